from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Self

import pytest

from portico.address import parse
from portico.channel import Channel
from portico.configuration import Configuration, ProcessSettings
from portico.counters import Counters
from portico.listener import OpenListener, open_listener
from portico.supervision import Generation, Stage, Worker
from portico.worker import INTERRUPT_SIGNAL
from portico.workers import SELF_DOUBT, Process, Reading, Workers
from tests.support import PATIENCE, eventually, nothing_left_behind

READING = Reading(1, Configuration(process=ProcessSettings(), services=()), (), ())


class Changes:
    """What the workers have made of a generation."""

    def __init__(self) -> None:
        self.generation = Generation(1)

    def __call__(self, number: int, change: Callable[[Generation], Generation]) -> None:
        assert number == 1
        self.generation = change(self.generation)


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
def workers(changes: Changes) -> Iterator[Workers]:
    counters = Counters.create(rows=1)  # whose mapping lasts as long as anybody has it
    with nothing_left_behind():
        made = Workers(changes, lambda: None)
        made.counters = counters
        yield made
    counters.close()


def test_a_worker_for_which_there_is_no_row_is_a_failure(
    workers: Workers, changes: Changes, capsys: pytest.CaptureFixture[str]
) -> None:
    workers.counters.claim()
    workers.start(READING, 1)
    assert list(workers) == []
    assert changes.generation.failures == 1
    assert changes.generation.reason.startswith("worker 1 cannot be started: ")
    assert changes.generation.reason in capsys.readouterr().err


def test_a_worker_that_the_system_does_not_grant_is_a_failure_and_gives_its_row_back(
    workers: Workers, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError("no process is left")

    monkeypatch.setattr(os, "fork", refuse)
    for _ in range(2):
        workers.start(READING, 1)
        assert changes.generation.reason == "worker 1 cannot be started: no process is left"


class Unlendable(OpenListener):
    """A listener for which the system has no descriptor more."""

    def lend(self) -> Self:
        raise OSError(errno.EMFILE, "too many open files")


def test_a_child_that_fails_before_it_can_work_ends_and_is_no_second_supervisor(
    workers: Workers, changes: Changes, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever it raises stays in it: the loop of the supervisor is further up."""
    parent = os.getpid()
    opened = open_listener(parse("tcp://127.0.0.1:0"))
    with closing(Unlendable(opened.place, opened.socket)) as listener:
        try:
            workers.start(replace(READING, listeners=(listener,)), 1)
        finally:
            if os.getpid() != parent:
                os._exit(77)
        eventually(workers.collect)
    assert changes.generation.reason.endswith("exited with status 1")
    assert "too many open files" in capfd.readouterr().err


def process(workers: Workers, pid: int, stage: Stage = Stage.READY) -> tuple[Process, Channel]:
    """Put a process of the test's among the workers."""
    ours, theirs = Channel.pair()
    now = monotonic()
    state = Worker(1, 1, stage, now, now, ready=now if stage is Stage.READY else None)
    made = Process(pid, ours, workers.counters.claim(), READING, state)
    workers._processes.append(made)
    return made, theirs


def ended(status: int) -> int:
    """Return a child that ends by itself."""
    child = os.fork()
    if child == 0:
        os._exit(status)
    return child


def test_silence_is_excused_only_after_a_time_without_us(workers: Workers) -> None:
    made, theirs = process(workers, ended(0))
    long_ago = replace(made.state, beat=0.0)
    made.state = long_ago
    workers.excuse(monotonic() + PATIENCE)  # not even if this thread is held up meanwhile
    assert made.state == long_ago
    workers.excuse(monotonic() - 2 * SELF_DOUBT)
    assert made.state.beat > 0
    eventually(workers.collect)
    theirs.close()


def test_who_has_closed_its_channel_is_told_to_drain_by_a_signal(workers: Workers) -> None:
    made, theirs = process(workers, ended(0))
    theirs.close()
    workers.listen(made)
    assert made.is_gone
    workers.drain(1, lambda _: [], "")
    assert made.state.stage is Stage.DRAINING
    eventually(workers.collect)


def test_what_a_worker_says_last_is_why_it_could_not_start(
    workers: Workers, changes: Changes, capsys: pytest.CaptureFixture[str]
) -> None:
    made, theirs = process(workers, ended(1), Stage.STARTING)
    theirs.send("nothing that is known")
    theirs.send("failed", reason="it cannot import app")
    theirs.close()
    eventually(workers.collect)
    assert list(workers) == []
    assert changes.generation.reason == "it cannot import app"
    assert f"{made} could not start: it cannot import app" in capsys.readouterr().err


def test_one_that_leaves_unasked_drains_and_counts_as_one_that_failed(
    workers: Workers, changes: Changes
) -> None:
    """Or a target that stops its server when it starts would be started without a pause."""
    made, theirs = process(workers, ended(0))
    made.state = replace(made.state, asked=monotonic())
    theirs.send("left")
    workers.listen(made)
    assert made.has_left
    assert (made.state.stage, made.state.asked) == (Stage.DRAINING, None)
    theirs.close()
    eventually(workers.collect)
    assert changes.generation.failures == 1


def test_one_that_was_told_to_drain_leaves_and_has_not_failed(
    workers: Workers, changes: Changes
) -> None:
    made, theirs = process(workers, ended(0))
    workers.drain(1, lambda _: [], "")
    theirs.send("left")
    workers.listen(made)
    eventually(workers.collect)
    theirs.close()
    assert changes.generation.failures == 0


@pytest.mark.parametrize("stage", [Stage.STARTING, Stage.DRAINING])
def test_one_that_is_interrupted_ends_at_once_and_has_not_failed(
    workers: Workers, changes: Changes, capsys: pytest.CaptureFixture[str], stage: Stage
) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(INTERRUPT_SIGNAL, signal.SIG_DFL)
        while True:
            signal.pause()
    made, theirs = process(workers, child, stage)
    workers.interrupt(1)
    eventually(workers.collect)
    theirs.close()
    assert f"{made} has ended at once" in capsys.readouterr().err
    assert changes.generation.failures == 0


def test_a_terminal_that_has_gone_is_no_reason_to_stop(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs = process(workers, ended(3))
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stderr", nobody)  # which cannot be written to
        eventually(workers.collect)
    theirs.close()
