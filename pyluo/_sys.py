"""The only module that uses cffi: for the kernel's structs, and for system calls.

No function here returns a cffi object. A system call that fails raises a `RequestError`; only
`Ioctl.attempt`, `Ioctl.errno_for_unknown_tail` and `preserve_many` return the errno instead, and
`read_small_file` returns no text.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pyluo._ffi import ffi, lib
from pyluo.errors import (
    ImageRejectedError,
    ImageSignatureError,
    KernelTooOldError,
    KexecBusyError,
    KexecError,
    NotPermittedError,
    RequestError,
    SealedError,
)
from pyluo.operation import Operation

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Sequence

    from pyluo.operation import Refusal

    Buffer = bytes | bytearray | memoryview | mmap.mmap
    Field = int | Buffer | Sequence[int] | Mapping[str, int]

__all__ = [
    "MMAP",
    "Exported",
    "FdNumber",
    "Files",
    "Ioctl",
    "PacketBuffer",
    "PlainIoctl",
    "Reply",
    "Request",
    "Struct",
    "bind_to_nodes",
    "constant",
    "kexec_file_load",
    "kexec_load_exists",
    "look",
    "madvise",
    "map_over",
    "mount",
    "pidfd_getfd",
    "preserve_many",
    "read_small_file",
    "read_tsc",
    "reboot",
]

_UNKNOWN_FLAGS = 0xFFF0  # flags that kexec_load(2) accepts on no kernel
_UNSIGNED = (
    "this kernel loads only images that are signed by a key that it trusts. Nothing has changed, "
    "and what is preserved is intact"
)
_NO_PAGES = "There is not enough memory, or too few huge pages are reserved: see vm.nr_hugepages"
_KEXEC_FILE_LOAD = Operation(
    "kexec_file_load",
    KexecError,
    {
        errno.EPERM: (
            NotPermittedError,
            "Loading needs CAP_SYS_BOOT, and /proc/sys/kernel/kexec_load_disabled to "
            "be 0; a kernel that is locked down also wants a valid signature",
        ),
        errno.ENOEXEC: ImageRejectedError,
        errno.ENODATA: (
            ImageSignatureError,
            "The image has no signature; " + _UNSIGNED,
        ),
        errno.ENOKEY: (
            ImageSignatureError,
            "The image is signed by a key that this kernel does not trust; " + _UNSIGNED,
        ),
        errno.EKEYREJECTED: (
            ImageSignatureError,
            (
                "The image was changed after it was signed, or its key is revoked, or "
                "this kernel cannot check the signatures of such images; "
            )
            + _UNSIGNED,
        ),
        errno.EBADMSG: (
            ImageSignatureError,
            "The signature is damaged; " + _UNSIGNED,
        ),
        errno.ELIBBAD: (
            ImageSignatureError,
            "The image is no PE file, so that it cannot have a signature; " + _UNSIGNED,
        ),
        errno.ENOPKG: (
            ImageSignatureError,
            "This kernel lacks the algorithm of the signature; " + _UNSIGNED,
        ),
        errno.EBUSY: KexecBusyError,
        errno.ENOSYS: (
            KernelTooOldError,
            "The kernel needs CONFIG_KEXEC_FILE=y",
        ),
    },
)
_REBOOT = Operation(
    "reboot",
    KexecError,
    {
        errno.EBUSY: KexecBusyError,
        errno.EPERM: NotPermittedError,
        errno.EINVAL: (
            "No image is loaded; or a preserved file could not be frozen: dmesg says "
            "which one. The system keeps running, unchanged"
        ),
    },
)
_MOUNT = Operation("mount")
_LOOK = Operation("fstat")
_PIDFD_GETFD = Operation("pidfd_getfd")
# Of a memfd.
MMAP = Operation(
    "mmap",
    RequestError,
    {
        errno.EPERM: SealedError,
        errno.EACCES: SealedError,
        errno.ENOMEM: "For huge pages, reserve some first: see vm.nr_hugepages",
    },
)
_MBIND = Operation(
    "mbind",
    RequestError,
    {
        errno.ENOSYS: "The kernel needs CONFIG_NUMA",
        errno.EINVAL: (
            "A node does not exist, has no memory or is outside this process's cpuset; or"
            " the mode needs other nodes, or a newer kernel than Linux {release}"
        ),
    },
)
_MADVISE = {
    "MADV_HUGEPAGE": Operation(
        "MADV_HUGEPAGE",
        RequestError,
        {
            errno.EINVAL: "The kernel needs CONFIG_TRANSPARENT_HUGEPAGE",
        },
    ),
    "MADV_POPULATE_READ": Operation(
        "MADV_POPULATE_READ",
        RequestError,
        {
            errno.EFAULT: _NO_PAGES,
        },
    ),
    "MADV_POPULATE_WRITE": Operation(
        "MADV_POPULATE_WRITE",
        RequestError,
        {
            errno.EFAULT: _NO_PAGES,
        },
    ),
}
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SMALL = 1 << 16  # bytes
_small = ffi.new_allocator(should_clear_after_alloc=False)
_NOT_CALLED = -(1 << 31)  # the outcome of an ioctl before the call: the negative of no errno


def constant(name: str) -> int:
    """Return the value of the macro or enum constant of this name in the headers of `_uapi`."""
    value = getattr(lib, name)
    assert isinstance(value, int), name
    return value


def _call(operation: Operation, subject: str, function: Callable[[], int]) -> int:
    """Return the result of a system call; raise the exception of `operation` if it fails."""
    result = _retry(function)
    if result < 0:
        raise operation.error(-result, subject)
    return result


def _retry(function: Callable[[], int]) -> int:
    """Call `function`, again after each EINTR; return its result, which is -errno if it failed."""
    while (result := function()) == -errno.EINTR:
        pass
    return result


class Reply:
    """A struct that the kernel filled in, or that was read from a buffer."""

    __slots__ = ("_memory", "_struct")

    def __init__(self, struct: object, memory: object) -> None:
        self._struct = struct
        self._memory = memory  # `struct` points into it

    def integer(self, field: str) -> int:
        """Return the value of an integer field."""
        return int(getattr(self._struct, field))

    def integers(self, field: str) -> tuple[int, ...]:
        """Return the values of a field that is an array of integers."""
        return tuple(int(item) for item in getattr(self._struct, field))

    def member(self, field: str) -> Reply:
        """Return a member that is a struct or a union; it stays part of this one."""
        return Reply(getattr(self._struct, field), self._memory)

    def text(self, field: str) -> str:
        """Return the text of a field that is a zero-terminated string, decoded by os.fsdecode."""
        raw = bytes(ffi.buffer(getattr(self._struct, field)))
        return os.fsdecode(raw.split(b"\0", 1)[0])

    def data(self) -> bytes:
        """Return the bytes of the struct and of the data after it, if there is any."""
        return bytes(ffi.buffer(self._memory))


class Request(Reply):
    """An ioctl with its struct, before and after the call.

    The struct and the outcome are stored in C, within the call. So nothing that the kernel did is
    ever in doubt, even if a signal handler raises right after the call: a descriptor that the
    kernel returned is in the struct, and `succeeded` tells whether there is one.
    """

    __slots__ = ("_command", "_outcome")

    def __init__(self, command: int, struct: object, memory: object) -> None:
        super().__init__(struct, memory)
        self._command = command
        self._outcome = ffi.new("int *", _NOT_CALLED)

    def attempt(self, fd: int) -> None:
        """Call the ioctl on a descriptor, which sets the attributes below."""
        struct, outcome = self._struct, self._outcome
        _retry(lambda: int(lib.pyluo_ioctl(fd, self._command, struct, outcome)))

    @property
    def succeeded(self) -> bool:
        """Whether the ioctl was called, and succeeded."""
        return int(self._outcome[0]) >= 0

    @property
    def result(self) -> int:
        """The return value of the ioctl; -1 if it failed or was not called."""
        return max(int(self._outcome[0]), -1)

    @property
    def errno(self) -> int:
        """The errno of the ioctl; 0 if it succeeded or was not called."""
        outcome = int(self._outcome[0])
        return 0 if outcome >= 0 or outcome == _NOT_CALLED else -outcome


class Struct:
    """A kernel struct from the headers in `_uapi`: packs fields into bytes, and unpacks bytes."""

    __slots__ = ("_pointer", "name", "size")

    def __init__(self, name: str) -> None:
        self.name: str = name
        self._pointer = f"struct {name} *"
        self.size: int = int(ffi.sizeof(f"struct {name}"))

    def offset(self, *members: str) -> int:
        """Return the offset of a member in bytes; of a member of a member, if several are given."""
        return int(ffi.offsetof(f"struct {self.name}", *members))

    def pack(self, **fields: Field) -> bytearray:
        """Return the bytes of the struct, with `fields` set and every other byte zero.

        Args:
            fields: the value of each member: an integer; bytes or integers for an array; a buffer
                for a member that holds an address. The caller must keep the buffer as long as the
                kernel may use the address.

        Raises:
            ValueError: a value does not fit into its member.
        """
        packed = bytearray(self.size)
        struct = ffi.cast(self._pointer, ffi.from_buffer("char[]", packed))
        _set_fields(self.name, struct, fields)
        return packed

    def view(self, memory: Exported) -> Reply:
        """Read the struct at the beginning of memory, each time anew, without copying it.

        Raises:
            ValueError: the memory is shorter than the struct, or was released.
        """
        address = memory.address_of_range(0, self.size)
        return Reply(ffi.cast(self._pointer, address), memory)

    def unpack(self, data: Buffer, offset: int = 0) -> Reply:
        """Read the struct from a copy of `data`.

        Raises:
            ValueError: the struct does not lie within `data`.
        """
        view = memoryview(data).cast("B")
        if offset < 0 or offset + self.size > len(view):
            raise ValueError(
                f"struct {self.name} of {self.size} bytes at {offset} does not lie within "
                f"{len(view)} bytes"
            )
        memory = ffi.new("char[]", bytes(view[offset : offset + self.size]))
        return Reply(ffi.cast(self._pointer, memory), memory)


class Exported:
    """A buffer that can neither move nor be freed until `release`, and its address.

    Args:
        buffer: the buffer.
        writable: whether the buffer must be writable; `store` needs a writable one.

    Attributes:
        address: the address of the buffer in this process.
        length: the length of the buffer in bytes.
        pid: the process whose memory this is; after a fork, the child has a copy.

    Raises:
        TypeError: the buffer must be writable and is not.
    """

    __slots__ = ("_buffer", "_exported", "_writable", "address", "length", "pid")

    def __init__(self, buffer: Buffer, *, writable: bool = True) -> None:
        if writable and memoryview(buffer).readonly:
            raise TypeError("a writable buffer is needed, such as a mapping made with mmap")
        self._buffer = ffi.from_buffer("char[]", buffer)
        self._writable = writable
        self.pid: int = os.getpid()
        self.address: int = int(ffi.cast("uintptr_t", self._buffer))
        self.length: int = len(self._buffer)
        self._exported = True

    def load(self, offset: int, bits: int) -> int:
        """Read an unsigned integer in a single access of `bits` bits (8, 16, 32 or 64).

        Raises:
            ValueError: the integer does not lie within the buffer, or is not aligned to its own
                width; `bits` is another number; or the buffer was released.
        """
        return int(lib.pyluo_load(self._address_of(offset, bits), bits))

    def store(self, offset: int, bits: int, value: int) -> None:
        """Write an unsigned integer in a single access of `bits` bits (8, 16, 32 or 64).

        Raises:
            ValueError: see `load`; or the value does not fit into `bits` bits.
            TypeError: this object was created with ``writable=False``.
        """
        if not self._writable:
            raise TypeError("the buffer was exported for reading only")
        if value < 0 or value >> bits:
            raise ValueError(f"{value:#x} does not fit into {bits} bits")
        lib.pyluo_store(self._address_of(offset, bits), bits, value)

    def _address_of(self, offset: int, bits: int) -> int:
        if bits not in (8, 16, 32, 64):
            raise ValueError(f"an access of {bits} bits: 8, 16, 32 and 64 are possible")
        if offset < 0 or offset + bits // 8 > self.length or offset % (bits // 8):
            raise ValueError(
                f"{bits} bits at {offset:#x}: not aligned, or not within {self.length:#x} bytes"
            )
        if not self._exported:
            raise ValueError("the buffer was released")
        return self.address + offset

    def address_of_range(self, offset: int, length: int) -> int:
        """Return the address of a range of the buffer.

        Raises:
            ValueError: the range is empty or does not lie within the buffer, or the buffer was
                released.
        """
        if offset < 0 or length <= 0 or offset + length > self.length:
            raise ValueError(f"{length} bytes at {offset} do not lie within {self.length} bytes")
        if not self._exported:
            raise ValueError("the buffer was released")
        return self.address + offset

    def release(self) -> None:
        """Release the buffer; releasing it twice does nothing."""
        self._exported = False
        ffi.release(self._buffer)


class Ioctl(Operation):
    """An ioctl that takes a pointer to a struct.

    A kernel that knows a shorter struct refuses one with more in it by E2BIG.

    Args:
        name: the kernel's name of the ioctl.
        struct: the name of the struct.
        kind: the usual class of its exceptions.
        refusals: what an errno means; see `Operation`.
        size: the name of the member that holds the struct's size in bytes; None if there is none.
            The size of the struct and its tail is filled in, unless the caller gives this member as
            a field.
    """

    __slots__ = ("_number", "_size_field", "struct")

    def __init__(
        self,
        name: str,
        struct: str,
        kind: type[RequestError],
        refusals: Mapping[int, Refusal] | None = None,
        *,
        size: str | None = "size",
    ) -> None:
        extensible: dict[int, Refusal] = {errno.E2BIG: KernelTooOldError} if size else {}
        super().__init__(name, kind, extensible | dict(refusals or {}))
        self.struct: Struct = Struct(struct)
        self._number = constant(name)
        self._size_field = size

    def __call__(
        self, fd: int, subject: str = "", tail: Buffer = b"", /, **fields: Field
    ) -> Request:
        """Call the ioctl with `fields` set and every other byte zero.

        Args:
            fd: the descriptor on which to call the ioctl.
            subject: the object of the request, for the message of an error.
            tail: bytes to copy behind the struct, which count in its size. The kernel may change
                the copy; `Reply.data` has the result.
            fields: the value of each member; see `Struct.pack`.

        Raises:
            RequestError: the class depends on the request and the errno.
            ValueError: a value does not fit into its member; nothing was called.
        """
        reply = self.attempt(fd, tail, **fields)
        if reply.errno:
            raise self.error(reply.errno, subject)
        return reply

    def attempt(self, fd: int, tail: Buffer = b"", /, **fields: Field) -> Request:
        """Call the ioctl; return the reply even if the ioctl fails, with the errno in it.

        Some ioctls fill in their struct even if they fail.
        """
        request = self.prepare(tail, **fields)
        request.attempt(fd)
        return request

    def prepare(self, tail: Buffer = b"", /, **fields: Field) -> Request:
        """Return the request with its struct filled in, without calling the ioctl.

        Raises:
            ValueError: a value does not fit into its member.
        """
        size = self.struct.size + len(tail)
        memory = ffi.new("unsigned char[]", size)
        if tail:
            ffi.buffer(memory)[self.struct.size :] = bytes(tail)
        struct = ffi.cast(self.struct._pointer, memory)
        if self._size_field is not None:
            fields.setdefault(self._size_field, size)
        _set_fields(self.struct.name, struct, fields)
        return Request(self._number, struct, memory)

    def put(self, fd: int, subject: str, data: Buffer, /) -> Reply:
        """Call the ioctl with all bytes of its struct, and of what follows it.

        Raises:
            RequestError: the class depends on the request and the errno.
            ValueError: the struct is longer than `data`.
        """
        if len(data) < self.struct.size:
            raise ValueError(f"{len(data)} bytes, not the {self.struct.size} of {self.struct.name}")
        memory = ffi.new("unsigned char[]", bytes(data))
        request = Request(self._number, ffi.cast(self.struct._pointer, memory), memory)
        request.attempt(fd)
        if request.errno:
            raise self.error(request.errno, subject)
        return request

    def errno_for_unknown_tail(self, fd: int) -> int:
        """Call the ioctl with a non-zero tail, which the kernel must refuse; return the errno."""
        size = self.struct.size
        struct = ffi.new("unsigned char[]", size + 8)
        ffi.cast("uint32_t *", struct)[0] = size + 8
        struct[size] = 1
        outcome = ffi.new("int *")
        result = _retry(lambda: int(lib.pyluo_ioctl(fd, self._number, struct, outcome)))
        assert result < 0, f"{self.name} accepted a struct with an unknown tail"
        return -result


def _set_fields(name: str, struct: object, fields: Mapping[str, Field]) -> None:
    """Set members of a struct; the caller must keep each buffer whose address is set.

    Raises:
        ValueError: a value does not fit into its member.
    """
    for field, value in fields.items():
        try:
            if isinstance(value, int):
                setattr(struct, field, value)
            elif isinstance(value, Mapping):
                _set_fields(name, getattr(struct, field), value)
            elif isinstance(member := getattr(struct, field), int):
                address = ffi.from_buffer("char[]", value)
                setattr(struct, field, int(ffi.cast("uintptr_t", address)))
            elif isinstance(value, bytes):
                ffi.buffer(member)[: len(value)] = value
            else:
                for index, item in enumerate(value):
                    member[index] = item
        except (OverflowError, IndexError) as error:
            shown = hex(value) if isinstance(value, int) else repr(value)
            raise ValueError(f"{shown} does not fit into {field} of struct {name}") from error


class FdNumber:
    """The number of a descriptor that somebody owns; -1 if there is none.

    `close` forgets the number and closes the descriptor in one step. If a signal handler could
    raise in between, the descriptor would stay open, or its number, which may belong to another
    file by then, would be closed again.
    """

    __slots__ = ("_cell",)

    def __init__(self, value: int = -1) -> None:
        self._cell = ffi.new("int *", value)

    @property
    def value(self) -> int:
        """The number."""
        return int(self._cell[0])

    @value.setter
    def value(self, value: int) -> None:
        self._cell[0] = value

    def take(self, source: FdNumber) -> None:
        """Move the number out of another object, in one step."""
        lib.pyluo_move_fd(self._cell, source._cell)

    def close(self) -> None:
        """Close the descriptor, if there is one, and set the number to -1.

        Raises:
            OSError: the descriptor was closed, but the file system reported an error.
        """
        if (result := int(lib.pyluo_close(self._cell))) < 0:
            raise OSError(-result, os.strerror(-result))


class PacketBuffer:
    """One packet of a Unix socket, to be sent or received without waiting.

    Because the buffer exists before the call, an exception that a signal handler raises right after
    the call loses nothing: the buffer tells whether the packet was sent, or has the packet that was
    received, with its descriptors.
    """

    __slots__ = ("_packet",)

    MAX_FDS = 253  # SCM_MAX_FD in include/net/scm.h
    MAX_BYTES = 1024

    def __init__(self, data: bytes = b"", fds: Sequence[int] = ()) -> None:
        self._packet = ffi.new("struct pyluo_packet *")
        self._packet.result = -errno.EAGAIN
        self._packet.pidfd = -1
        self._packet.length = len(data)
        self._packet.fd_count = len(fds)
        self._packet.fds[0 : len(fds)] = list(fds)
        ffi.buffer(self._packet.data)[: len(data)] = data

    def send(self, fd: int) -> int:
        """Send the packet, with the caller's effective credentials, unless it was sent already.

        Returns:
            The number of bytes sent; a negative errno if the packet was not sent.

        Source: unix(7), SCM_RIGHTS and SCM_CREDENTIALS
        """
        if self._packet.result < 0:
            lib.pyluo_send_packet(fd, self._packet)
        return int(self._packet.result)

    @property
    def sent(self) -> bool:
        """Whether `send` has sent the packet."""
        return int(self._packet.result) >= 0

    def receive(self, fd: int) -> int:
        """Receive the next packet into the buffer, unless it has one already.

        The descriptors have close-on-exec set.

        Returns:
            The number of bytes received, 0 at the end of the connection; a negative errno if no
            packet was received.
        """
        if self._packet.result < 0:
            lib.pyluo_receive_packet(fd, self._packet)
        return int(self._packet.result)

    @property
    def data(self) -> bytes:
        """The bytes of the packet."""
        return bytes(ffi.buffer(self._packet.data, self._packet.length))

    @property
    def flags(self) -> int:
        """The MSG_* flags that recvmsg(2) returned."""
        return int(self._packet.flags)

    @property
    def credentials(self) -> tuple[int, int, int] | None:
        """The PID, the user ID and the group ID of the sender; None if the kernel gave none."""
        packet = self._packet
        return (packet.pid, packet.uid, packet.gid) if packet.has_credentials else None

    @property
    def pidfd(self) -> int:
        """The number of a pidfd of the sender; negative if there is none, or it was moved."""
        return int(self._packet.pidfd)

    @property
    def fd_count(self) -> int:
        """The number of descriptors that came with the packet."""
        return int(self._packet.fd_count)

    def move_pidfd(self, to: FdNumber) -> None:
        """Move the pidfd out of the buffer, in one step."""
        lib.pyluo_move_fd(to._cell, ffi.addressof(self._packet, "pidfd"))

    def close_pidfd(self) -> None:
        """Close the pidfd, if there is one."""
        lib.pyluo_close(ffi.addressof(self._packet, "pidfd"))

    def move_fd(self, index: int, to: FdNumber) -> None:
        """Move a descriptor out of the buffer, in one step; do nothing if it was moved already."""
        if self._packet.fds[index] >= 0:
            lib.pyluo_move_fd(to._cell, self._packet.fds + index)


class PlainIoctl(Operation):
    """An ioctl without an argument, or with an integer in place of a pointer.

    Args:
        name: the kernel's name of the ioctl.
        kind: the usual class of its exceptions.
        refusals: what an errno means; see `Operation`.
    """

    __slots__ = ()

    def __call__(self, fd: int, subject: str = "", argument: int = 0) -> int:
        """Call the ioctl; return its result, which may be a new descriptor."""
        number, outcome = constant(self.name), ffi.new("int *")
        passed = ffi.cast("void *", argument)
        return _call(self, subject, lambda: int(lib.pyluo_ioctl(fd, number, passed, outcome)))

    def attempt_once(self, fd: int) -> int:
        """Call the ioctl once; return 0, or its errno, which may be EINTR. Other threads run."""
        result = int(lib.pyluo_ioctl(fd, constant(self.name), ffi.NULL, ffi.new("int *")))
        return -min(result, 0)


class Files(NamedTuple):
    """What preserving some files takes, as `look` finds it.

    Attributes:
        size: the bytes of all files, in whole pages.
        holes: those of them that are not allocated yet.
        largest: the bytes of the largest file.
        noexec: the index of the first file that is sealed noexec; None if none is.
    """

    size: int
    holes: int
    largest: int
    noexec: int | None


def look(fds: Sequence[int]) -> Files:
    """Return what preserving some files takes.

    A file that the kernel refuses counts as empty: it is not open, is not on a tmpfs, or has huge
    pages.

    Raises:
        RequestError: a file cannot be looked at, so that the kernel may preserve what is not
            counted here.

    Source: fcntl(2), F_GET_SEALS; fstatfs(2); fstat(2)
    """
    found = ffi.new("struct pyluo_files *")
    result = int(lib.pyluo_look(len(fds), ffi.new("int32_t[]", fds), _PAGE, found))
    if result < 0:
        raise _LOOK.error(-result, f"descriptor {fds[int(found.failed)]}")
    noexec = int(found.noexec)
    return Files(
        int(found.size),
        int(found.holes),
        int(found.largest),
        noexec if noexec < len(fds) else None,
    )


def read_small_file(path: str) -> str:
    """Return the text of a small file of the kernel's; nothing if it cannot be read.

    Each retrieval looks for the limits of cgroups, most of which have none: an exception for each
    would take longer than to read them.
    """
    text = _small("char[]", _SMALL)
    length = int(lib.pyluo_read_file(os.fsencode(path), text, _SMALL))
    return "" if length < 0 else os.fsdecode(bytes(ffi.buffer(text, length)))


def preserve_many(session: int, fds: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """Preserve each descriptor under its token; stop at the first one that fails.

    Returns:
        The number of descriptors preserved, and the errno of the first failure (0 if none failed).
    """
    done = ffi.new("size_t *")
    fd_array = ffi.new("int32_t[]", list(fds))
    token_array = ffi.new("uint64_t[]", list(tokens))
    result = int(lib.pyluo_preserve_many(session, len(fds), fd_array, token_array, done))
    return int(done[0]), -result


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Duplicate a descriptor of another process, with close-on-exec set; return the duplicate."""
    subject = f"descriptor {fd} of another process"
    return _call(_PIDFD_GETFD, subject, lambda: lib.pyluo_pidfd_getfd(pidfd, fd))


def kexec_file_load(kernel: int, initrd: int, cmdline: bytes, flags: int, subject: str) -> None:
    """Load an image for kexec; `cmdline` must have no terminating zero."""
    length = len(cmdline) + 1 if cmdline else 0
    _call(
        _KEXEC_FILE_LOAD,
        subject,
        lambda: lib.pyluo_kexec_file_load(kernel, initrd, length, cmdline, flags),
    )


def kexec_load_exists() -> bool:
    """Return whether this kernel has kexec_load(2).

    The system call is made with flags that it must refuse. If the sysctl
    kernel.kexec_load_limit_reboot is set, this call counts against the limit.
    """
    return int(lib.pyluo_kexec_load(_UNKNOWN_FLAGS)) != -errno.ENOSYS


def read_tsc() -> int:
    """Return the time-stamp counter of the CPU; 0 on a machine that has none."""
    return int(lib.pyluo_read_tsc())


def reboot(command: int) -> None:
    """Make the system call reboot with its magic numbers; raise RequestError if the call fails."""
    _call(_REBOOT, "", lambda: lib.pyluo_reboot(command))


def mount(source: str, target: str, kind: str, options: str = "") -> None:
    """Mount a file system of type `kind` at `target`, without mount flags."""
    encode = os.fsencode
    _call(
        _MOUNT,
        f"{target} ({kind})",
        lambda: lib.pyluo_mount(encode(source), encode(target), encode(kind), 0, encode(options)),
    )


def map_over(
    memory: Exported, offset: int, length: int, fd: int, protection: int, flags: int, subject: str
) -> None:
    """Replace a range of a mapping of this process by a mapping of a file, from its beginning.

    The range is given within an exported mapping, so that MAP_FIXED cannot replace other memory.

    Args:
        memory: the mapping.
        offset: the offset of the range in the mapping, in bytes; a multiple of the page size.
        length: the length of the range in bytes.
        fd: the file.
        protection: the PROT_* flags.
        flags: the MAP_* flags besides MAP_FIXED.
        subject: words for the file, for the message of an error.

    Source: mmap(2)
    """
    address = memory.address_of_range(offset, length)
    flags |= constant("MAP_FIXED")
    _call(MMAP, subject, lambda: lib.pyluo_mmap(address, length, protection, flags, fd))


def madvise(memory: Exported, offset: int, length: int, advice: str, subject: str) -> None:
    """Give the kernel an advice, such as MADV_HUGEPAGE, for a range of a mapping.

    Other threads run meanwhile.

    Source: madvise(2)
    """
    address = memory.address_of_range(offset, length)
    number = constant(advice)
    _call(_MADVISE[advice], subject, lambda: lib.pyluo_madvise(address, length, number))


def bind_to_nodes(
    memory: Exported, offset: int, length: int, mode: int, nodes: Sequence[int], subject: str
) -> None:
    """Set the NUMA policy of a range of a mapping: a mode MPOL_* and numbers of nodes.

    Source: mbind(2)
    """
    address = memory.address_of_range(offset, length)
    words = max(nodes, default=0) // 64 + 1
    mask = ffi.new("uint64_t[]", words)
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    # The kernel ignores the last of the bits that it is told of.
    max_node = words * 64 + 1
    _call(_MBIND, subject, lambda: lib.pyluo_mbind(address, length, mode, mask, max_node))
