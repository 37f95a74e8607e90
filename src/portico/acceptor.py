"""Wait for a listener, be woken at once, and know what an error of accept(2) asks for.

Owns the selector and the wake-up of a serving loop, and the table of accept's errors.  The
loop itself is `BaseServer.serve_forever`; nothing here reads from a connection.
"""

from __future__ import annotations

import errno
import os
import select
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from enum import Enum, auto
from math import inf
from time import monotonic as time
from types import TracebackType
from typing import Any, Final, Protocol, Self

# poll(2) has no limit on descriptor numbers and, unlike epoll, needs no descriptor itself.
_ServerSelector: type[selectors.BaseSelector] = selectors.PollSelector

HAS_EXCLUSIVE: Final = hasattr(select, "EPOLLEXCLUSIVE")

FIRST_PAUSE: Final = 0.1
"""Seconds without accepting after the system ran out of descriptors or memory.

Without a pause the listener stays readable and the loop takes a full core.  Ranch and trio
chose the same value; it is short beside the 1 s a client waits before it retries (RFC 6298).
"""

LONGEST_PAUSE: Final = 1.0
"""Seconds that the pause grows to, doubling, while accepting keeps failing."""


class Listener(Protocol):
    """Anything with a descriptor to accept from.

    The server object itself, so that a program's own `fileno` decides what is watched.
    """

    def fileno(self) -> int:
        """Return the descriptor; negative once it is closed."""
        ...


class Recovery(Enum):
    """What to do after accepting failed."""

    SKIP = auto()
    """The error belongs to one peer, which is gone: accept the next."""
    PAUSE = auto()
    """The system has no descriptor or memory left: wait until some are free."""
    CHECK = auto()
    """The listener may be closed or shut down; if it is, the loop ends."""


RECOVERIES: Final = {
    errno.EMFILE: Recovery.PAUSE,  # the process has no descriptor left
    errno.ENFILE: Recovery.PAUSE,  # the system has none
    errno.ENOBUFS: Recovery.PAUSE,  # no socket buffers
    errno.ENOMEM: Recovery.PAUSE,  # no memory
    errno.EBADF: Recovery.CHECK,  # closed
    errno.ENOTSOCK: Recovery.CHECK,  # closed, and its number belongs to something else now
    errno.EINVAL: Recovery.CHECK,  # not listening: never activated, or shut down
}
"""The errors of accept(2) that are not the peer's.

The survey.  accept(2), "Error handling": errors already pending on the connection come out of
accept itself and are to be retried like EAGAIN (ENETDOWN, EPROTO, ENOPROTOOPT, EHOSTDOWN,
ENONET, EHOSTUNREACH, EOPNOTSUPP, ENETUNREACH); so are ECONNABORTED (reset while it waited in
the backlog), EINTR, EPERM (a firewall's verdict) and EAGAIN (another process took it).  A
program's own `get_request` may raise any `OSError`, `ssl.SSLError` among them, and
`socketserver` goes on.  Hence all but the listed ones are skipped.
What others do when descriptors run out: asyncio waits 1 s, trio and Ranch 0.1 s, gevent
doubles from 0.01 to 1 s, Twisted keeps a spare descriptor.
"""


def recovery(error: OSError) -> Recovery:
    """Decide what `error`, raised by accepting, asks for."""
    return RECOVERIES.get(error.errno or 0, Recovery.SKIP)


def is_open(listener: Listener) -> bool:
    """Say whether `listener` still has a descriptor."""
    try:
        return listener.fileno() >= 0
    except ValueError:  # what a closed file says, where a closed socket says -1
        return False
    except AttributeError:  # a program's own selector may need no descriptor
        return True


def is_shared(listener: Listener) -> bool:
    """Say whether other processes wait for the same listener, which a server knows of its own."""
    return getattr(listener, "shares_listener", False) is True


def round_of(listener: Listener) -> Callable[[], object] | None:
    """Return what is to be called whenever a loop comes round; ``None`` if nobody watches it.

    Not `service_actions`: a program that has some is called after each request, and the engines
    take the long way for it.
    """
    found: Callable[[], object] | None = getattr(listener, "_on_round", None)
    return found


def is_ready(listener: Listener) -> bool:
    """Say whether somebody waits to be accepted from an open listener."""
    with _ServerSelector() as selector:
        try:
            selector.register(listener, selectors.EVENT_READ)
        except ValueError:  # closed
            return False
        return bool(selector.select(0))


def is_listening(listener: Any) -> bool:
    """Say whether accepting from `listener` can work on a later try."""
    if not is_open(listener):
        return False
    sock = getattr(listener, "socket", None)
    try:
        descriptor = listener.fileno()
        os.fstat(descriptor)
        if sock is None or sock.fileno() != descriptor or sock.type != socket.SOCK_STREAM:
            return True  # a datagram socket, or a program's own kind of listener
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return True
        sock.getpeername()  # a connection that the program takes its requests from
    except OSError:  # closed behind the object's back, or neither listening nor connected
        return False
    except AttributeError:  # a program's own kind of listener, as above
        return True
    return True


class Pause:
    """A time without accepting: until an instant, or until a descriptor is readable."""

    __slots__ = ("deadline", "descriptors", "is_for_place")

    def __init__(
        self, deadline: float, descriptors: Collection[int] = (), *, is_for_place: bool = False
    ) -> None:
        self.deadline = deadline
        self.descriptors = descriptors
        self.is_for_place = is_for_place
        """Whether it is for a place only: those who have one go on meanwhile."""

    def remaining(self, now: float) -> float:
        """Return the seconds from `now` to the deadline, 0 when it has passed."""
        return max(0.0, self.deadline - now)


class Exhaustion:
    """How long accepting has failed for want of descriptors or memory."""

    __slots__ = ("delay", "since")

    def __init__(self, now: float) -> None:
        self.since = now
        self.delay = FIRST_PAUSE

    def next_pause(self, now: float) -> Pause:
        """Return the pause to make at `now`; the one after it is twice as long."""
        delay, self.delay = self.delay, min(self.delay * 2, LONGEST_PAUSE)
        return Pause(now + delay)


class Wakeup:
    """A pipe that ends a wait from another thread or from a signal handler.

    A pipe, not a socket pair: programs that replace `socket.socket` in their tests keep it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # guards _writer: a closed descriptor's number is soon somebody else's.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._hears_signals = False
        self.misses_signals = False
        """Whether a signal that arrives just before a wait could go unnoticed in it."""
        if threading.current_thread() is threading.main_thread():
            self._hear_signals()

    def fileno(self) -> int:
        """Return the descriptor that is readable after `wake`."""
        return self._reader

    def wake(self) -> None:
        """End the wait.  Callable from any thread and from a signal handler; never waits."""
        with self._lock:
            if self._writer >= 0:
                try:
                    os.write(self._writer, b"\0")
                except BlockingIOError:  # full: the wait ends all the same
                    pass

    def clear(self) -> None:
        """Forget every `wake` so far."""
        try:
            os.read(self._reader, 4096)
        except BlockingIOError:  # a process that shares the pipe was faster
            pass
        if self._hears_signals:  # one may have rung
            run_signal_handlers()

    def close(self) -> None:
        """Close the pipe, in the thread that made it.  A `wake` that comes later does nothing."""
        if self._hears_signals:
            current = signal.set_wakeup_fd(-1)
            if current != self._writer and current >= 0:  # somebody else asked for it since
                signal.set_wakeup_fd(current)
        with self._lock:
            ends = self._reader, self._writer
            self._reader = self._writer = -1  # first: a signal handler may call `wake`
            for end in ends:
                os.close(end)

    def _hear_signals(self) -> None:
        """Have the interpreter write here when a signal arrives, unless it writes elsewhere.

        Python runs a signal's handler between two bytecodes of the main thread: a signal that
        arrives after the last one, just before the system call that waits, would be noticed
        only when the wait ends.
        """
        try:
            previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        except ValueError:  # the main thread of a subinterpreter, which has no signal handlers
            return
        if previous < 0:
            self._hears_signals = True
        else:
            signal.set_wakeup_fd(previous)
            self.misses_signals = True
        run_signal_handlers()


def run_signal_handlers() -> None:
    """Run the handlers of signals that have arrived; in the main thread.

    The interpreter does so by itself, but until Python 3.13 a signal that arrives while a thread
    takes the interpreter's lock can be lost sight of until the next one.  This call looks for it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ())


class SharedSelector:
    """Waits for a listener that other processes wait for, too: the system wakes one of them.

    A poll(2) of it would wake all, for each client.  Like a selector, as far as `Acceptor` goes.

    Source: epoll_ctl(2), ``EPOLLEXCLUSIVE``.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, *, is_shared: bool = False) -> None:
        """Wait for what is readable.

        Raises:
            ValueError: It is closed.
        """
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if number < 0:
            raise ValueError(f"Invalid file descriptor: {number}")
        self._epoll.register(number, select.EPOLLIN | (select.EPOLLEXCLUSIVE if is_shared else 0))
        self._keys[number] = selectors.SelectorKey(fileobj, number, events, None)

    def select(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is readable, after so many seconds at the most."""
        found = self._epoll.poll(timeout if timeout is None or timeout > 0 else 0)
        return [(self._keys[number], selectors.EVENT_READ) for number, _ in found]

    def close(self) -> None:
        """Wait for nothing any more.

        Taken out one by one: a child that was forked for a request has a copy of the epoll object,
        which would stay among those that the system may choose to wake.
        """
        for number in self._keys:
            try:
                self._epoll.unregister(number)
            except OSError:  # it was closed first
                pass
        self._epoll.close()


class Acceptor:
    """One wait after another for a listener, in one thread."""

    _beside: Listener | None = None

    def __init__(self, listener: Listener, *, wakeup: Wakeup | None = None) -> None:
        """Watch `listener`, and `wakeup`, which then belongs to this object.

        Raises:
            ValueError: The listener is closed.
        """
        self.process = os.getpid()
        self.thread = threading.get_ident()
        self.wakeup = wakeup
        self._on_round = round_of(listener)
        # A wait that has to end now and then does so for either reason.
        self.misses_signals = (
            wakeup is not None and wakeup.misses_signals
        ) or self._on_round is not None
        self._shared = listener if HAS_EXCLUSIVE and is_shared(listener) else None
        self._selector: Any
        try:
            self._selector = _ServerSelector() if self._shared is None else SharedSelector()
            try:
                if wakeup is not None:
                    self._selector.register(wakeup, selectors.EVENT_READ)
                if self._shared is None:
                    self._selector.register(listener, selectors.EVENT_READ)
                else:
                    self._selector.register(listener, selectors.EVENT_READ, is_shared=True)
            except BaseException:
                self._selector.close()
                raise
        except BaseException:
            if wakeup is not None:
                wakeup.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def has_more(self) -> bool:
        """Whether there may be another request without a wait; asked once before each wait."""
        return False

    def close(self) -> None:
        """Stop watching.  The listener stays open."""
        self._selector.close()
        if self.wakeup is not None:
            self.wakeup.close()

    def watch(self, beside: Listener) -> None:
        """Have a wait end as well when something else is readable: the listener is not ready then.

        To be called once.
        """
        self._selector.register(beside, selectors.EVENT_READ)
        self._beside = beside

    def wake(self) -> None:
        """End the wait.  Callable from any thread and from a signal handler."""
        if self.wakeup is not None:
            self.wakeup.wake()

    def wait(self, timeout: float | None) -> bool:
        """Wait until the listener is ready, and say whether it is.

        Args:
            timeout: Seconds; ``None`` waits until the listener is ready or `wake` is called.
        """
        self._come_round()
        ready = False
        wakeup = self.wakeup
        found = self._selector.select(timeout)
        for key, _ in found:
            if wakeup is not None and key.fileobj is wakeup:
                wakeup.clear()
            elif key.fileobj is not self._beside:
                ready = True
        if not found and self._shared is not None:
            # The one that the system woke for a client may have ended, or be held by a handler,
            # before it accepted; nobody else is woken for that client.
            return is_ready(self._shared)
        return ready

    def _come_round(self) -> None:
        """Tell who watches the loop that it goes on."""
        if self._on_round is not None:
            self._on_round()

    def rest(self, pause: Pause, timeout: float | None) -> bool:
        """Wait without the listener, and say whether `pause` is over.

        What is watched beside the listener ends the wait, but not the pause, of one for a place.

        Args:
            pause: What is waited for.
            timeout: Seconds after which to return in any case; ``None`` for no limit.
        """
        self._come_round()
        remaining = pause.remaining(time())
        if not remaining:
            return True
        patience = min(remaining, inf if timeout is None else timeout)
        over = False
        with _ServerSelector() as selector:
            for descriptor in pause.descriptors:
                selector.register(descriptor, selectors.EVENT_READ)
            if pause.is_for_place and self._beside is not None:
                with suppress(ValueError):  # closed in another thread, which wakes this one
                    selector.register(self._beside, selectors.EVENT_READ)
            if self.wakeup is not None:
                selector.register(self.wakeup, selectors.EVENT_READ)
            for key, _ in selector.select(None if patience == inf else patience):
                if self.wakeup is not None and key.fileobj is self.wakeup:
                    self.wakeup.clear()
                elif key.fileobj is not self._beside:
                    over = True
        return over or not pause.remaining(time())
