"""Tests of the defaults of a guest, which depend on its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo.vm import Kernel
from pyluo.vm.machine.needs import PLAIN, needs

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
