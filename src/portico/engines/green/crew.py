"""Run the requests of a server on hubs, each in a thread of its own.

A `Crew` is one hub, its thread, and its workers: greenlets that serve one request after another.
`Crews` are those of one server.  They end by themselves when nothing is left to do, so a program
whose server was closed ends like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import threading
import traceback
from _thread import get_ident, start_new_thread
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from greenlet import GreenletExit, greenlet

from portico.acceptor import Wakeup
from portico.console import show
from portico.engines.green.hub import Hub
from portico.engines.green.sockets import DatagramListener, GreenSocket, Lineage

if TYPE_CHECKING:
    from portico.connection import ClientAddress, Request

here: Final[dict[int, Crew]] = {}
"""The crew of each thread that has one, by the thread's number."""

MAX_IDLE: Final = 256
"""Workers without a request that a crew keeps.

A new greenlet costs a third of a short connection; one that is kept, some kilobytes.
"""

LINGER: Final = 5.0
"""Seconds that an additional hub waits for something to do before it ends."""


Task: TypeAlias = "tuple[Request, ClientAddress, bool]"
"""A request, its client address, and whether it is on the plain path."""

NO_TASK: Final[Task] = (None, None, False)


class Worker(greenlet):
    """A greenlet that serves one request after another."""

    __slots__ = ("crew", "task")

    def __init__(self, crew: Crew) -> None:
        super().__init__(parent=crew.hub.greenlet)
        self.crew = crew
        self.task: Task = NO_TASK
        """What it does."""

    # Written out for speed, hence long.
    def run(  # noqa: C901, PLR0912, PLR0915  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
    ) -> None:
        """Serve requests until the crew has no use for another worker."""
        crew, hub = self.crew, self.crew.hub
        new: Any = object.__new__
        server, requests = crew.server, crew.requests
        while True:
            served = 0
            while requests:
                self.task = request, client_address, is_plain = requests.popleft()
                try:
                    if not is_plain:
                        server.process_request_thread(request, client_address)
                    else:  # what the hooks that nobody has touched would do, see `plain`
                        kind: Any = server.RequestHandlerClass
                        try:
                            if kind is crew.bare:
                                handler = new(kind)
                                handler.request = request
                                handler.client_address = client_address
                                handler.server = server
                                handler.handle()
                            elif kind is crew.stepwise:
                                step(kind, request, client_address, server)
                            else:
                                kind(request, client_address, server)
                        except BaseException as error:
                            server._fail(request, client_address, error, None)
                            if not isinstance(error, Exception):
                                raise
                        else:
                            if crew.is_counted:
                                crew.note_finished(request, client_address)
                            elif crew.closes_plainly:
                                server.shutdown_request(request)
                except GreenletExit:
                    raise
                except BaseException as error:  # as in a thread: it ends this request only
                    report(error)
                if hub.unsent:
                    hub.send_unsent()
                if self.gr_context is not None:
                    self.gr_context = None  # the next request begins with a context of its own
                served += 1
            crew.busy -= served
            if crew.finished:
                crew.tell_finished()
            if hub.is_forked:  # the handler forked, and this is the child, which ends with it
                os._exit(0)
            self.task, request = NO_TASK, None
            if not crew.release(self):
                return
            hub.switch()


def step(kind: Any, request: Request, client_address: ClientAddress, server: Any) -> None:
    """Do what calling a class does that is made like any other, one step after the other.

    Raises:
        TypeError: Its constructor returned something, as from calling it.
    """
    if kind.__init__(object.__new__(kind), request, client_address, server) is not None:
        raise TypeError(f"{kind.__name__}.__init__() returned a value")


class Dispatcher:
    """Resumes a worker for the requests that were taken, in the place of a greenlet.

    A worker whose handler never waits serves them all; one whose handler waits comes back, and
    the next worker goes on.
    """

    __slots__ = ("_crew", "is_scheduled")

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self.is_scheduled = False
        """Whether the hub is to resume this in its current round."""

    def switch(self) -> None:
        """Serve, until no request is left that has not begun."""
        crew = self._crew
        self.is_scheduled = False
        while crew.requests:
            worker = crew.idle.pop() if crew.idle else Worker(crew)
            worker.switch()
        if crew.finished:
            crew.tell_finished()

    def throw(self, error: BaseException, /) -> None:
        """Not used: it waits for nothing."""
        raise error


class Crew:
    """A hub in a thread of its own, and its workers.

    Everything runs in the hub's thread, except what says otherwise.

    Args:
        server: Whose requests to serve.
        on_end: Called in the thread when it ends.
        is_daemon: Whether the program may end while requests are served.
        is_additional: Whether the thread should wait a while before it ends for want of work.
    """

    def __init__(
        self,
        server: Any,
        on_end: Callable[[Crew], object],
        *,
        is_daemon: bool,
        is_additional: bool = False,
    ) -> None:
        self.server = server
        self.hub = Hub()
        self.busy = 0
        """Requests that were taken and have not been served to their end; one whose worker has
        gone on to the next without a wait counts until that one waits or ends."""
        self.requests: deque[Task] = deque()
        """Those that no worker has begun to serve."""
        self.closes_plainly = True
        """Whether what came on the plain path has to be closed: a datagram has not."""
        self.bare: type | None = None
        """The handler class on the plain path of which nothing is called but `handle`."""
        self.stepwise: type | None = None
        """The one that is called step by step: its part of the stack is copied at every switch, and
        kept while the handler waits."""
        self.is_counted = False
        """Whether the end of what came on the plain path is counted."""
        self.finished = 0
        """Datagrams whose handlers have ended since that was counted last."""
        self.dispatcher = Dispatcher(self)
        self.idle: list[Worker] = []
        self.is_running = threading.Event()
        """Set when the thread has begun."""
        self.took_request = False
        """Set when the serving loop was given a request; the acceptor takes it back."""
        self.lineage: Lineage | None = None
        """How to accept without the family's `get_request`; ``None`` if that has to be asked."""
        self.acceptor: Any = None
        """The `GreenAcceptor` of the loop that runs here."""
        self.datagram_socket: DatagramListener | None = None
        self._on_end = on_end
        self._lingers = is_additional
        self._lock = threading.Lock()  # guards _coming, _is_over
        self._coming = 0
        # Loops and requests that were handed over and have not ended, or begun.
        self._is_over = False
        self._linger_timer: asyncio.TimerHandle | None = None
        self.thread = threading.Thread(
            target=self._run, name=f"{type(server).__name__} hub", daemon=is_daemon
        )

    # --- from any thread ----------------------------------------------------------------

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: The system has no thread left.
        """
        try:
            self.thread.start()
        except BaseException as error:
            # After Ctrl-C in the middle of it, the thread runs or is about to; it will have
            # nothing to do.
            if not isinstance(error, RuntimeError) and self.is_running.wait(1):
                self.hub.call_anywhere(self._consider_ending)
            else:
                self.hub.close()
            raise

    def serve(self, loop: Callable[[], None], outcome: Outcome | None) -> bool:
        """Run a serving loop in a greenlet; false if the crew has ended.

        Args:
            loop: The loop.
            outcome: Told of its end; ``None`` if nobody waits for it.
        """
        context = copy_context()

        def run() -> None:
            try:
                if outcome is None or outcome.begin():
                    loop()
            except BaseException as error:
                if outcome is None:
                    report(error)
                else:
                    outcome.error = error
            finally:
                self._leave()
                if outcome is not None:
                    outcome.end()

        def begin() -> None:
            looping = greenlet(run, self.hub.greenlet)
            looping.gr_context = context
            looping.switch()

        return self._enter(begin)

    def submit(self, request: Request, client_address: ClientAddress) -> bool:
        """Serve a request that another thread accepted; false if the crew has ended."""

        def begin() -> None:
            self.begin(request, client_address)
            self._leave()

        return self._enter(begin)

    def _enter(self, begin: Callable[[], object]) -> bool:
        """Call in the hub's thread, and keep it from ending until `_leave`."""
        with self._lock:
            if self._is_over:
                return False
            self._coming += 1
        self.hub.call_soon_threadsafe(begin)
        return True

    # --- in the hub's thread ------------------------------------------------------------

    def begin(self, request: Request, client_address: ClientAddress) -> None:
        """Serve a request, as soon as the acceptor lets others run.

        What the family or the program accepted as a plain socket is made green.
        """
        if type(request) is not GreenSocket:
            accepted, request = request, self.make_green(request)
            guard = getattr(self.server, "_guard", None)
            if guard is not None and request is not accepted:
                guard.connections.exchange(accepted, request)
        self.requests.append((request, client_address, False))
        self.busy += 1
        self.schedule()

    def note_finished(self, request: Request, client_address: ClientAddress) -> None:
        """Close and count a request of the plain path whose handler has ended."""
        if self.closes_plainly:
            self.server._finish(request, client_address, None)
        else:
            self.finished += 1

    def tell_finished(self) -> None:
        """Count the datagrams whose handlers have ended."""
        finished, self.finished = self.finished, 0
        counter = self.server._guard.counter
        if counter is not None:
            counter.note_finished(finished)

    def schedule(self) -> None:
        """Have a worker begin with the requests as soon as the acceptor lets others run."""
        if not self.dispatcher.is_scheduled:
            self.dispatcher.is_scheduled = True
            self.hub.poller.runnable.append(self.dispatcher)

    def release(self, worker: Worker) -> bool:
        """Take a worker back; return whether it is to wait for another request."""
        if not self.busy and (self._lingers or not self._coming):
            self.hub.call_soon(self._consider_ending)
        if len(self.idle) >= MAX_IDLE:
            return False
        self.idle.append(worker)
        return True

    def make_green(self, request: Request) -> Request:
        """Return a request whose socket waits by switching, if it has one that can."""
        kind: Any = cast("Any", type(request))
        if kind is tuple:  # a datagram
            listener: Any = getattr(self.server, "socket", None)
            if len(request) == 2 and request[1] is listener:
                return request[0], self.share(listener)
        elif kind is socket.socket:
            return GreenSocket(request.family, request.type, request.proto, request.detach())
        return request

    def share(self, listener: socket.socket) -> DatagramListener:
        """Return a green socket on the listener's descriptor, which stays the listener's."""
        if self.datagram_socket is not None:
            return self.datagram_socket
        self.datagram_socket = shared = DatagramListener(listener)
        return shared

    def drop_datagram_socket(self) -> None:
        """Let go of the listener's descriptor.  Callable from any thread."""
        shared, self.datagram_socket = self.datagram_socket, None
        if shared is not None:
            shared.detach()

    def _leave(self) -> None:
        with self._lock:
            self._coming -= 1
        self._consider_ending()

    def _consider_ending(self) -> None:
        """End the thread if there is nothing left to do."""
        if self.busy or self.hub.guests:
            return
        if self._lingers and self.acceptor is not None:
            if self._linger_timer is None:
                self._linger_timer = self.hub.call_later(LINGER, self._stop_lingering)
            return
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        with self._lock:
            if self._coming:
                return
            self._is_over = True
        self.hub.stop()

    def _stop_lingering(self) -> None:
        self._linger_timer = None
        if not self.busy and self.acceptor is not None:
            self._lingers = False
            self.acceptor.wake()

    def _run(self) -> None:
        self.is_running.set()
        hub = self.hub
        hub.on_guest_left = self._consider_ending
        try:
            with contextlib.ExitStack() as cleaning:
                cleaning.callback(self._on_end, self)
                cleaning.callback(hub.close)
                cleaning.callback(self._clean)
                while True:
                    try:
                        hub.run_forever()
                        break
                    except (SystemExit, KeyboardInterrupt) as error:
                        # Of a coroutine: asyncio lets it out of the loop.  It ends who waits for
                        # it, as in a thread of its own, and nobody else.
                        report(error)
        finally:
            with self._lock:
                self._is_over = True

    def _clean(self) -> None:
        """Leave nothing waiting on a hub that is about to be closed."""
        for worker in self.idle:
            worker.throw(GreenletExit)
        self.idle.clear()
        self.drop_datagram_socket()
        tasks = asyncio.all_tasks(self.hub)
        for task in tasks:
            task.cancel()
        if tasks:
            self.hub.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.hub.run_until_complete(self.hub.shutdown_asyncgens())


class Outcome:
    """How a serving loop in another thread ended."""

    def __init__(self) -> None:
        # Not an event: a signal that arrives just before the wait for one goes unnoticed in it.
        self._wakeup = Wakeup()
        self.has_begun = False
        self.is_unwanted = False
        """Set when nobody waits for the loop any more: then it is not to begin."""
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def begin(self) -> bool:
        """Note that the loop begins; return whether it still is to."""
        self.has_begun = True
        return not self.is_unwanted

    def end(self) -> None:
        """Tell who waits.  Callable from any thread."""
        self.ended.set()
        self._wakeup.wake()

    def wait(self, poll_interval: float) -> None:
        """Wait for the end, and let signal handlers run meanwhile.

        Args:
            poll_interval: Seconds between two looks, where signals do not end the wait.
        """
        patience = poll_interval if self._wakeup.misses_signals else None
        while not self.ended.is_set():
            wait_readable(self._wakeup.fileno(), patience)
            self._wakeup.clear()

    def close(self) -> None:
        """Release the descriptors, in the thread that made them."""
        self._wakeup.close()


class Crews:
    """The hubs of one server.  Callable from any thread.

    Args:
        server: Whose.
        on_change: Called when a hub was started or has ended.
    """

    def __init__(self, server: Any, on_change: Callable[[], object]) -> None:
        self._server = server
        self._on_change = on_change
        self._lock = threading.Lock()  # guards _live against two that start at once
        self._live: tuple[Crew, ...] = ()

    def live(self) -> tuple[Crew, ...]:
        """Return all crews, at this moment."""
        return self._live

    def start(self, *, is_additional: bool = False) -> Crew:
        """Start another hub.

        Raises:
            RuntimeError: The system has no thread left.
            OSError: The system has no descriptor left.
        """
        crew = Crew(
            self._server,
            self._forget,
            is_daemon=self._server.daemon_threads,
            is_additional=is_additional,
        )
        with self._lock:
            crew.hub.call_soon(self._introduce, crew)
            before = self._live
            self._live += (crew,)
            try:
                crew.start()
            except BaseException:
                if not crew.is_running.is_set():
                    self._live = before
                raise
        self._on_change()
        return crew

    def serve(self, loop: Callable[[], None], outcome: Outcome) -> None:
        """Run a serving loop on the first hub; how that ends, `outcome` says.

        A thread begins with it that Ctrl-C does not reach: raised here, in the midst of it, that
        would leave a hub without a loop, for whose end the program waits when it ends.
        """
        context = copy_context()

        def begin() -> None:
            try:
                while True:
                    crew = self._live[0] if self._live else self.start()
                    if context.run(crew.serve, loop, outcome):
                        return
                    crew.thread.join()  # it was about to end; a moment later it is no longer live
            except BaseException as error:
                outcome.error = error
                outcome.end()

        # Not a Thread, whose start may be interrupted, too.
        start_new_thread(begin, ())

    def submit(self, request: Request, client_address: ClientAddress) -> None:
        """Serve a request that was accepted in a thread without a hub of ours."""
        while True:
            crew = min(self._live, key=lambda crew: crew.busy) if self._live else self.start()
            if crew.submit(request, client_address):
                return
            crew.thread.join()

    def join(self) -> None:
        """Wait until all requests have been served; not for those of the calling hub."""
        here = threading.current_thread()
        for crew in self._live:
            if crew.thread is not here:
                crew.thread.join()

    def _introduce(self, crew: Crew) -> None:
        here[get_ident()] = crew

    def _forget(self, crew: Crew) -> None:
        here.pop(get_ident(), None)
        with self._lock:
            self._live = tuple(other for other in self._live if other is not crew)
        self._on_change()


def wait_readable(fd: int, timeout: float | None) -> None:
    """Wait for a descriptor of any number; ``None`` waits without limit."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(None if timeout is None else timeout * 1000)
    else:
        select.select([fd], [], [], timeout)


def crew_here(server: object) -> Crew | None:
    """Return the crew of the calling thread, if it is one of this server's."""
    crew = here.get(get_ident())
    return crew if crew is not None and crew.server is server else None


def _after_fork() -> None:
    """Leave to the parent, in a child that a handler forked, what others are to serve."""
    for crew in here.values():
        crew.requests.clear()
    here.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def report(error: BaseException) -> None:
    """Report what escaped from a worker, as a thread would."""
    escaped = (type(error), error, error.__traceback__, threading.current_thread())
    try:
        threading.excepthook(threading.ExceptHookArgs(escaped))
    except Exception:  # of a hook of the program's, which would end the hub
        show(traceback.format_exc())
