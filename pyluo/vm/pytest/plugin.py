"""The entry point of the plugin: adds its options and markers, and checks guests after each test.

The other parts of the plugin are `fixtures`, `recorder` and `summary`.

A test fails if the kernel of a guest complained while the test ran, even if the test itself passed.
The marker `expects` names the complaints that do not fail a test.

pytest imports this module in every run if `pyluo[vm]` is installed. In a project that does not use
the plugin, it must change nothing. Therefore the recorder, and the modules that boot guests, are
imported only when a test boots a guest or an option asks for them; and the setting `pyluo_guests`
declares that a project's tests use guests, which cannot be known before they run.
"""

from __future__ import annotations

import inspect
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyluo.vm.machine import options
from pyluo.vm.machine.usage import usage
from pyluo.vm.pytest import fixtures, summary
from pyluo.vm.pytest.fixtures import EXPECTS, FAILED, GUEST_FIXTURES, expected_causes

if TYPE_CHECKING:
    from collections.abc import Generator

__all__: list[str] = []

_MARKER = "in_guest"
_GUESTS = "pyluo_guests"  # the setting in pytest's configuration file


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugin to pytest."""
    group = parser.getgroup("pyluo", "guests to live-update")
    options.add(group.addoption, "pyluo-")
    group.addoption(
        "--pyluo-hops",
        type=options.count,
        default=1,
        metavar="N",
        help="how many live updates in a row, for tests that use the fixture hops (default: 1)",
    )
    group.addoption(
        "--pyluo-record",
        metavar="FILE",
        help="write a line of JSON to FILE for each test: the verdict, and the timelines and "
        "consoles of its guests",
    )
    group.addoption(
        "--pyluo-ktap", metavar="FILE", help="write the verdicts on all tests to FILE in KTAP"
    )
    group.addoption(
        "--pyluo-junit-subtests",
        action="store_true",
        help="make --junitxml write a test case for each subtest",
    )
    parser.addini(
        _GUESTS,
        "whether the tests of this project boot guests: if so, -n auto starts no more workers than "
        "guests fit into this machine, and pytest's header says what runs the guests",
        type="bool",
        default=False,
    )


@pytest.hookimpl(trylast=True)  # after pytest's JUnit plugin, which `separate_subtests` changes
def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers, and register the other parts of the plugin."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}: the body of this test runs in a guest: that of the fixture vm if the test "
        f"uses it, else the shared one",
    )
    config.addinivalue_line(
        "markers",
        f"{EXPECTS}(cause, ...): complaints of a guest's kernel, and deaths, that are no failure",
    )
    for part in (fixtures, summary):
        config.pluginmanager.register(part)
    usage.on_first_boot = lambda: _register_recorder(config)
    if config.getoption("--pyluo-record") or config.getoption("--pyluo-ktap"):
        _register_recorder(config)
        if not hasattr(config, "workerinput"):  # the main process of pytest-xdist writes the files
            from pyluo.vm.pytest.recorder import open_files

            open_files(config)
    if config.getoption("--pyluo-junit-subtests"):
        from pyluo.vm.pytest.subtests import separate_subtests

        separate_subtests(config)


def _register_recorder(config: pytest.Config) -> None:
    from pyluo.vm.pytest import recorder

    if not config.pluginmanager.is_registered(recorder):
        config.pluginmanager.register(recorder)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Return the lines that say what will run the guests, if tests of this run use guests."""
    named = any("--pyluo-" in os.fspath(word) for word in config.invocation_params.args)
    if not (named or config.getini(_GUESTS)):
        return []
    from pyluo.vm.pytest.header import describe

    return describe(config)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Add the guest to the fixtures of a test whose body runs in a guest."""
    if not isinstance(item, pytest.Function) or item.get_closest_marker(_MARKER) is None:
        return
    if "vm" not in item.fixturenames:
        item.fixturenames.append("shared_vm")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin to record which guests this test uses; a plugin may run a test more than once."""
    usage.begin_test()
    item.stash[FAILED] = False


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the body of a test in a guest if the test has the marker `in_guest`."""
    if pyfuncitem.get_closest_marker(_MARKER) is None:
        return None
    guest: Any = pyfuncitem.funcargs["vm" if "vm" in pyfuncitem.fixturenames else "shared_vm"]
    parameters = inspect.signature(pyfuncitem.obj).parameters
    names = [name for name in parameters if name in pyfuncitem.funcargs]
    if any(name in GUEST_FIXTURES for name in names):
        pytest.fail(
            f"this test runs in the guest, where there is no {' or '.join(GUEST_FIXTURES)}: "
            f"ask for a fresh guest by @pytest.mark.usefixtures('vm')",
            pytrace=False,
        )
    from pyluo.guest import wire
    from pyluo.vm.machine import bytecode
    from pyluo.vm.pytest import assertions, in_guest

    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    reference = wire.reference(pyfuncitem.obj)
    file = sys.modules[reference.partition(":")[0]].__file__  # not where it was collected
    assert file is not None
    source = Path(file).resolve()
    compiled = bytecode.compile_as(assertions.tag(), source, assertions.compile_module)
    guest.call(
        in_guest.run,
        reference,
        guest.path(os.fspath(source)),
        guest.path(os.fspath(compiled)) if compiled else None,
        arguments,
    )
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail a test that passed if the kernel of a guest made an unexpected complaint."""
    with ExitStack() as stack:
        for guest in list(usage.running):
            stack.enter_context(guest.expecting(*expected_causes(item)))
        yield
        for guest in list(usage.running):
            guest.check()


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    """Return the number of workers for `-n auto`: each must have cores and memory for a guest.

    PYTEST_XDIST_AUTO_NUM_WORKERS takes precedence. Nothing is changed unless the project's tests
    use guests.
    """
    workers = yield
    if not config.getini(_GUESTS):
        return workers
    from pyluo.vm.cores import usable_cores
    from pyluo.vm.machine.capacity import room_for
    from pyluo.vm.machine.needs import PLAIN

    # `workers` may come from the hook of another plugin, which may have ignored the variable.
    if (asked := os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", "")).isdecimal():
        return int(asked)
    cpus: int = config.getoption("--pyluo-cpus")
    memory: int = config.getoption("--pyluo-memory") or PLAIN.memory
    if workers in (len(os.sched_getaffinity(0)), os.cpu_count()):
        # Nobody but pytest-xdist itself chose this number; it does not know of quotas.
        workers = min(workers, usable_cores())
    return max(1, min(workers // cpus, room_for(memory)))
