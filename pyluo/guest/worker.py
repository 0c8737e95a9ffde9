"""The worker: it carries out the host's requests in the guest, one at a time."""

from __future__ import annotations

import os
import sys
from itertools import count
from typing import TYPE_CHECKING, Any

from pyluo.guest import commands, port, wire
from pyluo.guest.host_files import HostFiles
from pyluo.kernel_log import KernelLog

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

__all__ = ["run_worker"]

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class _UnreachableError(Exception):
    """The guest cannot see the file of the module that defines the requested function."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.file = file


class _Finder:
    """Finds top-level packages that the host's import hooks find, if Python itself finds none.

    Attributes:
        packages: the paths of the folders, or of the file, of each package or module.
    """

    def __init__(self) -> None:
        self.packages: dict[str, list[str]] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return how to import a package or module; None if it is not one of `packages`."""
        paths = self.packages.get(name)
        if paths is None or not os.path.exists(paths[0]):
            return None
        from importlib.machinery import ModuleSpec
        from importlib.util import spec_from_file_location

        if paths[0].endswith(".py"):
            return spec_from_file_location(name, paths[0])
        init = os.path.join(paths[0], "__init__.py")
        if os.path.exists(init):
            return spec_from_file_location(name, init, submodule_search_locations=paths)
        spec = ModuleSpec(name, None, is_package=True)  # a namespace package
        spec.submodule_search_locations = paths
        return spec


class Worker:
    """Carries out the host's requests. Keeps the results of `hold` requests until the next jump.

    Args:
        channel: the port to the host.
        boot_id: the boot id of this life.
        own_path: the folders in which to look for modules before those that a request names.
    """

    def __init__(self, channel: port.Port, boot_id: str, own_path: Sequence[str]) -> None:
        self._channel = channel
        self._boot_id = boot_id
        self._own_path = own_path
        self._held: dict[int, Any] = {}
        self._numbers = count(1)
        self._files = HostFiles()
        self._finder = _Finder()
        sys.meta_path.append(self._finder)

    def serve(self) -> None:
        """Answer requests until the machine is gone."""
        while True:
            request = self._channel.receive()
            # The host may have sent this request before the guest jumped; ignore it then.
            if request.get("boot_id") == self._boot_id:
                self._channel.send({"answer": request["id"], **self._answer(request)})

    def _answer(self, request: wire.Message) -> wire.Message:
        """Carry out a request, and return the answer: its result, or the exception that it raised.

        This function itself never raises an exception.
        """
        try:
            action = getattr(self, "do_" + request["do"])
            with self._files.current():
                answer = {"result": wire.encode(action(request))}
            wire.to_line(answer)  # raises here, not in serve(), if JSON cannot represent it
            return answer
        except _UnreachableError as error:
            return {"unreachable": error.file}
        except BaseException as error:
            return {"error": wire.encode(error)}

    def _find_held(self, boot_id: str, number: int) -> Any:
        if boot_id != self._boot_id:
            raise ValueError("an object was held before the last jump, in a life that is over")
        return self._held[number]

    def do_call(self, request: wire.Message) -> Any:
        """Run the requested function, and return its result."""
        sys.path[:] = [*self._own_path, *request["path"]]
        self._finder.packages = request["packages"]
        function = _find_function(request["function"], request["file"])
        arguments = wire.decode(request["arguments"], self._find_held)
        keywords = wire.decode(request["keywords"], self._find_held)
        return function(*arguments, **keywords)

    def do_hold(self, request: wire.Message) -> Any:
        """Run the requested function, keep its result, and return its number and its repr."""
        result = self.do_call(request)
        number = next(self._numbers)
        self._held[number] = result
        return [number, repr(result)]

    def do_release(self, request: wire.Message) -> None:
        """Drop a result that was kept."""
        wire.decode(request["held"], self._find_held)  # raises if it was held before the last jump
        del self._held[request["held"]["$held"][1]]

    def do_jump(self, request: wire.Message) -> None:
        """Load the next kernel and jump to it. Does not return; raises if that fails."""
        from pyluo import kexec  # here, because it would make each jump longer by its imports

        # handover=False and trust_image=True switch off pyluo's checks: a test may jump to a kernel
        # that loses what was preserved.
        kexec.load(request["image"], cmdline=request["cmdline"], handover=False)
        port.mark("loaded")
        if request["by_systemctl"]:
            port.mark("systemctl called")
            commands.jump_by_systemctl()
        os.sync()
        port.mark("reboot called")
        kexec.reboot(sync=False, trust_image=True)


def _find_function(reference: str, file: str | None) -> Any:
    """Return the function that a reference names.

    Args:
        reference: the name of the function, as `wire.reference` returned it.
        file: the file of its module on the host, for a module that cannot be imported by name.

    Raises:
        _UnreachableError: the guest cannot see the file.
    """
    module = reference.partition(":")[0]
    if module != "__main__":
        try:
            return wire.resolve(reference)
        except ModuleNotFoundError as error:
            # Fall back to the file only if the module or its package was not found; re-raise if one
            # of the module's own imports is missing.
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


def _bring_up_network() -> str:
    """Bring up the network, and return why that failed; empty if it did not.

    The host must be told: a worker that ends lets the kernel panic, which looks like its fault.
    """
    from pyluo.guest import network

    try:
        network.bring_up()
    except Exception as error:
        return f"the guest's network did not come up: {error!r}"
    return ""


def run_worker(own_path: Sequence[str] = ()) -> None:
    """Tell the host that the worker is up, and answer requests until the machine is gone.

    Args:
        own_path: the folders in which to look for modules before those that a request names.
    """
    channel = port.Port.find()
    port.set_mark_port(channel)
    problem = _bring_up_network() if os.environ.get("PYLUO_NETWORK") else ""
    with open(_BOOT_ID) as file:
        boot_id = file.read().strip()
    hello = {"boot_id": boot_id, "release": os.uname().release, "updates": KernelLog().updates}
    channel.send_first({"hello": hello | {"problem": problem}})
    os.setpriority(os.PRIO_PROCESS, 0, 0)  # the start may have been urgent, what follows is not
    Worker(channel, boot_id, own_path).serve()
