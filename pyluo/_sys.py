"""The only module that uses cffi: for the kernel's structs, and for system calls.

No function here returns a cffi object. A system call that fails raises a `LuoError`; only
`Ioctl.attempt`, `Ioctl.errno_for_unknown_tail` and `preserve_many` return the errno instead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from pyluo._ffi import ffi, lib
from pyluo.errors import LuoError, from_errno

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Sequence

    Buffer = bytes | bytearray | memoryview | mmap.mmap
    Field = int | Buffer | Sequence[int] | Mapping[str, int]

__all__ = [
    "Exported",
    "FdNumber",
    "Ioctl",
    "Reply",
    "Request",
    "Struct",
    "bind_to_nodes",
    "constant",
    "interruptible_ioctl",
    "kexec_file_load",
    "kexec_load_exists",
    "madvise",
    "map_over",
    "mount",
    "pidfd_getfd",
    "plain_ioctl",
    "preserve_many",
    "raising",
    "reboot",
]

_UNKNOWN_FLAGS = 0xFFF0  # flags that kexec_load(2) accepts on no kernel

T = TypeVar("T")


def constant(name: str) -> int:
    """Return the value of the macro or enum constant of this name in the headers of `_uapi`."""
    value = getattr(lib, name)
    assert isinstance(value, int), name
    return value


@contextmanager
def raising(operation: str, subject: str = "") -> Iterator[None]:
    """Turn an OSError that the ``with`` block raises into the LuoError for `operation`."""
    try:
        yield
    except LuoError:
        raise
    except OSError as error:
        default = errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.EIO
        raise from_errno(error.errno or default, operation, subject) from None


def _call(operation: str, subject: str, function: Callable[[], int]) -> int:
    """Return the result of a system call; raise the exception for `operation` if it fails."""
    result, number = _retry(function)
    if number:
        raise from_errno(number, operation, subject)
    return result


def _retry(function: Callable[[], int]) -> tuple[int, int]:
    """Call `function`, again after each EINTR; return its result and its errno (0 if none)."""
    while (result := function()) < 0:
        number = ffi.errno
        if number != errno.EINTR:
            return result, number
    return result, 0


class Reply:
    """A struct that the kernel filled in, with the result of the system call.

    Attributes:
        result: the return value of the system call; 0 if the struct was read from a buffer.
        errno: the errno of the system call; 0 if it succeeded.
    """

    __slots__ = ("_memory", "_struct", "errno", "result")

    def __init__(self, struct: object, memory: object, result: int = 0, errno: int = 0) -> None:
        self._struct = struct
        self._memory = memory  # `struct` points into it
        self.result = result
        self.errno = errno

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

    Because the struct exists before the call, a descriptor that the kernel returns in it is never
    lost, even if a signal handler raises right after the call.
    """

    __slots__ = ("_command",)

    def __init__(self, command: int, struct: object, memory: object) -> None:
        super().__init__(struct, memory)
        self._command = command

    def attempt(self, fd: int) -> None:
        """Call the ioctl on a descriptor, and set `result` and `errno`."""
        struct = self._struct
        self.result, self.errno = _retry(lambda: lib.pyluo_ioctl(fd, self._command, struct))


class Struct:
    """A kernel struct from the headers in `_uapi`: packs fields into bytes, and unpacks bytes."""

    __slots__ = ("_pointer", "name", "size")

    def __init__(self, name: str) -> None:
        self.name = name
        self._pointer = f"struct {name} *"
        self.size = int(ffi.sizeof(f"struct {name}"))

    def offset(self, *members: str) -> int:
        """Return the offset of a member in bytes; of a member of a member, if several are given."""
        return int(ffi.offsetof(f"struct {self.name}", *members))

    def pack(self, **fields: Field) -> bytearray:
        """Return the bytes of the struct, with `fields` set and every other byte zero.

        Args:
            fields: the value of each member: an integer; bytes or integers for an array; a buffer
                for a member that holds an address. The caller must keep the buffer as long as the
                kernel may use the address.
        """
        packed = bytearray(self.size)
        struct = ffi.cast(self._pointer, ffi.from_buffer("char[]", packed))
        _set_fields(struct, fields)
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

    Raises:
        TypeError: the buffer must be writable and is not.
    """

    __slots__ = ("_buffer", "_exported", "_writable", "address", "length")

    def __init__(self, buffer: Buffer, *, writable: bool = True) -> None:
        if writable and memoryview(buffer).readonly:
            raise TypeError("a writable buffer is needed, such as a mapping made with mmap")
        self._buffer = ffi.from_buffer("char[]", buffer)
        self._writable = writable
        self.address = int(ffi.cast("uintptr_t", self._buffer))
        self.length = len(self._buffer)
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


class Ioctl:
    """An ioctl that takes a pointer to a struct, one field of which may be the struct's size.

    Args:
        name: the kernel's name of the ioctl.
        struct: the name of the struct.
        size: the name of the member that holds the struct's size in bytes; None if there is none.
            The size of the struct and its tail is filled in, unless the caller gives this member as
            a field.
    """

    __slots__ = ("_number", "_size_field", "name", "struct")

    def __init__(self, name: str, struct: str, *, size: str | None = "size") -> None:
        self.name = name
        self.struct = Struct(struct)
        self._number = constant(name)
        self._size_field = size

    def __call__(self, fd: int, subject: str = "", tail: Buffer = b"", /, **fields: Field) -> Reply:
        """Call the ioctl with `fields` set and every other byte zero.

        Args:
            fd: the descriptor on which to call the ioctl.
            subject: the object of the request, for the message of an error.
            tail: bytes to copy behind the struct, which count in its size. The kernel may change
                the copy; `Reply.data` has the result.
            fields: the value of each member; see `Struct.pack`.

        Raises:
            LuoError: the class depends on the request and the errno.
        """
        reply = self.attempt(fd, tail, **fields)
        if reply.errno:
            raise from_errno(reply.errno, self.name, subject)
        return reply

    def attempt(self, fd: int, tail: Buffer = b"", /, **fields: Field) -> Reply:
        """Call the ioctl; return the reply even if the ioctl fails, with the errno in it.

        Some ioctls fill in their struct even if they fail.
        """
        request = self.prepare(tail, **fields)
        request.attempt(fd)
        return request

    def prepare(self, tail: Buffer = b"", /, **fields: Field) -> Request:
        """Return the request with its struct filled in, without calling the ioctl."""
        size = self.struct.size + len(tail)
        memory = ffi.new("unsigned char[]", size)
        ffi.buffer(memory)[self.struct.size :] = bytes(tail)
        struct = ffi.cast(f"struct {self.struct.name} *", memory)
        sizes = {} if self._size_field is None else {self._size_field: size}
        _set_fields(struct, sizes | fields)
        return Request(self._number, struct, memory)

    def put(self, fd: int, subject: str, data: Buffer, /) -> Reply:
        """Call the ioctl with all bytes of its struct, and of what follows it.

        Raises:
            LuoError: the class depends on the request and the errno.
            ValueError: the struct is longer than `data`.
        """
        if len(data) < self.struct.size:
            raise ValueError(f"{len(data)} bytes, not the {self.struct.size} of {self.struct.name}")
        memory = ffi.new("unsigned char[]", bytes(data))
        request = Request(self._number, ffi.cast(f"struct {self.struct.name} *", memory), memory)
        request.attempt(fd)
        if request.errno:
            raise from_errno(request.errno, self.name, subject)
        return request

    def errno_for_unknown_tail(self, fd: int) -> int:
        """Call the ioctl with a non-zero tail, which the kernel must refuse; return the errno."""
        size = self.struct.size
        struct = ffi.new("unsigned char[]", size + 8)
        ffi.cast("uint32_t *", struct)[0] = size + 8
        struct[size] = 1
        _, number = _retry(lambda: lib.pyluo_ioctl(fd, self._number, struct))
        assert number, f"{self.name} accepted a struct with an unknown tail"
        return number


def _set_fields(struct: object, fields: Mapping[str, Field]) -> None:
    """Set members of a struct; the caller must keep each buffer whose address is set."""
    for field, value in fields.items():
        if isinstance(value, int):
            setattr(struct, field, value)
        elif isinstance(value, Mapping):
            _set_fields(getattr(struct, field), value)
        elif isinstance(member := getattr(struct, field), int):
            address = ffi.from_buffer("char[]", value)
            setattr(struct, field, int(ffi.cast("uintptr_t", address)))
        elif isinstance(value, bytes):
            ffi.buffer(member)[: len(value)] = value
        else:
            for index, item in enumerate(value):
                member[index] = item


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

    def close(self) -> None:
        """Close the descriptor, if there is one, and set the number to -1.

        Raises:
            OSError: the descriptor was closed, but the file system reported an error.
        """
        if lib.pyluo_close(self._cell):
            raise OSError(ffi.errno, os.strerror(ffi.errno))


def plain_ioctl(name: str, fd: int, subject: str = "", argument: int = 0) -> int:
    """Call an ioctl without an argument, or whose argument is an integer instead of a pointer.

    Returns:
        The result of the ioctl, which may be a new descriptor.
    """
    number, passed = constant(name), ffi.cast("void *", argument)
    return _call(name, subject, lambda: lib.pyluo_ioctl(fd, number, passed))


def interruptible_ioctl(name: str, fd: int) -> int:
    """Call an ioctl without an argument once; return 0, or its errno, which may be EINTR.

    Other threads run meanwhile.
    """
    return ffi.errno if lib.pyluo_ioctl(fd, constant(name), ffi.NULL) < 0 else 0


def preserve_many(session: int, fds: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """Preserve each descriptor under its token; stop at the first one that fails.

    Returns:
        The number of descriptors preserved, and the errno of the first failure (0 if none failed).
    """
    done = ffi.new("size_t *")
    fd_array = ffi.new("int32_t[]", list(fds))
    token_array = ffi.new("uint64_t[]", list(tokens))
    failed = lib.pyluo_preserve_many(session, len(fds), fd_array, token_array, done)
    return int(done[0]), ffi.errno if failed else 0


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Duplicate a descriptor of another process, with close-on-exec set; return the duplicate."""
    subject = f"descriptor {fd} of another process"
    return _call("pidfd_getfd", subject, lambda: lib.pyluo_pidfd_getfd(pidfd, fd))


def kexec_file_load(kernel: int, initrd: int, cmdline: bytes, flags: int, subject: str) -> None:
    """Load an image for kexec; `cmdline` must have no terminating zero."""
    length = len(cmdline) + 1 if cmdline else 0
    _call(
        "kexec_file_load",
        subject,
        lambda: lib.pyluo_kexec_file_load(kernel, initrd, length, cmdline, flags),
    )


def kexec_load_exists() -> bool:
    """Return whether this kernel has kexec_load(2).

    The system call is made with flags that it must refuse. If the sysctl
    kernel.kexec_load_limit_reboot is set, this call counts against the limit.
    """
    return lib.pyluo_kexec_load(_UNKNOWN_FLAGS) == 0 or ffi.errno != errno.ENOSYS


def reboot(command: int) -> None:
    """Make the system call reboot with its magic numbers; raise LuoError if the call fails."""
    _call("reboot", "", lambda: lib.pyluo_reboot(command))


def mount(source: str, target: str, kind: str, options: str = "") -> None:
    """Mount a file system of type `kind` at `target`, without mount flags."""
    encode = os.fsencode
    _call(
        "mount",
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
    _call("mmap", subject, lambda: lib.pyluo_mmap(address, length, protection, flags, fd))


def madvise(memory: Exported, offset: int, length: int, advice: str, subject: str) -> None:
    """Give the kernel an advice, such as MADV_HUGEPAGE, for a range of a mapping.

    Other threads run meanwhile.

    Source: madvise(2)
    """
    address = memory.address_of_range(offset, length)
    number = constant(advice)
    _call(advice, subject, lambda: lib.pyluo_madvise(address, length, number))


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
    _call("mbind", subject, lambda: lib.pyluo_mbind(address, length, mode, mask, max_node))
