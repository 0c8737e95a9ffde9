"""Check that preserved memory of a guest survives a live update."""

from pyluo import IncomingStore, KeeperChoice, Memfd, OutgoingStore
from pyluo.vm import VM


def save(contents: bytes) -> OutgoingStore:  # runs in the guest
    ram = Memfd.create("ram", len(contents))
    ram.write(contents, 0)
    store = OutgoingStore.create("vm0", keeper=KeeperChoice.NONE)
    store.add("ram", ram)
    return store


def load() -> bytes:  # runs in the guest, on the next kernel
    store = IncomingStore.retrieve("vm0", keeper=KeeperChoice.NONE)
    with store.get("ram", Memfd) as ram:
        store.finish()
        return ram.read(ram.size, 0)


def test_ram_survives(vm: VM) -> None:
    vm.hold(save, b"state")  # the store stays open until the jump
    vm.live_update()
    assert vm.call(load) == b"state"
