"""Kconfig fragments: merged into a configuration, and checked against what became of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels.catalogue import fragments_folder

__all__ = ["Fragment", "Setting", "unmet"]

_SET = re.compile(r"(CONFIG_\w+)=(.+)")
_UNSET = re.compile(r"# (CONFIG_\w+) is not set")


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of a fragment.

    Attributes:
        option: its name, with CONFIG_.
        value: what it is set to; n where it is to be off.
        fragment: the name of the fragment that asks for it.
    """

    option: str
    value: str
    fragment: str

    def __str__(self) -> str:
        return f"{self.option}={self.value} ({self.fragment})"


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of configuration.

    Attributes:
        name: of the file, without its ending if it is one of the harness.
        text: its content.
    """

    name: str
    text: str

    @classmethod
    def load(cls, name: str) -> Self:
        """The fragment of this name among those of the harness.

        Raises:
            HarnessError: there is none.
        """
        path = fragments_folder() / f"{name}.config"
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.config")))
            raise HarnessError(f"there is no fragment {name!r}", f"there are {known}")
        return cls(name, path.read_text())

    @classmethod
    def read(cls, item: str) -> Self:
        """One that a command line names.

        Args:
            item: the path of a file, or a line like ``CONFIG_X=y``.

        Raises:
            HarnessError: it is neither, or a line of the file sets nothing.
        """
        if _SET.fullmatch(item):
            return cls("--config", f"{item}\n")
        try:
            text = Path(item).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise HarnessError(
                f"the fragment {item} cannot be read ({error})",
                "give the path of a file, or a line like CONFIG_X=y",
            ) from None
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.startswith("#") and not _SET.fullmatch(line):
                raise HarnessError(
                    f"{item}, line {number}, sets nothing: {line}", "write CONFIG_X=y, for example"
                )
        return cls(item, text if text.endswith("\n") else f"{text}\n")

    def settings(self) -> list[Setting]:
        """Its lines that set something."""
        return [Setting(option, value, self.name) for option, value in _parse(self.text).items()]


def unmet(config: Path, fragments: tuple[Fragment, ...]) -> list[Setting]:
    """The settings that are not in a final configuration: Kconfig drops in silence what an unmet
    dependency forbids. Where fragments disagree, the last one counts."""
    wanted = {each.option: each for fragment in fragments for each in fragment.settings()}
    final = _parse(config.read_text())
    return [each for each in wanted.values() if final.get(each.option, "n") != each.value]


def _parse(text: str) -> dict[str, str]:
    settings = {}
    for line in text.splitlines():
        if match := _SET.fullmatch(line):
            settings[match[1]] = match[2]
        elif match := _UNSET.fullmatch(line):
            settings[match[1]] = "n"
    return settings
