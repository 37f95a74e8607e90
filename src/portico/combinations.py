"""Put each engine in front of each family: one line each."""

from __future__ import annotations

from portico.engines.forks import ForkingMixIn
from portico.engines.pool import ThreadPoolMixIn
from portico.engines.threads import ThreadingMixIn
from portico.families import TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer


class ThreadingTCPServer(ThreadingMixIn, TCPServer):
    """Serve each TCP connection in a thread of its own."""


class ThreadingUDPServer(ThreadingMixIn, UDPServer):
    """Serve each datagram in a thread of its own."""


class ThreadingUnixStreamServer(ThreadingMixIn, UnixStreamServer):
    """Serve each connection of a Unix socket in a thread of its own."""


class ThreadingUnixDatagramServer(ThreadingMixIn, UnixDatagramServer):
    """Serve each datagram of a Unix socket in a thread of its own."""


class ForkingTCPServer(ForkingMixIn, TCPServer):
    """Serve each TCP connection in a process of its own."""


class ForkingUDPServer(ForkingMixIn, UDPServer):
    """Serve each datagram in a process of its own."""


class ForkingUnixStreamServer(ForkingMixIn, UnixStreamServer):
    """Serve each connection of a Unix socket in a process of its own."""


class ForkingUnixDatagramServer(ForkingMixIn, UnixDatagramServer):
    """Serve each datagram of a Unix socket in a process of its own."""


class ThreadPoolTCPServer(ThreadPoolMixIn, TCPServer):
    """Serve TCP connections on a bounded number of threads."""


class ThreadPoolUDPServer(ThreadPoolMixIn, UDPServer):
    """Serve datagrams on a bounded number of threads."""


class ThreadPoolUnixStreamServer(ThreadPoolMixIn, UnixStreamServer):
    """Serve connections of a Unix socket on a bounded number of threads."""


class ThreadPoolUnixDatagramServer(ThreadPoolMixIn, UnixDatagramServer):
    """Serve datagrams of a Unix socket on a bounded number of threads."""
