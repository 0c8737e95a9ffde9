"""Write the page of the manual about the exceptions, errors.md, from the code.

With --check, say whether the page is up to date, by the exit status.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import pyluo
from pyluo import errors
from pyluo.errors import RequestError, errno_name
from pyluo.operation import Operation, declared

_COMMON = errors.KernelTooOldError, errors.IommuUnsupportedError, errors.FeatureNotSupportedError
_MOST = 6  # requests to name in a row

PAGE = Path(__file__).parent / "errors.md"
HEAD = """\
# The exceptions

This page is made from the code: see `docs/make_errors.py`.

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    text = make_page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(f"{PAGE} is out of date: run python docs/{Path(__file__).name}")


def make_page() -> str:
    """Return the text of the page."""
    for name in pyluo.__all__:
        getattr(pyluo, name)  # imports the modules, whose requests are declared then
    classes = [getattr(errors, name) for name in errors.__all__]
    requests = [each for each in declared() if each.refusals or each.kind is not RequestError]
    rows = [_row(kind, requests) for kind in sorted(classes, key=_rank)]
    lines = [line for operation in requests for line in _lines(operation)]
    return HEAD + "\n".join(rows) + "\n" + MIDDLE + "\n".join(dict.fromkeys(lines)) + "\n"


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
