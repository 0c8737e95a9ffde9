"""Functions that the tests of the harness run in the guest."""

from __future__ import annotations

import builtins
import os
import socket
import threading
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NoReturn

from pyluo import RequestError


class Colour(Enum):
    RED = ("red", b"\xff")


@dataclass(frozen=True)
class Point:
    x: int
    label: str


def echo(value: object) -> object:
    return value


def panic_now() -> None:
    Path("/proc/sysrq-trigger").write_text("c")


def panic_soon() -> None:
    threading.Timer(0.2, panic_now).start()


def end_worker() -> NoReturn:
    os._exit(3)


def fail(number: int) -> NoReturn:
    raise RequestError(number, "an operation", "a subject", "a hint")


class OddError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def fail_oddly() -> NoReturn:
    raise OddError("this", "that")


class CyclicError(Exception):
    pass


def fail_in_a_cycle() -> NoReturn:
    cycle: list[object] = []
    cycle.append(cycle)
    raise CyclicError(cycle)


def fail_after_preserving_two() -> NoReturn:
    error = RequestError(1, "an operation")
    error.preserved = (1, 2)
    raise error


def raise_by_name(name: str) -> NoReturn:
    kind: type[BaseException] = getattr(builtins, name)
    raise kind("the end")


def make_unencodable_value(kind: str) -> object:
    if kind == "number":
        return 10**5000
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    return nested


def make_counter() -> list[int]:
    return [0]


def increment(counter: list[int]) -> int:
    counter[0] += 1
    return counter[0]


def find_bindable_addresses(candidates: list[str]) -> list[str]:
    bound = []
    for address in candidates:
        with socket.socket() as listener:
            try:
                listener.bind((address, 0))
                listener.listen()
                with socket.create_connection(listener.getsockname(), timeout=5):
                    bound.append(address)
            except OSError:
                continue
    return bound


def write_to_tmp() -> bool:
    path = Path("/tmp/pyluo-written-in-the-guest")
    path.write_text("x")
    return path.exists()
