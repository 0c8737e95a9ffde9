from __future__ import annotations

import errno
import importlib
import pickle
from typing import TYPE_CHECKING

import pytest

import pyluo
from pyluo import errors
from pyluo._sys import Ioctl
from pyluo.errors import DeviceBusyError, RequestError
from pyluo.operation import Operation, declared

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling_with_all_it_carries(kind: type[RequestError]) -> None:
    error = kind(errno.EBUSY, "REQUEST", "a subject", "a hint")
    error.preserved = (1, 2)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.errno, copy.operation, copy.subject) == (errno.EBUSY, "REQUEST", "a subject")
    assert copy.preserved == (1, 2)


# What a caller does after one of these depends on the request.
BASES = {"RequestError", "LuoError", "KexecError", "KvmError", "IommuError", "VfioError"}


@pytest.mark.parametrize("kind", [each for each in CLASSES if each.__name__ not in BASES])
def test_every_class_says_what_to_do(kind: type[RequestError]) -> None:
    assert kind.default_hint


READ = Operation(
    "read", errors.VfioError, {errno.EIO: "Switch it on", errno.EBUSY: DeviceBusyError}
)


def test_a_request_says_what_its_errnos_mean() -> None:
    hinted, classed, other = (READ.error(number, "it") for number in (errno.EIO, errno.EBUSY, 6))
    assert type(hinted) is type(other) is errors.VfioError
    assert hinted.hint == "Switch it on"
    assert (type(classed), classed.hint) == (DeviceBusyError, DeviceBusyError.default_hint)
    assert str(other) == "read on it: No such device or address (ENXIO)"
    assert READ.error(errno.EIO, hint="Wait").hint == "Wait"
    both = Operation("write", refusals={errno.EIO: (DeviceBusyError, "Read first")})
    assert (type(both.error(errno.EIO)), both.error(errno.EIO).hint) == (
        DeviceBusyError,
        "Read first",
    )


def test_an_oserror_in_the_block_becomes_that_of_the_request() -> None:
    with pytest.raises(DeviceBusyError, match="read on it"), READ.raising("it"):
        raise OSError(errno.EBUSY, "")
    with pytest.raises(errors.VfioError, match="ETIMEDOUT"), READ.raising("it"):
        raise TimeoutError
    inner = errors.SealedError(errno.EPERM, "ftruncate")
    with pytest.raises(errors.SealedError) as caught, READ.raising("it"):
        raise inner
    assert caught.value is inner


def test_a_struct_that_is_too_long_for_the_kernel_means_that_it_is_too_old() -> None:
    for module in ("liveupdate", "iommufd", "vfio"):
        importlib.import_module(f"pyluo.{module}")
    ioctls = [each for each in declared() if isinstance(each, Ioctl) and each._size_field]
    assert {each.name.partition("_")[0] for each in ioctls} >= {"LIVEUPDATE", "IOMMU", "VFIO"}
    for ioctl in ioctls:
        assert type(ioctl.error(errno.E2BIG)) is errors.KernelTooOldError


def test_opening_a_device_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(pyluo.LiveUpdateUnavailableError, match="CONFIG_LIVEUPDATE"):
        pyluo.LiveUpdate(tmp_path / "liveupdate")
