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
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "Ioctl",
    "Reply",
    "constant",
    "ioctl_for_fd",
    "kexec_file_load",
    "kexec_load_exists",
    "mount",
    "pidfd_getfd",
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
    """The result of `attempt`, tried again after each signal that interrupts it."""
    while (result := attempt()) < 0:
        number = ffi.errno
        if number != errno.EINTR:
            raise from_errno(number, operation, subject)
    return result


class Reply:
    """A struct as the kernel left it, and what the system call returned."""

    __slots__ = ("_struct", "result")

    def __init__(self, struct: object, result: int) -> None:
        self._struct = struct
        self.result = result

    def integer(self, field: str) -> int:
        """The value of an integer field."""
        return int(getattr(self._struct, field))

    def text(self, field: str) -> str:
        """A zero-terminated array of bytes, decoded as file names are."""
        raw = bytes(ffi.buffer(getattr(self._struct, field)))
        return os.fsdecode(raw.split(b"\0", 1)[0])


class Ioctl:
    """One ioctl: its number, and its struct, whose `size` is its own unless set otherwise."""

    __slots__ = ("_number", "_struct", "name")

    def __init__(self, name: str, struct: str) -> None:
        self.name = name
        self._number = constant(name)
        self._struct = f"struct {struct}"

    def __call__(self, fd: int, subject: str = "", /, **fields: int | bytes) -> Reply:
        """Calls it with `fields` set and every other byte zero.

        Args:
            fd: the descriptor to call it on.
            subject: what it is tried on, for the error.
            fields: members of the struct; bytes for an array.
        """
        struct = ffi.new(f"{self._struct} *", {"size": ffi.sizeof(self._struct)})
        for field, value in fields.items():
            if isinstance(value, bytes):
                ffi.buffer(getattr(struct, field))[: len(value)] = value
            else:
                setattr(struct, field, value)
        result = _call(self.name, subject, lambda: lib.pyluo_ioctl(fd, self._number, struct))
        return Reply(struct, result)

    def refusal_of_a_tail(self, fd: int) -> int:
        """The errno for a struct with a non-zero tail, which no kernel may carry out."""
        size = ffi.sizeof(self._struct)
        struct = ffi.new("unsigned char[]", size + 8)
        ffi.cast("uint32_t *", struct)[0] = size + 8
        struct[size] = 1
        while lib.pyluo_ioctl(fd, self._number, struct) < 0:
            if (number := ffi.errno) != errno.EINTR:
                return number
        raise AssertionError(f"{self.name} accepted a struct that it cannot know")


def ioctl_for_fd(name: str, fd: int) -> int:
    """The descriptor that an ioctl without a struct makes."""
    number = constant(name)
    return _call(name, "", lambda: lib.pyluo_ioctl(fd, number, ffi.NULL))


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
