"""Kconfig fragments, and the check that a kernel's final configuration has all their settings.

A fragment means what it means to the kernel's scripts/kconfig/merge_config.sh and to Kconfig, which
reads the merged file.

Source: scripts/kconfig/confdata.c
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pyluo.vm import progress
from pyluo.vm.errors import HarnessError
from pyluo.vm.kernels.catalogue import fragments_folder

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Fragment", "Setting", "find_unmet", "merge"]

# Kconfig looks only at the first letter of y, m and n.
_SET = re.compile(
    r"""(CONFIG_\w+)=(?:([ymn]).*|("(?:[^"\\]|\\.)*")\s*(?:\#.*)?"""
    r"""|(-?[0-9]+|0[xX][0-9a-fA-F]+)\s*)"""
)
_UNSET = re.compile(r"# (CONFIG_\w+) is not set")
_IGNORED = re.compile(r"(?:\s*#.*|\s*)")
_BARE = re.compile(r"CONFIG_\w+\s*")  # in some of the kernel's own fragments; Kconfig ignores it


@dataclass(frozen=True, slots=True)
class Setting:
    """The setting of one option in a fragment.

    Attributes:
        option: the name of the option, with CONFIG_.
        value: the value of the option; n if the fragment turns it off.
        fragment: the name of the fragment.
    """

    option: str
    value: str
    fragment: str

    @property
    def line(self) -> str:
        """The setting as a line of a .config file."""
        off = self.value == "n"
        return f"# {self.option} is not set" if off else f"{self.option}={self.value}"

    def __str__(self) -> str:
        return f"{self.option}={self.value} ({self.fragment})"


@dataclass(frozen=True, slots=True)
class Fragment:
    """A Kconfig fragment: a part of a kernel's configuration.

    Attributes:
        name: the name of the fragment's file, for messages; without its suffix if the file is a
            part of pyluo.
        text: the content of the file.
    """

    name: str
    text: str

    @classmethod
    def load(cls, name: str) -> Self:
        """Return the fragment of this name that is a part of pyluo.

        Raises:
            HarnessError: there is no such fragment.
        """
        path = fragments_folder() / f"{name}.config"
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.config")))
            raise HarnessError(f"there is no fragment {name!r}", f"there are {known}")
        return cls(name, path.read_text())

    @classmethod
    def read(cls, item: str) -> Self:
        """Return the fragment that the user names.

        Args:
            item: the path of a fragment, or a line of one like ``CONFIG_X=y``.

        Raises:
            HarnessError: the file cannot be read, or a line of it sets no option.
        """
        if _SET.fullmatch(item):
            return cls("--config", f"{item}\n")
        try:
            # A comment may be in any encoding.
            text = Path(item).read_text(errors="surrogateescape")
        except OSError as error:
            raise HarnessError(
                f"the fragment {item} cannot be read ({error})",
                "give the path of a file, or a line like CONFIG_X=y",
            ) from None
        for number, line in enumerate(text.splitlines(), 1):
            if _BARE.fullmatch(line):
                progress.say(f"{item}, line {number}, gives {line.strip()} no value: ignored")
            elif not (_SET.fullmatch(line) or _IGNORED.fullmatch(line)):
                shown = line.encode(errors="surrogateescape").decode(errors="backslashreplace")
                raise HarnessError(
                    f"{item}, line {number}, sets no option: {shown}",
                    "write CONFIG_X=y, for example",
                )
        return cls(item, text)

    def settings(self) -> list[Setting]:
        """Return the settings in the fragment; m becomes y, because guests load no modules."""
        return [
            Setting(option, "y" if value == "m" else value, self.name)
            for option, value in _parse(self.text).items()
        ]

    def modules(self) -> list[str]:
        """Return the options that the fragment sets to m."""
        return [option for option, value in _parse(self.text).items() if value == "m"]


def merge(fragments: Iterable[Fragment]) -> list[Setting]:
    """Return the settings of fragments; if several of them set an option, only the last setting."""
    merged: dict[str, Setting] = {}
    for setting in (each for fragment in fragments for each in fragment.settings()):
        merged.pop(setting.option, None)  # of a choice, the last line counts
        merged[setting.option] = setting
    return list(merged.values())


def find_unmet(config: Path, fragments: tuple[Fragment, ...]) -> list[Setting]:
    """Return the settings of fragments that a final configuration does not have.

    Kconfig silently turns an option off if the option depends on another one that is off. If
    several fragments set an option, the last setting counts.

    Args:
        config: the path of the final configuration.
        fragments: the fragments, in the order in which they were merged.
    """
    final = _parse(config.read_text(errors="surrogateescape"))
    return [
        each
        for each in merge(fragments)
        if _canonical(final.get(each.option, "n")) != _canonical(each.value)
    ]


def _canonical(value: str) -> str:
    """Return a value in the form that all ways to write it have in common: 0X1F is 0x1f."""
    return hex(int(value, 16)) if value[:2].lower() == "0x" else value


def _parse(text: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    for line in text.splitlines():
        if match := _SET.fullmatch(line) or _UNSET.fullmatch(line):
            settings.pop(match[1], None)
            settings[match[1]] = next(filter(None, match.groups()[1:]), "n")
    return settings
