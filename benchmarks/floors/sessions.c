/*
 * The floor for everything that is preserved: the requests that have to be made, and nothing else.
 *
 *     sessions preserve NAME SESSIONS FILES SIZE    create sessions NAME.0, NAME.1, ..., and preserve
 *                                                   FILES memfds of SIZE bytes in each
 *     sessions hold ...                             the same; hold them in the background until the jump
 *     sessions retrieve ...                         retrieve the sessions and each file, close the file
 *     sessions renew ...                            retrieve all files, finish, preserve them again, hold
 *
 * The seconds that this takes are printed. The files are created, and all of their memory allocated,
 * before the clock starts.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "liveupdate.h"
#include "floor.h"

static const char *name;
static int device;

static int open_session(unsigned long request, long number)
{
	struct liveupdate_ioctl_create_session argument = { .size = sizeof(argument), .fd = -1 };

	snprintf((char *)argument.name, sizeof(argument.name), "%s.%ld", name, number);
	check(ioctl(device, request, &argument), "session");
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

static int create_file(long size)
{
	int file = memfd_create("file", MFD_CLOEXEC);

	check(file < 0 || fallocate(file, 0, 0, size), "memfd");
	return file;
}

static void print(double seconds)
{
	printf("%.6f\n", seconds);
	fflush(stdout);
}

static void hold(void)
{
	check(daemon(0, 0), "daemon");
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	struct rlimit limit = { 65536, 65536 };
	struct liveupdate_session_finish finish = { .size = sizeof(finish) };
	long sessions, count, size;
	const char *operation;
	double began;
	int *files;

	if (argc != 6)
		return 2;
	operation = argv[1];
	name = argv[2];
	sessions = atol(argv[3]);
	count = atol(argv[4]);
	size = atol(argv[5]);
	files = calloc(sessions * count, sizeof(*files));
	check(!files || setrlimit(RLIMIT_NOFILE, &limit), "limit");
	device = open("/dev/liveupdate", O_RDWR | O_CLOEXEC);
	check(device < 0, "open");

	if (!strcmp(operation, "preserve") || !strcmp(operation, "hold")) {
		for (long number = 0; number < sessions * count; number++)
			files[number] = create_file(size);
		began = now();
		for (long number = 0; number < sessions; number++)
			preserve(open_session(LIVEUPDATE_IOCTL_CREATE_SESSION, number),
				 files + number * count, count);
		print(now() - began);
		close(device);
		if (*operation == 'h')
			hold();
		return 0;
	}
	began = now();
	for (long number = 0; number < sessions; number++) {
		int session = open_session(LIVEUPDATE_IOCTL_RETRIEVE_SESSION, number);

		for (long token = 1; token <= count; token++) {
			int file = retrieve(session, token);

			if (!strcmp(operation, "retrieve"))
				close(file);
			else
				files[token - 1] = file;
		}
		if (!strcmp(operation, "renew")) {
			check(ioctl(session, LIVEUPDATE_SESSION_FINISH, &finish), "finish");
			close(session);
			session = open_session(LIVEUPDATE_IOCTL_CREATE_SESSION, number);
			preserve(session, files, count);
		}
	}
	print(now() - began);
	close(device);
	if (!strcmp(operation, "renew"))
		hold();
	return 0;
}
