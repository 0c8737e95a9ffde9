"""The snippets of the manual do in a guest what they say.

Each is run as it stands, but for numbers that no guest has the memory for and names of files and
devices of the reader's; what a page leaves to the reader stands here, around it.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import pytest
from vfio import guest_vfio

from commands import guest_snippets
from pyluo.vm import VM, HarnessError
from tests.snippets import snippets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pyluo.vm.pytest.subtests import Ktap

JUMP = """
from pyluo import kexec
kexec.load("/boot/vmlinuz-next", reuse_cmdline=True)
kexec.reboot()
"""
HELLO = 'ram.write(b"hello", 0)\n'
CHECK = '\nassert ram.read(5, 0) == b"hello"\n'
SELFTEST = """#!/bin/sh
echo TAP version 13
echo 1..2
echo ok 1 one
echo ok 2 two
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose modules can be imported, here and in the guest."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def guest(modules: Path) -> Iterator[VM]:
    """The guest of the page about DMA, which has a device and an IOMMU."""
    made = snippets("docs/guides/dma.md")[2]
    options = functools.partial(VM, memory=2 << 30, cpus=2, call_timeout=300.0)
    with eval(made, {"VM": options}) as vm:
        yield vm


def run(vm: VM, *parts: str, **programs: str) -> None:
    """Run parts of a script in the guest."""
    script = "\n".join(parts).replace("/boot/vmlinuz-next", vm.path(vm.kernel.image))
    script = script.replace("0000:00:05.0", vm.call(find_device)).replace("1 << 30", "1 << 22")
    vm.call(guest_snippets.run, script, **programs)


def jump(vm: VM, *parts: str) -> None:
    """Run parts of a script of which the last one jumps."""
    with pytest.raises(HarnessError, match="booted again"):
        run(vm, *parts)


def find_device() -> str:
    return guest_vfio.edu().address


def imports(snippet: str) -> str:
    """Return the lines of a snippet that import something, for the next snippet of the page."""
    return "\n".join(line for line in snippet.splitlines() if line.startswith(("from", "import")))


def test_the_readmes_memory_is_there_on_the_next_kernel(guest: VM) -> None:
    before, after = snippets("README.md")[0].split("# on the next kernel\n")
    store, loading = before.split("kexec.load(", 1)
    jump(guest, store, HELLO, f"kexec.load({loading}")
    run(guest, imports(before), after, CHECK, "store.discard()")


def test_the_first_live_update_by_hand(guest: VM) -> None:
    before, after = snippets("docs/tutorials/first-live-update.md")
    session, loading = before.split("kexec.load(", 1)
    jump(guest, session, HELLO, f"kexec.load({loading}")
    run(guest, imports(before), after, CHECK)


def test_a_store_keeps_files_by_their_names(guest: VM) -> None:
    before, after = snippets("docs/guides/stores.md")
    given = 'from pyluo import Memfd\nram, state = Memfd.create("ram", 4096), Memfd.create("s", 9)'
    jump(guest, given, before, HELLO, JUMP)
    check = 'assert store.meta["machine"] == "q35"\nassert os.fstat(state.fileno()).st_size == 9'
    run(guest, "import os", imports(before), after, CHECK, check, "outgoing.discard()")


def test_the_mappings_of_a_device_are_rebuilt(guest: VM) -> None:
    before, after, _ = snippets("docs/guides/dma.md")
    jump(guest, before, HELLO, JUMP)
    run(guest, imports(before), after, CHECK, "outgoing.discard()")


def test_a_device_goes_to_another_process(guest: VM) -> None:
    owner, successor, *_ = snippets("docs/guides/handoff.md")
    slowly = owner.replace(".encode())", ".encode(), timeout=120)")  # the successor has to begin
    assert slowly != owner
    run(guest, snippets("docs/guides/dma.md")[0], slowly, "store.discard()", vmm=successor)


def test_a_device_is_driven(guest: VM) -> None:
    run(guest, *snippets("docs/guides/vfio.md"))


def test_the_ram_of_a_large_guest_with_less_memory(guest: VM) -> None:
    [snippet] = snippets("docs/guides/guest-ram.md")
    no_policies = "\n    ][:0],\n"  # the guest's kernel is built without CONFIG_NUMA
    for large, small in {"<< 40": "<< 23", "<< 30": "<< 21", "\n    ],\n": no_policies}.items():
        assert large in snippet
        snippet = snippet.replace(large, small)
    given = (
        "from pyluo.iommufd import IommuFd\nioas, kernel = IommuFd().alloc_ioas(), b'k' * 4096\n"
    )
    run(guest, given, snippet, "assert ram.read(1, (1 << 20) + 4095) == b'k'")


def test_a_vm_of_kvm_is_saved_and_restored(guest: VM) -> None:
    before, after = snippets("docs/guides/kvm.md")
    above = before[before.index("with kvm.") : before.index("store = ")]
    before_vm, after_vm = after.split("# ... a VM and its vCPUs are created as above ...\n")
    jump(guest, "serial_state = {'a': 1}", before, JUMP)
    check = "assert state.devices == {'serial': {'a': 1}}"
    run(guest, imports(before), before_vm, above, after_vm, check, "outgoing.discard()")


def test_the_network_of_the_host_is_made_again(guest: VM) -> None:
    [snippet] = snippets("docs/guides/network.md")
    given = (
        "import subprocess\nfrom pyluo import Memfd\nfile = Memfd.create('file', 1 << 16)\n"
        "subprocess.run(['ip', 'tuntap', 'add', 'vm0', 'mode', 'tap'], check=True)"
    )
    end = "subprocess.run(['ip', 'link', 'del', 'vm0'], check=True)"
    run(guest, given, snippet, end)


def test_what_happens_to_a_vm_is_marked(guest: VM) -> None:
    [snippet] = snippets("docs/guides/matrix.md")
    guest.call(guest_snippets.call, snippet, "pause", nanoseconds=1, pages=1)
    guest.live_update()
    guest.call(guest_snippets.call, snippet, "resume", nanoseconds=3, pages=2)
    [gap] = guest.timeline.gaps
    assert (gap.vm, gap.counted) == ("vm0", 1)
    assert gap.length is not None


def test_a_test_makes_several_hops(guest: VM) -> None:
    snippet, _ = snippets("docs/guides/test-suite.md")
    names: dict[str, Any] = {
        "build": guest_snippets.preserve,
        "check_and_preserve_again": guest_snippets.check_and_preserve_again,
    }
    exec(snippet, names)
    names["test_it_survives"](guest, 2)
    guest.live_update()
    assert guest.call(guest_snippets.intact)


def test_a_program_reports_in_ktap(
    guest: VM, ktap: Ktap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "my_selftest"
    program.write_text(SELFTEST)
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippets("docs/guides/test-suite.md")[1], names)
    names["test_my_program"](guest, ktap)


def test_a_fault_costs_nothing(guest: VM, modules: Path) -> None:
    given = (
        "from commands.guest_snippets import create, intact, preserve\n"
        "from pyluo import Memfd\n"
        "ram = Memfd.create('ram', 4096)\n"
    )
    [snippet] = snippets("docs/guides/faults.md")
    (modules / "snippet_of_faults.py").write_text(given + snippet)
    module = importlib.import_module("snippet_of_faults")
    module.test_a_bad_image_costs_nothing(guest)
    module.ram.close()
