"""Parcels of descriptors."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pyluo import Memfd, OwnedFd, RequestError
from pyluo.keepers.parcel import Parcel

if TYPE_CHECKING:
    from collections.abc import Iterator

MANY = 600  # more than two packets


def memfds(count: int) -> Iterator[tuple[int, OwnedFd]]:
    for token in range(count):
        memfd = Memfd.create(str(token), 8)
        memfd.write(token.to_bytes(8, "little"), 0)
        yield token, memfd


def read_all(parcel: Parcel) -> dict[int, int]:
    found = {}
    for files in parcel.unpack():
        for token, file in files.items():
            found[token] = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    return found


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_parcel_gives_out_its_files_again_and_again_and_takes_one_descriptor() -> None:
    before = open_fds()
    with Parcel.pack(memfds(MANY), MANY) as parcel:
        assert open_fds() == before + 1
        for _ in range(2):
            assert read_all(parcel) == {token: token for token in range(MANY)}
        duplicate = Parcel.from_fd(os.dup(parcel.fileno()))
    with duplicate:
        assert read_all(duplicate) == {token: token for token in range(MANY)}
    assert open_fds() == before


def test_a_parcel_may_be_left_half_unpacked() -> None:
    with Parcel.pack(memfds(MANY), MANY) as parcel:
        before = open_fds()
        for files in parcel.unpack():
            assert len(files) == 253
            kept = files.pop(7)
            break
        assert open_fds() == before + 1
        kept.close()
        assert len(read_all(parcel)) == MANY


def test_a_parcel_outlives_the_process_that_packed_it() -> None:
    ours, theirs = socket.socketpair()
    code = (
        "import os, socket, sys\n"
        "from pyluo import Memfd\n"
        "from pyluo.keepers.parcel import Parcel\n"
        "memfd = Memfd.create('a', 8)\n"
        "memfd.write((5).to_bytes(8, 'little'), 0)\n"
        "parcel = Parcel.pack(iter([(3, memfd)]), 1)\n"
        "sender = socket.socket(fileno=int(sys.argv[1]))\n"
        "socket.send_fds(sender, [b'x'], [parcel.fileno()])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with ours, theirs:
        command = [sys.executable, "-c", code, str(theirs.fileno())]
        assert subprocess.run(command, pass_fds=[theirs.fileno()], check=False).returncode == -9
        _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
    with Parcel.from_fd(fd) as parcel:
        assert read_all(parcel) == {3: 5}


def test_more_files_are_packed_and_unpacked_than_the_process_may_have_open() -> None:
    code = (
        "import resource\n"
        "from tests.keepers.test_parcel import memfds, read_all\n"
        "from pyluo.keepers.parcel import Parcel\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        "with Parcel.pack(memfds(2000), 2000) as parcel:\n"
        "    assert read_all(parcel) == {token: token for token in range(2000)}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.getcwd())


def test_files_that_do_not_fit_into_the_process_are_an_error_and_none_stays_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Parcel.pack(memfds(100), 100) as parcel:
        before = open_fds()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, hard))
        try:
            with pytest.raises(RequestError) as caught:
                read_all(parcel)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.errno == errno.EMFILE
        assert open_fds() == before
        assert len(read_all(parcel)) == 100


def test_an_empty_parcel_has_no_files() -> None:
    with Parcel.pack(iter(()), 0) as parcel:
        assert read_all(parcel) == {}


@pytest.mark.parametrize("packet", [b"x", b"\0" * 4, b"\1\0\0\0" + bytes(8), bytes(200)])
def test_what_is_no_parcel_is_told(packet: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.send(packet)
    with Parcel(ours.detach()) as parcel, pytest.raises(RequestError) as caught:
        read_all(parcel)
    assert caught.value.errno == errno.EBADMSG


def test_a_file_is_no_parcel() -> None:
    with Parcel(os.memfd_create("a")) as parcel, pytest.raises(RequestError) as caught:
        read_all(parcel)
    assert caught.value.errno == errno.ENOTSOCK
