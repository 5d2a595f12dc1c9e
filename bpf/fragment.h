/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Fragments: only the first of a packet carries its ports. It leaves them for the others; one that comes before it is
 * held, and sent after it when it comes.
 *
 * Every fragmented packet is noted, whoever it is for: that a fragment belongs to no service can only be told by its
 * ports.
 */
#ifndef __EBPROXY_FRAGMENT_H
#define __EBPROXY_FRAGMENT_H

#include "conntrack.h"

/* How many fragments of one packet are held. */
#define FRAGMENT_PLACES 4

/* Seconds after which an identification may stand for another packet. */
#define FRAGMENT_AGE_S  5

static __always_inline struct fragment_key fragment_key_of(const struct packet *packet, u8 place)
{
	struct fragment_key key = {
		.source = packet->tuple.source,
		.destination = packet->tuple.destination,
		.id = packet->fragment_id,
		.protocol = packet->tuple.protocol,
		.place = place,
	};

	return key;
}

/* Find the ports of a later fragment, or that they are not known yet. */
static __always_inline void fragment_recall(struct work *work)
{
	struct packet *packet = &work->packet;
	struct fragment_key key = fragment_key_of(packet, 0);
	struct fragment *known = fragments.lookup(&key);

	if (!known || seconds_since(known->seen, conntrack_now(work)) > FRAGMENT_AGE_S) {
		packet->kind = PACKET_EARLY_FRAGMENT;
		return;
	}
	packet->tuple.source_port = known->ports.source;
	packet->tuple.destination_port = known->ports.destination;
}

/* Note the ports of a first fragment for those that follow. */
static __always_inline void fragment_note(struct work *work)
{
	const struct packet *packet = &work->packet;
	struct fragment_key key = fragment_key_of(packet, 0);
	struct fragment fragment = {
		.ports = { packet->tuple.source_port, packet->tuple.destination_port },
		.seen = conntrack_now(work),
	};

	fragments.update(&key, &fragment);
}

/*
 * Check that a frame is one that can be held, in a way that the verifier follows: by two comparisons of
 * the register that is used.
 */
static __always_inline bool fragment_fits(u64 *size)
{
	if (*size > HELD_SIZE)
		return false;
	asm volatile("" : "+r"(*size));
	return *size >= ETH_SIZE;
}

/* Hold a fragment until its packet's first one comes. Returns whether there was room. */
static __always_inline bool fragment_hold(struct __sk_buff *skb, struct work *work)
{
	struct fragment_key key = fragment_key_of(&work->packet, 0);
	struct held *held = &work->held, *there;
	u32 now = conntrack_now(work);
	u64 size = skb->len;
	int i;

	if (!fragment_fits(&size) || bpf_skb_load_bytes(skb, 0, held->frame, size))
		return false;
	held->seen = now;
	held->size = size;
	held->is_taken = 0;
	held->pad = 0;
	for (i = 0; i < FRAGMENT_PLACES; i++) {
		key.place = i;
		there = held_fragments.lookup(&key);
		if (!there || seconds_since(there->seen, now) > FRAGMENT_AGE_S)
			return !held_fragments.update(&key, held);
	}
	return false;
}

/* Write a held fragment over the packet. */
static __always_inline int fragment_restore(struct __sk_buff *skb, struct held *held)
{
	u64 size = held->size;

	if (bpf_skb_change_tail(skb, size, 0) || !fragment_fits(&size))
		return -1;
	return bpf_skb_store_bytes(skb, 0, held->frame, size, 0);
}

/**
 * fragment_release - Send the fragments that wait for this first one behind it, each as if it came just now.
 * @flags: of a redirection to where the program runs
 * Returns a verdict, or 0 when none waits. What stands in struct work is spoilt otherwise.
 */
static __always_inline int fragment_release(struct __sk_buff *skb, struct work *work, u64 flags)
{
	const struct packet *packet = &work->packet;
	struct fragment_key key = fragment_key_of(packet, 0);
	u32 ifindex = packet->ifindex, now = conntrack_now(work);
	int i, verdict = 0;
	struct held *held;

	for (i = 0; i < FRAGMENT_PLACES; i++) {
		key.place = i;
		held = held_fragments.lookup(&key);
		/* Programs that see the clones run within the call: this one must not be found again. */
		if (!held || held->is_taken || seconds_since(held->seen, now) > FRAGMENT_AGE_S)
			break;
		held->is_taken = 1;
		bpf_clone_redirect(skb, ifindex, flags);
		if (fragment_restore(skb, held))
			return -1;
		held_fragments.delete(&key);
		verdict = bpf_redirect(ifindex, flags);
	}
	return verdict;
}

#endif
