"""Take and serve requests whose path no program has changed, without a call for each hook.

The hooks on the path of a request are looked up anew for every request, because programs override
them, and exchange them while they run.  Those that nobody has touched do little or nothing, and
calling them would be most of what a datagram costs.  So the acceptor asks once for each batch
whether all of them are portico's own, and nobody listens to the events between them.  If so, this
module does for the whole batch what they would do; if not, or as soon as anything but a request
comes, the serving loop and its step do their work as ever.

The same goes for a handler: of one that has nothing but a `handle` of its own, nothing else is
called.

Owns the list of hooks that are left out.  Whoever changes what one of them does changes it here.
"""

from __future__ import annotations

import socket
from functools import partial
from itertools import islice
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from portico.connection import Connection
from portico.engines import may_be_left_out
from portico.engines.green.sockets import Lineage
from portico.engines.green.watch import NOW
from portico.events import ConnectionAccepted, ConnectionClosed
from portico.families import TCPServer, UDPServer
from portico.guard import AT_THE_END
from portico.handlers import BaseRequestHandler
from portico.server import BaseServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from portico.connection import ClientAddress
    from portico.engines.green.acceptor import GreenAcceptor
    from portico.engines.green.crew import Crew
    from portico.engines.green.sockets import GreenSocket
    from portico.gate import Gate

    Accept = Callable[[], tuple[GreenSocket, ClientAddress]]

OF_EVERY_SERVER: Final = {
    name: getattr(TCPServer, name)
    for name in (
        "_handle_request_noblock",
        "admit_request",
        "verify_request",
        "serve_request",
        "prepare_request",
        "finish_request",
        "service_actions",
    )
}
"""The hooks that are left out of the path of a connection, beside those of the engine."""

SHARED_BATCH: Final = 4
"""Connections that are taken at once where other processes accept from the same listener."""

IN_FRONT: Final = ("get_request", "service_actions")
"""Those before which a hook of the library's own may stand that says `left_out_of_batches`: what a
`get_request` does beside accepting is done here (`Gate.reserve`), and a `service_actions` has its
turn each `poll_interval`."""

_NEW: Final[Any] = object.__new__

_hooks_of: Final = attrgetter("__init__", "setup", "finish")

_NO_HOOKS: Final = _hooks_of(BaseRequestHandler)
"""What a handler class has that does nothing around its `handle`."""


class PlainPath:
    """The path of the requests of one server, on one hub.

    Args:
        server: Whose.
        crew: Where they are served.
        own: The hooks of the engine itself, by name.
        family_request: The `get_request` of the family below the engine.
    """

    def __init__(
        self,
        server: Any,
        crew: Crew,
        own: dict[str, Callable[..., object]],
        family_request: object,
    ) -> None:
        self.leading: Gate | None = None
        """Where the batch that was taken last has left this process with more than its share."""
        self._server = server
        self._kind: type[Any] = type(server)
        self._crew = crew
        self._listener = server.socket
        is_datagram = family_request is UDPServer.get_request
        family = UDPServer if is_datagram else TCPServer
        # Those at the end have to be the family's: of a datagram they do nothing, and are left out;
        # of a connection they are called, and nobody looks after them whether it is forgotten.
        hooks = OF_EVERY_SERVER | own | {name: getattr(family, name) for name in AT_THE_END}
        for name in IN_FRONT:
            found = getattr(self._kind, name)
            hooks[name] = found if may_be_left_out(found) else hooks[name]
        self._names = hooks.keys()
        self._find = attrgetter(*hooks)
        self._expected = tuple(hooks.values())
        self._take = self._take_datagrams if is_datagram else self._take_connections
        crew.closes_plainly = not is_datagram

    def take(self, acceptor: GreenAcceptor, most: int) -> bool:
        """Take what is waiting, and have it served; return whether that was anything.

        Args:
            acceptor: Who asks; a `wake` of it ends the batch.
            most: How many requests to take at the most.
        """
        if not self._is_plain():
            return False
        crew = self._crew
        crew.is_counted = self._server._guard.counter is not None
        kind: Any = self._server.RequestHandlerClass
        is_stepwise = kind.__class__ is type and kind.__new__ is _NEW
        is_bare = is_stepwise and _hooks_of(kind) == _NO_HOOKS
        crew.bare = kind if is_bare else None
        crew.stepwise = kind if is_stepwise and crew.closes_plainly else None
        return self._take(acceptor, most)

    def _is_plain(self) -> bool:
        """Say whether everything that is left out would do what it does here."""
        server: TCPServer = self._server
        guard = server._guard
        return (
            self._find(self._kind) == self._expected
            and self._names.isdisjoint(vars(server))
            and server.socket is self._listener
            and self._server.coalesce_writes
            and not self._server._green.context  # each request gets a copy of it
            and server._exhaustion is None
            and guard.drain is None
            and (guard.gate is None or self._crew.closes_plainly)
            and server.ssl_context is None
            and server.proxy_protocol is None
            and not ConnectionAccepted.subscribers
            and not ConnectionClosed.subscribers
        )

    def _take_connections(self, acceptor: GreenAcceptor, most: int) -> bool:
        """Accept connections."""
        guard = self._server._guard
        taken = self._accept(acceptor, most, guard.gate)
        now = monotonic()
        if guard.counter is not None and taken:
            guard.counter.note_accepted(len(taken))
        gate = guard.gate
        if gate is not None and taken:
            taken = self._admitted(gate, taken, now)
        by_request, requests = guard.connections.by_request, self._crew.requests
        for request, client_address in taken:
            by_request[id(request)] = connection = Connection(request, client_address, now)
            if gate is not None:
                connection.gate = gate
            requests.append((request, client_address, True))
        if guard.keeper is not None and guard.keeper.is_asleep:
            guard.keeper.wake()
        self.leading = gate if gate is not None and gate.reserves and gate.leads else None
        return self._schedule(len(taken))

    def _accept(
        self, acceptor: GreenAcceptor, most: int, gate: Gate | None
    ) -> list[tuple[GreenSocket, ClientAddress]]:
        """Accept what is waiting, for as long as there is room."""
        lineage = self._crew.lineage
        assert lineage is not None
        accept = lineage.accept
        if gate is not None:  # what to do when all places are taken is for the step
            most = min(most, gate.room)
            if gate.reserves:
                most = min(most, SHARED_BATCH)
                accept = partial(self._accept_reserved, gate, accept)
        taken: list[tuple[GreenSocket, ClientAddress]] = []
        try:
            for _ in range(most):
                taken.append(accept())
                if acceptor.is_woken:
                    break
        except OSError:  # most often that there are no more; what it was, the next step will tell
            pass
        return taken

    def _accept_reserved(self, gate: Gate, accept: Accept) -> tuple[GreenSocket, ClientAddress]:
        """Accept a connection, if there is a place for it that no other process takes meanwhile.

        Raises:
            OSError: As accept(2); `BlockingIOError` if there is no place.
        """
        if not gate.reserve():
            raise BlockingIOError
        try:
            return accept()
        except OSError:
            gate.forgo()
            raise

    def _admitted(
        self, gate: Gate, taken: list[tuple[GreenSocket, ClientAddress]], now: float
    ) -> list[tuple[GreenSocket, ClientAddress]]:
        """Return those that may come in, and end the others."""
        refusals = gate.admit_all(taken, now)
        if not any(refusals):
            return taken
        admitted: list[tuple[GreenSocket, ClientAddress]] = []
        for (request, client_address), refusal in zip(taken, refusals, strict=True):
            if refusal is None:
                admitted.append((request, client_address))
            else:
                self._server._refuse(request, client_address, refusal)
        return admitted

    def _take_datagrams(self, acceptor: GreenAcceptor, most: int) -> bool:
        """Receive datagrams: a whole batch, because to ask in between would cost a fortieth."""
        del acceptor
        crew, server = self._crew, self._server
        requests, size = crew.requests, server.max_packet_size
        room = size + 1  # tells a datagram that just fits from one that was cut
        shared = crew.share(self._listener)
        receive, flags = self._listener.recvfrom, NOW
        before = len(requests)
        try:
            for _ in range(most):
                packet, client_address = receive(room, flags)
                if len(packet) > size:
                    packet = server._cut(packet, client_address)
                requests.append(((packet, shared), client_address, True))
        except OSError:  # as above
            pass
        count = len(requests) - before
        if crew.is_counted and count:
            taken = islice(requests, before, None)
            received = sum(len(packet) for (packet, _), *_ in taken)
            server._guard.counter.note_accepted(count, received)
        return self._schedule(count)

    def _schedule(self, count: int) -> bool:
        """Have the requests served that were taken; return whether there are any."""
        if count:
            self._crew.busy += count
            self._crew.schedule()
        return count > 0


def plain_path(
    server: Any,
    crew: Crew,
    own: dict[str, Callable[..., object]],
    family_request: Any,
) -> PlainPath | None:
    """Return the plain path of a server; ``None`` if its kind has none."""
    function = getattr(family_request, "__func__", None)
    listener = getattr(server, "socket", None)
    if not isinstance(server, BaseServer) or type(listener) is not socket.socket:
        return None
    if function is TCPServer.get_request and isinstance(crew.lineage, Lineage):
        return PlainPath(server, crew, own, function)
    if function is UDPServer.get_request and NOW:
        return PlainPath(server, crew, own, function)
    return None
