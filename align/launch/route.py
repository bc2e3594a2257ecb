"""Find the address of this machine that another machine can reach."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import NamedTuple


class Route(NamedTuple):
    """Addresses of the local and the remote end of a connection to another machine."""

    here: str
    there: str


def route_to(host: str, port: int) -> Route:
    """This machine's route to `host`, from the kernel's routing tables; nothing is sent.

    Resolving the machine's own host name does not give this address. The result is often a loopback address (127.0.1.1
    in Debian's /etc/hosts), which no other machine can reach.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        probe.connect(address)
        return Route(str(probe.getsockname()[0]), str(address[0]))
