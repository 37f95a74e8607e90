"""Put the green engine in front of each family: one line each.

Apart from `portico.combinations`, so that a program without green servers imports no event loop.
"""

from __future__ import annotations

from portico.engines.green import GreenMixIn
from portico.families import TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer


class GreenTCPServer(GreenMixIn, TCPServer):
    """Serve each TCP connection in a greenlet."""


class GreenUDPServer(GreenMixIn, UDPServer):
    """Serve each datagram in a greenlet."""


class GreenUnixStreamServer(GreenMixIn, UnixStreamServer):
    """Serve each connection of a Unix socket in a greenlet."""


class GreenUnixDatagramServer(GreenMixIn, UnixDatagramServer):
    """Serve each datagram of a Unix socket in a greenlet."""
