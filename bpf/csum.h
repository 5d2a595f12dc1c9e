/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Checksums. Those of IP, TCP, UDP and ICMP are sums, updated by what changed. SCTP's is a CRC over the whole packet:
 * it is linear, so what a changed port does to it follows from the change and from how many bytes come after it.
 */
#ifndef __EBPROXY_CSUM_H
#define __EBPROXY_CSUM_H

#include "parse.h"

#define CSUM_OFFSET_TCP  16
#define CSUM_OFFSET_UDP  6
#define CSUM_OFFSET_SCTP 8

static __always_inline u16 csum_fold(u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (u16)~sum;
}

/* Add the halves of a word, for a sum of 16-bit words. */
static __always_inline u32 csum_word(u32 word)
{
	return (word & 0xffff) + (word >> 16);
}

#define CRC32C_POLYNOMIAL 0x82f63b78u /* reflected (RFC 9260 appendix A) */

/* Multiply two polynomials modulo CRC32C's; in the reflected form, bit 31 is x^0. */
static __always_inline u32 crc32c_multiply(u32 a, u32 b)
{
	u32 product = 0;
	int i;

	for (i = 0; i < 32; i++) {
		product ^= b & -(a >> 31);
		a <<= 1;
		b = (b >> 1) ^ (CRC32C_POLYNOMIAL & -(b & 1));
	}
	return product;
}

/**
 * crc32c_shift - Carry a difference of the register over so many bytes that did not change.
 * @bytes: at most 65535
 *
 * That is a multiplication with x^(8 * bytes), by repeated squaring of x^8.
 */
static __always_inline u32 crc32c_shift(u32 difference, u32 bytes)
{
	u32 power = 0x00800000; /* x^8 */
	int i;

	for (i = 0; i < 16; i++) {
		if (bytes & 1)
			difference = crc32c_multiply(difference, power);
		power = crc32c_multiply(power, power);
		bytes >>= 1;
	}
	return difference;
}

/**
 * csum_sctp_ports - Update an SCTP packet's checksum for other ports.
 * @l4: offset of the SCTP header
 * @changed: old ports xor new ports, as they stand in the packet
 * @size: of the SCTP packet, bytes
 */
static __always_inline int csum_sctp_ports(struct __sk_buff *skb, u32 l4, __be32 changed, u32 size)
{
	u32 checksum;

	if (bpf_skb_load_bytes(skb, l4 + CSUM_OFFSET_SCTP, &checksum, sizeof(checksum)))
		return -1;
	/* The register after four bytes is their product with x^32, and x^8 for each byte behind them. */
	checksum ^= crc32c_shift(changed, size);
	return bpf_skb_store_bytes(skb, l4 + CSUM_OFFSET_SCTP, &checksum, sizeof(checksum), 0);
}

#endif
