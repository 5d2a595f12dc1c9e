// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The cgroup socket hooks: a service is translated once, when a socket of the node connects or sends, and no packet
 * of it is looked at afterwards. Every program is an entry point of a few lines: it reads an address out of its
 * context, calls the one path both families share, and writes the address back.
 */
#include "types.h"
#include "maps.h"
#include "lb.h"
#include "origin.h"

#define SOCK_PROCEED 1
#define SOCK_REFUSE  0

#define AF_INET      2
#define IPPROTO_UDP  17
#define EADDRINUSE   98
#define ECONNREFUSED 111

static __always_inline struct endpoint sock_read4(const struct bpf_sock_addr *ctx)
{
	struct endpoint peer = {
		.address = address_from_ipv4(ctx->user_ip4),
		.port = (__be16)ctx->user_port,
	};

	return peer;
}

static __always_inline struct endpoint sock_read6(const struct bpf_sock_addr *ctx)
{
	struct endpoint peer = {
		.address.word = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] },
		.port = (__be16)ctx->user_port,
	};

	return peer;
}

static __always_inline void sock_write4(struct bpf_sock_addr *ctx, const struct endpoint *peer)
{
	ctx->user_ip4 = peer->address.word[3];
	ctx->user_port = peer->port;
}

static __always_inline void sock_write6(struct bpf_sock_addr *ctx, const struct endpoint *peer)
{
	ctx->user_ip6[0] = peer->address.word[0];
	ctx->user_ip6[1] = peer->address.word[1];
	ctx->user_ip6[2] = peer->address.word[2];
	ctx->user_ip6[3] = peer->address.word[3];
	ctx->user_port = peer->port;
}

/* Whether this socket is ours to translate: with socketLB: host, only those of the node's own namespace are. */
static __always_inline bool sock_is_covered(struct bpf_sock_addr *ctx)
{
#ifdef HOST_ONLY
	return bpf_get_netns_cookie(ctx) == HOST_NETNS_COOKIE;
#else
	return true;
#endif
}

/* Whether to remember what a socket asks for. A datagram socket always checks who answered. */
static __always_inline bool sock_remembers(struct bpf_sock_addr *ctx)
{
#ifdef REMEMBER_PEER
	return true;
#else
	return ctx->protocol == IPPROTO_UDP;
#endif
}

/* Turn a refusal into what the application's system call returns. */
static __always_inline int sock_refuse(void)
{
	bpf_set_retval(-ECONNREFUSED);
	return SOCK_REFUSE;
}

/**
 * sock_translate - Find the service that a socket asks for and choose one of its backends.
 * @seed: see lb_select_backend()
 * @backend: receives the choice when the verdict is LB_FORWARD
 *
 * What takes the client's address to decide (affinity, source ranges) and what is to be silent is left to the packet
 * path: a socket that connects has no address yet, and a system call cannot go unanswered.
 */
static __always_inline enum lb_verdict sock_translate(const struct endpoint *asked, u8 protocol, u32 seed,
						      struct endpoint *backend)
{
	struct frontend *frontend = lb_frontend(asked, protocol);
	enum lb_verdict verdict;

	if (!frontend) {
		if (!lb_is_reserved(&asked->address))
			return LB_PASS;
		counter_add(COUNTER_UNDEFINED_PORT);
		return LB_REJECT;
	}
	if (lb_affinity_timeout(frontend) || frontend->flags & FRONTEND_SOURCE_RANGES ||
	    lb_kind(frontend) == FRONTEND_RESERVED)
		return LB_PASS;
	verdict = lb_select_backend(frontend->inside, seed, backend);
	if (verdict == LB_REJECT)
		counter_add(COUNTER_REJECTED);
	return verdict == LB_DROP ? LB_PASS : verdict;
}

/**
 * sock_connect - Translate the peer of a socket that connects.
 * @peer: what was asked for; becomes the backend
 * Returns LB_FORWARD when @peer changed.
 */
static __always_inline enum lb_verdict sock_connect(struct bpf_sock_addr *ctx, struct endpoint *peer)
{
	struct endpoint asked = *peer;
	enum lb_verdict verdict;

	if (!sock_is_covered(ctx))
		return LB_PASS;
	verdict = sock_translate(&asked, (u8)ctx->protocol, bpf_get_prandom_u32(), peer);
	if (verdict == LB_FORWARD && sock_remembers(ctx))
		origin_remember(socket_cookie(ctx), &asked, peer);
	else if (verdict == LB_PASS)
		origin_forget(socket_cookie(ctx),
			      peer); /* what this socket asked for before is no longer true */
	return verdict;
}

/**
 * sock_send - Translate the destination of a datagram.
 * @peer: what was asked for; becomes the backend
 *
 * The choice follows the socket's cookie: a socket stays with its backend for as long as the service does not change,
 * as a flow does under conntrack. Where two services lead a socket to one backend, its answers cannot tell which of them
 * was asked: the later one is left to the packet path, which gives it a source port of its own.
 */
static __always_inline enum lb_verdict sock_send(struct bpf_sock_addr *ctx, struct endpoint *peer)
{
	struct endpoint asked = *peer;
	enum lb_verdict verdict;
	u64 cookie;

	if (!sock_is_covered(ctx))
		return LB_PASS;
	cookie = socket_cookie(ctx);
	/* Multiplicative hashing (Knuth): consecutive cookies land far apart in the upper 32 bits. */
	verdict = sock_translate(&asked, (u8)ctx->protocol, (u32)((cookie * 0x9e3779b97f4a7c15ULL) >> 32),
				 peer);
	if (verdict == LB_FORWARD && !origin_claim_peer(cookie, &asked, peer)) {
		*peer = asked;
		verdict = LB_PASS;
	}
	if (verdict == LB_PASS)
		origin_forget_peer(cookie, peer);
	return verdict;
}

int connect4(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = sock_read4(ctx);
	enum lb_verdict verdict = sock_connect(ctx, &peer);

	if (verdict == LB_FORWARD)
		sock_write4(ctx, &peer);
	else if (verdict != LB_PASS)
		return sock_refuse();
	return SOCK_PROCEED;
}

int connect6(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = sock_read6(ctx);
	enum lb_verdict verdict = sock_connect(ctx, &peer);

	if (verdict == LB_FORWARD)
		sock_write6(ctx, &peer);
	else if (verdict != LB_PASS)
		return sock_refuse();
	return SOCK_PROCEED;
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = sock_read4(ctx);
	enum lb_verdict verdict = sock_send(ctx, &peer);

	if (verdict == LB_FORWARD)
		sock_write4(ctx, &peer);
	else if (verdict != LB_PASS)
		return sock_refuse();
	return SOCK_PROCEED;
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = sock_read6(ctx);
	enum lb_verdict verdict = sock_send(ctx, &peer);

	if (verdict == LB_FORWARD)
		sock_write6(ctx, &peer);
	else if (verdict != LB_PASS)
		return sock_refuse();
	return SOCK_PROCEED;
}

/* recvmsg may not refuse: the kernel asks for SOCK_PROCEED on every path. */
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = sock_read4(ctx);

	if (origin_recall(socket_cookie(ctx), &peer))
		sock_write4(ctx, &peer);
	return SOCK_PROCEED;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = sock_read6(ctx);

	if (origin_recall(socket_cookie(ctx), &peer))
		sock_write6(ctx, &peer);
	return SOCK_PROCEED;
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = sock_read4(ctx);

	if (origin_recall(socket_cookie(ctx), &peer))
		sock_write4(ctx, &peer);
	return SOCK_PROCEED;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = sock_read6(ctx);

	if (origin_recall(socket_cookie(ctx), &peer))
		sock_write6(ctx, &peer);
	return SOCK_PROCEED;
}

/* Whether a process of the node's own namespace binds the port of a NodePort, which would hide it from clients. */
static __always_inline bool sock_takes_node_port(struct bpf_sock *ctx, const struct address *any)
{
	struct endpoint reserved = { .address = *any, .port = bpf_htons((u16)ctx->src_port) };

	return bpf_get_netns_cookie(ctx) == HOST_NETNS_COOKIE && lb_frontend(&reserved, (u8)ctx->protocol);
}

static __always_inline int sock_refuse_bind(void)
{
	counter_add(COUNTER_NODE_PORT_TAKEN);
	bpf_set_retval(-EADDRINUSE);
	return SOCK_REFUSE;
}

int post_bind4(struct bpf_sock *ctx)
{
	struct address any = address_from_ipv4(0);

	return sock_takes_node_port(ctx, &any) ? sock_refuse_bind() : SOCK_PROCEED;
}

/* A socket of this family may take the port of the other as well. */
int post_bind6(struct bpf_sock *ctx)
{
	struct address any4 = address_from_ipv4(0), any6 = {};

	return sock_takes_node_port(ctx, &any6) || sock_takes_node_port(ctx, &any4) ? sock_refuse_bind()
										    : SOCK_PROCEED;
}

int sock_release(struct bpf_sock *ctx)
{
	struct endpoint peer = {
		.address.word = { ctx->dst_ip6[0], ctx->dst_ip6[1], ctx->dst_ip6[2], ctx->dst_ip6[3] },
		.port = (__be16)ctx->dst_port,
	};
	__be32 ipv4 = ctx->dst_ip4;

	/* LLVM 14 else merges the two loads into one through a computed context pointer, which 6.18 refuses. */
	asm volatile("" : "+r"(ipv4));
	if (ctx->family == AF_INET)
		peer.address = address_from_ipv4(ipv4);
	origin_forget(socket_cookie(ctx), &peer);
	return SOCK_PROCEED;
}
