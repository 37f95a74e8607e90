"""Watch over the connections of one server: who comes in, how long they stay, how they end.

Owns what the settings of a server ask for: its gate, its timekeeper, and its drain, with the set of
open connections that all of them work on.  Without such settings, that set is all there is.
"""

from __future__ import annotations

import os
from itertools import islice
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol

from portico.admission import AdmissionRules
from portico.connection import Connection, Connections, can_be_tracked
from portico.deadlines import TICK, Rules, check_limit
from portico.drain import Drain
from portico.errors import SettingError
from portico.gate import Gate, WhenFull, read_when_full
from portico.timekeeper import Timekeeper
from portico.traffic import idle_seconds, look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from portico.connection import ClientAddress, Request
    from portico.events import CloseReason, RefusalReason
    from portico.lobby import Lobby
    from portico.siblings import Siblings

ADMISSION: Final = (
    "max_connections",
    "max_connections_per_peer",
    "accept_rate",
    "accept_burst",
    "allowed_networks",
    "denied_networks",
)
"""The settings that `AdmissionRules` has under the same names."""

DEADLINES: Final = ("idle_timeout", "request_timeout", "minimum_rate")
"""Those that `Rules` has."""

SHED_SHARE: Final = 8
"""One in how many connections is remembered as idle by a look at all of them.

Looking at each for every client that comes would make a flood of clients expensive.
"""

VAIN_LOOK: Final = 1.0
"""Seconds after a look that found all at work until the next one: it has asked about each."""


class Counting(Protocol):
    """Who counts the requests of a server.  Callable from any thread."""

    def note_accepted(self, count: int = 1, received: int = 0) -> None:
        """Count requests that came in, and the bytes of those that are datagrams.

        The bytes only of those for which `note_datagram` is not called.
        """
        ...

    def note_refused(self, reason: RefusalReason) -> None:
        """Count one that does not get as far as a handler."""
        ...

    def note_closed(self, reason: CloseReason) -> None:
        """Count the end of one."""
        ...

    def note_finished(self, count: int) -> None:
        """Count requests whose handlers have ended, of which nothing else is told."""
        ...

    def note_closing(self, request: Request) -> None:
        """Look at a connection whose socket is closed next."""
        ...

    def note_datagram(self, size: int) -> None:
        """Note that a datagram of so many bytes is done with."""
        ...

    def note_child_end(self, process: int) -> None:
        """Note that a child process has ended which served a request."""
        ...


class Guard:
    """Guards one server.  Callable from any thread, except where it says otherwise.

    Args:
        server: Whose settings count; ``None`` for one that never was initialised.
    """

    def __init__(self, server: Any) -> None:
        self.connections = Connections(self._note_lost)
        self.gate: Gate | None = None
        """Where connections get a place; ``None`` if everyone may come in."""
        self.keeper: Timekeeper | None = None
        """What ends connections whose time is over; ``None`` if there is no limit."""
        self.drain: Drain | None = None
        """The drain under way, or the last one."""
        self.verifies_late = False
        """Whether `verify_request` waits for the preamble, which tells who the peer is."""
        self.tracks_plainly = False
        """Whether a connection that comes is remembered without further questions: it needs no
        place, has no limit in time, and ends where the hooks of this library see it."""
        self.is_in_child = False
        """Whether this process was forked to serve one connection."""
        self.of_children: dict[int, Connection] = {}
        """Connections that child processes serve, by the process."""
        self.siblings: Siblings | None = None
        """What child processes say of whom proxies speak for, if those are counted."""
        self.lobby: Lobby | None = None
        """Where connections wait for their peers' first word; ``None`` where they do not."""
        self.refusals: dict[int, RefusalReason] = {}
        """Why a request was not admitted, by its ``id``, until that is told."""
        self.make_gate: Callable[..., Gate] | None = getattr(server, "make_gate", None)
        """What makes the gate, where other processes have a part in it."""
        self.counter: Counting | None = None
        """Who wants to know of connections that end; ``None`` if nobody counts."""
        self._server = server
        self._process = os.getpid()
        self._settings: object = None
        self._row: int | None = None  # of the connection, in a child
        self._choosing = Lock()  # held from the choice of a row until it is taken
        self._shedding = Lock()  # guards what follows
        self._idle: list[tuple[float, Connection]] = []  # the longest last
        self._at_work: list[tuple[float, Connection]] = []  # if nobody else was found
        self._stubborn: Connection | None = None  # one of these that was ended, and may go on
        self._next_look = 0.0

    def read_settings(self) -> None:
        """Build what the settings ask for, if they have changed since the last time.

        To be called when the server is made, and before it accepts.  Connections that are open
        then take their places at the gate that is built, and come under the limits in time.

        Raises:
            SettingError: A setting is outside its range.
        """
        server = self._server
        if server is None:
            return
        if self._process != os.getpid():
            self._leave_parent()
        check_timeout("drain_timeout", server.drain_timeout)
        if not isinstance(server.farewell, bytes | bytearray | memoryview):
            raise SettingError("farewell", server.farewell, "bytes")
        admission = {name: getattr(server, name) for name in ADMISSION}
        deadlines = {name: getattr(server, name) for name in DEADLINES}
        peers_come = getattr(server, "proxy_protocol", None) is None
        self.verifies_late = getattr(server, "_verifies_late", False)
        # A program's own hooks may take a connection away and never say what became of it.
        self.connections.holds_weakly = not are_ours(server, TO_THE_END)
        settings = admission, deadlines, server.when_full, peers_come
        if settings != self._settings:
            self._build(admission, deadlines, peers_come)
            self._settings = settings
        self.tracks_plainly = (
            self.gate is None and self.keeper is None and not self.connections.holds_weakly
        )

    def _build(
        self, admission: dict[str, Any], deadlines: dict[str, Any], peers_come: bool
    ) -> None:
        """Build what the settings ask for."""
        server = self._server
        when_full = read_when_full(server.when_full)
        rules, limits = AdmissionRules(**admission), Rules(**deadlines)
        self._exchange_gate(
            None if rules == AdmissionRules() else self._make_gate(rules, when_full, peers_come)
        )
        self._exchange_keeper(
            None if limits == Rules() else Timekeeper(server, self.connections, limits)
        )

    def _make_gate(self, rules: AdmissionRules, when_full: WhenFull, peers_come: bool) -> Gate:
        if self.is_in_child and self.siblings is not None:
            from portico.siblings import SiblingGate  # noqa: PLC0415  # few need it

            return SiblingGate(rules, when_full, self.siblings, self._row)
        # A child serves one connection, whose place its parent keeps.
        make = None if self.is_in_child else self.make_gate
        return (make or Gate)(rules, when_full, counts_peers=peers_come)

    def _exchange_gate(self, gate: Gate | None) -> None:
        before, self.gate = self.gate, gate
        if before is not None and before.close():
            self._server.resume_accepting()  # the descriptor that ends its pause is not there
        if gate is not None:
            for connection in (*self.connections, *tuple(self.of_children.values())):
                self._take_place(gate, connection)

    def _take_place(self, gate: Gate, connection: Connection) -> None:
        """Give a connection that is open a place at a gate by which it did not come in."""
        gate.take_over(connection.client_address, connection.peer)
        self.note_closed(connection)
        connection.gate = gate
        if not self._is_known(connection):  # it was closed meanwhile
            self.note_closed(connection)

    def _is_known(self, connection: Connection) -> bool:
        process = connection.process
        if process is not None:
            return self.of_children.get(process) is connection
        return self.connections.get(connection.request) is connection

    def _exchange_keeper(self, keeper: Timekeeper | None) -> None:
        before, self.keeper = self.keeper, keeper
        if before is not None:
            before.stop()
        if keeper is not None:
            for connection in self.connections:
                connection.next_look = 0.0
            if len(self.connections):
                keeper.wake()

    def _leave_parent(self) -> None:
        """Forget what belongs to the process from which this one was forked.

        Its locks are exchanged: another thread, which there is no more, may have held them.
        """
        self._process = os.getpid()
        self._abandon_lobby()
        self._choosing, self._shedding = Lock(), Lock()
        self.connections = Connections(self._note_lost)
        self.gate = self.keeper = self.drain = self.siblings = self._settings = None
        self.of_children, self.refusals = {}, {}
        self._idle, self._at_work, self._stubborn = [], [], None
        self._row, self._next_look = None, 0.0

    def _abandon_lobby(self) -> None:
        """Close this process's copies of the connections that wait in its parent."""
        lobby, self.lobby = self.lobby, None
        if lobby is not None:
            lobby.abandon()

    # --- coming in ----------------------------------------------------------------------

    def admit(self, request: Request, client_address: ClientAddress) -> RefusalReason | None:
        """Give a request a place, if the rules let it in; what was refused has none."""
        gate = self.gate
        if gate is None:
            return None
        refusal = gate.admit(client_address, monotonic())
        if refusal is None:
            if can_be_tracked(request):
                self.track(request, client_address).gate = gate
            else:  # a datagram keeps no place
                gate.leave(client_address)
        return refusal

    def admit_peer(self, request: Request, peer: ClientAddress) -> RefusalReason | None:
        """Admit whom a proxy speaks for, or say why not."""
        connection = self.connections.get(request)
        if connection is None or connection.gate is None or not connection.gate.knows_proxies:
            return None
        refusal = connection.gate.admit_peer(peer, monotonic())
        if refusal is None:
            connection.peer = peer
        return refusal

    def track(self, request: Request, client_address: ClientAddress) -> Connection:
        """Remember a connection, unless it is known already."""
        # The gate has it already, if there is one.
        connection = None if self.gate is None else self.connections.get(request)
        if connection is None:
            connection = self.connections.add(request, client_address)
        self._wake_keeper()
        return connection

    def _wake_keeper(self) -> None:
        """Have the timekeeper look at a connection that has come."""
        if self.keeper is not None and self.keeper.is_asleep:
            self.keeper.wake()

    @property
    def is_full(self) -> bool:
        """Whether a client has to wait until a place is free."""
        gate = self.gate
        return gate is not None and gate.when_full is not WhenFull.REFUSE and gate.is_full

    def await_room(self) -> int | None:
        """Say whether a client has to wait for a place; ``None`` if it may come in.

        Returns:
            A descriptor that is readable as soon as there is room.

        Raises:
            OSError: The system has no descriptor left to wait for it.
        """
        gate = self.gate
        if gate is None or gate.when_full is WhenFull.REFUSE:
            return None
        return gate.await_room()

    @property
    def sheds(self) -> bool:
        """Whether a client who waits for a place gets that of another: `shed`."""
        return self.gate is not None and self.gate.when_full is WhenFull.SHED

    def shed(self) -> None:
        """End the connection that has been idle for longest, of those that end at once.

        One look at all of them finds several; each is looked at again when its turn comes.  If the
        handlers of all do something else than to wait for their peers, one of these is ended, and
        no other before it has gone: nobody would have a place sooner.
        """
        with self._shedding:
            if self._shed_idle():
                return
            now = monotonic()
            if now >= self._next_look or not self._at_work:
                idle_since = self._by_idleness(now)
                share = 1 + len(idle_since) // SHED_SHARE
                ends_at_once = (it for it in reversed(idle_since) if self._notices_end(it[1]))
                self._idle = list(islice(ends_at_once, share))[::-1]
                if self._shed_idle():
                    return
                self._at_work = idle_since[-share:]
                self._next_look = now + VAIN_LOOK
            self._shed_one_at_work()

    def _shed_idle(self) -> bool:
        """End one of those that are remembered as idle, if it still is; say whether one was."""
        while self._idle:
            since, connection = self._idle.pop()
            idle = idle_seconds(connection.request)
            has_moved = idle is not None and monotonic() - idle > since + TICK
            if has_moved or not self._notices_end(connection):
                continue
            if self.connections.interrupt(connection):
                return True
        return False

    def _shed_one_at_work(self) -> None:
        """End one that may go on all the same, unless there is such a one already."""
        last = self._stubborn
        if last is not None and self.connections.get(last.request) is last:
            return
        self._stubborn = None
        while self._at_work and self._stubborn is None:
            _, connection = self._at_work.pop()
            if not connection.was_cut and self.connections.interrupt(connection):
                self._stubborn = connection

    def _by_idleness(self, now: float) -> list[tuple[float, Connection]]:
        """Return the connections and since when each is idle; the one that is for longest last.

        Where the kernel does not tell, the oldest connection counts as idle for longest.
        """
        idle_since = [
            (connection.accepted if idle is None else now - idle, connection)
            for connection in self.connections
            if not connection.was_cut
            for idle in (idle_seconds(connection.request),)
        ]
        idle_since.sort(key=lambda entry: -entry[0])
        return idle_since

    def _notices_end(self, connection: Connection) -> bool:
        """Say whether a connection is known to end at once when it is shut down.

        So it does in the lobby, and under a handler that waits for bytes, or for room to write.
        """
        request = connection.request
        if self.lobby is not None and request in self.lobby:
            return True
        waits_to_read = self._server._waits_to_read(connection)
        return waits_to_read is True or (waits_to_read is False and bool(look(request).unsent))

    # --- leaving ------------------------------------------------------------------------

    def note_closing(self, request: Request) -> Connection | None:
        """Forget a connection whose socket is closed next; ``None`` if nobody knows it."""
        if self.drain is not None:
            connection = self.connections.get(request)
            if connection is not None:
                self.drain.note_end(connection)
        # What `remove` does, without a call: every connection ends here.
        connection = self.connections.by_request.pop(id(request), None)
        if connection is not None:
            if connection.is_held:
                self.connections.await_interrupt()
            if self.counter is not None:
                self.counter.note_closing(request)
        return connection

    def _note_lost(self, connection: Connection) -> None:
        """Give the place of a connection back whose socket nobody has any more."""
        if self.drain is not None:
            self.drain.note_lost(connection)
        gate: Gate | None = vars(connection).pop("gate", None)
        if gate is not None:
            gate.leave(connection.client_address, connection.peer)

    def expect_child(self, request: Request) -> None:
        """Get ready for a child that is to be forked for a connection."""
        gate, connection = self.gate, self.connections.get(request)
        if gate is None or connection is None or not gate.counts_whom_proxies_tell:
            self.siblings = None
            return
        if self.siblings is None:
            from portico.siblings import Siblings  # noqa: PLC0415  # few need it

            self.siblings = Siblings()
        with self._choosing:
            open_now = (*self.connections, *tuple(self.of_children.values()))
            connection.row = self.siblings.free_row({each.row for each in open_now})

    def hand_to_child(self, process: int, request: Request) -> None:
        """Keep the place of a connection until the child ends that serves it."""
        connection = self.connections.get(request)
        if connection is not None:
            connection.process = process
            self.of_children[process] = connection
            self.connections.remove(request)

    def note_child_end(self, process: int) -> None:
        """Give the place of a child's connection back."""
        connection = self.of_children.pop(process, None)
        if self.counter is not None:
            self.counter.note_child_end(process)
        if connection is not None:
            if connection.row is not None and self.siblings is not None:
                self.siblings.leave(connection.row)
            if self.drain is not None:
                self.drain.note_end(connection)
            self.note_closed(connection)

    def note_closed(self, connection: Connection) -> None:
        """Give the place of a connection back, now that its socket is closed.

        For whoever took it out of the set of those that are open, and so for one caller only.
        """
        gate = connection.gate
        if gate is not None:
            connection.gate = None
            gate.leave(connection.client_address, connection.peer)

    @property
    def is_inherited(self) -> bool:
        """Whether all this belongs to the process from which this one was forked.

        Not any more once this process has served with it.
        """
        return self._process != os.getpid() and self._server is not None

    @property
    def open(self) -> int:
        """Connections that are open, those of child processes included."""
        return len(self.connections) + len(self.of_children)

    def begin_drain(self, timeout: float | None, spared: Request | None) -> Drain:
        """Begin to count what ends.

        Args:
            timeout: Seconds until the rest is closed; ``None`` for no limit.
            spared: The request of a handler that asks for it, and cannot wait for itself.
        """
        mine = None if spared is None else self.connections.get(spared)
        self.drain = Drain(
            self.connections, self.of_children, self._server._waits_to_read, timeout, mine
        )
        return self.drain

    def spare(self, request: Request | None) -> None:
        """Do not wait for a handler that joins the drain.

        Args:
            request: Its request; ``None`` if the caller is no handler.
        """
        connection = None if request is None else self.connections.get(request)
        if connection is not None and self.drain is not None:
            self.drain.spare(connection)

    def close(self) -> None:
        """Release what only a server needs that accepts; in a forked child, its copies of it."""
        if self.is_inherited:
            self._abandon_lobby()
        elif self.keeper is not None:
            self.keeper.close()

    def enter_child(self, request: Request) -> None:
        """Watch over one connection only, in a process that was forked to serve it."""
        connection = self.connections.get(request)
        self.is_in_child = True
        siblings = self.siblings
        self._leave_parent()
        self.siblings, self._row = siblings, None if connection is None else connection.row
        self.read_settings()
        if connection is not None:
            vars(connection).pop("gate", None)  # the parent's, where it keeps its place
            self.connections.by_request[id(request)] = connection
            if self.gate is not None:  # it judges whom a proxy speaks for
                self._take_place(self.gate, connection)
            self._wake_keeper()


def check_timeout(name: str, value: float | None) -> None:
    """Check a number of seconds that may be 0, or ``None`` for no limit.

    Raises:
        SettingError: It is negative, or no number.
    """
    check_limit(name, value, may_be_zero=True)


TO_THE_WORKER: Final = ("process_request", "process_request_thread", "serve_request")
"""By which a request comes to `serve_request`, or past it if one is a program's own: then nobody
has prepared it for sure."""

AT_THE_END: Final = ("shutdown_request", "close_request")
"""With which a request ends: an engine that takes batches knows only what the family's do."""

TO_THE_END: Final = (*TO_THE_WORKER, *AT_THE_END)
"""All that see a connection to its end: past them it may go on elsewhere, or end unseen."""


def are_ours(server: Any, hooks: Iterable[str]) -> bool:
    """Say whether these hooks of a server, as far as it has them, are all this library's own."""
    found = (getattr(server, name, None) for name in hooks)
    return all(
        hook is None or getattr(hook, "__module__", "").startswith("portico.") for hook in found
    )
