"""Tests of the defaults of a guest, which depend on its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo.vm import HarnessError, Kernel
from pyluo.vm.machine.needs import PLAIN, check_options, explain_root, needs

if TYPE_CHECKING:
    from pathlib import Path


def kernel(folder: Path, config: str | None) -> Kernel:
    path = folder / "config"
    if config is None:
        return Kernel("k", "7", folder / "bzImage")
    path.write_text(config)
    return Kernel("k", "7", folder / "bzImage", path)


def test_a_kernel_with_kasan_is_given_room_and_time(tmp_path: Path) -> None:
    defaults = needs(kernel(tmp_path, "CONFIG_SMP=y\nCONFIG_KASAN=y\n"))
    assert defaults.memory > PLAIN.memory
    assert defaults.boot_timeout > PLAIN.boot_timeout
    assert "kho_scratch=" in defaults.words


@pytest.mark.parametrize("config", [None, "", "# CONFIG_KASAN is not set\nCONFIG_KASAN_X=y\n"])
def test_another_kernel_is_given_what_all_are(tmp_path: Path, config: str | None) -> None:
    assert needs(kernel(tmp_path, config)) is PLAIN


WHOLE = "".join(
    f"CONFIG_{name}=y\n"
    for name in (
        "VIRTIO_PCI", "NET_9P_VIRTIO", "9P_FS", "SERIAL_8250_CONSOLE", "VIRTIO_CONSOLE",
        "BINFMT_ELF", "DEVTMPFS_MOUNT", "PROC_FS", "SYSFS", "TMPFS", "UNIX98_PTYS",
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"), [("9P_FS", "m"), ("VIRTIO_CONSOLE", "m"), ("SERIAL_8250_CONSOLE", "n")]
)
def test_what_a_kernel_lacks_to_run_a_guest_is_named(
    tmp_path: Path, option: str, value: str
) -> None:
    config = WHOLE.replace(f"CONFIG_{option}=y", f"CONFIG_{option}={value}")
    with pytest.raises(HarnessError, match=f"lacks CONFIG_{option}:"):
        check_options(kernel(tmp_path, config), network=False)


def test_a_network_needs_its_driver(tmp_path: Path) -> None:
    check_options(kernel(tmp_path, WHOLE), network=False)
    with pytest.raises(HarnessError, match="lacks CONFIG_VIRTIO_NET:"):
        check_options(kernel(tmp_path, WHOLE), network=True)
    check_options(kernel(tmp_path, f"{WHOLE}CONFIG_VIRTIO_NET=y\n"), network=True)


def test_a_checkout_in_tmp_needs_overlayfs(tmp_path: Path) -> None:
    plain = kernel(tmp_path, WHOLE)
    check_options(plain, network=False, folders=["/home/me/pyluo", "/tmpfiles"])
    for folder in ("/tmp/pyluo", "/var/tmp"):
        with pytest.raises(HarnessError, match="lacks CONFIG_OVERLAY_FS:"):
            check_options(plain, network=False, folders=[folder])


def test_nothing_is_said_of_a_kernel_whose_options_are_not_known(tmp_path: Path) -> None:
    check_options(kernel(tmp_path, None), network=True)


def test_the_console_tells_what_an_unknown_kernel_lacks(tmp_path: Path) -> None:
    console = 'VFS: Cannot open root device "" or unknown-block(0,0): error -6\n'
    told = explain_root(kernel(tmp_path, None), console)
    assert "CONFIG_9P_FS" in str(told)
    assert explain_root(kernel(tmp_path, None), "Kernel panic - not syncing: Oops\n") is None
    # The command line asked for another root, then.
    assert explain_root(kernel(tmp_path, WHOLE), console) is None


def test_the_options_of_a_distributions_kernel_are_beside_it(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz-6.1"
    content = bytearray(4096)
    content[0x202:0x206] = b"HdrS"
    content[0x20E:0x210] = (0x300).to_bytes(2, "little")
    content[0x500:0x50C] = b"6.1 (debian)"
    image.write_bytes(content)
    (tmp_path / "config-6.1").write_text("CONFIG_9P_FS=m\n")
    found = Kernel.find(image)
    assert (found.release, found.has("CONFIG_9P_FS")) == ("6.1", False)
    with pytest.raises(HarnessError, match="CONFIG_9P_FS"):
        check_options(found, network=False)
