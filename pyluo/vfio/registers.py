"""Registers of a device: integers, each read and written in one access of its own width."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Registers"]


class Registers(ABC):
    """Where registers are, by their offsets from the start of a region.

    An access of one width is one access of the device. Registers are little-endian.

    Every method raises ValueError if the offset is not a multiple of the width, the access does not
    lie within the region, or the value does not fit.
    """

    __slots__ = ()

    @abstractmethod
    def _load(self, offset: int, bits: int) -> int: ...

    @abstractmethod
    def _store(self, offset: int, bits: int, value: int) -> None: ...

    def read8(self, offset: int) -> int:
        """The register of 8 bits at `offset`."""
        return self._load(offset, 8)

    def read16(self, offset: int) -> int:
        """The register of 16 bits at `offset`."""
        return self._load(offset, 16)

    def read32(self, offset: int) -> int:
        """The register of 32 bits at `offset`."""
        return self._load(offset, 32)

    def read64(self, offset: int) -> int:
        """The register of 64 bits at `offset`."""
        return self._load(offset, 64)

    def write8(self, offset: int, value: int) -> None:
        """Writes the register of 8 bits at `offset`."""
        self._store(offset, 8, value)

    def write16(self, offset: int, value: int) -> None:
        """Writes the register of 16 bits at `offset`."""
        self._store(offset, 16, value)

    def write32(self, offset: int, value: int) -> None:
        """Writes the register of 32 bits at `offset`."""
        self._store(offset, 32, value)

    def write64(self, offset: int, value: int) -> None:
        """Writes the register of 64 bits at `offset`."""
        self._store(offset, 64, value)
