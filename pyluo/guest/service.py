"""The service that runs the worker in a guest whose first process is systemd.

systemd runs this file, `python3 -I service.py`, in each life. Like `init`, it forks the worker, and
then sends heartbeats. If the worker ends, it exits, and the unit makes the kernel panic, because a
guest without its worker is of no use.
"""

from __future__ import annotations

import os
import sys

# This Python need not be the host's: its own library comes before the host's folders.
sys.path += os.environ["PYLUO_PATH"].split(":")

from pyluo.guest import commands, worker
from pyluo.guest.heartbeat import Heartbeat

commands.show_warnings()
child: int = os.fork()
if not child:
    hosts: list[str] = os.environ["PYLUO_PATH"].split(":")
    worker.run_worker([entry for entry in sys.path if entry not in hosts])
status: int = Heartbeat().beat_until(child)
print(f"pyluo: the worker ended, wait status {status:#x}", flush=True)
sys.exit(1)
