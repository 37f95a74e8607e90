"""Who may come in: limits that are never exceeded, and nobody who is left hanging."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.served import CONCURRENT, Served, served
from tests.support import PATIENCE, eventually, goodbye

LIMIT = 100
"""Connections that the server lets in at once."""

CLIENTS = 5000

AT_ONCE = 500
"""Of these, as many as fit into the backlog beside those that are let in."""

HOLD = 0.05
"""Seconds for which a client that is in holds its place."""

GREETING = b"welcome\n"
FAREWELL = b"full\n"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/smaps_rollup").exists(), reason="elsewhere 127.0.0.2 is no address"
    ),
]


async def visit(address: tuple[str, int], source: str) -> str:
    """Come in, stay for a moment, have a line answered; return how that ended.

    The client says nothing before it is greeted, so that a farewell is never lost by a reset.
    """
    reader, writer = await asyncio.open_connection(*address, local_addr=(source, 0))
    try:
        first = await reader.readline()
        if first == FAREWELL:
            assert await reader.read() == b""
            return "farewell"
        if first != GREETING:
            assert first == b""
            return "ended"
        await asyncio.sleep(HOLD)
        writer.write(b"hello\n")
        writer.write_eof()
        answer = await reader.read()
        return {b"hello\n": "answered", b"": "ended"}[answer]
    except OSError:  # in whatever call it is noticed
        return "reset"
    finally:
        writer.close()


async def flood(address: tuple[str, int], clients: int) -> Counter[str]:
    """Have clients visit, many at once; return how their visits ended."""
    outcomes: Counter[str] = Counter()
    sources = cycle(f"127.0.0.{host}" for host in range(1, 100))
    left = iter(range(clients))

    async def visit_again() -> None:
        for _ in left:
            async with asyncio.timeout(PATIENCE):
                outcomes[await visit(address, next(sources))] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(visit_again())
    return outcomes


@pytest.mark.parametrize("when_full", ["wait", "refuse", "shed"])
@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_limit_is_never_exceeded_and_nobody_is_left_hanging(engine: str, when_full: str) -> None:
    """Every visit ends in a way that its client can see.

    Handlers are counted by themselves, places by the server.  The pool has a worker for each place:
    with fewer, those without one would wait in the queue, and hold a place there.
    """
    settings: dict[str, Any] = {"max_workers": LIMIT} if engine == "pool" else {}
    with served(
        engine,
        max_connections=LIMIT,
        when_full=when_full,
        farewell=FAREWELL.decode(),
        greeting=GREETING.decode(),
        request_queue_size=2 * AT_ONCE,
        **settings,
    ) as server:
        outcomes = asyncio.run(flood(server.address, CLIENTS))
        eventually(lambda: server.ask("census")["active"] == 0, "every place is given back")
        census = server.ask("census")
        print(f"{engine}, {when_full}: {dict(outcomes)}, {census}")
        assert census["handlers"] <= LIMIT
        assert census["places"] <= LIMIT
        assert outcomes.total() == CLIENTS
        assert outcomes["answered"] >= LIMIT
        refused = server.seen("ConnectionRefused")
        if when_full == "wait":
            assert outcomes == {"answered": CLIENTS}
            assert census["handlers"] > LIMIT / 2, "the limit is not put to the test"
        if when_full == "refuse":
            assert outcomes == {"answered": CLIENTS - len(refused), "farewell": len(refused)}
            assert refused
        else:
            assert refused == []
            assert outcomes["farewell"] == 0
        assert server.end() == ""


@pytest.mark.parametrize("when_full", ["wait", "refuse"])
def test_a_forked_child_holds_its_place_until_it_ends(when_full: str) -> None:
    """The parent closes the connection at once, and yet it is open."""
    limit = 5
    with (
        served(
            "forks",
            max_connections=limit,
            when_full=when_full,
            farewell=FAREWELL.decode(),
            greeting=GREETING.decode(),
        ) as server,
        visitors(server, ["127.0.0.1"] * limit) as inside,
        socket.create_connection(server.address, PATIENCE) as next_one,
    ):
        if when_full == "refuse":
            assert goodbye(next_one) == FAREWELL
        else:
            next_one.settimeout(0.3)
            with pytest.raises(TimeoutError):
                next_one.recv(64)
            next_one.settimeout(PATIENCE)
            inside[0].close()
            assert next_one.recv(64) == GREETING
        census = server.ask("census")
        assert census["handlers"] == limit


@contextmanager
def visitors(server: Served, sources: list[str]) -> Iterator[list[socket.socket]]:
    """Hold clients that have been greeted, from these addresses."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                socket.create_connection(server.address, PATIENCE, source_address=(source, 0))
            )
            for source in sources
        ]
        for client in clients:
            assert client.recv(64) == GREETING
        yield clients


def knock(server: Served, source: str) -> bytes:
    """Say what a client from an address hears first, before it says anything."""
    with socket.create_connection(server.address, PATIENCE, source_address=(source, 0)) as client:
        try:
            return client.recv(64)
        except ConnectionResetError:
            return b""


EVERY_ENGINE = (*CONCURRENT, "forks")


@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_one_peer_takes_no_more_than_its_share(engine: str) -> None:
    """Others come in all the same, and so does the peer once it has left."""
    with served(engine, max_connections_per_peer=3, greeting=GREETING.decode()) as server:
        with visitors(server, ["127.0.0.2"] * 3):
            assert knock(server, "127.0.0.2") == b""
            assert knock(server, "127.0.0.3") == GREETING
        eventually(lambda: knock(server, "127.0.0.2") == GREETING, "it may come again")
        (reason,) = {event["reason"] for event in server.seen("ConnectionRefused")}
        assert "peer" in reason


@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_a_burst_comes_in_and_the_rest_comes_too_fast(engine: str) -> None:
    """So slow a rate that the next one is let in after a day, however busy the machine is."""
    settings: dict[str, Any] = {"accept_rate": 1e-5, "accept_burst": 10}
    with served(engine, greeting=GREETING.decode(), **settings) as server:
        heard = [knock(server, f"127.0.0.{host}") for host in range(1, 21)]
        assert heard == [GREETING] * 10 + [b""] * 10
        # A refusal is told when the connection is closed.
        eventually(lambda: len(server.seen("ConnectionRefused")) == 10, "all are told")


@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_networks_are_let_in_or_kept_out(engine: str) -> None:
    """What is denied stays out, even if it is allowed."""
    settings: dict[str, Any] = {
        "allowed_networks": ["127.0.0.0/24", "127.1.0.0/16"],
        "denied_networks": ["127.0.0.128/25"],
    }
    with served(engine, greeting=GREETING.decode(), **settings) as server:
        for source, answer in (
            ("127.0.0.5", GREETING),
            ("127.0.0.200", b""),
            ("127.1.2.3", GREETING),
            ("127.2.0.1", b""),
        ):
            assert knock(server, source) == answer
        eventually(lambda: len(server.seen("ConnectionRefused")) == 2, "both are told")
