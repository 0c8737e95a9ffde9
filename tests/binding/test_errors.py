from __future__ import annotations

import errno
import pickle
from typing import TYPE_CHECKING

import pytest

import pyluo
from pyluo import errors
from pyluo.errors import LuoError, from_errno

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling_with_all_it_carries(kind: type[LuoError]) -> None:
    error = kind(errno.EBUSY, "REQUEST", "a subject", "a hint")
    error.preserved = (1, 2)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.errno, copy.operation, copy.subject) == (errno.EBUSY, "REQUEST", "a subject")
    assert copy.preserved == (1, 2)


@pytest.mark.parametrize("kind", [each for each in CLASSES if each is not LuoError])
def test_every_class_says_what_to_do(kind: type[LuoError]) -> None:
    assert kind.default_hint


@pytest.mark.parametrize(
    ("operation", "number", "kind", "builtin"),
    [
        ("open", errno.ENOENT, errors.LiveUpdateUnavailableError, FileNotFoundError),
        ("open", errno.EBUSY, errors.DeviceBusyError, OSError),
        ("LIVEUPDATE_SESSION_PRESERVE_FD", errno.ENOENT, errors.NotPreservableError, OSError),
        ("LIVEUPDATE_SESSION_RETRIEVE_FD", errno.ENOENT, errors.TokenNotFoundError, OSError),
        ("LIVEUPDATE_SESSION_PRESERVE_FD", errno.EBUSY, errors.AlreadyPreservedError, OSError),
        ("LIVEUPDATE_SESSION_PRESERVE_FD", errno.EEXIST, errors.TokenInUseError, FileExistsError),
        ("kexec_file_load", errno.EPERM, errors.LuoPermissionError, PermissionError),
        ("anything", errno.E2BIG, errors.KernelTooOldError, OSError),
    ],
)
def test_one_errno_means_different_things_to_different_operations(
    operation: str, number: int, kind: type[LuoError], builtin: type[OSError]
) -> None:
    error = from_errno(number, operation)
    assert type(error) is kind
    assert isinstance(error, builtin)


def test_an_errno_that_nobody_foresaw_keeps_the_errno_and_the_operation() -> None:
    error = from_errno(errno.EXDEV, "LIVEUPDATE_SESSION_FINISH", "incoming session 's'")
    assert type(error) is LuoError
    assert str(error) == (
        "LIVEUPDATE_SESSION_FINISH on incoming session 's': Invalid cross-device link (EXDEV)"
    )


def test_opening_a_device_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(pyluo.LiveUpdateUnavailableError, match="CONFIG_LIVEUPDATE"):
        pyluo.LiveUpdate(tmp_path / "liveupdate")
