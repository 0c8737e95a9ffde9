"""The build of `pyluo._ffi` from the headers in pyluo/_uapi (cffi, API mode, stable ABI).

The headers are the only source: the C compiler includes them, and cffi parses the same structs, but
takes the value of every macro from the compiler.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

UAPI = Path(__file__).parent / "pyluo" / "_uapi"
HEADERS = (
    "liveupdate.h",
    "memfd.h",
    "fcntl.h",
    "if.h",
    "if_tun.h",
    "iommufd.h",
    "kexec.h",
    "kvm_x86.h",
    "kvm.h",
    "mempolicy.h",
    "mman.h",
    "pci_regs.h",
    "reboot.h",
    "vfio.h",
)

CALLS = """
int pyluo_ioctl(int fd, unsigned long request, void *argument, int *outcome);
int pyluo_pidfd_getfd(int pidfd, int fd);
uint64_t pyluo_load(uint64_t address, int bits);
void pyluo_store(uint64_t address, int bits, uint64_t value);
struct pyluo_files {
    uint64_t size, holes, largest;
    size_t noexec, failed;
};
int pyluo_look(size_t count, const int32_t *fds, uint64_t page, struct pyluo_files *found);
int pyluo_read_file(const char *path, char *text, size_t size);
uint64_t pyluo_read_tsc(void);
int pyluo_preserve_many(int session, size_t count, const int32_t *fds, const uint64_t *tokens,
                        size_t *preserved);
int pyluo_kexec_file_load(int kernel, int initrd, size_t cmdline_length, const char *cmdline,
                          unsigned long flags);
int pyluo_kexec_load(unsigned long flags);
int pyluo_close(int *fd);
void pyluo_move_fd(int *to, int *from);
struct pyluo_packet {
    int result;
    int flags;
    int has_credentials;
    int32_t pid, uid, gid;
    int pidfd;
    int fd_count;
    int fds[253];
    size_t length;
    unsigned char data[1024];
};
void pyluo_send_packet(int socket, struct pyluo_packet *packet);
void pyluo_receive_packet(int socket, struct pyluo_packet *packet);
int pyluo_reboot(unsigned int command);
int pyluo_mount(const char *source, const char *target, const char *type, unsigned long flags,
                const char *options);
int pyluo_mmap(uint64_t address, size_t length, int protection, int flags, int fd);
int pyluo_madvise(uint64_t address, size_t length, int advice);
int pyluo_mbind(uint64_t address, size_t length, int mode, const uint64_t *nodes,
                unsigned long max_node);
"""

# In a text of its own, which needs no other header, so that a test can compile it for each machine.
REGISTERS = """
#include <stdint.h>

/*
 * Memory that was written before a store to a register, such as a descriptor before its doorbell,
 * must be visible to the device first; memory that is read after a load of a register, such as data
 * after its status, must not be read earlier. The CPUs of x86 keep this order by themselves.
 */
#if defined(__aarch64__)
#define BEFORE_STORE() __asm__ volatile("dmb oshst" : : : "memory")
#define AFTER_LOAD() __asm__ volatile("dmb oshld" : : : "memory")
#elif defined(__x86_64__) || defined(__i386__)
#define BEFORE_STORE() __asm__ volatile("" : : : "memory")
#define AFTER_LOAD() __asm__ volatile("" : : : "memory")
#else
#define BEFORE_STORE() __sync_synchronize()
#define AFTER_LOAD() __sync_synchronize()
#endif

/* The time-stamp counter of this CPU; 0 on a machine that has none. */
static uint64_t pyluo_read_tsc(void)
{
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_ia32_rdtsc();
#else
    return 0;
#endif
}

/* Device registers need a single access of the given width; memcpy() may split or widen it. */
static uint64_t pyluo_load(uint64_t address, int bits)
{
    volatile void *place = (volatile void *)(uintptr_t)address;
    uint64_t value;

    switch (bits) {
    case 8: value = *(volatile uint8_t *)place; break;
    case 16: value = *(volatile uint16_t *)place; break;
    case 32: value = *(volatile uint32_t *)place; break;
    default: value = *(volatile uint64_t *)place; break;
    }
    AFTER_LOAD();
    return value;
}

static void pyluo_store(uint64_t address, int bits, uint64_t value)
{
    volatile void *place = (volatile void *)(uintptr_t)address;

    BEFORE_STORE();
    switch (bits) {
    case 8: *(volatile uint8_t *)place = value; break;
    case 16: *(volatile uint16_t *)place = value; break;
    case 32: *(volatile uint32_t *)place = value; break;
    default: *(volatile uint64_t *)place = value; break;
    }
}
"""

SOURCE = """
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * Each function returns -errno if its system call fails. errno itself would be read too late: a
 * signal handler that Python runs after the call may make calls of its own.
 */
static int result_of(long returned)
{
    return returned < 0 ? -errno : (int)returned;
}

/* The outcome is stored as well as returned: an exception may come before Python has the result. */
static int pyluo_ioctl(int fd, unsigned long request, void *argument, int *outcome)
{
    return *outcome = result_of(ioctl(fd, request, argument));
}

static int pyluo_pidfd_getfd(int pidfd, int fd)
{
    return result_of(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
}

/* What preserving some files takes, in bytes of whole pages; the first of them that is sealed
   noexec, `count` if none is; and the one that could not be looked at. */
struct pyluo_files {
    uint64_t size, holes, largest;
    size_t noexec, failed;
};

static int pyluo_look(size_t count, const int32_t *fds, uint64_t page, struct pyluo_files *found)
{
    memset(found, 0, sizeof(*found));
    found->noexec = count;
    for (size_t number = 0; number < count; number++) {
        struct statfs system;
        struct stat status;
        long seals = syscall(SYS_fcntl, fds[number], F_GET_SEALS);

        found->failed = number;
        if (seals < 0 && (errno == EINVAL || errno == EBADF))
            continue; /* it is on no tmpfs, or not open: the kernel refuses it */
        /* The C library has a function fstat() only since glibc 2.33. */
        if (seals < 0 || fstatfs(fds[number], &system) ||
            syscall(SYS_fstat, fds[number], &status))
            return -errno;
        if (seals & F_SEAL_EXEC && found->noexec == count)
            found->noexec = number;
        if ((uint64_t)system.f_bsize != page)
            continue; /* it has huge pages: the kernel refuses it */
        uint64_t size = ((uint64_t)status.st_size + page - 1) / page * page;
        uint64_t allocated = (uint64_t)status.st_blocks * 512;

        found->size += size;
        if (size > allocated)
            found->holes += size - allocated;
        if (size > found->largest)
            found->largest = size;
    }
    return 0;
}

static int pyluo_read_file(const char *path, char *text, size_t size)
{
    FILE *file = fopen(path, "re");
    int length;

    if (!file)
        return -errno;
    length = fread(text, 1, size, file);
    if (ferror(file))
        length = -errno;
    fclose(file);
    return length;
}

static int pyluo_preserve_many(int session, size_t count, const int32_t *fds,
                               const uint64_t *tokens, size_t *preserved)
{
    for (*preserved = 0; *preserved < count; ) {
        struct liveupdate_session_preserve_fd request = {
            .size = sizeof(request),
            .fd = fds[*preserved],
            .token = tokens[*preserved],
        };
        if (!ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, &request))
            ++*preserved;
        else if (errno != EINTR)
            return -errno;
    }
    return 0;
}

static int pyluo_kexec_file_load(int kernel, int initrd, size_t cmdline_length,
                                 const char *cmdline, unsigned long flags)
{
    return result_of(syscall(SYS_kexec_file_load, kernel, initrd, cmdline_length, cmdline, flags));
}

static int pyluo_kexec_load(unsigned long flags)
{
    return result_of(syscall(SYS_kexec_load, 0, 0, NULL, flags));
}

/* In one call, so that no exception can come between the two. */
static int pyluo_close(int *fd)
{
    int number = *fd;

    *fd = -1;
    return number < 0 ? 0 : result_of(close(number));
}

static void pyluo_move_fd(int *to, int *from)
{
    *to = *from;
    *from = -1;
}

#ifndef SCM_CREDENTIALS
#define SCM_CREDENTIALS 2
#endif
#ifndef SCM_PIDFD
#define SCM_PIDFD 4
#endif
#define PYLUO_MAX_FDS 253 /* SCM_MAX_FD in include/net/scm.h */

struct pyluo_credentials { /* struct ucred, which libc hides from some sources */
    int32_t pid;
    uint32_t uid, gid;
};

struct pyluo_packet {
    int result; /* bytes sent or received; a negative errno if the call failed or was not made */
    int flags; /* MSG_TRUNC, MSG_CTRUNC */
    int has_credentials;
    int32_t pid, uid, gid;
    int pidfd; /* a negative errno if the kernel could make none; -1 if it was not asked to */
    int fd_count;
    int fds[PYLUO_MAX_FDS];
    size_t length;
    unsigned char data[1024];
};

union pyluo_ancillary {
    struct cmsghdr align;
    /* The owner of the socket may have enabled other ancillary data, such as security labels and
       time stamps. Without room for these, the kernel would drop the descriptors, which come
       last. */
    char bytes[CMSG_SPACE(sizeof(struct pyluo_credentials)) +
               CMSG_SPACE(PYLUO_MAX_FDS * sizeof(int)) + CMSG_SPACE(sizeof(int)) + 1024];
};

static void pyluo_append(struct msghdr *message, int type, const void *data, size_t size)
{
    struct cmsghdr *header = (void *)((char *)message->msg_control + message->msg_controllen);

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = type;
    header->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(header), data, size);
    message->msg_controllen += CMSG_SPACE(size);
}

/* The result is stored by the same call that sends, so that no exception can come between. */
static void pyluo_send_packet(int socket, struct pyluo_packet *packet)
{
    /* Without these, the kernel would send the real user ID; and it would send none at all if the
       receiver has not enabled SO_PASSCRED yet. */
    struct pyluo_credentials self = {getpid(), geteuid(), getegid()};
    struct iovec bytes = {packet->data, packet->length};
    union pyluo_ancillary ancillary;
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = ancillary.bytes};
    ssize_t sent;

    memset(&ancillary, 0, sizeof(ancillary));
    pyluo_append(&message, SCM_CREDENTIALS, &self, sizeof(self));
    if (packet->fd_count)
        pyluo_append(&message, SCM_RIGHTS, packet->fds, packet->fd_count * sizeof(int));
    do
        sent = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    packet->result = sent < 0 ? -errno : (int)sent;
}

/* Descriptors are in the packet as soon as they are open, so that no exception can lose them. */
static void pyluo_receive_packet(int socket, struct pyluo_packet *packet)
{
    struct iovec bytes = {packet->data, sizeof(packet->data)};
    union pyluo_ancillary ancillary;
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = ancillary.bytes,
                             .msg_controllen = sizeof(ancillary.bytes)};
    struct cmsghdr *header;
    ssize_t received;

    do
        received = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (received < 0 && errno == EINTR);
    if (received < 0) {
        packet->result = -errno;
        return;
    }
    packet->flags = message.msg_flags;
    packet->length = received;
    for (header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
        size_t size = header->cmsg_len - CMSG_LEN(0);
        if (header->cmsg_level != SOL_SOCKET)
            continue;
        if (header->cmsg_type == SCM_RIGHTS) {
            packet->fd_count = size / sizeof(int);
            memcpy(packet->fds, CMSG_DATA(header), packet->fd_count * sizeof(int));
        } else if (header->cmsg_type == SCM_PIDFD && size >= sizeof(int)) {
            memcpy(&packet->pidfd, CMSG_DATA(header), sizeof(int));
        } else if (header->cmsg_type == SCM_CREDENTIALS && size >= sizeof(int[3])) {
            memcpy(&packet->pid, CMSG_DATA(header), sizeof(int[3]));
            packet->has_credentials = 1;
        }
    }
    packet->result = received;
}

static int pyluo_reboot(unsigned int command)
{
    return result_of(
        syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, command, NULL));
}

static int pyluo_mount(const char *source, const char *target, const char *type,
                       unsigned long flags, const char *options)
{
    return result_of(mount(source, target, type, flags, options));
}

static int pyluo_mmap(uint64_t address, size_t length, int protection, int flags, int fd)
{
    return syscall(SYS_mmap, address, length, protection, flags, fd, 0UL) == -1 ? -errno : 0;
}

static int pyluo_madvise(uint64_t address, size_t length, int advice)
{
    return result_of(syscall(SYS_madvise, address, length, advice));
}

static int pyluo_mbind(uint64_t address, size_t length, int mode, const uint64_t *nodes,
                       unsigned long max_node)
{
    return result_of(
        syscall(SYS_mbind, address, length, (unsigned long)mode, nodes, max_node, 0UL));
}
"""


def declarations(header: str) -> str:
    """Return a header's declarations for cffi: its structs, and its macros without their values."""
    body = re.sub(r"^#(include|ifndef|endif).*\n", "", header, flags=re.MULTILINE)
    body = re.sub(r"^#define PYLUO_UAPI_\w+\n", "", body, flags=re.MULTILINE)
    return re.sub(r"^#define (\w+) .+$", r"#define \1 ...", body, flags=re.MULTILINE)


ffibuilder = FFI()
for name in HEADERS:
    ffibuilder.cdef(declarations((UAPI / name).read_text()))
ffibuilder.cdef(CALLS)
ffibuilder.set_source(
    "pyluo._ffi",
    "".join(f'#include "pyluo/_uapi/{name}"\n' for name in HEADERS) + REGISTERS + SOURCE,
    include_dirs=[str(UAPI.parent.parent)],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
