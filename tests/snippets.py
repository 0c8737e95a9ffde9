"""The snippets and command lines of the pages, and what runs each of them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "COMMANDS", "NOT_RUN", "PAGES", "ROOT", "SNIPPETS", "blocks", "command", "command_lines",
    "run_command", "snippets",
]  # fmt: skip

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md", ".github/**/*.md")
    for page in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "not run: "
# Behind a prompt, or in a list of commands in YAML.
COMMAND = re.compile(
    r"(?:- |\S+[#$] )?((?:\S*/)?(?:git|make|pip|pyluo|pytest|python3|systemctl)(?: .*)?)"
)

_HARNESS = "vm-tests/harness/test_harness.py"
_GUEST = "vm-tests/commands/test_snippets.py"
_HOST = "tests/project/test_snippets.py"

SNIPPETS = {
    "CONTRIBUTING.md": [_HARNESS],
    "README.md": [_GUEST, _HARNESS],
    "docs/explanation/guest-deaths.md": [
        f"{NOT_RUN}boots guests that have to warn, as vm-tests/deaths/test_deaths.py does",
        f"{NOT_RUN}needs the memory of a dead guest, as vm-tests/deaths/test_vmcore.py does",
    ],
    "docs/guides/ci.md": [f"{NOT_RUN}a workflow; its command lines are in COMMANDS"],
    "docs/guides/dma.md": [_GUEST, _GUEST, _GUEST],
    "docs/guides/faults.md": [_GUEST],
    "docs/guides/guest-ram.md": [_GUEST],
    "docs/guides/handoff.md": [_GUEST, _GUEST, _HOST, _HOST],
    "docs/guides/kvm.md": [_GUEST, _GUEST],
    "docs/guides/matrix.md": [_GUEST],
    "docs/guides/network.md": [_GUEST],
    "docs/guides/roots.md": [
        f"{NOT_RUN}boots a guest with systemd, as vm-tests/harness/test_root.py does",
    ],
    "docs/guides/several-vms.md": [_HOST],
    "docs/guides/stores.md": [
        _GUEST,
        _GUEST,
        f"{NOT_RUN}a part of a unit, which vm-tests/stores/test_vm_service.py has as a whole",
    ],
    "docs/guides/test-suite.md": [_GUEST, _GUEST],
    "docs/guides/vfio.md": [_GUEST],
    "docs/reference/kernel-bugs.md": [
        f"{NOT_RUN}kills its guest, as vm-tests/sessions/test_kernel_bugs.py does",
    ],
    "docs/tutorials/first-live-update.md": [_HARNESS, _GUEST, _GUEST],
    "docs/tutorials/first-test.md": [_HARNESS],
    "examples/mini_vmm/README.md": ["vm-tests/kvm/test_mini_vmm.py"] * 2,
    "examples/passthrough_vm/README.md": ["vm-tests/kvm/test_passthrough_vm.py"] * 2,
    "examples/qemu_live_update/README.md": ["vm-tests/kvm/test_qemu_live_update.py"] * 2,
}
"""The file of the test that runs each snippet of a page, in order, or why none can."""

_INSTALLS = f"{NOT_RUN}installs from the network; the fixture `installed` has its environment"
_TESTS = f"{NOT_RUN}runs the tests, this one among them"
_HOURS = f"{NOT_RUN}runs for hours"
_BISECT = "vm-tests/runs/test_bisect.py"
_MATRIX = "vm-tests/runs/test_matrix.py"
_SELFTESTS = "vm-tests/runs/test_selftests.py"
_CLI = "vm-tests/commands/test_cli.py"
_SHELL = "vm-tests/commands/test_shell.py"
_ROOT = "vm-tests/harness/test_root.py"
_SAVED = "vm-tests/stores/test_saved.py"
_SCALE_OUT = "vm-tests/harness/test_scale_out.py"
_EXAMPLES = "vm-tests/kvm/test_examples.py"

COMMANDS = {
    ".github/ISSUE_TEMPLATE/kernel-regression.md": [
        f"{NOT_RUN}for the reporter to fill in; {_CLI} runs the same with commands"
    ],
    "CONTRIBUTING.md": [
        f"{NOT_RUN}clones from an address of the reader's",
        *[_TESTS] * 3,
        *[_HOURS] * 2,
        f"{NOT_RUN}fetches pyright",
    ],
    "README.md": [_CLI, *[_TESTS] * 3, *[_HOURS] * 2],
    "docs/guides/bisection.md": [_BISECT, _BISECT],
    "docs/guides/ci.md": [_INSTALLS, "tests/project/test_doctor.py", _SELFTESTS, _MATRIX],
    "docs/guides/files.md": [_SAVED, _SAVED, _SAVED],
    "docs/guides/kernel-tree.md": [_CLI, _CLI, _SELFTESTS, _SELFTESTS, _MATRIX],
    "docs/guides/matrix.md": [_MATRIX, _EXAMPLES, _EXAMPLES],
    "docs/guides/roots.md": [_ROOT, _ROOT, _ROOT],
    "docs/guides/scale-out.md": [_SCALE_OUT, _SCALE_OUT],
    "docs/guides/systemd-host.md": [
        f"{NOT_RUN}the guests of the tests enable their units by `VM(units=...)`",
        "vm-tests/update/test_systemd.py",
    ],
    "docs/guides/terminal.md": [f"{NOT_RUN}is what a terminal shows", *[_SHELL] * 3],
    "docs/reference/kernel-bugs.md": [_TESTS],
    "docs/tutorials/a-vm-lives-through.md": ["vm-tests/kvm/test_demo.py"],
    "docs/tutorials/bisect-a-regression.md": [
        *[_BISECT] * 2,
        *[f"{NOT_RUN}is as in the guide, whose line {_BISECT} runs"] * 2,
    ],
    "docs/tutorials/first-live-update.md": [
        f"{NOT_RUN}clones from an address of the reader's",
        f"{NOT_RUN}is the README's, which {_CLI} runs",
    ],
    "docs/tutorials/first-test.md": [_HARNESS, _HARNESS],
    "examples/mini_vmm/README.md": ["vm-tests/kvm/test_mini_vmm.py"] * 4,
    "examples/passthrough_vm/README.md": ["vm-tests/kvm/test_passthrough_vm.py"] * 2,
    "examples/qemu_live_update/README.md": ["vm-tests/kvm/test_qemu_live_update.py"] * 2,
    "examples/test-project/README.md": [
        *[_INSTALLS] * 2,
        f"{NOT_RUN}is in an environment of its own, in which {_SCALE_OUT} runs pytest",
    ],
}
"""The file of the test that runs each command line of a page, in order, or why none can.

Those in blocks of a shell are not among them: such a block is a snippet, and is run as a whole.
"""


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the texts of the blocks of a page that are in these languages."""
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def snippets(page: str, language: str = "python") -> list[str]:
    """Return the snippets of a page.

    Args:
        page: the path of the page.
        language: the language of the snippets.
    """
    return blocks(ROOT / page, language)


def command_lines(page: Path) -> list[str]:
    """Return the command lines of a page: those indented by four columns, and those in YAML."""
    indented = re.findall(r"^    (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    shown = "\n".join([*indented, *blocks(page, "yaml")])
    lines = re.sub(r" *\\\n *", " ", shown).splitlines()
    return [found[1] for line in lines if (found := COMMAND.fullmatch(line.strip()))]


def command(page: str, number: int, replaced: Mapping[str, str | Path] | None = None) -> str:
    """Return a command line of a page, without its comment.

    Args:
        page: the path of the page.
        number: the place of the command line among those of the page, from 0.
        replaced: what stands in the test for names of the reader's, and for numbers that would
            take long. Paths are quoted.
    """
    line = re.sub(r" +# .*", "", command_lines(ROOT / page)[number])
    replaced = replaced or {}
    for old in replaced:
        assert old in line, (old, line)

    def replace(found: re.Match[str]) -> str:
        new = replaced[found[0]]
        return new if isinstance(new, str) else shlex.quote(os.fspath(new))

    return re.sub("|".join(map(re.escape, replaced)) or "$^", replace, line)


def run_command(
    page: str,
    number: int,
    replaced: Mapping[str, str | Path] | None = None,
    *more: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command line of a page in a shell that finds the programs of this environment.

    Args:
        page: the path of the page.
        number: the place of the command line among those of the page, from 0.
        replaced: what stands in the test for something else.
        more: words that are added at the end.
        cwd: the folder to run it in.
        env: variables, besides those of this process.
        timeout: how many seconds it may take; after that, all that it has started is killed.
    """
    variables = os.environ | dict(env or {})
    variables["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), variables["PATH"]])
    line = " ".join([command(page, number, replaced), *map(shlex.quote, more)])
    with subprocess.Popen(
        line, shell=True, cwd=cwd, env=variables, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(line, process.returncode, stdout, stderr)
