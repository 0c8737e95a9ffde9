"""The command lines of the READMEs of the examples, in the guest that is the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvm import guest_vmm
from pyluo.vm import HarnessError
from tests.snippets import command

if TYPE_CHECKING:
    from pyluo.vm import VM

__all__ = ["jump"]


def jump(host: VM, readme: str) -> None:
    """Live-update the host by the first two command lines of a README."""
    # The guest's Python has this process's packages, and no script of them in its PATH.
    program = {"pyluo ": "python3 -m pyluo "}
    image = {"/boot/vmlinuz-next": host.path(host.kernel.image)}
    lines = [command(readme, 0, {**program, **image}), command(readme, 1, program)]
    with pytest.raises(HarnessError, match="booted again"):
        host.call(guest_vmm.run_shell, "\n".join(lines))
