/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Where a translated packet goes on: by the node's routes, or into the node itself. */
#ifndef __EBPROXY_ROUTE_H
#define __EBPROXY_ROUTE_H

#include "nat.h"

/* BCC's prototype lacks the length of the parameters. */
static long (*redirect_neigh)(u32, void *, int, u64) = (void *)BPF_FUNC_redirect_neigh;
static long (*check_mtu)(void *, u32, u32 *, s32, u64) = (void *)BPF_FUNC_check_mtu;

#define AF_INET     2
#define AF_INET6    10

/* No link has a smaller MTU than IPv6 asks for: shorter frames need not be compared. */
#define ROUTE_SMALL (ETH_SIZE + 1280)

static __always_inline bool address_is_ipv6(const struct address *address)
{
	return address->word[2] != bpf_htonl(0xffff) || address->word[1] || address->word[0];
}

static __always_inline bool address_is_loopback(const struct address *address)
{
	return !address_is_ipv6(address) &&
	       (address->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

static __always_inline bool route_is_own(const struct address *address)
{
	return node_addresses.lookup((struct address *)address);
}

/**
 * route_device - Find the device that leads to an address.
 * @from: the device the packet came by, or LOOPBACK where it starts here
 * Returns its ifindex; 0 = there is no way.
 */
static __always_inline u32 route_device(struct __sk_buff *skb, const struct address *source,
					const struct address *destination, u32 from)
{
	struct bpf_fib_lookup route = {
		.ifindex = from,
	};
	long result;

	if (address_is_ipv6(destination)) {
		route.family = AF_INET6;
		__builtin_memcpy(route.ipv6_src, source, sizeof(*source));
		__builtin_memcpy(route.ipv6_dst, destination, sizeof(*destination));
	} else {
		route.family = AF_INET;
		route.ipv4_src = source->word[3];
		route.ipv4_dst = destination->word[3];
	}
	result = bpf_fib_lookup(skb, &route, sizeof(route), 0);
	/* An unknown neighbour is asked for when the packet leaves; its size is looked at elsewhere. */
	if (result == BPF_FIB_LKUP_RET_SUCCESS || result == BPF_FIB_LKUP_RET_NO_NEIGH ||
	    result == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return route.ifindex;
	return 0;
}

/* Where the stack is to deliver a packet for an address of the node: it takes one from itself only by way of lo. */
static __always_inline u32 route_to_self(const struct address *source, const struct address *destination)
{
	return address_is_loopback(destination) || route_is_own(source) ? LOOPBACK : 0;
}

/*
 * Have the stack look for another route for what the node sends to itself. Such a packet keeps the route that it left by
 * and would be taken in, whatever its destination is by now; a tunnel's key, which nobody reads, takes that route's place.
 */
static __always_inline bool route_anew(struct __sk_buff *skb)
{
	u32 key[2] = {}; /* struct bpf_tunnel_key in its shortest form: an id, and an IPv4 address */

	return !bpf_skb_set_tunnel_key(skb, key, sizeof(key), 0);
}

/* Whether a socket of the node is connected to where a datagram comes from: it is an answer, not a question. */
static __always_inline bool route_is_awaited(struct __sk_buff *skb, const struct packet *packet)
{
	const struct tuple *tuple = &packet->tuple;
	struct bpf_sock_tuple ends = {};
	struct bpf_sock *sock;
	u32 size = sizeof(ends.ipv4);
	bool is_connected;

	if (packet->is_ipv6) {
		size = sizeof(ends.ipv6);
		__builtin_memcpy(ends.ipv6.saddr, &tuple->source, sizeof(tuple->source));
		__builtin_memcpy(ends.ipv6.daddr, &tuple->destination, sizeof(tuple->destination));
		ends.ipv6.sport = tuple->source_port;
		ends.ipv6.dport = tuple->destination_port;
	} else {
		ends.ipv4.saddr = tuple->source.word[3];
		ends.ipv4.daddr = tuple->destination.word[3];
		ends.ipv4.sport = tuple->source_port;
		ends.ipv4.dport = tuple->destination_port;
	}
	sock = bpf_sk_lookup_udp(skb, &ends, size, BPF_F_CURRENT_NETNS, 0);
	if (!sock)
		return false;
	is_connected = sock->state == BPF_TCP_ESTABLISHED;
	bpf_sk_release(sock);
	return is_connected;
}

/* Find the MTU of a device if a packet does not fit; 0 = it does. */
static __always_inline u32 route_exceeded_mtu(struct __sk_buff *skb, u32 device)
{
	u32 mtu = 0;
	long result;

	if (device <= LOOPBACK || skb->len <= ROUTE_SMALL)
		return 0;
	result = check_mtu(skb, device, &mtu, 0, BPF_MTU_CHK_SEGS);
	return result > 0 ? mtu : 0;
}

#endif
