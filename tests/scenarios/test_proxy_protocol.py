"""Servers behind a proxy that says in the PROXY protocol for whom it speaks.

HAProxy itself is one of the clients.  It listens on a socket that the test has bound, so that no
two programs want the same port.  Clients come from other addresses of the loopback network than the
proxy; the standard library has nothing of the kind.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
    PreambleFailed,
    RefusalReason,
)
from tests.support import (
    PATIENCE,
    RunningServer,
    eventually,
    goodbye,
    nothing_left_behind,
    recorded,
)

if TYPE_CHECKING:
    from tests.tls import Authority

ENGINES: dict[str, tuple[type, ...]] = {
    "serial": (),
    "threads": (ThreadingMixIn,),
    "pool": (ThreadPoolMixIn,),
    "forks": (ForkingMixIn,),
    "green": (GreenMixIn,),
}

CONCURRENT = ("threads", "pool", "green")

PROXY = "127.0.0.1"
"""From where HAProxy connects, and the only one whose word is taken."""

CLIENT = "127.0.0.5"
"""From where clients connect."""

ROUNDS = 20
"""Rounds at most of what is measured: a busy machine delays anybody, and the best of them counts.
The first that is within the limit is enough."""


class Tell(StreamRequestHandler):
    """Answer a line with what is known of who sent it."""

    def handle(self) -> None:
        server: Any = self.server
        header = server.proxy_header(self.request)
        server.commands.append(header and str(header.command))
        line = self.rfile.readline()
        told = {
            "line": line.decode(),
            "client": self.client_address[0],
            "verified": server.verified[-1],
            "command": server.commands[-1],
            "version": header and header.version,
            "unique_id": header and header.unique_id and header.unique_id.decode(),
        }
        self.wfile.write(json.dumps(told).encode() + b"\n")


class Verifying(TCPServer):
    """Notes whom `verify_request` sees."""

    request_queue_size = 1024
    proxy_protocol: Any = (PROXY,)
    verified: ClassVar[list[str]]
    commands: ClassVar[list[str | None]]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.verified.append(client_address[0])
        return True


@contextmanager
def serving(engine: str, **settings: Any) -> Iterator[Any]:
    """Serve, and check that nothing is left of it."""
    settings |= {"verified": [], "commands": []}
    kind: Any = type("Server", (*ENGINES[engine], Verifying), settings)
    with nothing_left_behind(), RunningServer(kind((PROXY, 0), Tell)) as running:
        yield running.server


def connect(address: Any, source: str = CLIENT) -> socket.socket:
    client = socket.create_connection(address, PATIENCE, (source, 0))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def ask(client: socket.socket, *pieces: bytes) -> Any:
    """Send a line, in pieces, and return what the server knows; ends the connection."""
    with client:
        for piece in pieces:
            client.sendall(piece)
        answer = b""
        while not answer.endswith(b"\n"):
            data = client.recv(4096)
            assert data, "closed without an answer"
            answer += data
        with suppress(OSError):  # the server was faster
            client.shutdown(socket.SHUT_RDWR)  # of which a forked child may have a copy
    return json.loads(answer)


# --- HAProxy ----------------------------------------------------------------------------

CONFIGURATION = """
global
    maxconn 200
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout check 5s
    unique-id-format of-this-client
listen front
    bind fd@{descriptor}
    server back {host}:{port} {options}
"""


@contextmanager
def haproxy(server: TCPServer, folder: Path, options: str) -> Iterator[Any]:
    """Run HAProxy in front of a server; gives the address where it listens."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    assert program, "HAProxy is not installed: tools/debian-packages.txt"
    host, port = server.server_address
    with socket.create_server((PROXY, 0), backlog=256) as listener:
        configuration = folder / "haproxy.cfg"
        configuration.write_text(
            CONFIGURATION.format(
                descriptor=listener.fileno(), host=host, port=port, options=options
            )
        )
        with subprocess.Popen(
            [program, "-db", "-q", "-f", configuration],
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                yield listener.getsockname()
                assert process.poll() is None, "HAProxy has ended"
            finally:
                process.kill()


VERSIONS = {
    "1": "send-proxy",
    "2": "send-proxy-v2 proxy-v2-options unique-id,crc32c",
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_client_behind_haproxy_is_known(engine: str, version: str, tmp_path: Path) -> None:
    """To `verify_request` and to the handler, with what the proxy says beyond its address."""
    with serving(engine) as server, haproxy(server, tmp_path, VERSIONS[version]) as front:
        told = [ask(connect(front), b"hello\n") for _ in range(20)]
    assert told == [
        {
            "line": "hello\n",
            "client": CLIENT,
            "verified": CLIENT,
            "command": "proxy",
            "version": int(version),
            "unique_id": "of-this-client" if version == "2" else None,
        }
    ] * len(told)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_client_that_speaks_tls_through_haproxy_is_known(
    engine: str, version: str, tmp_path: Path, authority: Authority
) -> None:
    """The header comes before the handshake, in the clear."""
    from tests.tls import wrap

    pair, client = authority.issue(), authority.client()
    with (
        serving(engine, ssl_context=(pair.certificate, pair.key)) as server,
        haproxy(server, tmp_path, VERSIONS[version]) as front,
    ):
        for _ in range(20):
            told = ask(wrap(client, connect(front)), b"hello\n")
            assert (told["client"], told["verified"]) == (CLIENT, CLIENT)
            assert told["version"] == int(version)


@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_check_of_haproxy_s_own_is_served_for_itself(
    engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It says LOCAL, and nobody is behind it."""
    options = "send-proxy-v2 check check-send-proxy inter 50ms"
    with recorded(PreambleFailed) as failed, serving(engine) as server:
        with haproxy(server, tmp_path, options) as front:
            eventually(lambda: server.commands.count("local") >= 5, "it is checked")
            assert ask(connect(front), b"hello\n")["client"] == CLIENT
            # Here: HAProxy may be killed in the middle of a check.
            assert failed == []
        assert PROXY in server.verified
    assert capfd.readouterr().err == ""


# --- whose word is taken ----------------------------------------------------------------

LINE = f"PROXY TCP4 192.0.2.7 {PROXY} 5000 80\r\n".encode()


def binary(source: str = "192.0.2.7", tlvs: bytes = b"") -> bytes:
    """Make a header of version 2."""
    block = socket.inet_aton(source) + socket.inet_aton(PROXY) + b"\x13\x88\x00\x50" + tlvs
    return b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + len(block).to_bytes(2, "big") + block


def test_a_peer_that_is_no_proxy_speaks_for_itself() -> None:
    """What looks like a header is its own words."""
    with serving("threads") as server:
        told = ask(connect(server.server_address), LINE)
        assert (told["client"], told["line"]) == (CLIENT, LINE.decode())
        assert told["command"] is None


@pytest.mark.parametrize("header", [LINE, binary(tlvs=b"\x05\0\x02id")], ids=["line", "binary"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_header_in_any_pieces_takes_no_byte_of_the_handler_s(engine: str, header: bytes) -> None:
    whole = header + b"hello\n"
    cuts: list[Callable[[], list[bytes]]] = [
        lambda: [whole],
        lambda: [whole[n : n + 1] for n in range(len(whole))],
        lambda: [header[:-1], header[-1:] + b"hel", b"lo\n"],
        lambda: [header, b"hello\n"],
    ]
    with serving(engine) as server:
        for cut in cuts:
            told = ask(connect(server.server_address, PROXY), *cut())
            assert (told["client"], told["line"]) == ("192.0.2.7", "hello\n")
            assert told["verified"] == "192.0.2.7"


GARBAGE = (
    b"GET / HTTP/1.1\r\n\r\n",
    b"PROXY TCP4 nonsense\r\n",
    b"\r\n\r\n\0\r\nQUIT\n\xff",
    b"\0",
)


@pytest.mark.parametrize("engine", CONCURRENT)
def test_what_is_no_header_is_closed_and_counted(
    engine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also a header of which only a part comes."""
    words = [*GARBAGE, LINE[:-1], binary()[:-1], b""] * 20
    with recorded(PreambleFailed) as failed, serving(engine) as server:
        for word in words:
            with connect(server.server_address, PROXY) as client:
                client.sendall(word)
                with suppress(OSError):  # it is closed already
                    client.shutdown(socket.SHUT_WR)
                assert goodbye(client) == b""
        eventually(lambda: len(failed) == len(words), "all are counted")
        assert ask(connect(server.server_address, PROXY), LINE, b"hello\n")["line"] == "hello\n"
        assert server.verified == ["192.0.2.7"]
    assert {event.stage for event in failed} == {"PROXY header"}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("said", [b"", LINE[:20], binary()[:20]], ids=["", "line", "binary"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_proxy_that_falls_silent_is_closed(engine: str, said: bytes) -> None:
    """Whether it has said something or not; the others are served meanwhile."""
    limit, times = 0.4, list[float]()
    with recorded(DeadlineExpired) as expired, serving(engine, handshake_timeout=limit) as server:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            with connect(server.server_address, PROXY) as client:
                client.sendall(said)
                assert goodbye(client) == b""
            times.append(time.perf_counter() - began)
            if times[-1] < limit * 1.2:
                break
    assert limit * 0.95 <= min(times) < limit * 1.2
    if engine != "forks":  # whose children tell nobody here
        assert {event.deadline for event in expired} == {Deadline.HANDSHAKE}


@pytest.mark.parametrize("engine", CONCURRENT)
def test_silent_proxies_keep_nobody_from_being_served(engine: str) -> None:
    with serving(engine) as server, ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connect(server.server_address, PROXY))
        for _ in range(20):
            assert ask(connect(server.server_address, PROXY), LINE, b"hello\n")["verified"]


# --- who is judged ----------------------------------------------------------------------


@pytest.mark.parametrize("engine", CONCURRENT)
def test_the_networks_are_those_of_the_clients(engine: str, tmp_path: Path) -> None:
    """A proxy is let in wherever it is; whom it speaks for is judged."""
    with (
        recorded(ConnectionRefused) as refused,
        serving(engine, denied_networks=[PROXY, CLIENT]) as server,
        haproxy(server, tmp_path, "send-proxy") as front,
    ):
        assert ask(connect(front, "127.0.0.6"), b"hello\n")["client"] == "127.0.0.6"
        with connect(front) as client:
            assert goodbye(client) == b""
        eventually(lambda: refused, "it is told")
    assert [(event.reason, event.peer[0]) for event in refused] == [(RefusalReason.DENIED, CLIENT)]


@pytest.mark.parametrize("engine", CONCURRENT)
def test_the_connections_of_one_client_are_counted_not_those_of_the_proxy(
    engine: str, tmp_path: Path
) -> None:
    with (
        recorded(ConnectionRefused) as refused,
        serving(engine, max_connections_per_peer=2) as server,
        haproxy(server, tmp_path, "send-proxy-v2") as front,
        ExitStack() as stack,
    ):
        for source in ("127.0.0.6", "127.0.0.7", CLIENT):
            for _ in range(2):
                stack.enter_context(connect(front, source))
        eventually(lambda: len(server.verified) == 6, "all six are served")
        with connect(front) as third:
            assert goodbye(third) == b""
        eventually(lambda: refused, "it is told")
        assert ask(connect(front, "127.0.0.8"), b"hello\n")["client"] == "127.0.0.8"
    assert [event.peer[0] for event in refused] == [CLIENT]
    assert [event.reason for event in refused] == [RefusalReason.TOO_MANY_OF_PEER]
