from __future__ import annotations

import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from portico import waits
from portico.waits import (
    CALLS,
    POLLFD,
    thread_activity,
    thread_waits_in_read,
    thread_waits_in_write,
)
from tests.support import PATIENCE, eventually

pytestmark = pytest.mark.skipif(
    waits._calls is None or not Path("/proc/self/syscall").exists(),
    reason="the kernel does not show what a thread waits for",
)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@contextmanager
def running(function: Callable[[], Any], end: Callable[[], Any]) -> Iterator[int]:
    """The native id of a thread that runs `function`, until `end` makes it return."""
    thread = threading.Thread(target=function)
    thread.start()
    try:
        assert thread.native_id is not None
        yield thread.native_id
    finally:
        end()
        thread.join(PATIENCE)


def shown(thread: int) -> list[str]:
    return Path(f"/proc/self/task/{thread}/syscall").read_text().split()


def settled(thread: int) -> None:
    """Wait until it is blocked for good: three looks in a row show the same, and no computing.

    Waiting for the interpreter lock is over soon, and shows another address each time.
    """

    def is_settled() -> bool:
        first = shown(thread)
        time.sleep(0.02)
        return first != ["running"] and first == shown(thread)

    eventually(is_settled, "it is blocked")


@pytest.mark.parametrize(
    "read",
    [
        lambda sock: sock.recv(1),
        lambda sock: sock.recv_into(bytearray(1)),
        lambda sock: sock.recvfrom(1),
        lambda sock: sock.recvmsg(1),
        lambda sock: os.read(sock.fileno(), 1),
        lambda sock: os.readv(sock.fileno(), [bytearray(1)]),
        lambda sock: sock.makefile("rb").readline(),
    ],
    ids=["recv", "recv_into", "recvfrom", "recvmsg", "read", "readv", "file"],
)
def test_a_thread_that_is_blocked_in_a_read_waits_for_it(
    pair: Pair, read: Callable[[socket.socket], Any]
) -> None:
    ours, theirs = pair
    with running(lambda: read(ours), lambda: theirs.sendall(b"\n")) as thread:
        eventually(lambda: thread_waits_in_read(thread, ours.fileno()), "it waits")
        assert thread_waits_in_read(thread, theirs.fileno()) is False


def test_a_thread_that_reads_with_a_timeout_waits_for_it(pair: Pair) -> None:
    """It is blocked in poll(2), whose descriptor stands in its memory."""
    ours, theirs = pair
    ours.settimeout(PATIENCE)
    with running(lambda: ours.recv(1), lambda: theirs.sendall(b"\n")) as thread:
        eventually(lambda: thread_waits_in_read(thread, ours.fileno()), "it waits")
        assert thread_waits_in_read(thread, theirs.fileno()) is False


def test_a_thread_that_waits_to_write_does_not_wait_for_a_read(pair: Pair) -> None:
    for timeout in (None, PATIENCE):
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout)

        def write(sock: socket.socket = ours) -> None:
            try:
                while True:
                    sock.sendall(b"x" * 65536)
            except OSError:
                pass

        with ours, running(write, theirs.close) as thread:
            settled(thread)
            assert thread_waits_in_read(thread, ours.fileno()) is False


def test_a_thread_that_polls_many_does_not_wait_for_one(pair: Pair) -> None:
    ours, theirs = pair
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    poll.register(theirs, select.POLLIN)
    with running(lambda: poll.poll(60_000), lambda: theirs.sendall(b"\n")) as thread:
        settled(thread)
        assert thread_waits_in_read(thread, ours.fileno()) is False


def test_a_thread_that_sleeps_does_not_wait_for_a_read(pair: Pair) -> None:
    ours, _ = pair
    done = threading.Event()

    def doze() -> None:
        while not done.is_set():
            time.sleep(0.1)

    with running(doze, done.set) as thread:
        eventually(lambda: shown(thread)[0] not in {"running", "-1"}, "it sleeps")
        assert thread_waits_in_read(thread, ours.fileno()) is False


def test_a_thread_that_waits_for_a_lock_does_not_wait_for_a_read(pair: Pair) -> None:
    ours, _ = pair
    lock = threading.Lock()
    lock.acquire()
    with running(lock.acquire, lock.release) as thread:
        settled(thread)
        # The first argument of futex(2) is a pointer; no descriptor is that large.
        assert [thread_waits_in_read(thread, fd) for fd in range(64)] == [False] * 64
        assert thread_waits_in_read(thread, ours.fileno()) is False


def test_a_thread_that_computes_does_not_wait_for_a_read(pair: Pair) -> None:
    ours, _ = pair
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            pass

    with running(compute, done.set) as thread:
        assert [thread_waits_in_read(thread, ours.fileno()) for _ in range(20)] == [False] * 20


def test_the_thread_that_asks_does_not_wait() -> None:
    assert thread_waits_in_read(threading.get_native_id(), 0) is False


def test_nobody_knows_of_a_thread_that_ended(pair: Pair) -> None:
    with running(lambda: None, lambda: None) as thread:
        pass
    eventually(lambda: thread_waits_in_read(thread, pair[0].fileno()) is None, "it is gone")


def test_nobody_knows_on_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_calls", None)
    assert thread_waits_in_read(threading.get_native_id(), 0) is None


# --- what the kernel may show, as literals ----------------------------------------------


def showing(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(waits, "_state", lambda _: text.split())
    monkeypatch.setattr(waits, "_calls", CALLS["x86_64"])


@pytest.mark.parametrize(
    ("text", "waits_for_it"),
    [
        ("0 0x7 0x1000 0x1 0x0 0x0 0x0 0x7ffc 0x7fff", True),
        ("45 0x7 0x1000 0x1 0x0 0x0 0x0 0x7ffc 0x7fff", True),
        ("45 0x8 0x1000 0x1 0x0 0x0 0x0 0x7ffc 0x7fff", False),
        ("1 0x7 0x1000 0x1 0x0 0x0 0x0 0x7ffc 0x7fff", False),  # write
        ("44 0x7 0x1000 0x1 0x0 0x0 0x0 0x7ffc 0x7fff", False),  # sendto
        ("running", False),
        ("-1 0x7ffc 0x7fff", False),  # blocked by a page fault, in no system call
        ("", False),
        ("7 0x0 0x1 0x0 0x0 0x0 0x0 0x7ffc 0x7fff", False),  # no memory there
        ("7 0xffffffffffffffff 0x1 0x0 0x0 0x0 0x0 0x7ffc 0x7fff", False),
        ("230 0x1 0x1 0x7ffc 0x0 0x0 0x0 0x7ffc 0x7fff", False),  # clock_nanosleep
    ],
)
def test_every_form_of_what_is_shown_is_understood(
    monkeypatch: pytest.MonkeyPatch, text: str, waits_for_it: bool
) -> None:
    showing(monkeypatch, text)
    assert thread_waits_in_read(1, 7) is waits_for_it


@pytest.mark.parametrize(
    ("number", "entry", "count", "waits_for_it"),
    [
        (7, (7, select.POLLIN, 0), 1, True),
        (271, (7, select.POLLIN | select.POLLPRI, 0), 1, True),
        (219, (7, select.POLLIN, 0), 1, True),  # poll, gone on after a stop
        (7, (8, select.POLLIN, 0), 1, False),
        (7, (7, select.POLLOUT, 0), 1, False),
        (7, (7, select.POLLIN, 0), 2, False),
    ],
)
def test_what_a_poll_waits_for_is_read_where_it_stands(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    entry: tuple[int, int, int],
    count: int,
    waits_for_it: bool,
) -> None:
    import ctypes

    memory = ctypes.create_string_buffer(POLLFD.pack(*entry), POLLFD.size)
    showing(monkeypatch, f"{number} {ctypes.addressof(memory):#x} {count:#x} 0 0 0 0 0 0")
    assert thread_waits_in_read(1, 7) is waits_for_it


def test_memory_that_may_not_be_read_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    showing(monkeypatch, "7 0x1000 0x1 0x0 0x0 0x0 0x0 0x7ffc 0x7fff")

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    assert thread_waits_in_read(1, 7) is False


HEADERS = {
    "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "/usr/include/asm-generic/unistd.h",
}


@pytest.mark.parametrize("machine", CALLS)
def test_the_numbers_are_those_of_the_kernels_header(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip("needs the kernel's headers")
    defined = re.findall(r"^#define __NR_(\w+) (\d+)$", header.read_text(), re.MULTILINE)
    numbers = {name: int(number) for name, number in defined}
    reads = ("read", "readv", "recvfrom", "recvmsg", "recvmmsg")
    polls = (
        ("poll", "ppoll", "restart_syscall")
        if machine == "x86_64"
        else ("ppoll", "restart_syscall")
    )
    assert CALLS[machine].reads == {numbers[name] for name in reads}
    assert CALLS[machine].polls == {numbers[name] for name in polls}


def test_a_thread_that_is_blocked_shows_no_activity_until_it_goes_on(pair: Pair) -> None:
    ours, theirs = pair

    def echo() -> None:
        while data := ours.recv(10):
            ours.sendall(data)

    with running(echo, lambda: theirs.shutdown(socket.SHUT_WR)) as thread:
        eventually(lambda: thread_waits_in_read(thread, ours.fileno()))
        before = still_activity(thread)
        theirs.sendall(b"x")
        assert theirs.recv(10) == b"x"
        eventually(lambda: thread_waits_in_read(thread, ours.fileno()))
        after = thread_activity(thread)
        assert after is not None
        assert after > before


def still_activity(thread: int) -> int:
    """Wait until two looks show the same, as they do unless the process was stopped just then."""
    looks: list[int] = []

    def is_still() -> bool:
        looks[:] = [seen for _ in range(2) if (seen := thread_activity(thread)) is not None]
        return len(looks) == 2 and looks[0] == looks[1]

    eventually(is_still, "it shows no activity")
    return looks[0]


def test_nobody_knows_the_activity_of_a_thread_that_is_not_there() -> None:
    assert thread_activity(2**30) is None


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_a_thread_whose_peer_takes_no_bytes_waits_in_a_write(
    pair: Pair, timeout: float | None
) -> None:
    ours, theirs = pair
    ours.settimeout(timeout)
    end = partial(received_until_closed, theirs)
    with running(lambda: fill(ours), end) as thread:
        eventually(lambda: thread_waits_in_write(thread, ours.fileno()), "it waits")
        assert thread_waits_in_read(thread, ours.fileno()) is False
        assert thread_waits_in_write(thread, theirs.fileno()) is False


def test_one_that_reads_does_not_wait_in_a_write(pair: Pair) -> None:
    ours, theirs = pair
    with running(lambda: ours.recv(1), theirs.close) as thread:
        settled(thread)
        assert thread_waits_in_write(thread, ours.fileno()) is False


def fill(sock: socket.socket) -> None:
    sock.sendall(b"x" * (1 << 22))
    sock.close()


def received_until_closed(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass
