"""The guest's part of the tests of images: loading them while a session is open."""

from __future__ import annotations

from pathlib import Path

from pyluo import Memfd, OutgoingSession, RequestError, kexec
from pyluo.kexec.contents import read_contents
from pyluo.kexec.handover import check_image
from pyluo.kexec.image import OpenImage
from sessions import guest_files

__all__ = [
    "Refusal",
    "do_nothing",
    "forbid_executable_memfds",
    "judge",
    "load_all",
    "read_command_line",
]

Refusal = tuple[str, int | None, str]


def load_all(
    images: list[str], held: tuple[OutgoingSession, Memfd]
) -> dict[str, kexec.LoadedImage | Refusal]:
    """Load each image, and return what came of it by its path.

    The session must stay open, and an image that is loaded must stay loaded.
    """
    outcomes: dict[str, kexec.LoadedImage | Refusal] = {}
    session, ram = held
    for image in images:
        was_loaded = kexec.loaded()
        try:
            outcomes[image] = kexec.load(image, reuse_cmdline=True)
        except RequestError as error:
            outcomes[image] = (type(error).__name__, error.errno, str(error))
            assert kexec.loaded() == was_loaded
        else:
            assert kexec.loaded()
        assert not session.closed
        assert ram.read(ram.size, 0) == guest_files.pattern(ram.size)
    return outcomes


def judge(path: str) -> tuple[str, ...]:
    with OpenImage(path) as image:
        return check_image(image.subject, read_contents(image))


def do_nothing() -> None:
    pass


def forbid_executable_memfds() -> None:
    Path("/proc/sys/vm/memfd_noexec").write_text("2")


def read_command_line() -> str:
    return Path("/proc/cmdline").read_text().strip()
