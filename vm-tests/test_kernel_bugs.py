"""What the kernels get wrong today: each test is expected to fail, and turns red once it passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyluo import LiveUpdate, Memfd, OutgoingSession, Seal

if TYPE_CHECKING:
    from pyluo.vm import VM


@pytest.mark.xfail(
    strict=True, reason="a noexec memfd comes back write-sealed", raises=AssertionError
)
def test_a_memfd_sealed_noexec_comes_back_with_the_seals_it_had(vm: VM) -> None:
    vm.hold(preserve_noexec)
    vm.live_update()
    assert vm.call(seals_and_mode) == (Seal.EXEC, 0o666)


def preserve_noexec() -> OutgoingSession:
    with LiveUpdate() as device, Memfd.create("ram", 4096, executable=False) as ram:
        session = device.create_session("s")
        session.preserve(ram, 1, allow_noexec=True)
    return session


def seals_and_mode() -> tuple[Seal, int]:
    import os

    with (
        LiveUpdate() as device,
        device.retrieve_session("s") as session,
        session.retrieve(1, Memfd) as ram,
    ):
        return ram.seals, os.fstat(ram.fileno()).st_mode & 0o777
