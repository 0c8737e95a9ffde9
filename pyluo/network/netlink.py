"""Requests to the kernel's network by netlink, with the errors of pyluo."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyluo.operation import Operation

__all__ = ["Netlink", "connect", "request"]

Netlink = IPRoute


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
