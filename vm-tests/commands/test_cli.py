"""Tests of the commands that start a guest, or run in one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import textwrap
from typing import TYPE_CHECKING

import pytest

from pyluo.vm import VM, Kernel
from tests.json_output import read_json
from tests.snippets import ROOT, run_command

if TYPE_CHECKING:
    from pathlib import Path

MODULE = [sys.executable, "-m", "pyluo"]
TREE = "docs/guides/kernel-tree.md"
OUTPUT = re.compile(r"<!-- output of make demo -->\n\n(.*)\n<!-- end of output -->", re.DOTALL)


def test_status_on_a_host_that_can_live_update(shared_vm: VM) -> None:
    done = shared_vm.run([*MODULE, "status", "--json"])
    assert done.returncode == 0, done.stderr
    status = read_json("status", done.stdout)
    assert status["live_update"] is True
    assert status["updates"] == 0
    text = shared_vm.run([*MODULE, "status"])
    assert f"Linux {shared_vm.life.release} can live-update" in text.stdout.decode()


def test_the_doctor_finds_a_guest_ready(shared_vm: VM) -> None:
    done = shared_vm.run([*MODULE, "doctor", "live-update", "--json"])
    assert done.returncode == 0, done.stderr
    checks = {check["subject"]: check for check in read_json("doctor", done.stdout)["live-update"]}
    for subject in (
        "kernel",
        "access to the device",
        "memory",
        "loading the next kernel",
        "memfds",
    ):
        assert checks[subject]["verdict"] == "ready", checks[subject]
    # The guest has no IOMMU, and says how to get one.
    assert checks["IOMMU"]["verdict"] == "limited"
    assert "intel_iommu=on" in checks["IOMMU"]["remedy"]


def test_the_doctor_says_what_keeps_a_kernel_from_a_live_update() -> None:
    with VM(append="liveupdate=off") as vm:
        vm.run(["sh", "-c", "echo 1 >/proc/sys/kernel/kexec_load_disabled"])
        vm.run(["sh", "-c", "echo 2 >/proc/sys/vm/memfd_noexec"])
        done = vm.run([*MODULE, "doctor", "live-update", "--json"])
    assert done.returncode == 1
    checks = read_json("doctor", done.stdout)["live-update"]
    missing = {each["subject"]: each["found"] for each in checks if each["verdict"] == "missing"}
    assert "liveupdate=on" in missing["kernel"]
    assert missing["loading the next kernel"] == "kernel.kexec_load_disabled is 1"
    assert "vm.memfd_noexec=2" in missing["memfds"]


def test_kexec_loads_looks_and_unloads(shared_vm: VM) -> None:
    image = os.fspath(shared_vm.kernel.image)
    for action, status in (
        (["loaded"], 1),
        (["load", image, "--reuse-cmdline", "--json"], 0),
        (["loaded", "--json"], 0),
        (["unload"], 0),
        (["reboot"], 1),
    ):
        done = shared_vm.run([*MODULE, "kexec", *action])
        assert done.returncode == status, (action, done.stderr)
        if action[0] == "load":
            assert read_json("kexec load", done.stdout)["release"] == shared_vm.life.release
        elif "--json" in action:
            assert read_json("kexec loaded", done.stdout) == {"loaded": True}


def test_the_demo_passes_and_tells_the_moments_in_order() -> None:
    done = pyluo("demo", "--json")
    assert done.returncode == 0, done.stderr
    report = read_json("demo", done.stdout)
    assert report["passed"] is True
    assert report["preserved"] == report["retrieved"]
    assert [event["name"] for event in report["timeline"]["events"]] == [
        "loaded", "reboot called", "first sign of the new kernel", "worker up",
        "session retrieved", "descriptor retrieved", "finished",
    ]  # fmt: skip
    assert report["blackout"] > 0


def test_make_demo_prints_what_the_readme_shows() -> None:
    binaries = os.path.dirname(sys.executable)
    # The packages and the environment are there.
    made = [f"BIN={binaries}", "-o", "packages", "-o", f"{binaries}/.vm", "--no-print-directory"]
    done = run_command("README.md", 0, None, *made, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    [shown] = OUTPUT.findall((ROOT / "README.md").read_text())
    # Numbers, versions and checksums differ, and the columns with them.
    one, other = (
        re.sub(r"\b([0-9a-f]{64}|\d+(\.\d+)*)\b", "N", re.sub(" +", " ", text)).strip()
        for text in (done.stdout, textwrap.dedent(shown))
    )
    assert one == other


def test_the_demo_fails_when_a_byte_is_flipped() -> None:
    done = pyluo("demo", "--corrupt")
    assert done.returncode == 1
    assert b"FAILED" in done.stdout


@pytest.mark.parametrize("command", ["true", "echo c >/proc/sysrq-trigger"])
def test_a_report_has_all_about_a_run_whatever_came_of_it(tmp_path: Path, command: str) -> None:
    file = tmp_path / "report.tar.gz"
    words = ["--before", "true", "--after", f"sh -c '{command}'"]
    done = pyluo("vm", "live-update", *words, "--report", os.fspath(file))
    assert done.returncode == (0 if command == "true" else 1), done.stderr
    with tarfile.open(file) as archive:
        texts = {
            name.removeprefix("pyluo-report/"): archive.extractfile(name).read().decode()  # type: ignore[union-attr]
            for name in archive.getnames()
        }
    assert texts["outcome.txt"].startswith("exit status 0 before the jump\n")
    assert ("GuestCrash" in texts["outcome.txt"]) == (command != "true")
    assert ("exit status 0 after the jump" in texts["outcome.txt"]) == (command == "true")
    assert ("sysrq: Trigger a crash" in texts["guest-1/console.txt"]) == (command != "true")
    [jump] = json.loads(texts["guest-1/jumps.json"])["jumps"]
    assert jump["blackout"] > 0
    [config] = [name for name in texts if name.startswith("kernels/")]
    assert "CONFIG_LIVEUPDATE=y" in texts[config].splitlines()
    assert texts["command.txt"].startswith("pyluo vm live-update --before true")
    assert {"pyluo", "python", "host"} == set(json.loads(texts["versions.json"]))
    assert os.path.expanduser("~") + "/" not in "".join(texts.values())


def test_a_report_has_the_death_of_a_guest_that_was_only_counted(tmp_path: Path) -> None:
    file = tmp_path / "report.tar.gz"
    no_root = "initcall_blacklist=init_v9fs"
    done = pyluo("vm", "live-update", "--append", no_root, "--report", os.fspath(file))
    assert done.returncode == 1, done.stderr
    with tarfile.open(file) as archive:
        outcome = archive.extractfile("pyluo-report/outcome.txt").read().decode()  # type: ignore[union-attr]
    assert outcome.startswith("0 of 0 live updates came back\n")
    assert "Unable to mount root fs" in outcome


@pytest.mark.parametrize(("command", "status"), [("exit 5", 5), ("kill -9 $$", 137)])
def test_run_relays_output_and_status(command: str, status: int) -> None:
    done = pyluo("vm", "run", "--", "sh", "-c", f"echo out; echo err >&2; {command}")
    assert (done.returncode, done.stdout) == (status, b"out\n")
    assert done.stderr.endswith(b"err\n")


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("no-such-program", 127, b"the guest has no "),
        ("program/within", 126, b"cannot be run: Not a directory"),
        ("program", 126, b"cannot be run: Permission denied"),
        ("no-format", 126, b"cannot be run: Exec format error"),
    ],
)
def test_run_tells_what_cannot_be_run_from_what_is_not_there(
    tmp_path: Path, name: str, status: int, message: bytes
) -> None:
    (tmp_path / "program").write_text("#!/bin/sh\n")
    (tmp_path / "no-format").write_text("exit 0\n")
    (tmp_path / "no-format").chmod(0o755)
    done = pyluo("vm", "run", "--", os.fspath(tmp_path / name))
    assert done.returncode == status
    assert message in done.stderr


def test_a_program_runs_on_a_kernel() -> None:
    done = run_command(TREE, 0, {"--kernel .": "--kernel previous"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == Kernel.find("previous").release


def test_live_update_runs_a_program_on_each_side() -> None:
    done = pyluo(
        "vm", "live-update", "--kernel", "previous", "--to", "stable",
        "--before", "uname -r", "--after", "uname -r",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    releases = [Kernel.find(name).release for name in ("previous", "stable")]
    assert done.stdout.decode().split() == releases


def test_live_updates_are_counted_shown_as_they_happen_and_drawn(tmp_path: Path) -> None:
    words = ["--cpus", "2", "--watch", "--json", "--plot", f"{tmp_path}/drawn.svg"]
    replaced = {"--kernel .": "--kernel stable", "--hops 20": "--hops 2"}
    done = run_command(TREE, 1, replaced, *words, timeout=120)
    assert done.returncode == 0, done.stderr
    tally = read_json("vm live-update", done.stdout)
    assert (tally["hops"], tally["landed"], tally["failures"]) == (2, 2, [])
    shown = [line.strip().partition(" s  ")[2] or line for line in done.stderr.split("\n")]
    jump = ["loaded", "reboot called", "first sign of the new kernel", "worker up"]
    expected = ["cold boot", *jump[2:], "live update 1", *jump, "live update 2", *jump]
    assert [line for line in shown if line in expected] == expected
    drawn = (tmp_path / "drawn.svg").read_text()
    assert "1: stable to stable, blackout" in drawn
    assert "2: stable to stable, blackout" in drawn


def test_a_watcher_that_is_gone_costs_no_verdict() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*MODULE, "vm", "live-update", "--watch", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, timeout=120)
    os.close(write)
    tally = read_json("vm live-update", done.stdout)
    assert (tally["landed"], tally["failures"]) == (1, [])


def test_live_updates_that_were_never_tried_are_no_success() -> None:
    done = pyluo("vm", "live-update", "--hops", "2", "--append", "rootfstype=nothing", "--json")
    assert done.returncode == 1
    tally = read_json("vm live-update", done.stdout)
    assert (tally["hops"], tally["landed"], len(tally["failures"])) == (0, 0, 1)


def test_a_crash_while_counting_is_counted_and_fails_the_run() -> None:
    done = pyluo("vm", "live-update", "--before", "sh -c 'echo c > /proc/sysrq-trigger'")
    assert done.returncode == 1
    assert b"sysrq triggered crash" in done.stderr


def test_jumps_from_a_kernel_that_hands_nothing_over_do_not_count_as_live_updates() -> None:
    done = pyluo("vm", "live-update", "--append", "kho_scratch=2G,0,0")
    assert done.returncode == 69, done.stdout
    assert b"no room in memory for the scratch areas" in done.stderr


def pyluo(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*MODULE, *arguments], capture_output=True, timeout=120)
