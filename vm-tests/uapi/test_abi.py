"""Compare every struct, field and constant of `_uapi` with the headers that a kernel installs.

The layout and the values that the compiler gave our declarations become static assertions about the
kernel's. Conversely, what a kernel's header declares must be declared in ours too.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pyluo
from pyluo._ffi import ffi, lib
from pyluo.vm import Kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

UAPI = Path(pyluo.__file__).parent / "_uapi"
# Our headers whose names differ from the kernel's, in linux/.
KERNEL_HEADERS = {"kvm_x86.h": "asm/kvm.h"}
# Our headers, and the names that each takes from the kernel's header of the same name.
HEADERS = {
    "liveupdate.h": r"LIVEUPDATE_\w+",
    "memfd.h": r"MFD_\w+",
    "fcntl.h": r"F_(?:SEAL_\w+|(?:ADD|GET)_SEALS)",
    "iommufd.h": r"IOMMU(?:FD)?_\w+",
    "kexec.h": r"KEXEC_\w+",
    "kvm.h": (
        r"KVM_DEV_(?:TYPE_VFIO|VFIO_FILE\w*)|KVM_API_VERSION|KVM_EXIT_\w+|KVM_MP_STATE_\w+|KVM_CLOCK_\w+|KVM_MEM_(?:LOG|READ)\w+"
        r"|KVM_IRQFD(?:_FLAG_\w+)?"
        r"|KVM_CREATE_(?:VM|VCPU|IRQCHIP|PIT2|GUEST_MEMFD|DEVICE)|KVM_(?:RUN|CHECK_EXTENSION|IRQ_LINE)"
        r"|KVM_GET_(?:API_VERSION|VCPU_MMAP_SIZE|MSR_INDEX_LIST|SUPPORTED_CPUID|XSAVE2|DEVICE_ATTR)"
        r"|KVM_SET_(?:USER_MEMORY_REGION|TSS_ADDR|DEVICE_ATTR)|KVM_HAS_DEVICE_ATTR|KVM_KVMCLOCK_CTRL"
        r"|KVM_[GS]ET_(?:IRQCHIP|PIT2|CLOCK|REGS|SREGS2|MSRS|LAPIC|CPUID2|MP_STATE|VCPU_EVENTS"
        r"|DEBUGREGS|TSC_KHZ|XSAVE|XCRS)"
        r"|KVM_CAP_(?:IRQCHIP|SET_TSS_ADDR|NR_VCPUS|MP_STATE|PIT2|ADJUST_CLOCK|VCPU_EVENTS|DEBUGREGS"
        r"|XSAVE2?|XCRS|TSC_CONTROL|GET_TSC_KHZ|MAX_VCPUS|KVMCLOCK_CTRL|IMMEDIATE_EXIT|SREGS2)"
    ),
    "kvm_x86.h": (
        r"KVM_(?:NR_)?IRQCHIP\w+|KVM_SREGS2_\w+|KVM_APIC_REG_SIZE|KVM_CPUID_FLAG_SIGNIFCANT_INDEX"
        r"|KVM_VCPUEVENT_\w+|KVM_VCPU_TSC_\w+"
    ),
    "if.h": r"IFNAMSIZ",
    "if_tun.h": r"TUNSET(?:IFF|PERSIST|OWNER|GROUP)|IFF_(?:TUN|TAP|MULTI_QUEUE|NO_PI|VNET_HDR)",
    "mempolicy.h": r"MPOL_\w+",
    "mman.h": r"MAP_(?:FIXED|NORESERVE)|MADV_(?:HUGEPAGE|POPULATE_\w+)",
    "pci_regs.h": (
        r"PCI_(?:CFG_SPACE_\w+|STD_\w+|(?:VENDOR|DEVICE)_ID|COMMAND\w*|STATUS\w*|CLASS_REVISION"
        r"|HEADER_TYPE\w*|BASE_ADDRESS_\w+|SUBSYSTEM_\w+|CAPABILITY_LIST|INTERRUPT_\w+"
        r"|CAP_LIST_(?:ID|NEXT)|(?:EXT_)?CAP_ID_\w+)"
    ),
    "reboot.h": r"LINUX_REBOOT_\w+",
    "vfio.h": r"_*VFIO_\w+",
}
STRUCTS = {
    "iommufd.h": r"\w+",
    "liveupdate.h": r"liveupdate_\w+",
    "if.h": r"ifmap|ifreq",
    "kexec.h": r"kexec_\w+",
    "kvm.h": (
        r"kvm_(?:create_guest_memfd|create_device|userspace_memory_region|irq_level|irqfd|irqchip|pit_config|run"
        r"|mp_state|clock_data|device_attr)"
    ),
    "kvm_x86.h": (
        r"kvm_(?:regs|segment|dtable|sregs2|lapic_state|msr_entry|msrs|msr_list|cpuid_entry2|cpuid2"
        r"|pit_channel_state|pit_state2|vcpu_events|debugregs|xsave|xcrs?)"
    ),
    "vfio.h": r"\w+",
}
# The names among these that we leave out, and why.
LEFT_OUT = {
    "mempolicy.h": {
        r"MPOL_MAX": "a count that grows",
        r"MPOL_(?:F|MF)_\w+|MPOL_\w+_FLAGS": "flags, none of which the RAM of a guest needs",
    },
    "kvm.h": {
        r"KVM_EXIT_HYPERCALL_\w+|KVM_EXIT_(?:HYPERV|XEN)_\w+": "of calls that a VMM must ask for",
        r"KVM_EXIT_ARM_SEA_FLAG_\w+": "of arm64",
    },
    "pci_regs.h": {
        r"PCI_(?:EXT_)?CAP_ID_M(?:AX|ASK)": "a count that grows, and a mask that nobody needs",
        r"PCI_BASE_ADDRESS_(?:MEM|IO)_MASK": "complements of what is declared",
    },
    "vfio.h": {
        r"VFIO_(?:API_VERSION|GET_API_VERSION|CHECK_EXTENSION|SET_IOMMU)": "of containers",
        r"VFIO_(?:\w+_IOMMU|EEH|UNMAP_ALL|UPDATE_VADDR)|__VFIO_\w+": "extensions of containers",
        r"VFIO_GROUP_\w+|vfio_group_\w+": "groups, of which there are none on the cdev path",
        r"VFIO_(?:IOMMU|DMA)_\w+|vfio_(?:iommu_\w+|bitmap|iova_range)": "type1 and sPAPR IOMMUs",
        r"VFIO_EEH_\w+|vfio_eeh_\w+": "error handling of POWER",
        r"VFIO_(?:CCW|AP)_\w+|VFIO_REGION_SUBTYPE_CCW_\w+": "devices of s390 that are not PCI",
        r"VFIO_DEVICE_API_\w+_STRING": "names in sysfs of mediated devices, which are no numbers",
        r"VFIO_GFX_\w+|VFIO_DEVICE_(?:GFX_\w+|QUERY_GFX_PLANE|GET_GFX_DMABUF)"
        r"|vfio_(?:region_gfx_edid|device_gfx_plane_info)": "framebuffers of mediated devices",
        r"VFIO_DEVICE_STATE_(?:V1_\w+|MASK)|vfio_device_migration_info": "the first migration API",
        r"VFIO_REGION_INFO_CAP_NVLINK2_\w+|vfio_region_info_cap_nvlink2_\w+": "no kernel gives it",
    },
}
# The release that added a name: older kernels must lack it, and all later ones must have it.
SINCE = {
    "iommufd.h": {
        "IOMMUFD_CMD_IOAS_NOIOMMU_GET_PA": (7, 3),
        "IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI": (7, 3),
        "IOMMU_IOAS_NOIOMMU_GET_PA": (7, 3),
        "iommu_ioas_noiommu_get_pa": (7, 3),
    },
    "vfio.h": {
        "VFIO_DEVICE_FEATURE_ZPCI_ERROR": (7, 3),
        "vfio_device_feature_zpci_err": (7, 3),
    },
}

pytestmark = [
    pytest.mark.parametrize("header", HEADERS),
    pytest.mark.parametrize("name", ["stable", "previous"]),
]


def test_our_declarations_are_the_kernels(name: str, header: str) -> None:
    compiled = compile_against(name, including(header, *assertions(name, header)))
    assert compiled.returncode == 0, compiled.stderr


def test_a_difference_of_one_byte_is_noticed(name: str, header: str) -> None:
    wrong = [
        re.sub(r"== (-?\d+)", lambda match: f"== {int(match[1]) + 1}", assertion)
        for assertion in assertions(name, header)
    ]
    assert not set(wrong) & set(assertions(name, header))
    complaints = compile_against(name, including(header, *wrong)).stderr
    noticed = re.findall(r'static assertion failed: "(.*)"', complaints)
    assert noticed == [re.findall(r', "(.*)"\);', assertion)[0] for assertion in wrong]


def test_we_declare_all_that_the_kernel_does(name: str, header: str) -> None:
    wanted = {one for one in declared(name, header) if not left_out(header, one)}
    assert wanted
    assert wanted - ours(header) == set()


def test_what_is_left_out_is_there_to_be_left_out(name: str, header: str) -> None:
    for pattern, reason in LEFT_OUT.get(header, {}).items():
        assert reason
        assert [one for one in declared(name, header) if re.fullmatch(pattern, one)], pattern
        assert not [one for one in ours(header) if re.fullmatch(pattern, one)], pattern


def test_a_kernel_lacks_what_is_newer_than_it_and_nothing_else(name: str, header: str) -> None:
    lacking = ours(header) - declared(name, header)
    newer = {one for one, since in SINCE.get(header, {}).items() if release(name) < since}
    assert lacking == newer


def assertions(name: str, header: str) -> list[str]:
    """Return static assertions that hold for a kernel's header if it agrees with ours."""
    lacking = {one for one, since in SINCE.get(header, {}).items() if release(name) < since}
    lines = []
    for constant in constants(header):
        if constant not in lacking:
            value = getattr(lib, constant)
            lines.append(f'_Static_assert(({constant}) == {value}, "{constant}");')
    for struct in structs(header):
        if struct not in lacking:
            lines += struct_assertions(f"struct {struct}")
    return lines


def struct_assertions(struct: str) -> list[str]:
    lines = [f'_Static_assert(sizeof({struct}) == {ffi.sizeof(struct)}, "{struct}");']
    for member, offset, kind in members(ffi.typeof(struct)):
        place = f"{struct}.{member}"
        value = f"(({struct} *)0)->{member}"
        lines.append(f'_Static_assert(offsetof({struct}, {member}) == {offset}, "{place}");')
        if kind.kind == "array" and kind.length is None:  # a flexible array member has no size
            kind, value = kind.item, f"{value}[0]"
        lines.append(f'_Static_assert(sizeof({value}) == {ffi.sizeof(kind)}, "size of {place}");')
        if kind.kind == "primitive":
            signed = int(kind.cname.startswith("int"))
            lines.append(
                f'_Static_assert(((__typeof__({value}))-1 < 0) == {signed}, "sign of {place}");'
            )
    return lines


def members(kind: Any, prefix: str = "", start: int = 0) -> Iterator[tuple[str, int, Any]]:
    """Yield the members of a struct, and of the structs without a tag in it, with their offsets."""
    for member, field in kind.fields:
        offset = start + field.offset
        if member:
            yield prefix + member, offset, field.type
        if field.type.kind in ("struct", "union") and is_untagged(field.type):
            yield from members(field.type, f"{prefix}{member}." if member else prefix, offset)


def is_untagged(kind: Any) -> bool:
    return "$" in kind.cname  # cffi's names for them: struct $1


def kernel_header(header: str) -> str:
    return KERNEL_HEADERS.get(header, f"linux/{header}")


def including(header: str, *lines: str) -> str:
    # linux/if_tun.h does not include what its ioctls are made of.
    needed = ["#include <stddef.h>", "#include <linux/ioctl.h>"]
    return "\n".join([*needed, f"#include <{kernel_header(header)}>", *lines])


def constants(header: str) -> list[str]:
    text = (UAPI / header).read_text()
    return [
        name
        for name in re.findall(r"^#define (\w+) .", text, re.MULTILINE)
        if not name.startswith("PYLUO_")
    ]


def structs(header: str) -> list[str]:
    return re.findall(r"^struct (\w+) {", (UAPI / header).read_text(), re.MULTILINE)


def ours(header: str) -> set[str]:
    return {*constants(header), *structs(header)}


def declared(name: str, header: str) -> set[str]:
    """Return the macros, members of enums and structs that a kernel's header declares."""
    macros = compile_against(name, including(header), "-E", "-dM").stdout
    text = re.sub(
        r"/\*.*?\*/", "", (headers(name) / kernel_header(header)).read_text(), flags=re.DOTALL
    )
    found = set(re.findall(rf"^#define ({HEADERS[header]}) \S", macros, re.MULTILINE))
    for members in re.findall(r"^enum\s*\w*\s*{(.*?)}", text, re.MULTILINE | re.DOTALL):
        found |= set(re.findall(rf"^\s*({HEADERS[header]})\b", members, re.MULTILINE))
    if header in STRUCTS:
        found |= set(re.findall(rf"^struct ({STRUCTS[header]}) {{", text, re.MULTILINE))
    return found


def left_out(header: str, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in LEFT_OUT.get(header, {}))


def release(name: str) -> tuple[int, int]:
    major, minor = Kernel.find(name).release.split(".")[:2]
    return int(major), int(re.match(r"\d+", minor)[0])  # type: ignore[index]


def headers(name: str) -> Path:
    folder = Kernel.find(name).headers
    assert folder is not None
    return folder


def compile_against(name: str, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Compile with the kernel's headers first; -nostdinc would leave out stddef.h."""
    return subprocess.run(
        ["gcc", "-xc", "-fsyntax-only", *options, f"-I{headers(name)}", "-"],
        input=source,
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    )
