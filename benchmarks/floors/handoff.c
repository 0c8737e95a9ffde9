/*
 * The floor for a handoff: a process gives a successor, which waits at a socket, its iommufd, its
 * device, its RAM and a list of its mappings. The successor asks the kernel whether each mapping is
 * there, and takes the memory over.
 *
 *     handoff IOMMUFD DEVICE FILE IOAS LENGTH STRIDE COUNT
 *
 * The first three are open descriptors. The mappings have LENGTH bytes and begin at the multiples of
 * STRIDE, from the first. The seconds are printed from just before the first process sends until the
 * memory is accounted to its successor.
 */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "iommufd.h"
#include "floor.h"

#define FILES 3
#define LIMIT 100000

static struct state {
	double left;
	uint64_t ioas, count;
	struct { uint64_t iova, length; } mappings[LIMIT];
} state;

static void transfer(int connection, int *fds, int sends)
{
	char control[CMSG_SPACE(FILES * sizeof(int))] = { 0 };
	struct iovec data = { &state, sizeof(state) };
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	data.iov_len = sizeof(state);
	if (sends) {
		data.iov_len = (char *)&state.mappings[state.count] - (char *)&state;
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(FILES * sizeof(int));
		memcpy(CMSG_DATA(header), fds, FILES * sizeof(int));
		check(sendmsg(connection, &message, 0) < 0, "send");
	} else {
		check(recvmsg(connection, &message, MSG_CMSG_CLOEXEC) < 1, "receive");
		memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), FILES * sizeof(int));
	}
}

static int is_mapped(int iommufd, uint64_t iova, uint64_t length)
{
	struct iommu_ioas_copy copy = {
		.size = sizeof(copy), .flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE,
		.dst_ioas_id = state.ioas, .src_ioas_id = state.ioas,
		.length = length, .dst_iova = iova, .src_iova = iova,
	};

	return ioctl(iommufd, IOMMU_IOAS_COPY, &copy) && errno != ENOENT;
}

static void succeed(int connection)
{
	struct iommu_ioas_change_process change = { .size = sizeof(change) };
	int fds[FILES];

	check(write(connection, "r", 1) != 1, "ready");
	transfer(connection, fds, 0);
	for (uint64_t number = 0; number < state.count; number++)
		check(!is_mapped(fds[0], state.mappings[number].iova, state.mappings[number].length),
		      "mapping");
	check(ioctl(fds[0], IOMMU_IOAS_CHANGE_PROCESS, &change), "change process");
	printf("%.6f\n", now() - state.left);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	int fds[FILES], sockets[2], status;
	char ready;

	if (argc != 8 || atol(argv[7]) > LIMIT)
		return 2;
	for (int place = 0; place < FILES; place++)
		fds[place] = atoi(argv[place + 1]);
	state.ioas = atol(argv[4]);
	state.count = atol(argv[7]);
	for (uint64_t number = 0; number < state.count; number++) {
		state.mappings[number].iova = (number + 1) * atol(argv[6]);
		state.mappings[number].length = atol(argv[5]);
	}
	check(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets), "socketpair");
	if (!fork()) {
		succeed(sockets[1]);
		return 0;
	}
	check(read(sockets[0], &ready, 1) != 1, "ready");
	state.left = now();
	transfer(sockets[0], fds, 1);
	check(wait(&status) < 0 || status, "successor");
	return 0;
}
