"""Tests of the rows of docs/reference/errors.md: each exception, raised by the real thing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vfio import guest_vfio

from errors import guest_errors
from pyluo import errors
from pyluo.vm import VM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.vm import Kernel

# These need a guest of their own, and so have a test of their own elsewhere.
ELSEWHERE = {
    "ImageSignatureError": (
        "sessions/test_images.py",
        "test_only_signed_images_are_loaded_by_a_kernel_that_wants_signatures",
    ),
    "IncomingStateError": (
        "sessions/test_refusals.py",
        "test_incoming_state_that_cannot_be_read_is_told_now_and_ever_after",
    ),
}


@pytest.fixture(scope="module")
def vm() -> Iterator[VM]:
    with VM("selftest", devices=guest_vfio.DEVICES, append=guest_vfio.CMDLINE) as guest:
        guest.hold(guest_errors.prepare)
        guest.live_update()
        yield guest


@pytest.mark.parametrize("name", [each for each in errors.__all__ if each not in ELSEWHERE])
def test_each_class_is_raised_by_the_real_thing(vm: VM, kernel: Kernel, name: str) -> None:
    assert vm.call(guest_errors.provoke, name, os.fspath(kernel.image)) == name


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_others_have_a_test_elsewhere(name: str) -> None:
    file, function = ELSEWHERE[name]
    text = (Path(__file__).parent.parent / file).read_text()
    body = text.partition(f"def {function}(")[2].partition("\ndef ")[0]
    assert name in body
