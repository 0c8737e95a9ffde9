"""Every struct, field and constant of `_uapi`, against the headers that a kernel installs.

The comparison is the compiler's: what it made of our declarations becomes static assertions on the
kernel's. And the other way round: what a kernel's header names, ours has too.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import pyluo
from pyluo._ffi import ffi, lib
from pyluo.vm import Kernel

UAPI = Path(pyluo.__file__).parent / "_uapi"
# Our file, and what of the kernel's header of that name it is about.
HEADERS = {
    "liveupdate.h": r"LIVEUPDATE_\w+",
    "memfd.h": r"MFD_\w+",
    "fcntl.h": r"F_(?:SEAL_\w+|(?:ADD|GET)_SEALS)",
    "kexec.h": r"KEXEC_\w+",
    "kvm.h": r"KVM_CREATE_(?:VM|GUEST_MEMFD)",
    "reboot.h": r"LINUX_REBOOT_\w+",
}
STRUCTS = {
    "liveupdate.h": r"liveupdate_\w+",
    "kexec.h": r"kexec_\w+",
    "kvm.h": r"kvm_create_guest_memfd",
}

pytestmark = [
    pytest.mark.parametrize("header", HEADERS),
    pytest.mark.parametrize("name", ["stable", "previous"]),
]


def test_our_declarations_are_the_kernels(name: str, header: str) -> None:
    compiled = compile_against(name, including(header, *assertions(header)))
    assert compiled.returncode == 0, compiled.stderr


def test_a_difference_of_one_byte_is_noticed(name: str, header: str) -> None:
    for assertion in assertions(header):
        wrong = re.sub(r"== (\d+)", lambda match: f"== {int(match[1]) + 1}", assertion)
        assert wrong != assertion
        complaint = compile_against(name, including(header, wrong)).stderr
        assert "static assertion failed" in complaint, assertion


def test_we_declare_all_that_the_kernel_does(name: str, header: str) -> None:
    macros = compile_against(name, including(header), "-E", "-dM").stdout
    text = (headers(name) / "linux" / header).read_text()
    wanted = set(re.findall(rf"^#define ({HEADERS[header]}) \S", macros, re.MULTILINE))
    wanted |= set(re.findall(rf"^\s+({HEADERS[header]})\s*(?:=.*)?,$", text, re.MULTILINE))
    assert wanted
    assert wanted - set(constants(header)) == set()
    if header in STRUCTS:
        in_kernel = set(re.findall(rf"^struct ({STRUCTS[header]}) {{", text, re.MULTILINE))
        assert in_kernel == set(structs(header))


def assertions(header: str) -> list[str]:
    """Static assertions that hold for a header exactly like ours."""
    lines = []
    for name in constants(header):
        lines.append(f'_Static_assert(({name}) == {getattr(lib, name)}, "{name}");')
    for name in structs(header):
        struct = f"struct {name}"
        lines.append(f'_Static_assert(sizeof({struct}) == {ffi.sizeof(struct)}, "{struct}");')
        for member, field in ffi.typeof(struct).fields:
            place = f"{struct}.{member}"
            value = f"(({struct} *)0)->{member}"
            size = ffi.sizeof(field.type)
            lines.append(
                f'_Static_assert(offsetof({struct}, {member}) == {field.offset}, "{place}");'
            )
            lines.append(f'_Static_assert(sizeof({value}) == {size}, "size of {place}");')
            if field.type.kind == "primitive":
                signed = int(field.type.cname.startswith("int"))
                lines.append(
                    f'_Static_assert(((__typeof__({value}))-1 < 0) == {signed}, "sign of {place}");'
                )
    return lines


def including(header: str, *lines: str) -> str:
    return "\n".join([f"#include <linux/{header}>", "#include <stddef.h>", *lines])


def constants(header: str) -> list[str]:
    text = (UAPI / header).read_text()
    return [
        name
        for name in re.findall(r"^#define (\w+) .", text, re.MULTILINE)
        if not name.startswith("PYLUO_")
    ]


def structs(header: str) -> list[str]:
    return re.findall(r"^struct (\w+) {", (UAPI / header).read_text(), re.MULTILINE)


def headers(name: str) -> Path:
    folder = Kernel.find(name).headers
    assert folder is not None
    return folder


def compile_against(name: str, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Compiles with the kernel's headers first; -nostdinc would lack stddef.h."""
    return subprocess.run(
        ["gcc", "-xc", "-fsyntax-only", *options, f"-I{headers(name)}", "-"],
        input=source,
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    )
