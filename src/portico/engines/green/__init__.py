"""Serve each request in a greenlet: many on one thread, at the speed of an event loop.

- `GreenMixIn` is the engine; `crew.Crews` are its hubs, threads and workers;
- `hub.Hub` is the event loop, an asyncio loop that resumes greenlets in its selector `poller`;
- `sockets.GreenSocket`, `tls.GreenSSLSocket`: what waits by switching, through a `watch.Watch`;
- `acceptor.GreenAcceptor`: how the serving loop waits;
- `bridge`: waiting for other things in handlers; `coroutines`: handlers with ``async def``, and
  `transports`, which gives them TLS connections;
- `watchdog`: finds handlers that hold a hub.
"""

from __future__ import annotations

import os
import socket
import threading
from _thread import get_ident
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from greenlet import getcurrent

from portico.connection import ClientAddress, Connection, Request
from portico.engines import may_be_left_out, serve
from portico.engines.green import tls
from portico.engines.green.acceptor import GreenAcceptor, prepare_listener
from portico.engines.green.crew import Crew, Crews, Outcome, Worker, crew_here, here
from portico.engines.green.hub import running
from portico.engines.green.plain import plain_path
from portico.engines.green.sockets import GreenSocket, Lineage
from portico.engines.green.watchdog import Watchdog
from portico.server import BaseServer

if TYPE_CHECKING:
    _Base: TypeAlias = BaseServer
else:
    _Base = object

PLAIN_FAMILIES: Final = frozenset({"portico.families", "socketserver"})
"""Modules whose `TCPServer.get_request` accepts a connection and does nothing else."""

_fileno: Final = socket.socket.fileno  # not the method of a green socket, which sends first

EVENT_INTERVAL: Final = 0.01
"""Seconds between two looks of a greenlet at an event that another thread sets."""

_starting = threading.Lock()  # guards `GreenMixIn._green` of all servers while it is made


class Green:
    """What the engine keeps for one server."""

    def __init__(self, server: Any) -> None:
        self.process = os.getpid()
        self.watchdog = Watchdog(server)
        self.crews = Crews(server, self.watchdog.wake)
        self.token = threading.Lock() if server.max_hubs > 1 else None
        # Held by the hub that runs the hooks of the accept path; ``None`` if there is but one.
        self.is_serving = False
        self.context = copy_context()
        # Of who accepts: a request begins with a copy.


class GreenMixIn(_Base):
    """Serve each request in a greenlet.

    The handlers of a server share one thread, its hub.  A handler runs until it waits for its
    connection, or in a helper such as `to_thread`; then the others do.  Whatever else it waits for
    (a lock, a queue, a database), all of them wait for.  A lock that one holds while it waits for
    its client stops the hub for good when another wants it, and does not keep the other out if it
    is an `RLock`; a `threading.local` is the same for all.

    The hooks of the accept path (`get_request`, `verify_request`, `process_request`,
    `service_actions`) run in that thread, too, while `serve_forever` waits in the one that called
    it.

    Owns `process_request` and `process_request_thread`; extends `serve_forever`, `shutdown`,
    `get_request` and `server_close`.
    """

    max_hubs: int = 1
    """Hubs at most, each a thread that accepts for itself.

    With one, a handler that blocks (sleeps, computes, waits for a database) makes all others
    wait.  With more, another hub serves who connects meanwhile; it is started when all are held
    (`watchdog.HELD`).  A connection stays with its hub, so those of the hub that is held wait.
    """

    stall_threshold: float | None = 0.1
    """Seconds that a handler may hold its hub before `events.HandlerStalled` tells of it;
    ``None`` for no limit."""

    coalesce_writes: bool = True
    """Whether `StreamRequestHandler.wfile` collects small writes until the handler waits, ends,
    or has written 64 KiB."""

    daemon_threads: bool = False
    """Whether the program may end while requests are served, which are not waited for then."""

    block_on_close: bool = True
    """Whether `server_close` waits for the requests under way, without limit."""

    _green: Green

    _keeps_lobby = False

    # --- the life of the server ---------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve requests until `shutdown`, or until the listener is closed.

        Args:
            poll_interval: Seconds between two calls of `service_actions` at the most.

        Raises:
            Exception: As `BaseServer.serve_forever`.
        """
        tls.install()
        green = self._get_green()
        loop = super().serve_forever if is_ours(self) else self._serve_foreign
        outcome = Outcome()
        try:
            green.crews.serve(lambda: self._loop(green, loop, poll_interval), outcome)
            outcome.wait(poll_interval)
        except BaseException:  # Ctrl-C, or what a signal handler raised, in the main thread
            self._end_loop(outcome)
            raise
        finally:
            outcome.close()
        if outcome.error is not None:
            raise outcome.error

    def shutdown(self) -> None:
        """Make `serve_forever` return, and wait until it has.

        Callable from any thread and from a handler, where it returns at once.  The handlers
        under way go on.
        """
        if is_ours(self):
            super().shutdown()
            return
        server: Any = self
        server._BaseServer__shutdown_request = True
        self._wake_acceptors()
        if crew_here(self) is None:
            server._BaseServer__is_shut_down.wait()

    def server_close(self) -> None:
        """Close the listener, then wait for the handlers as `block_on_close` says."""
        if not is_ours(self):
            self._drop_datagram_sockets()
        super().server_close()
        self._wake_acceptors()
        may_wait = self.block_on_close and not self.daemon_threads
        if may_wait and not getattr(self, "_has_stragglers", False):
            self._get_green().crews.join()

    # --- one request --------------------------------------------------------------------

    def get_request(self) -> tuple[Request, ClientAddress]:
        """Accept one connection, as a green socket where the family leaves it to us."""
        crew = here.get(get_ident())
        if crew is None or crew.server is not self:
            return super().get_request()
        lineage = crew.lineage
        if lineage is not None and lineage.listener is self.socket:
            taken: tuple[Request, ClientAddress] = lineage.accept()
            if getattr(self, "ssl_context", None) is not None and is_ours(self):
                taken = self._over_tls(taken[0]), taken[1]
        else:
            taken = super().get_request()
        crew.took_request = True
        return taken

    def _over_tls(self, request: Request) -> Request:
        crew = here.get(get_ident())
        if crew is not None and crew.server is self:
            request = crew.make_green(request)  # first: TLS waits as the socket below it does
        server: Any = super()
        return server._over_tls(request)

    def process_request(self, request: Request, client_address: ClientAddress) -> None:
        """Hand the request to a greenlet.

        Raises:
            RuntimeError: There is no hub, and the system has no thread left for one.
        """
        crew = here.get(get_ident())
        if crew is None or crew.server is not self:
            green = self._get_green()
            green.context = copy_context()
            green.crews.submit(request, client_address)
            green.watchdog.watch(green.crews)
            return
        crew.took_request = True
        crew.begin(request, client_address)

    def process_request_thread(self, request: Request, client_address: ClientAddress) -> None:
        """Serve the request; what the greenlet runs."""
        if not self.coalesce_writes and isinstance(request, GreenSocket):
            request.coalesces = False
        green: Green | None = self.__dict__.get("_green")
        if green is not None and green.context:
            green.context.copy().run(serve, self, request, client_address)
        else:  # a worker gives each request an empty context, which is the copy of an empty one
            serve(self, request, client_address)

    # --- what the engine knows of a handler ---------------------------------------------

    def _waits_to_read(self, connection: Connection) -> bool | None:
        request = connection.request
        if not isinstance(request, GreenSocket) or _fileno(request) < 0:  # another object has it
            return None
        return request.watch.reader is not None

    def _activity(self, connection: Connection) -> int | None:
        request = connection.request
        return request.watch.activity if isinstance(request, GreenSocket) else None

    def _requests_under_way(self) -> int:
        return sum(crew.busy for crew in self._get_green().crews.live())

    def _request_here(self) -> Request | None:
        worker = getcurrent()
        return worker.task[0] if isinstance(worker, Worker) else None

    def _exchange_request(self, before: Request, request: Request) -> None:
        worker = getcurrent()
        if isinstance(worker, Worker):
            worker.task = (request, *worker.task[1:])
        super()._exchange_request(before, request)

    def _wait_event(self, event: threading.Event, seconds: float | None) -> None:
        hub = running()
        if hub is None or hub.is_current():
            event.wait(seconds)
            return
        deadline = inf if seconds is None else monotonic() + seconds
        while not event.is_set() and (remaining := deadline - monotonic()) > 0:
            hub.sleep(min(remaining, EVENT_INTERVAL))

    # --- inside -------------------------------------------------------------------------

    def _close_listener(self) -> None:
        self._drop_datagram_sockets()
        super()._close_listener()

    def _drop_datagram_sockets(self) -> None:
        for crew in self._get_green().crews.live():
            crew.drop_datagram_socket()  # it has the listener's number, soon somebody else's

    def _make_acceptor(self) -> GreenAcceptor:
        """Return what the serving loop of this thread waits with."""
        green = self._get_green()
        crew = crew_here(self)
        assert crew is not None, "a serving loop runs on a hub"
        green.watchdog.watch(green.crews)
        crew.drop_datagram_socket()  # a program may have exchanged the listener
        family_request = getattr(super(), "get_request", None)
        crew.lineage = None
        if is_plain(family_request) and type(self.socket) is socket.socket:
            crew.lineage = Lineage(self.socket)
        crew.acceptor = acceptor = GreenAcceptor(
            self,
            crew,
            green.token,
            # A program's own get_request would see the one that finds nothing, which ends a batch.
            can_batch=prepare_listener(self) and is_own_get_request(self),
            plain=plain_path(self, crew, HOOKS, family_request),
        )
        return acceptor

    def _loop(self, green: Green, loop: Callable[[float], None], poll_interval: float) -> None:
        """Run the serving loop in a greenlet of the first hub."""
        green.is_serving = True
        green.context = own_context()
        try:
            loop(poll_interval)
        finally:
            green.is_serving = False
            crew = crew_here(self)
            if crew is not None:
                crew.acceptor = None
            self._wake_acceptors()

    def _serve_foreign(self, poll_interval: float) -> None:
        """Do what `serve_forever` of the standard library does, for a server of its kind."""
        server: Any = self
        server._BaseServer__is_shut_down.clear()
        acceptor = self._make_acceptor()
        try:
            while not server._BaseServer__shutdown_request:
                is_ready = acceptor.wait(poll_interval)
                if server._BaseServer__shutdown_request or self.fileno() < 0:
                    break
                if is_ready:
                    self._handle_request_noblock()
                self.service_actions()
        finally:
            acceptor.close()
            server._BaseServer__shutdown_request = False
            server._BaseServer__is_shut_down.set()

    def _serve_additionally(self, crew: Crew) -> None:
        """Accept on another hub than the first, while that one serves."""
        green = self._get_green()
        try:
            acceptor = self._make_acceptor()
        except ValueError:  # the listener was closed meanwhile
            return
        try:
            while green.is_serving and self.fileno() >= 0:
                if acceptor.wait(None):
                    self._handle_request_noblock()
                elif not crew.busy:
                    break
        finally:
            crew.acceptor = None
            acceptor.close()

    def _start_hub(self) -> None:
        """Start a hub beside those that there are; called by the watchdog when all are held."""
        green = self._get_green()
        if not green.is_serving:  # there is nothing to accept
            return
        with suppress(OSError, RuntimeError):  # no descriptor or thread left: as it was, then
            crew = green.crews.start(is_additional=True)
            # This is the watchdog's thread; the loop is to see what the other loops see.
            green.context.copy().run(crew.serve, lambda: self._serve_additionally(crew), None)

    def _end_loop(self, outcome: Outcome) -> None:
        """See that the loop accepts no more, without waiting for a hub that is held."""
        server: Any = self
        outcome.is_unwanted = True
        if outcome.has_begun and not outcome.ended.is_set():
            server._BaseServer__shutdown_request = True
            self._wake_acceptors()
        if outcome.ended.wait(1) and not self._get_green().is_serving:
            server._BaseServer__shutdown_request = False  # it may have ended before it was asked

    def _wake_acceptors(self) -> None:
        for crew in self._get_green().crews.live():
            if crew.acceptor is not None:
                crew.acceptor.wake()

    def _get_green(self) -> Green:
        """Return what the engine keeps for this server, which never called an __init__ of ours."""
        green: Green | None = self.__dict__.get("_green")
        if green is None or green.process != os.getpid():
            with _starting:
                green = self.__dict__.get("_green")
                if green is None or green.process != os.getpid():
                    green = self._green = Green(self)
        return green


HOOKS: Final = {
    name: getattr(GreenMixIn, name)
    for name in ("get_request", "process_request", "process_request_thread")
}
"""The hooks of the engine that are left out of the plain path."""


def own_context() -> Context:
    """Return the context of the calling greenlet: the one that it changes, not a copy."""
    context = getcurrent().gr_context
    return copy_context() if context is None else context


def is_own_get_request(server: Any) -> bool:
    """Say whether requests are taken by the engine's `get_request`, not by a program's."""
    found = getattr(server.get_request, "__func__", None)
    return found is GreenMixIn.get_request or may_be_left_out(found)


def is_plain(get_request: Callable[..., object] | None) -> bool:
    """Say whether the family below does nothing but ``self.socket.accept()``."""
    name = getattr(get_request, "__qualname__", "")
    module = getattr(get_request, "__module__", "")
    return name == "TCPServer.get_request" and module in PLAIN_FAMILIES


def is_ours(server: object) -> bool:
    """Say whether the loop below the engine is that of our `BaseServer`."""
    return isinstance(server, BaseServer)
