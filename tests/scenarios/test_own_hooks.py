"""The settings of a server hold for programs, too, that hand requests to handlers themselves.

Their own `process_request_thread`, or `process_request`, does what `socketserver` documents, and so
leaves out `serve_request`, of which `socketserver` knows nothing.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from portico import (
    ForkingMixIn,
    GreenMixIn,
    StreamRequestHandler,
    TCPServer,
    ThreadingMixIn,
    ThreadPoolMixIn,
)
from portico.events import (
    ConnectionRefused,
    Deadline,
    DeadlineExpired,
    Event,
    PreambleFailed,
    RefusalReason,
)
from tests.support import (
    PATIENCE,
    RunningServer,
    eventually,
    goodbye,
    nothing_left_behind,
    received,
    recorded,
    reset,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tls import Authority, Pair

    _Base = TCPServer
else:
    _Base = object

LINE = b"PROXY TCP4 192.0.2.1 192.0.2.9 4000 80\r\n"


class Own(_Base):
    """Call the handler as `socketserver` does."""

    def work(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)


class OwnThread(Own):
    """Call it where the engine has a hook for that."""

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.work(request, client_address)


class OwnProcess(Own):
    """Start a thread without an engine."""

    started: threading.Thread | None = None

    def process_request(self, request: Any, client_address: Any) -> None:
        self.started = threading.Thread(target=self.work, args=(request, client_address))
        self.started.start()


OWN: dict[str, tuple[type, ...]] = {
    "threads": (OwnThread, ThreadingMixIn),
    "pool": (OwnThread, ThreadPoolMixIn),
    "green": (OwnThread, GreenMixIn),
    "no engine": (OwnProcess,),
}

ENGINES: dict[str, tuple[type, ...]] = {
    "serial": (),
    "threads": (ThreadingMixIn,),
    "pool": (ThreadPoolMixIn,),
    "forks": (ForkingMixIn,),
    "green": (GreenMixIn,),
}


class Passing(_Base):
    """Extend the hook of the engine."""

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)  # type: ignore[misc]  # a mix-in's


class Counting:
    """Stand for a connection, as programs have it count bytes or write them down."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


class Secretive:
    """Stand for one, and have no more than a handler needs."""

    def __init__(self, sock: Any) -> None:
        self.makefile, self.sendall = sock.makefile, sock.sendall


class Greet(StreamRequestHandler):
    """Say to whom it speaks, and what that said."""

    def handle(self) -> None:
        self.wfile.write(f"{self.client_address[0]}: ".encode() + self.rfile.readline())


class Fail(StreamRequestHandler):
    """Fail once there is a word."""

    def handle(self) -> None:
        self.rfile.readline()
        raise ValueError("on purpose")


def by_attribute(server: Any, context: ssl.SSLContext) -> None:
    server.ssl_context = context


def by_wrapping(server: Any, context: ssl.SSLContext) -> None:
    server.socket = context.wrap_socket(server.socket, server_side=True)


def by_wrapping_lazily(server: Any, context: ssl.SSLContext) -> None:
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )


def server_context(pair: Pair, authority: Authority | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if authority is not None:
        context.load_verify_locations(authority.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextmanager
def serving(
    bases: tuple[type, ...],
    context: ssl.SSLContext | None = None,
    idiom: Callable[[Any, ssl.SSLContext], None] = by_attribute,
    handler: Any = Greet,
    **attributes: Any,
) -> Iterator[RunningServer[TCPServer]]:
    """Serve, and check that nothing is left of it."""
    with nothing_left_behind():
        server: Any = type("Server", (*bases, TCPServer), attributes)(("127.0.0.1", 0), handler)
        if context is not None:
            idiom(server, context)
        with RunningServer(server) as running:
            yield running
            eventually(lambda: not len(server._guard.connections), "none is remembered")


def ask(running: RunningServer[TCPServer], client: ssl.SSLContext, before: bytes = b"") -> bytes:
    """Return the answer to a word over TLS."""
    plain = running.connect()
    plain.sendall(before)
    with client.wrap_socket(plain, server_hostname="localhost") as tls:
        tls.sendall(b"hello\n")
        return received(tls)


def ask_plainly(running: RunningServer[TCPServer], words: bytes) -> bytes:
    """Return what comes in answer to words that are no TLS."""
    with running.connect() as client:
        client.sendall(words)
        return goodbye(client)


# --- TLS --------------------------------------------------------------------------------


@pytest.mark.parametrize("idiom", [by_attribute, by_wrapping])
@pytest.mark.parametrize("name", OWN)
def test_who_does_not_speak_tls_gets_no_handler(
    name: str,
    idiom: Callable[[Any, ssl.SSLContext], None],
    authority: Authority,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An answer in plain text would be the worst of all: nobody would notice."""
    with (
        recorded(PreambleFailed) as failed,
        serving(OWN[name], server_context(authority.issue()), idiom) as running,
    ):
        assert b"hello" not in ask_plainly(running, b"hello\n")
        assert ask(running, authority.client()) == b"127.0.0.1: hello\n"
    assert [event.stage for event in failed] == ["TLS handshake"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("idiom", [by_attribute, by_wrapping, by_wrapping_lazily])
@pytest.mark.parametrize("name", OWN)
def test_nor_does_a_program_that_makes_its_handler_itself_speak_plainly(
    name: str, idiom: Callable[[Any, ssl.SSLContext], None], authority: Authority
) -> None:
    """Nothing of portico's runs between the acceptance and the handler."""

    def finish_request(self: Any, request: Any, client_address: Any) -> None:
        with suppress(ssl.SSLError):
            Greet(request, client_address, self)

    attributes: dict[str, Any] = {"finish_request": finish_request}
    context = server_context(authority.issue())
    with serving(OWN[name], context, idiom, **attributes) as running:
        assert b"hello" not in ask_plainly(running, b"hello\n")
        assert ask(running, authority.client()) == b"127.0.0.1: hello\n"


@pytest.mark.parametrize("idiom", [by_attribute, by_wrapping])
@pytest.mark.parametrize("name", OWN)
def test_a_handshake_has_its_time_there_too(
    name: str, idiom: Callable[[Any, ssl.SSLContext], None], authority: Authority
) -> None:
    context = server_context(authority.issue())
    with (
        recorded(DeadlineExpired) as expired,
        serving(OWN[name], context, idiom, handshake_timeout=0.1) as running,
    ):
        assert ask_plainly(running, b"\x16\x03\x01") == b""
    assert [event.deadline for event in expired] == [Deadline.HANDSHAKE]


@pytest.mark.parametrize("name", OWN)
def test_a_peer_that_is_gone_before_it_is_accepted_stops_nobody(
    name: str, authority: Authority
) -> None:
    context = server_context(authority.issue())
    is_held, goes_on = threading.Event(), threading.Event()

    def service_actions(self: Any) -> None:
        is_held.set()
        goes_on.wait(PATIENCE)

    with serving(OWN[name], context, service_actions=service_actions) as running:
        with running.connect() as first:
            assert is_held.wait(PATIENCE)
            reset(running.connect())
            goes_on.set()
            first.close()
        assert ask(running, authority.client()) == b"127.0.0.1: hello\n"


# --- what the program says of a peer ----------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_a_certificate_can_be_asked_for_behind_a_wrapped_listener(
    name: str, authority: Authority
) -> None:
    """By `verify_request`, which `socketserver` calls when hands have been shaken."""

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        names = request.getpeercert()["subjectAltName"]
        return ("DNS", "friend") in names

    context = server_context(authority.issue(), authority)
    friend, stranger = (authority.client(authority.issue(name)) for name in ("friend", "stranger"))
    with serving(ENGINES[name], context, by_wrapping, verify_request=verify_request) as running:
        assert ask(running, friend) == b"127.0.0.1: hello\n"
        with suppress(OSError):  # it may be told by a reset
            assert ask(running, stranger) == b""


@pytest.mark.parametrize("name", OWN)
def test_and_where_handlers_are_made_by_the_program(name: str, authority: Authority) -> None:
    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        return ("DNS", "friend") in request.getpeercert()["subjectAltName"]

    context = server_context(authority.issue(), authority)
    friend, stranger = (authority.client(authority.issue(name)) for name in ("friend", "stranger"))
    with (
        recorded(ConnectionRefused) as refused,
        serving(OWN[name], context, by_wrapping, verify_request=verify_request) as running,
    ):
        assert ask(running, friend) == b"127.0.0.1: hello\n"
        with suppress(OSError):
            assert ask(running, stranger) == b""
    assert [event.reason for event in refused] == [RefusalReason.NOT_VERIFIED]


@pytest.mark.parametrize("name", OWN)
def test_a_peer_is_looked_at_before_its_handshake_where_nobody_would_later(
    name: str, authority: Authority
) -> None:
    """The program has all that comes after the acceptance in its own hands."""
    seen: list[str] = []

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        seen.append(client_address[0])
        return False

    def finish_request(self: Any, request: Any, client_address: Any) -> None:
        raise AssertionError

    attributes: dict[str, Any] = {
        "verify_request": verify_request,
        "finish_request": finish_request,
    }
    context = server_context(authority.issue())
    with serving(OWN[name], context, by_wrapping, **attributes) as running:
        assert ask_plainly(running, b"") == b""
    assert seen == ["127.0.0.1"]


# --- the PROXY protocol -----------------------------------------------------------------


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_a_proxy_is_understood(name: str, with_tls: bool, authority: Authority) -> None:
    """By the networks, by `verify_request` and by the handler."""
    verified: list[Any] = []

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        verified.append(client_address)
        return True

    attributes: dict[str, Any] = {
        "proxy_protocol": ["127.0.0.1"],
        "denied_networks": ["198.51.100.0/24"],
        "verify_request": verify_request,
    }
    context = server_context(authority.issue()) if with_tls else None
    denied = LINE.replace(b"192.0.2.1 ", b"198.51.100.1 ")
    told: list[Event]
    with (
        recorded(ConnectionRefused, PreambleFailed) as told,
        serving(OWN[name], context, **attributes) as running,
    ):
        if with_tls:
            assert ask(running, authority.client(), LINE) == b"192.0.2.1: hello\n"
            assert b"hello" not in ask_plainly(running, LINE + b"hello\n")
        else:
            assert ask_plainly(running, LINE + b"hello\n") == b"192.0.2.1: hello\n"
            assert ask_plainly(running, denied + b"hello\n") == b""
        assert ask_plainly(running, b"hello\n" * 9) == b""
    assert verified == [("192.0.2.1", 4000)]
    assert len(told) == 2


@pytest.mark.parametrize("name", OWN)
def test_a_handler_that_fails_ends_its_connection(
    name: str, authority: Authority, capfd: pytest.CaptureFixture[str]
) -> None:
    """Although the program holds another socket than the handler had."""
    attributes: dict[str, Any] = {"proxy_protocol": ["127.0.0.1"]}
    context = server_context(authority.issue())
    with serving(OWN[name], context, handler=Fail, **attributes) as running:
        assert ask(running, authority.client(), LINE) == b""
    assert "ValueError: on purpose" in capfd.readouterr().err


@pytest.mark.parametrize("name", OWN)
def test_a_peer_that_goes_away_leaves_no_traceback(
    name: str, authority: Authority, capfd: pytest.CaptureFixture[str]
) -> None:
    """`handle_error` is asked about the socket that the program holds, which is empty by then."""

    def lose(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(b"x")
        request.recv(1)

    attributes: dict[str, Any] = {"proxy_protocol": ["127.0.0.1"]}
    context = server_context(authority.issue())
    with serving(OWN[name], context, handler=lose, **attributes) as running:
        plain = running.connect()
        plain.sendall(LINE)
        with authority.client().wrap_socket(plain, server_hostname="localhost") as tls:
            assert tls.recv(1) == b"x"
            reset(tls)
    assert capfd.readouterr().err == ""


# --- a connection of which the program makes something else ------------------------------


def wrapping(kind: type) -> dict[str, Any]:
    """Return a `finish_request` that gives the handler an object of the program's own."""

    def finish_request(self: Any, request: Any, client_address: Any) -> None:
        TCPServer.finish_request(self, kind(request), client_address)

    return {"finish_request": finish_request}


SERVING: dict[str, tuple[type, ...]] = {
    **ENGINES,
    "extended threads": (Passing, ThreadingMixIn),
    "extended pool": (Passing, ThreadPoolMixIn),
    "extended green": (Passing, GreenMixIn),
}
"""Those on which each request comes through `serve_request`."""


@pytest.mark.parametrize("kind", [Counting, Secretive])
@pytest.mark.parametrize("with_proxy", [False, True])
@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("name", SERVING)
def test_what_is_prepared_is_not_prepared_again(
    name: str, with_tls: bool, with_proxy: bool, kind: type, authority: Authority, tmp_path: Path
) -> None:
    """Whatever a program's `finish_request` hands on, hands were shaken and the header was read."""
    verified = tmp_path / "verified"  # in a file, because a child process may write it

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        with verified.open("a") as lines:
            print(client_address[0], file=lines)
        return True

    attributes: dict[str, Any] = wrapping(kind) | {"verify_request": verify_request}
    if with_proxy:
        attributes["proxy_protocol"] = ["0.0.0.0/0"]  # so that a second header would be awaited
    line, peer = (LINE, "192.0.2.1") if with_proxy else (b"", "127.0.0.1")
    context = server_context(authority.issue()) if with_tls else None
    with serving(SERVING[name], context, **attributes) as running:
        if with_tls:
            answer = ask(running, authority.client(), line)
        else:
            answer = ask_plainly(running, line + b"hello\n")
    assert answer == f"{peer}: hello\n".encode()
    assert verified.read_text() == f"{peer}\n"


@pytest.mark.parametrize("idiom", [by_attribute, by_wrapping])
@pytest.mark.parametrize("name", OWN)
def test_what_is_not_prepared_speaks_no_plain_text_below_an_object_of_the_program_s(
    name: str, idiom: Callable[[Any, ssl.SSLContext], None], authority: Authority
) -> None:
    context = server_context(authority.issue())
    with (
        recorded(PreambleFailed) as failed,
        serving(OWN[name], context, idiom, **wrapping(Counting)) as running,
    ):
        assert b"hello" not in ask_plainly(running, b"hello\n")
        assert ask(running, authority.client()) == b"127.0.0.1: hello\n"
    assert [event.stage for event in failed] == ["TLS handshake"]


@pytest.mark.parametrize("name", OWN)
def test_a_header_is_read_below_an_object_of_the_program_s(name: str) -> None:
    attributes: dict[str, Any] = {"proxy_protocol": ["127.0.0.1"], **wrapping(Counting)}
    with serving(OWN[name], **attributes) as running:
        assert ask_plainly(running, LINE + b"hello\n") == b"192.0.2.1: hello\n"


@pytest.mark.parametrize("name", OWN)
def test_what_cannot_be_prepared_gets_no_handler(
    name: str, authority: Authority, capfd: pytest.CaptureFixture[str]
) -> None:
    """TLS is due after the header, and would take the connection from the program's object."""
    attributes: dict[str, Any] = {"proxy_protocol": ["127.0.0.1"], **wrapping(Counting)}
    context = server_context(authority.issue())
    with serving(OWN[name], context, **attributes) as running:
        assert ask_plainly(running, LINE + b"hello\n") == b""
    assert "call serve_request" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["no engine", "threads", "pool"])
def test_nor_does_what_is_not_found(
    name: str, authority: Authority, capfd: pytest.CaptureFixture[str]
) -> None:
    context = server_context(authority.issue())
    with serving(OWN[name], context, **wrapping(Secretive)) as running:
        assert b"hello" not in ask_plainly(running, b"hello\n")
    assert "call serve_request" in capfd.readouterr().err


def test_a_connection_that_came_past_all_hooks_shakes_hands(authority: Authority) -> None:
    """The program accepts it and makes the handler, both by itself."""

    def step(self: Any) -> None:
        request, client_address = self.get_request()
        self.finish_request(request, client_address)
        self.shutdown_request(request)

    context = server_context(authority.issue())
    with serving((), context, _handle_request_noblock=step) as running:
        assert b"hello" not in ask_plainly(running, b"hello\n")
        assert ask(running, authority.client()) == b"127.0.0.1: hello\n"
