/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Maglev: clients outside get the same backend on whichever node they enter, and most keep theirs when backends come or
 * go. Two array lookups more than a choice at random.
 */
#ifndef __EBPROXY_MAGLEV_H
#define __EBPROXY_MAGLEV_H

#include "lb.h"

/**
 * maglev_select_backend - Choose the backend that a table has for a hash.
 * @base: the segment; without a table, or where that leads past its backends, the choice is lb_select_backend's
 * @hash: of the client's tuple, equal on all nodes
 * @backend: receives the choice
 */
static __always_inline enum lb_verdict maglev_select_backend(u32 base, u32 hash, struct endpoint *backend)
{
	struct slot *slot = segments.lookup(&base);
	struct maglev_table *table;
	u32 number, place;

	if (!slot || !slot->port)
		return lb_select_backend(base, hash, backend);
	number = slot->port - 1;
	table = maglev_tables.lookup(&number);
	if (!table)
		return lb_select_backend(base, hash, backend);
	/* Scaled, as in lb_select_backend: of a remainder, which becomes multiplications, the verifier knows no bounds. */
	place = table->entries[(u64)hash * MAGLEV_SIZE >> 32];
	/* While a table is being replaced, or waits to be built, it may lead to a backend that is not there. */
	if (place >= slot->count)
		return lb_select_backend(base, hash, backend);
	return lb_take_slot(base + 1 + place, backend);
}

#endif
