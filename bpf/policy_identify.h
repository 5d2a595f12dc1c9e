/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Whose packet is this: the subject at whose device it is, and whether its sender is who it says. What policy is not about
 * passes here, and what lies about itself is dropped.
 */
#ifndef __EBPROXY_POLICY_IDENTIFY_H
#define __EBPROXY_POLICY_IDENTIFY_H

#include "conntrack.h"
#include "route.h"
#include "events.h"

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
static __always_inline void policy_describe(const struct work *work, struct flow_event *event)
{
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
	policy_describe(work, &work->event);
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
	if (unlikely(packet->reading == PARSE_MAPPED))
		return policy_turn_away(work, leaves, leaves ? REASON_SPOOFED : REASON_UNREADABLE);
	if (unlikely(policy_is_error(packet))) {
		tuple = &work->event.tuple;
		policy_read_error(skb, packet, tuple);
		if (!policy_is_related(packet, tuple, leaves))
			packet->reading = PARSE_STRAY;
	}
	own = leaves ? &tuple->source : &tuple->destination;
	found = subjects.lookup(own);
	/* Most packets come from a subject that says itself that it is behind this device. */
	is_placed = found && found->device == ifindex;
	if (unlikely(!is_placed))
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

#endif
