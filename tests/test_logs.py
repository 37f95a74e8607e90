from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from portico import StreamRequestHandler, TCPServer, ThreadingTCPServer, events, logs
from portico.errors import CertificateError
from portico.events import (
    AcceptPaused,
    AcceptResumed,
    CertificateLoaded,
    CertificateRejected,
    CloseReason,
    ConnectionAccepted,
    ConnectionClosed,
    ConnectionRefused,
    DatagramCut,
    Deadline,
    DeadlineExpired,
    Event,
    HandlerFailed,
    HandlerStalled,
    ListenerBound,
    ListenerLost,
    PeerGone,
    RefusalReason,
    RequestStarted,
    ServerStarted,
    ServerStopped,
    emit,
)
from tests.support import RunningServer, nothing_left_behind

PEER = ("192.0.2.7", 40000)


class Lines(logging.Handler):
    """Keep what a logger is told, as it would be printed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record.name, record.levelname, record.getMessage()))


@pytest.fixture
def logger() -> logging.Logger:
    """A logger that nobody else has, and that listens to everything."""
    made = logging.Logger("somebody's", logging.DEBUG)  # noqa: LOG001 - nobody else finds it
    made.addHandler(Lines())
    return made


def lines(logger: logging.Logger) -> list[tuple[str, str]]:
    """The level and the text of each line so far."""
    (handler,) = logger.handlers
    assert isinstance(handler, Lines)
    return [(level, text) for _, level, text in handler.seen]


@pytest.fixture
def server() -> Iterator[TCPServer]:
    """A server that never opened anything, at a literal address."""
    made = ThreadingTCPServer(PEER, StreamRequestHandler, bind_and_activate=False)
    made.server_address = ("192.0.2.1", 9000)
    yield made
    made.server_close()


@pytest.mark.parametrize(
    ("kind", "values", "line"),
    [
        (
            ServerStarted,
            (),
            ("INFO", "ThreadingTCPServer at ('192.0.2.1', 9000) started"),
        ),
        (
            ServerStopped,
            (),
            ("INFO", "ThreadingTCPServer at ('192.0.2.1', 9000) stopped"),
        ),
        (
            ListenerBound,
            (("192.0.2.1", 9000),),
            (
                "INFO",
                "ThreadingTCPServer at ('192.0.2.1', 9000) bound to ('192.0.2.1', 9000)",
            ),
        ),
        (
            ListenerLost,
            (None,),
            (
                "WARNING",
                "ThreadingTCPServer at ('192.0.2.1', 9000) stops: its listener was closed",
            ),
        ),
        (
            ConnectionAccepted,
            (PEER,),
            ("DEBUG", "accepted ('192.0.2.7', 40000)"),
        ),
        (
            ConnectionRefused,
            (PEER, RefusalReason.NOT_VERIFIED),
            ("INFO", "refused ('192.0.2.7', 40000): not verified"),
        ),
        (
            RequestStarted,
            (PEER, 0.12345),
            ("DEBUG", "serves ('192.0.2.7', 40000) after 0.123 s in the queue"),
        ),
        (
            ConnectionClosed,
            (PEER, CloseReason.FINISHED, 0.12345),
            ("DEBUG", "closed ('192.0.2.7', 40000) after 0.123 s: finished"),
        ),
        (
            HandlerFailed,
            (PEER, LookupError("no such key")),
            ("ERROR", "handler of ('192.0.2.7', 40000) failed: LookupError('no such key')"),
        ),
        (
            HandlerStalled,
            (PEER, "Echo", "program.py:12", 0.26),
            ("WARNING", "Echo of ('192.0.2.7', 40000) has held its hub for 0.3 s at program.py:12"),
        ),
        (
            PeerGone,
            (PEER, BrokenPipeError(errno.EPIPE, "Broken pipe")),
            ("DEBUG", "('192.0.2.7', 40000) went away: BrokenPipeError(32, 'Broken pipe')"),
        ),
        (
            DeadlineExpired,
            (PEER, Deadline.IDLE, 300.04),
            ("INFO", "shut ('192.0.2.7', 40000) down after 300.0 s: idle timeout"),
        ),
        (
            AcceptPaused,
            (OSError(errno.EMFILE, "Too many open files"),),
            (
                "WARNING",
                (
                    "ThreadingTCPServer at ('192.0.2.1', 9000) pauses accepting: "
                    "[Errno 24] Too many open files"
                ),
            ),
        ),
        (
            AcceptResumed,
            (1.26,),
            ("INFO", "ThreadingTCPServer at ('192.0.2.1', 9000) accepts again after 1.3 s"),
        ),
        (
            DatagramCut,
            (PEER, 8192),
            (
                "WARNING",
                "cut a datagram of ('192.0.2.7', 40000) to 8192 bytes (max_packet_size)",
            ),
        ),
        (
            CertificateLoaded,
            ("/etc/tls/cert.pem",),
            ("INFO", "/etc/tls/cert.pem was read again and is in use"),
        ),
        (
            CertificateRejected,
            ("/etc/tls/cert.pem", CertificateError(None, "no key", "/etc/tls/key.pem")),
            ("WARNING", "/etc/tls/key.pem: no key; the earlier certificate stays"),
        ),
    ],
)
def test_every_event_has_its_level_and_its_line(
    logger: logging.Logger,
    server: TCPServer,
    kind: type[Event],
    values: tuple[Any, ...],
    line: tuple[str, str],
) -> None:
    detach = logs.attach(logger)
    emit(kind(server, *values))
    detach()
    assert lines(logger) == [line]


def test_no_kind_of_event_is_forgotten() -> None:
    ours = {
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
    }
    assert set(logs.LINES) == ours


def test_the_logger_is_named_portico_unless_one_is_given(
    caplog: pytest.LogCaptureFixture, server: TCPServer
) -> None:
    caplog.set_level(logging.INFO, "portico")
    detach = logs.attach()
    emit(ServerStarted(server))
    detach()
    assert [(record.name, record.levelno) for record in caplog.records] == [
        ("portico", logging.INFO)
    ]


def test_nothing_is_written_after_the_end(logger: logging.Logger, server: TCPServer) -> None:
    detach = logs.attach(logger)
    detach()
    detach()
    emit(ServerStarted(server))
    assert lines(logger) == []
    assert all(kind.subscribers == () for kind in logs.LINES)


def test_what_the_level_hides_costs_nothing(logger: logging.Logger) -> None:
    """At the usual level no connection has an event built for it."""
    logger.setLevel(logging.INFO)
    detach = logs.attach(logger)
    try:
        assert {kind.__name__ for kind in logs.LINES if not kind.subscribers} == {
            "ConnectionAccepted",
            "ConnectionClosed",
            "PeerGone",
            "RequestStarted",
        }
    finally:
        detach()


def test_two_loggers_are_each_told(logger: logging.Logger, server: TCPServer) -> None:
    other = logging.Logger("another's", logging.ERROR)  # noqa: LOG001 - as above
    other.addHandler(Lines())
    ends = [logs.attach(logger), logs.attach(other)]
    emit(HandlerFailed(server, PEER, ValueError()))
    for end in ends:
        end()
    assert lines(logger) == lines(other)
    assert len(lines(logger)) == 1


def test_an_event_that_refines_one_of_ours_has_its_line(
    logger: logging.Logger, server: TCPServer
) -> None:
    class Restarted(ServerStarted):
        pass

    detach = logs.attach(logger)
    emit(Restarted(server))
    detach()
    assert lines(logger) == [("INFO", "ThreadingTCPServer at ('192.0.2.1', 9000) started")]


def test_a_peer_cannot_write_a_line_of_its_own(logger: logging.Logger, server: TCPServer) -> None:
    """The name of a Unix socket is its client's choice, line ends and percent signs included."""
    detach = logs.attach(logger)
    emit(ConnectionAccepted(server, "/tmp/%s\nERROR the server is on fire"))
    emit(DatagramCut(server, b"\0a\nb", 8192))
    detach()
    assert lines(logger) == [
        ("DEBUG", r"accepted '/tmp/%s\nERROR the server is on fire'"),
        ("WARNING", r"cut a datagram of b'\x00a\nb' to 8192 bytes (max_packet_size)"),
    ]


def test_a_server_of_another_kind_is_shown_as_it_shows_itself(logger: logging.Logger) -> None:
    detach = logs.attach(logger)
    emit(ServerStarted("my own server"))
    detach()
    assert lines(logger) == [("INFO", "my own server started")]


class Echo(StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        self.wfile.write(line)
        if line == b"fail with this secret\n":
            raise ValueError("the handler fails")


def test_a_log_tells_the_life_of_a_server_and_no_payload(
    logger: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    detach = logs.attach(logger)
    try:
        with nothing_left_behind():
            with RunningServer(TCPServer(("127.0.0.1", 0), Echo)) as running:
                name = f"TCPServer at {running.server.server_address!r}"
                with running.connect() as client:
                    peer = repr(client.getsockname())
                    client.sendall(b"fail with this secret\n")
                    assert client.recv(64) == b"fail with this secret\n"
                    assert client.recv(64) == b""
    finally:
        detach()
    written = lines(logger)
    closed = written.pop(4)
    assert written == [
        ("INFO", f"{name} bound to {running.server.server_address!r}"),
        ("INFO", f"{name} started"),
        ("DEBUG", f"accepted {peer}"),
        ("ERROR", f"handler of {peer} failed: ValueError('the handler fails')"),
        ("INFO", f"{name} stopped"),
    ]
    assert closed[1].startswith(f"closed {peer} after ")
    assert closed[1].endswith(" s: failed")
    assert "ValueError: the handler fails" in capfd.readouterr().err
