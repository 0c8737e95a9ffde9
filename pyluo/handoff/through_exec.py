"""Handing over descriptors to the next program in the same process, through exec.

The process keeps its PID, and the descriptors keep their numbers. But exec replaces the memory of
the process, so an iommufd needs `change_process`, as after a handoff to another process. The names
of the descriptors are in a sealed memfd; an environment variable has the number of its descriptor.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from dataclasses import replace
from errno import EBADMSG, EMFILE, ENOENT, ESTALE
from typing import TYPE_CHECKING, NoReturn

from pyluo.descriptor import ReceivedFd, fileno_of, fileno_to_share
from pyluo.errors import HandoffError, RequestError
from pyluo.handoff.manifest import Entry, Manifest
from pyluo.handoff.received import Handoff
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyluo.descriptor import Descriptor

__all__ = ["VARIABLE", "exec_with", "inherited"]

VARIABLE = "PYLUO_HANDOFF"  # environment variable with the number of the manifest's descriptor
_LOWEST = 3  # the lowest usable number: the next program uses 0 to 2 as its standard streams
_EXEC = Operation(
    "exec handoff",
    HandoffError,
    {
        EMFILE: (
            "No descriptor number is free for a duplicate: raise RLIMIT_NOFILE; nothing has changed"
        ),
    },
)
_INHERIT = Operation("inherit handoff", HandoffError)


def exec_with(
    argv: Sequence[str],
    files: Mapping[str, Descriptor | int],
    state: bytes = b"",
    *,
    env: Mapping[str, str] | None = None,
) -> NoReturn:
    """Replace this program by another one, which gets the descriptors and the state.

    The other program must call `inherited`. The descriptors keep their numbers, except that a
    standard stream, or a descriptor with two names, is duplicated. Close-on-exec is cleared just
    before the exec; if another thread starts a child at that moment, the child inherits the
    descriptors too. If this function raises, nothing has changed.

    As with any exec, all other threads end, no cleanup code runs, and Python does not write its
    buffers: flush them first.

    Args:
        argv: the name of the program, searched in PATH unless it contains a slash, followed by its
            arguments.
        files: a descriptor for each name, in the order in which the next program gets them.
        state: any bytes for the next program; there is no size limit.
        env: the environment of the program, to which PYLUO_HANDOFF is added; by default the
            environment of this process.

    Raises:
        ValueError: `argv` is empty, or a name is empty or longer than 255 bytes in UTF-8.
        HandoffError: a descriptor is not open (EBADF); no descriptor number is free for a duplicate
            (EMFILE); execve(2) failed (ENOENT, EACCES, ENOEXEC, E2BIG and others).
        RequestError: see `Memfd.create`.

    Source: execve(2)
    """
    if not argv:
        raise ValueError("argv is empty: no program is given")
    with _EXEC.raising(repr(argv[0])), ExitStack() as stack:
        entries = [
            Entry.of(name, fileno_to_share(file, _EXEC.name)) for name, file in files.items()
        ]
        numbers: set[int] = set()
        for index, file in enumerate(files.values()):
            number = fileno_of(file)
            if number < _LOWEST or number in numbers:
                number = _duplicate(number, stack)
            numbers.add(number)
            entries[index] = replace(entries[index], number=number)
        manifest = stack.enter_context(Manifest(tuple(entries), state, os.getpid()).to_memfd())
        manifest_fd = _duplicate(manifest.fileno(), stack)
        environment = {**(os.environ if env is None else env), VARIABLE: str(manifest_fd)}
        for number in (manifest_fd, *numbers):
            if not os.get_inheritable(number):
                stack.callback(os.set_inheritable, number, False)
                os.set_inheritable(number, True)
        os.execvpe(argv[0], list(argv), environment)


def inherited() -> Handoff:
    """Return the descriptors and the state from the previous program of this process.

    The previous program must have called `exec_with`. Call this function early, before any code
    closes descriptors by their numbers or starts a child. It works only once, because it removes
    the environment variable; it also sets close-on-exec again.

    Raises:
        HandoffError: the environment variable is not set (ENOENT); the handoff is for another
            process, from which this process inherited the variable (ESTALE); a descriptor refers
            to another file by now (ESTALE), or is no longer open (EBADF); the variable does not
            refer to a valid manifest (EBADMSG), or the manifest has another version
            (EPROTONOSUPPORT). In all these cases no descriptor is closed or changed, because this
            process may have the only descriptor of a file.

    Source: execve(2)
    """
    value = os.environ.pop(VARIABLE, None)
    if value is None:
        hint = f"{VARIABLE} is not set: no program before this one called exec_with()"
        raise HandoffError(ENOENT, _INHERIT.name, "", hint)
    number = _parse_variable(value)
    subject = f"{VARIABLE}={value}"
    try:
        manifest = Manifest.read(number)
    except RequestError as error:
        raise HandoffError(error.errno or EBADMSG, _INHERIT.name, subject, error.hint) from None
    if manifest.pid != os.getpid():
        hint = f"It is for process {manifest.pid}, and this is process {os.getpid()}"
        raise HandoffError(ESTALE, _INHERIT.name, subject, hint)
    _check_descriptors(manifest, number)
    for entry in manifest.entries:
        os.set_inheritable(entry.number, False)
    os.close(number)
    return Handoff(
        {entry.name: ReceivedFd(entry.number) for entry in manifest.entries}, manifest.state
    )


def _duplicate(number: int, stack: ExitStack) -> int:
    """Return a duplicate of a descriptor, with a number above the standard streams'.

    The exit stack closes the duplicate.
    """
    duplicate = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _LOWEST)
    stack.callback(os.close, duplicate)
    return duplicate


def _parse_variable(value: str) -> int:
    number = int(value) if value.isdecimal() and len(value) < 10 else -1
    if number < _LOWEST:
        raise HandoffError(
            EBADMSG, _INHERIT.name, f"{VARIABLE}={value}", "This is not the number of a descriptor"
        )
    return number


def _check_descriptors(manifest: Manifest, manifest_fd: int) -> None:
    numbers = {entry.number for entry in manifest.entries}
    if (
        len(numbers) < len(manifest.entries)
        or manifest_fd in numbers
        or min(numbers, default=3) < _LOWEST
    ):
        hint = "It names a descriptor twice, or a wrong one"
        raise HandoffError(EBADMSG, _INHERIT.name, "", hint)
    for entry in manifest.entries:
        subject = f"{entry.name!r}, descriptor {entry.number}"
        with _INHERIT.raising(subject):
            matches = entry.matches(entry.number)
        if not matches:
            raise HandoffError(ESTALE, _INHERIT.name, subject, "It is of another file by now")
