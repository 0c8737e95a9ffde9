"""The escape key: after it, a user of a guest's terminal types a command to the host."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HELP", "Command", "Keys"]

_ESCAPE = 0x1D  # Ctrl-], as in telnet and virsh console

HELP = """\
Ctrl-] u       live-update the guest
Ctrl-] q       end the guest
Ctrl-] Ctrl-]  send Ctrl-] to the guest
Ctrl-] ?       this text"""


class Command(enum.Enum):
    """A command to the host; its value is the key to type after the escape key."""

    LIVE_UPDATE = "u"
    QUIT = "q"
    HELP = "?"


class Keys:
    """Separates keys for the guest from commands to the host."""

    def __init__(self) -> None:
        self._escaped = False

    def split(self, typed: bytes) -> Iterator[bytes | Command]:
        """Yield the bytes for the guest and the commands to the host, in their order.

        If the input of the last call ended with the escape key, the first key of this input is a
        command. A key that is no command counts as HELP.

        Args:
            typed: the keys that the user has typed.
        """
        start = 0
        for at, key in enumerate(typed):
            if self._escaped:
                self._escaped = False
                # The escape key, typed twice, is sent to the guest once.
                start = at if key == _ESCAPE else at + 1
                if key != _ESCAPE:
                    yield _COMMANDS.get(key, Command.HELP)
            elif key == _ESCAPE:
                if start < at:
                    yield typed[start:at]
                start, self._escaped = at + 1, True
        if start < len(typed):
            yield typed[start:]


_COMMANDS = {ord(command.value): command for command in Command}
