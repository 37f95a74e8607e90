"""Servers whose requests are counted, to be compared with the same servers without.

They count as `portico.serve` does: into a mapping that in production all workers share.
"""

from typing import Any

import portico
from portico import BaseRequestHandler, StreamRequestHandler
from portico.counters import Counters, Row
from portico.tally import count

__all__ = [
    "BaseRequestHandler",
    "GreenTCPServer",
    "GreenUDPServer",
    "StreamRequestHandler",
    "ThreadingTCPServer",
]


class Counted(portico.TCPServer):
    """A server that counts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        count(self, Row(Counters.private(["here"]), 0).station("here"))


class GreenTCPServer(portico.GreenMixIn, Counted):
    """On greenlets."""


class ThreadingTCPServer(portico.ThreadingMixIn, Counted):
    """On threads."""


class GreenUDPServer(portico.GreenMixIn, Counted, portico.UDPServer):
    """On greenlets, for datagrams."""
