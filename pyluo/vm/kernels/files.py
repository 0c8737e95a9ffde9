"""The names of the files that a build of a kernel leaves in its folder of the cache."""

from __future__ import annotations

__all__ = ["CONFIG", "HEADERS", "IMAGE", "SIGNING_KEY", "SYSTEM_MAP", "VMLINUX"]

IMAGE, CONFIG, SYSTEM_MAP, VMLINUX = "bzImage", "config", "System.map", "vmlinux"
HEADERS, SIGNING_KEY = "headers", "signing_key.pem"
