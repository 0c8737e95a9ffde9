"""Write the pages of the manual about exceptions, ioctls and JSON, from the code and the schemas.

With --check, say whether the pages are up to date, by the exit status.
"""

from __future__ import annotations

import argparse
import inspect
import json
import pkgutil
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyluo
from pyluo import errors
from pyluo._sys import Ioctl, PlainIoctl
from pyluo.cli import make_parser
from pyluo.cli.parsers import walk
from pyluo.errors import RequestError, errno_name
from pyluo.operation import Operation, declared

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMMON = errors.KernelTooOldError, errors.IommuUnsupportedError, errors.FeatureNotSupportedError
_MOST = 6  # requests to name in a row

# Parts of pyluo that make no request of the kernel's themselves.
_APART = ("pyluo.__main__", "pyluo._ffi", "pyluo.cli", "pyluo.doctor", "pyluo.guest", "pyluo.vm")

FOLDER = Path(__file__).parent / "reference"
ERRORS = """\
# The exceptions

This page is made from the code: see `docs/make_reference.py`. To find out what to do about an
error, search this page for its words, or for its class and the request that it names.

A request that the kernel refuses, or pyluo before it, raises an exception of one of these classes.
All of them are `OSError`, with its `errno`; `operation` is the kernel's name of the request,
`subject` says on what it was made, and `hint` what can be done. There is a class where a caller
does something else because of it; an errno that calls for nothing else raises the class of its kind
(`LuoError`, `KexecError`, `KvmError`, `IommuError`, `VfioError`), or `RequestError` itself for what
is a matter of files, processes or memory. Arguments that cannot be right raise `ValueError` or
`TypeError`, before any request.

## What a caller does

| exception | is also | raised if | what to do | requests |
| --- | --- | --- | --- | --- |
"""
MIDDLE = """
## What each request's errnos mean

An errno that is not here raises the class of its kind, without a hint. Not shown are what all
requests have in common: E2BIG, and ENOTTY from an iommufd, are a `KernelTooOldError`; EOPNOTSUPP
from an iommufd is an `IommuUnsupportedError`; ENOTTY and EOPNOTSUPP for a feature of a VFIO device
are a `FeatureNotSupportedError`.

| request | errno | exception | hint |
| --- | --- | --- | --- |
"""


IOCTLS = """\
# The ioctls

This page is made from the docstrings: see `docs/make_reference.py`. It has each ioctl that pyluo
makes, what makes it, and the oldest kernel on which that works. A kernel of LUO's or iommufd's that
lacks a request, or a field of its struct, raises a `KernelTooOldError`; for the others see [the
exceptions](errors.md). `pyluo/_uapi` has the declarations, which a test compares with the kernel's
own headers.

| ioctl | struct | made by | since |
| --- | --- | --- | --- |
"""

JSON = """\
# What `--json` prints

This page is made from the schemas: see `docs/make_reference.py`. For each command with `--json`
there is a [JSON Schema](https://json-schema.org/draft/2020-12) in `docs/reference/json`; the tests
compare with it what the commands print. More members may come: a program passes over those that it
does not know.

A command that cannot do its work says on stderr why, and prints no JSON, or what it has come to so
far; [the exit status](commands.md#exit-status) tells.

In the tables, `a[].b` is the member `b` of each object in the array `a`.
"""
_JSON_HEAD = """
| member | type | unit | meaning |
| --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    for name in pyluo.__all__:
        getattr(pyluo, name)  # imports the modules, whose requests are declared then
    pages = {"errors.md": make_errors(), "ioctls.md": make_ioctls(), "json.md": make_json()}
    for name, text in pages.items():
        page = FOLDER / name
        if not check:
            page.write_text(text)
        elif page.read_text() != text:
            sys.exit(f"{page} is out of date: run python docs/{Path(__file__).name}")


def make_ioctls() -> str:
    """Return the text of the page about ioctls.

    Raises:
        SystemExit: no docstring names an ioctl that is made.
    """
    docstrings = dict(_docstrings())
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    for operation in declared():
        if not isinstance(operation, Ioctl | PlainIoctl) or not operation.name:
            continue
        pattern = re.compile(rf"Source:[^\0]*\b{operation.name}\b")
        makers = {name: text for name, text in docstrings.items() if pattern.search(text)}
        if not makers:
            sys.exit(f"no docstring names {operation.name} as its source")
        struct = operation.struct.name if isinstance(operation, Ioctl) else ""
        rows[operation.name] = f"`struct {struct}`" if struct else "", makers
    lines = []
    for name, (struct, makers) in sorted(rows.items()):
        releases = {found for text in makers.values() if (found := _oldest(text))}
        since = ".".join(map(str, min(releases))) if releases else ""
        made_by = ", ".join(f"`{maker}`" for maker in makers)
        lines.append(f"| `{name}` | {struct} | {made_by} | {since} |")
    return IOCTLS + "\n".join(lines) + "\n"


def _oldest(text: str) -> tuple[int, ...] | None:
    """Return the first release that the source of a docstring names."""
    found = re.search(r"Source:[^\0]*?Linux\s+(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(number) for number in found.groups() if number) if found else None


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield the docstrings of the functions, classes and methods of the binding, by their names."""
    for found in pkgutil.walk_packages(pyluo.__path__, "pyluo."):
        if found.name.startswith(_APART):
            continue
        module = import_module(found.name)
        for value in vars(module).values():
            if getattr(value, "__module__", None) == module.__name__ and not _is_private(value):
                yield from _docstrings_of(value)


def _docstrings_of(value: Any) -> Iterator[tuple[str, str]]:
    home = value.__module__.split(".")[1]
    name = value.__name__ if inspect.isclass(value) else f"{home}.{value.__name__}"
    yield name, value.__doc__ or ""
    if inspect.isclass(value):
        private = [base for base in value.__bases__ if _is_private(base)]
        for base in (value, *private):  # the methods of a private class are those of its heirs
            for name, member in vars(base).items():
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if not name.startswith("_") and callable(function):
                    yield f"{value.__qualname__}.{name}", function.__doc__ or ""


def _is_private(value: Any) -> bool:
    return not (inspect.isclass(value) or inspect.isfunction(value)) or value.__name__[0] == "_"


def make_json() -> str:
    """Return the text of the page about what commands print with --json.

    Raises:
        OSError: there is no schema for a command.
    """
    sections = [JSON]
    for command in walk(make_parser()):
        if "--json" in command._option_string_actions:
            name = command.prog.removeprefix("pyluo ").replace(" ", "-")
            sections.append(_section(f"json/{name}.schema.json", f"`{command.prog}`"))
    for part in sorted(FOLDER.glob("json/parts/*")):
        sections.append(_section(f"json/parts/{part.name}"))
    return "".join(sections)


def _section(path: str, title: str = "") -> str:
    """Return the section about a schema.

    Args:
        path: the path of the schema in the folder of the page.
        title: the title of the section; by default that of the schema.
    """
    schema = json.loads((FOLDER / path).read_text())
    text = f"\n## {title or _capital(schema['title'])}\n\n{schema['description']} "
    text += f"[The schema]({path}).\n"
    for choice in schema.get("oneOf", [schema]):
        if "$ref" in choice:
            text += f"\n{_capital(_link(choice))}.\n"
            continue
        if choice is not schema:
            text += f"\n{_capital(choice['title'])}:\n"
        if choice["type"] == "array":
            text += "\nAn array of objects:\n"
        text += _JSON_HEAD + "\n".join(_members(choice, "")) + "\n"
    return text


def _members(schema: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield the rows of a table about the members of an object, or of the objects in an array."""
    while "items" in schema:
        schema, prefix = schema["items"], f"{prefix}[]"
    for name, member in schema.get("properties", {}).items():
        path = f"{prefix}.{name}" if prefix else name
        meaning = member["description"]
        if name not in schema["required"]:
            meaning += "; not always there"
        unit = member.get("x-unit") or member.get("items", {}).get("x-unit", "")
        yield f"| `{path}` | {_type(member)} | {unit} | {meaning} |"
        yield from _members(member, path)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _link(schema)
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"array: {_type(schema['items'])}"
    types = schema["type"]
    return types if isinstance(types, str) else " or ".join(types)


def _link(schema: dict[str, Any]) -> str:
    """Return a link to the section about the schema that is referred to."""
    part = FOLDER / "json" / "parts" / schema["$ref"].rpartition("/")[2]
    title = json.loads(part.read_text())["title"]
    return f"[{title}](#{title.lower().replace(' ', '-')})"


def _capital(text: str) -> str:
    start = 1 if text.startswith("[") else 0  # of a link
    return text[:start] + text[start].upper() + text[start + 1 :]


def make_errors() -> str:
    """Return the text of the page about exceptions."""
    classes = [getattr(errors, name) for name in errors.__all__]
    requests = [each for each in declared() if each.refusals or each.kind is not RequestError]
    rows = [_row(kind, requests) for kind in sorted(classes, key=_rank)]
    lines = [line for operation in requests for line in _lines(operation)]
    return ERRORS + "\n".join(rows) + "\n" + MIDDLE + "\n".join(dict.fromkeys(lines)) + "\n"


def _rank(kind: type[RequestError]) -> list[str]:
    """Return what sorts classes so that each follows its base."""
    return [each.__name__ for each in reversed(kind.__mro__) if issubclass(each, RequestError)]


def _row(kind: type[RequestError], requests: list[Operation]) -> str:
    others = [f"`{each.__name__}`" for each in kind.__bases__ if each is not OSError]
    summary = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    raising = [
        f"`{operation.name}`"
        for operation in requests
        if any(each is kind for each, _ in operation.refusals.values())
    ]
    where = f"{len(raising)} requests" if len(raising) > _MOST else ", ".join(raising)
    cells = [f"`{kind.__name__}`", ", ".join(others), summary, _say(kind.default_hint), where]
    return "| " + " | ".join(cells) + " |"


def _lines(operation: Operation) -> list[str]:
    return [
        f"| `{operation.name}` | {errno_name(errno)} | `{kind.__name__}` | "
        f"{_say(hint or kind.default_hint)} |"
        for errno, (kind, hint) in operation.refusals.items()
        if hint or kind not in _COMMON
    ]


def _say(hint: str) -> str:
    return hint.replace("Linux {release}", "this kernel").replace("{release}", "another")


if __name__ == "__main__":
    main()
