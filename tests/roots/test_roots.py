"""Tests of finding roots, of their names in the cache, and of units for them; none makes a root."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from pyluo.cli import main
from pyluo.vm import VM, HarnessError, Root
from pyluo.vm.machine.userland import RootUserland
from pyluo.vm.roots import build
from pyluo.vm.roots.catalogue import RootSpec, catalogue

VERSIONS = {"systemd": "262.1-1", "python3": "3.14.8-1"}
SPEC = RootSpec("r", ("sid",), ("systemd", "python3"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    return tmp_path / "cache" / "pyluo"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of an operating system, as far as pyluo looks."""
    folder = tmp_path / "root"
    for name in (
        "usr/bin/sh", "usr/bin/mount", "usr/bin/python3", "usr/lib/systemd/systemd",
        "usr/lib/python3/dist-packages/_cffi_backend.cpython-314-x86_64-linux-gnu.so",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def make_userland(root: Path, units: dict[str, str]) -> RootUserland:
    return RootUserland(Root.find(root), False, units)


def test_each_root_of_the_catalogue_has_what_a_guest_needs() -> None:
    assert "sid" in catalogue()
    for spec in catalogue().values():
        assert {"systemd", "mount", "python3", "python3-cffi-backend"} <= set(spec.packages)
        assert spec.suites


def test_an_unknown_root_is_told_with_the_known_ones() -> None:
    with pytest.raises(HarnessError, match="there is no root 'woody': name one of sid"):
        Root.find("woody")
    with pytest.raises(HarnessError, match="there is no root '/tmp': name one of sid"):
        Root.build("/tmp")


def test_the_command_tells_of_an_unknown_root(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "root", "build", "woody"]) == 69
    assert "name one of sid" in capsys.readouterr().err


def test_what_a_folder_lacks_is_told_by_the_packages_that_have_it(root: Path) -> None:
    assert Root.find(root) == Root(os.fspath(root), root)
    (root / "usr/lib/systemd/systemd").unlink()
    next((root / "usr/lib/python3/dist-packages").iterdir()).unlink()
    with pytest.raises(HarnessError, match="lacks what Debian has in systemd, python3-cffi-backen"):
        Root.find(root)


def test_a_root_is_remembered_until_an_update_or_a_change_of_its_description(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newer = VERSIONS | {"systemd": "263-1"}
    answers = iter([VERSIONS, newer, newer])
    monkeypatch.setattr(build, "_resolve", lambda _: next(answers))
    monkeypatch.setattr(build, "_check_tools", lambda: None)
    folders = [build._folder(SPEC, versions) for versions in (VERSIONS, newer)]
    for folder in folders:
        folder.mkdir(parents=True)
    found = [build.build(SPEC, update=update) for update in (False, False, True, False)]
    assert found == [folders[0], folders[0], folders[1], folders[1]]
    assert build.build(dataclasses.replace(SPEC, packages=("systemd",)), update=False) == folders[1]
    folders[1].rmdir()
    with pytest.raises(StopIteration):  # it asks again, as the folder that it remembers is gone
        build.build(SPEC, update=False)


def test_the_versions_in_a_root_make_its_name_in_the_cache(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "Package: systemd\nStatus: install ok installed\nVersion: 262.1-1\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: python3\nStatus: install ok installed\nVersion: 3.14.8-1\n"
    )
    versions = build._read_installed(tmp_path)
    assert versions == VERSIONS
    assert build._folder(SPEC, versions) == build._folder(SPEC, dict(reversed(VERSIONS.items())))
    assert build._folder(SPEC, versions) != build._folder(SPEC, {"systemd": "262.1-1"})


def test_what_is_missing_to_make_a_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HarnessError, match="needs mmdebstrap"):
        build.build(SPEC, update=False)


def test_what_apt_would_install_is_read_from_a_simulation() -> None:
    said = (
        "Inst libc6 (2.43-7 Debian:unstable [amd64])\n"
        "Inst base-files [1] (14.3 Debian:unstable, Debian:testing [amd64]) []\n"
        "Conf libc6 (2.43-7 Debian:unstable [amd64])\n"
    )
    assert dict(build._INSTALLED.findall(said)) == {"libc6": "2.43-7", "base-files": "14.3"}


def test_units_are_wanted_by_what_their_install_section_says(root: Path) -> None:
    unit = (
        "[Service]\nExecStart=a\nExecStart=b %i\n"
        "[Install]\nWantedBy=basic.target multi-user.target\n"
    )
    files = make_userland(root, {"vmm.service": unit, "vmm.service.d/x.conf": "[Unit]\n"}).files
    assert files is not None
    assert files["systemd/system/vmm.service"] == unit
    assert files["systemd/system/vmm.service.d/x.conf"] == "[Unit]\n"
    for target in ("basic", "multi-user"):
        drop_in = files[f"systemd/system/{target}.target.d/vmm.service.conf"]
        assert drop_in == "[Unit]\nWants=vmm.service\n"


def test_a_unit_that_is_none_is_told_by_its_name(root: Path) -> None:
    with pytest.raises(HarnessError, match=r"the unit vmm\.service cannot be read"):
        make_userland(root, {"vmm.service": "ExecStart=a\n"})
    with pytest.raises(ValueError, match="which has systemd"):
        VM(units={"vmm.service": ""})


def test_a_guest_finds_the_hosts_files_but_not_the_library_of_its_python(root: Path) -> None:
    userland = make_userland(root, {})
    assert userland.path("/srv/x") == Root.host_path("/srv/x") == "/run/initramfs/host/srv/x"
    assert Root.host_path(Path.cwd()) in userland.import_path() + userland.imported_folders()
    assert Root.host_path(os.path.dirname(os.__file__)) not in userland.import_path()
