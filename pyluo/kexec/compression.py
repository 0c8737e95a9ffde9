"""Decompressing what kernels are compressed with, a piece at a time.

zstd and LZ4 are decoded by the system's libzstd and liblz4, which are loaded when they are first
needed; Python's own library has the other formats.
"""

from __future__ import annotations

import bz2
import ctypes
import enum
import functools
import lzma
import zlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["MAGIC_SIZE", "PIECE", "Compression", "UndecodableError", "decompress"]

MAGIC_SIZE = 6  # bytes that `Compression.recognize` needs
PIECE = 1 << 20  # about how many bytes are read and returned at a time

_MEMORY_LIMIT = 256 << 20  # bytes; the kernel's own XZ images need 65 MiB at most
_LZ4_BLOCK = 8 << 20  # bytes that each block of an LZ4 image but the last one decompresses to
_LZ4_LONGEST = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16  # LZ4_COMPRESSBOUND()


class UndecodableError(Exception):
    """The data cannot be decompressed: it is damaged, or there is no decoder for it."""


class Compression(enum.Enum):
    """A compression format that the kernel's build knows; the value is its magic number.

    Source: scripts/Makefile.lib; lib/decompress.c
    """

    GZIP = b"\x1f\x8b"
    BZIP2 = b"BZh"
    LZMA = b"\x5d\x00\x00"
    XZ = b"\xfd7zXZ\x00"
    LZO = b"\x89LZO\x00"
    LZ4 = b"\x02\x21\x4c\x18"
    ZSTD = b"\x28\xb5\x2f\xfd"

    @classmethod
    def recognize(cls, head: bytes) -> Compression | None:
        """Return the format of data that begins with `head`; None if it is none of these."""
        return next((each for each in cls if head.startswith(each.value)), None)


def decompress(compression: Compression, source: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the decompressed data, in pieces of at most 8 MiB.

    Data that follows is ignored, unless it is another compressed stream.

    Args:
        compression: the format of the data.
        source: the compressed data, in pieces.

    Raises:
        UndecodableError: the data is damaged, or this system has no decoder for it.
    """
    if compression is Compression.LZ4:
        return _decompress_lz4(source)
    return _decompress(compression, source)


class _Decoder(Protocol):
    """A decoder, as the modules bz2 and lzma have it."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def _decompress(compression: Compression, source: Iterable[bytes]) -> Iterator[bytes]:
    magic = compression.value
    decoder = _make_decoder(compression)
    behind = b""  # what was read behind the end of a stream, if that is too short to tell
    for piece in source:
        data = behind + piece
        behind = b""
        while True:
            if decoder.eof:
                if len(data) < len(magic):
                    behind = data
                    break
                if not data.startswith(magic):
                    return
                decoder = _make_decoder(compression)
            try:
                output = decoder.decompress(data, PIECE)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise UndecodableError(f"the data is damaged ({error})") from None
            if output:
                yield output
            if decoder.eof:
                data = decoder.unused_data
            elif decoder.needs_input:
                break
            else:
                data = b""
    if not decoder.eof:
        raise UndecodableError("the data ends too early")


def _make_decoder(compression: Compression) -> _Decoder:
    match compression:
        case Compression.GZIP:
            return _GzipDecoder()
        case Compression.BZIP2:
            return bz2.BZ2Decompressor()
        case Compression.LZMA:
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MEMORY_LIMIT)
        case Compression.XZ:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY_LIMIT)
        case Compression.ZSTD:
            return _ZstdDecoder()
    raise UndecodableError(f"pyluo has no decoder for {compression.name}")


class _GzipDecoder:
    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("position", ctypes.c_size_t),
    )


class _ZstdDecoder:
    def __init__(self) -> None:
        self._library = _load_library("libzstd.so.1", "libzstd1")
        self._library.ZSTD_createDStream.restype = ctypes.c_void_p
        self._library.ZSTD_decompressStream.restype = ctypes.c_size_t
        self._library.ZSTD_getErrorName.restype = ctypes.c_char_p
        self._stream = ctypes.c_void_p(self._library.ZSTD_createDStream())
        if not self._stream:
            raise MemoryError
        self._data = b""
        self._output = ctypes.create_string_buffer(PIECE)
        self.eof = False
        self.needs_input = True
        self.unused_data = b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._data += data
        memory = ctypes.create_string_buffer(self._data, max(len(self._data), 1))
        given = _Buffer(ctypes.addressof(memory), len(self._data), 0)
        room = min(max_length, PIECE)
        taken = _Buffer(ctypes.addressof(self._output), room, 0)
        result = self._library.ZSTD_decompressStream(
            self._stream, ctypes.byref(taken), ctypes.byref(given)
        )
        if self._library.ZSTD_isError(ctypes.c_size_t(result)):
            name = self._library.ZSTD_getErrorName(ctypes.c_size_t(result)).decode()
            raise UndecodableError(f"the data is damaged ({name})")
        self._data = self._data[given.position :]
        self.eof = result == 0
        if self.eof:
            self.unused_data = self._data
        # The decoder may hold more output only if this call filled the room.
        self.needs_input = not self._data and taken.position < room
        return ctypes.string_at(self._output, taken.position)

    def __del__(self) -> None:
        if stream := getattr(self, "_stream", None):
            self._library.ZSTD_freeDStream(stream)


def _decompress_lz4(source: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the content of the blocks of an LZ4 image, each of which has its length before it.

    The format has no end. In a bzImage, the length of the decompressed kernel is behind it.

    Source: lib/decompress_unlz4.c, unlz4()
    """
    library = _load_library("liblz4.so.1", "liblz4-1")
    output = ctypes.create_string_buffer(_LZ4_BLOCK)
    magic = Compression.LZ4.value
    waiting = b""
    for piece in source:
        waiting += piece
        while len(waiting) > 4:
            if waiting.startswith(magic):
                waiting = waiting[4:]
                continue
            length = int.from_bytes(waiting[:4], "little")
            if length > _LZ4_LONGEST:
                raise UndecodableError("the data is damaged (a block is too long)")
            if len(waiting) < 4 + length:
                break
            block, waiting = waiting[4 : 4 + length], waiting[4 + length :]
            size = library.LZ4_decompress_safe(block, output, length, _LZ4_BLOCK)
            if size < 0:
                raise UndecodableError("the data is damaged (a block cannot be decoded)")
            yield ctypes.string_at(output, size)
    if len(waiting) > 4:
        raise UndecodableError("the data ends too early")


@functools.cache
def _load_library(name: str, package: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise UndecodableError(f"this system has no {name}: apt install {package}") from None
