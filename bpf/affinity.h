/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Affinity: a client that comes back in time gets the backend it had. Its entry remembers which slot that was in; where
 * an edit has moved the backend, the segment is searched.
 */
#ifndef __EBPROXY_AFFINITY_H
#define __EBPROXY_AFFINITY_H

#include "conntrack.h"
#include "lb.h"

/* Slots that are searched for a backend; in a larger segment, one that was moved beyond may be chosen anew. */
#define AFFINITY_SEARCH 256

static __always_inline bool affinity_is_at(const struct slot *slot, const struct affinity *wanted)
{
	return slot->port == wanted->port && address_equal(&slot->address, &wanted->address);
}

/*
 * Search a segment for a backend. What is found is kept in map memory, of which the verifier knows nothing: in a
 * register it would be another state in each turn of the loop, each to be followed to the end of the program. A turn has
 * one branch, as the verifier follows each of them in every turn, and clang 19 makes several of a condition it understands.
 */
static __always_inline void affinity_search(u32 base, u32 count, struct affinity *wanted)
{
	struct slot *slot;
	u32 index, i;
	u64 misses;

	wanted->slot = 0;
#pragma clang loop unroll(disable)
	for (i = 1; i <= AFFINITY_SEARCH; i++) {
		index = base + i;
		slot = segments.lookup(&index);
		if (!slot)
			return;
		misses = (u32)(slot->port ^ wanted->port) |
			 address_difference(&slot->address, &wanted->address);
		misses |= ((u64)count - i) & 1ULL << 63; /* behind the last */
		asm volatile("" : "+r"(misses));
		if (!misses)
			wanted->slot = index;
	}
}

/* Find the slot of the backend that a client had; it becomes 0 where that is no longer in the segment. */
static __always_inline void affinity_find(u32 base, struct affinity *wanted)
{
	struct slot *slot = segments.lookup(&base);
	u32 count = slot ? slot->count : 0;

	slot = segments.lookup(&wanted->slot);
	if (slot && wanted->slot > base && wanted->slot <= base + count && affinity_is_at(slot, wanted))
		return;
	affinity_search(base, count, wanted);
}

/**
 * affinity_select - Choose the backend that a client had, or one by seed, and remember it.
 * @base: the segment for this client
 * @backend: receives the choice
 */
static __always_inline enum lb_verdict affinity_select(const struct frontend *frontend, u32 base,
						       struct work *work, u32 seed, struct endpoint *backend)
{
	struct affinity_key key = { .client = work->packet.tuple.source, .service = frontend->service };
	struct affinity *known = affinity.lookup(&key), *chosen = &work->affinity;
	enum lb_verdict verdict;
	u32 now = conntrack_now(work);

	chosen->slot = 0;
	if (known && seconds_since(known->seen, now) <= lb_affinity_timeout(frontend)) {
		*chosen = *known;
		affinity_find(base, chosen);
	}
	if (chosen->slot) {
		backend->address = chosen->address;
		backend->port = chosen->port;
	} else {
		verdict = lb_select_backend(base, seed, backend);
		if (verdict != LB_FORWARD)
			return verdict;
		chosen->address = backend->address;
		chosen->port = backend->port;
		chosen->pad = 0;
	}
	chosen->seen = now;
	affinity.update(&key, chosen);
	return LB_FORWARD;
}

#endif
