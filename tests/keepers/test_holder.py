"""The choice of the interpreter that runs a holder process."""

from __future__ import annotations

import errno
import sys

import pytest

from pyluo import RequestError
from pyluo.keepers.holder import find_python


@pytest.mark.parametrize("executable", [None, "", "/usr/bin/env", "/no/such/vmm"])
def test_a_program_that_is_no_python_is_not_run_as_one(
    monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(RequestError, match=r"HolderProcess\(python=") as caught:
        find_python(None)
    assert caught.value.errno == errno.ENOENT
    assert find_python("/usr/bin/env") == "/usr/bin/env"


def test_a_frozen_program_is_not_run_as_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(RequestError):
        find_python(None)


def test_the_interpreter_is_found() -> None:
    assert find_python(None) == sys.executable
