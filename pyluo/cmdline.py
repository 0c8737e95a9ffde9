"""The command line of a kernel, parsed as the kernel parses it."""

from __future__ import annotations

__all__ = ["END", "is_switched_on", "split"]

END = "--"  # the words behind this one are for init

# The kernel's isspace(). To it, the byte 0xa0 is the space of Latin-1, and not a part of a letter.
_SPACES = " \t\n\v\f\r\udca0"


def split(line: str) -> list[str]:
    """Return the words of a command line, with their quotes.

    A space within double quotes separates no words, and no character escapes a quote.

    Source: lib/cmdline.c, next_arg()
    """
    words = []
    word = ""
    quoted = False
    for character in line:
        if character in _SPACES and not quoted:
            if word:
                words.append(word)
            word = ""
            continue
        quoted ^= character == '"'
        word += character
    if word:
        words.append(word)
    return words


def is_switched_on(name: str, line: str, *, default: bool) -> bool:
    """Return whether a boolean parameter is on; its last occurrence decides.

    Args:
        name: the name of the parameter, such as ``liveupdate``.
        line: the command line; words after ``--`` are for init and are ignored.
        default: the result if the parameter is not on the command line.

    Source: lib/kstrtox.c, kstrtobool(), which looks only at the first one or two letters
    """
    words = split(line)
    if END in words:
        words = words[: words.index(END)]
    start = f"{name}="
    values = [
        word.lstrip('"').removeprefix(start).lstrip('"')
        for word in words
        if word.lstrip('"').startswith(start)
    ]
    return values[-1].lower().startswith(("1", "e", "on", "t", "y")) if values else default
