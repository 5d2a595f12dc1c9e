/* SPDX-License-Identifier: Apache-2.0 */
/* A Maglev table built as plainly as C allows: what the kernel's is compared with. */
#include <stdint.h>
#include <string.h>

#define SIZE 16381
#define FREE 0xffff

/* Offsets become where each backend was when the table was full. */
void build(uint32_t backends, uint32_t *offsets, const uint32_t *skips, uint16_t *table)
{
	uint32_t claimed = 0, i;

	memset(table, 0xff, SIZE * sizeof(*table));
	for (;;) {
		for (i = 0; i < backends; i++) {
			uint32_t entry = offsets[i];

			while (table[entry] != FREE) {
				entry += skips[i];
				if (entry >= SIZE)
					entry -= SIZE;
			}
			table[entry] = i;
			offsets[i] = entry;
			if (++claimed == SIZE)
				return;
		}
	}
}
