"""Tests of finding out the kind of an image, and of unwrapping it."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
from typing import TYPE_CHECKING

import pytest

from pyluo import ImageRejectedError, Memfd, RequestError
from pyluo.kexec import image as module
from pyluo.kexec.image import OpenImage
from tests.kexec.images import RELEASE, bzimage, kernel, pe, uki, zboot, zstd_of_zeros, zstd_stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLAIN = bzimage(gzip.compress(kernel()))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "image"
        path.write_bytes(content)
        return path

    return write


def read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def error_of(path: Path) -> ImageRejectedError:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageRejectedError) as caught:
        OpenImage(path)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert os.fspath(path) in str(caught.value)
    return caught.value


def test_a_bzimage_is_given_to_the_kernel_as_it_is(write: Callable[[bytes], Path]) -> None:
    path = write(PLAIN)
    with OpenImage(path) as image:
        assert os.path.samestat(os.fstat(image.kernel), path.stat())
        assert (image.wrappers, image.initrd, image.command_line) == ((), -1, None)
        assert image.header is not None
        assert (image.header.release, image.header.obstacle) == (RELEASE, "")
        assert image.subject == f"image {path}"
        assert not os.get_inheritable(image.kernel)
    assert image.kernel == -1


@pytest.mark.parametrize(
    ("pack", "names"),
    [
        (gzip.compress, ("a gzip file",)),
        (bz2.compress, ("a bzip2 file",)),
        (lzma.compress, ("a xz file",)),
        (zstd_stored, ("a zstd file",)),
        (lambda data: zboot(gzip.compress(data), "gzip"), ("an EFI zboot image with gzip",)),
        (lambda data: zboot(zstd_stored(data), "zstd22"), ("an EFI zboot image with zstd22",)),
        (lambda data: zboot(lzma.compress(data), "xzkern"), ("an EFI zboot image with xzkern",)),
        (uki, ("a unified kernel image",)),
        (lambda data: gzip.compress(uki(data)), ("a gzip file", "a unified kernel image")),
        (lambda data: uki(gzip.compress(data)), ("a unified kernel image", "a gzip file")),
    ],
    ids=lambda value: " in ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrapped_bzimage_is_unwrapped(
    pack: Callable[[bytes], bytes], names: tuple[str, ...], write: Callable[[bytes], Path]
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with OpenImage(write(pack(PLAIN))) as image:
        assert image.wrappers == names
        assert read(image.kernel) == PLAIN
        assert image.header is not None
        assert names[0] in image.subject
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_what_was_unwrapped_is_open_for_reading_only(write: Callable[[bytes], Path]) -> None:
    # The kernel reads no file that somebody has open for writing.
    with (
        OpenImage(write(gzip.compress(PLAIN))) as image,
        pytest.raises(OSError, match=os.strerror(errno.EBADF)),
    ):
        os.write(image.kernel, b"x")


def test_a_uki_brings_its_ramdisk_and_its_command_line(write: Callable[[bytes], Path]) -> None:
    parts = ((".cmdline", b"root=/dev/vda ro\n\0"), (".initrd", b"ramdisk"), (".ucode", b"micro"))
    with OpenImage(write(uki(PLAIN, *parts))) as image:
        assert image.command_line == "root=/dev/vda ro"
        assert read(image.initrd) == b"microramdisk"
        assert read(image.kernel) == PLAIN


def test_of_a_uki_with_profiles_the_first_one_is_used(write: Callable[[bytes], Path]) -> None:
    parts = [
        (".cmdline", b"shared"),
        (".initrd", b"ramdisk"),
        (".profile", b"ID=main"),
        (".cmdline", b"main"),
        (".profile", b"ID=rescue"),
        (".cmdline", b"rescue"),
        (".initrd", b"other"),
    ]
    with OpenImage(write(pe([(".osrel", b""), (".linux", PLAIN), *parts]))) as image:
        assert image.command_line == "main"
        assert read(image.initrd) == b"ramdisk"


def test_the_addons_beside_a_uki_are_appended_in_the_order_of_their_names(
    write: Callable[[bytes], Path],
) -> None:
    path = write(uki(PLAIN, (".cmdline", b"own"), (".uname", RELEASE.encode())))
    folder = path.parent / "image.extra.d"
    folder.mkdir()
    addons = {
        "b.addon.efi": pe([(".cmdline", b"second")]),
        "a.addon.efi": pe([(".cmdline", b"first"), (".uname", RELEASE.encode())]),
        "c.addon.efi": pe([(".cmdline", b"of another kernel"), (".uname", b"6.1")]),
        "d.addon.efi": pe([(".dtb", b"no command line")]),
        "e.addon.efi": b"no PE file",
        "f.efi": pe([(".cmdline", b"no addon")]),
    }
    for name, content in addons.items():
        (folder / name).write_bytes(content)
    with OpenImage(path) as image:
        assert image.command_line == "own first second"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (kernel(), "ELF"),
        (gzip.compress(kernel()), "ELF"),
        (pe([(".osrel", b""), (".cmdline", b"quiet")]), "add-on"),
        (pe([(".text", b"code")]), "EFI program"),
        (bytes(0x38) + b"ARM\x64" + bytes(8), "arm64"),
        (zboot(gzip.compress(bytes(0x38) + b"ARM\x64" + bytes(8)), "gzip"), "arm64"),
        (bytes(0x38) + b"RSC\x05" + bytes(8), "RISC-V"),
        (zboot(b"x" * 100, "lzo"), "LZO"),
        (zboot(b"x" * 100, "brotli"), "'brotli'"),
        (zboot(gzip.compress(PLAIN), "gzip")[:-1], "shorter"),
        (gzip.compress(PLAIN)[:-9], "too early"),
        (b"\x1f\x8b" + b"x" * 100, "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_loaded_is_called_by_its_kind(
    content: bytes, words: str, write: Callable[[bytes], Path]
) -> None:
    error = error_of(write(content))
    assert error.errno == errno.ENOEXEC
    assert words in error.hint


def test_of_a_vmlinux_the_bzimage_of_the_same_build_is_named(tmp_path: Path) -> None:
    vmlinux = tmp_path / "vmlinux"
    vmlinux.write_bytes(kernel())
    assert f"arch/x86/boot/bzImage in the kernel's tree (the file has Linux {RELEASE})" in (
        error_of(vmlinux).hint
    )
    built = tmp_path / "arch" / "x86" / "boot" / "bzImage"
    built.parent.mkdir(parents=True)
    built.write_bytes(PLAIN.replace(RELEASE.encode(), b"6.1.0-another"[: len(RELEASE)]))
    assert os.fspath(built) not in error_of(vmlinux).hint
    built.write_bytes(PLAIN)
    assert f"the bzImage of the same build, {built}" in error_of(vmlinux).hint


@pytest.mark.parametrize("pack", [lambda data: data, uki, lambda data: zboot(data, "zstd")])
def test_an_image_that_grows_too_large_is_refused_before_it_has_eaten_the_memory(
    pack: Callable[[bytes], bytes], write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST", 8 << 20)
    written = []
    real = Memfd.write

    def write_and_count(memfd: Memfd, data: bytes, offset: int) -> None:
        written.append(offset + len(data))
        real(memfd, data, offset)

    monkeypatch.setattr(Memfd, "write", write_and_count)
    error = error_of(write(pack(zstd_of_zeros(64 << 20))))
    assert error.errno == errno.EFBIG
    assert "8 MiB" in error.hint
    assert max(written) <= 8 << 20


def test_an_image_that_is_wrapped_again_and_again_is_refused(
    write: Callable[[bytes], Path],
) -> None:
    content = PLAIN
    for _ in range(5):
        content = gzip.compress(content)
    assert "wrapped" in error_of(write(content)).hint


def test_what_pyluo_does_not_know_is_left_to_the_kernel(write: Callable[[bytes], Path]) -> None:
    for content in (b"", b"x", b"MZ", b"MZ" + bytes(62), b"no kernel" * 4096):
        with OpenImage(write(content)) as image:
            assert (image.header, image.wrappers) == (None, ())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"protocol": 0x20B}, "2.12"),
        ({"loadflags": 0}, "zImage"),
        ({"xloadflags": 0x3E}, "32-bit"),
        ({"xloadflags": 0x3D}, "CONFIG_RELOCATABLE"),
    ],
)
def test_a_bzimage_that_the_kernel_refuses_says_why(
    wrong: dict[str, int], words: str, write: Callable[[bytes], Path]
) -> None:
    with OpenImage(write(bzimage(b"", **wrong))) as image:
        assert image.header is not None
        assert words in image.header.obstacle


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(RequestError, match="/no/such/image"):
        OpenImage("/no/such/image")


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=os.fspath(tmp_path)) as caught:
        OpenImage(tmp_path)
    assert caught.value.errno == errno.EISDIR
