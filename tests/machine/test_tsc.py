"""The frequency of the time-stamp counter that emulated guests are told."""

from __future__ import annotations

import platform

import pytest

from pyluo.vm.machine import tsc


@pytest.mark.skipif(platform.machine() != "x86_64", reason="no machine with this counter")
def test_two_measurements_agree() -> None:
    first, second = tsc.frequency.__wrapped__(), tsc.frequency.__wrapped__()
    assert 100_000 < first < 20_000_000  # kHz
    assert abs(first - second) < first / 1000
