/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The layout of everything the agent and the programs share. This file is the truth: the loader reports each
 * struct as the compiler laid it out, and the agent refuses to run where agent/core/abi.py says otherwise.
 */
#ifndef __EBPROXY_TYPES_H
#define __EBPROXY_TYPES_H

/* Of what few packets are: the others need not jump. */
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Either family, in network byte order; IPv4 is held as ::ffff:a.b.c.d. */
struct address {
	__be32 word[4];
};

static __always_inline struct address address_from_ipv4(__be32 ipv4)
{
	struct address address = { { 0, 0, bpf_htonl(0xffff), ipv4 } };

	return address;
}

static __always_inline u32 address_difference(const struct address *a, const struct address *b)
{
	return (a->word[3] ^ b->word[3]) | (a->word[2] ^ b->word[2]) | (a->word[1] ^ b->word[1]) |
	       (a->word[0] ^ b->word[0]);
}

static __always_inline bool address_equal(const struct address *a, const struct address *b)
{
	u32 differs = address_difference(a, b);

	/*
	 * One branch rather than four: the verifier follows each. clang 19 makes them of it all the same where it sees
	 * what differs is compared with, and a loop over slots then exceeds what the verifier looks at.
	 */
	asm volatile("" : "+r"(differs));
	return !differs;
}

/* How long ago that was, in seconds. Another CPU may have seen the next second begin already. */
static __always_inline u32 seconds_since(u32 seen, u32 now)
{
	return (s32)(now - seen) > 0 ? now - seen : 0;
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
	u32 service; /* id of the service port, never reused */
	u32 inside;  /* base of the segment for clients of the cluster */
	u32 outside; /* base of the segment for everybody else */
	u32 flags;   /* enum frontend_kind, FRONTEND_*; above, the timeout of affinity in seconds or 0 */
};

enum frontend_kind {
	FRONTEND_CLUSTER_IP = 1,
	FRONTEND_NODE_PORT,
	FRONTEND_EXTERNAL_IP,
	FRONTEND_LOAD_BALANCER,
	/*
	 * Nothing to forward to: port 0 and protocol 0 stand for a ClusterIP itself, whose other ports are refused; the
	 * address zero of a family stands for the port of a NodePort, which no process of the node may bind.
	 */
	FRONTEND_RESERVED,
};

#define FRONTEND_KIND_MASK      0x007
#define FRONTEND_EXTERNAL_LOCAL 0x008 /* externalTrafficPolicy: Local: the client's address is kept */
#define FRONTEND_SOURCE_RANGES  0x010 /* only for the clients in source_ranges */
#define FRONTEND_MASQUERADE     0x020 /* a ClusterIP that hides every client (masqueradeAll) */
#define FRONTEND_DSR            0x040 /* the backend's node answers clients outside by itself */
#define FRONTEND_MAGLEV         0x080 /* backends for clients outside by consistent hashing */
#define FRONTEND_TIMEOUT_SHIFT  12    /* what is above the flags; a timeout is a day at most, 17 bits */

/*
 * A segment is a header and, right behind it, its backends:
 *
 *	base      base+1     base+2           base+count
 *	[header]  [backend]  [backend]  ...   [backend]
 *
 * A header uses flags, count and, as its port, the number of a table; a backend address and port; the rest is zero.
 */
struct slot {
	struct address address;
	__be16 port; /* a header's: the number of its table in maglev_tables, 0 = none; in host order */
	u16 flags;   /* SEGMENT_* */
	u32 count;   /* backends behind this header */
};

/* With count == 0: say nothing to the client, rather than refuse (endpoints exist, but not for this client). */
#define SEGMENT_DROP        1

/* Two segments that every layout has, both without backends. */
#define SEGMENT_BASE_REJECT 0
#define SEGMENT_BASE_DROP   1

#define MAGLEV_SIZE         16381 /* a prime */
#define MAGLEV_BACKENDS     1024  /* how many a table is built for at most */
#define MAGLEV_FREE         0xffff

/* Which backend a client outside gets: its place in the segment, counted from 0. */
struct maglev_table {
	u16 entries[16384]; /* MAGLEV_SIZE of them are used */
};

/* A backend on its way through a table: it claims the first free entry that it comes by, then the next one has a turn. */
struct maglev_walk {
	u64 entry;
	u64 step;  /* less MAGLEV_SIZE, which is added where the walk would leave the table */
	u32 place; /* in the segment */
	u32 next;  /* whose turn it is then */
};

/* A table as it is being built. */
struct maglev_build {
	u32 turn;   /* which walk */
	u32 filled; /* entries that are claimed */
	struct maglev_walk walks[MAGLEV_BACKENDS];
	struct maglev_table table;
};

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

/* What tells one flow of packets from another, as a packet of it has it in one direction. */
struct tuple {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	u8 protocol;
	u8 pad[3]; /* zero */
};

/* The tuple of an answer. */
static __always_inline struct tuple tuple_turned(const struct tuple *tuple)
{
	struct tuple turned = {
		.source = tuple->destination,
		.destination = tuple->source,
		.source_port = tuple->destination_port,
		.destination_port = tuple->source_port,
		.protocol = tuple->protocol,
	};

	return turned;
}

/*
 * What becomes of a packet with a tuple. A translated flow has two entries, one for each way:
 *
 *	client:cp -> frontend:fp   becomes   source:sp -> backend:bp	(FLOW_REPLY not set)
 *	backend:bp -> source:sp    becomes   frontend:fp -> client:cp	(FLOW_REPLY set)
 *
 * source is the client itself, or an address of this node if the flow is masqueraded.
 */
struct flow {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	u32 service; /* id of the service port */
	u32 seen;    /* when a packet last went this way; seconds of the monotonic clock */
	u32 device;  /* 0: the stack routes it; LOOPBACK: into the node; else out of this device */
	u32 flags;   /* FLOW_* */
};

#define LOOPBACK         1 /* the ifindex of lo in every network namespace */

#define FLOW_REPLY       0x001 /* the way back */
#define FLOW_AT_EGRESS   0x002 /* the way back is translated where it leaves the node, not where it enters */
#define FLOW_MASQUERADED 0x004 /* the backend sees an address of this node */
#define FLOW_REPLIED     0x008 /* the backend has answered */
#define FLOW_ESTABLISHED 0x010 /* TCP: the client has answered the backend's answer */
#define FLOW_FIN         0x020 /* TCP: this way has ended */
#define FLOW_PEER_FIN    0x040 /* TCP: the other way has ended */
#define FLOW_CLOSED      0x080 /* TCP: reset */
#define FLOW_DSR         0x100 /* the backend's node answers; no reply comes this way */

/* The backend that a client of a service with affinity gets. */
struct affinity_key {
	struct address client;
	u32 service;
};

struct affinity {
	struct address address;
	__be16 port;
	u16 pad;  /* zero */
	u32 slot; /* where the backend was last found */
	u32 seen; /* when the client last connected; seconds of the monotonic clock */
};

/* Clients that a service's load balancer addresses answer; prefix_bits counts the 32 of service too. */
struct source_range {
	u32 prefix_bits;
	u32 service;
	struct address client;
};

struct address_range {
	u32 prefix_bits;
	struct address address;
};

#define POD_RANGE_PODS    1 /* the cluster's pods have these addresses */
#define POD_RANGE_OWN     2 /* this node's pods have them */
#define POD_RANGE_UNKNOWN 4 /* a whole family, where nobody says which of its addresses are the pods' */

/* The addresses a masqueraded packet leaves a device with; zero = none of that family. ifindex 0: the node's own. */
struct device {
	struct address ipv4;
	struct address ipv6;
	u32 flags; /* DEVICE_* */
};

#define DEVICE_PORT 2 /* it is a bridge's: what it takes in may be for the bridge */
#define DEVICE_PODS 1 /* what comes in by it comes from the cluster's pods */

/* A fragmented packet, whose ports only its first fragment carries. */
struct fragment_key {
	struct address source;
	struct address destination;
	u32 id; /* as in the packet */
	u8 protocol;
	u8 place;  /* of a held fragment, among those of its packet; else zero */
	u8 pad[2]; /* zero */
};

struct ports {
	__be16 source;
	__be16 destination;
};

struct fragment {
	struct ports ports;
	u32 seen; /* seconds of the monotonic clock */
};

#define HELD_SIZE 1536

/* A fragment that came before its packet's first one, with its Ethernet header. */
struct held {
	u32 seen; /* seconds of the monotonic clock */
	u32 size;
	u32 is_taken;
	u32 pad; /* zero */
	u8 frame[HELD_SIZE];
};

enum packet_kind {
	PACKET_WHOLE,          /* with its transport header */
	PACKET_FIRST_FRAGMENT, /* likewise, and others follow */
	PACKET_LATER_FRAGMENT, /* without; its ports are known */
	PACKET_EARLY_FRAGMENT, /* without; its packet's first fragment has not come yet */
	PACKET_ICMP_ERROR,     /* about a packet of a flow */
	PACKET_ICMP_ECHO,      /* a ping */
};

/* Of an ICMP error, tuple is what an answer to the packet it is about would have; inner_* are where that stands. */
struct packet {
	struct tuple tuple;
	u32 kind;     /* enum packet_kind */
	u32 l4;       /* offset of the transport header, or of the payload of a later fragment */
	u32 end;      /* offset behind the packet; the frame may be padded */
	u32 inner_l3; /* offsets within an ICMP error */
	u32 inner_l4;
	u32 fragment_id;
	u32 l3_size; /* the header and its extensions, bytes */
	u32 ifindex; /* of the device it is seen at */
	u8 is_ipv6;
	u8 ttl;
	u8 flags;   /* TCP_*; for SCTP those that its first chunk amounts to */
	u8 reading; /* enum parse_result; only where there is policy */
};

/*
 * Policy. A peer is known by a number, its identity: a pod's stands for its labels and for the blocks that hold its
 * address, any other address's for those blocks alone. Who is subject to policy is known by the same number.
 */
#define PEER_ANY   0 /* in policy: whoever has no entries of its own there */
#define PEER_WORLD 1 /* no pod, and in no block that a policy names */

/* A pod of this node. */
struct subject {
	u32 identity;
	u32 flags; /* SUBJECT_* */
	u32 since; /* its connections may be older than what is known of them; seconds of the monotonic clock, 0 = none is */
	u32 device; /* the ifindex of that the pod is behind; 0 = not known */
};

#define SUBJECT_INGRESS 1 /* policy is to be asked about what comes in */
#define SUBJECT_EGRESS  2 /* and about what goes out */
#define SUBJECT_FAIL_CLOSED                                                                                  \
	4 /* its policy does not fit in the map: nothing may pass that policy is to be asked about */
#define SUBJECT_FAIL_OPEN 8 /* likewise: everything may */

enum direction {
	DIRECTION_INGRESS, /* into the subject */
	DIRECTION_EGRESS,
	DIRECTIONS,
};

/*
 * What a subject may do with a peer: the longest prefix decides, and each verdict stands by itself. A subject and peer
 * with any entry have one for everything (POLICY_BASE_BITS), so that PEER_ANY need only be asked where there is none.
 */
struct policy_key {
	u32 prefix_bits; /* POLICY_BASE_BITS, POLICY_PROTOCOL_BITS, or that and some of the port's */
	u32 subject;
	u32 peer;
	u8 direction; /* enum direction */
	u8 protocol;
	__be16 port; /* the destination's */
};

/* What is asked about a connection, and what policy has answered. Nothing pads it: it is hashed word by word. */
struct question {
	u32 subject;
	struct address peer;
	u8 direction; /* enum direction */
	u8 protocol;
	__be16 port; /* the destination's */
};

struct verdict {
	struct question question;
	u32 generation; /* that it is of; 0 = none */
	u32 peer;
	u32 rule;
	u32 allowed;
};

/* How many answers each CPU keeps, as a power of two. */
#define VERDICT_BITS         10

#define POLICY_BASE_BITS     72
#define POLICY_PROTOCOL_BITS 80
#define POLICY_PORT_BITS     96

struct policy_entry {
	u32 rule;    /* which one decided; 0 = none allowed it */
	u32 allowed; /* 0 or 1 */
};

/* Whoever is not known, pod or device, is held. */
#define POLICY_STRICT 1

struct policy_state {
	u32 generation;  /* of all verdicts: one that was taken under another is taken again */
	u32 sample;      /* of new connections that are allowed, one in so many is told; 0 = none */
	u32 is_strict;   /* POLICY_STRICT; else, not 0: a pod that is no subject is held, for want of room */
	u32 is_answered; /* what is denied on its way out is refused rather than dropped */
};

/*
 * The devices at which packets of one way are plain: a look at everything has found nothing to do about them but
 * policy. Who comes by another device has another source. 0 = not looked at yet in the second that is the connection's seen.
 */
struct passage {
	u32 from_pod;
	u32 to_pod;
};

/*
 * A connection of a subject, whoever of its ends that is. The key is a tuple whose source is the lesser end, so that
 * both ways find it (policy_is_turned()); generation is by direction: egress at the end that began, ingress at the other.
 */
struct connection {
	u32 seen;                   /* when a packet last came by; seconds of the monotonic clock */
	u32 flags;                  /* FLOW_*, CONNECTION_* */
	u32 generation[DIRECTIONS]; /* of policy when it allowed the connection; 0 = it has not yet */
	struct passage plain[2];    /* of the packets of either end, the lesser first */
};

#define CONNECTION_TURNED 0x1000 /* the greater end began it */

/* The addresses of the pod behind a device; zero = none of that family. */
struct pod_device {
	struct address ipv4;
	struct address ipv6;
};

enum verdict_reason {
	REASON_POLICY,     /* a rule, or that none allows it */
	REASON_SPOOFED,    /* the source is not the pod's */
	REASON_HELD,       /* the pod's policy has not been applied yet */
	REASON_OVERFLOW,   /* the pod's policy does not fit */
	REASON_UNREADABLE, /* headers that contradict themselves */
	REASON_UNTRACKED,  /* the connection could not be entered */
	REASONS,
};

/* Indexes of stages. */
enum stage {
	STAGE_FROM_POD, /* policy for what leaves a pod, behind its translation */
	STAGE_TO_POD,   /* translation of what policy lets into a pod */
	STAGES,
};

/* Told through the ring buffer: a drop, or a new connection. */
struct flow_event {
	u64 time;           /* nanoseconds of the monotonic clock */
	struct tuple tuple; /* as the packet had it, behind the translation */
	u32 subject;        /* identities */
	u32 peer;
	u32 rule;
	u32 device;
	u8 allowed;
	u8 direction; /* enum direction */
	u8 reason;    /* enum verdict_reason */
	u8 flags;     /* TCP_*, of the packet */
	u32 pad;      /* zero */
};

/* What a program of the packet path works on; what each packet needs comes first, then what a connection does. */
struct work {
	u64 jiffies;  /* when this CPU last looked at the clock */
	u32 now;      /* what it said then, seconds */
	u32 is_plain; /* whether no flow or service is for the packet */
	struct packet packet;
	u32 has_back; /* 0 = it opens a stream, for no service, and for its answers there is no flow */
	struct flow_event event;    /* what policy makes of it */
	struct flow_event received; /* and for the pod that it goes to */
	struct subject subject;     /* whose packet it is to policy */
	u32 generation;             /* of policy, when that was begun to be asked */
	u32 has_flow;               /* whether flow is what the packet becomes */
	u32 is_read;                /* between stages: whether packet is this one, its fragments joined */
	struct flow flow;
	struct flow reply;
	struct affinity affinity;
	struct held held;
};

/* Indexes of policy_counters: (direction * REASONS + reason) * 2 + allowed; behind them, events that were lost. */
#define POLICY_COUNTERS    (DIRECTIONS * REASONS * 2 + 1)
#define POLICY_EVENTS_LOST (POLICY_COUNTERS - 1)

/* Indexes of the counters map. */
enum counter {
	COUNTER_REJECTED,             /* refused: no usable endpoint */
	COUNTER_DROPPED,              /* silent: endpoints, but none for this client (traffic policy Local) */
	COUNTER_ORIGIN_SPILLED,       /* connected sockets remembered in peer_origins: their slot was taken */
	COUNTER_ORIGIN_LOST,          /* peers nobody remembers: the map refused the entry */
	COUNTER_UNDEFINED_PORT,       /* refused: a ClusterIP without such a port */
	COUNTER_SOURCE_RANGE,         /* dropped: not in loadBalancerSourceRanges */
	COUNTER_NODE_PORT_TAKEN,      /* binds refused: the port is a NodePort */
	COUNTER_FRAGMENT_LOST,        /* dropped: a later fragment whose first one was never seen */
	COUNTER_SOURCE_NAT_EXHAUSTED, /* dropped: no free source port towards the backend */
	COUNTER_CONNTRACK_FULL,       /* dropped: conntrack refused the entry */
	COUNTER_NO_ROUTE,             /* dropped: no route to the backend or back to the client */
	COUNTER_TOO_BIG,              /* answered: does not fit the way to the backend */
	COUNTER_TTL_EXCEEDED,         /* dropped: out of hops */
	COUNTER_WRITE_FAILED,         /* dropped: the packet could not be rewritten */
	COUNTER_FLOWS,                /* flows that began to be translated */
	COUNTER_STAGE_MISSED,         /* dropped: the program that was to go on is not there */
	COUNTERS,
};

#endif
