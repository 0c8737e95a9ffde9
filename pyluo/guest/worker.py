"""The worker: does in the guest what the host asks for, one request at a time."""

from __future__ import annotations

import os
import sys
from itertools import count
from typing import Any

from pyluo import kexec
from pyluo.guest import port, wire
from pyluo.kernel_log import KernelLog

__all__ = ["work"]

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class _UnreachableError(Exception):
    """The host's module does not lie where this machine has the host's files."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.file = file


class Worker:
    """What the host can ask for; `hold` keeps what it makes until the jump."""

    def __init__(self, channel: port.Port, boot_id: str) -> None:
        self._channel = channel
        self._boot_id = boot_id
        self._held: dict[int, Any] = {}
        self._numbers = count(1)

    def serve(self) -> None:
        """Answers requests until the machine is gone."""
        while True:
            request = self._channel.receive()
            # The host may have written this to the life before.
            if request.get("boot_id") == self._boot_id:
                self._channel.send({"answer": request["id"], **self._answer(request)})

    def _answer(self, request: wire.Frame) -> wire.Frame:
        """The result or the exception; whatever a function does, the worker goes on."""
        try:
            action = getattr(self, "do_" + request["do"])
            answer = {"result": wire.encode(action(request))}
            wire.frame(answer)  # what JSON cannot carry is an exception here, not the worker's end
            return answer
        except _UnreachableError as error:
            return {"unreachable": error.file}
        except BaseException as error:
            return {"error": wire.encode(error)}

    def _find(self, boot_id: str, number: int) -> Any:
        if boot_id != self._boot_id:
            raise ValueError("an argument was held in a life of the guest that is over")
        return self._held[number]

    def do_call(self, request: wire.Frame) -> Any:
        """Runs a function and gives its result back."""
        sys.path[:] = request["path"]
        function = _function(request["function"], request["file"])
        arguments = wire.decode(request["arguments"], self._find)
        keywords = wire.decode(request["keywords"], self._find)
        return function(*arguments, **keywords)

    def do_hold(self, request: wire.Frame) -> Any:
        """Runs a function and keeps its result."""
        result = self.do_call(request)
        number = next(self._numbers)
        self._held[number] = result
        return [number, repr(result)]

    def do_release(self, request: wire.Frame) -> None:
        """Lets go of something held."""
        wire.decode(request["held"], self._find)  # or it says which life it was held in
        del self._held[request["held"]["$held"][1]]

    def do_jump(self, request: wire.Frame) -> None:
        """Loads the next kernel and jumps; returns only by an error."""
        # Whatever a test wants to jump into: what it may lose is the test's to say.
        kexec.load(request["image"], cmdline=request["cmdline"], handover=False)
        port.mark("loaded")
        os.sync()
        port.mark("reboot called")
        kexec.reboot(sync=False, trust_image=True)


def _function(reference: str, file: str | None) -> Any:
    """The function by its module's name, or out of the module's file where it goes by another."""
    module = reference.partition(":")[0]
    if module != "__main__":
        try:
            return wire.resolve(reference)
        except ModuleNotFoundError as error:
            # The module, or a package that it is said to be in, is not importable by that name.
            if file is None or not f"{module}.".startswith(f"{error.name}."):
                raise
    name = wire.MAIN if module == "__main__" else module
    if name not in sys.modules:
        if file is not None and not os.path.exists(file):
            raise _UnreachableError(file)
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is no Python module")
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return wire.resolve(name + ":" + reference.partition(":")[2])


def work() -> None:
    """Says hello to the host and answers it until the machine is gone."""
    channel = port.Port.find()
    port.use(channel)
    if os.environ.get("PYLUO_NETWORK"):
        from pyluo.guest import network

        network.bring_up()
    with open(_BOOT_ID) as file:
        boot_id = file.read().strip()
    release = os.uname().release
    channel.greet(
        {"hello": {"boot_id": boot_id, "release": release, "updates": KernelLog().updates}}
    )
    Worker(channel, boot_id).serve()
