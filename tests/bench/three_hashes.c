// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * A connect hook to compare ours with, in the shape that is usual: a hash lookup for the service, one for a slot of it,
 * one for the backend, and an LRU hash that remembers, by socket cookie and backend, what was asked for.
 * IPv4 and TCP only, no counters, no options: less than any real one does.
 */
struct service_key {
	__be32 address;
	__be16 port;
	u16 slot; /* 0 = the service itself */
};

struct service {
	u32 count;   /* backends, in slot 0 */
	u32 backend; /* in the others */
};

struct backend {
	__be32 address;
	__be16 port;
	u16 pad;
};

struct reverse_key {
	u64 cookie;
	__be32 address;
	__be16 port;
	u16 pad;
};

struct reverse {
	__be32 address;
	__be16 port;
	u16 pad;
};

BPF_HASH(services, struct service_key, struct service, 1);
BPF_HASH(backends, u32, struct backend, 1);
BPF_TABLE("lru_hash", struct reverse_key, struct reverse, reverses, 1);

/* BCC declares it to return u32, which would cut the cookie. */
static u64 (*socket_cookie)(void *) = (void *)BPF_FUNC_get_socket_cookie;

int connect4(struct bpf_sock_addr *ctx)
{
	struct service_key key = { .address = ctx->user_ip4, .port = (__be16)ctx->user_port };
	struct service *service = services.lookup(&key);
	struct reverse asked = { .address = key.address, .port = key.port };
	struct reverse_key peer = {};
	struct backend *backend;
	u32 id;

	if (!service || !service->count)
		return 1;
	key.slot = 1 + bpf_get_prandom_u32() % service->count;
	service = services.lookup(&key);
	if (!service)
		return 1;
	id = service->backend;
	backend = backends.lookup(&id);
	if (!backend)
		return 1;
	peer.cookie = socket_cookie(ctx);
	peer.address = backend->address;
	peer.port = backend->port;
	reverses.update(&peer, &asked);
	ctx->user_ip4 = backend->address;
	ctx->user_port = backend->port;
	return 1;
}
