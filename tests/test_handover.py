"""What another process of the same command line inherits."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import pytest

from portico.address import parse
from portico.channel import Channel
from portico.configuration import ServiceSettings
from portico.duty import openings
from portico.errors import ListenerError
from portico.handover import (
    LOOK_INTERVAL,
    VARIABLE,
    HandoverError,
    Heir,
    Heirloom,
    inherit,
    said_end,
    start_heir,
)
from portico.listener import open_listener
from portico.listeners import Listeners
from portico.settings import Settings
from portico.socketfile import SocketFile
from tests.support import PATIENCE, eventually, in_child, nothing_left_behind


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leave no descriptor and no process."""
    with nothing_left_behind():
        yield


def service(*addresses: str, backlog: int = 16) -> list[ServiceSettings]:
    return [
        ServiceSettings(
            name="test",
            target="app:Echo",
            addresses=tuple(map(parse, addresses)),
            settings=Settings(backlog=backlog),
        )
    ]


def gathered(listeners: Listeners, *addresses: str) -> list[Any]:
    return list(listeners.gather(openings(service(*addresses))))


def test_a_process_without_a_predecessor_inherits_nothing() -> None:
    assert inherit({"HOME": "/"}) is None


def test_what_a_predecessor_sets_is_read_once_and_kept_from_children(tmp_path: Path) -> None:
    ours, theirs = Channel.pair()
    listener = socket.create_server(("127.0.0.1", 0))
    told = {
        "channel": theirs.fileno(),
        "predecessor": 4711,
        "counters": "7",
        "passed": ["web", "other"],
        "listeners": [
            {
                "address": "tcp://127.0.0.1:9",
                "descriptor": listener.fileno(),
                "file": [str(tmp_path), 1, 2],
            }
        ],
    }
    os.set_inheritable(listener.fileno(), True)
    environment = {VARIABLE: json.dumps(told)}
    heritage = inherit(environment)
    assert heritage is not None
    assert (heritage.predecessor, heritage.counters) == (4711, "7")
    assert heritage.listeners == (
        Heirloom("tcp://127.0.0.1:9", listener.fileno(), SocketFile(tmp_path, 1, 2)),
    )
    assert not os.get_inheritable(listener.fileno())
    assert environment == {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "web:other",
    }
    heritage.channel.send("serving")
    assert ours.receive() == [{"kind": "serving"}]
    heritage.channel.close()
    theirs._end.detach()
    ours.close()
    listener.close()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"channel": 3}', '{"listeners": [{}]}'])
def test_what_no_predecessor_sets_is_an_error(text: str) -> None:
    with pytest.raises(HandoverError, match=f"{VARIABLE}: expected what a predecessor sets"):
        inherit({VARIABLE: text})


def test_an_heirloom_that_is_no_listener_is_an_error() -> None:
    reader, writer = os.pipe()
    address: Any = parse("tcp://127.0.0.1:9000")
    with pytest.raises(HandoverError, match=f"descriptor {reader} is no listener for tcp:"):
        Heirloom("tcp://127.0.0.1:9000", reader, None).open(address)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("address", "waits"), [("tcp", False), ("udp", True)])
def test_accepting_from_an_heirloom_never_waits(address: str, waits: bool) -> None:
    """Whether it does is one flag for all processes: a copy that set it would hold their hubs."""
    text = f"{address}://127.0.0.1:0"
    listeners = Listeners()
    (theirs,) = gathered(listeners, text)
    opened = Heirloom(text, os.dup(theirs.socket.fileno()), None).open(theirs.place.address)
    lent = opened.lend()
    assert [os.get_blocking(each.socket.fileno()) for each in (theirs, opened, lent)] == [waits] * 3
    for each in (lent, opened, listeners):
        each.close()


def test_how_a_process_ended_is_said_in_words() -> None:
    assert said_end(3 << 8) == "exited with status 3"
    assert said_end(9) == "was killed by SIGKILL"
    assert said_end(40) == "was killed by signal 40"


@contextmanager
def an_heir(*, is_silent: bool, timeout: float | None = None) -> Iterator[Heir]:
    """Have a process that lives until it is killed, and may close its channel."""
    ours, theirs = Channel.pair()
    child = os.fork()
    if child == 0:
        ours.close()
        if is_silent:
            theirs.close()
        signal.pause()
        os._exit(0)
    theirs.close()
    yield Heir(child, ours, inf if timeout is None else time.monotonic() + timeout)


def test_an_heir_that_takes_too_long_is_killed() -> None:
    with an_heir(is_silent=False, timeout=PATIENCE) as heir:
        assert not heir.attend()
        heir.deadline = time.monotonic() + 0.05
        eventually(heir.attend)
        assert heir.end == "was killed by SIGKILL (it did not serve in time)"


def test_an_heir_that_closes_its_channel_and_lives_holds_nobody_up() -> None:
    with an_heir(is_silent=True) as heir:
        eventually(lambda: heir.attend() or heir.fileno() is None)
        assert heir.due - time.monotonic() <= LOOK_INTERVAL  # its end is told by nobody
        eventually(heir.attend)
        assert heir.end == "was killed by SIGKILL (it had closed its channel)"


def test_an_heir_that_somebody_else_has_collected_has_ended() -> None:
    with an_heir(is_silent=False) as heir:
        os.kill(heir.process, signal.SIGTERM)
        os.waitpid(heir.process, 0)
        assert heir.attend()
        assert heir.end == "ended"
        assert heir.due == inf


def test_an_heir_that_serves_says_what_it_has_taken() -> None:
    ours, theirs = Channel.pair()
    theirs.send("serving", listeners=["tcp://127.0.0.1:9"])
    heir = Heir(os.getpid(), ours)
    assert heir.attend()
    assert heir.due == inf
    assert heir.taken == ["tcp://127.0.0.1:9"]
    assert heir.fileno() is None
    theirs.close()
    ours.close()


def test_an_heir_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere")
    with pytest.raises(FileNotFoundError):
        start_heir([])


# --- the listeners of a program ----------------------------------------------------------


def test_a_listener_is_opened_once_however_often_it_is_wanted() -> None:
    listeners = Listeners()
    first = gathered(listeners, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0")
    again = gathered(listeners, "tcp://127.0.0.1:0", "udp://127.0.0.1:0", "tcp://127.0.0.1:0")
    assert [again[0], again[2]] == first
    assert first[0].address != first[1].address
    assert listeners.keep([again[1]]) == first
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", first[0].place.name[1] or 1))
    listeners.close()


def test_of_those_that_cannot_all_be_had_none_is_opened() -> None:
    listeners = Listeners()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenerError):
            gathered(listeners, "tcp://127.0.0.1:0", address)
    assert listeners.keep([]) == []


def test_a_listener_of_a_predecessor_is_its_own_until_it_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    theirs = open_listener(parse(f"unix:{path}"))
    unwanted = os.dup(theirs.socket.fileno())

    def heirloom() -> Heirloom:
        return Heirloom(f"unix:{path}", os.dup(theirs.socket.fileno()), theirs.file)

    failed = Listeners([heirloom()])
    (opened,) = gathered(failed, f"unix:{path}")
    assert opened.socket.getsockname() == str(path)
    failed.close()
    assert path.exists()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))

    taken = Listeners([heirloom(), Heirloom("tcp://127.0.0.1:9", unwanted, None)])
    gathered(taken, f"unix:{path}", "tcp://127.0.0.1:0")
    assert taken.take_over() == [f"unix:{path}"]
    before = Listeners()
    before._open.append((f"unix:{path}", theirs))
    assert before.hand_over([f"unix:{path}", "tcp://127.0.0.1:9"]) == [theirs]
    before.close()
    assert path.exists()
    taken.close()
    assert not path.exists()


def test_a_child_that_closes_them_ends_nothing(tmp_path: Path) -> None:
    listeners = Listeners()
    (opened,) = gathered(listeners, f"unix:{tmp_path}/echo")
    assert in_child(listeners.close) == 0
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/echo")
    assert opened.socket.fileno() >= 0
    listeners.close()
