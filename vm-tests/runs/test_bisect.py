"""Run `git bisect run pyluo vm bisect` over a kernel tree with a history made for it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from deaths.provocations import make_endless_loop

from pyluo.vm import Kernel, cache
from tests.snippets import run_command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GUIDE, TUTORIAL = "docs/guides/bisection.md", "docs/tutorials/bisect-a-regression.md"
PYLUO = [sys.executable, "-m", "pyluo", "vm", "bisect"]
# Folders of which the kernel compiles no file: more than half of the tree.
UNUSED = (
    "Documentation", "drivers/gpu", "drivers/media", "drivers/net/ethernet",
    "drivers/net/wireless", "drivers/scsi", "drivers/staging", "sound", "tools/perf",
    "tools/testing",
)  # fmt: skip
# Options that the test does not need; they would take two thirds of the build. What depends on one
# of them has to be here as well: the harness would otherwise configure the kernel a dozen times, to
# find out which fragment is the reason that it is lost.
SMALL = (
    "VIRTUALIZATION", "KVM", "KVM_AMD", "KVM_INTEL",
    "IOMMU_SUPPORT", "INTEL_IOMMU", "INTEL_IOMMU_DEFAULT_ON", "IRQ_REMAP", "IOMMUFD",
    "VFIO", "VFIO_DEVICE_CDEV", "VFIO_PCI",
    "INET", "IPV6", "IPV6_SIT", "PACKET", "BRIDGE", "BRIDGE_VLAN_FILTERING", "VLAN_8021Q",
    "VETH", "DUMMY", "TUN", "VIRTIO_NET", "NETDEVICES",
    "EXT4_FS", "9P_FS_POSIX_ACL", "TMPFS_POSIX_ACL", "BLK_DEV", "BLK_DEV_LOOP",
    "BLK_DEV_LOOP_MIN_COUNT", "VIRTIO_BLK",
    "SWAP", "IO_URING", "AIO", "SYSVIPC", "POSIX_MQUEUE", "FHANDLE",
    "CGROUPS", "MEMCG", "NAMESPACES", "SECCOMP", "HUGETLBFS", "TRANSPARENT_HUGEPAGE",
    "ACPI", "PCIEPORTBUS", "RTC_CLASS", "MTRR", "X86_PAT", "X86_X2APIC", "HYPERVISOR_GUEST",
    "PARAVIRT", "KVM_GUEST", "VIRTIO_BALLOON", "HW_RANDOM", "HW_RANDOM_VIRTIO", "PREEMPT_DYNAMIC",
    "SOFTLOCKUP_DETECTOR", "HARDLOCKUP_DETECTOR", "DETECT_HUNG_TASK", "MAGIC_SYSRQ",
    "IKCONFIG", "IKCONFIG_PROC", "PROC_PAGE_MONITOR", "KEXEC_HANDOVER_DEBUGFS",
)  # fmt: skip
TEST = """
from pyluo import LiveUpdate, Memfd, Seal


def build():
    with LiveUpdate() as device:
        session = device.create_session("vm0")
    with Memfd.create("firmware", 4096, seals=Seal.WRITE | Seal.GROW | Seal.SHRINK) as memfd:
        session.preserve(memfd, 1)
    return session


def seals():
    with LiveUpdate() as device:
        session = device.retrieve_session("vm0")
    with session.retrieve(1, Memfd) as memfd:
        return memfd.seals


def test_seals_survive(vm):
    vm.hold(build)
    vm.live_update()
    assert vm.life.release.endswith("-bisected")
    assert vm.call(seals) == Seal.WRITE | Seal.GROW | Seal.SHRINK
"""
COMPLETE = "pyluo-complete"  # a file in .git which says that the whole tree was unpacked, and added
LUO = "mm/memfd_luo.c"
CORE = "kernel/liveupdate/luo_core.c"
SEALS = "memfd_add_seals(file, ser->seals)"
# The change of each commit: a file, a text in it, and its replacement; an empty text stands for the
# end of the file.
HISTORY = {
    "say something at the end of luo_core": (CORE, "", "/* one */"),
    "forget a semicolon": (CORE, "/* one */", "static int pyluo_forgot_it"),
    "put it back": (CORE, "static int pyluo_forgot_it", "/* two */"),
    "tidy the seals": (LUO, SEALS, "memfd_add_seals(file, 0)"),
    "say something else": (CORE, "/* two */", "/* three */"),
}
BRANCH = f"history-{hashlib.sha256(repr(HISTORY).encode()).hexdigest()[:8]}"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in the cache that keeps the tree and its object files between runs.

    Its name contains the identity of the source package; folders of other packages are removed.
    """
    source = Kernel.find("stable").source
    assert source is not None
    path = cache.folder() / f"bisected-{source.identity[:16]}"
    with cache.lock("bisected", lambda: None):
        for other in cache.folder().glob("bisected-*/"):
            if other != path:
                shutil.rmtree(other)
        path.mkdir(exist_ok=True)
        # Each run must build the kernels themselves.
        shutil.rmtree(path / "cache" / "pyluo" / "kernels", ignore_errors=True)
        yield path


@pytest.fixture(scope="module")
def tree(folder: Path) -> Path:
    """The source of the kernel `stable`, in a repository that has only the files of HISTORY."""
    path = folder / "linux"
    if not (path / ".git" / COMPLETE).exists():
        unpack_tree(path)
    git(path, "bisect", "reset")  # a killed run may not have done so
    if BRANCH not in git(path, "branch", "--format=%(refname:short)").split():
        make_history(path)
    git(path, "checkout", "--quiet", "--force", BRANCH)
    return path


def unpack_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    source = Kernel.find("stable").source
    assert source is not None
    source.unpack(path)
    for folder in UNUSED:
        for file in (path / folder).rglob("*.[ch]"):
            file.unlink()
    git(path, "init", "--quiet")
    (path / ".git" / "info" / "exclude").write_text("*\n")
    git(path, "add", "--force", CORE, LUO)
    git(path, "commit", "--quiet", "--message", "the kernel as it is")
    (path / ".git" / COMPLETE).touch()


def make_history(path: Path) -> None:
    """Make the branch of HISTORY, which begins with the kernel as it is."""
    root = git(path, "rev-list", "--max-parents=0", "--all").strip()
    git(path, "checkout", "--quiet", "--force", "--detach", root)
    for message, (name, old, new) in HISTORY.items():
        file = path / name
        text = file.read_text()
        if old:
            assert text.count(old) == 1, (name, old)
        file.write_text(text.replace(old, new) if old else f"{text}{new}\n")
        git(path, "commit", "--quiet", "--all", "--message", message)
    git(path, "branch", BRANCH)


def git(tree: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "gc.auto=0"]
    command = ["git", "-C", os.fspath(tree), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# The Makefile of a tree that is built in no time, from an image beside it.
MAKEFILE = """
tinyconfig:
	touch $(O)/.config
olddefconfig:
bzImage:
	mkdir -p $(O)/arch/x86/boot
	cp ../image $(O)/arch/x86/boot/bzImage
	touch $(O)/System.map
vmlinux:
	touch $(O)/vmlinux
headers_install:
	mkdir -p $(INSTALL_HDR_PATH)/include
"""


@pytest.mark.parametrize(("words", "status"), [([], 125), (["--unbootable=bad"], 1)])
def test_a_kernel_that_does_not_boot_is_told_though_guests_boot_another_one(
    tmp_path: Path, words: list[str], status: int
) -> None:
    stable = Kernel.find("stable").image
    (tmp_path / "image").write_bytes(make_endless_loop(stable.read_bytes()))
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "Makefile").write_text(MAKEFILE)
    (tree / "Kbuild").touch()
    (tmp_path / "test_it.py").write_text("def test_passes(): pass\n")
    done = subprocess.run(
        [*PYLUO, f"--from={stable}", "--boot-timeout=5", *words, "../test_it.py"],
        cwd=tree,
        env=os.environ | {"XDG_CACHE_HOME": os.fspath(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "it does not boot: never spoke" in done.stdout


def test_the_culprit_is_found_though_a_commit_does_not_compile(folder: Path, tree: Path) -> None:
    (folder / "test_seals.py").write_text(TEST)
    small = (f"# CONFIG_{option} is not set\n" for option in SMALL)
    (folder / "small.config").write_text("".join(small))
    config = ["--config=../small.config", '--config=CONFIG_LOCALVERSION="-bisected"']

    step = f"vm bisect {shlex.join(config)} --limit=600"
    run = functools.partial(
        run_command, cwd=tree, env={"XDG_CACHE_HOME": os.fspath(folder / "cache")}
    )
    begun = run(GUIDE, 0, {"BAD": "HEAD", "GOOD": f"HEAD~{len(HISTORY)}"})
    assert begun.returncode == 0, begun.stderr
    found = run(GUIDE, 1, {"vm bisect": step, "~/tests/": "../"})
    assert found.returncode == 0, found.stdout + found.stderr
    assert "because of a later fragment" not in found.stdout + found.stderr
    log = git(tree, "bisect", "log")
    marks = re.findall(r"^# (good|bad|skip): \[\w+\] (.*)$", log, re.MULTILINE)
    culprit = re.search(r"^# first bad commit: \[\w+\] (.*)$", log, re.MULTILINE)
    assert culprit, log
    assert culprit[1] == "tidy the seals", found.stdout
    assert ("skip", "forget a semicolon") in marks
    names = list(HISTORY)
    for mark, message in marks:
        if message in names and mark != "skip":
            assert (mark == "bad") == (names.index(message) >= names.index("tidy the seals"))
    # One step by hand, and the test alone, as the tutorial does; the kernel is built already.
    git(tree, "checkout", "--quiet", "bisect/bad")
    in_tutorial = {"~/tests/test_ram.py": "../test_seals.py"}
    tried = run(TUTORIAL, 1, {"vm bisect": step, **in_tutorial})
    assert re.search(r"^pyluo: Linux \S+-bisected is bad.*\n1\n$", tried.stdout, re.MULTILINE), (
        tried
    )
    kernels = (folder / "cache" / "pyluo" / "kernels").glob("*/")
    image = max(kernels, key=lambda kernel: kernel.stat().st_mtime) / "bzImage"  # the last one used
    tested = run(TUTORIAL, 0, {"--pyluo-kernel .": f"--pyluo-kernel {image}", **in_tutorial})
    assert tested.returncode == 1, tested.stdout
    assert re.search("^E .*Seal", tested.stdout, re.MULTILINE), tested.stdout
