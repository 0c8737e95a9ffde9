"""The guest's part of the tests that hand a device over while it does DMA.

The two processes are programs of their own: `old` has the device, and hands it to its successor
over a socket (`after_socket`) or becomes its successor through exec (`after_exec`).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vfio import guest_dma
from vfio.guest_dma import IOVA, SIZE, pattern, slot
from vfio.guest_edu import BUFFER, Edu

from pyluo import IoasLayout, Memfd, RequestError, handoff
from pyluo.iommufd import Accounting, IommuFd
from pyluo.vfio import VfioDevice

if TYPE_CHECKING:
    from pyluo.iommufd import Ioas

TRANSFERS = 3
"""The transfers that each process makes; one more is in flight during the handoff."""

PINNED = SIZE // 1024
"""The memory that a process has pinned while RAM is mapped for it, in KiB."""

# CAP_IPC_LOCK exempts a process from the accounting of locked memory, also from that by process.
ACCOUNTINGS = {
    "none": Accounting.PROCESS,
    "user": Accounting.USER,
    "process": Accounting.PROCESS,
}
_WITHOUT_IPC_LOCK = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
_TIMEOUT = 50  # seconds; the harness waits a little longer
_NOBODY = 65534


@dataclass
class Machine:
    """A process's device, IOAS and RAM.

    Attributes:
        next: the number of the first transfer that is not complete.
    """

    edu: Edu
    ioas: Ioas
    ram: Memfd
    next: int = 0

    @classmethod
    def make(cls, accounting: str) -> Machine:
        iommufd = IommuFd()
        iommufd.accounting = ACCOUNTINGS[accounting]
        ioas = iommufd.alloc_ioas()
        ram = Memfd.create("ram", SIZE)
        ioas.map_file(ram, iova=IOVA)
        return cls(Edu.open(iommufd, ioas), ioas, ram)

    @property
    def files(self) -> dict[str, Any]:
        return {"iommufd": self.ioas.iommufd, "device": self.edu.device, "ram": self.ram}

    @property
    def state(self) -> bytes:
        state = {
            "layout": IoasLayout.record(self.ioas, {"ram": self.ram}).as_json(),
            "ioas": self.ioas.id,
            "device": self.edu.device.iommu_device.id,
            "next": self.next,
        }
        return json.dumps(state).encode()

    @classmethod
    def from_handoff(cls, given: handoff.Handoff) -> Machine:
        with given:
            iommufd = given.take("iommufd", IommuFd)
            device = given.take("device", VfioDevice)
            ram = given.take("ram", Memfd)
            state = json.loads(given.state)
        layout = IoasLayout.from_json(state["layout"])
        ioas = layout.adopt(iommufd, state["ioas"], {"ram": ram})
        device.adopt(iommufd, state["device"], attached=ioas)
        return cls(Edu(device, iommufd), ioas, ram, state["next"])

    def begin(self) -> None:
        """Start the next transfer, without waiting for it."""
        self.ram.write(pattern(self.next), 0)
        self.edu.load(IOVA)
        self.edu.start(IOVA + slot(self.next), BUFFER, to_ram=True)

    def complete(self) -> None:
        """Wait for the transfer in flight."""
        self.edu.wait()
        self.next += 1

    def transfer(self, count: int) -> None:
        for _ in range(count):
            self.begin()
            self.complete()

    def repeat(self) -> None:
        """Clear the result of the last transfer in RAM, and start it again."""
        self.ram.write(bytes(BUFFER), slot(self.next))
        self.edu.start(IOVA + slot(self.next), BUFFER, to_ram=True)

    def has_room(self) -> bool:
        """Return whether one more page can be mapped, and so locked."""
        with Memfd.create("page", 4096) as page:
            try:
                mapping = self.ioas.map_file(page, iova=IOVA + SIZE)
            except RequestError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return False
            self.ioas.unmap(mapping)
            return True

    def failed_transfers(self) -> list[int]:
        """Return the numbers of the transfers whose data is not in RAM."""
        return [
            number
            for number in range(self.next)
            if self.ram.read(BUFFER, slot(number)) != pattern(number)
        ]

    def close(self) -> None:
        self.edu.close()
        self.ioas.iommufd.close()
        self.ram.close()


def read_locked_memory() -> dict[str, int]:
    """Return the memory that this process has pinned and locked, in KiB."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) for name in ("VmPin", "VmLck")}


def hand_over(how: str, accounting: str, obstacle: str = "") -> dict[str, Any]:
    """Run the two programs, and return what they report.

    Args:
        how: "socket" or "exec".
        accounting: a key of `ACCOUNTINGS`.
        obstacle: "user mapping" or "limit", which prevent the change of the process; or "other
            user", as which the successor runs.
    """
    before = len(guest_dma.read_faults())
    prefix = [] if accounting == "none" else _WITHOUT_IPC_LOCK
    program = [*prefix, *_program("old", how, accounting, obstacle)]
    ended = subprocess.run(program, env=_environment(), capture_output=True, timeout=_TIMEOUT)
    if ended.returncode != 0:
        raise RuntimeError(ended.stderr.decode())
    seen: dict[str, Any] = {}
    for line in ended.stdout.splitlines():
        seen |= json.loads(line)
    seen["pause"] = seen.pop("took") - seen.pop("left")
    return seen | {"faults": guest_dma.read_faults()[before:]}


def _program(*arguments: str) -> list[str]:
    call = "import sys, handoff.guest_handoff as g; getattr(g, sys.argv[1])(*sys.argv[2:])"
    return [sys.executable, "-c", call, *arguments]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def _report(**seen: object) -> None:
    print(json.dumps(seen), flush=True)


def old(how: str, accounting: str, obstacle: str) -> None:
    """Run the process that has the device."""
    machine = Machine.make(accounting)
    if accounting != "none":
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock_limit(accounting, obstacle),) * 2)
        _report(old_room_before=machine.has_room())
    machine.transfer(TRANSFERS)
    state = machine.state
    files = machine.files
    if obstacle == "user mapping":
        machine.ioas.map(Memfd.create("buffer", 4096).map(), iova=2 * SIZE + IOVA)
        # pyluo refuses to hand over such an iommufd, but does not recognize a duplicate.
        files["iommufd"] = os.dup(machine.ioas.iommufd.fileno())
    _report(old_before=read_locked_memory())
    if how == "exec":
        machine.begin()
        _report(left=time.monotonic())
        handoff.exec_with(_program("after_exec", obstacle), files, state, env=_environment())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            successor = subprocess.Popen(
                _program("after_socket", str(theirs.fileno()), obstacle),
                env=_environment(),
                pass_fds=[theirs.fileno()],
            )
        assert ours.recv(100) == b"ready"
        machine.begin()
        _report(left=time.monotonic())
        handoff.send(ours, files, state)
        assert ours.recv(100) == b"changed"
        _report(old_after=read_locked_memory())
        if accounting != "none":
            _report(old_room_after=machine.has_room())
        machine.close()
        ours.send(b"gone")
    sys.exit(successor.wait())


def memlock_limit(accounting: str, obstacle: str) -> int:
    """Return the memory that both processes may lock: just enough for RAM, in bytes.

    With accounting by user, the kernel charges the new process before it uncharges the old one.
    """
    twice = accounting == "user" and obstacle != "other user"
    return SIZE * (2 if twice else 1) + (4096 if obstacle == "user mapping" else 0)


def after_socket(number: str, obstacle: str) -> None:
    """Run the successor at the other end of a socket."""
    with socket.socket(fileno=int(number)) as theirs:
        theirs.send(b"ready")
        machine = Machine.from_handoff(handoff.receive(theirs))
        change_process(machine, obstacle)
        theirs.send(b"changed")
        assert theirs.recv(100) == b"gone"
    continue_transfers(machine)


def after_exec(obstacle: str) -> None:
    """Run the successor in the same process."""
    machine = Machine.from_handoff(handoff.inherited())
    change_process(machine, obstacle)
    continue_transfers(machine)


def change_process(machine: Machine, obstacle: str) -> None:
    """Move the iommufd's mappings to this process, while the device does DMA."""
    before = read_locked_memory()
    if not machine.edu.busy:
        machine.repeat()
    if obstacle == "limit":
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (SIZE // 2, SIZE // 2))
    if obstacle == "other user":
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    running = machine.edu.busy
    try:
        machine.ioas.iommufd.change_process()
    except RequestError as error:
        _report(refused=[type(error).__name__, str(error)])
    _report(took=time.monotonic(), across=running and machine.edu.busy)
    _report(new_before=before, new_after=read_locked_memory())
    if obstacle == "other user":
        _report(new_room=machine.has_room())


def continue_transfers(machine: Machine) -> None:
    """Complete the transfer and make more, which shows that the successor drives the device."""
    machine.complete()
    machine.transfer(TRANSFERS)
    _report(transfers=machine.next, wrong=machine.failed_transfers())
    machine.ioas.unmap_all()
    _report(new_unmapped=read_locked_memory())
    machine.close()
