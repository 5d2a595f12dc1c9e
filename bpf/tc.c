// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The packet path: services are translated packet by packet, for what starts outside the node and for what the socket
 * hooks do not see.
 */
#include "types.h"
#include "maps.h"

#define TC_ACT_UNSPEC (-1) /* go on to the next program, or to the stack */

int tc_ingress(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

int tc_egress(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

int tc_loopback(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}
