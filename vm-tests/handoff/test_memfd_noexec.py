"""What works with vm.memfd_noexec=2, which forbids executable memfds, and what cannot."""

from __future__ import annotations

import errno
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pyluo import (
    GuestRam,
    LiveUpdate,
    Memfd,
    NotPreservableError,
    OutgoingStore,
    RequestError,
    Seal,
    handoff,
)
from pyluo.keepers.holder import HolderProcess
from pyluo.probe import Verdict, probe

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.in_guest

SYSCTL = "/proc/sys/vm/memfd_noexec"


@contextmanager
def no_executable_memfds() -> Iterator[None]:
    with open(SYSCTL) as file:
        before = file.read()
    write_sysctl("2")
    try:
        yield
    finally:
        write_sysctl(before)


def write_sysctl(value: str) -> None:
    with open(SYSCTL, "w") as file:
        file.write(value)


def test_descriptors_are_handed_over() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        no_executable_memfds(),
        ours,
        theirs,
        ThreadPoolExecutor(1) as thread,
        GuestRam.create("ram", 1 << 16, part_size=1 << 14, executable=False) as ram,
    ):
        ram.write(b"contents", 1 << 14)
        files = {str(number): memfd for number, memfd in enumerate(ram.memfds)}
        sending = thread.submit(handoff.send, ours, files, b"state")
        with handoff.receive(theirs) as received, received.take("1", Memfd) as part:
            assert received.state == b"state"
            assert part.seals & Seal.EXEC
            assert part.read(8, 0) == b"contents"
        sending.result()
        mapping = ram.map()
        assert bytes(mapping[1 << 14 : (1 << 14) + 8]) == b"contents"
        mapping.close()


def test_descriptors_go_through_exec() -> None:
    program = "from pyluo import handoff; print(handoff.inherited().state.decode())"
    reader, writer = os.pipe()
    with no_executable_memfds():
        pid = os.fork()
        if not pid:
            try:
                os.dup2(writer, 1)
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
                handoff.exec_with([sys.executable, "-c", program], {}, b"state", env=environment)
            finally:
                os._exit(1)
        os.close(writer)
        with open(reader) as output:
            assert output.read() == "state\n"
        assert os.waitpid(pid, 0)[1] == 0


def test_a_holder_keeps_descriptors() -> None:
    keeper = HolderProcess()
    with no_executable_memfds(), Memfd.create("file", 4096, executable=False) as memfd:
        keeper.keep("noexec", "file", memfd)
        ((label, kept),) = keeper.kept("noexec").items()
        with kept:
            assert label == "file"
            assert os.path.samestat(os.fstat(kept.fileno()), os.fstat(memfd.fileno()))
        keeper.release("noexec", "file")


def test_a_store_says_that_the_setting_rules_out_live_updates_of_memfds() -> None:
    with no_executable_memfds():
        with pytest.raises(RequestError, match="rules out the live update of memfds") as caught:
            OutgoingStore.create("noexec")
        assert caught.value.errno == errno.EACCES
    OutgoingStore.create("noexec").discard()  # nothing of the first one is left


def test_preserving_says_that_the_setting_rules_it_out() -> None:
    with no_executable_memfds(), LiveUpdate() as device:
        session = device.create_session("noexec")
        with (
            Memfd.create("file", 4096, executable=False) as memfd,
            pytest.raises(NotPreservableError, match=r"memfd_noexec=2 allows no others.*rules out"),
        ):
            session.preserve(memfd, 1)
        session.discard()


def test_a_probe_says_why_there_is_no_memfd_to_try() -> None:
    with no_executable_memfds():
        findings = {finding.kind: finding for finding in probe()}
    assert findings["memfd"].verdict is Verdict.ABSENT
    assert "vm.memfd_noexec=2" in findings["memfd"].reason
