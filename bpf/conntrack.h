/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Following flows: a translated flow keeps its backend, and its replies find the way back.
 *
 * A flow is a pair of entries (see struct flow), each of which can rebuild the other: one that was evicted comes back
 * with the next packet of its pair. State is written at most once a second, or when it changes.
 */
#ifndef __EBPROXY_CONNTRACK_H
#define __EBPROXY_CONNTRACK_H

#include "maps.h"
#include "parse.h"

/* Source ports that are tried for a masqueraded flow before it is given up. */
#define SOURCE_PORT_TRIES   32

/* Seconds without a packet after which a TCP flow that is not established is over. */
#define CONNTRACK_OPENING_S 60

static u64 (*ktime_get_coarse_ns)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static u64 (*jiffies64)(void) = (void *)BPF_FUNC_jiffies64;

/* Tell the time, in seconds. The clock is looked at once a tick: a call and a division are much for one packet. */
static __always_inline u32 conntrack_now(struct work *work)
{
	u64 jiffies = jiffies64();

	if (work->jiffies != jiffies) {
		work->jiffies = jiffies;
		work->now = (u32)(ktime_get_coarse_ns() / 1000000000);
	}
	return work->now;
}

/* Seconds without a packet after which a flow is over that is neither reset nor ended both ways. */
static __always_inline u32 conntrack_timeout(const struct flow *flow, u8 protocol)
{
	if (protocol == IPPROTO_UDP)
		return flow->flags & FLOW_REPLIED ? UDP_STREAM_S : UDP_S;
	if (flow->flags & (FLOW_FIN | FLOW_PEER_FIN))
		return TCP_CLOSE_WAIT_S;
	return flow->flags & FLOW_ESTABLISHED ? TCP_ESTABLISHED_S : CONNTRACK_OPENING_S;
}

/* Whether nobody can mean this flow any more: its place may be taken. */
static __always_inline bool conntrack_is_over(const struct flow *flow, u8 protocol, u32 now)
{
	u32 ended = flow->flags & (FLOW_FIN | FLOW_PEER_FIN);

	if (flow->flags & FLOW_CLOSED || ended == (FLOW_FIN | FLOW_PEER_FIN))
		return true;
	return seconds_since(flow->seen, now) > conntrack_timeout(flow, protocol);
}

/* What packets of a flow's other way have for a tuple. */
static __always_inline struct tuple conntrack_pair(const struct flow *flow, u8 protocol)
{
	struct tuple pair = {
		.source = flow->destination,
		.destination = flow->source,
		.source_port = flow->destination_port,
		.destination_port = flow->source_port,
		.protocol = protocol,
	};

	return pair;
}

static __always_inline void conntrack_forget(const struct tuple *tuple, const struct flow *flow)
{
	struct tuple pair = conntrack_pair(flow, tuple->protocol);

	conntrack.delete(&pair);
	conntrack.delete((struct tuple *)tuple);
}

/* What a packet says of its flow's state, as flags of its own way; *pair receives those of the other way. */
static __always_inline u32 conntrack_flags(const struct packet *packet, const struct flow *flow, u32 *pair)
{
	u32 own = 0;

	if (flow->flags & FLOW_REPLY)
		own = FLOW_REPLIED;
	else if (flow->flags & FLOW_REPLIED && packet->flags & TCP_ACK)
		own = FLOW_ESTABLISHED;
	else if (flow->flags & FLOW_DSR && (packet->flags & TCP_ACK || packet->tuple.protocol == IPPROTO_UDP))
		own = FLOW_REPLIED; /* replies need not come this way, but the client has had one */
	if (packet->flags & TCP_RST)
		own |= FLOW_CLOSED;
	*pair = own;
	if (packet->flags & TCP_FIN) {
		own |= FLOW_FIN;
		*pair |= FLOW_PEER_FIN;
		if (flow->flags & FLOW_DSR)
			own |= FLOW_PEER_FIN; /* nor does the other end's */
	}
	return own;
}

/* Make a flow's other entry again out of this one. */
static __always_inline void conntrack_heal(const struct packet *packet, const struct flow *flow,
					   struct tuple *pair, u32 device, u32 now)
{
	u32 kept =
		FLOW_AT_EGRESS | FLOW_MASQUERADED | FLOW_DSR | FLOW_REPLIED | FLOW_ESTABLISHED | FLOW_CLOSED;
	struct flow healed = {
		.source = packet->tuple.destination,
		.destination = packet->tuple.source,
		.source_port = packet->tuple.destination_port,
		.destination_port = packet->tuple.source_port,
		.service = flow->service,
		.seen = now,
		.device = device,
		.flags = (flow->flags & kept) | (~flow->flags & FLOW_REPLY) |
			 (flow->flags & FLOW_FIN ? FLOW_PEER_FIN : 0) |
			 (flow->flags & FLOW_PEER_FIN ? FLOW_FIN : 0),
	};

	conntrack.insert(pair, &healed);
}

/**
 * conntrack_note - Note that a packet of a flow came by.
 * @device: where the other way leaves if it has to be made again
 * Returns whether this is the first packet of its second: time to look whether routes are still the same.
 */
static __always_inline bool conntrack_note(struct work *work, struct flow *flow, u32 device)
{
	const struct packet *packet = &work->packet;
	struct tuple pair_key;
	struct flow *pair;
	u32 pair_flags;
	u32 own = conntrack_flags(packet, flow, &pair_flags);
	u32 now = conntrack_now(work);
	/* Whoever goes on after a RST did not send it, or it came to nothing: an end that is closed would send another. */
	u32 lost = (packet->flags & (TCP_ACK | TCP_SYN | TCP_RST)) == TCP_ACK ? FLOW_CLOSED : 0;
	bool is_later = flow->seen != now;

	if (packet->kind == PACKET_ICMP_ERROR || packet->kind == PACKET_LATER_FRAGMENT)
		return false;
	if (!is_later && !(own & ~flow->flags) && !(lost & flow->flags))
		return false;
	flow->seen = now;
	flow->flags = (flow->flags & ~lost) | own;
	pair_key = conntrack_pair(flow, packet->tuple.protocol);
	if ((flow->flags & (FLOW_DSR | FLOW_REPLY)) == (FLOW_DSR | FLOW_REPLY)) {
		/* Another node has translated it: what the client asked for is not what its packets have here. */
		pair_key.destination = packet->tuple.source;
		pair_key.destination_port = packet->tuple.source_port;
	}
	pair = conntrack.lookup(&pair_key);
	if (pair) {
		pair->seen = now;
		pair->flags = (pair->flags & ~lost) | pair_flags;
	} else {
		conntrack_heal(packet, flow, &pair_key, device, now);
	}
	return is_later;
}

/* Whether the entry that stands in the way of a new flow's replies may be overwritten: it is over, or the client's own. */
static __always_inline bool conntrack_may_take(struct tuple *key, const struct flow *reply, u32 now)
{
	struct flow *there = conntrack.lookup(key);

	if (!there)
		return true;
	if (address_equal(&there->destination, &reply->destination) &&
	    there->destination_port == reply->destination_port && there->source_port == reply->source_port &&
	    address_equal(&there->source, &reply->source))
		return true;
	return conntrack_is_over(there, key->protocol, now);
}

/* Take a tuple for the replies of a new flow. */
static __always_inline bool conntrack_take(struct tuple *key, struct flow *reply, u32 now)
{
	if (!conntrack.insert(key, reply))
		return true;
	return conntrack_may_take(key, reply, now) && !conntrack.update(key, reply);
}

/**
 * conntrack_begin - Enter a new flow.
 * @asked: the tuple of its first packet
 * @forward: what becomes of the client's packets; its source port changes where another flow has it already
 * @reply: what becomes of the backend's
 * @any_port: whether the source port is ours to choose from the start
 * Returns 0, or which counter says why not.
 */
static __always_inline u32 conntrack_begin(struct tuple *asked, struct flow *forward, struct flow *reply,
					   bool any_port)
{
	struct tuple key = conntrack_pair(forward, asked->protocol);
	u32 seed = bpf_get_prandom_u32();
	u32 now = forward->seen;
	int i;

	if (any_port || !conntrack_take(&key, reply, now)) {
#pragma clang loop unroll(disable)
		for (i = 0; i < SOURCE_PORT_TRIES; i++) {
			key.destination_port =
				bpf_htons(SOURCE_NAT_FIRST + seed % (SOURCE_NAT_LAST - SOURCE_NAT_FIRST + 1));
			if (conntrack_take(&key, reply, now))
				break;
			seed = seed * 1664525 + 1013904223; /* Numerical Recipes' generator */
		}
		if (i == SOURCE_PORT_TRIES)
			return COUNTER_SOURCE_NAT_EXHAUSTED;
		forward->source_port = key.destination_port;
	}
	if (conntrack.update(asked, forward)) {
		conntrack.delete(&key);
		return COUNTER_CONNTRACK_FULL;
	}
	return 0;
}

#endif
