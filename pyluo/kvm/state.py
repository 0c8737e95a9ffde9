"""`VmState`: the state of a VM without its RAM, as bytes that a store can carry over."""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pyluo.kvm.vm import Clock
from pyluo.state_format import StateFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyluo.memfd import Memfd

__all__ = ["VcpuState", "VmState"]

_FORMAT = StateFormat("pyluoKVM", 1)


@dataclass(frozen=True, slots=True)
class VcpuState:
    """The state of a vCPU.

    Attributes:
        number: the id of its local APIC.
        tsc_khz: the frequency of its time-stamp counter, in kHz.
        tsc_offset: what is added to the host's time-stamp counter; None if the kernel does not
            tell.
        parts: the structs of the kernel, by the names that `pyluo.kvm.saving` gives them.
    """

    number: int
    tsc_khz: int
    tsc_offset: int | None
    parts: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class VmState:
    """The state of a VM that is paused, without its RAM.

    Attributes:
        vcpus: the vCPUs, in the order in which they are created.
        parts: the state of the interrupt controllers and of the timer.
        clock: the kvmclock when the state was saved.
        realtime: CLOCK_REALTIME at that moment, in nanoseconds since 1970.
        release: the kernel that saved it.
        devices: the state of the devices that the VMM emulates, as JSON represents it.
    """

    vcpus: tuple[VcpuState, ...]
    parts: Mapping[str, bytes]
    clock: Clock
    realtime: int
    release: str = field(default_factory=lambda: os.uname().release)
    devices: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the state as bytes, which `from_bytes` reads."""
        return _FORMAT.pack(self._pack())

    def _pack(self) -> bytes:
        blobs: list[bytes] = []
        table = {
            "architecture": "x86_64",
            "release": self.release,
            "clock": {
                "nanoseconds": self.clock.nanoseconds,
                "realtime": self.clock.realtime,
                "host_tsc": self.clock.host_tsc,
            },
            "realtime": self.realtime,
            "devices": self.devices,
            "parts": _add_parts(self.parts, blobs),
            "vcpus": [
                {
                    "number": vcpu.number,
                    "tsc_khz": vcpu.tsc_khz,
                    "tsc_offset": vcpu.tsc_offset,
                    "parts": _add_parts(vcpu.parts, blobs),
                }
                for vcpu in self.vcpus
            ],
        }
        text = json.dumps(table).encode()
        return struct.pack("=I", len(text)) + text + b"".join(blobs)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a state; bytes after its end are ignored.

        Raises:
            RequestError: the state is not complete or damaged (EBADMSG); it is of a newer version,
                or of another architecture (EPROTONOSUPPORT).
        """
        body = _FORMAT.unpack(data)
        try:
            [length] = struct.unpack_from("=I", body)
            table = json.loads(body[4 : 4 + length])
            if table["architecture"] != "x86_64":
                hint = f"It is of a VM on {table['architecture']}"
                raise _FORMAT.error(errno.EPROTONOSUPPORT, hint)
            blobs = memoryview(body)[4 + length :]
            vcpus = []
            parts, blobs = _take_parts(table["parts"], blobs)
            for each in table["vcpus"]:
                own, blobs = _take_parts(each["parts"], blobs)
                vcpus.append(VcpuState(each["number"], each["tsc_khz"], each["tsc_offset"], own))
            return cls(
                vcpus=tuple(vcpus),
                parts=parts,
                clock=Clock(**table["clock"]),
                realtime=table["realtime"],
                release=table["release"],
                devices=table["devices"],
            )
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise _FORMAT.error(errno.EBADMSG, f"Damaged: {error!r}") from error

    def write(self, memfd: Memfd) -> None:
        """Write the state into a file, so that at no moment a part of it can be taken for all.

        The file may be preserved already: its size does not change.

        Raises:
            ValueError: the file is too small.
        """
        _FORMAT.write(memfd, self._pack())

    @staticmethod
    def erase(memfd: Memfd) -> None:
        """Make a file one that has no state, as before the VM goes on."""
        _FORMAT.erase(memfd)

    @classmethod
    def read(cls, memfd: Memfd) -> Self:
        """Read the state from a file.

        Raises:
            RequestError: see `from_bytes`.
        """
        return cls.from_bytes(memfd.read(memfd.size, 0))


def _add_parts(parts: Mapping[str, bytes], blobs: list[bytes]) -> list[tuple[str, int]]:
    """Append the parts to `blobs`, and return their names and sizes, in order."""
    blobs += parts.values()
    return [(name, len(data)) for name, data in parts.items()]


def _take_parts(sizes: Any, blobs: memoryview) -> tuple[dict[str, bytes], memoryview]:
    """Return the parts at the beginning of `blobs`, and what follows them."""
    parts = {}
    for name, size in sizes:
        if size > len(blobs):
            raise ValueError(f"{name} has {len(blobs)} of {size} bytes")
        parts[name], blobs = bytes(blobs[:size]), blobs[size:]
    return parts, blobs
