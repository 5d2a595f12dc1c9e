/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Empty on purpose: BCC includes it by name and force-includes its own declarations. */
