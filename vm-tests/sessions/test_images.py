"""Tests of the images of next kernels: what is loaded, what is refused, and what becomes of it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyluo import HandoverError, ImageRejectedError, KexecError, kexec, kho
from pyluo.build_config import BuildConfig
from pyluo.kexec import LoadedImage
from pyluo.vm import VM, HarnessError, Kernel
from sessions import guest_files, guest_images
from sessions.images import WRAPPERS, change_payload, make_uki, sign

if TYPE_CHECKING:
    from collections.abc import Callable

PYLUO = os.fspath(Path(sys.executable).parent / "pyluo")
HOPS = 8
SIZE = 1 << 20


def load_all(
    vm: VM, images: list[Path], prepare: Callable[[], None] = guest_images.do_nothing
) -> dict[str, LoadedImage | guest_images.Refusal]:
    """Load images while a session is open, jump into what was loaded last, and look at the session.

    Returns:
        What came of each image, by its file's name.
    """
    held = vm.hold(guest_files.preserve, "vm0", SIZE)
    vm.call(prepare)
    paths = {vm.path(each): each.name for each in images}
    outcomes: dict[str, Any] = vm.call(guest_images.load_all, list(paths), held)
    with pytest.raises(HarnessError, match="booted again"):
        vm.call(kexec.reboot)
    assert vm.call(guest_files.inspect, "vm0")[:2] == (True, SIZE)
    return {paths[path]: outcome for path, outcome in outcomes.items()}


def test_a_wrapped_image_is_unwrapped_and_jumped_into(
    guest: Callable[..., VM], tmp_path: Path
) -> None:
    vm = guest("stable")
    bzimage = vm.kernel.image.read_bytes()
    images = []
    for number, wrap in enumerate(WRAPPERS.values()):
        images.append(tmp_path / f"{number}")
        images[-1].write_bytes(wrap(bzimage))
    outcomes = load_all(vm, images, guest_images.forbid_executable_memfds)
    for outcome, wrapper in zip(outcomes.values(), WRAPPERS, strict=True):
        assert isinstance(outcome, LoadedImage), outcome
        assert (outcome.release, outcome.unknown) == (vm.kernel.release, ())
        assert outcome.wrappers == (wrapper,)


def test_a_uki_has_a_command_line_and_a_ramdisk_of_its_own(
    guest: Callable[..., VM], tmp_path: Path
) -> None:
    vm = guest("stable")
    line = vm.call(guest_images.read_command_line)
    sections = (".cmdline", f"{line} pyluo.uki=1\n".encode()), (".initrd", bytes(4096))
    uki = tmp_path / "linux.efi"
    uki.write_bytes(make_uki(vm.kernel.image.read_bytes(), *sections))
    done = vm.run([PYLUO, "kexec", "load", vm.path(uki)])
    assert (done.returncode, done.stderr) == (0, b"")
    with pytest.raises(HarnessError, match="booted again"):
        vm.call(kexec.reboot)
    assert vm.call(guest_images.read_command_line) == f"{line} pyluo.uki=1"
    assert vm.call(kho.status).updates == 1


def test_of_an_elf_kernel_the_bzimage_is_named(shared_vm: VM) -> None:
    assert shared_vm.kernel.vmlinux is not None
    with pytest.raises(ImageRejectedError, match="ELF") as caught:
        shared_vm.call(kexec.load, os.fspath(shared_vm.kernel.vmlinux), reuse_cmdline=True)
    assert caught.value.errno == errno.ENOEXEC
    assert os.fspath(shared_vm.kernel.image) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({b"luo-v5\0": b"luo-v9\0"}, "over luo-v5, and that one takes over kho-v4 and luo-v9"),
        ({b"kho-v4\0": b"kho-v9\0"}, "over kho-v4, and that one takes over kho-v9 and luo-v5"),
        ({b"IKCFG_ST": b"IKCFG_XX", b"liveupdate\0": b"liveupgrade"}, "no parameter `liveupdate`"),
    ],
    ids=["other sessions", "other KHO", "no live update"],
)
def test_an_image_that_would_take_nothing_over_is_refused(
    shared_vm: VM, tmp_path: Path, changes: dict[bytes, bytes], words: str
) -> None:
    image = tmp_path / "bzImage"
    change_payload(shared_vm.kernel.image, image, changes)
    with pytest.raises(HandoverError, match=words) as caught:
        shared_vm.call(kexec.load, shared_vm.path(image), reuse_cmdline=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert not shared_vm.call(kexec.loaded)


def test_what_cannot_be_told_of_an_image_is_said(shared_vm: VM, tmp_path: Path) -> None:
    image = tmp_path / "bzImage"
    change_payload(shared_vm.kernel.image, image, {b"IKCFG_ST": b"IKCFG_XX"})
    [sentence] = shared_vm.call(guest_images.judge, shared_vm.path(image))
    assert "CONFIG_IKCONFIG" in sentence
    assert shared_vm.call(guest_images.judge, os.fspath(shared_vm.kernel.image)) == ()


def test_only_signed_images_are_loaded_by_a_kernel_that_wants_signatures(tmp_path: Path) -> None:
    kernel = Kernel.find("signed")
    assert kernel.signing_key is not None
    signed = sign(kernel.image, kernel.signing_key, tmp_path / "signed")
    other_key, certificate = tmp_path / "other.pem", tmp_path / "other.crt"
    subprocess.run(
        [
            *("openssl", "req", "-new", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256"),
            *("-batch", "-subj", "/CN=other", "-keyout", other_key, "-out", certificate),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    with other_key.open("ab") as file:
        file.write(certificate.read_bytes())
    stranger = sign(kernel.image, other_key, tmp_path / "stranger")
    changed = tmp_path / "changed"
    content = bytearray(signed.read_bytes())
    content[0x4000] ^= 1
    changed.write_bytes(content)
    unsigned = tmp_path / "unsigned"
    shutil.copyfile(kernel.image, unsigned)
    unsigned_in_uki = tmp_path / "unsigned in a UKI"
    unsigned_in_uki.write_bytes(make_uki(unsigned.read_bytes()))
    signed_in_uki = tmp_path / "signed in a UKI"
    signed_in_uki.write_bytes(make_uki(signed.read_bytes()))
    images = [unsigned, signed, stranger, changed, unsigned_in_uki, signed_in_uki]
    with VM("signed") as vm:
        outcomes = load_all(vm, images)
    expected = {
        "unsigned": (errno.ENODATA, "no signature"),
        "stranger": (errno.ENOKEY, "does not trust"),
        "changed": (errno.EKEYREJECTED, "changed after it was signed"),
        "unsigned in a UKI": (errno.ENODATA, "a unified kernel image, in it a kernel"),
    }
    for name, outcome in outcomes.items():
        if name not in expected:
            assert isinstance(outcome, LoadedImage), outcome
            continue
        assert isinstance(outcome, tuple), name
        kind, number, message = outcome
        assert (kind, number) == ("ImageSignatureError", expected[name][0]), message
        assert expected[name][1] in message
        assert "what is preserved is intact" in message


def test_under_lockdown_an_image_without_a_valid_signature_is_told_so(
    guest: Callable[..., VM],
) -> None:
    vm = guest("selftest", append="lockdown=integrity")
    held = vm.hold(guest_files.preserve, "vm0", SIZE)
    image = os.fspath(vm.kernel.image)
    outcome = vm.call(guest_images.load_all, [image], held)[image]
    assert isinstance(outcome, tuple), outcome
    assert outcome[:2] == ("ImageSignatureError", errno.EPERM)
    assert "locked down" in outcome[2]


def test_live_update_stays_on_however_often_the_command_line_is_reused(tmp_path: Path) -> None:
    kernel = Kernel.find("signed")
    assert kernel.signing_key is not None
    assert kernel.config is not None
    signed = sign(kernel.image, kernel.signing_key, tmp_path / "signed")
    with VM("signed") as vm:
        lines = [vm.call(guest_images.read_command_line)]
        for _ in range(HOPS):
            done = vm.run([PYLUO, "kexec", "load", vm.path(signed), "--reuse-cmdline"])
            assert (done.returncode, done.stderr) == (0, b"")
            with pytest.raises(HarnessError, match="booted again"):
                vm.call(kexec.reboot)
            lines.append(vm.call(guest_images.read_command_line))
        status = vm.call(kho.status)
    assert (status.live_update, status.updates) == (True, HOPS)
    assert len(set(lines[1:])) == 1
    assert lines[1].split() == lines[0].split()
    assert lines[0].startswith(BuildConfig(kernel.config.read_text()).command_line + " ")


def test_a_command_line_that_the_next_kernel_would_cut_is_refused(
    shared_vm: VM, tmp_path: Path
) -> None:
    signed = Kernel.find("signed").image
    base = f"{shared_vm.call(guest_images.read_command_line)} "
    fits = base + "x" * (2047 - 301 - len(base))
    image = shared_vm.path(signed)
    with pytest.raises(
        KexecError, match=r"1747 bytes, behind the 300 bytes .* cut it to 2047"
    ) as caught:
        shared_vm.call(kexec.load, image, cmdline=fits + "x")
    assert caught.value.errno == errno.E2BIG
    assert not shared_vm.call(kexec.loaded)
    assert shared_vm.call(kexec.load, image, cmdline=fits).cmdline == fits
    shared_vm.call(kexec.unload)


def test_kho_has_to_be_turned_on_unless_the_image_says_that_it_is(shared_vm: VM) -> None:
    image = shared_vm.path(Kernel.find("signed").image)
    with pytest.raises(HandoverError, match="lacks kho=on"):
        shared_vm.call(kexec.load, image, cmdline="liveupdate=on")
    shared_vm.call(kexec.load, image, cmdline="liveupdate=on kho=on")
    shared_vm.call(kexec.load, os.fspath(shared_vm.kernel.image), cmdline="liveupdate=on")
    shared_vm.call(kexec.unload)
