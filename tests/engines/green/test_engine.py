from __future__ import annotations

import contextvars
import http.client
import http.server
import io
import os
import signal
import socket
import socketserver
import sys
import threading
import wsgiref.simple_server
import xmlrpc.client
import xmlrpc.server
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import portico
from portico.engines.green import GreenMixIn
from portico.engines.green.crew import Outcome
from portico.engines.green.outbox import GreenWriter
from portico.engines.green.sockets import GreenSocket
from tests.support import PATIENCE, Call, eventually, received, running_program


class GreenTCP(GreenMixIn, portico.TCPServer):
    allow_reuse_address = True


class GreenUDP(GreenMixIn, portico.UDPServer):
    pass


class GreenUnix(GreenMixIn, portico.UnixStreamServer):
    pass


class GreenUnixDatagram(GreenMixIn, portico.UnixDatagramServer):
    pass


class StandardTCP(GreenMixIn, socketserver.TCPServer):
    """In front of the standard library's server."""

    allow_reuse_address = True
    request_queue_size = 128


class StandardUDP(GreenMixIn, socketserver.UDPServer):
    pass


INTERRUPTED = """import os, signal, sys
            import portico
            from portico.engines.green import GreenMixIn
            class Server(GreenMixIn, portico.TCPServer): pass
            class Handler(portico.BaseRequestHandler):
                def handle(self):
                    self.request.send(b"!")
                    self.request.recv(1)
"""
"""The beginning of programs that Ctrl-C ends."""


class Echo(portico.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class LineEcho(portico.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class DatagramEcho(portico.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.packet.upper())


@pytest.fixture(autouse=True, params=["epoll", "portable"])
def poller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole engine, on each poller."""
    monkeypatch.setenv("PORTICO_POLLER", "" if request.param == "epoll" else request.param)


@pytest.fixture(params=[GreenTCP, StandardTCP])
def tcp(request: pytest.FixtureRequest) -> Any:
    """The engine in front of our server, and of the standard library's."""
    return request.param


@contextmanager
def serving(kind: Any, handler: Any, address: Any = ("127.0.0.1", 0)) -> Iterator[Any]:
    """Serve in a thread until the block ends."""
    with kind(address, handler) as server:
        loop = Call(server.serve_forever)
        try:
            yield server
        finally:
            server.shutdown()
            failure = loop.failure()
            assert failure is None, failure
    # The watchdog may have begun to start one more, which ends at once.
    eventually(lambda: not server._get_green().crews.live(), "its hubs have ended")


@contextmanager
def connected(server: Any) -> Iterator[socket.socket]:
    with socket.create_connection(server.server_address, PATIENCE) as client:
        yield client


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    answer = b""
    while len(answer) < len(data):
        part = client.recv(65536)
        assert part, "the connection ended"
        answer += part
    return answer


class TestServing:
    @pytest.mark.parametrize("handler", [Echo, LineEcho])
    def test_many_connections_share_one_thread(self, tcp: Any, handler: Any) -> None:
        before = threading.active_count()
        with serving(tcp, handler) as server:
            clients = [socket.create_connection(server.server_address) for _ in range(50)]
            for _ in range(3):
                for client in clients:
                    assert ask(client, b"HELLO\n") == b"HELLO\n"
            # The thread of the test's call, the hub, the watchdog.
            assert threading.active_count() <= before + 3
            for client in clients:
                client.close()

    def test_a_silent_client_holds_nobody(self, tcp: Any) -> None:
        with (
            serving(tcp, LineEcho) as server,
            connected(server) as silent,
            connected(server) as other,
        ):
            silent.sendall(b"half a li")
            assert ask(other, b"LINE\n") == b"LINE\n"
            assert ask(silent, b"NE\n")[:3] == b"HAL"

    @pytest.mark.parametrize("kind", [GreenUDP, StandardUDP])
    def test_datagrams(self, kind: Any) -> None:
        with serving(kind, DatagramEcho) as server:
            client = socket.socket(type=socket.SOCK_DGRAM)
            client.settimeout(PATIENCE)
            with client:
                client.connect(server.server_address)
                for number in range(100):
                    client.send(b"a%d" % number)
                answers = {client.recv(100) for _ in range(100)}
        assert answers == {b"A%d" % number for number in range(100)}

    def test_a_handler_of_datagrams_has_a_green_socket_that_is_the_listener(self) -> None:
        seen: list[Any] = []

        def handler(request: Any, client_address: Any, server: Any) -> None:
            data, sock = request
            seen.extend([data, isinstance(sock, GreenSocket), sock.fileno() == server.fileno()])
            sock.sendto(b"done", client_address)

        with serving(GreenUDP, handler) as server:
            with socket.socket(type=socket.SOCK_DGRAM) as client:
                client.settimeout(PATIENCE)
                client.sendto(b"x", server.server_address)
                assert client.recv(10) == b"done"
            fd = server.fileno()
            server.shutdown()
            os.fstat(fd)  # the listener is open still: the green one let go of it
        assert seen == [b"x", True, True]

    def test_unix_sockets(self, tmp_path: Any) -> None:
        with serving(GreenUnix, LineEcho, str(tmp_path / "stream")) as server:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(server.server_address)
                assert ask(client, b"UNIX\n") == b"UNIX\n"
        with serving(GreenUnixDatagram, DatagramEcho, str(tmp_path / "datagram")) as server:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
                client.settimeout(PATIENCE)
                client.bind(str(tmp_path / "client"))
                client.sendto(b"unix", server.server_address)
                assert client.recv(10) == b"UNIX"

    def test_the_hooks_run_in_their_order(self, tcp: Any) -> None:
        order: list[str] = []

        def noted(name: str) -> Callable[..., Any]:
            def hook(self: Any, *args: Any) -> Any:
                order.append(name)
                return getattr(super(kind, self), name)(*args)

            return hook

        hooks = (
            "get_request", "verify_request", "process_request", "finish_request",
            "shutdown_request", "close_request",
        )  # fmt: skip
        kind: Any = type("Noted", (tcp,), {name: noted(name) for name in hooks})
        with serving(kind, Echo) as server, connected(server) as client:
            assert ask(client, b"x") == b"x"
            assert order[:4] == list(hooks[:4])
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        order = [name for index, name in enumerate(order) if name not in order[:index]]
        assert order == list(hooks)

    def test_a_program_may_accept_by_itself(self, tcp: Any) -> None:
        """What it returns is a plain socket; the handler gets a green one."""
        kinds: list[Any] = []

        class Own(tcp):  # type: ignore[misc]  # a class of each module
            def get_request(self) -> Any:
                return self.socket.accept()

        class Look(Echo):
            def setup(self) -> None:
                kinds.append(type(self.request))

        with serving(Own, Look) as server, connected(server) as client:
            assert ask(client, b"x") == b"x"
        assert kinds == [GreenSocket]

    def test_a_refused_request_is_closed_and_the_next_one_served(self, tcp: Any) -> None:
        class Choosy(tcp):  # type: ignore[misc]  # a class of each module
            refused = 0

            def verify_request(self, request: Any, client_address: Any) -> bool:
                self.refused += 1
                return self.refused > 3

        with serving(Choosy, Echo) as server:
            for _ in range(3):
                with connected(server) as client:
                    assert client.recv(1) == b""
            with connected(server) as client:
                assert ask(client, b"x") == b"x"

    def test_the_loop_comes_back_when_the_step_takes_nothing(self) -> None:
        """A program throttles: its step returns without accepting."""

        class Throttled(GreenTCP):
            steps = 0

            def _handle_request_noblock(self) -> None:
                self.steps += 1
                if self.steps > 20:
                    super()._handle_request_noblock()

        with serving(Throttled, Echo) as server, connected(server) as client:
            assert ask(client, b"x") == b"x"
            assert server.steps < 100

    def test_service_actions_run_at_least_every_poll_interval(self, tcp: Any) -> None:
        actions = threading.Semaphore(0)

        class Active(tcp):  # type: ignore[misc]  # a class of each module
            def service_actions(self) -> None:
                actions.release()

        with Active(("127.0.0.1", 0), Echo) as server:
            loop = Call(server.serve_forever, 0.01)
            for _ in range(5):
                assert actions.acquire(timeout=PATIENCE)
            server.shutdown()
            loop.result()

    def test_it_serves_again_after_a_shutdown(self, tcp: Any) -> None:
        with tcp(("127.0.0.1", 0), Echo) as server:
            for _ in range(3):
                loop = Call(server.serve_forever)
                with connected(server) as client:
                    assert ask(client, b"x") == b"x"
                server.shutdown()
                assert loop.failure() is None

    def test_a_handler_may_shut_the_server_down(self, tcp: Any) -> None:
        class Last(Echo):
            def handle(self) -> None:
                self.server.shutdown()
                self.request.sendall(b"bye")

        with tcp(("127.0.0.1", 0), Last) as server:
            loop = Call(server.serve_forever)
            with connected(server) as client:
                assert client.recv(3) == b"bye"
            assert loop.failure() is None

    def test_what_service_actions_raises_leaves_serve_forever(self, tcp: Any) -> None:
        class Failing(tcp):  # type: ignore[misc]  # a class of each module
            def service_actions(self) -> None:
                raise ZeroDivisionError

        with Failing(("127.0.0.1", 0), Echo) as server:
            loop = Call(server.serve_forever, 0.01)
            assert isinstance(loop.failure(), ZeroDivisionError)

    def test_requests_that_came_before_serving_are_served(self, tcp: Any) -> None:
        with tcp(("127.0.0.1", 0), Echo) as server:
            with connected(server) as client:
                client.sendall(b"early")
                loop = Call(server.serve_forever)
                assert client.recv(5) == b"early"
            server.shutdown()
            loop.result()

    def test_handle_request_hands_one_request_over(self, tcp: Any) -> None:
        """As with threads: it returns, and the handler goes on."""
        with tcp(("127.0.0.1", 0), Echo) as server:
            with connected(server) as silent, connected(server) as client:
                server.handle_request()
                server.handle_request()
                assert ask(client, b"x") == b"x"
                assert ask(silent, b"y") == b"y"

    def test_closing_waits_for_the_handlers(self, tcp: Any) -> None:
        finished = threading.Event()

        class Slow(Echo):
            def finish(self) -> None:
                finished.set()

        with tcp(("127.0.0.1", 0), Slow) as server:
            loop = Call(server.serve_forever)
            client = socket.create_connection(server.server_address)
            assert ask(client, b"x") == b"x"
            server.shutdown()
            assert loop.failure() is None
            closing = Call(server.server_close)
            assert ask(client, b"still there") == b"still there"
            assert closing.is_running()
            client.close()
            closing.result()
        assert finished.is_set()

    def test_closing_does_not_wait_if_told_not_to(self, tcp: Any) -> None:
        class Hasty(tcp):  # type: ignore[misc]  # a class of each module
            block_on_close = False

        server = Hasty(("127.0.0.1", 0), Echo)
        loop = Call(server.serve_forever)
        with socket.create_connection(server.server_address) as client:
            assert ask(client, b"x") == b"x"
            server.shutdown()
            assert loop.failure() is None
            server.server_close()
            assert ask(client, b"still there") == b"still there"
        server._get_green().crews.join()

    def test_a_closed_listener_ends_the_loop(self) -> None:
        server = GreenTCP(("127.0.0.1", 0), Echo)
        loop = Call(server.serve_forever)
        with connected(server) as client:
            assert ask(client, b"x") == b"x"
        server.server_close()
        assert loop.failure() is None

    def test_a_server_over_a_pipe(self) -> None:
        """`fileno` decides what is watched, `get_request` what a request is."""
        reader, writer = os.pipe()
        received: list[bytes] = []
        done = threading.Event()

        class Pipe(GreenMixIn, portico.BaseServer):
            def fileno(self) -> int:
                return reader

            def get_request(self) -> Any:
                return os.read(reader, 1), None

        def handler(request: bytes, client_address: None, server: Any) -> None:
            received.append(request)
            if len(received) == 3:
                done.set()

        server = Pipe(None, handler)
        server.socket = None  # type: ignore[assignment]  # it has none
        loop = Call(server.serve_forever)
        os.write(writer, b"abc")
        assert done.wait(PATIENCE)
        server.shutdown()
        assert loop.failure() is None
        server.server_close()
        assert received == [b"a", b"b", b"c"]
        os.close(reader)
        os.close(writer)


class TestFailures:
    def test_an_exception_goes_to_handle_error_and_the_request_is_closed(self, tcp: Any) -> None:
        errors: list[Any] = []

        class Noting(tcp):  # type: ignore[misc]  # a class of each module
            def handle_error(self, request: Any, client_address: Any) -> None:
                errors.append(sys.exc_info()[1])

        class Failing(Echo):
            def handle(self) -> None:
                raise ZeroDivisionError

        with serving(Noting, Failing) as server:
            for _ in range(3):
                with connected(server) as client:
                    assert client.recv(1) == b""
        assert [type(error) for error in errors] == [ZeroDivisionError] * 3

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, ZeroDivisionError])
    def test_what_escapes_goes_to_the_hook_of_threads(
        self, tcp: Any, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As with a thread each; the others are served on."""
        escaped: list[Any] = []
        monkeypatch.setattr(threading, "excepthook", lambda args: escaped.append(args.exc_type))

        class Escaping(tcp):  # type: ignore[misc]  # a class of each module
            def handle_error(self, request: Any, client_address: Any) -> None:
                error = sys.exc_info()[1]
                assert error is not None
                raise error

        class Failing(Echo):
            def handle(self) -> None:
                raise kind

        with serving(Escaping, Failing) as server:
            for _ in range(2):
                with connected(server) as client:
                    assert client.recv(1) == b""
            eventually(lambda: len(escaped) == 2)
        assert escaped == [kind, kind]

    def test_a_hook_of_threads_that_raises_ends_nobody(
        self, tcp: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: object) -> None:
            raise RuntimeError

        class Leaving(portico.BaseRequestHandler):
            def handle(self) -> None:
                if self.request.recv(1) == b"x":
                    raise SystemExit
                self.request.sendall(b"served")

        monkeypatch.setattr(threading, "excepthook", fail)
        with serving(tcp, Leaving) as server:
            for said, answer in ((b"x", b""), (b"y", b"served"), (b"x", b""), (b"y", b"served")):
                with connected(server) as client:
                    client.sendall(said)
                    assert client.recv(100) == answer

    def test_an_interrupt_after_the_loop_has_ended_leaves_the_next_one_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wait = Outcome.wait

        def wait_and_raise(outcome: Outcome, poll_interval: float) -> None:
            wait(outcome, poll_interval)
            raise KeyboardInterrupt

        with GreenTCP(("127.0.0.1", 0), Echo) as server:
            with monkeypatch.context() as patched:
                patched.setattr(Outcome, "wait", wait_and_raise)
                loop = Call(server.serve_forever)
                with connected(server) as client:
                    assert ask(client, b"one") == b"one"
                server.shutdown()
                assert isinstance(loop.failure(), KeyboardInterrupt)
            again = Call(server.serve_forever)
            with connected(server) as client:
                assert ask(client, b"two") == b"two"
            server.shutdown()
            again.result()

    @pytest.mark.usefixtures("unmeasured")
    def test_an_interrupt_of_the_main_thread_leaves_serve_forever(self) -> None:
        program = f"""if True:
            {INTERRUPTED}
            with Server(("127.0.0.1", 0), Handler) as server:
                try:
                    print(server.server_address[1], flush=True)
                    server.serve_forever()
                except KeyboardInterrupt:
                    print("interrupted", flush=True)
        """
        with running_program(program) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                assert client.recv(1) == b"!"  # it serves: nothing is being imported any more
                process.send_signal(signal.SIGINT)
                assert process.stdout.readline() == "interrupted\n"
            assert process.wait(PATIENCE) == 0

    @pytest.mark.usefixtures("unmeasured")
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_an_interrupt_at_the_start_of_a_hub_leaves_no_hub_behind(self, moment: str) -> None:
        program = f"""if True:
            {INTERRUPTED}
            from portico.engines.green.crew import Crew
            start = Crew.start
            def interrupted_start(crew):
                if {moment == "before"}:
                    os.kill(os.getpid(), signal.SIGINT)
                start(crew)
                if {moment == "after"}:
                    os.kill(os.getpid(), signal.SIGINT)
            Crew.start = interrupted_start
            try:
                with Server(("127.0.0.1", 0), Handler) as server:
                    server.serve_forever()
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        """
        with running_program(program) as process:
            output, errors = process.communicate(timeout=PATIENCE)
            assert (output, errors, process.returncode) == ("interrupted\n", "", 0)

    def test_a_forked_child_of_a_handler_ends_with_it(self, tcp: Any) -> None:
        class Forking(Echo):
            def handle(self) -> None:
                child = os.fork()
                if child:
                    os.waitpid(child, 0)
                    self.request.sendall(b"parent")
                else:
                    self.request.sendall(b"child ")

        with serving(tcp, Forking) as server, connected(server) as client:
            answer = b""
            while part := client.recv(100):
                answer += part
            # In the child the request is shut down like any other, so the parent may be cut off.
            assert answer.startswith(b"child ")

    @pytest.mark.parametrize("way", ["wfile", "request"])
    def test_what_was_written_before_a_fork_is_sent_once_and_first(
        self, tcp: Any, way: str
    ) -> None:
        """A child that inherited what was collected would send it again, or lose its own."""

        class Forking(portico.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"ready ")
                child = os.fork()
                if not child:
                    try:
                        write = self.wfile.write if way == "wfile" else self.request.sendall
                        write(b"child ")
                    finally:
                        os._exit(0)
                os.waitpid(child, 0)
                self.wfile.write(b"bye")

        with serving(tcp, Forking) as server, connected(server) as client:
            assert received(client) == b"ready child bye"


class TestRequests:
    def test_context_variables_are_of_one_request(self, tcp: Any) -> None:
        """A greenlet serves many; none sees what one before it set."""
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

        class Setting(Echo):
            def handle(self) -> None:
                self.request.sendall(variable.get().encode())
                variable.set("set")

        with serving(tcp, Setting) as server:
            for _ in range(3):
                with connected(server) as client:
                    assert client.recv(100) == b"unset"

    def test_greenlets_are_used_again(self, tcp: Any) -> None:
        workers: set[int] = set()

        class Noting(Echo):
            def handle(self) -> None:
                from greenlet import getcurrent

                workers.add(id(getcurrent()))
                super().handle()

        with serving(tcp, Noting) as server:
            for _ in range(20):
                with connected(server) as client:
                    assert ask(client, b"x") == b"x"
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(1) == b""
        assert len(workers) < 5

    @pytest.mark.parametrize("together", [True, False])
    def test_small_writes_leave_together_unless_switched_off(self, together: bool) -> None:
        kinds: list[Any] = []

        class Server(GreenTCP):
            coalesce_writes = together

        class Noting(LineEcho):
            def setup(self) -> None:
                super().setup()
                kinds.append(isinstance(self.wfile, GreenWriter))

        with serving(Server, Noting) as server, connected(server) as client:
            assert ask(client, b"A\nB\nC\n") == b"A\nB\nC\n"
        assert kinds == [together]

    def test_a_busy_connection_does_not_keep_another_from_being_served(self) -> None:
        with serving(GreenTCP, Echo) as server, connected(server) as busy:
            over = threading.Event()

            def flood() -> None:
                while not over.is_set():
                    busy.sendall(b"x" * 65536)

            def swallow() -> None:
                while not over.is_set() and busy.recv(1 << 20):
                    pass

            calls = [Call(flood), Call(swallow)]
            for _ in range(20):
                with connected(server) as client:
                    assert ask(client, b"hello") == b"hello"
            over.set()
            busy.shutdown(socket.SHUT_RDWR)
            for call in calls:
                call.failure()


class TestForeignServers:
    """Servers that the standard library built on its own `socketserver`."""

    def test_http_server(self) -> None:
        class Web(GreenMixIn, http.server.HTTPServer):
            pass

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.path.encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        with serving(Web, Handler) as server:
            port = server.server_port
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            for number in range(5):
                connection.request("GET", f"/{number}")
                assert connection.getresponse().read() == b"/%d" % number
            connection.close()

    def test_xmlrpc(self) -> None:
        class Rpc(GreenMixIn, xmlrpc.server.SimpleXMLRPCServer):
            pass

        class Handler(xmlrpc.server.SimpleXMLRPCRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

        with serving(Rpc, Handler) as server:
            server.register_function(pow)
            host, port = server.server_address
            with xmlrpc.client.ServerProxy(f"http://{host}:{port}") as proxy:
                assert proxy.pow(2, 10) == 1024

    def test_wsgi(self) -> None:
        class Wsgi(GreenMixIn, wsgiref.simple_server.WSGIServer):
            pass

        class Handler(wsgiref.simple_server.WSGIRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def get_stderr(self) -> Any:
                return io.StringIO()

        def application(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [environ["PATH_INFO"].encode()]

        with serving(Wsgi, Handler) as server:
            server.set_app(application)
            port = server.server_port
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("GET", "/wsgi")
            assert connection.getresponse().read() == b"/wsgi"
            connection.close()
