/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Answering a packet in the name of its destination: a refusal, a complaint about its size, an echo.
 *
 * An answer is written over the packet that it answers, without IP options, and goes back where that came from. A TCP
 * segment is refused by a RST rather than by ICMP: Linux hears one while connect() still holds the socket, and may
 * miss the other.
 */
#ifndef __EBPROXY_ANSWER_H
#define __EBPROXY_ANSWER_H

#include "csum.h"

#define ANSWER_TTL                64

#define ICMP_UNREACHABLE          3
#define ICMP_PORT_UNREACHABLE     3
#define ICMP_FRAGMENTATION_NEEDED 4
#define ICMPV6_UNREACHABLE        1
#define ICMPV6_PORT_UNREACHABLE   4
#define ICMPV6_TOO_BIG            2
#define ICMP_QUOTED               8 /* bytes of the transport header that are quoted */

struct ethernet_header {
	u8 destination[6];
	u8 source[6];
	__be16 protocol;
};

struct ipv4_rst {
	struct ipv4_header ip;
	struct tcp_header tcp;
};

struct ipv6_rst {
	struct ipv6_header ip;
	struct tcp_header tcp;
};

struct ipv4_error {
	struct ipv4_header ip;
	struct icmp_header icmp;
	struct ipv4_header quoted;
	u8 transport[ICMP_QUOTED];
};

/* Of a fragment, its header is quoted too. */
struct ipv6_error {
	struct ipv6_header ip;
	struct icmp_header icmp;
	struct ipv6_header quoted;
	u8 transport[sizeof(struct ipv6_extension) + ICMP_QUOTED];
};

/* The part of a checksum that stands for the addresses, the length and the protocol. */
static __always_inline u64 answer_pseudo_sum(const struct tuple *tuple, u8 protocol, u16 size)
{
	u64 sum = bpf_csum_diff(0, 0, (void *)tuple, 2 * sizeof(struct address), 0);

	/* Both IPv4 addresses are held behind ffff, which is zero in one's complement. */
	return sum + bpf_htons(protocol) + bpf_htons(size);
}

static __always_inline void answer_ipv4_header(struct ipv4_header *ip, const struct tuple *tuple, u8 protocol,
					       u16 size)
{
	ip->version_ihl = 0x45;
	ip->total_length = bpf_htons(size);
	ip->fragment = bpf_htons(IPV4_DONT_FRAGMENT); /* may not be fragmented, so needs no id */
	ip->ttl = ANSWER_TTL;
	ip->protocol = protocol;
	ip->source = tuple->destination.word[3];
	ip->destination = tuple->source.word[3];
	ip->checksum = csum_fold(bpf_csum_diff(0, 0, (void *)ip, sizeof(*ip), 0));
}

static __always_inline void answer_ipv6_header(struct ipv6_header *ip, const struct tuple *tuple, u8 protocol,
					       u16 payload)
{
	ip->version_class_label = bpf_htonl(6u << 28);
	ip->payload_length = bpf_htons(payload);
	ip->next_header = protocol;
	ip->hop_limit = ANSWER_TTL;
	ip->source = tuple->destination;
	ip->destination = tuple->source;
}

/* Send the packet's Ethernet frame back to its sender. */
static __always_inline int answer_turn_round(struct __sk_buff *skb)
{
	struct ethernet_header eth;
	u8 sender[6];

	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return -1;
	__builtin_memcpy(sender, eth.source, sizeof(sender));
	__builtin_memcpy(eth.source, eth.destination, sizeof(sender));
	__builtin_memcpy(eth.destination, sender, sizeof(sender));
	return bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0);
}

/*
 * Whether the kernel will complete the packet's checksum later (CHECKSUM_PARTIAL): then it ignores changes of what is
 * not in the pseudo header, which is how it is found out.
 */
static __always_inline bool answer_is_partial(struct __sk_buff *skb, u32 offset)
{
	u16 before = 0, after = 0;

	bpf_skb_load_bytes(skb, offset, &before, sizeof(before));
	bpf_l4_csum_replace(skb, offset, 0, bpf_htons(0x0101), sizeof(u16));
	bpf_skb_load_bytes(skb, offset, &after, sizeof(after));
	return before == after;
}

/* Write the TCP header that refuses a segment (RFC 9293, 3.5.2). */
static __always_inline void answer_rst_header(struct tcp_header *rst, const struct tcp_header *refused,
					      u32 size)
{
	u32 length = size - (refused->offset >> 4) * 4;

	rst->source = refused->destination;
	rst->destination = refused->source;
	rst->offset = sizeof(*rst) / 4 << 4;
	if (refused->flags & TCP_ACK) {
		rst->sequence = refused->acknowledged;
		rst->flags = TCP_RST;
		return;
	}
	length += !!(refused->flags & TCP_SYN) + !!(refused->flags & TCP_FIN);
	rst->acknowledged = bpf_htonl(bpf_ntohl(refused->sequence) + length);
	rst->flags = TCP_RST | TCP_ACK;
}

/**
 * answer_rst - Turn a TCP segment into its refusal.
 * Returns 0, or less than 0 when the packet is spoilt, or is one that is not to be answered.
 */
static __always_inline int answer_rst(struct __sk_buff *skb, const struct packet *packet)
{
	struct ipv6_rst v6 = {};
	struct ipv4_rst v4 = {};
	struct tcp_header refused, rst = {};
	bool is_partial;
	u64 sum;

	if (packet->flags & TCP_RST || bpf_skb_load_bytes(skb, packet->l4, &refused, sizeof(refused)))
		return -1;
	answer_rst_header(&rst, &refused, packet->end - packet->l4);
	is_partial = answer_is_partial(skb, packet->l4 + CSUM_OFFSET_TCP);
	sum = answer_pseudo_sum(&packet->tuple, IPPROTO_TCP, sizeof(rst));
	if (is_partial)
		rst.checksum = ~csum_fold(sum);
	else
		rst.checksum = csum_fold(sum + bpf_csum_diff(0, 0, (void *)&rst, sizeof(rst), 0));
	if (packet->is_ipv6) {
		answer_ipv6_header(&v6.ip, &packet->tuple, IPPROTO_TCP, sizeof(rst));
		v6.tcp = rst;
		return bpf_skb_change_tail(skb, ETH_SIZE + sizeof(v6), 0)
			       ?: bpf_skb_store_bytes(skb, ETH_SIZE, &v6, sizeof(v6), 0);
	}
	answer_ipv4_header(&v4.ip, &packet->tuple, IPPROTO_TCP, sizeof(v4));
	v4.tcp = rst;
	return bpf_skb_change_tail(skb, ETH_SIZE + sizeof(v4), 0)
		       ?: bpf_skb_store_bytes(skb, ETH_SIZE, &v4, sizeof(v4), 0);
}

static __always_inline int answer_ipv4_error(struct __sk_buff *skb, const struct packet *packet, u8 code,
					     u32 rest)
{
	struct ipv4_error error = {
		.icmp = { .type = ICMP_UNREACHABLE, .code = code, .rest = bpf_htonl(rest) },
	};

	if (bpf_skb_load_bytes(skb, ETH_SIZE, &error.quoted, sizeof(error.quoted)) ||
	    bpf_skb_load_bytes(skb, packet->l4, error.transport, sizeof(error.transport)))
		return -1;
	answer_ipv4_header(&error.ip, &packet->tuple, IPPROTO_ICMP, sizeof(error));
	error.icmp.checksum =
		csum_fold(bpf_csum_diff(0, 0, (void *)&error.icmp, sizeof(error) - sizeof(error.ip), 0));
	return bpf_skb_change_tail(skb, ETH_SIZE + sizeof(error), 0)
		       ?: bpf_skb_store_bytes(skb, ETH_SIZE, &error, sizeof(error), 0);
}

static __always_inline int answer_ipv6_error(struct __sk_buff *skb, const struct packet *packet, u8 type,
					     u8 code, u32 rest)
{
	struct ipv6_error error = {
		.icmp = { .type = type, .code = code, .rest = bpf_htonl(rest) },
	};
	u32 quoted = packet->l3_size + ICMP_QUOTED;
	u32 payload = sizeof(error.icmp) + quoted;
	u64 sum;

	if (quoted > sizeof(error.quoted) + sizeof(error.transport) ||
	    bpf_skb_load_bytes(skb, ETH_SIZE, &error.quoted, quoted))
		return -1;
	answer_ipv6_header(&error.ip, &packet->tuple, IPPROTO_ICMPV6, payload);
	sum = answer_pseudo_sum(&packet->tuple, IPPROTO_ICMPV6, payload);
	/* What is not quoted is zero, and adds nothing. */
	error.icmp.checksum = csum_fold(
		sum + bpf_csum_diff(0, 0, (void *)&error.icmp, sizeof(error) - sizeof(error.ip), 0));
	return bpf_skb_change_tail(skb, ETH_SIZE + sizeof(error.ip) + payload, 0)
		       ?: bpf_skb_store_bytes(skb, ETH_SIZE, &error, sizeof(error.ip) + payload, 0);
}

/*
 * Whether the headers of a packet are such that a quotation tells its flow: no IP options, no extensions but that of a
 * fragment. Others are not answered.
 */
static __always_inline bool answer_can_quote(const struct packet *packet)
{
	u32 fragment = packet->kind == PACKET_WHOLE ? 0 : sizeof(struct ipv6_extension);

	if (packet->is_ipv6)
		return packet->l3_size == sizeof(struct ipv6_header) + fragment;
	return packet->l3_size == sizeof(struct ipv4_header);
}

/* Turn a packet into the ICMP error that refuses it. */
static __always_inline int answer_unreachable(struct __sk_buff *skb, const struct packet *packet)
{
	if (!answer_can_quote(packet))
		return -1;
	if (packet->is_ipv6)
		return answer_ipv6_error(skb, packet, ICMPV6_UNREACHABLE, ICMPV6_PORT_UNREACHABLE, 0);
	return answer_ipv4_error(skb, packet, ICMP_PORT_UNREACHABLE, 0);
}

/* Turn a packet into the ICMP error that says how large one may be. */
static __always_inline int answer_too_big(struct __sk_buff *skb, const struct packet *packet, u32 mtu)
{
	if (!answer_can_quote(packet))
		return -1;
	if (packet->is_ipv6)
		return answer_ipv6_error(skb, packet, ICMPV6_TOO_BIG, 0, mtu);
	return answer_ipv4_error(skb, packet, ICMP_FRAGMENTATION_NEEDED, mtu);
}

/* Turn a ping into its answer. */
static __always_inline int answer_echo(struct __sk_buff *skb, const struct packet *packet)
{
	struct address swapped[2] = { packet->tuple.destination, packet->tuple.source };
	__be32 ipv4[2] = { swapped[0].word[3], swapped[1].word[3] };
	u8 type = packet->is_ipv6 ? 129 : 0;
	u16 from = bpf_htons((packet->is_ipv6 ? 128 : 8) << 8), to = bpf_htons(type << 8);

	/* Swapped addresses leave every sum over them as it is. */
	if (bpf_l4_csum_replace(skb, packet->l4 + offsetof(struct icmp_header, checksum), from, to,
				sizeof(to)) ||
	    bpf_skb_store_bytes(skb, packet->l4, &type, sizeof(type), 0))
		return -1;
	if (packet->is_ipv6)
		return bpf_skb_store_bytes(skb, ETH_SIZE + offsetof(struct ipv6_header, source), swapped,
					   sizeof(swapped), 0);
	return bpf_skb_store_bytes(skb, ETH_SIZE + offsetof(struct ipv4_header, source), ipv4, sizeof(ipv4),
				   0);
}

#endif
