"""The messages between the coordinator of an update and the VMMs that take part.

docs/reference/update-protocol.md describes who says what when. Each message is one packet of a Unix
socket of type SOCK_SEQPACKET: a JSON object, whose member ``type`` is the name of a class here, and
whose other members are the class's fields.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from errno import EBADMSG, EPROTONOSUPPORT
from typing import TYPE_CHECKING, Any, NoReturn, Union, get_args, get_type_hints

from pyluo.operation import Operation

if TYPE_CHECKING:
    from pyluo.errors import RequestError

__all__ = [
    "JUMP",
    "VERSION",
    "Abort",
    "Answer",
    "CreateSession",
    "Done",
    "Hello",
    "Jump",
    "Message",
    "Prepare",
    "Progress",
    "Ready",
    "RetrieveSession",
    "Running",
    "Status",
    "Unable",
    "Update",
    "Welcome",
    "decode",
    "encode",
]

VERSION = 1
JUMP = "jump"
"""The text of the `Progress` that announces the jump."""

_LONGEST = 1024  # bytes of a packet
_MESSAGE = Operation("update message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message of a VMM.

    Attributes:
        version: the version of the protocol.
        name: the name of the VM, which no other participant has.
        stored: whether the VM is paused and stored, as after a "ready" to another coordinator.
        paused: for how many seconds the VM did not run, if it has been resumed after a jump; else
            None.
    """

    version: int
    name: str
    stored: bool
    paused: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The answer to "hello": the VM takes part in every update from now on."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Pause the VM and store it, and answer "ready" or "unable".

    Attributes:
        round: the number of the update, which each answer repeats.
        limit: seconds within which the answer must come.
        dry_run: whether there will be no jump, but an "abort" once all are ready.
    """

    round: int
    limit: float
    dry_run: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The VM is paused, and all of it is in these outgoing sessions."""

    round: int
    sessions: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unable:
    """The VM runs on, and cannot be stored now."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Jump:
    """The host jumps now: if the connection ends, that is no "abort"."""

    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """There is no jump: let the VM run on, and answer "running"."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The VM runs again."""

    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateSession:
    """Create an outgoing session, for a VMM that may not open the device."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveSession:
    """Retrieve an incoming session, for a VMM that may not open the device."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a request for a session, with the descriptor in the same packet.

    Attributes:
        errno: 0, or why there is none.
        text: the hint of the error.
    """

    errno: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Update the host's kernel to the image that is loaded: an administrator's program asks for it.

    Attributes:
        version: the version of the protocol.
        limit: seconds for all to be ready.
        dry_run: whether to abort once all are ready.
        rounds: how often to do so.
        expected: the names of participants without which there is no update.
    """

    version: int
    limit: float
    dry_run: bool
    rounds: int
    expected: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Ask who takes part; the answers are "progress", one for each, and "done"."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Something happened in the update that was asked for.

    Attributes:
        seconds: since it began.
        name: the participant that it is about; empty for the host.
        text: what happened.
    """

    seconds: float
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The end of what was asked for; if it was a jump, there is none.

    Attributes:
        failure: why there was no jump; empty after a dry run in which all were ready.
    """

    failure: str


Message = Union[  # noqa: UP007
    Hello, Welcome, Prepare, Ready, Unable, Jump, Abort, Running, CreateSession, RetrieveSession,
    Answer, Update, Status, Progress, Done,
]  # fmt: skip

_CLASSES: dict[str, type[Any]] = {each.__name__: each for each in get_args(Message)}


def encode(message: Message) -> bytes:
    """Return a message as bytes; a text in it that is too long for a packet is cut."""
    members: dict[str, Any] = {"type": type(message).__name__, **dataclasses.asdict(message)}
    data = json.dumps(members).encode()
    for name in ("text", "reason", "failure"):
        while len(data) > _LONGEST and members.get(name):
            members[name] = members[name][: len(members[name]) // 2]
            data = json.dumps(members).encode()
    if len(data) > _LONGEST:
        raise error(EBADMSG, f"A {members['type']} of {len(data)} bytes: {_LONGEST} are possible")
    return data


def decode(data: bytes) -> Message:
    """Return the message in a packet.

    Raises:
        RequestError: it is none (EBADMSG), or of another version (EPROTONOSUPPORT).
    """
    try:
        members = json.loads(data, parse_constant=_refuse_constant)
        kind = _CLASSES[members.pop("type")]
        version = members.get("version", VERSION)
        if version != VERSION:
            hint = f"The other program uses version {version}; this one uses {VERSION}"
            raise error(EPROTONOSUPPORT, hint)
        message: Message = kind(**members)
        for name, expected in get_type_hints(kind).items():
            _check(getattr(message, name), expected)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise error(EBADMSG, f"The other program sent {data[:80]!r}") from problem
    return message


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _check(value: object, expected: Any) -> None:
    kinds = get_args(expected)
    if expected == list[str]:
        fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
    elif float in (expected, *kinds):
        fits = (value is None and bool(kinds)) or (
            isinstance(value, int | float) and not isinstance(value, bool)
        )
    else:
        fits = type(value) is expected
    if not fits:
        raise TypeError(f"{value!r} is no {expected}")


def error(number: int, hint: str) -> RequestError:
    """Return the exception for a message that cannot be used."""
    return _MESSAGE.error(number, "", hint)
