"""Start worker processes, talk with them, and see how they are and how they end.

Owns the processes of one supervisor, their channels and their rows in the counters.  Leaves what is
done about them to `portico.supervision`, and what they do to `portico.worker`.

Sources: fork(2); signal(7); wait(2) (only processes of our own are collected); proc_pid_statm(5).
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

from portico.channel import Channel, Message
from portico.configuration import Configuration, ProcessSettings
from portico.console import say
from portico.counters import Counters
from portico.errors import CountersError
from portico.handover import said_end
from portico.listener import OpenListener
from portico.opening import Opening
from portico.supervision import Generation, Stage, Worker, note_end, note_ready
from portico.worker import DUMP_SIGNAL, INTERRUPT_SIGNAL, Post, work

Change: TypeAlias = Callable[[int, Callable[[Generation], Generation]], None]
"""Exchanges what is known of the generation with a number."""

SELF_DOUBT: Final = 1.0
"""Seconds by which a wait may take too long before it is no worker's fault that it was silent."""

PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading of the configuration, and what was opened for it.

    Attributes:
        number: That of its generation.
        configuration: What was read.
        listeners: One for each address, in their order.
        wanted: What was asked for at these addresses.
    """

    number: int
    configuration: Configuration
    listeners: tuple[OpenListener, ...]
    wanted: tuple[Opening, ...]

    @property
    def process(self) -> ProcessSettings:
        """How its processes are run."""
        return self.configuration.process


@dataclass(slots=True)
class Process:
    """A worker process.

    Attributes:
        pid: Its number.
        channel: To it.
        row: In which it counts.
        reading: What it serves.
        state: How it is.
        failure: Why it says that it cannot serve.
        has_left: Whether it has stopped accepting.
        left_unasked: Whether it was not the supervisor who had it do so, but a signal from outside
            or its own code.
        is_gone: Whether its end of the channel is closed.
    """

    pid: int
    channel: Channel
    row: int
    reading: Reading
    state: Worker
    failure: str = ""
    has_left: bool = False
    left_unasked: bool = False
    is_gone: bool = False

    def __str__(self) -> str:
        return f"worker {self.state.number} (process {self.pid})"


class Workers:
    """The processes of one supervisor, in whose only thread all of this is called.

    Args:
        change: Exchanges what is known of a generation: one of its workers serves, or has ended.
        let_go: Closes, in a child, what else belongs to the supervisor.
    """

    def __init__(self, change: Change, let_go: Callable[[], object]) -> None:
        self.counters: Counters
        """Where they count; to be set before the first is started."""
        self._change = change
        self._let_go = let_go
        self._processes: list[Process] = []

    def __iter__(self) -> Iterator[Process]:
        return iter(tuple(self._processes))

    @property
    def states(self) -> list[Worker]:
        """How they are, as `look` has seen it."""
        return [each.state for each in self._processes]

    @property
    def have_left(self) -> bool:
        """Whether none of them accepts any more."""
        return all(each.has_left for each in self._processes)

    # --- to begin and to end ---------------------------------------------------------------

    def start(self, reading: Reading, count: int) -> None:
        """Fork a worker.

        Args:
            reading: What it serves.
            count: How many there are to be.
        """
        now = time.monotonic()
        taken = {each.state.number for each in self._processes}
        number = next(number for number in range(1, len(taken) + 2) if number not in taken)
        state = Worker(
            number, reading.number, Stage.STARTING, now, now, allowance=_allowance(reading.process)
        )
        try:
            row = self.counters.claim()
            try:
                self._fork(reading, state, row, count)
            except BaseException:
                self.counters.release(row)
                raise
        except (OSError, CountersError) as error:
            reason = f"worker {number} cannot be started: {error}"
            say(reason)
            self._change(reading.number, lambda each: note_end(each, state, now, reason))

    def drain(self, number: int, rest_of: Callable[[Reading], Sequence[int]], reason: str) -> None:
        """Have a worker accept no more, and end.

        Args:
            number: Which.
            rest_of: Says from which listeners nobody else accepts, by their numbers in a reading.
            reason: Why, if that is worth a word.
        """
        process = self._find(number)
        if reason:
            say(f"{process} drains: {reason}")
        if process.channel.send("drain", rest=rest_of(process.reading)):
            self._enter(process, Stage.DRAINING)
        else:
            self._signal(process, signal.SIGTERM, Stage.DRAINING)

    def interrupt(self, number: int) -> None:
        """Have a worker end at once."""
        self._signal(self._find(number), INTERRUPT_SIGNAL, Stage.INTERRUPTED)

    def kill(self, number: int, reason: str) -> None:
        """Kill a worker."""
        process = self._find(number)
        say(f"{process} is killed: {reason}")
        self._signal(process, signal.SIGKILL, Stage.KILLED)

    def collect(self) -> bool:
        """See which have ended; say whether any has."""
        ended = False
        for each in self:
            pid, status = os.waitpid(each.pid, os.WNOHANG)
            if pid:
                ended = True
                self.listen(each)  # its last words
                self._note_end(each, status)
        return ended

    # --- how they are ----------------------------------------------------------------------

    def look(self) -> None:
        """See how they are, from what they share with us."""
        for each in self._processes:
            state = each.state
            if state.stage is not Stage.READY:
                continue
            pulse = self.counters.pulse(each.row)
            beat = max(state.beat, pulse.heartbeat / 1e9)
            is_weighed = each.reading.process.max_worker_memory is not None
            memory = _memory(each.pid) if is_weighed else 0
            state = replace(state, beat=beat, requests=pulse.served, memory=memory)
            if state.asked is not None and beat > state.asked:  # it has come back
                state = replace(state, asked=None, asks=0, has_answered=False)
            each.state = state

    def excuse(self, expected: float) -> None:
        """Take silence for no sign of anything after a time in which we did not run either.

        The processes of a terminal are stopped and go on together, and so are those of a container.

        Args:
            expected: The instant at which a wait should have ended.
        """
        now = time.monotonic()
        if now - expected >= SELF_DOUBT:
            for each in self._processes:
                each.state = replace(each.state, beat=now)

    def ask(self, number: int, reason: str, *, by_signal: bool) -> None:
        """Have a worker say where its threads are.

        Args:
            number: Which.
            reason: Why it is asked.
            by_signal: Whether the interpreter is to tell it, whatever runs.
        """
        process = self._find(number)
        state = process.state
        if by_signal:
            say(f"{process} does not answer; its threads are at:")
            with suppress(ProcessLookupError):
                os.kill(process.pid, DUMP_SIGNAL)
        else:
            process.channel.send("report", reason=reason)
        process.state = replace(state, asked=time.monotonic(), asks=state.asks + 1)

    def reopen_logs(self) -> None:
        """Have all of them open their log files again."""
        for each in self._processes:
            each.channel.send("reopen")

    def listen(self, process: Process) -> None:
        """Take note of what a worker says."""
        while messages := process.channel.receive():
            for message in messages:
                self._note(process, message)
        process.is_gone = messages is None

    def _note(self, process: Process, message: Message) -> None:
        state, now = process.state, time.monotonic()
        match message["kind"]:
            case "ready" if state.stage is Stage.STARTING:
                process.state = replace(state, stage=Stage.READY, since=now, ready=now, beat=now)
                say(f"{process} is ready")
                self._change(state.generation, note_ready)
            case "ready" if state.stage is Stage.DRAINING:
                process.state = replace(state, ready=now)
            case "failed":
                process.failure = str(message.get("reason"))
            case "left":
                process.has_left = True
                if state.stage is Stage.READY:
                    say(f"{process} accepts no more, unasked")
                    process.left_unasked = True
                    self._enter(process, Stage.DRAINING)
            case "waits":
                process.state = replace(state, beat=now, asked=None, asks=0)
            case "stacks" if state.asked is not None:
                say(f"{process} is stuck; its threads are at:\n{message.get('text')}")
                process.state = replace(state, has_answered=True)
            case "served":
                for line in message.get("drained", ()):
                    say(f"{process}: {line}")
            case _:
                pass

    def _note_end(self, process: Process, status: int) -> None:
        self._processes.remove(process)
        process.channel.close()
        counts = self.counters.release(process.row)
        state = process.state = replace(process.state, requests=counts.served)
        how, now = said_end(status), time.monotonic()
        was_told = state.stage in {Stage.DRAINING, Stage.INTERRUPTED}
        if state.ready is None and not was_told:
            say(f"{process} could not start: {process.failure or f'it {how}'}")
        elif state.stage is Stage.DRAINING and status == 0:
            say(f"{process} has ended")
        elif was_told and status in {0, INTERRUPT_SIGNAL, signal.SIGTERM}:
            say(f"{process} has ended at once")
        else:
            say(f"{process} {how}")
        reason = process.failure or f"{process} {how}"
        if process.left_unasked and state.stage is Stage.DRAINING:
            # It is judged as one that crashed: those that always leave are not started ceaselessly.
            state = replace(state, stage=Stage.READY)
        self._change(state.generation, lambda each: note_end(each, state, now, reason))

    # --- inside ----------------------------------------------------------------------------

    def _find(self, number: int) -> Process:
        return next(each for each in self._processes if each.state.number == number)

    def _enter(self, process: Process, stage: Stage) -> None:
        """Note in what stage a worker is from now on."""
        process.state = replace(process.state, stage=stage, since=time.monotonic(), asked=None)

    def _signal(self, process: Process, number: int, stage: Stage) -> None:
        """Send a worker a signal, and note in what stage it is from then on."""
        self._enter(process, stage)
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)

    def _fork(self, reading: Reading, state: Worker, row: int, count: int) -> None:
        ours, theirs = Channel.pair()

        def take_up() -> Post:
            lent = tuple(each.lend() for each in reading.listeners)
            return Post(reading.configuration, lent, self.counters, row, count, theirs)

        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # there may be none
                stream.flush()  # or the child would write it again
        try:
            # No handler of ours may run in the child: it would write to our pipe.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                pid = os.fork()
                if pid == 0:
                    work(take_up, lambda: self._close_in_child(ours))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._processes.append(Process(pid, ours, row, reading, state))

    def _close_in_child(self, ours: Channel) -> None:
        """Close what is the supervisor's: while it is open here, nobody misses it elsewhere."""
        ours.close()
        for each in self._processes:
            each.channel.close()
        self._let_go()


def _allowance(process: ProcessSettings) -> int | None:
    """Return after how many requests a worker is replaced."""
    if process.max_requests is None:
        return None
    return process.max_requests + random.randint(0, process.max_requests_jitter)  # noqa: S311


def _memory(pid: int) -> int:
    """Return the bytes of memory that a process takes; 0 if nobody knows."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * PAGE
    return 0
