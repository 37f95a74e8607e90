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


def is_peer_gone(request: Request, error: Exception) -> bool:
    """Say whether `error` only tells that the peer of `request` vanished.

    The error alone does not show it: a handler may well have lost another connection, one to
    a database, which is worth a traceback.  So the kernel is asked whether *this* connection
    is down in both directions.
    """
    if not isinstance(error, OSError) or error.errno not in PEER_GONE_ERRNOS:
        return False
    poll = select.poll()
    try:
        poll.register(request, 0)  # POLLHUP and POLLERR are reported unasked
        return bool(poll.poll(0))
    except (TypeError, ValueError, OSError):  # no socket, or one that was closed
        return False
