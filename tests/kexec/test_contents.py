"""Tests of what an image says of the kernel in it, and of refusing one that takes nothing over."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import random
from typing import TYPE_CHECKING

import pytest

from pyluo import HandoverError
from pyluo.build_config import BuildConfig
from pyluo.kexec import handover
from pyluo.kexec.contents import Contents, read_contents
from pyluo.kexec.handover import check_image, check_line
from pyluo.kexec.image import OpenImage
from tests.kexec.images import bzimage, kernel, zstd_stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXTS = b"\0liveupdate\0kho-v4\0luo-v5\0kho-very\0"
SPOKEN = frozenset({"kho-v4", "luo-v5"})
CONFIG = "CONFIG_KEXEC_HANDOVER=y\nCONFIG_LIVEUPDATE=y\n"
DEFAULT_ON = "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y\n"
BUILT_IN = 'CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="kho=on liveupdate=on"\n'


@pytest.fixture
def contents_of(tmp_path: Path) -> Callable[[bytes], Contents]:
    def contents_of(image: bytes) -> Contents:
        path = tmp_path / "image"
        path.write_bytes(image)
        with OpenImage(path) as opened:
            return read_contents(opened)

    return contents_of


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Callable[[frozenset[str]], None]:
    """A function that sets the formats that the running kernel is believed to hand over."""

    def set_running(formats: frozenset[str]) -> None:
        monkeypatch.setattr(handover, "read_running_formats", lambda: formats)

    return set_running


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, bz2.compress, lzma.compress, zstd_stored],
    ids=lambda pack: f"{pack.__module__}",
)
def test_a_compressed_kernel_says_what_it_was_built_with(
    pack: Callable[[bytes], bytes], contents_of: Callable[[bytes], Contents]
) -> None:
    contents = contents_of(bzimage(pack(kernel(CONFIG, TEXTS)) + b"\0\1\0\0"))
    assert contents == Contents(BuildConfig(CONFIG), True, SPOKEN)


def test_a_kernel_without_its_configuration_is_known_by_its_texts(
    contents_of: Callable[[bytes], Contents],
) -> None:
    assert contents_of(bzimage(gzip.compress(kernel(None, TEXTS)))) == Contents(None, True, SPOKEN)
    nothing = contents_of(bzimage(gzip.compress(kernel(None, b"liveupdates"))))
    assert nothing == Contents(None, False)


def test_what_lies_across_two_pieces_is_found(contents_of: Callable[[bytes], Contents]) -> None:
    config = "".join(f"CONFIG_{number}=y\n" for number in random.Random(1).sample(range(10**9), 9))
    body = kernel(config, TEXTS)
    for shift in range(-len(body), 0, 97):
        data = bytes((1 << 20) + shift) + body
        assert contents_of(bzimage(gzip.compress(data, 1))) == Contents(
            BuildConfig(config), True, SPOKEN
        )


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"no compression", "not known"),
        (b"\x89LZO\x00\r\n\x1a\n", "LZO"),
        (gzip.compress(kernel())[:-20], "too early"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_image_that_cannot_be_read_says_why(
    payload: bytes, words: str, contents_of: Callable[[bytes], Contents]
) -> None:
    contents = contents_of(bzimage(payload))
    assert words in contents.obstacle
    [sentence] = check_image("image i", contents)
    assert words in sentence


def test_of_a_file_that_may_be_no_kernel_nothing_is_said(
    contents_of: Callable[[bytes], Contents],
) -> None:
    assert "does not know" in contents_of(b"no kernel" * 1000).obstacle


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (Contents(BuildConfig("CONFIG_KEXEC_HANDOVER=y"), True), "without CONFIG_LIVEUPDATE:"),
        (Contents(BuildConfig(""), True), "CONFIG_KEXEC_HANDOVER and CONFIG_LIVEUPDATE:"),
        (Contents(None, False), "no parameter `liveupdate`"),
        (Contents(BuildConfig(CONFIG), True, frozenset({"kho-v3", "luo-v5"})), "kho-v4"),
        (Contents(None, True, frozenset({"kho-v4", "luo-v6"})), "luo-v5"),
    ],
)
def test_an_image_that_takes_nothing_over_is_refused(
    contents: Contents, words: str, running: Callable[[frozenset[str]], None]
) -> None:
    running(SPOKEN)
    with pytest.raises(HandoverError) as caught:
        check_image("image i", contents)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert words in caught.value.hint
    assert "handover=False" in caught.value.hint


@pytest.mark.parametrize(
    ("contents", "formats", "words"),
    [
        (Contents(BuildConfig(CONFIG), True, SPOKEN | {"luo-v6"}), SPOKEN, []),
        (Contents(None, True, SPOKEN), SPOKEN, ["CONFIG_IKCONFIG"]),
        (Contents(BuildConfig(CONFIG), True, SPOKEN), frozenset(), ["formats"]),
        (Contents(BuildConfig(CONFIG), True, SPOKEN), frozenset({"kho-v4"}), ["formats"]),
        (Contents(BuildConfig(CONFIG), True), SPOKEN, ["formats"]),
    ],
)
def test_what_cannot_be_told_is_said(
    contents: Contents,
    formats: frozenset[str],
    words: list[str],
    running: Callable[[frozenset[str]], None],
) -> None:
    running(formats)
    sentences = check_image("image i", contents)
    assert len(sentences) == len(words)
    assert all(word in sentence for word, sentence in zip(words, sentences, strict=True))


@pytest.mark.parametrize(
    ("line", "config", "reason"),
    [
        ("liveupdate=on kho=on", None, ""),
        ("liveupdate=on", None, "lacks kho=on"),
        ("liveupdate=on", CONFIG, "lacks kho=on"),
        ("liveupdate=on", CONFIG + DEFAULT_ON, ""),
        ("liveupdate=on kho=off", CONFIG + DEFAULT_ON, "turns KHO off"),
        ("liveupdate=on kho=off", None, "turns KHO off"),
        ("kho=on", CONFIG + DEFAULT_ON, "lacks liveupdate=on"),
        ("kho=on liveupdate=on -- kho=off liveupdate=off", None, ""),
        ("kho=on -- liveupdate=on", None, "lacks liveupdate=on"),
        ('kho=on note="a liveupdate=on b"', None, "lacks liveupdate=on"),
        ('"kho=on" liveupdate="on"', None, ""),
        ("", CONFIG + BUILT_IN, ""),
        ("kho=off", CONFIG + BUILT_IN, "turns KHO off"),
        ("kho=off", CONFIG + BUILT_IN + "CONFIG_CMDLINE_OVERRIDE=y\n", ""),
        ("", BUILT_IN.replace("BOOL=y", "BOOL=n"), "lacks kho=on"),
    ],
)
def test_the_next_command_line_turns_on_kho_and_live_update(
    line: str, config: str | None, reason: str
) -> None:
    contents = Contents(None if config is None else BuildConfig(config), True)
    if not reason:
        check_line(line, contents)
        return
    with pytest.raises(HandoverError) as caught:
        check_line(line, contents)
    assert caught.value.errno == errno.EINVAL
    assert reason in caught.value.hint


def test_a_built_in_command_line_may_have_quotes_and_backslashes() -> None:
    config = BuildConfig('CONFIG_CMDLINE_BOOL=y\nCONFIG_CMDLINE="a=\\"b c\\" d=\\\\e"\n')
    assert config.command_line == 'a="b c" d=\\e'
