/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Telling what policy does with connections, and counting it. */
#ifndef __EBPROXY_EVENTS_H
#define __EBPROXY_EVENTS_H

#include "maps.h"

static __always_inline void events_add(u32 index)
{
	u64 *value = policy_counters.lookup(&index);

	if (value)
		(*value)++; /* per CPU, and tc programs do not migrate while they run */
}

/* Count a verdict. */
static __always_inline void events_count(const struct flow_event *event)
{
	u32 index = (event->direction & 1) * REASONS + event->reason;

	events_add(index * 2 + (event->allowed & 1));
}

/* Tell a verdict to whoever listens, or count that it was lost. */
static __always_inline void events_tell(struct flow_event *event)
{
	event->time = bpf_ktime_get_ns();
	if (events.ringbuf_output(event, sizeof(*event), 0))
		events_add(POLICY_EVENTS_LOST);
}

#endif
