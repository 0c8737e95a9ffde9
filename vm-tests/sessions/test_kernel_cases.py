"""The cases of the kernel's selftests/liveupdate, under their names, through the binding."""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING

import pytest

from pyluo import (
    AlreadyPreservedError,
    DeviceBusyError,
    LiveUpdate,
    Memfd,
    NotPreservableError,
    OutgoingSession,
    SessionExistsError,
)
from pyluo.vm import VM
from sessions import guest_cases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pyluo.vm import Kernel


@pytest.mark.parametrize("name", ["stable", "previous"])
def test_every_case_of_the_kernels_has_its_equivalent_here(
    name: str, selftest_source: Callable[[str], Path]
) -> None:
    folder = selftest_source(name)
    text = (folder / "liveupdate.c").read_text()
    cases = set(re.findall(r"^TEST_F\(\w+, (\w+)\)", text, re.MULTILINE))
    cases |= {path.stem for path in folder.glob("luo_*.c")} - {"luo_test_utils"}
    assert len(cases) > 10
    assert cases - {test.removeprefix("test_") for test in globals()} == set()


@pytest.mark.in_guest
def test_basic_open_close() -> None:
    device = LiveUpdate()
    device.close()
    assert device.closed


@pytest.mark.in_guest
def test_exclusive_open() -> None:
    with LiveUpdate(), pytest.raises(DeviceBusyError) as caught:
        LiveUpdate()
    assert caught.value.errno == errno.EBUSY


@pytest.mark.in_guest
def test_create_duplicate_session() -> None:
    with LiveUpdate() as device:
        session = device.create_session("duplicate")
        with pytest.raises(SessionExistsError) as caught:
            device.create_session("duplicate")
        session.discard()
    assert caught.value.errno == errno.EEXIST


@pytest.mark.in_guest
def test_create_distinct_sessions() -> None:
    with LiveUpdate() as device:
        sessions = [device.create_session(name) for name in ("one", "two")]
        assert len({session.fileno() for session in sessions}) == 2
        for session in sessions:
            session.discard()


@pytest.mark.in_guest
def test_preserve_memfd() -> None:
    with LiveUpdate() as device, Memfd.create("a", 16) as memfd:
        session = device.create_session("one file")
        memfd.write(b"hello liveupdate", 0)
        session.preserve(memfd, 0x1234)
        session.discard()
        assert memfd.read(64, 0) == b"hello liveupdate"


@pytest.mark.in_guest
def test_preserve_multiple_memfds() -> None:
    with (
        LiveUpdate() as device,
        Memfd.create("a", 1) as one,
        Memfd.create("b", 2) as two,
    ):
        session = device.create_session("two files")
        one.write(b"1", 0)
        two.write(b"22", 0)
        session.preserve_many({0xAAAA: one, 0xBBBB: two})
        assert (one.read(9, 0), two.read(9, 0)) == (b"1", b"22")
        session.discard()


@pytest.mark.in_guest
def test_preserve_complex_scenario() -> None:
    memfds = [Memfd.create(str(size), size) for size in (4, 0, 5, 0)]
    with LiveUpdate() as device:
        sessions = [device.create_session(name) for name in ("complex 1", "complex 2")]
    for number, memfd in enumerate(memfds):
        memfd.write(b"x" * memfd.size, 0)
        sessions[number // 2].preserve(memfd, number)
    assert [memfd.read(9, 0) for memfd in memfds] == [b"xxxx", b"", b"xxxxx", b""]
    for session in sessions:
        session.discard()
    for memfd in memfds:
        memfd.close()


@pytest.mark.in_guest
def test_preserve_unsupported_fd() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    with LiveUpdate() as device:
        session = device.create_session("unsupported")
        with pytest.raises(NotPreservableError, match="/dev/null") as caught:
            session.preserve(fd, 0xDEAD)
        session.discard()
    os.close(fd)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.in_guest
def test_prevent_double_preservation() -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as memfd:
        one, two = device.create_session("one"), device.create_session("two")
        one.preserve(memfd, 0x1111)
        for session in (two, one):
            with pytest.raises(AlreadyPreservedError) as caught:
                session.preserve(memfd, 0x2222)
            assert caught.value.errno == errno.EBUSY
        one.discard()
        two.discard()


@pytest.mark.in_guest
def test_create_session_no_null_termination() -> None:
    from sessions.guest_requests import CREATE, answer

    with LiveUpdate() as device:
        refusal = answer(CREATE, device.fileno(), fd=-1, name=b"X" * 64)
    assert refusal == ("SessionNameError", errno.EINVAL)


@pytest.mark.in_guest
def test_create_session_empty_name() -> None:
    from sessions.guest_requests import CREATE, answer

    with LiveUpdate() as device:
        refusal = answer(CREATE, device.fileno(), fd=-1, name=b"")
    assert refusal == ("SessionNameError", errno.EINVAL)


@pytest.mark.in_guest
def test_get_session_name() -> None:
    assert read_name_from_kernel("a name") == "a name"


@pytest.mark.in_guest
def test_get_session_name_max_length() -> None:
    assert read_name_from_kernel("A" * 63) == "A" * 63


def read_name_from_kernel(name: str) -> str:
    with LiveUpdate() as device:
        session = OutgoingSession.from_fd(device.create_session(name).detach())
    answer = session.name
    session.discard()
    return answer


@pytest.mark.in_guest
def test_preserve_many_sessions() -> None:
    guest_cases.allow_files(guest_cases.SESSIONS)
    sessions = guest_cases.preserve(guest_cases.many_sessions())
    assert len({session.fileno() for session in sessions}) == 2000
    for session in sessions:
        session.discard()


@pytest.mark.in_guest
def test_preserve_many_files() -> None:
    guest_cases.allow_files(guest_cases.FILES)
    (session,) = guest_cases.preserve(guest_cases.many_files())
    with pytest.raises(Exception, match="EEXIST"), Memfd.create("a", 1) as memfd:
        session.preserve(memfd, 499)
    session.discard()


@pytest.fixture(scope="module")
def landed(kernel: Kernel) -> Iterator[VM]:
    """A guest after one jump, with everything that the kexec tests preserve."""
    with VM(kernel) as vm:
        vm.hold(guest_cases.preserve_all)
        vm.live_update()
        yield vm


def test_luo_kexec_simple(landed: VM) -> None:
    expected = {"simple": {1: b"hello over the jump"}}
    assert landed.call(guest_cases.retrieve, expected) == expected


def test_luo_multi_session(landed: VM) -> None:
    assert landed.call(guest_cases.retrieve, guest_cases.SEVERAL) == guest_cases.SEVERAL


def test_luo_stress_sessions(landed: VM) -> None:
    assert landed.call(guest_cases.count_retrieved_sessions) == 2000


def test_luo_stress_files(landed: VM) -> None:
    assert landed.call(guest_cases.count_intact_files) == 500
