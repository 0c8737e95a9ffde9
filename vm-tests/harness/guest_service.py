"""A service that keeps a memfd over live updates, in the descriptor store of systemd.

As a program, this is the service; its functions are for the worker.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

from pyluo import LiveUpdate, Memfd
from pyluo.session import IncomingSession

_STATE = Path("/run/keeper.json")
_SESSION = "keeper"
_SIZE = 1 << 20
_FIRST_FD = 3  # sd_listen_fds(3)
_TOKEN = 1


def state() -> dict[str, str]:
    """Return what the service has found and written in this life; it has started."""
    found: dict[str, str] = json.loads(_STATE.read_text())
    return found


def main() -> None:
    names = os.environ.get("LISTEN_FDNAMES", "")
    if names:
        incoming = IncomingSession.from_fd(_FIRST_FD)
        ram = incoming.retrieve(_TOKEN, Memfd)
        content = ram.read(5, 0).decode()
        incoming.finish()
    else:
        ram, content = Memfd.create("ram", _SIZE), ""
    written = "again" if names else "first"
    ram.write(written.encode(), 0)
    with LiveUpdate() as device:
        session = device.create_session(_SESSION)
    session.preserve(ram, token=_TOKEN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect(os.environ["NOTIFY_SOCKET"])
        message = f"FDSTORE=1\nFDNAME={_SESSION}\nFDPOLL=0".encode()
        socket.send_fds(systemd, [message], [session.fileno()])
        _STATE.write_text(json.dumps({"names": names, "content": content, "written": written}))
        systemd.send(b"READY=1")
    signal.pause()


if __name__ == "__main__":
    main()
