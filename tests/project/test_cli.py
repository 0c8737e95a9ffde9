from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyluo
from pyluo import kho
from pyluo.cli import main
from tests.json_output import read_json


@pytest.fixture
def no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the device, so that the tests below also pass on a host with live update."""
    monkeypatch.setattr("pyluo.kho.DEVICE", os.fspath(tmp_path / "liveupdate"))


@pytest.mark.usefixtures("no_device")
def test_status_says_what_is_missing_and_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 1
    output = capsys.readouterr().out
    assert "cannot live-update" in output
    obstacles = kho.status().obstacles
    assert obstacles
    for obstacle in obstacles:
        assert f"{obstacle.missing}: {obstacle.remedy}." in output


@pytest.mark.usefixtures("no_device")
def test_status_tells_a_program_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 1
    status = read_json("status", capsys.readouterr().out)
    assert status["live_update"] is False
    assert status["release"] == os.uname().release
    assert all(obstacle["missing"] and obstacle["remedy"] for obstacle in status["obstacles"])
    assert status["obstacles"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["kexec", "load", __file__],  # it has no command line
        ["vm", "live-update", "--hops", "0"],
        ["vm", "live-update", "--before", "echo 'x"],
        ["demo", "--size", "4X"],
        ["demo", "--vm", "--corrupt"],
    ],
)
def test_a_wrong_command_line_is_a_matter_of_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pyluo" in capsys.readouterr().err


def test_a_harness_that_cannot_work_says_so_in_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["vm", "kernel", "build", "no-such-kernel"]) == 69
    message = capsys.readouterr().err
    assert message.startswith("pyluo: there is no kernel 'no-such-kernel'")
    assert message.count("\n") == 1


def test_without_a_network_and_a_cache_it_says_what_else_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    monkeypatch.setenv("PYLUO_DEBIAN_MIRROR", f"file:{tmp_path}/no-archive")
    assert main(["vm", "kernel", "build"]) == 69
    assert "the package archive cannot be read" in capsys.readouterr().err


def test_a_refusal_of_the_kernel_fails_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kexec", "load", "/no/such/image", "--reuse-cmdline"]) == 1
    assert "/no/such/image" in capsys.readouterr().err


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"pyluo {version('pyluo')}\n"


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--version"], 69), (["demo", "--help"], 69), (["vm", "bisect", "--help"], 125)],
)
def test_what_cannot_be_printed_is_no_pass(
    words: list[str],
    status: int,
    broken_output: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, "-m", "pyluo", *words]
    done = subprocess.run(command, stdout=broken_output, stderr=subprocess.PIPE, text=True)
    assert done.returncode == status
    full = "full" in request.node.callspec.id
    message = "pyluo: the output could not be printed: No space left on device\n"
    assert done.stderr == (message if full else "")
    assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=broken_output).returncode == 0


@pytest.mark.parametrize(
    ("words", "status"),
    [(["no-such-command"], 2), (["kexec", "load", "/no/such/image", "--reuse-cmdline"], 1)],
)
def test_a_failure_that_cannot_be_printed_stays_one(
    words: list[str], status: int, broken_output: int
) -> None:
    command = [sys.executable, "-m", "pyluo", *words]
    assert subprocess.run(command, stdout=broken_output, stderr=broken_output).returncode == status


SHOW_PROGRESS = (
    "from pyluo.cli.saved import _progress_bar as bar\n"
    "with bar('saving', 64 << 20) as report: report(32 << 20)\n"
)


def test_progress_is_shown_on_a_terminal_and_nowhere_else() -> None:
    terminal, child_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    subprocess.run(
        [sys.executable, "-c", SHOW_PROGRESS], stderr=child_end, env=environment, check=True
    )
    os.close(child_end)
    shown = os.read(terminal, 1 << 16)
    os.close(terminal)
    piped = subprocess.run(
        [sys.executable, "-c", SHOW_PROGRESS], stderr=subprocess.PIPE, check=True
    )
    assert b"saving, MiB" in shown
    assert piped.stderr == b""


@pytest.mark.parametrize(
    ("words", "broken", "status"),
    [
        (["vm", "bisect", "test_it.py"], "argparse.py", 125),
        (["vm", "bisect", "test_it.py"], "pyluo/cli/vm/bisect.py", 125),
        (["status"], "argparse.py", 69),
        (["status"], "pyluo/cli/status.py", 69),
        (["status"], "pyluo/_ffi.py", 69),
    ],
)
def test_a_pyluo_that_is_broken_is_no_verdict(
    tmp_path: Path, words: list[str], broken: str, status: int
) -> None:
    copy = tmp_path / "pyluo"
    shutil.copytree(Path(pyluo.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / broken).write_text("raise ImportError('broken')\n")
    done = subprocess.run(
        [sys.executable, "-m", "pyluo", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert "ImportError: broken" in done.stderr
