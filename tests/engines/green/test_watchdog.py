from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import portico
from portico.engines.green import GreenMixIn
from portico.engines.green.watchdog import find, is_program
from portico.events import HandlerStalled, subscribe
from tests.engines.green.test_engine import ask, connected, serving
from tests.support import PATIENCE, Call

SOON = 0.01


class Blocking(portico.StreamRequestHandler):
    """Holds its hub until the test releases it, if it is told to."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)
            if line == b"block\n":
                self.server.held.set()
                self.server.release.wait(PATIENCE)  # this is the line that holds the hub


class Server(GreenMixIn, portico.TCPServer):
    stall_threshold: float | None = SOON

    def __init__(self, address: Any, handler: Any) -> None:
        super().__init__(address, handler)
        self.held = threading.Event()
        self.release = threading.Event()


class Hubs(Server):
    max_hubs = 4


@pytest.fixture
def stalls() -> Iterator[queue.Queue[HandlerStalled]]:
    """What was told of handlers that hold a hub."""
    told: queue.Queue[HandlerStalled] = queue.Queue()
    unsubscribe = subscribe(told.put, HandlerStalled)
    yield told
    unsubscribe()


def is_the_line(stall: HandlerStalled) -> bool:
    """Say whether it tells of the line that holds the hub."""
    path, _, number = stall.place.rpartition(":")
    return (
        path == __file__
        and "this is the line" in Path(path).read_text().splitlines()[int(number) - 1]
    )


def wait_told(stalls: queue.Queue[HandlerStalled]) -> HandlerStalled:
    """Wait until the line is told of; the system may have held the thread elsewhere before."""
    while not is_the_line(stall := stalls.get(timeout=PATIENCE)):
        pass
    return stall


def test_a_handler_that_holds_the_hub_is_named_by_its_line(
    stalls: queue.Queue[HandlerStalled],
) -> None:
    with serving(Server, Blocking) as server, connected(server) as client:
        assert ask(client, b"block\n") == b"block\n"
        stall = wait_told(stalls)
        server.release.set()
        assert stall.handler == "Blocking"
        assert stall.peer == client.getsockname()
        assert stall.duration >= SOON
        assert stall.server is server
        assert ask(client, b"go on\n") == b"go on\n"
        server.release.clear()
        # The answer is sent by the watchdog, after it had the occasion to tell again.
        assert ask(client, b"block\n") == b"block\n"
        server.release.set()
    assert not any(map(is_the_line, stalls.queue))  # once for each place and minute


def test_what_it_has_written_is_sent_meanwhile() -> None:
    with serving(Server, Blocking) as server, connected(server) as client:
        client.settimeout(PATIENCE)
        assert ask(client, b"block\n") == b"block\n"
        assert not server.release.is_set()
        server.release.set()


def test_other_hubs_serve_while_one_is_held() -> None:
    with serving(Hubs, Blocking) as server, connected(server) as client:
        assert ask(client, b"block\n") == b"block\n"
        for _ in range(5):
            with connected(server) as other:
                assert ask(other, b"served\n") == b"served\n"
        assert not server.release.is_set()
        server.release.set()


def test_service_actions_run_beside_no_other_hook() -> None:
    """Whichever hub accepts: a program's hooks need no lock of their own."""
    hooks = threading.Lock()
    overlaps: list[str] = []
    seen: set[int] = set()
    pause = threading.Event()

    class Hooked(Hubs):
        def take_turn(self, name: str) -> None:
            if not hooks.acquire(blocking=False):
                overlaps.append(name)
                return
            pause.wait(0.002)
            hooks.release()

        def verify_request(self, request: Any, client_address: Any) -> bool:
            seen.add(threading.get_ident())
            self.take_turn("verify_request")
            return True

        def service_actions(self) -> None:
            self.take_turn("service_actions")

    with Hooked(("127.0.0.1", 0), Blocking) as server:
        loop = Call(server.serve_forever, 0.001)
        with connected(server) as held:
            assert ask(held, b"block\n") == b"block\n"
            with connected(server) as other:  # another hub is started for it
                assert ask(other, b"served\n") == b"served\n"
            server.release.set()
            for _ in range(100):
                with connected(server) as client:
                    assert ask(client, b"served\n") == b"served\n"
        server.shutdown()
        loop.result()
    assert len(seen) > 1
    assert not overlaps


def test_hubs_are_started_up_to_the_limit() -> None:
    with serving(Hubs, Blocking) as server:
        clients = []
        for _ in range(Hubs.max_hubs):
            client = socket.create_connection(server.server_address, PATIENCE)
            assert ask(client, b"block\n") == b"block\n"
            clients.append(client)
        assert len(server._get_green().crews.live()) == Hubs.max_hubs
        server.release.set()
        for client in clients:
            client.close()


def test_hubs_are_started_although_nobody_is_to_be_told(
    stalls: queue.Queue[HandlerStalled],
) -> None:
    class Untold(Hubs):
        stall_threshold = None

    with serving(Untold, Blocking) as server, connected(server) as held:
        assert ask(held, b"block\n") == b"block\n"
        with connected(server) as other:
            assert ask(other, b"served\n") == b"served\n"
        threading.Event().wait(0.2)  # longer than any threshold
        assert not server.release.is_set()
        server.release.set()
    assert stalls.empty()


@pytest.mark.parametrize("is_serving", [True, False])
def test_no_hub_is_started_once_the_server_accepts_no_more(
    stalls: queue.Queue[HandlerStalled], monkeypatch: pytest.MonkeyPatch, is_serving: bool
) -> None:
    """Whoever is connected may hold a hub then, too."""
    tried = threading.Event()

    def start(**_: Any) -> None:
        tried.set()
        raise RuntimeError("no thread left")

    with serving(Server, Blocking) as server, connected(server) as client:
        assert ask(client, b"x\n") == b"x\n"
        monkeypatch.setattr(server._get_green().crews, "start", start)
        server.max_hubs = 4  # until now there was to be but one
        if not is_serving:
            server.shutdown()
        assert ask(client, b"block\n") == b"block\n"
        wait_told(stalls)
        tried.clear()  # by a look that began earlier, perhaps
        assert tried.wait(PATIENCE if is_serving else 10 * SOON) == is_serving
        server.release.set()


def test_a_hub_that_comes_too_late_for_the_listener_ends() -> None:
    with serving(Hubs, Blocking) as server:
        green = server._get_green()
    green.is_serving = True  # as the watchdog saw it just before
    server._start_hub()
    Call(green.crews.join).result()


def test_hooks_of_the_accept_path_never_run_in_two_threads() -> None:
    class Guarded(Hubs):
        inside = threading.Lock()

        def verify_request(self, request: Any, client_address: Any) -> bool:
            assert self.inside.acquire(blocking=False), "two at once"
            self.inside.release()
            return True

    with serving(Guarded, Blocking) as server, connected(server) as held:
        assert ask(held, b"block\n") == b"block\n"
        for _ in range(30):
            with connected(server) as client:
                assert ask(client, b"x\n") == b"x\n"
        server.release.set()


def test_an_idle_server_does_not_wake_for_it() -> None:
    """The watchdog looks while a hub is busy, and sleeps while none is."""
    with serving(Server, Blocking) as server, connected(server) as client:
        assert ask(client, b"x\n") == b"x\n"
        watchdog = server._get_green().watchdog
        poller = server._get_green().crews.live()[0].hub.poller
        pause = threading.Event()

        def rests() -> bool:
            turn = poller.turn
            pause.wait(10 * SOON)
            return bool(poller.turn == turn and poller.on_wake == watchdog._changed.set)

        # Not at once: the hub may not have ended its turn, or the watchdog be about to look.
        assert any(rests() for _ in range(20))


def test_it_can_be_switched_off() -> None:
    class Unwatched(Server):
        stall_threshold = None

    with serving(Unwatched, Blocking) as server, connected(server) as client:
        assert ask(client, b"x\n") == b"x\n"
        assert server._get_green().watchdog._thread is None


def test_the_program_s_own_line_is_the_one_that_is_named() -> None:
    assert is_program(__file__)
    assert is_program("/venv/lib/python3.13/site-packages/client.py")
    assert not is_program(portico.__file__)
    assert not is_program(threading.__file__)
    assert find(None) == (None, "")
