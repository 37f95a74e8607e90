"""Run servers side by side: one for each address, started and stopped together.

Owns how a server is put together from settings and an address, which of its loops runs in which
thread, and how a signal drains all of them.  Leaves serving and draining to the servers, counting
to `portico.tally`, and what is allowed to `portico.settings`.
"""

from __future__ import annotations

import os
import pkgutil
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, Unpack

from portico.acceptor import Wakeup
from portico.address import Address, BoundAddress, DescriptorAddress, Scheme, parse
from portico.counters import Counters, Row, Station
from portico.counts import Counts
from portico.drain import LAST_WORDS
from portico.engines import ENGINES
from portico.engines.forks import ForkingMixIn
from portico.errors import ListenerError, PhaseError, SettingError
from portico.events import ListenerBound, emit
from portico.families import TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from portico.listener import OpenListener, expand, open_listener, scheme_of
from portico.places import SharedPlaces, SharingMixIn
from portico.settings import AUTO, Settings, SettingValues, connection_limit
from portico.tally import Counter, count
from portico.tally import Tally as Tally  # noqa: PLC0414  # what `Service.run` returns
from portico.target import Handler, check_scheme

if TYPE_CHECKING:
    from portico.certificates import Certificates

    _Base: TypeAlias = TCPServer
else:
    _Base = object

FAMILIES: Final[Mapping[Scheme, type[TCPServer]]] = {
    Scheme.TCP: TCPServer,
    Scheme.TLS: TCPServer,
    Scheme.UDP: UDPServer,
    Scheme.UNIX: UnixStreamServer,
    Scheme.UNIX_DATAGRAM: UnixDatagramServer,
}
"""The family that serves each scheme."""

STOP_PATIENCE: Final = 2 * LAST_WORDS
"""Seconds that a loop still has after the time of its drain.

A handler that holds its loop has been given end-of-file by then, or its connection was closed, and
it had its last words; one that does not even notice that is interrupted, or left behind."""

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

SIGNAL_INTERVAL: Final = 0.5
"""Seconds until a signal is noticed where the program has another wake-up descriptor for them."""

LONGEST_PAUSE: Final = 3600.0
"""Seconds of one wait at the most; then it waits again.  poll(2) counts milliseconds in an ``int``,
which are 24 days."""

LONGEST_ALARM: Final = 1e9
"""Seconds, 31 years, that no drain outlasts, and for which the system still sets an alarm."""

POLL_INTERVAL: Final = 0.5
"""Seconds between two rounds of an idle loop that has something to do in each."""

OF_EVERY_KIND: Final = ("accept_rate", "accept_burst", "allowed_networks", "denied_networks")
"""Settings of every server under the same name."""

OF_CONNECTIONS: Final = (
    "max_connections",
    "max_connections_per_peer",
    "when_full",
    "farewell",
    "handshake_timeout",
    "idle_timeout",
    "request_timeout",
    "minimum_rate",
    "proxy_protocol",
)
"""Those of servers whose requests are connections: a datagram has no place and no time."""


class AdoptingMixIn(_Base):
    """Serve on a listener that is open already.

    Owns `server_bind`, `server_activate` and the closing of the listener; extends `shutdown` and
    `fileno`.
    """

    opened: OpenListener
    """The listener."""

    leaves_rest: bool = False
    """Whether a drain leaves those who wait in the backlog to another process that accepts them."""

    on_left: Callable[[], object] | None = None
    """Called when the server accepts nobody any more; perhaps more than once."""

    _on_round: Callable[[], object] | None = None
    """Called in the serving loop whenever it comes round; see `portico.acceptor.round_of`."""

    _has_stopped = False

    @property
    def shares_listener(self) -> bool:
        """Whether other processes accept from it, too."""
        return self.opened.is_lent

    @property
    def address(self) -> BoundAddress:
        """The address that was bound, with the port that the system chose."""
        return self.opened.place.address_of(self.server_address)

    def shutdown(self) -> None:
        """End the loop; what comes after it may have no listener."""
        super().shutdown()
        self._has_stopped = True

    def fileno(self) -> int:
        """Return the descriptor of the listener; -1 when nobody is accepted from it any more."""
        return -1 if self._has_stopped and self.leaves_rest else super().fileno()

    def server_bind(self) -> None:
        """Take the listener over."""
        self.socket.close()  # every server makes one for itself
        self.socket = self.opened.socket
        self.server_address = self.socket.getsockname()
        if ListenerBound.subscribers:
            emit(ListenerBound(self, self.server_address))

    def server_activate(self) -> None:
        """Do nothing: it listens."""

    def _close_listener(self) -> None:
        self.opened.close()
        super()._close_listener()
        if self.on_left is not None:
            self.on_left()


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
            SettingError: There is a TLS address and no certificate, or the other way round.
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
        self._stops: SimpleQueue[None] = SimpleQueue()  # a signal handler may put into it
        self._wakeup: Wakeup | None = None
        self._poll_interval = POLL_INTERVAL
        self._pulse: _Pulse | None = None
        with ExitStack() as closing:
            if listeners is None:
                listeners = open_listeners(assignments)
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
        pulse = self._pulse
        return [] if pulse is None else pulse.overdue(self._servers)

    def beat(self, beat: Callable[[], object], interval: float) -> None:
        """Have `beat` called while the serving loops are alive; to be said before `run`.

        Args:
            beat: Called in one of the loops whenever every one of them has gone round again.
            interval: Seconds between two calls at the most, of a service that is alive.
        """
        pulse = self._pulse = _Pulse(beat, len(self._servers), interval / 2)
        self._poll_interval = pulse.interval
        for server in self._servers:
            # On the instance: a server that nobody watches sleeps until a client comes.
            server._on_round = partial(pulse.go_round, server)

    def stop(self) -> None:
        """Have `run` drain the servers and return.  Callable from any thread and signal handler."""
        self._is_stopping = True
        self._stops.put(None)
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup.wake()

    def close(self) -> None:
        """Close the servers, and end the processes that still serve.  Callable again."""
        self._closing.close()

    @contextmanager
    def stopped_by_signals(
        self, numbers: Iterable[int] = STOP_SIGNALS, *, at_once: Collection[int] = ()
    ) -> Generator[None]:
        """Stop at these signals while the block runs; in the main thread.

        The first drains, a second one ends at once: `KeyboardInterrupt` is raised in what the main
        thread does.  So it is when a handler that runs in the main thread, and holds the loop, has
        not ended `STOP_PATIENCE` seconds after the time of the drain.

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
            is_first = not self._is_stopping
            if is_first:
                if timeout is not None:
                    # An alarm, and not a thread that waits, because a signal handler may come in
                    # between any two steps of starting one.
                    catch(signal.SIGALRM)
                    seconds = min(timeout + STOP_PATIENCE, LONGEST_ALARM)
                    alarm = signal.setitimer(signal.ITIMER_REAL, seconds)
                self.stop()
            if number in {*at_once, signal.SIGALRM} or not (is_first or at_once):
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
        drainer = _Drainer(server, self._stops)
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
            _wait_until(drainer.has_ended.is_set, wakeup)
        if drainer.error is not None:
            raise drainer.error
        if server.drain_report is None:
            server.drain()  # it was asked to before the loop had begun

    def _run_in_threads(self) -> None:
        """Serve each address in a thread of its own, until `stop` or until none is left."""
        wakeup = self._wakeup = Wakeup()
        try:
            loops = [_Loop(server, wakeup, self._poll_interval) for server in self._servers]
            for loop in loops:
                loop.start()
            _wait_until(lambda: self._has_reason_to_stop(loops), wakeup)
            timeout = self._drain_timeout
            deadline = inf if timeout is None else time.monotonic() + timeout + STOP_PATIENCE
            for loop in loops:
                loop.drain()
            # A handler that holds its loop beyond the deadline is left behind; where the loop has
            # ended, the drain ends, too.
            _wait_until(lambda: all(loop.has_ended for loop in loops), wakeup, deadline)
            _wait_until(
                lambda: all(loop.is_drained or not loop.has_ended for loop in loops), wakeup
            )
        finally:
            self._wakeup = None
            wakeup.close()
        for loop in loops:
            if loop.error is not None:
                raise loop.error

    def _has_reason_to_stop(self, loops: Sequence[_Loop]) -> bool:
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

    In the main thread SIGINT and SIGTERM stop it: the first drains, a second one ends at once.  In
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


@dataclass(frozen=True, slots=True)
class Opening:
    """Where a listener is to be opened, before anybody knows by whom it is served.

    Attributes:
        address: Where.
        settings: Its backlog, and who may use the file of a Unix socket.
    """

    address: Address
    settings: Settings


def open_listeners(openings: Sequence[Opening | Assignment]) -> list[OpenListener]:
    """Open a listener for each of several openings, or none.

    Raises:
        ListenerError: An address cannot be had.
        SettingError: There is no such owner of a Unix socket.
    """
    _refuse_shared([each.address for each in openings])
    accesses = [each.settings.socket_access() for each in openings]
    with ExitStack() as closing:
        opened: list[OpenListener] = []
        for each, access in zip(openings, accesses, strict=True):
            backlog = each.settings.backlog
            opened.append(open_listener(each.address, backlog=backlog, access=access))
            closing.callback(opened[-1].close)
        closing.pop_all()
        return opened


def station_names(listeners: Iterable[OpenListener]) -> list[str]:
    """Return what the stations of listeners are called: by their addresses, each name once."""
    names: list[str] = []
    for each in listeners:
        bound = str(each.place.address_of(each.socket.getsockname()))
        again = sum(name.partition(" ")[0] == bound for name in names)
        names.append(f"{bound} {again + 1}" if again else bound)
    return names


def share_places(
    asked: Settings, settled: Settings, descriptors: int, workers: int
) -> tuple[Settings, int]:
    """Say how many connections one worker may have, and how many all of them.

    Args:
        asked: The settings of a server.
        settled: The same, with a number in the place of each `AUTO`.
        descriptors: How many one process may have open for this server; below 0 for no limit.
        workers: How many there are.

    Returns:
        The settings of the server in one worker, which has descriptors of its own to be bounded
        by, and the limit for all.
    """
    most = settled.max_connections
    assert isinstance(most, int), "it is settled"
    if asked.max_connections == AUTO:
        return settled, most * workers
    own = min(most, connection_limit(descriptors, most))
    return replace(settled, max_connections=own), most


def _refuse_shared(addresses: Sequence[Address]) -> None:
    """Make sure that no inherited socket is two servers': a client would get either of them.

    A socket that is opened here is refused by the system, the second time.
    """
    seen: set[int] = set()
    for each in addresses:
        if isinstance(each, DescriptorAddress):
            if each.descriptor in seen:
                raise ListenerError(
                    f"cannot listen on {each}: in use by this very process; is the address, or "
                    "the name that systemd has for it, given twice?"
                )
            seen.add(each.descriptor)


def server_class(
    opened: OpenListener,
    settings: Settings,
    certificates: Certificates | None = None,
    places: SharedPlaces | None = None,
) -> type[AdoptingMixIn]:
    """Put together the class that serves a listener: an engine, in front of a family.

    Its requests do not outlive the program, nor hold up its end.

    Args:
        opened: The listener.
        settings: With a number in the place of each `AUTO`.
        certificates: For an address that speaks TLS.
        places: Those that it shares with other processes; ``None`` for none.
    """
    scheme = opened.place.address.scheme
    family = FAMILIES[scheme]
    mixin = ENGINES[settings.engine]
    engines = (pkgutil.resolve_name(mixin),) if mixin else ()
    prefix = "".join(kind.__name__.removesuffix("MixIn") for kind in engines)
    names = OF_EVERY_KIND if scheme.is_datagram else OF_EVERY_KIND + OF_CONNECTIONS
    attributes: dict[str, Any] = {
        "__module__": __name__,
        "opened": opened,
        "address_family": opened.place.family,
        "daemon_threads": True,
        "block_on_close": False,
        "request_queue_size": settings.backlog,
        "drain_timeout": settings.drain_timeout,
        "ssl_context": certificates if scheme is Scheme.TLS else None,
    }
    attributes |= {name: getattr(settings, name) for name in names}
    attributes |= settings.engine_attributes()
    if scheme.is_datagram:
        # The listener waits, for the sake of handlers that reply by it; the acceptor does not:
        # another process that has it may be faster.
        attributes["receive_flags"] = socket.MSG_DONTWAIT
    mixins: tuple[type[Any], ...] = (*engines, AdoptingMixIn)
    if places is not None and not scheme.is_datagram:
        attributes["shared_places"] = places
        mixins = (SharingMixIn, *mixins)
    bases: Any = (*mixins, family)
    return type(f"{prefix}{family.__name__}", bases, attributes)


def load_certificates(settings: Settings) -> Certificates | None:
    """Load what the settings name; ``None`` if they name no certificate.

    Raises:
        CertificateError: A file cannot be used.
    """
    if settings.cert is None:
        return None
    from portico.certificates import Certificates  # noqa: PLC0415  # it stands on ssl

    wanted: Any = settings.client_certificates
    if wanted is None:
        wanted = "none" if settings.client_ca is None else "required"
    return Certificates(
        settings.cert, settings.key, client_ca=settings.client_ca, client_certificates=wanted
    )


def _longest(timeouts: Iterable[float | None]) -> float | None:
    """Return the longest of several times; ``None`` stands for no limit."""
    return max(timeouts, key=lambda timeout: inf if timeout is None else timeout)


def descriptor_limit() -> int:
    """Return how many descriptors this process may have open; below 0 for no limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors open as the system allows it.

    The usual limit, 1,024, is for the sake of select(2), which knows no higher numbers.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems say more than they allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _close(server: AdoptingMixIn) -> None:
    """Close a server, and end the children that still serve for it."""
    server.drain_timeout = None  # it was drained, or is to end at once
    server.server_close()
    if isinstance(server, ForkingMixIn):
        # A copy: the thread of a drain that is given up may collect one at any moment.
        for child in tuple(server.active_children or ()):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)


def _wait_until(is_so: Callable[[], bool], wakeup: Wakeup, deadline: float = inf) -> None:
    """Wait until something is so, of which `wakeup` tells, or until the deadline.

    In the main thread a signal ends the wait for as long as its handler takes.  To wait for an
    event, or a thread, would not do: a signal that comes just before goes unnoticed until the end.
    """
    poll = select.poll()  # and not select(2), since descriptors may be many
    poll.register(wakeup, select.POLLIN)
    while not is_so() and (remaining := deadline - time.monotonic()) > 0:
        pause = min(remaining, SIGNAL_INTERVAL if wakeup.misses_signals else LONGEST_PAUSE)
        poll.poll(ceil(pause * 1000))
        wakeup.clear()


class _Drainer(threading.Thread):
    """Drains a server whose loop runs elsewhere, once it is asked to."""

    def __init__(self, server: AdoptingMixIn, stops: SimpleQueue[None]) -> None:
        super().__init__(name=f"drain of {server.address}", daemon=True)
        self.error: BaseException | None = None
        self.has_ended = threading.Event()
        self._has_begun = False
        self._is_cancelled = False
        self._server = server
        self._stops = stops
        self._wakeup: Wakeup | None = None

    def tell(self, wakeup: Wakeup) -> None:
        """Say what to wake at the end; who has said so looks whether it has come already."""
        self._wakeup = wakeup

    def cancel(self) -> None:
        """Have the thread end, unless it drains already."""
        self._is_cancelled = True
        self._stops.put(None)
        if not self._has_begun:
            self.join(LAST_WORDS)

    def run(self) -> None:
        self._stops.get()
        try:
            if not self._is_cancelled:
                self._has_begun = True
                self._server.drain()
        except PhaseError:  # the loop has not begun: it will end at once
            self._server.shutdown()
        except BaseException as error:  # raised again, in the thread of `Service.run`
            self.error = error
        finally:
            self.has_ended.set()
            if self._wakeup is not None:
                self._wakeup.wake()


class _Loop(threading.Thread):
    """A serving loop in a thread of its own."""

    def __init__(self, server: AdoptingMixIn, wakeup: Wakeup, poll_interval: float) -> None:
        super().__init__(name=str(server.address), daemon=True)
        self.error: BaseException | None = None
        self.has_ended = False
        self.is_drained = False
        self._server = server
        self._wakeup = wakeup
        self._poll_interval = poll_interval

    def run(self) -> None:
        try:
            self._server.serve_forever(self._poll_interval)
        except BaseException as error:  # raised again, in the thread of `Service.run`
            self.error = error
        finally:
            self.has_ended = True
            self._wakeup.wake()

    def drain(self) -> None:
        """Begin to drain the server."""
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        try:
            try:
                self._server.drain()
            except PhaseError:  # the loop has not begun: it will end at once
                self._server.shutdown()
                self.join()
                self._server.drain()
        except BaseException as error:
            self.error = self.error or error
        finally:
            self.is_drained = True
            self._wakeup.wake()


class _Pulse:
    """Tells that all serving loops are alive, by the rounds that they make."""

    def __init__(self, beat: Callable[[], object], loops: int, interval: float) -> None:
        self.interval = interval
        self._beat = beat
        self._loops = loops
        self._changed = threading.Lock()  # guards the two below
        self._seen: set[AdoptingMixIn] = set()
        self._last = -inf
        self._threads: dict[AdoptingMixIn, int] = {}

    def go_round(self, server: AdoptingMixIn) -> None:
        """Take note that a loop has gone round; called in it, for every connection as well.

        Of a server with several, as one with several hubs has, the first counts.
        """
        here = threading.get_ident()
        if self._threads.setdefault(server, here) != here:
            return
        now = time.monotonic()
        with self._changed:
            self._seen.add(server)
            if len(self._seen) < self._loops or now - self._last < self.interval:
                return
            self._seen.clear()
            self._last = now
        self._beat()

    def overdue(self, servers: Iterable[AdoptingMixIn]) -> list[AdoptingMixIn]:
        """Return the servers whose loops have not gone round."""
        with self._changed:
            return [each for each in servers if each not in self._seen]
