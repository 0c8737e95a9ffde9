"""The first process of a guest: the kernel runs this file, `python -I -S init.py`.

Python itself, with PYLUO_* from the kernel's command line as its environment: under emulation a
shell and its mount(8)s would take longer than all of this. It stays behind to reap orphans and to
give signs of life, and its child works. Should the child die, this process follows it, and the
kernel says so by a panic: a guest without its worker is a dead guest.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

# Without site, neither pyluo nor its compiled part is importable yet. Last, since every entry
# before the standard library would be searched first, over 9p.
sys.path += os.environ["PYLUO_PATH"].split(":")

# The kernel gives its first process none, and programs are looked up by it.
os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

from pyluo.guest import mounts, worker
from pyluo.guest.heart import Heart

mounts.mount_all()
# What was to boot quietly is to be heard from now on: the host goes by what the kernel warns of.
# (A kernel without CONFIG_SYSCTL has no such file.)
with suppress(FileNotFoundError), open("/proc/sys/kernel/printk", "r+b", buffering=0) as levels:
    if int(levels.read().split()[0]) < 6:
        levels.seek(0)
        levels.write(b"6")
child = os.fork()
if not child:
    worker.work()
status = Heart().beat_until(child)
print(f"pyluo: the worker ended, wait status {status:#x}", flush=True)
sys.exit(1)
