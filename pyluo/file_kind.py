"""The kind of file behind a descriptor, and why a kernel cannot preserve some kinds.

The kind is read from the descriptor's link in /proc/self/fd.
"""

from __future__ import annotations

import os

__all__ = ["SESSION_LINK", "describe_file", "missing_support", "read_link"]

SESSION_LINK = "anon_inode:[luo_session] "
"""The beginning of a session's link in /proc/PID/fd; the rest of the link is the session's name."""

_RETRIEVED = "/ (deleted)"  # the link of a memfd that a live update carried over, up to Linux 7.3

_REBUILD = (
    "Record its mappings with IoasLayout in the store, and rebuild them after the jump; preserve "
    "the memory itself as a memfd"
)
# For links that begin like this: the handler that kernels up to 7.3 lack, and what to do instead.
_MISSING = {
    "/dev/iommu": f"it has no live update handler for iommufd. {_REBUILD}",
    "/dev/vfio/devices/": (
        "it has no live update handler for VFIO devices (vfio-pci). Bind and attach the device "
        f"again after the jump. {_REBUILD}"
    ),
    "anon_inode:kvm-vm": (
        "it has no live update handler for KVM VMs. Save the VM's state, and create it again after "
        "the jump"
    ),
    "anon_inode:[kvm-gmem]": "it has no live update handler for guest_memfd. Use a plain memfd",
}


def read_link(fd: int) -> str:
    """Return the link in /proc/self/fd of a descriptor; an empty string if it is not open."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def describe_file(fd: int) -> str:
    """Return a phrase that describes the file behind a descriptor, such as "a memfd".

    The phrase is for error messages.
    """
    link = read_link(fd)
    if link.startswith("/memfd:") or link == _RETRIEVED:
        return "a memfd"
    if link.startswith(SESSION_LINK):
        return f"a live update session {link.removeprefix(SESSION_LINK)!r}"
    if link.startswith("anon_inode:"):
        kind = link.removeprefix("anon_inode:").strip("[]")
        return f"an {kind}" if kind[:1] in tuple("aeio") else f"a {kind}"
    return link or "not open"


def missing_support(fd: int) -> str:
    """Return why the running kernel cannot preserve a file; an empty string if unknown."""
    link = read_link(fd)
    for beginning, reason in _MISSING.items():
        if link.startswith(beginning):
            return f"Linux {os.uname().release} cannot preserve it: {reason}"
    return ""
