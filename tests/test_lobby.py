"""Tests of the connections that wait for their peers' first word."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from portico import (
    CertificateError,
    ForkingMixIn,
    GreenMixIn,
    StreamRequestHandler,
    TCPServer,
    ThreadPoolMixIn,
)
from portico.deadlines import LONGEST_WAIT
from portico.events import CloseReason, ConnectionClosed, Deadline, DeadlineExpired
from portico.lobby import Guest, Lobby
from tests.support import (
    Call,
    Journal,
    RunningServer,
    eventually,
    goodbye,
    in_child,
    nothing_left_behind,
    recorded,
)

if TYPE_CHECKING:
    from tests.tls import Authority

PROXY_LINE = b"PROXY TCP4 192.0.2.7 127.0.0.1 5000 80\r\n"


# --- the lobby itself -------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@contextmanager
def lobby(timeout: float | None = None) -> Iterator[Lobby]:
    with nothing_left_behind():
        made = Lobby(timeout)
        yield made
        for guest in made.close():
            guest.request.close()


def test_who_has_spoken_already_is_not_kept(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(b"x")
    with lobby() as kept:
        assert not kept.take(Guest(ours, None, 0.0))
        assert len(kept) == 0


@pytest.mark.parametrize("act", [lambda peer: peer.sendall(b"x"), lambda peer: peer.close()])
def test_who_speaks_or_goes_is_found(pair: tuple[socket.socket, socket.socket], act: Any) -> None:
    """And makes the lobby's own descriptor readable."""
    ours, theirs = pair
    guest = Guest(ours, None, 0.0)
    with lobby() as kept:
        assert kept.take(guest)
        assert list(kept.speaking()) == []
        act(theirs)
        poll = select.poll()
        poll.register(kept)
        assert poll.poll(0)
        assert list(kept.speaking()) == [guest]
        assert kept.leave(guest)
        assert not kept.leave(guest), "it had left"
        assert not poll.poll(0)


def test_who_leaves_while_others_are_looked_at_is_left_out() -> None:
    with lobby() as kept, ExitStack() as stack:
        for _ in range(2):
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            assert kept.take(Guest(ours, None, 0.0))
            theirs.sendall(b"x")
        seen = 0
        for guest in kept.speaking():
            seen += 1
            for other in kept.guests():
                if other is not guest:
                    kept.leave(other)
        assert seen == 1


def test_the_first_that_came_is_late_first() -> None:
    with lobby(timeout=5) as kept, ExitStack() as stack:
        guests = []
        for since in (10.0, 12.0):
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            guests.append(Guest(ours, None, since))
            assert kept.take(guests[-1])
        assert kept.remaining(11.0) == 4.0
        assert list(kept.late(14.9)) == []
        for guest in kept.late(15.1):
            assert kept.leave(guest)
        assert kept.guests() == (guests[1],)


def test_who_is_late_in_many_years_is_waited_for_in_parts(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    with lobby(timeout=1e11) as kept:
        assert kept.take(Guest(pair[0], None, 0.0))
        assert kept.remaining(1.0) == LONGEST_WAIT


def test_without_a_limit_nobody_is_late(pair: tuple[socket.socket, socket.socket]) -> None:
    with lobby(timeout=None) as kept:
        assert kept.take(Guest(pair[0], None, 0.0))
        assert kept.remaining(1e9) is None
        assert list(kept.late(1e9)) == []


def test_a_lobby_that_is_closed_keeps_nobody(pair: tuple[socket.socket, socket.socket]) -> None:
    guest = Guest(pair[0], None, 0.0)
    with lobby() as kept:
        assert kept.take(guest)
        assert kept.close() == (guest,)
        assert kept.close() == ()
        assert not kept.take(guest)
        assert list(kept.speaking()) == []


def test_what_the_system_does_not_watch_is_not_kept(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a limit to what one user may watch; then a worker waits, as for any handler."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with lobby() as kept:
        monkeypatch.setattr(kept._selector, "register", refuse)
        assert not kept.take(Guest(pair[0], None, 0.0))
        assert kept.guests() == ()


def test_a_forked_child_lets_go_of_its_copies(pair: tuple[socket.socket, socket.socket]) -> None:
    """And leaves those of its parent watched."""
    ours, theirs = pair
    guest = Guest(ours, None, 0.0)
    with lobby() as kept:
        assert kept.take(guest)

        def abandon() -> None:
            kept.abandon()
            assert ours.fileno() < 0

        assert in_child(abandon) == 0
        theirs.sendall(b"x")
        assert list(kept.speaking()) == [guest]


# --- in a server ------------------------------------------------------------------------


class Echo(StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


WITH_A_LOBBY: Any = [(), (ThreadPoolMixIn,), (ForkingMixIn,)]
"""The engines on which a peer that has to speak first waits in the acceptor."""


class Rounds:
    """Has the serving loop come round every `poll_interval`."""

    def service_actions(self) -> None:
        super().service_actions()  # type: ignore[misc]  # of the server that it is mixed into


def make(*mix_ins: type, **settings: Any) -> Any:
    """Make a server whose peers begin with a PROXY header."""
    settings.setdefault("proxy_protocol", ["127.0.0.0/8"])
    kind: Any = type("Server", (*mix_ins, TCPServer), settings)
    return kind(("127.0.0.1", 0), Echo)


def kept_by(server: Any) -> int:
    lobby = server._guard.lobby
    return 0 if lobby is None else len(lobby)


def answer(client: socket.socket) -> bytes:
    client.sendall(PROXY_LINE + b"hello\n")
    return goodbye(client)


def test_closing_the_server_ends_who_is_silent() -> None:
    with recorded(ConnectionClosed) as closed, RunningServer(make(ThreadPoolMixIn)) as running:
        with running.connect() as silent:
            eventually(lambda: kept_by(running.server) == 1)
            running.shutdown()
            Call(running.server.server_close).result()
            assert goodbye(silent) == b""
    assert [event.reason for event in closed] == [CloseReason.CUT]


def test_a_child_that_closes_what_it_inherited_leaves_who_is_silent_to_its_parent() -> None:
    with RunningServer(make(ThreadPoolMixIn)) as running, running.connect() as silent:
        eventually(lambda: kept_by(running.server) == 1)
        assert in_child(running.server.server_close) == 0
        assert answer(silent) == b"hello\n"


def test_a_child_that_serves_for_itself_leaves_who_is_silent_to_its_parent() -> None:
    with RunningServer(make(ThreadPoolMixIn)) as running, running.connect() as silent:
        eventually(lambda: kept_by(running.server) == 1)

        def begin_to_serve() -> None:
            running.server._guard.read_settings()
            assert kept_by(running.server) == 0

        assert in_child(begin_to_serve) == 0
        assert answer(silent) == b"hello\n"


def test_who_waits_while_nobody_serves_is_served_afterwards() -> None:
    """As in the backlog."""
    server = make(ThreadPoolMixIn)
    with RunningServer(server) as running, running.connect() as client:
        eventually(lambda: kept_by(server) == 1)
        running.shutdown()
        assert running.wait_ended() is None
        client.sendall(PROXY_LINE + b"hello\n")
        again = Call(server.serve_forever)
        assert goodbye(client) == b"hello\n"
        running.shutdown()
        again.result()


@pytest.mark.parametrize("mix_ins", WITH_A_LOBBY)
def test_a_drain_serves_who_has_spoken_and_ends_who_has_not(mix_ins: tuple[type, ...]) -> None:
    with RunningServer(make(*mix_ins)) as running, ExitStack() as stack:
        server = running.server
        silent = [stack.enter_context(running.connect()) for _ in range(20)]
        eventually(lambda: kept_by(server) == len(silent))
        running.shutdown()  # from here on nobody looks who speaks
        assert running.wait_ended() is None
        silent.pop().sendall(PROXY_LINE + b"hello\n")
        talker = stack.enter_context(running.connect())
        talker.sendall(PROXY_LINE + b"hello\n")
        report = Call(server.drain, 20).result()
        assert goodbye(talker) == b"hello\n"
        assert all(goodbye(client) == b"" for client in silent)
    assert report is not None
    assert report.connections == 21
    assert report.forced == 0


def test_a_request_of_its_own_does_not_wait_in_the_lobby() -> None:
    """`handle_request` returns when one request has been processed."""
    with make() as server:
        call = Call(server.handle_request)
        with socket.create_connection(server.server_address) as client:
            assert answer(client) == b"hello\n"
        call.result()


def test_what_a_handler_raises_ends_the_loop_of_a_serial_server_as_ever() -> None:
    def end(request: Any, client_address: object, server: object) -> None:
        raise SystemExit

    server = make()
    server.RequestHandlerClass = end
    with RunningServer(server) as running, running.connect() as client:
        eventually(lambda: kept_by(server) == 1)
        assert answer(client) == b""
        assert isinstance(running.wait_ended(), SystemExit)


def test_what_a_handler_raises_is_reported_as_ever(capfd: pytest.CaptureFixture[str]) -> None:
    """On a serial server the error passes through `process_request`."""

    def fail(request: Any, client_address: object, server: object) -> None:
        raise ValueError("the client asked for it")

    server = make()
    server.RequestHandlerClass = fail
    with RunningServer(server) as running, running.connect() as client:
        eventually(lambda: kept_by(server) == 1)
        assert answer(client) == b""
    assert "the client asked for it" in capfd.readouterr().err


def test_a_full_pool_leaves_the_others_where_they_are() -> None:
    """They are served when it has room."""
    release = threading.Event()
    with Journal() as journal:

        def wait(request: Any, client_address: object, server: object) -> None:
            journal.note("served")
            release.wait()

        server = make(ThreadPoolMixIn, max_workers=1, max_queued=0)
        server.RequestHandlerClass = wait
        with RunningServer(server) as running, ExitStack() as stack:
            clients = [stack.enter_context(running.connect()) for _ in range(3)]
            eventually(lambda: kept_by(server) == 3)
            for client in clients:
                client.sendall(PROXY_LINE)
            journal.wait_for("served")
            assert kept_by(server) == 2
            release.set()
            journal.wait_for("served", times=3)


def wait_for_one_in_vain(server: Any) -> None:
    """Wait until the loop waits for a place for a client in the backlog."""
    gate = server._guard.gate
    assert gate is not None
    eventually(lambda: gate.is_awaited, "an acceptor waits for a place")


@pytest.mark.parametrize("mix_ins", WITH_A_LOBBY)
def test_who_has_a_place_is_let_in_while_others_wait_for_one(mix_ins: tuple[type, ...]) -> None:
    """All places may be in the lobby: nobody else would give one back."""
    server = make(*mix_ins, max_connections=2)
    with RunningServer(server) as running, ExitStack() as stack:
        guests = [stack.enter_context(running.connect()) for _ in range(2)]
        eventually(lambda: kept_by(server) == 2)
        other = stack.enter_context(running.connect())
        wait_for_one_in_vain(server)
        assert answer(guests[0]) == b"hello\n"
        assert answer(other) == b"hello\n"
        guests[1].close()
        with running.connect() as last:
            assert answer(last) == b"hello\n"


@pytest.mark.parametrize("mix_ins", WITH_A_LOBBY)
def test_who_is_silent_for_too_long_gives_up_the_place_that_another_waits_for(
    mix_ins: tuple[type, ...],
) -> None:
    server = make(Rounds, *mix_ins, max_connections=1)
    with (
        recorded(DeadlineExpired) as expired,
        RunningServer(server, 0.01) as running,
        running.connect() as silent,
        running.connect() as client,
    ):
        eventually(lambda: kept_by(server) == 1)
        client.sendall(PROXY_LINE + b"hello\n")
        wait_for_one_in_vain(server)
        server._guard.lobby.timeout = 0.0
        assert goodbye(client) == b"hello\n"
        assert goodbye(silent) == b""
    assert [event.deadline for event in expired] == [Deadline.HANDSHAKE]


@pytest.mark.parametrize("mix_ins", WITH_A_LOBBY)
def test_who_is_silent_makes_room_for_who_comes(mix_ins: tuple[type, ...]) -> None:
    server = make(*mix_ins, max_connections=1, when_full="shed")
    with RunningServer(server) as running, running.connect() as silent:
        eventually(lambda: kept_by(server) == 1)
        with running.connect() as client:
            assert answer(client) == b"hello\n"
            assert goodbye(silent) == b""


@pytest.mark.parametrize("mix_ins", WITH_A_LOBBY)
def test_a_drain_serves_who_waits_for_the_place_of_one_that_is_silent(
    mix_ins: tuple[type, ...],
) -> None:
    server = make(*mix_ins, max_connections=1)
    with RunningServer(server) as running, running.connect() as silent, running.connect() as talker:
        eventually(lambda: kept_by(server) == 1)
        wait_for_one_in_vain(server)
        talker.sendall(PROXY_LINE + b"hello\n")
        report = Call(server.drain).result()
        assert goodbye(talker) == b"hello\n"
        assert goodbye(silent) == b""
    assert report is not None
    assert report.connections == 2
    assert report.forced == 0


def test_who_is_late_is_ended_while_the_pool_is_full() -> None:
    release = threading.Event()

    def wait(request: Any, client_address: object, server: object) -> None:
        release.wait()

    server = make(Rounds, ThreadPoolMixIn, max_workers=1, max_queued=0)
    server.RequestHandlerClass = wait
    with (
        recorded(DeadlineExpired) as expired,
        RunningServer(server, 0.01) as running,
        running.connect() as silent,
        running.connect() as busy,
    ):
        try:
            eventually(lambda: kept_by(server) == 2)
            busy.sendall(PROXY_LINE)
            eventually(lambda: kept_by(server) == 1)
            server._guard.lobby.timeout = 0.0
            assert goodbye(silent) == b""
        finally:
            release.set()
    assert [event.deadline for event in expired] == [Deadline.HANDSHAKE]


@pytest.mark.parametrize("mix_ins", [(), (ThreadPoolMixIn,), (GreenMixIn,)])
def test_a_wrong_setting_fails_when_the_server_begins(mix_ins: tuple[type, ...]) -> None:
    """One that was made after the server was, too."""
    with make(*mix_ins) as server:
        server.ssl_context = "no such file", "nor this one"
        assert isinstance(Call(server.serve_forever).failure(), CertificateError)


def test_the_time_in_the_lobby_counts(authority: Authority) -> None:
    """There is one deadline for all of the preamble, from the acceptance on."""
    pair = authority.issue()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    # Long enough for the client to be seen in the lobby, and to speak, on a busy machine.
    server = make(ThreadPoolMixIn, ssl_context=context, handshake_timeout=2.0)
    with (
        recorded(DeadlineExpired, ConnectionClosed) as told,
        RunningServer(server) as running,
        running.connect() as client,
    ):
        eventually(lambda: kept_by(server) == 1)
        client.sendall(PROXY_LINE)  # and no TLS
        assert goodbye(client) == b""
        eventually(lambda: len(told) == 2)
    kinds = {type(event): event for event in told}
    expired: Any = kinds[DeadlineExpired]
    assert expired.deadline is Deadline.HANDSHAKE
    closed: Any = kinds[ConnectionClosed]
    assert closed.reason is CloseReason.NO_PREAMBLE
