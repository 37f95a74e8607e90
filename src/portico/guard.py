"""Watch over the connections of one server: who comes in, how long they stay, how they end.

Owns what the settings of a server ask for: its gate, its timekeeper, and its drain, with the set of
open connections that all of them work on.  Without such settings, that set is all there is.
"""

from __future__ import annotations

import os
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from portico.admission import AdmissionRules
from portico.connection import Connection, Connections, can_be_tracked
from portico.deadlines import TICK, Rules
from portico.drain import Drain
from portico.errors import SettingError
from portico.gate import Gate, WhenFull, read_when_full
from portico.timekeeper import Timekeeper
from portico.traffic import idle_seconds

if TYPE_CHECKING:
    from portico.connection import ClientAddress, Request
    from portico.events import RefusalReason
    from portico.lobby import Lobby

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
        self.of_children: dict[int, Connection] = {}
        """Connections that child processes serve, by the process."""
        self.lobby: Lobby | None = None
        """Where connections wait for their peers' first word; ``None`` where they do not."""
        self.refusals: dict[int, RefusalReason] = {}
        """Why a request was not admitted, by its ``id``, until that is told."""
        self._server = server
        self._settings: object = None
        self._idle: list[tuple[float, Connection]] = []  # the longest last

    def read_settings(self) -> None:
        """Build what the settings ask for, if they have changed since the last time.

        To be called when the server is made, and before it accepts.

        Raises:
            SettingError: A setting is outside its range.
        """
        server = self._server
        if server is None:
            return
        admission = {name: getattr(server, name) for name in ADMISSION}
        deadlines = {name: getattr(server, name) for name in DEADLINES}
        peers_come = getattr(server, "proxy_protocol", None) is None
        settings = admission, deadlines, server.when_full, peers_come, os.getpid()
        if settings == self._settings:
            return
        when_full = read_when_full(server.when_full)
        check_timeout("drain_timeout", server.drain_timeout)
        rules, limits = AdmissionRules(**admission), Rules(**deadlines)
        if self.gate is not None:
            self.gate.close()
        self.gate = (
            None if rules == AdmissionRules() else Gate(rules, when_full, counts_peers=peers_come)
        )
        if self.keeper is not None:
            self.keeper.close()
        self.keeper = (
            None
            if limits == Rules()
            else Timekeeper(server, self.connections, limits, server._waits_to_read)
        )
        self._settings = settings

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
        connection = self.connections.get(request)
        if connection is None:
            connection = self.connections.add(request, client_address)
        if self.keeper is not None and self.keeper.is_asleep:
            self.keeper.wake()
        return connection

    def await_room(self) -> int | None:
        """Make room for a client, or have it wait; ``None`` if it may come in.

        Returns:
            A descriptor that is readable as soon as there is room.

        Raises:
            OSError: The system has no descriptor left to wait for it.
        """
        gate = self.gate
        if gate is None or gate.when_full is WhenFull.REFUSE:
            return None
        room = gate.await_room()
        if room is not None and gate.when_full is WhenFull.SHED:
            self._shed()
        return room

    def _shed(self) -> None:
        """End the connection that has been idle for longest.

        One look at all of them finds several; each is looked at again when its turn comes.
        """
        for _ in range(2):
            while self._idle:
                since, connection = self._idle.pop()
                idle = idle_seconds(connection.request)
                has_moved = idle is not None and monotonic() - idle > since + TICK
                if not has_moved and self.connections.interrupt(connection):
                    return
            now = monotonic()
            # Where the kernel does not tell, the oldest connection counts as idle for longest.
            idle_since = [
                (connection.accepted if idle is None else now - idle, connection)
                for connection in self.connections
                for idle in (idle_seconds(connection.request),)
            ]
            idle_since.sort(key=lambda entry: -entry[0])
            self._idle = idle_since[-(1 + len(idle_since) // SHED_SHARE) :]

    # --- leaving ------------------------------------------------------------------------

    def note_closing(self, request: Request) -> Connection | None:
        """Forget a connection whose socket is closed next; ``None`` if nobody knows it."""
        connection = self.connections.get(request)
        if connection is None:
            return None
        if self.drain is not None:
            self.drain.note_end(connection)
        return self.connections.remove(request)

    def _note_lost(self, connection: Connection) -> None:
        """Give the place of a connection back whose socket nobody has any more."""
        if self.drain is not None:
            self.drain.note_end(connection)
        self.note_closed(connection)

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
        if connection is not None:
            if self.drain is not None:
                self.drain.note_end(connection)
            self.note_closed(connection)

    def note_closed(self, connection: Connection) -> None:
        """Give the place of a connection back, now that its socket is closed."""
        gate = connection.gate
        if gate is not None:
            connection.gate = None
            gate.leave(connection.client_address)
            if gate.knows_proxies and connection.peer is not None:
                gate.leave_peer(connection.peer)

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

    def close(self) -> None:
        """Release what only a server needs that accepts."""
        if self.keeper is not None:
            self.keeper.close()

    def enter_child(self, request: Request) -> None:
        """Watch over one connection only, in a process that was forked to serve it."""
        connection = self.connections.get(request)
        self.connections = Connections(self._note_lost)
        if self.lobby is not None:
            self.lobby.abandon()
        self.gate = self.keeper = self.drain = self.lobby = self._settings = None
        self.of_children = {}
        self.read_settings()  # a timekeeper of this process's own
        self.gate = None  # it is the parent that counts
        if connection is not None:
            connection.gate = None
            self.connections.by_request[id(request)] = connection
            self.track(request, connection.client_address)


def check_timeout(name: str, value: float | None) -> None:
    """Check a number of seconds that may be 0, or ``None`` for no limit.

    Raises:
        SettingError: It is negative, or no number.
    """
    if value is not None and not 0 <= value < inf:
        raise SettingError(name, value, "0 or more seconds, or None for no limit")
