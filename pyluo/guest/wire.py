"""The wire between host and guest: one JSON object a line, over a virtio-serial port.

A line is its own frame, so that a message cut short by a jump spoils only itself: the guest begins
each life with an empty line, and whatever does not parse belongs to the life before.

Values cross as JSON. What JSON does not have is an object with one key that starts with ``$``.
Nothing is unpickled: classes cross by name, and only exceptions, enums and dataclasses do.
"""

from __future__ import annotations

import binascii
import enum
import importlib
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Held", "decode", "encode", "frame", "parse", "reference", "resolve"]

Frame = dict[str, Any]


class Held:
    """An object that stays in the guest: what `vm.hold` returns, and an argument to later calls.

    Attributes:
        boot_id: the life of the guest that it belongs to.
        number: its name there.
        description: its repr, when it was held.
    """

    def __init__(self, boot_id: str, number: int, description: str) -> None:
        self.boot_id = boot_id
        self.number = number
        self.description = description

    def __repr__(self) -> str:
        return f"<held in the guest: {self.description}>"


def frame(message: Frame) -> bytes:
    """The line that carries a message."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def parse(line: bytes) -> Frame | None:
    """The message of a line; None for what is left of one that was cut short."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def reference(thing: type | Callable[..., Any]) -> str:
    """The name under which the other side can import a class or a function.

    Raises:
        TypeError: it has none: a lambda, or defined inside a function.
    """
    name = f"{thing.__module__}:{thing.__qualname__}"
    if "<" in name:
        raise TypeError(
            f"{name} has no name that the guest could import it by: define it in a module"
        )
    return name


def resolve(name: str) -> Any:
    """What a reference stands for."""
    module, _, path = name.partition(":")
    thing: Any = importlib.import_module(module)
    for part in path.split("."):
        thing = getattr(thing, part)
    return thing


def encode(value: Any) -> Any:
    """A value as JSON carries it.

    Raises:
        TypeError: there is no way to carry a value of this type.
    """
    if isinstance(value, enum.Enum):
        return {"$enum": [reference(type(value)), value.value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes | bytearray):
        return {"$bytes": binascii.b2a_base64(value, newline=False).decode()}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"$set": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"$dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, os.PathLike):
        return {"$path": os.fspath(value)}
    if isinstance(value, Held):
        return {"$held": value.number}
    if isinstance(value, BaseException):
        return {"$error": _encode_error(value)}
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        fields = {name: encode(getattr(value, name)) for name in value.__dataclass_fields__}
        return {"$data": [reference(type(value)), fields]}
    raise TypeError(
        f"{type(value).__name__} cannot cross between host and guest; "
        f"vm.hold() keeps a result in the guest"
    )


def decode(value: Any, held: Callable[[int], Any] | None = None) -> Any:
    """The value that `encode` was given.

    Args:
        value: as it came off the wire.
        held: what a held object's number stands for on this side.
    """
    if isinstance(value, list):
        return [decode(item, held) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "$bytes":
            return binascii.a2b_base64(content)
        case "$tuple":
            return tuple(decode(item, held) for item in content)
        case "$set":
            return {decode(item, held) for item in content}
        case "$dict":
            return {decode(key, held): decode(item, held) for key, item in content}
        case "$path":
            from pathlib import Path  # here, since it takes a moment to load in a guest

            return Path(content)
        case "$enum":
            return _class(content[0], enum.Enum)(content[1])
        case "$data":
            fields = {name: decode(item, held) for name, item in content[1].items()}
            return _dataclass(content[0])(**fields)
        case "$held" if held is not None:
            return held(content)
        case "$error":
            return _decode_error(content)
    raise ValueError(f"{kind!r} is no kind of value")


def _class(name: str, base: type) -> Any:
    found = resolve(name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name} is not a {base.__name__}")
    return found


def _dataclass(name: str) -> Any:
    found = resolve(name)
    if not (isinstance(found, type) and hasattr(found, "__dataclass_fields__")):
        raise ValueError(f"{name} is not a dataclass")
    return found


def _encode_error(error: BaseException) -> Frame:
    import traceback

    message = "".join(traceback.format_exception(error))
    plain: Frame = {"traceback": message, "summary": f"{type(error).__name__}: {error}"}
    reduced = error.__reduce__()
    if isinstance(reduced, str):
        return plain
    try:
        arguments = [encode(item) for item in reduced[1]]
        return plain | {"type": reference(type(error)), "arguments": arguments}
    except TypeError:
        return plain


def _decode_error(content: Frame) -> BaseException:
    try:
        kind = _class(content["type"], BaseException)
        error = kind(*(decode(item) for item in content["arguments"]))
    except Exception:
        error = RuntimeError(content["summary"])
    assert isinstance(error, BaseException)
    error.add_note("Raised in the guest:\n" + content["traceback"])
    return error
