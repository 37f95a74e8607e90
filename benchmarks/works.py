"""The works that servers are measured at."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from benchmarks import loads
from benchmarks.loads import Load
from benchmarks.machine import Cores
from benchmarks.process import Server


@dataclass(frozen=True)
class Scale:
    """How much load, and for how long.

    Attributes:
        cores: Where servers and loads run.
        seconds: How long a server is measured in each round, after a warm-up.
        connections: Connections that are busy at once.
        idle_connections: Connections that the idle work holds.
    """

    cores: Cores
    seconds: float = 1.0
    connections: int = 64
    idle_connections: int = 10_000


@dataclass(frozen=True)
class Result:
    """What one round of a work found on one server.

    Attributes:
        load: What the load saw.
        bytes_per_connection: What the server's memory grew by for an idle connection; only the
            idle work looks.
    """

    load: Load
    bytes_per_connection: float | None = None


Run: TypeAlias = Callable[[Server, Scale], Result]


@dataclass(frozen=True)
class Work:
    """Something that a server is asked to do again and again.

    Attributes:
        name: What the command line calls it.
        title: What tables and plots call it.
        role: What the server has to be; a peer has a program for each role it can play.
        unit: What is counted.
        run: Put the load on a server that has just started.
        reference: The peer whose processor time is 1.
    """

    name: str
    title: str
    role: str
    unit: str
    run: Run
    reference: str = "limit"


def _messages(size: int, line_size: int) -> Run:
    def run(server: Server, scale: Scale) -> Result:
        core, connections = scale.cores.load, scale.connections
        return Result(
            loads.send_messages(server, core, connections, size, line_size, scale.seconds)
        )

    return run


def _connections(server: Server, scale: Scale) -> Result:
    return Result(
        loads.open_connections(server, scale.cores.load, scale.connections, scale.seconds)
    )


def _datagrams(server: Server, scale: Scale) -> Result:
    core, sockets = scale.cores.load, scale.connections
    return Result(loads.send_datagrams(server, core, sockets, 64, scale.seconds))


def _idle(server: Server, scale: Scale) -> Result:
    before = server.memory()
    with loads.held_connections(server, scale.cores.load, scale.idle_connections):
        growth = max(0, server.memory() - before)
        busy = _messages(64, 64)(server, scale)
    return replace(busy, bytes_per_connection=growth / scale.idle_connections)


def _pages(server: Server, scale: Scale) -> Result:
    return Result(loads.request_pages(server, scale.cores.load, scale.connections, scale.seconds))


def _commands(pipelined: int) -> Run:
    def run(server: Server, scale: Scale) -> Result:
        core, connections = scale.cores.load, scale.connections
        return Result(loads.send_commands(server, core, connections, pipelined, scale.seconds))

    return run


WORKS = (
    Work("echo", "Echo of 64 bytes", "echo", "a message", _messages(64, 64)),
    Work("line", "Echo of a line", "lines", "a line", _messages(64, 64)),
    Work("pipelined", "Echo of 16 lines at once", "lines", "16 lines", _messages(16 * 64, 64)),
    Work("connect", "Connect, echo, close", "echo", "a connection", _connections),
    Work("datagram", "Echo of a datagram", "datagrams", "a datagram", _datagrams),
    Work("idle", "Echo among idle connections", "echo", "a message", _idle),
    Work("web", "A page of http.server", "web", "a request", _pages),
    Work("redis", "A command of Redis", "keyvalue", "a command", _commands(1), "redis"),
    Work(
        "redis-16", "16 commands of Redis at once", "keyvalue", "a command", _commands(16), "redis"
    ),
)
