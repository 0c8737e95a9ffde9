"""What the image of a kernel says of the kernel in it, and what the running kernel hands over."""

from __future__ import annotations

import os
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyluo.build_config import BuildConfig
from pyluo.kexec.compression import Compression, UndecodableError, decompress
from pyluo.kexec.image import read_pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pyluo.kexec.image import OpenImage

__all__ = ["Contents", "read_contents", "read_running_formats"]

_LONGEST = 512 << 20  # bytes of the decompressed kernel that are looked at
_OVERLAP = 512 << 10  # bytes; longer than any configuration
_CONFIG_START = b"IKCFG_ST"
_PARAMETER = b"liveupdate\0"
_FORMATS = (b"kho-v", b"luo-v")
_FORMAT = re.compile(rb"(kho|luo)-v[0-9]+\0")
# Files of the running kernel that have the names of its formats in them; of each line, the first
# one that is there. A kernel that took something over has no out/fdt (up to Linux 7.3), but in/fdt:
# it takes over only the format in which it hands over.
_DEBUG = "/sys/kernel/debug/kho"
_HANDED_OVER = (
    (f"{_DEBUG}/out/fdt", f"{_DEBUG}/in/fdt"),
    (f"{_DEBUG}/out/sub_fdts/LUO",),
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What the image of a kernel says of the kernel in it.

    Attributes:
        config: the configuration of the kernel; None if it is not in the image.
        knows_live_update: whether the kernel has the parameter ``liveupdate``; None if the image
            cannot be read.
        formats: the names of the formats in which the kernel takes over data, such as ``kho-v4``
            and ``luo-v5``.
        obstacle: why the image cannot be read; empty if it can.
    """

    config: BuildConfig | None = None
    knows_live_update: bool | None = None
    formats: frozenset[str] = frozenset()
    obstacle: str = ""


def read_contents(image: OpenImage) -> Contents:
    """Return what an image says of the kernel in it.

    The image is decompressed, a piece at a time, and searched for what ``CONFIG_IKCONFIG`` puts
    into it, and for texts that a kernel with live update has.

    Source: kernel/configs.c; include/linux/kho/abi/kexec_handover.h, KHO_FDT_COMPATIBLE;
    include/linux/kho/abi/luo.h, LUO_ABI_COMPATIBLE
    """
    header = image.header
    pieces: Iterable[bytes]
    if header is None and not image.is_plain:
        return Contents(obstacle="pyluo does not know such images")
    if header is None:
        pieces = read_pieces(image.kernel, 0, _LONGEST)
    else:
        magic = os.pread(image.kernel, 8, header.payload_offset)
        compression = Compression.recognize(magic)
        if compression is None:
            return Contents(obstacle="its compression is not known")
        packed = read_pieces(image.kernel, header.payload_offset, header.payload_size)
        pieces = decompress(compression, packed)
    try:
        return _search(pieces)
    except UndecodableError as error:
        return Contents(obstacle=str(error))


def read_running_formats() -> frozenset[str]:
    """Return the names of the formats in which the running kernel hands over data.

    Only root can read them, and only with ``CONFIG_KEXEC_HANDOVER_DEBUGFS``; what cannot be read is
    left out.
    """
    found: set[str] = set()
    for paths in _HANDED_OVER:
        path = next(filter(os.path.exists, paths), paths[0])
        with suppress(OSError), open(path, "rb") as file:
            found.update(_find_formats(file.read()))
    return frozenset(found)


def _search(pieces: Iterable[bytes]) -> Contents:
    config = None
    knows_live_update = False
    formats: set[str] = set()
    for window in _windows(pieces):
        if config is None:
            config = _find_config(window)
        knows_live_update = knows_live_update or _PARAMETER in window
        formats.update(_find_formats(window))
    return Contents(config, knows_live_update, frozenset(formats))


def _windows(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the pieces, each with the end of what came before it."""
    window = b""
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > _LONGEST:
            raise UndecodableError(f"decompressed, it is longer than {_LONGEST >> 20} MiB")
        window = window[-_OVERLAP:] + piece
        yield window


def _find_config(window: bytes) -> BuildConfig | None:
    at = window.find(_CONFIG_START)
    while at >= 0:
        decoder = zlib.decompressobj(wbits=31)
        with suppress(zlib.error):
            text = decoder.decompress(window[at + len(_CONFIG_START) :], _LONGEST >> 4)
            if decoder.eof:
                return BuildConfig(text.decode(errors="surrogateescape"))
        at = window.find(_CONFIG_START, at + 1)
    return None


def _find_formats(data: bytes) -> Iterator[str]:
    for start in _FORMATS:
        at = data.find(start)  # much faster than a search with an expression
        while at >= 0:
            if match := _FORMAT.match(data, at):
                yield match[0].rstrip(b"\0").decode()
            at = data.find(start, at + 1)
