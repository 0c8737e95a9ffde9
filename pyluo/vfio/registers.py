"""The base class for the registers of a device."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Registers"]


class Registers(ABC):
    """Little-endian registers, at offsets from the start of a region.

    Each method makes exactly one access to the device, with the width in its name.

    Each method raises ValueError if the offset is not a multiple of the width, the access does not
    lie within the region, or the value does not fit into the width.
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
