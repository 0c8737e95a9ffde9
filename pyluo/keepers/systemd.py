"""Whether systemd runs this system."""

from __future__ import annotations

import os

__all__ = ["systemd_is_running"]


def systemd_is_running() -> bool:
    """Return whether the first process is systemd.

    Source: sd_booted(3)
    """
    return os.path.isdir("/run/systemd/system")
