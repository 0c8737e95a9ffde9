"""What is known of QEMU by its version."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo.vm.errors import HarnessError
from pyluo.vm.machine import qemu

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("version", "nests"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", False),
        ("QEMU emulator version 9.2.4", False),
        ("QEMU emulator version 10.0.8 (Debian 1:10.0.8+ds-0+deb13u1)", True),
        ("QEMU of somebody's own", True),
    ],
)
def test_an_old_qemu_does_not_emulate_a_host_of_vms(
    version: str, nests: bool, tmp_path: Path
) -> None:
    binary = tmp_path / "qemu-system-x86_64"
    binary.write_text(f'#!/bin/sh\necho "{version}"\necho "Copyright"\n')
    binary.chmod(0o755)
    assert qemu.version(str(binary)) == version
    assert qemu.nests(str(binary)) is nests


def test_a_qemu_that_does_not_run_is_told_of(tmp_path: Path) -> None:
    binary = tmp_path / "qemu-system-x86_64"
    binary.write_text("#!/bin/sh\necho cannot open libfdt.so.1 >&2\nexit 127\n")
    binary.chmod(0o755)
    with pytest.raises(HarnessError, match=r"status 127: cannot open libfdt\.so\.1"):
        qemu.nests(str(binary))
