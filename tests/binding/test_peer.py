"""Who is at the other end of a socket, as seen from a user namespace."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from pyluo.handoff import Peer, same_user

# In a user namespace without a mapping, every user is 65534, and so is the caller itself.
ACCEPT = """
import errno, os, socket, sys
from pyluo import HandoffError, handoff
assert os.geteuid() == 65534
assert not handoff.same_user(handoff.Peer(1, 65534, 65534))
end = socket.socket(fileno=int(sys.argv[1]))
try:
    handoff.receive(end, timeout=20)
except HandoffError as error:
    assert error.errno == errno.EPERM, error
    assert "of user 65534" in str(error), error
    print("refused")
"""

# The kernel makes no user namespace for a process whose root was changed by chroot(2), and many
# containers forbid them.
needs_user_namespaces = pytest.mark.skipif(
    subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode != 0,
    reason="this machine, container or chroot forbids user namespaces",
)


@needs_user_namespaces
def test_a_user_who_is_not_mapped_is_not_taken_for_another_one_who_is_not() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        done = subprocess.run(
            ["unshare", "--user", sys.executable, "-c", ACCEPT, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    assert (done.stdout, done.returncode) == ("refused\n", 0), done.stderr


@needs_user_namespaces
def test_a_mapped_user_is_told_from_others() -> None:
    program = (
        "from pyluo.handoff import Peer, same_user; "
        "print(*(same_user(Peer(1, uid, uid)) for uid in (0, 1, 65534)))"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "True False False\n", done.stderr


@pytest.mark.parametrize(("uid", "expected"), [(os.geteuid(), True), (0, True), (12345, False)])
def test_the_same_user_and_root_are_the_same_user(uid: int, expected: bool) -> None:
    assert same_user(Peer(1, uid, uid)) is expected


def test_nobody_is_a_user_like_others_only_where_every_user_is_mapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open("/proc/self/uid_map") as file:
        all_are_mapped = sum(int(line.split()[2]) for line in file) >= (1 << 32) - 1
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert same_user(Peer(1, 65534, 65534)) is all_are_mapped
