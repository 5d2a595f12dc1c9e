/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Every map. The sizes here are BCC's throw-away ones: the agent creates, sizes and pins the real maps
 * (agent/core/abi.py), and the loader puts them in the place of these.
 */
#ifndef __EBPROXY_MAPS_H
#define __EBPROXY_MAPS_H

#include "types.h"

/*
 * address, port, protocol -> service and segments. Written by the agent when a service port appears, goes, or
 * moves to another segment; read once for each connect. Lives as long as its service. Sized by mapSizes.frontends.
 */
BPF_HASH(frontends, struct frontend_key, struct frontend, 1);

/*
 * slot -> header or backend. Written by the agent, backends before headers; read twice for each translation.
 * Sized by mapSizes.segments: for each service port and family, its endpoints plus one, rounded up to a power of two.
 */
BPF_ARRAY(segments, struct slot, 2);

/*
 * socket cookie modulo size -> the address that the socket asked for. Written at connect, read at getpeername and
 * recvmsg, freed at release. Cookies are dealt out in sequence, so consecutive sockets have consecutive slots, and
 * remembering costs no allocation. Sized by mapSizes.socketOrigins, a power of two.
 */
BPF_ARRAY(socket_origins, struct origin, 1);

/*
 * socket cookie, backend -> the address that was asked for. Written at sendmsg (and by connects whose slot is
 * taken), read at recvmsg and getpeername, evicted least recently used. Sized by mapSizes.peerOrigins.
 */
BPF_TABLE("lru_hash", struct peer_key, struct peer_origin, peer_origins, 1);

/* enum counter -> events. Added to by the programs, read by the agent's metrics. Never reset. */
BPF_PERCPU_ARRAY(counters, u64, COUNTERS);

static __always_inline void counter_add(u32 index)
{
	u64 *value = counters.lookup(&index);

	if (value)
		(*value)++; /* per CPU, and cgroup hooks do not migrate while they run */
}

#endif
