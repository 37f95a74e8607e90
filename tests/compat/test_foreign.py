"""Our engines serve in front of servers of the untouched standard library.

`http.server`, `xmlrpc.server` and `wsgiref` keep their own `socketserver`; only the mix-in is
ours, which therefore has to do with the hooks that every server has.
"""

from __future__ import annotations

import http.client
import http.server
import os
import pkgutil
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import wsgiref.simple_server
import wsgiref.validate
import xmlrpc.client
import xmlrpc.server
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest

import portico
from portico import engines
from tests.compat.peers import PATIENCE, ask, background, connect, read_all, serving, shout

LOCALHOST = ("127.0.0.1", 0)

ENGINES = {name: pkgutil.resolve_name(path) for name, path in engines.ENGINES.items() if path}
"""The mix-ins, which can stand in front of a foreign server, too."""


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    """One mix-in after the other."""
    return ENGINES[request.param]


def in_front(engine: type, server: type, **attributes: Any) -> Any:
    """Make a class of an engine and a server, as ``class Web(engine, server)`` does."""
    return type(f"{engine.__name__}{server.__name__}", (engine, server), attributes)


def url_of(server: Any, path: str = "/") -> str:
    host, port = server.server_address[:2]
    return f"http://{host}:{port}{path}"


def get(server: Any, path: str = "/") -> bytes:
    with urllib.request.urlopen(url_of(server, path), timeout=PATIENCE) as response:
        body: bytes = response.read()
        return body


def curl(*arguments: str) -> str:
    """Run curl; a machine without it cannot show what this module claims."""
    program = shutil.which("curl")
    assert program is not None, "install curl"
    command = [program, "--silent", "--show-error", "--max-time", str(PATIENCE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -------------------------------------------------------------------------------------- http.server


class Quiet:
    """Keeps a handler's access log off standard error."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


class Where(Quiet, http.server.BaseHTTPRequestHandler):
    """Answers who serves, and echoes what is posted."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(f"{os.getpid()} {threading.get_ident()}".encode())

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_servers_are_those_of_the_standard_library() -> None:
    """Otherwise nothing here would be foreign."""
    for server in (
        http.server.HTTPServer,
        xmlrpc.server.SimpleXMLRPCServer,
        wsgiref.simple_server.WSGIServer,
    ):
        assert issubclass(server, socketserver.TCPServer)
        assert not issubclass(server, portico.BaseServer)


def test_http_is_served_by_the_engine(engine: Any) -> None:
    server = in_front(engine, http.server.HTTPServer)(LOCALHOST, Where)
    with serving(server):
        pid, thread = map(int, get(server).split())
    if engine is portico.ForkingMixIn:
        assert pid != os.getpid()
    else:
        assert pid == os.getpid()
        assert thread != threading.get_ident()


def test_http_clients_are_served_beside_each_other(engine: Any) -> None:
    """One that keeps its connection open holds nobody up."""
    server = in_front(engine, http.server.HTTPServer, request_queue_size=100)(LOCALHOST, Where)
    with serving(server), connect(server) as idle:
        asking = [background(get, server) for _ in range(20)]
        assert all(future.result(PATIENCE) for future in asking)
        idle.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert read_all(idle).startswith(b"HTTP/1.1 200 OK\r\n")


def test_http_keeps_a_connection_alive(engine: Any) -> None:
    server = in_front(engine, http.server.HTTPServer)(LOCALHOST, Where)
    with serving(server):
        host, port = server.server_address
        client = http.client.HTTPConnection(host, port, timeout=PATIENCE)
        client.connect()
        sock = client.sock
        for number in range(5):
            body = b"%d" % number * 10_000
            client.request("POST", "/", body)
            assert client.getresponse().read() == body
            assert client.sock is sock
        # Not only closed: a forked server has a copy of this end, too.
        sock.shutdown(socket.SHUT_RDWR)
        client.close()


def test_http_serves_files_to_curl(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>page</p>")
    large = os.urandom(1 << 20)
    (tmp_path / "large").write_bytes(large)

    class Files(Quiet, http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

    server = in_front(engine, http.server.HTTPServer)(LOCALHOST, Files)
    with serving(server):
        assert curl(url_of(server, "/page.html")) == "<p>page</p>"
        assert "page.html" in curl(url_of(server))
        head = curl("--head", url_of(server, "/large"))
        assert f"Content-Length: {len(large)}" in head
        copy = tmp_path / "copy"
        curl("--output", str(copy), url_of(server, "/large"))
        assert copy.read_bytes() == large
        status = curl("--output", "/dev/null", "--write-out", "%{http_code}", url_of(server, "/no"))
        assert status == "404"


def test_http_takes_a_large_post_from_curl(engine: Any, tmp_path: Path) -> None:
    """curl waits for ``100 Continue`` before it sends so much."""
    (tmp_path / "body").write_bytes(b"x" * (2 << 20))
    server = in_front(engine, http.server.HTTPServer)(LOCALHOST, Where)
    with serving(server):
        answer = curl("--data-binary", f"@{tmp_path / 'body'}", url_of(server))
        assert answer == "x" * (2 << 20)


def test_an_error_of_an_http_handler_is_reported_by_the_server(engine: Any) -> None:
    class Failing(Quiet, http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            raise ValueError("of the handler")

    reader, writer = os.pipe()

    def handle_error(self: Any, request: Any, client_address: Any) -> None:
        os.write(writer, repr(sys.exc_info()[1]).encode())

    kind = in_front(engine, http.server.HTTPServer, handle_error=handle_error)
    with open(reader, "rb") as reports, open(writer, "wb"):  # noqa: PTH123
        server = kind(LOCALHOST, Failing)
        with serving(server), pytest.raises(http.client.RemoteDisconnected):
            get(server)
        assert reports.read1() == b"ValueError('of the handler')"


# ------------------------------------------------------------------------------------ xmlrpc.server


def test_xmlrpc_is_served(engine: Any) -> None:
    server = in_front(engine, xmlrpc.server.SimpleXMLRPCServer)(
        LOCALHOST, logRequests=False, allow_none=True
    )
    server.register_function(pow, "power")
    server.register_introspection_functions()
    server.register_multicall_functions()
    with serving(server), xmlrpc.client.ServerProxy(url_of(server), allow_none=True) as proxy:
        assert proxy.power(2, 10) == 1024
        assert "power" in proxy.system.listMethods()  # type: ignore[operator]
        calls: Any = xmlrpc.client.MultiCall(proxy)
        calls.power(2, 2)
        calls.power(3, 3)
        assert list(calls()) == [4, 27]
        with pytest.raises(xmlrpc.client.Fault, match="TypeError"):
            proxy.power("two")


def test_xmlrpc_is_documented(engine: Any) -> None:
    kind = in_front(engine, xmlrpc.server.DocXMLRPCServer)
    server = kind(LOCALHOST, logRequests=False)
    server.set_server_title("A server")
    server.register_function(pow)
    with serving(server):
        assert "A server" in get(server).decode()


# ------------------------------------------------------------------------------------------ wsgiref


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer with the path and the body."""
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode(), b" ", body]


class QuietWSGIHandler(Quiet, wsgiref.simple_server.WSGIRequestHandler):
    """wsgiref's handler."""


def test_wsgi_is_served(engine: Any) -> None:
    server = wsgiref.simple_server.make_server(
        *LOCALHOST,
        wsgiref.validate.validator(application),
        in_front(engine, wsgiref.simple_server.WSGIServer),
        QuietWSGIHandler,
    )
    with serving(server):
        assert get(server, "/there") == b"/there "
        assert curl("--data", "body", url_of(server, "/here")) == "/here body"


# ---------------------------------------------------------------------------------------- the hooks


def test_a_plain_server_of_the_standard_library_is_served(engine: Any) -> None:
    server = in_front(engine, socketserver.TCPServer)(LOCALHOST, shout)
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_datagrams_of_the_standard_library_are_served(engine: Any) -> None:
    class Upper(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read().upper())

    server = in_front(engine, socketserver.UDPServer)(LOCALHOST, Upper)
    with serving(server), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(b"hello", server.server_address)
        assert client.recv(100) == b"HELLO"


def test_unix_sockets_of_the_standard_library_are_served(engine: Any, tmp_path: Path) -> None:
    server = in_front(engine, socketserver.UnixStreamServer)(str(tmp_path / "socket"), shout)
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_the_hooks_of_a_foreign_server_are_called(engine: Any) -> None:
    calls = []

    class Server(engine, socketserver.TCPServer):  # type: ignore[misc]  # a value as a base
        def verify_request(self, request: Any, client_address: Any) -> bool:
            calls.append("verify_request")
            return super().verify_request(request, client_address)

        def process_request(self, request: Any, client_address: Any) -> None:
            calls.append("process_request")
            super().process_request(request, client_address)

        def service_actions(self) -> None:
            if "service_actions" not in calls:
                calls.append("service_actions")
            super().service_actions()

        def server_close(self) -> None:
            calls.append("server_close")
            super().server_close()

    server = Server(LOCALHOST, shout)
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"
    assert set(calls) == {"verify_request", "process_request", "service_actions", "server_close"}
    assert calls.index("verify_request") < calls.index("process_request")
    assert calls[-1] == "server_close"


def test_handle_request_of_a_foreign_server(engine: Any) -> None:
    with in_front(engine, socketserver.TCPServer)(LOCALHOST, shout) as server:
        asking = background(ask, server, b"hello")
        server.handle_request()
        assert asking.result(PATIENCE) == b"HELLO"


def test_a_foreign_server_waits_for_its_requests_when_it_closes(engine: Any) -> None:
    server = in_front(engine, socketserver.TCPServer)(LOCALHOST, shout)
    with serving(server), connect(server) as client:
        client.sendall(b"hello")
        # A second client was served: so was the first accepted.
        assert ask(server, b"second") == b"SECOND"
        server.shutdown()
        closing = background(server.server_close)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"HELLO"
        closing.result(PATIENCE)


def test_a_fork_beyond_the_limit_waits_for_a_child_to_end() -> None:
    """A foreign server cannot rest, so the acceptor waits."""
    kind = in_front(portico.ForkingMixIn, socketserver.TCPServer, max_children=2)
    server = kind(LOCALHOST, shout)
    server.socket.listen(20)
    with serving(server):
        asking = [background(ask, server, b"hello") for _ in range(10)]
        assert [future.result(PATIENCE) for future in asking] == [b"HELLO"] * 10
        assert len(server.active_children) <= 2
