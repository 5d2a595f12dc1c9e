/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Rewriting a packet as its flow says: addresses, ports, and every sum over them. */
#ifndef __EBPROXY_NAT_H
#define __EBPROXY_NAT_H

#include "csum.h"

#define IPV4_CHECKSUM  offsetof(struct ipv4_header, checksum)
#define IPV4_TTL       offsetof(struct ipv4_header, ttl)
#define IPV4_SOURCE    offsetof(struct ipv4_header, source)
#define IPV6_SOURCE    offsetof(struct ipv6_header, source)
#define IPV6_HOP_LIMIT offsetof(struct ipv6_header, hop_limit)
#define ICMP_CHECKSUM  offsetof(struct icmp_header, checksum)

/* What changes of a packet's addresses; bpf_csum_diff() takes both at once, for either family. */
struct pair {
	struct address source;
	struct address destination;
};

static __always_inline u32 nat_difference(const struct pair *from, const struct pair *to)
{
	return bpf_csum_diff((void *)from, sizeof(*from), (void *)to, sizeof(*to), 0);
}

/* Write both addresses of an IP header, and IPv4's checksum. */
static __always_inline int nat_write_addresses(struct __sk_buff *skb, u32 l3, bool is_ipv6,
					       const struct pair *to, u32 difference)
{
	__be32 ipv4[2] = { to->source.word[3], to->destination.word[3] };

	if (is_ipv6)
		return bpf_skb_store_bytes(skb, l3 + IPV6_SOURCE, (void *)to, sizeof(*to), 0);
	return bpf_l3_csum_replace(skb, l3 + IPV4_CHECKSUM, 0, difference, 0)
		       ?: bpf_skb_store_bytes(skb, l3 + IPV4_SOURCE, ipv4, sizeof(ipv4), 0);
}

static __always_inline u32 nat_ports_word(__be16 source, __be16 destination)
{
	struct ports ports = { source, destination };
	u32 word;

	__builtin_memcpy(&word, &ports, sizeof(word));
	return word;
}

/* Update a transport header's checksum for other addresses and ports, and write the ports. */
static __always_inline int nat_write_ports(struct __sk_buff *skb, const struct packet *packet,
					   const struct flow *flow, u32 difference)
{
	u32 from = nat_ports_word(packet->tuple.source_port, packet->tuple.destination_port);
	u32 to = nat_ports_word(flow->source_port, flow->destination_port);
	u32 offset = packet->l4 + CSUM_OFFSET_TCP;
	u32 flags = 0;
	int failed;

	if (packet->tuple.protocol == IPPROTO_SCTP) {
		failed = from == to ? 0
				    : csum_sctp_ports(skb, packet->l4, from ^ to, packet->end - packet->l4);
	} else {
		if (packet->tuple.protocol == IPPROTO_UDP) {
			offset = packet->l4 + CSUM_OFFSET_UDP;
			flags = BPF_F_MARK_MANGLED_0; /* zero says that there is none */
		}
		failed = bpf_l4_csum_replace(skb, offset, 0, difference, flags | BPF_F_PSEUDO_HDR);
		if (!failed && from != to)
			failed = bpf_l4_csum_replace(skb, offset, from, to, flags | sizeof(to));
	}
	if (failed || from == to)
		return failed;
	return bpf_skb_store_bytes(skb, packet->l4, &to, sizeof(to), 0);
}

static __always_inline u16 nat_load16(struct __sk_buff *skb, u32 offset)
{
	u16 value = 0;

	bpf_skb_load_bytes(skb, offset, &value, sizeof(value));
	return value;
}

/*
 * Rewrite an ICMP error about a packet of the other way: its own addresses, and those and the ports of the packet that
 * it quotes. Whoever answers for the sender of the quoted packet is where the error seems to come from, as netfilter
 * has it: the hop that found fault may have an address that means nothing to the receiver.
 */
static __always_inline int nat_icmp_error(struct __sk_buff *skb, const struct packet *packet,
					  const struct flow *flow)
{
	struct pair quoted_from = { packet->tuple.destination, packet->tuple.source };
	struct pair quoted_to = { flow->destination, flow->source };
	struct pair outer_from = {}, outer_to = { flow->source, flow->destination };
	u32 ports_from = nat_ports_word(packet->tuple.destination_port, packet->tuple.source_port);
	u32 ports_to = nat_ports_word(flow->destination_port, flow->source_port);
	u32 checksum = packet->l4 + ICMP_CHECKSUM;
	u32 inner_checksum = packet->inner_l3 + IPV4_CHECKSUM;
	u32 quoted = nat_difference(&quoted_from, &quoted_to);
	u64 pseudo = packet->is_ipv6 ? BPF_F_PSEUDO_HDR : 0;
	__be32 ipv4[2];
	u16 before;

	if (packet->is_ipv6) {
		if (bpf_skb_load_bytes(skb, ETH_SIZE + IPV6_SOURCE, &outer_from, sizeof(outer_from)))
			return -1;
	} else {
		if (bpf_skb_load_bytes(skb, ETH_SIZE + IPV4_SOURCE, ipv4, sizeof(ipv4)))
			return -1;
		outer_from.source = address_from_ipv4(ipv4[0]);
		outer_from.destination = address_from_ipv4(ipv4[1]);
	}
	before = packet->is_ipv6 ? 0 : nat_load16(skb, inner_checksum);
	if (nat_write_addresses(skb, packet->inner_l3, packet->is_ipv6, &quoted_to, quoted))
		return -1;
	/* What is quoted is payload of ICMP: its addresses, its IPv4 checksum, its ports. */
	if (bpf_l4_csum_replace(skb, checksum, 0, quoted, 0))
		return -1;
	if (!packet->is_ipv6 &&
	    bpf_l4_csum_replace(skb, checksum, before, nat_load16(skb, inner_checksum), sizeof(before)))
		return -1;
	if (bpf_l4_csum_replace(skb, checksum, ports_from, ports_to, sizeof(ports_to)) ||
	    bpf_skb_store_bytes(skb, packet->inner_l4, &ports_to, sizeof(ports_to), 0))
		return -1;
	/* ICMPv6 has the outer addresses in its pseudo header. */
	quoted = nat_difference(&outer_from, &outer_to);
	if (pseudo && bpf_l4_csum_replace(skb, checksum, 0, quoted, pseudo))
		return -1;
	return nat_write_addresses(skb, ETH_SIZE, packet->is_ipv6, &outer_to, quoted);
}

/**
 * nat_translate - Rewrite a packet.
 * @packet: what it is
 * @flow: what it becomes
 * Returns 0, or less than 0 when it may be half rewritten and must be dropped.
 */
static __always_inline int nat_translate(struct __sk_buff *skb, const struct packet *packet,
					 const struct flow *flow)
{
	struct pair from = { packet->tuple.source, packet->tuple.destination };
	struct pair to = { flow->source, flow->destination };
	u32 difference;

	if (packet->kind == PACKET_ICMP_ERROR)
		return nat_icmp_error(skb, packet, flow);
	difference = nat_difference(&from, &to);
	if (packet->kind != PACKET_LATER_FRAGMENT && nat_write_ports(skb, packet, flow, difference))
		return -1;
	return nat_write_addresses(skb, ETH_SIZE, packet->is_ipv6, &to, difference);
}

/* Count a hop down, as a router does. */
static __always_inline int nat_count_hop(struct __sk_buff *skb, const struct packet *packet)
{
	u8 ttl = packet->ttl - 1;

	if (packet->is_ipv6)
		return bpf_skb_store_bytes(skb, ETH_SIZE + IPV6_HOP_LIMIT, &ttl, sizeof(ttl), 0);
	return bpf_l3_csum_replace(skb, ETH_SIZE + IPV4_CHECKSUM, bpf_htons(packet->ttl << 8),
				   bpf_htons(ttl << 8), sizeof(u16))
		       ?: bpf_skb_store_bytes(skb, ETH_SIZE + IPV4_TTL, &ttl, sizeof(ttl), 0);
}

#endif
