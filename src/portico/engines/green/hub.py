"""Run greenlets and asyncio together on one thread.

A `Hub` is an asyncio event loop whose selector resumes greenlets (see `Poller`).  It owns the
greenlet that runs the loop, to which every waiting greenlet switches, and the list of sockets with
bytes that have not left yet.  Timers, signals, tasks and `add_reader` are plain asyncio.

Greenlets are started by the loop's own greenlet: whoever waits switches to ``hub.greenlet`` and is
found again through a watch, a timer or `Hub.run_soon`.  One that waits for a message may resume the
next whose message has come (`Poller.pass_on`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from _thread import get_ident
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar, TypeVarTuple, cast

from greenlet import getcurrent, greenlet

from portico.engines.green.poller import Poller, make_poller

if TYPE_CHECKING:
    from contextvars import Context

    from portico.engines.green.watch import Watch

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Nobody:
    """Stands for the greenlet of a hub that is not running: the parent of nobody."""

    def switch(self) -> NoReturn:
        """Say that there is nobody to switch to.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("the hub that this greenlet waits on does not run")


NOBODY: Final = cast("greenlet", _Nobody())

_running: dict[int, Hub] = {}
# The hub that runs in each thread, by the thread's number.

_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()
# All of this process, to be told of a fork.


def running() -> Hub | None:
    """Return the hub that runs in the calling thread."""
    return _running.get(get_ident())


class Unsent(Protocol):
    """A connection that collects bytes, as its hub sees it."""

    def send_at_once(self) -> bool:
        """Send what the system takes before a wait; return whether nothing is left.

        It is in `Hub.unsent` no longer.  Never raises `OSError`.
        """
        ...

    def send_collected(self) -> None:
        """Send what was collected, waiting for the peer if need be; never raise `OSError`."""

    def list_again(self) -> None:
        """Be in `Hub.unsent`, if anything is left."""

    def send_now(self) -> None:
        """Send what the system takes at once; never raise `OSError`."""

    def leave_to_parent(self) -> None:
        """Hold nothing in a child process: the parent sends what is left."""


class Hub(asyncio.SelectorEventLoop):
    """An asyncio event loop that runs greenlets as well.

    Runs in the thread that calls `run_forever`; a process may have several.  A process forked
    while a hub was not running may go on using it.  One forked from a greenlet of a running hub
    keeps that greenlet only, outside of any hub: its sockets block.

    Args:
        poller: What to poll with; the best of the system by default.
    """

    _is_made = False

    def __init__(self, poller: Poller | None = None) -> None:
        self.poller = make_poller() if poller is None else poller
        self.greenlet: greenlet = NOBODY
        self.switch: Callable[[], object] = NOBODY.switch
        """Lets the calling greenlet wait: the method of `greenlet`, at hand."""
        self.unsent: list[Unsent] = []
        self.sending = Lock()  # guards the bytes of what is in `unsent` against the watchdog
        self.wants = None if self.poller.is_edge_triggered else self.poller.wants
        self.guests = 0
        """Greenlets that a handler started beside its own, and that have not ended."""
        self.on_guest_left: Callable[[], object] = _nothing
        self.is_forked = False
        """Whether this is a copy in a child process of a hub of its parent's."""
        with _unlogged():
            super().__init__(self.poller)
        self._is_made = True
        _hubs.add(self)

    def __del__(self) -> None:
        # asyncio is not prepared for a want of descriptors that ended __init__ in its midst.
        if self._is_made:
            super().__del__()

    def run_forever(self) -> None:
        """Run until `stop`.

        Raises:
            BaseException: What no `Exception` is and came out of a greenlet or a callback.
        """
        if self.is_forked:
            self._renew()
        thread = get_ident()
        self.greenlet = getcurrent()
        self.switch = self.greenlet.switch
        _running[thread] = self
        try:
            super().run_forever()
        finally:
            self.greenlet, self.switch = NOBODY, NOBODY.switch
            _running.pop(thread, None)

    def stop(self) -> None:
        """Let `run_forever` return after the current round."""
        super().stop()
        self.poller.is_wanted = True

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Call back in the next round; a `select` in progress ends for it."""
        self.poller.is_wanted = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call back at an instant of `time`; a `select` in progress ends in time for it."""
        self.poller.deadline = min(self.poller.deadline, when)
        return super().call_at(when, callback, *args, context=context)

    def call_anywhere(self, callback: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call back in the hub's thread, from any thread; nothing if the hub is closed."""
        try:
            self.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self.is_closed():
                raise

    def is_current(self) -> bool:
        """Whether the hub's own greenlet is the calling one, which cannot wait."""
        return getcurrent() is self.greenlet

    def run_soon(self, waiting: greenlet) -> None:
        """Resume a greenlet in the current round, after the events that are at hand."""
        self.poller.runnable.append(waiting)

    def cancel_run(self, waiting: greenlet) -> None:
        """Take back `run_soon`, if it has not happened yet."""
        runnable = self.poller.runnable
        if runnable and waiting in runnable:
            runnable.remove(waiting)

    def give_way(self) -> None:
        """Let everybody else who is ready run first."""
        current = getcurrent()
        if current is self.greenlet:
            return
        if self.unsent:
            self.send_unsent()
        self.run_soon(current)
        try:
            self.switch()
        finally:
            self.cancel_run(current)

    def sleep(self, seconds: float) -> None:
        """Let the calling greenlet wait; the others run."""
        alarm = Alarm(self)
        timer = self.call_later(seconds, alarm.ring)
        try:
            alarm.wait()
        finally:
            timer.cancel()

    def wait_for(self, future: asyncio.Future[T]) -> T:
        """Let the calling greenlet wait for a future of this loop; return its result.

        Raises:
            BaseException: What the future holds.
        """
        alarm = Alarm(self)
        future.add_done_callback(alarm.ring)
        try:
            alarm.wait()
        except BaseException:
            future.cancel()
            raise
        finally:
            future.remove_done_callback(alarm.ring)
        return future.result()

    def run_in_thread(self, function: Callable[[], T]) -> T:
        """Let a thread call a function, and the calling greenlet wait for what it returns."""
        return self.wait_for(self.run_in_executor(None, function))

    def send_unsent(self) -> None:
        """Send what the calling greenlet collected; called before every wait."""
        unsent = self.unsent
        while unsent:
            outbox = unsent.pop()
            if not outbox.send_at_once():
                self._send_slowly(outbox)

    def _send_slowly(self, first: Unsent) -> None:
        """Wait for peers that have no room, one after the other, when all that have it are served.

        Nothing is listed by then.  So the wait for one does not begin by waiting for the next, in
        a deeper call for each; and no other greenlet waits for these peers.
        """
        slow = [first]
        while self.unsent:
            outbox = self.unsent.pop()
            if not outbox.send_at_once():
                slow.append(outbox)
        try:
            while slow:
                slow[-1].send_collected()
                slow.pop()
        except BaseException:
            for outbox in slow:
                outbox.list_again()
            raise

    def send_from_watchdog(self) -> None:
        """Send what the greenlet that holds the hub has written so far; from another thread."""
        if self.unsent and self.sending.acquire(blocking=False):
            try:
                for outbox in tuple(self.unsent):
                    outbox.send_now()
            finally:
                self.sending.release()

    def listen(self, watch: Watch, on_readable: Callable[[], object]) -> None:
        """Call back whenever a descriptor is readable, from within the hub's greenlet.

        Raises:
            OSError: The descriptor cannot be polled.
        """
        bell: Any = _Bell(on_readable)
        watch.reader = bell
        watch.hub = self
        self.poller.listen(watch)

    def close(self) -> None:
        """Release the hub's descriptors; what waits on it stays where it is."""
        super().close()
        self.poller.close()

    def _fork(self) -> None:
        """Leave the parent's hub alone; called in a child process, perhaps by a greenlet."""
        self.is_forked = True
        self.greenlet, self.switch = NOBODY, NOBODY.switch
        # Another thread, which there is no more, may have held the one before.
        self.sending = Lock()
        for outbox in self.unsent:
            outbox.leave_to_parent()
        self.unsent.clear()
        self.poller.abandon()
        self.stop()

    def _renew(self) -> None:
        """Use descriptors of this process's own: the parent goes on using those of before."""
        self.is_forked = False
        self._stopping = False
        self.poller.renew()
        self._close_self_pipe()  # type: ignore[attr-defined]  # private to asyncio
        self._make_self_pipe()  # type: ignore[attr-defined]  # as above


class Alarm:
    """One wait of one greenlet for one ring."""

    __slots__ = ("_greenlet", "_hub", "_is_waiting", "has_rung")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._greenlet = getcurrent()
        self._is_waiting = False
        self.has_rung = False

    def ring(self, _: object = None) -> None:
        """Wake the greenlet; from a callback of the hub."""
        self.has_rung = True
        if self._is_waiting:
            self._greenlet.switch()

    def wait(self) -> None:
        """Wait until it has rung, once; only in the greenlet that made it, not in the hub's."""
        if self._hub.unsent:
            self._hub.send_unsent()
        if self.has_rung:
            return
        self._is_waiting = True
        try:
            self._hub.switch()
        finally:
            self._is_waiting = False


class _Bell:
    """A function in the place of a greenlet."""

    __slots__ = ("switch",)

    def __init__(self, switch: Callable[[], object]) -> None:
        self.switch = switch

    def throw(self, error: BaseException, /) -> object:
        """Not used: a listener has no timeout."""
        raise error


def _nothing() -> None:
    """Do nothing."""


def _before_fork() -> None:
    """Send what was written before a child comes that may write to the same connection.

    Without a wait, for which others would run in the midst of a fork.
    """
    hub = running()
    if hub is not None and hub.unsent:
        with hub.sending:
            for outbox in tuple(hub.unsent):
                outbox.send_now()


def _after_fork() -> None:
    """Take the hubs of the parent out of service in a child."""
    _running.clear()
    for hub in tuple(_hubs):
        hub._fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


@contextmanager
def _unlogged() -> Generator[None]:
    """Keep what asyncio says in this thread out of its log.

    Every loop that is made tells its selector at debug level, and a program that listens to all
    loggers, as a logging server does, would find that line among its own.
    """
    log, thread = logging.getLogger("asyncio"), get_ident()

    def is_of_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_of_another_thread)
    try:
        yield
    finally:
        log.removeFilter(is_of_another_thread)
