"""Run greenlets in tests: on every poller, each test on a hub of its own."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from greenlet import greenlet

from portico.engines.green.hub import Hub
from portico.engines.green.poller import HAS_EPOLL, PortablePoller
from portico.engines.green.sockets import GreenSocket

T = TypeVar("T")


class Stage:
    """A hub, and greenlets on it that a test waits for."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.greenlets: list[greenlet] = []
        self._opened: list[socket.socket] = []

    def spawn(self, function: Callable[..., Any], *args: Any) -> greenlet:
        """Make a greenlet that begins when the hub runs, or in its next round."""
        spawned = greenlet(lambda: function(*args))

        def start() -> None:
            spawned.parent = self.hub.greenlet
            spawned.switch()

        self.hub.call_soon(start)
        self.greenlets.append(spawned)
        return spawned

    def run(self, *functions: Callable[[], Any]) -> list[Any]:
        """Run each function in a greenlet of its own until all have ended.

        The first exception that one of them lets out is raised; otherwise their results come
        back in order.
        """
        results: list[Any] = [None] * len(functions)
        running = len(functions)
        failures: list[BaseException] = []

        def act(index: int, function: Callable[[], Any]) -> None:
            nonlocal running
            try:
                results[index] = function()
            except BaseException as failure:
                failures.append(failure)
            running -= 1
            if not running or failures:
                self.hub.stop()

        for index, function in enumerate(functions):
            self.spawn(act, index, function)
        self.hub.run_forever()
        if failures:
            raise failures[0]
        return results

    def pair(self, family: int = socket.AF_INET) -> tuple[GreenSocket, socket.socket]:
        """Return two ends of a stream: ours, which is green, and a peer that blocks."""
        if family == socket.AF_INET:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                peer = socket.create_connection(listener.getsockname())
                accepted = listener.accept()[0]
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        else:
            accepted, peer = socket.socketpair(family)
        ours = self.adopt(accepted)
        peer.settimeout(30)
        self._opened.append(peer)
        return ours, peer

    def datagrams(self) -> tuple[GreenSocket, socket.socket]:
        """Return a bound UDP socket, which is green, and a peer that is connected to it."""
        ours = GreenSocket(socket.AF_INET, socket.SOCK_DGRAM)
        ours.bind(("127.0.0.1", 0))
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.connect(ours.getsockname())
        peer.settimeout(30)
        self._opened += [ours, peer]
        return ours, peer

    def adopt(self, plain: socket.socket) -> GreenSocket:
        """Turn a socket into a green one."""
        family, kind, proto = plain.family, plain.type, plain.proto
        ours = GreenSocket(family, kind, proto, plain.detach())
        self._opened.append(ours)
        return ours

    def close(self) -> None:
        for opened in self._opened:
            opened.close()


def make_hub(name: str) -> Hub:
    """Return a hub on the poller of this name."""
    if name == "poll":
        return Hub(PortablePoller(selectors.PollSelector()))
    if name == "select":
        return Hub(PortablePoller(selectors.SelectSelector()))
    return Hub()


@pytest.fixture(params=[*(["epoll"] if HAS_EPOLL else []), "poll", "select"])
def poller(request: pytest.FixtureRequest) -> str:
    """The name of each poller in turn."""
    return str(request.param)


@pytest.fixture
def hub(poller: str) -> Iterator[Hub]:
    """A hub on each poller."""
    hub = make_hub(poller)
    yield hub
    if not hub.is_closed():
        hub.close()


@pytest.fixture
def stage(hub: Hub) -> Iterator[Stage]:
    """A hub on each poller, with greenlets."""
    stage = Stage(hub)
    yield stage
    stage.close()
