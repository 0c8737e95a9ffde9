"""The base classes for the registers of a device."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from pyluo._sys import Exported
from pyluo.operation import raising

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["MappedRegisters", "Registers"]


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


class MappedRegisters(Registers):
    """Registers that are mapped into this process. The CPU keeps accesses to them in order.

    What the process wrote to memory before it writes to a register is visible to the device when it
    sees the register change; what it reads from memory after a register is not older.

    Args:
        fd: the descriptor of the file with the registers.
        place: where they begin in the file, in bytes.
        length: their length in bytes.
        writable: whether they can be written to.
        subject: words for the registers, for the message of an error.

    Raises:
        RequestError: the registers cannot be mapped; the errno is that of mmap(2).
        ValueError: they do not begin at a page.
    """

    __slots__ = ("__weakref__", "_exported", "_memory")

    def __init__(self, fd: int, place: int, length: int, *, writable: bool, subject: str) -> None:
        if place % mmap.ALLOCATIONGRANULARITY:
            raise ValueError(f"{subject} does not begin at a page")
        with raising("mmap", subject):
            self._memory = mmap.mmap(
                fd,
                length,
                access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ,
                offset=place,
            )
        self._exported = Exported(self._memory, writable=writable)

    @property
    def address(self) -> int:
        """The address of the mapping in this process, for example for a memory slot of KVM.

        Raises:
            ValueError: the mapping is closed.
        """
        if self.closed:
            raise ValueError("the mapping is closed")
        return self._exported.address

    def __len__(self) -> int:
        return len(self._memory)

    @property
    def closed(self) -> bool:
        """Whether the mapping is closed."""
        return self._memory.closed

    def close(self) -> None:
        """Unmap the registers; closing the mapping twice does nothing."""
        self._exported.release()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self, offset: int, bits: int) -> int:
        return self._exported.load(offset, bits)

    def _store(self, offset: int, bits: int, value: int) -> None:
        self._exported.store(offset, bits, value)
