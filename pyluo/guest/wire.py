"""The wire between host and guest: one JSON object per line, over a virtio-serial port.

Each line is a complete frame, so that a message cut off by a jump spoils only itself: the guest
begins each life with an empty line, and a line that does not parse belongs to the life before.

Values are sent as JSON. A type that JSON does not have is an object with one key that starts with
``$``. Nothing is unpickled: classes are sent by name, and only exceptions, enums and dataclasses.
"""

from __future__ import annotations

import binascii
import builtins
import enum
import importlib
import json
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MAIN",
    "GuestObject",
    "decode",
    "encode",
    "frame",
    "parse",
    "reference",
    "resolve",
    "resolve_loaded"
]  # fmt: skip

MAIN = "__host_main__"  # the guest's name for the module that is __main__ on the host

Frame = dict[str, Any]


class GuestObject:
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
    """Return the line that carries a message."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def parse(line: bytes) -> Frame | None:
    """Return the message of a line; None if the line was cut off."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def reference(thing: type | Callable[..., Any]) -> str:
    """Return the name by which the other side can find a class or a function.

    Raises:
        TypeError: it has no such name: it is a lambda, a bound method, or defined in a function.
    """
    name = f"{_find_module(thing)}:{getattr(thing, '__qualname__', repr(thing))}"
    bound = getattr(thing, "__self__", None)
    if "<" in name or (bound is not None and not isinstance(bound, ModuleType)):
        raise TypeError(f"{name} cannot be found by its name in the guest: define it in a module")
    return name


def resolve(name: str) -> Any:
    """Return the class or function that a reference names, after importing its module."""
    module, _, path = name.partition(":")
    return _follow_path(importlib.import_module(MAIN if module == "__main__" else module), path)


def resolve_loaded(name: str) -> Any:
    """Return the class or function that a reference names, in a module that is already imported.

    The host uses this, so that no guest can make it import anything.

    Raises:
        ValueError: the module is not imported.
    """
    module, _, path = name.partition(":")
    home = sys.modules.get("__main__" if module == MAIN else module)
    if home is None:
        raise ValueError(f"{module} is not imported here")
    return _follow_path(home, path)


def _follow_path(thing: Any, path: str) -> Any:
    for part in path.split("."):
        thing = getattr(thing, part)
    return thing


def _find_module(thing: Any) -> str:
    """Return the module where a thing can be found; pytest's outcomes claim to be builtins."""
    outcomes = sys.modules.get("_pytest.outcomes")
    if outcomes is not None and getattr(outcomes, getattr(thing, "__name__", ""), None) is thing:
        return "_pytest.outcomes"
    return str(thing.__module__)


def encode(value: Any) -> Any:
    """Return a value as JSON.

    Raises:
        TypeError: values of this type cannot be sent.
    """
    if isinstance(value, enum.Enum):
        return {"$enum": [reference(type(value)), encode(value.value)]}
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
        return {"$path": os.fsdecode(value)}
    if isinstance(value, GuestObject):
        return {"$held": [value.boot_id, value.number]}
    if isinstance(value, BaseException):
        return {"$error": _encode_error(value)}
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        fields = {name: encode(getattr(value, name)) for name in value.__dataclass_fields__}
        return {"$data": [reference(type(value)), fields]}
    raise TypeError(
        f"{type(value).__name__} cannot cross between host and guest; "
        f"vm.hold() keeps a result in the guest"
    )


def decode(
    value: Any,
    held: Callable[[str, int], Any] | None = None,
    *,
    find: Callable[[str], Any] = resolve,
) -> Any:
    """Return the value that was given to `encode`.

    Args:
        value: the JSON.
        held: returns the object that a boot id and a number stand for on this side.
        find: returns the class that a name stands for on this side: `resolve` or `resolve_loaded`.

    Raises:
        ValueError: `encode` returns no such JSON.
    """

    def inner(item: Any) -> Any:
        return decode(item, held, find=find)

    if isinstance(value, list):
        return [inner(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "$bytes":
            return binascii.a2b_base64(content)
        case "$tuple":
            return tuple(inner(item) for item in content)
        case "$set":
            return {inner(item) for item in content}
        case "$dict":
            return {inner(key): inner(item) for key, item in content}
        case "$path":
            from pathlib import Path  # here, because it takes a moment to load in a guest

            return Path(content)
        case "$enum":
            return _check_class(find(content[0]), enum.Enum)(inner(content[1]))
        case "$data":
            fields = {name: inner(item) for name, item in content[1].items()}
            return _check_dataclass(find(content[0]))(**fields)
        case "$held" if held is not None:
            return held(*content)
        case "$error":
            return _decode_error(content, find)
    raise ValueError(f"{kind!r} is no kind of value")


def _check_class(found: Any, base: type) -> Any:
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{found!r} is not a {base.__name__}")
    return found


def _check_dataclass(found: Any) -> Any:
    if not (isinstance(found, type) and hasattr(found, "__dataclass_fields__")):
        raise ValueError(f"{found!r} is not a dataclass")
    return found


def _encode_error(error: BaseException) -> Frame:
    """Return an exception's text, and the parts to rebuild it from, if these can be sent."""
    import traceback

    try:
        text = {
            "summary": f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
    except Exception:
        text = {"summary": type(error).__name__, "traceback": "it has no text"}
    try:
        reduced = error.__reduce__()
        if isinstance(reduced, str):
            return text
        state = reduced[2] if len(reduced) > 2 and isinstance(reduced[2], dict) else {}
        complete = text | {
            "type": reference(type(error)),
            "arguments": [encode(item) for item in reduced[1]],
            "state": {name: encode(item) for name, item in state.items()},
        }
        frame(complete)  # raises if JSON cannot represent it
        return complete
    except Exception:
        return text


def _decode_error(content: Frame, find: Callable[[str], Any]) -> BaseException:
    """Rebuild an exception.

    If this is not possible, or the exception would end more than a call, return a RuntimeError with
    its text.
    """
    try:
        kind = _check_class(find(content["type"]), BaseException)
        if not issubclass(kind, Exception) and kind.__name__ in vars(builtins):
            raise ValueError(f"{kind.__name__} is for the guest alone")
        error: BaseException = kind(*(decode(item, find=find) for item in content["arguments"]))
        state = {name: decode(item, find=find) for name, item in content["state"].items()}
        vars(error).update(state)
    except Exception:
        error = RuntimeError(content["summary"])
    error.add_note("Raised in the guest:\n" + content["traceback"])
    return error
