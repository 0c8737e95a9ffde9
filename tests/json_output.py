"""Read what the commands print with --json, and compare it with their schemas.

The tests with guests use this as well. Some of them are imported in guests, where an import takes
long, so that jsonschema is imported only by what needs it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

__all__ = ["check_json", "load", "read_json", "read_json_lines"]

_FOLDER = Path(__file__).parents[1] / "docs" / "reference" / "json"


def load() -> dict[str, Any]:
    """Return all schemas, by their paths in the folder of schemas."""
    return {
        path.relative_to(_FOLDER).as_posix(): json.loads(path.read_text())
        for path in _FOLDER.rglob("*.schema.json")
    }


def read_json(command: str, text: str | bytes) -> Any:
    """Return what a command has printed with --json, if it is as its schema says.

    A member that the schema does not name is an error as well.

    Args:
        command: the words of the command: "vm matrix".
        text: all that the command printed.
    """
    data = json.loads(text)
    check_json(command, data)
    return data


def check_json(command: str, data: Any) -> None:
    """Compare what a command has printed with its schema, as `read_json` does."""
    _validator(command).validate(data)


def read_json_lines(command: str, text: str) -> list[Any]:
    """Return what a command has printed that prints a line of JSON for each thing that happens."""
    return [read_json(command, line) for line in text.splitlines()]


@functools.cache
def _validator(command: str) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    registry: Any = Registry().with_resources(
        (path, Resource.from_contents(_strict(schema))) for path, schema in load().items()
    )
    schema = {"$ref": f"{command.replace(' ', '-')}.schema.json"}
    return Draft202012Validator(schema, registry=registry)


def _strict(schema: Any) -> Any:
    """Return a schema that allows no member which it does not name."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(each) for name, each in schema.items()}
    return strict | {"additionalProperties": False} if "required" in schema else strict
