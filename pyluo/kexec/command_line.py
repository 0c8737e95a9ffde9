"""The command line of the next kernel: what of the running one's to give it, and what it keeps."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from pyluo.cmdline import END, split
from pyluo.errors import KexecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.build_config import BuildConfig
    from pyluo.kexec.bzimage import BzImageHeader

__all__ = ["append", "check_length", "complete", "drop_repeats", "strip_built_in"]

# COMMAND_LINE_SIZE of x86 and arm64 without the terminating zero: a kernel cuts its command line,
# the built-in part included, behind this many bytes.
_LONGEST = 2047
# MAX_ELFCOREHDR_STR_LEN, which kexec_file_load(2) on x86 always leaves free, and a zero.
_LEFT_FREE = 31
# These words say how many huge pages of which size there are. The kernel takes `hugepages` for the
# size before it, so that dropping one of them could change the meaning of the next. Any other word
# replaces what an earlier one of the same name has set, or adds nothing to it if both are the same.
_ORDERED = ("default_hugepagesz=", "hugepages=", "hugepagesz=")
_PAIR = ("hugepagesz=", "hugepages=")


def drop_repeats(line: str) -> str:
    """Return a command line with only the last one of equal words.

    The last of several values of a parameter counts, and the last ``console`` becomes
    /dev/console: neither changes. Words about huge pages are dropped only if the same sizes and
    counts are there twice in a row. Words after ``--`` are for init, and all stay.
    """
    words, for_init = _divide(line)
    last = {word: number for number, word in enumerate(words)}
    ordered = [number for number, word in enumerate(words) if word.startswith(_ORDERED)]
    dropped = set(ordered[: _count_repeated([words[number] for number in ordered])])
    kept = [
        word
        for number, word in enumerate(words)
        if (number not in dropped if word.startswith(_ORDERED) else last[word] == number)
    ]
    return " ".join([*kept, END, *for_init] if for_init else kept)


def append(line: str, more: str) -> str:
    """Return a command line with the words of another one behind those of its own for the kernel.

    The words for init follow, those of `line` first.
    """
    for_kernel, for_init = zip(_divide(line), _divide(more), strict=True)
    words = [each for part in for_kernel for each in part]
    rest = [each for part in for_init for each in part]
    return " ".join([*words, END, *rest] if rest else words)


def strip_built_in(line: str, built_in: str) -> str:
    """Return a command line without the part that the next kernel puts before it.

    Args:
        line: the command line.
        built_in: what the next kernel has built in.
    """
    words, prefix = split(line), split(built_in)
    while prefix and words[: len(prefix)] == prefix:
        words = words[len(prefix) :]
    return " ".join(words)


def complete(line: str, config: BuildConfig | None) -> str:
    """Return the command line as the next kernel sees it.

    Args:
        line: the command line that it is loaded with.
        config: its configuration, if that is known.

    Source: arch/x86/kernel/setup.c, setup_arch()
    """
    built_in = config.command_line if config is not None else ""
    if config is not None and built_in and config.has("CONFIG_CMDLINE_OVERRIDE"):
        return built_in
    return " ".join(filter(None, [built_in, line]))


def check_length(line: str, built_in: str, header: BzImageHeader | None, source: str) -> None:
    """Refuse a command line that the kernel does not load, or that the next kernel would cut.

    Args:
        line: the command line.
        built_in: what the next kernel puts before it.
        header: the header of the image, if it is a bzImage.
        source: words that say how `built_in` is known.

    Raises:
        KexecError: the command line is too long (E2BIG).
    """
    length = len(os.fsencode(line))
    total = length + (len(os.fsencode(built_in)) + 1 if built_in else 0)
    limit = _LONGEST if header is None else min(_LONGEST, header.longest_line)
    if total > limit:
        behind = f"behind the {total - length - 1} bytes {source}, {total}; " if built_in else ""
        reason = f"{behind}the next kernel would cut it to {limit}"
    elif header is not None and length > header.longest_line - _LEFT_FREE:
        reason = f"kexec_file_load(2) takes {header.longest_line - _LEFT_FREE} for this image"
    else:
        return
    hint = f"It has {length} bytes, {reason}: shorten it"
    raise KexecError(errno.E2BIG, "kexec_file_load", "the command line", hint)


def _divide(line: str) -> tuple[list[str], list[str]]:
    """Return the words for the kernel, and the words for init."""
    words = split(line)
    end = words.index(END) if END in words else len(words)
    return words[:end], words[end + 1 :]


def _count_repeated(words: Sequence[str]) -> int:
    """Return how many words to drop so that no sequence of them is there twice at the beginning.

    Only a sequence of sizes that are each followed by a count means the same once and twice: the
    kernel ignores the second one.

    Source: mm/hugetlb.c, hugepages_setup() and hugepagesz_setup()
    """
    dropped = 0
    length = 2
    while dropped + 2 * length <= len(words):
        first = words[dropped : dropped + length]
        second = words[dropped + length : dropped + 2 * length]
        if first == second and all(
            word.startswith(_PAIR[number % 2]) for number, word in enumerate(first)
        ):
            dropped += length
            length = 2
        else:
            length += 2
    return dropped
