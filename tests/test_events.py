from __future__ import annotations

import dataclasses
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from portico import (
    ForkingTCPServer,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
    UDPServer,
    acceptor,
    events,
)
from portico.events import (
    AcceptPaused,
    AcceptResumed,
    CloseReason,
    ConnectionAccepted,
    ConnectionClosed,
    ConnectionRefused,
    DatagramCut,
    Deadline,
    Event,
    HandlerFailed,
    ListenerBound,
    ListenerLost,
    PeerGone,
    RefusalReason,
    ServerStarted,
    ServerStopped,
    emit,
    subscribe,
)
from tests.support import (
    Call,
    Journal,
    RunningServer,
    ask,
    connect,
    eventually,
    nothing_left_behind,
    received,
    recorded,
    reset,
    run_program,
)

LOOPBACK = ("127.0.0.1", 0)

ENGINES = {"serial": TCPServer, "threads": ThreadingTCPServer, "forks": ForkingTCPServer}


def kinds(root: type[Event] = Event) -> Iterator[type[Event]]:
    """Every kind of event that portico has, and those that a test has just defined."""
    yield root
    for kind in root.__subclasses__():
        yield from kinds(kind)


OURS = [kind for kind in kinds() if kind.__module__ == events.__name__]


# --- subscribing ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
def test_nobody_subscribes_unasked(kind: type[Event]) -> None:
    assert kind.subscribers == ()


def test_a_subscriber_gets_the_kinds_that_it_named() -> None:
    with recorded(ServerStarted, ServerStopped) as seen:
        for event in (
            ServerStarted("a server"),
            ConnectionAccepted("a server", "a peer"),
            ServerStopped("a server"),
        ):
            emit(event)
    assert seen == [ServerStarted("a server"), ServerStopped("a server")]


def test_a_subscriber_that_names_no_kind_gets_all() -> None:
    seen: list[Event] = []
    end = subscribe(seen.append)
    try:
        assert all(len(kind.subscribers) == 1 for kind in OURS)
        emit(ServerStarted("a server"))
        emit(ConnectionAccepted("a server", "a peer"))
    finally:
        end()
    assert seen == [ServerStarted("a server"), ConnectionAccepted("a server", "a peer")]


def test_a_kind_stands_for_those_that_refine_it() -> None:
    class Restarted(ServerStarted):
        pass

    with recorded(ServerStarted) as seen:
        emit(Restarted("a server"))
    assert seen == [Restarted("a server")]


def test_a_refinement_does_not_stand_for_what_it_refines() -> None:
    class Restarted(ServerStarted):
        pass

    with recorded(Restarted):
        assert ServerStarted.subscribers == ()


def test_a_kind_defined_later_has_the_subscribers_of_what_it_refines() -> None:
    with recorded(ServerStarted) as seen:

        class Restarted(ServerStarted):
            pass

        emit(Restarted("a server"))
    assert seen == [Restarted("a server")]
    assert Restarted.subscribers == (), "the end of a subscription holds for it too"


def test_a_kind_that_is_named_twice_is_told_once() -> None:
    with recorded(ServerStarted, Event, ServerStarted) as seen:
        emit(ServerStarted("a server"))
    assert seen == [ServerStarted("a server")]


def test_subscribers_are_called_in_their_order() -> None:
    called: list[str] = []
    ends = [
        subscribe(lambda _, name=name: called.append(name), ServerStarted)  # type: ignore[misc]
        for name in ("first", "second", "third")
    ]
    emit(ServerStarted("a server"))
    for end in ends:
        end()
    assert called == ["first", "second", "third"]


def test_the_end_of_a_subscription_may_be_asked_for_twice() -> None:
    """The second time does not end the same callback's other subscription."""
    seen: list[Event] = []
    first, second = subscribe(seen.append, ServerStarted), subscribe(seen.append, ServerStarted)
    emit(ServerStarted("twice"))
    first()
    first()
    emit(ServerStarted("once"))
    second()
    emit(ServerStarted("never"))
    assert [event.server for event in seen] == ["twice", "twice", "once"]


def test_a_subscriber_may_end_its_subscription_while_it_is_called() -> None:
    seen: list[Event] = []

    def once(event: Event) -> None:
        seen.append(event)
        end()

    end = subscribe(once, ServerStarted)
    with recorded(ServerStarted) as others:
        emit(ServerStarted(1))
        emit(ServerStarted(2))
    assert seen == [ServerStarted(1)]
    assert others == [ServerStarted(1), ServerStarted(2)]


def test_a_failing_subscriber_is_logged_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(event: Event) -> None:
        raise ValueError("the subscriber fails")

    end = subscribe(fail, ServerStarted)
    try:
        with recorded(ServerStarted) as seen:
            emit(ServerStarted("a server"))
    finally:
        end()
    assert seen == [ServerStarted("a server")]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("portico.events", "ERROR")
    assert record.getMessage() == "a subscriber of ServerStarted failed"
    assert "the subscriber fails" in caplog.text


def test_subscribing_is_safe_in_many_threads() -> None:
    """No subscription is lost to another, and none is left."""
    together = threading.Barrier(8)
    seen: list[int] = []

    def come_and_go() -> None:
        together.wait()
        for _ in range(300):
            end = subscribe(lambda _: seen.append(1), ServerStarted, ConnectionClosed)
            end()
        subscribe(lambda _: seen.append(2), ServerStarted)

    try:
        for call in [Call(come_and_go) for _ in range(8)]:
            call.result()
        emit(ServerStarted("a server"))
        assert seen == [2] * 8
        assert ConnectionClosed.subscribers == ()
    finally:
        ServerStarted.subscribers = ()


@pytest.mark.parametrize("kind", OURS)
def test_an_event_cannot_be_changed(kind: type[Event]) -> None:
    values: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(kind))
    event = kind(**values)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.server = "another"  # type: ignore[misc]  # what the test is about


# --- the life of a server ---------------------------------------------------------------


def do_nothing(request: object, client_address: object, server: object) -> None:
    """Be the handler of a test that is not about handlers."""


def test_a_server_tells_where_it_is_bound() -> None:
    with recorded(Event) as seen, TCPServer(LOOPBACK, do_nothing) as server:
        assert seen == [ListenerBound(server, server.socket.getsockname())]


def test_a_server_that_is_not_bound_tells_nothing() -> None:
    with (
        recorded(Event) as seen,
        TCPServer(LOOPBACK, do_nothing, bind_and_activate=False) as server,
    ):
        assert seen == []
        server.server_bind()
        assert seen == [ListenerBound(server, server.server_address)]


def test_a_loop_tells_its_start_and_its_end() -> None:
    server = TCPServer(LOOPBACK, do_nothing)
    with recorded(Event) as seen:
        with RunningServer(server):
            assert seen == [ServerStarted(server)]
        assert seen == [ServerStarted(server), ServerStopped(server)]


def test_a_loop_that_is_over_before_it_begins_tells_nothing() -> None:
    with recorded(Event) as seen, TCPServer(LOOPBACK, do_nothing) as server:
        seen.clear()
        server.shutdown()
        server.serve_forever()
    assert seen == []


def test_a_loop_that_is_left_by_an_error_tells_its_end() -> None:
    class Failing(TCPServer):
        def service_actions(self) -> None:
            raise LookupError("the program ends the loop")

    with recorded(Event) as seen, Failing(LOOPBACK, do_nothing) as server:
        seen.clear()
        with pytest.raises(LookupError):
            server.serve_forever(0.01)
    assert seen == [ServerStarted(server), ServerStopped(server)]


def test_a_listener_closed_by_its_server_is_lost_without_an_error() -> None:
    server = TCPServer(LOOPBACK, do_nothing)
    with recorded(Event) as seen, RunningServer(server) as running:
        server.server_close()
        assert running.wait_ended() is None
    assert seen == [ServerStarted(server), ListenerLost(server, None), ServerStopped(server)]


def test_a_listener_closed_by_a_handler_is_lost_without_an_error() -> None:
    """The loop does not wait at that moment, so it tries to accept once more."""

    def close(request: object, client_address: object, server: TCPServer) -> None:
        server.server_close()

    with recorded(ListenerLost) as seen, RunningServer(TCPServer(LOOPBACK, close)) as running:
        with running.connect():
            assert running.wait_ended() is None
    assert [event.error for event in seen] == [None]


def test_a_listener_that_was_shut_down_is_lost_with_the_error_of_accept() -> None:
    server = TCPServer(LOOPBACK, do_nothing)
    with recorded(ListenerLost) as seen, RunningServer(server) as running:
        server.socket.shutdown(socket.SHUT_RDWR)
        assert running.wait_ended() is None
    (lost,) = seen
    assert lost.error is not None
    assert lost.error.errno == errno.EINVAL


def test_a_listener_that_is_closed_after_the_loop_is_not_lost() -> None:
    with recorded(ListenerLost) as seen, RunningServer(TCPServer(LOOPBACK, do_nothing)) as running:
        running.shutdown()
        running.wait_ended()
        running.server.server_close()
    assert seen == []


# --- the life of a connection -----------------------------------------------------------


class Echo(StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


@contextmanager
def journalled() -> Iterator[Journal]:
    """Note what is told of connections, in this process and in the children of an engine."""
    with Journal() as journal:

        def note(event: Any) -> None:
            if isinstance(event, ConnectionAccepted):
                journal.note("accepted")
            elif isinstance(event, ConnectionRefused):
                journal.note(f"refused: {event.reason}")
            elif isinstance(event, ConnectionClosed):
                journal.note(f"closed: {event.reason}")
            elif isinstance(event, HandlerFailed):
                journal.note(f"failed: {type(event.error).__name__}")
            elif isinstance(event, PeerGone):
                journal.note(f"gone: {type(event.error).__name__}")
            else:
                raise TypeError(f"a request causes no {event}")

        end = subscribe(
            note, ConnectionAccepted, ConnectionRefused, ConnectionClosed, HandlerFailed, PeerGone
        )
        try:
            yield journal
        finally:
            end()


HOOKS = [
    "admit_request",
    "verify_request",
    "process_request",
    "prepare_request",
    "finish_request",
    "RequestHandlerClass",
]
"""What runs between accepting a request and closing it."""


def told(server: TCPServer, behave: Callable[[socket.socket], object] = ask) -> list[str]:
    """Serve one client that behaves like this, wait for the worker, and return the notes."""
    with nothing_left_behind(), journalled() as journal:
        with server, connect(server) as client:
            call = Call(behave, client)
            try:
                server.handle_request()
            except SystemExit:
                pass
            call.failure()
        return journal.entries()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> type[TCPServer]:
    return ENGINES[request.param]


def no(*_: object) -> bool:
    return False


def fail(*_: object) -> Any:
    raise ValueError("a hook fails")


def leave(*_: object) -> Any:
    raise SystemExit(0)


def with_hooks(engine: type[TCPServer], **hooks: object) -> TCPServer:
    """Make a server whose hooks are replaced, and whose reports nobody has to read."""
    quiet = {"handle_error": lambda *_: None}
    server: TCPServer = type("Hooked", (engine,), {**quiet, **hooks})(LOOPBACK, Echo)
    return server


def test_a_request_is_accepted_and_closed(engine: type[TCPServer]) -> None:
    assert told(engine(LOOPBACK, Echo)) == ["accepted", "closed: finished"]


def test_a_request_that_is_not_admitted_is_refused(engine: type[TCPServer]) -> None:
    notes = told(with_hooks(engine, admit_request=no, verify_request=fail))
    assert notes == ["accepted", "refused: not admitted"]


def test_a_request_that_is_not_verified_is_refused(engine: type[TCPServer]) -> None:
    notes = told(with_hooks(engine, verify_request=no))
    assert notes == ["accepted", "refused: not verified"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_request_whose_hook_fails_is_closed(engine: type[TCPServer], hook: str) -> None:
    """Wherever it runs: in the acceptor or in the worker."""
    server = with_hooks(engine)
    setattr(server, hook, fail)
    assert told(server) == ["accepted", "failed: ValueError", "closed: failed"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_request_whose_hook_is_interrupted_is_closed(
    engine: type[TCPServer], hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no Exception is nobody's failure.  Whoever counts sees each connection end."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    server = with_hooks(engine)
    setattr(server, hook, leave)
    assert told(server) == ["accepted", "closed: interrupted"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_report_that_fails_is_no_second_failure(
    engine: type[TCPServer], hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `handle_error` raises leaves the acceptor or the worker; the request is closed once."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    server = with_hooks(engine, handle_error=leave)
    setattr(server, hook, fail)
    assert told(server) == ["accepted", "failed: ValueError", "closed: failed"]


class Reading(StreamRequestHandler):
    def handle(self) -> None:
        self.rfile.read()


def test_a_peer_that_vanishes_is_gone(
    engine: type[TCPServer], capfd: pytest.CaptureFixture[str]
) -> None:
    """And leaves no traceback: it is no fault of the program."""
    notes = told(engine(LOOPBACK, Reading), reset)
    assert notes == ["accepted", "gone: ConnectionResetError", "closed: peer gone"]
    assert capfd.readouterr().err == ""


class LosingAnother(StreamRequestHandler):
    """A handler that talks to somebody else, who is gone."""

    def handle(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        with ours:
            ours.sendall(b"are you there?")


def test_another_connection_that_the_handler_lost_is_a_failure(
    engine: type[TCPServer], capfd: pytest.CaptureFixture[str]
) -> None:
    """The error is the same as that of a vanished peer; the traceback stays."""
    notes = told(engine(LOOPBACK, LosingAnother))
    assert notes == ["accepted", "failed: BrokenPipeError", "closed: failed"]
    assert "BrokenPipeError" in capfd.readouterr().err


def test_a_peer_that_vanishes_before_the_acceptor_looks_at_it_is_gone(
    engine: type[TCPServer],
) -> None:
    """A `verify_request` that talks to it can lose it as well as a handler can."""

    def read(_: object, request: socket.socket, client_address: object) -> bool:
        return bool(request.recv(1))

    notes = told(with_hooks(engine, verify_request=read), reset)
    assert notes == ["accepted", "gone: ConnectionResetError", "closed: peer gone"]


def test_a_datagram_is_accepted_and_closed() -> None:
    assert told(UDPServer(LOOPBACK, answer), ask) == ["accepted", "closed: finished"]


def answer(request: tuple[bytes, socket.socket], client_address: Any, server: object) -> None:
    packet, sock = request
    sock.sendto(packet, client_address)


def test_events_carry_their_server_and_the_address_of_the_peer() -> None:
    refusing = with_hooks(TCPServer, verify_request=no)
    failing = with_hooks(TCPServer, finish_request=fail)
    for server in (refusing, failing):
        with server, connect(server) as client:
            with recorded(ConnectionAccepted, ConnectionRefused, HandlerFailed) as seen:
                server.handle_request()
            peer = client.getsockname()
        assert [(event.server, event.peer) for event in seen] == [(server, peer)] * 2  # type: ignore[attr-defined]


def test_a_failure_carries_its_error() -> None:
    error = LookupError("of the handler")

    def raise_it(*_: object) -> None:
        raise error

    with with_hooks(TCPServer, finish_request=raise_it) as server, connect(server):
        with recorded(HandlerFailed) as seen:
            server.handle_request()
    assert [event.error for event in seen] == [error]


def test_a_failure_is_told_before_it_is_handled() -> None:
    told_so_far: list[int] = []

    def look(*_: object) -> None:
        told_so_far.append(len(seen))

    with with_hooks(TCPServer, finish_request=fail, handle_error=look) as server, connect(server):
        with recorded(HandlerFailed) as seen:
            server.handle_request()
    assert told_so_far == [1]


def test_a_duration_is_the_time_that_the_worker_took(monkeypatch: pytest.MonkeyPatch) -> None:
    instants = iter([90.0, 100.0, 102.5])  # accepted, taken, closed
    with TCPServer(LOOPBACK, do_nothing) as server, connect(server):
        for module in ("server", "request"):
            monkeypatch.setattr(f"portico.{module}.time", lambda: next(instants))
        with recorded(ConnectionClosed) as seen:
            server.handle_request()
    assert [(event.duration, event.reason) for event in seen] == [(2.5, CloseReason.FINISHED)]


def test_the_duration_of_what_no_worker_took_begins_with_the_accept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instants = iter([90.0, 102.5])
    with with_hooks(TCPServer, verify_request=fail) as server, connect(server):
        for module in ("server", "request"):
            monkeypatch.setattr(f"portico.{module}.time", lambda: next(instants))
        with recorded(ConnectionClosed) as seen:
            server.handle_request()
    assert [(event.duration, event.reason) for event in seen] == [(12.5, CloseReason.FAILED)]


def test_a_connection_is_closed_when_it_is_told_so() -> None:
    """So a subscriber may count what is still open."""
    requests: list[socket.socket] = []
    open_then: list[int] = []

    def note(request: socket.socket, client_address: object, server: object) -> None:
        requests.append(request)

    def look(event: Event) -> None:
        open_then.append(requests[0].fileno())

    end = subscribe(look, ConnectionClosed)
    try:
        with TCPServer(LOOPBACK, note) as server, connect(server):
            server.handle_request()
    finally:
        end()
    assert open_then == [-1]


def test_a_child_process_tells_of_its_connection_itself() -> None:
    """The parent has handed it over, and knows no more of it."""
    with Journal() as journal:

        def note(event: Event) -> None:
            journal.note(f"{type(event).__name__} {os.getpid() == test}")

        test = os.getpid()
        end = subscribe(note, ConnectionAccepted, ConnectionClosed)
        try:
            with ForkingTCPServer(LOOPBACK, do_nothing) as server, connect(server):
                server.handle_request()
        finally:
            end()
        assert journal.entries() == ["ConnectionAccepted True", "ConnectionClosed False"]


# --- datagrams --------------------------------------------------------------------------


def test_a_datagram_that_is_too_long_is_told() -> None:
    """One byte makes the difference; a subscriber knows who sent it and what was kept."""

    class Short(UDPServer):
        max_packet_size = 100

    with Short(LOOPBACK, answer) as server, connect(server) as client:
        with recorded(DatagramCut) as seen:
            for size in (0, 99, 100, 101, 5000):
                client.send(b"x" * size)
                server.handle_request()
                assert client.recv(8192) == b"x" * min(size, 100)
        assert seen == [DatagramCut(server, client.getsockname(), 100)] * 2


# --- out of descriptors -----------------------------------------------------------------


class Exhausted(TCPServer):
    """A server that finds no descriptor for the first four connections."""

    numbers: Iterator[int] = iter(())

    def get_request(self) -> Any:
        for number in self.numbers:
            raise OSError(number, os.strerror(number))
        return super().get_request()


def test_a_pause_is_told_once_until_accepting_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "FIRST_PAUSE", 0.001)
    server = Exhausted(LOOPBACK, Echo)
    server.numbers = iter((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
    with recorded(AcceptPaused, AcceptResumed) as seen, RunningServer(server) as running:
        assert running.ask(b"hello\n") == b"hello\n"
        assert running.ask(b"again\n") == b"again\n"
    paused, resumed = seen
    assert isinstance(paused, AcceptPaused)
    assert isinstance(resumed, AcceptResumed)
    assert paused.error.errno == errno.EMFILE
    # 1 + 2 + 4 + 8 ms of pauses at the least.
    assert resumed.duration >= 0.015


def test_each_exhaustion_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "FIRST_PAUSE", 0.001)
    server = Exhausted(LOOPBACK, Echo)
    with recorded(AcceptPaused, AcceptResumed) as seen, RunningServer(server) as running:
        for _ in range(2):
            server.numbers = iter((errno.EMFILE,))
            assert running.ask(b"hello\n") == b"hello\n"
    assert [type(event) for event in seen] == [AcceptPaused, AcceptResumed] * 2


OUT_OF_DESCRIPTORS = """
import os, resource, socket, threading
from portico import StreamRequestHandler, ThreadingTCPServer, events

class Echo(StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())

paused = threading.Event()
events.subscribe(
    lambda event: (print(type(event).__name__, event.error.errno, flush=True), paused.set()),
    events.AcceptPaused,
)
events.subscribe(lambda event: print(type(event).__name__, flush=True), events.AcceptResumed)

server = ThreadingTCPServer(("127.0.0.1", 0), Echo)
serving = threading.Thread(target=server.serve_forever)
serving.start()
with socket.create_connection(server.server_address) as client:  # what is made once, is made
    client.sendall(b"first\\n")
    assert client.recv(64) == b"first\\n"
    assert client.recv(64) == b""
for thread in threading.enumerate():  # its handler has closed its end, not only shut it down
    if thread not in (serving, threading.main_thread()):
        thread.join()

client = socket.socket()
client.settimeout(60)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
fillers = [os.dup(0)]
while fillers[-1] < 64:
    fillers.append(os.dup(0))
resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, hard))
client.connect(server.server_address)
client.sendall(b"patience\\n")
assert paused.wait(60)
os.close(fillers.pop())
assert client.recv(64) == b"patience\\n"
client.close()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
server.shutdown()
serving.join()
server.server_close()
"""


def test_a_server_out_of_descriptors_pauses_and_recovers_by_itself() -> None:
    """The client that had to wait is served as soon as there is one descriptor for it."""
    done = run_program(OUT_OF_DESCRIPTORS)
    assert done.stderr == ""
    assert done.stdout == f"AcceptPaused {errno.EMFILE}\nAcceptResumed\n"


# --- subscribers and the server ---------------------------------------------------------


def test_nothing_is_built_when_nobody_subscribed(
    engine: type[TCPServer], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever happens, no event comes into being."""

    def refuse(self: Event, *values: object) -> None:
        raise AssertionError(f"{type(self)} was built")

    for kind in OURS:
        monkeypatch.setattr(kind, "__init__", refuse)
    monkeypatch.setattr(acceptor, "FIRST_PAUSE", 0.001)

    class Everything(Exhausted, engine):  # type: ignore[misc, valid-type]  # one of three
        turn = 0

        def verify_request(self, request: object, client_address: object) -> bool:
            self.turn += 1
            return self.turn != 2

        def finish_request(self, request: Any, client_address: Any) -> None:
            if self.turn == 3:
                fail()
            super().finish_request(request, client_address)

    server = Everything(LOOPBACK, Echo)
    server.numbers = iter((errno.EMFILE, errno.ECONNABORTED))
    serving = Call(server.serve_forever)
    answers = []
    for question in (b"hello\n", b"", b"", b"hello\n"):
        with connect(server) as client:
            client.sendall(question)
            answers.append(received(client))
    with connect(server) as client:
        reset(client)
    eventually(lambda: server.turn == 5, "all were accepted")
    server.shutdown()
    serving.result()
    server.server_close()
    assert answers == [b"hello\n", b"", b"", b"hello\n"]
    assert "was built" not in capfd.readouterr().err


def test_a_subscriber_that_fails_at_everything_disturbs_nobody(
    engine: type[TCPServer], caplog: pytest.LogCaptureFixture
) -> None:
    end = subscribe(fail)
    try:
        with nothing_left_behind(), RunningServer(engine(LOOPBACK, Echo)) as running:
            assert running.ask(b"hello\n") == b"hello\n"
    finally:
        end()
    assert "a subscriber of ConnectionAccepted failed" in caplog.messages


@pytest.mark.parametrize("kind", [ConnectionAccepted, ConnectionClosed])
def test_a_subscriber_that_ends_the_loop_leaves_no_connection_open(kind: type[Event]) -> None:
    """SystemExit and KeyboardInterrupt go through every hook, and through subscribers."""
    requests: list[socket.socket] = []

    class Keeping(TCPServer):
        def get_request(self) -> Any:
            request, client_address = super().get_request()
            requests.append(request)
            return request, client_address

    end = subscribe(leave, kind)
    try:
        with Keeping(LOOPBACK, do_nothing) as server, connect(server):
            with pytest.raises(SystemExit):
                server.handle_request()
    finally:
        end()
    try:
        assert [request.fileno() for request in requests] == [-1]
    finally:
        for request in requests:
            request.close()


def test_reasons_read_as_words() -> None:
    """They are what a log line says."""
    assert [str(reason) for reason in RefusalReason] == [
        "not admitted",
        "not verified",
        "network denied",
        "network not allowed",
        "too many connections",
        "too many connections of this peer",
        "too many connections a second",
    ]
    assert [str(reason) for reason in CloseReason] == [
        "finished",
        "failed",
        "peer gone",
        "interrupted",
        "deadline",
        "cut",
        "no preamble",
    ]
    assert [str(deadline) for deadline in Deadline] == [
        "handshake timeout",
        "idle timeout",
        "request timeout",
        "minimum rate",
    ]
