"""What forked children tell each other of their peers."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from typing import Any

import pytest

from portico import ForkingTCPServer, StreamRequestHandler
from portico.siblings import ATTEMPTS, FREE, IN, ROW_SIZE, ROWS, TRYING, Siblings
from tests.support import RunningServer, eventually, in_child, nothing_left_behind

LINE = b"PROXY TCP4 192.0.2.1 192.0.2.9 4000 80\r\n"
OTHER = LINE.replace(b"192.0.2.1 ", b"192.0.2.2 ")


class Stage:
    """Rows, and what happens to the first of them while another tries again."""

    def __init__(self, state: bytes = FREE) -> None:
        self.pauses = 0
        self.siblings = Siblings(self._pause)
        self._state = state

    def _pause(self, seconds: float) -> None:
        assert seconds >= 0
        self.pauses += 1
        self.put(self._state)

    def put(self, state: bytes, row: int = 0) -> None:
        at = row * ROW_SIZE
        self.siblings._memory[at : at + 1] = state

    def try_first(self) -> None:
        """Have the first row try to come in, and stop in the middle of it."""
        assert self.siblings.admit(0, "peer", 1)
        self.put(TRYING)


def test_a_peer_has_as_many_children_as_it_may() -> None:
    siblings = Siblings()
    assert [siblings.admit(row, "peer", 2) for row in range(4)] == [True, True, False, False]
    assert siblings.admit(4, "another", 2)
    assert siblings.admit(5, 7, 2)
    siblings.leave(0)
    assert siblings.admit(6, "peer", 2)
    assert not siblings.admit(7, "peer", 2)


def test_what_one_process_writes_the_others_see() -> None:
    siblings = Siblings()

    def come_in() -> None:
        assert siblings.admit(0, "peer", 1)

    assert in_child(come_in) == 0
    assert not siblings.admit(1, "peer", 1)


def test_who_sees_another_try_tries_again() -> None:
    """And is in when the other has given up."""
    stage = Stage(FREE)
    stage.try_first()
    assert stage.siblings.admit(1, "peer", 1)
    assert stage.pauses == 1


def test_who_sees_another_try_is_out_when_that_one_is_in() -> None:
    stage = Stage(IN)
    stage.try_first()
    assert not stage.siblings.admit(1, "peer", 1)
    assert stage.pauses == 1


def test_who_sees_another_try_for_too_long_is_out() -> None:
    """That one may have been stopped."""
    stage = Stage(TRYING)
    stage.try_first()
    assert not stage.siblings.admit(1, "peer", 1)
    assert stage.pauses == ATTEMPTS


def test_a_row_is_given_to_one_child_at_a_time() -> None:
    siblings = Siblings()
    assert siblings.admit(1, "peer", 1)
    assert siblings.free_row({0, None}) == 1
    assert siblings.admit(2, "peer", 1), "a row that is given says nothing of who had it before"
    assert siblings.free_row(range(ROWS)) is None


class Echo(StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class Server(ForkingTCPServer):
    proxy_protocol = ("127.0.0.1",)
    max_connections_per_peer = 2


def is_served(running: RunningServer[Any], stack: ExitStack, header: bytes = LINE) -> bool:
    """Connect through the proxy, and say whether the handler answers."""
    client = stack.enter_context(running.connect())
    client.sendall(header + b"hello\n")
    try:
        return client.recv(6) == b"hello\n"
    except ConnectionResetError:
        return False


def kill(server: Server, child: int) -> None:
    os.kill(child, signal.SIGKILL)
    eventually(lambda: child not in (server.active_children or ()), "it is collected")


@pytest.mark.parametrize("end", ["leaves", "killed"])
def test_children_count_whom_proxies_speak_for_together(end: str) -> None:
    server = Server(("127.0.0.1", 0), Echo)
    with nothing_left_behind(), RunningServer(server, 0.01) as running, ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        assert is_served(running, first)
        [child] = list(server.active_children or ())
        assert is_served(running, stack)
        assert not is_served(running, stack)
        assert is_served(running, stack, OTHER)
        if end == "killed":
            kill(server, child)
        else:
            first.close()
        eventually(lambda: is_served(running, stack), "there is room again")
        assert not is_served(running, stack)


@pytest.mark.parametrize("setting", ["proxy_protocol", "max_connections_per_peer"])
def test_nothing_is_written_where_nobody_asks(setting: str) -> None:
    server: Any = type("Other", (Server,), {setting: None})(("127.0.0.1", 0), Echo)
    with RunningServer(server) as running, ExitStack() as stack:
        header = b"" if setting == "proxy_protocol" else LINE
        assert is_served(running, stack, header)
        assert server._guard.siblings is None


def test_a_child_without_a_row_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portico.siblings.ROWS", 1)
    with RunningServer(Server(("127.0.0.1", 0), Echo)) as running, ExitStack() as stack:
        assert is_served(running, stack)
        assert not is_served(running, stack)
        assert not is_served(running, stack, OTHER)
