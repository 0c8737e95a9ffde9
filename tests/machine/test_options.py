"""Tests of the options of a guest on command lines."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo.vm.machine import options
from pyluo.vm.machine.options import GuestOptions

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
GUESTS = st.builds(
    GuestOptions,
    kernel=TEXT,
    to=st.none() | TEXT,
    config=st.lists(TEXT).map(tuple),
    memory=st.none() | st.integers(1, 1 << 40),
    cpus=st.integers(1, 64),
    device=st.lists(TEXT).map(tuple),
    network=st.booleans(),
    root=st.none() | TEXT,
    accel=st.sampled_from([None, "kvm", "tcg"]),
    append=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    boot_timeout=st.none() | st.floats(0.001, 1e6).map(lambda number: round(number, 3)),
    vmcores=st.none() | TEXT,
)


def parse(words: list[str], prefix: str = "") -> GuestOptions:
    parser = argparse.ArgumentParser()
    options.add(parser.add_argument, prefix)
    return GuestOptions.of(parser.parse_args(words), prefix.replace("-", "_"))


@given(guest=GUESTS, prefix=st.sampled_from(["", "pyluo-"]))
def test_the_words_for_a_guest_are_parsed_to_the_same_guest(
    guest: GuestOptions, prefix: str
) -> None:
    assert parse(guest.words(f"--{prefix}"), prefix) == guest


def test_a_guest_of_which_nothing_is_said() -> None:
    guest = parse([])
    assert (guest.kernel, guest.to, guest.memory, guest.cpus) == ("stable", None, None, 1)


@pytest.mark.parametrize(
    "words",
    [["--memory", "1T"], ["--cpus", "0"], ["--accel", "xen"], ["--boot-timeout", "0"]],
)
def test_what_makes_no_guest_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert f"argument {words[0]}" in capsys.readouterr().err


def test_pytest_has_every_option_of_a_guest(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from pyluo.vm.machine.options import GuestOptions

        def test_options(pytestconfig, hops):
            guest = GuestOptions.of(pytestconfig.option, "pyluo_")
            assert guest == GuestOptions(
                kernel="a", to="b", config=("CONFIG_A=y", "f"), memory=2 << 30, cpus=2,
                device=("edu",), network=True, root="sid", accel="tcg", append="x y",
                boot_timeout=1.5, vmcores="d",
            )
            assert hops == 7
        """
    )
    words = [
        "--pyluo-kernel=a", "--pyluo-to=b", "--pyluo-config=CONFIG_A=y", "--pyluo-config=f",
        "--pyluo-memory=2G", "--pyluo-cpus=2", "--pyluo-device=edu", "--pyluo-network",
        "--pyluo-root=sid",
        "--pyluo-accel=tcg", "--pyluo-append=x y", "--pyluo-boot-timeout=1.5",
        "--pyluo-vmcores=d", "--pyluo-hops=7",
    ]  # fmt: skip
    pytester.runpytest_subprocess(*words).assert_outcomes(passed=1)
