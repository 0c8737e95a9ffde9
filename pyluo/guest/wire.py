"""The wire between host and guest: messages over a virtio-serial port, one JSON object a line.

A jump may cut off a message. After each boot the guest first sends an empty line, so that the next
message begins on a line of its own; a line that does not parse was cut off by the jump.

A value that JSON cannot represent, such as bytes, a tuple, a path or a `GuestObject`, is sent as an
object with one key that starts with ``$`` and names the type. Exceptions, enums, dataclasses and
named tuples are sent as the names of their classes and their values. Objects of other classes
cannot be sent; nothing is pickled.
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
    "parse",
    "reference",
    "resolve",
    "resolve_loaded",
    "to_line"
]  # fmt: skip

MAIN = "__host_main__"  # the name in the guest of the module that is __main__ on the host

Message = dict[str, Any]

_BINARY: dict[type, str] = {bytes: "$bytes", bytearray: "$bytearray"}
_CONTAINERS: dict[type, str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
_BUILT_IN = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)


class GuestObject:
    """A handle to an object that stays in the guest.

    `vm.hold` returns the handle; pass it as an argument to later calls of `vm.call` and `vm.hold`.

    Attributes:
        boot_id: the boot id of the life of the guest in which the object exists.
        number: the number under which the guest keeps the object.
        description: the object's repr at the time when `vm.hold` returned.
    """

    def __init__(self, boot_id: str, number: int, description: str) -> None:
        self.boot_id = boot_id
        self.number = number
        self.description = description

    def __repr__(self) -> str:
        return f"<held in the guest: {self.description}>"


def to_line(message: Message) -> bytes:
    """Return the line that carries a message, with its line break."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def parse(line: bytes) -> Message | None:
    """Return the message that a line carries; None if the line was cut off."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def reference(class_or_function: type | Callable[..., Any]) -> str:
    """Return the name by which the other side can find a class or a function: "module:path".

    Raises:
        TypeError: the other side cannot find it by a name, because it is a lambda or a bound
            method, or is defined in a function.
    """
    path = getattr(class_or_function, "__qualname__", repr(class_or_function))
    name = f"{_find_module(class_or_function)}:{path}"
    bound = getattr(class_or_function, "__self__", None)
    if "<" in name or (bound is not None and not isinstance(bound, ModuleType)):
        raise TypeError(f"{name} cannot be found by its name in the guest: define it in a module")
    return name


def resolve(name: str) -> Any:
    """Import the module of a reference, and return the class or function that it names."""
    module, _, path = name.partition(":")
    return _follow_path(importlib.import_module(MAIN if module == "__main__" else module), path)


def resolve_loaded(name: str) -> Any:
    """Return the class or function that a reference names, if its module is already imported.

    The host uses this function instead of `resolve`, so that no guest can make it import a module,
    except pyluo's own.

    Raises:
        ValueError: the module is not imported.
    """
    module, _, path = name.partition(":")
    if module.startswith("pyluo."):
        importlib.import_module(module)
    home = sys.modules.get("__main__" if module == MAIN else module)
    if home is None:
        raise ValueError(f"{module} is not imported here")
    return _follow_path(home, path)


def _follow_path(module: ModuleType, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _find_module(class_or_function: Any) -> str:
    """Return the name of the module in which a class or a function can be found.

    pytest's outcome exceptions (skip, fail) have the __module__ "builtins", so they are looked up
    separately.
    """
    outcomes = sys.modules.get("_pytest.outcomes")
    name = getattr(class_or_function, "__name__", "")
    if outcomes is not None and getattr(outcomes, name, None) is class_or_function:
        return "_pytest.outcomes"
    return str(class_or_function.__module__)


def encode(value: Any) -> Any:
    """Convert a value to lists, dicts, strings, numbers, booleans and None, for `json.dumps`.

    `decode` reverses this.

    Raises:
        TypeError: values of this type cannot be sent.
    """
    try:
        return _encode(value)
    except RecursionError:
        raise TypeError("this value contains itself, or has too many levels to be sent") from None


def _encode(value: Any) -> Any:
    # Exact types: an object of a subclass would arrive as an object of another class.
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in _BINARY:
        return {_BINARY[kind]: binascii.b2a_base64(value, newline=False).decode()}
    if kind is list:
        return [_encode(item) for item in value]
    if kind in _CONTAINERS:
        return {_CONTAINERS[kind]: [_encode(item) for item in value]}
    if kind is dict:
        return {"$dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, enum.Enum):
        content = _encode(value.value) if isinstance(value, enum.Flag) else value.name
        return {"$enum": [reference(kind), content]}
    if isinstance(value, os.PathLike) and kind.__name__ == "PosixPath":
        return {"$path": os.fsdecode(value)}
    if kind is GuestObject:
        return {"$held": [value.boot_id, value.number]}
    if isinstance(value, BaseException):
        return {"$error": _encode_error(value)}
    if _is_named_tuple(kind):
        return {"$named": [reference(kind), [_encode(item) for item in value]]}
    if _is_dataclass(kind):
        fields = {name: _encode(item) for name, item in _read_state(value).items()}
        return {"$data": [reference(kind), fields]}
    raise TypeError(
        f"{kind.__name__} cannot cross between host and guest; "
        f"vm.hold() keeps a result in the guest"
    )


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_make")


def _is_dataclass(kind: Any) -> bool:
    """Return whether a class is a dataclass that does not derive from a built-in type such as list.

    All state of such an object is in its attributes.
    """
    return (
        isinstance(kind, type)
        and hasattr(kind, "__dataclass_fields__")
        and not issubclass(kind, _BUILT_IN)
    )


def _read_state(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, and the other attributes of the object, by their names."""
    import dataclasses  # not at the top: a guest that sends none need not load it

    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    others = (name for name in getattr(value, "__dict__", ()) if not name.startswith("__"))
    return {name: getattr(value, name) for name in dict.fromkeys([*names, *others])}


def decode(
    value: Any,
    find_held: Callable[[str, int], Any] | None = None,
    *,
    find: Callable[[str], Any] = resolve,
) -> Any:
    """Convert what `encode` returned back to the original value.

    Args:
        value: the result of `encode`, after a round trip through JSON.
        find_held: returns the object that is kept under a boot id and a number; None on the host,
            which keeps no objects.
        find: returns the class that a reference names: `resolve` or `resolve_loaded`.

    Raises:
        ValueError: `encode` does not return such a value.
    """

    def inner(item: Any) -> Any:
        return decode(item, find_held, find=find)

    if isinstance(value, list):
        return [inner(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    match tag:
        case "$bytes":
            return binascii.a2b_base64(content)
        case "$bytearray":
            return bytearray(binascii.a2b_base64(content))
        case "$tuple":
            return tuple(inner(item) for item in content)
        case "$set":
            return {inner(item) for item in content}
        case "$frozenset":
            return frozenset(inner(item) for item in content)
        case "$dict":
            return {inner(key): inner(item) for key, item in content}
        case "$path":
            from pathlib import Path  # imported only here, because loading it slows a guest's boot

            return Path(content)
        case "$enum":
            kind = _check_class(find(content[0]), enum.Enum)
            return kind(inner(content[1])) if issubclass(kind, enum.Flag) else kind[content[1]]
        case "$named":
            kind = find(content[0])
            if not _is_named_tuple(kind):
                raise ValueError(f"{kind!r} is no named tuple")
            return kind._make(inner(item) for item in content[1])
        case "$data":
            return _make_dataclass(find(content[0]), content[1], inner)
        case "$held" if find_held is not None:
            return find_held(*content)
        case "$error":
            return _decode_error(content, find)
    raise ValueError(f"{tag!r} is no kind of value")


def _check_class(found: Any, base: type) -> Any:
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{found!r} is not a {base.__name__}")
    return found


def _make_dataclass(kind: Any, fields: Message, decode_field: Callable[[Any], Any]) -> Any:
    """Return an object of a dataclass with these attributes, without calling its __init__."""
    if not _is_dataclass(kind):
        raise ValueError(f"{kind!r} is not a dataclass")
    made = kind.__new__(kind)
    for name, item in fields.items():
        object.__setattr__(made, name, decode_field(item))
    return made


def _encode_error(error: BaseException) -> Message:
    """Return the text of an exception and, if its class and values can be sent, the values to
    rebuild it from.
    """
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
        to_line(complete)  # raises if JSON cannot represent it
        return complete
    except Exception:
        return text


def _decode_error(content: Message, find: Callable[[str], Any]) -> BaseException:
    """Return the exception that the JSON stands for.

    If it cannot be rebuilt, or if raising it would end the host program (SystemExit,
    KeyboardInterrupt, ...), return a RuntimeError with its text instead.
    """
    try:
        kind = _check_class(find(content["type"]), BaseException)
        if not issubclass(kind, Exception) and kind.__name__ in vars(builtins):
            raise ValueError(f"{kind.__name__} must not be raised on the host")
        error: BaseException = kind(*(decode(item, find=find) for item in content["arguments"]))
        state = {name: decode(item, find=find) for name, item in content["state"].items()}
        vars(error).update(state)
    except Exception:
        error = RuntimeError(content["summary"])
    error.add_note("Raised in the guest:\n" + content["traceback"])
    return error
