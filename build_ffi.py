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
int pyluo_ioctl(int fd, unsigned long request, void *argument);
int pyluo_pidfd_getfd(int pidfd, int fd);
uint64_t pyluo_load(uint64_t address, int bits);
void pyluo_store(uint64_t address, int bits, uint64_t value);
int pyluo_preserve_many(int session, size_t count, const int32_t *fds, const uint64_t *tokens,
                        size_t *preserved);
int pyluo_kexec_file_load(int kernel, int initrd, size_t cmdline_length, const char *cmdline,
                          unsigned long flags);
int pyluo_kexec_load(unsigned long flags);
int pyluo_close(int *fd);
int pyluo_reboot(unsigned int command);
int pyluo_mount(const char *source, const char *target, const char *type, unsigned long flags,
                const char *options);
int pyluo_mmap(uint64_t address, size_t length, int protection, int flags, int fd);
int pyluo_madvise(uint64_t address, size_t length, int advice);
int pyluo_mbind(uint64_t address, size_t length, int mode, const uint64_t *nodes,
                unsigned long max_node);
"""

SOURCE = """
#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

static int pyluo_ioctl(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument);
}

static int pyluo_pidfd_getfd(int pidfd, int fd)
{
    return syscall(SYS_pidfd_getfd, pidfd, fd, 0);
}

/* Device registers need a single access of the given width; memcpy() may split or widen it. */
static uint64_t pyluo_load(uint64_t address, int bits)
{
    volatile void *place = (volatile void *)(uintptr_t)address;

    switch (bits) {
    case 8: return *(volatile uint8_t *)place;
    case 16: return *(volatile uint16_t *)place;
    case 32: return *(volatile uint32_t *)place;
    default: return *(volatile uint64_t *)place;
    }
}

static void pyluo_store(uint64_t address, int bits, uint64_t value)
{
    volatile void *place = (volatile void *)(uintptr_t)address;

    switch (bits) {
    case 8: *(volatile uint8_t *)place = value; break;
    case 16: *(volatile uint16_t *)place = value; break;
    case 32: *(volatile uint32_t *)place = value; break;
    default: *(volatile uint64_t *)place = value; break;
    }
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
            return -1;
    }
    return 0;
}

static int pyluo_kexec_file_load(int kernel, int initrd, size_t cmdline_length,
                                 const char *cmdline, unsigned long flags)
{
    return syscall(SYS_kexec_file_load, kernel, initrd, cmdline_length, cmdline, flags);
}

static int pyluo_kexec_load(unsigned long flags)
{
    return syscall(SYS_kexec_load, 0, 0, NULL, flags);
}

/* In one call, so that no exception can come between the two. */
static int pyluo_close(int *fd)
{
    int number = *fd;

    *fd = -1;
    return number < 0 ? 0 : close(number);
}

static int pyluo_reboot(unsigned int command)
{
    return syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, command, NULL);
}

static int pyluo_mount(const char *source, const char *target, const char *type,
                       unsigned long flags, const char *options)
{
    return mount(source, target, type, flags, options);
}

static int pyluo_mmap(uint64_t address, size_t length, int protection, int flags, int fd)
{
    return syscall(SYS_mmap, address, length, protection, flags, fd, 0UL) == -1 ? -1 : 0;
}

static int pyluo_madvise(uint64_t address, size_t length, int advice)
{
    return syscall(SYS_madvise, address, length, advice);
}

static int pyluo_mbind(uint64_t address, size_t length, int mode, const uint64_t *nodes,
                       unsigned long max_node)
{
    return syscall(SYS_mbind, address, length, (unsigned long)mode, nodes, max_node, 0UL);
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
    "".join(f'#include "pyluo/_uapi/{name}"\n' for name in HEADERS) + SOURCE,
    include_dirs=[str(UAPI.parent.parent)],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
