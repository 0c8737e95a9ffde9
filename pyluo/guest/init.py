"""The init process of a guest: the kernel runs this file, `python -I -S init.py`.

Init is Python, not a shell script: under emulation a shell and its mount(8) processes would be
slower. The kernel passes the PYLUO_* settings of its command line as environment variables.

Init forks the worker, and then reaps orphans and sends heartbeats. If the worker ends, init exits,
which makes the kernel panic, because a guest without its worker is of no use.
"""

from __future__ import annotations

import os
import sys

# Because of -S, neither pyluo nor cffi is importable yet. Their folders come last: if they came
# before the standard library, each import from it would first search them, over 9p.
sys.path += os.environ["PYLUO_PATH"].split(":")

from pyluo.guest import archive

archive.install(os.environ["PYLUO_ARCHIVE"])

from pyluo.guest import commands, mounts, worker
from pyluo.guest.heartbeat import Heartbeat

# The kernel does not set PATH for init; the worker needs it to find programs.
os.environ["PATH"] = commands.PATH
mounts.mount_all()
commands.show_warnings()
child: int = os.fork()
if not child:
    worker.run_worker()
status: int = Heartbeat().beat_until(child)
print(f"pyluo: the worker ended, wait status {status:#x}", flush=True)
sys.exit(1)
