from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portico import counters as module
from portico.bell import Bell
from portico.counters import STATIONS, Counters, Row, Station
from portico.counts import NO_PREAMBLE, NOBODY, REASONS, Cell, Counts, refusal_cell
from portico.errors import CountersError
from portico.events import RefusalReason
from portico.processes import is_alive
from tests.support import PATIENCE, Call, eventually

HERE = "tcp://127.0.0.1:9000"
THERE = "tls://[::1]:9443"

NEVER_DOWN = (
    "accepted",
    "finished",
    "failed",
    "peer_gone",
    "cut_off",
    "lost",
    "received",
    "sent",
    "refused",
    "served",
)
"""The numbers that only grow."""


@pytest.fixture
def counters() -> Iterator[Counters]:
    with closing(Counters.create(rows=16, stations=4)) as made:
        made.allot([HERE, THERE])
        yield made


def forked(work: Callable[[], object]) -> int:
    """Do something in a child process, which then ends with 0; returns the process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """Wait for a child, and return its exit status; below 0 for the signal that ended it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child does not end")


def serve(station: Station, *cells: int) -> None:
    """Count requests that come in and end in these ways."""
    for cell in cells:
        station.cells[Cell.ACCEPTED] += 1
        station.cells[cell] += 1


def come(station: Station, number: int) -> None:
    """Count requests that come in and stay."""
    station.cells[Cell.ACCEPTED] += number


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208  # of a folder that looking changes


def adds_up(counts: Counts) -> bool:
    parts = counts.finished, counts.failed, counts.peer_gone, counts.cut_off, counts.lost
    return counts.accepted == sum(parts) + counts.active + counts.refused


# ------------------------------------------------------------------------------- rows and totals


def test_what_a_worker_counted_survives_its_sudden_end(counters: Counters) -> None:
    """What was under way is lost, and counted so; its places are free."""
    number = counters.claim()

    def work() -> None:
        station = Row(counters, number).station(HERE)
        serve(station, *[Cell.FINISHED] * 5, Cell.FAILED, refusal_cell(NO_PREAMBLE))
        come(station, 3)
        station.cells[Cell.PLACES] = 3
        os.kill(os.getpid(), signal.SIGKILL)

    child = forked(work)
    assert ended(child) == -signal.SIGKILL
    pulse = counters.pulse(number)
    assert (pulse.process, pulse.served, pulse.active) == (child, 6, 3)
    before = counters.totals()
    assert (before.at[HERE].active, before.at[HERE].lost) == (3, 0)
    assert sum(counters.column(1, Cell.PLACES)) == 3

    assert counters.release(number).lost == 3
    expected = Counts(
        accepted=10, finished=5, failed=1, lost=3, refused_by={**NOBODY, NO_PREAMBLE: 1}
    )
    assert counters.totals().at == {HERE: expected, THERE: Counts()}
    assert counters.totals().sum == expected
    assert sum(counters.column(1, Cell.PLACES)) == 0
    assert counters.claim() == number
    assert counters.totals().sum == expected


def test_each_reason_of_a_refusal_has_a_cell(counters: Counters) -> None:
    station = Row(counters, counters.claim()).station(HERE)
    for times, reason in enumerate(REASONS, 1):
        serve(station, *[refusal_cell(reason)] * times)
    counts = counters.totals().sum
    assert counts.refused_by == {reason: times for times, reason in enumerate(REASONS, 1)}
    assert {*RefusalReason, NO_PREAMBLE} == set(counts.refused_by)
    assert counts.refused == counts.accepted
    assert counts.served == 0
    assert adds_up(counts)


steps = st.lists(
    st.tuples(
        st.sampled_from(["claim", "release", "serve", "come", "bytes", "adopt"]),
        st.integers(0, 63),
        st.sampled_from([HERE, THERE]),
        st.sampled_from([Cell.FINISHED, Cell.FAILED, Cell.CUT_OFF, refusal_cell(REASONS[0])]),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_totals_are_the_sum_of_all_that_was_ever_counted_and_never_go_down(
    told: list[tuple[str, int, str, int]],
) -> None:
    made = Counters.create(rows=4, stations=3)
    try:
        made.allot([HERE, THERE])
        live: list[Row] = []
        truth = {HERE: 0, THERE: 0}
        before = made.totals()
        for step, number, name, cell in told:
            if step == "claim" and len(live) < 4:
                live.append(Row(made, made.claim()))
            elif step == "adopt":  # the one before has no hold on it any more
                with made.inheritable() as text:
                    made = Counters.adopt(text)
                live = [Row(made, row.number) for row in live]
            elif live and step == "release":
                made.release(live.pop(number % len(live)).number)
            elif live and step == "bytes":
                live[number % len(live)].station(name).cells[Cell.RECEIVED] += number
            elif live and step in {"serve", "come"}:
                truth[name] += number
                station = live[number % len(live)].station(name)
                come(station, number) if step == "come" else serve(station, *[cell] * number)
            now = made.totals()
            for was, counts in (
                (before.sum, now.sum),
                *((before.at[at], now.at[at]) for at in truth),
            ):
                assert all(getattr(counts, each) >= getattr(was, each) for each in NEVER_DOWN)
                assert adds_up(counts)
            assert {at: counts.accepted for at, counts in now.at.items()} == truth
            assert now.sum == Counts.sum(now.at.values())
            before = now
    finally:
        made.close()


@pytest.fixture
def patient_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have who reads wait for one that moves totals and is held up in the middle of it."""
    monkeypatch.setattr(module, "READ_PATIENCE", PATIENCE)


@pytest.mark.usefixtures("patient_readers")
@pytest.mark.parametrize("workers", [4])
def test_totals_that_are_read_meanwhile_never_go_down(counters: Counters, workers: int) -> None:
    """Workers count, are killed in the middle of it, and are replaced; a reader looks all along."""
    killed: list[Counts] = []
    ears, mouth = os.pipe()

    def work(number: int) -> None:
        station = Row(counters, number).station(HERE)
        while True:
            serve(station, Cell.FINISHED)

    def has_served(number: int, requests: int) -> bool:
        return counters.pulse(number).served >= requests

    def read() -> None:
        before = counters.totals().sum
        while not select.select([ears], [], [], 0)[0]:
            now = counters.totals().sum
            assert all(getattr(now, each) >= getattr(before, each) for each in NEVER_DOWN)
            before = now

    reader = forked(read)
    for _ in range(6):
        rows = [counters.claim() for _ in range(workers)]
        children = [forked(partial(work, number)) for number in rows]
        for child, number in zip(children, rows, strict=True):
            eventually(partial(has_served, number, counters.pulse(number).served + 100))
            os.kill(child, signal.SIGKILL)
            assert ended(child) == -signal.SIGKILL
            killed.append(counters.release(number))
    os.write(mouth, b".")
    assert ended(reader) == 0
    os.close(ears)
    os.close(mouth)
    assert counters.totals().sum == Counts.sum(killed)
    assert adds_up(counters.totals().sum)
    assert counters.totals().sum.lost <= 6 * workers  # each was in the middle of one


@pytest.mark.usefixtures("patient_readers")
def test_a_reader_waits_while_numbers_are_moved(
    counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a supervisor that was killed in the middle keeps nobody waiting for ever."""
    with counters._moving():
        reader = Call(counters.totals)
        assert reader.is_running()
    assert reader.result().sum == Counts()
    moves = module._Header.MOVES
    counters._memory[moves] += 1  # and there it ended
    monkeypatch.setattr(module, "READ_PATIENCE", 0.0)
    assert counters.totals().sum == Counts()
    counters.release(counters.claim())
    assert counters._memory[moves] % 2 == 0


def test_what_a_worker_forks_counts_nowhere(counters: Counters) -> None:
    number = counters.claim()

    def work() -> None:
        station = Row(counters, number).station(HERE)
        serve(station, Cell.FINISHED)
        assert ended(forked(lambda: serve(station, Cell.FINISHED))) == 0
        assert not station.is_detached

    assert ended(forked(work)) == 0
    assert counters.release(number).accepted == 1


def test_a_heartbeat_is_an_instant_of_the_one_clock(counters: Counters) -> None:
    before = time.monotonic_ns()
    number = counters.claim()
    claimed = counters.pulse(number)
    assert claimed.process == 0
    assert claimed.heartbeat >= before
    assert ended(forked(lambda: Row(counters, number).beat())) == 0
    assert claimed.heartbeat < counters.pulse(number).heartbeat < time.monotonic_ns()


def test_no_row_belongs_to_two_workers(counters: Counters) -> None:
    """Two supervisors claim at once while one takes the place of the other."""
    reader, writer = os.pipe()

    def claim() -> None:
        for _ in range(8):
            os.write(writer, bytes([counters.claim()]))

    assert [ended(child) for child in [forked(claim), forked(claim)]] == [0, 0]
    assert sorted(os.read(reader, 100)) == list(range(16))
    os.close(reader)
    os.close(writer)
    with pytest.raises(CountersError, match="16 workers: no row is left"):
        counters.claim()


def test_rows_of_processes_that_have_ended_can_be_had_again(counters: Counters) -> None:
    """Such as those of a supervisor that was killed, once its workers have ended, too."""
    mine = counters.claim()
    eyes, mouth = os.pipe()

    def work(number: int) -> None:
        Row(counters, number)
        os.close(mouth)
        os.read(eyes, 1)

    def claim() -> None:
        with_worker, without = counters.claim(), counters.claim()
        forked(partial(work, with_worker))
        serve(Station(counters, without, 1), Cell.FINISHED)

    assert ended(forked(claim)) == 0
    eventually(lambda: counters.pulse(1).process)
    assert counters.release_abandoned() == 1
    assert counters.totals().sum.finished == 1
    worker = counters.pulse(1).process
    os.write(mouth, b".")  # have the worker end
    os.close(mouth)
    os.close(eyes)
    eventually(lambda: not is_alive(worker))
    assert counters.release_abandoned() == 1
    assert counters.claim() == mine + 1


def test_a_row_is_abandoned_when_the_number_of_its_process_is_anothers(counters: Counters) -> None:
    """Of one that began at another time."""
    row = counters.claim()
    assert counters.release_abandoned() == 0
    counters.plate(row)[module._Plate.CLAIMANT_BEGAN] -= 1
    assert counters.release_abandoned() == 1
    row = counters.claim()
    Row(counters, row)
    counters.plate(row)[module._Plate.CLAIMANT] = (1 << 22) + 1  # more than any process has
    assert counters.release_abandoned() == 0
    counters.plate(row)[module._Plate.OWNER_BEGAN] -= 1
    assert counters.release_abandoned() == 1


def test_it_is_known_whether_another_supervisor_has_rows(counters: Counters) -> None:
    counters.claim()
    assert not counters.has_rows_of_others()
    child = forked(counters.claim)
    assert ended(child) == 0
    assert counters.has_rows_of_others()
    counters.release_abandoned()
    assert not counters.has_rows_of_others()


# ------------------------------------------------------------------------------------- addresses


def test_an_address_keeps_its_station(counters: Counters) -> None:
    stations = counters.station_of(HERE), counters.station_of(THERE)
    counters.allot([THERE, "unix:/run/third"])
    assert (counters.station_of(HERE), counters.station_of(THERE)) == stations
    assert list(counters.totals().at) == [HERE, THERE, "unix:/run/third"]


def test_a_station_that_nobody_uses_is_given_away_and_its_totals_stay(counters: Counters) -> None:
    number = counters.claim()
    serve(Row(counters, number).station(HERE), Cell.FINISHED)
    counters.allot([THERE, "udp://127.0.0.1:53"])
    with pytest.raises(CountersError, match="3 addresses: expected 3 at the most"):
        counters.allot([THERE, "udp://127.0.0.1:53", "tcp://127.0.0.1:1"])  # HERE is in use
    counters.release(number)
    counters.allot([THERE, "udp://127.0.0.1:53", "tcp://127.0.0.1:1"])
    totals = counters.totals()
    assert totals.sum.finished == 1
    assert [counts.finished for counts in totals.at.values()] == [0, 0, 0]
    with pytest.raises(CountersError, match="expected one that has a station"):
        counters.station_of(HERE)


def test_an_address_that_is_far_too_long_has_no_station(counters: Counters) -> None:
    name = os.fsdecode("é".encode() + b"\xff" + b"x" * (module.NAME_SIZE - 3))
    counters.allot([HERE, THERE, name])
    assert counters.station_of(name)
    with pytest.raises(CountersError, match="504 bytes"):
        counters.allot([HERE, THERE, "y" * (module.NAME_SIZE + 1)])


def test_there_is_a_bell_for_each_address(counters: Counters) -> None:
    bells = [counters.bell_of(counters.station_of(name)) for name in (HERE, THERE)]
    assert None not in bells
    assert bells[0] is not bells[1]


# ------------------------------------------------------------------------- into another program

ADOPT = f"""
import os, signal, sys
from portico.counters import Counters, Row
from portico.counts import Cell
counters = Counters.adopt(sys.argv[1])
assert not any(os.get_inheritable(each) for each in counters.descriptors)
print(counters.totals().sum.finished, counters.station_of({THERE!r}), flush=True)
bell = counters.bell_of(counters.station_of({HERE!r}))
bell.ring()
number = counters.claim()
cells = Row(counters, number).station({THERE!r}).cells
cells[Cell.ACCEPTED] += 7
cells[Cell.FINISHED] += 7
if sys.argv[2:]:
    os.kill(os.getpid(), signal.SIGKILL)
counters.release(number)
"""


@pytest.mark.parametrize("end", [[], ["killed"]])
def test_a_program_that_is_executed_goes_on_with_the_totals(
    counters: Counters, end: list[str]
) -> None:
    serve(Row(counters, counters.claim()).station(HERE), *[Cell.FINISHED] * 5)
    with counters.inheritable() as text:
        done = subprocess.run(
            [sys.executable, "-c", ADOPT, text, *end],
            pass_fds=counters.descriptors,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.stdout == f"5 {counters.station_of(THERE)}\n", done.stderr
    assert done.returncode == (-signal.SIGKILL if end else 0)
    assert not any(os.get_inheritable(each) for each in counters.descriptors)
    assert counters.totals().at[THERE].finished == 7
    assert counters.release_abandoned() == len(end)
    assert counters.totals().sum.finished == 12
    bell = counters.bell_of(counters.station_of(HERE))
    assert bell is not None
    assert os.read(bell.fileno(), 8)  # it rang in the other program


@pytest.mark.parametrize("text", ["", "none", "3;1=4/4", "-1", "3,1=4", "99999999999"])
def test_what_is_no_handing_is_not_adopted(text: str) -> None:
    with pytest.raises(CountersError, match=r"expected what `Counters\.inheritable` gave"):
        Counters.adopt(text)


def test_a_descriptor_that_is_closed_is_not_adopted() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(CountersError, match="Bad file descriptor"):
        Counters.adopt(str(reader))


@pytest.mark.parametrize(
    ("cell", "value", "expected"),
    [
        (0, 1, "expected layout 1 of this version"),
        (1, 2, "expected layout 1 of this version"),
        (4, 8, "expected layout 1 of this version"),
        (2, 1 << 40, "rows and"),
        (3, 0, "rows and"),
        (2, 15, "bytes for 15 rows"),
        (6, 17, "bytes for 16 rows"),
    ],
)
def test_a_mapping_of_another_layout_is_not_adopted(
    counters: Counters, cell: int, value: int, expected: str
) -> None:
    """Nor are its descriptors kept: they are of no use here."""
    copies = [os.dup(each) for each in counters.descriptors]
    os.pwrite(copies[0], struct.pack("=Q", value), 8 * cell)
    with pytest.raises(CountersError, match=expected):
        Counters.adopt(f"{copies[0]},1={copies[1]}/{copies[1]},2={copies[2]}/{copies[2]}")
    for copy in copies:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(copy)


def test_a_file_that_is_too_short_is_not_adopted(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"portico#")
    with pytest.raises(CountersError, match="expected a mapping"):
        Counters.adopt(str(os.open(path, os.O_RDWR)))


@pytest.mark.skipif(not hasattr(fcntl, "F_ADD_SEALS"), reason="nothing can be sealed here")
def test_nobody_can_take_the_memory_away(counters: Counters) -> None:
    """A shorter file would end with SIGBUS whoever reads beyond its end."""
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(counters.descriptors[0], size)


def test_memory_is_used_for_what_is_used() -> None:
    with closing(Counters.create()) as made:
        assert made.stations == STATIONS
        made.allot([HERE])
        made.release(made.claim())
        made.totals()
        used = os.fstat(made.descriptors[0]).st_blocks * 512
    assert used < 256 << 10


def test_systems_without_memfd_and_eventfd_have_files_and_pipes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.delattr(os, "eventfd", raising=False)
    with closing(Counters.create(rows=2, stations=2)) as made:
        made.allot([HERE])
        assert len(made.descriptors) == 3
        number = made.claim()
        assert ended(forked(lambda: serve(Row(made, number).station(HERE), Cell.FAILED))) == 0
        assert made.release(number).failed == 1
        with made.inheritable() as text:
            assert Counters.adopt(text).totals().sum.failed == 1


def test_what_cannot_be_made_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    with pytest.raises((OSError, OverflowError)):
        Counters.create(rows=1 << 60)

    def fail(descriptor: int, size: int) -> None:
        raise OSError("no memory")

    monkeypatch.setattr("mmap.mmap", fail)
    with pytest.raises(OSError, match="no memory"):
        Counters.create(rows=1)
    assert open_descriptors() == before


def test_a_private_mapping_needs_no_descriptor() -> None:
    before = open_descriptors()
    made = Counters.private([HERE, THERE])
    assert open_descriptors() == before
    assert made.descriptors == ()
    assert made.bell_of(made.station_of(HERE)) is None
    serve(Row(made, 0).station(THERE), Cell.FINISHED)
    assert made.totals().at[THERE].finished == 1
    made.release(0)
    made.close()
    assert made.totals().sum.finished == 1


# ------------------------------------------------------------------------------------------ bells


@contextmanager
def ringing(bell: Bell) -> Iterator[Bell]:
    with closing(bell):
        yield bell


@pytest.mark.parametrize("has_eventfd", [True, False])
def test_a_bell_is_heard_until_it_is_hushed(
    monkeypatch: pytest.MonkeyPatch, has_eventfd: bool
) -> None:
    if not has_eventfd:
        monkeypatch.delattr(os, "eventfd", raising=False)
    with ringing(Bell.make()) as bell:
        bell.hush()
        for _ in range(10_000):  # more than a pipe holds
            bell.ring()
        assert os.read(bell.fileno(), 8)
        bell.hush()
        bell.hush()
        with pytest.raises(BlockingIOError):
            os.read(bell.fileno(), 8)
    bell.close()
    assert bell.fileno() < 0


def test_threads_that_wait_for_each_others_stations_are_no_deadlock(counters: Counters) -> None:
    """To the kernel they look like one: it takes the threads of a process for one."""

    def enter(station: int) -> None:
        for _ in range(3000):
            with counters.exclusive(station):
                pass

    def enter_both() -> None:
        calls = [Call(enter, station) for station in (1, 2)]
        for call in calls:
            call.result()

    children = [forked(enter_both) for _ in range(2)]
    assert [ended(child) for child in children] == [0, 0]
