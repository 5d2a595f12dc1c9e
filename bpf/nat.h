/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Rewriting a packet as its flow says: addresses, ports, and every sum over them. */
#ifndef __EBPROXY_NAT_H
#define __EBPROXY_NAT_H

#include "csum.h"

#define IPV4_CHECKSUM offsetof(struct ipv4_header, checksum)
#define IPV4_SOURCE   offsetof(struct ipv4_header, source)
#define IPV6_SOURCE   offsetof(struct ipv6_header, source)
#define ICMP_CHECKSUM offsetof(struct icmp_header, checksum)

struct pair {
	struct address source;
	struct address destination;
};

/* What other addresses add to a sum over them, in either family: IPv4's are held behind the same words. */
static __always_inline u32 nat_difference(const struct pair *from, const struct pair *to)
{
	u64 sum = 0;
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		sum += (u64)to->source.word[i] + to->destination.word[i];
		sum += (u64)(u32)~from->source.word[i] + (u32)~from->destination.word[i];
	}
	sum = (u32)sum + (sum >> 32);
	return (u32)sum + (u32)(sum >> 32);
}

static __always_inline u32 nat_ports_word(__be16 source, __be16 destination)
{
	struct ports ports = { source, destination };
	u32 word;

	__builtin_memcpy(&word, &ports, sizeof(word));
	return word;
}

/* Find a transport header's checksum where it stands; NULL = out of reach. */
static __always_inline u16 *nat_find_checksum(struct __sk_buff *skb, u32 offset)
{
	u16 *there;

	if (offset > PARSE_REACH)
		return NULL;
	there = (void *)(long)skb->data + offset;
	return (void *)(there + 1) <= (void *)(long)skb->data_end ? there : NULL;
}

/*
 * Whether a checksum was complete when it went from one value to another as its addresses changed. One that is yet to be
 * completed is a sum, any other a sum's complement: the same difference is added to one and taken from the other. Both
 * come to the same only where twice the difference is nothing, so where it is nothing, 65535 being odd.
 */
static __always_inline bool nat_is_complete(u16 before, u16 after, u32 difference)
{
	u16 folded = csum_fold(difference);

	return folded && folded != 0xffff && after == csum_fold((u64)(u16)~before + difference);
}

/**
 * nat_checksum - Update a transport header's checksum for other addresses and ports.
 * @from: the ports as they are, @to: as they become
 * @difference: what the addresses add to a sum over them
 *
 * The kernel is asked once: it knows whether the checksum is yet to be completed, and what the device said of it. What it
 * made of it tells the former, and the latter does not change with the ports.
 */
static __always_inline int nat_checksum(struct __sk_buff *skb, const struct packet *packet, u32 from, u32 to,
					u32 difference)
{
	bool is_udp = packet->tuple.protocol == IPPROTO_UDP;
	u32 offset = packet->l4 + (is_udp ? CSUM_OFFSET_UDP : CSUM_OFFSET_TCP);
	u32 flags = is_udp ? BPF_F_MARK_MANGLED_0 : 0; /* zero says that there is none */
	u16 *there, before;

	if (packet->tuple.protocol == IPPROTO_SCTP)
		return from == to ? 0 : csum_sctp_ports(skb, packet->l4, from ^ to, packet->end - packet->l4);
	there = nat_find_checksum(skb, offset);
	before = there ? *there : 0;
	if (bpf_l4_csum_replace(skb, offset, 0, difference, flags | BPF_F_PSEUDO_HDR))
		return -1;
	if (from == to)
		return 0;
	there = nat_find_checksum(skb, offset);
	if (!there || !before || !nat_is_complete(before, *there, difference))
		return bpf_l4_csum_replace(skb, offset, from, to, flags | sizeof(to));
	before = csum_fold((u64)(u16) ~*there + (u32)~from + to);
	*there = is_udp && !before ? 0xffff : before;
	return 0;
}

/* Write the ports, where they stand if they are in reach. */
static __always_inline int nat_write_ports(struct __sk_buff *skb, u32 l4, u32 ports)
{
	u32 *there;

	if (l4 <= PARSE_REACH) {
		there = (void *)(long)skb->data + l4;
		if ((void *)(there + 1) <= (void *)(long)skb->data_end) {
			*there = ports;
			return 0;
		}
	}
	return bpf_skb_store_bytes(skb, l4, &ports, sizeof(ports), 0);
}

/* Add a difference to an IPv4 header's checksum. */
static __always_inline void nat_ipv4_checksum(struct ipv4_header *header, u64 difference)
{
	header->checksum = csum_fold((u16)~header->checksum + (difference & 0xffff) + (difference >> 16));
}

/**
 * nat_write_addresses - Write both addresses of the packet's IP header, and IPv4's checksum.
 * @difference: what they add to a sum over them
 * @hops: how many hops to count down
 */
static __always_inline int nat_write_addresses(struct __sk_buff *skb, bool is_ipv6, const struct pair *to,
					       u32 difference, u8 hops)
{
	void *header = (void *)(long)skb->data + ETH_SIZE, *end = (void *)(long)skb->data_end;
	struct ipv4_header *v4 = header;
	struct ipv6_header *v6 = header;

	if (is_ipv6) {
		if ((void *)(v6 + 1) > end)
			return -1;
		v6->source = to->source;
		v6->destination = to->destination;
		v6->hop_limit -= hops;
		return 0;
	}
	if ((void *)(v4 + 1) > end)
		return -1;
	nat_ipv4_checksum(v4, (u64)difference + (u16)~bpf_htons(hops << 8));
	v4->source = to->source.word[3];
	v4->destination = to->destination.word[3];
	v4->ttl -= hops;
	return 0;
}

static __always_inline u16 nat_load16(struct __sk_buff *skb, u32 offset)
{
	u16 value = 0;

	bpf_skb_load_bytes(skb, offset, &value, sizeof(value));
	return value;
}

/* Write both addresses of an IP header that is quoted, and IPv4's checksum. */
static __always_inline int nat_write_quoted(struct __sk_buff *skb, const struct packet *packet,
					    struct pair *to, u32 difference)
{
	__be32 ipv4[2] = { to->source.word[3], to->destination.word[3] };
	u32 l3 = packet->inner_l3;

	if (packet->is_ipv6)
		return bpf_skb_store_bytes(skb, l3 + IPV6_SOURCE, to, sizeof(*to), 0);
	return bpf_l3_csum_replace(skb, l3 + IPV4_CHECKSUM, 0, difference, 0)
		       ?: bpf_skb_store_bytes(skb, l3 + IPV4_SOURCE, ipv4, sizeof(ipv4), 0);
}

/*
 * Rewrite an ICMP error about a packet of the other way: its own addresses, and those and the ports of the packet that
 * it quotes. Whoever answers for the sender of the quoted packet is where the error seems to come from, as netfilter
 * has it: the hop that found fault may have an address that means nothing to the receiver.
 */
static __always_inline int nat_icmp_error(struct __sk_buff *skb, const struct packet *packet,
					  const struct flow *flow, u8 hops)
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
	if (nat_write_quoted(skb, packet, &quoted_to, quoted))
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
	return nat_write_addresses(skb, packet->is_ipv6, &outer_to, quoted, hops);
}

/**
 * nat_translate - Rewrite a packet.
 * @packet: what it is
 * @flow: what it becomes
 * @hops: how many hops to count down, as a router does
 * Returns 0, or less than 0 when it may be half rewritten and must be dropped.
 */
static __always_inline int nat_translate(struct __sk_buff *skb, const struct packet *packet,
					 const struct flow *flow, u8 hops)
{
	struct pair from = { packet->tuple.source, packet->tuple.destination };
	struct pair to = { flow->source, flow->destination };
	u32 ports_from, ports_to, difference;

	if (packet->kind == PACKET_ICMP_ERROR)
		return nat_icmp_error(skb, packet, flow, hops);
	difference = nat_difference(&from, &to);
	if (packet->kind != PACKET_LATER_FRAGMENT) {
		ports_from = nat_ports_word(packet->tuple.source_port, packet->tuple.destination_port);
		ports_to = nat_ports_word(flow->source_port, flow->destination_port);
		if (nat_checksum(skb, packet, ports_from, ports_to, difference) ||
		    (ports_from != ports_to && nat_write_ports(skb, packet->l4, ports_to)))
			return -1;
	}
	return nat_write_addresses(skb, packet->is_ipv6, &to, difference, hops);
}

#endif
