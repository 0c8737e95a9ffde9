"""Kernels to boot (draft)."""
from __future__ import annotations
import os
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    image: Path
    @classmethod
    def find(cls, what):
        if isinstance(what, Kernel): return what
        return cls("stable", Path("/tmp/k/b7.3/arch/x86/boot/bzImage"))
