"""Keep worker processes serving: start, watch and replace them, and exchange them for a reload.

Owns the generations of workers, the listeners that they share, and what signals mean.  Waits in one
call for all that can happen: signals, what workers say, and the next instant at which something is
due.  Leaves what to do next to `portico.supervision`, which only decides, the processes to
`portico.workers`, serving to `portico.worker`, and another supervisor to `portico.succession`.

The listeners are opened once.  None of them is closed while somebody accepts from it: a worker that
goes leaves it open for the others, and the last one has it closed.
"""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from math import ceil, inf
from typing import Final, TypeAlias

from portico import privileges
from portico.configuration import MOST_WORKERS, Configuration, ProcessSettings
from portico.console import say
from portico.counters import Counters
from portico.deadlines import LONGEST_WAIT
from portico.descriptors import raise_descriptor_limit
from portico.directory import Directory, DirectoryError
from portico.duty import counted, described, expanded, log_kept, openings, reopen_log, say_counts
from portico.errors import PorticoError
from portico.handover import Heritage
from portico.listeners import Listeners
from portico.opening import station_names
from portico.service import STOP_PATIENCE
from portico.signals import SignalPipe, Wish
from portico.succession import Succession
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
    Start,
    Stop,
    Wait,
    decide,
)
from portico.systemd import Notifier
from portico.workers import Reading, Workers

Load: TypeAlias = Callable[[], Configuration]

DRAIN_SLACK: Final = 2 * STOP_PATIENCE
"""Seconds beyond `drain_timeout` after which a worker that still drains is ended: it has ways of
its own to end handlers, and more to tell than one that is killed."""


FORMER_INTERVAL: Final = 1.0
"""Seconds between two looks at whether a predecessor that counts with us has ended: places of
`max_connections` that it had are free then, and nobody else may be left to see it."""

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


OF_THE_START: Final = ("user", "group", "pid_file")
"""Settings of the processes that a reload does not change: they are done with when it serves."""


class SupervisorError(PorticoError, RuntimeError):
    """No worker can be started; says why."""


class Supervisor:
    """Keeps workers serving.

    Args:
        load: Reads the configuration.
        configuration: What it has read.
        notifier: Tells systemd.
        heritage: What a predecessor has left; ``None`` if there is none.
        directory: Where workers and a successor start; ``None`` for the current one.
    """

    def __init__(
        self,
        load: Load,
        configuration: Configuration,
        notifier: Notifier,
        heritage: Heritage | None = None,
        directory: Directory | None = None,
    ) -> None:
        self._load = load
        self._directory = Directory.current() if directory is None else directory
        self._notifier = notifier
        self._listeners = Listeners(() if heritage is None else heritage.listeners)
        self._succession = Succession(
            "supervisor", self._listeners, notifier, heritage, self._directory
        )
        self._signals = SignalPipe(SIGNALS)
        self._workers = Workers(self._change, self._let_go)
        self._readings: dict[int, Reading] = {}
        self._serving: Generation | None = None
        self._upcoming: Generation | None = None
        self._last_number = 0
        self._stop = Stop.NOT
        self._is_told_to_end = False
        self._wish_to_end = Wish()
        self._has_ended = False
        self._reload_is_due = False
        self._hand_over_is_due = False
        self._failure = ""
        self._has_former = False
        self._first = configuration
        self._counters: Counters
        self._started = time.monotonic()

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; in the main thread, which is the only one.

        Raises:
            PorticoError: What was asked cannot be done, or no worker can start.
        """
        process = self._first.process
        identity = privileges.find(process.user, process.group)
        raise_descriptor_limit()
        with ExitStack() as closing:
            # First, and so left last: whatever is opened is closed again, and files are removed.
            closing.enter_context(self._signals)
            closing.callback(self._listeners.close)
            closing.enter_context(self._succession.pid_file(process.pid_file))
            self._counters = self._workers.counters = self._succession.counters()
            closing.callback(self._counters.close)
            self._begin(self._first)
            privileges.drop(identity)
            closing.enter_context(log_kept(process))
            self._work()
        if self._failure:
            raise SupervisorError(self._failure)

    # --- the loop -------------------------------------------------------------------------

    def _work(self) -> None:
        """Do what is due, and wait for what comes next, until nobody is left."""
        self._hear()
        while not self._has_ended:
            until = self._act()
            if not self._has_ended:
                self._wait(until)
        if self._failure:
            return
        seconds = time.monotonic() - self._started
        if self._succession.has_handed_over:
            say(f"has handed over after {seconds:.1f} s")
            return
        totals = self._counters.totals()
        say_counts(totals.at)
        counts = totals.sum
        served = counts.finished + counts.failed + counts.peer_gone
        words = counted(served, refused=counts.refused, cut_off=counts.cut_off, lost=counts.lost)
        say(f"stopped after {seconds:.1f} s: {words}")

    def _act(self) -> float | None:
        """Carry out what is decided; return until when to wait then."""
        while True:
            self._workers.look()
            situation = Situation(
                self._workers.states,
                self._serving,
                self._upcoming,
                self._succession.predecessor is not None,
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
                with suppress(DirectoryError):  # it imports what it can from where it is
                    self._directory.enter()
                self._workers.start(self._readings[generation], self._wanted_of(generation))
            case Drain(worker, reason):
                self._workers.drain(worker, self._rest_of, reason)
            case Report(worker, reason, by_signal):
                self._workers.ask(worker, reason, by_signal=by_signal)
            case Interrupt(worker):
                self._workers.interrupt(worker)
            case Kill(worker, reason):
                self._workers.kill(worker, reason)
            case Adopt():
                self._adopt()
            case GiveUp(_, reason):
                self._give_up(reason)
            case End():
                self._has_ended = True
            case _:
                raise AssertionError(action)

    def _wait(self, until: float | None) -> None:
        """Wait until something happens, or until an instant, and take note of it."""
        ready = self._poll(until)
        spoke = [each for each in self._workers if each.channel.fileno() in ready]
        for each in spoke:
            self._workers.listen(each)
        if self._succession.attend() and self._stop is Stop.NOT:
            self._stop = Stop.DRAIN
        self._hear()
        if self._has_former:
            self._counters.release_abandoned()
            self._has_former = self._counters.has_rows_of_others()
        has_any_ended = self._workers.collect()
        if self._stop is not Stop.NOT and self._workers.have_left:
            self._listeners.close()  # as `_tidy` does, but for whom nobody has to be left
        elif has_any_ended or spoke:
            self._tidy()

    def _poll(self, until: float | None) -> set[int]:
        """Wait; return the descriptors that have something to tell."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        for each in self._workers:
            if not each.is_gone:
                poll.register(each.channel, select.POLLIN)
        now, interval = time.monotonic(), self._notifier.watchdog_interval
        instants = [now + LONGEST_WAIT, until if until is not None else inf]
        instants.append(self._succession.deadline)
        if (number := self._succession.fileno()) is not None:
            poll.register(number, select.POLLIN)
        if interval is not None:
            instants.append(now + interval)
        if self._has_former:
            instants.append(now + FORMER_INTERVAL)
        pause = max(0.0, min(instants) - now)
        ready = poll.poll(ceil(pause * 1000))
        self._workers.excuse(now + pause)
        self._notifier.keep_alive()
        return {number for number, _ in ready}

    # --- signals --------------------------------------------------------------------------

    def _hear(self) -> None:
        for number in self._signals.take():
            self._obey(number)

    def _obey(self, number: int) -> None:
        match number:
            case signal.SIGTERM | signal.SIGINT:
                self._end(signal.Signals(number).name)
            case signal.SIGHUP if self._stop is Stop.NOT:
                self._reload()
            case signal.SIGUSR1:
                reopen_log()
                self._workers.reopen_logs()
                self._say_counts()
            case signal.SIGUSR2 if self._stop is Stop.NOT:
                self._hand_over()
            case signal.SIGTTIN if self._stop is Stop.NOT:
                self._want(1)
            case signal.SIGTTOU if self._stop is Stop.NOT:
                self._want(-1)
            case _:
                pass

    def _end(self, why: str) -> None:
        """Begin to end; the second time, at once.

        A hand-over begins to end, too, and is none of the times.
        """
        is_again = self._wish_to_end.comes_again()
        if self._is_told_to_end:
            if is_again and self._stop is not Stop.NOW:
                say(f"stops at once ({why} again)")
                self._stop = Stop.NOW
            return
        self._is_told_to_end = True
        say(f"stops ({why})")
        if self._stop is Stop.NOT:
            self._stop = Stop.DRAIN
            generation = self._serving or self._upcoming
            within = None if generation is None else generation.limits.drain_timeout
            self._notifier.stopping("draining", within=within)
            self._succession.stop()
        self._wish_to_end.settle()

    def _reload(self) -> None:
        """Read the configuration and start workers with it; after the reload that is under way."""
        if self._upcoming is not None:
            self._reload_is_due = True
            return
        self._reload_is_due = False
        say("reloads")
        self._notifier.reloading("reloading")
        try:
            configuration = self._load()
            self._begin(configuration)
        except Exception as error:  # whatever it is, those that serve stay
            has_words = isinstance(error, (PorticoError, OSError))
            self._failed_reload(str(error) if has_words else f"{type(error).__name__}: {error}")
            self._tidy()
        else:
            _say_kept(self._first.process, configuration.process)

    def _failed_reload(self, reason: str) -> None:
        say(f"cannot reload, and serves as before: {reason}")
        self._notifier.ready(f"could not reload: {reason}")

    def _say_counts(self) -> None:
        """Say what all workers have counted so far; in sum, where systemd shows it."""
        totals = self._counters.totals()
        say_counts(totals.at)
        self._notifier.status(described(totals.sum))

    def _hand_over(self) -> None:
        """Start another supervisor, which is to take over; after the reload that is under way.

        What that has opened is not to be handed on before it serves, and the other one would find
        it in use.
        """
        if self._serving is None:
            say("cannot hand over before it serves")
            return
        self._hand_over_is_due = self._upcoming is not None
        if self._hand_over_is_due:
            say("starts another supervisor when the reload has ended")
            return
        reading = self._readings[self._serving.number]
        addresses = [each.address for each in reading.wanted]
        pairs = list(zip(addresses, reading.listeners, strict=True))
        self._succession.begin(pairs, reading.process, self._counters)

    def _want(self, more: int) -> None:
        """Have so many workers more, in a reload that is under way, too."""
        before = self._newest
        if self._serving is not None:
            self._serving = _with_more(self._serving, more)
        if self._upcoming is not None:
            self._upcoming = _with_more(self._upcoming, more)
        count = 0 if self._newest is None else self._newest.wanted
        if before is not None and count != before.wanted:
            say(f"is to have {count} worker{'s' * (count != 1)}")

    # --- generations ----------------------------------------------------------------------

    def _begin(self, configuration: Configuration) -> None:
        """Begin a generation of workers.

        Raises:
            PorticoError: An address cannot be had.  What was opened for others is left to `_tidy`.
        """
        process = configuration.process
        services = expanded(configuration.services)
        wanted = openings(services)
        listeners = self._listeners.gather(wanted)
        self._counters.release_abandoned()  # of a predecessor that was killed
        self._counters.allot(station_names(listeners))
        self._last_number += 1
        self._readings[self._last_number] = Reading(
            self._last_number,
            replace(configuration, services=services),
            listeners,
            tuple(wanted),
        )
        count = self._count_for(process)
        self._upcoming = Generation(self._last_number, count, _limits(configuration))

    def _count_for(self, process: ProcessSettings) -> int:
        """Return how many workers are wanted: as signals have changed it, if nothing else has."""
        serving, count = self._serving, process.worker_count()
        if serving is not None and self._readings[serving.number].process.worker_count() == count:
            return serving.wanted
        return max(1, count)

    @property
    def _newest(self) -> Generation | None:
        return self._upcoming or self._serving

    def _wanted_of(self, number: int) -> int:
        """Return how many workers of a generation are wanted."""
        known = (self._serving, self._upcoming)
        return next(each.wanted for each in known if each is not None and each.number == number)

    def _adopt(self) -> None:
        """Have the upcoming generation be the one that serves."""
        upcoming, self._upcoming = self._upcoming, None
        assert upcoming is not None
        is_first, self._serving = self._serving is None, upcoming
        reading = self._readings[upcoming.number]
        addresses = ", ".join(str(each.address) for each in reading.listeners)
        if is_first:
            self._has_former = self._succession.take_over()
        self._listeners.settle(reading.wanted, reading.listeners)
        if is_first:
            for each in reading.listeners:
                say(f"ready on {each.address}")
        else:
            say(f"serves as reloaded (generation {upcoming.number}); earlier workers drain")
        self._notifier.ready(f"ready on {addresses}")
        self._go_on()

    def _give_up(self, reason: str) -> None:
        """Forget the upcoming generation."""
        self._upcoming = None
        if self._serving is None:
            say("no worker can start")
            self._failure = reason
        else:
            self._failed_reload(reason)
            self._go_on()
        self._tidy()

    def _go_on(self) -> None:
        """Do what was asked for during a reload that has ended."""
        if self._reload_is_due:
            self._reload()
        if self._hand_over_is_due and self._upcoming is None and self._stop is Stop.NOT:
            self._hand_over()

    def _tidy(self) -> None:
        """Forget the readings from whose listeners nobody accepts any more, and close these.

        Those who connect are refused then, at once: in the queue they would wait for the end of the
        drain, and be reset.
        """
        used = {each.reading.number for each in self._workers if not each.has_left}
        used |= {each.number for each in (self._serving, self._upcoming) if each is not None}
        self._readings = {
            number: reading
            for number, reading in self._readings.items()
            if number in used or number == self._last_number
        }
        kept = [each for number in used for each in self._readings[number].listeners]
        for gone in self._listeners.keep(kept):
            say(f"serves {gone.place.address} no more")

    def _rest_of(self, reading: Reading) -> list[int]:
        """Return the listeners from which nobody else accepts, by their numbers in a reading."""
        if self._stop is Stop.NOT and self._serving is not None:
            others = {id(each) for each in self._readings[self._serving.number].listeners}
        else:
            others = {id(each) for each in self._succession.handed}
        return [at for at, each in enumerate(reading.listeners) if id(each) not in others]

    def _change(self, number: int, change: Callable[[Generation], Generation]) -> None:
        """Exchange what is known of a generation, if it still counts."""
        if self._upcoming is not None and self._upcoming.number == number:
            self._upcoming = change(self._upcoming)
        before, now = self._serving, time.monotonic()
        if before is not None and before.number == number:
            self._serving = after = change(before)
            if after.retry > max(now, before.retry) and self._stop is Stop.NOT:
                say(f"starts another worker in {after.retry - now:.1f} s")

    def _let_go(self) -> None:
        """Close in a child what is the supervisor's."""
        self._signals.close()
        self._succession.let_go()
        self._listeners.close()  # the lent ones are others, and a child ends nothing by this


def _say_kept(first: ProcessSettings, process: ProcessSettings) -> None:
    """Say what a reload has read and cannot change."""
    for name in OF_THE_START:
        if getattr(process, name) != getattr(first, name):
            say(f"keeps {name}={getattr(first, name)!r}: a reload does not change it")
    if not process.worker_count():
        say("keeps one worker: a reload does not change workers to none")


def _with_more(generation: Generation, more: int) -> Generation:
    return replace(generation, wanted=max(1, min(generation.wanted + more, MOST_WORKERS)))


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
