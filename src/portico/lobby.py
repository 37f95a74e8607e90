"""Keep accepted connections whose peers have to speak first, until they do.

Owns the connections that were accepted and over which nothing has come, of a server whose peers
begin (with a PROXY header, or a ClientHello): they would occupy a worker each while they say
nothing, and where workers are few, silent peers keep everyone else from being served.  In here they
cost a descriptor each, as in the backlog.  Leaves it to the server to let them in and to say what
becomes of those who are silent for too long, and their number to `max_connections`.

A peer that says one byte and then falls silent is let in: its worker waits for the rest, under the
same deadline.

Source: epoll(7): a descriptor of epoll is itself readable when one that it watches is, so that the
accept loop waits for one more descriptor, however many connections are here.
"""

from __future__ import annotations

import select
import selectors
from collections.abc import Iterator
from contextlib import suppress
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

from portico.deadlines import LONGEST_WAIT

if TYPE_CHECKING:
    from portico.connection import ClientAddress, Request


class Guest(NamedTuple):
    """A connection whose peer has said nothing yet."""

    request: Request
    client_address: ClientAddress
    since: float
    """When it came, by `time.monotonic`."""


class Lobby:
    """Where the connections of one server wait for their peers' first word.

    Callable from any thread.

    Args:
        timeout: Seconds until a peer has to have said something; ``None`` for no limit.

    Raises:
        OSError: The system has no descriptor left.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._lock = RLock()  # guards all that follows
        self._guests: dict[Any, Guest] = {}  # by the request; the first has been here for longest
        self._selector = selectors.DefaultSelector()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._guests)

    def __contains__(self, request: object) -> bool:
        return request in self._guests

    def fileno(self) -> int:
        """Return a descriptor that is readable when a peer has begun to speak, or has gone."""
        selector: Any = self._selector
        number: int = selector.fileno()
        return number

    def take(self, guest: Guest) -> bool:
        """Keep a connection, and say whether it is kept: not if its peer has spoken already."""
        if has_spoken(guest.request):
            return False
        with self._lock:
            if self._is_closed:
                return False
            try:
                self._selector.register(guest.request, selectors.EVENT_READ)
            except (OSError, ValueError):  # the system's limit of watches
                return False
            self._guests[guest.request] = guest
        return True

    def leave(self, guest: Guest) -> bool:
        """Let a connection go, and say whether it was here: it is the caller's then."""
        with self._lock:
            if self._guests.pop(guest.request, None) is None:
                return False
            # Before anybody closes it: a child process may share it, and would keep it watched.
            self._selector.unregister(guest.request)
            return True

    def speaking(self) -> Iterator[Guest]:
        """Go through those whose peers have begun to speak, or have gone."""
        with self._lock:
            if self._is_closed or not self._guests:
                return
            keys = [key for key, _ in self._selector.select(0)]
        for key in keys:
            guest = self._guests.get(key.fileobj)
            if guest is not None:
                yield guest

    def wait(self, timeout: float) -> bool:
        """Wait until a peer has begun to speak, and say whether there was time for one.

        Args:
            timeout: Seconds; no wait at all from 0 down.
        """
        if timeout <= 0:
            return False
        poll = select.poll()
        poll.register(self, select.POLLIN)
        poll.poll(timeout * 1000)
        return True

    def late(self, now: float) -> Iterator[Guest]:
        """Go through those whose peers have been silent for too long.

        Each has to `leave` before the next is asked for.

        Args:
            now: The instant, by `time.monotonic`.
        """
        while (remaining := self.remaining(now)) is not None and remaining <= 0:
            guest = self._first()
            if guest is not None:
                yield guest

    def remaining(self, now: float) -> float | None:
        """Return the seconds until the first one is late, or nearly; ``None`` if none ever is."""
        first = self._first()
        if first is None or self.timeout is None:
            return None
        return min(max(0.0, first.since + self.timeout - now), LONGEST_WAIT)

    def guests(self) -> tuple[Guest, ...]:
        """Return all that are here now."""
        with self._lock:
            return tuple(self._guests.values())

    def close(self) -> tuple[Guest, ...]:
        """Keep no more connections, and return those that were here: they are the caller's."""
        with self._lock:
            left = tuple(self._guests.values())
            self._guests.clear()
            if not self._is_closed:
                self._is_closed = True
                self._selector.close()
            return left

    def abandon(self) -> None:
        """Close, in a forked child, its copies of what waits in its parent."""
        # Unregistering would reach into the parent, with which the descriptor of epoll is shared.
        self._lock = RLock()  # somebody may have held it
        for guest in self.close():
            with suppress(OSError):
                guest.request.close()

    def _first(self) -> Guest | None:
        with self._lock:
            return next(iter(self._guests.values()), None)


def has_spoken(request: Any) -> bool:
    """Say whether something can be read from a connection, be it its end."""
    poll = select.poll()
    poll.register(request, select.POLLIN)
    return bool(poll.poll(0))
