from __future__ import annotations

import errno
import os
import queue
import selectors
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from math import inf
from pathlib import Path
from time import monotonic as time
from types import SimpleNamespace
from typing import Any

import pytest

from portico import acceptor as module
from portico.acceptor import (
    Acceptor,
    Exhaustion,
    Pause,
    Recovery,
    Wakeup,
    is_listening,
    is_open,
    is_ready,
    recovery,
)
from tests.support import PATIENCE, Call, Client, eventually, nothing_left_behind, run_program


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def is_readable(descriptor: Any) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(0))


class Holder:
    """What a server looks like to the acceptor: a socket, and a descriptor to wait for."""

    def __init__(self, sock: Any, fileno: int | None = None) -> None:
        self.socket = sock
        self._fileno = fileno

    def fileno(self) -> int:
        descriptor: int = self.socket.fileno() if self._fileno is None else self._fileno
        return descriptor


# --- the errors of accept(2) ------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(errno.errorcode), ids=errno.errorcode.get)
def test_every_error_of_accepting_has_its_recovery(number: int) -> None:
    """The system's own troubles and the listener's are listed; all others belong to one peer."""
    name = errno.errorcode[number]
    if name in {"EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"}:
        expected = Recovery.PAUSE
    elif name in {"EBADF", "ENOTSOCK", "EINVAL"}:
        expected = Recovery.CHECK
    else:
        expected = Recovery.SKIP
    assert recovery(OSError(number, os.strerror(number))) is expected


def test_an_error_without_a_number_is_skipped() -> None:
    """A program's own `get_request` may raise a plain OSError."""
    assert recovery(OSError("no number")) is Recovery.SKIP


@pytest.mark.parametrize("number", ssl.SSLErrorNumber, ids=lambda number: number.name)
def test_a_failed_handshake_is_skipped(number: ssl.SSLErrorNumber) -> None:
    """The numbers of TLS errors are not those of the system."""
    assert recovery(ssl.SSLError(number, "handshake")) is Recovery.SKIP


# --- is it open, does it listen ---------------------------------------------------------


def test_a_listener_is_open_until_it_is_closed(listener: socket.socket) -> None:
    assert is_open(listener)
    listener.close()
    assert not is_open(listener)


def test_a_closed_file_is_not_open(tmp_path: Path) -> None:
    """Where a closed socket returns -1, a closed file raises ValueError."""
    file = (tmp_path / "file").open("w")
    assert is_open(file)
    file.close()
    assert not is_open(file)


def test_what_has_no_descriptor_counts_as_open() -> None:
    """A program's own selector may need none."""
    without: Any = object()
    assert is_open(without)


def test_a_listening_socket_listens(listener: socket.socket) -> None:
    assert is_listening(Holder(listener))


def test_a_closed_socket_does_not_listen(listener: socket.socket) -> None:
    listener.close()
    assert not is_listening(Holder(listener))


def test_a_bound_socket_does_not_listen_yet() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert not is_listening(Holder(sock))


def test_a_socket_that_was_shut_down_does_not_listen(listener: socket.socket) -> None:
    listener.shutdown(socket.SHUT_RDWR)
    assert not is_listening(Holder(listener))


def test_a_socket_closed_behind_its_back_does_not_listen(listener: socket.socket) -> None:
    os.close(listener.fileno())
    try:
        assert not is_listening(Holder(listener))
    finally:
        listener.detach()


def test_a_number_that_belongs_to_a_file_now_does_not_listen(
    listener: socket.socket, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("w") as file:
        os.dup2(file.fileno(), listener.fileno())
        assert not is_listening(Holder(listener))


def test_a_connection_is_a_listener_of_the_programs_own_kind() -> None:
    """A `get_request` that reads messages from a stream needs no backlog."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert is_listening(Holder(ours))


def test_an_object_that_knows_little_is_a_listener_of_the_programs_own_kind(
    listener: socket.socket,
) -> None:
    little = SimpleNamespace(fileno=listener.fileno, type=socket.SOCK_STREAM)
    assert is_listening(Holder(little))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_datagram_socket_has_nothing_to_listen_for(family: int) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        assert is_listening(Holder(sock))


def test_another_descriptor_than_the_sockets_is_the_programs_own_kind() -> None:
    """A program's `fileno` decides; its `socket` may be anything."""
    reader, writer = os.pipe()
    with socket.socket() as sock, open(reader), open(writer, "w"):  # noqa: PTH123 - descriptors
        assert is_listening(Holder(sock, reader))
        assert is_listening(Holder(None, reader))


def test_another_descriptor_that_was_closed_does_not_listen() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with socket.socket() as sock:
        assert not is_listening(Holder(sock, reader))


# --- pauses -----------------------------------------------------------------------------


def test_what_remains_of_a_pause() -> None:
    pause = Pause(10.0)
    assert [pause.remaining(now) for now in (7.5, 10.0, 12.0)] == [2.5, 0.0, 0.0]


def test_a_pause_without_limit_always_remains() -> None:
    assert Pause(inf).remaining(1e9) == inf


def test_a_pause_keeps_the_descriptors_that_end_it() -> None:
    assert Pause(10.0, (3, 4)).descriptors == (3, 4)
    assert Pause(10.0).descriptors == ()


def test_the_pauses_of_an_exhaustion_double_up_to_a_second() -> None:
    exhaustion = Exhaustion(100.0)
    ends = [exhaustion.next_pause(100.0).deadline for _ in range(6)]
    assert ends == pytest.approx([100.1, 100.2, 100.4, 100.8, 101.0, 101.0])


def test_each_pause_of_an_exhaustion_begins_when_it_is_made() -> None:
    exhaustion = Exhaustion(100.0)
    exhaustion.next_pause(100.0)
    assert exhaustion.next_pause(500.0).deadline == pytest.approx(500.2)
    assert exhaustion.since == 100.0


# --- the wake-up ------------------------------------------------------------------------


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    made = Wakeup()
    yield made
    if made.fileno() >= 0:
        made.close()


@pytest.fixture
def signalled() -> Iterator[list[int]]:
    """The signals of kind SIGUSR1 that reached Python."""
    seen: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGUSR1, previous)


def test_a_wakeup_is_readable_from_wake_to_clear(wakeup: Wakeup) -> None:
    assert not is_readable(wakeup)
    wakeup.wake()
    assert is_readable(wakeup)
    wakeup.clear()
    assert not is_readable(wakeup)


def test_clear_forgets_every_wake_so_far(wakeup: Wakeup) -> None:
    for _ in range(100):
        wakeup.wake()
    wakeup.clear()
    assert not is_readable(wakeup)


def test_clear_without_a_wake_does_not_wait(wakeup: Wakeup) -> None:
    """A process that shares the pipe may have been faster."""
    wakeup.clear()
    wakeup.wake()
    assert is_readable(wakeup)


def test_wake_never_waits_for_room_in_the_pipe(wakeup: Wakeup) -> None:
    """64 KiB are what a pipe holds."""

    def wake_often() -> None:
        for _ in range(70_000):
            wakeup.wake()

    Call(wake_often).result()
    assert is_readable(wakeup)


def test_a_wake_after_the_close_reaches_nobody() -> None:
    """The number of the closed descriptor is soon somebody else's."""
    wakeup = Wakeup()
    wakeup.close()
    reader, writer = os.pipe()
    with open(reader), open(writer, "w"):  # noqa: PTH123 - descriptors, not paths
        wakeup.wake()
        assert not is_readable(reader)
    assert wakeup.fileno() == -1


def test_a_wakeup_closes_all_that_it_opened() -> None:
    with nothing_left_behind():
        Wakeup().close()


def test_a_signal_in_the_main_thread_is_a_wake(wakeup: Wakeup, signalled: list[int]) -> None:
    """One that comes just before the wait would otherwise be noticed only after it."""
    signal.raise_signal(signal.SIGUSR1)
    assert is_readable(wakeup)
    assert signalled == [signal.SIGUSR1]
    assert not wakeup.misses_signals


def test_signals_are_no_wake_after_the_close(wakeup: Wakeup, signalled: list[int]) -> None:
    wakeup.close()
    assert signal.set_wakeup_fd(-1) == -1
    signal.raise_signal(signal.SIGUSR1)
    assert signalled == [signal.SIGUSR1]


def test_a_signal_handler_may_call_wake_during_a_wake(
    wakeup: Wakeup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It interrupts the main thread anywhere, so the lock lets the same thread in twice."""
    write = os.write
    previous = signal.signal(signal.SIGUSR1, lambda *_: wakeup.wake())

    def interrupted(descriptor: int, data: bytes) -> int:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGUSR1)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", interrupted)
    try:
        wakeup.wake()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert is_readable(wakeup)


def test_signals_of_an_event_loop_stay_its_own(signalled: list[int]) -> None:
    """asyncio has the interpreter write to a socket of its own; that is left alone."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.fileno())
        try:
            wakeup = Wakeup()
            assert wakeup.misses_signals
            signal.raise_signal(signal.SIGUSR1)
            assert not is_readable(wakeup)
            assert theirs.recv(1) == bytes([signal.SIGUSR1])
            wakeup.close()
        finally:
            assert signal.set_wakeup_fd(-1) == ours.fileno()
    assert signalled == [signal.SIGUSR1]


def test_an_event_loop_that_came_later_keeps_its_signals() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        wakeup = Wakeup()
        signal.set_wakeup_fd(ours.fileno())
        try:
            wakeup.close()
        finally:
            assert signal.set_wakeup_fd(-1) == ours.fileno()


def test_a_wakeup_of_another_thread_leaves_the_signals_alone(signalled: list[int]) -> None:
    """Python runs signal handlers in the main thread, so no other wait can miss one."""
    wakeup = Call(Wakeup).result()
    assert signal.set_wakeup_fd(-1) == -1
    signal.raise_signal(signal.SIGUSR1)
    assert not is_readable(wakeup)
    assert not wakeup.misses_signals
    wakeup.close()
    assert signalled == [signal.SIGUSR1]


def test_a_wakeup_works_where_signals_cannot_be_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a subinterpreter the main thread may not ask for them, and none run there."""

    def refuse(*_: object, **__: object) -> int:
        raise ValueError("set_wakeup_fd only works in main thread of the main interpreter")

    with monkeypatch.context() as patches, nothing_left_behind():
        patches.setattr(signal, "set_wakeup_fd", refuse)
        wakeup = Wakeup()
        assert not wakeup.misses_signals
        wakeup.wake()
        assert is_readable(wakeup)
        wakeup.close()


def test_ten_thousand_wakeups_from_two_threads_leave_the_lock_free(wakeup: Wakeup) -> None:
    def wake_often() -> None:
        for _ in range(5_000):
            wakeup.wake()

    calls = [Call(wake_often) for _ in range(2)]
    while any(call.is_running() for call in calls):
        wakeup.clear()
    for call in calls:
        call.result()
    wakeup.close()


# --- waiting for a listener -------------------------------------------------------------


def knock(listener: socket.socket) -> socket.socket:
    client = Client(listener.family, listener.type)
    client.connect(listener.getsockname())
    return client


def test_waiting_ends_when_a_client_knocks(listener: socket.socket) -> None:
    with Acceptor(listener) as acceptor, knock(listener):
        assert acceptor.wait(PATIENCE)
        assert acceptor.wait(None), "it is ready until the connection is accepted"


def test_waiting_ends_without_a_client_when_the_time_is_over(listener: socket.socket) -> None:
    with Acceptor(listener) as acceptor:
        assert not acceptor.wait(0)
        assert not acceptor.wait(0.001)


def test_a_wake_ends_a_wait_without_limit(listener: socket.socket) -> None:
    waiting = threading.Event()

    def wait() -> bool:
        with Acceptor(listener, wakeup=Wakeup()) as acceptor:
            acceptors.append(acceptor)
            waiting.set()
            return acceptor.wait(None)

    acceptors: list[Acceptor] = []
    call = Call(wait)
    assert waiting.wait(PATIENCE)
    acceptors[0].wake()
    assert call.result() is False


def test_a_wake_ends_one_wait(listener: socket.socket) -> None:
    """It comes before the wait here, which makes no difference."""
    with Acceptor(listener, wakeup=Wakeup()) as acceptor:
        acceptor.wake()
        assert not acceptor.wait(None)
        with knock(listener):
            assert acceptor.wait(None)


def test_a_client_and_a_wake_together_are_a_client(listener: socket.socket) -> None:
    with Acceptor(listener, wakeup=Wakeup()) as acceptor, knock(listener):
        acceptor.wake()
        assert acceptor.wait(None)


def test_an_acceptor_without_a_wakeup_is_not_woken(listener: socket.socket) -> None:
    with Acceptor(listener) as acceptor:
        acceptor.wake()
        assert not acceptor.wait(0)
        assert not acceptor.misses_signals


def test_an_acceptor_knows_its_thread_and_process(listener: socket.socket) -> None:
    def made() -> tuple[int, int]:
        with Acceptor(listener) as acceptor:
            return acceptor.thread, acceptor.process

    call = Call(made)
    assert call.result() == (call.thread, os.getpid())


def test_closing_an_acceptor_leaves_the_listener_open(listener: socket.socket) -> None:
    with nothing_left_behind():
        Acceptor(listener, wakeup=Wakeup()).close()
    with knock(listener):
        connection, _ = listener.accept()
        connection.close()


def test_a_closed_listener_cannot_be_waited_for(listener: socket.socket) -> None:
    listener.close()
    with nothing_left_behind(), pytest.raises(ValueError, match="-1"):
        Acceptor(listener, wakeup=Wakeup())


def test_a_selector_that_cannot_be_made_leaves_no_wakeup(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted() -> selectors.BaseSelector:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module, "_ServerSelector", exhausted)
    with nothing_left_behind(), pytest.raises(OSError, match="Too many"):
        Acceptor(listener, wakeup=Wakeup())
    assert signal.set_wakeup_fd(-1) == -1


# --- waiting without the listener -------------------------------------------------------


@pytest.fixture
def acceptor(listener: socket.socket) -> Iterator[Acceptor]:
    with Acceptor(listener, wakeup=Wakeup()) as made:
        yield made


def test_a_rest_is_over_when_its_time_has_come(acceptor: Acceptor) -> None:
    assert acceptor.rest(Pause(0.0), None)
    assert acceptor.rest(Pause(time() + 0.01), None)


def test_a_rest_of_no_limit_is_left_when_the_patience_is_over(acceptor: Acceptor) -> None:
    assert not acceptor.rest(Pause(inf), 0)
    assert not acceptor.rest(Pause(inf), 0.01)


def test_a_rest_does_not_see_clients(acceptor: Acceptor, listener: socket.socket) -> None:
    with knock(listener):
        assert acceptor.wait(None)
        assert not acceptor.rest(Pause(inf), 0)


def test_a_rest_is_over_when_one_of_its_descriptors_is_readable(acceptor: Acceptor) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pause = Pause(inf, (ours.fileno(),))
        assert not acceptor.rest(pause, 0)
        theirs.send(b"x")
        assert acceptor.rest(pause, None)


def test_what_is_watched_beside_ends_the_wait_of_a_rest_for_a_place(acceptor: Acceptor) -> None:
    """And neither the pause nor another kind of rest."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        acceptor.watch(ours)
        theirs.send(b"x")
        pause = Pause(time() + PATIENCE)
        assert not acceptor.rest(pause, 0)
        pause = Pause(time() + PATIENCE, is_for_place=True)
        assert not acceptor.rest(pause, None)
        assert pause.remaining(time())
    assert not acceptor.rest(pause, 0), "it is closed"


def test_a_wake_leaves_a_rest_that_is_not_over(acceptor: Acceptor) -> None:
    acceptor.wake()
    assert not acceptor.rest(Pause(inf), None)
    assert not acceptor.rest(Pause(inf), 0), "the wake was forgotten"


def test_a_wake_during_a_rest_ends_it(listener: socket.socket) -> None:
    def rest() -> bool:
        with Acceptor(listener, wakeup=Wakeup()) as acceptor:
            acceptors.append(acceptor)
            resting.set()
            return acceptor.rest(Pause(inf), None)

    acceptors: list[Acceptor] = []
    resting = threading.Event()
    call = Call(rest)
    assert resting.wait(PATIENCE)
    acceptors[0].wake()
    assert call.result() is False


def test_a_rest_needs_no_wakeup(listener: socket.socket) -> None:
    with Acceptor(listener) as acceptor:
        assert acceptor.rest(Pause(time() + 0.01), None)
        assert not acceptor.rest(Pause(inf), 0)


def test_a_rest_leaves_no_descriptor(acceptor: Acceptor) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, nothing_left_behind():
        acceptor.rest(Pause(inf, (ours.fileno(),)), 0)


# --- signals, in a program of their own -------------------------------------------------

INTERRUPTED_JUST_BEFORE = """
import os, signal, socket, threading
from portico.acceptor import Acceptor, Wakeup

signal.signal(signal.SIGUSR1, lambda *_: None)
listener = socket.create_server(("127.0.0.1", 0))
with Acceptor(listener, wakeup=Wakeup()) as acceptor:
    # Another thread takes the signal, so the system call of this one is not interrupted by it:
    # as if it had come just before.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    taker = threading.Thread(
        target=lambda: (
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]),
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1),
        )
    )
    taker.start()
    assert acceptor.wait(None) is False
    taker.join()
listener.close()
"""


def test_a_signal_that_does_not_interrupt_the_wait_ends_it_all_the_same() -> None:
    done = run_program(INTERRUPTED_JUST_BEFORE)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_listener_is_ready_while_somebody_waits_to_be_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert not is_ready(listener)
        with socket.create_connection(listener.getsockname()):
            eventually(lambda: is_ready(listener))
    assert not is_ready(listener)


# --- a listener that other processes wait for, too ----------------------------------------


class Shared:
    """A listener that knows that it is shared, as a worker's server does."""

    shares_listener = True

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener

    def fileno(self) -> int:
        return self.listener.fileno()


needs_exclusive = pytest.mark.skipif(
    not module.HAS_EXCLUSIVE, reason="the system has no EPOLLEXCLUSIVE"
)


@pytest.fixture
def shared() -> Iterator[Shared]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield Shared(listener)


@needs_exclusive
def test_of_several_that_wait_for_a_shared_listener_one_is_woken(shared: Shared) -> None:
    """A poll(2) would wake all of them for each client.

    A process that is stopped and goes on has all of its threads look again, and then each may find
    the client: so one round of several counts.
    """
    assert any(woken_of_four(shared) == 1 for _ in range(5))


def woken_of_four(shared: Shared) -> int:
    """Have four wait for one client, and return how many of them have seen it."""
    woken: queue.SimpleQueue[None] = queue.SimpleQueue()
    waiting: list[Acceptor] = []
    may_accept = threading.Event()

    def wait() -> None:
        with Acceptor(shared, wakeup=Wakeup()) as acceptor:
            waiting.append(acceptor)
            threads.append(threading.get_native_id())
            if acceptor.wait(None):
                woken.put(None)
                assert may_accept.wait(PATIENCE)  # until then it is there for all to see

    threads: list[int] = []
    calls = [Call(wait) for _ in range(4)]
    eventually(lambda: len(threads) == 4, "all of them begin to wait")
    polls = {each._selector._epoll.fileno() for each in waiting}
    eventually(lambda: all(is_blocked(each, polls) for each in threads), "all of them wait")
    with socket.create_connection(shared.listener.getsockname()):
        woken.get(timeout=PATIENCE)
        for each in waiting:
            each.wake()
        may_accept.set()
        for call in calls:
            call.result()
        shared.listener.accept()[0].close()
    return 1 + woken.qsize()


def is_blocked(thread: int, polls: set[int]) -> bool:
    """Say whether a thread waits for one of these descriptors, and not for the interpreter."""
    number, *arguments = Path(f"/proc/self/task/{thread}/syscall").read_text().split()
    return number not in {"running", "-1"} and int(arguments[0], 16) in polls


@needs_exclusive
def test_who_was_woken_may_come_to_naught_and_the_next_look_finds_the_client(
    shared: Shared,
) -> None:
    with Acceptor(shared) as waiting:
        with socket.create_connection(shared.listener.getsockname()):
            eventually(lambda: waiting.wait(0))
            # It is not taken: the one that was woken has gone.  Here, the epoll object reports it
            # again; another process's would not.
            waiting._selector.select = lambda timeout: []
            assert waiting.wait(0)
        shared.listener.accept()[0].close()
        assert not waiting.wait(0)


@needs_exclusive
def test_the_wakeup_of_a_shared_listener_ends_the_wait(shared: Shared) -> None:
    wakeup = Wakeup()
    with Acceptor(shared, wakeup=wakeup) as waiting:
        wakeup.wake()
        assert not waiting.wait(None)


@needs_exclusive
def test_what_is_watched_beside_a_shared_listener_is_not_it(shared: Shared) -> None:
    one, other = socket.socketpair()
    with one, other, Acceptor(shared) as waiting:
        waiting.watch(one)
        other.send(b"x")
        assert not waiting.wait(None)


@needs_exclusive
def test_a_shared_listener_that_is_closed_cannot_be_waited_for(shared: Shared) -> None:
    shared.listener.close()
    with pytest.raises(ValueError, match="Invalid file descriptor"):
        Acceptor(shared)


@needs_exclusive
def test_one_that_is_closed_while_it_is_watched_is_let_go(shared: Shared) -> None:
    with Acceptor(shared):
        shared.listener.close()
