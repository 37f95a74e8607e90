from __future__ import annotations

import threading

import pytest

from portico import StreamRequestHandler, TCPServer
from portico.traffic import connections_waiting
from tests.support import PATIENCE, Call, RunningServer, connect, eventually, nothing_left_behind

LOOPBACK = ("127.0.0.1", 0)


class Echo(StreamRequestHandler):
    """Send each line back; say on the server when one was."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


def test_a_drain_gives_end_of_file_to_a_peer_whose_handler_holds_the_loop() -> None:
    """And to those that were in the backlog, whose handlers hold the drain."""
    server = TCPServer(LOOPBACK, Echo)
    with nothing_left_behind(), RunningServer(server) as running, running.connect() as client:
        client.sendall(b"word\n")
        assert client.recv(64) == b"word\n"
        with connect(server) as waiting:
            waiting.sendall(b"other\n")
            eventually(lambda: connections_waiting(server.socket), "it is in the backlog")
            report = Call(server.drain, PATIENCE).result()
            assert waiting.recv(64) == b"other\n"
            assert waiting.recv(64) == b""
        assert client.recv(64) == b""
    assert report is not None
    assert (report.connections, report.idle, report.forced) == (2, 2, 0)


def test_a_drain_closes_at_the_deadline_under_a_handler_that_holds_the_loop() -> None:
    entered = threading.Event()

    class Await(StreamRequestHandler):
        def handle(self) -> None:
            self.request.recv(1)
            entered.set()
            self.request.recv(1)  # the last word is the peer's, so it is not idle

    server = TCPServer(LOOPBACK, Await)
    with nothing_left_behind(), RunningServer(server) as running, running.connect() as client:
        client.sendall(b"x")
        assert entered.wait(PATIENCE)
        report = Call(server.drain, 0.3).result()
        assert client.recv(64) == b""
    assert report is not None
    assert (report.connections, report.forced) == (1, 1)


def test_a_drain_needs_no_thread_if_the_system_has_none_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no thread left")

    server = TCPServer(LOOPBACK, Echo)
    with RunningServer(server) as running:
        running.shutdown()
        monkeypatch.setattr(threading.Thread, "start", fail)
        report = server.drain(PATIENCE)
        monkeypatch.undo()
    assert report is not None
    assert report.connections == 0
