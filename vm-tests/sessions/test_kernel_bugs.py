"""Tests of known kernel bugs, each expected to fail; one that passes turns the run red.

docs/reference/kernel-bugs.md describes each bug. A precondition that does not hold raises `Unmet`,
which is not an expected failure.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pyluo import LiveUpdate, Memfd, OutgoingSession, Seal
from pyluo.vm import VM, GuestCrash, Kernel
from sessions import guest_bugs
from sessions.guest_bugs import MIB, OK, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# luo_session.c: the sessions of a block, which is a page: a header of 16 bytes, and 80 for each
SESSIONS_PER_BLOCK = (4096 - 16) // 80
TEBIBYTE = 1 << 40


def bug(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


@pytest.fixture(scope="module", params=["stable", "previous"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Both kernels, whichever one --pyluo-kernel names."""
    return Kernel.find(request.param)


@pytest.fixture(scope="module")
def landed(kernel: Kernel) -> Iterator[VM]:
    """A guest after a jump, with a session for each test that needs one."""
    with VM(kernel) as vm:
        vm.hold(guest_bugs.preserve_for_all_tests)
        vm.live_update()
        yield vm


@bug("a block of sessions left empty by EEXIST makes the next kernel panic")
def test_a_refused_session_name_does_not_kill_the_next_kernel(vm: VM) -> None:
    vm.hold(guest_bugs.create_sessions_and_one_twice, SESSIONS_PER_BLOCK)
    try:
        vm.live_update()
    except GuestCrash:
        cause = "Block contains invalid entry count: 0"
        require(cause in vm.console, "the next kernel died of something else")
        survived = False
    else:
        survived = True
    assert survived


@bug("PRESERVE_FD looks for memory until the OOM killer comes, beside free memory of scratch areas")
def test_preserving_what_memory_has_no_room_for_is_refused(cold_vm: VM) -> None:
    answer, available = cold_vm.call(guest_bugs.preserve_a_file_in_memory, 720 * MIB)
    require(available > 64 * MIB, f"{available} bytes available: nothing could be said of less")
    require(answer in {OK, "ENOMEM", "ended by signal 9"}, answer)
    assert answer != "ended by signal 9"


@bug("the descriptor of a session that was not told of is closed, which finishes the session")
def test_a_session_whose_retrieve_failed_can_still_be_retrieved(landed: VM) -> None:
    first, second = landed.call(guest_bugs.retrieve_a_session_into_read_only_memory)
    require(first == "EFAULT", first)
    require(second in {OK, "ENOENT"}, second)
    assert second == OK


@bug("a failed retrieve is remembered, whatever it failed of")
@pytest.mark.parametrize(
    ("retrieve", "refusal"),
    [
        (guest_bugs.retrieve_while_memory_is_overcommitted, "ENOSPC"),
        (guest_bugs.retrieve_in_a_small_cgroup, "ENOMEM"),
    ],
)
def test_a_file_that_found_no_memory_can_be_retrieved_later(
    landed: VM, retrieve: Callable[[], tuple[str, str]], refusal: str
) -> None:
    first, second = landed.call(retrieve)
    require(first == refusal, first)
    require(second in {OK, refusal}, second)
    assert second == OK


@bug("a retrieve that fails before it has a file forgets the pages")
def test_finishing_gives_back_the_memory_of_a_file_that_was_not_retrieved(landed: VM) -> None:
    answer, given_back = landed.call(guest_bugs.lose_a_file_without_open_files_left)
    require(answer == "ENFILE", answer)
    assert given_back >= guest_bugs.UNRETRIEVED


@bug("one allocation that fails in the first open loses every session")
def test_the_device_can_be_opened_after_an_open_that_found_no_memory(
    guest: Callable[..., VM],
) -> None:
    vm = guest("selftest")
    vm.hold(guest_bugs.preserve_for_all_tests)
    vm.live_update()
    assert vm.call(guest_bugs.open_the_device_while_allocations_fail) == OK


@bug("seals are read when a file is preserved, and not again")
def test_a_seal_added_to_a_preserved_file_holds_after_the_jump(landed: VM) -> None:
    seals = landed.call(guest_bugs.read_seals_after_jump)
    require(seals in {Seal(0), Seal.SHRINK | Seal.GROW}, repr(seals))
    assert seals == Seal.SHRINK | Seal.GROW


@bug("every file comes back open for reading and writing")
def test_a_file_preserved_read_only_comes_back_read_only(landed: VM) -> None:
    mode = landed.call(guest_bugs.read_access_mode_after_jump)
    require(mode in {os.O_RDONLY, os.O_RDWR}, str(mode))
    assert mode == os.O_RDONLY


@bug("a noexec memfd comes back write-sealed")
def test_a_memfd_sealed_noexec_comes_back_with_the_seals_it_had(vm: VM) -> None:
    vm.hold(preserve_noexec)
    vm.live_update()
    seals, mode = vm.call(read_seals_and_mode)
    added = ~Seal.SEAL & (Seal.EXEC | Seal.SHRINK | Seal.GROW | Seal.WRITE | Seal.FUTURE_WRITE)
    require((seals, mode) in {(Seal.EXEC, 0o666), (added, 0o777)}, f"{seals!r}, {mode:o}")
    assert (seals, mode) == (Seal.EXEC, 0o666)


def preserve_noexec() -> OutgoingSession:
    with LiveUpdate() as device, Memfd.create("ram", 4096, executable=False) as ram:
        session = device.create_session("s")
        session.preserve(ram, 1, allow_noexec=True)
    return session


def read_seals_and_mode() -> tuple[Seal, int]:
    with LiveUpdate() as device:
        session = device.retrieve_session("s")
    with session.retrieve(1, Memfd) as ram:
        session.finish()
        return ram.seals, os.fstat(ram.fileno()).st_mode & 0o777


@bug("a file stays preserved though the request said that it failed")
def test_a_file_whose_preserve_failed_can_be_preserved(vm: VM) -> None:
    first, second = vm.call(guest_bugs.preserve_from_read_only_memory)
    require(first == "EFAULT", first)
    require(second in {OK, "EEXIST"}, second)
    assert second == OK


@bug("the session is finished though the request said that it failed")
def test_a_session_whose_finish_failed_still_has_its_files(landed: VM) -> None:
    first, second = landed.call(guest_bugs.finish_from_read_only_memory)
    require(first == "EFAULT", first)
    require(second in {OK, "ENOENT"}, second)
    assert second == OK


@bug("the table of pages is larger than kvmalloc() takes")
def test_a_memfd_of_a_tebibyte_is_refused_without_a_kernel_warning(vm: VM) -> None:
    answer, warnings = vm.call(guest_bugs.preserve_a_sparse_file, TEBIBYTE)
    require(answer != OK, "a tebibyte fits into this guest")
    assert warnings == []


@bug("the holes filled so far stay filled")
def test_a_file_whose_preserve_failed_takes_no_more_memory_than_before(vm: VM) -> None:
    answer, before, after = vm.call(guest_bugs.preserve_what_does_not_fit_its_tmpfs)
    require(answer == "ENOSPC", answer)
    require(before == 0, f"{before} bytes taken by a file of holes")
    assert after == before


@bug("the restored file has no name, not even a memfd's prefix")
def test_a_retrieved_memfd_can_be_told_to_be_one(landed: VM) -> None:
    link = landed.call(guest_bugs.read_link_after_jump)
    require(link.startswith(("/memfd:", "/ (deleted)")), link)
    assert link.startswith("/memfd:")
