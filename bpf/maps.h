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
 * Sized by mapSizes.segments: for each service port and family, its endpoints plus one, rounded up to a power of two
 * or to three quarters of one.
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

/*
 * tuple -> what becomes of its packets; two entries a flow. Written by the packet path, read once for each packet,
 * swept by the agent, evicted least recently used. Sized by mapSizes.conntrack.
 */
BPF_TABLE("lru_hash", struct tuple, struct flow, conntrack, 1);

/*
 * number - 1 -> which backends clients outside get by consistent hashing. Written by the agent before the header that
 * names it, and again when the segment's backends change; read when a flow of a service with Maglev begins. Sized by
 * mapSizes.maglevTables.
 */
BPF_ARRAY(maglev_tables, struct maglev_table, 1);

/* The one table that is being built. Written by the agent, worked on by maglev.c, read by the agent when it is done. */
BPF_ARRAY(maglev_builds, struct maglev_build, 1);

/* client, service -> backend. Written and read when a flow of a service with affinity begins. Sized by mapSizes.affinity. */
BPF_TABLE("lru_hash", struct affinity_key, struct affinity, affinity, 1);

/* service, client prefix -> allowed. Written by the agent, read when a flow of a service with ranges begins. */
BPF_F_TABLE("lpm_trie", struct source_range, u32, source_ranges, 1, BPF_F_NO_PREALLOC);

/* prefix -> whose pods are there, POD_RANGE_*. Written by the agent, read when a flow or a connection begins. */
BPF_F_TABLE("lpm_trie", struct address_range, u32, pod_ranges, 1, BPF_F_NO_PREALLOC);

/* address -> it is this node's own. Written by the agent as netlink tells, read when a flow begins. */
BPF_HASH(node_addresses, struct address, u32, 1);

/* ifindex -> addresses to masquerade with. Written by the agent as netlink tells, read when a flow begins. */
BPF_HASH(devices, u32, struct device, 1);

/* a fragmented packet -> its ports. Written by its first fragment, read by the others. Sized by mapSizes.fragments. */
BPF_TABLE("lru_hash", struct fragment_key, struct fragment, fragments, 1);

/* a fragmented packet, place -> a fragment that came before the first. Written by it, read and removed by the first. */
BPF_TABLE("lru_hash", struct fragment_key, struct held, held_fragments, 1);

/*
 * Policy; without it these maps have one entry each. The agent writes them, but for connections and verdicts, in the order
 * policy, identities, subjects, and removed in reverse; then it raises the generation.
 */

/* address -> identity, of every pod of the cluster. Sized by mapSizes.identities. */
BPF_HASH(identities, struct address, u32, 1);

/* prefix -> identity, of every block that a policy names. Sized by mapSizes.blocks. */
BPF_F_TABLE("lpm_trie", struct address_range, u32, blocks, 1, BPF_F_NO_PREALLOC);

/* subject, peer, direction, protocol, port -> verdict and rule. Sized by mapSizes.policy. */
BPF_F_TABLE("lpm_trie", struct policy_key, struct policy_entry, policy, 1, BPF_F_NO_PREALLOC);

/*
 * What was asked, hashed -> the verdict, while the generation is the same: most connections are like one before. Written
 * and read by the programs when a connection is judged, each CPU its own.
 */
BPF_PERCPU_ARRAY(verdicts, struct verdict, 1 << VERDICT_BITS);

/* address of a pod of this node -> who it is to policy. */
BPF_HASH(subjects, struct address, struct subject, 1);

/* ifindex -> which pod is behind it, where that is known. Read where a source is no subject that says so itself. */
BPF_HASH(pod_devices, u32, struct pod_device, 1);

/* Read with every packet of a subject. */
BPF_ARRAY(policy_states, struct policy_state, 1);

/*
 * ends of a connection -> its state and verdicts. Written by the programs, swept by the agent, evicted least recently
 * used. Sized by mapSizes.connections.
 */
BPF_TABLE("lru_hash", struct tuple, struct connection, connections, 1);

/* direction, reason, verdict -> packets that were dropped, connections that began. Read by the agent's metrics. */
BPF_PERCPU_ARRAY(policy_counters, u64, POLICY_COUNTERS);

/* What becomes of connections, for whoever asks. Sized by mapSizes.events, in bytes. */
BPF_RINGBUF_OUTPUT(events, 1);

/* Programs that go on where another ended. Filled by the agent before either is attached. */
BPF_PROG_ARRAY(stages, STAGES);

/* What a program of the packet path works on, which is more than its stack holds. Means nothing between packets. */
BPF_PERCPU_ARRAY(works, struct work, 1);

/* enum counter -> events. Added to by the programs, read by the agent's metrics. Never reset. */
BPF_PERCPU_ARRAY(counters, u64, COUNTERS);

static __always_inline void counter_add(u32 index)
{
	u64 *value = counters.lookup(&index);

	if (value)
		(*value)++; /* per CPU, and cgroup hooks do not migrate while they run */
}

#endif
