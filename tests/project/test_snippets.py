"""The snippets of the manual that need no guest, run as they stand."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from pyluo import Memfd, handoff
from tests.snippets import snippets
from tests.update.test_coordinator import LIMIT, running

if TYPE_CHECKING:
    from tests.update.test_coordinator import Running

__all__ = ["running"]  # a fixture


@pytest.mark.parametrize("number", [2, 3])
def test_a_successor_receives_what_was_sent(number: int) -> None:
    snippet = snippets("docs/guides/handoff.md")[number]
    names: dict[str, Any] = {"handoff": handoff}
    ours, names["theirs"] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, names["theirs"], Memfd.create("ram", 4096) as ram:
        sender = threading.Thread(target=handoff.send, args=(ours, {"ram": ram}), daemon=True)
        sender.start()
        exec(snippet, names)
        sender.join(LIMIT)
        with names["received"] as received, received.take("ram", Memfd) as taken:
            assert taken.size == 4096


def test_a_vmm_takes_part_in_updates(running: Running) -> None:
    [snippet] = snippets("docs/guides/several-vms.md")
    assert 'join("vm0")' in snippet
    names = {"path": running.path}
    running.host.held.add("vm0")
    vmm = threading.Thread(
        target=exec, args=(snippet.replace('join("vm0")', 'join("vm0", path=path)'), names)
    )
    vmm.start()
    running.wait_for(lambda: "vm0 takes part" in running.log)
    running.run(running.update(dry_run=True))
    assert ("vm0", "ready") in running.reports
    assert ("vm0", "runs on") in running.reports
    running.cut_connections()
    vmm.join(LIMIT)
    assert not vmm.is_alive()
