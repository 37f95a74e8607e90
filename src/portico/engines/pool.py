"""Serve requests on a bounded number of threads.

Owns the workers of a server, the queue in front of them, and what happens when both are full:
a server of ours leaves clients in the backlog, and in front of another one the acceptor waits.

An idle worker waits at a gate of its own, and the one that served last is taken first: its
memory is still warm, and those that are not needed stay idle long enough to retire.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from contextlib import suppress
from contextvars import Context, copy_context
from time import monotonic as time
from typing import Any, Final, NamedTuple
from weakref import WeakSet

from portico.acceptor import FIRST_PAUSE
from portico.connection import ClientAddress, Request
from portico.engines import Hooks, serve
from portico.errors import SettingError
from portico.events import RequestStarted, emit
from portico.gate import Room

FOREVER: Final = threading.TIMEOUT_MAX
"""Seconds that a lock can be waited for at the most; some systems refuse more."""


class ThreadPoolMixIn(Hooks):
    """Serve requests on a bounded number of threads, which serve one after another.

    A request goes to an idle worker, or to one that is started for it, or to the queue.  When
    all workers serve and the queue is full, clients wait in the kernel's backlog; in front of a
    server that is not ours, `process_request` waits.

    A request has a context of its own (`contextvars`), a copy of the acceptor's; a
    `threading.local` keeps what an earlier request left on the same worker.  A handler that
    raises what is no `Exception` ends its worker, and another takes its place.  Workers are
    daemons, and so are the threads that a handler starts without saying otherwise.

    Owns `process_request` and `process_request_thread`; extends `server_activate` and
    `server_close`.
    """

    max_workers: int = 64
    """Handlers that run at once, each in a thread."""

    max_queued: int = 64
    """Requests that were accepted and wait for a worker; 0 for none.

    The queue spares a worker that comes free the wait for the next request; what is beyond one
    for each worker waits as well in the backlog, where it holds no descriptor of ours.
    """

    worker_idle_timeout: float = 10.0
    """Seconds after which a worker without a request ends.

    Long enough that starting the thread again does not matter, and short enough that the threads
    of a burst give back their memory within seconds of its end.
    """

    daemon_threads: bool = False
    """Whether the program may end while requests are served or queued.  `server_close` does not
    wait for them then."""

    block_on_close: bool = True
    """Whether `server_close` waits for the requests that are served or queued, without limit."""

    _pool: Pool | None = None

    def server_activate(self) -> None:
        """Get ready to accept.

        Raises:
            SettingError: A setting of the pool is outside its range.
        """
        if self.max_workers < 1:
            raise SettingError("max_workers", self.max_workers, "1 or more")
        if self.max_queued < 0:
            raise SettingError("max_queued", self.max_queued, "0 or more")
        if not self.worker_idle_timeout > 0:
            raise SettingError("worker_idle_timeout", self.worker_idle_timeout, "more than 0")
        super().server_activate()

    def process_request_thread(self, request: Request, client_address: ClientAddress) -> None:
        """Serve the request; what the worker runs."""
        serve(self, request, client_address)

    def process_request(self, request: Request, client_address: ClientAddress) -> None:
        """Hand the request to a worker, or to the queue.

        Callable from any thread.  Waits while both are full, which a serving loop of ours
        avoids: it leaves clients in the backlog.

        Raises:
            RuntimeError: The system has no thread left, and the pool has none; the server then
                closes the request and goes on.
        """
        since = time() if RequestStarted.subscribers else None
        pool = self._pool or _pools.of(self)
        if pool.hand_over(_Task(request, client_address, since, copy_context())):
            pool.pause_accepting()

    def _requests_under_way(self) -> int:
        return 0 if self._pool is None else self._pool.under_way

    def _is_under_way_here(self) -> bool:
        return self._pool is not None and self._pool.serves_here

    def server_close(self) -> None:
        """Close the listener, then wait as `block_on_close` says.

        Idle workers end at once, the others when the queue is empty.
        """
        super().server_close()
        pool = self._pool
        if pool is not None:
            pool.close()
            may_wait = self.block_on_close and not self.daemon_threads
            if may_wait and not getattr(self, "_has_stragglers", False):
                pool.wait_ended()


class _Task(NamedTuple):
    """A request on its way to a worker."""

    request: Request
    client_address: ClientAddress
    since: float | None
    """When it was handed over; ``None`` if nobody asks."""
    context: Context
    """A copy of the acceptor's."""


class _Worker:
    """A thread of a pool."""

    __slots__ = ("gate", "task", "thread")

    def __init__(self, task: _Task | None) -> None:
        self.task = task  # what it has to serve next
        self.gate = threading.Lock()  # held until there is something to do for an idle worker
        self.gate.acquire()
        self.thread: threading.Thread

    def wake(self) -> None:
        """End the wait at the gate, if it is not over.  To be called with the pool's lock."""
        if self.gate.locked():
            self.gate.release()


class Pool:
    """The workers of one server in one process, and the requests that wait for them."""

    def __init__(self, server: Any) -> None:
        """Make a pool without workers."""
        self._server = server
        self._lock = threading.RLock()  # guards all that follows, and each worker's `task`
        self._changed = threading.Condition(self._lock)  # there is room, or a worker left
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []  # the last one served last
        self._queue: deque[_Task] = deque()
        self._left: list[threading.Thread] = []  # of workers that left, and may not have ended
        self._closers: set[_Worker] = set()  # whose handlers wait for the others
        self._is_full = False  # and somebody has to be told when there is room
        self._room: Room | None = None  # made when the pool is first full
        self._is_blind = False  # the acceptor rests without a word when there is room
        # It comes back while the pool is full, and must not wait then: it would hear of no
        # shutdown.  So the queue takes one more.
        self._is_closed = False
        self._is_exiting = False

    @property
    def workers(self) -> int:
        """Threads, idle or serving."""
        return len(self._workers)

    @property
    def under_way(self) -> int:
        """Requests that are queued or served."""
        with self._lock:
            return len(self._queue) + len(self._workers) - len(self._idle)

    @property
    def serves_here(self) -> bool:
        """Whether the calling thread is one of the workers."""
        here = threading.current_thread()
        with self._lock:
            return any(worker.thread is here for worker in self._workers)

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue)

    # --- what the acceptor does ---------------------------------------------------------

    def hand_over(self, task: _Task) -> bool:
        """Give a task to a worker or to the queue, and say whether there is no room left.

        Waits until there is room, unless `pause_accepting` could not.  Callable from any thread.

        Raises:
            RuntimeError: No worker could be started, and there is none.
        """
        with self._lock:
            while not self._give(task):
                self._note_full()
                if self._is_blind:
                    self._queue.append(task)
                    break
                self._changed.wait()
            if self._idle or self._has_room():
                return False
            self._note_full()
            return True

    def pause_accepting(self) -> None:
        """Have a server of ours leave clients in the backlog until there is room."""
        pause = getattr(self._server, "pause_accepting", None)
        if pause is None:
            return
        with self._lock:
            self._is_blind = False
            if self._room is None and self._is_full and not self._is_closed:
                try:
                    self._room = Room()
                except OSError:  # out of descriptors
                    self._is_blind = True
                    pause(FIRST_PAUSE)
            if self._room is not None and self._is_full:
                pause(until=(self._room.fileno(),))

    def _give(self, task: _Task) -> bool:
        """Find a place for a task, and say whether there was one."""
        if self._is_exiting:
            raise RuntimeError("no request can be served while the interpreter ends")
        if self._idle:
            # In this order, whatever a signal handler raises in between: a worker that was
            # taken from the list has its task, and one that was not will get another.
            worker = self._idle[-1]
            worker.task = task
            self._idle.pop()
            worker.wake()  # unless `close` has done so, a moment ago
            return True
        if len(self._workers) < max(1, self._server.max_workers):
            try:
                self._start(task)
            except RuntimeError:
                if not self._workers:
                    raise
            else:
                return True
        if len(self._queue) < self._server.max_queued or self._is_closed:
            self._queue.append(task)
            return True
        return False

    def _has_room(self) -> bool:
        """Say whether there is a place for a task, when no worker is idle."""
        if len(self._queue) < self._server.max_queued:
            return True
        # A queue that is in use says that no worker could be started.
        return not self._queue and len(self._workers) < self._server.max_workers

    def _start(self, task: _Task) -> None:
        """Start a worker for a task."""
        worker = _Worker(task)
        worker.thread = threading.Thread(
            # Daemons, because the interpreter waits for any other thread before it ends, and
            # nothing of its public interface could tell an idle worker that it wants to.  It is
            # `_finish_at_exit` that lets the requests finish.
            target=self._work,
            args=(worker,),
            name=f"{type(self._server).__name__} worker",
            daemon=True,
        )
        self._workers.add(worker)
        try:
            worker.thread.start()
        except BaseException:
            self._workers.discard(worker)
            raise

    # --- what a worker does -------------------------------------------------------------

    def _work(self, worker: _Worker) -> None:
        """Serve one task after another; what a worker's thread runs."""
        while True:
            try:
                while self._serve_next(worker):
                    pass
            except BaseException as error:
                if self._replace(worker):
                    raise  # the thread ends, and `threading.excepthook` is told why
                _report(error)
            else:
                return

    def _serve_next(self, worker: _Worker) -> bool:
        """Serve a task, and say whether there was one; if not, the worker has left.

        A function of its own, so that an idle worker holds on to nothing of the last request.
        """
        task = self._next(worker)
        if task is None:
            return False
        task.context.run(self._serve, task)
        return True

    def _serve(self, task: _Task) -> None:
        request, client_address, since, _ = task
        if since is not None:
            emit(RequestStarted(self._server, client_address, time() - since))
        self._server.process_request_thread(request, client_address)

    def _next(self, worker: _Worker) -> _Task | None:
        """Wait for a task; ``None`` if the worker has left instead."""
        with self._lock:
            task, worker.task = worker.task, None  # for which it was started
            if task is not None:
                return task
            if self._queue:
                task = self._queue.popleft()
                self._look_for_room()
                return task
            if self._is_closed:
                self._leave(worker)
                return None
            self._idle.append(worker)
            self._tell_room()
        in_time = worker.gate.acquire(timeout=min(self._server.worker_idle_timeout, FOREVER))
        with self._lock:
            task, worker.task = worker.task, None
            if worker in self._idle:
                self._idle.remove(worker)
            elif not in_time:  # it was taken in the last moment
                worker.gate.acquire(blocking=False)
            if task is None:
                self._leave(worker)
            return task

    def _replace(self, worker: _Worker) -> bool:
        """Let a worker go that something was raised in, and say whether its thread may end."""
        with self._lock:
            if worker.task is not None:  # raised by somebody else, before it served
                self._queue.appendleft(worker.task)
                worker.task = None
            self._leave(worker)
            if self._queue:
                task = self._queue.popleft()
                try:
                    self._start(task)
                except RuntimeError:
                    self._queue.appendleft(task)
                    if not self._workers:  # nobody else would serve the queue
                        self._left.remove(worker.thread)
                        self._workers.add(worker)
                        return False
            self._look_for_room()
            return True

    def _leave(self, worker: _Worker) -> None:
        """Take a worker out, whose thread is about to end."""
        if worker in self._idle:
            self._idle.remove(worker)
        self._workers.discard(worker)
        self._closers.discard(worker)
        self._left = [thread for thread in self._left if thread.is_alive()]
        self._left.append(worker.thread)
        self._changed.notify_all()

    # --- being full ---------------------------------------------------------------------

    def _note_full(self) -> None:
        if not self._is_full:
            self._is_full = True
            if self._room is not None:
                self._room.clear()

    def _look_for_room(self) -> None:
        """Tell that there is room, once half of the queue is free.

        At every single place, accepting would be paused and resumed for each request.
        """
        if len(self._queue) <= self._server.max_queued // 2:
            self._tell_room()

    def _tell_room(self) -> None:
        if self._is_full:
            self._is_full = False
            self._changed.notify_all()
            if self._room is not None:
                self._room.tell()

    # --- the end ------------------------------------------------------------------------

    def close(self) -> None:
        """Have every worker end as soon as there is nothing for it to do; does not wait."""
        with self._lock:
            self._is_closed = True
            for worker in self._workers:
                worker.wake()
            self._changed.notify_all()  # whoever waits for room need not any more
            self._close_room()

    def wait_ended(self) -> None:
        """Wait until every worker has ended, without limit.

        In a handler, for the others, unless their handlers do the same.  In a signal handler not
        for one that the thread below was about to start.
        """
        here = threading.current_thread()
        with self._lock:
            self._closers |= {worker for worker in self._workers if worker.thread is here}
            is_worker = any(worker.thread is here for worker in self._closers)
            spared = self._closers if is_worker else frozenset[_Worker]()
            self._changed.notify_all()
            while any(worker.thread.is_alive() for worker in self._workers - spared):
                self._changed.wait()
            left = tuple(self._left)
        for thread in left:
            if thread is not here:
                thread.join()

    def finish_at_exit(self) -> None:
        """Let the requests finish that were handed over, and take no more."""
        if not self._server.daemon_threads:
            with self._lock:
                self._is_exiting = True
            self.close()
            self.wait_ended()

    def abandon(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""
        self._lock = threading.RLock()  # somebody may have held it
        self._changed = threading.Condition(self._lock)
        self._workers.clear()
        self._idle.clear()
        self._queue.clear()
        self._left.clear()
        self._closers.clear()
        self._is_closed = True  # a worker that has forked ends after its handler
        self._close_room()
        self._server._pool = None

    def _close_room(self) -> None:
        self._is_full = False
        room, self._room = self._room, None
        if room is not None:
            resume = getattr(self._server, "resume_accepting", None)
            if resume is not None:  # the descriptor that ends the pause will not be there
                resume()
            room.close()


def _report(error: BaseException) -> None:
    """Report what a handler raised as for a thread that it ended."""
    arguments = (type(error), error, error.__traceback__, threading.current_thread())
    with suppress(Exception):  # of the program's own hook
        threading.excepthook(threading.ExceptHookArgs(arguments))


class _Pools:
    """The pools of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the pools, and the servers' `_pool` when it is set
        self._pools: WeakSet[Pool] = WeakSet()
        os.register_at_fork(after_in_child=self._abandon_all)

    def of(self, server: Any) -> Pool:
        """Return the pool of a server, made now if there is none."""
        with self._lock:
            pool: Pool | None = server._pool
            if pool is None:
                pool = server._pool = Pool(server)
                self._pools.add(pool)
                # Again and again, to be the last: exit handlers run from the last to the first,
                # and what those of the program take down, its requests may still need.
                atexit.unregister(self._finish_at_exit)
                atexit.register(self._finish_at_exit)
            return pool

    def _finish_at_exit(self) -> None:
        for pool in tuple(self._pools):
            pool.finish_at_exit()

    def _abandon_all(self) -> None:
        self._lock = threading.Lock()  # somebody may have held it
        for pool in tuple(self._pools):
            pool.abandon()
        self._pools.clear()


_pools: Final = _Pools()
