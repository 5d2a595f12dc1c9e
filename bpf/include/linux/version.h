/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* A fixed floor: BCC's helpers.h asks, our programs never do (features are probed, not guessed from a version). */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 18, 0)
