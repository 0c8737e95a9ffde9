"""Running the VMMs of the examples, in the guest that is their host.

Each function takes the name of a VM.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

from pyluo import IncomingStore, OutgoingStore, SessionNotFoundError

EXAMPLES = Path(__file__).parents[2] / "examples"
MINI_VMM = EXAMPLES / "mini_vmm" / "mini_vmm.py"
QEMU = EXAMPLES / "qemu_live_update" / "qemu_live_update.py"
KILLED = Path(__file__).with_name("killed_vmm.py")
SHELL_PATH = os.pathsep.join([os.path.dirname(sys.executable), "/usr/bin", "/bin"])
PATIENCE = 240.0  # seconds; a VM in an emulated guest needs many on a busy machine
_CHUNK = 1 << 20

_processes: dict[str, subprocess.Popen[bytes]] = {}


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


def messages(name: str) -> Path:
    """Return the path of what the VMM has said."""
    return Path(f"/tmp/{name}.messages")


def start(
    command: str, name: str, *options: str, vmm: Path = MINI_VMM, killed_before: str = ""
) -> None:
    """Start a VMM; see killed_vmm.py for `killed_before`."""
    program = [KILLED, vmm.stem, killed_before] if killed_before else [vmm]
    path = os.pathsep.join([os.fspath(vmm.parent), *sys.path])
    with output(name).open("wb") as stdout, messages(name).open("wb") as stderr:
        _processes[name] = subprocess.Popen(
            [sys.executable, *program, command, name, *options],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | {"PYTHONPATH": path},
        )


def wait_for_message(name: str, text: str) -> str:
    """Wait until the VMM has said `text`; return all that it has said."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended = _processes[name].poll()
        said = messages(name).read_text()
        if text in said:
            return said
        assert ended is None, f"the VMM ended with status {ended}: {said}"
        time.sleep(0.05)
    raise AssertionError(f"the VMM did not say {text!r}: {messages(name).read_text()}")


def wait_for_end(name: str) -> tuple[int, str]:
    """Wait until the VMM has ended; return its status and what it has said."""
    return _processes[name].wait(PATIENCE), messages(name).read_text()


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
    before = len(messages(name).read_text().splitlines())
    _processes[name].send_signal(signal.SIGUSR1)
    _wait_for_next(name, before, "is stored")
    return said(name), checksums_of_process(name)


def go_on(name: str) -> None:
    """Have the VMM take the VM's state out of the store again, and run it."""
    before = len(messages(name).read_text().splitlines())
    _processes[name].send_signal(signal.SIGUSR2)
    _wait_for_next(name, before, "runs on")


def _wait_for_next(name: str, before: int, text: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(text in line for line in messages(name).read_text().splitlines()[before:]):
        ended = _processes[name].poll()
        assert ended is None, f"the VMM ended with status {ended}"
        assert time.monotonic() < deadline, f"the VMM did not say {text!r}"
        time.sleep(0.05)


def signal_and_wait_for_end(name: str, number: int) -> int:
    """Send a signal to the VMM, which ends it; return its status."""
    _processes[name].send_signal(number)
    return _processes[name].wait(PATIENCE)


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


def run_shell(commands: str) -> str:
    """Run commands of the README in the checkout; return what they print."""
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path, "PATH": SHELL_PATH}
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
        if folder.name.isdigit() and b"mini_vmm.py" in (folder / "cmdline").read_bytes():
            os.kill(int(folder.name), signal.SIGKILL)
