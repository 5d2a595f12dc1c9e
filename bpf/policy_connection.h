/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What is known of a subject's connection: one entry for both ways and both ends. It has the generation of each end's
 * verdict, and the devices at which packets have nothing done to them and so pass by the entry alone.
 */
#ifndef __EBPROXY_POLICY_CONNECTION_H
#define __EBPROXY_POLICY_CONNECTION_H

#include "policy_identify.h"

/* No device: packets of this way are known to have more done to them. */
#define POLICY_NOT_PLAIN 0xffffffff

static __always_inline u64 policy_half(const struct address *address, int half)
{
	return (u64)address->word[2 * half] << 32 | address->word[2 * half + 1];
}

/* Whether the greater end has sent a packet, in an order of our own: of ports, and of addresses where those are equal. */
static __always_inline bool policy_is_turned(const struct tuple *tuple)
{
	u64 source = tuple->source_port, destination = tuple->destination_port;

	if (source == destination) {
		source = policy_half(&tuple->source, 0);
		destination = policy_half(&tuple->destination, 0);
	}
	if (source == destination) {
		source = policy_half(&tuple->source, 1);
		destination = policy_half(&tuple->destination, 1);
	}
	return source > destination;
}

/**
 * policy_key_of - Give the key of a packet's connection.
 * @key: receives it: the tuple with the lesser end first
 * Returns whether the greater end has sent the packet.
 */
static __always_inline bool policy_key_of(const struct tuple *tuple, struct tuple *key)
{
	bool is_turned = policy_is_turned(tuple);

	*key = is_turned ? tuple_turned(tuple) : *tuple;
	return is_turned;
}

/*
 * Find who sent a packet to a pod in truth, where this node has translated it: whoever an answer to it would go to.
 * Returns whether somebody is found.
 */
static __always_inline bool policy_see_through(struct work *work, struct tuple *tuple)
{
	struct tuple back = tuple_turned(tuple);
	struct flow *flow = conntrack.lookup(&back);

	work->has_back = flow != NULL;
	if (!flow || conntrack_is_over(flow, tuple->protocol, conntrack_now(work)))
		return false;
	tuple->source = flow->destination;
	tuple->source_port = flow->destination_port;
	return true;
}

static __always_inline bool policy_is_stream(u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_SCTP;
}

/* Whether a packet can only be the first of its connection. */
static __always_inline bool policy_opens(const struct packet *packet)
{
	if (packet->kind == PACKET_ICMP_ECHO)
		return packet->reading == PARSE_FLOW;
	return opens_stream(packet);
}

static __always_inline bool policy_is_over(const struct connection *connection, u8 protocol, u32 now)
{
	struct flow state = { .seen = connection->seen, .flags = connection->flags };

	return conntrack_is_over(&state, policy_is_stream(protocol) ? IPPROTO_TCP : IPPROTO_UDP, now);
}

/* Have the next packets of a connection looked at in full, one of each way at each device. */
static __always_inline void policy_look_again(struct connection *connection)
{
	struct passage nowhere = {};

	connection->plain[0] = nowhere;
	connection->plain[1] = nowhere;
}

/* Where it is written that packets of one way are plain. */
static __always_inline u32 *policy_plain(struct connection *connection, bool turned, bool leaves)
{
	struct passage *passage = turned ? &connection->plain[1] : &connection->plain[0];

	return leaves ? &passage->from_pod : &passage->to_pod;
}

/* What a connection's state becomes by a packet. */
static __always_inline u32 policy_flags(u32 flags, const struct packet *packet, bool is_beginner)
{
	if ((packet->flags & (TCP_ACK | TCP_SYN | TCP_RST)) == TCP_ACK)
		flags &= ~FLOW_CLOSED; /* see conntrack_note() */
	if (packet->flags & TCP_RST)
		flags |= FLOW_CLOSED;
	if (!is_beginner)
		return flags | FLOW_REPLIED | (packet->flags & TCP_FIN ? FLOW_PEER_FIN : 0);
	if (flags & FLOW_REPLIED && packet->flags & TCP_ACK)
		flags |= FLOW_ESTABLISHED;
	return flags | (packet->flags & TCP_FIN ? FLOW_FIN : 0);
}

/* Note that a packet of a connection came by; in most there is nothing new. */
static __always_inline void policy_note(struct connection *connection, const struct packet *packet,
					bool is_beginner, u32 now)
{
	u32 flags = policy_flags(connection->flags, packet, is_beginner);

	if (connection->seen != now) {
		policy_look_again(connection);
		connection->seen = now;
	}
	if (connection->flags != flags)
		connection->flags = flags;
}

/* Whether a packet is of a kind that opens nothing, and of which a connection has many. */
static __always_inline bool policy_is_common(const struct packet *packet)
{
	return packet->kind == PACKET_WHOLE &&
	       (packet->flags & TCP_ACK || packet->tuple.protocol == IPPROTO_UDP);
}

/* Whether a packet, which opens nothing, may yet be the first of a service that is new: any datagram may. */
static __always_inline bool policy_may_be_served(const struct packet *packet)
{
	const struct tuple *tuple = &packet->tuple;
	struct endpoint asked = { .address = tuple->destination, .port = tuple->destination_port };

	return tuple->protocol == IPPROTO_UDP && lb_frontend(&asked, IPPROTO_UDP);
}

/**
 * policy_passes - Whether a packet may pass as it is, by what is written of its connection alone.
 * @leaves: whether it comes from a pod, rather than goes to one
 *
 * The verdict is that of the present generation, and in this second packets of this way were found to be plain at this
 * device. Where nothing is written the packet is looked at in full. So is what opens a connection, but where it enters a
 * pod and nothing else has come by yet: policy_admit_receiver() has looked at it.
 */
static __always_inline bool policy_passes(struct work *work, bool leaves)
{
	const struct packet *packet = &work->packet;
	struct policy_state *state = policy_state_now();
	bool opens = !leaves && packet->kind == PACKET_WHOLE && policy_opens(packet);
	u32 now = conntrack_now(work), generation;
	struct connection *found;
	struct tuple key;
	bool turned, began;

	if (!(opens || policy_is_common(packet)) || !state)
		return false;
	turned = policy_key_of(&packet->tuple, &key);
	found = connections.lookup(&key);
	if (!found || found->seen != now || *policy_plain(found, turned, leaves) != packet->ifindex)
		return false;
	began = !(found->flags & CONNECTION_TURNED) == !turned;
	if (opens && (!began || found->flags & ~CONNECTION_TURNED))
		return false;
	generation =
		began == leaves ? found->generation[DIRECTION_EGRESS] : found->generation[DIRECTION_INGRESS];
	if (generation != state->generation || (leaves && policy_may_be_served(packet)))
		return false;
	policy_note(found, packet, began, now);
	return true;
}

/* Whether no flow and no service is for a packet that goes to a pod: what find_flow() and decline() would find out. */
static __always_inline bool policy_is_plain(struct work *work)
{
	struct tuple *tuple = &work->packet.tuple;
	struct endpoint asked = { .address = tuple->destination, .port = tuple->destination_port };

	return work->packet.reading == PARSE_FLOW && !conntrack.lookup(tuple) &&
	       !lb_frontend(&asked, tuple->protocol) &&
	       (work->packet.flags & TCP_ACK || !lb_is_reserved(&tuple->destination));
}

#endif
