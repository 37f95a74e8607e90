"""Ask the kernel about one accepted peer.

Owns no state: what it answers is true at the moment someone asks, and costs nothing before.
"""

from __future__ import annotations

import errno
import select
from typing import Any, Final, TypeAlias

Request: TypeAlias = Any
"""What `get_request` returns first: a socket; ``(bytes, socket)`` for a datagram; or whatever
a program's own `get_request` makes."""

ClientAddress: TypeAlias = Any
"""What `get_request` returns second: its shape depends on the address family."""

PEER_GONE_ERRNOS: Final = frozenset(
    {
        errno.EPIPE,
        errno.ESHUTDOWN,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)
"""What send(2) and recv(2) return on a connection whose other end is no longer there.

ETIMEDOUT and the two UNREACH are the kernel's verdict after retransmissions or keep-alive
probes (tcp(7), "Error handling").  A `settimeout` that ran out carries no errno, so it is
not one of them.
"""


LOST: Final = "_portico_lost"
"""Where an error keeps the request whose loss it tells, once that is closed and cannot be asked."""


def mark_peer_gone(request: Request, error: OSError) -> None:
    """Note that `error` tells the loss of this very request's peer, for `is_peer_gone`."""
    vars(error)[LOST] = request


def is_peer_gone(request: Request, error: Exception) -> bool:
    """Say whether `error` only tells that the peer of `request` vanished.

    The error alone does not show it: a handler may well have lost another connection, one to
    a database, which is worth a traceback.  So the kernel is asked whether *this* connection
    is down in both directions.
    """
    if vars(error).get(LOST, is_peer_gone) is request:
        return True
    if not isinstance(error, OSError) or error.errno not in PEER_GONE_ERRNOS:
        return False
    poll = select.poll()
    try:
        poll.register(request, 0)  # POLLHUP and POLLERR are reported unasked
        return bool(poll.poll(0))
    except (TypeError, ValueError, OSError):  # no socket, or one that was closed
        return False
