// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Sends frames as fast as it can, past the sender's own stack: what is measured is who forwards them.
 *
 *	flood_worker NETNS DEVICE CPU FRAMES SIZE
 *
 * It reads FRAMES frames of SIZE bytes from standard input, each behind a struct virtio_net_hdr that says what is left
 * to do of its checksum; prints "ready"; and then takes commands, one a line:
 *
 *	COUNT LIMIT_MS		send the frames in turn, COUNT of them at most and no longer than that
 *
 * The answer is a line with how many were sent, and in how many nanoseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "place.h"

#define MOST_FRAMES 1024
#define MOST_BYTES  (sizeof(struct virtio_net_hdr) + ETH_FRAME_LEN)
#define BATCH       64

static char bytes[MOST_FRAMES][MOST_BYTES];
static struct iovec parts[MOST_FRAMES];
static struct mmsghdr messages[MOST_FRAMES];
static int frames;

static int number(const char *text, int most)
{
	int value = atoi(text);

	if (value < 0 || value > most)
		errx(1, "not a number up to %d: %s", most, text);
	return value;
}

static int open_device(const char *name)
{
	struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(name) };
	int one = 1, fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0); /* protocol 0: receives nothing */

	if (fd < 0 || !address.sll_ifindex || bind(fd, (struct sockaddr *)&address, sizeof(address)))
		err(1, "device %s", name);
	if (setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one)))
		err(1, "packet socket");
	return fd;
}

static void read_frames(int count, int size)
{
	for (int i = 0; i < count; i++) {
		if (fread(bytes[i], size, 1, stdin) != 1)
			errx(1, "frames are missing");
		parts[i] = (struct iovec) { bytes[i], size };
		messages[i].msg_hdr = (struct msghdr) { .msg_iov = &parts[i], .msg_iovlen = 1 };
	}
	frames = count;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/* Send a batch from a frame on. What the device has no room for is lost, and counts as sent. */
static int send_batch(int fd, int first, int most)
{
	int count = frames - first < BATCH ? frames - first : BATCH;
	int sent;

	if (count > most)
		count = most;
	sent = sendmmsg(fd, messages + first, count, 0);
	if (sent < 0 && errno != ENOBUFS && errno != ENETDOWN && errno != EINTR)
		err(1, "sending");
	return sent < 0 ? 0 : sent;
}

static void flood(int fd, int count, int limit_ms)
{
	uint64_t begun = now_ns(), end = begun + limit_ms * 1000000ULL;
	int sent = 0;

	while (sent < count && now_ns() < end)
		sent += send_batch(fd, sent % frames, count - sent);
	printf("%d %llu\n", sent, (unsigned long long)(now_ns() - begun));
	fflush(stdout);
}

int main(int argc, char **argv)
{
	int fd, count, limit_ms;
	char line[64];

	if (argc != 6)
		errx(1, "usage: flood_worker NETNS DEVICE CPU FRAMES SIZE");
	enter(argv[1]);
	fd = open_device(argv[2]);
	pin_to(atoi(argv[3]));
	read_frames(number(argv[4], MOST_FRAMES), number(argv[5], MOST_BYTES));
	if (!frames)
		errx(1, "no frames");
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "%d %d", &count, &limit_ms) != 2 || count < 0 || limit_ms < 0)
			errx(1, "not a command: %s", line);
		flood(fd, count, limit_ms);
	}
	return 0;
}
