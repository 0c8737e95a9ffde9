"""A guest to live-update, as a test sees it."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

import pyluo
from pyluo.guest import commands, wire
from pyluo.guest.wire import Held
from pyluo.vm.errors import Death, GuestCrash, HarnessError
from pyluo.vm.kernels.kernel import Kernel
from pyluo.vm.machine import bytecode
from pyluo.vm.machine.accelerator import Accelerator
from pyluo.vm.machine.guest import Guest, Life
from pyluo.vm.machine.needs import needs
from pyluo.vm.machine.qemu import Machine, find_binary
from pyluo.vm.machine.timeline import GuestLog, Jump
from pyluo.vm.machine.usage import usage

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
    from types import TracebackType

    from pyluo.vm.machine.complaint import Report
    from pyluo.vm.machine.timeline import Timeline

__all__ = ["VM"]

P = ParamSpec("P")
R = TypeVar("R")

_GUEST = Path(pyluo.__file__).parent / "guest"
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

_ALL_TRACES = "panic_sys_info=all_bt"  # of the other CPUs too, by NMIs, before a panic stops them


class VM:
    """A guest that boots on entry of its `with` block and is gone when the block is left.

    Its root is the host's, read-only, so that a function of any module the host can import runs in
    it unchanged. Requests of several threads take turns.

    A kernel that warns, or worse, fails the block when it is left: see `check`.

    Args:
        kernel: a kernel, or the name of one in kernels.toml, or the path of a bzImage, a kernel
            tree or a tarball.
        to: the kernel that `live_update` goes to, and from there back again, in turns; without it,
            the guest goes from `kernel` to `kernel`.
        memory: in bytes; without it, 1 GiB, or what the kernel needs (see `needs`).
        cpus: how many.
        devices: values of further ``-device`` options for QEMU.
        append: more words for the kernel's command line; a word without "=" that the kernel does
            not know would be taken for an argument of the guest's first process.
        network: give the guest an interface, and bring it and the loopback up.
        accelerator: KVM or TCG; without it, KVM where it works.
        boot_timeout: seconds that a kernel has to speak, after the boot and after each jump;
            without it, 60, or what that kernel needs.
        call_timeout: seconds that a function has to return.
        silence: seconds without a sign of life after which the guest counts as hung; without it,
            four times as long as it took to boot, and at least ten seconds.
        expects: what the kernel may complain of all the time.
        vmcores: a folder that the memory of a guest that dies is written to, before anything else;
            without it, the one that PYLUO_VMCORES names, if it is set.

    Attributes:
        requests: how many things it was asked for, jumps among them.

    Raises:
        HarnessError: on entry, no QEMU, no kernel.
        GuestCrash: the guest died; on entry, and from then on whenever it is asked for something.
            On leaving the block as well, if its kernel complained of something unexpected.
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
        accelerator: Accelerator | None = None,
        boot_timeout: float | None = None,
        call_timeout: float = _CALL_TIMEOUT,
        silence: float | None = None,
        expects: Collection[Death] = (),
        vmcores: str | os.PathLike[str] | None = None,
    ) -> None:
        self._first = Kernel.find(kernel)
        self._second = self._first if to is None else Kernel.find(to)
        self._jumps: list[Jump] = []
        self._memory = memory or max(needs(each).memory for each in (self._first, self._second))
        self._cpus = cpus
        self._devices = tuple(devices)
        self._append = append
        self._network = network
        self._accelerator = accelerator
        self._boot_timeout = boot_timeout
        self._call_timeout = call_timeout
        self._silence = silence
        folder = vmcores or os.environ.get(_VMCORES)
        self._vmcores = Path(folder).absolute() if folder else None
        self._expects = frozenset(expects)
        self._notes = count(1)
        self._used = False
        self.requests = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._guest: Guest | None = None

    def __enter__(self) -> Self:
        machine = Machine(
            image=self._first.image,
            cmdline=self._cmdline(self._first, self._append),
            accelerator=self._accelerator or Accelerator.choose(find_binary()),
            memory=self._memory,
            cpus=self._cpus,
            devices=self._devices,
            network=self._network,
        )
        bytecode.provide_package(_GUEST.parent)
        usage.boots += 1
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pyluo-vm", daemon=True)
        self._thread.start()
        try:
            self._guest = self._run(
                _make(Guest, machine, self._first, self._expects, self._silence, self._vmcores)
            )
            self._run(self._guest.start(self._timeout(self._first)))
        except BaseException:
            self.close()
            raise
        usage.running.append(self)
        return self

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
        """Ends the guest; a second time does nothing."""
        if self in usage.running:
            usage.running.remove(self)
        if usage.ended is not None and self.running:
            usage.ended.append(self.log)
        loop, self._loop = self._loop, None
        guest, self._guest = self._guest, None
        if loop is None or self._thread is None:
            return
        try:
            if guest is not None:
                asyncio.run_coroutine_threadsafe(guest.close(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()

    def call(self, function: Callable[..., R], *args: object, **kwargs: object) -> R:
        """Runs a function in the guest, by reference, and brings its result or exception back.

        Args:
            function: defined at the top level of a module, or a static method of a class there.
            args: numbers, strings, bytes, paths, enums, dataclasses, containers of these, and
                what `hold` returned.
            kwargs: likewise.

        Raises:
            TypeError: the function or an argument cannot cross.
            HarnessError: the function's module lies where the guest does not see the host's files.
            ValueError: an argument was held in an earlier life of the guest.
            GuestCrash: the guest died, or did not answer in time.
        """
        result: R = self._request("call", function, args, kwargs)
        return result

    def hold(self, function: Callable[..., object], *args: object, **kwargs: object) -> Held:
        """Runs a function like `call`, but its result stays alive in the guest, until the jump.

        Returns:
            A handle, which later calls take as an argument.
        """
        number, description = self._request("hold", function, args, kwargs)
        return Held(self.boot_id, number, description)

    def release(self, held: Held) -> None:
        """Lets go of something held."""
        self._do({"do": "release", "held": wire.encode(held)}, self._call_timeout)

    def run(
        self, argv: Sequence[str | os.PathLike[str]], timeout: float = _CALL_TIMEOUT
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a program in the guest, in the host's current folder.

        Args:
            argv: the program, looked up in the guest's PATH, and its arguments.
            timeout: in seconds; the program is killed after it.

        Returns:
            Its exit status (the negative number of a signal that ended it), stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it was still running.
            FileNotFoundError: there is no such program.
        """
        words = [os.fspath(word) for word in argv]
        status, stdout, stderr = self._request(
            "call",
            commands.run,
            (words, os.getcwd(), timeout),
            {},
            timeout=timeout + self._call_timeout,
        )
        return subprocess.CompletedProcess(words, status, stdout, stderr)

    def live_update(
        self, to: Kernel | str | os.PathLike[str] | None = None, *, append: str | None = None
    ) -> Timeline:
        """Loads a kernel, jumps into it and waits until it speaks. What was held is gone then.

        Args:
            to: the next kernel; without it, what the guest was made for (see `VM`).
            append: more words for its command line; without it, those of the guest's boot.

        Raises:
            LuoError: the guest could not jump, and runs on.
            GuestCrash: it died on the way, or the next kernel never spoke.
        """
        kernel = self._next() if to is None else Kernel.find(to)
        cmdline = self._cmdline(kernel, self._append if append is None else append)
        image = os.fspath(kernel.image)
        guest = self._alive()
        self._jumps = list(self.jumps)
        self.requests += 1
        self._used = True
        origin, tried = guest.kernel, not guest.dead
        try:
            refusal = self._run(guest.jump(image, cmdline, kernel, self._timeout(kernel)))
        except GuestCrash:
            if tried:
                self._jumps.append(Jump(origin.name, kernel.name, False, guest.timeline))
            raise
        if refusal is not None:
            raise wire.decode(refusal["error"], find=wire.loaded)
        self._jumps.append(Jump(origin.name, kernel.name, True, guest.timeline))
        usage.live_updates += 1
        return guest.timeline

    def _next(self) -> Kernel:
        return self._first if self.kernel == self._second else self._second

    def check(self, *expected: Death) -> None:
        """Looks for what the kernel complained of since the last look: a warning, or worse.

        It is done when the `with` block is left without an exception, and by the pytest plugin
        after each test that passed, and again after the fixtures that use the guest.

        Args:
            expected: what it may have complained of, beside what it may all the time.

        Raises:
            GuestCrash: there is something that is not expected, or the guest died of something
                that is not, and nobody was told so far.
            HarnessError: the watch over the guest failed, and nobody was told; or the kernel keeps
                its warnings from the serial line.
        """
        guest = self._alive()
        heard = True
        if self._used and not guest.dead:
            # What the kernel has printed by now lies before this line.
            words, since = f"pyluo: so far, {next(self._notes)}", guest.console.length
            self._request("call", commands.note, (words,), {})
            heard = self._run(guest.hears(words, since))
            self._used = False
        self._run(guest.check(frozenset(expected)))
        if not heard and not guest.dead:
            raise HarnessError(
                "what the kernel warns of does not come over the serial line",
                "something in the guest has lowered the log level of the console, as `dmesg -n` "
                "does: leave it at 6",
            )

    @contextmanager
    def expecting(self, *deaths: Death) -> Iterator[None]:
        """In the block the kernel may complain of these, and is given the time to recover.

        If the block fails by itself, what the kernel complained of is no failure beside that.

        Raises:
            GuestCrash: on entry and on leaving, as `check` does.
        """
        self.check()
        guest = self._alive()
        before, guest.expected = guest.expected, guest.expected | set(deaths)
        try:
            yield
            if self.running:  # or it was closed in the block
                self.check()
        except BaseException:
            guest.overlook()
            raise
        finally:
            guest.expected = before

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes the guest's memory to a file, as an ELF core; that of a dead guest as well.

        drgn opens it, by `pyluo.vm.machine.vmcore`, if the kernel tells QEMU where things are
        (`debug`).

        Raises:
            HarnessError: QEMU is gone, or could not.
        """
        self._run(self._alive().dump(os.path.abspath(path)))

    @contextmanager
    def notifying(self, news: Callable[[], None]) -> Iterator[None]:
        """In the block, `news` is called by another thread when the guest has died, and when a
        life has begun that was not asked for: somebody in the guest has jumped."""
        self._run(self._alive().tell(news))
        try:
            yield
        finally:
            if self._guest is not None:  # or it was closed in the block
                self._run(self._guest.tell(None))

    @property
    def terminal(self) -> socket.socket:
        """The host's end of the port that `pyluo.guest.terminal` opens; as long as the guest is
        there."""
        return self._alive().process.sockets["terminal"]

    @property
    def silence(self) -> float:
        """Seconds without a sign of life after which the guest counts as hung."""
        return self._alive().silence

    @property
    def reports(self) -> tuple[Report, ...]:
        """What the kernels of all lives complained of so far, expected or not."""
        return tuple(self._alive().console.reports)

    @property
    def kernel(self) -> Kernel:
        """The kernel that runs now: of one that the guest jumped to by itself, if it is another,
        only its release is known. Before the guest boots and when it is gone, the first."""
        return self._guest.kernel if self._guest else self._first

    @property
    def running(self) -> bool:
        """Whether there is a guest, dead or alive: within the `with` block."""
        return self._guest is not None

    @property
    def dead(self) -> bool:
        """Whether the guest died, or was never started: then nothing can be asked of it."""
        return self._guest is None or self._guest.dead

    @property
    def timeline(self) -> Timeline:
        """The last live update, with what the guest has marked since."""
        return self._alive().timeline

    @property
    def jumps(self) -> tuple[Jump, ...]:
        """All live updates so far, the last one with what the guest has marked since."""
        if self._guest is None or not self._jumps:
            return tuple(self._jumps)
        *before, last = self._jumps
        now = self._guest.timeline
        if now.started == last.timeline.started:  # no other one was refused since
            last = replace(last, timeline=now)
        return (*before, last)

    @property
    def log(self) -> GuestLog:
        """What happened so far, for somebody who comes later."""
        return GuestLog(self._first.name, self.jumps, self.console)

    @property
    def life(self) -> Life:
        """The current life of the guest."""
        life = self._alive().life
        assert life is not None
        return life

    @property
    def boot_id(self) -> str:
        """The kernel's name for its boot; another after each jump."""
        return self.life.boot_id

    @property
    def updates(self) -> int | None:
        """How many live updates the guest's kernel counts since its cold boot."""
        return self.life.updates

    @property
    def console(self) -> str:
        """Everything that came over the serial line so far, of all lives."""
        return self._alive().console.text

    @property
    def console_log(self) -> Path:
        """The file that QEMU writes it to, as long as the guest is there."""
        return self._alive().process.console_log

    @property
    def dmesg(self) -> str:
        """The log of the guest's kernel, of this life."""
        return self.call(commands.dmesg)

    @property
    def append(self) -> str:
        """The words that its boot had on the command line beyond the harness's own."""
        return self._append

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._alive().process.pid

    def qmp(self, command: str, **arguments: object) -> object:
        """Runs a command of the QEMU Machine Protocol.

        Returns:
            What QEMU returned.

        Raises:
            qemu.qmp.ExecuteError: QEMU refused it.
            GuestCrash: QEMU is gone.
        """
        return self._run(self._alive().monitor(command, arguments))

    def _alive(self) -> Guest:
        if self._guest is None:
            raise HarnessError("the guest is not running", "use it inside its `with` block")
        return self._guest

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _do(self, message: wire.Frame, timeout: float) -> Any:
        usage.requests += 1
        self.requests += 1
        self._used = True
        answer = self._run(self._alive().request(message, timeout))
        if file := answer.get("unreachable"):
            raise HarnessError(
                f"the guest does not have {file}",
                "its /dev, /run and /proc are its own, and its /tmp too, if its kernel lacks "
                "overlayfs: put the code elsewhere",
            )
        if "error" in answer:
            raise wire.decode(answer["error"], find=wire.loaded)
        return wire.decode(answer["result"], find=wire.loaded)

    def _request(
        self,
        action: str,
        function: Callable[..., object],
        args: Sequence[object],
        kwargs: dict[str, Any],
        timeout: float | None = None,
    ) -> Any:
        name = wire.reference(function)
        source = _source(name)
        if source and not sys.dont_write_bytecode:
            bytecode.provide([Path(source)])
        message = {
            "do": action,
            "function": name,
            "file": source,
            "path": _import_path(),
            "arguments": wire.encode(tuple(args)),
            "keywords": wire.encode(kwargs),
        }
        return self._do(message, timeout or self._call_timeout)

    def _timeout(self, kernel: Kernel) -> float:
        return self._boot_timeout or needs(kernel).boot_timeout

    def _cmdline(self, kernel: Kernel, append: str) -> str:
        """The kernel's command line; the kernel passes PYLUO_* on to init as its environment."""
        environment = {
            "PYLUO_PATH": ":".join(_bare_path(self._network)),
        }
        if self._network:
            environment["PYLUO_NETWORK"] = "1"
        words = [f"{name}={value}" for name, value in environment.items()]
        words += [f"init={os.path.realpath(sys.executable)}", "--", "-I", "-S", "-X", "utf8"]
        words += [os.fspath(_GUEST / "init.py")]
        line = " ".join(
            [
                _FIXED,
                needs(kernel).words,
                _ALL_TRACES if self._cpus > 1 else "",
                append,
                *(f'"{word}"' if " " in word else word for word in words),
            ]
        )
        unfit = any(character in word for word in words for character in '"\t\n')
        if unfit or "--" in append.split() or len(os.fsencode(line)) >= _CMDLINE_LIMIT:
            raise HarnessError(
                f"the kernel cannot be given the command line {line}",
                f"it takes {_CMDLINE_LIMIT - 1} bytes, no -- of one's own, and no path with a "
                f"quotation mark or a line break",
            )
        return line


async def _make(guest: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Makes something that belongs to the loop in it."""
    return guest(*args, **kwargs)


def _source(name: str) -> str | None:
    """The file of a reference's module; None for what is built in."""
    module = sys.modules.get(name.partition(":")[0])
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if file else None


@functools.cache
def _bare_path(network: bool = False) -> list[str]:
    """Where the guest finds pyluo and what it stands on, before it knows our sys.path."""
    folders = [_GUEST.parent.parent]
    for module, needed in (("_cffi_backend", True), ("pyroute2", network)):
        spec = importlib.util.find_spec(module) if needed else None
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            folders.append((origin.parent if spec.submodule_search_locations else origin).parent)
    return list(dict.fromkeys(map(os.fspath, folders)))


def _import_path() -> list[str]:
    """This process's sys.path, with the folder of an editable pyluo, all absolute."""
    here = [os.path.abspath(entry) for entry in sys.path]
    return [*here, *(entry for entry in _bare_path() if entry not in here)]
