"""Tests of the line to a terminal in a guest; its other end starts afresh in each life."""

from __future__ import annotations

import socket

from pyluo.guest import wire
from pyluo.vm.terminal.line import Line


def test_what_a_jump_cut_short_spoils_nothing_of_the_next_life() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = Line(ours)
        theirs.sendall(wire.to_line({"folder": "/a"}) + b'{"folder": "/b')
        theirs.sendall(b"\n" + wire.to_line({"folder": "/c"}))
        assert line.drain() == [{"folder": "/a"}, {"folder": "/c"}]


def test_what_one_life_did_not_take_is_not_sent_to_the_next() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = Line(ours)
        line.begin_life("first")
        while not line.unsent:
            line.send(input="x" * (1 << 16))
        line.begin_life("second")
        line.send(eof=True)
        last = b""
        while b"second" not in last:
            line.flush()
            last = (last + theirs.recv(1 << 20)).rpartition(b"\n\n")[2] or last
        assert wire.parse(last.splitlines()[-1]) == {"boot_id": "second", "eof": True}


def test_a_line_that_qemu_hung_up_has_an_end() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        line = Line(ours)
        theirs.sendall(wire.to_line({"end": 0}))
        theirs.close()
        assert line.drain() == [{"end": 0}]
        assert line.closed
