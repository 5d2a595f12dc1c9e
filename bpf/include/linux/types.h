/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The integer types that BCC's helpers and our programs use. */
#ifndef __EBPROXY_LINUX_TYPES_H
#define __EBPROXY_LINUX_TYPES_H

typedef unsigned char u8, __u8;
typedef unsigned short u16, __u16;
typedef unsigned int u32, __u32;
typedef unsigned long long u64, __u64;
typedef signed char s8, __s8;
typedef short s16, __s16;
typedef int s32, __s32;
typedef long long s64, __s64;
typedef _Bool bool;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;

/* Values in network byte order; anything unmarked is in host order. */
typedef u16 __be16, __le16, __sum16;
typedef u32 __be32, __le32, __wsum;
typedef u64 __be64, __le64;

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

#define NULL ((void *)0)
#define offsetof(type, member) __builtin_offsetof(type, member)
#define true 1
#define false 0
#define __aligned_u64 __u64 __attribute__((aligned(8)))

#endif
