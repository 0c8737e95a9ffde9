"""Loading the image of the next kernel, and jumping into it.

This package uses only kexec_file_load(2). A kernel loaded by the older kexec_load(2) takes nothing
over from this one.
"""

from __future__ import annotations

from pyluo.kexec.jump import reboot
from pyluo.kexec.loading import LoadedImage, load, loaded, unload

__all__ = ["LoadedImage", "load", "loaded", "reboot", "unload"]
