"""Memfds, on the host's own kernel, because they need no live update."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import warnings

import pytest

from pyluo import Memfd, OwnedFd, RequestError, Seal, SealedError


def test_a_new_memfd_is_as_long_as_asked_for_all_zero_and_close_on_exec() -> None:
    with Memfd.create("ram", 10_000) as ram:
        assert ram.size == 10_000
        assert ram.read(20_000, 0) == bytes(10_000)
        assert not os.get_inheritable(ram.fileno())
        assert os.readlink(f"/proc/self/fd/{ram.fileno()}") == "/memfd:ram (deleted)"


def test_reading_and_writing_leave_the_position_alone() -> None:
    with Memfd.create("ram", 100) as ram:
        ram.write(b"abc", 50)
        assert ram.read(5, 49) == b"\0abc\0"
        assert os.lseek(ram.fileno(), 0, os.SEEK_CUR) == 0


def test_writing_past_the_end_grows_the_file_until_a_seal_forbids_it() -> None:
    with Memfd.create("ram", 4) as ram:
        ram.write(b"abcd", 2)
        assert ram.size == 6
        ram.seal(Seal.GROW)
        with pytest.raises(SealedError) as caught:
            ram.write(b"abcd", 4)
        assert caught.value.errno == errno.EPERM


def test_a_mapping_shares_the_memory_and_outlives_the_memfd() -> None:
    ram = Memfd.create("ram", 8192)
    with ram, ram.map(4096) as mapping:
        ram.close()
        mapping[:3] = b"abc"
        assert len(mapping) == 4096
        assert mapping[:3] == b"abc"


@pytest.mark.parametrize(("offset", "length"), [(-4096, 1), (0, 0), (0, 8193), (8192, None)])
def test_a_mapping_outside_the_file_is_refused(offset: int, length: int | None) -> None:
    with Memfd.create("ram", 8192) as ram, pytest.raises(ValueError, match="do not lie within"):
        ram.map(offset, length)


def test_a_memfd_sealed_against_writing_maps_read_only() -> None:
    with Memfd.create("ram", 4096, seals=Seal.WRITE) as ram:
        with pytest.raises(SealedError):
            ram.map()
        with ram.map(writable=False) as mapping:
            assert mapping[0] == 0


def test_a_writable_mapping_keeps_the_write_seal_off() -> None:
    with Memfd.create("ram", 4096) as ram, ram.map(), pytest.raises(RequestError) as caught:
        ram.seal(Seal.WRITE)
    assert caught.value.errno == errno.EBUSY


def test_no_seal_can_be_added_after_the_seal_of_seals() -> None:
    with Memfd.create("ram", 4096, seals=Seal.SEAL | Seal.SHRINK) as ram:
        assert ram.seals == Seal.SEAL | Seal.SHRINK
        with pytest.raises(SealedError):
            ram.seal(Seal.GROW)
        with pytest.raises(SealedError):
            ram.resize(0)


def test_a_memfd_is_executable_unless_told_otherwise() -> None:
    with Memfd.create("a", 0) as plain, Memfd.create("b", 0, executable=False) as noexec:
        assert Seal.EXEC not in plain.seals
        assert Seal.EXEC in noexec.seals


@pytest.mark.parametrize(
    ("size", "huge"), [(-1, 0), (4096, 3000), (3 << 20, 2 << 20), (4096, -4096)]
)
def test_sizes_that_make_no_sense_are_refused(size: int, huge: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Memfd.create("ram", size, huge_page_size=huge)


def test_a_descriptor_of_another_kind_is_not_adopted_and_stays_open() -> None:
    # A file outside of tmpfs, whose files can have seals too; /tmp may be a tmpfs.
    with open("/proc/self/status") as file:
        with pytest.raises(RequestError):
            Memfd.from_fd(file.fileno())
        os.fstat(file.fileno())


def test_closing_twice_is_closing_once() -> None:
    ram = Memfd.create("ram", 4096)
    ram.close()
    ram.close()
    assert ram.closed
    with pytest.raises(ValueError, match="Memfd is closed"):
        ram.read(1, 0)


def test_a_detached_descriptor_is_the_callers() -> None:
    ram = Memfd.create("ram", 4096)
    fd = ram.detach()
    assert ram.closed
    ram.close()
    with Memfd.from_fd(fd) as again:
        assert again.size == 4096


def test_a_memfd_dropped_open_warns_and_is_closed() -> None:
    ram = Memfd.create("ram", 4096)
    fd = ram.fileno()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del ram
        gc.collect()
    assert [warning.category for warning in caught] == [ResourceWarning]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_owner_of_what_is_not_open_cannot_be_made() -> None:
    with pytest.raises(RequestError) as caught:
        OwnedFd.from_fd(10_000)
    assert caught.value.errno == errno.EBADF


def test_a_failed_creation_leaves_no_descriptor_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RequestError):
        Memfd.create("ram", 4096, seals=Seal.SEAL | Seal(1 << 20))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_whole_of_a_mapping_can_be_written() -> None:
    with mmap.mmap(-1, 4096) as memory, Memfd.create("ram", 0) as ram:
        memory[:2] = b"ab"
        ram.write(memory, 0)
        assert (ram.size, ram.read(2, 0)) == (4096, b"ab")
