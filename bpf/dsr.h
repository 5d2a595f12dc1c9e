/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Direct server return: the backend's node answers clients outside in the name of the frontend, by itself.
 *
 *	client -> first node -> backend's node -> backend	client's address kept; the packet says what was asked for
 *	client <--------------- backend's node <- backend
 *
 * What was asked for travels as an IPv4 option or an IPv6 destination option of the experimental kind (RFC 4727), which
 * everybody else passes over: in the packet that opens a TCP connection or SCTP association, and in each datagram that
 * has room for it.
 */
#ifndef __EBPROXY_DSR_H
#define __EBPROXY_DSR_H

#include "nat.h"
#include "lb.h"

#define DSR_IPV4_TYPE 158
#define DSR_IPV6_TYPE 0x1e

struct dsr_ipv4 {
	u8 type;
	u8 length; /* of the whole option */
	__be16 port;
	__be32 address;
};

struct dsr_ipv6 {
	u8 next_header;
	u8 size; /* in units of 8 bytes, the first not counted */
	u8 pad_type;
	u8 pad_length;
	u8 type;
	u8 length; /* of what follows */
	__be16 port;
	struct address address;
};

/* Whether a packet is one to say in what was asked for: those that may come first, and are not too large already. */
static __always_inline bool dsr_is_due(const struct packet *packet)
{
	if (packet->kind != PACKET_WHOLE || packet->l3_size != (packet->is_ipv6 ? 40 : 20))
		return false;
	if (packet->tuple.protocol == IPPROTO_UDP)
		return packet->end + sizeof(struct dsr_ipv6) <= ETH_SIZE + 1280;
	return opens_stream(packet);
}

/* Write an option behind the IP header, where room is made for it. */
static __always_inline int dsr_insert(struct __sk_buff *skb, u32 l3_size, void *option, u32 size)
{
	return bpf_skb_adjust_room(skb, size, BPF_ADJ_ROOM_NET, BPF_F_ADJ_ROOM_FIXED_GSO)
		       ?: bpf_skb_store_bytes(skb, ETH_SIZE + l3_size, option, size, 0);
}

static __always_inline int dsr_write_ipv4(struct __sk_buff *skb, const struct packet *packet)
{
	struct dsr_ipv4 option = {
		.type = DSR_IPV4_TYPE,
		.length = sizeof(option),
		.port = packet->tuple.destination_port,
		.address = packet->tuple.destination.word[3],
	};
	struct ipv4_header *header;
	__be16 length, longer;

	if (dsr_insert(skb, sizeof(*header), &option, sizeof(option)))
		return -1;
	header = (void *)(long)skb->data + ETH_SIZE;
	if ((void *)(header + 1) > (void *)(long)skb->data_end)
		return -1;
	length = header->total_length;
	longer = bpf_htons(bpf_ntohs(length) + sizeof(option));
	header->total_length = longer;
	header->version_ihl += sizeof(option) / 4;
	/* The sum takes in the option, the header's size in its first byte, and the packet's. */
	nat_ipv4_checksum(header, (u64)(u16)~length + longer + bpf_htons(sizeof(option) / 4 << 8) +
					  csum_word(bpf_htons(DSR_IPV4_TYPE << 8 | sizeof(option))) +
					  option.port + csum_word(option.address));
	return 0;
}

static __always_inline int dsr_write_ipv6(struct __sk_buff *skb, const struct packet *packet)
{
	struct dsr_ipv6 option = {
		.next_header = packet->tuple.protocol,
		.size = sizeof(option) / 8 - 1,
		.pad_type = 1,
		.type = DSR_IPV6_TYPE,
		.length = sizeof(option.port) + sizeof(option.address),
		.port = packet->tuple.destination_port,
		.address = packet->tuple.destination,
	};
	struct ipv6_header *header;

	if (dsr_insert(skb, sizeof(*header), &option, sizeof(option)))
		return -1;
	header = (void *)(long)skb->data + ETH_SIZE;
	if ((void *)(header + 1) > (void *)(long)skb->data_end)
		return -1;
	header->payload_length = bpf_htons(bpf_ntohs(header->payload_length) + sizeof(option));
	header->next_header = IPPROTO_DSTOPTS;
	return 0;
}

/* Say in a packet what its client asked for, behind the IP header that is there. */
static __always_inline int dsr_write(struct __sk_buff *skb, const struct packet *packet)
{
	return packet->is_ipv6 ? dsr_write_ipv6(skb, packet) : dsr_write_ipv4(skb, packet);
}

/* Read what the client of a packet for a backend of this node asked for elsewhere. Returns whether it says so. */
static __always_inline bool dsr_read(struct __sk_buff *skb, const struct packet *packet,
				     struct endpoint *asked)
{
	struct dsr_ipv4 v4;
	struct dsr_ipv6 v6;

	if (packet->is_ipv6) {
		if (packet->l3_size != sizeof(struct ipv6_header) + sizeof(v6) ||
		    bpf_skb_load_bytes(skb, ETH_SIZE + sizeof(struct ipv6_header), &v6, sizeof(v6)) ||
		    v6.type != DSR_IPV6_TYPE || v6.length != sizeof(v6.port) + sizeof(v6.address))
			return false;
		asked->address = v6.address;
		asked->port = v6.port;
		return true;
	}
	if (packet->l3_size != sizeof(struct ipv4_header) + sizeof(v4) ||
	    bpf_skb_load_bytes(skb, ETH_SIZE + sizeof(struct ipv4_header), &v4, sizeof(v4)) ||
	    v4.type != DSR_IPV4_TYPE || v4.length != sizeof(v4))
		return false;
	asked->address = address_from_ipv4(v4.address);
	asked->port = v4.port;
	return true;
}

/*
 * Whether an address is one that nodes answer for directly: here or, if it is the port of a NodePort, at another node.
 * Of what is offered in other ways, a packet may say what it likes.
 */
static __always_inline bool dsr_is_offered(const struct endpoint *asked, const struct packet *packet)
{
	struct endpoint reserved = { .port = asked->port };
	struct frontend *frontend = lb_frontend(asked, packet->tuple.protocol);

	if (!packet->is_ipv6)
		reserved.address = address_from_ipv4(0);
	if (!frontend)
		frontend = lb_frontend(&reserved, packet->tuple.protocol);
	return frontend && frontend->flags & FRONTEND_DSR;
}

#endif
