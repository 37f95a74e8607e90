"""Run servers side by side: one for each address, started and stopped together.

Owns which of their loops runs in which thread, and how a signal drains all of them.  Leaves putting
a server together to `portico.assembly`, serving and draining to the servers, counting to
`portico.tally`, and what is allowed to `portico.settings`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Final, Self, Unpack

from portico.acceptor import Wakeup
from portico.address import Address, BoundAddress, parse
from portico.assembly import AdoptingMixIn, load_certificates, server_class, share_places
from portico.counters import Counters, Row, Station
from portico.counts import Counts
from portico.descriptors import descriptor_limit
from portico.drain import LAST_WORDS
from portico.engines.forks import ForkingMixIn
from portico.errors import SettingError
from portico.listener import OpenListener, expand, scheme_of
from portico.loops import Drainer, ServingLoop, wait_until
from portico.opening import Opening, open_listeners, station_names
from portico.places import SharedPlaces
from portico.rounds import Rounds
from portico.settings import Settings, SettingValues
from portico.signals import Wish
from portico.tally import Counter, Tally, count
from portico.target import Handler, check_scheme

STOP_PATIENCE: Final = 2 * LAST_WORDS
"""Seconds that a loop still has after the time of its drain.

A handler that holds its loop has been given end-of-file by then, or its connection was closed, and
it had its last words; one that does not even notice that is interrupted, or left behind."""

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

LONGEST_ALARM: Final = 1e9
"""Seconds, 31 years, that no drain outlasts, and for which the system still sets an alarm."""

POLL_INTERVAL: Final = 0.5
"""Seconds between two rounds of an idle loop that has something to do in each."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a server is to do.

    Attributes:
        handler: What serves each request.
        address: Where.
        settings: What runs and protects the server.
    """

    handler: Handler
    address: Address
    settings: Settings


class Service:
    """Servers side by side, bound when it is made.

    A context manager; leaving the ``with`` block closes the servers.
    """

    def __init__(
        self,
        assignments: Sequence[Assignment],
        listeners: Sequence[OpenListener] | None = None,
        *,
        row: Row | None = None,
        workers: int = 1,
    ) -> None:
        """Make a server for each assignment, or none.

        Args:
            assignments: What to serve; at least one.
            listeners: A listener for each, which is closed with its server; ``None`` to open them
                here.
            row: Where this process counts, as one of several workers, with a station for each of
                the names of the listeners (`station_names`); ``None`` if nobody else wants to know.
            workers: How many processes serve the same listeners.  They share `max_connections`,
                which `AUTO` makes so many times what one process may have.

        Raises:
            CertificateError: A certificate or key cannot be used.
            CountersError: An address has no station.
            ListenerError: An address cannot be had.
            SettingError: There is a TLS address and no certificate, or the other way round, or no
                such owner of a Unix socket.
        """
        share, limit = len(assignments), descriptor_limit()
        # By identity: assignments share their settings, and those share one look at their files.
        settings = {id(each.settings): each.settings for each in assignments}
        for own in settings.values():
            own.check_addresses(each.address for each in assignments if each.settings is own)
        certificates = {key: load_certificates(each) for key, each in settings.items()}
        self._certificates = [each for each in certificates.values() if each is not None]
        self._drain_timeout = _longest(each.drain_timeout for each in settings.values())
        self._servers: list[AdoptingMixIn] = []
        self._counters: list[Counter] = []
        self._stations: dict[str, Station] = {}
        self._is_running = False
        self._is_in_loop = False
        self._is_stopping = False
        self._is_ending_at_once = False
        self._wish = Wish()
        self._stops: SimpleQueue[None] = SimpleQueue()  # a signal handler may put into it
        self.on_stop: Callable[[], object] = _nothing
        """Called by `stop`, in any thread and signal handler; not to wait there."""
        self._wakeup: Wakeup | None = None
        self._poll_interval = POLL_INTERVAL
        self._rounds: Rounds | None = None
        with ExitStack() as closing:
            if listeners is None:
                listeners = open_listeners(
                    [Opening.of(each.address, each.settings) for each in assignments]
                )
            for each in listeners:
                closing.callback(each.close)
            names = station_names(listeners)
            cells = Row(Counters.private(names), 0) if row is None else row
            for assignment, opened, name in zip(assignments, listeners, names, strict=True):
                own = assignment.settings
                station = self._stations[name] = cells.station(name)
                settled = own.resolved(limit, share)
                places = None
                if row is not None and settled.max_connections is not None:
                    settled, most = share_places(own, settled, limit // share, workers)
                    places = SharedPlaces(station, most, workers)
                kind = server_class(opened, settled, certificates[id(own)], places)
                server = kind(opened.place.name, assignment.handler)
                closing.callback(_close, server)
                self._servers.append(server)
                self._counters.append(count(server, station))
                closing.callback(self._counters[-1].close)
            self._closing = closing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def addresses(self) -> list[BoundAddress]:
        """The addresses that were bound, with the ports that the system chose."""
        return [server.address for server in self._servers]

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._is_stopping

    @property
    def drain_timeout(self) -> float | None:
        """Seconds that the longest drain may take; ``None`` for no limit."""
        return self._drain_timeout

    @property
    def has_left_handlers(self) -> bool:
        """Whether handlers still run in threads of this process, with nobody to wait for them."""
        return any(counter.has_left_handlers for counter in self._counters)

    def run(self) -> list[Tally]:
        """Serve until `stop`, drain, and close; says what each server did.

        With one address, serving is done in the calling thread; with several, in a thread each.

        Raises:
            Exception: What ended a serving loop; the other servers are drained first.
        """
        try:
            try:
                self._is_running = True
                if len(self._servers) == 1:
                    self._run_here()
                else:
                    self._run_in_threads()
            finally:
                self._is_running = False
        except KeyboardInterrupt:  # of `stopped_by_signals`, in the middle of anything
            pass
        tallies = [counter.tally() for counter in self._counters]
        self.close()
        return tallies

    @property
    def servers(self) -> Sequence[AdoptingMixIn]:
        """The servers, in the order of their assignments."""
        return self._servers

    def counts(self) -> dict[str, Counts]:
        """Return what this process has counted so far, by the address.  Callable from any thread.

        A second server of an address has a number behind it.
        """
        return {name: each.counts for name, each in self._stations.items()}

    def reload_certificates(self) -> bool:
        """Read the certificates and keys again; say whether all of them are in use now.

        Those that cannot be used are told of by events, and the earlier ones stay.
        """
        loaded = [
            each.reload() for each in self._certificates
        ]  # each of them, whatever came before
        return all(loaded)

    def overdue(self) -> list[AdoptingMixIn]:
        """Return the servers whose loops have not gone round since the last beat."""
        rounds = self._rounds
        return [] if rounds is None else rounds.overdue(self._servers)

    def beat(self, beat: Callable[[], object], interval: float) -> None:
        """Have `beat` called while the serving loops are alive; to be said before `run`.

        Args:
            beat: Called in one of the loops whenever every one of them has gone round again.
            interval: Seconds between two calls at the most, of a service that is alive.
        """
        rounds = self._rounds = Rounds(beat, len(self._servers), interval / 2)
        self._poll_interval = rounds.interval
        for server in self._servers:
            # On the instance: a server that nobody watches sleeps until a client comes.
            server._on_round = partial(rounds.go_round, server)

    def stop(self) -> None:
        """Have `run` drain the servers and return.  Callable from any thread and signal handler."""
        self._is_stopping = True
        self._stops.put(None)
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup.wake()
        self.on_stop()

    def stop_by_signal(self) -> None:
        """Stop as at the first of `stopped_by_signals`, from another thread than the main one.

        By the signal, since an alarm is the main thread's to set; but it is none of those that are
        counted, in whatever order they come.
        """
        self._wish.leave_out_one()
        os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        """Close the servers, and end the processes that still serve.  Callable again."""
        self._closing.close()

    @contextmanager
    def stopped_by_signals(
        self, numbers: Iterable[int] = STOP_SIGNALS, *, at_once: Collection[int] = ()
    ) -> Generator[None]:
        """Stop at these signals while the block runs; in the main thread.

        The first drains, a second one ends at once, unless it comes with the first (`SAME_WISH`):
        `KeyboardInterrupt` is raised in what the main thread does.  So it is when a handler that
        runs in the main thread, and holds the loop, has not ended `STOP_PATIENCE` seconds after the
        time of the drain.

        Args:
            numbers: Which.
            at_once: The only signals that end at once, for a process that may be told to drain
                more often; empty for the second of any.
        """
        process = os.getpid()
        timeout = self._drain_timeout
        before: dict[int, Any] = {}
        alarm: tuple[float, float] | None = None

        def catch(number: int) -> None:
            before[number] = signal.signal(number, on_signal)

        def on_signal(number: int, _: FrameType | None) -> None:
            nonlocal alarm
            if os.getpid() != process:  # a child, which has inherited this and is to end
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
                return
            ends_at_once = number in {*at_once, signal.SIGALRM}
            is_again = not (ends_at_once or at_once) and self._wish.comes_again()
            if not self._is_stopping:
                if timeout is not None:
                    # An alarm, and not a thread that waits, because a signal handler may come in
                    # between any two steps of starting one.
                    catch(signal.SIGALRM)
                    seconds = min(timeout + STOP_PATIENCE, LONGEST_ALARM)
                    alarm = signal.setitimer(signal.ITIMER_REAL, seconds)
                self.stop()
            if ends_at_once or is_again:
                self._interrupt(number)

        for number in (*numbers, *at_once):
            catch(number)
        try:
            yield
        finally:
            if alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, *alarm)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int) -> None:
        """Interrupt the main thread, if it is to end at once or the time of its loop is over."""
        if number == signal.SIGALRM:
            if self._is_in_loop:
                raise KeyboardInterrupt
        elif self._is_running:
            self._is_ending_at_once = True
            raise KeyboardInterrupt

    def _run_here(self) -> None:
        """Serve the one address in the calling thread, and drain from another.

        A handler may hold this thread (the serial engine), or the hub for which it waits.
        """
        (server,) = self._servers
        drainer = Drainer(server, self._stops)
        drainer.start()
        try:
            self._is_in_loop = True
            try:
                server.serve_forever(self._poll_interval)
            finally:
                self._is_in_loop = False
        except KeyboardInterrupt:
            if self._is_ending_at_once or not self._is_stopping:
                drainer.cancel()
                raise
            # A handler that held the loop was interrupted, and the drain is at its end.
        except BaseException:
            drainer.cancel()
            raise
        self._stops.put(None)  # if it was the program that ended the loop
        with closing(Wakeup()) as wakeup:  # not before the loop, whose own it is that hears signals
            drainer.tell(wakeup)
            wait_until(drainer.has_ended.is_set, wakeup)
        if drainer.error is not None:
            raise drainer.error
        if server.drain_report is None:
            server.drain()  # it was asked to before the loop had begun

    def _run_in_threads(self) -> None:
        """Serve each address in a thread of its own, until `stop` or until none is left."""
        wakeup = self._wakeup = Wakeup()
        try:
            loops = [ServingLoop(server, wakeup, self._poll_interval) for server in self._servers]
            for loop in loops:
                loop.start()
            wait_until(lambda: self._has_reason_to_stop(loops), wakeup)
            timeout = self._drain_timeout
            deadline = inf if timeout is None else time.monotonic() + timeout + STOP_PATIENCE
            for loop in loops:
                loop.drain()
            # A handler that holds its loop beyond the deadline is left behind; where the loop has
            # ended, the drain ends, too.
            wait_until(lambda: all(loop.has_ended for loop in loops), wakeup, deadline)
            wait_until(lambda: all(loop.is_drained or not loop.has_ended for loop in loops), wakeup)
        finally:
            self._wakeup = None
            wakeup.close()
        for loop in loops:
            if loop.error is not None:
                raise loop.error

    def _has_reason_to_stop(self, loops: Sequence[ServingLoop]) -> bool:
        return (
            self._is_stopping
            or any(loop.error is not None for loop in loops)
            or all(loop.has_ended for loop in loops)
        )


def serve(
    handler: Handler,
    *addresses: str | Address,
    engine: str = "threads",
    **settings: Unpack[SettingValues],
) -> list[Tally]:
    """Serve a handler at each address, with every protection on, until the service is stopped.

    In the main thread SIGINT and SIGTERM stop it: the first drains, a later one ends at once.  In
    another thread, where no signal arrives, it serves until each server was drained or shut down:
    a handler can do that (``self.server.drain()``), and so can whoever `events.ServerStarted` has
    told of the server.

    Args:
        handler: Called with ``(request, client_address, server)`` for each request, such as a class
            that derives from `BaseRequestHandler`.
        addresses: Where, such as ``"tcp://127.0.0.1:9000"``; at least one.  ``"tls://..."`` needs
            the settings ``cert`` and ``key``.
        engine: What runs the handlers: ``"threads"``, ``"pool"``, ``"green"``, ``"forks"`` or
            ``"serial"``.
        settings: Those of `portico.settings.Settings`, by name; ``None`` means no limit.

    Returns:
        What each server did, in the order of the addresses.

    Raises:
        AddressError: An address cannot be read.
        CertificateError: A certificate or key cannot be used.
        ListenerError: An address cannot be had.
        SettingError: There is no setting of a name, or a value is outside its range.
        PorticoError: A handler for streams would get datagrams, or the other way round.
        Exception: What ended a serving loop.
    """
    checked = Settings.read({"engine": engine, **settings})
    if not addresses:
        raise SettingError("addresses", addresses, "at least one, such as 'tcp://127.0.0.1:9000'")
    parsed = expand(parse(each) if isinstance(each, str) else each for each in addresses)
    for address in parsed:
        name = getattr(handler, "__qualname__", repr(handler))
        check_scheme(name, handler, scheme_of(address))
    with Service([Assignment(handler, address, checked) for address in parsed]) as service:
        in_main_thread = threading.current_thread() is threading.main_thread()
        with service.stopped_by_signals() if in_main_thread else nullcontext():
            return service.run()


def _longest(timeouts: Iterable[float | None]) -> float | None:
    """Return the longest of several times; ``None`` stands for no limit."""
    return max(timeouts, key=lambda timeout: inf if timeout is None else timeout)


def _nothing() -> None:
    """Do nothing."""


def _close(server: AdoptingMixIn) -> None:
    """Close a server, and end the children that still serve for it."""
    server.drain_timeout = None  # it was drained, or is to end at once
    server.server_close()
    if isinstance(server, ForkingMixIn):
        # A copy: the thread of a drain that is given up may collect one at any moment.
        for child in tuple(server.active_children or ()):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
