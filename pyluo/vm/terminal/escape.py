"""The escape key, by which a user in a guest's terminal gives commands to the host."""

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
    """A command to the host; its value is the key after the escape key."""

    LIVE_UPDATE = "u"
    QUIT = "q"
    HELP = "?"


class Keys:
    """Separates the keys for the guest from the commands to the host."""

    def __init__(self) -> None:
        self._escaped = False

    def split(self, typed: bytes) -> Iterator[bytes | Command]:
        """Yield the bytes for the guest and the commands, in their order.

        If the last call ended with the escape key, the command follows in this one. A key that is
        no command counts as HELP.
        """
        start = 0
        for at, key in enumerate(typed):
            if self._escaped:
                self._escaped = False
                # An escape key after an escape key is a byte for the guest.
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
