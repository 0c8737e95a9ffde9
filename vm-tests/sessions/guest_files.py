"""The guest's part of the tests of memfds. Imports only pyluo and the standard library."""

from __future__ import annotations

import os

from pyluo import LiveUpdate, Memfd, OutgoingSession, Seal, TokenNotFoundError

PAGE = 4096


def preserve(
    name: str, size: int, *, token: int = 1, seals: Seal | None = None, position: int = 0
) -> tuple[OutgoingSession, Memfd]:
    ram = Memfd.create("ram", size)
    ram.write(pattern(size), 0)
    if seals:
        ram.seal(seals)
    os.lseek(ram.fileno(), position, os.SEEK_SET)
    with LiveUpdate() as device:
        session = device.create_session(name)
    session.preserve(ram, token)
    return session, ram


def pattern(size: int, seed: int = 0) -> bytes:
    """Return contents in which no page is like another, or like one of another seed."""
    pages = range(seed << 32, (seed << 32) + -(-size // PAGE))
    return b"".join(page.to_bytes(8, "little") * (PAGE // 8) for page in pages)[:size]


def inspect(name: str, *, token: int = 1) -> tuple[bool, int, Seal, int]:
    """Return whether the contents are the pattern, the size, the seals and the position."""
    with LiveUpdate() as device:
        session = device.retrieve_session(name)
    with session.retrieve(token, Memfd) as ram:
        session.finish()
        position = os.lseek(ram.fileno(), 0, os.SEEK_CUR)
        return ram.read(ram.size, 0) == pattern(ram.size), ram.size, ram.seals, position


def preserve_again(name: str, *, token: int = 1) -> tuple[OutgoingSession, Memfd]:
    """Retrieve a file, finish its session, and preserve it again for the next update."""
    with LiveUpdate() as device:
        incoming = device.retrieve_session(name)
        ram = incoming.retrieve(token, Memfd)
        incoming.finish()
        outgoing = device.create_session(name)
    outgoing.preserve(ram, token)
    return outgoing, ram


def create_files() -> list[str]:
    paths = ["/run/left", "/dev/shm/left", "/tmp/left"]
    for path in paths:
        with open(path, "w") as file:
            file.write("here before the jump")
    return paths


def filter_existing(paths: list[str]) -> list[str]:
    return [path for path in paths if os.path.exists(path)]


def token_is_known(name: str, token: int) -> bool:
    with LiveUpdate() as device:
        session = device.retrieve_session(name)
    try:
        session.retrieve(token).close()
    except TokenNotFoundError:
        return False
    finally:
        session.finish()
    return True


def preserve_swapped(name: str, size: int) -> tuple[OutgoingSession, Memfd, int]:
    """Page a file out and preserve it; return also how many bytes were in swap then."""
    page_out = 21  # MADV_PAGEOUT, which Python's mmap does not name
    ram = Memfd.create("ram", size)
    ram.write(pattern(size), 0)
    before = read_swap_in_use()
    with ram.map() as mapping:
        sum(mapping[::PAGE])  # map all pages, because only mapped pages are paged out
        mapping.madvise(page_out)
    out = read_swap_in_use() - before
    with LiveUpdate() as device:
        session = device.create_session(name)
    session.preserve(ram, 1)
    return session, ram, out


def get_swapped_size(held: tuple[OutgoingSession, Memfd, int]) -> int:
    return held[2]


def read_swap_in_use() -> int:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return (int(fields["SwapTotal"].split()[0]) - int(fields["SwapFree"].split()[0])) << 10
