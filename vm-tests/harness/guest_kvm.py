"""A guest in a guest: KVM works there, whether or not it does on the host."""

from __future__ import annotations

import os
from typing import Any

from pyluo import LiveUpdate, Memfd
from pyluo.vm import VM
from pyluo.vm.machine import kvm
from pyluo.vm.machine.qemu import find_binary


def preserve() -> object:
    with LiveUpdate() as device, Memfd.create("ram", 4096) as memfd:
        session = device.create_session("vm0")
        memfd.write(b"inner", 0)
        session.preserve(memfd, 1)
    return session


def retrieve() -> bytes:
    with LiveUpdate() as device:
        session = device.retrieve_session("vm0")
    with session.retrieve(1, Memfd) as memfd:
        session.finish()
        return memfd.read(5, 0)


def live_update_inner_guest(image: str) -> dict[str, Any]:
    """Live-update a guest in this guest, without asking for an accelerator; return what it was."""
    os.environ["XDG_CACHE_HOME"] = "/tmp/cache"
    # QEMU's XSAVE under SVM is broken: the inner kernel would oops while it boots.
    with VM(image, append="noxsave", memory=512 << 20) as vm:
        held = vm.hold(preserve)
        vm.live_update()
        return {
            "held": repr(held),
            "monitor": vm.qmp("query-kvm"),
            "result": tuple(kvm.probe(find_binary())),
            "kept": vm.call(retrieve),
            "updates": vm.updates,
        }
