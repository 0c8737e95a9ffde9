"""The key that speaks to the host from a terminal in a guest, and what may follow it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HELP", "Command", "Keys"]

_ESCAPE = 0x1D  # Ctrl-], as of telnet and of virsh console

HELP = """\
Ctrl-] u       live-update the guest
Ctrl-] q       end the guest
Ctrl-] Ctrl-]  send Ctrl-] to the guest
Ctrl-] ?       this text"""


class Command(enum.Enum):
    """What the host is to do, by the key after the escape key."""

    LIVE_UPDATE = "u"
    QUIT = "q"
    HELP = "?"


class Keys:
    """Tells what is typed for the guest from what is typed for the host."""

    def __init__(self) -> None:
        self._escaped = False

    def split(self, typed: bytes) -> Iterator[bytes | Command]:
        """What is for the guest, and commands, in their order; an escape key may have come before.

        A key that is no command asks for help.
        """
        begun = 0
        for at, key in enumerate(typed):
            if self._escaped:
                self._escaped = False
                # The escape key itself, a second time, is the first byte of what is for the guest.
                begun = at if key == _ESCAPE else at + 1
                if key != _ESCAPE:
                    yield _COMMANDS.get(key, Command.HELP)
            elif key == _ESCAPE:
                if begun < at:
                    yield typed[begun:at]
                begun, self._escaped = at + 1, True
        if begun < len(typed):
            yield typed[begun:]


_COMMANDS = {ord(command.value): command for command in Command}
