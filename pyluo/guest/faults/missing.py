"""The exception for a fault that the running kernel cannot inject."""

from __future__ import annotations

__all__ = ["FaultMissingError"]


class FaultMissingError(RuntimeError):
    """The running kernel was built without an option that this fault needs; nothing was injected.

    Args:
        fault: the name of the fault.
        option: the missing option of the kernel's configuration.
    """

    def __init__(self, fault: str, option: str) -> None:
        super().__init__(fault, option)
        self.fault = fault
        self.option = option

    def __str__(self) -> str:
        return f"no {self.fault}: the kernel lacks {self.option}, which the kernel selftest has"
