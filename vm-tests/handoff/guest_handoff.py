"""A device that does DMA while it goes from one process to the next, run in the guest.

The two processes are programs of their own: `old` has the device, and either hands it to `new`
over a socket or becomes `new` through exec.
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

from pyluo import IoasLayout, LuoError, Memfd, handoff
from pyluo.iommufd import Accounting, IommuFd
from pyluo.vfio import VfioDevice

if TYPE_CHECKING:
    from pyluo.iommufd import Ioas

TRANSFERS = 3
"""How many each of the processes makes; one more is on its way while the device changes hands."""

PINNED = SIZE // 1024
"""What a process has pinned, in KiB, while RAM is mapped for it."""

# CAP_IPC_LOCK takes a process out of the accounting of locked memory, also out of that by process.
ACCOUNTINGS = {
    "none": Accounting.PROCESS,
    "user": Accounting.USER,
    "process": Accounting.PROCESS,
}
_COUNTED = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
_PATIENCE = 50  # seconds; what drives the guest waits a little longer
_NOBODY = 65534


@dataclass
class Machine:
    """What one process has of it.

    Attributes:
        next: the number of the first transfer that is not done.
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
    def take(cls, given: handoff.Handoff) -> Machine:
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
        """Starts the next transfer, and leaves it on its way."""
        self.ram.write(pattern(self.next), 0)
        self.edu.load(IOVA)
        self.edu.start(IOVA + slot(self.next), BUFFER, to_ram=True)

    def complete(self) -> None:
        """Waits for the transfer on its way."""
        self.edu.wait()
        self.next += 1

    def transfer(self, count: int) -> None:
        for _ in range(count):
            self.begin()
            self.complete()

    def repeat(self) -> None:
        """Starts the transfer once more that was on its way and has ended; RAM forgets it first."""
        self.ram.write(bytes(BUFFER), slot(self.next))
        self.edu.start(IOVA + slot(self.next), BUFFER, to_ram=True)

    def has_room(self) -> bool:
        """Whether one more page can be mapped, and so locked."""
        with Memfd.create("page", 4096) as page:
            try:
                mapping = self.ioas.map_file(page, iova=IOVA + SIZE)
            except LuoError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return False
            self.ioas.unmap(mapping)
            return True

    def wrong(self) -> list[int]:
        """The transfers of which RAM does not hold what they brought."""
        return [
            number
            for number in range(self.next)
            if self.ram.read(BUFFER, slot(number)) != pattern(number)
        ]

    def close(self) -> None:
        self.edu.close()
        self.ioas.iommufd.close()
        self.ram.close()


def counted() -> dict[str, int]:
    """What this process has pinned and locked, in KiB."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) for name in ("VmPin", "VmLck")}


def hand_over(how: str, accounting: str, obstacle: str = "") -> dict[str, Any]:
    """Has the two programs hand the device on, and gives what they saw.

    Args:
        how: "socket" or "exec".
        accounting: one of `ACCOUNTINGS`.
        obstacle: "user mapping" or "limit", to the change of the process; or "other user", which
            is what the successor becomes first.
    """
    before = len(guest_dma.faults())
    prefix = [] if accounting == "none" else _COUNTED
    program = [*prefix, *_program("old", how, accounting, obstacle)]
    ended = subprocess.run(program, env=_environment(), capture_output=True, timeout=_PATIENCE)
    if ended.returncode != 0:
        raise RuntimeError(ended.stderr.decode())
    seen: dict[str, Any] = {}
    for line in ended.stdout.splitlines():
        seen |= json.loads(line)
    seen["pause"] = seen.pop("took") - seen.pop("left")
    return seen | {"faults": guest_dma.faults()[before:]}


def _program(*arguments: str) -> list[str]:
    call = "import sys, guest_handoff as g; getattr(g, sys.argv[1])(*sys.argv[2:])"
    return [sys.executable, "-c", call, *arguments]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def _say(**seen: object) -> None:
    print(json.dumps(seen), flush=True)


def old(how: str, accounting: str, obstacle: str) -> None:
    """The process that has the device."""
    machine = Machine.make(accounting)
    if accounting != "none":
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (room(accounting, obstacle),) * 2)
        _say(old_room_before=machine.has_room())
    machine.transfer(TRANSFERS)
    state = machine.state
    if obstacle == "user mapping":
        machine.ioas.map(Memfd.create("buffer", 4096).map(), iova=2 * SIZE + IOVA)
    _say(old_before=counted())
    if how == "exec":
        machine.begin()
        _say(left=time.monotonic())
        handoff.exec_with(
            _program("after_exec", obstacle), machine.files, state, env=_environment()
        )
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
        _say(left=time.monotonic())
        handoff.send(ours, machine.files, state)
        assert ours.recv(100) == b"changed"
        _say(old_after=counted())
        if accounting != "none":
            _say(old_room_after=machine.has_room())
        machine.close()
        ours.send(b"gone")
    sys.exit(successor.wait())


def room(accounting: str, obstacle: str) -> int:
    """How much both processes may lock: enough for RAM, and not a page more than is needed.

    By user the kernel charges the new process before it gives the old one its count back.
    """
    twice = accounting == "user" and obstacle != "other user"
    return SIZE * (2 if twice else 1) + (4096 if obstacle == "user mapping" else 0)


def after_socket(number: str, obstacle: str) -> None:
    """The successor, at the other end of a socket."""
    with socket.socket(fileno=int(number)) as theirs:
        theirs.send(b"ready")
        machine = Machine.take(handoff.receive(theirs))
        change(machine, obstacle)
        theirs.send(b"changed")
        assert theirs.recv(100) == b"gone"
    go_on(machine)


def after_exec(obstacle: str) -> None:
    """The successor, in the same process."""
    machine = Machine.take(handoff.inherited())
    change(machine, obstacle)
    go_on(machine)


def change(machine: Machine, obstacle: str) -> None:
    """Makes this process the one whose memory it is, while the device does DMA."""
    before = counted()
    if not machine.edu.busy:
        machine.repeat()
    if obstacle == "limit":
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (SIZE // 2, SIZE // 2))
    if obstacle == "other user":
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    running = machine.edu.busy
    try:
        machine.ioas.iommufd.change_process()
    except LuoError as error:
        _say(refused=[type(error).__name__, str(error)])
    _say(took=time.monotonic(), across=running and machine.edu.busy)
    _say(new_before=before, new_after=counted())
    if obstacle == "other user":
        _say(new_room=machine.has_room())


def go_on(machine: Machine) -> None:
    """What shows that the device is the successor's: it goes on with the next transfer."""
    machine.complete()
    machine.transfer(TRANSFERS)
    _say(transfers=machine.next, wrong=machine.wrong())
    machine.ioas.unmap_all()
    _say(new_unmapped=counted())
    machine.close()
