"""Tests of the command line that the next kernel gets."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import RequestError
from pyluo.build_config import BuildConfig
from pyluo.cmdline import END, is_switched_on, split
from pyluo.kexec.bzimage import BzImageHeader
from pyluo.kexec.command_line import append, check_length, complete, drop_repeats, strip_built_in

HUGE = ("hugepages=1", "hugepages=2", "hugepagesz=2M", "hugepagesz=1G", "default_hugepagesz=1G")
WORDS = st.sampled_from(
    [
        *HUGE, "console=tty0", "console=ttyS0", "quiet", "ro", "liveupdate=on", "liveupdate=off",
        "kho=on", 'note="two words"', 'note="two  words"', '"quoted word"',
    ]
)  # fmt: skip
LINES = st.lists(WORDS, max_size=12)
ENDS = st.one_of(st.builds(list[str]), st.lists(WORDS, max_size=4).map(lambda words: [END, *words]))


def boot(built_in: str, line: str) -> str:
    """Return the command line of a kernel on x86, as setup_arch() makes it."""
    return f"{built_in} {line}" if built_in else line


class HugePages:
    """What the kernel makes of the words about huge pages.

    Source: mm/hugetlb.c: hugepages_setup(), hugepagesz_setup(), default_hugepagesz_setup()
    """

    def __init__(self, words: list[str]) -> None:
        self.counts: dict[str, int] = {}
        self.default = ""
        self._parsed = self._last = ""  # no size, or "first" for the count before any size
        self._is_valid = True
        self._count_of_default = 0
        for word in words:
            name, _, value = word.partition("=")
            if name == "hugepages":
                self._set_count(int(value))
            elif name == "hugepagesz":
                self._choose(value)
            elif name == "default_hugepagesz":
                self._choose_default(value)

    def result(self) -> tuple[dict[str, int], str, int]:
        return self.counts, self.default, self._count_of_default

    def _set_count(self, count: int) -> None:
        size = self._parsed if self.counts else "first"
        if not self._is_valid:
            self._is_valid = True
        elif size != self._last:
            if size == "first":
                self._count_of_default = count
            else:
                self.counts[size] = count
            self._last = size

    def _choose(self, size: str) -> None:
        self._is_valid = size not in self.counts or (size == self.default and not self.counts[size])
        if self._is_valid:
            self.counts.setdefault(size, 0)
            self._parsed = size

    def _choose_default(self, size: str) -> None:
        self._is_valid = not self.default
        if self.default:
            return
        if size not in self.counts:
            self.counts[size] = 0
            self._parsed = size
        self.default = size
        if self._count_of_default:
            self.counts[size] = self._count_of_default
            self._count_of_default = 0


def huge_pages(words: list[str]) -> tuple[dict[str, int], str, int]:
    return HugePages(words).result()


def own_words(line: str) -> list[str]:
    words = split(line)
    return words[: words.index(END)] if END in words else words


@given(LINES, ENDS)
def test_only_repeated_words_go_and_the_last_ones_stay_in_their_order(
    words: list[str], end: list[str]
) -> None:
    line = " ".join([*words, *end])
    short = drop_repeats(line)
    kept = own_words(short)
    assert set(kept) == set(words)
    assert split(short)[len(kept) :] == (end if end[1:] else [])
    last_first = list(dict.fromkeys(reversed([word for word in words if word not in HUGE])))
    assert [word for word in kept if word not in HUGE] == last_first[::-1]
    assert drop_repeats(short) == short


@given(LINES, ENDS)
def test_what_the_words_mean_does_not_change(words: list[str], end: list[str]) -> None:
    line = " ".join([*words, *end])
    short = drop_repeats(line)
    for name in ("liveupdate", "kho"):
        assert is_switched_on(name, short, default=False) == is_switched_on(
            name, line, default=False
        )
    for start in ("console=", "note="):
        before = [word for word in words if word.startswith(start)]
        assert [word for word in own_words(short) if word.startswith(start)][-1:] == before[-1:]
    assert huge_pages(own_words(short)) == huge_pages(words)


@given(LINES.map(" ".join), LINES.map(" ".join), ENDS.map(" ".join), st.booleans())
def test_a_line_that_is_reused_again_and_again_stays_as_it_is_from_the_second_time_on(
    built_in: str, line: str, end: str, is_known: bool
) -> None:
    # A kernel that cannot tell what the next one has built in must not lose it.
    built_in = drop_repeats(built_in)
    seen = [boot(built_in, f"{line} {end}")]
    for _ in range(8):
        given_line = drop_repeats(strip_built_in(seen[-1], built_in if is_known else ""))
        seen.append(boot(built_in, given_line))
    if is_known or not any(word in HUGE for word in split(built_in)):
        assert len({" ".join(split(each)) for each in seen[2:]}) == 1
    for each in seen:
        assert own_words(each)[-1:] == own_words(seen[0])[-1:]


@given(st.lists(st.sampled_from(HUGE), max_size=4), st.lists(st.sampled_from(HUGE), max_size=4))
def test_the_huge_pages_stay_the_same(repeated: list[str], rest: list[str]) -> None:
    words = [*repeated, *repeated, *rest]
    assert huge_pages(own_words(drop_repeats(" ".join(words)))) == huge_pages(words)


def test_huge_pages_that_are_built_in_do_not_pile_up() -> None:
    built_in = "hugepagesz=2M hugepages=5 hugepagesz=1G hugepages=5"
    seen = boot(built_in, "quiet liveupdate=on")
    for _ in range(8):
        seen = boot(built_in, drop_repeats(seen))
    assert seen == f"{built_in} {built_in} quiet liveupdate=on"
    assert drop_repeats(seen) == f"{built_in} quiet liveupdate=on"


def test_equal_counts_of_different_huge_pages_stay() -> None:
    line = "hugepagesz=2M hugepages=5 hugepagesz=1G hugepages=5"
    assert drop_repeats(line) == line


def test_words_that_are_appended_go_before_those_for_init() -> None:
    assert append("a -- x", "b") == "a b -- x"
    assert append("a", "b -- y") == "a b -- y"
    assert append("a -- x", "b -- y") == "a b -- x y"
    assert append("a", "") == "a"


def test_the_last_console_stays_the_last() -> None:
    line = "console=ttyS0 console=tty0 console=ttyS0"
    assert drop_repeats(line) == "console=tty0 console=ttyS0"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("  a  b=c\td\n", ["a", "b=c", "d"]),
        ('a="b c" d', ['a="b c"', "d"]),
        ('"a=b c" d', ['"a=b c"', "d"]),
        ('a="b c', ['a="b c']),
        ("", []),
    ],
)
def test_a_line_is_split_as_the_kernel_splits_it(line: str, words: list[str]) -> None:
    assert split(line) == words


def test_what_is_built_in_is_put_before_the_line_or_in_its_place() -> None:
    text = 'CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="a b"\n'
    assert complete("c", BuildConfig(text)) == "a b c"
    assert complete("c", BuildConfig(text + "CONFIG_CMDLINE_OVERRIDE=y\n")) == "a b"
    assert complete("c", BuildConfig("")) == complete("c", None) == "c"


def header(longest_line: int) -> BzImageHeader:
    return BzImageHeader("7.3.4", longest_line, 0, 0, "")


@pytest.mark.parametrize(
    ("length", "built_in", "longest_line", "words"),
    [
        (2016, 0, 2047, ()),
        (2017, 0, 2047, ("2017 bytes", "2016")),
        (2048, 0, 2047, ("2048 bytes", "2047")),
        (1746, 300, 2047, ()),
        (1747, 300, 2047, ("1747 bytes", "300 bytes", "2048", "2047")),
        (1000, 0, 255, ("1000 bytes", "255")),
    ],
)
def test_a_line_that_would_be_cut_is_refused_with_both_lengths(
    length: int, built_in: int, longest_line: int, words: tuple[str, ...]
) -> None:
    arguments = "x" * length, "y" * built_in, header(longest_line), "that are built into it"
    if not words:
        check_length(*arguments)
        return
    with pytest.raises(RequestError) as caught:
        check_length(*arguments)
    assert caught.value.errno == errno.E2BIG
    assert all(word in str(caught.value) for word in words)


def test_a_line_counts_in_bytes() -> None:
    check_length("é" * 1000, "", header(2047), "")
    with pytest.raises(RequestError):
        check_length("é" * 1020, "", header(2047), "")
