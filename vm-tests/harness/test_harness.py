"""Tests of getting functions, values and programs into a guest and back."""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import guest_actions
from pyluo import RequestError
from pyluo.guest.port import PAUSED, mark_vm
from pyluo.vm import VM, HarnessError, Kernel
from pyluo.vm.errors import VmRegression
from tests.snippets import command, snippets

if TYPE_CHECKING:
    from collections.abc import Callable


ROOT = Path(__file__).parents[2]
# Pages with a test, and the number of the command line that runs it.
PAGES = [
    ("README.md", None),
    ("CONTRIBUTING.md", None),
    ("docs/tutorials/first-test.md", 0),
    ("docs/tutorials/first-test.md", 1),
]
TUTORIAL = "docs/tutorials/first-live-update.md"


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        2.5,
        "text",
        b"\0\xff",
        (1, [2, {"three": (4,)}]),
        {5: "six", (7,): b"8"},
        {9, 10},
        Path("/a/b"),
        guest_actions.Colour.RED,
        guest_actions.Point(1, "p"),
        "x" * (1 << 20),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_crosses_to_the_guest_and_back_unchanged(shared_vm: VM, value: object) -> None:
    back = shared_vm.call(guest_actions.echo, value)
    assert back == value
    assert type(back) is type(value)


def test_an_exception_comes_back_as_what_it_was_with_the_guests_trace(shared_vm: VM) -> None:
    with pytest.raises(RequestError) as caught:
        shared_vm.call(guest_actions.fail, errno.EBUSY)
    error = caught.value
    assert (error.errno, error.operation, error.subject) == (
        errno.EBUSY,
        "an operation",
        "a subject",
    )
    assert any("in fail" in note for note in error.__notes__)


def test_an_exception_that_cannot_be_rebuilt_comes_back_as_its_text(shared_vm: VM) -> None:
    with pytest.raises(RuntimeError, match="OddError: this and that"):
        shared_vm.call(guest_actions.fail_oddly)


def test_what_has_no_name_is_refused_before_it_is_sent(shared_vm: VM) -> None:
    def local() -> None: ...

    bound, part = [1].copy, functools.partial(os.getpid)
    functions: list[Callable[[], object]] = [local, lambda: None, bound, part]
    for function in functions:
        with pytest.raises(TypeError, match="define it in a module"):
            shared_vm.call(function)


def test_a_result_that_cannot_cross_says_how_to_keep_it(shared_vm: VM) -> None:
    with pytest.raises(TypeError, match=r"vm\.hold"):
        shared_vm.call(object)


def test_what_is_held_stays_alive_and_can_be_used(shared_vm: VM) -> None:
    counter = shared_vm.hold(guest_actions.make_counter)
    assert [shared_vm.call(guest_actions.increment, counter) for _ in range(3)] == [1, 2, 3]
    shared_vm.release(counter)
    with pytest.raises(KeyError):
        shared_vm.call(guest_actions.increment, counter)


def test_what_was_held_before_a_jump_is_refused_after_it(vm: VM) -> None:
    counter = vm.hold(guest_actions.make_counter)
    vm.live_update()
    vm.hold(guest_actions.make_counter)
    with pytest.raises(ValueError, match="in a life that is over"):
        vm.call(guest_actions.increment, counter)
    with pytest.raises(ValueError, match="in a life that is over"):
        vm.call(guest_actions.echo, [counter])


def test_threads_of_the_host_take_turns(shared_vm: VM) -> None:
    counter = shared_vm.hold(guest_actions.make_counter)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(shared_vm.call, guest_actions.increment, counter) for _ in range(64)]
    assert sorted(future.result() for future in futures) == list(range(1, 65))


def test_a_programs_status_and_output_come_back(shared_vm: VM) -> None:
    done = shared_vm.run(["sh", "-c", "pwd; echo oops >&2; exit 7"])
    assert (done.returncode, done.stderr) == (7, b"oops\n")
    assert done.stdout.decode().strip() == os.getcwd()


def test_a_daemon_that_a_program_leaves_behind_is_not_waited_for(shared_vm: VM) -> None:
    done = shared_vm.run(["sh", "-c", "sleep 1000 & echo $!"], timeout=30)
    assert done.returncode == 0
    daemon = int(done.stdout)
    assert shared_vm.run(["sh", "-c", f"kill {daemon}"]).returncode == 0


def test_programs_of_the_administrator_are_found(shared_vm: VM) -> None:
    assert shared_vm.run(["mkswap", "--version"]).returncode == 0


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt, RecursionError])
def test_whatever_a_function_ends_in_neither_side_ends_with_it(
    shared_vm: VM, ending: type[BaseException]
) -> None:
    expected = ending if issubclass(ending, Exception) else RuntimeError
    with pytest.raises(expected):
        shared_vm.call(guest_actions.raise_by_name, ending.__name__)
    assert shared_vm.call(guest_actions.echo, 1) == 1


def test_an_exception_that_does_not_cross_does_not_end_the_worker(shared_vm: VM) -> None:
    with pytest.raises(RuntimeError, match="CyclicError"):
        shared_vm.call(guest_actions.fail_in_a_cycle)
    assert shared_vm.call(guest_actions.echo, 1) == 1


@pytest.mark.parametrize(("kind", "error"), [("number", ValueError), ("nesting", TypeError)])
def test_a_result_beyond_json_is_the_callers_error(
    shared_vm: VM, kind: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        shared_vm.call(guest_actions.make_unencodable_value, kind)
    assert shared_vm.call(guest_actions.echo, 1) == 1


def test_what_an_error_carries_besides_its_arguments_crosses(shared_vm: VM) -> None:
    with pytest.raises(RequestError) as caught:
        shared_vm.call(guest_actions.fail_after_preserving_two)
    assert caught.value.preserved == (1, 2)


def test_a_program_that_takes_too_long_is_the_tests_own_failure(shared_vm: VM) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        shared_vm.run(["sleep", "60"], timeout=0.5)
    assert not shared_vm.dead


def test_a_program_that_is_not_there_is_told_as_such(shared_vm: VM) -> None:
    with pytest.raises(FileNotFoundError):
        shared_vm.run(["no-such-program"])


def test_code_that_the_guest_does_not_see_is_the_harness_matter(shared_vm: VM) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # the guest has its own /dev
        path = Path(folder, "unseen.py")
        path.write_text("def nothing(): pass\n")
        spec = importlib.util.spec_from_file_location("unseen", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["unseen"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            with pytest.raises(HarnessError, match=f"the guest does not have {path}"):
                shared_vm.call(module.nothing)
        finally:
            del sys.modules["unseen"]
    assert not shared_vm.dead


def test_the_hosts_files_cannot_be_changed_from_the_guest(shared_vm: VM, tmp_path: Path) -> None:
    secret = tmp_path / "file"
    secret.write_text("host")
    done = shared_vm.run(["sh", "-c", f"cat {secret}; echo guest > {secret}; cat {secret}"])
    assert done.stdout == b"hostguest\n"  # /tmp is the guest's own, over the host's
    assert secret.read_text() == "host"
    before = os.stat(__file__).st_mtime_ns
    shared_vm.run(["touch", os.path.abspath(__file__)])  # works in the guest if it lies in /tmp
    assert os.stat(__file__).st_mtime_ns == before
    assert shared_vm.run(["touch", "/etc/hostname"]).returncode != 0
    assert shared_vm.call(guest_actions.write_to_tmp)


def test_much_crosses_to_the_guest_in_time(shared_vm: VM) -> None:
    assert shared_vm.call(len, bytes(16 << 20)) == 16 << 20


def test_dmesg_and_the_console_log_are_those_of_the_guest(shared_vm: VM) -> None:
    release = shared_vm.life.release
    assert f"Linux version {release}" in shared_vm.dmesg
    assert f"Linux version {release}" in shared_vm.console
    assert f"Linux version {release}" in shared_vm.console_log.read_text()


def test_the_monitor_answers(shared_vm: VM) -> None:
    status = shared_vm.qmp("query-status")
    assert isinstance(status, dict)
    assert status["status"] == "running"


def test_each_life_has_its_own_boot_id_and_count(vm: VM) -> None:
    first = vm.life
    timeline = vm.live_update()
    second = vm.life
    assert first.updates == first.number - 1
    assert (second.number, second.updates) == (first.number + 1, first.number)
    assert first.boot_id != second.boot_id
    moments = [timeline.at(event.name) for event in timeline.events]
    assert [event.name for event in timeline.events] == [
        "loaded", "reboot called", "first sign of the new kernel", "worker up"
    ]  # fmt: skip
    assert moments == sorted(moments)


@pytest.mark.parametrize("network", [True, False])
def test_the_network_comes_up_where_it_is_asked_for(
    guest: Callable[..., VM], kernel: Kernel, network: bool
) -> None:
    candidates = ["127.0.0.1", "10.0.2.15"]
    vm = guest(kernel, network=network)
    bound = vm.call(guest_actions.find_bindable_addresses, candidates)
    assert bound == (candidates if network else [])
    if network:
        vm.live_update()
        assert vm.call(guest_actions.find_bindable_addresses, candidates) == candidates


def test_the_bodies_of_marked_tests_run_in_the_guest(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # the host may write their code
    pytester.makepyfile(
        """
        import os, pytest, sys

        @pytest.mark.in_guest
        def test_passes():
            assert os.uname().nodename == "(none)"
            assert "_pytest" not in sys.modules  # which would take a guest seconds to import
            with pytest.raises(ZeroDivisionError):
                1 / 0

        @pytest.mark.in_guest
        @pytest.mark.parametrize("number", [1, 2])
        def test_fails_once(number):
            assert number == 1

        @pytest.mark.in_guest
        def test_skips():
            pytest.skip("told so in the guest")

        @pytest.mark.in_guest
        def test_asks_for_what_is_not_there(vm):
            pass
        """
    )
    outcome = pytester.runpytest_subprocess("-rs")
    outcome.assert_outcomes(passed=2, failed=2, skipped=1)
    outcome.stdout.fnmatch_lines(["*The console of a guest (stable)*"])
    outcome.stdout.fnmatch_lines(["vm-tests: 5 ran, 5 of them drove a guest; guests booted: 3, *"])
    outcome.stdout.fnmatch_lines(["E*assert 2 == 1"])
    outcome.stdout.fnmatch_lines(["*told so in the guest*"])
    outcome.stdout.fnmatch_lines(["*usefixtures('vm')*"])


def test_the_gap_of_a_vm_spans_the_jump_and_a_vm_that_goes_back_fails_the_test(vm: VM) -> None:
    vm.call(mark_vm, "a", PAUSED, clock=1_000, counter=5)
    vm.call(mark_vm, "a", "running on", clock=900)  # without a jump
    with pytest.raises(VmRegression, match="the clock of the VM a went back: 1000 when"):
        vm.check()
    vm.call(mark_vm, "a", PAUSED, clock=2_000, counter=6)
    vm.call(mark_vm, "b", PAUSED, counter=9)
    vm.live_update()
    vm.call(mark_vm, "b", "resumed", counter=8)
    vm.call(mark_vm, "a", "resumed", clock=3_000, counter=6)
    a, b = vm.timeline.gaps
    assert [event.name for event in a.events] == [PAUSED, "resumed"]
    assert a.events[0].at < vm.timeline.started < a.events[1].at
    assert (a.counted, b.counted) == (0, -1)
    assert vm.jumps[-1].timeline == vm.timeline
    with pytest.raises(VmRegression, match="the counter of the VM b went back: 9 when"):
        vm.check()
    vm.check()  # it was raised


@pytest.mark.parametrize(("page", "number"), PAGES)
def test_a_pages_own_test_passes_as_it_stands(
    pytester: pytest.Pytester, page: str, number: int | None
) -> None:
    (example,) = (block for block in snippets(page) if "def test_" in block)
    pytester.makepyfile(test_ram=example)
    tree = {"~/linux": Kernel.find("stable").image} if number == 1 else {}
    words = [] if number is None else shlex.split(command(page, number, tree))[1:]
    pytester.runpytest_subprocess(*words).assert_outcomes(passed=1)


def test_the_tutorials_script_works_as_it_stands() -> None:
    [script] = snippets(TUTORIAL, "sh")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-ec", script],
        env=os.environ | {"PATH": path, "SHELL": "/bin/sh"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("this was in memory\n"), done.stdout
    assert "1 live update" in done.stderr


def test_another_projects_fixture_called_vm_is_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def vm():
            return "no guest"

        def test_fails(vm):
            assert vm == "a guest"
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(failed=1)


def test_a_run_fails_where_no_guest_can_be_started(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("def test_asks_for_a_guest(vm): pass")
    tools = pytester.mkdir("tools")
    for tool in ("gcc", "ld"):
        (tools / tool).symlink_to(f"/usr/bin/{tool}")
    monkeypatch.setenv("PATH", os.fspath(tools))
    outcome = pytester.runpytest_subprocess()
    outcome.stdout.fnmatch_lines(
        ["*qemu-system-x86_64 is not installed: apt install qemu-system-x86*"]
    )
    outcome.assert_outcomes(errors=1)
    assert outcome.ret == pytest.ExitCode.TESTS_FAILED


FINDER = """\
import importlib
import importlib.util
import sys

MAPPING = {{"hooked": {folder!r}, "hooked_module": {module!r}}}


class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "hooked":
            file = MAPPING[name] + "/__init__.py"
            paths = [MAPPING[name]]
            return importlib.util.spec_from_file_location(
                name, file, submodule_search_locations=paths
            )
        if name == "hooked_module":
            return importlib.util.spec_from_file_location(name, MAPPING[name] + ".py")
        return None


def install():
    sys.meta_path.append(Finder)
"""


def test_a_package_that_an_import_hook_finds_is_found_in_the_guest(
    shared_vm: VM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, module = tmp_path / "src" / "hooked", tmp_path / "src" / "hooked_module"
    (folder / "part").mkdir(parents=True)
    (folder / "__init__.py").write_text("VALUE = 5\n")
    (folder / "part" / "__init__.py").touch()
    (folder / "part" / "code.py").write_text(
        "from hooked import VALUE\n\n\n"
        "def get():\n    import hooked_module\n    return VALUE, hooked_module.NAME\n"
    )
    module.with_suffix(".py").write_text("NAME = 'n'\n")
    finder = tmp_path / "__editable___hooked_finder.py"
    finder.write_text(FINDER.format(folder=str(folder), module=str(module)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.import_module(finder.stem).install()
    code = importlib.import_module("hooked.part.code")
    try:
        assert shared_vm.call(code.get) == (5, "n")
    finally:
        for name in [name for name in sys.modules if "hooked" in name]:
            del sys.modules[name]
