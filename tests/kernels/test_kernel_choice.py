"""Tests of finding kernels by name, and of wrong names; none reads a package archive."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import pytest

from pyluo.vm import HarnessError, Kernel, packages
from pyluo.vm.kernels import build, source
from pyluo.vm.kernels.catalogue import KernelSpec, Series, catalogue
from pyluo.vm.kernels.debian import SourcePackage
from pyluo.vm.kernels.kconfig import Fragment, find_unmet, merge
from pyluo.vm.kernels.source import Tree
from pyluo.vm.machine import options


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    return tmp_path / "cache" / "pyluo"


def package(series: str, version: str) -> SourcePackage:
    return SourcePackage(f"linux-source-{series}", version, "0" * 64, ("a-suite",))


NEWEST_FIRST = [package("7.3", "7.3.4-1"), package("7.2", "7.2.13-1"), package("7.2", "7.2.9-1")]


@pytest.mark.parametrize(
    ("series", "expected"), [(Series.NEWEST, "7.3.4"), (Series.BEFORE_NEWEST, "7.2.13")]
)
def test_a_rule_takes_the_newest_version_of_its_series(
    series: Series, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyluo.vm.kernels.debian.newest_first", lambda *_, **__: NEWEST_FIRST)
    spec = KernelSpec("k", series, candidates=False, fragments=())
    assert source.choose(spec, update=False).package.upstream == expected


def test_a_choice_is_remembered_until_an_update_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = KernelSpec("k", Series.NEWEST, candidates=False, fragments=())
    answers = iter([NEWEST_FIRST[1:], NEWEST_FIRST])
    monkeypatch.setattr("pyluo.vm.kernels.debian.newest_first", lambda *_, **__: next(answers))
    versions = [source.choose(spec, update=update).package for update in (False, False, True)]
    assert versions == [NEWEST_FIRST[1], NEWEST_FIRST[1], NEWEST_FIRST[0]]


def test_all_names_are_chosen_from_one_state_of_the_archive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved_on = [package("7.4", "7.4.1-1"), *NEWEST_FIRST]
    answers = iter([NEWEST_FIRST, moved_on])
    monkeypatch.setattr("pyluo.vm.kernels.debian.newest_first", lambda *_, **__: next(answers))
    kernels = catalogue()
    before = [source.choose(kernels[name], update=False) for name in ("stable", "previous")]
    assert [each.package.upstream for each in before] == ["7.3.4", "7.2.13"]
    after = [
        source.choose(kernels[name], update=update)
        for name, update in (("stable", True), ("previous", False))
    ]
    assert [each.package.upstream for each in after] == ["7.4.1", "7.3.4"]


def test_the_catalogue_has_what_the_tests_are_named_after() -> None:
    kernels = catalogue()
    assert kernels["stable"].series is Series.NEWEST
    assert kernels["previous"].series is Series.BEFORE_NEWEST
    assert not kernels["stable"].candidates
    assert "debug" not in kernels["stable"].fragments
    for spec in kernels.values():
        for name in spec.fragments:
            assert Fragment.load(name).settings()


def test_options_that_kconfig_dropped_are_named(tmp_path: Path) -> None:
    config = tmp_path / ".config"
    config.write_text('CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S="x"\n')
    fragment = Fragment("f", 'CONFIG_A=y\nCONFIG_B=y\nCONFIG_S="x"\n# CONFIG_GONE is not set\n')
    assert [str(each) for each in find_unmet(config, (fragment,))] == ["CONFIG_B=y (f)"]
    later = Fragment("g", "# CONFIG_A is not set\n")
    lost = find_unmet(config, (fragment, later))
    assert [str(each) for each in lost] == ["CONFIG_B=y (f)", "CONFIG_A=n (g)"]


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("CONFIG_A=y # why", ["CONFIG_A=y (f)"]),
        ("CONFIG_A=yes", ["CONFIG_A=y (f)"]),
        ("CONFIG_S=no_quotes", ["CONFIG_S=n (f)"]),
        ("CONFIG_S=what", []),
        ("CONFIG_A=n", ["CONFIG_A=n (f)"]),
        ("# CONFIG_A is not set", ["CONFIG_A=n (f)"]),
        ("# CONFIG_A is not set any more", []),
        ("  # CONFIG_A is not set", []),
        ("#CONFIG_A=y", []),
        ('CONFIG_S="a # b" # why', ['CONFIG_S="a # b" (f)']),
        ('CONFIG_S="a \\" b"', ['CONFIG_S="a \\" b" (f)']),
        ('CONFIG_S=""', ['CONFIG_S="" (f)']),
        ("CONFIG_H=0X10", ["CONFIG_H=0X10 (f)"]),
        ("CONFIG_I=-3", ["CONFIG_I=-3 (f)"]),
        ("CONFIG_I=-3 # why", []),
        ("CONFIG_A=m", ["CONFIG_A=y (f)"]),
        ("CONFIG_A=y\nCONFIG_A=n", ["CONFIG_A=n (f)"]),
        ("CONFIG_A=y\nCONFIG_B=y\nCONFIG_A=y", ["CONFIG_B=y (f)", "CONFIG_A=y (f)"]),
    ],
)
def test_a_line_of_a_fragment_means_what_it_means_to_kconfig(
    line: str, settings: list[str]
) -> None:
    assert [str(each) for each in Fragment("f", f"{line}\n").settings()] == settings


def test_a_choice_that_is_made_again_comes_last() -> None:
    fragments = [Fragment(text, f"CONFIG_{text}=y\n") for text in ("A", "B", "A")]
    assert [each.option for each in merge(fragments)] == ["CONFIG_B", "CONFIG_A"]


def test_a_number_is_the_same_in_either_case(tmp_path: Path) -> None:
    config = tmp_path / ".config"
    config.write_text("CONFIG_H=0x1f\n")
    assert find_unmet(config, (Fragment("f", "CONFIG_H=0X1F\n"),)) == []
    assert find_unmet(config, (Fragment("f", "CONFIG_H=0X2F\n"),)) != []


def test_an_unknown_kernel_is_told_with_the_known_ones() -> None:
    with pytest.raises(HarnessError, match="name one of stable, previous"):
        Kernel.find("newest")


def test_a_file_that_is_no_kernel_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(b"nothing" * 1000)
    with pytest.raises(HarnessError, match="is no bzImage"):
        Kernel.find(tmp_path / "bzImage")


VERSION = b"7.4.0-rc1+ (someone@somewhere) #7 SMP PREEMPT_DYNAMIC Sat Nov 21"


def make_image(version: bytes) -> bytes:
    image = bytearray(4096)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x300).to_bytes(2, "little")
    image[0x500 : 0x500 + len(version)] = version
    return bytes(image)


def test_a_ready_image_says_its_release_itself(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(make_image(VERSION))
    kernel = Kernel.find(tmp_path / "bzImage")
    assert kernel.release == "7.4.0-rc1+"
    assert (kernel.config, kernel.system_map, kernel.vmlinux) == (None, None, None)


@pytest.mark.parametrize(
    ("image", "config"), [("arch/x86/boot/bzImage", ".config"), ("bzImage", "config")]
)
def test_what_a_ready_image_was_made_of_is_found_where_its_build_left_it(
    tmp_path: Path, image: str, config: str
) -> None:
    path = tmp_path / image
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_image(VERSION))
    (tmp_path / config).write_text("CONFIG_KASAN=y\n")
    (tmp_path / "System.map").touch()
    builder, number = VERSION.split(b") ")
    banner = b"\0Linux version %s) (gcc 12) %s\n\0"
    (tmp_path / "vmlinux").write_bytes(banner % (builder, number))
    kernel = Kernel.find(path)
    assert (kernel.vmlinux, kernel.has("CONFIG_KASAN")) == (tmp_path / "vmlinux", True)
    assert kernel.system_map == tmp_path / "System.map"
    (tmp_path / "vmlinux").write_bytes(banner % (builder, number.replace(b"#7", b"#8")))
    assert Kernel.find(path).vmlinux is None, "linked again since"
    (tmp_path / "vmlinux").write_bytes(b"")
    assert Kernel.find(path).vmlinux is None, "the link failed"


def test_lines_of_configuration_are_for_what_is_built(tmp_path: Path, tree: Path) -> None:
    ready = tmp_path / "bzImage"
    ready.write_bytes(make_image(VERSION))
    words = ["--config=CONFIG_A=y", "--kernel", os.fspath(ready)]
    parser = argparse.ArgumentParser()
    options.add(parser.add_argument)
    alone = options.GuestOptions.of(parser.parse_args(words))
    with pytest.raises(HarnessError, match="cannot be configured with CONFIG_A=y"):
        alone.find_kernel()
    both = options.GuestOptions.of(parser.parse_args([*words, "--to", os.fspath(tree)]))
    assert both.find_kernel().release == "7.4.0-rc1+"
    built = both.find_next()
    assert built is not None
    assert built.has("CONFIG_A")


def test_tools_that_are_missing_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HarnessError, match="apt install gcc make flex bison bc lz4 xz-utils"):
        build.build(Tree(Path("/")), ())


def test_packages_are_named_where_there_is_no_apt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert packages.how_to_install(["a", "b"]) == "apt install a b"
    monkeypatch.setattr(packages, "_APT", tmp_path / "apt")
    assert packages.how_to_install(["a", "b"]).startswith("install what Debian calls a b;")


def test_a_full_disk_is_told_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(build, "NEEDED_SPACE", 1 << 60)
    with pytest.raises(HarnessError, match=r"GB of free space.*XDG_CACHE_HOME"):
        build.build(Tree(Path(__file__).parent), ())
    assert list((cache / "kernels").iterdir()) == []


def test_what_a_killed_build_left_is_swept_and_never_taken_for_a_kernel(
    cache: Path, tmp_path: Path
) -> None:
    leftover = cache / "kernels" / ".building-killed" / "result"
    leftover.mkdir(parents=True)
    (leftover / "bzImage").touch()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "Makefile").write_text("tinyconfig:\n\t@echo this tree is broken; exit 1\n")
    with pytest.raises(HarnessError, match="this tree is broken"):
        build.build(Tree(tree), ())
    assert list((cache / "kernels").iterdir()) == []


def test_a_trees_identity_follows_its_content(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "one")
    committed = Tree(tmp_path).identity
    assert Tree(tmp_path).identity == committed
    (tmp_path / "file").write_text("two")
    changed = Tree(tmp_path).identity
    (tmp_path / "new").write_text("three")
    assert len({committed, changed, Tree(tmp_path).identity}) == 3
