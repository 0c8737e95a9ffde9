"""What an open descriptor is, by its link in /proc, and what the kernels lack to preserve it."""

from __future__ import annotations

import os

__all__ = ["SESSION_LINK", "describe_file", "missing_support", "read_link"]

SESSION_LINK = "anon_inode:[luo_session] "
"""What the link of a session in /proc/PID/fd begins with; the name follows."""

_RETRIEVED = "/ (deleted)"  # the link of a memfd that came over, on the kernels up to 7.3

_REBUILD = (
    "Record what is mapped with IoasLayout in the store, and rebuild it after the jump; the memory "
    "itself goes over as a memfd"
)
# By the beginning of the link: which handler is missing in the kernels up to 7.3, and what to do.
_MISSING = {
    "/dev/iommu": f"it has no live update handler for iommufd. {_REBUILD}",
    "/dev/vfio/devices/": (
        f"it has no live update handler for VFIO devices (vfio-pci). Bind and attach the device "
        f"again after the jump. {_REBUILD}"
    ),
    "anon_inode:kvm-vm": (
        "it has no live update handler for KVM VMs. Save their state, and make them again"
    ),
    "anon_inode:[kvm-gmem]": "it has no live update handler for guest_memfd. Use a plain memfd",
}


def read_link(fd: int) -> str:
    """The link of a descriptor of this process in /proc; empty if it is not open."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def describe_file(fd: int) -> str:
    """What a descriptor is, in words, for a message."""
    link = read_link(fd)
    if link.startswith("/memfd:") or link == _RETRIEVED:
        return "a memfd"
    if link.startswith(SESSION_LINK):
        return f"a live update session {link.removeprefix(SESSION_LINK)!r}"
    if link.startswith("anon_inode:"):
        kind = link.removeprefix("anon_inode:").strip("[]")
        return f"an {kind}" if kind[:1] in tuple("aeio") else f"a {kind}"
    return link or "no open file"


def missing_support(fd: int) -> str:
    """Which support the running kernel lacks to preserve a descriptor; empty if it has no name."""
    link = read_link(fd)
    for beginning, what in _MISSING.items():
        if link.startswith(beginning):
            return f"Linux {os.uname().release} cannot preserve it: {what}"
    return ""
