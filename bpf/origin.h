/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Remembering what a socket asked for, so that getpeername() and recvmsg() can say it again.
 *
 * A connected socket has one peer: it takes the slot its cookie selects in an array, which costs one cache line and no
 * allocation. Should an older socket with the same remainder still live there, and for unconnected UDP, which has many
 * peers, an LRU hash remembers by cookie and backend.
 */
#ifndef __EBPROXY_ORIGIN_H
#define __EBPROXY_ORIGIN_H

#include "maps.h"

/* BCC declares it to return u32, which would cut the cookie. */
static u64 (*socket_cookie)(void *) = (void *)BPF_FUNC_get_socket_cookie;

static __always_inline struct origin *origin_slot(u64 cookie)
{
	u32 index = cookie & (SOCKET_ORIGIN_SLOTS - 1);

	return socket_origins.lookup(&index);
}

static __always_inline struct peer_key origin_peer_key(u64 cookie, const struct endpoint *backend)
{
	struct peer_key key = {
		.cookie = cookie,
		.address = backend->address,
		.port = backend->port,
	};

	return key;
}

/* Remember one peer of a socket that may have many. Known pairs are only looked up: a datagram writes nothing. */
static __always_inline void origin_remember_peer(u64 cookie, const struct endpoint *asked,
						 const struct endpoint *backend)
{
	struct peer_key key = origin_peer_key(cookie, backend);
	struct peer_origin *known = peer_origins.lookup(&key);
	struct peer_origin origin = {
		.address = asked->address,
		.port = asked->port,
	};

	if (known && known->port == asked->port && address_equal(&known->address, &asked->address))
		return;
	if (peer_origins.update(&key, &origin))
		counter_add(COUNTER_ORIGIN_LOST);
}

/* Remember the peer of a socket that has one. */
static __always_inline void origin_remember(u64 cookie, const struct endpoint *asked,
					    const struct endpoint *backend)
{
	struct origin *slot = origin_slot(cookie);

	/* The exchange decides between two sockets that find a slot free at the same time. */
	if (slot && (slot->cookie == cookie || !__sync_val_compare_and_swap(&slot->cookie, 0, cookie))) {
		slot->address = asked->address;
		slot->port = asked->port;
		slot->backend_port = backend->port;
		slot->backend_word = backend->address.word[3];
		return;
	}
	counter_add(COUNTER_ORIGIN_SPILLED);
	origin_remember_peer(cookie, asked, backend);
}

/**
 * origin_recall - Replace a backend by the address that the socket asked for.
 * @peer: the peer as the kernel knows it; overwritten where it stands for a service
 * Returns whether it does.
 */
static __always_inline bool origin_recall(u64 cookie, struct endpoint *peer)
{
	struct origin *slot = origin_slot(cookie);
	struct peer_key key = {};
	struct peer_origin *origin;

	if (slot && slot->cookie == cookie && slot->backend_port == peer->port &&
	    slot->backend_word == peer->address.word[3]) {
		peer->address = slot->address;
		peer->port = slot->port;
		return true;
	}
	key = origin_peer_key(cookie, peer);
	origin = peer_origins.lookup(&key);
	if (!origin)
		return false;
	peer->address = origin->address;
	peer->port = origin->port;
	return true;
}

static __always_inline bool origin_equal(const struct endpoint *a, const struct endpoint *b)
{
	return a->port == b->port && address_equal(&a->address, &b->address);
}

/* Whether a backend stands for another address that the socket asked for: answers can have one of them only. */
static __always_inline bool origin_is_another(u64 cookie, const struct endpoint *asked,
					      const struct endpoint *backend)
{
	struct endpoint known = *backend;

	return origin_recall(cookie, &known) && !origin_equal(&known, asked);
}

/* Remember one peer of a socket that may have many, unless it stands for another address. Returns whether it does now. */
static __always_inline bool origin_claim_peer(u64 cookie, const struct endpoint *asked,
					      const struct endpoint *backend)
{
	struct endpoint known = *backend;

	if (origin_recall(cookie, &known))
		return origin_equal(&known, asked);
	origin_remember_peer(cookie, asked, backend);
	return true;
}

/* Forget that an address stands for a service. Most often it does not, and a lookup is cheaper than a deletion. */
static __always_inline void origin_forget_peer(u64 cookie, const struct endpoint *peer)
{
	struct peer_key key = origin_peer_key(cookie, peer);

	if (peer_origins.lookup(&key))
		peer_origins.delete(&key);
}

/* Free what a socket holds for the peer it is connected to. Its other peers in the LRU hash age out. */
static __always_inline void origin_forget(u64 cookie, const struct endpoint *peer)
{
	struct origin *slot = origin_slot(cookie);

	if (slot && slot->cookie == cookie)
		slot->cookie = 0;
	origin_forget_peer(cookie, peer);
}

#endif
