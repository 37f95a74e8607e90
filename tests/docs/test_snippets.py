"""The programs that the documentation shows do what it says."""

import hashlib
import http.server
import io
import logging
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

import portico
from portico.sources import Sources
from tests.tls import Authority, Pair, shake_hands

from .conftest import SNIPPETS, WAIT, Run

Load = Callable[[str], ModuleType]


@contextmanager
def serving(server: Any) -> Iterator[Any]:
    """Serve in a thread while the block runs; portico's servers and others."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(WAIT)


def converse(server: Any, text: bytes = b"") -> bytes:
    """Send a text, end it, and return everything that comes back."""
    with socket.create_connection(server.server_address, timeout=WAIT) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


def test_echo(run: Run) -> None:
    with run("echo.py") as server:
        assert converse(server, b"one\ntwo\n") == b"one\ntwo\n"


def test_ask(run: Run) -> None:
    with run("echo.py") as server:
        host, port = server.server_address
        command = [sys.executable, str(SNIPPETS / "ask.py"), host, str(port), "hello"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT)
    assert answer.stdout == "hello\n"


def test_greet(load: Load) -> None:
    handler = load("greet.py").Greet
    with serving(portico.TCPServer(("127.0.0.1", 0), handler)) as server:
        assert converse(server, b"Ada\n") == b"Hello Ada!\n"


def test_greet_refuses_what_is_no_name(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """The tutorial shows that the error of one client is reported and stays with it."""
    handler = load("greet.py").Greet
    with serving(portico.TCPServer(("127.0.0.1", 0), handler)) as server:
        assert converse(server, b"42\n") == b""
        assert converse(server, b"Ada\n") == b"Hello Ada!\n"
    assert "ValueError: not a name: '42'" in capsys.readouterr().err


def test_combine(load: Load) -> None:
    snippet = load("combine.py")
    with serving(snippet.EchoServer(("127.0.0.1", 0), snippet.Echo)) as server:
        assert converse(server, b"hello\n") == b"hello\n"


@pytest.mark.parametrize(
    ("name", "module"),
    [("clock.py", socketserver), ("ported.py", portico)],
    ids=["before", "after"],
)
def test_clock_is_the_same_program_before_and_after_porting(
    run: Run, name: str, module: ModuleType
) -> None:
    with run(name, "0") as server:
        assert isinstance(server, module.BaseServer)
        time.strptime(converse(server).decode(), "%H:%M:%S\n")


def test_lookup(run: Run) -> None:
    key = hashlib.scrypt(b"hello", salt=b"", n=2**14, r=8, p=1).hex().encode()
    with run("lookup.py") as server:
        assert converse(server, b"hello\nhello\n") == key + b"\n" + key + b"\n"


def test_bounded(run: Run) -> None:
    with run("bounded.py") as server:
        assert isinstance(server, portico.ThreadPoolMixIn)
        assert converse(server, b"hello\n") == b"HELLO\n"


def test_protected(run: Run) -> None:
    with run("protected.py") as server:
        assert isinstance(server, portico.GreenMixIn)
        assert server.idle_timeout == 60
        assert server.max_connections is not None
        assert converse(server, b"hello\n") == b"hello\n"


def test_coroutine(run: Run) -> None:
    with run("coroutine.py") as server:
        assert converse(server, b"3\n") == b"3\n2\n1\n"


def test_count(load: Load) -> None:
    snippet = load("count.py")
    try:
        with serving(load("combine.py").EchoServer(("127.0.0.1", 0), load("combine.py").Echo)) as s:
            converse(s, b"hello\n")
    finally:
        snippet.stop_counting()
    assert snippet.ended == {"finished": 1}


def test_log(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    snippet = load("log.py")
    try:
        with serving(portico.TCPServer(("127.0.0.1", 0), portico.StreamRequestHandler)):
            pass
    finally:
        snippet.detach()
    lines = log.getvalue().splitlines()
    assert lines
    assert all(line.startswith("INFO TCPServer at") for line in lines)


@pytest.fixture
def files(authority: Authority, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificates and keys that the snippets name."""
    monkeypatch.chdir(tmp_path)
    authority.issue().write_over(Pair(tmp_path / "cert.pem", tmp_path / "key.pem"))
    for name, stem in (("example.org", "example.org"), ("*.example.org", "star.example.org")):
        into = Pair(tmp_path / f"{stem}.pem", tmp_path / f"{stem}.key")
        authority.issue(name).write_over(into)


@pytest.mark.usefixtures("files")
def test_tls(load: Load, authority: Authority) -> None:
    context = load("tls.py").tls_context
    assert shake_hands(context, authority.client(alpn=["http/1.1"])).protocol == "http/1.1"


@pytest.mark.usefixtures("files")
def test_names(load: Load, authority: Authority) -> None:
    certificates = load("names.py").certificates
    for name in ("localhost", "example.org", "mail.example.org"):  # the client checks the name
        shake_hands(certificates.refresh(), authority.client(), name)


def converse_over_tls(server: Any, authority: Authority, text: bytes) -> bytes:
    plain = socket.create_connection(server.server_address, timeout=WAIT)
    with authority.client().wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(text)
        return connection.recv(4096)


@pytest.mark.usefixtures("files")
def test_secure(run: Run, authority: Authority) -> None:
    with run("secure.py") as server:
        assert converse_over_tls(server, authority, b"hello\n") == b"HELLO\n"


@pytest.mark.usefixtures("files")
def test_wrapped(run: Run, authority: Authority) -> None:
    with run("wrapped.py") as server, socket.create_connection(server.server_address):
        answer = converse_over_tls(server, authority, b"HEAD / HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.0 200")


def test_behind(run: Run) -> None:
    with run("behind.py") as server:
        header = b"PROXY TCP4 192.0.2.7 127.0.0.1 5000 80\r\n"
        assert converse(server, header) == b"192.0.2.7 asked for None\n"


def test_one() -> None:
    """The other file of settings is served in `tests/scenarios/test_settings_file.py`."""
    (service,) = Sources(directory=SNIPPETS, config="one.toml").read().configuration.services
    assert (service.target, service.settings.idle_timeout) == ("echo.py:Echo", 60)


def test_web(run: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.txt").write_text("a page")
    monkeypatch.chdir(tmp_path)
    with run("web.py") as server:
        assert isinstance(server, portico.ThreadingMixIn)
        assert isinstance(server, http.server.HTTPServer)
        url = f"http://127.0.0.1:{server.server_port}/page.txt"
        with urllib.request.urlopen(url, timeout=WAIT) as answer:
            assert answer.read() == b"a page"
