"""What the commands print with --json, and the schemas of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from pyluo import doctor, kexec, probe
from pyluo.cli import main, make_parser
from pyluo.cli.parsers import walk
from pyluo.vm import Root
from pyluo.vm.results.cell import Direction
from pyluo.vm.results.verdict import Outcome
from pyluo.vm.run.bisection import Mark
from tests.json_output import load, read_json

if TYPE_CHECKING:
    import enum
    from collections.abc import Iterator
    from pathlib import Path

SCHEMAS = load()
COMMANDS = {name for name in SCHEMAS if "/" not in name}


def parts_of(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and the schemas in it."""
    if isinstance(schema, dict):
        yield schema
    if isinstance(schema, dict | list):
        for each in schema.values() if isinstance(schema, dict) else schema:
            yield from parts_of(each)


def test_each_command_with_json_has_a_schema_and_each_schema_a_command() -> None:
    commands = [each.prog for each in walk(make_parser()) if "--json" in each.format_usage()]
    names = {command.removeprefix("pyluo ").replace(" ", "-") for command in commands}
    assert {f"{name}.schema.json" for name in names} == COMMANDS
    assert {SCHEMAS[name]["title"] for name in COMMANDS} == set(commands)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_says_what_each_member_means(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["description"].endswith(".")
    for part in parts_of(SCHEMAS[name]):
        members = part.get("properties", {})
        assert set(part.get("required", ())) <= set(members)
        for member in members.values():
            assert "type" in member or "$ref" in member
            assert member["description"]


def test_no_part_is_left_that_no_schema_refers_to() -> None:
    used = {
        each["$ref"].removeprefix("parts/")
        for schema in SCHEMAS.values()
        for each in parts_of(schema)
        if "$ref" in each
    }
    assert {f"parts/{name}" for name in used} == SCHEMAS.keys() - COMMANDS


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (("parts/check", "verdict"), doctor.Verdict),
        (("parts/verdict", "outcome"), Outcome),
        (("probe", "kinds", "verdict"), probe.Verdict),
        (("vm-matrix", "direction"), Direction),
        (("vm-bisect", "mark"), Mark),
    ],
)
def test_a_schema_has_the_values_that_the_code_has(
    path: tuple[str, ...], kind: type[enum.Enum]
) -> None:
    name, *members = path
    schema = SCHEMAS[f"{name}.schema.json"]
    for member in members:
        schema = schema.get("items", schema)["properties"][member]
    values = {each.name.lower() if kind is Mark else each.value for each in kind}
    assert set(schema["enum"]) == values


def test_a_member_that_no_schema_names_is_an_error() -> None:
    assert read_json("kexec loaded", '{"loaded": true}') == {"loaded": True}
    for text in ('{"loaded": true, "more": 1}', "{}", '{"loaded": 1}'):
        with pytest.raises(ValidationError):
            read_json("kexec loaded", text)


@pytest.mark.parametrize("loaded", [False, True])
def test_kexec_tells_a_program_whether_an_image_is_loaded(
    loaded: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kexec, "loaded", lambda: loaded)
    assert main(["kexec", "loaded", "--json"]) == (0 if loaded else 1)
    assert read_json("kexec loaded", capsys.readouterr().out) == {"loaded": loaded}


def test_kexec_tells_a_program_what_it_has_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = kexec.LoadedImage("7.9.9", "liveupdate=on", ("a UKI",), ("it is not known whether",))
    monkeypatch.setattr(kexec, "load", lambda *_, **__: image)
    assert main(["kexec", "load", "image", "--json"]) == 0
    printed = capsys.readouterr()
    assert read_json("kexec load", printed.out) == {
        "release": "7.9.9",
        "cmdline": "liveupdate=on",
        "wrappers": ["a UKI"],
        "unknown": ["it is not known whether"],
    }
    assert printed.err == "pyluo: it is not known whether\n"


def test_a_build_tells_a_program_where_the_kernel_is(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vm", "kernel", "build", "--json", os.fspath(tree)]) == 0
    [built] = read_json("vm kernel build", capsys.readouterr().out)
    assert (built["name"], built["release"]) == (os.fspath(tree), "7.9.9")
    assert os.path.exists(built["image"])


def test_a_build_tells_a_program_where_the_root_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Root, "build", lambda name, update: Root(name, tmp_path))
    assert main(["vm", "root", "build", "--json", "sid"]) == 0
    built = read_json("vm root build", capsys.readouterr().out)
    assert built == [{"name": "sid", "folder": os.fspath(tmp_path)}]
