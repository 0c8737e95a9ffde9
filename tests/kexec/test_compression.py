"""Tests of decompressing what kernels are compressed with."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from pyluo.kexec.compression import Compression, UndecodableError, decompress
from tests.kexec.images import zstd_of_zeros, zstd_stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DATA = random.Random(1).randbytes(300_000) + bytes(1_500_000)


def lz4_stored(data: bytes) -> bytes:
    """Return the data as blocks of literals, in the format that the kernel's build makes."""
    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = data[at : at + (8 << 20)]
        rest = len(block) - 15
        length = b"\xff" * (rest // 255) + bytes([rest % 255])
        coded = b"\xf0" + length + block
        packed += len(coded).to_bytes(4, "little") + coded
    return packed


PACKERS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.GZIP: gzip.compress,
    Compression.BZIP2: bz2.compress,
    Compression.LZMA: lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    Compression.XZ: lzma.compress,
    Compression.LZ4: lz4_stored,
    Compression.ZSTD: zstd_stored,
}
BOMB = 24 << 20  # bytes of zeros
KINDS = pytest.mark.parametrize("kind", PACKERS, ids=lambda kind: kind.name)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


@KINDS
@pytest.mark.parametrize("size", [3, 1000, 1 << 20])
def test_what_was_compressed_comes_back(kind: Compression, size: int) -> None:
    data = DATA if size > 3 else DATA[299_000:305_000]
    packed = PACKERS[kind](data)
    assert Compression.recognize(packed) is kind
    assert b"".join(decompress(kind, pieces(packed, size))) == data


@KINDS
def test_a_second_stream_behind_the_first_is_a_part_of_the_data(kind: Compression) -> None:
    packed = PACKERS[kind](b"a" * 5000) + PACKERS[kind](b"b" * 5000)
    for size in (1, 7, 1000, len(packed)):
        assert b"".join(decompress(kind, pieces(packed, size))) == b"a" * 5000 + b"b" * 5000


@KINDS
def test_the_length_behind_the_payload_of_a_bzimage_is_no_part_of_it(kind: Compression) -> None:
    packed = PACKERS[kind](b"a" * 5000) + (5000).to_bytes(4, "little")
    for size in (1, 7, 1000, len(packed)):
        assert b"".join(decompress(kind, pieces(packed, size))) == b"a" * 5000


@KINDS
def test_data_that_is_cut_off_is_not_taken_for_whole(kind: Compression) -> None:
    packed = PACKERS[kind](DATA)
    with pytest.raises(UndecodableError, match="too early"):
        list(decompress(kind, pieces(packed[: len(packed) // 2], 1000)))


@pytest.mark.parametrize(
    "kind", [kind for kind in PACKERS if kind is not Compression.LZ4], ids=lambda kind: kind.name
)
def test_damaged_data_is_said_to_be_damaged(kind: Compression) -> None:
    packed = bytearray(PACKERS[kind](DATA))
    packed[6:600] = b"\xff" * 594
    with pytest.raises(UndecodableError, match="damaged"):
        list(decompress(kind, pieces(bytes(packed), 1000)))


def test_a_damaged_block_of_lz4_is_said_to_be_damaged() -> None:
    block = b"\x00\xff\xff\x00"  # a match before the beginning
    packed = b"\x02\x21\x4c\x18" + len(block).to_bytes(4, "little") + block + bytes(8)
    with pytest.raises(UndecodableError, match="damaged"):
        list(decompress(Compression.LZ4, [packed]))
    with pytest.raises(UndecodableError, match="too long"):
        list(decompress(Compression.LZ4, [b"\x02\x21\x4c\x18\xff\xff\xff\x7f" + bytes(8)]))


def test_a_format_without_a_decoder_is_named() -> None:
    packed = b"\x89LZO\x00\r\n\x1a\n"
    kind = Compression.recognize(packed)
    assert kind is Compression.LZO
    with pytest.raises(UndecodableError, match="LZO"):
        list(decompress(kind, [packed]))


@pytest.mark.parametrize(
    ("kind", "bomb"),
    [
        (Compression.GZIP, gzip.compress(bytes(BOMB))),
        (Compression.BZIP2, bz2.compress(bytes(BOMB))),
        (Compression.XZ, lzma.compress(bytes(BOMB), preset=0)),
        (Compression.ZSTD, zstd_of_zeros(BOMB)),
    ],
    ids=lambda value: value.name if isinstance(value, Compression) else "",
)
def test_zeros_that_were_compressed_a_thousandfold_take_no_more_memory_than_a_few_pieces(
    kind: Compression, bomb: bytes
) -> None:
    tracemalloc.start()
    try:
        total = sum(map(len, decompress(kind, [bomb])))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == BOMB
    assert peak < 8 << 20
