"""Servers with every protection on, to be compared with the same servers without.

No limit is reached: what is measured is what it costs to have them.
"""

import portico
from portico import BaseRequestHandler, StreamRequestHandler

__all__ = [
    "BaseRequestHandler",
    "GreenTCPServer",
    "GreenTCPServerWithDeadlines",
    "StreamRequestHandler",
    "ThreadingTCPServer",
]


class Deadlines(portico.BaseServer):
    """The limits in time, with the values of `portico.serve` where it has any."""

    idle_timeout = 300.0
    request_timeout = 3600.0
    minimum_rate = 1.0


class Protections(Deadlines):
    """And those on who comes in."""

    max_connections = 19_000
    max_connections_per_peer = 19_000
    accept_rate = 1e6
    accept_burst = 1_000_000
    allowed_networks = ("127.0.0.0/8", "::1")
    denied_networks = ("192.0.2.0/24",)


class GreenTCPServer(portico.GreenMixIn, Protections, portico.TCPServer):
    """On greenlets."""


class ThreadingTCPServer(portico.ThreadingMixIn, Protections, portico.TCPServer):
    """On threads."""


class GreenTCPServerWithDeadlines(portico.GreenMixIn, Deadlines, portico.TCPServer):
    """On greenlets, with the limits in time alone."""
