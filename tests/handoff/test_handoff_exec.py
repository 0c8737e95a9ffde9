"""Handing over through exec: with real programs, and with variables not set by `exec_with`."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyluo import HandoffError, Memfd, OwnedFd, Seal, handoff
from pyluo.handoff.manifest import Entry, Manifest
from pyluo.handoff.through_exec import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SEALS = Seal.SEAL | Seal.SHRINK | Seal.GROW | Seal.WRITE

BEFORE = """
import os, sys
from pyluo import HandoffError, Memfd, OwnedFd, handoff
def memfd(text):
    file = Memfd.create("file", 0)
    file.write(text.encode(), 0)
    return file
"""
# Prints what it received, as JSON, and the descriptors that it leaked.
AFTER = """
import fcntl, hashlib, json, os
from pyluo import handoff
taken = handoff.inherited()
with taken:
    print(json.dumps({
        "files": {name: [
            file.fileno(), os.pread(file.fileno(), 100, 0).decode() if name[0] != "-" else "",
            os.get_inheritable(file.fileno()),
        ] for name, file in taken.files.items()},
        "state": hashlib.sha256(taken.state).hexdigest(),
        "pid": os.getpid(),
        "peer": taken.peer,
        "variable": os.environ.get("PYLUO_HANDOFF"),
    }), flush=True)
print(sorted(map(int, os.listdir("/proc/self/fd")))[3:-1])
"""


def open_fds() -> dict[str, tuple[str, bool]]:
    """Return the link of each open descriptor, and whether a child would inherit it."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself is closed
            found[number] = (
                os.readlink(f"/proc/self/fd/{number}"),
                os.get_inheritable(int(number)),
            )
    return found


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


def run(before: str, after: str = AFTER, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program; NEXT in its text is the argv of the program that it executes."""
    script = BEFORE + f"NEXT = {[sys.executable, '-c', after]!r}\n" + before
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done


def read_report(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], list[int]]:
    """Return what the second program received, and the descriptors that it leaked."""
    given, still_open = done.stdout.splitlines()[-2:]
    return json.loads(given), json.loads(still_open)


def test_the_next_program_finds_descriptors_and_state_where_they_were() -> None:
    found, still_open = read_report(
        run(
            """
files = {name: memfd(name) for name in ("ram", "log \\n", "é")}
print(os.getpid(), *(file.fileno() for file in files.values()), flush=True)
handoff.exec_with(NEXT, files, b"state" * 1_000_000)
"""
        )
    )
    assert found["state"] == hashlib.sha256(b"state" * 1_000_000).hexdigest()
    assert {name: file[1:] for name, file in found["files"].items()} == {
        name: [name, False] for name in ("ram", "log \n", "é")
    }
    assert list(found["files"]) == ["ram", "log \n", "é"]
    assert found["variable"] is None
    assert found["peer"] is None
    assert still_open == []


def test_process_and_numbers_stay_the_same() -> None:
    done = run(
        """
ram = memfd("ram")
print(os.getpid(), ram.fileno(), flush=True)
handoff.exec_with(NEXT, {"ram": ram})
"""
    )
    pid, number = map(int, done.stdout.splitlines()[0].split())
    found, _ = read_report(done)
    assert found["pid"] == pid
    assert found["files"]["ram"][0] == number


def test_many_descriptors_go_through_exec() -> None:
    found, still_open = read_report(
        run("handoff.exec_with(NEXT, {str(n): memfd(str(n)) for n in range(500)})")
    )
    assert [file[1] for file in found["files"].values()] == [str(n) for n in range(500)]
    assert still_open == []


def test_nothing_but_a_state_can_be_handed_over() -> None:
    found, still_open = read_report(run("handoff.exec_with(NEXT, {})"))
    assert found["files"] == {}
    assert found["state"] == hashlib.sha256(b"").hexdigest()
    assert still_open == []


def test_a_standard_stream_is_handed_over_as_a_duplicate() -> None:
    """Otherwise the next program would lose its output when it closes what it received."""
    found, still_open = read_report(
        run('handoff.exec_with(NEXT, {"-in": 0, "-out": 1, "-err": 2})')
    )
    assert all(number > 2 for number, _, _ in found["files"].values())
    assert still_open == []


def test_nothing_becomes_a_standard_stream_though_these_are_closed() -> None:
    done = run(
        """
out = os.dup(1)
for number in (0, 1, 2):
    os.close(number)
files = {"ram": memfd("ram"), "out": out}
assert files["ram"].fileno() == 0
handoff.exec_with(NEXT, files)
""",
        """
import os
from pyluo import Memfd, handoff
with handoff.inherited() as taken:
    out = taken.take("out")
    for name, file in taken.files.items():
        os.write(out.fileno(), os.pread(file.fileno(), 100, 0) + b" %d\\n" % (file.fileno() > 2))
    out.close()
""",
    )
    assert done.stdout == "ram 1\n"


def test_a_descriptor_with_two_names_is_two_descriptors() -> None:
    found, still_open = read_report(
        run('ram = memfd("x"); handoff.exec_with(NEXT, {"a": ram, "b": ram.fileno(), "c": ram})')
    )
    assert len({number for number, _, _ in found["files"].values()}) == 3
    assert [text for _, text, _ in found["files"].values()] == ["x", "x", "x"]
    assert still_open == []


def test_the_environment_is_the_one_that_was_given_and_the_callers_is_as_before() -> None:
    done = run(
        """
try:
    handoff.exec_with(["/nowhere"], {}, env={"A": "b"})
except HandoffError:
    assert "PYLUO_HANDOFF" not in os.environ
handoff.exec_with(NEXT, {}, env={"A": "b", "PYLUO_HANDOFF": "of another"})
""",
        "import os; from pyluo import handoff\n"
        "handoff.inherited().close(); print(dict(os.environ))",
    )
    assert "'A': 'b'" in done.stdout
    assert "PYLUO_HANDOFF" not in done.stdout


def test_one_program_after_the_other_hands_over() -> None:
    middle = """
import json, os, sys
from pyluo import handoff
taken = handoff.inherited()
handoff.exec_with([sys.executable, "-c", os.environ["LAST"]], taken.files, taken.state + b"!")
"""
    found, still_open = read_report(
        run(
            'handoff.exec_with(NEXT, {"a": memfd("a"), "b": memfd("b")}, b"state")',
            middle,
            env=os.environ | {"LAST": AFTER},
        )
    )
    assert list(found["files"]) == ["a", "b"]
    assert found["state"] == hashlib.sha256(b"state!").hexdigest()
    assert still_open == []


def test_a_child_does_not_take_what_its_parent_was_given() -> None:
    child = (
        "from pyluo import handoff, HandoffError\n"
        "try:\n handoff.inherited()\n"
        "except HandoffError as error:\n print(error.errno, error, flush=True)\n"
    )
    after = f"""
import subprocess, sys
from pyluo import handoff
subprocess.run([sys.executable, "-c", {child!r}], close_fds=False)
with handoff.inherited() as taken:
    print(list(taken.files))
"""
    done = run('handoff.exec_with(NEXT, {"ram": memfd("ram")})', after)
    first, *_, last = done.stdout.splitlines()
    assert first.startswith(f"{errno.ESTALE} ")
    assert "It is for process" in first
    assert last == "['ram']"


# A program that cannot be run


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        (None, "", errno.ENOENT),
        (0o644, "", errno.EACCES),
        (0o755, "no program", errno.ENOEXEC),
        (0o755, "#!/nowhere\n", errno.ENOENT),
    ],
)
def test_a_program_that_cannot_be_run_leaves_everything_as_it_was(
    tmp_path: Path, mode: int | None, text: str, expected: int
) -> None:
    program = tmp_path / "program"
    if mode is not None:
        program.write_text(text)
        program.chmod(mode)
    with ExitStack() as stack:
        close_on_exec = stack.enter_context(Memfd.create("a", 0))
        inheritable = stack.enter_context(Memfd.create("b", 0))
        os.set_inheritable(inheritable.fileno(), True)
        before, environment = open_fds(), dict(os.environ)
        files: dict[str, OwnedFd | int] = {
            "a": close_on_exec,
            "b": inheritable,
            "again": close_on_exec,
            "out": 1,
        }
        with pytest.raises(HandoffError) as caught:
            handoff.exec_with([os.fspath(program)], files, b"state")
        assert caught.value.errno == expected
        assert "program" in str(caught.value)
        assert open_fds() == before
        assert dict(os.environ) == environment


def test_what_cannot_be_handed_over_is_refused_and_leaves_everything_as_it_was() -> None:
    with Memfd.create("a", 0) as memfd:
        before = open_fds()
        with pytest.raises(ValueError, match="no program"):
            handoff.exec_with([], {"a": memfd})
        with pytest.raises(ValueError, match="1 to 255 bytes"):
            handoff.exec_with(["true"], {"a": memfd, "": memfd})
        with pytest.raises(HandoffError) as caught:
            handoff.exec_with(["true"], {"a": memfd, "b": 999_999})
        assert caught.value.errno == errno.EBADF
        free = fcntl.fcntl(
            0, fcntl.F_DUPFD_CLOEXEC, 3
        )  # the duplicate of 0 will get this number too
        os.close(free)
        with pytest.raises(HandoffError) as caught:
            handoff.exec_with(["true"], {"a": 0, "b": free, "c": memfd})
        assert caught.value.errno == errno.EBADF
        with pytest.raises(ValueError, match="null"):
            handoff.exec_with(["/bin/true", "\0"], {"a": memfd})
        assert open_fds() == before


# A variable that means something else


def test_without_a_program_before_this_one_there_is_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(HandoffError) as caught:
        handoff.inherited()
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    "value", ["", "x", "-1", "0", "1", "2", "999999", "9" * 30, "+3", "2147483648"]
)
def test_a_variable_that_names_no_manifest_is_an_error(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(HandoffError) as caught:
        handoff.inherited()
    assert caught.value.errno == errno.EBADMSG
    assert VARIABLE not in os.environ


def inherit(monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> handoff.Handoff:
    """Call `inherited` with a manifest, which it closes if it accepts it."""
    with manifest.to_memfd() as memfd:
        monkeypatch.setenv(VARIABLE, str(memfd.fileno()))
        found = handoff.inherited()
        memfd.detach()
        return found


def entry(name: str, file: OwnedFd, number: int | None = None) -> Entry:
    return Entry.of(name, file.fileno(), file.fileno() if number is None else number)


def test_a_manifest_of_this_process_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = Memfd.create("ram", 0)
    os.set_inheritable(ram.fileno(), True)
    manifest = Manifest((entry("ram", ram),), b"state", os.getpid())
    with inherit(monkeypatch, manifest) as found, found.take("ram", Memfd) as taken:
        assert ram.detach() == taken.fileno()
        assert not os.get_inheritable(taken.fileno())
        assert found.state == b"state"
    with pytest.raises(HandoffError) as caught:
        handoff.inherited()
    assert caught.value.errno == errno.ENOENT


def test_a_manifest_of_another_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Memfd.create("ram", 0) as ram:
        for pid in (0, 1, os.getppid()):
            with pytest.raises(HandoffError) as caught:
                inherit(monkeypatch, Manifest((entry("ram", ram),), b"", pid))
            assert caught.value.errno == errno.ESTALE
        ram.fileno()


@pytest.mark.parametrize("expected", [errno.EBADF, errno.ESTALE])
def test_a_descriptor_that_changed_since_is_named_and_nothing_is_touched(
    monkeypatch: pytest.MonkeyPatch, expected: int
) -> None:
    with Memfd.create("ram", 0) as ram, Memfd.create("log", 0) as log:
        os.set_inheritable(ram.fileno(), True)
        with OwnedFd(os.dup(ram.fileno())) as other:
            changed = other.fileno() if expected == errno.ESTALE else 999_999
            entries = entry("ram", ram), entry("log", log, changed)
            before = open_fds()
            with pytest.raises(HandoffError, match="'log'") as caught:
                inherit(monkeypatch, Manifest(entries, b"", os.getpid()))
            assert caught.value.errno == expected
            assert open_fds() == before


def test_a_manifest_that_gives_one_descriptor_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Memfd.create("ram", 0) as ram:
        manifest_fd = os.dup(0)  # the next descriptor gets this number
        os.close(manifest_fd)
        for entries in (
            (entry("a", ram), entry("b", ram)),
            (entry("a", ram, manifest_fd),),
            (entry("a", ram, 1),),
            (entry("a", ram, -1),),
        ):
            with pytest.raises(HandoffError) as caught:
                inherit(monkeypatch, Manifest(entries, b"", os.getpid()))
            assert caught.value.errno == errno.EBADMSG


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=200), seals=st.sampled_from([SEALS, Seal(0), Seal.WRITE]))
def test_any_bytes_in_place_of_a_manifest_are_an_error(data: bytes, seals: Seal) -> None:
    with Memfd.create("noise", 0) as memfd:
        memfd.write(data, 0)
        memfd.seal(seals)
        os.environ[VARIABLE] = str(memfd.fileno())
        before = open_fds()
        with pytest.raises(HandoffError):
            handoff.inherited()
        assert open_fds() == before
