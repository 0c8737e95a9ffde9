"""Tests of carrying files over a live update by the command line."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sessions import guest_files

from pyluo.open_sessions import open_sessions
from stores import guest_saved
from tests.json_output import read_json
from tests.snippets import command

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from pyluo.vm import VM

PYLUO = os.fspath(Path(sys.executable).parent / "pyluo")
SMALL_FILES = int(os.environ.get("PYLUO_SAVED_FILES", "1200"))
PATHS = [os.fspath(guest_saved.FOLDER / name) for name in guest_saved.FILES]


@pytest.fixture
def vm(vm: VM) -> Iterator[VM]:
    """A guest from which the test's files are removed afterwards, so that it can be used again."""
    yield vm
    if not vm.dead:
        vm.call(guest_saved.remove_files)


def pyluo(vm: VM, *words: str) -> subprocess.CompletedProcess[bytes]:
    return vm.run([PYLUO, *words])


def shown(number: int, replaced: dict[str, str]) -> list[str]:
    """Return the words of a command line of the page, behind `pyluo`."""
    return shlex.split(command("docs/guides/files.md", number, replaced))[1:]


def test_files_come_back_as_they_were(vm: VM) -> None:
    files = vm.call(guest_saved.make_files)
    saved = pyluo(vm, "save", "--json", "vm0", "--", *PATHS)
    assert saved.returncode == 0, saved.stderr
    report = read_json("save", saved.stdout)
    assert {file["name"]: file["sha256"] for file in report["files"]} == {
        name: digest for name, (_, _, digest) in files.items()
    }
    (holder,) = vm.call(open_sessions)
    assert (holder.session, holder.direction) == ("vm0", "outgoing")
    assert holder.command == "pyluo-holder"
    assert report["kept_by"] == f"process {holder.pid}"
    vm.live_update()
    restored = pyluo(vm, "restore", "--json", "vm0", "/run/target")
    assert restored.returncode == 0, restored.stderr
    assert read_json("restore", restored.stdout) == {"session": "vm0", "files": report["files"]}
    assert vm.call(guest_saved.describe, Path("/run/target")) == files
    assert vm.call(open_sessions) == []
    assert vm.call(guest_saved.list_sockets) == []
    again = pyluo(vm, "restore", "vm0", "/run/target")
    assert again.returncode == 1
    assert b"ENOENT" in again.stderr


def test_what_was_saved_can_be_discarded_on_either_side(vm: VM) -> None:
    vm.call(guest_saved.make_files)
    files = f"-- {shlex.join(PATHS)}"
    for name in ("vm0", "vm1"):
        assert pyluo(vm, *shown(0, {"NAME": name, "FILE...": files})).returncode == 0
    refused = pyluo(vm, "save", "vm0", "--", *PATHS)
    assert refused.returncode == 1
    assert b"EEXIST" in refused.stderr
    discarded = pyluo(vm, *shown(2, {"NAME": "vm0"}))
    assert b"outgoing session 'vm0' is discarded" in discarded.stdout
    assert [holder.session for holder in vm.call(open_sessions)] == ["vm1"]
    assert pyluo(vm, "save", "vm0", "--", *PATHS).returncode == 0
    vm.live_update()
    discarded = pyluo(vm, "discard", "--json", "vm1")
    assert read_json("discard", discarded.stdout) == {"session": "vm1", "direction": "incoming"}
    restored = pyluo(vm, *shown(1, {"NAME": "vm0", "DIR": "/run/target"}))
    assert b"Session 'vm0' is finished." in restored.stdout, restored.stderr
    gone = pyluo(vm, "discard", "vm1")
    assert gone.returncode == 1
    assert b"ENOENT" in gone.stderr
    assert vm.call(open_sessions) == []


def test_a_restore_that_fails_loses_nothing_and_can_be_run_again(vm: VM) -> None:
    files = vm.call(guest_saved.make_files)
    assert pyluo(vm, "save", "vm0", "--", *PATHS).returncode == 0
    vm.live_update()
    vm.call(guest_saved.create_conflicting_file, "/run/target", "run me")
    refused = pyluo(vm, "restore", "vm0", "/run/target")
    assert refused.returncode == 1
    assert b"run me in /run/target" in refused.stderr
    assert vm.call(guest_saved.list_names, "/run/target") == ["run me"]
    (holder,) = vm.call(open_sessions)
    assert (holder.session, holder.direction) == ("vm0", "incoming")
    assert pyluo(vm, "restore", "--force", "vm0", "/run/target").returncode == 0
    assert vm.call(guest_saved.describe, Path("/run/target")) == files
    assert vm.call(open_sessions) == []


def test_what_root_restores_stays_in_the_folder_whatever_its_owner_does(vm: VM) -> None:
    assert "which another user can change" in vm.call(
        guest_saved.save_what_the_owner_of_a_folder_links_to
    )
    vm.call(guest_saved.make_files)
    assert pyluo(vm, "save", "vm0", "--", *PATHS).returncode == 0
    vm.live_update()
    vm.call(guest_saved.restore_where_the_owner_changes_the_path, "vm0")


def test_a_restore_that_is_killed_half_way_is_run_again(vm: VM) -> None:
    files = vm.call(guest_saved.make_files)
    assert pyluo(vm, "save", "vm0", "--", *PATHS).returncode == 0
    vm.live_update()
    there = vm.call(guest_saved.interrupt_after_the_first_name, "vm0", "/run/target")
    assert len(there) == 1
    assert pyluo(vm, "restore", "vm0", "/run/target").returncode == 0
    assert vm.call(guest_saved.describe, Path("/run/target")) == files
    assert vm.call(open_sessions) == []
    assert vm.call(guest_saved.restore_as_another_user) == 0o755


def test_a_file_that_is_not_what_was_saved_is_not_restored(vm: VM) -> None:
    vm.hold(guest_saved.make_stores_that_save_did_not_make)
    vm.live_update()
    wrong = pyluo(vm, "restore", "wrong digest", "/run/target")
    assert wrong.returncode == 1
    assert b"It is not what was saved" in wrong.stderr
    evil = pyluo(vm, "restore", "elsewhere", "/run/target")
    assert evil.returncode == 1
    assert b"not made by `pyluo save`" in evil.stderr
    partly = pyluo(vm, "restore", "partly", "/run/target")
    assert partly.returncode == 1
    assert b"not made by a `pyluo save` that completed" in partly.stderr
    refused = pyluo(vm, "discard", "partly")
    assert refused.returncode == 1
    assert vm.call(guest_saved.read_entry_size, "partly", "file") == 4096
    assert pyluo(vm, "discard", "--force", "partly").returncode == 0
    assert vm.call(guest_saved.list_names, "/run/target") == []
    assert vm.call(guest_saved.list_names, "/run/evil") == []
    assert vm.call(guest_saved.read_entry_size, "wrong digest", "file") == 4096
    assert vm.call(guest_saved.read_entry_size, "elsewhere", "../evil") == 4096


def test_a_session_that_is_no_store_is_neither_restored_nor_destroyed(vm: VM) -> None:
    vm.hold(guest_files.preserve, "plain", 4096)
    vm.live_update()
    for words in (["restore", "plain", "/run/target"], ["discard", "plain"]):
        refused = pyluo(vm, *words)
        assert refused.returncode == 1
        assert b"no table of contents" in refused.stderr
        assert vm.call(guest_saved.read_kept_file, "plain", 1) == guest_files.pattern(4096)
    assert pyluo(vm, "discard", "--force", "plain").returncode == 0
    assert vm.call(open_sessions) == []
    assert vm.call(guest_saved.list_sockets) == []


def test_what_is_not_there_is_not_restored_and_leaves_no_process(vm: VM) -> None:
    for words in (["restore", "typo", "/run/target"], ["discard", "typo"]):
        refused = pyluo(vm, *words)
        assert refused.returncode == 1
        assert b"ENOENT" in refused.stderr
        assert vm.call(guest_saved.list_sockets) == []


def test_more_files_than_a_process_may_open_are_saved_and_restored(vm: VM) -> None:
    digests = vm.call(guest_saved.make_small_files, SMALL_FILES)
    saved = run_with_few_descriptors(vm, f"save vm0 -- {guest_saved.FOLDER}/*")
    assert saved.returncode == 0, saved.stderr
    vm.live_update()
    restored = run_with_few_descriptors(vm, "restore vm0 /run/target")
    assert restored.returncode == 0, restored.stderr
    assert vm.call(guest_saved.read_digests, Path("/run/target")) == digests
    assert vm.call(open_sessions) == []


def run_with_few_descriptors(vm: VM, words: str) -> subprocess.CompletedProcess[bytes]:
    """Run `pyluo` where no process may have more than 1024 descriptors open, as is usual."""
    command = f"ulimit -n 1024 && exec {shlex.quote(PYLUO)} {words}"
    return vm.run(["sh", "-c", command], timeout=SMALL_FILES)


def test_a_holder_that_is_killed_takes_what_was_saved_with_it_and_leaves_no_trace(vm: VM) -> None:
    vm.call(guest_saved.make_files)
    assert pyluo(vm, "save", "vm0", "--", *PATHS).returncode == 0
    vm.call(guest_saved.kill_holder, "vm0")
    assert vm.call(open_sessions) == []
    assert pyluo(vm, "discard", "vm0").returncode == 1
    assert pyluo(vm, "save", "vm0", "--", *PATHS).returncode == 0
    assert pyluo(vm, "discard", "vm0").returncode == 0
    assert vm.call(guest_saved.list_sockets) == []


def test_a_holder_answers_its_own_user_and_nobody_else(vm: VM) -> None:
    vm.call(guest_saved.make_files)
    assert pyluo(vm, "save", "vm0", "--", *PATHS).returncode == 0
    at_the_folder, at_the_socket = vm.call(guest_saved.ask_as_another_user)
    assert at_the_folder == "PermissionError"
    assert at_the_socket in (b"answered (b'', [])", b"ConnectionResetError", b"BrokenPipeError")
    assert "0700" in vm.call(guest_saved.use_a_folder_that_others_may_enter)
    assert vm.call(guest_saved.connect_and_stay_silent)
    assert pyluo(vm, "discard", "vm0").returncode == 0


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["save", "s", "/run"], 2, "/run is not a regular file"),
        (["save", "s", "/etc/passwd", "/etc/../etc/passwd"], 2, "have the same name"),
        (["save", "s", "/no/such/file"], 1, "/no/such/file"),
        (["save", "x" * 64, "/etc/passwd"], 1, "1 to 63 bytes"),
        (["save", "s"], 2, "required: FILE"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_done(
    shared_vm: VM, words: list[str], status: int, complaint: str
) -> None:
    done = pyluo(shared_vm, *words)
    assert done.returncode == status
    assert complaint in done.stderr.decode()
    assert shared_vm.call(open_sessions) == []


def test_what_does_not_fit_is_refused_before_anything_is_done(cold_vm: VM) -> None:
    sparse = cold_vm.call(guest_saved.make_sparse, 1 << 30)
    done = pyluo(cold_vm, "save", "s", sparse)
    assert done.returncode == 1
    assert errno.errorcode[errno.ENOMEM] in done.stderr.decode()
    assert cold_vm.call(open_sessions) == []
