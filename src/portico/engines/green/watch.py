"""Let greenlets wait for one descriptor.

Owns what is known of a descriptor (who waits to read, who to write, may the next read succeed),
and the timer that its waits share.  Leaves the system's poll to `Poller`, and what is read or
written to the socket.

A wait outside of a hub (another thread, the hub's own greenlet, a forked child) blocks the thread
until the descriptor is ready, as a blocking socket would: the same code means the same everywhere.
"""

from __future__ import annotations

import select
import socket
import sys
from math import inf
from sys import maxsize
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol

from greenlet import getcurrent, greenlet

from portico.engines.green.hub import running

if TYPE_CHECKING:
    import asyncio

    from portico.engines.green.hub import Hub

CREDIT: Final = 2
"""Operations on one socket without a wait before a look at the clock.

Few, because nobody knows what a handler does between two of them: a buffer of lines of two bytes is
a thousand lines.  A question and its answer are fewer, so only who is busy pays for the look.
"""

SMALL: Final = 479
"""Bytes that the first reads of a stream ask for: what Python's own allocator has room for.

Larger objects than 512 bytes, 33 of them for the head, are the system's allocator's.  A stream that
has brought as much is asked for all that the handler wants from then on.

Source: the documentation of Python's C interface, "The pymalloc allocator".
"""

NOW: Final = int(socket.MSG_DONTWAIT) if sys.platform == "linux" else 0
"""The flag that keeps a call from waiting; elsewhere the descriptor is made non-blocking.

A plain number: combining flags of the enumeration costs more than the call.
"""

SLICE: Final = 0.001
"""Seconds that a connection which always has data may go on before others have their turn.

Giving way costs some microseconds, so the busy one loses less than a percent.
"""

WRITING: Final = 0.05
"""Seconds beyond its slice that a connection may go on writing.

A write to a peer that reads does not wait on a blocking socket, so programs write to several
clients while they hold a lock; the next handler that wants the lock would hold the whole thread.
Half of the time after which a handler that holds its hub is reported, unless it is told otherwise.
"""


class Resumable(Protocol):
    """What a poller resumes: a greenlet, or what acts like one."""

    def switch(self) -> object:
        """Go on."""
        ...

    def throw(self, error: BaseException, /) -> object:
        """Go on by raising an error."""
        ...


class Watch:
    """One descriptor, as the hub sees it.

    Everything is used in the thread of the hub only, except `drop`, which any thread may call.
    """

    __slots__ = (
        "credit",
        "crowd",
        "fd",
        "guess",
        "hub",
        "is_closed",
        "is_eager",
        "is_watching_writes",
        "may_read",
        "owner",
        "read_deadline",
        "reader",
        "slice_end",
        "timeout",
        "timer",
        "turn",
        "waits",
        "write_deadline",
        "writer",
    )

    def __init__(self, fd: int, is_eager: bool, timeout: float | None) -> None:
        self.fd = fd
        self.hub: Any = None
        # The `Hub` that watches the descriptor; ``None`` before the first wait.
        self.owner: greenlet | None = None
        # Who may wait to read by a mere switch: no timeout, nobody else waits, the hub is known.
        self.reader: Resumable | None = None
        self.writer: Resumable | None = None
        self.may_read = False
        # False only if a read now would find nothing; the next edge says when that is over.
        self.is_eager = is_eager
        # Whether a short read says nothing about the next one.
        self.guess = maxsize if is_eager else SMALL
        # Bytes that a read asks for first.
        self.is_watching_writes = False
        # Whether a wait to write is told of the next edge; false after one that nobody waited for.
        self.is_closed = False
        self.credit = CREDIT
        self.slice_end = 0.0
        # When others are to have their turn, by `time.monotonic`, unless they had it before.
        self.turn = -1
        # The poller's when the slice began; with another, others had their turn since.
        self.waits = 0
        # How many there were, but for those to read by a mere switch.
        self.timeout = timeout
        self.timer: asyncio.TimerHandle | None = None
        self.read_deadline = inf
        self.write_deadline = inf
        self.crowd: list[greenlet] | None = None
        # Who waits although somebody else does already, on the same side.

    def wait_readable(self, deadline: float = inf) -> None:
        """Wait until a read may succeed; returns at once if the socket does not block.

        Args:
            deadline: When to give up, by `time.monotonic`, if the operation began before this
                wait.  Without one, the timeout of the socket counts from now.

        Raises:
            TimeoutError: The deadline or the timeout came first.
        """
        if self.timeout is not None:
            deadline = min(deadline, monotonic() + self.timeout)
        hub = self._prepare(deadline, is_reading=True)
        if hub is None or self.may_read:  # an edge may have come while bytes went out
            return
        if self.reader is not None:
            self._join_crowd(hub, deadline)
            return
        self.waits += 1
        self.reader = current = getcurrent()
        self.owner = None
        self.read_deadline = deadline
        if deadline != inf:
            self._arm(hub, deadline)
        elif hub.wants is None:
            self.owner = current
        if hub.wants is not None:
            hub.wants(self)
        try:
            hub.switch()
        finally:
            self.reader = None
            if self.crowd is not None:
                self.wake_crowd()

    def wait_writable(self, deadline: float = inf) -> None:
        """Wait until a write may succeed; otherwise as `wait_readable`.

        Raises:
            TimeoutError: The deadline or the timeout came first.
        """
        if self.timeout is not None:
            deadline = min(deadline, monotonic() + self.timeout)
        hub = self._prepare(deadline, is_reading=False)
        if hub is None:
            return
        if self.writer is not None:
            self._join_crowd(hub, deadline)
            return
        self.waits += 1
        self.writer = getcurrent()
        self.write_deadline = deadline
        if deadline != inf:
            self._arm(hub, deadline)
        if not self.is_watching_writes:
            self.is_watching_writes = True
            hub.poller.watch_writing(self)
        if hub.wants is not None:
            hub.wants(self)
        try:
            hub.switch()
        finally:
            self.writer = None
            if self.crowd is not None:
                self.wake_crowd()

    def give_way(self, more: float = 0.0) -> None:
        """Let others go on first, if this socket's slice is over; after some operations.

        Args:
            more: Seconds beyond the slice; `WRITING` before a write.
        """
        hub = running()
        if hub is None:
            self.credit = CREDIT
            return
        poller = hub.poller
        if poller.turn == self.turn:
            over = monotonic() - self.slice_end
            if over < more:
                # The next read looks again, although a write has looked just now.
                self.credit = CREDIT if over < 0 else 0
                return
            hub.give_way()
        self.credit = CREDIT
        self.turn = poller.turn
        self.slice_end = monotonic() + SLICE

    @property
    def activity(self) -> int | None:
        """A number that grows while bytes of a Unix socket move, callable from any thread.

        ``None`` if nobody waited here: the descriptor may be asyncio's by now.
        """
        return None if self.hub is None else self.waits + max(self.turn, 0)

    def deadline(self) -> float:
        """Return when an operation that begins now has to end, by `time.monotonic`."""
        return inf if self.timeout is None else monotonic() + self.timeout

    def set_timeout(self, timeout: float | None) -> None:
        """Limit the waits that begin from now on; 0 for none at all, ``None`` for no limit."""
        self.timeout = timeout
        self.owner = None

    def wake_crowd(self) -> None:
        """Let those go on that waited behind a wait that ended."""
        crowd, self.crowd = self.crowd, None
        for member in crowd or ():
            self.hub.run_soon(member)

    def wake(self) -> None:
        """Resume who waits, as if the descriptor were ready; in the hub's thread."""
        if self.reader is not None:
            self.reader.switch()
        if self.writer is not None:
            self.writer.switch()

    def nudge(self) -> None:
        """Let who waits look again whether that is still right; callable from any thread."""
        if self.hub is not None and (self.reader is not None or self.writer is not None):
            self.hub.call_anywhere(self.wake)

    def drop(self, *, is_closing: bool) -> None:
        """Leave the hub, and wake who waits; callable from any thread."""
        self.is_closed = is_closing
        self.may_read = self.is_eager = True  # so the next read fails instead of waiting
        self.owner = None
        hub = self.hub
        if hub is None:
            return
        hub.poller.forget(self, is_closing=is_closing)
        if self.timer is not None or self.reader is not None or self.writer is not None:
            hub.call_anywhere(self._leave)
        if not is_closing:
            self.hub = None
            self.is_watching_writes = False

    def _leave(self) -> None:
        """Finish `drop` in the hub's thread."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.wake()

    def _prepare(self, deadline: float, *, is_reading: bool) -> Hub | None:
        """Return the hub to wait on; ``None`` if the caller has waited, or is not to wait.

        Raises:
            TimeoutError: The deadline came, outside of a hub.
        """
        if self.timeout == 0:
            return None
        hub = self._find_hub(getcurrent())
        if hub is None:
            block(self.fd, deadline, is_reading=is_reading)
        else:
            self.credit = CREDIT
            if hub.unsent:
                hub.send_unsent()
                if not is_reading:
                    # Meanwhile the edge may have come, even to another greenlet: ask again.
                    self.is_watching_writes = False
        return hub

    def _find_hub(self, current: greenlet) -> Hub | None:
        """Return the hub to wait on, and let it watch; ``None`` if there is none to wait on."""
        there: Hub | None = self.hub
        if there is not None and current.parent is there.greenlet:
            return there
        here = running()
        if here is None or current is here.greenlet:
            return None
        if there is not here:
            if there is not None and not self._leave_hub(there):
                return None
            here.poller.watch(self)
            self.hub = here
        return here

    def _leave_hub(self, hub: Hub) -> bool:
        """Move away from a hub of another thread, unless somebody waits there."""
        if self.reader is not None or self.writer is not None:
            return False
        self.owner = None
        hub.poller.forget(self, is_closing=False)
        if self.timer is not None:
            hub.call_anywhere(self.timer.cancel)
            self.timer = None
        self.hub = None
        self.is_watching_writes = False
        return True

    def _arm(self, hub: Hub, deadline: float) -> None:
        """See that somebody looks at the clock at a deadline.

        A wait that ends in time leaves the timer as it is: it looks who waits when it rings, and
        is set again only if somebody does.
        """
        if self.timer is not None:
            if self.timer.when() <= deadline:
                return
            self.timer.cancel()
        self.timer = hub.call_at(deadline, self._expire)

    def _expire(self) -> None:
        """End the waits whose time is over; set the timer for those that go on."""
        self.timer = None
        now = monotonic()
        if self.reader is not None and self.read_deadline <= now:
            self.reader.throw(TimeoutError("timed out"))
        if self.writer is not None and self.write_deadline <= now:
            self.writer.throw(TimeoutError("timed out"))
        hub = self.hub
        if hub is None:
            return
        if self.reader is not None and self.read_deadline != inf:
            self._arm(hub, self.read_deadline)
        if self.writer is not None and self.write_deadline != inf:
            self._arm(hub, self.write_deadline)

    def _join_crowd(self, hub: Hub, deadline: float) -> None:
        """Wait until the wait of another greenlet ends; then the caller tries again."""
        if self.crowd is None:
            self.crowd = []
        current = getcurrent()
        self.crowd.append(current)
        timer = None if deadline == inf else hub.call_at(deadline, self._expire_crowd, current)
        try:
            hub.switch()
        finally:
            if timer is not None:
                timer.cancel()
            if current in (waiting := self.crowd or []):
                waiting.remove(current)
            hub.cancel_run(current)

    def _expire_crowd(self, member: greenlet) -> None:
        if member in (self.crowd or ()):
            member.throw(TimeoutError("timed out"))


def block(fd: int, deadline: float, *, is_reading: bool) -> None:
    """Wait for a descriptor with the whole thread, where there is no hub to wait on.

    Raises:
        TimeoutError: The deadline came first.
    """
    pause = None if deadline == inf else max(0.0, deadline - monotonic())
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, select.POLLIN if is_reading else select.POLLOUT)
        is_ready = bool(poll.poll(None if pause is None else pause * 1000))
    else:
        reading, writing = ([fd], []) if is_reading else ([], [fd])
        is_ready = any(select.select(reading, writing, writing, pause))
    if not is_ready:
        raise TimeoutError("timed out")
