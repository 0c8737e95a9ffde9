"""Images of kernels that are small, but have what pyluo looks at in the right places."""

from __future__ import annotations

import gzip
import struct

__all__ = ["BANNER", "bzimage", "kernel", "pe", "uki", "zboot", "zstd_of_zeros", "zstd_stored"]

RELEASE = "7.3.4-test"
BANNER = f"Linux version {RELEASE} (a@b) (gcc) #1 SMP\n".encode()


def kernel(
    config: str | None = "CONFIG_KEXEC_HANDOVER=y\nCONFIG_LIVEUPDATE=y\n", texts: bytes = b""
) -> bytes:
    """Return an uncompressed kernel, with its configuration if it is to have one."""
    data = b"\x7fELF" + bytes(5000) + BANNER + texts
    if config is not None:
        data += b"IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED"
    return data + bytes(5000)


def bzimage(
    payload: bytes,
    *,
    protocol: int = 0x20F,
    loadflags: int = 1,
    xloadflags: int = 0x3F,
    longest_line: int = 2047,
) -> bytes:
    """Return a bzImage around a compressed kernel."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<H", setup, 0x20E, 0x80)
    setup[0x211] = loadflags
    struct.pack_into("<H", setup, 0x236, xloadflags)
    struct.pack_into("<I", setup, 0x238, longest_line)
    struct.pack_into("<II", setup, 0x248, 16, len(payload))
    text = f"{RELEASE} (a@b) #1 SMP".encode() + b"\0"
    setup[0x280 : 0x280 + len(text)] = text
    return bytes(setup) + bytes(16) + payload


def pe(sections: list[tuple[str, bytes]]) -> bytes:
    """Return a PE file with these sections."""
    table, body = b"", b""
    start = 64 + 24 + len(sections) * 40
    for name, content in sections:
        padded = content + bytes(-len(content) % 16)
        header = struct.pack("<8sIIII", name.encode(), len(content), 0, len(padded), start)
        table += header + bytes(16)
        body += padded
        start += len(padded)
    dos = struct.pack("<2s58xI", b"MZ", 64)
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, len(sections), 0, 0, 0, 0, 0)
    return dos + coff + table + body


def uki(linux: bytes, *more: tuple[str, bytes]) -> bytes:
    """Return a unified kernel image."""
    return pe([(".osrel", b"ID=debian\n"), *more, (".linux", linux)])


def zboot(payload: bytes, compression: str) -> bytes:
    """Return an EFI zboot image."""
    header = struct.pack("<2s2x4sII8x32s", b"MZ", b"zimg", 64, len(payload), compression.encode())
    return header.ljust(64, b"\0") + payload


def zstd_stored(data: bytes) -> bytes:
    """Return a zstd frame with the data as it is.

    Source: RFC 8878
    """
    blocks = [data[at : at + 100_000] for at in range(0, len(data), 100_000)] or [b""]
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\x58"  # the size is not known; a window of 2 MiB
    for number, block in enumerate(blocks):
        is_last = number == len(blocks) - 1
        frame += (len(block) << 3 | is_last).to_bytes(3, "little") + block
    return frame


def zstd_of_zeros(count: int) -> bytes:
    """Return a zstd frame of some 4 bytes for each 128 KiB of zeros."""
    size = 128 << 10
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\x58"
    blocks = count // size
    for number in range(blocks):
        is_last = number == blocks - 1
        frame += (size << 3 | 1 << 1 | is_last).to_bytes(3, "little") + b"\0"
    return frame
