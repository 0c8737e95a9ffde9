"""A small VMM whose VMs live through an update of their host's kernel, and of itself.

`run NAME` starts a VM. SIGUSR1 pauses it and stores its state beside its RAM, which is in the store
from the beginning; then the host may jump. `resume NAME`, after the jump, goes on where it was.
SIGUSR2 lets a VM that was stored run on without a jump; SIGTERM ends the VM, unless it is stored.

With `--coordinator PATH`, the VM takes part in every update that `pyluo update run` makes: it is
stored when the coordinator says so, and runs on if there is no jump.

Without a jump, the VM moves to another build of the VMM: `take-over NAME --socket PATH` gets it
from the process that was started with this `--socket`, and SIGHUP executes this file anew.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from machine import PATTERN, Machine, VcpuFailure

from pyluo import (
    GuestRam,
    IncomingStore,
    KeeperChoice,
    Memfd,
    OutgoingStore,
    OwnedFd,
    RequestError,
    SessionNotFoundError,
    handoff,
    kvm,
    update,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROGRAM = Path(__file__).with_name("program.elf")
_MIB = 1 << 20
_RAM_LIMIT = 3 << 30  # below the interrupt controllers
_STATE_ROOM = 64 << 10  # bytes of state for each vCPU, and for the rest; it needs some 10 KiB
_PATIENCE = 30.0  # seconds for the other VMM to answer, or to close the device
_ENDING = 2.0  # seconds from the end of a process's connections to its own end, at most
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


class Lost(Exception):
    """The VM cannot go on."""


class StillHere(Exception):
    """The VM did not move to a successor, and goes on in this process."""


# Makes a machine with this RAM and so many vCPUs.
MakeMachine = Callable[[GuestRam, int], Machine]
# What a VMM is asked for: a signal, a successor's connection, or what the coordinator wants.
Event = int | socket.socket | update.Event


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the command line chose, besides the command.

    Attributes:
        name: the name of the VM and of its store.
        keeper: what keeps the store.
        socket: the path at which a successor can ask for the VM; None for nowhere.
        coordinator: where the coordinator of updates listens; None to take part in none.
    """

    name: str
    keeper: KeeperChoice
    socket: Path | None
    coordinator: Path | None

    def words(self) -> list[str]:
        """Return the words of the command line that choose the same."""
        words = [] if self.socket is None else ["--socket", os.fspath(self.socket)]
        words += [] if self.coordinator is None else ["--coordinator", os.fspath(self.coordinator)]
        words += ["--no-keeper"] if self.keeper is KeeperChoice.NONE else []
        return [self.name, *words]


class Vmm:
    """A VM that runs in this process, and its store.

    Args:
        choices: what the command line chose.
        ram: the VM's RAM.
        lock: the lock on the RAM, by which no other process runs the VM.
        machine: the VM.
        store: the store, with the entries ``ram`` and ``state``.
        state_file: the file of ``state``. There is a state in it only while it is the VM's present
            one: while the VM is paused.
    """

    def __init__(
        self,
        choices: Choices,
        ram: GuestRam,
        lock: OwnedFd,
        machine: Machine,
        store: OutgoingStore,
        state_file: Memfd,
    ) -> None:
        self._choices = choices
        self._ram = ram
        self._lock = lock
        self._machine = machine
        self._store = store
        self._state_file = state_file
        self._listening = ExitStack()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._coordinator: update.Participant
        self._is_stored = False
        self._stored_for_update = False  # and not by SIGUSR1

    @property
    def _name(self) -> str:
        return self._choices.name

    def serve(self, paused: float | None = None) -> None:
        """Do what is asked for, until the VM ends or has moved.

        Args:
            paused: for how many seconds the VM did not run, if it has just been resumed.
        """
        self._begin(_put_signals, self._events)
        if self._choices.coordinator is not None:
            self._begin(self._take_part, self._choices.coordinator, paused)
        with self._listening:
            self._listen()
            while self._do(self._events.get()):
                pass

    def _do(self, event: Event) -> bool:
        """Do what an event asks for; return whether the VM is still here."""
        if self._machine.failure:
            self._store.discard()
            raise Lost(self._machine.failure)
        is_stored = self._is_stored
        match event:
            case signal.SIGUSR1 if not is_stored:
                self._put_into_store()
            case signal.SIGUSR2 if is_stored:
                self._run_on()
            case signal.SIGHUP if not is_stored:
                self._move_through_exec()
            case signal.SIGTERM | signal.SIGINT:
                if not is_stored:
                    self._store.discard()
                return False
            case socket.socket():
                return not self._move_to_process(event, is_stored)
            case update.Participant():
                self._coordinator = event
            case update.Prepare():
                self._prepare(event, is_stored)
            case update.Abort():
                if is_stored and self._stored_for_update:
                    self._run_on()
                with suppress(RequestError):  # the coordinator has gone; it will be heard of
                    self._coordinator.running(event)
            case update.CoordinatorLost() if is_stored and self._stored_for_update:
                self._run_on()
        return True

    # What is asked for, from threads that wait for it.

    @staticmethod
    def _begin(function: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()

    def _take_part(self, path: Path, paused: float | None) -> None:
        update.take_part(
            self._name,
            self._events.put,
            path=path,
            is_stored=lambda: self._is_stored,
            paused=paused,
            complain=lambda reason: tell(f"{self._name} takes part in no update: {reason}"),
        )

    def _prepare(self, prepare: update.Prepare, is_stored: bool) -> None:
        """Store the VM for an update, and say so, or why not."""
        if not is_stored:
            self._stored_for_update = self._put_into_store()
        with suppress(RequestError):  # the coordinator has gone; it will be heard of
            if self._is_stored:
                self._coordinator.ready(prepare, [self._name])
            else:
                self._coordinator.unable(prepare, "see what its VMM says")

    def _run_on(self) -> None:
        self._run_machine()
        tell(f"{self._name} runs on")

    def _run_machine(self) -> None:
        # In this order: a VM that runs has no state that could be taken for its own.
        kvm.VmState.erase(self._state_file)
        self._is_stored = self._stored_for_update = False
        self._machine.run()

    def _put_into_store(self) -> bool:
        """Pause the VM and store its state, or let it run on; return whether it is stored."""
        began = time.monotonic()
        try:
            self._machine.pause()
            self._machine.save().write(self._state_file)
        except (RequestError, ValueError) as error:
            self._run_machine()
            tell(f"{self._name} runs on: {error}")
            return False
        self._is_stored = True
        tell(f"{self._name} is stored: {(time.monotonic() - began) * 1000:.1f} ms")
        return True

    # Moving to another build of the VMM. What moves is the state; the RAM stays where it is.

    def _listen(self) -> None:
        """Begin to wait for a successor."""
        if self._choices.socket is None:
            return
        try:
            listener = self._listening.enter_context(
                handoff.listen(self._choices.socket, timeout=None)
            )
        except RequestError as error:
            tell(f"{self._name}: nobody can take it over: {error}")
            return
        self._listening.callback(_wake_up, listener)
        self._begin(self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # there will be no successor
            self._events.put(listener.accept()[0])

    def _move_to_process(self, successor: socket.socket, is_stored: bool) -> bool:
        """Let the VM go on in the process that has connected; return whether it does."""
        self._listening.close()
        with successor:
            try:
                if is_stored:
                    raise StillHere("it is stored: send SIGUSR2 first")
                self._require_movable()
                self._hand_over(successor)
            except (StillHere, RequestError, OSError, ValueError) as error:
                tell(f"{self._name} stays: {error}")
                self._listen()
                return False
        self._store.close()
        tell(f"{self._name} has moved")
        return True

    def _hand_over(self, successor: socket.socket) -> None:
        """Hand the VM over; `take_over` is the other side.

        The successor gets the files while the VM runs, and makes all that it can beforehand. Then
        the VM pauses. It belongs to this process until "go", and to the successor once the state
        is erased.

        Raises:
            StillHere: the successor does not go on with the VM, and never will.
            RequestError: the handoff of the files failed.
            Lost: the successor died with the VM.
        """
        peer = handoff.send(successor, self._files(), self._parts())
        with OwnedFd(os.pidfd_open(peer.pid)) as pidfd:
            _expect(successor, b"ready")  # so the pidfd is the successor's
            self._machine.pause()
            try:
                self._machine.save().write(self._state_file)
                successor.send(b"state")
                _expect(successor, b"restored")
                successor.send(b"go")
                try:
                    _expect(successor, b"runs")
                except StillHere:
                    self._take_back(pidfd)
                    raise
            except (StillHere, RequestError, OSError, ValueError):
                # Should this process die at any moment from here on, the successor finds no state
                # of a VM that has gone on since.
                self._run_machine()
                raise

    def _take_back(self, successor: OwnedFd) -> None:
        """Make sure that a successor that was told to go on has not, and never will.

        Raises:
            Lost: it has.
        """
        if not has_ended(successor):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(successor.fileno(), signal.SIGKILL)
            select.select([successor], [], [])
        try:
            kvm.VmState.read(self._state_file)
        except RequestError as error:
            raise Lost("its successor is dead") from error

    def _move_through_exec(self) -> None:
        """Execute this file anew, which goes on with the VM; if that fails, let it run on here."""
        try:
            self._require_movable()
        except StillHere as error:
            tell(f"{self._name} stays: {error}")
            return
        if not self._put_into_store():
            return
        self._listening.close()
        command = [sys.executable, os.path.abspath(__file__), "inherit", *self._choices.words()]
        try:
            handoff.exec_with(command, self._files(), self._parts())
        except RequestError as error:
            tell(f"{self._name} runs on: {error}")
            self._run_machine()
            self._listen()

    def _require_movable(self) -> None:
        if not self._machine.is_movable:
            raise StillHere("it has a device, which only a jump can carry over")
        if self._store.keeper is None:
            raise StillHere("its store has no keeper, who could give it to another program")

    def _files(self) -> dict[str, OwnedFd]:
        """Return what a successor in this kernel needs; the store comes from its keeper."""
        memfds = {f"ram{number}": memfd for number, memfd in enumerate(self._ram.memfds)}
        return memfds | {"lock": self._lock, "state": self._state_file}

    def _parts(self) -> bytes:
        """Return what a successor must know to make the machine."""
        parts = {"ram": self._ram.as_json(), "vcpus": len(self._machine.vcpus)}
        return json.dumps(parts).encode()


def _put_signals(events: queue.SimpleQueue[Event]) -> None:
    while True:
        events.put(signal.sigwait(_SIGNALS))


def _wake_up(listener: socket.socket) -> None:
    """End the wait of another thread for a connection."""
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


def _expect(connection: socket.socket, word: bytes) -> None:
    """Wait for a word from the other VMM.

    Raises:
        StillHere: it sends another one, ends the connection, or takes too long.
    """
    connection.settimeout(_PATIENCE)
    try:
        got = connection.recv(100)
    except OSError as error:
        raise StillHere(f"no answer: {error}") from error
    if got != word:
        raise StillHere(f"the other VMM says {got.decode(errors='replace') or 'nothing'}")


def run(choices: Choices, make: MakeMachine, *, memory: int, cpus: int, program: Path) -> None:
    """Start a VM, and keep it until it is told to end."""
    ram = GuestRam.create(choices.name, memory)
    lock = ram.lock()
    machine = make(ram, cpus)
    machine.load(program)
    store = OutgoingStore.create(choices.name, keeper=choices.keeper, wait=_PATIENCE)
    try:
        store.add("ram", ram)
        # Preserved now, and empty: storing the state needs no memory, and no request.
        state_file = Memfd.create(f"{choices.name}.state", _STATE_ROOM * (cpus + 1))
        store.add("state", state_file, requires=["ram"])
        machine.record(store)
    except BaseException:
        store.discard()
        raise
    machine.start()
    tell(f"{choices.name} runs")
    Vmm(choices, ram, lock, machine, store, state_file).serve()


def find(choices: Choices) -> IncomingStore | None:
    """Return the store of a VM that lived before the jump; None if there was none."""
    try:
        return IncomingStore.retrieve(choices.name, keeper=choices.keeper, wait=_PATIENCE)
    except SessionNotFoundError:
        return None


def resume(choices: Choices, make: MakeMachine, incoming: IncomingStore) -> None:
    """Go on with a VM that was stored before the jump."""
    began = time.monotonic()
    name = choices.name
    ram = incoming.get_ram("ram")
    lock = ram.lock()
    state_file = incoming.get("state", Memfd)
    try:
        state = kvm.VmState.read(state_file)
    except RequestError as error:
        if error.errno != errno.EBADMSG:
            raise
        raise Lost("it was not stored when the host jumped; its RAM is in the store") from error
    machine = make(ram, len(state.vcpus))
    machine.rebuild(incoming)
    restored = machine.restore(state)
    # Until here, nothing has changed, so that this can be tried again. Once the state is erased,
    # the VM is in this process only, and nobody else can go on from there.
    store = incoming.renew(wait=_PATIENCE)
    kvm.VmState.erase(state_file)
    machine.start()
    tell(f"{name} runs again: paused for {restored.paused / 1e6:.0f} ms by its own clock")
    tell(f"{name}: resumed in {(time.monotonic() - began) * 1000:.0f} ms; {restored}")
    Vmm(choices, ram, lock, machine, store, state_file).serve(restored.paused / 1e9)


class Received:
    """A VM from another VMM on this kernel: its RAM, and a machine that has no state yet."""

    def __init__(self, files: handoff.Handoff) -> None:
        parts = json.loads(files.state)
        names = [name for name in files.files if name.startswith("ram")]
        self.ram = GuestRam.from_memfds([files.take(name, Memfd) for name in names], parts["ram"])
        self.lock = files.take("lock")
        self.state_file = files.take("state", Memfd)
        self.machine = Machine(self.ram, parts["vcpus"])

    def restore(self) -> kvm.Restored:
        """Give the machine the state."""
        return self.machine.restore(kvm.VmState.read(self.state_file))

    def start(self, other: socket.socket | None = None) -> None:
        """Run the VM, whose state was restored, and say so to the VMM that had it."""
        kvm.VmState.erase(self.state_file)
        if other is not None:
            with suppress(OSError):  # it is dead
                other.send(b"runs")
        self.machine.start()

    def serve(self, choices: Choices, store: OutgoingStore, restored: kvm.Restored) -> None:
        """Keep the VM, which runs, until it ends."""
        paused = restored.paused / 1e6
        tell(f"{choices.name} runs here: paused for {paused:.1f} ms by its own clock; {restored}")
        Vmm(choices, self.ram, self.lock, self.machine, store, self.state_file).serve()


def take_over(choices: Choices) -> None:
    """Get a VM from the VMM that runs it, and go on with it; `Vmm._hand_over` is the other side."""
    if choices.socket is None:
        raise Lost("--socket PATH says where its VMM listens")
    with handoff.connect(choices.socket) as other:
        with handoff.receive(other) as files:
            vm = Received(files)
            assert files.peer is not None
            pidfd = OwnedFd(os.pidfd_open(files.peer.pid))
        with pidfd:
            try:
                other.send(b"ready")
                _expect(other, b"state")
                restored = vm.restore()
                other.send(b"restored")
                _expect(other, b"go")
            except (OSError, StillHere) as error:
                if not has_ended(pidfd):
                    raise Lost(f"its VMM goes on with it: {error}") from error
                # If it died before it paused the VM, or after it had gone on, there is no state.
                restored = vm.restore()
        vm.start(other)
    vm.serve(choices, OutgoingStore.open(choices.name, keeper=choices.keeper), restored)


def inherit(choices: Choices) -> None:
    """Go on with the VM that the previous program of this process has stored."""
    with handoff.inherited() as files:
        vm = Received(files)
    restored = vm.restore()
    store = OutgoingStore.open(choices.name, keeper=choices.keeper)
    vm.start()
    vm.serve(choices, store, restored)


def has_ended(pidfd: OwnedFd) -> bool:
    """Return whether a process has ended, or is just ending."""
    poll = select.poll()
    poll.register(pidfd.fileno(), select.POLLIN)
    return bool(poll.poll(_ENDING * 1000))


def tell(text: str) -> None:
    print(f"mini_vmm: {text}", file=sys.stderr, flush=True)


def memory_size(text: str) -> int:
    """Return the size of a VM's RAM, in bytes, that a number of MiB means."""
    size = int(text) * _MIB
    if not PATTERN < size <= _RAM_LIMIT:
        limits = f"more than {PATTERN // _MIB} and up to {_RAM_LIMIT // _MIB} MiB"
        raise argparse.ArgumentTypeError(f"{text} MiB: a VM has {limits}")
    return size


def make_parser(program: Path) -> argparse.ArgumentParser:
    """Return the parser of a VMM whose VMs run `program`, unless told otherwise."""
    parser = argparse.ArgumentParser(description="run a VM that lives through live updates")
    commands = parser.add_subparsers(dest="command", required=True)
    new = [
        commands.add_parser("run", help="start a VM"),
        commands.add_parser(
            "run-or-resume", help="go on with the VM if there is one; for a service"
        ),
    ]
    for command in new:
        command.add_argument("--memory", type=memory_size, default="80", metavar="MIB")
        command.add_argument("--cpus", type=int, default=2)
        command.add_argument("--program", type=Path, default=program)
    others = {
        "resume": "go on with a VM after the jump",
        "take-over": "get a VM from the VMM that runs it",
        "inherit": "go on with the VM of the program before; SIGHUP calls this",
    }
    old = [commands.add_parser(name, help=text) for name, text in others.items()]
    for command in (*new, *old):
        command.add_argument("name")
        command.add_argument("--no-keeper", action="store_true", help="nothing keeps its store")
        command.add_argument(
            "--socket",
            type=Path,
            metavar="PATH",
            help="where another VMM can ask for the VM; for take-over, also where it asks",
        )
        command.add_argument(
            "--coordinator",
            type=Path,
            metavar="PATH",
            help="take part in the updates of the coordinator that listens there",
        )
    return parser


def carry_out(chosen: argparse.Namespace, make: MakeMachine) -> int:
    """Do what a command line chose; return the program's status."""
    keeper = KeeperChoice.NONE if chosen.no_keeper else KeeperChoice.DEFAULT
    choices = Choices(
        name=chosen.name, keeper=keeper, socket=chosen.socket, coordinator=chosen.coordinator
    )
    # In all threads: the main thread waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        match chosen.command:
            case "take-over":
                take_over(choices)
            case "inherit":
                inherit(choices)
            case "resume" | "run-or-resume" if (incoming := find(choices)) is not None:
                resume(choices, make, incoming)
            case "resume":
                raise Lost("there is no such VM: it was not stored, or another process has it")
            case _:
                size, cpus, program = chosen.memory, chosen.cpus, chosen.program
                run(choices, make, memory=size, cpus=cpus, program=program)
    except (RequestError, Lost, StillHere, VcpuFailure) as error:
        tell(f"{chosen.name}: {error}")
        return 1
    return 0


def main(words: Sequence[str] | None = None) -> int:
    return carry_out(make_parser(_PROGRAM).parse_args(words), Machine)


if __name__ == "__main__":
    sys.exit(main())
