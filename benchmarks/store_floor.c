/*
 * The floor for the benchmark of stores: the requests that a store has to make, and nothing else.
 *
 *     store_floor preserve NAME COUNT    create a session, and preserve COUNT files of 4 KiB in it
 *     store_floor retrieve NAME COUNT    retrieve the session and each file, and close the file
 *     store_floor renew NAME COUNT       retrieve all files, finish, and preserve them again
 *
 * The seconds that this takes are printed. "preserve" and "renew" leave a process behind that holds
 * the session open until the jump. The files are created before the clock starts.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "liveupdate.h"

static void check(int failed, const char *what)
{
	if (failed) {
		perror(what);
		exit(1);
	}
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static int open_session(unsigned long request, const char *name)
{
	struct liveupdate_ioctl_create_session argument = { .size = sizeof(argument), .fd = -1 };
	int device = open("/dev/liveupdate", O_RDWR | O_CLOEXEC);

	check(device < 0, "open");
	strncpy((char *)argument.name, name, sizeof(argument.name) - 1);
	check(ioctl(device, request, &argument), "session");
	close(device);
	return argument.fd;
}

static void preserve(int session, const int *files, long count)
{
	for (long token = 1; token <= count; token++) {
		struct liveupdate_session_preserve_fd argument = {
			.size = sizeof(argument), .fd = files[token - 1], .token = token,
		};

		check(ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, &argument), "preserve");
	}
}

static int retrieve(int session, long token)
{
	struct liveupdate_session_retrieve_fd argument = {
		.size = sizeof(argument), .fd = -1, .token = token,
	};

	check(ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, &argument), "retrieve");
	return argument.fd;
}

static void stay(double seconds)
{
	printf("%.6f\n", seconds);
	fflush(stdout);
	check(daemon(0, 0), "daemon");
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	struct rlimit limit = { 65536, 65536 };
	struct liveupdate_session_finish finish = { .size = sizeof(finish) };
	int session, *files;
	double began;
	long count;

	if (argc != 4)
		return 2;
	count = atol(argv[3]);
	files = calloc(count, sizeof(*files));
	check(!files || setrlimit(RLIMIT_NOFILE, &limit), "limit");

	if (!strcmp(argv[1], "preserve")) {
		for (long number = 0; number < count; number++) {
			files[number] = memfd_create("file", MFD_CLOEXEC);
			check(files[number] < 0 || ftruncate(files[number], 4096), "memfd");
			check(pwrite(files[number], "x", 1, 0) != 1, "write");
		}
		session = open_session(LIVEUPDATE_IOCTL_CREATE_SESSION, argv[2]);
		began = now();
		preserve(session, files, count);
		stay(now() - began);
	}
	began = now();
	session = open_session(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, argv[2]);
	for (long token = 1; token <= count; token++) {
		files[token - 1] = retrieve(session, token);
		if (argv[1][2] == 't')
			close(files[token - 1]);
	}
	if (argv[1][2] == 't') {
		printf("%.6f\n", now() - began);
		return 0;
	}
	check(ioctl(session, LIVEUPDATE_SESSION_FINISH, &finish), "finish");
	close(session);
	session = open_session(LIVEUPDATE_IOCTL_CREATE_SESSION, argv[2]);
	preserve(session, files, count);
	stay(now() - began);
	return 0;
}
