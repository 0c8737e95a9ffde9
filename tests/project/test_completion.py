"""Completions for shells, and the manual page: both are made from the commands' own parser."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyluo.cli import _COMMANDS

COMMANDS = [name for names in _COMMANDS.values() for name in names]


def script(shell: str) -> str:
    command = [sys.executable, "-m", "pyluo", "completion", shell]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def complete(script: str, *words: str) -> set[str]:
    """Return what bash offers for the last word."""
    asked = f"""
        {script}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
        "$(complete -p pyluo | sed 's/.*-F //; s/ .*//')"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asked], check=True, capture_output=True, text=True)
    return {word.strip() for word in done.stdout.splitlines()}


def test_bash_completes_commands_options_and_choices() -> None:
    text = script("bash")
    assert complete(text, "pyluo", "") >= set(COMMANDS)
    assert complete(text, "pyluo", "vm", "li") == {"live-update"}
    assert "--reuse-cmdline" in complete(text, "pyluo", "kexec", "load", "--")
    assert complete(text, "pyluo", "doctor", "") >= {"live-update", "harness", "all"}


@pytest.mark.parametrize("shell", ["fish", "zsh"])
def test_other_shells_get_all_commands(shell: str) -> None:
    text = script(shell)
    for command in COMMANDS:
        assert command in text
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=text, text=True, check=True)


def test_the_manual_page_has_all_commands_and_is_well_formed(tmp_path: Path) -> None:
    page = tmp_path / "pyluo.1"
    subprocess.run(
        [
            *(Path(sys.executable).with_name("argparse-manpage"), "--module", "pyluo.cli"),
            *("--function", "make_parser", "--prog", "pyluo", "--output", page),
        ],
        check=True,
    )
    text = page.read_text()
    for command in COMMANDS:
        assert command.replace("-", r"\-") in text or command in text
    if groff := shutil.which("groff"):
        done = subprocess.run(
            [groff, "-man", "-ww", "-Tutf8", page], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
