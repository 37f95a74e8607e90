from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import portico
from portico import address
from portico.counters import Counters, Row
from portico.counts import NO_PREAMBLE, NOBODY, Counts
from portico.events import RefusalReason
from portico.listener import open_listener
from portico.opening import station_names
from portico.service import Assignment, Service
from portico.settings import Settings
from portico.tally import Tally
from tests.support import PATIENCE, Call, descriptors, eventually, received, reset
from tests.tls import Authority

ENGINES = ["serial", "threads", "pool", "green", "forks"]


class Obey(portico.StreamRequestHandler):
    """Does what the first line says."""

    def handle(self) -> None:
        match self.rfile.readline().split():
            case [b"say", number]:
                self.wfile.write(b"x" * int(number))
            case [b"fail"]:
                raise RuntimeError("as told")
            case [b"hold"]:
                self.wfile.write(b"held\n")
                self.rfile.read()
            case [b"exit"]:
                self.wfile.write(b"gone\n")
                os._exit(3)
            case _:
                pass


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portico.BaseServer, "handle_error", lambda *_: None)


class Counted:
    """A service of one address that counts in a row of a shared mapping, and its clients."""

    def __init__(
        self, text: str = "tcp://127.0.0.1:0", handler: Any = Obey, **settings: Any
    ) -> None:
        self.opened = open_listener(address.parse(text))
        self.counters = Counters.create(rows=2, stations=2)
        self.counters.allot(station_names([self.opened]))
        self.row = Row(self.counters, self.counters.claim())
        assignment = Assignment(handler, self.opened.place.address, Settings(**settings))
        self.where: Any = self.opened.socket.getsockname()
        self.service = Service([assignment], [self.opened], row=self.row)
        self.running = Call(self.service.run)

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        if self.opened.socket.family == socket.AF_UNIX:
            client = socket.socket(socket.AF_UNIX)
            client.connect(self.where)
            return client
        return socket.create_connection(self.where, PATIENCE, (host, 0))

    def ask(self, question: bytes) -> bytes:
        with self.connect() as client:
            client.sendall(question)
            return received(client)

    @property
    def counts(self) -> Counts:
        return self.counters.totals().sum

    def stop(self) -> Tally:
        self.service.stop()
        (tally,) = self.running.result()
        return tally

    def close(self) -> None:
        self.service.stop()
        self.running.failure()
        self.service.close()
        self.counters.close()


@contextmanager
def counted(*arguments: Any, **settings: Any) -> Iterator[Counted]:
    with closing(Counted(*arguments, **settings)) as made:
        yield made


@pytest.mark.parametrize("engine", ENGINES)
def test_the_counts_are_what_the_clients_know(engine: str) -> None:
    """Each request in its way, each byte that was written to it or by it, each refusal."""
    rounds, sizes = 4, (0, 1, 5000, 1 << 20)
    sent = got = 0
    with counted(
        engine=engine, denied_networks=("127.0.0.2",), max_connections=100, when_full="refuse"
    ) as server:
        for _ in range(rounds):
            for size in sizes:
                question = b"say %d\n" % size
                sent += len(question)
                got += len(server.ask(question))
            sent += len(b"fail\n")
            got += len(server.ask(b"fail\n"))
            with server.connect("127.0.0.2") as denied:
                assert received(denied) == b""
        eventually(lambda: server.counts.accepted == rounds * 6)
        tally = server.stop()
        assert got == rounds * sum(sizes)
        assert server.counts == Counts(
            accepted=rounds * 6,
            finished=rounds * 4,
            failed=rounds,
            received=sent,
            sent=got,
            refused_by={**NOBODY, RefusalReason.DENIED: rounds},
        )
        assert (tally.served, tally.refused, tally.cut_off) == (rounds * 5, rounds, 0)
        assert server.counters.release(server.row.number) == server.counts


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks"])
def test_many_clients_at_once_are_counted_exactly(engine: str) -> None:
    threads, each = 6, 20

    def load() -> int:
        return sum(len(server.ask(b"say 10\n")) for _ in range(each))

    with counted(engine=engine, max_connections=100) as server:
        calls = [Call(load) for _ in range(threads)]
        assert sum(call.result() for call in calls) == threads * each * 10
        server.stop()
        counts = server.counts
        assert (counts.accepted, counts.finished, counts.active) == (120, 120, 0)
        assert (counts.received, counts.sent) == (120 * 7, 120 * 10)


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks"])
def test_who_is_cut_off_at_the_stop_is_counted_so(engine: str) -> None:
    with (
        counted(engine=engine, drain_timeout=0.2, handler=HoldAll) as server,
        server.connect() as client,
    ):
        client.sendall(b"hold\n")
        assert client.recv(5) == b"held\n"
        assert server.counts.active == 1
        tally = server.stop()
        assert (tally.served, tally.cut_off) == (0, 1)
        assert (server.counts.cut_off, server.counts.active) == (1, 0)


class HoldAll(Obey):
    """Goes on after the end of the stream, until its connection is closed."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"held\n")
        while True:
            self.wfile.write(b"." * 65536)


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_a_peer_that_vanishes_is_no_failure(engine: str) -> None:
    with counted(engine=engine, handler=HoldAll) as server:
        client = server.connect()
        client.sendall(b"hold\n")
        assert client.recv(5) == b"held\n"
        reset(client)
        eventually(lambda: server.counts.peer_gone)
        assert server.stop().served == 1


@pytest.mark.parametrize("engine", ["threads", "green", "forks"])
def test_who_does_not_shake_hands_is_refused(engine: str, authority: Authority) -> None:
    pair = authority.issue("localhost")
    with counted("tls://127.0.0.1:0", engine=engine, cert=pair.certificate, key=pair.key) as server:
        with suppress(ConnectionResetError):  # what it has said is not read
            server.ask(b"say 10\n")
        context = authority.client()
        with (
            server.connect() as bare,
            context.wrap_socket(bare, server_hostname="localhost") as client,
        ):
            client.sendall(b"say 10\n")
            assert client.recv(64) == b"x" * 10
        eventually(lambda: server.counts.accepted == 2)
        tally = server.stop()
        assert (tally.served, tally.refused) == (1, 1)
        counts = server.counts
        assert counts.refused_by[NO_PREAMBLE] == 1
        assert counts.finished == 1
        assert counts.received > 7  # the records of TLS


@pytest.mark.parametrize("engine", ["threads", "green", "forks"])
def test_of_datagrams_the_bytes_that_came_are_counted(engine: str) -> None:
    class Reply(portico.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read())

    with (
        counted("udp://127.0.0.1:0", Reply, engine=engine) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(PATIENCE)
        for size in (1, 100, 1000):
            client.sendto(b"x" * size, server.where)
            assert len(client.recv(2000)) == size
        server.stop()
        counts = server.counts
        assert (counts.accepted, counts.finished, counts.received, counts.sent) == (3, 3, 1101, 0)


def test_the_system_does_not_tell_the_bytes_of_a_unix_socket(tmp_path: Path) -> None:
    with counted(f"unix:{tmp_path}/s", engine="threads") as server:
        assert len(server.ask(b"say 10\n")) == 10
        server.stop()
        counts = server.counts
        assert (counts.finished, counts.received, counts.sent) == (1, 0, 0)


def test_a_child_that_ends_without_a_word_was_cut_off() -> None:
    with counted(engine="forks") as server:
        assert server.ask(b"exit\n") == b"gone\n"
        assert len(server.ask(b"say 10\n")) == 10
        tally = server.stop()
        assert (tally.served, tally.cut_off) == (1, 1)
        assert (server.counts.finished, server.counts.cut_off) == (1, 1)


def test_a_service_of_its_own_counts_in_memory_of_its_own() -> None:
    gc.collect()
    before = set(descriptors().values())  # by what they are: some of an earlier test may close yet
    settings = Settings()
    where = address.parse("tcp://127.0.0.1:0")
    with Service([Assignment(Obey, where, settings)] * 70) as service:
        assert len(service.addresses) == 70
        opened = set(descriptors().values()) - before
        assert [each.partition(":")[0] for each in opened] == ["socket"] * 70


def test_a_handler_that_is_left_behind_is_known() -> None:
    release = threading.Event()

    class Hold(portico.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b".")
            release.wait(PATIENCE)

    with ExitStack() as stack:
        server = stack.enter_context(counted(handler=Hold, engine="threads", drain_timeout=0.1))
        client = stack.enter_context(server.connect())
        assert client.recv(1) == b"."
        assert server.service.has_left_handlers
        release.set()
        eventually(lambda: not server.service.has_left_handlers)


def test_children_are_no_handlers_that_are_left_behind() -> None:
    with counted(engine="forks", drain_timeout=0) as server, server.connect() as client:
        client.sendall(b"hold\n")
        assert client.recv(64) == b"held\n"
        assert not server.service.has_left_handlers
        for child in server.service._servers[0].active_children:  # type: ignore[attr-defined]
            os.kill(child, signal.SIGKILL)
