"""Tests of telling the keys for a guest's terminal from those for the host."""

from __future__ import annotations

import pytest

from pyluo.vm.terminal.escape import Command, Keys


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"\x1du", [Command.LIVE_UPDATE]),
        (b"ls\x1dqpwd", [b"ls", Command.QUIT, b"pwd"]),
        (b"a\x1d\x1db", [b"a", b"\x1db"]),
        (b"\x1d\x1du", [b"\x1du"]),
        (b"\x1d\x1d\x1d?", [b"\x1d", Command.HELP]),
        (b"\x1dx.", [Command.HELP, b"."]),
        (b"\x1d", []),
    ],
)
def test_a_key_after_the_escape_key_is_for_the_host(
    typed: bytes, parts: list[bytes | Command]
) -> None:
    assert list(Keys().split(typed)) == parts


def test_keys_that_come_one_by_one_mean_the_same() -> None:
    keys = Keys()
    parts = [
        part for key in (b"a", b"\x1d", b"u", b"\x1d", b"\x1d", b"b") for part in keys.split(key)
    ]
    assert parts == [b"a", Command.LIVE_UPDATE, b"\x1d", b"b"]
