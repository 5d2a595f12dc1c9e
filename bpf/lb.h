/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Choosing a backend: one hash lookup and two array lookups, whatever the number of services. */
#ifndef __EBPROXY_LB_H
#define __EBPROXY_LB_H

#include "maps.h"

enum lb_verdict {
	LB_FORWARD, /* to the backend that was chosen */
	LB_REJECT,  /* a service without a usable endpoint: tell the client */
	LB_DROP,    /* a service with endpoints, none of them for this client: silence */
	LB_PASS,    /* no service: leave it alone */
};

/* Find the service behind an address, port and protocol. */
static __always_inline struct frontend *lb_frontend(const struct endpoint *asked, u8 protocol)
{
	struct frontend_key key = {
		.address = asked->address,
		.port = asked->port,
		.protocol = protocol,
	};

	return frontends.lookup(&key);
}

/* Whether an address is a service's own, whatever the port: what it does not offer there is refused. */
static __always_inline bool lb_is_reserved(const struct address *address)
{
	struct frontend_key key = { .address = *address };

	return frontends.lookup(&key);
}

static __always_inline u32 lb_kind(const struct frontend *frontend)
{
	return frontend->flags & FRONTEND_KIND_MASK;
}

/* How long a client keeps its backend, in seconds; 0 = it does not. */
static __always_inline u32 lb_affinity_timeout(const struct frontend *frontend)
{
	return frontend->flags >> FRONTEND_TIMEOUT_SHIFT;
}

/* Whether nobody is behind a segment, and its clients are to be told so. */
static __always_inline bool lb_is_refused(u32 base)
{
	struct slot *slot = segments.lookup(&base);

	return !slot || (!slot->count && !(slot->flags & SEGMENT_DROP));
}

/* Take the backend that stands in a slot. */
static __always_inline enum lb_verdict lb_take_slot(u32 index, struct endpoint *backend)
{
	struct slot *slot = segments.lookup(&index);

	if (!slot)
		return LB_REJECT;
	backend->address = slot->address;
	backend->port = slot->port;
	return LB_FORWARD;
}

/**
 * lb_select_backend - Choose the backend of a segment that a number from the whole range of u32 falls to.
 * @base: the segment
 * @seed: equal seeds choose equal backends for as long as the segment does not change
 * @backend: receives the choice
 */
static __always_inline enum lb_verdict lb_select_backend(u32 base, u32 seed, struct endpoint *backend)
{
	struct slot *slot = segments.lookup(&base);
	u32 index;

	if (!slot)
		return LB_REJECT;
	if (!slot->count)
		return slot->flags & SEGMENT_DROP ? LB_DROP : LB_REJECT;

	/* Scale rather than take a remainder: unbiased and without a division. */
	index = base + 1 + (u32)(((u64)seed * slot->count) >> 32);
	return lb_take_slot(index, backend);
}

#endif
