"""What the coordinator of an update does to the host."""

from __future__ import annotations

import errno
import subprocess
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from pyluo import kexec
from pyluo.errors import KexecError, SessionNotFoundError
from pyluo.keepers.keeper import KeeperChoice
from pyluo.keepers.systemd import systemd_is_running
from pyluo.liveupdate import LiveUpdate
from pyluo.memfd import Memfd
from pyluo.open_sessions import require_sessions
from pyluo.stores.incoming import IncomingStore
from pyluo.stores.outgoing import OutgoingStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyluo.keepers.keeper import Keeper
    from pyluo.session import IncomingSession, OutgoingSession

__all__ = ["Host"]

_RECORD = "pyluo.update"
_NETWORK = "network"  # the entry of that store
_SYSTEMCTL = ("systemctl", "--no-wall", "kexec")
_DEVICE_WAIT = 10.0  # seconds for another process to close the device
_CARRIER = 30.0  # seconds for the hardware to have a carrier after the jump
_STOPPING = 600.0  # seconds for systemd to stop every service


class Host:
    """The host on which the coordinator runs.

    Args:
        keeper: what keeps the record of an update over the jump.
        network: whether to make the host's network again after the jump; see `pyluo.network`, which
            needs pyroute2.

    Raises:
        ImportError: pyroute2 is not installed.
    """

    def __init__(
        self, keeper: Keeper | KeeperChoice = KeeperChoice.DEFAULT, *, network: bool = False
    ) -> None:
        if network:
            import pyluo.network  # noqa: F401 # now, and not when all VMs are paused
        self._keeper = keeper
        self._network = network
        self._record: OutgoingStore | None = None

    def create_session(self, name: str) -> OutgoingSession:
        """Create an outgoing session; see `LiveUpdate.create_session`."""
        with LiveUpdate(wait=_DEVICE_WAIT) as device:
            return device.create_session(name)

    def retrieve_session(self, name: str) -> IncomingSession:
        """Retrieve an incoming session; see `LiveUpdate.retrieve_session`."""
        with LiveUpdate(wait=_DEVICE_WAIT) as device:
            return device.retrieve_session(name)

    def check(self) -> None:
        """Refuse an update that cannot succeed, before anybody pauses for it.

        Raises:
            KexecError: no image is loaded (EINVAL).
        """
        if not kexec.loaded():
            hint = "No image is loaded: see `pyluo kexec load`"
            raise KexecError(errno.EINVAL, "update", "this host", hint)

    def require(self, sessions: Sequence[str]) -> None:
        """Refuse to jump unless these outgoing sessions are open; see `require_sessions`."""
        require_sessions(sessions)

    def record(self, record: dict[str, Any]) -> Sequence[str]:
        """Keep a record over the jump, for `last`, and what the network is like.

        Returns:
            What of the network cannot be made again after the jump, in words.

        Raises:
            RequestError: see `OutgoingStore.create` and `OutgoingStore.add`.
        """
        self.forget()
        self._record = OutgoingStore.create(_RECORD, keeper=self._keeper, wait=_DEVICE_WAIT)
        self._record.set_meta(record)
        if not self._network:
            return ()
        from pyluo import network

        state = network.record()
        data = state.pack()
        with Memfd.create(_NETWORK, len(data)) as file:
            file.write(data, 0)
            self._record.add(_NETWORK, file)
        return state.left_out

    def forget(self) -> None:
        """Drop the record: there was no jump."""
        store, self._record = self._record, None
        if store is None:
            with suppress(SessionNotFoundError):  # a coordinator that died has left it
                store = OutgoingStore.open(_RECORD, keeper=self._keeper)
        if store is not None:
            store.discard()

    def last(self) -> dict[str, Any] | None:
        """Return the record that came over the jump, and make the network again; None if none came.

        If the network was recorded, and not all of it could be made again, the record says so, in
        its member "network".

        Raises:
            RequestError: see `IncomingStore.retrieve`.
        """
        with suppress(SessionNotFoundError):
            store = IncomingStore.retrieve(_RECORD, keeper=self._keeper, wait=_DEVICE_WAIT)
            record = store.meta
            if _NETWORK in store:
                record["network"] = self._replay(store)
            store.finish(destroy=list(store))
            return record
        return None

    def _replay(self, store: IncomingStore) -> list[str]:
        """Make the network again; return what could not be made.

        Nothing that goes wrong here may keep the VMs from their sessions.
        """
        try:
            from pyluo import network

            with store.get(_NETWORK, Memfd) as file:
                state = network.NetworkState.read(file)
            network.replay(state)
        except ExceptionGroup as group:
            failures = [str(error) for error in group.exceptions]
        except Exception as error:
            return [f"the network: {error}"]
        else:
            failures = []
        # Neighbours hear of it once the hardware has a carrier again.
        announcing = partial(network.announce, wait=_CARRIER)
        threading.Thread(target=announcing, daemon=True).start()
        return failures

    def jump(self) -> float:
        """Jump, or have systemd jump, which stops every service first.

        Returns:
            After how many seconds systemd must have jumped.

        Raises:
            KexecError: the kernel or systemd refuses (EINVAL).
            RequestError: see `kexec.reboot`.
        """
        if not systemd_is_running():
            kexec.reboot()
        done = subprocess.run(_SYSTEMCTL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KexecError(errno.EINVAL, "systemctl kexec", "this host", done.stderr.strip())
        return _STOPPING
