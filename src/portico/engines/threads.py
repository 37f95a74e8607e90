"""Serve each request in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from typing import Final

from portico.connection import ClientAddress, Request
from portico.engines import Hooks, serve

REAP_AT: Final = 8
"""Threads that may be remembered before the ones that ended are looked for.

Looking costs a step for each remembered thread, so it is done when their number has doubled
since the last time, not at every request."""


class _Threads(list[threading.Thread]):
    """The threads that a server has to wait for; daemons are not among them."""

    def __init__(self, threads: Iterable[threading.Thread] = ()) -> None:
        super().__init__(threads)
        self._lock = threading.RLock()  # guards the list against two that reap at once
        self._reap_at = REAP_AT

    def append(self, thread: threading.Thread) -> None:
        """Remember `thread`, unless it is a daemon."""
        with self._lock:
            self._append(thread)

    def start(self, thread: threading.Thread) -> None:
        """Remember `thread` and start it, before anyone can take it out to wait for it.

        Raises:
            RuntimeError: The system has no thread left; it is not remembered then.
        """
        with self._lock:
            self._append(thread)
            try:
                thread.start()
            except BaseException:
                with suppress(ValueError):  # it was not remembered, or has been taken out
                    self.remove(thread)  # nobody can wait for it
                raise

    def pop_all(self) -> list[threading.Thread]:
        """Forget all threads and return them."""
        with self._lock:
            threads = list(self)
            self.clear()
            return threads

    def join(self) -> None:
        """Wait for every thread but the calling one, without limit.

        Not for one that has not begun: who starts it was interrupted by the signal handler that
        calls this, and goes on only after it.
        """
        here = threading.current_thread()
        for thread in self.pop_all():
            if thread is not here:
                with suppress(RuntimeError):  # what `Thread.join` raises for one that has not begun
                    thread.join()

    def reap(self) -> None:
        """Forget the threads that have ended."""
        with self._lock:
            self._reap()

    def _remembers(self, thread: threading.Thread) -> bool:
        return not thread.daemon

    def _append(self, thread: threading.Thread) -> None:
        if not self._remembers(thread):
            return
        if len(self) >= self._reap_at:
            self._reap()
            self._reap_at = max(REAP_AT, 2 * len(self))
        super().append(thread)

    def _reap(self) -> None:
        # One that has not been started yet counts: somebody is about to.
        self[:] = [thread for thread in self if thread.is_alive() or thread.ident is None]


class _UnderWay(_Threads):
    """Threads that the end of a server does not wait for, but a drain does; daemons, too."""

    def _remembers(self, thread: threading.Thread) -> bool:
        return True


_OURS: Final = _Threads
"""Stays what it is when a program puts something else in the place of `_Threads`."""


class _NoThreads:
    """Stands for `_Threads` on a server that waits for none."""

    def append(self, thread: threading.Thread) -> None:
        """Do nothing."""

    def join(self) -> None:
        """Do nothing."""

    def pop_all(self) -> list[threading.Thread]:
        """Return no thread."""
        return []

    def reap(self) -> None:
        """Do nothing."""


def _run_in(context: Context, thread: threading.Thread) -> None:
    """Do what a thread was made to do, in a context."""
    del vars(thread)["run"]  # which refers to the thread: nothing is left to the collector
    context.run(thread.run)


class ThreadingMixIn(Hooks):
    """Serve each request in a thread of its own.

    Owns `process_request`, `process_request_thread` and `_threads`; extends `server_close`.
    """

    daemon_threads: bool = False
    """Whether the program may end while requests are served.  Daemon threads are not waited for."""

    block_on_close: bool = True
    """Whether `server_close` waits for the threads that are no daemons, without limit."""

    _keeps_lobby = False

    _threads: _Threads | _NoThreads = _NoThreads()

    _under_way: _UnderWay | None = None
    # Handlers of datagrams that are not in _threads: they need the listener, and no connection
    # tells of them.

    def process_request_thread(self, request: Request, client_address: ClientAddress) -> None:
        """Serve the request; what the thread runs."""
        serve(self, request, client_address)

    def process_request(self, request: Request, client_address: ClientAddress) -> None:
        """Start a thread for the request, with a copy of the caller's context variables.

        Raises:
            RuntimeError: The system has no thread left; the server then closes the request
                and goes on.
        """
        # Programs, and their tests, put something in the place of Thread that knows this call.
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address)
        )
        context = copy_context()
        if context:  # a thread begins with an empty one, unless Python was told otherwise
            vars(thread)["run"] = partial(_run_in, context, thread)
        thread.daemon = self.daemon_threads
        if self.block_on_close and not thread.daemon and "_threads" not in vars(self):
            vars(self).setdefault("_threads", _Threads())  # two may come here at once
        threads = self._threads
        if isinstance(threads, _OURS) and not thread.daemon:
            threads.start(thread)
        elif getattr(self, "_replies_by_listener", False):
            if self._under_way is None:
                vars(self).setdefault("_under_way", _UnderWay())
            under_way = self._under_way
            assert under_way is not None
            under_way.start(thread)
        else:
            threads.append(thread)
            thread.start()

    def _requests_under_way(self) -> int:
        threads, under_way = self._threads, self._under_way
        threads.reap()
        waited_for = len(threads) if isinstance(threads, list) else 0
        if under_way is None:
            return waited_for
        under_way.reap()
        return waited_for + len(under_way)

    def _is_under_way_here(self) -> bool:
        here = threading.current_thread()
        return any(
            isinstance(threads, list) and here in threads
            for threads in (self._threads, self._under_way)
        )

    def server_close(self) -> None:
        """Close the listener, then wait for the threads as `block_on_close` says.

        Not after a drain that has given some up.
        """
        super().server_close()
        if not getattr(self, "_has_stragglers", False):
            self._threads.join()
