"""Running the VMMs of the examples, in the guest that is their host.

Each function takes the name of a VM.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo import IncomingStore, OutgoingStore, SessionNotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXAMPLES = Path(__file__).parents[2] / "examples"
MINI_VMM = EXAMPLES / "mini_vmm" / "mini_vmm.py"
PASSTHROUGH = EXAMPLES / "passthrough_vm" / "passthrough_vm.py"
QEMU = EXAMPLES / "qemu_live_update" / "qemu_live_update.py"
KILLED = Path(__file__).with_name("killed_vmm.py")
SHELL_PATH = os.pathsep.join([os.path.dirname(sys.executable), "/usr/bin", "/bin"])
PATIENCE = 240.0  # seconds; a VM in an emulated guest needs many on a busy machine
_CHUNK = 1 << 20

_processes: dict[str, subprocess.Popen[bytes]] = {}
_predecessors: dict[str, subprocess.Popen[bytes]] = {}  # of VMMs that got a running VM


def hops(usual: int) -> int:
    """Return how many jumps a VM lives through in a test."""
    return int(os.environ.get("PYLUO_VM_HOPS", usual))


def changed_pages(before: list[int], after: list[int]) -> list[int]:
    """Return the numbers of the pages whose checksums differ."""
    assert len(before) == len(after)
    pairs = zip(before, after, strict=True)
    return [page for page, (one, other) in enumerate(pairs) if one != other]


def output(name: str) -> Path:
    """Return the path of what the VM has said, in this life of its VMM."""
    return Path(f"/tmp/{name}.output")


def control(name: str) -> Path:
    """Return the path at which a successor asks for the VM."""
    return Path(f"/tmp/{name}.socket")


def messages(name: str) -> Path:
    """Return the path of what the VMM has said."""
    return Path(f"/tmp/{name}.messages")


def start(
    command: str,
    name: str,
    *options: str,
    vmm: Path = MINI_VMM,
    device: str = "",
    qemu: str = "",
    killed_before: str = "",
) -> None:
    """Start a VMM.

    Args:
        command: what it does: run or resume.
        name: the name of the VM.
        options: the VMM's options for the VM.
        vmm: the VMM.
        device: a PCI device for a new VM.
        qemu: the path of the QEMU that it starts, if that is not the usual one.
        killed_before: see killed_vmm.py.
    """
    for log in (output(name), messages(name)):
        log.write_bytes(b"")
    before = ["--device", device] if device else []
    before += ["--qemu", qemu] if qemu else []
    _processes[name] = _start(name, [*before, command, name, *options], vmm, killed_before)


def _start(
    name: str, words: Sequence[str], vmm: Path, killed_before: str = ""
) -> subprocess.Popen[bytes]:
    """Start a process whose output is appended to that of the VM."""
    program = [KILLED, vmm.stem, killed_before] if killed_before else [vmm]
    path = os.pathsep.join([os.fspath(vmm.parent), *sys.path])
    with output(name).open("ab") as stdout, messages(name).open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, *program, *words],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | {"PYTHONPATH": path},
        )


def start_successor(name: str, *, newer: bool = False, killed_before: str = "") -> None:
    """Start a VMM that gets the VM from the VMM that runs it.

    Args:
        name: the name of the VM.
        newer: whether it is a VMM in another folder.
        killed_before: see killed_vmm.py.
    """
    vmm = Path("/tmp/newer/mini_vmm.py") if newer else MINI_VMM
    if newer:
        shutil.copytree(MINI_VMM.parent, vmm.parent, dirs_exist_ok=True)
    words = ["take-over", name, "--socket", os.fspath(control(name))]
    _predecessors[name] = _processes[name]
    _processes[name] = _start(name, words, vmm, killed_before)


def kill_child(name: str) -> None:
    """Kill the QEMU of a VMM."""
    [child] = [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if int(stat.read_text().rpartition(")")[2].split()[1]) == _processes[name].pid
    ]
    os.kill(child, signal.SIGKILL)


def end_of_predecessor(name: str) -> int:
    """Wait until the VMM that had the VM has ended; return its status."""
    return _predecessors[name].wait(PATIENCE)


def return_to_predecessor(name: str) -> int:
    """Wait until the successor has ended, and forget it; return its status."""
    successor, _processes[name] = _processes[name], _predecessors[name]
    return successor.wait(PATIENCE)


def wait_for_message(name: str, text: str, count: int = 1) -> str:
    """Wait until the VMM has said `text` so often; return all that it has said."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended = _processes[name].poll()
        told = messages(name).read_text()
        if told.count(text) >= count:
            return told
        assert ended is None, f"the VMM ended with status {ended}: {told}"
        time.sleep(0.05)
    raise AssertionError(f"the VMM did not say {text!r}: {messages(name).read_text()}")


def wait_for_end(name: str) -> tuple[int, str]:
    """Wait until the VMM has ended; return its status and what it has said."""
    return _processes[name].wait(PATIENCE), messages(name).read_text()


def told(name: str) -> str:
    """Return what the VMM has said."""
    return messages(name).read_text()


def said(name: str) -> str:
    """Return what the VM has said in this life of its VMM; a line can be cut at either end."""
    return output(name).read_text()


def wait_for_lines(name: str, count: int) -> str:
    """Wait until the VM has said `count` more lines; return what it has said, as `said` does."""
    deadline = time.monotonic() + PATIENCE
    count += said(name).count("\n")
    while said(name).count("\n") < count:
        ended = _processes[name].poll()
        told = messages(name).read_text()
        assert ended is None, f"the VMM ended with status {ended}: {told}"
        assert time.monotonic() < deadline, f"the VM said {said(name)[-300:]!r}; the VMM: {told}"
        time.sleep(0.1)
    return said(name)


def wait_for_text(name: str, text: str) -> None:
    """Wait until the VM has said `text`."""
    deadline = time.monotonic() + PATIENCE
    while text not in said(name):
        ended = _processes[name].poll()
        told = messages(name).read_text()
        assert ended is None, f"the VMM ended with status {ended}: {told}"
        assert time.monotonic() < deadline, f"the VM said {said(name)[-300:]!r}; the VMM: {told}"
        time.sleep(0.1)


def store(name: str) -> tuple[str, list[int]]:
    """Have the VMM store the VM; return what the VM has said, and the checksums of its RAM."""
    signal_and_wait(name, signal.SIGUSR1, "is stored")
    return said(name), checksums_of_process(name)


def go_on(name: str) -> None:
    """Have the VMM take the VM's state out of the store again, and run it."""
    signal_and_wait(name, signal.SIGUSR2, "runs on")


def signal_and_wait(name: str, number: int, text: str) -> None:
    """Send a signal to the VMM, and wait until it has said `text` once more."""
    before = messages(name).read_text().count(text)
    _processes[name].send_signal(number)
    wait_for_message(name, text, before + 1)


def send_signal(name: str, number: int) -> None:
    """Send a signal to the VMM."""
    _processes[name].send_signal(number)


def signal_and_wait_for_end(name: str, number: int) -> int:
    """Send a signal to the VMM, which ends it; return its status."""
    _processes[name].send_signal(number)
    return _processes[name].wait(PATIENCE)


def end(name: str) -> None:
    """End the VM and its VMM, which leaves nothing of it."""
    status = signal_and_wait_for_end(name, signal.SIGTERM)
    assert status == 0, f"the VMM ended with status {status}: {messages(name).read_text()}"
    assert entries_of_outgoing(name) is None


def checksums_of_process(name: str) -> list[int]:
    """Return the checksum of each page of the VM's RAM, by a descriptor of the VMM's."""
    folder = Path(f"/proc/{_processes[name].pid}/fd")
    # "reserved" is the empty file by which the mapping of the RAM reserves its addresses. The RAM
    # is the largest of the others; after a jump, its link does not say that it is a memfd.
    files = [each for each in folder.iterdir() if each.is_file()]
    others = [each for each in files if "reserved" not in os.readlink(each)]
    checksums = _checksums(max(others, key=lambda each: each.stat().st_size))
    assert len(set(checksums)) > 1  # it is not empty
    return checksums


def checksums_in_store(name: str) -> list[int]:
    """Return the checksums of the RAM in the store, before any VMM has taken it up."""
    incoming = IncomingStore.retrieve(name)
    with incoming.get_ram("ram") as ram:
        [memfd] = ram.memfds
        checksums = _checksums(Path(f"/proc/self/fd/{memfd.fileno()}"))
    incoming.close()
    return checksums


def _checksums(path: Path) -> list[int]:
    checksums = []
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            pages = (chunk[start : start + 4096] for start in range(0, len(chunk), 4096))
            checksums += [zlib.crc32(page) for page in pages]
    return checksums


def resume_twice(name: str) -> list[int | None]:
    """Start two VMMs at once; return the status of each, None for the one that runs the VM."""
    command = [sys.executable, os.fspath(MINI_VMM), "resume", name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with output(name).open("ab") as stdout, messages(name).open("ab") as stderr:
        both = [
            subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
            for _ in range(2)
        ]
    deadline = time.monotonic() + PATIENCE
    while len(running := [each for each in both if each.poll() is None]) > 1:
        assert time.monotonic() < deadline, messages(name).read_text()
        time.sleep(0.1)
    if running:
        [_processes[name]] = running
    return [each.poll() for each in both]


def entries_of_outgoing(name: str) -> list[str] | None:
    """Return the entries of the outgoing store that a keeper has; None if there is none."""
    try:
        store = OutgoingStore.open(name)
    except SessionNotFoundError:
        return None
    names = list(store)
    store.close()
    return names


def discard(name: str) -> None:
    """End what is left of the VM."""
    OutgoingStore.open(name).discard()


def finish_what_is_lost(name: str) -> list[str]:
    """Return the entries of the incoming store of a VM that is lost, and end it."""
    incoming = IncomingStore.retrieve(name)
    names = list(incoming)
    incoming.finish(destroy=names)
    return names


def own_memory(name: str) -> int:
    """Return how much memory the VMM has besides the VM's RAM, in bytes."""
    status = Path(f"/proc/{_processes[name].pid}/status").read_text()
    [kib] = re.findall(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(kib) << 10


def run_shell(commands: str, variables: Mapping[str, str] | None = None) -> str:
    """Run commands of a README in the checkout; return what they print."""
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path, "PATH": SHELL_PATH} | dict(variables or {})
    done = subprocess.run(
        ["sh", "-ec", commands],
        cwd=EXAMPLES.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return done.stdout


def kill_vmms() -> None:
    """Kill all VMMs that shells have started."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and any(
            os.fsencode(vmm.name) in (folder / "cmdline").read_bytes()
            for vmm in (MINI_VMM, PASSTHROUGH, QEMU)
        ):
            os.kill(int(folder.name), signal.SIGKILL)
