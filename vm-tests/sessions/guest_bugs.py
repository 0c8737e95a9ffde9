"""The guest's part of the tests of kernel bugs. Imports only pyluo and the standard library.

The requests go directly to the kernel, without pyluo's guards.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from typing import TYPE_CHECKING, cast

from pyluo import LiveUpdate, Memfd, OutgoingSession, Seal
from pyluo._sys import constant, mount
from pyluo.guest.faults import each_fails
from pyluo.kernel_log import KernelLog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CREATE = constant("LIVEUPDATE_IOCTL_CREATE_SESSION")
RETRIEVE_SESSION = constant("LIVEUPDATE_IOCTL_RETRIEVE_SESSION")
PRESERVE = constant("LIVEUPDATE_SESSION_PRESERVE_FD")
RETRIEVE = constant("LIVEUPDATE_SESSION_RETRIEVE_FD")
FINISH = constant("LIVEUPDATE_SESSION_FINISH")

OK = "ok"
PAGE = 4096
MIB = 1 << 20
TOKEN = 1
USER = 1000  # any user but root
UNRETRIEVED = 40 * MIB

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


class UnmetPrecondition(Exception):
    """A precondition of a test is not met, so the test has shown nothing."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise UnmetPrecondition(what)


def name_argument(name: str) -> bytes:
    return struct.pack("=Ii64s", 72, -1, name.encode())


def file_argument(token: int, fd: int = -1) -> bytes:
    return struct.pack("=IiQ", 16, fd, token)


def finish_argument() -> bytes:
    return struct.pack("=II", 8, 0)


def request(fd: int, number: int, argument: bytes) -> str:
    """Make a request; return OK or the errno's name. A descriptor that it returns stays open."""
    return _answer(fd, number, ctypes.create_string_buffer(argument, len(argument)))


def request_from_read_only_memory(fd: int, number: int, argument: bytes) -> str:
    """Make a request from memory that the kernel can read but not write its answer to."""
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page = libc.mmap(None, PAGE, access, kind, -1, 0)
    ctypes.memmove(page, argument, len(argument))
    require(libc.mprotect(page, PAGE, mmap.PROT_READ) == 0, "mprotect")
    return _answer(fd, number, page)


def _answer(fd: int, number: int, argument: object) -> str:
    failed = libc.ioctl(fd, number, argument) < 0
    return errno.errorcode[ctypes.get_errno()] if failed else OK


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return OK


def run_in_child(action: Callable[[], Sequence[str]]) -> list[str]:
    """Return the result of `action` in a child process, or the signal that ended the child."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            os.write(write, "\n".join(action()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answers = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return answers or [f"ended by signal {-status}"]


def write_file(path: str, value: object) -> None:
    with open(path, "w") as file:
        file.write(str(value))


def read_meminfo(field: str) -> int:
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines[field].split()[0]) << 10


def make_filled_memfd(size: int) -> Memfd:
    ram = Memfd.create("ram", size)
    for offset in range(0, size, MIB):
        ram.write(b"\x5a" * min(MIB, size - offset), offset)
    return ram


# Before the jump.


def preserve_for_all_tests() -> list[OutgoingSession]:
    """Create a session for each test that runs after the jump."""
    sessions = {}
    with LiveUpdate() as device:
        for name, size in (
            ("unanswered", PAGE),
            ("unfinished", PAGE),
            ("overcommit", MIB),
            ("cgroup", 32 * MIB),
            ("leak", UNRETRIEVED),
            ("plain", PAGE),
        ):
            sessions[name] = device.create_session(name)
            with make_filled_memfd(size) as ram:
                sessions[name].preserve(ram, TOKEN)
        sessions["sealed"] = device.create_session("sealed")
        sessions["read-only"] = device.create_session("read-only")
    with make_filled_memfd(PAGE) as ram:
        sessions["sealed"].preserve(ram, TOKEN)
        ram.seal(Seal.SHRINK | Seal.GROW)
    with make_filled_memfd(PAGE) as ram:
        read_only = os.open(f"/proc/self/fd/{ram.fileno()}", os.O_RDONLY)
    sessions["read-only"].preserve(read_only, TOKEN)
    os.close(read_only)
    return list(sessions.values())


def create_sessions_and_one_twice(count: int) -> list[OutgoingSession]:
    with LiveUpdate() as device:
        sessions = [device.create_session(f"s{number}") for number in range(count)]
        answer = request(device.fileno(), CREATE, name_argument("s0"))
    require(answer == "EEXIST", f"a name in use was answered by {answer}")
    return sessions


def preserve_from_read_only_memory() -> tuple[str, str]:
    """Return the answer, and the answer to the same request from writable memory."""
    with LiveUpdate() as device:
        session = device.create_session("s")
    with make_filled_memfd(PAGE) as ram:
        argument = file_argument(TOKEN, ram.fileno())
        first = request_from_read_only_memory(session.fileno(), PRESERVE, argument)
        second = request(session.fileno(), PRESERVE, argument)
        session.discard()
    return first, second


def preserve_a_sparse_file(size: int) -> tuple[str, list[str]]:
    """Return the answer and the kernel's warnings."""
    with LiveUpdate() as device:
        session = device.create_session("s")
    with Memfd.create("ram", size) as ram:
        answer = request(session.fileno(), PRESERVE, file_argument(TOKEN, ram.fileno()))
    session.discard()
    return answer, [line for line in KernelLog().messages if line.startswith("WARNING:")]


def preserve_what_does_not_fit_its_tmpfs() -> tuple[str, int, int]:
    """Return the answer, and the bytes that the file takes before and after."""
    os.mkdir("/run/small")
    mount("small", "/run/small", "tmpfs", "size=64k")
    fd = os.open("/run/small", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, MIB)
    before = os.fstat(fd).st_blocks * 512
    with LiveUpdate() as device:
        session = device.create_session("s")
    answer = request(session.fileno(), PRESERVE, file_argument(TOKEN, fd))
    session.discard()
    after = os.fstat(fd).st_blocks * 512
    os.close(fd)
    return answer, before, after


def preserve_a_file_in_memory(size: int) -> tuple[str, int]:
    """Return the answer or how the process ended, and the memory available beside the file."""

    def look() -> list[str]:
        with make_filled_memfd(size):
            return [str(read_meminfo("MemAvailable"))]

    def preserve() -> list[str]:
        write_file("/proc/self/oom_score_adj", 1000)  # killed first, before what the guest needs
        with LiveUpdate() as device, make_filled_memfd(size) as ram:
            session = device.create_session("s")
            argument = file_argument(TOKEN, ram.fileno())
            answer = request(session.fileno(), PRESERVE, argument)
            session.discard()
        return [answer]

    available = int(run_in_child(look)[0])
    return run_in_child(preserve)[0], available


# After the jump.


def retrieve_a_session_into_read_only_memory() -> tuple[str, str]:
    """Return the answer, and the answer to the same request from writable memory."""
    argument = name_argument("unanswered")
    with LiveUpdate() as device:
        first = request_from_read_only_memory(device.fileno(), RETRIEVE_SESSION, argument)
        return first, request(device.fileno(), RETRIEVE_SESSION, argument)


def finish_from_read_only_memory() -> tuple[str, str]:
    """Return the answer, and the answer to a retrieve after it."""
    with LiveUpdate() as device:
        session = device.retrieve_session("unfinished")
    fd = session.fileno()
    first = request_from_read_only_memory(fd, FINISH, finish_argument())
    second = request(fd, RETRIEVE, file_argument(TOKEN))
    session.finish()
    return first, second


def retrieve_while_memory_is_overcommitted() -> tuple[str, str]:
    """Return the answer, and the answer to a retrieve after the overcommit policy is reset."""
    with LiveUpdate() as device:
        session = device.retrieve_session("overcommit")
    argument = ctypes.create_string_buffer(file_argument(TOKEN), 16)
    write_file("/proc/sys/vm/overcommit_kbytes", 1)
    # Under the strict policy this process cannot allocate memory either: run as little as possible.
    with open("/proc/sys/vm/overcommit_memory", "w") as policy:
        policy.write("2")
        policy.flush()
        first = _answer(session.fileno(), RETRIEVE, argument)
        policy.seek(0)
        policy.write("0")
        policy.flush()
    second = request(session.fileno(), RETRIEVE, file_argument(TOKEN))
    session.finish()
    return first, second


def retrieve_in_a_small_cgroup() -> tuple[str, str]:
    """Return the answer, and the answer to a retrieve after the limit of the cgroup is raised."""
    os.makedirs("/run/cgroup")
    mount("cgroup", "/run/cgroup", "cgroup2")
    write_file("/run/cgroup/cgroup.subtree_control", "+memory")
    os.mkdir("/run/cgroup/small")
    write_file("/run/cgroup/small/memory.max", 20 * MIB)
    with LiveUpdate() as device:
        session = device.retrieve_session("cgroup")

    def retrieve() -> list[str]:
        write_file("/proc/self/oom_score_adj", -1000)
        write_file("/run/cgroup/small/cgroup.procs", os.getpid())
        first = request(session.fileno(), RETRIEVE, file_argument(TOKEN))
        write_file("/run/cgroup/small/memory.max", "max")
        return [first, request(session.fileno(), RETRIEVE, file_argument(TOKEN))]

    answers = run_in_child(retrieve)
    session.finish()
    require(len(answers) == 2, answers[0])
    return answers[0], answers[1]


def lose_a_file_without_open_files_left() -> tuple[str, int]:
    """Return the answer to a retrieve, and the bytes that the finish after it freed."""
    limit = "/proc/sys/fs/file-max"
    with open(limit) as file:
        usual = file.read().strip()
    with LiveUpdate() as device:
        session = device.retrieve_session("leak")

    def retrieve() -> list[str]:
        os.setuid(USER)
        return [request(session.fileno(), RETRIEVE, file_argument(TOKEN))]

    write_file(limit, 0)
    answer = run_in_child(retrieve)[0]
    write_file(limit, usual)
    before = read_meminfo("MemTotal")
    session.finish()
    return answer, read_meminfo("MemTotal") - before


def read_seals_after_jump() -> Seal:
    with LiveUpdate() as device:
        session = device.retrieve_session("sealed")
    with session.retrieve(TOKEN, Memfd) as ram:
        session.finish()
        return ram.seals


def read_access_mode_after_jump() -> int:
    with LiveUpdate() as device:
        session = device.retrieve_session("read-only")
    with session.retrieve(TOKEN) as ram:
        session.finish()
        return fcntl.fcntl(ram.fileno(), fcntl.F_GETFL) & os.O_ACCMODE


def read_link_after_jump() -> str:
    with LiveUpdate() as device:
        session = device.retrieve_session("plain")
    with session.retrieve(TOKEN) as ram:
        session.finish()
        return os.readlink(f"/proc/self/fd/{ram.fileno()}")


def open_the_device_while_allocations_fail() -> str:
    """Return the answer to an open after one that failed with EIO because an allocation failed."""
    for fault in each_fails():
        with fault:
            fd = cast("int", libc.open(b"/dev/liveupdate", os.O_RDWR | os.O_CLOEXEC))
            answer = errno.errorcode[ctypes.get_errno()] if fd < 0 else OK
        if fd >= 0:
            os.close(fd)
        if answer == "EIO":
            return outcome(lambda: LiveUpdate().close())
        require(answer == "ENOMEM", f"failure {fault.number} led to {answer}")
    raise UnmetPrecondition("no failure led to EIO")
