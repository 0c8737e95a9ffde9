"""Whether the next kernel would take over what this one hands over."""

from __future__ import annotations

import errno
import os

from pyluo.cmdline import is_switched_on
from pyluo.errors import HandoverError
from pyluo.kexec.command_line import complete
from pyluo.kexec.contents import Contents, read_running_formats

__all__ = ["check_image", "check_line"]

_LOST = "the next kernel would take nothing over, and what is preserved would be lost"
_OVERRIDE = "or load it with handover=False"
_WANTED = ("CONFIG_KEXEC_HANDOVER", "CONFIG_LIVEUPDATE")


def check_image(subject: str, contents: Contents) -> tuple[str, ...]:
    """Refuse an image that takes nothing over; return what cannot be told of it, as sentences.

    Args:
        subject: words for the image.
        contents: what the image says of itself.

    Raises:
        HandoverError: the kernel in the image has no live update, or takes over other formats than
            this kernel hands over (EOPNOTSUPP).
    """
    if contents.obstacle:
        return (f"Whether the image can take anything over cannot be told: {contents.obstacle}",)
    if contents.config is not None:
        missing = [each for each in _WANTED if not contents.config.has(each)]
        if missing:
            raise _refuse(subject, f"It was built without {' and '.join(missing)}")
    elif not contents.knows_live_update:
        raise _refuse(subject, "The kernel in it has no parameter `liveupdate`")
    running = read_running_formats()
    strange = sorted(running - contents.formats)
    if strange and contents.formats:
        theirs = " and ".join(sorted(contents.formats))
        ours = " and ".join(strange)
        raise _refuse(subject, f"This kernel hands over {ours}, and that one takes over {theirs}")
    unknown = []
    if contents.config is None:
        unknown.append(
            "The image does not contain its configuration (CONFIG_IKCONFIG): whether a part of its "
            "command line is built in, and whether KHO is on by default, cannot be told"
        )
    if strange or len(running) < 2:
        unknown.append(
            "Whether the image takes over the formats that this kernel hands over cannot be told"
        )
    return tuple(unknown)


def check_line(line: str, contents: Contents) -> None:
    """Refuse a command line with which the next kernel would take nothing over.

    Args:
        line: the command line.
        contents: what the image says of itself.

    Raises:
        HandoverError: the command line does not turn on live update and KHO (EINVAL).
    """
    config = contents.config
    seen = complete(line, config)
    by_default = config is not None and config.has("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
    if not is_switched_on("kho", seen, default=by_default):
        lacks = is_switched_on("kho", seen, default=True)
        reason = "It lacks kho=on" if lacks else "It turns KHO off"
    elif not is_switched_on("liveupdate", seen, default=False):
        reason = "It lacks liveupdate=on"
    else:
        return
    raise HandoverError(
        errno.EINVAL,
        "kexec_file_load",
        f"command line {seen!r}",
        f"{reason}: {_LOST}; add kho=on liveupdate=on, {_OVERRIDE}",
    )


def _refuse(subject: str, reason: str) -> HandoverError:
    return HandoverError(
        errno.EOPNOTSUPP,
        "kexec_file_load",
        subject,
        f"{reason}: {_LOST}; load a kernel that suits Linux {os.uname().release}, {_OVERRIDE}",
    )
