"""Handing over to the program that takes this one's place.

Process and descriptors keep their numbers; the memory of the process is another, though, so that an
iommufd has to be told as after any handoff. What the descriptors are called stands in a sealed
memfd, whose own number is in the environment.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from dataclasses import replace
from errno import EBADMSG, ENOENT, ESTALE
from typing import TYPE_CHECKING, NoReturn

from pyluo._sys import raising
from pyluo.descriptor import OwnedFd, number_of
from pyluo.errors import HandoffError, LuoError
from pyluo.handoff.manifest import Entry, Manifest
from pyluo.handoff.received import Handoff

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyluo.descriptor import Descriptor

__all__ = ["VARIABLE", "exec_with", "inherited"]

VARIABLE = "PYLUO_HANDOFF"  # of the environment: the number of the manifest's descriptor
_FIRST = 3  # 0 to 2 are the next program's standard streams, whatever else they are
_INHERIT = "inherit handoff"


def exec_with(
    argv: Sequence[str],
    files: Mapping[str, Descriptor | int],
    state: bytes = b"",
    *,
    env: Mapping[str, str] | None = None,
) -> NoReturn:
    """Makes this process run another program, which finds descriptors and a state by `inherited`.

    Descriptors are passed on as they are, with their numbers; one that is a standard stream, or has
    two names, as a duplicate. They lose close-on-exec in the last moment: a child that another
    thread starts just then inherits them. When this raises, all is as it was.

    As with any exec, other threads end, nothing is cleaned up, and what Python has buffered is not
    written: flush before.

    Args:
        argv: the program, looked for in PATH unless it has a slash, and its arguments.
        files: descriptors by name, in the order in which the next program shall see them.
        state: what the next program shall know besides, of any size.
        env: its environment; this process's if it is not given. PYLUO_HANDOFF is set in it.

    Raises:
        ValueError: `argv` is empty, or a name is empty or longer than 255 bytes in UTF-8.
        HandoffError: EBADF, a descriptor is not open; EMFILE, no number is left for a duplicate;
            ENOENT, EACCES, ENOEXEC, E2BIG and others, as execve(2) answered.
        LuoError: as `Memfd.create` does.

    Source: execve(2)
    """
    if not argv:
        raise ValueError("no program is given")
    with raising("exec handoff", repr(argv[0])), ExitStack() as stack:
        entries = [Entry.of(name, number_of(file)) for name, file in files.items()]
        numbers: set[int] = set()
        for index, file in enumerate(files.values()):
            number = number_of(file)
            if number < _FIRST or number in numbers:
                number = _duplicate(number, stack)
            numbers.add(number)
            entries[index] = replace(entries[index], number=number)
        manifest = stack.enter_context(Manifest(tuple(entries), state, os.getpid()).to_memfd())
        own = _duplicate(manifest.fileno(), stack)
        environment = {**(os.environ if env is None else env), VARIABLE: str(own)}
        for number in (own, *numbers):
            if not os.get_inheritable(number):
                stack.callback(os.set_inheritable, number, False)
                os.set_inheritable(number, True)
        os.execvpe(argv[0], list(argv), environment)


def inherited() -> Handoff:
    """What the program that ran in this process before has passed on by `exec_with`.

    Call it early, before anything closes descriptors by their numbers or starts a child. It works
    once: the variable is removed, and the descriptors are close-on-exec again.

    Raises:
        HandoffError: ENOENT, nothing was passed on; ESTALE, it was meant for another process, and
            this one has inherited the variable; or a descriptor is of another file now; EBADF, a
            descriptor is not open any more; EBADMSG, what the variable names is no manifest;
            EPROTONOSUPPORT, it is one of another version. No descriptor is closed or changed then:
            no other process has them any more.

    Source: execve(2)
    """
    value = os.environ.pop(VARIABLE, None)
    if value is None:
        hint = f"{VARIABLE} is not set: no program before this one has called exec_with()"
        raise HandoffError(ENOENT, _INHERIT, "", hint)
    number = _parse_variable(value)
    subject = f"{VARIABLE}={value}"
    try:
        manifest = Manifest.read(number)
    except LuoError as error:
        raise HandoffError(error.errno or EBADMSG, _INHERIT, subject, error.hint) from None
    if manifest.pid != os.getpid():
        hint = f"It is meant for process {manifest.pid}, and this is {os.getpid()}"
        raise HandoffError(ESTALE, _INHERIT, subject, hint)
    _check_descriptors(manifest, number)
    for entry in manifest.entries:
        os.set_inheritable(entry.number, False)
    os.close(number)
    return Handoff(
        {entry.name: OwnedFd(entry.number) for entry in manifest.entries}, manifest.state
    )


def _duplicate(number: int, stack: ExitStack) -> int:
    """Another descriptor of the file, which is no standard stream."""
    duplicate = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _FIRST)
    stack.callback(os.close, duplicate)
    return duplicate


def _parse_variable(value: str) -> int:
    number = int(value) if value.isdecimal() and len(value) < 10 else -1
    if number < _FIRST:
        raise HandoffError(
            EBADMSG, _INHERIT, f"{VARIABLE}={value}", "This is no descriptor's number"
        )
    return number


def _check_descriptors(manifest: Manifest, own: int) -> None:
    numbers = {entry.number for entry in manifest.entries}
    if len(numbers) < len(manifest.entries) or own in numbers or min(numbers, default=3) < _FIRST:
        raise HandoffError(EBADMSG, _INHERIT, "", "It names one descriptor twice, or a wrong one")
    for entry in manifest.entries:
        subject = f"{entry.name!r}, descriptor {entry.number}"
        with raising(_INHERIT, subject):
            matches = entry.matches(entry.number)
        if not matches:
            raise HandoffError(ESTALE, _INHERIT, subject, "It is of another file now")
