// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Maglev tables: every backend walks through the table by steps of its own, and the backends take turns in claiming the
 * next entry on their way that is still free. agent/core/maglev.py says the same in a few lines of Python, and where
 * walks begin. The agent runs this program by BPF_PROG_TEST_RUN until the table is full; it is attached nowhere.
 * Source: Eisenbud et al., Maglev: A Fast and Reliable Software Network Load Balancer, NSDI 2016, section 3.4.
 */
#include "types.h"
#include "maps.h"

/* Entries that one run looks at. The verifier follows each turn of the loop: 84 instructions, 64 microseconds. */
#define MAGLEV_STEPS  512

/* Hide a value's origin from the compiler, and so keep it from branching where the next instruction is. */
#define OPAQUE(value) asm volatile("" : "+r"(value))

/*
 * What is known of a value after a branch, the verifier keeps apart in every later turn of the loop. So nothing is
 * compared but entries: entry and step are full words of map memory, of which it assumes nothing (a sum of bounded ones
 * would have other bounds in each turn), indexes are masked, and what is claimed is counted in map memory.
 */
static __always_inline void maglev_fill(struct maglev_build *build)
{
	u64 turn = build->turn & (MAGLEV_BACKENDS - 1), entry, step, at, is_outside, i;
	struct maglev_walk *walk = &build->walks[turn];
	u16 *claimed, holder;

	entry = walk->entry;
	step = walk->step;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAGLEV_STEPS; i++) {
		at = entry;
		OPAQUE(at);
		claimed = &build->table.entries[at & 16383];
		holder = *claimed;
		/* Half of all walks leave the table at a given step: a branch could not be predicted. */
		entry += step;
		is_outside = (s64)entry >> 63;
		OPAQUE(is_outside);
		entry += is_outside & MAGLEV_SIZE;
		if (holder != MAGLEV_FREE)
			continue;
		*claimed = walk->place;
		build->filled++;
		walk->entry = entry;
		turn = walk->next & (MAGLEV_BACKENDS - 1);
		walk = &build->walks[turn];
		entry = walk->entry;
		step = walk->step;
	}
	walk->entry = entry;
	build->turn = turn;
}

/* Returns whether the table is full. */
int maglev_run(struct __sk_buff *skb)
{
	u32 only = 0;
	struct maglev_build *build = maglev_builds.lookup(&only);

	if (!build)
		return false;
	if (build->filled < MAGLEV_SIZE)
		maglev_fill(build);
	return build->filled >= MAGLEV_SIZE;
}
