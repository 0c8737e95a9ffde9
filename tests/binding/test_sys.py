"""Tests of the funnel to the kernel: of the values that go in, and of the errno that comes out."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import Memfd, RequestError
from pyluo._ffi import ffi
from pyluo._sys import FdNumber, Ioctl, PlainIoctl, Struct
from pyluo.descriptor import fileno_of
from pyluo.iommufd import IovaRange

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

ROOT = Path(__file__).parents[2]
_, NAMES, _ = ffi.list_types()


def integer_fields() -> Iterator[tuple[str, str, int, bool]]:
    """Yield each integer field of each struct: both names, its bits, and whether it has a sign."""
    for name in NAMES:
        for field, described in ffi.typeof(f"struct {name}").fields or ():
            kind = described.type
            if kind.kind == "primitive":
                signed = int(ffi.cast(kind, -1)) < 0
                yield name, field, 8 * ffi.sizeof(kind), signed


FIELDS = list(integer_fields())


def test_the_structs_have_fields_to_test() -> None:
    assert {"iommu_ioas_map_file", "liveupdate_session_preserve_fd", "vfio_irq_set"} <= {
        name for name, *_ in FIELDS
    }


@given(st.sampled_from(FIELDS), st.integers(-(1 << 70), 1 << 70))
def test_an_integer_goes_into_a_field_as_it_is_or_not_at_all(
    field: tuple[str, str, int, bool], value: int
) -> None:
    struct, name, bits, signed = field
    least, limit = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    if least <= value < limit:
        assert Struct(struct).unpack(Struct(struct).pack(**{name: value})).integer(name) == value
    else:
        with pytest.raises(ValueError, match=f"{name} of struct {struct}"):
            Struct(struct).pack(**{name: value})


@pytest.mark.parametrize("value", [1 << 64, -1, 1 << 200])
def test_an_ioctl_whose_values_do_not_fit_is_not_made(value: int) -> None:
    ioctl = Ioctl("IOMMU_IOAS_MAP", "iommu_ioas_map", RequestError)
    with pytest.raises(ValueError, match="iova of struct iommu_ioas_map"):
        ioctl.attempt(-1, iova=value)
    assert not ioctl.prepare(iova=0).succeeded
    assert ioctl.attempt(-1, iova=0).errno == errno.EBADF


@pytest.mark.parametrize("number", [1 << 31, 1 << 64, -(1 << 31) - 1])
def test_what_cannot_be_a_descriptor_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="not the number of a descriptor"):
        fileno_of(number)


@given(st.integers(-10, 1 << 65), st.integers(-10, 1 << 65))
def test_a_range_of_iovas_has_64_bits_and_is_not_empty(start: int, last: int) -> None:
    if 0 <= start <= last < 1 << 64:
        assert IovaRange(start, last).length == last - start + 1
    else:
        with pytest.raises(ValueError, match="is not a range"):
            IovaRange(start, last)


def _close_nothing() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        FdNumber(1 << 20).close()


def test_an_errno_is_that_of_the_call_though_another_call_fails_before_it_is_read() -> None:
    """As a signal handler would: after every instruction, another call fails differently."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if "_sys" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            sys.settrace(None)
            _close_nothing()
            sys.settrace(trace)
        return trace

    create_vm = PlainIoctl("KVM_CREATE_VM", RequestError)
    with Memfd.create("file", 4096) as file:
        sys.settrace(trace)
        try:
            with pytest.raises(RequestError) as caught:
                create_vm(file.fileno())
        finally:
            sys.settrace(None)
        assert caught.value.errno == errno.ENOTTY


def test_a_request_that_an_exception_interrupted_knows_its_outcome() -> None:
    class StopError(Exception):
        pass

    def stop(frame: FrameType, event: str, argument: object) -> None:
        if event == "c_return" and getattr(argument, "__name__", "") == "pyluo_ioctl":
            raise StopError

    request = Ioctl("IOMMU_IOAS_MAP", "iommu_ioas_map", RequestError).prepare()
    assert (request.succeeded, request.errno) == (False, 0)
    sys.setprofile(stop)
    try:
        with pytest.raises(StopError):
            request.attempt(-1)
    finally:
        sys.setprofile(None)
    assert (request.succeeded, request.errno, request.result) == (False, errno.EBADF, -1)


@pytest.mark.parametrize(
    ("macro", "before_store", "after_load"),
    [("__aarch64__", "dmb oshst", "dmb oshld"), ("__x86_64__", None, None)],
)
def test_registers_are_accessed_in_order_on_each_machine(
    macro: str, before_store: str | None, after_load: str | None
) -> None:
    """The compiler writes what it is told for a machine, even if it is not for that machine."""
    spec = importlib.util.spec_from_file_location("build_ffi", ROOT / "build_ffi.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    code = build.REGISTERS.replace("static ", "")
    machines = [f"-U{one}" for one in ("__x86_64__", "__i386__", "__aarch64__")]
    compiler = sysconfig.get_config_var("CC").split()[0]
    command = [
        compiler,
        "-O2",
        "-S",
        "-ffreestanding",
        *machines,
        f"-D{macro}",
        "-x",
        "c",
        "-",
        "-o",
        "-",
    ]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    functions = dict(re.findall(r"^(pyluo_\w+):\n(.*?)^\s+\.size", done.stdout, re.M | re.S))
    assert before_store is None or before_store in functions["pyluo_store"]
    assert after_load is None or after_load in functions["pyluo_load"]
    if before_store is None:
        assert "fence" not in done.stdout
        assert "dmb" not in done.stdout


def test_a_descriptor_that_is_dropped_is_closed_though_the_warning_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ignored: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: ignored.append(hook.exc_type))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        file = Memfd.create("file", 4096)
        number = file.fileno()
        del file
    assert ignored == [ResourceWarning]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
