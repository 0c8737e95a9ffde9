"""Images that are wrapped, or changed, on the host."""

from __future__ import annotations

import gzip
import struct
import subprocess
from typing import TYPE_CHECKING

from pyluo.kexec.bzimage import BzImageHeader
from pyluo.kexec.compression import Compression, decompress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["WRAPPERS", "change_payload", "make_uki", "sign"]

_LZ4_BLOCK = 8 << 20


def make_uki(linux: bytes, *sections: tuple[str, bytes]) -> bytes:
    """Return a unified kernel image: a PE file with these sections, the kernel and its name."""
    contents = [*sections, (".osrel", b"ID=test\n"), (".linux", linux)]
    table, body = b"", b""
    start = 64 + 24 + len(contents) * 40
    for name, content in contents:
        padded = content + bytes(-len(content) % 512)
        table += struct.pack("<8sIIII16x", name.encode(), len(content), 0, len(padded), start)
        body += padded
        start += len(padded)
    head = struct.pack("<2s58xI4sHH12xHH", b"MZ", 64, b"PE\0\0", 0x8664, len(contents), 0, 0)
    return head + table + body


def _make_zboot(payload: bytes, compression: bytes) -> bytes:
    return struct.pack("<4s4sII8x40s", b"MZ", b"zimg", 64, len(payload), compression) + payload


def _run(*command: str) -> Callable[[bytes], bytes]:
    return lambda kernel: (
        subprocess.run(command, input=kernel, capture_output=True, check=True).stdout
    )


def _gzip(kernel: bytes) -> bytes:
    return gzip.compress(kernel, 1)


_zstd = _run("zstd", "-1", "-c")

WRAPPERS: dict[str, Callable[[bytes], bytes]] = {
    "a gzip file": _gzip,
    "a xz file": _run("xz", "-0", "-c", "--check=crc32"),
    "a lz4 file": _run("lz4", "-l", "-c"),
    "a zstd file": _zstd,
    "an EFI zboot image with gzip": lambda kernel: _make_zboot(_gzip(kernel), b"gzip"),
    "an EFI zboot image with zstd22": lambda kernel: _make_zboot(_zstd(kernel), b"zstd22"),
    "a unified kernel image": make_uki,
}


def change_payload(source: Path, target: Path, changes: dict[bytes, bytes]) -> None:
    """Write a bzImage whose kernel has texts replaced; it is only to be looked at."""
    image = source.read_bytes()
    with source.open("rb") as file:
        header = BzImageHeader.read(file.fileno())
    assert header is not None
    at, size = header.payload_offset, header.payload_size
    payload = image[at : at + size]
    compression = Compression.recognize(payload)
    assert compression is not None
    kernel = b"".join(decompress(compression, [payload]))
    for old, new in changes.items():
        assert old in kernel
        kernel = kernel.replace(old, new)
    packed = _store_as_lz4(kernel)
    changed = bytearray(image[:at] + packed + image[at + size :])
    struct.pack_into("<I", changed, 0x24C, len(packed))
    target.write_bytes(changed)


def _store_as_lz4(data: bytes) -> bytes:
    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), _LZ4_BLOCK):
        block = data[at : at + _LZ4_BLOCK]
        rest = len(block) - 15
        coded = b"\xf0" + b"\xff" * (rest // 255) + bytes([rest % 255]) + block
        packed += len(coded).to_bytes(4, "little") + coded
    return packed


def sign(image: Path, key: Path, signed: Path) -> Path:
    """Sign an image with a private key; its certificate is in the same file."""
    command = ["sbsign", "--key", str(key), "--cert", str(key), "--output", str(signed), str(image)]
    subprocess.run(command, capture_output=True, check=True)
    return signed
