"""The service that runs the worker in a guest whose first process is systemd.

systemd runs this file, `python3 -I service.py`, in each life. Like `init`, it forks the worker, and
then sends heartbeats. If the worker ends, it makes the kernel panic, because a guest without its
worker is of no use; but not if systemd ends all processes, for a jump or for good.
"""

from __future__ import annotations

import os
import sys

# This Python need not be the host's: its own library comes before the host's folders.
sys.path += os.environ["PYLUO_PATH"].split(":")

from pyluo.guest import commands, worker
from pyluo.guest.heartbeat import Heartbeat

commands.show_warnings()
child = os.fork()
if not child:
    hosts = os.environ["PYLUO_PATH"].split(":")
    worker.run_worker([entry for entry in sys.path if entry not in hosts])
status = Heartbeat().beat_until(child)
print(f"pyluo: the worker ended, wait status {status:#x}", flush=True)
with open("/proc/1/comm") as file:
    # The first process, once the services are stopped; the kernel keeps 15 characters of a name.
    is_ending = file.read().strip() == "systemd-shutdow"
if not is_ending:
    with open("/proc/sysrq-trigger", "w") as trigger:
        trigger.write("c")
sys.exit(1)
