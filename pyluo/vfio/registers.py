"""Registers of a device: integers, each accessed in one operation of its own width."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Registers"]


class Registers(ABC):
    """Registers at offsets from the start of a region, which are little-endian.

    Each call makes exactly one access of the named width to the device.

    Every method raises ValueError if the offset is not a multiple of the width, the access does not
    lie within the region, or the value does not fit.
    """

    __slots__ = ()

    @abstractmethod
    def _load(self, offset: int, bits: int) -> int: ...

    @abstractmethod
    def _store(self, offset: int, bits: int, value: int) -> None: ...

    def read8(self, offset: int) -> int:
        """Return the 8-bit register at `offset`."""
        return self._load(offset, 8)

    def read16(self, offset: int) -> int:
        """Return the 16-bit register at `offset`."""
        return self._load(offset, 16)

    def read32(self, offset: int) -> int:
        """Return the 32-bit register at `offset`."""
        return self._load(offset, 32)

    def read64(self, offset: int) -> int:
        """Return the 64-bit register at `offset`."""
        return self._load(offset, 64)

    def write8(self, offset: int, value: int) -> None:
        """Write the 8-bit register at `offset`."""
        self._store(offset, 8, value)

    def write16(self, offset: int, value: int) -> None:
        """Write the 16-bit register at `offset`."""
        self._store(offset, 16, value)

    def write32(self, offset: int, value: int) -> None:
        """Write the 32-bit register at `offset`."""
        self._store(offset, 32, value)

    def write64(self, offset: int, value: int) -> None:
        """Write the 64-bit register at `offset`."""
        self._store(offset, 64, value)
