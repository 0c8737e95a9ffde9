"""QEMU, as it is, whose VMs live through an update of their host's kernel.

`run NAME -- OPTIONS` starts QEMU with these options and with RAM that is in a store from the
beginning. SIGUSR1 pauses the VM and stores the state of its devices beside the RAM; then the host
may jump. `resume NAME`, after the jump, starts another QEMU, possibly a newer one, which goes on
where the VM was. `run-or-resume NAME -- OPTIONS` is for services: it resumes a VM that was stored,
and else starts one. SIGUSR2 lets a VM that was stored run on without a jump; SIGTERM ends the VM,
unless it is stored.

The state of the devices is what QEMU would send to another host in a migration, without the RAM,
which both QEMUs share.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qemu.qmp import QMPClient, QMPError

from pyluo import (
    GuestRam,
    IncomingStore,
    KeeperChoice,
    Memfd,
    OutgoingStore,
    RequestError,
    SessionNotFoundError,
    StateFormat,
    update,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo import OwnedFd

_FORMAT = StateFormat("qemuLive", 2)
_PAUSED_AT = struct.Struct("=d")  # before what QEMU gives: CLOCK_REALTIME in seconds since 1970
_MIB = 1 << 20
_STATE_ROOM = 8 << 10  # KiB; a state has about 300 KiB, and more with every device and its firmware
_PATIENCE = 60.0  # seconds for QEMU to start, to give a state or to take one
_POLL = 0.01  # seconds
Events = asyncio.Queue["int | update.Event"]
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def open_tap(name: str) -> OwnedFd:
    """Open a tap. Only a VM with a tap waits for the library for networks, which loads slowly."""
    from pyluo import network

    return network.open_tap(name)


class Lost(Exception):
    """The VM cannot go on."""


class StateError(Exception):
    """QEMU did not give a state, or did not take it."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What makes two QEMUs the same machine.

    Attributes:
        machine: the type of the machine. One that has a version, such as pc-q35-7.2, is the same
            in every QEMU that has it.
        options: QEMU's options for everything but the machine's type, its RAM, its monitor and its
            taps.
        taps: the names of the taps, which are those of QEMU's network backends, too.
    """

    machine: str
    options: tuple[str, ...]
    taps: tuple[str, ...]


class Qemu:
    """A QEMU process and its monitor. The VM is paused until `go_on`.

    QEMU ends with the process that has started it, so that no VM runs without one.
    """

    def __init__(self, process: asyncio.subprocess.Process, monitor: QMPClient) -> None:
        self.process = process
        self._monitor = monitor

    @classmethod
    async def start(
        cls, binary: str, setup: Setup, ram: GuestRam, lock: OwnedFd, *, incoming: bool
    ) -> Self:
        """Start a QEMU.

        Args:
            binary: the path of QEMU.
            setup: the machine.
            ram: its RAM.
            lock: the lock on the RAM, which QEMU has from now on, too.
            incoming: whether it begins with the state that `load` gets, and not with firmware.
        """
        if len(ram.memfds) != 1:
            raise Lost(f"its RAM consists of {len(ram.memfds)} files, and QEMU takes one")
        file = ram.memfds[0].fileno()
        ours, qemus = socket.socketpair()
        with ExitStack() as files, qemus:
            try:
                taps = {name: files.enter_context(open_tap(name)) for name in setup.taps}
                command = [
                    "setpriv", "--pdeathsig", "KILL", "--", binary,
                    "-machine", f"{setup.machine},memory-backend=ram",
                    "-m", f"size={ram.size >> 10}K",
                    "-object", "memory-backend-file,id=ram,share=on,"
                    f"size={ram.size},mem-path=/proc/self/fd/{file}",
                    "-chardev", f"socket,id=monitor,fd={qemus.fileno()}",
                    "-mon", "chardev=monitor,mode=control",
                    "-S",
                ]  # fmt: skip
                for name, tap in taps.items():
                    command += ["-netdev", f"tap,id={name},fd={tap.fileno()}"]
                command += ["-incoming", "defer"] if incoming else []
                process = await asyncio.create_subprocess_exec(
                    *command,
                    *setup.options,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[
                        file,
                        lock.fileno(),
                        qemus.fileno(),
                        *(tap.fileno() for tap in taps.values()),
                    ],
                )
            except BaseException:
                ours.close()
                raise
        qemu = cls(process, QMPClient("vm"))
        try:
            async with asyncio.timeout(_PATIENCE):
                await qemu._monitor.connect(ours)  # which closes it
                capability = {"capability": "x-ignore-shared", "state": True}
                await qemu._ask("migrate-set-capabilities", capabilities=[capability])
        except BaseException as error:
            status = await qemu.end()
            if isinstance(error, QMPError | OSError | StateError):
                raise Lost(f"QEMU did not start: {error}; status {status}") from error
            raise
        return qemu

    async def machine(self) -> str:
        """Return the type of the machine, with its version."""
        answer = await self._ask("qom-get", path="/machine", property="type")
        return str(answer).removesuffix("-machine")

    async def go_on(self) -> None:
        """Run the VM."""
        await self._ask("cont")

    async def save(self, room: int) -> bytes:
        """Pause the VM, and return the state of its devices.

        Args:
            room: how large the state may be, in bytes.

        Raises:
            StateError: QEMU gives none, or a larger one, or takes too long. The VM is paused.
        """
        await self._ask("stop")
        loop = asyncio.get_running_loop()
        state = bytearray()
        with await self._give_socket() as ours:
            await self._ask("migrate", uri="fd:state")
            while part := await loop.sock_recv(ours, _MIB):
                state += part
                if len(state) > room:
                    await self._ask("migrate_cancel")
                    raise StateError(f"the state has more than {room} bytes: see --state-room")
            await self._wait_for_migration()
        return bytes(state)

    async def load(self, state: bytes) -> None:
        """Give the state of another QEMU to this one, which was started to get it.

        Raises:
            StateError: QEMU does not take it. It has not run, and cannot.
        """
        with await self._give_socket() as ours:
            await self._ask("migrate-incoming", uri="fd:state")
            try:
                await asyncio.get_running_loop().sock_sendall(ours, state)
            except OSError as error:
                raise StateError(f"QEMU stopped reading the state: {error}") from error
            await self._wait_for_migration()

    async def end(self) -> int:
        """Kill QEMU; return its status."""
        with suppress(ProcessLookupError):
            self.process.kill()
        status = await self.process.wait()
        with suppress(QMPError, EOFError, OSError):
            await self._monitor.disconnect()
        return status

    async def _give_socket(self) -> socket.socket:
        """Give QEMU a socket, which it calls `state`; return the other end."""
        ours, qemus = socket.socketpair()
        ours.setblocking(False)
        with qemus:
            try:
                if self.process.returncode is None:
                    self._monitor.send_fd_scm(qemus.fileno())
                await self._ask("getfd", fdname="state")
            except BaseException as error:
                ours.close()
                if isinstance(error, OSError):
                    raise StateError(f"QEMU takes no descriptor: {error}") from error
                raise
        return ours

    async def _wait_for_migration(self) -> None:
        while True:
            answer = await self._ask("query-migrate")
            match answer.get("status"):
                case "completed":
                    return
                case "failed" | "cancelled" as status:
                    reason = answer.get("error-desc", "its messages may say why")
                    raise StateError(f"{status}: {reason}")
            await asyncio.sleep(_POLL)

    async def _ask(self, command: str, **arguments: Any) -> Any:
        try:
            return await self._monitor.execute(command, arguments or None)
        except QMPError as error:
            raise StateError(f"{command}: {error}") from error


class Vm:
    """A VM that runs in a QEMU of this process, and its store.

    Args:
        name: the name of the VM and of its store.
        qemu: the QEMU.
        store: the store, with the entries ``ram`` and ``state``.
        state_file: the file of ``state``. There is a state in it only while it is the VM's present
            one: while the VM is paused.
    """

    def __init__(self, name: str, qemu: Qemu, store: OutgoingStore, state_file: Memfd) -> None:
        self._name = name
        self._qemu = qemu
        self._store = store
        self._state_file = state_file
        self._is_stored = False
        self._stored_for_update = False  # and not by SIGUSR1
        self._coordinator: update.Participant

    def take_part(self, path: Path, events: Events, paused: float | None) -> None:
        """Take part in the updates of the coordinator that listens at `path`.

        Args:
            path: the path of its socket.
            events: what `serve` waits for.
            paused: for how many seconds the VM did not run, if it has just been resumed.
        """
        loop = asyncio.get_running_loop()
        wishes = partial(
            update.take_part,
            self._name,
            lambda wish: loop.call_soon_threadsafe(events.put_nowait, wish),
            path=path,
            is_stored=lambda: self._is_stored,
            paused=paused,
            complain=lambda reason: tell(f"{self._name} takes part in no update: {reason}"),
        )
        threading.Thread(target=wishes, daemon=True).start()

    async def serve(self, events: Events) -> int:
        """Do what is asked for, until the VM ends; return the program's status."""
        ended = asyncio.create_task(self._qemu.process.wait())
        while True:
            event = asyncio.create_task(events.get())
            await asyncio.wait([ended, event], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                event.cancel()
                return self._end(ended.result())
            if await self._do(event.result()):
                return 0

    async def _do(self, event: int | update.Event) -> bool:
        """Do what an event asks for; return whether the VM has ended."""
        is_stored = self._is_stored
        match event:
            case signal.SIGUSR1 if not is_stored:
                await self._put_into_store()
            case signal.SIGUSR2 if is_stored:
                await self._run_on()
            case signal.SIGTERM | signal.SIGINT:
                await self._qemu.end()
                if not is_stored:
                    self._store.discard()
                return True
            case update.Participant():
                self._coordinator = event
            case update.Prepare():
                await self._prepare(event, is_stored)
            case update.Abort():
                if is_stored and self._stored_for_update:
                    await self._run_on()
                with suppress(RequestError):  # the coordinator has gone; it will be heard of
                    self._coordinator.running(event)
            case update.CoordinatorLost() if is_stored and self._stored_for_update:
                await self._run_on()
        return False

    async def _prepare(self, prepare: update.Prepare, is_stored: bool) -> None:
        """Store the VM for an update, and say so, or why not."""
        if not is_stored:
            self._stored_for_update = await self._put_into_store()
        with suppress(RequestError):  # the coordinator has gone; it will be heard of
            if self._is_stored:
                self._coordinator.ready(prepare, [self._name])
            else:
                self._coordinator.unable(prepare, "see what its VMM says")

    async def _put_into_store(self) -> bool:
        """Pause the VM and store its state, or let it run on; return whether it is stored."""
        began, paused_at = time.monotonic(), _PAUSED_AT.pack(time.time())
        try:
            async with asyncio.timeout(_PATIENCE):
                room = _FORMAT.room(self._state_file) - len(paused_at)
                state = await self._qemu.save(room)
        except (StateError, TimeoutError) as error:
            with suppress(StateError):  # it has ended: `serve` sees that
                await self._go_on()
            tell(f"{self._name} runs on: {error or 'QEMU took too long'}")
            return False
        _FORMAT.write(self._state_file, paused_at + state)
        self._is_stored = True
        took = (time.monotonic() - began) * 1000
        tell(f"{self._name} is stored: {took:.1f} ms, {len(state)} bytes")
        return True

    async def _run_on(self) -> None:
        await self._go_on()
        tell(f"{self._name} runs on")

    async def _go_on(self) -> None:
        # In this order: a VM that runs has no state that could be taken for its own.
        _FORMAT.erase(self._state_file)
        self._is_stored = self._stored_for_update = False
        await self._qemu.go_on()

    def _end(self, status: int) -> int:
        """Take leave of a QEMU that has ended; return the program's status."""
        if self._is_stored:
            tell(f"{self._name}: QEMU has ended with status {status}; the VM is stored")
            return 0
        self._store.discard()
        if status:
            raise Lost(f"QEMU has ended with status {status}")
        return 0


async def run(arguments: argparse.Namespace, keeper: KeeperChoice) -> int:
    """Start a VM, and keep it until it ends."""
    events = listen()
    ram = GuestRam.create(arguments.name, arguments.memory * _MIB)
    lock = ram.lock()
    store = OutgoingStore.create(arguments.name, keeper=keeper, wait=_PATIENCE)
    try:
        store.add("ram", ram)
        # Preserved now, and empty: storing the state needs no memory, and no request.
        state_file = Memfd.create(f"{arguments.name}.state", arguments.state_room << 10)
        store.add("state", state_file, requires=["ram"])
        setup = Setup(
            machine=arguments.machine,
            options=tuple(arguments.options),
            taps=tuple(arguments.tap),
        )
        qemu = await Qemu.start(find(arguments.qemu), setup, ram, lock, incoming=False)
        setup = replace(setup, machine=await qemu.machine())
        store.set_meta({"setup": asdict(setup)})
        await qemu.go_on()
    except BaseException:
        store.discard()
        raise
    tell(f"{arguments.name} runs: machine {setup.machine}")
    vm = Vm(arguments.name, qemu, store, state_file)
    if arguments.coordinator is not None:
        vm.take_part(arguments.coordinator, events, paused=None)
    return await vm.serve(events)


async def resume(arguments: argparse.Namespace, incoming: IncomingStore) -> int:
    """Go on with a VM that was stored before the jump."""
    began = time.monotonic()
    events = listen()
    name = arguments.name
    ram = incoming.get_ram("ram")
    lock = ram.lock()
    state_file = incoming.get("state", Memfd)
    try:
        stored = _FORMAT.read(state_file)
    except RequestError as error:
        if error.errno != errno.EBADMSG:
            raise
        raise Lost("it was not stored when the host jumped; its RAM is in the store") from error
    [paused_at] = _PAUSED_AT.unpack_from(stored)
    state = stored[_PAUSED_AT.size :]
    saved = incoming.meta["setup"]
    setup = Setup(
        machine=saved["machine"], options=tuple(saved["options"]), taps=tuple(saved["taps"])
    )
    qemu = await Qemu.start(find(arguments.qemu), setup, ram, lock, incoming=True)
    try:
        async with asyncio.timeout(_PATIENCE):
            await qemu.load(state)
        # Until here, nothing has changed, so that this can be tried again. Once the state is
        # erased, the VM is in this QEMU only, and nobody else can go on from there.
        store = incoming.renew(wait=_PATIENCE)
        _FORMAT.erase(state_file)
    except BaseException:
        await qemu.end()
        raise
    await qemu.go_on()
    took = (time.monotonic() - began) * 1000
    tell(f"{name} runs again: resumed in {took:.0f} ms, {len(state)} bytes of state")
    vm = Vm(name, qemu, store, state_file)
    if arguments.coordinator is not None:
        vm.take_part(arguments.coordinator, events, paused=time.time() - paused_at)
    return await vm.serve(events)


async def run_or_resume(arguments: argparse.Namespace, keeper: KeeperChoice) -> int:
    """Do what the command says."""
    if arguments.command != "run":
        try:
            incoming = IncomingStore.retrieve(arguments.name, keeper=keeper, wait=_PATIENCE)
        except SessionNotFoundError as error:
            if arguments.command == "resume":
                raise Lost(str(error)) from error
        else:
            return await resume(arguments, incoming)
    return await run(arguments, keeper)


def listen() -> Events:
    """Return a queue that gets the number of each signal from now on."""
    events: Events = asyncio.Queue()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, events.put_nowait, number)
    return events


def find(binary: str) -> str:
    path = shutil.which(binary)
    if path is None:
        raise Lost(f"there is no {binary}: install QEMU, or name it by --qemu")
    return path


def tell(text: str) -> None:
    print(f"qemu_live_update: {text}", file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="run QEMU's VMs, which live through live updates")
    parser.add_argument("--no-keeper", action="store_true", help="nothing keeps what it stores")
    parser.add_argument("--qemu", default="qemu-system-x86_64", help="QEMU's name or path")
    commands = parser.add_subparsers(dest="command", required=True)
    new = [
        commands.add_parser("run", help="start a VM; QEMU's options follow after --"),
        commands.add_parser(
            "run-or-resume", help="go on with the VM if there is one, else start it; for a service"
        ),
    ]
    for command in new:
        command.add_argument("--memory", type=int, default=128, metavar="MIB")
        command.add_argument("--machine", default="q35", help="QEMU's type of the machine")
        command.add_argument(
            "--tap",
            action="append",
            default=[],
            metavar="NAME",
            help="a tap, which is the network backend NAME of the options after --; may be "
            "repeated",
        )
        command.add_argument(
            "--state-room",
            type=int,
            default=_STATE_ROOM,
            metavar="KIB",
            help="memory for the state of its devices",
        )
    for command in (*new, commands.add_parser("resume", help="go on with a VM after the jump")):
        command.add_argument("name")
        command.add_argument(
            "--coordinator",
            type=Path,
            metavar="PATH",
            help="take part in the updates of the coordinator that listens there",
        )
    # argparse takes no list of options after an option: those after -- are QEMU's.
    words = sys.argv[1:] if words is None else words
    own = words.index("--") if "--" in words else len(words)
    chosen = parser.parse_args(words[:own], argparse.Namespace(options=words[own + 1 :]))
    keeper = KeeperChoice.NONE if chosen.no_keeper else KeeperChoice.DEFAULT
    try:
        return asyncio.run(run_or_resume(chosen, keeper))
    except (RequestError, Lost, StateError, TimeoutError) as error:
        tell(f"{chosen.name}: {error or 'QEMU took too long'}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
