"""One echo server, of every engine and family that claims what a scenario needs.

A scenario asks for `echo` and says with a marker what it needs, if it is not for all::

    @pytest.mark.needs("connections", "neighbours")
    def test_an_idle_client_holds_up_nobody(echo: RunningServer[TCPServer]) -> None: ...
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from portico import (
    BaseRequestHandler,
    DatagramRequestHandler,
    ForkingMixIn,
    GreenMixIn,
    StreamRequestHandler,
    TCPServer,
    ThreadingMixIn,
    ThreadPoolMixIn,
    UDPServer,
    UnixDatagramServer,
    UnixStreamServer,
)
from tests.support import RunningServer, nothing_left_behind


@dataclass(frozen=True)
class Engine:
    """An engine and what it claims.

    ``neighbours``: several requests are served at the same time.
    """

    mix_ins: tuple[type, ...]
    claims: frozenset[str]


@dataclass(frozen=True)
class Family:
    """A family and what it claims.

    ``connections``: a request is a connection; ``datagrams``: it is a datagram.
    """

    server: type[TCPServer]
    handler: type[BaseRequestHandler]
    claims: frozenset[str]


class LineEcho(StreamRequestHandler):
    """Send each line back; fail at ``fail``."""

    def handle(self) -> None:
        for line in self.rfile:
            if line == b"fail\n":
                raise ValueError("the client asked for it")
            self.wfile.write(line)


class DatagramEcho(DatagramRequestHandler):
    """Send the datagram back; fail at ``fail``."""

    def handle(self) -> None:
        if self.packet == b"fail\n":
            raise ValueError("the client asked for it")
        self.wfile.write(self.packet)

    def finish(self) -> None:
        """Do not send the empty reply that a handler that failed leaves behind."""
        if self.packet != b"fail\n":
            super().finish()


ENGINES = {
    "serial": Engine((), frozenset()),
    "threads": Engine((ThreadingMixIn,), frozenset({"neighbours"})),
    "forks": Engine((ForkingMixIn,), frozenset({"neighbours"})),
    "pool": Engine((ThreadPoolMixIn,), frozenset({"neighbours"})),
    "green": Engine((GreenMixIn,), frozenset({"neighbours"})),
}

FAMILIES = {
    "tcp": Family(TCPServer, LineEcho, frozenset({"connections"})),
    "udp": Family(UDPServer, DatagramEcho, frozenset({"datagrams"})),
    "unix-stream": Family(UnixStreamServer, LineEcho, frozenset({"connections"})),
    "unix-datagram": Family(UnixDatagramServer, DatagramEcho, frozenset({"datagrams"})),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*claims): what the engine or the family must claim")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a scenario once for each engine and family that claim all it needs."""
    if "echo" not in metafunc.fixturenames:
        return
    needed = {claim for mark in metafunc.definition.iter_markers("needs") for claim in mark.args}
    metafunc.parametrize(
        "echo",
        [
            pytest.param((engine, family), id=f"{engine_name}-{family_name}")
            for engine_name, engine in ENGINES.items()
            for family_name, family in FAMILIES.items()
            if needed <= engine.claims | family.claims
        ],
        indirect=True,
    )


@pytest.fixture
def echo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningServer[TCPServer]]:
    """Serve until the test ends, and check that nothing is left of it."""
    engine, family = request.param
    bases = (*engine.mix_ins, family.server)
    server_class: Any = type("EchoServer", bases, {})
    is_unix = family.server.address_family == socket.AF_UNIX
    address: Any = str(tmp_path / "echo") if is_unix else ("127.0.0.1", 0)
    with nothing_left_behind(), RunningServer(server_class(address, family.handler)) as running:
        yield running
