"""Know the connections that a server has open, and what became of one.

Owns what is remembered of an accepted peer: little, because the kernel knows the rest
(`portico.traffic`).  Leaves the socket to the family, and judging to `portico.deadlines` and
`portico.lifecycle`.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from threading import RLock
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, cast
from weakref import ref

if TYPE_CHECKING:
    from portico.deadlines import Memory
    from portico.events import Deadline
    from portico.gate import Gate
    from portico.proxy import Header

_Result = TypeVar("_Result")

Request: TypeAlias = Any
"""What `get_request` returns first: a socket; ``(bytes, socket)`` for a datagram; or whatever
a program's own `get_request` makes."""

ClientAddress: TypeAlias = Any
"""What `get_request` returns second: its shape depends on the address family."""

_Socket: Final = socket.socket  # also when a program's test puts something else in its place

ADDRESSED_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6})
"""Where a peer has an address of its own."""

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


class Connection:
    """One accepted peer, from its acceptance to its end.

    What most connections never need is a class attribute until they do.

    Args:
        request: Its socket, as it was accepted.
        client_address: Its address, as accept(2) told it.
        accepted: When, by `time.monotonic`; by default, now.
    """

    thread: int | None = None
    """The system's number of the thread that serves it; ``None`` before one does, and where the
    engine knows better what its handler waits for."""

    descriptor: int | None = None
    """The number of its descriptor, which outlives the request where a handler puts TLS over it;
    ``None`` before a worker serves it, and where the request itself tells (a green socket)."""

    process: int | None = None
    """The child process that serves it, if one does; the socket here is closed then."""

    row: int | None = None
    """Where its child says for whom a proxy speaks, if that is counted (`portico.siblings`)."""

    memory: Memory | None = None
    """What looks at it have to remember, from the first one on."""

    next_look: float = 0.0
    """When to look at it again, by `time.monotonic`."""

    deadline: Deadline | None = None
    """The limit in time that ended it."""

    gate: Gate | None = None
    """Where it has a place; ``None`` where nobody counts."""

    peer: ClientAddress | None = None
    """For whom a proxy speaks, if that is counted."""

    proxy_header: Header | None = None
    """What a proxy said of it."""

    patience: float | None = None
    """Seconds that its peer has left for its preamble, once it has begun to speak; ``None`` for all
    that the settings give it."""

    has_ended: bool = False
    """Whether a drain has counted its end."""

    was_cut: bool = False
    """Whether it was shut down in both directions under its handler."""

    is_held: bool = False
    """Whether its socket is being used from another thread, and must not be closed."""

    def __init__(
        self, request: Any, client_address: ClientAddress, accepted: float | None = None
    ) -> None:
        self.held = request
        """The request, or a `Hold` on it."""
        self.client_address = client_address
        self.accepted = monotonic() if accepted is None else accepted

    @property
    def request(self) -> Any:
        """The socket as the handler has it, another one once TLS is spoken over it.

        ``None`` if nobody has it any more.
        """
        held = self.held
        return held() if type(held) is Hold else held

    @property
    def speaker(self) -> ClientAddress:
        """Who is at the other end: for whom the proxy speaks, once it has said so."""
        header = self.proxy_header
        return self.client_address if header is None or header.source is None else header.source


class Hold(ref[Any]):
    """A hold on a request that does not keep it alive."""

    __slots__ = ("key",)

    key: int
    """The ``id`` of the request."""


class Connections:
    """The open connections of one server.

    A connection is found by its request.  It is in here until just before its socket is closed,
    so whoever finds it may use the socket, if `interrupt` does it.  A program may take a connection
    away and let go of it without a word, as it may with the socket of a `socketserver`: where it
    has hooks of its own (`holds_weakly`), a connection is in here until nobody has its socket any
    more.

    Callable from any thread: what has to be atomic is one step of a dictionary.

    Args:
        on_lost: Called with a connection whose socket nobody has any more, between any two steps of
            any thread: it waits for no lock.
    """

    def __init__(self, on_lost: Callable[[Connection], object]) -> None:
        self.by_request: dict[int, Connection] = {}
        """By the ``id`` of the request."""
        self.holds_weakly = True
        """Whether one that is added is forgotten when nobody has its socket any more."""
        self._on_lost = on_lost
        # Held while a socket is used from another thread.  Re-entrant for a signal handler that
        # closes one in the middle of it: then no descriptor is used that is another's.
        self._interrupting = RLock()

    def __len__(self) -> int:
        return len(self.by_request)

    def __iter__(self) -> Iterator[Connection]:
        """Go through those that are open now; the set may change meanwhile."""
        return iter(list(self.by_request.values()))

    def add(self, request: Any, client_address: ClientAddress) -> Connection:
        """Remember a connection that was accepted."""
        held = self._hold(request) if self.holds_weakly else request
        connection = self.by_request[id(request)] = Connection(held, client_address)
        return connection

    def get(self, request: Any) -> Connection | None:
        """Return the connection of a request, if it is open."""
        return self.by_request.get(id(request))

    def exchange(self, before: Any, request: Any) -> None:
        """Note that a connection has another socket object from now on."""
        connection = self.get(before)
        if connection is None:
            return
        # First the new, then the old: nobody who goes through them misses it.
        self.by_request[id(request)] = connection
        is_weak = type(connection.held) is Hold and isinstance(request, _socket.socket)
        connection.held = self._hold(request) if is_weak else request
        self.remove(before)

    def remove(self, request: Any) -> Connection | None:
        """Forget a connection whose socket is closed next; ``None`` if it is forgotten already."""
        connection = self.by_request.pop(id(request), None)
        if connection is not None and connection.is_held:
            self.await_interrupt()
        return connection

    def await_interrupt(self) -> None:
        """Wait until no socket is being used: its descriptor must not become another's now."""
        with self._interrupting:
            pass

    def interrupt(self, connection: Connection, how: int = _socket.SHUT_RDWR) -> bool:
        """Shut a connection down, which wakes whoever waits for it in any engine.

        Args:
            connection: Which.
            how: As for ``socket.shutdown``; ``SHUT_RD`` is an end-of-file that loses nothing of
                what is on its way to the peer.

        Returns:
            Whether there was a socket to shut down.  There is none once it was closed, nor in the
            moment in which another object of ours takes its descriptor over, nor where a program
            made something else of it that `borrow` does not find.
        """
        with self._interrupting:
            connection.is_held = True  # first, and then a look: `remove` does it the other way
            try:
                request = connection.request
                if self.get(request) is not connection or not isinstance(request, _socket.socket):
                    return False
                return borrow(connection, partial(_shut_down, connection, how))
            finally:
                connection.is_held = False

    def _hold(self, request: Any) -> Hold:
        """Return a hold on a request that tells when nobody has it any more."""
        hold = Hold(request, self._lose)
        hold.key = id(request)
        return hold

    def _lose(self, hold: ref[Any]) -> None:
        """Forget a connection that nobody has any more.

        The collector calls it between any two steps of a thread, whatever lock that thread holds.
        """
        connection = self.by_request.get(cast("Hold", hold).key)
        if connection is not None and connection.held is hold:
            del self.by_request[cast("Hold", hold).key]
            self._on_lost(connection)


def borrow(connection: Connection, use: Callable[[Any], _Result]) -> _Result:
    """Look at the socket of a connection, or shut it down, and return what `use` does.

    It is the request, unless that has lost its descriptor to an object that nobody told us of:
    `ssl.SSLContext.wrap_socket` takes it over in a handler that speaks STARTTLS.  Then it is a copy
    of the descriptor with that number, if it is connected to the same peer.  Peers of Unix sockets
    have no address to be known by.
    """
    request = connection.request
    # Not the method of a green or a TLS socket, here and below: that belongs to another thread.
    if not isinstance(request, _socket.socket) or _socket.socket.fileno(request) >= 0:
        return use(request)
    number: int | None = connection.descriptor
    if number is None:
        number = getattr(request, "descriptor", None)
    copy = None if number is None else _copy(number, connection.client_address)
    if copy is None:
        return use(request)
    with closing(copy):
        return use(copy)


def _shut_down(connection: Connection, how: int, sock: Any) -> bool:
    """Shut the socket of a connection down, and say whether it was open."""
    if _socket.socket.fileno(sock) < 0:
        return False
    if how == _socket.SHUT_RDWR:
        connection.was_cut = True
    with suppress(OSError):  # the peer was faster
        _socket.socket.shutdown(sock, how)
    return True


def _copy(number: int, peer: ClientAddress) -> _socket.socket | None:
    """Return another hold on the socket with this number, if it is connected to `peer`.

    First the copy, and then the question: the number may become another's at any moment.
    """
    try:
        descriptor = os.dup(number)
    except OSError:  # closed, or none left
        return None
    try:
        copy = _socket.socket(fileno=descriptor)
    except OSError:  # it is no socket
        os.close(descriptor)
        return None
    try:
        if copy.family in ADDRESSED_FAMILIES and copy.getpeername() == peer:
            return copy
    except OSError:  # connected no more
        pass
    copy.close()
    return None


def can_be_tracked(request: object) -> bool:
    """Say whether a request is a connection of its own, and no datagram or other thing."""
    return isinstance(request, _Socket)


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
