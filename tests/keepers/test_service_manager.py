"""Tests of the service manager as the keeper, where there is none; the others need a guest."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

from pyluo import KeeperError, Memfd, ServiceManager

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("listens", [False, True])
def test_what_no_manager_got_is_not_kept_open(tmp_path: Path, listens: bool) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        if listens:
            dead.bind(os.fspath(path))
    keeper = ServiceManager({"NOTIFY_SOCKET": os.fspath(path)})
    with Memfd.create("file", 4096) as file:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            with pytest.raises(KeeperError) as caught:
                keeper.keep("vm0", "session", file)
            assert caught.value.errno == (errno.ECONNREFUSED if listens else errno.ENOENT)
            assert len(os.listdir("/proc/self/fd")) == before
            assert keeper.kept("vm0") == {}
