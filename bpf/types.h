/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The layout of everything the agent and the programs share. This file is the truth: the loader reports each
 * struct as the compiler laid it out, and the agent refuses to run where agent/core/abi.py says otherwise.
 */
#ifndef __EBPROXY_TYPES_H
#define __EBPROXY_TYPES_H

/* Either family, in network byte order; IPv4 is held as ::ffff:a.b.c.d. */
struct address {
	__be32 word[4];
};

static __always_inline struct address address_from_ipv4(__be32 ipv4)
{
	struct address address = { { 0, 0, bpf_htonl(0xffff), ipv4 } };

	return address;
}

static __always_inline bool address_equal(const struct address *a, const struct address *b)
{
	return a->word[3] == b->word[3] && a->word[2] == b->word[2] && a->word[1] == b->word[1] &&
	       a->word[0] == b->word[0];
}

/* One end of a connection. */
struct endpoint {
	struct address address;
	__be16 port;
};

/* What a client asks for. */
struct frontend_key {
	struct address address;
	__be16 port;
	u8 protocol;
	u8 pad; /* zero */
};

struct frontend {
	u32 service;          /* id of the service port, never reused */
	u32 inside;           /* base of the segment for clients of the cluster */
	u32 outside;          /* base of the segment for everybody else */
	u32 affinity_timeout; /* seconds; 0 = no affinity */
	u32 flags;            /* none yet; zero */
};

/*
 * A segment is a header and, right behind it, its backends:
 *
 *	base      base+1     base+2           base+count
 *	[header]  [backend]  [backend]  ...   [backend]
 *
 * A header uses flags and count, a backend address and port; the rest is zero.
 */
struct slot {
	struct address address;
	__be16 port;
	u16 flags; /* SEGMENT_* */
	u32 count; /* backends behind this header */
};

/* With count == 0: say nothing to the client, rather than refuse (endpoints exist, but not for this client). */
#define SEGMENT_DROP        1

/* Two segments that every layout has, both without backends. */
#define SEGMENT_BASE_REJECT 0
#define SEGMENT_BASE_DROP   1

/*
 * What a connected socket asked for, in the slot that its cookie selects. backend_port and backend_word (the last
 * word of its address) tell a socket that has since been connected elsewhere.
 */
struct origin {
	u64 cookie; /* 0 = free */
	struct address address;
	__be16 port;
	__be16 backend_port;
	__be32 backend_word;
};

/* The same, for sockets that talk to many services (unconnected UDP) or found their slot taken. */
struct peer_key {
	u64 cookie;
	struct address address; /* the backend */
	__be16 port;
	u16 pad;  /* zero */
	u32 pad2; /* zero */
};

struct peer_origin {
	struct address address;
	__be16 port;
	u16 pad; /* zero */
};

/* Indexes of the counters map. */
enum counter {
	COUNTER_REJECTED,       /* connects and datagrams refused: no usable endpoint */
	COUNTER_DROPPED,        /* the same, refused because of internalTrafficPolicy: Local */
	COUNTER_ORIGIN_SPILLED, /* connected sockets remembered in peer_origins: their slot was taken */
	COUNTER_ORIGIN_LOST,    /* peers nobody remembers: the map refused the entry */
	COUNTERS,
};

#endif
