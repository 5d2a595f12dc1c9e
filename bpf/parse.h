/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Reading a packet: which flow it belongs to, and where its headers stand.
 *
 * Both families come out alike. What cannot be read is left to the stack, which knows how to refuse it.
 */
#ifndef __EBPROXY_PARSE_H
#define __EBPROXY_PARSE_H

#include "maps.h"

#ifdef POLICY
#define HAS_POLICY 1
#else
#define HAS_POLICY 0
#endif

#define ETH_P_IP   0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_SIZE   14 /* every device that the programs are attached to has an Ethernet header, lo included */

#define IPPROTO_HOPOPTS        0
#define IPPROTO_ICMP           1
#define IPPROTO_TCP            6
#define IPPROTO_UDP            17
#define IPPROTO_ROUTING        43
#define IPPROTO_FRAGMENT       44
#define IPPROTO_ICMPV6         58
#define IPPROTO_DSTOPTS        60
#define IPPROTO_SCTP           132

#define TCP_FIN                0x01
#define TCP_SYN                0x02
#define TCP_RST                0x04
#define TCP_ACK                0x10

/* Chunks of SCTP (RFC 9260). */
#define SCTP_INIT              1
#define SCTP_ABORT             6
#define SCTP_SHUTDOWN_COMPLETE 14

/* How far into a packet headers are read and written where they stand, rather than through calls. */
#define PARSE_REACH            256

/* Extension headers of one packet that are read; a packet with more is left to the stack. */
#define IPV6_EXTENSIONS        6

struct ipv4_header {
	u8 version_ihl;
	u8 tos;
	__be16 total_length;
	__be16 id;
	__be16 fragment;
	u8 ttl;
	u8 protocol;
	__be16 checksum;
	__be32 source;
	__be32 destination;
};

#define IPV4_DONT_FRAGMENT   0x4000
#define IPV4_MORE_FRAGMENTS  0x2000
#define IPV4_FRAGMENT_OFFSET 0x1fff

struct ipv6_header {
	__be32 version_class_label;
	__be16 payload_length;
	u8 next_header;
	u8 hop_limit;
	struct address source;
	struct address destination;
};

struct ipv6_extension {
	u8 next_header;
	u8 length; /* in units of 8 bytes, the first not counted */
	__be16 fragment;
	__be32 id;
};

#define IPV6_MORE_FRAGMENTS  0x0001
#define IPV6_FRAGMENT_OFFSET 0xfff8

struct tcp_header {
	__be16 source;
	__be16 destination;
	__be32 sequence;
	__be32 acknowledged;
	u8 offset; /* of the data, in units of 4 bytes, in the upper half */
	u8 flags;
	__be16 window;
	__be16 checksum;
	__be16 urgent;
};

struct icmp_header {
	u8 type;
	u8 code;
	__be16 checksum;
	__be32 rest;
};

/* Why a packet belongs to no flow of a service, which policy alone asks. */
enum parse_reading {
	PARSE_FLOW,       /* it may belong to one */
	PARSE_OTHER,      /* its protocol has none, but its ends are known */
	PARSE_STRAY,      /* an ICMP error that does not tell what it is about; its tuple means nothing */
	PARSE_UNREADABLE, /* it contradicts itself, or goes on beyond what is read */
	PARSE_FOREIGN,    /* neither IPv4 nor IPv6 */
	PARSE_MAPPED, /* IPv6 between addresses that stand for IPv4's, which no wire has (RFC 4291); its tuple deceives */
};

static __always_inline bool parse_ends(struct packet *packet, enum parse_reading reading)
{
	if (HAS_POLICY)
		packet->reading = reading;
	return false;
}

/* Read an IP header that stands at an offset. Returns the offset of what follows it; 0 = not to be read. */
static __always_inline u32 parse_ipv4(const struct ipv4_header *header, u32 l3, struct packet *packet)
{
	u32 size = (header->version_ihl & 0x0f) * 4;
	u16 fragment = bpf_ntohs(header->fragment);

	if (header->version_ihl >> 4 != 4 || size < sizeof(*header))
		return 0;
	if (unlikely(fragment & IPV4_FRAGMENT_OFFSET))
		packet->kind = PACKET_LATER_FRAGMENT;
	else if (fragment & IPV4_MORE_FRAGMENTS)
		packet->kind = PACKET_FIRST_FRAGMENT;
	packet->fragment_id = header->id;
	packet->ttl = header->ttl;
	packet->end = l3 + bpf_ntohs(header->total_length);
	packet->tuple.protocol = header->protocol;
	packet->tuple.source = address_from_ipv4(header->source);
	packet->tuple.destination = address_from_ipv4(header->destination);
	return l3 + size;
}

static __always_inline bool parse_is_extension(u8 header)
{
	return header == IPPROTO_HOPOPTS || header == IPPROTO_ROUTING || header == IPPROTO_DSTOPTS ||
	       header == IPPROTO_FRAGMENT;
}

/* Go past the extension headers of IPv6. Returns the offset of what follows them; 0 = not to be read. */
static __always_inline u32 parse_extensions(struct __sk_buff *skb, u32 offset, u8 next, struct packet *packet)
{
	struct ipv6_extension extension;
	u16 fragment;
	int i;

	for (i = 0; i < IPV6_EXTENSIONS && parse_is_extension(next); i++) {
		if (bpf_skb_load_bytes(skb, offset, &extension, sizeof(extension)))
			return 0;
		if (next == IPPROTO_FRAGMENT) {
			fragment = bpf_ntohs(extension.fragment);
			packet->fragment_id = extension.id;
			if (fragment & IPV6_FRAGMENT_OFFSET)
				packet->kind = PACKET_LATER_FRAGMENT;
			else if (fragment & IPV6_MORE_FRAGMENTS)
				packet->kind = PACKET_FIRST_FRAGMENT;
			offset += sizeof(extension);
		} else {
			offset += (extension.length + 1) * 8;
		}
		next = extension.next_header;
		if (packet->kind == PACKET_LATER_FRAGMENT)
			break;
	}
	packet->tuple.protocol = next;
	return offset;
}

static __always_inline u32 parse_ipv6(struct __sk_buff *skb, const struct ipv6_header *header, u32 l3,
				      struct packet *packet)
{
	u32 offset = l3 + sizeof(*header);
	u8 next = header->next_header;

	if ((bpf_ntohl(header->version_class_label) >> 28) != 6)
		return 0;
	packet->ttl = header->hop_limit;
	packet->end = header->payload_length ? offset + bpf_ntohs(header->payload_length) : skb->len;
	packet->tuple.source = header->source;
	packet->tuple.destination = header->destination;
	packet->tuple.protocol = next;
	return parse_is_extension(next) ? parse_extensions(skb, offset, next, packet) : offset;
}

static __always_inline bool parse_has_ports(u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

static __always_inline bool parse_is_error(bool is_ipv6, u8 type)
{
	/* ICMP: unreachable, time exceeded, parameter problem (RFC 792). ICMPv6: 1 to 4 (RFC 4443). */
	return is_ipv6 ? type >= 1 && type <= 4 : type == 3 || type == 11 || type == 12;
}

/* Read the ports of a transport header that is quoted. */
static __always_inline bool parse_quoted_ports(struct __sk_buff *skb, struct packet *packet)
{
	struct ports ports;

	if (bpf_skb_load_bytes(skb, packet->inner_l4, &ports, sizeof(ports)))
		return false;
	packet->tuple.source_port = ports.source;
	packet->tuple.destination_port = ports.destination;
	return true;
}

static __always_inline u32 parse_quoted(struct __sk_buff *skb, struct packet *packet)
{
	struct ipv6_header v6;
	struct ipv4_header v4;

	if (packet->is_ipv6) {
		if (bpf_skb_load_bytes(skb, packet->inner_l3, &v6, sizeof(v6)))
			return 0;
		return parse_ipv6(skb, &v6, packet->inner_l3, packet);
	}
	if (bpf_skb_load_bytes(skb, packet->inner_l3, &v4, sizeof(v4)))
		return 0;
	return parse_ipv4(&v4, packet->inner_l3, packet);
}

/*
 * Read what an ICMP error is about, and turn it round: the error travels as an answer would. Where there is policy, it may
 * be about a packet that is no flow's.
 */
static __always_inline bool parse_icmp_error(struct __sk_buff *skb, struct packet *packet)
{
	struct tuple inner;
	u8 ttl = packet->ttl;
	u32 end = packet->end;

	packet->inner_l3 = packet->l4 + sizeof(struct icmp_header);
	packet->inner_l4 = parse_quoted(skb, packet);
	packet->ttl = ttl;
	packet->end = end;
	if (!packet->inner_l4 || packet->kind == PACKET_LATER_FRAGMENT)
		return parse_ends(packet, PARSE_STRAY);
	if (packet->inner_l4 + sizeof(struct ports) > end)
		return parse_ends(packet, PARSE_STRAY);
	if (parse_has_ports(packet->tuple.protocol) ? !parse_quoted_ports(skb, packet) : !HAS_POLICY)
		return parse_ends(packet, PARSE_STRAY);
	inner = packet->tuple;
	packet->tuple.source = inner.destination;
	packet->tuple.destination = inner.source;
	packet->tuple.source_port = inner.destination_port;
	packet->tuple.destination_port = inner.source_port;
	packet->kind = PACKET_ICMP_ERROR;
	return !HAS_POLICY || parse_has_ports(inner.protocol) || parse_ends(packet, PARSE_OTHER);
}

static __always_inline bool parse_icmp(struct __sk_buff *skb, struct packet *packet)
{
	struct icmp_header icmp;

	if (packet->kind != PACKET_WHOLE || bpf_skb_load_bytes(skb, packet->l4, &icmp, sizeof(icmp)))
		return parse_ends(packet, packet->kind == PACKET_WHOLE ? PARSE_UNREADABLE : PARSE_OTHER);
	if (parse_is_error(packet->is_ipv6, icmp.type))
		return parse_icmp_error(skb, packet);
	packet->kind = PACKET_ICMP_ECHO;
	return icmp.type == (packet->is_ipv6 ? 128 : 8) || parse_ends(packet, PARSE_OTHER);
}

/* Whether a packet opens a stream: a SYN or INIT, which no answer is. */
static __always_inline bool opens_stream(const struct packet *packet)
{
	return (packet->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* What an SCTP packet's first chunk says of its association, in TCP's terms. */
static __always_inline u8 parse_sctp_flags(u8 chunk)
{
	if (chunk == SCTP_INIT)
		return TCP_SYN;
	return chunk == SCTP_ABORT || chunk == SCTP_SHUTDOWN_COMPLETE ? TCP_RST | TCP_ACK : TCP_ACK;
}

/* The beginning of a transport header, as far as it is read. All three protocols begin with the ports. */
struct transport {
	struct ports ports;
	u8 skipped[8];
	u8 chunk; /* of SCTP: the type of the first */
	u8 flags; /* of TCP */
};

#define UDP_HEADER_SIZE  8
#define SCTP_HEADER_SIZE 12

static __always_inline void parse_transport(const struct transport *transport, struct packet *packet)
{
	packet->tuple.source_port = transport->ports.source;
	packet->tuple.destination_port = transport->ports.destination;
	if (packet->tuple.protocol == IPPROTO_TCP)
		packet->flags = transport->flags;
	else if (packet->tuple.protocol == IPPROTO_SCTP)
		packet->flags = parse_sctp_flags(transport->chunk);
}

/* Read the transport header, where it stands if it is in reach. */
static __always_inline bool parse_ports(struct __sk_buff *skb, struct packet *packet)
{
	struct transport copy = {};
	u32 size = packet->tuple.protocol == IPPROTO_UDP ? UDP_HEADER_SIZE : sizeof(copy);
	const struct transport *there;
	u32 l4 = packet->l4;

	if (l4 <= PARSE_REACH) {
		there = (void *)(long)skb->data + l4;
		if ((void *)(there + 1) <= (void *)(long)skb->data_end) {
			parse_transport(there, packet);
			return true;
		}
	}
	if (bpf_skb_load_bytes(skb, l4, &copy, size))
		return parse_ends(packet, PARSE_UNREADABLE);
	parse_transport(&copy, packet);
	return true;
}

/* What is neither IPv4 nor IPv6 has no more to it than where it is seen, which policy tells. */
static __always_inline bool parse_foreign(struct packet *packet, u32 ifindex)
{
	if (HAS_POLICY) {
		packet->ifindex = ifindex;
		packet->kind = PACKET_WHOLE;
		packet->flags = 0;
		packet->tuple.source_port = 0;
		packet->tuple.destination_port = 0;
	}
	return parse_ends(packet, PARSE_FOREIGN);
}

/* Whether an address of an IPv6 header would be taken for an IPv4 one. */
static __always_inline bool parse_is_mapped(const struct address *address)
{
	return !(address->word[0] | address->word[1] | (address->word[2] ^ bpf_htonl(0xffff)));
}

/* Read the IP header where it stands. Returns the offset of what follows it; 0 = not to be read. */
static __always_inline u32 parse_network(struct __sk_buff *skb, struct packet *packet)
{
	u32 size = packet->is_ipv6 ? sizeof(struct ipv6_header) : sizeof(struct ipv4_header);
	void *header = (void *)(long)skb->data + ETH_SIZE;

	if (unlikely(header + size > (void *)(long)skb->data_end)) {
		if (bpf_skb_pull_data(skb, ETH_SIZE + size))
			return 0;
		header = (void *)(long)skb->data + ETH_SIZE;
	}
	if (packet->is_ipv6) {
		if (header + sizeof(struct ipv6_header) > (void *)(long)skb->data_end)
			return 0;
		return parse_ipv6(skb, header, ETH_SIZE, packet);
	}
	if (header + sizeof(struct ipv4_header) > (void *)(long)skb->data_end)
		return 0;
	return parse_ipv4(header, ETH_SIZE, packet);
}

/* How much of its payload a packet has to have. */
static __always_inline u32 parse_least(const struct packet *packet)
{
	u8 protocol = packet->tuple.protocol;

	if (HAS_POLICY && !parse_has_ports(protocol) &&
	    protocol != (packet->is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return 0;
	return protocol == IPPROTO_TCP    ? sizeof(struct tcp_header)
	       : protocol == IPPROTO_SCTP ? SCTP_HEADER_SIZE
					  : UDP_HEADER_SIZE;
}

/*
 * Whether a packet has all the bytes that its header promises, and those that its transport needs. Segments to be cut
 * later may be longer than an IPv4 header can say.
 */
static __always_inline bool parse_is_whole(struct __sk_buff *skb, struct packet *packet)
{
	u32 size = skb->len;
	u32 least = packet->l4;

	if (packet->kind != PACKET_LATER_FRAGMENT)
		least += parse_least(packet);
	if (packet->end == ETH_SIZE && skb->gso_size)
		packet->end = size;
	return packet->end <= size && packet->end >= least;
}

/**
 * parse_packet - Read a packet.
 * @packet: receives what was read
 * Returns whether it may belong to a flow of a service. Of a later fragment, the ports are not known yet.
 */
static __always_inline bool parse_packet(struct __sk_buff *skb, struct packet *packet)
{
	u32 ifindex = skb->ifindex;

	/* LLVM 14 else reads it later, through a computed context pointer, which the verifier refuses. */
	asm volatile("" : "+r"(ifindex));
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return parse_foreign(packet, ifindex);
	/* What is read below need not be cleared, nor what only an ICMP error has. */
	packet->ifindex = ifindex;
	if (HAS_POLICY)
		packet->reading = PARSE_FLOW;
	packet->kind = PACKET_WHOLE;
	packet->flags = 0;
	packet->tuple.source_port = 0;
	packet->tuple.destination_port = 0;
	packet->tuple.pad[0] = 0;
	packet->tuple.pad[1] = 0;
	packet->tuple.pad[2] = 0;
	packet->is_ipv6 = skb->protocol == bpf_htons(ETH_P_IPV6);
	packet->l4 = parse_network(skb, packet);
	if (HAS_POLICY && packet->is_ipv6 &&
	    (parse_is_mapped(&packet->tuple.source) || parse_is_mapped(&packet->tuple.destination)))
		return parse_ends(packet, PARSE_MAPPED);
	if (unlikely(!packet->l4))
		return parse_ends(packet, PARSE_UNREADABLE);
	packet->l3_size = packet->l4 - ETH_SIZE;
	if (unlikely(!parse_is_whole(skb, packet)))
		return parse_ends(packet, PARSE_UNREADABLE);
	if (packet->tuple.protocol == (packet->is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return parse_icmp(skb, packet);
	if (!parse_has_ports(packet->tuple.protocol))
		return parse_ends(packet, parse_is_extension(packet->tuple.protocol) ? PARSE_UNREADABLE
										     : PARSE_OTHER);
	return packet->kind == PACKET_LATER_FRAGMENT || parse_ports(skb, packet);
}

#endif
