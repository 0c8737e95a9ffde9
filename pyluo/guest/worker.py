"""The worker: it carries out the host's requests in the guest, one at a time."""

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
    """The file of the host's module does not exist in this machine's view of the host's files."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.file = file


class Worker:
    """The host's requests; results of `hold` are kept until the jump."""

    def __init__(self, channel: port.Port, boot_id: str) -> None:
        self._channel = channel
        self._boot_id = boot_id
        self._held: dict[int, Any] = {}
        self._numbers = count(1)

    def serve(self) -> None:
        """Answer requests until the machine is gone."""
        while True:
            request = self._channel.receive()
            # The host may have sent this request to the life before.
            if request.get("boot_id") == self._boot_id:
                self._channel.send({"answer": request["id"], **self._answer(request)})

    def _answer(self, request: wire.Frame) -> wire.Frame:
        """Carry out a request, and return its result or its exception, whatever happens."""
        try:
            action = getattr(self, "do_" + request["do"])
            answer = {"result": wire.encode(action(request))}
            wire.frame(answer)  # raises here, not in serve(), if JSON cannot represent it
            return answer
        except _UnreachableError as error:
            return {"unreachable": error.file}
        except BaseException as error:
            return {"error": wire.encode(error)}

    def _find_held(self, boot_id: str, number: int) -> Any:
        if boot_id != self._boot_id:
            raise ValueError("an argument was held in a life of the guest that is over")
        return self._held[number]

    def do_call(self, request: wire.Frame) -> Any:
        """Run a function and return its result."""
        sys.path[:] = request["path"]
        function = _find_function(request["function"], request["file"])
        arguments = wire.decode(request["arguments"], self._find_held)
        keywords = wire.decode(request["keywords"], self._find_held)
        return function(*arguments, **keywords)

    def do_hold(self, request: wire.Frame) -> Any:
        """Run a function and keep its result."""
        result = self.do_call(request)
        number = next(self._numbers)
        self._held[number] = result
        return [number, repr(result)]

    def do_release(self, request: wire.Frame) -> None:
        """Release a result that was kept."""
        wire.decode(request["held"], self._find_held)  # raises if it is of an earlier life
        del self._held[request["held"]["$held"][1]]

    def do_jump(self, request: wire.Frame) -> None:
        """Load the next kernel and jump; this returns only with an exception."""
        # A test may jump into any kernel, even one that loses what was preserved.
        kexec.load(request["image"], cmdline=request["cmdline"], handover=False)
        port.mark("loaded")
        os.sync()
        port.mark("reboot called")
        kexec.reboot(sync=False, trust_image=True)


def _find_function(reference: str, file: str | None) -> Any:
    """Return a function by its module's name; if needed, load the module from its file."""
    module = reference.partition(":")[0]
    if module != "__main__":
        try:
            return wire.resolve(reference)
        except ModuleNotFoundError as error:
            # Only if the module itself, or its package, cannot be imported by that name.
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
    """Say hello to the host, and answer requests until the machine is gone."""
    channel = port.Port.find()
    port.set_mark_port(channel)
    if os.environ.get("PYLUO_NETWORK"):
        from pyluo.guest import network

        network.bring_up()
    with open(_BOOT_ID) as file:
        boot_id = file.read().strip()
    release = os.uname().release
    channel.send_first(
        {"hello": {"boot_id": boot_id, "release": release, "updates": KernelLog().updates}}
    )
    Worker(channel, boot_id).serve()
