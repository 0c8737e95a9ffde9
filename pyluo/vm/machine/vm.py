"""A guest for tests: boot it, run functions in it, and live-update it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pyluo.build_config import BuildConfig
from pyluo.guest import commands, wire
from pyluo.guest.wire import GuestObject
from pyluo.vm import progress
from pyluo.vm.errors import GuestCrash, HarnessError, VmRegression
from pyluo.vm.kernels.kernel import Kernel
from pyluo.vm.machine import bytecode, imports, kvm, tsc
from pyluo.vm.machine.accelerator import Accelerator, Choice
from pyluo.vm.machine.needs import check_options, explain_root, needs
from pyluo.vm.machine.timeline import GuestLog, Jump
from pyluo.vm.machine.usage import Position, usage
from pyluo.vm.machine.userland import HostUserland, RootUserland, Userland
from pyluo.vm.roots.root import Root

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
    from types import TracebackType

    from pyluo.vm.errors import Cause
    from pyluo.vm.machine.guest import Guest
    from pyluo.vm.machine.lives import Life
    from pyluo.vm.machine.loop_thread import LoopThread
    from pyluo.vm.machine.qemu import Machine
    from pyluo.vm.machine.report import Report
    from pyluo.vm.machine.timeline import Timeline

__all__ = ["VM"]

R = TypeVar("R")

_CALL_TIMEOUT = 60.0
_VMCORES = "PYLUO_VMCORES"
_CMDLINE_LIMIT = 2048  # arch/x86/include/asm/setup.h, COMMAND_LINE_SIZE
_FIXED = (
    "console=ttyS0,115200 earlyprintk=serial,ttyS0,115200 loglevel=6 printk.time=1 panic=0 "
    "oops=panic "
    "no_timer_check unknown_nmi_panic nmi_watchdog=panic "
    "rootfstype=9p rootflags=trans=virtio,version=9p2000.L,cache=loose,msize=1048576 ro "
    "kho=on liveupdate=on"
)

# Before a panic stops the other CPUs, it makes them print their backtraces too, by NMIs.
_ALL_TRACES = "panic_sys_info=all_bt"


class VM:
    """A guest that boots at the start of its `with` block and ends with the block.

    The guest's root is the host's root, read-only, so that the guest can run a function of any
    module that the host can import; or it is another one, and the guest's first process the systemd
    in it. If several threads use the guest, one request runs at a time.

    If the guest's kernel complained of something unexpected, the end of the block raises an error:
    see `check`.

    Args:
        kernel: a kernel, the name of one in kernels.toml, or the path of a bzImage, a kernel tree
            or a tarball.
        to: the kernel that `live_update` jumps to; the next live update jumps back to `kernel`, and
            so on. If None, each live update jumps to `kernel`.
        memory: the guest's memory in bytes; by default 1 GiB, or what the kernel needs (see
            `needs`).
        cpus: the number of the guest's CPUs.
        devices: values of further ``-device`` options for QEMU.
        append: more words for the kernel's command line. A word without "=" that the kernel does
            not know becomes an argument of the guest's init process.
        network: whether to give the guest a network interface, and to bring it and the loopback up.
        root: another root: the name of one in roots.toml, or the path of a folder with an operating
            system. The guest's Python is then the root's, and modules come from the host.
        units: the texts of systemd's units, and of drop-ins, by their names: they are there in each
            life before systemd starts, and wanted by whatever their section [Install] says.
        accelerator: KVM or TCG; by default KVM if it works, else TCG.
        boot_timeout: seconds after the boot and after each jump within which the guest must have
            spoken; by default 60, or what the kernel needs, and three times as long if the guest
            has systemd.
        call_timeout: seconds within which a function must return.
        silence: seconds without a sign of life after which the guest counts as hung; by default
            four times the duration of the cold boot, and at least ten seconds.
        expects: complaints of the kernel, and deaths, that never count as failures.
        vmcores: the folder for the memory of the guest if it dies; by default the folder that
            PYLUO_VMCORES names, if it is set.

    Attributes:
        requests: how many requests the guest was sent, including jumps.
        on_event: is called with the timeline of the boot, or of a live update, after each of the
            guest's own events, in another thread; set it before the block begins.

    Raises:
        ValueError: there are `units`, but no `root`.
        HarnessError: QEMU, the kernel or the root is missing; raised at the start of the block.
        GuestCrash: the guest died; raised at the start of the block, and by each request.
        KernelComplaint: the kernel complained of something unexpected; raised at the end of the
            block.
        VmRegression: a VM whose host the guest is went back; raised at the end of the block.
    """

    def __init__(
        self,
        kernel: Kernel | str | os.PathLike[str] = "stable",
        *,
        to: Kernel | str | os.PathLike[str] | None = None,
        memory: int | None = None,
        cpus: int = 1,
        devices: Sequence[str] = (),
        append: str = "",
        network: bool = False,
        root: Root | str | os.PathLike[str] | None = None,
        units: Mapping[str, str] | None = None,
        accelerator: Accelerator | None = None,
        boot_timeout: float | None = None,
        call_timeout: float = _CALL_TIMEOUT,
        silence: float | None = None,
        expects: Collection[Cause] = (),
        vmcores: str | os.PathLike[str] | None = None,
    ) -> None:
        if units and root is None:
            raise ValueError("units are for a guest with a root of its own, which has systemd")
        self._first = Kernel.find(kernel)
        self._second = self._first if to is None else Kernel.find(to)
        self._jumps: list[Jump] = []
        self._memory = memory or max(needs(each).memory for each in (self._first, self._second))
        self._cpus = cpus
        self._devices = tuple(devices)
        self._append = append
        self._network = network
        self._userland: Userland = (
            HostUserland(network)
            if root is None
            else RootUserland(Root.find(root), network, units or {})
        )
        self._accelerator = accelerator
        self._boot_timeout = boot_timeout
        self._call_timeout = call_timeout
        self._silence = silence
        folder = vmcores or os.environ.get(_VMCORES)
        self._vmcores = Path(folder).absolute() if folder else None
        self._expects = frozenset(expects)
        self._notes = count(1)  # numbers the lines that `check` writes to the kernel's log
        self._settings = ""
        self._used = False  # whether there was a request or a jump since the last check
        self.requests: int = 0
        self.on_event: Callable[[Timeline], None] = lambda _: None
        self._loop: LoopThread | None = None
        self._guest: Guest | None = None

    def __enter__(self) -> Self:
        from pyluo.vm.machine.qemu import find_binary

        qemu = find_binary()
        choice = Choice.make(qemu, self._accelerator)
        bytecode.compile_package(imports.GUEST.parent)
        usage.count_boot()
        try:
            self._start(choice.accelerator)
        except GuestCrash as crash:
            # Before anything is said of the kernel: KVM may run a boot sector, and no kernel.
            untried = choice.accelerator is Accelerator.KVM and not choice.asked
            if not untried or kvm.probe(qemu).proven or crash.booted or crash.console:
                raise
            self._start(Accelerator.TCG)  # raises if the kernel is to blame
            kvm.distrust(qemu)
            progress.say(f"{kvm.probe(qemu).reason}: guests are emulated from now on")
        else:
            if choice.accelerator is Accelerator.KVM and not choice.asked:
                kvm.prove(qemu)
        usage.running.append(self)
        return self

    def _start(self, accelerator: Accelerator) -> None:
        # Tests import this module in guests, too, where it would take seconds to import these.
        from pyluo.vm.machine.loop_thread import LoopThread

        self._check_options(self._first)
        machine = self.machine(accelerator)
        self._loop = LoopThread()
        try:
            self._run(self._make_guest(machine))
            assert self._guest is not None
            self._run(self._guest.start(self._timeout(self._first)))
        except GuestCrash as crash:
            no_root = explain_root(self._first, self.console)
            self.close()
            if no_root is not None:
                raise no_root from crash
            raise
        except BaseException:
            self.close()
            raise

    def machine(self, accelerator: Accelerator) -> Machine:
        """Return the machine that boots the first kernel, as QEMU is to emulate it.

        Args:
            accelerator: what runs the guest's instructions.

        Raises:
            HarnessError: the kernel would not understand its command line.
        """
        from pyluo.vm.machine.qemu import Machine  # see `_start`

        self._settings = _settings(accelerator)
        return Machine(
            image=self._first.image,
            cmdline=self._cmdline(self._first, self._append),
            accelerator=accelerator,
            memory=self._memory,
            cpus=self._cpus,
            devices=self._devices,
            network=self._network,
            root=self._userland.root,
            mapped=self._userland.mapped,
            translations=max(self._userland.translations, self._memory >> 25),
            files=self._userland.files,
        )

    def _check_options(self, kernel: Kernel) -> None:
        check_options(
            kernel,
            network=self._network,
            folders=self._userland.imported_folders(),
            more=self._userland.options,
        )

    async def _make_guest(self, machine: Machine) -> None:
        """Make the guest, in the event loop that it needs; QEMU begins to start."""
        from pyluo.vm.machine.guest import Guest

        self._guest = Guest(machine, self._first, self._expects, self._silence, self._vmcores)
        self._guest.on_event = self.on_event

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self.running:
                self.check()
        finally:
            self.close()

    def close(self) -> None:
        """End the guest; closing it twice does nothing."""
        if self.running:
            usage.count_end(self)
        loop, self._loop = self._loop, None
        if loop is None:
            return
        loop.catch_up()  # if Ctrl-C ended the wait for it, the guest may just be being made
        guest, self._guest = self._guest, None
        try:
            if guest is not None:
                loop.run(guest.close())
        finally:
            loop.close()

    def call(self, function: Callable[..., R], *args: object, **kwargs: object) -> R:
        """Run a function in the guest, and return its result or raise its exception.

        The guest imports the function's module from the host's files.

        Args:
            function: a function at the top level of a module, or a static method of a class at the
                top level of a module.
            args: positional arguments: numbers, strings, bytes, paths, enums, dataclasses,
                containers of these, and objects that `hold` returned.
            kwargs: keyword arguments of the same types.

        Raises:
            TypeError: the function or an argument cannot be sent to the guest.
            HarnessError: the guest cannot see the file of the function's module.
            ValueError: an argument is an object that was held before the last jump.
            GuestCrash: the guest died, or did not answer in time.
        """
        result: R = self._request("call", function, args, kwargs)
        return result

    def hold(self, function: Callable[..., object], *args: object, **kwargs: object) -> GuestObject:
        """Run a function like `call`, and keep its result in the guest until the next jump.

        Returns:
            A handle on the result. If it is an argument of a later call, the function gets the
            result itself.
        """
        number, description = self._request("hold", function, args, kwargs)
        return GuestObject(self.boot_id, number, description)

    def release(self, held: GuestObject) -> None:
        """Drop an object that `hold` keeps in the guest."""
        self._send({"do": "release", "held": wire.encode(held)}, self._call_timeout)

    def run(
        self, argv: Sequence[str | os.PathLike[str]], timeout: float = _CALL_TIMEOUT
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program in the guest, in the host's current folder.

        Args:
            argv: the program, looked up in the guest's PATH, and its arguments.
            timeout: seconds after which the program is killed.

        Returns:
            The program's exit status (or the negative number of the signal that ended it), stdout
            and stderr.

        Raises:
            subprocess.TimeoutExpired: the program was still running after `timeout` seconds.
            FileNotFoundError: there is no such program, or no such folder in the guest.
        """
        words = [os.fspath(word) for word in argv]
        status, stdout, stderr = self._request(
            "call",
            commands.run,
            (words, self.path(os.getcwd()), timeout),
            {},
            timeout=timeout + self._call_timeout,
        )
        return subprocess.CompletedProcess(words, status, stdout, stderr)

    def live_update(
        self,
        to: Kernel | str | os.PathLike[str] | None = None,
        *,
        append: str | None = None,
        by_systemctl: bool = False,
    ) -> Timeline:
        """Load a kernel, jump to it and wait until the guest speaks; held objects are gone then.

        Args:
            to: the next kernel; by default, `to` and `kernel` of `VM` in turns.
            append: more words for the next kernel's command line; by default, `append` of `VM`.
            by_systemctl: whether to jump by ``systemctl kexec``, with which systemd stops the
                services first. By default, the worker calls reboot(), which ends nothing.

        Returns:
            The events of the live update, and the events that the guest has marked since.

        Raises:
            RequestError: the guest could not jump, and runs on.
            RuntimeError: systemd refused, and the guest runs on.
            ValueError: the guest has no systemd, because its root is the host's.
            GuestCrash: the guest died on the way, or did not speak in time after the jump.
        """
        if by_systemctl and not self._userland.has_systemd:
            raise ValueError("only a guest with a root of its own has systemd: give it one by root")
        kernel = self._next() if to is None else Kernel.find(to)
        self._check_options(kernel)
        cmdline = self._cmdline(kernel, self._append if append is None else append)
        image = self.path(os.fspath(kernel.image))
        guest = self._running_guest()
        self._jumps = list(self.jumps)
        self.requests += 1
        self._used = True
        origin, tried = guest.lives.kernel, not guest.watch.dead
        before = len(self.console)
        try:
            refusal = self._run(
                guest.jump(image, cmdline, kernel, self._timeout(kernel), by_systemctl=by_systemctl)
            )
        except GuestCrash:
            if tried:
                self._jumps.append(Jump(origin.name, kernel.name, False, guest.timeline))
            if no_root := explain_root(kernel, self.console[before:]):
                raise no_root from None
            raise
        if refusal is not None:
            raise wire.decode(refusal["error"], find=wire.resolve_loaded)
        self._jumps.append(Jump(origin.name, kernel.name, True, guest.timeline))
        usage.live_updates += 1
        return guest.timeline

    def _next(self) -> Kernel:
        return self._first if self.kernel == self._second else self._second

    def check(self, *expected: Cause) -> None:
        """Raise an error if the kernel has made an unexpected complaint since the last check.

        A complaint is a warning, or worse. The end of the `with` block calls this method if the
        block raised no exception. The pytest plugin calls it after each test that passed, and again
        after the fixtures that use the guest have ended.

        Args:
            expected: causes that are expected in addition to `expects` of `VM`.

        Raises:
            KernelComplaint: the kernel complained of something unexpected.
            GuestCrash: the guest died of something unexpected, and this was not raised before.
            HarnessError: the watch over the guest failed, and this was not raised before; or the
                kernel's warnings do not appear on the console.
            VmRegression: the clock or the counter of a VM in the guest went back.
        """
        guest = self._running_guest()
        note_came = True
        if self._used and not guest.watch.dead:
            # Wait until this line is on the console. Then all earlier messages are there, too.
            words, since = f"pyluo: so far, {next(self._notes)}", guest.console.length
            self._request("call", commands.log_warning, (words,), {})
            note_came = self._run(guest.wait_for_note(words, since))
            self._used = False
        self._run(guest.check(frozenset(expected)))
        if not note_came and not guest.watch.dead:
            raise HarnessError(
                "the kernel's warnings do not come over the serial line",
                "a program in the guest has lowered the console's log level, as `dmesg -n` does: "
                "leave it at 6",
            )
        if regressions := guest.take_regressions():
            raise VmRegression("; ".join(regressions))

    @contextmanager
    def expecting(self, *causes: Cause) -> Iterator[None]:
        """Expect these complaints and deaths in the block; call `check` at its start and its end.

        In the block, the guest does not count as dead because its kernel reports an expected stall.
        If the block raises an exception, only that is raised, and its reports are not checked.

        Raises:
            KernelComplaint: the kernel complained of something unexpected before or in the block.
            GuestCrash: the guest died of something unexpected, and this was not raised before.
            VmRegression: see `check`.
        """
        self.check()
        guest = self._running_guest()
        watch = guest.watch
        before, watch.expected = watch.expected, watch.expected | set(causes)
        try:
            yield
            if self.running:  # not if it was closed in the block
                self.check()
        except BaseException:
            guest.ignore_reports()
            raise
        finally:
            watch.expected = before

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write the guest's memory to a file, as an ELF core; the guest may be dead.

        `pyluo.vm.machine.vmcore` opens the file with drgn, if the kernel tells QEMU where its data
        is, as the kernel `debug` does.

        Raises:
            HarnessError: QEMU has ended, or could not write the file.
        """
        self._run(self._running_guest().dump(os.path.abspath(path)))

    @contextmanager
    def notifying(self, on_change: Callable[[], None]) -> Iterator[None]:
        """Call a function, in another thread, if the guest dies or jumps by itself in the block."""
        self._run(self._running_guest().notify(on_change))
        try:
            yield
        finally:
            if self._guest is not None:  # not if it was closed in the block
                self._run(self._guest.notify(None))

    def path(self, path: str | os.PathLike[str]) -> str:
        """Return the path in the guest of a file or folder of the host."""
        return self._userland.path(os.fspath(path))

    @property
    def terminal(self) -> socket.socket:
        """The host's end of the port that `pyluo.guest.terminal` opens; closed with the guest."""
        return self._running_guest().process.sockets["terminal"]

    @property
    def silence(self) -> float:
        """Seconds without a sign of life after which the guest counts as hung."""
        return self._running_guest().watch.silence

    @property
    def reports(self) -> tuple[Report, ...]:
        """The reports of the kernels of all lives so far, expected or not."""
        return tuple(self._running_guest().console.reports)

    @property
    def kernel(self) -> Kernel:
        """The kernel that runs now; outside the `with` block, the kernel that the guest boots.

        If the guest jumped to another kernel by itself, only the release of that kernel is known.
        """
        return self._guest.lives.kernel if self._guest else self._first

    @property
    def running(self) -> bool:
        """Whether the guest exists, dead or alive: it was started and is not closed yet."""
        return self._guest is not None

    @property
    def dead(self) -> bool:
        """Whether the guest died or was never started, so that it takes no requests."""
        return self._guest is None or self._guest.watch.dead

    @property
    def timeline(self) -> Timeline:
        """The events of the last live update, and the events that the guest has marked since."""
        return self._running_guest().timeline

    @property
    def jumps(self) -> tuple[Jump, ...]:
        """All live updates so far; the last one has the events that the guest has marked since."""
        if self._guest is None or not self._jumps:
            return tuple(self._jumps)
        *before, last = self._jumps
        now = self._guest.timeline
        # If the times differ, the guest's timeline belongs to a later jump, which was refused.
        if now.started == last.timeline.started:
            last = replace(last, timeline=now)
        return (*before, last)

    def log_since(self, position: Position) -> GuestLog:
        """Return the record of what happened in the guest after a position.

        It can be used after the guest has ended.
        """
        kernel = self._first.name
        return GuestLog(kernel, self.jumps[position.jumps :], self.console[position.console :])

    @property
    def position(self) -> Position:
        """How far the guest has come."""
        return Position(self.requests, len(self.jumps), len(self.console))

    @property
    def life(self) -> Life:
        """The current life of the guest."""
        life = self._running_guest().lives.current
        assert life is not None
        return life

    @property
    def boot_id(self) -> str:
        """The kernel's id for its boot; each jump changes it."""
        return self.life.boot_id

    @property
    def updates(self) -> int | None:
        """How many live updates since the cold boot the kernel counts; None if it does not say."""
        return self.life.updates

    @property
    def console(self) -> str:
        """Everything that the kernels of all lives printed on the console so far."""
        return self._running_guest().console.text

    @property
    def console_log(self) -> Path:
        """The file to which QEMU writes the console; it is removed when the guest ends."""
        return self._running_guest().process.console_log

    @property
    def dmesg(self) -> str:
        """The log of the kernel that runs now."""
        return self.call(commands.dmesg)

    @property
    def append(self) -> str:
        """The words that `append` of `VM` added to the kernel's command line."""
        return self._append

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._running_guest().process.pid

    def qmp(self, command: str, **arguments: object) -> object:
        """Run a command of the QEMU Machine Protocol.

        Returns:
            QEMU's answer.

        Raises:
            qemu.qmp.ExecuteError: QEMU refused the command.
            GuestCrash: the guest is dead, or QEMU does not answer.
        """
        return self._run(self._running_guest().monitor(command, arguments))

    def forward(self, port: int, address: str = "") -> int:
        """Forward a port of the host's loopback to a TCP port in the guest's network.

        Connections last over live updates, as far as QEMU is concerned.

        Args:
            port: the port in the guest's network.
            address: the address there, such as that of a VM whose host the guest is; by default the
                guest's own.

        Returns:
            The port of the host's loopback, which the system has chosen.

        Raises:
            HarnessError: the guest has no network.
            GuestCrash: the guest is dead, or QEMU does not answer.
        """
        if not self._network:
            raise HarnessError("the guest has no network", "give it one: VM(network=True)")
        rule = f"hostfwd_add net tcp:127.0.0.1:0-{address}:{port}"
        known = self._forwarded()
        answer = self.qmp("human-monitor-command", **{"command-line": rule})
        new = self._forwarded() - known
        if len(new) != 1:
            raise HarnessError(f"QEMU forwards no port: {answer}", "its address may be no IPv4 one")
        return new.pop()

    def _forwarded(self) -> set[int]:
        """Return the ports of the host's loopback that QEMU forwards."""
        answer = self.qmp("human-monitor-command", **{"command-line": "info usernet"})
        return {
            int(port)
            for port in re.findall(r"TCP\[HOST_FORWARD\] .*?127\.0\.0\.1 +(\d+)", str(answer))
        }

    def _running_guest(self) -> Guest:
        if self._guest is None:
            raise HarnessError("the guest is not running", "use it inside its `with` block")
        return self._guest

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        assert self._loop is not None
        return self._loop.run(coroutine)

    def _send(self, message: wire.Message, timeout: float) -> Any:
        usage.requests += 1
        self.requests += 1
        self._used = True
        answer = self._run(self._running_guest().request(message, timeout))
        if file := answer.get("unreachable"):
            raise HarnessError(
                f"the guest does not have {file}",
                "its /dev, /run and /proc are its own, and its /tmp too, if its kernel lacks "
                "overlayfs: put the code elsewhere",
            )
        if "error" in answer:
            raise wire.decode(answer["error"], find=wire.resolve_loaded)
        return wire.decode(answer["result"], find=wire.resolve_loaded)

    def _request(
        self,
        action: str,
        function: Callable[..., object],
        args: Sequence[object],
        kwargs: dict[str, Any],
        timeout: float | None = None,
    ) -> Any:
        name = wire.reference(function)
        source = imports.find_source(name)
        if source and not sys.dont_write_bytecode:
            bytecode.compile_modules([Path(source)])
        message = {
            "do": action,
            "function": name,
            "file": self.path(source) if source else None,
            "path": self._userland.import_path(),
            "packages": {
                package: [self.path(each) for each in paths]
                for package, paths in imports.packages_off_path().items()
            },
            "arguments": wire.encode(tuple(args)),
            "keywords": wire.encode(kwargs),
        }
        return self._send(message, timeout or self._call_timeout)

    def _timeout(self, kernel: Kernel) -> float:
        return self._boot_timeout or needs(kernel).boot_timeout * self._userland.patience

    def _cmdline(self, kernel: Kernel, append: str) -> str:
        """Return a kernel's command line.

        Raises:
            HarnessError: the kernel would not understand the command line.
        """
        words = self._userland.words()
        line = " ".join(
            [
                _FIXED,
                self._settings,
                needs(kernel).words,
                _ALL_TRACES if self._cpus > 1 else "",
                *self._userland.settings,
                append,
                *(f'"{word}"' if " " in word else word for word in words),
            ]
        )
        unfit = any(character in word for word in words for character in '"\t\n')
        longest = _CMDLINE_LIMIT - 1
        if kernel.config is not None:
            config = BuildConfig(kernel.config.read_text(errors="surrogateescape"))
            longest -= len(os.fsencode(config.command_line)) + 1 if config.command_line else 0
        if unfit or "--" in append.split() or len(os.fsencode(line)) > longest:
            raise HarnessError(
                f"the kernel cannot be given the command line {line}",
                f"it may have {longest} bytes; `append` may not contain --, and no path may "
                f"contain a quotation mark, a tab or a line break",
            )
        return line


def _settings(accelerator: Accelerator) -> str:
    """Return words for the command line of every kernel that runs under an accelerator.

    TCG shows the guest the time-stamp counter of this machine. A kernel that measures the counter
    while other processes run here can get a frequency that is off, or none: then its clocks, and
    those of the VMs in it, go wrong.

    If QEMU does not emulate nested paging well (see `qemu.nests`), the guest uses shadow paging for
    VMs in it, which avoids most of what goes wrong.
    """
    if accelerator is not Accelerator.TCG:
        return ""
    from pyluo.vm.machine.qemu import find_binary, nests  # see `VM._start`

    words = [] if nests(find_binary()) else ["kvm_amd.npt=0"]
    if frequency := tsc.frequency():
        words.append(f"tsc_early_khz={frequency}")
    return " ".join(words)
