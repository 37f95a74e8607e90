"""Keep worker processes serving: start, watch and replace them, and exchange them for a reload.

Owns the processes, the listeners that they share, and the signals.  Waits in one call for all that
can happen: signals, what workers say, and the next instant at which something is due.  Leaves what
to do next to `portico.supervision`, which only decides, and serving to `portico.worker`.

The listeners are opened once.  None of them is closed while somebody may still wait in its queue:
a worker that goes leaves it open for the others.

Sources: signal(7); fork(2); wait(2) (only processes of our own are collected); listen(2), called
again for another backlog.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Final, TypeAlias

from portico import privileges
from portico.address import Address
from portico.channel import Channel, Message
from portico.configuration import Configuration, ProcessSettings
from portico.console import say
from portico.counters import Counters
from portico.duty import counted, expanded, log_kept, openings
from portico.errors import CountersError, PorticoError
from portico.handover import Heir, Heritage, said_end, start_heir
from portico.listener import OpenListener
from portico.listeners import Listeners
from portico.logfile import reopen_all
from portico.pidfile import PidFile
from portico.service import STOP_PATIENCE, raise_descriptor_limit, station_names
from portico.supervision import (
    Adopt,
    Drain,
    End,
    Generation,
    GiveUp,
    Interrupt,
    Kill,
    Limits,
    Report,
    Situation,
    Stage,
    Start,
    Stop,
    Wait,
    Worker,
    decide,
    note_end,
    note_ready,
)
from portico.systemd import Notifier
from portico.worker import DUMP_SIGNAL, Post, work

Load: TypeAlias = Callable[[], Configuration]

DRAIN_SLACK: Final = 2 * STOP_PATIENCE
"""Seconds beyond `drain_timeout` after which a worker that still drains is ended: it has ways of
its own to end handlers, and more to tell than one that is killed."""

SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)
"""What a supervisor hears."""

PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class SupervisorError(PorticoError, RuntimeError):
    """No worker can be started; says why."""


@dataclass(slots=True)
class Reading:
    """One reading of the configuration, and what was opened for it.

    Attributes:
        number: That of its generation.
        configuration: What was read.
        listeners: One for each address, in their order.
        addresses: Those addresses, as they were asked for.
    """

    number: int
    configuration: Configuration
    listeners: tuple[OpenListener, ...]
    addresses: tuple[Address, ...]


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
        is_gone: Whether its end of the channel is closed.
    """

    pid: int
    channel: Channel
    row: int
    reading: Reading
    state: Worker
    failure: str = ""
    has_left: bool = False
    is_gone: bool = False

    def __str__(self) -> str:
        return f"worker {self.state.number} (process {self.pid})"


class Supervisor:
    """Keeps workers serving.

    Args:
        load: Reads the configuration.
        configuration: What it has read.
        notifier: Tells systemd.
        heritage: What a predecessor has left; ``None`` if there is none.
    """

    def __init__(
        self,
        load: Load,
        configuration: Configuration,
        notifier: Notifier,
        heritage: Heritage | None = None,
    ) -> None:
        self._load = load
        self._notifier = notifier
        self._heritage = heritage
        self._listeners = Listeners(() if heritage is None else heritage.listeners)
        self._processes: list[Process] = []
        self._readings: dict[int, Reading] = {}
        self._wanted = 0
        self._serving: Generation | None = None
        self._upcoming: Generation | None = None
        self._last_number = 0
        self._stop = Stop.NOT
        self._has_ended = False
        self._reload_is_due = False
        self._failure = ""
        self._heir: Heir | None = None
        self._first = configuration
        self._counters: Counters
        self._pid_file: PidFile
        self._reader = self._writer = -1
        self._started = time.monotonic()

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; in the main thread, which is the only one.

        Raises:
            PorticoError: What was asked cannot be done, or no worker can start.
        """
        process = self._first.process
        identity = privileges.find(process.user, process.group)
        predecessor = None if self._heritage is None else self._heritage.predecessor
        raise_descriptor_limit()
        with ExitStack() as closing:
            closing.callback(self._listeners.close)
            self._pid_file = closing.enter_context(PidFile(process.pid_file, predecessor))
            self._counters = self._make_counters()
            closing.callback(self._counters.close)
            self._begin(self._first)
            privileges.drop(identity)
            closing.enter_context(log_kept(process))
            self._hear()
            closing.callback(self._hear_no_more)
            self._work()
        if self._failure:
            raise SupervisorError(self._failure)

    # --- the loop -------------------------------------------------------------------------

    def _work(self) -> None:
        """Do what is due, and wait for what comes next, until nobody is left."""
        while not self._has_ended:
            until = self._act()
            if not self._has_ended:
                self._wait(until)
        if self._failure:
            return
        seconds = time.monotonic() - self._started
        counts = self._counters.totals().sum
        served = counts.finished + counts.failed + counts.peer_gone
        words = counted(served, refused=counts.refused, cut_off=counts.cut_off, lost=counts.lost)
        say(f"stopped after {seconds:.1f} s: {words}")

    def _act(self) -> float | None:
        """Carry out what is decided; return until when to wait then."""
        while True:
            self._look()
            situation = Situation(
                [each.state for each in self._processes],
                self._wanted,
                self._serving,
                self._upcoming,
                self._heritage is not None,
                self._stop,
            )
            actions = decide(situation, time.monotonic())
            for action in actions:
                if isinstance(action, Wait):
                    if len(actions) == 1:
                        return action.until
                else:
                    self._carry_out(action)
            if self._has_ended or not actions:
                return None

    def _carry_out(self, action: object) -> None:
        match action:
            case Start(generation):
                self._start(self._readings[generation])
            case Drain(worker, reason):
                self._drain(self._find(worker), reason)
            case Report(worker, reason, by_signal):
                self._ask(self._find(worker), reason, by_signal=by_signal)
            case Interrupt(worker):
                self._signal(self._find(worker), signal.SIGTERM, Stage.INTERRUPTED)
            case Kill(worker, reason):
                found = self._find(worker)
                say(f"{found} is killed: {reason}")
                self._signal(found, signal.SIGKILL, Stage.KILLED)
            case Adopt():
                self._adopt()
            case GiveUp(_, reason):
                self._give_up(reason)
            case End():
                self._has_ended = True
            case _:
                raise AssertionError(action)

    def _look(self) -> None:
        """See how the workers are, from what they share with us."""
        for each in self._processes:
            state = each.state
            if state.stage is not Stage.READY:
                continue
            pulse = self._counters.pulse(each.row)
            beat = max(state.beat, pulse.heartbeat / 1e9)
            state = replace(state, beat=beat, requests=pulse.served, memory=_memory(each.pid))
            if state.asked is not None and beat > state.asked:  # it has come back
                state = replace(state, asked=None, asks=0, has_answered=False)
            each.state = state

    def _wait(self, until: float | None) -> None:
        """Wait until something happens, or until an instant, and take note of it."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        for each in self._processes:
            if not each.is_gone:
                poll.register(each.channel, select.POLLIN)
        if self._heir is not None and not self._heir.is_serving:
            poll.register(self._heir.channel, select.POLLIN)
        interval = self._notifier.watchdog_interval
        now = time.monotonic()
        instants = [until] if until is not None else []
        if interval is not None:
            instants.append(now + interval)
        pause = None if not instants else max(0, ceil((min(instants) - now) * 1000))
        ready = {number for number, _ in poll.poll(pause)}
        if interval is not None:
            self._notifier.keep_alive()
        for each in tuple(self._processes):
            if each.channel.fileno() in ready:
                self._listen(each)
        if self._heir is not None and self._heir.channel.fileno() in ready:
            self._listen_to_heir(self._heir)
        if self._reader in ready:
            self._hear_signals()
        self._collect()

    # --- signals --------------------------------------------------------------------------

    def _hear(self) -> None:
        """Have signals written into a pipe, for the wait to end."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _do_nothing)  # the interpreter writes its number

    def _hear_no_more(self) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)

    def _hear_signals(self) -> None:
        """Do what the signals ask for that have come."""
        with suppress(BlockingIOError):
            for number in os.read(self._reader, 4096):
                self._obey(number)

    def _obey(self, number: int) -> None:
        match number:
            case signal.SIGTERM | signal.SIGINT:
                self._end(signal.Signals(number).name)
            case signal.SIGHUP if self._stop is Stop.NOT:
                self._reload()
            case signal.SIGUSR1:
                self._reopen()
            case signal.SIGUSR2 if self._stop is Stop.NOT:
                self._hand_over()
            case signal.SIGTTIN if self._stop is Stop.NOT:
                self._want(self._wanted + 1)
            case signal.SIGTTOU if self._stop is Stop.NOT:
                self._want(max(1, self._wanted - 1))
            case _:
                pass

    def _end(self, why: str) -> None:
        """Begin to end; the second time, at once."""
        if self._stop is Stop.NOT:
            say(f"stops ({why})")
            self._stop = Stop.DRAIN
            self._notifier.stopping("draining")
            if self._heir is not None and not self._heir.is_serving:
                with suppress(ProcessLookupError):
                    os.kill(self._heir.process, signal.SIGTERM)
        elif self._stop is Stop.DRAIN:
            say(f"stops at once ({why} again)")
            self._stop = Stop.NOW

    def _reload(self) -> None:
        """Read the configuration and start workers with it; after the reload that is under way."""
        if self._upcoming is not None:
            self._reload_is_due = True
            return
        self._reload_is_due = False
        say("reloads")
        self._notifier.reloading("reloading")
        try:
            self._begin(self._load())
        except (PorticoError, OSError) as error:
            self._failed_reload(str(error))

    def _failed_reload(self, reason: str) -> None:
        say(f"cannot reload, and serves as before: {reason}")
        self._notifier.ready(f"could not reload: {reason}")

    def _reopen(self) -> None:
        """Open the log files again, here and in every worker."""
        try:
            reopen_all()
        except OSError as error:
            say(f"cannot open the log again: {error}")
        else:
            say("has opened its log again")
        for each in self._processes:
            each.channel.send("reopen")

    def _want(self, count: int) -> None:
        if count != self._wanted:
            self._wanted = count
            say(f"is to have {count} worker{'s' * (count != 1)}")

    # --- generations ----------------------------------------------------------------------

    def _begin(self, configuration: Configuration) -> None:
        """Begin a generation of workers.

        Raises:
            PorticoError: An address cannot be had.
        """
        process = configuration.process
        services = expanded(configuration.services)
        wanted = openings(services)
        listeners = self._listeners.gather(wanted)
        self._counters.allot(station_names(listeners))
        if self._wanted == 0 or self._count_of_last() != process.worker_count():
            # Otherwise it stays as it was changed by signals.
            self._wanted = max(1, process.worker_count())
        self._last_number += 1
        self._readings[self._last_number] = Reading(
            self._last_number,
            replace(configuration, services=services),
            listeners,
            tuple(each.address for each in wanted),
        )
        self._upcoming = Generation(self._last_number, _limits(configuration))

    def _count_of_last(self) -> int:
        return self._readings[self._last_number].configuration.process.worker_count()

    def _adopt(self) -> None:
        """Have the upcoming generation be the one that serves."""
        upcoming, self._upcoming = self._upcoming, None
        assert upcoming is not None
        is_first, self._serving = self._serving is None, upcoming
        reading = self._readings[upcoming.number]
        addresses = ", ".join(str(each.address) for each in reading.listeners)
        if is_first:
            self._take_over()
            for each in reading.listeners:
                say(f"ready on {each.address}")
        else:
            say(f"serves as reloaded (generation {upcoming.number}); earlier workers drain")
        self._notifier.ready(f"ready on {addresses}")
        if self._reload_is_due:
            self._reload()

    def _give_up(self, reason: str) -> None:
        """Forget the upcoming generation."""
        self._upcoming = None
        if self._serving is None:
            say("no worker can start")
            self._failure = reason
        else:
            self._failed_reload(reason)
            if self._reload_is_due:
                self._reload()
        self._tidy()

    def _take_over(self) -> None:
        """Tell the predecessor that it can go."""
        heritage, self._heritage = self._heritage, None
        if heritage is not None:
            heritage.channel.send("serving", listeners=self._listeners.take_over())
            heritage.channel.close()

    def _tidy(self) -> None:
        """Forget the readings that nobody serves any more, and close their listeners."""
        used = {each.reading.number for each in self._processes}
        used |= {each.number for each in (self._serving, self._upcoming) if each is not None}
        self._readings = {
            number: reading
            for number, reading in self._readings.items()
            if number in used or number == self._last_number
        }
        kept = [each for number in used for each in self._readings[number].listeners]
        for gone in self._listeners.keep(kept):
            say(f"serves {gone.place.address} no more")

    # --- workers --------------------------------------------------------------------------

    def _start(self, reading: Reading) -> None:
        """Fork a worker."""
        now = time.monotonic()
        taken = {each.state.number for each in self._processes}
        number = next(number for number in range(1, len(taken) + 2) if number not in taken)
        process = reading.configuration.process
        state = Worker(
            number, reading.number, Stage.STARTING, now, now, allowance=_allowance(process)
        )
        try:
            row = self._counters.claim()
            try:
                self._fork(reading, state, row)
            except BaseException:
                self._counters.release(row)
                raise
        except (OSError, CountersError) as error:
            reason = f"worker {number} cannot be started: {error}"
            say(reason)
            self._change(reading.number, lambda each: note_end(each, state, now, reason))

    def _fork(self, reading: Reading, state: Worker, row: int) -> None:
        ours, theirs = Channel.pair()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()  # or the child would write it again
        try:
            # No handler of ours may run in the child: it would write to our pipe.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                pid = os.fork()
                if pid == 0:
                    lent = tuple(each.lend() for each in reading.listeners)
                    post = Post(
                        reading.configuration, lent, self._counters, row, self._wanted, theirs
                    )
                    work(post, lambda: self._let_go(ours))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._processes.append(Process(pid, ours, row, reading, state))

    def _let_go(self, ours: Channel) -> None:
        """Close in a child what is the supervisor's: while it is open, nobody misses it."""
        ours.close()
        os.close(self._reader)
        os.close(self._writer)
        for each in self._processes:
            each.channel.close()
        if self._heir is not None:
            self._heir.channel.close()
        if self._heritage is not None:
            self._heritage.channel.close()
        self._listeners.close()  # the lent ones are others, and a child ends nothing by this

    def _find(self, number: int) -> Process:
        return next(each for each in self._processes if each.state.number == number)

    def _signal(self, process: Process, number: int, stage: Stage) -> None:
        """Send a worker a signal, and note in what stage it is from then on."""
        process.state = replace(process.state, stage=stage, since=time.monotonic(), asked=None)
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)

    def _drain(self, process: Process, reason: str) -> None:
        if reason:
            say(f"{process} drains: {reason}")
        self._signal(process, signal.SIGTERM, Stage.DRAINING)

    def _ask(self, process: Process, reason: str, *, by_signal: bool) -> None:
        """Have a worker say where its threads are."""
        state = process.state
        if by_signal:
            say(f"{process} does not answer; its threads are at:")
            with suppress(ProcessLookupError):
                os.kill(process.pid, DUMP_SIGNAL)
        else:
            process.channel.send("report", reason=reason)
        process.state = replace(state, asked=time.monotonic(), asks=state.asks + 1)

    def _listen(self, process: Process) -> None:
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
            case "failed":
                process.failure = str(message.get("reason"))
            case "left":
                process.has_left = True
                self._close_if_left()
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

    def _close_if_left(self) -> None:
        """Close the listeners when everything ends and nobody accepts any more.

        Those who connect now are refused, and try elsewhere; in the queue they would wait for the
        end of the drain, and then be reset.
        """
        if self._stop is not Stop.NOT and all(each.has_left for each in self._processes):
            self._listeners.close()

    def _collect(self) -> None:
        """See which processes have ended."""
        ended = False
        for each in tuple(self._processes):
            pid, status = os.waitpid(each.pid, os.WNOHANG)
            if pid:
                ended = True
                self._listen(each)  # its last words
                self._note_end(each, status)
        if ended:
            self._close_if_left()
            self._tidy()

    def _note_end(self, process: Process, status: int) -> None:
        self._processes.remove(process)
        process.channel.close()
        counts = self._counters.release(process.row)
        process.state = replace(process.state, requests=counts.served)
        how = said_end(status)
        reason = process.failure or f"{process} {how}"
        state, now = process.state, time.monotonic()
        if state.ready is None and state.stage is not Stage.INTERRUPTED:
            say(f"{process} could not start: {process.failure or f'it {how}'}")
        elif state.stage is Stage.DRAINING and status == 0:
            say(f"{process} has ended")
        else:
            say(f"{process} {how}")
        self._change(state.generation, lambda each: note_end(each, state, now, reason))

    def _change(self, number: int, change: Callable[[Generation], Generation]) -> None:
        """Exchange what is known of a generation, if it still counts."""
        if self._serving is not None and self._serving.number == number:
            self._serving = change(self._serving)
        if self._upcoming is not None and self._upcoming.number == number:
            self._upcoming = change(self._upcoming)

    # --- a successor ----------------------------------------------------------------------

    def _make_counters(self) -> Counters:
        """Return the mapping that all workers count in: the predecessor's, if it can be read."""
        text = None if self._heritage is None else self._heritage.counters
        if text is not None:
            try:
                return Counters.adopt(text)
            except CountersError as error:
                say(f"counts from nothing: {error}")
        return Counters.create()

    def _hand_over(self) -> None:
        """Start another supervisor, which is to take over."""
        if self._heir is not None:
            say(f"another supervisor (process {self._heir.process}) is starting already")
            return
        if self._serving is None:
            say("cannot hand over before it serves")
            return
        reading = self._readings[self._serving.number]
        pairs = list(zip(reading.addresses, reading.listeners, strict=True))
        variables = self._notifier.variables(0)
        variables.pop("WATCHDOG_PID", None)  # it will be the heir's
        try:
            self._heir = start_heir(pairs, self._counters, variables)
        except OSError as error:
            say(f"cannot start another supervisor: {error}")
            return
        say(f"starts another supervisor (process {self._heir.process})")

    def _listen_to_heir(self, heir: Heir) -> None:
        """Go when it serves, and stay if it does not."""
        messages = heir.channel.receive()
        for message in messages or ():
            if message["kind"] == "serving":
                heir.is_serving = True
                self._listeners.hand_over(message.get("listeners", ()))
                try:
                    self._pid_file.hand_over(heir.process)
                except PorticoError as error:
                    say(str(error))
                self._notifier.main_process(heir.process)
                say(f"leaves everything to process {heir.process}")
                self._stop = Stop.DRAIN
        if messages is None and not heir.is_serving:
            heir.channel.close()
            self._heir = None
            say(f"the other supervisor {heir.wait()} before it served; this one goes on")


def _limits(configuration: Configuration) -> Limits:
    """Return what workers of a configuration may do."""
    process = configuration.process
    timeouts = [each.settings.drain_timeout for each in configuration.services]
    longest = max((each for each in timeouts if each is not None), default=0.0)
    return Limits(
        start_timeout=process.start_timeout,
        worker_timeout=process.worker_timeout,
        drain_timeout=None if None in timeouts else longest + DRAIN_SLACK,
        max_memory=process.max_worker_memory,
    )


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


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
