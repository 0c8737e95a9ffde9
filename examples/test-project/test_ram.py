"""Check that preserved memory of a guest survives a live update."""

from pyluo import FdStore, Memfd
from pyluo.vm import VM


def save(contents: bytes) -> FdStore:  # runs in the guest
    ram = Memfd.create("ram", len(contents))
    ram.write(contents, 0)
    store = FdStore.create("vm0")
    store.add("ram", ram)
    return store


def load() -> bytes:  # runs in the guest, on the next kernel
    with FdStore.retrieve("vm0") as store, store.get("ram", Memfd) as ram:
        return ram.read(ram.size, 0)


def test_ram_survives(vm: VM) -> None:
    vm.hold(save, b"state")  # the store stays open until the jump
    vm.live_update()
    assert vm.call(load) == b"state"
