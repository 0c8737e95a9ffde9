"""The guest's part of the tests of a RAM of several memfds.

Imports only pyluo and the standard library.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyluo import GuestRam, LiveUpdate, Memfd, NumaMode, NumaPolicy, OutgoingSession, RequestError
from sessions.guest_files import pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE = 2 << 20
PART = 2 * HUGE
SIZE = 2 * PART + HUGE
PARTS = 3
TRANSPARENT = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
FIRST_TOKEN = 7


@contextmanager
def setting(path: str, value: str) -> Iterator[None]:
    """Change a setting of the kernel during the block."""
    file = Path(path)
    before = file.read_text()
    chosen = re.search(r"\[(.*)\]", before)
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(chosen[1] if chosen else before)


def preserve(name: str) -> tuple[OutgoingSession, GuestRam]:
    return preserve_ram(name, GuestRam.create("ram", SIZE, part_size=PART))


def preserve_huge(name: str) -> tuple[OutgoingSession, GuestRam]:
    """Preserve a RAM of transparent huge pages."""
    ram = GuestRam.create("ram", SIZE, part_size=PART, transparent_huge_pages=True)
    with setting(TRANSPARENT, "advise"), ram.map(populate=True):
        mapped = re.findall(r"\nShmemPmdMapped: +(\d+) kB", Path("/proc/self/smaps").read_text())
        assert sum(map(int, mapped)) << 10 == SIZE, mapped
    return preserve_ram(name, ram)


def preserve_ram(name: str, ram: GuestRam) -> tuple[OutgoingSession, GuestRam]:
    ram.write(pattern(SIZE), 0)
    with LiveUpdate() as device:
        session = device.create_session(name)
    for token, memfd in enumerate(ram.memfds, FIRST_TOKEN):
        session.preserve(memfd, token)
    return session, ram


def describe(held: tuple[OutgoingSession, GuestRam]) -> dict[str, Any]:
    return held[1].as_json()


@contextmanager
def retrieved(name: str) -> Iterator[list[Memfd]]:
    with LiveUpdate() as device:
        session = device.retrieve_session(name)
    yield [session.retrieve(FIRST_TOKEN + number, Memfd) for number in range(PARTS)]
    session.finish()


def inspect(name: str, description: dict[str, Any]) -> tuple[bool, bool, dict[str, Any]]:
    """Return whether RAM and mapping have the pattern, and the description of the RAM."""
    with (
        retrieved(name) as memfds,
        GuestRam.from_memfds(memfds, description) as ram,
        ram.map() as mapping,
    ):
        expected = pattern(SIZE)
        return ram.read(SIZE, 0) == expected, mapping[:] == expected, ram.as_json()


def refuse_policies_without_numa(name: str, description: dict[str, Any]) -> str:
    """Return why a policy is refused; check that the memfds still make a RAM without it."""
    policy = NumaPolicy(NumaMode.BIND, (0,))
    refusal = ""
    with retrieved(name) as memfds:
        try:
            GuestRam.from_memfds(memfds, description | {"numa": [policy.as_json()]})
        except RequestError as error:
            refusal = str(error)
        with GuestRam.from_memfds(memfds) as ram:
            assert ram.read(SIZE, 0) == pattern(SIZE)
    return refusal


def free_huge_pages() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert fields["Hugepagesize"].split() == [str(HUGE >> 10), "kB"]
    return int(fields["HugePages_Free"]) - int(fields["HugePages_Rsvd"])


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
