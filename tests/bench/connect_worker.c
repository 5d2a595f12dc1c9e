// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * One worker of the bench: a client and its servers, each in a network namespace (which may be the same), both in one
 * cgroup, on CPUs of their own.
 *
 *	connect_worker CLIENT_NETNS SERVER_NETNS CGROUP CLIENT_CPU SERVER_CPU PORT
 *
 * It prints "ready" and then takes commands from standard input, one a line, for an ADDRESS or (SPREAD > 1) for a
 * pseudo-random one of the SPREAD addresses from it on:
 *
 *	connect COUNT ADDRESS SPREAD PORT	connect and close, COUNT times
 *	crr     COUNT ADDRESS SPREAD PORT	connect, a byte there and back, close
 *	rr      COUNT ADDRESS SPREAD PORT	a byte there and back, on one connection
 *	udp     COUNT ADDRESS SPREAD PORT	a byte there and back, on one unconnected socket
 *	churn   0     ADDRESS SPREAD PORT	connect and close until something arrives on standard input
 *
 * The answer is COUNT pairs of u32, nanoseconds of the connect or the exchange and of the close (0 for rr and udp); for
 * churn one pair, connects tried and failed. Any failure but churn's ends the worker.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "place.h"

#define MOST_ROUNDS 100000
#define BACKLOG     4096

struct target {
	uint32_t address; /* host order */
	uint32_t spread;
	uint16_t port;
};

struct sample {
	uint32_t exchange_ns;
	uint32_t close_ns;
};

static struct sample samples[MOST_ROUNDS];
static int server_cpu;

static void join(const char *cgroup)
{
	char path[4096];
	FILE *procs;

	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
	procs = fopen(path, "w");
	if (!procs || fprintf(procs, "%d", getpid()) < 0 || fclose(procs))
		err(1, "joining %s", cgroup);
}

static int bound_socket(int type, uint16_t port)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(port) };
	int one = 1, fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof(any)))
		err(1, "port %u", port);
	return fd;
}

static void *serve_tcp(void *argument)
{
	int fd = *(int *)argument;

	pin_to(server_cpu);
	for (;;) {
		int client = accept(fd, NULL, NULL);
		char byte;

		if (client < 0)
			continue;
		while (recv(client, &byte, 1, 0) == 1)
			send(client, &byte, 1, MSG_NOSIGNAL);
		close(client);
	}
	return NULL;
}

/* Answers from the very address that was asked, which a socket bound to any address has to be told. */
static void *serve_udp(void *argument)
{
	int fd = *(int *)argument;

	pin_to(server_cpu);
	for (;;) {
		char byte, control[CMSG_SPACE(sizeof(struct in_pktinfo))];
		struct sockaddr_in client;
		struct iovec data = { &byte, 1 };
		struct msghdr message = {
			.msg_name = &client,
			.msg_namelen = sizeof(client),
			.msg_iov = &data,
			.msg_iovlen = 1,
			.msg_control = control,
			.msg_controllen = sizeof(control),
		};
		struct in_pktinfo *info;

		if (recvmsg(fd, &message, 0) != 1 || !CMSG_FIRSTHDR(&message))
			continue;
		info = (struct in_pktinfo *)CMSG_DATA(CMSG_FIRSTHDR(&message));
		info->ipi_spec_dst = info->ipi_addr;
		info->ipi_ifindex = 0;
		sendmsg(fd, &message, 0);
	}
	return NULL;
}

static void start_servers(uint16_t port)
{
	static int tcp, udp;
	pthread_t thread;
	int one = 1;

	tcp = bound_socket(SOCK_STREAM, port);
	udp = bound_socket(SOCK_DGRAM, port);
	setsockopt(tcp, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(udp, IPPROTO_IP, IP_PKTINFO, &one, sizeof(one));
	if (listen(tcp, BACKLOG))
		err(1, "listen");
	if (pthread_create(&thread, NULL, serve_tcp, &tcp) || pthread_create(&thread, NULL, serve_udp, &udp))
		errx(1, "threads");
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static struct sockaddr_in pick(const struct target *target)
{
	static uint32_t state = 2463534242u; /* xorshift32 (Marsaglia): the same sequence in every worker */
	struct sockaddr_in peer = { .sin_family = AF_INET, .sin_port = htons(target->port) };

	state ^= state << 13;
	state ^= state >> 17;
	state ^= state << 5;
	peer.sin_addr.s_addr = htonl(target->address + (uint32_t)(((uint64_t)state * target->spread) >> 32));
	return peer;
}

static int client_socket(void)
{
	struct linger reset = { .l_onoff = 1, .l_linger = 0 };
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		err(1, "socket");
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

static void exchange_byte(int fd)
{
	char byte = 'x';

	if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1 || recv(fd, &byte, 1, 0) != 1)
		err(1, "no echo");
}

static void run_tcp(int count, const struct target *target, int with_request)
{
	for (int i = 0; i < count; i++) {
		struct sockaddr_in peer = pick(target);
		int fd = client_socket();
		uint64_t begun = now_ns(), done, closed;

		if (connect(fd, (struct sockaddr *)&peer, sizeof(peer)))
			err(1, "connect to %s:%u", inet_ntoa(peer.sin_addr), target->port);
		if (with_request)
			exchange_byte(fd);
		done = now_ns();
		close(fd);
		closed = now_ns();
		samples[i] = (struct sample) { done - begun, closed - done };
	}
}

static void run_requests(int count, const struct target *target)
{
	struct sockaddr_in peer = pick(target);
	int fd = client_socket();

	if (connect(fd, (struct sockaddr *)&peer, sizeof(peer)))
		err(1, "connect to %s:%u", inet_ntoa(peer.sin_addr), target->port);
	for (int i = 0; i < count; i++) {
		uint64_t begun = now_ns();

		exchange_byte(fd);
		samples[i] = (struct sample) { now_ns() - begun, 0 };
	}
	close(fd);
}

static void run_udp(int count, const struct target *target)
{
	struct timeval patience = { .tv_sec = 2 };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	for (int i = 0; i < count; i++) {
		struct sockaddr_in peer = pick(target), from;
		socklen_t size = sizeof(from);
		uint64_t begun = now_ns();
		char byte = 'x';

		if (sendto(fd, &byte, 1, 0, (struct sockaddr *)&peer, sizeof(peer)) != 1 ||
		    recvfrom(fd, &byte, 1, 0, (struct sockaddr *)&from, &size) != 1)
			err(1, "no datagram back from %s:%u", inet_ntoa(peer.sin_addr), target->port);
		samples[i] = (struct sample) { now_ns() - begun, 0 };
		if (from.sin_addr.s_addr != peer.sin_addr.s_addr || from.sin_port != peer.sin_port)
			errx(1, "a datagram from a stranger, %s", inet_ntoa(from.sin_addr));
	}
	close(fd);
}

static int is_told_to_stop(void)
{
	struct pollfd input = { .fd = 0, .events = POLLIN };

	return poll(&input, 1, 0) != 0;
}

static void run_churn(const struct target *target)
{
	struct sample total = { 0, 0 };

	while (!is_told_to_stop()) {
		struct sockaddr_in peer = pick(target);
		int fd = client_socket();

		total.exchange_ns++;
		if (connect(fd, (struct sockaddr *)&peer, sizeof(peer)))
			total.close_ns++;
		close(fd);
	}
	samples[0] = total;
}

static void obey(const char *line)
{
	char verb[16], address[64];
	struct target target;
	struct in_addr parsed;
	int count;

	if (sscanf(line, "%15s %d %63s %u %hu", verb, &count, address, &target.spread, &target.port) != 5 ||
	    !inet_aton(address, &parsed) || count < 0 || count > MOST_ROUNDS)
		errx(1, "not a command: %s", line);
	target.address = ntohl(parsed.s_addr);
	if (!strcmp(verb, "connect") || !strcmp(verb, "crr"))
		run_tcp(count, &target, verb[1] == 'r');
	else if (!strcmp(verb, "rr"))
		run_requests(count, &target);
	else if (!strcmp(verb, "udp"))
		run_udp(count, &target);
	else if (!strcmp(verb, "churn"))
		run_churn(&target), count = 1;
	else
		errx(1, "not a command: %s", line);
	if (fwrite(samples, sizeof(samples[0]), count, stdout) != (size_t)count || fflush(stdout))
		err(1, "answer");
}

int main(int argc, char **argv)
{
	char line[256];

	if (argc != 7)
		errx(1, "usage: connect_worker CLIENT_NETNS SERVER_NETNS CGROUP CLIENT_CPU SERVER_CPU PORT");
	setvbuf(stdin, NULL, _IONBF, 0); /* poll() has to see what was not read yet */
	join(argv[3]);
	enter(argv[2]);
	server_cpu = atoi(argv[5]);
	start_servers((uint16_t)atoi(argv[6]));
	enter(argv[1]); /* the servers' sockets and threads stay where they began */
	pin_to(atoi(argv[4]));
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin))
		if (line[0] != '\n') /* what ended a churn */
			obey(line);
	return 0;
}
