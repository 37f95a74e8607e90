"""What no program has touched is left out, and nothing that a program can see changes by that."""

from __future__ import annotations

import contextvars
import errno
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import pytest

import portico
from portico import events
from portico.engines import left_out_of_batches
from portico.engines.green import HOOKS as OF_THE_ENGINE
from portico.engines.green import GreenMixIn
from portico.engines.green.plain import OF_EVERY_SERVER, PlainPath
from portico.engines.green.sockets import Lineage
from portico.families import UDPServer
from portico.guard import AT_THE_END
from tests.support import PATIENCE, Call


class Echo(portico.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class DatagramEcho(portico.BaseRequestHandler):
    def handle(self) -> None:
        packet, listener = self.request
        listener.sendto(packet, self.client_address)


class Client:
    """Asks a server for one echo after another; a connection for each, or a datagram."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def ask(self) -> None:
        if isinstance(self.server, UDPServer):
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.settimeout(PATIENCE)
                sock.sendto(b"x", self.server.server_address)
                assert sock.recv(10) == b"x"
        else:
            with socket.create_connection(self.server.server_address, PATIENCE) as sock:
                sock.sendall(b"x")
                assert sock.recv(10) == b"x"


@contextmanager
def serving(kind: Any, handler: Any) -> Iterator[Any]:
    with kind(("127.0.0.1", 0), handler) as server:
        loop = Call(server.serve_forever)
        try:
            yield server
        finally:
            server.shutdown()
            failure = loop.failure()
            assert failure is None, failure


@pytest.fixture(params=["stream", "datagram"])
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server of each kind, of a class of its own, that has served one request."""
    is_stream = request.param == "stream"
    base: Any = portico.GreenTCPServer if is_stream else portico.GreenUDPServer
    kind = type("Server", (base,), {})
    with serving(kind, Echo if is_stream else DatagramEcho) as server:
        Client(server).ask()
        yield server


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each batch was taken on the plain path."""
    seen: list[bool] = []
    take = PlainPath.take

    def recorded(self: PlainPath, *arguments: Any) -> bool:
        seen.append(take(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(PlainPath, "take", recorded)
    return seen


HOOKS = (
    "_handle_request_noblock",
    "get_request",
    "admit_request",
    "verify_request",
    "process_request",
    "process_request_thread",
    "serve_request",
    "prepare_request",
    "finish_request",
    "shutdown_request",
    "close_request",
    "service_actions",
)


def owner(server: Any, name: str) -> type:
    """The class that the hook of a server comes from."""
    return next(kind for kind in type(server).__mro__ if name in vars(kind))


@pytest.mark.parametrize("name", HOOKS)
class TestHooks:
    """A hook that is exchanged while the server serves is called from the next request on."""

    def test_a_hook_of_the_class_is_called(
        self, server: Any, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called = threading.Event()
        before = getattr(type(server), name)

        def hook(self: Any, *arguments: Any) -> Any:
            called.set()
            return before(self, *arguments)

        monkeypatch.setattr(type(server), name, hook, raising=False)
        Client(server).ask()
        assert called.wait(PATIENCE)

    def test_a_hook_of_the_instance_is_called(
        self, server: Any, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called = threading.Event()
        before = getattr(server, name)

        def hook(*arguments: Any) -> Any:
            called.set()
            return before(*arguments)

        monkeypatch.setattr(server, name, hook)
        Client(server).ask()
        assert called.wait(PATIENCE)

    def test_a_hook_of_the_base_is_called(
        self, server: Any, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called = threading.Event()
        kind = owner(server, name)
        before = vars(kind)[name]

        def hook(self: Any, *arguments: Any) -> Any:
            called.set()
            return before(self, *arguments)

        monkeypatch.setattr(kind, name, hook)
        Client(server).ask()
        assert called.wait(PATIENCE)


def test_the_hooks_of_the_test_are_those_that_are_left_out() -> None:
    assert set(HOOKS) == {*OF_EVERY_SERVER, *AT_THE_END, *OF_THE_ENGINE}


def test_a_server_that_nobody_changed_takes_the_plain_path(server: Any, taken: list[bool]) -> None:
    Client(server).ask()
    assert True in taken


def test_a_handler_class_that_is_exchanged_serves_the_next_request(server: Any) -> None:
    used = threading.Event()

    class Other(server.RequestHandlerClass):  # type: ignore[misc]
        def setup(self) -> None:
            used.set()
            super().setup()

    server.RequestHandlerClass = Other
    Client(server).ask()
    assert used.is_set()


@pytest.mark.parametrize("kind", [events.ConnectionAccepted, events.ConnectionClosed])
def test_an_event_that_somebody_listens_to_is_told(
    server: Any, kind: Any, taken: list[bool]
) -> None:
    told = threading.Event()

    def tell(event: Any) -> None:
        if event.server is server:
            told.set()

    end = events.subscribe(tell, kind)
    try:
        Client(server).ask()
        assert told.wait(PATIENCE)
        assert True not in taken
    finally:
        end()


class Made(portico.BaseRequestHandler):
    """What is made of it, by whatever makes it, answers with its name."""

    name = b"init"

    def handle(self) -> None:
        self.request.sendall(self.name)


class MadeByNew(Made):
    def __new__(cls, *arguments: Any) -> Any:
        made = super().__new__(cls)
        made.name = b"new"
        return made


class Meta(type):
    def __call__(cls: Any, *arguments: Any) -> Any:
        made = object.__new__(cls)
        made.name = b"call"
        made.__init__(*arguments)
        return made


class MadeByCall(Made, metaclass=Meta):
    pass


@pytest.mark.parametrize(
    ("handler", "answer"),
    [
        (Made, b"init"),
        (MadeByNew, b"new"),
        (MadeByCall, b"call"),
        (lambda request, *_: request.sendall(b"function"), b"function"),
    ],
)
def test_a_handler_is_made_as_its_class_wants_it(
    handler: Any, answer: bytes, taken: list[bool]
) -> None:
    with serving(portico.GreenTCPServer, handler) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(10) == answer
    assert True in taken


@pytest.mark.parametrize("name", ["__init__", "setup", "finish"])
def test_a_hook_that_a_handler_class_gets_later_is_called(name: str, taken: list[bool]) -> None:
    called: list[tuple[Any, ...]] = []

    class Handler(portico.BaseRequestHandler):
        def handle(self) -> None:
            called.append((self.request, self.client_address, self.server))
            self.request.sendall(b"x")

    with serving(portico.GreenTCPServer, Handler) as server:
        for _ in range(2):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                assert client.recv(10) == b"x"
                assert client.recv(10) == b""
        ours = portico.BaseRequestHandler.__dict__[name]

        def hook(self: Any, *arguments: Any) -> None:
            called.append(("hook", server))
            ours(self, *arguments)

        setattr(Handler, name, hook)
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(10) == b"x"
            assert client.recv(10) == b""
    assert all(each[-1] is server for each in called)
    assert sum(each[0] == "hook" for each in called) == 1
    assert len(called) == 4
    assert True in taken


@pytest.mark.parametrize("kind", [portico.GreenTCPServer, portico.TCPServer])
def test_a_constructor_that_returns_something_fails(
    kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(portico.BaseRequestHandler):
        __init__: Any = lambda self, *arguments: b"something"

    with serving(kind, Wrong) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(10) == b""
    assert "TypeError: " in capsys.readouterr().err


def test_a_handler_that_raises_is_reported_and_its_request_is_closed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        raise LookupError("the handler's own")

    with serving(portico.GreenTCPServer, handler) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(10) == b""
    assert "LookupError: the handler's own" in capsys.readouterr().err


def test_a_failed_handler_is_told(server: Any) -> None:
    failures: list[events.HandlerFailed] = []
    told = threading.Event()

    def tell(event: events.HandlerFailed) -> None:
        failures.append(event)
        told.set()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        raise LookupError

    server.RequestHandlerClass = handler
    server.handle_error = lambda request, client_address: None
    end = events.subscribe(tell, events.HandlerFailed)
    try:
        kind = socket.SOCK_DGRAM if isinstance(server, UDPServer) else socket.SOCK_STREAM
        with socket.socket(type=kind) as client:
            client.connect(server.server_address)
            client.send(b"x")
            assert told.wait(PATIENCE)
            assert failures[0].peer == client.getsockname()
    finally:
        end()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_is_no_exception_ends_its_request_only(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    escaped: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: escaped.append(args.exc_type))

    def handler(request: Any, client_address: Any, server: Any) -> None:
        if request.recv(10) == b"end":
            raise kind
        request.sendall(b"x")

    with serving(portico.GreenTCPServer, handler) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(b"end")
            assert client.recv(10) == b""
        Client(server).ask()
    assert escaped == [kind]


def test_each_request_has_a_context_of_its_own(server: Any) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    class Setting(server.RequestHandlerClass):  # type: ignore[misc]
        def setup(self) -> None:
            seen.append(variable.get())
            variable.set("set")
            super().setup()

    server.RequestHandlerClass = Setting
    for _ in range(3):
        Client(server).ask()
    assert seen == ["unset"] * 3


def test_a_datagram_that_is_too_long_is_cut_and_told() -> None:
    told: list[events.DatagramCut] = []
    end = events.subscribe(told.append, events.DatagramCut)
    try:
        with serving(portico.GreenUDPServer, DatagramEcho) as server:
            server.max_packet_size = 4
            with socket.socket(type=socket.SOCK_DGRAM) as client:
                client.settimeout(PATIENCE)
                client.sendto(b"just fits"[:4], server.server_address)
                assert client.recv(100) == b"just"
                assert not told
                client.sendto(b"too long", server.server_address)
                assert client.recv(100) == b"too "
                assert [event.max_packet_size for event in told] == [4]
    finally:
        end()


def test_a_listener_that_is_exchanged_is_left_to_the_loop() -> None:
    """Whoever puts another kind of socket in its place gets what that one accepts."""

    class Accepting(socket.socket):
        def accept(self) -> Any:
            return super().accept()

    class Server(portico.GreenTCPServer):
        def server_activate(self) -> None:
            super().server_activate()
            self.socket = Accepting(fileno=self.socket.detach())

    with serving(Server, Echo) as server:
        Client(server).ask()


def test_descriptors_that_run_out_pause_the_server_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accepting raises reaches the loop, which knows what to do."""
    paused, resumed = threading.Event(), threading.Event()
    ends = [
        events.subscribe(lambda _: paused.set(), events.AcceptPaused),
        events.subscribe(lambda _: resumed.set(), events.AcceptResumed),
    ]
    refusals = iter([True, True])

    def accept(self: Any) -> Any:
        if next(refusals, False):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return original(self)

    original = Lineage.accept
    monkeypatch.setattr(Lineage, "accept", accept)
    try:
        with serving(portico.GreenTCPServer, Echo) as server:
            Client(server).ask()
            assert paused.is_set()
            assert resumed.wait(PATIENCE)
            Client(server).ask()
    finally:
        for end in ends:
            end()


def test_no_request_is_taken_after_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch ends where a shutdown came: what waits stays in the backlog."""
    taken: list[Any] = []
    is_ready = threading.Event()

    original = Lineage.accept

    def accept(self: Any) -> Any:
        is_ready.wait(PATIENCE)
        request = original(self)
        taken.append(request)
        stopping._BaseServer__shutdown_request = True  # as another thread does
        return request

    monkeypatch.setattr(Lineage, "accept", accept)
    with portico.GreenTCPServer(("127.0.0.1", 0), Echo) as server:
        stopping: Any = server
        clients = [socket.create_connection(server.server_address, PATIENCE) for _ in range(5)]
        is_ready.set()
        server.serve_forever()
        assert len(taken) == 1
        for client in clients:
            client.close()


def test_a_server_in_front_of_a_foreign_family_has_no_plain_path(taken: list[bool]) -> None:
    class Foreign(GreenMixIn, socketserver.TCPServer):
        pass

    with serving(Foreign, Echo) as server:
        Client(server).ask()
    assert taken == []


@left_out_of_batches
def pass_on(server: Any) -> Any:
    """Accept as the engine does: what stands for a hook of the library's own in front of it."""
    return GreenMixIn.get_request(server)


def test_a_hook_in_front_that_may_be_left_out_is(taken: list[bool]) -> None:
    class Server(portico.GreenTCPServer):
        get_request = pass_on

    with serving(Server, Made) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(10) == b"init"
    assert True in taken


def test_actions_that_may_be_left_out_have_their_turn_under_a_load(taken: list[bool]) -> None:
    """The loop comes round in time although it is never without a client."""
    ticked = threading.Event()

    class Server(portico.GreenTCPServer):
        @left_out_of_batches
        def service_actions(self) -> None:
            ticked.set()

    server = Server(("127.0.0.1", 0), Made)
    loop = threading.Thread(target=server.serve_forever, args=(0.05,))
    loop.start()
    try:
        deadline = monotonic() + PATIENCE
        while not ticked.is_set():
            assert monotonic() < deadline
            with socket.create_connection(server.server_address, PATIENCE) as client:
                assert client.recv(10) == b"init"
    finally:
        server.shutdown()
        loop.join()
        server.server_close()
    assert True in taken
