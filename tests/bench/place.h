/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Where a worker runs: its network namespace, its CPU. For sources that define _GNU_SOURCE. */
#ifndef EBPROXY_BENCH_PLACE_H
#define EBPROXY_BENCH_PLACE_H

#include <err.h>
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

static void enter(const char *netns)
{
	int fd = open(netns, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || setns(fd, CLONE_NEWNET))
		err(1, "entering %s", netns);
	close(fd);
}

static void pin_to(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "cpu %d", cpu);
}

#endif
