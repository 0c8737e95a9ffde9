"""Tests of guests under KVM, in a guest: the host's own KVM may be missing or broken."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from harness import guest_kvm
from pyluo.vm import VM, Kernel

if TYPE_CHECKING:
    from collections.abc import Callable


def test_kvm_is_chosen_where_it_works_and_a_guest_under_it_jumps(guest: Callable[..., VM]) -> None:
    # Nested paging is right for one VM; with shadow paging it had not spoken after 60 s.
    outer = guest(
        "stable", memory=3 << 30, call_timeout=300.0, silence=120.0, append="kvm_amd.npt=1"
    )
    inner = outer.call(guest_kvm.live_update_inner_guest, os.fspath(Kernel.find("stable").image))
    assert inner["monitor"] == {"enabled": True, "present": True}
    assert inner["result"][:2] == (True, True)  # it works, and is proven
    assert (inner["kept"], inner["updates"]) == (b"inner", 1)
