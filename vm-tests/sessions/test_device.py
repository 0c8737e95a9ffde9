"""Tests of /dev/liveupdate and of requests that need no jump."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from pyluo import (
    AlreadyPreservedError,
    DeviceBusyError,
    IncomingSession,
    KernelTooOldError,
    LiveUpdate,
    LuoError,
    Memfd,
    NotPreservableError,
    OutgoingSession,
    SealedError,
    SessionExistsError,
    SessionNameError,
    SessionNotFoundError,
    TokenInUseError,
)
from pyluo.errors import RequestError

pytestmark = pytest.mark.in_guest


def test_the_device_opens_once_at_a_time() -> None:
    with LiveUpdate(), pytest.raises(DeviceBusyError) as caught:
        LiveUpdate()
    assert caught.value.errno == errno.EBUSY
    LiveUpdate().close()


def test_a_session_outlives_the_device_it_was_made_on() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
    with Memfd.create("ram", 4096) as ram:
        session.preserve(ram, 1)
    session.discard()


def test_a_name_is_taken_until_its_session_is_discarded() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        with pytest.raises(SessionExistsError):
            device.create_session("s")
        session.discard()
        device.create_session("s").discard()


@pytest.mark.parametrize("name", ["", "x" * 64, "a\0b"])
def test_a_name_that_the_kernel_would_cut_is_refused(name: str) -> None:
    with LiveUpdate() as device, pytest.raises(SessionNameError):
        device.create_session(name)


def test_the_longest_name_comes_back_from_the_kernel() -> None:
    with LiveUpdate() as device:
        session = device.create_session("n" * 63)
    adopted = OutgoingSession.from_fd(session.detach())
    assert adopted.name == "n" * 63
    adopted.discard()


def test_no_session_came_in_with_a_cold_boot() -> None:
    with LiveUpdate() as device, pytest.raises(SessionNotFoundError):
        device.retrieve_session("s")


def test_a_token_is_used_once_and_a_file_is_preserved_once() -> None:
    with (
        LiveUpdate() as device,
        Memfd.create("a", 4096) as one,
        Memfd.create("b", 4096) as other,
    ):
        session, second = device.create_session("s"), device.create_session("t")
        session.preserve(one, 7)
        with pytest.raises(TokenInUseError):
            session.preserve(other, 7)
        with pytest.raises(AlreadyPreservedError):
            session.preserve(one, 8)
        with pytest.raises(AlreadyPreservedError):
            second.preserve(one, 7)
        session.discard()
        second.preserve(one, 7)
        second.discard()


@pytest.mark.parametrize("token", [0, (1 << 64) - 1])
def test_the_extreme_tokens_are_tokens(token: int) -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as memfd:
        session = device.create_session("s")
        session.preserve(memfd, token)
        session.discard()


def test_a_closed_descriptor_is_told_as_such() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        with pytest.raises(LuoError) as caught:
            session.preserve(1000, 1)
        session.discard()
    assert caught.value.errno == errno.EBADF


def test_preserving_many_stops_at_the_first_that_fails_and_says_what_is_in() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        memfds = [Memfd.create(str(number), 4096) for number in range(4)]
        files: dict[int, Memfd | int] = dict(enumerate(memfds))
        files[2] = 1000
        with pytest.raises(LuoError, match="token 2") as caught:
            session.preserve_many(files)
        assert caught.value.preserved == (0, 1)
        session.preserve(memfds[2], 2)
        session.discard()
        for memfd in memfds:
            memfd.close()


def test_the_size_of_a_preserved_file_is_fixed_and_its_contents_are_not() -> None:
    with LiveUpdate() as device, Memfd.create("ram", 8192) as ram:
        session = device.create_session("s")
        session.preserve(ram, 1)
        with pytest.raises(SealedError):
            ram.resize(4096)
        with pytest.raises(SealedError):
            ram.write(b"xx", 8191)
        ram.write(b"x", 8191)
        session.discard()
        ram.resize(4096)


def test_a_huge_page_memfd_is_refused() -> None:
    with open("/proc/sys/vm/nr_hugepages", "w") as file:
        file.write("2")
    with LiveUpdate() as device, Memfd.create("huge", 2 << 20, huge_page_size=2 << 20) as huge:
        with huge.map() as mapping:
            mapping[0] = 1
        session = device.create_session("s")
        with pytest.raises(NotPreservableError):
            session.preserve(huge, 1)
        session.discard()


def test_huge_pages_that_were_not_reserved_are_told_as_such() -> None:
    with open("/proc/sys/vm/nr_hugepages", "w") as file:
        file.write("0")
    with (
        Memfd.create("huge", 2 << 20, huge_page_size=2 << 20) as huge,
        pytest.raises(RequestError, match="nr_hugepages"),
    ):
        huge.map()


def test_a_memfd_sealed_noexec_is_refused_unless_allowed() -> None:
    with LiveUpdate() as device, Memfd.create("ram", 4096, executable=False) as ram:
        session = device.create_session("s")
        with pytest.raises(NotPreservableError, match="allow_noexec"):
            session.preserve(ram, 1)
        with pytest.raises(NotPreservableError, match="allow_noexec"):
            session.preserve_many({1: ram})
        session.preserve(ram, 1, allow_noexec=True)
        session.discard()


def test_the_device_is_adopted_by_its_descriptor_and_nothing_else_is() -> None:
    device = LiveUpdate.from_fd(LiveUpdate().detach())
    with device:
        device.create_session("s").discard()
        with Memfd.create("ram", 4096) as ram, pytest.raises(RequestError):
            LiveUpdate.from_fd(ram.fileno())


def test_an_outgoing_session_is_not_adopted_as_an_incoming_one() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
        with pytest.raises(LuoError):
            IncomingSession.from_fd(session.fileno())
        with Memfd.create("ram", 4096) as ram:
            with pytest.raises(LuoError):
                OutgoingSession.from_fd(ram.fileno())
            session.preserve(ram, 1)
        session.discard()


def test_a_field_that_the_kernel_does_not_know_means_that_it_is_too_old() -> None:
    from pyluo.session import _PRESERVE_FD

    with LiveUpdate() as device:
        session = device.create_session("s")
        answer = _PRESERVE_FD.errno_for_unknown_tail(session.fileno())
        session.discard()
    assert answer == errno.E2BIG
    assert isinstance(_PRESERVE_FD.error(answer), KernelTooOldError)


def test_a_session_that_nobody_has_used_takes_its_name_no_longer_when_it_is_dropped() -> None:
    with LiveUpdate() as device:
        with pytest.warns(ResourceWarning, match="nobody had used it"):
            device.create_session("s")
        device.create_session("s").discard()


def test_a_session_that_somebody_used_stays_open_when_it_is_dropped() -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as a:
        session = device.create_session("s")
        session.preserve(a, 1)
        fd = session.fileno()
        with pytest.warns(ResourceWarning, match="stays open"):
            del session
        with pytest.raises(SessionExistsError):
            device.create_session("s")
        os.close(fd)


def test_a_session_tells_whether_it_has_a_token() -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as a:
        session = device.create_session("s")
        session.preserve(a, 7)
        assert session.has(7)
        assert not session.has(8)
        session.discard()


def test_a_signal_handler_is_refused_a_session_that_its_thread_is_using() -> None:
    import signal

    refused: list[int | None] = []

    def use_it(_number: int, _frame: object) -> None:
        try:
            session.has(1)
        except RequestError as error:
            refused.append(error.errno)

    def send(_frame: object, event: str, function: object) -> None:
        if event == "c_call" and getattr(function, "__name__", "") == "pyluo_preserve_many":
            signal.raise_signal(signal.SIGUSR1)

    with LiveUpdate() as device, Memfd.create("a", 4096) as a:
        session = device.create_session("s")
        before = signal.signal(signal.SIGUSR1, use_it)
        sys.setprofile(send)
        session.preserve(a, 1)
        sys.setprofile(None)
        signal.signal(signal.SIGUSR1, before)
        session.discard()
    assert refused == [errno.EDEADLK]


def test_many_threads_may_use_one_session_while_one_of_them_discards_it() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with LiveUpdate() as device:
        session = device.create_session("s")
        memfds = [Memfd.create(str(number), 4096) for number in range(64)]

        def preserve(number: int) -> str:
            if number == 40:
                session.discard()
            try:
                session.preserve(memfds[number], number)
            except ValueError:
                return "closed"
            return "preserved"

        with ThreadPoolExecutor(8) as pool:
            outcomes = set(pool.map(preserve, range(64)))
        assert session.closed
        assert "closed" in outcomes
        device.create_session("s").discard()
        for memfd in memfds:
            memfd.close()


def test_many_threads_may_use_the_device_while_one_of_them_closes_it() -> None:
    from concurrent.futures import ThreadPoolExecutor

    device = LiveUpdate()

    def create(number: int) -> OutgoingSession | None:
        if number == 40:
            device.close()
        try:
            return device.create_session(f"s{number}")
        except ValueError:
            return None

    with ThreadPoolExecutor(8) as pool:
        sessions = [session for session in pool.map(create, range(64)) if session is not None]
    assert device.closed
    assert 0 < len(sessions) < 64
    for session in sessions:
        session.discard()
    LiveUpdate().close()


def test_a_discard_waits_for_a_request_of_another_thread() -> None:
    import os
    import threading
    import time

    size = 128 << 20
    with LiveUpdate() as device, Memfd.create("sparse", size) as sparse:
        session = device.create_session("s")
        thread = threading.Thread(target=session.preserve, args=(sparse, 1))
        thread.start()
        while not os.fstat(sparse.fileno()).st_blocks:  # until the request is in the kernel
            time.sleep(0)
        begun = os.fstat(sparse.fileno()).st_blocks * 512
        session.discard()
        ended = os.fstat(sparse.fileno()).st_blocks * 512
        thread.join()
        assert begun < size  # otherwise the request was over before
        assert ended == size
        sparse.resize(0)
