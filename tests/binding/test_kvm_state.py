"""Tests of the bytes that the state of a VM consists of; the states themselves need a guest."""

from __future__ import annotations

import errno
import json
import struct
import zlib
from typing import TYPE_CHECKING

import pytest

from pyluo import Memfd, RequestError
from pyluo.kvm import Clock, CpuidEntry, VcpuState, VmState, cpuid_of_vcpu
from pyluo.kvm.cpuid import pack_entries, unpack_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE = VmState(
    vcpus=(
        VcpuState(0, 2_600_000, (1 << 64) - 5, {"regs": b"\1" * 144, "msrs": b""}),
        VcpuState(1, 2_600_000, None, {"regs": bytes(range(144))}),
    ),
    parts={"pit": b"pit", "ioapic": b"io"},
    clock=Clock(1 << 40, None, None),
    realtime=1_800_000_000_000_000_000,
    release="7.2",
    devices={"serial": {"line": 3}},
)


@pytest.fixture
def memfd() -> Iterator[Memfd]:
    with Memfd.create("state", 16384) as memfd:
        yield memfd


def test_a_state_is_read_as_it_was_written(memfd: Memfd) -> None:
    STATE.write(memfd)
    assert VmState.read(memfd) == STATE


def test_a_state_replaces_a_longer_one(memfd: Memfd) -> None:
    memfd.write(b"\xff" * memfd.size, 0)
    STATE.write(memfd)
    assert VmState.read(memfd) == STATE


def test_a_state_that_does_not_fit_leaves_the_file_as_it_was() -> None:
    with Memfd.create("small", 100) as small:
        small.write(b"x" * 100, 0)
        with pytest.raises(ValueError, match="in a file of 100 bytes"):
            STATE.write(small)
        assert small.read(100, 0) == b"x" * 100


def test_no_part_of_a_state_is_taken_for_all() -> None:
    data = STATE.to_bytes()
    for length in range(len(data)):
        with pytest.raises(RequestError) as caught:
            VmState.from_bytes(data[:length])
        assert caught.value.errno == errno.EBADMSG


def test_a_byte_that_changed_is_noticed() -> None:
    data = STATE.to_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(RequestError) as caught:
            VmState.from_bytes(bytes(changed))
        assert caught.value.errno in (errno.EBADMSG, errno.EPROTONOSUPPORT)


class Interrupted(Exception):
    pass


class Unsteady(Memfd):
    """A memfd that is interrupted before one of the writes."""

    __slots__ = ("left",)
    left: int

    def write(self, data: object, offset: int) -> None:
        self.left -= 1
        if not self.left:
            raise Interrupted
        super().write(data, offset)  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [2, 3])
def test_a_write_that_was_interrupted_leaves_no_state(write: int) -> None:
    with Unsteady.create("state", 16384) as memfd:
        memfd.left = 0
        STATE.write(memfd)  # one that is out of date
        memfd.left = write
        with pytest.raises(Interrupted):
            STATE.write(memfd)
        with pytest.raises(RequestError) as caught:
            VmState.read(memfd)
        assert caught.value.errno == errno.EBADMSG


def test_a_state_of_another_version_is_refused_by_its_number() -> None:
    changed = bytearray(STATE.to_bytes())
    changed[8] = 2
    with pytest.raises(RequestError, match="version 2; this program reads version 1") as caught:
        VmState.from_bytes(bytes(changed))
    assert caught.value.errno == errno.EPROTONOSUPPORT


def with_table(table: object) -> bytes:
    text = json.dumps(table).encode()
    body = struct.pack("=I", len(text)) + text
    return struct.pack("=8sIIQ", b"pyluoKVM", 1, zlib.crc32(body), len(body)) + body


def test_a_state_of_another_architecture_is_refused_by_its_name() -> None:
    with pytest.raises(RequestError, match="of a VM on aarch64") as caught:
        VmState.from_bytes(with_table({"architecture": "aarch64"}))
    assert caught.value.errno == errno.EPROTONOSUPPORT


@pytest.mark.parametrize(
    "table",
    [{}, [], {"architecture": "x86_64"}, {"architecture": "x86_64", "parts": [["regs", 1]]}],
)
def test_a_table_that_makes_no_sense_is_damaged(table: object) -> None:
    with pytest.raises(RequestError) as caught:
        VmState.from_bytes(with_table(table))
    assert caught.value.errno == errno.EBADMSG


def test_cpuid_tells_each_vcpu_its_number_and_hides_virtualization() -> None:
    supported = (
        CpuidEntry(1, 0, 0, 0, 0x12340567, 0xFFFFFFFF, 0),
        CpuidEntry(0xB, 0, 1, 0, 0, 0, 9),
        CpuidEntry(0x80000001, 0, 0, 0, 0, 0xFF, 0),
        CpuidEntry(0x8000000A, 0, 0, 1, 2, 3, 4),
    )
    first, topology, extended = cpuid_of_vcpu(supported, 2, 4)
    assert first.ebx == 0x02040567
    assert first.ecx == 0xFFFFFFFF & ~(1 << 5)
    assert topology.edx == 2
    assert extended.ecx == 0xFF & ~(1 << 2)


def test_entries_of_cpuid_are_read_as_they_were_written() -> None:
    entries = (CpuidEntry(1, 2, 1, 4, 5, 6, 7), CpuidEntry(*[0xFFFFFFFF] * 7))
    assert unpack_entries(pack_entries(entries), 2) == entries
