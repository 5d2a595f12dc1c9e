/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Stands in for the kernel's own: without this file BCC goes looking for kernel headers on the node. */
#ifndef __EBPROXY_KCONFIG_H
#define __EBPROXY_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#endif
