"""Accept requests in a loop, and see a server from its start to its end.

Owns the serving loop, what starts and stops it, its step, and what a drain does beside the
connections.  Leaves a request that was accepted to its path (`portico.request`), the kind of socket
to the families (`portico.families`) and where a request runs to the engines (`portico.engines`).

Source: the documentation of `socketserver` for the names; its observed behaviour for the rest.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Collection, Iterable
from functools import partial
from math import inf
from time import monotonic as time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

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
from portico.connection import ClientAddress, Connection, Request, can_be_tracked
from portico.errors import ListenerError, PreambleError
from portico.events import (
    AcceptPaused,
    AcceptResumed,
    CloseReason,
    ConnectionAccepted,
    ConnectionClosed,
    Drained,
    DrainStarted,
    ListenerLost,
    RefusalReason,
    ServerStarted,
    ServerStopped,
    emit,
)
from portico.guard import Guard, check_timeout
from portico.lifecycle import DrainReport, Phase, move
from portico.lobby import Guest, Lobby
from portico.request import RequestPath, inline
from portico.traffic import STILLNESS, connections_waiting

if TYPE_CHECKING:
    from portico.drain import Drain

MOST_AT_THE_END: Final = 65_536
"""Connections, or datagrams, that a drain still takes: more than a backlog holds.

A flood that goes on must not keep it from its end.  Of TCP connections the kernel says how many
wait when the drain begins, and those are taken.
"""

ON_THEIR_WAY: Final = 64
"""Connections that a drain takes beyond those that wait when it begins.

A client may know before our side of the kernel that its connection is complete.
"""

UNDER_WAY_INTERVAL: Final = 0.01
"""Seconds between two looks of a drain at what nobody tells it: that there is room for who waits in
the backlog, or that a request without a connection of its own has been served."""

SHED_AGAIN: Final = 1.0
"""Seconds after which another connection is ended for a client if the first still has its place.

Long beside what a handler needs that reads the end of its stream, on a machine that is short of
time, too; and a client that finds no place at all tries again after a second (RFC 6298).
"""

_NEVER: Final = threading.Event()
"""What is waited for when only time is to pass."""

_BEFORE_THE_END: Final = frozenset({Phase.SERVING, Phase.STOPPED, Phase.DRAINING})
"""The phases in which closing can begin with a drain, or wait for one."""


class BaseServer(RequestPath):
    """The hooks that every server has, and the loop that calls them.

    A subclass gives it a descriptor (`fileno`) and requests (`get_request`);
    `portico.TCPServer` and its siblings do.

    Instances are context managers; leaving the ``with`` block calls `server_close`.
    """

    timeout: float | None = None
    """Seconds that `handle_request` waits before it calls `handle_timeout`; ``None`` waits
    without limit.  `serve_forever` does not look at it."""

    max_connections: int | None = None
    """Connections that are open at once; ``None`` for no limit."""

    when_full: str = "wait"
    """What to do with a client for whom there is no place.

    ``"wait"`` leaves it in the backlog until there is one, ``"refuse"`` closes it after a
    `farewell`, ``"shed"`` closes the connection that has been idle for longest, and one whose
    handler is at work only if there is no other.
    """

    max_connections_per_peer: int | None = None
    """Connections of one IPv4 address, or of one IPv6 network of 64 bits."""

    accept_rate: float | None = None
    """Connections, or datagrams, a second on average; ``None`` for no limit."""

    accept_burst: int | None = None
    """How many may come at once after a quiet time; ``None`` for those of one second."""

    allowed_networks: Iterable[Any] | None = None
    """Networks and addresses from which one may come, such as ``["10.0.0.0/8", "::1"]``; ``None``
    for all.  A peer of a Unix socket may always come."""

    denied_networks: Iterable[Any] = ()
    """Those from which one may not, even if they are allowed."""

    idle_timeout: float | None = None
    """Seconds that a connection may stay open without a byte in either direction; ``None`` for no
    limit."""

    request_timeout: float | None = None
    """Seconds that a connection may stay open in all; ``None`` for no limit."""

    minimum_rate: float | None = None
    """Bytes a second that a peer has to send while its handler waits; ``None`` for no limit."""

    drain_timeout: float | None = None
    """Seconds that `drain`, and `server_close` if this is not ``None``, give open connections to
    finish; ``None`` for no limit."""

    draining: threading.Event
    """Set when a drain has begun, for handlers that would go on for long."""

    drain_report: DrainReport | None = None
    """What became of the connections, once a drain is over."""

    if TYPE_CHECKING:  # brought by the families
        socket: socket.socket

        def fileno(self) -> int: ...  # noqa: D102
        def get_request(self) -> tuple[Request, ClientAddress]: ...  # noqa: D102

    # Before __init__ ran, or when a subclass never calls it, these stand in.
    __lock = threading.RLock()
    # guards __loops, __acceptors, __phase, __is_taken_over and the moves of __is_shut_down.
    # Re-entrant, because a signal handler that calls shutdown() can interrupt the serving thread
    # while it holds the lock.
    __loops: tuple[tuple[int, int], ...] = ()  # the process and the thread of each
    __acceptors: tuple[Acceptor, ...] = ()  # what the loops wait with
    __pause: Pause | None = None
    __drain_wish: tuple[float | None] | None = None  # the timeout of a drain that the loop ends
    __is_taken_over = False  # by the call of drain() that carries it out
    __phase = Phase.CREATED
    _exhaustion: Exhaustion | None = None

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[[Any, Any, Any], Any],
    ) -> None:
        """Keep both arguments as attributes; open nothing.

        Args:
            server_address: Where to serve; its shape depends on the address family.
            RequestHandlerClass: Called with ``(request, client_address, server)`` for every
                request; a class that derives from `BaseRequestHandler`, or any callable.
                It is looked up anew for each request.
        """
        self.server_address = server_address
        self.RequestHandlerClass = RequestHandlerClass
        self.__lock = threading.RLock()
        self.__is_shut_down: threading.Event = _Ending()
        self.__shutdown_request = False
        self.__drain_callers: set[tuple[int, int]] = set()  # the process and the thread of each
        self.draining = threading.Event()
        self._guard = Guard(self)
        self._guard.read_settings()

    # --- the life of the server ---------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where the server is in its life.  Readable from any thread."""
        return self.__phase

    def server_activate(self) -> None:
        """Get ready to accept; the constructor calls it after `server_bind`."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve requests until `shutdown`, or until the listener is closed.

        An idle server waits in one system call and is woken by a descriptor.

        Args:
            poll_interval: Seconds between two calls of `service_actions` at the most, for
                servers that override it.  Nothing else depends on it.

        Raises:
            ValueError: The listener is closed already.
            ListenerError: The listener does not listen.
            Exception: What `service_actions`, `handle_error` or, unless it is an `OSError`,
                `get_request` raised.
        """
        here = os.getpid(), threading.get_ident()
        is_stopping = partial(vars(self).get, "_BaseServer__shutdown_request")
        acceptor = None
        try:
            with self.__lock:
                self.__loops += (here,)  # first of all: a signal handler may call shutdown()
            self.__is_shut_down.clear()
            acceptor = self.__start()
            while acceptor is not None and not is_stopping():
                ready = (self.__pause is None and acceptor.has_more) or self.__wait(
                    acceptor, self.__patience(acceptor, poll_interval)
                )
                if is_stopping():
                    break  # a connection that came with it stays in the backlog
                lobby = self._guard.lobby
                if lobby is not None:
                    self.__look_into_lobby(lobby)
                if ready:
                    if self.__pause is None:  # who was let in may have taken the last place
                        self._handle_request_noblock()
                elif not is_open(self):
                    self.__lose_listener(None)
                    break
                self.service_actions()
        finally:
            self.__stop(here, acceptor)
        if self.__drain_wish is not None:
            self.drain(*self.__drain_wish)

    def shutdown(self) -> None:
        """Make `serve_forever` return, and wait until it has.

        Callable from any thread, from a handler and from a signal handler.  In the thread
        that serves it returns at once, and the loop ends after the request under way.
        Before `serve_forever` it is remembered, and `serve_forever` will return at once; after
        it, nothing happens.
        """
        with self.__lock:
            ending = self.__is_shut_down
            if ending.is_set() is True:
                return
            self.__shutdown_request = True
            serves_here = self.__serves_here
        # A program may have put an event of its own in the place of ours.
        is_elsewhere = isinstance(ending, _Ending) and ending.process != os.getpid()
        if not serves_here and not is_elsewhere:
            ending.wait()

    def drain(self, timeout: float | None = None) -> DrainReport | None:
        """Stop accepting, and see the open connections to their end.

        Accepts first what the kernel has completed already, and closes the listener.  Sets
        `draining`.  Connections that are idle (the last byte that moved was ours, nothing is
        unread) get end-of-file; the others have time to finish; at the deadline, what is left is
        closed.

        Callable from any thread, and more than once: later calls join the first.  From a handler it
        waits for all connections but those of handlers that do the same.  In the thread that serves
        (a signal handler, a handler of the serial or the green engine) it returns at once: the
        drain has begun, and `serve_forever` sees to its end before it returns.  In a child that was
        forked from the process that serves it only sets `draining`: the rest is its parent's.

        Under `handle_request` of the serial engine, a signal handler cannot be told from the
        handler that it interrupts: that connection is spared, neither waited for nor closed.

        Args:
            timeout: Seconds until the rest is closed, 0 for at once; ``None`` for `drain_timeout`,
                and if that is ``None``, too, without limit.

        Returns:
            What became of the connections; ``None`` in the thread that serves or is draining
            already, and in a child.

        Raises:
            PhaseError: The server never served, or was closed without a drain.
            SettingError: The timeout is negative.
        """
        check_timeout("timeout", timeout)
        if self._guard.is_in_child or self._guard.is_inherited:  # it is the parent that accepts
            self.draining.set()
            return None
        here = os.getpid(), threading.get_ident()
        if here in self.__drain_callers:
            return None  # a signal handler: what it would wait for is the call that it interrupts
        try:
            self.__drain_callers.add(here)
            limit = self.drain_timeout if timeout is None else timeout
            if self.__serves_here:
                self.__note_wish(limit)
                return None
            return self.__carry_out_or_join(limit)
        finally:
            self.__drain_callers.discard(here)

    def __begin_drain(self, limit: float | None, spared: Request | None) -> Drain:
        """Begin a drain, for a caller that holds the lock; nobody has to see to its end yet."""
        phase = move(self.__phase, Phase.DRAINING)
        drain = self._guard.begin_drain(limit, spared)
        self.__phase = phase
        return drain

    def __note_wish(self, limit: float | None) -> None:
        """Begin a drain in the thread that serves, which carries it out when it has left the loop.

        Unless another does: then it joins that one.
        """
        with self.__lock:
            drain = self._guard.drain or self.__begin_drain(limit, None)
            self.__drain_wish = (limit,)
            self.__shutdown_request = True
        if inline.serving is not None:  # a handler holds the loop, until `__stop`
            drain.watch(self.draining)

    def __carry_out_or_join(self, limit: float | None) -> DrainReport | None:
        """See a drain to its end in a thread that does not serve: the first carries it out."""
        mine = self._request_here()
        with self.__lock:
            drain = self._guard.drain or self.__begin_drain(limit, mine)
            is_taken_over, self.__is_taken_over = self.__is_taken_over, True
        self._guard.spare(mine)  # if it began without this caller
        if self._replies_by_listener and self._is_under_way_here():
            drain.note_waiting()
        if not is_taken_over:
            return self.__carry_out(drain, limit)
        self._wait_event(drain.is_over, None)
        return self.drain_report

    def __carry_out(self, drain: Drain, limit: float | None) -> DrainReport:
        """Do what `drain` says, in the call that took it over; the others wait for that."""
        was_asked = self.__shutdown_request
        try:
            self.draining.set()
            with drain.watched(self.draining):
                self.shutdown()
                if DrainStarted.subscribers:
                    emit(DrainStarted(self, self._guard.open, limit))
                self.__accept_rest(drain)
            self.__clear_lobby()
            self.__release_room()
            if self._replies_by_listener:
                self.__await_requests(drain)
            self._close_listener()
            report = self.drain_report = drain.run(self._wait_event)
        finally:
            with self.__lock:
                self.__phase = move(self.__phase, Phase.CLOSED)
                if not was_asked and not self.__acceptors:
                    # No loop was there to see it; one with another listener is not meant.
                    self.__shutdown_request = False
            drain.is_over.set()
        if Drained.subscribers:
            emit(Drained(self, report))
        return report

    def service_actions(self) -> None:
        """Do what the program wants done now and then; for subclasses.

        The serving loop calls it after every request and, when it is overridden, at least
        every `poll_interval` seconds.  What it raises ends the loop.
        """

    def server_close(self) -> None:
        """Close the server; a serving loop ends.  Callable more than once.

        With a `drain_timeout`, it is drained first, and a handler that goes on all the same is not
        waited for; but not in the thread that serves.

        In a child that was forked from the process that serves, only its copies are closed: the
        connections are its parent's, and go on.
        """
        if self._guard.is_inherited:
            # Without the lock, which another thread of the parent may have held.
            self.__phase = move(self.__phase, Phase.CLOSED)
            self._close_listener()
            self._guard.close()
            return
        can_drain = self.__phase in _BEFORE_THE_END and not self.__serves_here
        if self.drain_timeout is not None and can_drain:
            self.drain()
        with self.__lock:
            self.__phase = move(self.__phase, Phase.CLOSED)
            if not self.__acceptors:  # else the last loop does
                self.__release_room()
        self._close_listener()
        self.__wake()
        self.__clear_lobby()
        self._guard.close()

    def pause_accepting(self, seconds: float | None = None, *, until: Collection[int] = ()) -> None:
        """Leave clients in the backlog for a while.

        For engines that have no room for another request, and for hooks.  To be called in the
        serving thread.  A later call replaces an earlier one.

        Args:
            seconds: How long; ``None`` for no limit.
            until: Descriptors; the first that becomes readable ends the pause.
        """
        self.__pause = Pause(inf if seconds is None else time() + seconds, until)

    def resume_accepting(self) -> None:
        """End what `pause_accepting` began.  To be called in the serving thread."""
        self.__pause = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server_close()

    # --- one request --------------------------------------------------------------------

    def handle_request(self) -> None:
        """Wait for one request and process it.

        Waits at most the smaller of `timeout` and the listener's own timeout, in seconds,
        then calls `handle_timeout`.

        A server that serves single requests is `Phase.STOPPED` between them, and can be drained.

        Raises:
            ValueError: The listener is closed.
        """
        self._guard.read_settings()
        limits = (self.socket.gettimeout(), self.timeout)
        timeout = min((limit for limit in limits if limit is not None), default=None)
        deadline = None if timeout is None else time() + timeout
        with Acceptor(self) as acceptor:
            while not self.__wait(acceptor, timeout) or self.__has_no_room():
                if deadline is not None:
                    timeout = deadline - time()
                    if timeout <= 0:
                        return self.handle_timeout()
        with self.__lock:
            if self.__phase is Phase.CREATED:  # not any more: it may be drained
                self.__phase = move(move(self.__phase, Phase.SERVING), Phase.STOPPED)
        return self._handle_request_noblock()

    def handle_timeout(self) -> None:
        """Do what is to be done when `handle_request` saw no request; for subclasses."""

    # Written out for speed, hence long.
    def _handle_request_noblock(self) -> None:  # noqa: C901
        """Accept one request, which is waiting, and process it: the step of every loop."""
        guard = self._guard
        if guard.gate is not None and self.__has_no_room():
            return
        try:
            request, client_address = self.get_request()
        except OSError as error:
            self.__recover(error)
            return
        started = time() if ConnectionClosed.subscribers else None
        try:
            if self._exhaustion is not None:
                self.__resume()
            if guard.counter is not None:
                guard.counter.note_accepted()
            if ConnectionAccepted.subscribers:
                emit(ConnectionAccepted(self, client_address))
            is_admitted = self.admit_request(request, client_address)
            reason = guard.refusals.pop(id(request), None) if guard.refusals else None
            if not is_admitted:
                self._refuse(request, client_address, reason or RefusalReason.NOT_ADMITTED)
                return
            if guard.tracks_plainly and can_be_tracked(request):
                guard.connections.by_request[id(request)] = Connection(request, client_address)
            elif can_be_tracked(request):
                guard.track(request, client_address)
            if not guard.verifies_late and not self.verify_request(request, client_address):
                self._refuse(request, client_address, RefusalReason.NOT_VERIFIED)
            elif guard.lobby is None or not self.__keep(guard.lobby, request, client_address):
                self.process_request(request, client_address)
        except Exception as error:
            self._fail(*inline.leave(request, client_address), error, started)
        except BaseException as error:
            self._fail(*inline.leave(request, client_address), error, started)
            raise

    # --- what the loop needs ------------------------------------------------------------

    @property
    def __shutdown_request(self) -> bool:
        """Whether the loop is to end.

        Programs set this name (as ``_BaseServer__shutdown_request``) from handlers, other
        threads and signal handlers, and find it in the instance's ``__dict__``.
        """
        return bool(vars(self).get("_BaseServer__shutdown_request", False))

    @__shutdown_request.setter
    def __shutdown_request(self, requested: bool) -> None:
        vars(self)["_BaseServer__shutdown_request"] = requested
        if requested:
            self.__wake()

    def _make_acceptor(self) -> Acceptor:
        """Return what the serving loop waits with; an engine may bring its own."""
        return Acceptor(self, wakeup=Wakeup())

    def __start(self) -> Acceptor | None:
        """Return what the loop waits with; ``None`` if a `shutdown` came first."""
        self._guard.read_settings()
        with self.__lock:  # a shutdown() from now on waits for this loop
            if self.__shutdown_request or self.__phase is Phase.DRAINING:
                if self.__phase is Phase.CREATED:  # it was asked to serve, and to stop
                    self.__phase = move(move(self.__phase, Phase.SERVING), Phase.STOPPED)
                return None
            if is_open(self) and not is_listening(self):
                raise ListenerError(
                    f"{type(self).__name__} does not listen: call server_bind() and "
                    "server_activate() before serve_forever()"
                )
            lobby = self._guard.lobby
            if lobby is None:
                lobby = self._guard.lobby = self._make_lobby()
            acceptor = self._make_acceptor()
            self.__acceptors += (acceptor,)
            if self.__phase is Phase.CLOSED:  # a program gave it another listener
                self.__begin_anew()
            if self.__phase is not Phase.SERVING:  # as another loop may have it already
                self.__phase = move(self.__phase, Phase.SERVING)
            if lobby is not None:
                acceptor.watch(lobby)
        if ServerStarted.subscribers:
            emit(ServerStarted(self))
        return acceptor

    def __stop(self, loop: tuple[int, int], acceptor: Acceptor | None) -> None:
        """Undo what `__start` did for this loop; after the last one, release `shutdown`.

        Args:
            loop: Its process and its thread, which it may share with another: one that a handler
                runs, or one on the same hub.
            acceptor: What it waited with; ``None`` if `__start` returned none, or did not return.
        """
        with self.__lock:
            is_alone = self.__loops.count(loop) == 1
            mine = [
                other
                for other in self.__acceptors
                if other is acceptor
                # A signal handler may have raised before the loop got to know it.
                or (acceptor is None and is_alone and (other.process, other.thread) == loop)
            ]
        for each in mine:
            each.close()
            if ServerStopped.subscribers:
                emit(ServerStopped(self))
        with self.__lock:
            # What a forked process has inherited is its parent's, to wake and to end.
            self.__acceptors = tuple(
                other
                for other in self.__acceptors
                if other.process == loop[0] and other not in mine
            )
            if not self.__acceptors:
                self.__shutdown_request = False
                self.__is_shut_down.set()
                if self.__phase is Phase.SERVING:
                    self.__phase = move(self.__phase, Phase.STOPPED)
                self.__release_room()
            # Until then a handler of another loop, or of an outer one, may hold that.
            drain = None if self.__acceptors else self._guard.drain
            if loop in self.__loops:
                at = self.__loops.index(loop)
                self.__loops = (*self.__loops[:at], *self.__loops[at + 1 :])
        if drain is not None:  # and no handler holds up a loop any more
            drain.end_watch()

    @property
    def __serves_here(self) -> bool:
        """Whether the calling thread is in `serve_forever`."""
        return (os.getpid(), threading.get_ident()) in self.__loops

    def __begin_anew(self) -> None:
        self.__phase, self.__is_taken_over = Phase.CREATED, False
        self._guard.drain = self.drain_report = self.__drain_wish = None
        self.draining.clear()

    def __wake(self) -> None:
        process = os.getpid()
        for acceptor in self.__acceptors:
            if acceptor.process == process:
                acceptor.wake()

    def __patience(self, acceptor: Acceptor, poll_interval: float) -> float | None:
        """Return how long the loop may wait: without limit if nobody needs it to come round."""
        needs_it = acceptor.misses_signals or _overrides_service_actions(self)
        patience = poll_interval if needs_it else None
        lobby = self._guard.lobby
        remaining = None if lobby is None else lobby.remaining(time())
        if remaining is None:
            return patience
        return remaining if patience is None else min(patience, remaining)

    def __wait(self, acceptor: Acceptor, timeout: float | None) -> bool:
        pause = self.__pause
        if pause is None:
            return acceptor.wait(timeout)
        if acceptor.rest(pause, timeout) and self.__pause is pause:
            self.__pause = None
        return False

    def __has_no_room(self) -> bool:
        """Say whether clients have to wait for a place; if so, accepting rests until there is."""
        try:
            room = self._guard.await_room()
        except OSError as error:
            self.__recover(error)
            return True
        if room is None:
            return False
        seconds = None
        if self._guard.sheds:
            if not is_ready(self):  # an engine asks ahead, and nobody is there
                return True
            self._guard.shed()
            seconds = SHED_AGAIN
        self._await_place((room,), seconds)
        return True

    def _await_place(self, until: tuple[int, ...], seconds: float | None) -> None:
        """Rest until there is a place; an engine may know what else tells of one.

        Args:
            until: Descriptors, of which one is readable as soon as there is a place.
            seconds: After which to look again in any case; ``None`` for no limit.
        """
        deadline = inf if seconds is None else time() + seconds
        self.__pause = Pause(deadline, until, is_for_place=True)

    def __release_room(self) -> None:
        """Release the descriptor that tells of room, now that nobody accepts."""
        gate = self._guard.gate
        if gate is not None and gate.close():
            self.__pause = None

    def __recover(self, error: OSError) -> None:
        """Decide how to go on after accepting failed."""
        match recovery(error):
            case Recovery.PAUSE:
                if self._exhaustion is None:
                    self._exhaustion = Exhaustion(time())
                    if AcceptPaused.subscribers:
                        emit(AcceptPaused(self, error))
                self.__pause = self._exhaustion.next_pause(time())
            case Recovery.CHECK if self.__acceptors and not is_listening(self):
                self.__lose_listener(error if is_open(self) else None)
            case _:
                pass

    def __resume(self) -> None:
        exhaustion, self._exhaustion = self._exhaustion, None
        if exhaustion is not None and AcceptResumed.subscribers:
            emit(AcceptResumed(self, time() - exhaustion.since))

    def __lose_listener(self, error: OSError | None) -> None:
        self.__shutdown_request = True
        if ListenerLost.subscribers:
            emit(ListenerLost(self, error))

    # --- peers that have said nothing yet -------------------------------------------------

    _keeps_lobby: bool = True
    """Whether a peer that has to speak first waits in the acceptor until it does; not on engines
    with a worker for everybody."""

    def _make_lobby(self) -> Lobby | None:
        """Return where peers wait that have to speak first; for the families."""
        return None

    def _begins_with_peer(self, request: Request, client_address: ClientAddress) -> bool:
        """Say whether a handler is made only after its peer has spoken; for the families."""
        return False

    def __keep(self, lobby: Lobby, request: Request, client_address: ClientAddress) -> bool:
        """Keep a request until its peer has begun to speak, if it has to; say whether."""
        return (
            # There has to be a loop that looks after it.
            (len(self.__acceptors) > 0 or self.draining.is_set())
            and self._begins_with_peer(request, client_address)
            and lobby.take(Guest(request, client_address, time()))
        )

    def __look_into_lobby(self, lobby: Lobby) -> None:
        """Process the requests whose peers have begun to speak, and end those that are late.

        All who are here have a place, so while others wait for one, these go on: it may be theirs
        that comes free.
        """
        pause = self.__pause
        if pause is None or pause.is_for_place:
            for guest in lobby.speaking():
                self.__let_in(lobby, guest)
                if self.__pause is not pause or self.__shutdown_request:
                    break  # the others stay where they are, as in the backlog
        for guest in lobby.late(time()):
            if lobby.leave(guest):
                silence = PreambleError("preamble", "the peer said nothing", is_late=True)
                started = guest.since if ConnectionClosed.subscribers else None
                self._fail(guest.request, guest.client_address, silence, started)

    def __let_in(self, lobby: Lobby, guest: Guest) -> None:
        """Process a request that has been kept."""
        request, client_address, since = guest
        if not lobby.leave(guest):
            return
        connection = self._guard.connections.get(request)
        if connection is not None and lobby.timeout is not None:
            connection.patience = since + lobby.timeout - time()
        started = time() if ConnectionClosed.subscribers else None
        try:
            self.process_request(request, client_address)
        except Exception as error:
            self._fail(*inline.leave(request, client_address), error, started)
        except BaseException as error:
            self._fail(*inline.leave(request, client_address), error, started)
            raise

    def __let_in_last(self, lobby: Lobby) -> bool:
        """Process one more request in a drain, and say whether there may be another.

        Of those that have said nothing, one that came a moment ago has its first bytes on the way;
        the others are left for `__clear_lobby`.
        """
        guest = next(lobby.speaking(), None)
        if guest is not None:
            self.__let_in(lobby, guest)
            return True
        youngest = max((guest.since for guest in lobby.guests()), default=-inf)
        return lobby.wait(youngest + STILLNESS - time())

    def __clear_lobby(self) -> None:
        """End the connections whose peers have said nothing, and keep no more."""
        lobby = self._guard.lobby
        if lobby is None:
            return
        self._guard.lobby = None
        for guest in lobby.close():
            self._end(guest.request)
            started = guest.since if ConnectionClosed.subscribers else None
            self._tell_closed(guest.client_address, CloseReason.CUT, started)

    def __accept_rest(self, drain: Drain) -> None:
        """Accept what the kernel completed before now: no more than the backlog holds."""
        if not is_open(self) or not is_listening(self):
            return
        with Acceptor(self) as acceptor:
            waiting, lobby = connections_waiting(self.__dict__.get("socket")), self._guard.lobby
            left = MOST_AT_THE_END if waiting is None else waiting + ON_THEIR_WAY
            while left and time() < drain.deadline:
                if self.__pause is not None:
                    drain.look()  # who is idle makes room
                    if lobby is not None:
                        self.__look_into_lobby(lobby)  # who is in there has a place as well
                    self._wait_event(_NEVER, UNDER_WAY_INTERVAL)
                    self.__wait(acceptor, 0)
                elif acceptor.wait(0):
                    is_full = self._guard.is_full
                    self._handle_request_noblock()
                    if not is_full and self._exhaustion is None:  # or nobody was taken
                        left -= 1
                elif lobby is None or not self.__let_in_last(lobby):
                    break

    def __await_requests(self, drain: Drain) -> None:
        """Wait until what was taken has been served, as far as the engine knows."""
        # Less those whose handlers wait for the drain.
        while (left := self._requests_under_way() - drain.waiting) > 0 and time() < drain.deadline:
            self._wait_event(_NEVER, UNDER_WAY_INTERVAL)
        drain.unfinished = max(0, left)

    @property
    def _has_stragglers(self) -> bool:
        """Whether there are handlers for which an engine does not wait.

        A drain has given them up, or they are those of the process from which this one was forked.
        """
        drain = self._guard.drain
        has_given_up = drain is not None and drain.stragglers + drain.unfinished > 0
        return has_given_up or self._guard.is_inherited

    @property
    def _replies_by_listener(self) -> bool:
        """Whether handlers use the listener, so that it must stay open for them."""
        return False

    def _requests_under_way(self) -> int:
        """Return how many requests wait for a worker or are being served; for the engines."""
        return 0

    def _is_under_way_here(self) -> bool:
        """Say whether the calling thread is serving one of these requests; for the engines."""
        return False

    def _close_listener(self) -> None:
        """Close the listener, and nothing else; for the families."""

    def _wait_event(self, event: threading.Event, seconds: float | None) -> None:
        """Wait for an event in the way of the engine."""
        event.wait(seconds)


class _Ending(threading.Event):
    """Set when no loop serves any more; knows where the last one, ours or the program's, began."""

    process = 0
    """The process of that loop; 0 before the first."""

    def clear(self) -> None:
        """Note that a loop begins: what `socketserver` has every loop say."""
        self.process = os.getpid()
        # As Event does it, without its lock: Ctrl-C just then would leave that taken, and the end
        # of the loop would wait for it.
        self._flag = False


_service_actions_of_the_base: Final = BaseServer.service_actions


def _overrides_service_actions(server: BaseServer) -> bool:
    """Say whether the program wants `service_actions`: by subclass, instance or patch."""
    actions = server.service_actions
    return getattr(actions, "__func__", actions) is not _service_actions_of_the_base
