"""NUMA policies: on which nodes the memory of a guest is allocated."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Self

from pyluo._sys import constant

__all__ = ["NumaMode", "NumaPolicy"]

_MAX_NODES = 1024  # no kernel is built for more, see CONFIG_NODES_SHIFT


class NumaMode(enum.IntEnum):
    """How a policy chooses among its nodes.

    Source: include/uapi/linux/mempolicy.h, MPOL_*; set_mempolicy(2). Linux 2.6.7; LOCAL since 3.8,
    PREFERRED_MANY since 5.15, WEIGHTED_INTERLEAVE since 6.9.
    """

    DEFAULT = constant("MPOL_DEFAULT")
    PREFERRED = constant("MPOL_PREFERRED")
    BIND = constant("MPOL_BIND")
    INTERLEAVE = constant("MPOL_INTERLEAVE")
    LOCAL = constant("MPOL_LOCAL")
    PREFERRED_MANY = constant("MPOL_PREFERRED_MANY")
    WEIGHTED_INTERLEAVE = constant("MPOL_WEIGHTED_INTERLEAVE")


@dataclass(frozen=True, slots=True)
class NumaPolicy:
    """The policy for a range of a guest's RAM.

    Attributes:
        mode: how to choose among the nodes.
        nodes: the numbers of the host's nodes; empty for DEFAULT and LOCAL.
        offset: the offset of the range in the RAM in bytes.
        length: the length of the range in bytes; None if the range reaches to the end of the RAM.

    Raises:
        ValueError: no kernel has a node of such a number, or the range cannot exist.
    """

    mode: NumaMode
    nodes: tuple[int, ...] = ()
    offset: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        if not all(0 <= node < _MAX_NODES for node in self.nodes):
            raise ValueError(f"nodes {self.nodes}: their numbers are 0 to {_MAX_NODES - 1}")
        if self.offset < 0 or (self.length is not None and self.length <= 0):
            raise ValueError(f"{self.length} bytes at {self.offset} are not a range")

    def as_json(self) -> dict[str, Any]:
        """Return the policy as a value for JSON, with the bytes as hexadecimal strings."""
        return {
            "mode": self.mode.name.lower(),
            "nodes": list(self.nodes),
            "offset": hex(self.offset),
            "length": None if self.length is None else hex(self.length),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Return the policy for a value that `as_json` returned.

        Raises:
            KeyError, TypeError, ValueError: the value is damaged.
        """
        length = data["length"]
        nodes = tuple(data["nodes"])
        if not all(isinstance(node, int) for node in nodes):
            raise TypeError(f"nodes {nodes}: not all of them are integers")
        return cls(
            NumaMode[data["mode"].upper()],
            nodes,
            int(data["offset"], 16),
            None if length is None else int(length, 16),
        )
