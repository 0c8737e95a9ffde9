"""The funnel: the one place where Python meets the kernel's structs and system calls.

Nothing of cffi leaves this module, and no errno passes it unexplained.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from pyluo._ffi import ffi, lib
from pyluo.errors import LuoError, from_errno

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Buffer = bytes | bytearray | memoryview | mmap.mmap
    Field = int | Buffer | Sequence[int]

__all__ = [
    "Exported",
    "Ioctl",
    "Reply",
    "Struct",
    "constant",
    "kexec_file_load",
    "kexec_load_exists",
    "mount",
    "pidfd_getfd",
    "plain_ioctl",
    "preserve_many",
    "raising",
    "reboot",
]

_NO_FLAGS = 0xFFF0  # none that kexec_load(2) knows

T = TypeVar("T")


def constant(name: str) -> int:
    """The value of a macro of `_uapi`, by the kernel's name of it."""
    value = getattr(lib, name)
    assert isinstance(value, int), name
    return value


@contextmanager
def raising(operation: str, subject: str = "") -> Iterator[None]:
    """Turns an OSError of the standard library into the exception of `operation`."""
    try:
        yield
    except LuoError:
        raise
    except OSError as error:
        late = errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.EIO
        raise from_errno(error.errno or late, operation, subject) from None


def _call(operation: str, subject: str, attempt: Callable[[], int]) -> int:
    """The result of `attempt`, which is at least zero."""
    result, number = _retry(attempt)
    if number:
        raise from_errno(number, operation, subject)
    return result


def _retry(attempt: Callable[[], int]) -> tuple[int, int]:
    """The result of `attempt` and its errno; tried again after each signal that interrupts it."""
    while (result := attempt()) < 0:
        number = ffi.errno
        if number != errno.EINTR:
            return result, number
    return result, 0


class Reply:
    """A struct as the kernel left it, and what the system call returned.

    Attributes:
        result: of the system call; 0 for a struct that came out of a buffer.
        errno: by which the system call failed; 0 if it did not.
    """

    __slots__ = ("_memory", "_struct", "errno", "result")

    def __init__(self, struct: object, memory: object, result: int = 0, errno: int = 0) -> None:
        self._struct = struct
        self._memory = memory  # what `struct` points into
        self.result = result
        self.errno = errno

    def integer(self, field: str) -> int:
        """The value of an integer field."""
        return int(getattr(self._struct, field))

    def integers(self, field: str) -> tuple[int, ...]:
        """The values of an array of integers."""
        return tuple(int(item) for item in getattr(self._struct, field))

    def text(self, field: str) -> str:
        """A zero-terminated array of bytes, decoded as file names are."""
        raw = bytes(ffi.buffer(getattr(self._struct, field)))
        return os.fsdecode(raw.split(b"\0", 1)[0])

    def data(self) -> bytes:
        """The whole of it: the struct, and the tail that was asked for."""
        return bytes(ffi.buffer(self._memory))


class Struct:
    """A struct of `_uapi`, made from fields and read out of bytes."""

    __slots__ = ("_pointer", "name", "size")

    def __init__(self, name: str) -> None:
        self.name = name
        self._pointer = f"struct {name} *"
        self.size = int(ffi.sizeof(f"struct {name}"))

    def pack(self, **fields: Field) -> bytearray:
        """Its bytes, with `fields` set and every other one zero.

        Args:
            fields: members: an integer; bytes or integers for an array; a buffer for a pointer.
                The pointer is good for as long as the caller keeps the buffer.
        """
        packed = bytearray(self.size)
        struct = ffi.cast(self._pointer, ffi.from_buffer("char[]", packed))
        _set_fields(struct, fields)
        return packed

    def unpack(self, data: Buffer, offset: int = 0) -> Reply:
        """Reads it out of `data`, of which a copy is made.

        Raises:
            ValueError: it does not lie within `data`.
        """
        whole = memoryview(data).cast("B")
        if offset < 0 or offset + self.size > len(whole):
            raise ValueError(
                f"struct {self.name} of {self.size} bytes at {offset} does not lie within "
                f"{len(whole)} bytes"
            )
        memory = ffi.new("char[]", bytes(whole[offset : offset + self.size]))
        return Reply(ffi.cast(self._pointer, memory), memory)


class Exported:
    """The address of a buffer, which can neither move nor be freed until `release`.

    Args:
        buffer: what is exported.
        writable: whether it has to be writable, and `store` is possible.

    Raises:
        TypeError: it is no writable buffer.
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
        """An unsigned integer, read in one access of `bits` bits (8, 16, 32 or 64).

        Raises:
            ValueError: it does not lie within the buffer, is not aligned to its own width, or the
                width is none of these.
        """
        return int(lib.pyluo_load(self._address_of(offset, bits), bits))

    def store(self, offset: int, bits: int, value: int) -> None:
        """Writes an unsigned integer in one access of `bits` bits (8, 16, 32 or 64).

        Raises:
            ValueError: as `load` does, or the value does not fit.
            TypeError: it was exported for reading.
        """
        if not self._writable:
            raise TypeError("the buffer was exported for reading")
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

    def release(self) -> None:
        """Lets go of the buffer; a second time does nothing."""
        self._exported = False
        ffi.release(self._buffer)


class Ioctl:
    """One ioctl: its number, and its struct, of which one field is its size in bytes.

    Args:
        name: of the request.
        struct: what it takes a pointer to.
        size: the field that says how long the struct is; set to that unless the caller sets it.
    """

    __slots__ = ("_number", "_size_field", "name", "struct")

    def __init__(self, name: str, struct: str, *, size: str = "size") -> None:
        self.name = name
        self.struct = Struct(struct)
        self._number = constant(name)
        self._size_field = size

    def __call__(self, fd: int, subject: str = "", tail: Buffer = b"", /, **fields: Field) -> Reply:
        """Calls it with `fields` set and every other byte zero.

        Args:
            fd: the descriptor to call it on.
            subject: what it is tried on, for the error.
            tail: what follows the struct, and counts in its size; the kernel may write to it.
            fields: members of the struct, as for `Struct.pack`.
        """
        reply = self.attempt(fd, tail, **fields)
        if reply.errno:
            raise from_errno(reply.errno, self.name, subject)
        return reply

    def attempt(self, fd: int, tail: Buffer = b"", /, **fields: Field) -> Reply:
        """As a call, for a request whose failure has something to say: see the reply's `errno`."""
        size = self.struct.size + len(tail)
        memory = ffi.new("unsigned char[]", size)
        ffi.buffer(memory)[self.struct.size :] = bytes(tail)
        struct = ffi.cast(f"struct {self.struct.name} *", memory)
        _set_fields(struct, {self._size_field: size} | fields)
        result, number = _retry(lambda: lib.pyluo_ioctl(fd, self._number, struct))
        return Reply(struct, memory, result, number)

    def errno_for_unknown_tail(self, fd: int) -> int:
        """The errno for a struct with a non-zero tail, which no kernel may carry out."""
        size = self.struct.size
        struct = ffi.new("unsigned char[]", size + 8)
        ffi.cast("uint32_t *", struct)[0] = size + 8
        struct[size] = 1
        _, number = _retry(lambda: lib.pyluo_ioctl(fd, self._number, struct))
        assert number, f"{self.name} accepted a struct that it cannot know"
        return number


def _set_fields(struct: object, fields: Mapping[str, Field]) -> None:
    """Sets members of a struct; the caller keeps the buffers that it is made to point to."""
    for field, value in fields.items():
        if isinstance(value, int):
            setattr(struct, field, value)
        elif isinstance(member := getattr(struct, field), int):
            address = ffi.from_buffer("char[]", value)
            setattr(struct, field, int(ffi.cast("uintptr_t", address)))
        elif isinstance(value, bytes):
            ffi.buffer(member)[: len(value)] = value
        else:
            for index, item in enumerate(value):
                member[index] = item


def plain_ioctl(name: str, fd: int, subject: str = "") -> int:
    """What an ioctl without a struct returns, a new descriptor if it makes one."""
    number = constant(name)
    return _call(name, subject, lambda: lib.pyluo_ioctl(fd, number, ffi.NULL))


def preserve_many(session: int, fds: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """Preserves each descriptor under its token until one fails.

    Returns:
        How many are in, and the errno that stopped the next one (0 when all are in).
    """
    done = ffi.new("size_t *")
    fd_array = ffi.new("int32_t[]", list(fds))
    token_array = ffi.new("uint64_t[]", list(tokens))
    failed = lib.pyluo_preserve_many(session, len(fds), fd_array, token_array, done)
    return int(done[0]), ffi.errno if failed else 0


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate, close-on-exec, of another process's descriptor."""
    subject = f"descriptor {fd} of another process"
    return _call("pidfd_getfd", subject, lambda: lib.pyluo_pidfd_getfd(pidfd, fd))


def kexec_file_load(kernel: int, initrd: int, cmdline: bytes, flags: int, subject: str) -> None:
    """Loads an image for kexec; `cmdline` without the zero that ends it."""
    length = len(cmdline) + 1 if cmdline else 0
    _call(
        "kexec_file_load",
        subject,
        lambda: lib.pyluo_kexec_file_load(kernel, initrd, length, cmdline, flags),
    )


def kexec_load_exists() -> bool:
    """Whether this kernel has kexec_load(2), which refuses flags that no kernel knows.

    It counts as a try where kernel.kexec_load_limit_reboot is set.
    """
    return lib.pyluo_kexec_load(_NO_FLAGS) == 0 or ffi.errno != errno.ENOSYS


def reboot(command: int) -> None:
    """Leaves this kernel; the magic numbers are seen to. Returns only by an error."""
    _call("reboot", "", lambda: lib.pyluo_reboot(command))


def mount(source: str, target: str, kind: str, options: str = "") -> None:
    """Mounts a file system, without flags."""
    encode = os.fsencode
    _call(
        "mount",
        f"{target} ({kind})",
        lambda: lib.pyluo_mount(encode(source), encode(target), encode(kind), 0, encode(options)),
    )
