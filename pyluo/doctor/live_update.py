"""Is the running kernel, and the system on it, ready for a live update?"""

from __future__ import annotations

import os
import re
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pyluo import guards, kho
from pyluo.build_config import BuildConfig
from pyluo.doctor.check import Check, Verdict
from pyluo.keepers.systemd import systemd_is_running
from pyluo.liveupdate import DEVICE
from pyluo.memfd import forbids_executable_memfds

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_live_update"]

_MIB = 1 << 20
_LITTLE_MEMORY = 64 * _MIB  # bytes that can still be preserved
_USUAL_FILES = 1024  # the usual limit of open files
_KEEPS_SESSIONS = 261  # the first version of systemd that carries them over `systemctl kexec`
_LOAD_DISABLED = Path("/proc/sys/kernel/kexec_load_disabled")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
# What only some users need, and why.
_OPTIONS = {
    "CONFIG_IOMMUFD": "devices of VMs",
    "CONFIG_VFIO_DEVICE_CDEV": "devices of VMs",
    "CONFIG_KVM": "VMs",
    "CONFIG_MEMCG": "refusing what a memory cgroup has no room for",
    "CONFIG_TUN": "networks of VMs",
}


def check_live_update() -> Iterator[Check]:
    """Check what a live update of this system needs, from what everybody needs to what few do.

    Nothing is opened, loaded or changed.
    """
    status = kho.status()
    yield from _check_kernel(status)
    yield _check_device()
    if status.live_update:
        yield _check_memory()
    yield _check_loading()
    yield _check_memfds()
    yield _check_files()
    yield _check_locked_memory()
    yield from _check_options()
    yield _check_iommu()
    yield _check_kvm()
    yield _check_systemd()


def _check_kernel(status: kho.KhoStatus) -> Iterator[Check]:
    if status.live_update:
        yield Check("kernel", Verdict.READY, f"Linux {status.release} has live update")
    for obstacle in status.obstacles:
        yield Check("kernel", Verdict.MISSING, obstacle.missing, obstacle.remedy)


def _check_device() -> Check:
    subject = "access to the device"
    if not os.path.exists(DEVICE):
        return Check(subject, Verdict.MISSING, f"there is no {DEVICE}", "see the kernel, above")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        remedy = "be root, or have an agent create sessions: see `pyluo update serve`"
        return Check(subject, Verdict.MISSING, f"this user may not open {DEVICE}", remedy)
    return Check(subject, Verdict.READY, f"this user may open {DEVICE}")


def _check_memory() -> Check:
    room = max(guards.preservable_memory() - guards.RESERVE, 0)
    verdict = Verdict.READY if room >= _LITTLE_MEMORY else Verdict.LIMITED
    remedy = "" if room >= _LITTLE_MEMORY else "free memory, or boot with a smaller kho_scratch="
    return Check("memory", verdict, f"about {room // _MIB} MiB more can be preserved", remedy)


def _check_loading() -> Check:
    subject = "loading the next kernel"
    if os.geteuid():
        remedy = "be root, or have CAP_SYS_BOOT"
        return Check(subject, Verdict.LIMITED, "this user is not root", remedy)
    if _read(_LOAD_DISABLED) == "1":
        remedy = "boot again: a kernel does not allow it again once it is disabled"
        return Check(subject, Verdict.MISSING, "kernel.kexec_load_disabled is 1", remedy)
    mode = re.search(r"\[(\w+)\]", _read(_LOCKDOWN))
    if mode is not None and mode[1] != "none":
        remedy = "sign the next kernel with a key that this one trusts; see kernel_lockdown(7)"
        return Check(subject, Verdict.LIMITED, f"the kernel is locked down: {mode[1]}", remedy)
    return Check(subject, Verdict.READY, "allowed")


def _check_memfds() -> Check:
    if forbids_executable_memfds():
        remedy = "sysctl vm.memfd_noexec=1, until a kernel keeps their mode"
        return Check("memfds", Verdict.MISSING, "vm.memfd_noexec=2 rules them out", remedy)
    return Check("memfds", Verdict.READY, "vm.memfd_noexec allows them")


def _check_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdict = Verdict.READY if hard >= _USUAL_FILES else Verdict.LIMITED
    found = f"{_number(soft)} at once, and up to {_number(hard)} if a process asks for more"
    remedy = "" if verdict is Verdict.READY else "LimitNOFILE= of the unit, or limits.conf(5)"
    return Check("open files", verdict, found, remedy)


def _check_locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or not os.geteuid():
        return Check("memory for DMA", Verdict.READY, "not limited for this process")
    found = f"RLIMIT_MEMLOCK limits what devices can reach to {soft // _MIB} MiB"
    return Check("memory for DMA", Verdict.LIMITED, found, "LimitMEMLOCK=infinity, or prlimit(1)")


def _check_options() -> Iterator[Check]:
    config = BuildConfig.running()
    if config is None:
        found = "the kernel's configuration cannot be read"
        yield Check(
            "kernel options", Verdict.LIMITED, found, "build it with CONFIG_IKCONFIG_PROC=y"
        )
        return
    lines = set(config.text.splitlines())
    absent = [name for name in _OPTIONS if not {f"{name}=y", f"{name}=m"} & lines]
    if not absent:
        yield Check("kernel options", Verdict.READY, f"it has {', '.join(_OPTIONS)}")
    for name in absent:
        found = f"the kernel was built without {name}, for {_OPTIONS[name]}"
        yield Check("kernel options", Verdict.LIMITED, found, f"build it with {name}=y")


def _check_iommu() -> Check:
    units = sorted(path.name for path in Path("/sys/class/iommu").glob("*"))
    if units and Path("/dev/iommu").exists():
        return Check("IOMMU", Verdict.READY, f"{', '.join(units)}, and /dev/iommu")
    found = "no IOMMU is in use" if not units else "there is no /dev/iommu"
    remedy = "switch it on in the firmware and by intel_iommu=on; load the module iommufd"
    return Check("IOMMU", Verdict.LIMITED, f"{found}: VMs can have no devices", remedy)


def _check_kvm() -> Check:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Check("KVM", Verdict.READY, "this user may open /dev/kvm")
    found = "there is no /dev/kvm" if not Path("/dev/kvm").exists() else "this user may not open it"
    remedy = "switch virtualization on in the firmware, load the module, be in the group kvm"
    return Check("KVM", Verdict.LIMITED, found, remedy)


def _check_systemd() -> Check:
    subject = "systemd"
    if not systemd_is_running():
        found = "it is not the first process: a holder process keeps sessions, pyluo itself jumps"
        return Check(subject, Verdict.READY, found)
    match = re.match(r"systemd (\d+)", _ask_systemctl("--version")[1])
    if match is None:
        return Check(subject, Verdict.LIMITED, "its version is unknown", "see systemctl --version")
    version = int(match[1])
    if version < _KEEPS_SESSIONS:
        found = f"version {version} loses the sessions of services at `systemctl kexec`"
        remedy = f"use {_KEEPS_SESSIONS} or newer, or jump by `pyluo kexec reboot`"
        return Check(subject, Verdict.LIMITED, found, remedy)
    found = f"version {version} carries the sessions of services over `systemctl kexec`"
    remedy = "" if _serves() else "their units need what docs/guides/stores.md says under Keepers"
    return Check(subject, Verdict.READY, f"{found}; {_describe_coordinator()}", remedy)


def _describe_coordinator() -> str:
    return "pyluo-update.service runs" if _serves() else "pyluo-update.service does not run"


def _serves() -> bool:
    return _ask_systemctl("is-active", "--quiet", "pyluo-update.service")[0] == 0


def _ask_systemctl(*words: str) -> tuple[int, str]:
    """Return the status and the output of systemctl; 127 and nothing if there is none."""
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    except OSError:
        return 127, ""
    return done.returncode, done.stdout


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)
