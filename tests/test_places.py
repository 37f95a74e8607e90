from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from random import random
from typing import Any

import pytest

import portico
from portico import address, service, worker
from portico.admission import AdmissionRules
from portico.assembly import share_places
from portico.counters import Counters, Row
from portico.counts import Cell, Totals
from portico.events import RefusalReason
from portico.gate import WhenFull
from portico.listener import open_listener
from portico.opening import station_names
from portico.places import LOOK_AGAIN, SILENCE, SharedGate, SharedPlaces
from portico.service import Assignment, Service
from portico.settings import Settings
from tests.support import PATIENCE, eventually
from tests.test_counters import ended, forked

HERE = "tcp://127.0.0.1:9000"
PEER = ("192.0.2.1", 1)


@pytest.fixture
def counters() -> Iterator[Counters]:
    with closing(Counters.create(rows=16, stations=4)) as made:
        made.allot([HERE])
        yield made


def places(counters: Counters, limit: int, number: int | None = None) -> SharedPlaces:
    """The places as a worker sees them that has just claimed a row."""
    row = Row(counters, counters.claim() if number is None else number)
    return SharedPlaces(row.station(HERE), limit)


def gate(
    counters: Counters, limit: int, when_full: WhenFull = WhenFull.WAIT, **rules: Any
) -> SharedGate:
    """The gate of a worker that has just claimed a row."""
    settings = AdmissionRules(**{"max_connections": 100} | rules)
    return SharedGate(settings, when_full, shared=places(counters, limit))


def is_readable(descriptor: int | None, seconds: float = 0.0) -> bool:
    assert descriptor is not None
    return bool(select.select([descriptor], [], [], seconds)[0])


# -------------------------------------------------------------------------- the limit, for all


@pytest.fixture(params=["at full speed", "slowly"])
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have others do something between adding up and what follows from it."""
    if request.param == "slowly":
        taken: Any = SharedPlaces.taken

        def look_and_sleep(self: SharedPlaces) -> int:
            number: int = taken.fget(self)
            time.sleep(random() / 10_000)
            return number

        monkeypatch.setattr(SharedPlaces, "taken", property(look_and_sleep))


@pytest.mark.usefixtures("pace")
def test_there_are_never_more_than_the_limit_however_many_hammer(counters: Counters) -> None:
    """For each place there is a token in a pipe: who has a place always finds one."""
    limit, workers, times = 2, 4, 400
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, b"." * limit)

    def hammer(number: int) -> None:
        mine, admitted = places(counters, limit, number), 0
        while admitted < times:
            if mine.take():
                os.read(reader, 1)  # raises if there are more than the limit
                admitted += 1
                time.sleep(random() / 10_000)
                os.write(writer, b".")
                mine.leave()
            os.sched_yield()

    rows = [counters.claim() for _ in range(workers)]
    children = [forked(partial(hammer, number)) for number in rows]
    assert [ended(child) for child in children] == [0] * workers
    assert len(os.read(reader, 100)) == limit
    assert sum(counters.column(1, Cell.PLACES)) == 0
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("pace")
def test_one_of_those_who_come_at_the_same_moment_gets_the_last_place(counters: Counters) -> None:
    """They raise their cells, see each other, take back, and all of them could stay out."""
    workers, rounds = 3, 500
    go, results, end = os.pipe(), os.pipe(), os.pipe()

    def come(number: int) -> None:
        mine = places(counters, 1, number)
        for _ in range(rounds):
            os.read(go[0], 1)
            is_in = mine.take()
            os.write(results[1], b"1" if is_in else b"0")
            os.read(end[0], 1)
            if is_in:
                mine.leave()
            os.write(results[1], b".")

    children = [forked(partial(come, counters.claim())) for _ in range(workers)]

    def gathered() -> bytes:
        told = b""
        while len(told) < workers:
            told += os.read(results[0], workers - len(told))
        return told

    for _ in range(rounds):
        os.write(go[1], b"." * workers)
        assert gathered().count(b"1") == 1
        os.write(end[1], b"." * workers)
        gathered()
    assert [ended(child) for child in children] == [0] * workers
    for descriptor in (*go, *results, *end):
        os.close(descriptor)


def test_who_sees_a_place_taken_that_is_given_back_tries_again(
    counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker has raised its cell, and takes that back, while this one adds up."""
    mine, other = places(counters, 1), places(counters, 1)
    settle = SharedPlaces._settle_order

    def meet(each: SharedPlaces) -> None:
        other._station.cells[Cell.PLACES] += 1
        settle(each)

    @contextmanager
    def part(self: Counters, station: int) -> Iterator[None]:
        monkeypatch.undo()
        other._station.cells[Cell.PLACES] -= 1
        yield

    monkeypatch.setattr(SharedPlaces, "_settle_order", meet)
    monkeypatch.setattr(Counters, "exclusive", part)
    assert mine.take()
    assert not other.take()
    assert mine.taken == 1


def test_who_takes_a_place_back_tells_those_who_saw_it(
    counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = places(counters, 1), places(counters, 1)
    descriptor = other.begin_to_wait()
    settle = SharedPlaces._settle_order

    def meet(each: SharedPlaces) -> None:
        other._station.cells[Cell.PLACES] = 1
        settle(each)

    monkeypatch.setattr(SharedPlaces, "_settle_order", meet)
    assert not mine.take()
    assert is_readable(descriptor)


# ----------------------------------------------------------------------------------- the gate


def test_the_places_of_two_gates_are_the_same(counters: Counters) -> None:
    here, there = gate(counters, 2, WhenFull.REFUSE), gate(counters, 2, WhenFull.REFUSE)
    assert here.admit(PEER, 0.0) is None
    assert there.admit(PEER, 0.0) is None
    assert here.admit(PEER, 0.0) is RefusalReason.TOO_MANY
    assert here.is_full
    assert (here.active, there.active) == (1, 1)
    there.leave(PEER)
    assert here.admit(PEER, 0.0) is None


def test_a_gate_has_limits_of_its_own(counters: Counters) -> None:
    here = gate(counters, 5, WhenFull.REFUSE, max_connections=1)
    there = gate(counters, 5, WhenFull.REFUSE, max_connections_per_peer=1)
    assert (here.admit(PEER, 0.0), there.admit(PEER, 0.0)) == (None, None)
    assert here.admit(PEER, 0.0) is RefusalReason.TOO_MANY
    assert there.admit(PEER, 0.0) is RefusalReason.TOO_MANY_OF_PEER
    assert counters.column(1, Cell.PLACES).tolist() == [1, 1]


def test_who_finds_no_place_has_not_come(counters: Counters) -> None:
    """It takes none of those that may come in a second, nor of those of its peer."""
    other = gate(counters, 1, WhenFull.REFUSE)
    here = gate(
        counters,
        1,
        WhenFull.REFUSE,
        accept_rate=1.0,
        accept_burst=1,
        max_connections_per_peer=1,
    )
    assert other.admit(PEER, 0.0) is None
    assert here.admit(PEER, 0.0) is RefusalReason.TOO_MANY
    other.leave(PEER)
    assert here.admit(PEER, 0.0) is None


def test_a_place_is_reserved_before_a_client_is_accepted(counters: Counters) -> None:
    here, there = gate(counters, 1, accept_rate=1.0), gate(counters, 1)
    assert here.reserve()
    assert not there.reserve()
    assert there.await_room() is not None
    assert here.admit(PEER, 0.0) is None  # uses it
    assert not there.reserve()
    here.leave(PEER)
    assert here.reserve()
    assert here.admit(PEER, 0.0) is RefusalReason.TOO_FAST  # gives it back
    assert there.reserve()
    there.forgo()
    there.forgo()
    assert sum(counters.column(1, Cell.PLACES)) == 0


def test_what_was_open_already_has_a_place(counters: Counters) -> None:
    here = gate(counters, 1)
    here.take_over(PEER)
    here.take_over(PEER)
    assert counters.column(1, Cell.PLACES).tolist() == [2]
    here.leave(PEER)
    assert here.is_full
    here.leave(PEER)
    assert here.await_room() is None


# ------------------------------------------------------------------------------------- waiting


def test_who_waits_is_woken_when_another_process_gives_a_place_back(counters: Counters) -> None:
    go, stop = os.pipe()
    number = counters.claim()

    def leave() -> None:
        other = places(counters, 1, number)
        assert other.take()
        os.read(go, 1)
        other.leave()

    child = forked(leave)
    here = gate(counters, 1)
    eventually(lambda: here.is_full)
    room = here.await_room()
    assert not is_readable(room)
    os.write(stop, b".")
    assert is_readable(room, PATIENCE)
    assert here.await_room() is None
    assert ended(child) == 0
    os.close(go)
    os.close(stop)


def test_who_waits_is_woken_when_a_killed_worker_is_buried(counters: Counters) -> None:
    number = counters.claim()

    def die() -> None:
        assert places(counters, 1, number).take()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(die)) == -signal.SIGKILL
    here = gate(counters, 1)
    room = here.await_room()
    assert not is_readable(room)
    counters.release(number)
    assert is_readable(room)
    assert here.reserve()


def test_all_who_wait_have_a_look_when_there_is_room_for_more_than_one(counters: Counters) -> None:
    """The first to hear the bell may hush it, before another one has heard it."""
    full, first, second = gate(counters, 2), gate(counters, 2), gate(counters, 2)
    for _ in range(2):
        assert full.admit(PEER, 0.0) is None
    rooms = first.await_room(), second.await_room()
    full.leave(PEER)
    full.leave(PEER)
    assert is_readable(rooms[0])
    first._shared._bell.hush()
    assert first.reserve()
    assert is_readable(rooms[1])
    assert second.reserve()
    first._shared._bell.hush()
    full.await_room()
    second.forgo()
    assert is_readable(rooms[0])


def test_there_may_be_room_by_the_time_that_one_waits(
    counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, here = gate(counters, 1), gate(counters, 1)
    assert other.admit(PEER, 0.0) is None
    begin = SharedPlaces.begin_to_wait

    def meanwhile(self: SharedPlaces) -> int:
        other.leave(PEER)
        return begin(self)

    monkeypatch.setattr(SharedPlaces, "begin_to_wait", meanwhile)
    assert here.await_room() is None


def test_a_gate_that_is_closed_says_whether_somebody_waited(counters: Counters) -> None:
    here = gate(counters, 1)
    assert not here.close()
    here.take_over(PEER)
    assert here.await_room() is not None
    assert here.close()
    assert not here.close()


# --------------------------------------------------------------------------------- real workers


class Stay(portico.StreamRequestHandler):
    """Says that it is there, and stays until its peer is gone."""

    def handle(self) -> None:
        self.wfile.write(b"%d\n" % os.getpid())
        for line in self.rfile:
            self.wfile.write(line)


class Workers:
    """Processes that serve one listener, each as a service with a row of the same mapping."""

    def __init__(self, number: int, limit: int | None = None, **settings: Any) -> None:
        self.limit = limit  # of each worker
        self.settings = Settings(**settings)
        self.opened = open_listener(address.parse("tcp://127.0.0.1:0"), backlog=64)
        self.where: Any = self.opened.socket.getsockname()
        self.counters = Counters.create(rows=16, stations=2)
        self.counters.allot(station_names([self.opened]))
        self.number = number
        self.children: dict[int, int] = {}
        for _ in range(number):
            self.start()

    def start(self) -> int:
        number = self.counters.claim()
        child = forked(partial(self._work, number))
        self.children[child] = number
        eventually(lambda: self.counters.pulse(number).process)
        return child

    def _work(self, number: int) -> None:
        if self.limit is not None:
            settled = replace(self.settings.resolved(1000), max_connections=self.limit)
            vars(service)["share_places"] = lambda *_: (settled, self.number * (self.limit or 0))
        listener = self.opened.lend()
        assignment = Assignment(Stay, self.opened.place.address, self.settings)
        with Service(
            [assignment], [listener], row=Row(self.counters, number), workers=self.number
        ) as serving:
            with serving.stopped_by_signals():
                serving.run()

    def end(self, child: int, number: int = signal.SIGTERM) -> None:
        os.kill(child, number)
        assert ended(child) in {0, -number}
        self.counters.release(self.children.pop(child))

    def close(self) -> None:
        for child in tuple(self.children):
            self.end(child, signal.SIGKILL)
        self.counters.close()
        self.opened.close()

    def totals(self) -> Totals:
        return self.counters.totals()


def greeted(clients: Sequence[socket.socket], seconds: float = 0.0) -> list[socket.socket]:
    """Those of the clients to whom somebody has said something."""
    return select.select(clients, [], [], seconds)[0]


def are_greeted(clients: Sequence[socket.socket], number: int) -> bool:
    """Whether it is so many of them; never more."""
    now = len(greeted(clients))
    assert now <= number
    return now == number


@pytest.mark.parametrize("engine", ["threads", "pool", "green", "forks"])
def test_clients_wait_for_a_place_among_those_of_all_workers(engine: str) -> None:
    """One that is given back in one worker is had by a client of any."""
    with (
        closing(Workers(2, engine=engine, max_connections=3, when_full="wait")) as workers,
        ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(socket.create_connection(workers.where, PATIENCE)) for _ in range(6)
        ]
        for left in range(6, 0, -1):
            eventually(partial(are_greeted, clients, min(3, left)))
            leaving = greeted(clients)[0]
            assert int(leaving.recv(64))
            clients.remove(leaving)
            leaving.close()
        eventually(lambda: workers.totals().sum.active == 0)
        assert workers.totals().sum.accepted == workers.totals().sum.served == 6


def test_a_client_has_the_place_of_a_worker_that_was_killed() -> None:
    with (
        closing(Workers(2, engine="threads", max_connections=1, when_full="wait")) as workers,
        socket.create_connection(workers.where, PATIENCE) as first,
    ):
        child = int(first.recv(64))
        with socket.create_connection(workers.where, PATIENCE) as second:
            assert not greeted([second], 0.1)
            workers.end(child, signal.SIGKILL)
            assert int(second.recv(64)) in workers.children
        assert workers.totals().sum.lost == 1


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_who_finds_no_place_in_any_worker_is_refused(engine: str) -> None:
    settings: dict[str, Any] = {"when_full": "refuse", "farewell": b"full\n"}
    with (
        closing(Workers(2, engine=engine, max_connections=2, **settings)) as workers,
        ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(socket.create_connection(workers.where, PATIENCE)) for _ in range(6)
        ]
        words = [client.recv(64) for client in clients]
        assert words.count(b"full\n") == 4
        eventually(lambda: workers.totals().sum.refused == 4)
        assert workers.totals().sum.refused_by[RefusalReason.TOO_MANY] == 4


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_who_comes_has_the_place_of_one_that_is_idle(engine: str) -> None:
    with (
        closing(Workers(2, engine=engine, max_connections=2, when_full="shed")) as workers,
        ExitStack() as stack,
    ):
        clients: list[socket.socket] = []
        for _ in range(6):
            client = stack.enter_context(socket.create_connection(workers.where, PATIENCE))
            assert int(client.recv(64)) in workers.children
            clients.append(client)
        eventually(
            lambda: len(greeted(clients)) >= 4
        )  # one for each that came, or one of each worker


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_a_client_is_served_although_the_worker_that_it_woke_cannot(engine: str) -> None:
    """It has no connection to close; another worker has the one that could make room."""
    with (
        closing(Workers(3, engine=engine, max_connections=1, when_full="shed")) as workers,
        ExitStack() as stack,
    ):
        for _ in range(8):
            client = stack.enter_context(socket.create_connection(workers.where, PATIENCE))
            assert int(client.recv(64)) in workers.children


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_a_worker_without_descriptors_left_leaves_clients_to_the_others(engine: str) -> None:
    with (
        closing(Workers(2, limit=2, engine=engine)) as workers,
        ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(socket.create_connection(workers.where, PATIENCE)) for _ in range(4)
        ]
        served = [int(client.recv(64)) for client in clients]
        assert sorted(map(served.count, workers.children)) == [2, 2]


def test_a_bell_that_nobody_has_rung_keeps_no_client_waiting() -> None:
    """A worker was killed after it had given its place back, and before it rang."""
    with (
        closing(Workers(1, engine="threads", max_connections=1, when_full="wait")) as workers,
        socket.create_connection(workers.where, PATIENCE) as client,
    ):
        assert int(client.recv(64)) in workers.children
        other = Row(workers.counters, workers.counters.claim())
        station = other.station(station_names([workers.opened])[0])
        station.cells[Cell.PLACES] = 1
        client.close()
        with socket.create_connection(workers.where, PATIENCE) as second:
            (row,) = workers.children.values()
            eventually(lambda: workers.counters.cells(row, 1)[Cell.AWAITS])
            station.cells[Cell.PLACES] = 0
            assert int(second.recv(64)) in workers.children
    assert 0 < LOOK_AGAIN < PATIENCE


# ------------------------------------------------------------------------------ what is shared


def test_each_worker_has_as_many_as_its_descriptors_allow_and_all_have_their_sum() -> None:
    asked = Settings()
    settled = asked.resolved(1000)
    assert isinstance(settled.max_connections, int)
    assert share_places(asked, settled, 1000, 4) == (settled, 4 * settled.max_connections)


@pytest.mark.parametrize(("descriptors", "own"), [(-1, 5000), (1 << 20, 5000), (1000, 750)])
def test_a_number_holds_for_all_workers(descriptors: int, own: int) -> None:
    asked = Settings(max_connections=5000)
    settled, most = share_places(asked, asked, descriptors, 4)
    assert most == 5000
    assert isinstance(settled.max_connections, int)
    assert own * 0.9 < settled.max_connections <= own * 1.34


def test_two_listeners_of_one_name_have_a_station_each() -> None:
    with closing(open_listener(address.parse("tcp://127.0.0.1:0"))) as opened:
        first, second, third = station_names([opened] * 3)
    assert (second, third) == (f"{first} 2", f"{first} 3")


# ------------------------------------------------------------------------ who has how many


def test_a_worker_leads_that_has_clearly_more_than_its_share(counters: Counters) -> None:
    rows = [Row(counters, counters.claim()) for _ in range(2)]
    one, other = (SharedPlaces(row.station(HERE), 100, workers=2) for row in rows)
    leads = []
    for each, number in ((one, 2), (one, 8), (other, 6)):
        for _ in range(number):
            assert each.take()
        leads.append((one.leads, other.leads))
    # Two may come to the same one by chance.
    assert leads == [(False, False), (True, False), (False, False)]


def test_nobody_is_left_to_workers_that_give_no_sign_of_life(
    counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(counters, counters.claim()) for _ in range(2)]
    one, _ = (SharedPlaces(row.station(HERE), 100, workers=2) for row in rows)
    for _ in range(10):
        assert one.take()
    leads = [one.leads]
    later = time.monotonic_ns() + int((SILENCE + 1) * 1e9)
    monkeypatch.setattr("portico.places.monotonic_ns", lambda: later)
    leads.append(one.leads)
    assert leads == [True, False]
    assert SILENCE > worker.BEAT_INTERVAL


def test_a_worker_alone_never_leads(counters: Counters) -> None:
    alone = places(counters, 100)
    for _ in range(50):
        assert alone.take()
        assert not alone.leads


def test_who_leaves_clients_to_others_learns_that_it_leads_no_more(counters: Counters) -> None:
    row, _ = (Row(counters, counters.claim()) for _ in range(2))
    shared = SharedPlaces(row.station(HERE), 100, workers=2)
    leading = SharedGate(AdmissionRules(max_connections=100), WhenFull.WAIT, shared=shared)
    for _ in range(4):
        assert leading.reserve()
        assert leading.admit(PEER, 0.0) is None
    assert leading.leads
    told: list[bool] = []
    leading.on_relief = lambda: told.append(leading.leads)
    for _ in range(4):
        leading.leave(PEER)
    assert told == [False], "once"


def test_connections_that_stay_are_shared() -> None:
    """Although the worker that the system woke first would be fast enough for all of them."""
    with closing(Workers(2, engine="green")) as workers, ExitStack() as stack:
        eventually(lambda: workers.counters.beating(1) == 2, "each counts on the other")
        served_by: Counter[bytes] = Counter()
        for _ in range(400):  # the second may not have begun to serve with the first of them
            client = stack.enter_context(socket.create_connection(workers.where, PATIENCE))
            served_by[client.recv(64)] += 1
            if len(served_by) == 2:
                break
        assert len(served_by) == 2
