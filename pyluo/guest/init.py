"""The init process of a guest: the kernel runs this file, `python -I -S init.py`.

Init is written in Python, with PYLUO_* from the kernel's command line in its environment, because
under emulation a shell and its mount(8)s would take longer than all of this. This process remains
to reap orphans and to send heartbeats; its child is the worker. If the child dies, this process
exits, which makes the kernel panic: a guest without its worker is of no use.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

# Without site, neither pyluo nor its compiled part is importable yet. They are added last, because
# entries before the standard library would be searched first, over 9p.
sys.path += os.environ["PYLUO_PATH"].split(":")

# The kernel does not set PATH for init, and programs are looked up by it.
os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

from pyluo.guest import mounts, worker
from pyluo.guest.heartbeat import Heartbeat

mounts.mount_all()
# The guest may have booted with `quiet`; from now on the host needs the kernel's warnings on the
# console. (A kernel without CONFIG_SYSCTL has no such file.)
with suppress(FileNotFoundError), open("/proc/sys/kernel/printk", "r+b", buffering=0) as levels:
    if int(levels.read().split()[0]) < 6:
        levels.seek(0)
        levels.write(b"6")
child = os.fork()
if not child:
    worker.work()
status = Heartbeat().beat_until(child)
print(f"pyluo: the worker ended, wait status {status:#x}", flush=True)
sys.exit(1)
