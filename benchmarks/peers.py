"""The servers that are measured beside each other, and how to start them."""

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TypeAlias

from benchmarks import toolchain
from benchmarks.toolchain import HERE, MissingProgram

Command: TypeAlias = Callable[[str], list[str]]
"""Given the Python to use, return the command line that starts a server.

Raises `MissingProgram` or `MissingModule` when that cannot be done here.
"""


class MissingModule(Exception):
    """A module, or a name in it, that a server needs cannot be imported."""


@dataclass(frozen=True, eq=False)
class Peer:
    """One kind of server.

    Attributes:
        name: What the command line calls it.
        title: What tables and plots call it.
        programs: How to start it in each role that it can play.
        environment: Variables that its processes get.
    """

    name: str
    title: str
    programs: Mapping[str, Command]
    environment: Mapping[str, str] = field(default_factory=dict)


@cache
def _expect_import(python: str, statement: str) -> None:
    done = subprocess.run(
        [python, "-c", statement], capture_output=True, text=True, cwd=HERE.parent, check=False
    )
    if done.returncode != 0:
        raise MissingModule(done.stderr.strip().splitlines()[-1])


def _python(
    script: str, *arguments: str, needs: str = "import sys", runner: tuple[str, ...] = ()
) -> Command:
    """Return the command for a Python program among our servers."""

    def command(python: str) -> list[str]:
        _expect_import(python, needs)
        return [python, *runner, str(HERE / "servers" / script), *arguments]

    return command


def sequential(server: str, role: str) -> Command:
    """Return the command for a server class that is named ``module:Class``."""
    module, _, name = server.partition(":")
    return _python("sequential.py", server, role, needs=f"from {module} import {name}")


def _socketserver(module: str, engine: str) -> dict[str, Command]:
    """Return the roles that a threading or green server of a module can play."""
    tcp, udp = f"{module}:{engine}TCPServer", f"{module}:{engine}UDPServer"
    return {
        "echo": sequential(tcp, "echo"),
        "lines": sequential(tcp, "lines"),
        "datagrams": sequential(udp, "datagrams"),
        "keyvalue": sequential(tcp, "keyvalue"),
    }


def _portico_run(engine: str, needs: str) -> Command:
    """Return the command for the web program, unmodified, on an engine of portico."""
    runner = ("-m", "portico", "run", "--engine", engine)
    return _python("web.py", needs=f"from portico import {needs}", runner=runner)


def _roles(program: Callable[[str], Command], *roles: str) -> dict[str, Command]:
    return {role: program(role) for role in roles}


def _c(role: str) -> Command:
    return lambda _: [toolchain.c_server("limit"), role]


def _go(role: str) -> Command:
    return lambda _: [toolchain.go_server("goroutines"), role]


def _redis(python: str) -> list[str]:
    toolchain.find_program("redis-server")
    return _python("redis_server.py")(python)


def _gevent(role: str) -> Command:
    return _python("greenlets.py", role, needs="import gevent")


def _streams(loop: str, role: str) -> Command:
    return _python("coroutines.py", loop, role, needs=f"import {loop}")


def _protocol(loop: str, role: str) -> Command:
    return _python("callbacks.py", loop, role, needs=f"import {loop}")


PEERS = (
    Peer("limit", "C, epoll", _roles(_c, "echo", "lines", "datagrams", "web")),
    Peer("redis", "Redis", {"keyvalue": _redis}),
    Peer(
        "goroutines",
        "Go, one core",
        _roles(_go, "echo", "lines", "datagrams", "web"),
        environment={"GOMAXPROCS": "1"},
    ),
    Peer(
        "portico-green",
        "portico, green",
        _socketserver("portico", "Green") | {"web": _portico_run("green", "GreenMixIn")},
    ),
    Peer(
        "portico-threads",
        "portico, threads",
        _socketserver("portico", "Threading") | {"web": _portico_run("threads", "ThreadingMixIn")},
    ),
    Peer(
        "standard",
        "standard library, threads",
        _socketserver("socketserver", "Threading") | {"web": _python("web.py")},
    ),
    Peer("gevent", "gevent", _roles(_gevent, "echo", "lines", "datagrams", "web")),
    Peer(
        "uvloop-protocol",
        "uvloop, Protocol",
        _roles(partial(_protocol, "uvloop"), "echo", "lines", "datagrams"),
    ),
    Peer("uvloop-streams", "uvloop, streams", _roles(partial(_streams, "uvloop"), "echo", "lines")),
    Peer(
        "asyncio-streams",
        "asyncio, streams",
        _roles(partial(_streams, "asyncio"), "echo", "lines")
        | {"datagrams": _protocol("asyncio", "datagrams")},
    ),
)

Missing = (MissingProgram, MissingModule)
"""What starting a peer raises when something that it needs is not installed."""
