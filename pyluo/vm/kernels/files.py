"""The names of the files that a build of a kernel leaves in its folder of the cache."""

from __future__ import annotations

__all__ = ["CONFIG", "HEADERS", "IMAGE", "SYSTEM_MAP", "VMLINUX"]

IMAGE, CONFIG, SYSTEM_MAP, VMLINUX, HEADERS = (
    "bzImage",
    "config",
    "System.map",
    "vmlinux",
    "headers",
)
