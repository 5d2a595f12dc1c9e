/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Policy: what a pod of this node may do with whom, decided at its own device, in both ways.
 *
 *	pod -> [from pod: translation, policy] -> stack -> [to pod: policy, translation] -> pod
 *
 * so that policy always sees the true ends of a connection, client and backend. A connection is judged when it begins,
 * once for each end that is a subject: the one that began it by its egress, the other by its ingress. Its packets pass
 * either way for as long as the generation stays the same; then it is judged again.
 */
#ifndef __EBPROXY_POLICY_H
#define __EBPROXY_POLICY_H

#include "conntrack.h"
#include "route.h"
#include "events.h"

/*
 * How long after the agent's first start packets may belong to what is older, seconds: datagrams to a conversation, those
 * of a stream to a connection, of which more are silent for long.
 */
#define POLICY_YOUNG_S          120
#define POLICY_YOUNG_STREAM_S   600

/* Clients' ports begin about here, and servers' are mostly below. */
#define POLICY_CLIENT_PORTS     32768

/* No device: packets of this way are known to have more done to them. */
#define POLICY_NOT_PLAIN        0xffffffff

/* Of the first byte of a link address. */
#define ETH_GROUP               0x01

#define IPV6_LINK_LOCAL         0xfe800000u
#define IPV6_LINK_LOCAL_MASK    0xffc00000u

/* ICMPv6 that links live by: multicast listeners, routers, neighbours (RFC 2710, RFC 4861), listeners again (RFC 3810). */
#define ICMPV6_LISTENER_QUERY   130
#define ICMPV6_LISTENER_DONE    132
#define ICMPV6_ROUTER_ADVERT    134
#define ICMPV6_REDIRECT         137
#define ICMPV6_LISTENER_REPORTS 143
/* What it is sent with, so that it comes from its link and stays there. */
#define LISTENER_HOP_LIMIT      1
#define NEIGHBOUR_HOP_LIMIT     255

#define ETH_P_ARP               0x0806
#define ETH_P_8021Q             0x8100
#define ETH_P_8021AD            0x88a8

static __always_inline struct policy_state *policy_state_now(void)
{
	u32 only = 0;

	return policy_states.lookup(&only);
}

static __always_inline bool policy_is_link_local(const struct address *address)
{
	return (address->word[0] & bpf_htonl(IPV6_LINK_LOCAL_MASK)) == bpf_htonl(IPV6_LINK_LOCAL);
}

/*
 * Read the state of policy as it is before anything else is: a verdict is that of the generation that was in force when it
 * was begun with, however long it took.
 */
static __always_inline const struct policy_state *policy_state_read(struct policy_state *read)
{
	const volatile struct policy_state *state = policy_state_now();

	if (!state)
		return NULL;
	read->generation = state->generation;
	read->sample = state->sample;
	return read;
}

static __always_inline u32 policy_strictness(void)
{
	struct policy_state *state = policy_state_now();

	return state ? state->is_strict : 0;
}

/* The type of an ICMPv6 message; 0 = it cannot be read. */
static __always_inline u8 policy_icmp_type(struct __sk_buff *skb, const struct packet *packet)
{
	u8 type = 0;

	return bpf_skb_load_bytes(skb, packet->l4, &type, sizeof(type)) ? 0 : type;
}

/* Whether a packet is what a link cannot do without. What has come from beyond the link only looks like that. */
static __always_inline bool policy_is_discovery(struct __sk_buff *skb, const struct packet *packet)
{
	u8 type;

	if (!packet->is_ipv6 || packet->reading != PARSE_OTHER || packet->kind != PACKET_ICMP_ECHO)
		return false;
	type = policy_icmp_type(skb, packet);
	if (type == ICMPV6_LISTENER_REPORTS ||
	    (type >= ICMPV6_LISTENER_QUERY && type <= ICMPV6_LISTENER_DONE))
		return packet->ttl == LISTENER_HOP_LIMIT;
	return type > ICMPV6_LISTENER_DONE && type <= ICMPV6_REDIRECT && packet->ttl == NEIGHBOUR_HOP_LIMIT;
}

/* Read the addresses of an ICMP error itself: its tuple has those of what it is about. */
static __always_inline bool policy_read_error(struct __sk_buff *skb, const struct packet *packet,
					      struct tuple *tuple)
{
	__be32 ipv4[2];

	tuple->source_port = 0;
	tuple->destination_port = 0;
	if (packet->is_ipv6) {
		tuple->protocol = IPPROTO_ICMPV6;
		return !bpf_skb_load_bytes(skb, ETH_SIZE + offsetof(struct ipv6_header, source), tuple,
					   2 * sizeof(struct address));
	}
	tuple->protocol = IPPROTO_ICMP;
	if (bpf_skb_load_bytes(skb, ETH_SIZE + offsetof(struct ipv4_header, source), ipv4, sizeof(ipv4)))
		return false;
	tuple->source = address_from_ipv4(ipv4[0]);
	tuple->destination = address_from_ipv4(ipv4[1]);
	return true;
}

static __always_inline bool policy_is_error(const struct packet *packet)
{
	return packet->kind == PACKET_ICMP_ERROR || packet->reading == PARSE_STRAY;
}

/* Write down whose packet it is of which something is to be told, but for its ends. */
static __always_inline void policy_describe(struct work *work)
{
	struct flow_event *event = &work->event;

	event->subject = work->subject.identity;
	event->peer = 0;
	event->rule = 0;
	event->device = work->packet.ifindex;
	event->flags = work->packet.flags;
	event->pad = 0;
}

/* Drop a packet for a reason: count and tell it. */
static __always_inline bool policy_drop(struct flow_event *event, enum verdict_reason reason)
{
	event->reason = reason;
	event->allowed = 0;
	events_count(event);
	events_tell(event);
	return false;
}

/* Drop a packet for what it is, before anything is asked. */
static __always_inline bool policy_turn_away(struct work *work, bool leaves, enum verdict_reason reason)
{
	if (!policy_is_error(&work->packet))
		work->event.tuple = work->packet.tuple;
	policy_describe(work);
	work->event.direction = leaves ? DIRECTION_EGRESS : DIRECTION_INGRESS;
	return policy_drop(&work->event, reason);
}

/* Find the subject behind a device, for what has no address of a pod: link-local, multicast, unreadable. */
static __always_inline struct subject *policy_behind(struct pod_device *pod, bool is_ipv6)
{
	struct subject *found = subjects.lookup(is_ipv6 ? &pod->ipv6 : &pod->ipv4);

	return found ? found : subjects.lookup(is_ipv6 ? &pod->ipv4 : &pod->ipv6);
}

static __always_inline bool policy_is_nobody(const struct address *address)
{
	return !(address->word[0] | address->word[1] | address->word[2] | address->word[3]);
}

/* Whether an IPv6 address is one that no router sends anything on to: link-local, or a multicast group's. */
static __always_inline bool policy_is_near(const struct address *address)
{
	return policy_is_link_local(address) ||
	       (address->word[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

/**
 * policy_is_anothers - Whether a source is not the pod's behind a device, or is known to be elsewhere.
 * @pod: who is behind it, if that is known
 * @found: whose the source is, if it is a subject's that does not say that it is behind this device
 */
static __always_inline bool policy_is_anothers(const struct address *source, bool is_ipv6,
					       const struct pod_device *pod, const struct subject *found)
{
	if (pod)
		return !address_equal(source, is_ipv6 ? &pod->ipv6 : &pod->ipv4);
	return found ? found->device : route_is_own(source);
}

/* Whether a pod's packet has a source that is not the pod's. Its link-local address nobody but the pod knows. */
static __always_inline bool policy_is_spoofed(const struct packet *packet, const struct tuple *tuple,
					      const struct pod_device *pod, const struct subject *found)
{
	/* Not even its IP header could be read. */
	if (packet->reading == PARSE_UNREADABLE && policy_is_nobody(&tuple->destination))
		return false;
	if (packet->is_ipv6 && policy_is_link_local(&tuple->source))
		return !policy_is_near(&tuple->destination);
	return policy_is_anothers(&tuple->source, packet->is_ipv6, pod, found);
}

/* Whether a packet is on its way to a gateway, beyond which nobody takes it for what its link lives by. */
static __always_inline bool policy_is_routed(struct __sk_buff *skb, const struct tuple *tuple)
{
	struct bpf_fib_lookup route = { .family = AF_INET6, .ifindex = LOOPBACK };
	struct address *next = (struct address *)route.ipv6_dst;

	if (policy_is_near(&tuple->destination))
		return false;
	__builtin_memcpy(route.ipv6_src, &tuple->source, sizeof(tuple->source));
	__builtin_memcpy(route.ipv6_dst, &tuple->destination, sizeof(tuple->destination));
	/* What there is no way for goes nowhere; the next hop stands where the destination did. */
	bpf_fib_lookup(skb, &route, sizeof(route), 0);
	return !address_equal(next, &tuple->destination);
}

/* Whether a pod says of its link what is not for it to say, or not in its own name. */
static __always_inline bool policy_misleads(struct __sk_buff *skb, const struct packet *packet)
{
	const struct address *source = &packet->tuple.source;
	u8 type = policy_icmp_type(skb, packet);
	u32 ifindex = packet->ifindex;
	struct subject *found;

	if (type == ICMPV6_ROUTER_ADVERT || type == ICMPV6_REDIRECT || policy_is_routed(skb, &packet->tuple))
		return true;
	if (policy_is_nobody(source) || policy_is_link_local(source))
		return false;
	found = subjects.lookup((struct address *)source);
	return !(found && found->device == ifindex) &&
	       policy_is_anothers(source, true, pod_devices.lookup(&ifindex), found);
}

/* Whether somebody behind the device may take a packet for IP that is not IP here: one more tag is before it. */
static __always_inline bool policy_is_tagged(struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_8021Q) || skb->protocol == bpf_htons(ETH_P_8021AD);
}

/**
 * policy_admit_link - Decide whether what no policy is about may pass: discovery, and what is no IP.
 * @leaves: whether it comes from a pod
 */
static __always_inline bool policy_admit_link(struct __sk_buff *skb, struct work *work, bool leaves)
{
	struct packet *packet = &work->packet;
	u32 ifindex = packet->ifindex;

	work->subject.identity = 0;
	if (packet->reading != PARSE_FOREIGN)
		return !ANTI_SPOOFING || !leaves || !policy_misleads(skb, packet) ||
		       policy_turn_away(work, leaves, REASON_SPOOFED);
	if (policy_is_tagged(skb))
		return policy_turn_away(work, leaves, REASON_UNREADABLE);
	return skb->protocol == bpf_htons(ETH_P_ARP) || policy_strictness() != POLICY_STRICT ||
	       pod_devices.lookup(&ifindex) || policy_turn_away(work, leaves, REASON_HELD);
}

/*
 * Whether an ICMP error is for whoever sent the packet that it quotes, and comes from that one's receiver, if from a pod.
 * Else it may quote what it likes. Translation gives errors and what they quote the same ends.
 */
static __always_inline bool policy_is_related(const struct packet *packet, const struct tuple *error,
					      bool leaves)
{
	return address_equal(&error->destination, &packet->tuple.destination) &&
	       (!leaves || address_equal(&error->source, &packet->tuple.source));
}

/**
 * policy_identify - Find whose packet this is to policy, before anything is done with it.
 * @leaves: whether it comes from a pod, rather than goes to one
 * Returns false when the packet is dropped for what it is. Where nobody is to be asked about, the identity in @work is 0.
 */
static __always_inline bool policy_identify(struct __sk_buff *skb, struct work *work, bool leaves)
{
	struct packet *packet = &work->packet;
	struct tuple *tuple = &packet->tuple;
	u32 ifindex = packet->ifindex;
	struct pod_device *pod = NULL;
	struct address *own;
	struct subject *found;
	u32 strictness;
	bool is_placed;

	work->subject.identity = 0;
	if (packet->reading == PARSE_MAPPED)
		return policy_turn_away(work, leaves, leaves ? REASON_SPOOFED : REASON_UNREADABLE);
	if (policy_is_error(packet)) {
		tuple = &work->event.tuple;
		policy_read_error(skb, packet, tuple);
		if (!policy_is_related(packet, tuple, leaves))
			packet->reading = PARSE_STRAY;
	}
	own = leaves ? &tuple->source : &tuple->destination;
	found = subjects.lookup(own);
	/* Most packets come from a subject that says itself that it is behind this device. */
	is_placed = found && found->device == ifindex;
	if (!is_placed)
		pod = pod_devices.lookup(&ifindex);
	if (ANTI_SPOOFING && leaves && !is_placed && policy_is_spoofed(packet, tuple, pod, found))
		return policy_turn_away(work, leaves, REASON_SPOOFED);
	if (!found && pod)
		found = policy_behind(pod, packet->is_ipv6);
	if (!found || (!is_placed && !pod)) {
		strictness = policy_strictness();
		if (strictness == POLICY_STRICT || (strictness && !found))
			return policy_turn_away(work, leaves, REASON_HELD);
	}
	if (!found)
		return true;
	if (packet->reading != PARSE_UNREADABLE) {
		work->subject = *found;
	} else if (found->flags & (leaves ? SUBJECT_EGRESS : SUBJECT_INGRESS)) {
		work->subject = *found;
		return policy_turn_away(work, leaves, REASON_UNREADABLE);
	}
	return true;
}

/* An address as two numbers, which compare as its bytes do. */
static __always_inline u64 policy_half(const struct address *address, int half)
{
	return (u64)bpf_ntohl(address->word[2 * half]) << 32 | bpf_ntohl(address->word[2 * half + 1]);
}

/**
 * policy_key_of - Give the key of a packet's connection.
 * @key: receives it: the tuple with the lesser end first
 * Returns whether the greater end has sent the packet.
 */
static __always_inline bool policy_key_of(const struct tuple *tuple, struct tuple *key)
{
	u64 source = policy_half(&tuple->source, 0), destination = policy_half(&tuple->destination, 0);
	u16 from = bpf_ntohs(tuple->source_port), to = bpf_ntohs(tuple->destination_port);

	*key = *tuple;
	if (source == destination) {
		source = policy_half(&tuple->source, 1);
		destination = policy_half(&tuple->destination, 1);
	}
	if (source < destination || (source == destination && from <= to))
		return false;
	key->source = tuple->destination;
	key->destination = tuple->source;
	key->source_port = tuple->destination_port;
	key->destination_port = tuple->source_port;
	return true;
}

/*
 * Find who sent a packet to a pod in truth, where this node has translated it: whoever an answer to it would go to.
 * Returns whether somebody is found.
 */
static __always_inline bool policy_see_through(struct work *work, struct tuple *tuple)
{
	struct tuple back = {
		.source = tuple->destination,
		.destination = tuple->source,
		.source_port = tuple->destination_port,
		.destination_port = tuple->source_port,
		.protocol = tuple->protocol,
	};
	struct flow *flow = conntrack.lookup(&back);

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
	return (packet->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
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
 * device. Where nothing is written the packet is looked at in full.
 */
static __always_inline bool policy_passes(struct work *work, bool leaves)
{
	const struct packet *packet = &work->packet;
	struct policy_state *state = policy_state_now();
	u32 now = conntrack_now(work), generation;
	struct connection *found;
	struct tuple key;
	bool turned, began;

	if (!policy_is_common(packet) || !state)
		return false;
	turned = policy_key_of(&packet->tuple, &key);
	found = connections.lookup(&key);
	if (!found || found->seen != now || *policy_plain(found, turned, leaves) != packet->ifindex)
		return false;
	began = !(found->flags & CONNECTION_TURNED) == !turned;
	generation =
		began == leaves ? found->generation[DIRECTION_EGRESS] : found->generation[DIRECTION_INGRESS];
	if (generation != state->generation || (leaves && policy_may_be_served(packet)))
		return false;
	policy_note(found, packet, began, now);
	return true;
}

static __always_inline u32 policy_peer(const struct address *address)
{
	struct address_range range = { .prefix_bits = 128, .address = *address };
	u32 *identity = identities.lookup(&range.address);

	if (!identity)
		identity = blocks.lookup(&range);
	return identity ? *identity : PEER_WORLD;
}

static __always_inline void policy_ask(struct flow_event *event, u8 direction, __be16 port)
{
	struct policy_key key = {
		.prefix_bits = POLICY_PORT_BITS,
		.subject = event->subject,
		.peer = event->peer,
		.direction = direction,
		.protocol = event->tuple.protocol,
		.port = port,
	};
	struct policy_entry *entry = policy.lookup(&key);

	if (!entry) {
		key.peer = PEER_ANY;
		entry = policy.lookup(&key);
	}
	event->rule = entry ? entry->rule : 0;
	event->allowed = entry ? entry->allowed : 0;
}

/**
 * policy_judge - Take the verdict on a connection, for one of its ends.
 * @leaves: whether the subject has sent the packet
 * @began: whether the packet's sender began the connection
 * Returns whether it is allowed; the event has the rest.
 */
static __always_inline bool policy_judge(struct work *work, bool leaves, bool began)
{
	struct flow_event *event = &work->event;
	struct address *peer = leaves ? &event->tuple.destination : &event->tuple.source;
	struct address *own = leaves ? &event->tuple.source : &event->tuple.destination;
	u8 direction = began == leaves ? DIRECTION_EGRESS : DIRECTION_INGRESS;
	u32 flags = work->subject.flags;

	event->direction = direction;
	event->reason = REASON_POLICY;
	event->rule = 0;
	event->allowed = 1;
	event->peer = policy_peer(peer);
	if (!(flags & (1 << direction)) || address_equal(peer, own) ||
	    (direction == DIRECTION_INGRESS && route_is_own(peer)))
		return true;
	if (flags & (SUBJECT_FAIL_CLOSED | SUBJECT_FAIL_OPEN)) {
		event->reason = REASON_OVERFLOW;
		event->allowed = !(flags & SUBJECT_FAIL_CLOSED);
	} else {
		policy_ask(event, direction,
			   began ? event->tuple.destination_port : event->tuple.source_port);
	}
	return event->allowed;
}

/* What is known of a packet's connection, and what is guessed. */
struct policy_case {
	struct tuple key;
	bool turned; /* the greater end has sent the packet */
	bool began;  /* its sender began the connection */
	bool either; /* so may the other end have */
	bool is_own; /* key is that of the packet as it came, not as it is translated */
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
static __always_inline void policy_sample(struct flow_event *event, const struct policy_state *state)
{
	events_count(event);
	if (state->sample && bpf_get_prandom_u32() % state->sample == 0)
		events_tell(event);
}

/* Judge an ICMP error that is about no connection that is known. */
static __always_inline bool policy_admit_error(struct __sk_buff *skb, struct work *work, bool leaves)
{
	policy_describe(work);
	policy_read_error(skb, &work->packet, &work->event.tuple);
	return policy_judge(work, leaves, true) || policy_drop(&work->event, work->event.reason);
}

/* Forget a connection that has the ends a service's client asks for, not those it gets: packets would be taken for it. */
static __always_inline void policy_forget_asked(const struct work *work)
{
	struct tuple key;

	policy_key_of(&work->packet.tuple, &key);
	connections.delete(&key);
}

/* Whether no flow and no service is for a packet that goes to a pod: what find_flow() and decline() would find out. */
static __always_inline bool policy_is_plain(struct __sk_buff *skb, struct work *work)
{
	struct tuple *tuple = &work->packet.tuple;
	struct endpoint asked = { .address = tuple->destination, .port = tuple->destination_port };

	return work->packet.reading == PARSE_FLOW && !skb->vlan_present && !conntrack.lookup(tuple) &&
	       !lb_frontend(&asked, tuple->protocol) &&
	       (work->packet.flags & TCP_ACK || !lb_is_reserved(&tuple->destination));
}

/* Whether no flow and no service is for the answers to a packet that is plain itself; those that say they are answers. */
static __always_inline bool policy_is_answer_plain(const struct tuple *tuple)
{
	struct endpoint asked = { .address = tuple->source, .port = tuple->source_port };
	struct tuple back = {
		.source = tuple->destination,
		.destination = tuple->source,
		.source_port = tuple->destination_port,
		.destination_port = tuple->source_port,
		.protocol = tuple->protocol,
	};

	return !conntrack.lookup(&back) && !lb_frontend(&asked, tuple->protocol);
}

/* Write down where the answers to a packet that opens a connection are plain, so that not even the first is looked at. */
static __always_inline void policy_foresee(struct work *work, struct connection *connection,
					   const struct policy_case *known, bool leaves)
{
	bool is_placed = leaves || !ANTI_SPOOFING || work->subject.device == work->packet.ifindex;
	u32 *plain = policy_plain(connection, !known->turned, !leaves);

	*plain = 0;
	if (work->is_plain && is_placed && policy_is_answer_plain(&work->packet.tuple))
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
		work->is_plain = policy_is_plain(skb, work);
	*plain = work->is_plain ? ifindex : POLICY_NOT_PLAIN;
	if (opens)
		policy_foresee(work, connection, known, leaves);
}

/* Enter a connection that was allowed, with one end's verdict. */
static __always_inline bool policy_begin(struct __sk_buff *skb, struct work *work, struct policy_case *known,
					 u32 generation, u32 now, bool leaves)
{
	bool is_egress = work->event.direction == DIRECTION_EGRESS;
	u32 turned = known->began == known->turned ? CONNECTION_TURNED : 0;
	struct connection fresh = {
		.seen = now,
		.flags = policy_flags(turned, &work->packet, known->began),
		.generation = { is_egress ? 0 : generation, is_egress ? generation : 0 },
	};

	policy_learn(skb, work, &fresh, known, leaves);
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

	return since && now - since < young;
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
	policy_describe(work);
	return policy_judge(work, false, true) || policy_drop(&work->event, work->event.reason);
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
	if (packet->reading == PARSE_STRAY)
		return policy_admit_error(skb, work, leaves);
	if (!leaves && policy_is_for_many(skb))
		return policy_admit_for_many(work);
	now = conntrack_now(work);
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
	if (packet->kind == PACKET_ICMP_ERROR && (!generation || !*generation))
		return policy_admit_error(skb, work, leaves);
	policy_describe(work);
	if (!policy_judge(work, leaves, known.began)) {
		known.began = !known.began;
		if (!known.either || !policy_judge(work, leaves, known.began))
			return policy_drop(event, event->reason);
	}
	is_first = begins || !generation || !*generation;
	if (begins) {
		if (leaves && work->has_flow)
			policy_forget_asked(work);
		if (!policy_begin(skb, work, &known, state->generation, now, leaves))
			return policy_drop(event, REASON_UNTRACKED);
	} else if (generation && packet->kind != PACKET_ICMP_ERROR) {
		*generation = state->generation;
		policy_note(found, packet, known.began, now);
		policy_learn(skb, work, found, &known, leaves);
	}
	if (is_first)
		policy_sample(event, state);
	return true;
}

#endif
