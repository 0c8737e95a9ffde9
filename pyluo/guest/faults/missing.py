"""What a fault raises that the running kernel cannot throw."""

from __future__ import annotations

__all__ = ["FaultMissingError"]


class FaultMissingError(RuntimeError):
    """The kernel was built without what throws this fault; nothing was thrown.

    Args:
        fault: what was to be thrown.
        option: of the kernel's configuration, that it takes.
    """

    def __init__(self, fault: str, option: str) -> None:
        super().__init__(fault, option)
        self.fault = fault
        self.option = option

    def __str__(self) -> str:
        return f"no {self.fault}: the kernel lacks {self.option}, which the kernel selftest has"
