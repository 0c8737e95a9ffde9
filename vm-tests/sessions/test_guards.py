"""Tests of what pyluo refuses because the kernel would lose it, or die of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from stores import guest_store

from pyluo import (
    HandoverError,
    IncomingStore,
    KeeperChoice,
    LiveUpdate,
    Memfd,
    NotPreservableError,
    OutgoingSession,
    PreservedMemoryError,
    SessionExistsError,
    SessionNotFoundError,
    _sys,
    guards,
    kexec,
    kho,
    saved,
)
from pyluo.vm import VM, Complaint, Death, GuestCrash, HarnessError
from sessions import guest_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyluo.vm import Kernel


@pytest.mark.parametrize("memory", [512 << 20, 1 << 30])
def test_all_that_pyluo_preserves_the_next_kernel_can_carry(kernel: Kernel, memory: int) -> None:
    with VM(kernel, memory=memory) as vm:
        filled = vm.hold(fill_up)
        refusal, size = vm.call(get_refusal_and_size, filled)
        assert "64 MiB beyond them are left to the kernel" in refusal
        vm.live_update()
        assert vm.call(count_preserved) == size
        assert size > memory // 4


@pytest.mark.parametrize(("memory", "left"), [(512, 16), (1024, 32)])
def test_the_line_that_the_guard_keeps_away_from_lies_lower(
    kernel: Kernel, memory: int, left: int
) -> None:
    """The manual names these sizes too: MiB of a guest, and MiB left outside its scratch areas."""
    with VM(kernel, memory=memory << 20) as vm:
        vm.hold(fill_up_to, left << 20)
        vm.live_update()
        assert vm.updates == 1


def test_with_nothing_left_the_kernel_that_preserves_dies(cold_vm: VM) -> None:
    with pytest.raises(GuestCrash) as caught:
        cold_vm.hold(fill_up_to, 0)
    assert caught.value.cause in {Complaint.PANIC, Death.HANG, Death.SILENT_HANG}
    console = cold_vm.console
    assert "invoked oom-killer" in console or "deadlocked on memory" in console


@pytest.mark.in_guest
def test_files_that_fit_one_by_one_and_not_together_are_refused_together() -> None:
    with LiveUpdate() as device:
        session = device.create_session("s")
    files = {token: Memfd.create(str(token), 200 << 20) for token in range(8)}
    with pytest.raises(PreservedMemoryError) as caught:
        session.preserve_many(files)
    assert caught.value.preserved == ()
    assert sum(os.fstat(file.fileno()).st_blocks for file in files.values()) == 0
    session.discard()
    for file in files.values():
        file.close()


def test_pages_that_lie_in_scratch_memory_count_as_well(kernel: Kernel) -> None:
    """Pages of a file that was filled before it is preserved may have to move out of scratch."""
    with VM(kernel, memory=1 << 30) as vm:
        assert "MiB to allocate" in vm.call(preserve_a_filled_file)
        assert vm.call(count_sessions) == 1


@pytest.mark.in_guest
def test_a_file_that_was_refused_for_its_size_is_as_it_was() -> None:
    with LiveUpdate() as device, Memfd.create("sparse", 1 << 39) as sparse:
        session = device.create_session("s")
        with pytest.raises(PreservedMemoryError) as caught:
            session.preserve(sparse, 1)
        assert caught.value.errno == errno.ENOMEM
        assert isinstance(caught.value, MemoryError)
        sparse.resize(1 << 40)
        with pytest.raises(NotPreservableError, match="less than 1 TiB") as too_big:
            session.preserve(sparse, 1)
        assert too_big.value.errno == errno.EFBIG
        assert os.fstat(sparse.fileno()).st_blocks == 0
        sparse.resize(4096)
        session.preserve(sparse, 1)
        with Memfd.create("second", 1 << 39) as second, pytest.raises(PreservedMemoryError):
            session.preserve_many({2: second})
        session.discard()


@pytest.mark.in_guest
@pytest.mark.parametrize("token", [-1, 1 << 64])
def test_a_token_out_of_range_is_refused_before_anything_is_preserved(token: int) -> None:
    with LiveUpdate() as device, Memfd.create("a", 4096) as a, Memfd.create("b", 4096) as b:
        session = device.create_session("s")
        with pytest.raises(ValueError, match="a token is 0 to"):
            session.preserve(a, token)
        with pytest.raises(ValueError, match="a token is 0 to"):
            session.preserve_many({1: a, token: b})
        a.resize(8192)  # succeeds, because the file was not preserved either
        session.discard()


@pytest.mark.parametrize(
    "cmdline",
    ["", "kho=on", "kho=on liveupdate=on liveupdate=off", "kho=0", "kho=on -- liveupdate=on"],
)
def test_a_command_line_that_would_lose_everything_is_refused(shared_vm: VM, cmdline: str) -> None:
    image = os.fspath(shared_vm.kernel.image)
    with pytest.raises(HandoverError, match="take nothing over"):
        shared_vm.call(kexec.load, image, cmdline=cmdline)
    assert not shared_vm.call(kexec.loaded)
    shared_vm.call(kexec.load, image, cmdline=cmdline, handover=False)
    shared_vm.call(kexec.unload)


def test_an_image_of_unknown_origin_is_not_jumped_into(guest: Callable[..., VM]) -> None:
    vm = guest("selftest")
    vm.hold(guest_files.preserve, "vm0", 4096)
    cmdline = load_by_kexec_load(vm)
    with pytest.raises(HandoverError, match="trust_image"):
        vm.call(kexec.reboot)
    vm.call(kexec.load, os.fspath(vm.kernel.image), cmdline=cmdline)
    vm.call(kexec.unload)  # and pyluo forgets that it loaded an image
    load_by_kexec_load(vm)
    with pytest.raises(HandoverError):
        vm.call(kexec.reboot)
    vm.call(kexec.load, os.fspath(vm.kernel.image), cmdline=cmdline)
    with pytest.raises(HarnessError, match="booted again"):
        vm.call(kexec.reboot)
    assert vm.call(guest_files.inspect, "vm0")[0]


def test_an_image_loaded_by_the_older_call_takes_nothing_over_and_says_nothing(
    guest: Callable[..., VM],
) -> None:
    vm = guest("selftest")
    vm.hold(guest_files.preserve, "vm0", 4096)
    load_by_kexec_load(vm)
    with pytest.raises(HarnessError, match="booted again"):
        vm.call(kexec.reboot, trust_image=True)
    with pytest.raises(SessionNotFoundError):
        vm.call(guest_files.inspect, "vm0")
    assert vm.call(kho.status).handed_over is False


def test_a_name_that_is_taken_does_not_cost_the_next_kernel_its_life(vm: VM) -> None:
    """51 sessions fill a block; a refused name would leave an empty one, at which kernels panic."""
    vm.hold(create_51_sessions_and_one_twice)
    vm.live_update()
    assert vm.call(guest_files.token_is_known, "s50", 1) is False


def test_what_a_memory_group_has_no_room_for_is_neither_preserved_nor_retrieved(vm: VM) -> None:
    refusal = vm.call(preserve_in_a_small_group)
    assert "/small has room for" in refusal
    assert "32 MiB to allocate" in refusal
    vm.hold(guest_store.make, "store", {"ram": 32 << 20})
    vm.hold(guest_files.preserve, "raw", 4096)
    vm.live_update()
    of_store, of_session, is_intact = vm.call(retrieve_in_a_small_group)
    for refusal in (of_store, of_session):
        assert "/small has room for" in refusal
        assert "still in the session" in refusal
    assert "say how large it is" in of_session
    assert is_intact


def create_51_sessions_and_one_twice() -> list[OutgoingSession]:
    with LiveUpdate() as device:
        sessions = [device.create_session(f"s{number}") for number in range(51)]
        with pytest.raises(SessionExistsError):
            device.create_session("s0")
    return sessions


def enter_a_small_group() -> Path:
    """Move this process into a memory cgroup of 24 MiB, and return the file with that limit."""
    top = Path("/sys/fs/cgroup")
    if not (top / "cgroup.procs").exists():
        _sys.mount("cgroup", os.fspath(top), "cgroup2")
    (top / "cgroup.subtree_control").write_text("+memory")
    group = top / "small"
    group.mkdir(exist_ok=True)
    (group / "memory.max").write_text(str(24 << 20))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group / "memory.max"


def preserve_in_a_small_group() -> str:
    """Return the refusal of a file with holes; preserve one without, whose pages are charged."""
    with LiveUpdate() as device, Memfd.create("full", 32 << 20) as full:
        session = device.create_session("s")
        for offset in range(0, full.size, 1 << 20):
            full.write(b"\x5a" * (1 << 20), offset)
        saved_file = Path("/run/large")
        saved_file.write_bytes(bytes(32 << 20))
        limit = enter_a_small_group()
        with pytest.raises(PreservedMemoryError, match="in the memory cgroup /small"):
            saved.save("files", [saved_file])
        saved_file.unlink()
        session.preserve(full, 1)
        with Memfd.create("sparse", 32 << 20) as sparse:
            with pytest.raises(PreservedMemoryError) as caught:
                session.preserve(sparse, 2)
            assert os.fstat(sparse.fileno()).st_blocks == 0
            limit.write_text("max")
            session.preserve(sparse, 2)
        session.discard()
    return str(caught.value)


def retrieve_in_a_small_group() -> tuple[str, str, bool]:
    """Return both refusals, and whether the files are intact once the group may have more memory.

    The file in the session would fit, but how large it is the kernel does not tell.
    """
    limit = enter_a_small_group()
    # Finds out whether the entry is there, which was added last: this must not lose it either.
    store = IncomingStore.retrieve("store", keeper=KeeperChoice.NONE)
    with LiveUpdate() as device:
        session = device.retrieve_session("raw")
    with pytest.raises(PreservedMemoryError) as of_store:
        store["ram"]
    with pytest.raises(PreservedMemoryError) as of_session:
        session.retrieve(1)
    session.retrieve(1, size=4096).close()
    session.finish()
    limit.write_text("max")
    is_intact = guest_store.intact(store)
    store.finish(destroy=["ram"])
    return str(of_store.value), str(of_session.value), is_intact


def fill_up() -> tuple[OutgoingSession, str, int]:
    """Preserve ever smaller files until the smallest size is refused."""
    with LiveUpdate() as device:
        session = device.create_session("fill")
    size, token, total, refusal = 64 << 20, 0, 0, ""
    while size >= 1 << 20:
        with Memfd.create("part", size) as part:
            try:
                session.preserve(part, token)
            except PreservedMemoryError as error:
                refusal = str(error)
                size //= 2
                continue
        token, total = token + 1, total + size
    return session, refusal, total


def fill_up_to(left: int) -> OutgoingSession:
    """Preserve files without the guard until only `left` bytes are free outside scratch areas."""
    with LiveUpdate() as device:
        session = device.create_session("fill")
    token = 0
    while (gap := read_free_outside_scratch() - left) > 0:
        with Memfd.create("part", max(min(gap // 2, 64 << 20) >> 20, 1) << 20) as part:
            session.preserve_many({token: part}, guarded=False)
        token += 1
    return session


def read_free_outside_scratch() -> int:
    fields = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, value = line.split(":")
            fields[name] = int(value.split()[0]) << 10
    return fields["MemFree"] - fields["CmaFree"]


def get_refusal_and_size(filled: tuple[OutgoingSession, str, int]) -> tuple[str, int]:
    return filled[1], filled[2]


def count_preserved() -> int:
    from pyluo import TokenNotFoundError

    total = 0
    with LiveUpdate() as device:
        session = device.retrieve_session("fill")
    for token in range(1000):
        try:
            with session.retrieve(token, Memfd) as part:
                total += part.size
        except TokenNotFoundError:
            break
    session.finish()
    return total


def preserve_a_filled_file() -> str:
    """Fill almost all memory with one file, so that it extends into scratch memory."""
    total = guards._read_meminfo()["MemAvailable"] - (48 << 20)
    ram = Memfd.create("ram", total // 4096 * 4096)
    chunk = b"\x5a" * (1 << 20)
    for offset in range(0, ram.size - len(chunk), len(chunk)):
        ram.write(chunk, offset)
    with LiveUpdate() as device:
        session = device.create_session("s")
    try:
        session.preserve(ram, 1)
    except PreservedMemoryError as error:
        return str(error)
    finally:
        session.discard()
        ram.close()
    return ""


def count_sessions() -> int:
    with LiveUpdate() as device:
        device.create_session("s").discard()
    return 1


def load_by_kexec_load(vm: VM) -> str:
    """Load the running kernel's image by kexec_load(2), and return its command line."""
    cmdline = vm.run(["cat", "/proc/cmdline"]).stdout.decode().strip()
    image = os.fspath(vm.kernel.image)
    done = vm.run(["kexec", "--kexec-syscall", "--load", image, "--command-line", cmdline])
    assert done.returncode == 0, done.stderr
    assert vm.call(kexec.loaded)
    return cmdline
