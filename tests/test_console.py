from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from pyluo.vm import Death
from pyluo.vm.console import Console


@dataclass
class Heard:
    beginnings: int = 0
    deaths: list[tuple[Death, str]] = field(default_factory=list)


def listen(*chunks: bytes) -> tuple[Heard, Console]:
    """What a console makes of chunks that come one after the other, and then end."""

    async def feed() -> tuple[Heard, Console]:
        heard = Heard()

        def began(_: float) -> None:
            heard.beginnings += 1

        def died(death: Death, reason: str) -> None:
            heard.deaths.append((death, reason))

        console = Console(began, died)
        stream = asyncio.StreamReader()
        for chunk in chunks:
            stream.feed_data(chunk)
        stream.feed_eof()
        await console.read(stream)
        return heard, console

    return asyncio.run(feed())


@pytest.mark.parametrize(
    ("line", "death", "reason"),
    [
        ("Kernel panic - not syncing: Fatal exception", Death.PANIC, "Fatal exception"),
        ("Oops: general protection fault: 0000 [#1]", Death.OOPS, "Oops: general protection fault"),
        ("kernel BUG at mm/slub.c:1!", Death.OOPS, "kernel BUG at mm"),
        ("BUG: kernel NULL pointer dereference, address: 0", Death.OOPS, "BUG: kernel NULL"),
    ],
)
def test_a_deadly_line_is_told_as_what_it_is(line: str, death: Death, reason: str) -> None:
    heard, _ = listen(f"[    1.0] {line}\r\n".encode())
    ((told, words),) = heard.deaths
    assert told is death
    assert words.startswith(reason)


@pytest.mark.parametrize(
    "line",
    [
        "DEBUG: all is well",
        "[ 1.0] watchdog: BUG: soft lockup",
        "[    1.0] Kernel command line: panic=0 oops=panic",
        "a test says: Kernel panic - not syncing: no",
    ],
)
def test_a_harmless_line_is_no_death(line: str) -> None:
    heard, _ = listen(line.encode() + b"\n")
    assert heard.deaths == []


def test_a_lockup_is_an_omen_and_no_death() -> None:
    heard, console = listen(b"[ 9.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!\n")
    assert heard.deaths == []
    assert console.omen.startswith("BUG: soft lockup")


def test_a_character_cut_in_two_is_one_character() -> None:
    assert "ü" in listen(b"\xc3", b"\xbc\n")[1].text


def test_a_line_cut_in_two_is_one_line() -> None:
    heard, console = listen(b"[0.0] Linux ver", b"sion 7.3.4 (x)\n", b"unfinished")
    assert heard.beginnings == 1
    assert console.tail() == ("[0.0] Linux version 7.3.4 (x)", "unfinished")


def test_control_characters_do_not_reach_the_reader() -> None:
    _, console = listen(b"\x1b[2J\x1bc\x07plain\r\n\x1b[31m\xc2\x9bred")
    assert "plain" in console.text
    assert console.tail()[-1] == "red"
    assert "\x1b[" not in console.text
    assert "\x07" not in console.text
