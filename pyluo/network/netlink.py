"""Requests to the kernel's network by netlink, and what its messages say."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyluo.operation import Operation

__all__ = ["connect", "off_event_loops", "read_data", "read_kind", "read_vlans", "request"]

P = ParamSpec("P")
R = TypeVar("R")


def off_event_loops(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function that uses netlink callable where an event loop runs as well.

    pyroute2 runs an event loop of its own, of which a thread can have only one: then the function
    runs in another thread, which has the same network namespace, and the caller waits for it.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return function(*args, **kwargs)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function, *args, **kwargs).result()

    return called


@contextmanager
def connect(operation: Operation) -> Iterator[IPRoute]:
    """Connect to the kernel; turn what it refuses, and nobody catches, into errors of `operation`.

    Raises:
        RequestError: the kernel refuses a request, by errno.
    """
    with operation.raising(), IPRoute() as netlink:
        try:
            yield netlink
        except NetlinkError as error:
            raise operation.error(error.code) from error


def request(netlink: IPRoute, kind: int, flags: int, message: Any) -> None:
    """Send a message as it is, with attributes by the kernel's names, and wait for the answer.

    Args:
        netlink: the connection.
        kind: an RTM_* request that changes something.
        flags: NLM_F_* flags.
        message: a message of pyroute2.

    Raises:
        NetlinkError: the kernel refuses the request.
    """
    message["header"]["type"] = kind
    message["header"]["flags"] = flags
    # pyroute2's only synchronous call for a message that somebody else has made.
    netlink.nlm_request_batch([message])


def read_kind(message: Any) -> str:
    """Return the kind of an interface; empty for hardware.

    Args:
        message: the message that describes the interface.
    """
    information = message.get("IFLA_LINKINFO")
    return (information and information.get("IFLA_INFO_KIND")) or ""


def read_data(message: Any, name: str = "IFLA_INFO_DATA") -> Any:
    """Return what the kernel tells of the kind of an interface; None if nothing.

    Args:
        message: the message that describes the interface.
        name: "IFLA_INFO_SLAVE_DATA" for what it tells of a port.
    """
    information = message.get("IFLA_LINKINFO")
    return information and information.get(name)


def read_vlans(message: Any) -> Iterator[tuple[int, int]]:
    """Yield the number and the flags of each VLAN that a bridge, or a port of one, lets through.

    Args:
        message: the message of `IPRoute.get_vlans` that describes the interface; None if none does.
    """
    specification = message and message.get("IFLA_AF_SPEC")
    for name, value in (specification or {}).get("attrs", ()):
        if name == "IFLA_BRIDGE_VLAN_INFO":
            yield value["vid"], value["flags"]
