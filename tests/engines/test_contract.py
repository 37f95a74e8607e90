"""What every engine keeps to, whatever it does to run a request."""

from __future__ import annotations

import ast
import http.client
import http.server
import os
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import portico
from portico import (
    ForkingMixIn,
    GreenMixIn,
    StreamRequestHandler,
    TCPServer,
    ThreadingMixIn,
    ThreadPoolMixIn,
    engines,
)
from portico.engines import serve, serve_foreign
from portico.events import Deadline, DeadlineExpired
from portico.guard import Guard
from tests.support import (
    PATIENCE,
    Call,
    Client,
    Journal,
    RunningServer,
    ask,
    connect,
    descriptors,
    eventually,
    goodbye,
    nothing_left_behind,
    received,
    recorded,
    run_program,
)
from tests.tls import Authority

LOOPBACK = ("127.0.0.1", 0)

MIX_INS: dict[str, tuple[type, ...]] = {
    "serial": (),
    "threads": (ThreadingMixIn,),
    "forks": (ForkingMixIn,),
    "pool": (ThreadPoolMixIn,),
}

CONCURRENT = ["threads", "forks", "pool"]

COMBINED = ("Threading", "Forking", "ThreadPool")


@pytest.fixture(params=MIX_INS)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Abort(BaseException):
    """What is no Exception, and is not quietly ignored in a thread either."""


if TYPE_CHECKING:
    _Base = TCPServer
else:
    _Base = object


# --- a hook that raises -----------------------------------------------------------------


class Scene(_Base):
    """In front of an engine: a server one of whose hooks raises for its first client."""

    journal: Journal
    hook: str
    raised: type[BaseException]

    def __init__(self) -> None:
        self.requests: list[socket.socket] = []
        super().__init__(LOOPBACK, SceneHandler)

    def passed(self, hook: str, request: Any) -> None:
        """Raise, if this is the hook and the request is the first client's."""
        if hook == self.hook and request is self.requests[0]:
            raise self.raised(hook)

    def get_request(self) -> Any:
        request, client_address = super().get_request()
        self.requests.append(request)
        return request, client_address

    def admit_request(self, request: Any, client_address: Any) -> bool:
        self.passed("admit_request", request)
        return super().admit_request(request, client_address)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.passed("verify_request", request)
        return super().verify_request(request, client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.passed("process_request", request)
        super().process_request(request, client_address)

    def prepare_request(self, request: Any, client_address: Any) -> Any:
        self.passed("prepare_request", request)
        return super().prepare_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.passed("finish_request", request)
        super().finish_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.passed("shutdown_request", request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        self.journal.note(f"handle_error: {type(error).__name__} of {error}")
        if self.hook == "handle_error":
            raise self.raised("handle_error")


class SceneHandler(StreamRequestHandler):
    server: Scene

    def setup(self) -> None:
        self.server.passed("setup", self.request)
        super().setup()

    def handle(self) -> None:
        self.server.passed("handle", self.request)
        if self.server.hook == "handle_error" and self.request is self.server.requests[0]:
            raise ValueError("handle")
        self.wfile.write(self.rfile.readline())

    def finish(self) -> None:
        super().finish()
        self.server.passed("finish", self.request)


ACCEPTOR = ("admit_request", "verify_request", "process_request")
WORKER = ("prepare_request", "finish_request", "setup", "handle", "finish")


@contextmanager
def scene(
    engine: str, hook: str, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RunningServer[Scene], Journal]]:
    """Serve a first client, for whom the hook raises; what workers end with is noted."""

    def note_thread(args: threading.ExceptHookArgs) -> None:
        journal.note(f"thread: {args.exc_type.__name__} of {args.exc_value}")

    waitpid = os.waitpid

    def note_child(child: int, options: int) -> tuple[int, int]:
        ended, status = waitpid(child, options)
        if ended:
            journal.note(f"child: {os.waitstatus_to_exitcode(status)}")
        return ended, status

    with Journal() as journal, nothing_left_behind():
        monkeypatch.setattr(threading, "excepthook", note_thread)
        monkeypatch.setattr(os, "waitpid", note_child)
        attributes = {"journal": journal, "hook": hook, "raised": raised}
        server: Scene = type("Server", (Scene, *MIX_INS[engine], TCPServer), attributes)()
        with RunningServer(server) as running:
            with running.connect() as client:
                assert ask(client) == b""
            yield running, journal
    assert [request.fileno() for request in server.requests] == [-1] * len(server.requests)


def serves_on(running: RunningServer[Scene], journal: Journal) -> list[str]:
    """See the next client served, wait for the workers, and return the notes."""
    assert running.ask(b"next\n") == b"next\n"
    running.shutdown()
    assert running.wait_ended() is None
    running.server.server_close()
    return journal.entries()


def ended(
    running: RunningServer[Scene], journal: Journal
) -> tuple[BaseException | None, list[str]]:
    """Wait for the end of the loop, and return what ended it, and the notes."""
    failure = running.wait_ended()
    running.server.server_close()
    return failure, journal.entries()


@pytest.mark.parametrize("hook", ACCEPTOR + WORKER)
def test_an_exception_is_handled_and_the_server_goes_on(
    engine: str, hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, in whatever process the hook runs, and the connection is closed."""
    with scene(engine, hook, ValueError, monkeypatch) as (running, journal):
        notes = serves_on(running, journal)
    expected = [f"handle_error: ValueError of {hook}"]
    if engine == "forks":  # one child for each client who was not refused
        expected += ["child: 0"] if hook in ACCEPTOR else ["child: 1", "child: 0"]
    assert sorted(notes) == sorted(expected)


@pytest.mark.parametrize("hook", ACCEPTOR)
def test_what_is_no_exception_ends_the_loop_from_the_acceptor(
    engine: str, hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene(engine, hook, Abort, monkeypatch) as (running, journal):
        failure, notes = ended(running, journal)
    assert isinstance(failure, Abort)
    assert notes == []


@pytest.mark.parametrize("hook", WORKER)
def test_what_is_no_exception_ends_the_worker(
    engine: str, hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the loop in the serial engine.  `handle_error` is not asked."""
    with scene(engine, hook, Abort, monkeypatch) as (running, journal):
        if engine == "serial":
            failure, notes = ended(running, journal)
            assert isinstance(failure, Abort)
            assert notes == []
        else:
            notes = serves_on(running, journal)
            end = [f"thread: Abort of {hook}"]
            if engine == "forks":
                end = ["child: 0", "child: 1"]
            assert sorted(notes) == end


@pytest.mark.parametrize("raised", [ValueError, Abort])
def test_what_handle_error_raises_ends_the_worker(
    engine: str,
    raised: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A child process reports it, since nobody else would."""
    with scene(engine, "handle_error", raised, monkeypatch) as (running, journal):
        if engine == "serial":
            failure, notes = ended(running, journal)
            assert isinstance(failure, raised)
        else:
            notes = serves_on(running, journal)
    ends = {
        "serial": [],
        "threads": [f"thread: {raised.__name__} of handle_error"],
        "pool": [f"thread: {raised.__name__} of handle_error"],
        "forks": ["child: 0", "child: 1"],
    }
    assert sorted(notes) == sorted(["handle_error: ValueError of handle", *ends[engine]])
    reported = engine == "forks" and raised is ValueError
    assert ("ValueError: handle_error" in capfd.readouterr().err) is reported


@pytest.mark.parametrize("raised", [ValueError, Abort])
def test_what_shutdown_request_raises_ends_the_worker(
    engine: str, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene(engine, "shutdown_request", raised, monkeypatch) as (running, journal):
        if engine == "serial":
            failure, _ = ended(running, journal)
            assert isinstance(failure, raised)
        else:
            notes = serves_on(running, journal)
            end = [f"thread: {raised.__name__} of shutdown_request"]
            if engine == "forks":
                end = ["child: 0", "child: 1"]
            assert sorted(notes) == end


@pytest.mark.parametrize("raised", [ValueError, Abort])
@pytest.mark.parametrize("hook", ["get_request", "service_actions"])
def test_what_the_loops_own_hooks_raise_ends_the_loop(
    engine: str, hook: str, raised: type[BaseException]
) -> None:
    """Not an OSError of `get_request`, which is a peer's.  No request is under way then."""

    class Failing(_Base):
        """In front of an engine, like `Scene`."""

    def fail(self: TCPServer) -> Any:
        raise raised(hook)

    setattr(Failing, hook, fail)
    server: TCPServer = type("Server", (Failing, *MIX_INS[engine], TCPServer), {})(LOOPBACK, None)
    with nothing_left_behind(), RunningServer(server, 0.01) as running, connect(server):
        assert isinstance(running.wait_ended(), raised)


# --- where a request runs ---------------------------------------------------------------


@pytest.mark.parametrize("name", CONCURRENT)
def test_process_request_hands_over_and_returns(name: str) -> None:
    """The acceptor goes on while the handler waits for its client."""

    class Reading(StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    server = type("Server", (*MIX_INS[name], TCPServer), {})(LOOPBACK, Reading)
    with nothing_left_behind(), server, connect(server) as client:
        Call(server.handle_request).result()
        assert ask(client, b"still served\n") == b"still served\n"


def test_settings_are_class_attributes() -> None:
    """So that a class statement, or its instance, sets them."""
    assert (ThreadingMixIn.daemon_threads, ThreadingMixIn.block_on_close) == (False, True)
    assert (ForkingMixIn.timeout, ForkingMixIn.max_children) == (300, 40)
    assert (ForkingMixIn.active_children, ForkingMixIn.block_on_close) == (None, True)
    assert (ThreadPoolMixIn.max_workers, ThreadPoolMixIn.max_queued) == (64, 64)
    assert ThreadPoolMixIn.worker_idle_timeout == 10
    assert (ThreadPoolMixIn.daemon_threads, ThreadPoolMixIn.block_on_close) == (False, True)


def test_an_engine_is_a_plain_class() -> None:
    """It derives from nothing, so it can stand in front of any server."""
    mix_ins = (ThreadingMixIn, ForkingMixIn, ThreadPoolMixIn)
    assert [mix_in.__bases__ for mix_in in mix_ins] == [(object,)] * 3


def test_no_engine_imports_another() -> None:
    """They replace each other."""
    (folder,) = engines.__path__
    names = {path.stem for path in Path(folder).iterdir()} - {"__init__", "__pycache__"}
    for name in names & {"threads", "forks", "pool"}:
        tree = ast.parse((Path(folder) / f"{name}.py").read_text())
        imported = {
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            if node.module
        }
        assert not {f"portico.engines.{other}" for other in names} & imported


def test_hooks_are_extended_not_replaced(engine: str) -> None:
    """What is behind the engine is called too."""
    called: list[str] = []

    class Behind(TCPServer):
        def server_activate(self) -> None:
            called.append("server_activate")
            super().server_activate()

        def handle_timeout(self) -> None:
            called.append("handle_timeout")

        def service_actions(self) -> None:
            called.append("service_actions")

        def server_close(self) -> None:
            called.append("server_close")
            super().server_close()

    with type("Server", (*MIX_INS[engine], Behind), {})(LOOPBACK, None) as server:
        server.handle_timeout()
        server.service_actions()
    assert called == ["server_activate", "handle_timeout", "service_actions", "server_close"]


# --- context variables ------------------------------------------------------------------

variable: ContextVar[str] = ContextVar("variable", default="unset")

EVERY_ENGINE: dict[str, tuple[type, ...]] = {**MIX_INS, "green": (GreenMixIn,)}


class Remember(StreamRequestHandler):
    """Answers with what the request finds in the variable, and leaves something else there."""

    def handle(self) -> None:
        self.wfile.write(variable.get().encode())
        variable.set(f"left by {self.rfile.readline().decode()}")


@pytest.mark.parametrize("name", EVERY_ENGINE)
@pytest.mark.parametrize("set_by_caller", [True, False])
def test_each_request_has_a_copy_of_the_context_variables(name: str, set_by_caller: bool) -> None:
    """Of those that the caller of `serve_forever` sees; what it sets is seen by nobody else."""
    seen: list[str] = []

    def serve_in_context() -> None:
        if set_by_caller:
            variable.set("of the caller")
        server.serve_forever()
        seen.append(variable.get())

    server = type("Server", (*EVERY_ENGINE[name], TCPServer), {})(LOOPBACK, Remember)
    with nothing_left_behind(), server:
        serving = Call(serve_in_context)
        answers = []
        for turn in range(3):
            with connect(server) as client:
                answers.append(ask(client, b"request %d\n" % turn))
        server.shutdown()
        serving.result()
    expected = "of the caller" if set_by_caller else "unset"
    assert answers == [expected.encode()] * 3
    assert seen == [expected]


@pytest.mark.parametrize("name", EVERY_ENGINE)
def test_a_request_sees_the_context_variables_of_who_accepted_it(name: str) -> None:
    """Also where no loop serves: `handle_request` runs in anybody's context."""
    server = type("Server", (*EVERY_ENGINE[name], TCPServer), {})(LOOPBACK, Remember)
    with nothing_left_behind(), server:
        for turn in (b"first", b"second"):
            with connect(server) as client:
                client.sendall(turn + b"\n")

                def handle_request(turn: bytes = turn) -> str:
                    variable.set(turn.decode())
                    server.handle_request()
                    return variable.get()

                assert Call(handle_request).result() == turn.decode()
                assert received(client) == turn


# --- in front of servers that are not ours ----------------------------------------------


class Answer(socketserver.StreamRequestHandler):
    """A handler of the standard library, as programs have them."""

    def handle(self) -> None:
        line = self.rfile.readline()
        if line == b"fail\n":
            raise ValueError("the client asked for it")
        if line == b"exit\n":
            raise Abort("the client asked for it")
        self.wfile.write(line)


def foreign(name: str, **attributes: object) -> Any:
    server_class: Any = type("Foreign", (*MIX_INS[name], socketserver.TCPServer), attributes)
    return server_class(LOOPBACK, Answer)


def foreign_client(server: Any) -> Client:
    client = Client(server.address_family, server.socket_type)
    client.connect(server.server_address)
    return client


def ask_foreign(server: Any, question: bytes) -> bytes:
    with foreign_client(server) as client:
        client.sendall(question)
        return goodbye(client)


@contextmanager
def serving_foreign(server: Any) -> Iterator[None]:
    serving = Call(server.serve_forever, 0.01)
    try:
        yield
    finally:
        Call(server.shutdown).result()
        serving.result()
        Call(server.server_close).result()


@pytest.mark.parametrize("name", CONCURRENT)
def test_an_engine_serves_in_front_of_a_foreign_server(name: str) -> None:
    with nothing_left_behind():
        server = foreign(name)
        with serving_foreign(server):
            answers = [ask_foreign(server, b"%d\n" % turn) for turn in range(5)]
    assert answers == [b"%d\n" % turn for turn in range(5)]


@pytest.mark.parametrize("name", CONCURRENT)
def test_a_foreign_server_is_told_of_failures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are Exceptions; in each case the connection is closed."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Journal() as journal, nothing_left_behind():

        def note(self: Any, request: Any, client_address: Any) -> None:
            journal.note(type(sys.exc_info()[1]).__name__)

        server = foreign(name, handle_error=note)
        with serving_foreign(server):
            assert ask_foreign(server, b"fail\n") == b""
            assert ask_foreign(server, b"exit\n") == b""
            assert ask_foreign(server, b"next\n") == b"next\n"
        assert journal.entries() == ["ValueError"]


@pytest.mark.parametrize("name", CONCURRENT)
def test_closing_a_foreign_server_waits_for_its_requests(name: str) -> None:
    with nothing_left_behind():
        server = foreign(name)
        with foreign_client(server) as client:
            Call(server.handle_request).result()
            closing = Call(server.server_close)
            client.sendall(b"last words\n")
            assert goodbye(client) == b"last words\n"
        closing.result()


@pytest.mark.parametrize("name", CONCURRENT)
def test_http_server_runs_on_every_engine(name: str) -> None:
    class Hello(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.path.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server_class: Any = type("Web", (*MIX_INS[name], http.server.HTTPServer), {})
    with nothing_left_behind():
        server = server_class(LOOPBACK, Hello)
        with serving_foreign(server):
            host, port = server.server_address[:2]
            # Made and closed between two requests, so that no child process inherits it.
            for path in ("/one", "/two"):
                client = http.client.HTTPConnection(host, port, timeout=PATIENCE)
                client.request("GET", path, headers={"Connection": "close"})
                with client.getresponse() as response:
                    assert (response.status, response.read()) == (200, path.encode())
                client.close()


class Hooks:
    """A foreign server reduced to the hooks that a worker needs."""

    def __init__(self, raised: BaseException | None = None) -> None:
        self.raised = raised
        self.called: list[str] = []

    def finish_request(self, request: str, client_address: str) -> None:
        self.called.append(f"finish {request} {client_address}")
        if self.raised is not None:
            raise self.raised

    def handle_error(self, request: str, client_address: str) -> None:
        self.called.append(f"error {request} {client_address}")

    def shutdown_request(self, request: str) -> None:
        self.called.append(f"shutdown {request}")


@pytest.mark.parametrize("how", [serve, serve_foreign])
def test_a_worker_uses_nothing_but_documented_hooks(how: Any) -> None:
    good, bad = Hooks(), Hooks(ValueError())
    assert how(good, "request", "address") is True
    assert how(bad, "request", "address") is False
    assert good.called == ["finish request address", "shutdown request"]
    assert bad.called == ["finish request address", "error request address", "shutdown request"]


@pytest.mark.parametrize("how", [serve, serve_foreign])
def test_a_worker_of_a_foreign_server_passes_on_what_is_no_exception(how: Any) -> None:
    server = Hooks(Abort())
    with pytest.raises(Abort):
        how(server, "request", "address")
    assert server.called == ["finish request address", "shutdown request"]


def test_a_worker_of_our_servers_has_serve_request_do_it_all() -> None:
    class Ours(Hooks):
        def serve_request(self, request: str, client_address: str) -> bool:
            self.called.append(f"serve {request} {client_address}")
            return True

    server = Ours()
    assert serve(server, "request", "address") is True
    assert server.called == ["serve request address"]


# --- every combination ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [name for name in portico.__all__ if name.startswith(COMBINED)],
)
def test_a_combination_is_an_engine_in_front_of_a_family(name: str) -> None:
    if name.endswith("MixIn"):
        return
    engine = next(engine for engine in COMBINED if name.startswith(engine))
    combination = getattr(portico, name)
    assert combination.__bases__ == (
        getattr(portico, f"{engine}MixIn"),
        getattr(portico, name.removeprefix(engine)),
    )


def test_a_server_that_grew_shrinks_again(engine: str) -> None:
    """After its requests have ended, it holds what it held before them."""

    class Echo(StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    settings = {"worker_idle_timeout": 0.1}
    server: TCPServer = type("Server", (*MIX_INS[engine], TCPServer), settings)(LOOPBACK, Echo)
    with RunningServer(server, 0.01) as running, nothing_left_behind():
        before = len(descriptors())
        calls = [Call(running.ask, b"%d\n" % number) for number in range(12)]
        assert [call.result() for call in calls] == [b"%d\n" % number for number in range(12)]
        eventually(lambda: not getattr(server, "active_children", None), "children are collected")
        # Its clients have seen their ends before the last connection is closed.
        eventually(lambda: len(descriptors()) <= before, "the connections are closed")


# --- places -----------------------------------------------------------------------------


class Ending(StreamRequestHandler):
    """Ends in the way that its server says, after a word of its client."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())
        self.wfile.flush()
        if (end := getattr(self.server, "end", None)) is not None:
            end(self.request)


def fail(*_: object) -> None:
    raise ValueError("on purpose")


def abort(*_: object) -> None:
    raise Abort


def refuse(*_: object) -> bool:
    return False


def close(request: socket.socket) -> None:
    request.close()


def detach(request: socket.socket) -> None:
    os.close(request.detach())


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def close_and_fail(server: TCPServer) -> Any:
    """Return a `close_request` that fails in the family's own call."""

    def close_request(request: Any) -> None:
        class Failing:
            def close(self) -> None:
                request.close()
                raise OSError("on purpose")

        connection = server._guard.connections.get(request)
        failing = Failing()
        if connection is not None:
            server._guard.connections.exchange(request, failing)
        TCPServer.close_request(server, failing)

    return close_request


def close_in_vain(request: Any) -> None:
    """Stand for a `shutdown_request` that fails, when nobody knows the connection any more."""
    request.close()
    fail()


def keep_open(request: Any) -> None:
    """Stand for a `shutdown_request` that leaves the connection to somebody else."""
    kept.append(request)


kept: list[Any] = []


def another(request: socket.socket, client_address: Any) -> tuple[socket.socket, Any]:
    """Stand for a `prepare_request` that exchanges the socket."""
    return socket.socket(fileno=request.detach()), client_address


PATHS: dict[str, dict[str, Any]] = {
    "served": {},
    "verified not": {"verify_request": refuse},
    "verifying fails": {"verify_request": fail},
    "admitted not": {"admit_request": refuse},
    "admitting fails": {"admit_request": fail},
    "processing fails": {"process_request": fail},
    "no worker": {"process_request": no_thread},
    "preparing fails": {"prepare_request": fail},
    "exchanged": {"prepare_request": another},
    "exchanged, and fails": {"prepare_request": another, "end": fail},
    "handler fails": {"end": fail},
    "handler closes": {"end": close},
    "handler detaches": {"end": detach},
    "kept open": {"shutdown_request": keep_open},
    "shutting down fails": {"shutdown_request": close_in_vain},
    "closing fails": {"close_request": close_and_fail},
}


CLOSING_FAILS = {"shutting down fails", "closing fails"}

ENDS_THE_LOOP = {
    ("serial", "shutting down fails"),
    ("serial", "closing fails"),
    ("forks", "closing fails"),
}
"""Where it is the acceptor that closes a connection, and what that raises goes through it."""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [*MIX_INS, "green"])
def test_every_path_gives_the_place_back(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of a connection, nobody counts or remembers it in the end."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    mix_ins = MIX_INS.get(name, (GreenMixIn,))
    server: Any = type("Server", (*mix_ins, TCPServer), {"max_connections": 9})(LOOPBACK, Ending)
    server.handle_error = lambda *_: None
    for hook, replacement in PATHS[path].items():
        made = replacement(server) if replacement is close_and_fail else replacement
        setattr(server, hook, made)
    guard = server._guard
    with nothing_left_behind():
        with RunningServer(server) as running:
            for _ in range(3):
                with running.connect() as client:
                    client.sendall(b"word\n")
                    if path == "kept open":
                        assert client.recv(100) == b"word\n"
                    else:
                        goodbye(client)
                if (name, path) in ENDS_THE_LOOP:
                    break
            if path in CLOSING_FAILS:
                running.shutdown()
                running.wait_ended()
        eventually(partial(is_forgotten, guard))
        for request in kept:
            request.close()
        kept.clear()


def is_forgotten(guard: Guard) -> bool:
    return guard.gate is not None and guard.gate.active == 0 and guard.open == 0


def test_a_worker_that_is_killed_gives_the_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    for name in (*CONCURRENT, "green"):
        mix_ins = MIX_INS.get(name, (GreenMixIn,))
        attributes = {"max_connections": 9, "end": staticmethod(abort)}
        server: Any = type("Server", (*mix_ins, TCPServer), attributes)(LOOPBACK, Ending)
        with RunningServer(server) as running:
            assert running.ask(b"word\n") == b"word\n"
            guard = server._guard
            eventually(partial(is_forgotten, guard))


@pytest.mark.parametrize("name", [*CONCURRENT, "green"])
def test_closing_under_load_gives_every_place_back(name: str) -> None:
    mix_ins = MIX_INS.get(name, (GreenMixIn,))
    attributes = {"max_connections": 20, "max_children": 20}
    server: Any = type("Server", (*mix_ins, TCPServer), attributes)(LOOPBACK, Ending)
    stopped = threading.Event()

    def call_on() -> None:
        while not stopped.is_set():
            try:
                with connect(server) as client:
                    client.sendall(b"word\n")
                    goodbye(client)
            except OSError:
                return

    with nothing_left_behind():
        with RunningServer(server) as running:
            calls = [Call(call_on) for _ in range(4)]
            eventually(lambda: server._guard.gate.active)
            Call(server.server_close).result()
            assert running.wait_ended() is None
            stopped.set()
            for call in calls:
                call.result()
        eventually(partial(is_forgotten, server._guard))


TLS_CLIENT = """
import socket, ssl, sys

port, authority = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
with (
    socket.create_connection(("127.0.0.1", int(port))) as plain,
    context.wrap_socket(plain, server_hostname="localhost") as client,
):
    client.sendall(b"word\\n")
    print(client.recv(100))
"""
"""In a process of its own: a child that is forked while another thread of its parent is inside of
OpenSSL may find a lock of it taken, for ever.  A server has no such threads beside it."""


@pytest.mark.parametrize("is_eager", [True, False])
@pytest.mark.parametrize("name", [*MIX_INS, "green"])
def test_a_handshake_that_fails_gives_the_place_back(
    name: str, is_eager: bool, authority: Authority
) -> None:
    """With a context, or with a listener that speaks TLS."""
    pair = authority.issue("localhost")
    mix_ins = MIX_INS.get(name, (GreenMixIn,))
    server: Any = type("Server", (*mix_ins, TCPServer), {"max_connections": 9})(LOOPBACK, Ending)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if is_eager:
        server.ssl_context = context
    else:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with nothing_left_behind(), RunningServer(server) as running:
        for words in (b"GET / HTTP/1.0\r\n\r\n", b"", b"\x16\x03\x01\x02\x00\x01"):
            with running.connect() as client:
                client.sendall(words)
                with suppress(OSError):  # the server may have reset the connection by now
                    client.shutdown(socket.SHUT_WR)
                goodbye(client)
        port = str(server.server_address[1])
        done = run_program(TLS_CLIENT, port, str(authority.certificate))
        assert (done.stdout, done.stderr) == ("b'word\\n'\n", "")
        guard = server._guard
        eventually(partial(is_forgotten, guard))


@pytest.mark.parametrize("name", ["threads", "pool", "green"])
def test_a_limit_in_time_ends_a_handshake(name: str, authority: Authority) -> None:
    """Although the connection changes hands for it."""
    pair = authority.issue("localhost")
    attributes = {
        "ssl_context": (pair.certificate, pair.key),
        "request_timeout": 0.1,
        "handshake_timeout": None,
    }
    server: Any = type("Server", (*MIX_INS.get(name, (GreenMixIn,)), TCPServer), attributes)(
        LOOPBACK, Ending
    )
    with recorded(DeadlineExpired) as expired, RunningServer(server) as running:
        with running.connect() as client:
            assert goodbye(client) == b""
        eventually(lambda: expired)  # told once it is done
        assert [event.deadline for event in expired] == [Deadline.REQUEST]
