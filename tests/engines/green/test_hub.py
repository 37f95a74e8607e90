from __future__ import annotations

import asyncio
import os
import select
import selectors
import signal
import socket
import threading
from functools import partial
from time import monotonic
from typing import Any

import pytest
from greenlet import getcurrent, greenlet

from portico.engines.green.hub import Alarm, Hub, running
from portico.engines.green.poller import PortablePoller, make_poller
from portico.engines.green.sockets import GreenSocket
from tests.engines.green.conftest import Stage, make_hub
from tests.support import PATIENCE, Call


def test_a_greenlet_is_resumed_inside_select(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """No handle, callback or future is made for it: the loop does not come round meanwhile."""
    ours, peer = stage.pair()
    select, selects = stage.hub.poller.select, []

    def count(timeout: float | None) -> Any:
        selects.append(timeout)
        return select(timeout)

    monkeypatch.setattr(stage.hub.poller, "select", count)

    def read() -> int:
        before = 0
        for _ in range(10):
            peer.send(b"x")
            ours.recv(1)
            before = before or len(selects)
        return len(selects) - before

    assert stage.run(read) == [0]


def test_call_soon_from_a_greenlet_ends_the_select_in_progress(stage: Stage) -> None:
    """It would wait for ever: nothing else happens."""
    ours, peer = stage.pair()
    called = threading.Event()

    def read() -> None:
        ours.recv(1)
        ours.recv(1)  # the second one is resumed inside a select that has no timeout
        stage.hub.call_soon(finish)
        ours.recv(1)

    def finish() -> None:
        called.set()
        peer.send(b"c")

    peer.send(b"a")
    stage.hub.call_soon(peer.send, b"b")
    stage.run(read)
    assert called.is_set()


def test_call_later_from_a_greenlet_ends_the_select_in_progress_in_time(stage: Stage) -> None:
    ours, peer = stage.pair()

    def read() -> bytes:
        ours.recv(1)
        stage.hub.call_later(0.01, peer.send, b"c")
        return ours.recv(1)

    stage.hub.call_soon(lambda: stage.hub.call_soon(peer.send, b"b"))
    assert stage.run(read) == [b"c"]


def test_an_earlier_timer_of_a_greenlet_comes_before_a_later_one_of_asyncio(stage: Stage) -> None:
    ours, peer = stage.pair()
    far = stage.hub.call_later(PATIENCE, stage.hub.stop)

    def read() -> None:
        peer.send(b"a")
        ours.recv(1)
        stage.hub.sleep(0.01)

    stage.run(read)
    assert not far.cancelled()
    far.cancel()


def test_call_soon_threadsafe_ends_a_select(stage: Stage) -> None:
    ours, peer = stage.pair()

    def read() -> bytes:
        thread = threading.Thread(
            target=stage.hub.call_soon_threadsafe, args=(peer.send, b"a"), daemon=True
        )
        thread.start()
        data = ours.recv(1)
        thread.join()
        return data

    assert stage.run(read) == [b"a"]


def test_stop_from_a_greenlet_ends_the_loop(hub: Hub) -> None:
    ended = []

    def stop() -> None:
        hub.stop()
        hub.sleep(0)
        ended.append("never")

    spawned = greenlet(stop)
    hub.call_soon(spawned.switch)
    hub.run_forever()
    assert not ended
    spawned.throw()


def test_asyncio_runs_beside_greenlets(stage: Stage) -> None:
    """Streams, tasks and timers of asyncio answer a green client on the same thread."""

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        await asyncio.sleep(0.001)
        writer.write(line.upper())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = stage.hub.run_until_complete(asyncio.start_server(shout, "127.0.0.1", 0))

    def ask() -> bytes:
        with GreenSocket() as client:
            client.connect(server.sockets[0].getsockname())
            client.sendall(b"hello\n")
            with client.makefile("rb") as file:
                line: bytes = file.readline()
                assert file.read() == b""
        return line

    assert stage.run(ask, ask, ask) == [b"HELLO\n"] * 3
    server.close()
    stage.hub.run_until_complete(server.wait_closed())


def test_add_reader_and_remove_reader_work_beside_greenlets(stage: Stage) -> None:
    reader, writer = os.pipe()
    heard: list[bytes] = []
    done = Alarm

    def listen() -> None:
        alarm = done(stage.hub)

        def hear() -> None:
            heard.append(os.read(reader, 1))
            stage.hub.remove_reader(reader)
            alarm.ring()

        stage.hub.add_reader(reader, hear)
        os.write(writer, b"x")
        alarm.wait()

    stage.run(listen)
    assert heard == [b"x"]
    assert not stage.hub.remove_reader(reader)
    os.close(reader)
    os.close(writer)


def test_a_signal_handler_of_asyncio_runs_while_greenlets_wait(stage: Stage) -> None:
    ours, peer = stage.pair()
    stage.hub.add_signal_handler(signal.SIGUSR1, peer.send, b"s")

    def read() -> bytes:
        signal.raise_signal(signal.SIGUSR1)
        return ours.recv(1)

    assert stage.run(read) == [b"s"]
    assert stage.hub.remove_signal_handler(signal.SIGUSR1)


def test_hubs_run_in_several_threads(poller: str) -> None:
    """Each has its own greenlets; a socket of one is not a matter of the other."""

    def serve() -> tuple[int, bytes]:
        hub = make_hub(poller)
        stage = Stage(hub)
        ours, peer = stage.pair()

        def read() -> bytes:
            assert running() is hub
            stage.hub.call_later(0.01, peer.send, b"x")
            return ours.recv(1)

        (data,) = stage.run(read)
        stage.close()
        hub.close()
        assert running() is None
        return threading.get_ident(), data

    calls = [Call(serve) for _ in range(4)]
    results = [call.result() for call in calls]
    assert [data for _, data in results] == [b"x"] * 4
    assert len({ident for ident, _ in results}) > 1 or len(results) == 4


def test_a_base_exception_of_a_greenlet_leaves_the_loop_and_loses_no_event(stage: Stage) -> None:
    """Two are ready in one batch; the first one raises; the second goes on in the next run."""
    first, peer_of_first = stage.pair()
    second, peer_of_second = stage.pair()
    ended: list[bytes] = []

    def leave() -> None:
        first.recv(1)
        raise KeyboardInterrupt

    def stay() -> None:
        ended.append(second.recv(1))
        stage.hub.stop()

    stage.spawn(leave)
    stage.spawn(stay)
    stage.hub.call_soon(stage.hub.stop)
    stage.hub.run_forever()  # both wait now
    peer_of_first.send(b"1")
    peer_of_second.send(b"2")
    for ours in (first, second):
        assert select.select([ours], [], [], PATIENCE)[0]
    with pytest.raises(KeyboardInterrupt):
        stage.hub.run_forever()
    if not ended:
        stage.hub.run_forever()
    assert ended == [b"2"]


def test_giving_way_lets_everybody_else_run_first(stage: Stage) -> None:
    order: list[str] = []

    def act(name: str) -> None:
        for _ in range(3):
            order.append(name)
            stage.hub.give_way()

    stage.run(lambda: act("a"), lambda: act("b"))
    assert order == ["a", "b"] * 3


def test_a_greenlet_that_gave_way_and_is_interrupted_is_not_resumed_twice(stage: Stage) -> None:
    trace: list[str] = []

    def give() -> None:
        try:
            stage.hub.give_way()
        except TimeoutError:
            trace.append("interrupted")
        before = monotonic()
        stage.hub.sleep(0.01)
        trace.append("slept" if monotonic() >= before + 0.009 else "woken")

    def act() -> None:
        stage.hub.sleep(0)
        waiting = stage.spawn(give)
        stage.hub.call_soon(waiting.throw, TimeoutError())
        while len(trace) < 2:
            stage.hub.sleep(0.01)

    stage.run(act)
    assert trace == ["interrupted", "slept"]


def test_an_alarm_that_rang_early_is_not_missed(stage: Stage) -> None:
    def wait() -> bool:
        alarm = Alarm(stage.hub)
        alarm.ring()
        alarm.wait()
        return alarm.has_rung

    assert stage.run(wait) == [True]


def test_waiting_for_a_future_returns_its_result_or_raises_its_error(stage: Stage) -> None:
    async def work(value: int) -> int:
        await asyncio.sleep(0)
        if not value:
            raise ZeroDivisionError
        return value

    def wait() -> int:
        with pytest.raises(ZeroDivisionError):
            stage.hub.wait_for(stage.hub.create_task(work(0)))
        return stage.hub.wait_for(stage.hub.create_task(work(7)))

    assert stage.run(wait) == [7]


def test_an_interrupted_wait_cancels_what_it_waited_for(stage: Stage) -> None:
    future: asyncio.Future[None] = stage.hub.create_future()

    def wait() -> None:
        current = getcurrent()
        stage.hub.call_soon(current.throw, TimeoutError())
        with pytest.raises(TimeoutError):
            stage.hub.wait_for(future)

    stage.run(wait)
    assert future.cancelled()


def test_a_thread_works_for_a_greenlet(stage: Stage) -> None:
    here = threading.get_ident()
    ((there, name),) = stage.run(
        lambda: stage.hub.run_in_thread(lambda: (threading.get_ident(), "result"))
    )
    assert there != here
    assert name == "result"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_hub_is_used_in_a_forked_child_and_still_by_its_parent(stage: Stage) -> None:
    """Made before the fork, run after it, in both: neither takes the other's events."""
    ours, peer = stage.pair()

    def echo_once() -> None:
        ours.sendall(ours.recv(8))

    peer.send(b"before")
    stage.run(echo_once)
    assert peer.recv(8) == b"before"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            ours_of_child, peer_of_child = stage.pair()
            peer_of_child.send(b"child")
            stage.hub.call_soon_threadsafe(lambda: None)
            if stage.run(lambda: ours_of_child.recv(8)) == [b"child"]:
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    peer.send(b"after")
    stage.run(echo_once)
    assert peer.recv(8) == b"after"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_greenlet_that_forks_goes_on_in_the_child_with_sockets_that_block(stage: Stage) -> None:
    """The other greenlets stay with the parent: nothing is answered twice."""
    ours, peer = stage.pair()
    other, peer_of_other = stage.pair()

    def fork() -> int:
        for _ in range(3):  # the short way of waiting, too
            stage.hub.call_soon(peer.send, b"1")
            assert ours.recv(1) == b"1"
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert running() is None
                ours.sendall(b"from the child")
                ours.recv(1)  # blocks until the parent has seen it
                status = 0
            finally:
                os._exit(status)
        peer_of_other.send(b"other")
        return child

    def answer() -> None:
        other.sendall(other.recv(8).upper())

    child, _ = stage.run(fork, answer)
    assert peer.recv(64) == b"from the child"
    peer.send(b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert peer_of_other.recv(8) == b"OTHER"


def test_greenlets_and_asyncio_have_their_turns_in_one_batch(stage: Stage) -> None:
    """Each message that is there at once is passed on once, whoever waits for it."""
    pairs = [stage.pair() for _ in range(9)]
    ours, peers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    rounds = 5
    watched, bell = socket.socketpair()
    watched.setblocking(False)
    seen: list[bytes] = []
    stage.hub.add_reader(watched, lambda: seen.append(watched.recv(1)))

    def send_all() -> None:
        for peer in peers[:4]:
            peer.send(b"x")
        bell.send(b"x")
        for peer in peers[4:]:
            peer.send(b"x")

    def read(number: int) -> list[bytes]:
        received = []
        for turn in range(rounds):
            if number == 0:
                stage.hub.call_later(0.01, send_all)
            if number % 4 == 3:
                ours[number].settimeout(PATIENCE if turn % 2 else None)
            received.append(ours[number].recv(10))
        return received

    try:
        results = stage.run(*(partial(read, number) for number in range(len(pairs))))
    finally:
        stage.hub.remove_reader(watched)
        watched.close()
        bell.close()
    assert b"".join(b"".join(each) for each in results) == b"x" * rounds * len(pairs)
    assert len(seen) >= rounds - 1  # the last may come after the last greenlet has ended


def test_a_closed_hub_takes_no_more_calls_and_says_nothing(hub: Hub) -> None:
    hub.close()
    hub.call_anywhere(lambda: None)
    assert hub.is_closed()


def test_a_greenlet_of_a_hub_that_does_not_run_is_told(hub: Hub) -> None:
    with pytest.raises(RuntimeError, match="does not run"):
        hub.greenlet.switch()


class TestSelector:
    """What asyncio asks of its selector, and what other code may ask."""

    def test_registering(self, hub: Hub) -> None:
        reader, writer = socket.socketpair()
        poller = hub.poller
        with reader, writer:
            key = poller.register(reader, selectors.EVENT_READ, "data")
            assert poller.get_key(reader) == key
            assert poller.get_map()[reader.fileno()] is key
            with pytest.raises(KeyError):
                poller.register(reader, selectors.EVENT_READ)
            assert poller.select(0) == []
            writer.send(b"x")
            assert poller.select(PATIENCE) == [(key, selectors.EVENT_READ)]
            key = poller.modify(reader, selectors.EVENT_READ | selectors.EVENT_WRITE, "more")
            assert poller.select(PATIENCE) == [(key, selectors.EVENT_READ | selectors.EVENT_WRITE)]
            assert poller.unregister(reader).data == "more"
            assert poller.select(0) == []
            with pytest.raises(KeyError):
                poller.unregister(reader)

    def test_an_error_is_reported_to_whoever_waits(self, hub: Hub) -> None:
        reader, writer = socket.socketpair()
        with reader:
            key = hub.poller.register(reader, selectors.EVENT_READ)
            writer.close()
            assert hub.poller.select(PATIENCE) == [(key, selectors.EVENT_READ)]
            hub.poller.unregister(reader)

    @pytest.mark.parametrize("events", [0, 8])
    def test_unknown_events_are_refused(self, hub: Hub, events: int) -> None:
        with pytest.raises(ValueError, match="EVENT_READ"):
            hub.poller.register(0, events)

    @pytest.mark.parametrize("fileobj", [-1, object(), "3"])
    def test_what_is_no_descriptor_is_refused(self, hub: Hub, fileobj: int) -> None:
        with pytest.raises(ValueError, match="descriptor"):
            hub.poller.register(fileobj, selectors.EVENT_READ)

    def test_a_closed_descriptor_can_be_unregistered(self, hub: Hub) -> None:
        reader, writer = os.pipe()
        hub.poller.register(reader, selectors.EVENT_READ)
        os.close(reader)
        os.close(writer)
        assert hub.poller.unregister(reader).fd == reader

    def test_a_green_descriptor_is_not_asyncio_s(self, stage: Stage) -> None:
        """Both at once would take the other's events away."""
        ours, peer = stage.pair()

        def read() -> None:
            ours.recv(1)
            with pytest.raises((FileExistsError, KeyError)):
                stage.hub.add_reader(ours.fileno(), print)

        peer.send(b"x")
        stage.run(read)


@pytest.mark.parametrize("wish", ["portable", "select"])
def test_the_environment_may_ask_for_a_portable_poller(
    wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTICO_POLLER", wish)
    poller = make_poller()
    assert isinstance(poller, PortablePoller)
    poller.close()
