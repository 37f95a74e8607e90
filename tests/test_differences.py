"""What portico mends: each test passes on portico and fails on the standard library's module.

Both halves are run, and the second is expected to fail, so that a row of
`docs/reference/differences.md` never claims what no longer differs.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import portico
from portico import console

if TYPE_CHECKING:
    from tests.tls import Authority

BOUND = 30.0
"""Seconds until a wait for portico counts as endless."""

STANDARD_BOUND = 1.0
"""The same for the standard library, where it is expected to run out."""


def differs_where(standard_fails: bool, reason: str) -> pytest.MarkDecorator:
    """Run a test on both modules, and expect the standard one to fail it where it does."""
    fails = pytest.mark.xfail(standard_fails, reason=reason, strict=True)
    return pytest.mark.parametrize(
        "module",
        [
            pytest.param(portico, id="portico"),
            pytest.param(socketserver, id="standard", marks=fails),
        ],
    )


differs = differs_where(True, "what portico mends")


def bound(module: Any) -> float:
    return BOUND if module is portico else STANDARD_BOUND


def do_nothing(request: object, client_address: object, server: object) -> None:
    """Be the handler of a test that is not about handlers."""


@contextmanager
def serving(server: Any, **options: float) -> Iterator[threading.Thread]:
    """Serve in a thread, and end it in whatever way the module under test understands."""
    thread = threading.Thread(target=serve, args=(server, options), daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server._BaseServer__shutdown_request = True
        if server.socket.fileno() >= 0:
            wake(server)
        thread.join(BOUND)
        server.server_close()
        assert not thread.is_alive()


def serve(server: Any, options: dict[str, float]) -> None:
    try:
        server.serve_forever(**options)
    except Exception:  # the loop ended; the tests look at what it left behind
        pass


def wake(server: Any) -> None:
    """End the wait of a loop that nothing but a request wakes."""
    with socket.socket(server.address_family, server.socket_type) as client:
        client.settimeout(BOUND)
        client.connect(server.server_address)
        if server.socket_type == socket.SOCK_DGRAM:
            client.send(b"")


def finishes(call: Callable[[], object], seconds: float) -> bool:
    """Say whether `call` returns in time, in a thread of its own."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def fail(request: object, client_address: object, server: object) -> None:
    raise ZeroDivisionError


@contextmanager
def stopped_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a standard error that is full, until the block ends and its reader goes away."""
    monkeypatch.setattr(console._lost, "count", 0)  # put back at the end
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * select.PIPE_BUF)
    os.set_blocking(writer, True)
    with suppress(BrokenPipeError), os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        try:
            yield
        finally:
            os.close(reader)


# --- the backlog and the loop -----------------------------------------------------------


@differs_where(sys.version_info < (3, 15), "five, before 3.15")
def test_the_backlog_is_as_large_as_the_system_allows(module: Any) -> None:
    """Five places are taken by the first five clients that come together."""
    assert module.TCPServer.request_queue_size == socket.SOMAXCONN


@differs
def test_an_idle_server_does_not_wake(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop waits once, however short the poll interval."""
    waits = threading.Semaphore(0)

    class Counting(module._ServerSelector):  # type: ignore[misc]  # one of two classes
        def select(self, timeout: float | None = None) -> Any:
            waits.release()
            return super().select(timeout)

    monkeypatch.setattr(module, "_ServerSelector", Counting)
    with serving(module.TCPServer(("127.0.0.1", 0), do_nothing), poll_interval=0.01):
        assert waits.acquire(timeout=BOUND)
        assert not waits.acquire(timeout=1), "it waited again"


@differs
def test_shutdown_does_not_wait_for_the_poll_interval(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wake-up descriptor ends the wait, however long it would last."""
    waits = threading.Event()

    class Telling(module._ServerSelector):  # type: ignore[misc]  # one of two classes
        def select(self, timeout: float | None = None) -> Any:
            waits.set()  # so it has looked already whether it is to end
            return super().select(timeout)

    monkeypatch.setattr(module, "_ServerSelector", Telling)
    server = module.TCPServer(("127.0.0.1", 0), do_nothing)
    server.service_actions = lambda: None  # which the poll interval is for
    with serving(server, poll_interval=60):
        assert waits.wait(BOUND)
        assert finishes(server.shutdown, bound(module))


@differs
def test_a_handler_of_the_serving_thread_may_call_shutdown(module: Any) -> None:
    """It would wait for itself; here it returns at once, and the loop ends after the handler."""
    returned = threading.Event()

    class Stopping(module.BaseRequestHandler):  # type: ignore[misc]  # one of two classes
        def handle(self) -> None:
            self.server.shutdown()
            returned.set()

    server = module.TCPServer(("127.0.0.1", 0), Stopping)
    with serving(server):
        wake(server)
        try:
            assert returned.wait(bound(module))
        finally:
            server._BaseServer__is_shut_down.set()


@differs
def test_shutdown_before_serve_forever_is_remembered(module: Any) -> None:
    """It returns, and so does the serve_forever that comes later."""
    with module.TCPServer(("127.0.0.1", 0), do_nothing) as server:
        try:
            assert finishes(server.shutdown, bound(module))
            assert finishes(server.serve_forever, bound(module))
        finally:
            server._BaseServer__is_shut_down.set()


@differs
def test_shutdown_after_the_loop_leaves_the_next_one_alone(module: Any) -> None:
    """The second serve_forever serves."""
    served = threading.Event()
    server = module.TCPServer(("127.0.0.1", 0), lambda *_: served.set())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    wake(server)
    assert served.wait(BOUND)
    server.shutdown()
    thread.join(BOUND)
    server.shutdown()
    served.clear()
    with serving(server):
        wake(server)
        assert served.wait(bound(module))


@differs
def test_closing_the_listener_ends_the_loop(module: Any) -> None:
    """Polling a closed descriptor returns at once, for ever, and takes a full core."""
    served = threading.Event()
    server = module.TCPServer(("127.0.0.1", 0), lambda *_: served.set())
    with serving(server, poll_interval=0.01) as thread:
        wake(server)
        assert served.wait(BOUND)
        server.server_close()
        thread.join(bound(module))
        assert not thread.is_alive()


@differs
def test_a_server_that_does_not_listen_says_so(module: Any) -> None:
    """The standard library's takes a full core instead."""
    server = module.TCPServer(("127.0.0.1", 0), do_nothing, bind_and_activate=False)
    raised: list[BaseException] = []

    def serve_forever() -> None:
        try:
            server.serve_forever(0.01)
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=serve_forever, daemon=True)
    thread.start()
    thread.join(bound(module))
    server._BaseServer__shutdown_request = True
    thread.join(BOUND)
    server.server_close()
    assert "server_activate()" in str(raised[0])


# --- out of descriptors -----------------------------------------------------------------

EXHAUSTED = """
import importlib, resource, socket, sys, threading
module = importlib.import_module(sys.argv[1])

class Server(module.ThreadingTCPServer):
    attempts = 0
    failed = threading.Event()

    def get_request(self):
        self.attempts += 1
        try:
            return super().get_request()
        except OSError:
            self.failed.set()
            raise

class Echo(module.BaseRequestHandler):
    def handle(self):
        self.request.sendall(self.request.recv(64))

server = Server(("127.0.0.1", 0), Echo)
serving = threading.Thread(target=server.serve_forever, daemon=True)
serving.start()
client = socket.create_connection(server.server_address)
client.sendall(b"first")
assert client.recv(64) == b"first"
assert client.recv(64) == b""
client.close()
for thread in threading.enumerate():  # its handler has closed its end, not only shut it down
    if thread not in (serving, threading.main_thread()):
        thread.join()
client = socket.socket()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, hard))
client.connect(server.server_address)
assert server.failed.wait(30)
before = server.attempts
threading.Event().wait(1)
print(server.attempts - before)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
client.settimeout(30)
client.sendall(b"again")
assert client.recv(64) == b"again"
"""


@differs
def test_a_server_out_of_descriptors_rests(module: Any) -> None:
    """It tries a few times a second, and serves again when there are descriptors."""
    done = subprocess.run(
        [sys.executable, "-c", EXHAUSTED, module.__name__],
        capture_output=True,
        text=True,
        check=True,
        timeout=BOUND * 3,
    )
    # 0.1 s, doubling to 1 s: three in the first second.  Ten leave room for a slow machine.
    assert int(done.stdout) <= 10


# --- hooks that raise -------------------------------------------------------------------


@differs
def test_a_verify_request_that_raises_refuses_one_peer(module: Any) -> None:
    """The error goes to handle_error, the request is closed, the next one is served."""
    served = threading.Event()

    class Choosy(module.TCPServer):  # type: ignore[misc]  # one of two classes
        handled = threading.Semaphore(0)
        refusals = 0

        def verify_request(self, request: Any, client_address: Any) -> bool:
            self.refusals += 1
            if self.refusals == 1:
                raise ValueError("the first one is refused")
            return True

        def handle_error(self, request: Any, client_address: Any) -> None:
            self.handled.release()

    server = Choosy(("127.0.0.1", 0), lambda *_: served.set())
    with serving(server), socket.create_connection(server.server_address) as client:
        client.settimeout(bound(module))
        assert server.handled.acquire(timeout=bound(module))
        assert client.recv(1) == b""
        wake(server)
        assert served.wait(bound(module))


@differs
def test_a_handle_error_that_raises_leaves_no_connection_open(module: Any) -> None:
    """It ends the loop, as programs expect; the connection is closed before."""

    class Strict(module.TCPServer):  # type: ignore[misc]  # one of two classes
        def handle_error(self, request: Any, client_address: Any) -> None:
            requests.append(request)
            raise RuntimeError("an error must not pass unseen")

    def fail(*_: object) -> None:
        raise ValueError("the handler fails")

    requests: list[socket.socket] = []
    server = Strict(("127.0.0.1", 0), fail)
    try:
        with serving(server) as thread, socket.create_connection(server.server_address):
            thread.join(BOUND)
            assert not thread.is_alive()
        (request,) = requests
        assert request.fileno() == -1
    finally:
        for request in requests:
            request.close()


@differs
def test_a_thread_that_cannot_start_does_not_break_the_close(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server closes that request, serves on, and has nothing to wait for."""
    errors = threading.Semaphore(0)

    class Server(module.ThreadingTCPServer):  # type: ignore[misc]  # one of two classes
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.release()

    class Unstartable(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    server = Server(("127.0.0.1", 0), do_nothing)
    with monkeypatch.context() as patches, socket.create_connection(server.server_address):
        patches.setattr(threading, "Thread", Unstartable)
        server.handle_request()
    assert errors.acquire(timeout=BOUND)
    server.server_close()


# --- context variables ------------------------------------------------------------------

VARIABLE: ContextVar[str] = ContextVar("variable", default="unset")


def values_seen(server: Any, requests: int) -> list[str]:
    """Serve from a context with a value; return what requests, and then that context, see."""
    seen: list[str] = []

    def handle(request: Any, client_address: object, server: object) -> None:
        seen.append(VARIABLE.get())
        VARIABLE.set("of a request")
        request.sendall(b"!")

    def serve_all() -> None:
        VARIABLE.set("of the caller")
        for _ in range(requests):
            with socket.create_connection(server.server_address, BOUND) as client:
                server.handle_request()
                assert client.recv(1) == b"!"
        seen.append(VARIABLE.get())

    server.RequestHandlerClass = handle
    with server:
        Context().run(serve_all)
    return seen


@differs
def test_what_a_request_sets_in_a_context_variable_stays_with_it(module: Any) -> None:
    seen = values_seen(module.TCPServer(("127.0.0.1", 0), do_nothing), 2)
    assert seen == ["of the caller"] * 3


@differs_where(
    not getattr(sys.flags, "thread_inherit_context", 0), "threads begin with an empty context"
)
def test_a_request_in_a_thread_sees_the_context_variables_of_the_caller(module: Any) -> None:
    seen = values_seen(module.ThreadingTCPServer(("127.0.0.1", 0), do_nothing), 1)
    assert seen == ["of the caller"] * 2


# --- peers that go away -----------------------------------------------------------------


@differs
def test_a_reader_of_standard_error_that_has_stopped_stops_nobody(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = module.TCPServer(("127.0.0.1", 0), fail)
    with serving(server), stopped_reader(monkeypatch):
        with socket.create_connection(server.server_address, bound(module)) as client:
            assert client.recv(64) == b""


@differs
def test_a_peer_that_went_away_leaves_no_traceback(
    module: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is no fault of the program; handle_error is called all the same."""
    handled = threading.Event()

    class Server(module.TCPServer):  # type: ignore[misc]  # one of two classes
        def handle_error(self, request: Any, client_address: Any) -> None:
            super().handle_error(request, client_address)
            handled.set()

    class Writer(module.StreamRequestHandler):  # type: ignore[misc]  # one of two classes
        def handle(self) -> None:
            self.rfile.read(1)

    server = Server(("127.0.0.1", 0), Writer)
    with serving(server):
        client = socket.create_connection(server.server_address)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()  # a reset
        assert handled.wait(BOUND)
    assert capfd.readouterr().err == ""


# --- kinds of sockets -------------------------------------------------------------------


@differs
def test_disable_nagle_algorithm_is_ignored_where_there_is_none(
    module: Any, tmp_path: Path
) -> None:
    """A handler with the setting serves Unix sockets, too."""

    class Prompt(module.StreamRequestHandler):  # type: ignore[misc]  # one of two classes
        disable_nagle_algorithm = True

        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    class Quiet(module.UnixStreamServer):  # type: ignore[misc]  # one of two classes
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Leave the standard error stream alone."""

    server = Quiet(str(tmp_path / "socket"), Prompt)
    with serving(server), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(BOUND)
        client.connect(server.server_address)
        client.sendall(b"prompt\n")
        assert client.recv(64) == b"prompt\n"


def _refuses_to_share_unix_ports() -> bool:
    """Say whether this kernel has EOPNOTSUPP for SO_REUSEPORT on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError as error:
            return error.errno == errno.EOPNOTSUPP
    return False


@differs_where(
    _refuses_to_share_unix_ports() and sys.version_info < (3, 13, 11),
    "CPython asks for it before 3.13.11, and Linux refuses it from 6.12.9 on",
)
def test_allow_reuse_port_is_ignored_on_unix_sockets(module: Any, tmp_path: Path) -> None:
    """Only IP sockets have ports to share."""

    class Server(module.UnixStreamServer):  # type: ignore[misc]  # one of two classes
        allow_reuse_port = True

    with Server(str(tmp_path / "socket"), do_nothing) as server:
        assert server.server_address == str(tmp_path / "socket")


# --- datagrams --------------------------------------------------------------------------


@differs
def test_a_datagram_that_was_cut_is_told(module: Any) -> None:
    """One that just fits is not."""
    cut: list[Any] = []
    received = threading.Semaphore(0)
    packets: list[bytes] = []

    class Server(module.UDPServer):  # type: ignore[misc]  # one of two classes
        max_packet_size = 100

    def keep(request: Any, client_address: Any, server: Any) -> None:
        packets.append(request[0])
        received.release()

    server = Server(("127.0.0.1", 0), keep)
    unsubscribe = portico.events.subscribe(cut.append, portico.events.DatagramCut)
    try:
        with serving(server), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for size in (100, 101, 5000):
                client.sendto(b"x" * size, server.server_address)
                assert received.acquire(timeout=BOUND)
            sender = client.getsockname()[1]
    finally:
        unsubscribe()
    assert packets == [b"x" * 100] * 3
    assert [(event.peer[1], event.max_packet_size) for event in cut] == [(sender, 100)] * 2


@differs
def test_a_datagram_from_an_unbound_unix_socket_is_handled(module: Any, tmp_path: Path) -> None:
    """There is nobody to reply to, and that is no error."""
    errors: list[BaseException | None] = []
    packets: list[bytes] = []

    class Server(module.UnixDatagramServer):  # type: ignore[misc]  # one of two classes
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(sys.exc_info()[1])

    class Handler(module.DatagramRequestHandler):  # type: ignore[misc]  # one of two classes
        def handle(self) -> None:
            packets.append(self.packet)
            self.wfile.write(b"nobody reads this")

    with Server(str(tmp_path / "socket"), Handler) as server:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", server.server_address)
        server.handle_request()
    assert packets == [b"hello"]
    assert errors == []


# --- connections that do not end by themselves ------------------------------------------


@differs
def test_closing_with_a_drain_timeout_is_bounded(module: Any) -> None:
    """An idle client keeps its handler, and whoever waits for that."""

    class Server(module.ThreadingTCPServer):  # type: ignore[misc]  # one of two classes
        drain_timeout = 0.05

    class Waiting(module.BaseRequestHandler):  # type: ignore[misc]  # one of two classes
        def handle(self) -> None:
            self.request.sendall(b"x")
            self.request.recv(1)

    server = Server(("127.0.0.1", 0), Waiting)
    serving_thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    serving_thread.start()
    with socket.create_connection(server.server_address, BOUND) as client:
        assert client.recv(1) == b"x"
        server.shutdown()
        closing = threading.Thread(target=server.server_close, daemon=True)
        closing.start()
        closing.join(bound(module))
        is_closed = not closing.is_alive()
    closing.join(BOUND)
    assert is_closed
    assert server.drain_report.connections == 1


@differs
def test_a_failed_handshake_is_told_and_stops_nobody(
    module: Any, authority: Authority, capfd: pytest.CaptureFixture[str]
) -> None:
    """While one client is silent, another that does not speak TLS is closed."""
    issued = authority.issue("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    failed: list[Any] = []
    unsubscribe = portico.events.subscribe(failed.append, portico.events.PreambleFailed)
    server = module.ThreadingTCPServer(("127.0.0.1", 0), module.BaseRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    try:
        with (
            serving(server),
            socket.create_connection(server.server_address) as silent,
            socket.create_connection(server.server_address) as client,
        ):
            client.settimeout(bound(module))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            try:
                while client.recv(100):
                    pass
                is_closed = True
            except ConnectionResetError:
                is_closed = True
            except TimeoutError:
                is_closed = False
            silent.close()
    finally:
        unsubscribe()
    assert is_closed
    assert [event.stage for event in failed] == ["TLS handshake", "TLS handshake"]
    assert capfd.readouterr().err == ""


# --- TLS --------------------------------------------------------------------------------


def wrapped(module: Any, handler: Any, authority: Authority) -> Any:
    """Make a server whose listener speaks TLS, as programs do."""
    pair = authority.issue()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server = module.ThreadingTCPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


def greet(request: Any, client_address: object, server: object) -> None:
    request.sendall(b"hello\n")
    request.recv(1)


def greeted(server: Any, authority: Authority, seconds: float) -> float:
    """Return the seconds from the begin of the handshake to the server's greeting."""
    context = authority.client()
    plain = socket.create_connection(server.server_address, seconds)
    began = time.perf_counter()
    with plain, context.wrap_socket(plain, server_hostname="localhost") as client:
        assert client.recv(64) == b"hello\n"
        return time.perf_counter() - began


@differs
def test_a_silent_tls_client_stops_nobody_else(module: Any, authority: Authority) -> None:
    """It costs its worker some time, and nobody anything else."""
    server = wrapped(module, greet, authority)
    thread = threading.Thread(target=serve, args=(server, {}), daemon=True)
    thread.start()
    try:
        with socket.create_connection(server.server_address):
            greeted(server, authority, bound(module))
    finally:  # the silent client has gone
        server.shutdown()
        server.server_close()
        thread.join(BOUND)


@differs
def test_the_first_reply_over_tls_leaves_at_once(module: Any, authority: Authority) -> None:
    """Linux delays an acknowledgement by 40 ms at least; a busy machine may delay most replies."""
    server = wrapped(module, greet, authority)
    thread = threading.Thread(target=serve, args=(server, {}), daemon=True)
    thread.start()
    try:
        times = [greeted(server, authority, BOUND) for _ in range(20)]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(BOUND)
    assert min(times) < 0.030


@differs
def test_a_client_that_does_not_speak_tls_is_told(module: Any, authority: Authority) -> None:
    failed: list[Any] = []
    server = wrapped(module, greet, authority)
    unsubscribe = portico.events.subscribe(failed.append, portico.events.PreambleFailed)
    thread = threading.Thread(target=serve, args=(server, {}), daemon=True)
    thread.start()
    try:
        with socket.create_connection(server.server_address, BOUND) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(ConnectionError):
                while client.recv(4096):
                    pass
    finally:
        server.shutdown()
        server.server_close()  # which waits for the worker, and so for what it tells
        thread.join(BOUND)
        unsubscribe()
    assert [event.stage for event in failed] == ["TLS handshake"]


# --- child processes --------------------------------------------------------------------

FOREIGN_CHILD = """
import importlib, os, socket, sys
module = importlib.import_module(sys.argv[1])
foreign = os.fork()
if foreign == 0:
    os._exit(7)
os.waitid(os.P_PID, foreign, os.WEXITED | os.WNOWAIT)

class Server(module.ForkingTCPServer):
    max_children = 1

class Once(module.BaseRequestHandler):
    def handle(self):
        self.request.recv(1)

server = Server(("127.0.0.1", 0), Once)
for turn in range(3):
    with socket.create_connection(server.server_address) as client:
        client.sendall(b"x")
        server.handle_request()
        server.service_actions()
print(os.waitpid(foreign, 0)[1] >> 8)
server.server_close()
"""


@differs
def test_children_of_the_program_are_left_alone(module: Any) -> None:
    """The program can still ask how its own child ended."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FOREIGN_CHILD, module.__name__],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.stdout == "7\n", done.stderr


FULL = """
import importlib, os, signal, socket, sys, threading
module = importlib.import_module(sys.argv[1])

class Server(module.ForkingTCPServer):
    max_children = 1
    block_on_close = False

class Long(module.BaseRequestHandler):
    def handle(self):
        self.request.recv(1)

server = Server(("127.0.0.1", 0), Long)
client = socket.create_connection(server.server_address)
thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
thread.start()
while not server.active_children:
    threading.Event().wait(0.01)
threading.Event().wait(0.2)  # the loop comes round, and looks for ended children
shutdown = threading.Thread(target=server.shutdown, daemon=True)
shutdown.start()
shutdown.join(float(sys.argv[2]))
print("blocked" if shutdown.is_alive() else "shut down")
sys.stdout.flush()
for child in server.active_children:
    os.kill(child, signal.SIGKILL)
os._exit(0)
"""


@differs
def test_a_full_forking_server_can_be_shut_down(module: Any) -> None:
    """At `max_children` the acceptor rests; it does not block."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, module.__name__, str(bound(module))],
        capture_output=True,
        text=True,
        timeout=BOUND * 2,
        check=False,
    )
    assert done.stdout == "shut down\n", done.stderr
