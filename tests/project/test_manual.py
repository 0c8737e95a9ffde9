"""The snippets, command lines and links of the manual and of the other pages."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest

from pyluo.cli import make_parser
from tests.snippets import COMMANDS, FENCE, NOT_RUN, PAGES, ROOT, SNIPPETS, blocks, command_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# What stands for something else in a command line.
STANDS_FOR = {"NAME": "vm0", "SUITE": "iommu", "DIR": "/tmp", "FILE": "/tmp/file", "N": "3"}


def pyluo_lines(page: Path) -> Iterator[str]:
    """Yield the command lines of pyluo on a page, those in blocks of a shell among them."""
    for line in [*command_lines(page), *"\n".join(blocks(page, "sh")).splitlines()]:
        if found := re.search(r"(?:^|[\s/])(pyluo [a-z].*)$", line):
            yield found[1]


def test_there_are_pages_and_command_lines() -> None:
    assert len(PAGES) > 50
    assert sum(len(list(pyluo_lines(page))) for page in PAGES) > 25


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_snippets_import_is_there(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("pyluo"):
                continue
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{module.__name__}.{alias.name}")


def test_each_snippet_is_run_by_a_test_or_there_is_a_reason() -> None:
    shown = {}
    for page, name in zip(PAGES, NAMES, strict=True):
        languages = [each for each, _ in FENCE.findall(page.read_text()) if each[:1] != "{"]
        if languages:
            shown[name] = len(languages)
    check_fates(SNIPPETS, shown)


def test_each_command_line_is_run_by_a_test_or_there_is_a_reason() -> None:
    shown = {
        name: len(lines)
        for page, name in zip(PAGES, NAMES, strict=True)
        if (lines := command_lines(page))
    }
    check_fates(COMMANDS, shown)


def check_fates(listed: Mapping[str, Sequence[str]], shown: Mapping[str, int]) -> None:
    """Check that each of what the pages show is listed, with a test that names its page."""
    assert {name: len(fates) for name, fates in listed.items()} == shown
    for name, fates in listed.items():
        for fate in fates:
            if not fate.startswith(NOT_RUN):
                test = (ROOT / fate).read_text()
                assert name in test, (name, fate)
                assert "from tests.snippets import" in test, fate


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_make_has_the_targets_and_pyluo_the_extras_and_the_tests(page: Path) -> None:
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([a-z][a-z-]*)|`make ([a-z][a-z-]*)`", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra in re.findall(r"'(?:pyluo|\.)\[(\w+)\]'", text):
        assert extra in extras
    for line in re.findall(r"^    .*pytest .*", text, re.MULTILINE):
        for path in re.findall(r"(?:vm-)?tests/\w+/\w+\.py", line):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_parser_takes_each_command_line(page: Path) -> None:
    for line in pyluo_lines(page):
        words = shlex.split(re.split(r" (?:&&|\|\|?|<<?|>>?|;) ?|; |<<", line)[0], comments=True)
        words = [STANDS_FOR.get(word.strip(".…"), word) for word in words[1:]]
        make_parser(words).parse_args(words)  # which shows what is wrong, and exits


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, heading = target.partition("#")
        if ":" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
            assert heading in slugs, target


@pytest.mark.parametrize("program", ["make_reference.py", "make_performance.py"])
def test_the_pages_that_are_made_are_up_to_date(program: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / program), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
