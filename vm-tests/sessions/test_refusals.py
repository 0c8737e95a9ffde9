"""Tests of each refusal of the kernel, and of its exception, without pyluo's own checks."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from pyluo import LiveUpdate, LiveUpdateUnavailableError, LuoError, Memfd
from pyluo.vm import VM
from sessions import guest_requests
from sessions.guest_requests import (
    CREATE,
    FINISH,
    GET_NAME,
    PRESERVE_FD,
    RETRIEVE,
    RETRIEVE_FD,
    answer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.vm import Kernel
    from sessions.guest_requests import Answer

DONE = ("", 0)


@pytest.fixture(scope="module")
def landed(kernel: Kernel) -> Iterator[VM]:
    with VM(kernel) as vm:
        vm.hold(guest_requests.preserve_named, ["s0", "s1", "s2", "s3"])
        vm.live_update()
        yield vm


@pytest.mark.in_guest
@pytest.mark.parametrize("name", [b"", b"x" * 64], ids=["empty", "unterminated"])
def test_a_name_that_is_none_is_refused_by_the_kernel_too(name: bytes) -> None:
    with LiveUpdate() as device:
        assert answer(CREATE, device.fileno(), fd=-1, name=name) == (
            "SessionNameError",
            errno.EINVAL,
        )


@pytest.mark.in_guest
def test_a_name_in_use_and_one_that_did_not_come_in() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        in_use = answer(CREATE, device.fileno(), fd=-1, name=b"s")
        unknown = answer(RETRIEVE, device.fileno(), fd=-1, name=b"s")
        session.discard()
    assert in_use == ("SessionExistsError", errno.EEXIST)
    assert unknown == ("SessionNotFoundError", errno.ENOENT)


@pytest.mark.in_guest
def test_an_outgoing_session_answers_each_wrong_request_in_its_way() -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as a, Memfd.create("b", 4096) as b:
        session = device.create_session("s")
        fd = session.fileno()
        assert answer(PRESERVE_FD, fd, fd=a.fileno(), token=1) == DONE
        answers = {
            "token used": answer(PRESERVE_FD, fd, fd=b.fileno(), token=1),
            "file preserved": answer(PRESERVE_FD, fd, fd=a.fileno(), token=2),
            "no file": answer(PRESERVE_FD, fd, fd=1000, token=2),
            "the device": answer(PRESERVE_FD, fd, fd=device.fileno(), token=2),
            "itself": answer(PRESERVE_FD, fd, fd=fd, token=2),
            "retrieve": answer(RETRIEVE_FD, fd, fd=-1, token=1),
            "finish": answer(FINISH, fd),
            "name, reserved": answer(GET_NAME, fd, reserved=1),
        }
        session.discard()
    assert answers == {
        "token used": ("TokenInUseError", errno.EEXIST),
        "file preserved": ("AlreadyPreservedError", errno.EBUSY),
        "no file": ("LuoError", errno.EBADF),
        "the device": ("NotPreservableError", errno.ENOENT),
        "itself": ("NotPreservableError", errno.ENOENT),
        "retrieve": ("LuoError", errno.EINVAL),
        "finish": ("LuoError", errno.EINVAL),
        "name, reserved": ("KernelTooOldError", errno.EINVAL),
    }


@pytest.mark.in_guest
def test_a_file_of_more_pages_than_can_be_counted_is_too_big() -> None:
    with LiveUpdate() as device, Memfd.create("a", (1 << 44) + 4096) as sparse:
        session = device.create_session("s")
        refusal = answer(PRESERVE_FD, session.fileno(), fd=sparse.fileno(), token=1)
        session.discard()
    assert refusal == ("NotPreservableError", errno.EFBIG)


@pytest.mark.in_guest
def test_sizes_numbers_and_tails_that_the_kernel_does_not_know() -> None:
    from pyluo import _sys

    with LiveUpdate() as device:
        session = device.create_session("s")
        fd = session.fileno()
        unknown = _sys.Ioctl(RETRIEVE_FD.name, RETRIEVE_FD.struct.name, LuoError)
        unknown._number += 10
        assert answer(unknown, fd) == ("LuoError", errno.EINVAL)
        assert answer(unknown, device.fileno()) == ("LuoError", errno.EINVAL)
        assert answer(PRESERVE_FD, fd, size=8, fd=0, token=1) == ("LuoError", errno.EINVAL)
        assert PRESERVE_FD.errno_for_unknown_tail(fd) == errno.E2BIG
        assert CREATE.errno_for_unknown_tail(device.fileno()) == errno.E2BIG
        session.discard()


def test_an_incoming_session_answers_each_request_in_its_way(landed: VM) -> None:
    answers: dict[str, Answer] = landed.call(guest_requests.ask_incoming, "s0")
    assert answers == {
        "preserve": ("LuoError", errno.EINVAL),
        "unknown token": ("TokenNotFoundError", errno.ENOENT),
        "name": DONE,
        "reserved": ("LuoError", errno.EINVAL),
        "still there": DONE,
        "finish": DONE,
        "finish again": DONE,
        "after the finish": ("TokenNotFoundError", errno.ENOENT),
    }


def test_a_session_retrieved_and_one_finished_are_told_apart(landed: VM) -> None:
    assert landed.call(guest_requests.retrieve_twice, "s1") == [
        ("SessionRetrievedError", errno.EINVAL),
        ("SessionNotFoundError", errno.ENOENT),
    ]


def test_the_direction_of_a_session_shows_in_its_refusal_of_a_tail(landed: VM) -> None:
    errnos = landed.call(guest_requests.send_unknown_tails, "s2")
    assert errnos == (errno.E2BIG, errno.EINVAL, True)


def test_incoming_state_that_cannot_be_read_is_told_now_and_ever_after(
    guest: Callable[..., VM],
) -> None:
    vm = guest("selftest")
    vm.hold(guest_requests.preserve_named, ["s"])
    vm.live_update()
    assert vm.call(guest_requests.open_with_a_fault) == [
        ("IncomingStateError", errno.EIO),
        ("IncomingStateError", errno.EIO),
    ]


def test_a_retrieval_that_failed_fails_ever_after_by_the_same_errno(
    guest: Callable[..., VM],
) -> None:
    vm = guest("selftest")
    vm.hold(guest_requests.preserve_named, ["s"])
    vm.live_update()
    answers = vm.call(guest_requests.retrieve_with_a_fault, "s")
    (refusal,) = set(answers)
    assert refusal in {("LuoError", errno.ENOMEM), ("LuoError", errno.ENOSPC)}


@pytest.mark.parametrize("off", ["liveupdate=off", "kho=off"])
def test_a_kernel_without_live_update_says_how_to_get_it(
    guest: Callable[..., VM], kernel: Kernel, off: str
) -> None:
    vm = guest(kernel, append=off)
    with pytest.raises(LiveUpdateUnavailableError, match="pyluo status") as caught:
        vm.call(open_the_device)
    assert caught.value.errno == errno.ENOENT


def open_the_device() -> None:
    LiveUpdate().close()


@pytest.mark.in_guest
def test_a_refusal_names_the_session_the_token_the_file_the_release_and_the_way_out() -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as memfd:
        session = device.create_session("vm0")
        event = os.eventfd(0)
        session.preserve(memfd, 1)
        attempts: dict[str, Callable[[], object]] = {
            "token 7, an eventfd": lambda: session.preserve(event, 7),
            os.uname().release: lambda: session.preserve(event, 7),
            "pyluo probe": lambda: session.preserve_many({7: event}),
            "token 1, a memfd": lambda: session.preserve(memfd, 1),
            "Choose another name": lambda: device.create_session("vm0"),
            "no session of this name": lambda: device.retrieve_session("vm0"),
        }
        for part, attempt in attempts.items():
            with pytest.raises(LuoError, match="'vm0'") as caught:
                attempt()
            assert part in str(caught.value)
        os.close(event)
        session.discard()


def test_a_refusal_of_an_incoming_session_names_it_and_the_token(landed: VM) -> None:
    unknown, wrong = landed.call(guest_requests.refusals_in_words, "s3")
    assert "incoming session 's3', token 99" in unknown
    assert "Nothing was preserved under this token" in unknown
    assert "outgoing session 's3'" in wrong
    assert wrong.startswith("LuoError")
    assert "It is an incoming session" in wrong


@pytest.mark.in_guest
def test_the_link_of_a_session_tells_its_name_as_the_kernel_does() -> None:
    from pyluo import OutgoingSession

    for name in ("n" * 63, "a name with / and %s"):
        with LiveUpdate() as device:
            fd = device.create_session(name).detach()
        by_ioctl = OutgoingSession.from_fd(fd)
        by_link = OutgoingSession.from_fd(by_ioctl.detach(), trusted=True)
        assert (by_ioctl.name, by_link.name) == (name, name)
        by_link.discard()
