"""Opening the image of a kernel: finding out its kind, and unwrapping what is wrapped.

kexec_file_load(2) on x86 loads only a bzImage. One that is in a compressed file, in a unified
kernel image (UKI) or in an EFI image that decompresses itself (zboot) is copied to a memfd.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from pyluo.errors import ImageRejectedError, KexecError, RequestError
from pyluo.kexec.bzimage import BzImageHeader
from pyluo.kexec.pe import Section, read_sections
from pyluo.memfd import Memfd
from pyluo.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

    from pyluo.kexec.compression import Compression

__all__ = ["OPEN_IMAGE", "READ_IMAGE", "OpenImage", "read_pieces"]

OPEN_IMAGE = Operation("open image", KexecError)
READ_IMAGE = Operation("read image", KexecError)
_LONGEST = 512 << 20  # bytes that an image may have when it is unwrapped
_MOST_WRAPPERS = 4
_LONGEST_TEXT = 64 << 10  # bytes that are read of a section of text
_PIECE = 1 << 20  # bytes that are read at a time
_ZBOOT_MAGIC = b"zimg"
_ZBOOT = struct.Struct("<2x2x4sII8x32s")  # the magic number, offset and size, compression
_ELF_MAGIC = b"\x7fELF"
_PLAIN_AT = 0x38
_PLAIN = {b"ARM\x64": "arm64", b"RSC\x05": "RISC-V"}
_BANNER = b"Linux version "
_X86 = ("x86_64", "i686")
# The kernel's names of compressions in a zboot image: scripts/Makefile.lib and Makefile.zboot.
_ZBOOT_COMPRESSIONS = {
    "gzip": "GZIP", "lz4": "LZ4", "lzma": "LZMA", "lzo": "LZO", "xzkern": "XZ", "xz": "XZ",
    "zstd": "ZSTD", "zstd22": "ZSTD",
}  # fmt: skip


class OpenImage:
    """An image that is open for the kernel to read, unwrapped; used in a `with` block.

    Attributes:
        path: the path of the file.
        wrappers: the names of what the image was unwrapped from, the outermost first.
        kernel: the descriptor of the image.
        initrd: the descriptor of the initial ramdisk that came with the image; -1 if none did.
        command_line: the command line that came with the image; None if none did.
        header: the header of the image, if it is a bzImage.
        is_plain: whether the image is a kernel that is not compressed, as on arm64.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the image.

        Raises:
            ImageRejectedError: the image is of a kind that cannot be loaded here, or cannot be
                unwrapped (ENOEXEC), or is too large (EFBIG).
            KexecError: the file cannot be opened (ENOENT and others).
        """
        self.path: str = os.fspath(path)
        self.wrappers: tuple[str, ...] = ()
        self.initrd: int = -1
        self.command_line: str | None = None
        self.header: BzImageHeader | None = None
        self.is_plain: bool = False
        with OPEN_IMAGE.raising(self.path):
            self.kernel: int = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with READ_IMAGE.raising(self.path):
                self._unwrap()
        except BaseException:
            self.close()
            raise

    @property
    def subject(self) -> str:
        """Words for the image, for the message of an error."""
        inside = "".join(f", in it {each}" for each in (*self.wrappers[1:], "a kernel"))
        wrapped = f" ({self.wrappers[0]}{inside})" if self.wrappers else ""
        return f"image {self.path}{wrapped}"

    def close(self) -> None:
        """Close the descriptors."""
        fds = self.kernel, self.initrd
        self.kernel = self.initrd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def reject(self, reason: str, number: int = errno.ENOEXEC) -> ImageRejectedError:
        """Return the error that says why the image cannot be loaded."""
        return ImageRejectedError(number, "kexec_file_load", self.subject, reason)

    def _unwrap(self) -> None:
        for _ in range(_MOST_WRAPPERS):
            if not self._unwrap_once():
                return
        raise self.reject(f"It is wrapped {_MOST_WRAPPERS} times or more")

    def _unwrap_once(self) -> bool:
        """Take away the outermost wrapper; return whether there was one."""
        head = os.pread(self.kernel, 64, 0)
        sections = _choose_sections(read_sections(self.kernel) or ())
        if ".linux" in sections:
            self._unwrap_uki(sections)
            return True
        self.header = BzImageHeader.read(self.kernel)
        if self.header is not None:
            return False
        if head[4:8] == _ZBOOT_MAGIC and len(head) >= _ZBOOT.size:
            self._unwrap_zboot(head)
            return True
        if self._unwrap_compressed(head):
            return True
        self._check_kind(head, sections)
        return False

    def _unwrap_zboot(self, head: bytes) -> None:
        _, offset, size, name = _ZBOOT.unpack_from(head)
        kind = name.split(b"\0", 1)[0].decode("latin-1")
        self.wrappers = (*self.wrappers, f"an EFI zboot image with {kind}")
        from pyluo.kexec.compression import Compression

        if kind not in _ZBOOT_COMPRESSIONS:
            raise self.reject(f"pyluo does not know the compression {kind!r}")
        compression = Compression[_ZBOOT_COMPRESSIONS[kind]]
        if offset + size > os.fstat(self.kernel).st_size:
            raise self.reject("The file is shorter than its header says")
        self._decompress(compression, read_pieces(self.kernel, offset, size))

    def _unwrap_compressed(self, head: bytes) -> bool:
        """Unwrap a compressed file; return whether the file was one."""
        from pyluo.kexec.compression import Compression

        compression = Compression.recognize(head)
        if compression is None:
            return False
        self.wrappers = (*self.wrappers, f"a {compression.name.lower()} file")
        size = os.fstat(self.kernel).st_size
        self._decompress(compression, read_pieces(self.kernel, 0, size))
        return True

    def _decompress(self, compression: Compression, pieces: Iterable[bytes]) -> None:
        from pyluo.kexec.compression import UndecodableError, decompress

        try:
            unwrapped = self._copy(decompress(compression, pieces), "kernel")
        except UndecodableError as error:
            raise self.reject(f"It cannot be decompressed: {error}") from None
        wrapped, self.kernel = self.kernel, unwrapped
        os.close(wrapped)

    def _unwrap_uki(self, sections: Mapping[str, Section]) -> None:
        self.wrappers = (*self.wrappers, "a unified kernel image")
        line = _read_text(self.kernel, sections, ".cmdline")
        if line is not None:
            release = _read_text(self.kernel, sections, ".uname")
            addons = _read_addons(self.path, release) if len(self.wrappers) == 1 else []
            self.command_line = " ".join(filter(None, [line, *addons]))
        parts = {
            name: read_pieces(self.kernel, section.offset, section.size)
            for name, section in sections.items()
        }
        # The kernel applies microcode only if it is the first archive of the initial ramdisk.
        ramdisks = [each for each in (".ucode", ".initrd") if each in sections]
        if ramdisks and self.initrd < 0:
            pieces = (piece for each in ramdisks for piece in parts[each])
            self.initrd = self._copy(pieces, "initrd")
        unwrapped = self._copy(parts[".linux"], "kernel")
        wrapped, self.kernel = self.kernel, unwrapped
        os.close(wrapped)

    def _copy(self, pieces: Iterable[bytes], name: str) -> int:
        """Return a descriptor of a memfd with this content, which is open for reading only.

        The kernel reads no file that is open for writing (ETXTBSY).
        """
        with _create_memfd(f"pyluo-{name}") as memfd:
            size = 0
            for piece in pieces:
                if size + len(piece) > _LONGEST:
                    raise self.reject(
                        f"Unwrapped, it is longer than {_LONGEST >> 20} MiB", errno.EFBIG
                    )
                memfd.write(piece, size)
                size += len(piece)
            path = f"/proc/self/fd/{memfd.fileno()}"
            with OPEN_IMAGE.raising(self.subject):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _check_kind(self, head: bytes, sections: Mapping[str, Section]) -> None:
        """Reject an image of a kind that x86 cannot load; leave any other to the kernel."""
        plain = _PLAIN.get(head[_PLAIN_AT : _PLAIN_AT + 4], "")
        is_elf = head.startswith(_ELF_MAGIC)
        if os.uname().machine not in _X86:
            self.is_plain = bool(plain) or is_elf
            return
        if is_elf:
            raise self.reject(_find_bzimage(self.kernel, self.path, bool(self.wrappers)))
        if plain:
            raise self.reject(f"It is a kernel for {plain}, and this machine is x86")
        if ".cmdline" in sections:
            raise self.reject("It is an add-on of a unified kernel image: load that image")
        if sections:
            raise self.reject("It is an EFI program, but no kernel")


def _create_memfd(name: str) -> Memfd:
    """Return a memfd that is not executable, which works with every vm.memfd_noexec."""
    try:
        return Memfd.create(name, 0, executable=False)
    except RequestError as error:
        if error.errno != errno.EINVAL:
            raise
        return Memfd.create(name, 0)  # before Linux 6.3, every memfd is executable


def read_pieces(fd: int, offset: int, size: int) -> Iterator[bytes]:
    """Yield a range of a file, in pieces of at most 1 MiB; less if the file ends before."""
    while size > 0:
        piece = os.pread(fd, min(size, _PIECE), offset)
        if not piece:
            return
        yield piece
        offset += len(piece)
        size -= len(piece)


def _choose_sections(sections: tuple[Section, ...]) -> dict[str, Section]:
    """Return the sections that systemd-stub uses if nobody chooses a profile.

    What lies behind the first ``.profile`` section belongs to that profile, up to the next one, and
    goes before what all profiles share.

    Source: Unified Kernel Image Specification, Multi-Profile UKIs
    """
    found: dict[str, Section] = {}
    profiles = 0
    own: set[str] = set()
    for section in sections:
        if section.name == ".profile":
            profiles += 1
            own.clear()
        if profiles > 1:
            break
        if section.name not in own:
            found[section.name] = section
        own.add(section.name)
    return found


def _read_text(fd: int, sections: Mapping[str, Section], name: str) -> str | None:
    """Return the content of a section of text; None if there is no such section."""
    section = sections.get(name)
    if section is None:
        return None
    text = os.pread(fd, min(section.size, _LONGEST_TEXT), section.offset)
    return os.fsdecode(text.split(b"\0", 1)[0]).strip()


def _read_addons(path: str, release: str | None) -> list[str]:
    """Return the command lines of the add-ons beside a UKI, in the order of their names.

    As to systemd-stub, an add-on for another release does not count.

    Source: systemd-stub(7), ESP/.../foo.efi.extra.d/*.addon.efi
    """
    from pathlib import Path  # here, because it takes a moment to load

    lines = []
    for addon in sorted(Path(f"{path}.extra.d").glob("*.addon.efi")):
        with OPEN_IMAGE.raising(os.fspath(addon)), addon.open("rb") as file:
            sections = _choose_sections(read_sections(file.fileno()) or ())
            line = _read_text(file.fileno(), sections, ".cmdline")
            wanted = _read_text(file.fileno(), sections, ".uname")
        if line and ".linux" not in sections and wanted in (None, release):
            lines.append(line)
    return lines


def _find_bzimage(fd: int, path: str, unwrapped: bool) -> str:
    """Return words for what to load in place of an uncompressed kernel; with its path, if found."""
    from pathlib import Path

    reason = "It is an ELF file, which kexec_file_load(2) cannot load on x86: load "
    release = _read_release(fd)
    candidates = [Path("/boot") / f"vmlinuz-{release}", Path(f"/lib/modules/{release}/vmlinuz")]
    if not unwrapped:
        folder = Path(path).absolute().parent
        candidates = [folder / "arch/x86/boot/bzImage", folder / "bzImage", *candidates]
    for candidate in candidates if release else ():
        with suppress(OSError), candidate.open("rb") as file:
            header = BzImageHeader.read(file.fileno())
            if header is not None and header.release == release:
                return f"{reason}the bzImage of the same build, {candidate}"
    build = "the bzImage of the same build, arch/x86/boot/bzImage in the kernel's tree"
    return f"{reason}{build}" + (f" (the file has Linux {release})" if release else "")


def _read_release(fd: int) -> str:
    """Return the release of an uncompressed kernel; an empty string if it is not found."""
    window = b""
    for piece in read_pieces(fd, 0, _LONGEST):
        window = window[-256:] + piece
        at = window.find(_BANNER)
        while at >= 0:
            words = window[at + len(_BANNER) :].split(b" ", 1)
            # The kernel has the text as a pattern, too.
            if len(words) == 2 and words[0][:1].isdigit():
                return words[0].decode("latin-1")
            at = window.find(_BANNER, at + 1)
    return ""
