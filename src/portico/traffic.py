"""Ask the kernel what moved over one connection, at the moment when somebody looks.

Owns how the kernel is asked, and what its answers mean.  Nothing is counted on the way of a byte:
a connection that nobody looks at costs nothing.  Never waits, never reads a payload, and never
makes a socket send what it has collected.

Source: tcp(7), "TCP_INFO" and "Ioctls"; unix(7), "Ioctls"; `struct tcp_info` in linux/tcp.h, which
only ever grew at its end, so the length of an answer tells which of its fields exist.  Observed
on loopback, where the manual is silent: probes of a closed window move no instant; retransmissions
move `since_sent`; the end of the stream counts as one byte.
"""

from __future__ import annotations

import _socket
import fcntl
import sys
import termios
from struct import Struct
from typing import Any, Final, NamedTuple

IS_LINUX: Final[bool] = sys.platform.startswith("linux")
"""Elsewhere TCP_INFO is laid out in another way, if it is there, and SIOCOUTQ has another name."""

TCP_INFO: Final[int | None] = getattr(_socket, "TCP_INFO", None) if IS_LINUX else None
"""The option; ``None`` on a system that has no such answer."""

TCP: Final = _socket.IPPROTO_TCP
UNREAD: Final = termios.FIONREAD
"""SIOCINQ by its portable name."""
UNSENT: Final[int | None] = getattr(termios, "TIOCOUTQ", None) if IS_LINUX else None
"""SIOCOUTQ by the name that Python knows; ``None`` where it is for terminals alone."""

NUMBER: Final = Struct("=i")
"""What an ioctl of these tells."""

TIMES: Final = Struct("=44x I 4x I")
"""tcpi_last_data_sent, tcpi_last_data_recv."""
RECEIVED: Final = Struct("=128x Q")
"""tcpi_bytes_received."""
WAITING: Final = Struct("=24x I")
"""tcpi_unacked, which of a listener is the length of its backlog."""
BASIC: Final = Struct(f"{TIMES.format} 12x I 28x I")
"""And tcpi_rtt, tcpi_total_retrans.  Every Linux has these."""
COUNTED: Final = Struct(f"{BASIC.format} 16x Q Q")
"""And tcpi_bytes_acked, tcpi_bytes_received: since Linux 4.1."""
FULL: Final = Struct(f"{COUNTED.format} 64x Q Q")
"""And tcpi_bytes_sent, tcpi_bytes_retrans: since Linux 4.19."""

MOVED: Final = Struct("=B 119x Q Q 8x I 52x Q Q")
"""tcpi_state; tcpi_bytes_acked, tcpi_bytes_received; tcpi_notsent_bytes; tcpi_bytes_sent,
tcpi_bytes_retrans: since Linux 4.19."""

CLOSE: Final = 7
"""The state of a connection that both ends have ended, or one has reset."""
PEER_ENDED: Final = frozenset({6, 8, 9, 11})
"""The states after the peer's end of the stream: TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING."""
PEER_GOES_ON: Final = frozenset({1, 4, 5})
"""Those before it: ESTABLISHED, FIN_WAIT1, FIN_WAIT2."""
WE_ENDED: Final = frozenset({4, 5, 6, 9, 11})
"""The states after ours: FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK, CLOSING."""

STILLNESS: Final = 0.1
"""Seconds without a byte after which a connection may count as idle.

A peer that talks sends its next request one round trip after our last byte: closing in between
would lose that request.  It is long beside a round trip in one data centre, and short beside the
half second in which a drain ends idle connections.  A longer round trip is waited for twice.
"""

_fileno = _socket.socket.fileno  # not the method of a green socket, which sends what it collected
_getsockopt = _socket.socket.getsockopt


class Traffic(NamedTuple):
    """What moved over one connection, as far as the system says.

    ``None`` stands for what this kind of socket, or this system, does not tell.  On a TLS
    connection bytes are those of its records.
    """

    received: int | None = None
    """Bytes that came in, read or not; the end of the stream counts as one."""
    sent: int | None = None
    """Bytes that left, each once, however often it had to be sent again."""
    acknowledged: int | None = None
    """Bytes of them that the peer's system has; the end of the stream counts as one."""
    unread: int | None = None
    """Bytes that came in and that nobody has read from the kernel.  What a file or a TLS layer
    over the socket has buffered is read."""
    unsent: int | None = None
    """Bytes that were written and not acknowledged, sent or not.  On a Unix socket it is the
    memory that they take until the peer reads them, so only zero is exact."""
    since_received: float | None = None
    """Seconds since the last byte came in, in steps of the kernel's tick (1 to 10 ms); ``None``
    also when none ever did."""
    since_sent: float | None = None
    """Seconds since a byte last left, also if it was sent again; ``None`` also when none ever
    did."""
    round_trip: float | None = None
    """Seconds from a byte to its acknowledgement, smoothed."""
    retransmissions: int | None = None
    """Segments that had to be sent again."""


UNKNOWN: Final = Traffic()
"""What is known of a socket that was closed, and of a request that is none."""


def look(sock: Any) -> Traffic:
    """Ask the kernel about the connection of `sock`.

    Callable from any thread.  Three system calls, about two microseconds.  Whoever looks keeps
    the socket from being closed meanwhile, as for every call on a socket: its descriptor may
    belong to another connection a moment later.

    Args:
        sock: A socket of any kind in any state, a TLS or a green one too.  A connection that was
            reset still tells its totals.

    Returns:
        What the system says; `UNKNOWN` for a closed socket and for anything that is no socket.
    """
    if not isinstance(sock, _socket.socket) or (fd := _fileno(sock)) < 0:
        return UNKNOWN
    unread = _ask(fd, UNREAD)
    unsent = None if UNSENT is None else _ask(fd, UNSENT)
    return read(_tcp_info(sock, FULL.size), unread, unsent)


def read(info: bytes, unread: int | None = None, unsent: int | None = None) -> Traffic:
    """Read the kernel's `struct tcp_info`, of whatever age.

    Args:
        info: As getsockopt(2) returned it; fields beyond its end are not known.
        unread: As SIOCINQ told it.
        unsent: As SIOCOUTQ told it.
    """
    received = sent = acknowledged = None
    if len(info) >= FULL.size:
        left, came, rtt, again, acknowledged, received, data, repeated = FULL.unpack_from(info)
        sent = data - repeated
    elif len(info) >= COUNTED.size:
        left, came, rtt, again, acknowledged, received = COUNTED.unpack_from(info)
        sent = acknowledged
    elif len(info) >= BASIC.size:
        left, came, rtt, again = BASIC.unpack_from(info)
    else:
        return Traffic(unread=unread, unsent=unsent)
    return Traffic(
        received,
        sent,
        acknowledged,
        unread,
        unsent,
        # Until a first byte the kernel counts from the beginning of the connection.
        None if received == 0 else came / 1000,
        None if sent == 0 else left / 1000,
        rtt / 1_000_000 if rtt else None,
        again,
    )


def with_activity(traffic: Traffic, activity: int | None) -> Traffic:
    """Put what an engine knows in the place of bytes that the kernel does not count.

    So it is with a Unix socket: nobody tells how many bytes came and left, nor when the last did.
    What then stands in `Traffic.received` and `Traffic.sent` only tells whether anything moved
    between two looks.

    Args:
        traffic: What `look` returned.
        activity: A number of 0 or more that grows when the handler does something; ``None`` if
            nobody knows.
    """
    if activity is None or traffic is UNKNOWN or traffic.received is not None:
        return traffic
    # Side by side, so that a change of one cannot hide that of another; and never 0, which would
    # say that nothing has ever moved.
    mark = ((activity + 1) << 64) + ((traffic.unread or 0) << 32) + (traffic.unsent or 0)
    return traffic._replace(received=mark, sent=mark)


def idle_seconds(sock: Any) -> float | None:
    """Say for how long no byte has left or come in: one system call, for a look at many.

    Callable from any thread.

    Returns:
        Seconds; since the connection came to be if nothing ever moved.  Retransmissions count
        as bytes here, so a connection may have been idle for longer.  ``None`` where the system
        does not tell.
    """
    info = _tcp_info(sock, TIMES.size)
    if len(info) < TIMES.size:
        return None
    left: int
    came: int
    left, came = TIMES.unpack_from(info)
    return min(left, came) / 1000


def bytes_received(sock: Any) -> int | None:
    """Say how many bytes came in: one system call, for a look at many.

    Callable from any thread.

    Returns:
        As `Traffic.received`.
    """
    info = _tcp_info(sock, RECEIVED.size)
    if len(info) < RECEIVED.size:
        return None
    count: int
    (count,) = RECEIVED.unpack_from(info)
    return count


def bytes_moved(sock: Any) -> tuple[int, int] | None:
    """Say how many bytes came in and were written, without the ends of the streams.

    One or two system calls, for a look at a connection that is about to be closed.  Callable from
    any thread.

    Returns:
        What came in, read or not; and what was written, sent or not, but without what a reset has
        kept from being sent.  ``None`` where the system does not tell.
    """
    if TCP_INFO is None:
        return None
    try:
        info = _getsockopt(sock, TCP, TCP_INFO, MOVED.size)
        # The kernel reads the state before it stops the connection to read the rest: if the end of
        # the peer's stream came in between, it is counted, and the state does not show it.
        while info[0] in PEER_GOES_ON and _getsockopt(sock, TCP, TCP_INFO, 1) != info[:1]:
            info = _getsockopt(sock, TCP, TCP_INFO, MOVED.size)
    except (OSError, TypeError):  # of another kind, or closed; or no socket
        return None
    return read_moved(info)


def read_moved(info: bytes) -> tuple[int, int] | None:
    """Read the bytes that have moved from the kernel's `struct tcp_info`.

    The kernel counts the end of the stream as a byte that came in, and one that is acknowledged or
    not yet sent.  Which of them there was, the state of the connection tells; if a connection that
    we had ended was then reset, one byte too few is told.

    Args:
        info: As getsockopt(2) returned it.

    Returns:
        As `bytes_moved`; ``None`` if fields are missing.
    """
    if len(info) < MOVED.size:
        return None
    state, acknowledged, received, unsent, data, repeated = MOVED.unpack_from(info)
    sent = data - repeated
    peer_ended = state in PEER_ENDED or (state == CLOSE and acknowledged > sent)
    if state != CLOSE:  # after a reset, nothing more is sent
        sent += max(0, unsent - (state in WE_ENDED))
    return max(0, received - peer_ended), sent


def connections_waiting(listener: Any) -> int | None:
    """Say how many connections the kernel has completed and holds in the backlog of a listener.

    Callable from any thread.

    Returns:
        ``None`` where the system does not tell.
    """
    info = _tcp_info(listener, WAITING.size)
    if len(info) < WAITING.size:
        return None
    count: int
    (count,) = WAITING.unpack_from(info)
    return count


def is_idle(
    traffic: Traffic,
    waits_to_read: bool | None,
    age: float,
    stillness: float = STILLNESS,
) -> bool:
    """Say whether nobody would miss this connection: it is between two requests.

    It is, when the last byte that moved was ours, nothing is unread, and that has been so for a
    moment.  A handler that may be at work, or in the middle of a request, is not idle: of two
    errors, giving a busy connection time is the one that loses nothing.

    A connection over which no byte has moved yet is idle once it is older than `stillness`: one
    that was just accepted has its request on the way, one that has been silent has none.  So
    whoever drains asks again about those that were not idle at first.

    Args:
        traffic: What `look` returned.
        waits_to_read: Whether its handler waits for bytes of this connection, as its engine
            knows; ``None`` if it does not.  It decides alone where the kernel tells no instants,
            and where both fell into one tick of its clock.
        age: Seconds since the connection was accepted.
        stillness: Seconds without a byte that it takes; two round trips if that is longer.
    """
    if waits_to_read is False or traffic.unread:
        return False
    if traffic.unsent and not waits_to_read:  # it may be in the middle of writing
        return False
    came, left = traffic.since_received, traffic.since_sent
    quiet = min((since for since in (came, left) if since is not None), default=age)
    if quiet < max(stillness, 2 * (traffic.round_trip or 0.0)):
        return False
    if came is None and traffic.received == 0:
        return True  # it has said nothing: not one request has begun
    if came is None or left is None:
        # Nobody says who was last; or a request came, and nothing has left.
        return came is left and bool(waits_to_read)
    return left < came or (left == came and bool(waits_to_read))


def _tcp_info(sock: Any, size: int) -> bytes:
    """Return as much of `struct tcp_info` as the kernel has; nothing if it is no TCP socket."""
    if TCP_INFO is None:
        return b""
    try:
        return _getsockopt(sock, TCP, TCP_INFO, size)
    except (OSError, TypeError):  # of another kind, or closed; or no socket
        return b""


def _ask(fd: int, request: int) -> int | None:
    """Return the number that an ioctl tells; ``None`` if this socket has no answer."""
    answer = bytearray(NUMBER.size)  # of its own: threads look at the same time
    try:
        fcntl.ioctl(fd, request, answer)
    except OSError:
        return None
    number: int = NUMBER.unpack(answer)[0]
    return number
