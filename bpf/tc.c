// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The packet path: services are translated packet by packet, for what starts outside the node and for what the socket
 * hooks do not see.
 *
 *	client -> [ingress] -> stack -> [egress] -> backend		forward: where the packet is first seen
 *	client <- [egress]  <- stack <- [ingress] <- backend		reply: at egress
 *
 * so that the stack, and netfilter in it, know one flow, between client and backend. A flow that is masqueraded, or that
 * the node itself began, has its replies translated at ingress, before the stack takes them for its own.
 *
 * Where there is policy, the devices of pods have programs of their own: see policy.h.
 */
#include "types.h"
#include "maps.h"
#include "parse.h"
#include "lb.h"
#include "conntrack.h"
#include "nat.h"
#include "answer.h"
#include "route.h"
#include "affinity.h"
#include "maglev.h"
#include "fragment.h"
#include "dsr.h"
#include "origin.h"
#ifdef POLICY
#include "policy.h"
#endif

#define TC_ACT_UNSPEC    (-1) /* go on to the next program, or to the stack */
#define TC_ACT_SHOT      2
#define PACKET_OTHERHOST 3 /* __sk_buff.pkt_type: the frame is for somebody else */
/*
 * A connection whose client was heard of so lately is alive: a SYN in its name may be forged, and goes to its backend,
 * which knows what to say. If that is gone, the third SYN comes late enough.
 */
#define ALIVE_S          2
#define GO_ON            100 /* no verdict yet: translate */

enum hook {
	HOOK_INGRESS,
	HOOK_EGRESS,
	HOOK_LOOPBACK, /* egress of lo: what the node sends to itself */
};

/* Where a flow starts. */
enum origin_kind {
	ORIGIN_POD,
	ORIGIN_HOST,
	ORIGIN_OUTSIDE,
	ORIGIN_UNKNOWN, /* nobody says where pods are: outside, but that it may be a pod */
};

static __always_inline int drop(u32 counter)
{
	counter_add(counter);
	return TC_ACT_SHOT;
}

/* Send an answer, written over the packet, back where that came from. */
static __always_inline int answer(struct __sk_buff *skb, const struct packet *packet, enum hook hook,
				  int failed)
{
	if (failed || answer_turn_round(skb))
		return TC_ACT_SHOT;
	return bpf_redirect(packet->ifindex, hook == HOOK_INGRESS ? 0 : BPF_F_INGRESS);
}

static __always_inline int refuse(struct __sk_buff *skb, const struct packet *packet, enum hook hook,
				  u32 counter)
{
	counter_add(counter);
	if (packet->tuple.protocol == IPPROTO_TCP)
		return answer(skb, packet, hook, answer_rst(skb, packet));
	return answer(skb, packet, hook, answer_unreachable(skb, packet));
}

/* Hand a packet to the node itself, past the routing that knows it as one that leaves. */
static __always_inline int deliver(struct __sk_buff *skb)
{
	u8 addresses[12] = {}; /* lo's own */

	if (bpf_skb_store_bytes(skb, 0, addresses, sizeof(addresses), 0))
		return drop(COUNTER_WRITE_FAILED);
	return bpf_redirect(LOOPBACK, BPF_F_INGRESS);
}

/* Whether a packet comes from the node that translated it: then only its replies are translated here. */
static __always_inline bool is_identity(const struct packet *packet, const struct flow *flow)
{
	return (flow->flags & (FLOW_DSR | FLOW_REPLY)) == FLOW_DSR &&
	       packet->tuple.destination_port == flow->destination_port &&
	       address_equal(&packet->tuple.destination, &flow->destination);
}

/*
 * Whether the stack may send on in pieces what does not fit, which no program can: IPv4 without Don't Fragment, and the
 * node's own datagrams of either family, whose sockets took lo's MTU for the way's.
 */
static __always_inline bool is_cut_by_stack(struct __sk_buff *skb, const struct packet *packet,
					    enum hook hook)
{
	__be16 fragment;

	if (hook == HOOK_LOOPBACK)
		return packet->tuple.protocol == IPPROTO_UDP && route_anew(skb);
	return !packet->is_ipv6 &&
	       !bpf_skb_load_bytes(skb, ETH_SIZE + offsetof(struct ipv4_header, fragment), &fragment,
				   sizeof(fragment)) &&
	       !(fragment & bpf_htons(IPV4_DONT_FRAGMENT));
}

/**
 * forward - Translate a packet and send it on its way.
 * @flow: what it becomes
 */
static __always_inline int forward(struct __sk_buff *skb, const struct packet *packet,
				   const struct flow *flow, enum hook hook)
{
	u32 device = flow->device, mtu;
	u8 hops;

	if (hook == HOOK_EGRESS && flow->flags & FLOW_REPLY)
		device = 0; /* it is on its way already */
	mtu = route_exceeded_mtu(skb, device);
	if (mtu && is_cut_by_stack(skb, packet, hook)) {
		device = LOOPBACK;
	} else if (mtu) {
		counter_add(COUNTER_TOO_BIG);
		return answer(skb, packet, hook, answer_too_big(skb, packet, mtu));
	}
	/* What goes past the stack is counted down here; what starts here has not hopped. */
	hops = device > LOOPBACK && hook == HOOK_INGRESS;
	if (hops && packet->ttl <= 1)
		return drop(COUNTER_TTL_EXCEEDED);
	if (!is_identity(packet, flow) && nat_translate(skb, packet, flow, hops))
		return drop(COUNTER_WRITE_FAILED);
	if ((flow->flags & (FLOW_DSR | FLOW_REPLY)) == FLOW_DSR && device && dsr_is_due(packet) &&
	    dsr_write(skb, packet))
		return drop(COUNTER_WRITE_FAILED);
	if (!device)
		return TC_ACT_UNSPEC;
	if (device == LOOPBACK)
		return hook == HOOK_LOOPBACK ? TC_ACT_UNSPEC : deliver(skb);
	return redirect_neigh(device, 0, 0, 0);
}

/* Whether a flow's packets are translated here. */
static __always_inline bool is_due(const struct flow *flow, enum hook hook)
{
	if (hook == HOOK_LOOPBACK || !(flow->flags & FLOW_REPLY))
		return true;
	return !(flow->flags & FLOW_AT_EGRESS) == (hook == HOOK_INGRESS);
}

/* Whether a packet asks for a new flow though its tuple has one: the client has begun anew with the same port. */
static __always_inline bool begins_anew(struct work *work, const struct flow *flow)
{
	const struct packet *packet = &work->packet;
	u32 now;

	if (flow->flags & FLOW_REPLY)
		return false;
	if (packet->tuple.protocol == IPPROTO_UDP)
		return conntrack_is_over(flow, IPPROTO_UDP, conntrack_now(work));
	if (!opens_stream(packet))
		return false;
	now = conntrack_now(work);
	return (flow->flags & FLOW_ESTABLISHED && seconds_since(flow->seen, now) >= ALIVE_S) ||
	       conntrack_is_over(flow, IPPROTO_TCP, now);
}

/* Note that a packet of a flow came by; once a second, see whether its route is still the same. */
static __always_inline void refresh(struct __sk_buff *skb, struct work *work, struct flow *flow,
				    enum hook hook)
{
	const struct packet *packet = &work->packet;
	u32 from = hook == HOOK_INGRESS ? packet->ifindex : LOOPBACK;
	u32 device;

	if (!conntrack_note(work, flow, hook == HOOK_INGRESS ? packet->ifindex : 0) ||
	    flow->device <= LOOPBACK)
		return;
	device = route_device(skb, &flow->source, &flow->destination, from);
	if (device)
		flow->device = device;
}

static __always_inline u32 device_flags(const struct packet *packet)
{
	u32 ifindex = packet->ifindex;
	struct device *device = devices.lookup(&ifindex);

	return device ? device->flags : 0;
}

/* Tell where a flow starts: by the client's address, or by the device its packets come in by. */
static __always_inline enum origin_kind origin_of(const struct packet *packet, enum hook hook)
{
	struct address_range range = { .prefix_bits = 128, .address = packet->tuple.source };
	u32 *found;

	if (hook == HOOK_LOOPBACK || route_is_own(&packet->tuple.source))
		return ORIGIN_HOST;
	found = pod_ranges.lookup(&range);
	if (found && *found & POD_RANGE_PODS)
		return ORIGIN_POD;
	if (found && *found & POD_RANGE_UNKNOWN)
		return ORIGIN_UNKNOWN;
	return hook == HOOK_INGRESS && device_flags(packet) & DEVICE_PODS ? ORIGIN_POD : ORIGIN_OUTSIDE;
}

/* Whether a client is served as those outside are. */
static __always_inline bool is_outside(enum origin_kind origin)
{
	return origin >= ORIGIN_OUTSIDE;
}

/* Whether a client may use a frontend that has source ranges. */
static __always_inline bool is_in_range(const struct address *client, u32 service)
{
	struct source_range range = { .prefix_bits = 160, .service = service, .client = *client };

	return source_ranges.lookup(&range);
}

/* Whether a backend sees an address of this node instead of the client's (the table of origins and frontends). */
static __always_inline bool is_masqueraded(const struct frontend *frontend, enum origin_kind origin,
					   const struct address *client, const struct address *asked,
					   const struct address *backend)
{
	if (address_equal(client, backend))
		return true;
	if (origin == ORIGIN_HOST)
		return address_is_loopback(client) ||
		       (lb_kind(frontend) != FRONTEND_NODE_PORT && address_equal(client, asked));
	if (lb_kind(frontend) == FRONTEND_CLUSTER_IP)
		return origin == ORIGIN_OUTSIDE || frontend->flags & FRONTEND_MASQUERADE;
	return !(frontend->flags & FRONTEND_EXTERNAL_LOCAL);
}

/* Read the address that a device's packets leave with. Returns whether it has one of that family. */
static __always_inline bool device_address(u32 ifindex, bool is_ipv6, struct address *chosen)
{
	struct device *device = devices.lookup(&ifindex);

	if (!device || !(is_ipv6 ? device->ipv6.word[0] : device->ipv4.word[3]))
		return false;
	*chosen = is_ipv6 ? device->ipv6 : device->ipv4;
	return true;
}

/* Choose the address that a device's packets leave with, else the node's own. */
static __always_inline bool masquerade_address(u32 ifindex, bool is_ipv6, struct address *chosen)
{
	return device_address(ifindex, is_ipv6, chosen) || device_address(0, is_ipv6, chosen);
}

/* Spread flows over backends: equal tuples, also after their entry was lost, choose equal backends. */
static __always_inline u32 tuple_hash(const struct tuple *tuple)
{
	u64 hash = tuple->protocol;
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		hash = (hash ^ tuple->source.word[i]) * 0x9e3779b97f4a7c15ULL;
		hash = (hash ^ hash >> 32 ^ tuple->destination.word[i]) * 0xbf58476d1ce4e5b9ULL;
	}
	hash = (hash ^ hash >> 29 ^ nat_ports_word(tuple->source_port, tuple->destination_port)) *
	       0x94d049bb133111ebULL;
	return (u32)((hash ^ hash >> 32) * 0x9e3779b97f4a7c15ULL >> 32);
}

/**
 * plan_routes - Decide where both ways of a new flow go.
 * @work: its flows have everything but their devices; the source may become an address of this node
 * Returns false when there is no way.
 */
static __always_inline bool plan_routes(struct __sk_buff *skb, struct work *work, enum origin_kind origin,
					enum hook hook)
{
	struct packet *packet = &work->packet;
	struct flow *flow = &work->flow, *reply = &work->reply;
	u32 from = hook == HOOK_INGRESS ? packet->ifindex : LOOPBACK;

	if (route_is_own(&flow->destination)) {
		flow->flags &= ~(FLOW_MASQUERADED | FLOW_DSR);
		flow->device = hook == HOOK_INGRESS ? 0 : LOOPBACK;
	} else if (flow->flags & (FLOW_MASQUERADED | FLOW_DSR) || hook != HOOK_INGRESS) {
		flow->device = route_device(skb, &flow->source, &flow->destination, from);
		if (!flow->device)
			return false;
	}
	if (flow->flags & FLOW_MASQUERADED &&
	    !masquerade_address(flow->device, packet->is_ipv6, &flow->source))
		return false;
	reply->flags |= flow->flags;
	if (origin == ORIGIN_HOST)
		reply->device =
			hook == HOOK_LOOPBACK ? LOOPBACK : route_to_self(&reply->source, &reply->destination);
	else if (flow->flags & FLOW_MASQUERADED)
		reply->device =
			route_device(skb, &reply->source, &reply->destination, LOOPBACK) ?: packet->ifindex;
	else
		reply->flags |= FLOW_AT_EGRESS;
	flow->flags |= reply->flags & FLOW_AT_EGRESS;
	return true;
}

/*
 * Whether a flow needs another source port, as its socket already speaks to the backend in another service's name: what a
 * socket hook translated has no entry here. The socket is known until the stack has the packet, whatever namespace it is in.
 */
static __always_inline bool is_port_taken(struct __sk_buff *skb, const struct tuple *asked,
					  const struct endpoint *backend)
{
	struct endpoint frontend = { .address = asked->destination, .port = asked->destination_port };
	u64 cookie;

	if (asked->protocol != IPPROTO_UDP)
		return false;
	cookie = socket_cookie(skb);
	return cookie && origin_is_another(cookie, &frontend, backend);
}

/* Begin a flow to the backend that was chosen. Returns GO_ON with the flow in @work, or a verdict. */
static __always_inline int begin(struct __sk_buff *skb, struct work *work, const struct frontend *frontend,
				 enum origin_kind origin, const struct endpoint *backend, enum hook hook)
{
	struct tuple *asked = &work->packet.tuple;
	u32 now = conntrack_now(work), failed;
	struct flow *flow = &work->flow, *reply = &work->reply;

	flow->source = asked->source;
	flow->destination = backend->address;
	flow->source_port = asked->source_port;
	flow->destination_port = backend->port;
	flow->service = frontend->service;
	flow->seen = now;
	flow->device = 0;
	flow->flags = 0;
	if (is_masqueraded(frontend, origin, &asked->source, &asked->destination, &backend->address))
		flow->flags = FLOW_MASQUERADED;
	if (flow->flags && is_outside(origin) && frontend->flags & FRONTEND_DSR)
		flow->flags = FLOW_DSR;
	reply->source = asked->destination;
	reply->destination = asked->source;
	reply->source_port = asked->destination_port;
	reply->destination_port = asked->source_port;
	reply->service = frontend->service;
	reply->seen = now;
	reply->device = 0;
	reply->flags = FLOW_REPLY;
	if (!plan_routes(skb, work, origin, hook))
		return drop(COUNTER_NO_ROUTE);
	failed = conntrack_begin(asked, flow, reply,
				 flow->flags & FLOW_MASQUERADED || is_port_taken(skb, asked, backend));
	/* The backend's node cannot know of a port that was changed here. */
	if (!failed && flow->flags & FLOW_DSR && flow->source_port != asked->source_port)
		failed = COUNTER_SOURCE_NAT_EXHAUSTED;
	if (failed)
		return drop(failed);
	counter_add(COUNTER_FLOWS);
	return GO_ON;
}

/*
 * Begin a flow that another node has translated: nothing changes on the way to the backend, and its replies get the
 * address that the client asked for. Returns GO_ON with the flow in @work, or a verdict.
 */
static __always_inline int begin_return(struct work *work, const struct endpoint *asked)
{
	struct tuple *tuple = &work->packet.tuple;
	struct flow *flow = &work->flow, *reply = &work->reply;

	flow->source = tuple->source;
	flow->destination = tuple->destination;
	flow->source_port = tuple->source_port;
	flow->destination_port = tuple->destination_port;
	flow->service = 0;
	flow->seen = conntrack_now(work);
	flow->device = 0;
	flow->flags = FLOW_DSR | FLOW_AT_EGRESS;
	*reply = *flow;
	reply->source = asked->address;
	reply->destination = tuple->source;
	reply->source_port = asked->port;
	reply->destination_port = tuple->source_port;
	reply->flags |= FLOW_REPLY;
	return conntrack_begin(tuple, flow, reply, false) ? TC_ACT_UNSPEC : GO_ON;
}

/* Whether a packet is the node's own to an address of its own, which it has for a source too, and the node is in range. */
static __always_inline bool is_node_in_range(const struct packet *packet, u32 service, enum hook hook)
{
	struct address node;

	return hook == HOOK_LOOPBACK && address_equal(&packet->tuple.source, &packet->tuple.destination) &&
	       device_address(0, packet->is_ipv6, &node) && is_in_range(&node, service);
}

/* Choose for the first packet of a flow that asks for a service. Returns GO_ON with the flow in @work, or a verdict. */
static __always_inline int serve(struct __sk_buff *skb, struct work *work, const struct frontend *frontend,
				 enum hook hook)
{
	struct packet *packet = &work->packet;
	enum origin_kind origin = origin_of(packet, hook);
	struct endpoint backend = {};
	enum lb_verdict verdict;
	u32 base = is_outside(origin) ? frontend->outside : frontend->inside;
	u32 hash;

	if (lb_kind(frontend) == FRONTEND_RESERVED)
		return TC_ACT_UNSPEC;
	/* Without endpoints everybody is refused, in range or not. */
	if (frontend->flags & FRONTEND_SOURCE_RANGES && !lb_is_refused(base) &&
	    !is_in_range(&packet->tuple.source, frontend->service) &&
	    !is_node_in_range(packet, frontend->service, hook))
		return drop(COUNTER_SOURCE_RANGE);
	hash = tuple_hash(&packet->tuple);
	if (lb_affinity_timeout(frontend))
		verdict = affinity_select(frontend, base, work, hash, &backend);
	else if (is_outside(origin) && frontend->flags & FRONTEND_MAGLEV)
		verdict = maglev_select_backend(base, hash, &backend);
	else
		verdict = lb_select_backend(base, hash, &backend);
	if (verdict == LB_REJECT)
		return refuse(skb, packet, hook, COUNTER_REJECTED);
	if (verdict == LB_DROP)
		return drop(COUNTER_DROPPED);
	return begin(skb, work, frontend, origin, &backend, hook);
}

/*
 * Whether a packet that has no flow may begin one: an answer never does. At an address of the node only what opens a
 * connection does, as the node's own connections have ports there, those that netfilter translates among them.
 */
static __always_inline bool may_begin(struct __sk_buff *skb, const struct packet *packet,
				      const struct frontend *frontend)
{
	if (packet->flags & TCP_SYN && packet->flags & TCP_ACK)
		return false;
	if (lb_kind(frontend) != FRONTEND_NODE_PORT && !route_is_own(&packet->tuple.destination))
		return true;
	return packet->tuple.protocol == IPPROTO_UDP ? !route_is_awaited(skb, packet) : opens_stream(packet);
}

/*
 * Forget a flow that is over and that a new connection without a service has the same ends as: the answers to it would
 * be taken for replies of that flow.
 */
static __always_inline void forget_former(struct work *work)
{
	const struct tuple *tuple = &work->packet.tuple;
	struct tuple key = tuple_turned(tuple);
	struct flow *former = conntrack.lookup(&key);

	work->has_back = former != NULL;
	if (former && former->flags & FLOW_REPLY &&
	    conntrack_is_over(former, tuple->protocol, conntrack_now(work)))
		conntrack_forget(&key, former);
}

/* What to do with a packet that no service offers anything: one to a ClusterIP would only wander about. */
static __always_inline int decline(struct __sk_buff *skb, struct work *work, enum hook hook)
{
	const struct packet *packet = &work->packet;

	if (packet->flags & TCP_ACK || packet->kind == PACKET_LATER_FRAGMENT)
		return TC_ACT_UNSPEC;
	if (!lb_is_reserved(&packet->tuple.destination)) {
		if (packet->flags & TCP_SYN)
			forget_former(work);
		return TC_ACT_UNSPEC;
	}
	if (packet->kind == PACKET_ICMP_ECHO)
		return answer(skb, packet, hook, answer_echo(skb, packet));
	return refuse(skb, packet, hook, COUNTER_UNDEFINED_PORT);
}

/* Find out whose packet this is. Returns GO_ON with what it becomes in *@found, or a verdict. */
static __always_inline int find_flow(struct __sk_buff *skb, struct work *work, enum hook hook,
				     struct flow **found)
{
	struct packet *packet = &work->packet;
	struct frontend *frontend;
	struct endpoint asked;
	struct flow *flow;

	/* Replies first: one must never be taken for a client's packet. */
	flow = conntrack.lookup(&packet->tuple);
	if (flow && !begins_anew(work, flow)) {
		if (!is_due(flow, hook)) {
			if (HAS_POLICY)
				work->is_plain = !opens_stream(packet);
			return TC_ACT_UNSPEC;
		}
		refresh(skb, work, flow, hook);
		*found = flow;
		return GO_ON;
	}
	if (flow)
		conntrack_forget(&packet->tuple, flow);
	if (packet->kind == PACKET_ICMP_ERROR)
		return TC_ACT_UNSPEC;
	asked.address = packet->tuple.destination;
	asked.port = packet->tuple.destination_port;
	frontend = lb_frontend(&asked, packet->tuple.protocol);
	if (HAS_POLICY)
		work->is_plain = !frontend;
	if (!frontend && hook == HOOK_INGRESS && dsr_read(skb, packet, &asked) &&
	    dsr_is_offered(&asked, packet))
		return begin_return(work, &asked);
	if (!frontend || packet->kind == PACKET_LATER_FRAGMENT)
		return decline(skb, work, hook);
	return may_begin(skb, packet, frontend) ? serve(skb, work, frontend, hook) : TC_ACT_UNSPEC;
}

/* Give a fragment the ports it lacks, or note those it brings. Returns GO_ON or a verdict. */
static __always_inline int join_fragments(struct __sk_buff *skb, struct work *work, enum hook hook)
{
	struct packet *packet = &work->packet;
	int verdict;

	if (unlikely(packet->kind == PACKET_FIRST_FRAGMENT)) {
		fragment_note(work);
		verdict = fragment_release(skb, work, hook == HOOK_INGRESS ? BPF_F_INGRESS : 0);
		if (verdict)
			return verdict < 0 ? drop(COUNTER_WRITE_FAILED) : verdict;
	} else if (unlikely(packet->kind == PACKET_LATER_FRAGMENT)) {
		fragment_recall(work);
		if (packet->kind == PACKET_EARLY_FRAGMENT)
			return fragment_hold(skb, work) ? TC_ACT_SHOT : drop(COUNTER_FRAGMENT_LOST);
	}
	return GO_ON;
}

/* Whether the program that went on in this one has read the packet, and found that it may belong to a flow. */
static __always_inline bool is_read(struct work *work, enum hook hook)
{
	bool was_read = hook == HOOK_EGRESS && work->is_read;

	if (was_read)
		work->is_read = 0;
	return was_read;
}

static __always_inline int run(struct __sk_buff *skb, enum hook hook)
{
	u32 only = 0;
	struct work *work = works.lookup(&only);
	struct flow *flow;
	int verdict;

	if (!work || skb->vlan_present ||
	    (!(HAS_POLICY && is_read(work, hook)) && !parse_packet(skb, &work->packet)))
		return TC_ACT_UNSPEC;
	flow = &work->flow;
	/* A bridge that does not know where a host is floods what is for it: only at a bridge's port may it be for us. */
	if (hook == HOOK_INGRESS && skb->pkt_type == PACKET_OTHERHOST &&
	    !(device_flags(&work->packet) & DEVICE_PORT))
		return TC_ACT_UNSPEC;
	verdict = join_fragments(skb, work, hook);
	if (verdict == GO_ON)
		verdict = find_flow(skb, work, hook, &flow);
	return verdict == GO_ON ? forward(skb, &work->packet, flow, hook) : verdict;
}

int tc_ingress(struct __sk_buff *skb)
{
	return run(skb, HOOK_INGRESS);
}

int tc_egress(struct __sk_buff *skb)
{
	return run(skb, HOOK_EGRESS);
}

int tc_loopback(struct __sk_buff *skb)
{
	return run(skb, HOOK_LOOPBACK);
}

#ifdef POLICY
/*
 * Translation and policy are each much for the verifier, so that a packet that is translated goes through two programs.
 * What the first one found out the second finds in struct work; without the second, packets are dropped rather than let
 * pass.
 */

/* Whether a pod's packet is one that services are for: as in run(). */
static __always_inline bool is_translated(struct __sk_buff *skb, const struct work *work)
{
	return work->packet.reading == PARSE_FLOW && !skb->vlan_present &&
	       (skb->pkt_type != PACKET_OTHERHOST || device_flags(&work->packet) & DEVICE_PORT);
}

/* Read a packet, and find whose it is to policy, unless its connection says enough. Returns GO_ON or a verdict. */
static __always_inline int enter(struct __sk_buff *skb, struct work *work, bool leaves)
{
	struct packet *packet = &work->packet;
	struct address nobody = {};

	packet->tuple.source = nobody;
	packet->tuple.destination = nobody;
	packet->tuple.protocol = 0;
	work->is_plain = 0;
	work->has_back = 1;
	if (parse_packet(skb, packet) && policy_passes(work, leaves))
		return TC_ACT_UNSPEC;
	if (unlikely(packet->reading == PARSE_FOREIGN || policy_is_discovery(skb, packet)))
		return policy_admit_link(skb, work, leaves) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
	return policy_identify(skb, work, leaves) ? GO_ON : TC_ACT_SHOT;
}

/* Tell a pod that it may not, where it can be told. */
static __always_inline int deny(struct __sk_buff *skb, struct work *work)
{
	const struct packet *packet = &work->packet;
	struct policy_state *state = policy_state_now();

	if (!state || !state->is_answered || work->event.direction != DIRECTION_EGRESS ||
	    packet->reading != PARSE_FLOW || packet->kind > PACKET_FIRST_FRAGMENT)
		return TC_ACT_SHOT;
	if (packet->tuple.protocol == IPPROTO_TCP)
		return answer(skb, packet, HOOK_INGRESS, answer_rst(skb, packet));
	return answer(skb, packet, HOOK_INGRESS, answer_unreachable(skb, packet));
}

/* Whether policy lets what leaves a pod pass. */
static __always_inline bool may_leave(struct __sk_buff *skb, struct work *work)
{
	return !work->subject.identity || policy_admit(skb, work, true);
}

/* Ingress of a pod's device: what leaves the pod. */
int tc_from_pod(struct __sk_buff *skb)
{
	u32 only = 0;
	struct work *work = works.lookup(&only);
	struct flow *flow;
	int verdict;

	if (!work)
		return TC_ACT_SHOT;
	verdict = enter(skb, work, true);
	if (verdict != GO_ON)
		return verdict;
	work->has_flow = 0;
	if (is_translated(skb, work)) {
		flow = &work->flow;
		verdict = join_fragments(skb, work, HOOK_INGRESS);
		if (verdict == GO_ON)
			verdict = find_flow(skb, work, HOOK_INGRESS, &flow);
		if (verdict != GO_ON && verdict != TC_ACT_UNSPEC)
			return verdict;
		if (verdict == GO_ON) {
			if (flow != &work->flow)
				work->flow = *flow;
			work->has_flow = 1;
		}
	}
	if (!work->has_flow)
		return may_leave(skb, work) ? TC_ACT_UNSPEC : deny(skb, work);
	stages.call(skb, STAGE_FROM_POD);
	return drop(COUNTER_STAGE_MISSED);
}

int tc_from_pod_stage(struct __sk_buff *skb)
{
	u32 only = 0;
	struct work *work = works.lookup(&only);

	if (!work)
		return TC_ACT_SHOT;
	return may_leave(skb, work) ? forward(skb, &work->packet, &work->flow, HOOK_INGRESS)
				    : deny(skb, work);
}

/* Egress of a pod's device: what goes to the pod. */
int tc_to_pod(struct __sk_buff *skb)
{
	u32 only = 0, from = skb->ingress_ifindex, device = skb->ifindex;
	struct work *work = works.lookup(&only);
	int verdict = GO_ON;

	if (!work)
		return TC_ACT_SHOT;
	/* What comes back by the device that it came from is the pod's own, or an answer to it in a service's name. */
	if (from != device) {
		verdict = enter(skb, work, false);
		if (verdict == GO_ON && work->packet.reading == PARSE_FLOW)
			verdict = join_fragments(skb, work, HOOK_EGRESS);
		if (verdict == GO_ON && work->subject.identity && !policy_admit(skb, work, false))
			return TC_ACT_SHOT;
		if (verdict != GO_ON)
			return verdict;
		if (work->packet.reading != PARSE_FLOW || skb->vlan_present)
			return TC_ACT_UNSPEC;
		if (work->is_plain) {
			if (policy_opens(&work->packet) && work->has_back)
				forget_former(work);
			return TC_ACT_UNSPEC;
		}
		work->is_read = 1;
	}
	stages.call(skb, STAGE_TO_POD);
	return drop(COUNTER_STAGE_MISSED);
}
#endif
