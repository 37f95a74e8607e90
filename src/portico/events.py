"""Tell whoever listens what happens in a server.

Owns the kinds of events and who subscribed to them.  An event is built only when somebody
subscribed to its kind: the place that emits it asks first, which costs one attribute.

    if ConnectionAccepted.subscribers:
        emit(ConnectionAccepted(self, client_address))

Subscribers run in the thread where the event happened, between two steps of a request, so
they return soon and never wait for a peer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from threading import Lock
from typing import Any, ClassVar, TypeAlias, TypeVar

from portico.errors import CertificateError

Subscriber: TypeAlias = "Callable[[Any], object]"
_E = TypeVar("_E", bound="Event")

_subscribing = Lock()  # guards every `Event.subscribers`


@dataclass(frozen=True)
class Event:
    """Something that happened in a server; the root of all kinds.

    Attributes:
        server: The server object in which it happened.
    """

    subscribers: ClassVar[tuple[Subscriber, ...]] = ()
    """Who listens to this kind; empty when nobody does.  Change it with `subscribe`."""

    server: Any

    def __init_subclass__(cls) -> None:
        """Give each kind subscribers of its own: those of the kind that it refines."""
        cls.subscribers = tuple(cls.subscribers)


@dataclass(frozen=True)
class ServerStarted(Event):
    """`serve_forever` begins to accept."""


@dataclass(frozen=True)
class ServerStopped(Event):
    """`serve_forever` ended, for whatever reason."""


@dataclass(frozen=True)
class ListenerBound(Event):
    """A listener has its address.

    Attributes:
        address: What `getsockname` returns; its shape depends on the address family.
    """

    address: Any


@dataclass(frozen=True)
class ListenerLost(Event):
    """The listener was closed or shut down while the server accepted from it; the loop ends.

    Attributes:
        error: What accepting raised; ``None`` when the server was closed by its own
            `server_close`.
    """

    error: OSError | None


@dataclass(frozen=True)
class ConnectionAccepted(Event):
    """A connection, or a datagram, came in.

    Attributes:
        peer: Its client address.
    """

    peer: Any


class RefusalReason(StrEnum):
    """Why a connection was refused."""

    NOT_ADMITTED = "not admitted"
    """`admit_request` said no."""
    NOT_VERIFIED = "not verified"
    """The program's own `verify_request` said no."""
    DENIED = "network denied"
    """It is in one of `denied_networks`."""
    NOT_ALLOWED = "network not allowed"
    """It is in none of `allowed_networks`."""
    TOO_MANY = "too many connections"
    """`max_connections` were open."""
    TOO_MANY_OF_PEER = "too many connections of this peer"
    """`max_connections_per_peer` of the same peer were open."""
    TOO_FAST = "too many connections a second"
    """`accept_rate` was exceeded."""


@dataclass(frozen=True)
class ConnectionRefused(Event):
    """A connection, or a datagram, was closed before its handler was made.

    Attributes:
        peer: Its client address.
        reason: Who refused it.
    """

    peer: Any
    reason: RefusalReason


@dataclass(frozen=True)
class RequestStarted(Event):
    """A worker of a `ThreadPoolMixIn` took a connection, or a datagram.

    Told in the worker, just before it serves.

    Attributes:
        peer: Its client address.
        queued: Seconds since the acceptor handed it over.  What it waited in the kernel's backlog
            before that, nobody knows.
    """

    peer: Any
    queued: float


class CloseReason(StrEnum):
    """Why a connection ended."""

    FINISHED = "finished"
    """The handler returned."""
    FAILED = "failed"
    """The handler, or a hook on the way to it, raised."""
    PEER_GONE = "peer gone"
    """The peer vanished while the handler used the connection."""
    INTERRUPTED = "interrupted"
    """`SystemExit`, `KeyboardInterrupt` or the like went through the handler."""
    DEADLINE = "deadline"
    """It exceeded a limit in time (`DeadlineExpired`)."""
    CUT = "cut"
    """It was closed at the end of a drain, or to make room for another (`BaseServer.when_full`)."""
    NO_PREAMBLE = "no preamble"
    """The TLS handshake or the PROXY header did not come (`PreambleFailed`)."""


@dataclass(frozen=True)
class ConnectionClosed(Event):
    """An accepted connection, or a datagram, came to its end without being refused.

    With `ForkingMixIn` it happens in the child process.

    Attributes:
        peer: Its client address, as the handler saw it.
        reason: How its handler ended.
        duration: Seconds from the moment that a worker took it; if none could, from the moment
            that it was accepted.
    """

    peer: Any
    reason: CloseReason
    duration: float


@dataclass(frozen=True)
class HandlerFailed(Event):
    """A handler, or a hook on the way to it, raised.  Told before `handle_error` is called.

    Attributes:
        peer: The client address.
        error: What was raised.
    """

    peer: Any
    error: Exception


@dataclass(frozen=True)
class HandlerStalled(Event):
    """A handler held its hub for longer than `GreenMixIn.stall_threshold`: nobody else was served.

    Told while it goes on, once a minute for each place.

    Attributes:
        peer: The client address of the request; ``None`` if it was no request's greenlet.
        handler: The name of the handler's class or function.
        place: Where it was: the file and line of the innermost frame of the program's own.
        duration: Seconds so far.
    """

    peer: Any
    handler: str
    place: str
    duration: float


@dataclass(frozen=True)
class PeerGone(Event):
    """A handler failed only because its peer vanished.  Told before `handle_error` is called.

    Attributes:
        peer: The client address.
        error: What was raised.
    """

    peer: Any
    error: Exception


class Deadline(StrEnum):
    """A limit in time that a connection can exceed."""

    HANDSHAKE = "handshake timeout"
    """What comes before the handler took too long."""
    IDLE = "idle timeout"
    """No byte moved in either direction for too long."""
    REQUEST = "request timeout"
    """The handler took too long in all."""
    RATE = "minimum rate"
    """The handler waited for a peer that sent too little."""


@dataclass(frozen=True)
class DeadlineExpired(Event):
    """A connection exceeded a limit in time and is shut down, which ends its handler.

    Attributes:
        peer: Its client address.
        deadline: Which limit it was.
        duration: Seconds since the connection was accepted.
    """

    peer: Any
    deadline: Deadline
    duration: float


@dataclass(frozen=True)
class PreambleFailed(Event):
    """A peer did not speak TLS, or sent no PROXY header, where it has to; it was closed.

    Attributes:
        peer: Its client address.
        stage: ``"TLS handshake"`` or ``"PROXY header"``.
        reason: What happened, in words; nothing of what the peer sent.
    """

    peer: Any
    stage: str
    reason: str


@dataclass(frozen=True)
class DrainStarted(Event):
    """A server accepts no more, and waits for its open connections.

    Attributes:
        connections: How many are open.
        timeout: Seconds until the rest is closed; ``None`` for no limit.
    """

    connections: int
    timeout: float | None


@dataclass(frozen=True)
class Drained(Event):
    """A drain has come to its end.

    Attributes:
        report: A `portico.DrainReport`.
    """

    report: Any


@dataclass(frozen=True)
class AcceptPaused(Event):
    """The system has no descriptor or memory for another connection; accepting rests.

    Told once until accepting works again.

    Attributes:
        error: What accepting raised.
    """

    error: OSError


@dataclass(frozen=True)
class AcceptResumed(Event):
    """Accepting works again.

    Attributes:
        duration: Seconds since `AcceptPaused`.
    """

    duration: float


@dataclass(frozen=True)
class DatagramCut(Event):
    """A datagram was longer than `max_packet_size`; its end is lost.

    Attributes:
        peer: Who sent it; ``None`` for an unbound Unix socket.
        max_packet_size: Bytes that were kept.
    """

    peer: Any
    max_packet_size: int


@dataclass(frozen=True)
class CertificateLoaded(Event):
    """A certificate and its key were read again; handshakes use them from now on.

    `server` is the one whose handshake noticed the change; ``None`` if somebody asked for it.

    Attributes:
        certificate: The file of the certificate.
    """

    certificate: str


@dataclass(frozen=True)
class CertificateRejected(Event):
    """A certificate and its key cannot be used as they are now; the earlier ones stay.

    Told once, until the files change or somebody asks for them to be read again.  `server` is
    the one whose handshake noticed the change; ``None`` if somebody asked for it.

    Attributes:
        certificate: The file of the certificate.
        error: Which file is wrong, and what would be right.
    """

    certificate: str
    error: CertificateError


def subscribe(callback: Callable[[_E], object], *kinds: type[_E]) -> Callable[[], None]:
    """Call `callback` with every event of these kinds, in all servers of the process.

    Callable from any thread.  What the callback raises is logged and stops nothing.

    Args:
        callback: Called with the event, in the thread where it happened.
        *kinds: Classes of events; a class stands for all that refine it, and none stands
            for all kinds.

    Returns:
        A function that ends the subscription; a second call does nothing.
    """
    subscription = partial(callback)  # an object of its own: unlike a function, not shared
    roots: tuple[type[Event], ...] = kinds or (Event,)
    with _subscribing:
        for kind in _refinements(roots):
            kind.subscribers += (subscription,)

    def unsubscribe() -> None:
        with _subscribing:
            for kind in _refinements(roots):  # with those that were defined since
                kind.subscribers = tuple(s for s in kind.subscribers if s is not subscription)

    return unsubscribe


def emit(event: Event) -> None:
    """Hand `event` to its subscribers.  Never raises what they raise."""
    for callback in event.subscribers:
        try:
            callback(event)
        except Exception:
            logging.getLogger(__name__).exception("a subscriber of %s failed", type(event).__name__)


def _refinements(roots: Iterable[type[Event]]) -> set[type[Event]]:
    """Return the kinds and all that refine them."""
    kinds = set(roots)
    for kind in roots:
        kinds |= _refinements(kind.__subclasses__())
    return kinds
