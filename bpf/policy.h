/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Policy: what a pod of this node may do with whom, decided at its own device, in both ways.
 *
 *	pod -> [from pod: translation, policy] -> stack -> [to pod: policy, translation] -> pod
 *
 * so that policy always sees the true ends of a connection, client and backend. A connection is judged when it begins,
 * once for each end that is a subject: the one that began it by its egress, the other by its ingress; for both at the
 * first one's device, if both are pods of this node and nothing is translated. Its packets pass either way for as long as
 * the generation stays the same; then it is judged again.
 */
#ifndef __EBPROXY_POLICY_H
#define __EBPROXY_POLICY_H

#include "policy_connection.h"

/*
 * How long after the agent's first start packets may belong to what is older, seconds: datagrams to a conversation, those
 * of a stream to a connection, of which more are silent for long.
 */
#define POLICY_YOUNG_S        120
#define POLICY_YOUNG_STREAM_S 600

/* Clients' ports begin about here, and servers' are mostly below. */
#define POLICY_CLIENT_PORTS   32768

/* Of the first byte of a link address. */
#define ETH_GROUP             0x01

static __always_inline u32 policy_peer(const struct address *address)
{
	struct address_range range = { .prefix_bits = 128, .address = *address };
	u32 *identity = identities.lookup(&range.address);

	if (!identity)
		identity = blocks.lookup(&range);
	return identity ? *identity : PEER_WORLD;
}

/* Answer by the maps of policy. */
static __always_inline void policy_look_up(const struct question *question, struct flow_event *event)
{
	struct policy_key key = {
		.prefix_bits = POLICY_PORT_BITS,
		.subject = question->subject,
		.peer = policy_peer(&question->peer),
		.direction = question->direction,
		.protocol = question->protocol,
		.port = question->port,
	};
	struct policy_entry *entry = policy.lookup(&key);

	event->peer = key.peer;
	if (!entry) {
		key.peer = PEER_ANY;
		entry = policy.lookup(&key);
	}
	event->rule = entry ? entry->rule : 0;
	event->allowed = entry ? entry->allowed : 0;
}

/* Where the answer to a question is kept. */
static __always_inline struct verdict *policy_kept(const struct question *question)
{
	const u32 *word = (const u32 *)question;
	u64 hash = 0;
	u32 slot;
	int i;

#pragma unroll
	for (i = 0; i < sizeof(*question) / sizeof(*word); i++)
		hash = (hash ^ word[i]) * 0x9e3779b97f4a7c15ULL;
	slot = (hash ^ hash >> 32) * 0x9e3779b97f4a7c15ULL >> (64 - VERDICT_BITS);
	return verdicts.lookup(&slot);
}

static __always_inline bool policy_is_same(const struct question *a, const struct question *b)
{
	return a->subject == b->subject && address_equal(&a->peer, &b->peer) &&
	       a->direction == b->direction && a->protocol == b->protocol && a->port == b->port;
}

/*
 * Answer a question, as it was answered before if the generation is the same. While that is odd the maps are being
 * written, and no answer is kept.
 */
static __always_inline void policy_ask(const struct work *work, struct flow_event *event,
				       const struct address *peer, u8 direction, __be16 port)
{
	struct question question = {
		.subject = event->subject,
		.peer = *peer,
		.direction = direction,
		.protocol = event->tuple.protocol,
		.port = port,
	};
	struct verdict *kept = policy_kept(&question);

	if (unlikely(!kept || work->generation & 1)) {
		policy_look_up(&question, event);
		return;
	}
	if (unlikely(kept->generation != work->generation) || !policy_is_same(&kept->question, &question)) {
		policy_look_up(&question, event);
		kept->question = question;
		kept->generation = work->generation;
		kept->peer = event->peer;
		kept->rule = event->rule;
		kept->allowed = event->allowed;
		return;
	}
	event->peer = kept->peer;
	event->rule = kept->rule;
	event->allowed = kept->allowed;
}

/**
 * policy_judge - Take the verdict on a connection, for the one of its ends that is the subject in @work.
 * @event: what is told of it
 * @leaves: whether the subject has sent the packet
 * @began: whether the packet's sender began the connection
 * Returns whether it is allowed; the event has the rest, the peer's identity only where it was asked about.
 */
static __always_inline bool policy_judge(const struct work *work, struct flow_event *event, bool leaves,
					 bool began)
{
	struct address *peer = leaves ? &event->tuple.destination : &event->tuple.source;
	struct address *own = leaves ? &event->tuple.source : &event->tuple.destination;
	u8 direction = began == leaves ? DIRECTION_EGRESS : DIRECTION_INGRESS;
	u32 flags = work->subject.flags;

	event->direction = direction;
	event->reason = REASON_POLICY;
	event->rule = 0;
	event->allowed = 1;
	if (!(flags & (1 << direction)))
		return true;
	if (unlikely(flags & (SUBJECT_FAIL_CLOSED | SUBJECT_FAIL_OPEN))) {
		event->peer = policy_peer(peer);
		event->reason = REASON_OVERFLOW;
		event->allowed = !(flags & SUBJECT_FAIL_CLOSED);
	} else {
		policy_ask(work, event, peer, direction,
			   began ? event->tuple.destination_port : event->tuple.source_port);
	}
	if (event->allowed)
		return true;
	/* What policy is not to be asked about: itself, and its node. */
	if (!address_equal(peer, own) && !(direction == DIRECTION_INGRESS && route_is_own(peer)))
		return false;
	event->reason = REASON_POLICY;
	event->rule = 0;
	event->allowed = 1;
	return true;
}

/* What is known of a packet's connection, and what is guessed. */
struct policy_case {
	struct tuple key;
	bool turned;      /* the greater end has sent the packet */
	bool began;       /* its sender began the connection */
	bool either;      /* so may the other end have */
	bool is_own;      /* key is that of the packet as it came, not as it is translated */
	bool is_received; /* it leaves a pod for another of this node, which was judged for as well */
};

/*
 * Guess who began a connection in whose midst a packet comes: the end whose port is not a server's. It is older than
 * what is known of connections. Only at first are there such: ports are the sender's to choose, and it would be guessed
 * what suits it.
 */
static __always_inline void policy_guess(const struct tuple *tuple, struct policy_case *known)
{
	u16 from = bpf_ntohs(tuple->source_port), to = bpf_ntohs(tuple->destination_port);

	known->began = from >= to;
	known->either = (from >= POLICY_CLIENT_PORTS) == (to >= POLICY_CLIENT_PORTS);
}

/* Tell one in so many of the connections that are allowed. */
static __always_inline void policy_sample(struct flow_event *event, u32 one_in, bool leaves)
{
	events_count(event);
	if (!one_in || bpf_get_prandom_u32() % one_in)
		return;
	if (!event->peer)
		event->peer = policy_peer(leaves ? &event->tuple.destination : &event->tuple.source);
	events_tell(event);
}

/* Judge an ICMP error that is about no connection that is known. */
static __always_inline bool policy_admit_error(struct __sk_buff *skb, struct work *work, bool leaves)
{
	policy_describe(work, &work->event);
	policy_read_error(skb, &work->packet, &work->event.tuple);
	return policy_judge(work, &work->event, leaves, true) ||
	       policy_drop(&work->event, work->event.reason);
}

/* Forget a connection that has the ends a service's client asks for, not those it gets: packets would be taken for it. */
static __always_inline void policy_forget_asked(const struct work *work)
{
	struct tuple key;

	policy_key_of(&work->packet.tuple, &key);
	connections.delete(&key);
}

/*
 * Write down where the answers to a packet that opens a connection are plain, so that not even the first is looked at: no
 * flow is for them, and no service, as they go to where the packet has come from.
 */
static __always_inline void policy_foresee(struct work *work, struct connection *connection,
					   const struct policy_case *known, bool leaves)
{
	bool is_placed = leaves || !ANTI_SPOOFING || work->subject.device == work->packet.ifindex;
	/* What the node itself asks may be a service's a moment later, and is translated back at the pod's device then. */
	bool is_nodes = !leaves && route_is_own(&work->packet.tuple.source);
	u32 *plain = policy_plain(connection, !known->turned, !leaves);

	*plain = 0;
	if (work->is_plain && is_placed && !is_nodes && !work->has_back)
		*plain = work->packet.ifindex;
}

/*
 * Write down whether packets like this one are plain at this device, if it is not written yet. When a connection opens,
 * or packets of it begin to be translated, what was written of it need not be so any longer.
 */
static __always_inline void policy_learn(struct __sk_buff *skb, struct work *work,
					 struct connection *connection, const struct policy_case *known,
					 bool leaves)
{
	u32 *plain = policy_plain(connection, known->turned, leaves), ifindex = work->packet.ifindex;
	bool opens = policy_opens(&work->packet);

	if (leaves && !known->is_own && !(work->flow.flags & FLOW_REPLIED)) {
		*policy_plain(connection, !known->turned, true) = 0;
		*policy_plain(connection, !known->turned, false) = 0;
	}
	if (!known->is_own || work->packet.kind != PACKET_WHOLE ||
	    (!opens && (*plain == ifindex || *plain == POLICY_NOT_PLAIN)))
		return;
	if (!leaves)
		work->is_plain = !skb->vlan_present && policy_is_plain(work);
	else if (!opens && route_is_own(&work->packet.tuple.destination))
		work->is_plain = 0; /* see policy_foresee() */
	*plain = work->is_plain ? ifindex : POLICY_NOT_PLAIN;
	if (opens)
		policy_foresee(work, connection, known, leaves);
}

/*
 * Judge a packet that opens a stream for the pod of this node that it goes to, too, and write down that it passes at that
 * one's device, if neither it nor its answers are translated. Where it may not enter, that device says so. Returns whether
 * it may; then the event of that is the one that is received.
 */
static __always_inline bool policy_admit_receiver(struct work *work, struct connection *connection,
						  const struct policy_case *known)
{
	struct flow_event *event = &work->received;
	struct packet *packet = &work->packet;
	struct subject *receiver;

	/* What is over with its first packet is judged again with it at the receiver's. */
	if (work->has_back || packet->flags & TCP_RST)
		return false;
	receiver = subjects.lookup(&packet->tuple.destination);
	if (!receiver || !receiver->device || receiver->device == packet->ifindex)
		return false;
	work->subject = *receiver;
	event->tuple = packet->tuple;
	policy_describe(work, event);
	event->device = receiver->device;
	if (!policy_judge(work, event, false, true))
		return false;
	connection->generation[DIRECTION_INGRESS] = work->generation;
	*policy_plain(connection, known->turned, false) = event->device;
	*policy_plain(connection, !known->turned, true) = event->device;
	return true;
}

/* Enter a connection that was allowed, with one end's verdict, or those of both. */
static __always_inline bool policy_begin(struct __sk_buff *skb, struct work *work, struct policy_case *known,
					 u32 now, bool leaves)
{
	bool is_egress = work->event.direction == DIRECTION_EGRESS;
	u32 generation = work->generation;
	u32 turned = known->began == known->turned ? CONNECTION_TURNED : 0;
	struct connection fresh = {
		.seen = now,
		.flags = policy_flags(turned, &work->packet, known->began),
		.generation = { is_egress ? 0 : generation, is_egress ? generation : 0 },
	};

	policy_learn(skb, work, &fresh, known, leaves);
	known->is_received = leaves && policy_admit_receiver(work, &fresh, known);
	return !connections.update(&known->key, &fresh);
}

/* Find the connection of a packet, behind its translation. */
static __always_inline struct connection *policy_find(struct work *work, struct policy_case *known,
						      bool leaves)
{
	struct tuple *tuple = &work->event.tuple;
	struct connection *found;

	*tuple = work->packet.tuple;
	known->is_own = !leaves || !work->has_flow;
	if (!known->is_own) {
		tuple->destination = work->flow.destination;
		tuple->destination_port = work->flow.destination_port;
	}
	known->turned = policy_key_of(tuple, &known->key);
	found = connections.lookup(&known->key);
	if (leaves || (found && !policy_opens(&work->packet)) || !policy_see_through(work, tuple))
		return found;
	known->is_own = false;
	known->turned = policy_key_of(tuple, &known->key);
	return connections.lookup(&known->key);
}

/* Whether a packet may belong to a connection that is older than what is known of connections. */
static __always_inline bool policy_may_be_older(const struct work *work, u32 now)
{
	u32 since = work->subject.since;
	u32 young = policy_is_stream(work->packet.tuple.protocol) ? POLICY_YOUNG_STREAM_S : POLICY_YOUNG_S;

	return since && seconds_since(since, now) < young;
}

/* Whether a packet begins another connection than the one that is known; else, who began that. */
static __always_inline bool policy_begins(struct work *work, const struct connection *found,
					  struct policy_case *known, u32 now)
{
	bool opens = policy_opens(&work->packet), is_over;
	u8 protocol = work->packet.tuple.protocol;

	known->began = true;
	known->either = false;
	if (found) {
		is_over = policy_is_over(found, protocol, now);
		known->began = !(found->flags & CONNECTION_TURNED) == !known->turned;
		/* The last packets of a stream come when it is over: they begin nothing. */
		if (!(opens ? is_over || !known->began : is_over && !policy_is_stream(protocol)))
			return false;
		known->began = true;
	} else if (!opens && policy_may_be_older(work, now)) {
		policy_guess(&work->event.tuple, known);
	}
	return true;
}

/* Whether a packet goes to everybody on the link who listens: multicast and broadcast. */
static __always_inline bool policy_is_for_many(struct __sk_buff *skb)
{
	u8 first = 0;

	return !bpf_skb_load_bytes(skb, 0, &first, sizeof(first)) && first & ETH_GROUP;
}

/* Judge what goes to many, for one of them: its tuple is that of all receivers, so nothing is kept of it. */
static __always_inline bool policy_admit_for_many(struct work *work)
{
	work->event.tuple = work->packet.tuple;
	policy_describe(work, &work->event);
	return policy_judge(work, &work->event, false, true) || policy_drop(&work->event, work->event.reason);
}

/**
 * policy_admit - Decide whether a packet of a subject, or for one, may pass.
 * @leaves: whether it comes from the pod; then @work has the flow that it is translated by
 */
static __always_inline bool policy_admit(struct __sk_buff *skb, struct work *work, bool leaves)
{
	const struct packet *packet = &work->packet;
	struct flow_event *event = &work->event;
	struct policy_state read;
	const struct policy_state *state = policy_state_read(&read);
	struct policy_case known;
	struct connection *found;
	u32 now, *generation = NULL;
	bool begins, is_first;

	if (!state)
		return false;
	work->generation = state->generation;
	if (unlikely(packet->reading == PARSE_STRAY))
		return policy_admit_error(skb, work, leaves);
	if (!leaves && unlikely(policy_is_for_many(skb)))
		return policy_admit_for_many(work);
	now = conntrack_now(work);
	known.is_received = false;
	found = policy_find(work, &known, leaves);
	begins = policy_begins(work, found, &known, now);
	if (!begins && found) {
		generation = known.began == leaves ? &found->generation[DIRECTION_EGRESS]
						   : &found->generation[DIRECTION_INGRESS];
		if (*generation && *generation == state->generation) {
			if (packet->kind != PACKET_ICMP_ERROR && packet->kind != PACKET_LATER_FRAGMENT)
				policy_note(found, packet, known.began, now);
			policy_learn(skb, work, found, &known, leaves);
			return true;
		}
	}
	/* What is about a connection that was allowed is judged as its packets are, once the generation has moved. */
	if (unlikely(packet->kind == PACKET_ICMP_ERROR) && (!generation || !*generation))
		return policy_admit_error(skb, work, leaves);
	policy_describe(work, &work->event);
	if (unlikely(!policy_judge(work, event, leaves, known.began))) {
		known.began = !known.began;
		if (!known.either || !policy_judge(work, event, leaves, known.began))
			return policy_drop(event, event->reason);
	}
	is_first = begins || !generation || !*generation;
	if (begins) {
		if (leaves && work->has_flow)
			policy_forget_asked(work);
		if (!policy_begin(skb, work, &known, now, leaves))
			return policy_drop(event, REASON_UNTRACKED);
	} else if (generation && packet->kind != PACKET_ICMP_ERROR) {
		*generation = state->generation;
		policy_note(found, packet, known.began, now);
		policy_learn(skb, work, found, &known, leaves);
	}
	if (is_first)
		policy_sample(event, state->sample, leaves);
	if (known.is_received)
		policy_sample(&work->received, state->sample, false);
	return true;
}

#endif
