"""Keep the guest's view of the host's files up to date, from one request to the next.

The guest's kernel caches names, sizes and contents of the host's files, and does not look whether
the host has changed them (9p's cache=loose). Without that cache, a guest takes half as long again
to boot. So the caches are dropped at the start of each request, which takes a few milliseconds.

The kernel waits for all CPUs while it drops them, for ever if one is stuck. A request does not.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HostFiles"]

_DROP_CACHES = "/proc/sys/vm/drop_caches"
_QUIET = b"4"  # the kernel no longer logs each write
_STEPS = (b"3", b"2")  # contents, names and inodes; names and inodes that were in use just now
_PATIENCE = 1.0  # seconds; the kernel needs some milliseconds
_STANDARD_LIBRARY = f"{os.path.dirname(os.__file__)}/"
_INSTALLED = ("/site-packages/", "/dist-packages/")
_PYLUO = "pyluo"


class HostFiles:
    """What the guest knows of the host's files.

    A file that a process of the guest keeps open or mapped can stay as the guest first saw it.
    """

    def __init__(self) -> None:
        self._caches = _Caches()
        self._known = set(sys.modules)
        self._modules: dict[str, tuple[str, object]] = {}  # the file of a module, and its state

    @contextmanager
    def current(self) -> Iterator[None]:
        """Run a request in the block: it reads the files as the host has written them before.

        If the host has changed a module that an earlier request imported, all modules that requests
        imported are forgotten, except installed ones, and will be imported again.
        """
        self._caches.drop()
        importlib.invalidate_caches()
        changed = any(_state(file) != state for file, state in self._modules.values())
        if changed:
            for name in self._modules:
                sys.modules.pop(name, None)
                package, _, last = name.rpartition(".")
                with suppress(KeyError, AttributeError):  # `from package import last` looks here
                    delattr(sys.modules[package], last)
            self._known -= self._modules.keys()
            self._modules.clear()
        # Python takes bytecode for up to date if the source was changed within the same second and
        # has the same size: look for no bytecode.
        prefix = sys.pycache_prefix
        sys.pycache_prefix = "/dev/null" if changed else prefix
        try:
            yield
        finally:
            sys.pycache_prefix = prefix
            self._note_modules()

    def _note_modules(self) -> None:
        """Note the states of new modules' files, which the kernel cached at the import."""
        for name in sys.modules.keys() - self._known:
            self._known.add(name)
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and not _is_fixed(name, file):
                self._modules[name] = file, _state(file)


class _Caches:
    """The kernel's caches of files; a thread drops them, because the kernel may not come back."""

    def __init__(self) -> None:
        self._wanted, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._pending = False
        self._control: int | None = None
        with suppress(FileNotFoundError):  # a kernel without CONFIG_SYSCTL
            self._control = os.open(_DROP_CACHES, os.O_WRONLY)
            os.pwrite(self._control, _QUIET, 0)
            threading.Thread(target=self._serve, name="pyluo-caches", daemon=True).start()

    def drop(self) -> None:
        """Drop the caches, or give up waiting for that, now and until it is done."""
        if self._control is None:
            return
        if self._pending and not self._done.acquire(blocking=False):
            return
        self._wanted.release()
        self._pending = not self._done.acquire(timeout=_PATIENCE)

    def _serve(self) -> None:
        assert self._control is not None
        while True:
            self._wanted.acquire()
            for step in _STEPS:
                os.pwrite(self._control, step, 0)
            self._done.release()


def _is_fixed(name: str, file: str) -> bool:
    """Return whether a module belongs to pyluo, to Python, or to an installed package."""
    installed = file.startswith(_STANDARD_LIBRARY) or any(each in file for each in _INSTALLED)
    return installed or name.partition(".")[0] == _PYLUO


def _state(file: str) -> object:
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino
