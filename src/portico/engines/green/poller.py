"""Wait for descriptors, and resume the greenlets that wait for them.

Owns the system's object to poll with and the table of `Watch`es; is the selector of the hub's
asyncio loop at the same time.  A greenlet is resumed inside `select`, or by the one whose turn was
before it, by a mere switch: no handle, no callback, no future.  What asyncio registered is returned
from `select`, as from any selector.  Leaves to `Watch` who waits and for how long.

Greenlets run while `select` is under way, so what asyncio computed before it (is anything ready,
when is the next timer) may be out of date after each of them.  The hub tells by `is_wanted` and
`deadline`, and `select` looks at both after every batch.

Source: epoll(7), "Edge-triggered"; the questions there about descriptors that were closed or
copied are answered where they matter, in `EpollPoller.forget` and `EpollPoller.select`.
"""

from __future__ import annotations

import abc
import os
import select
import selectors
from collections.abc import Callable, Mapping
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

    from portico.engines.green.watch import Resumable, Watch

Ready: TypeAlias = list[tuple[selectors.SelectorKey, int]]

BATCH: Final = 256
"""Descriptors reported by one poll.

Enough that the cost of the system call is shared, few enough that timers and asyncio have their
turn after some milliseconds of handlers.
"""

HAS_EPOLL: Final = hasattr(select, "epoll")


class Poller(selectors.BaseSelector):
    """What the two pollers share: the descriptors of asyncio, and the state of one `select`.

    Everything here belongs to the hub's thread; only `forget` and `wants` may be called from
    others.
    """

    is_wanted: bool
    """Set to make the `select` in progress return after its current batch."""

    deadline: float
    """When the `select` in progress has to return, by `time.monotonic`."""

    runnable: list[Resumable]
    """What waits for nothing but its turn; each goes on once in every round."""

    turn: int
    """How often it polled: two looks at the same number saw the same batch of greenlets."""

    is_polling: bool
    """Whether it waits for the system, rather than for a greenlet."""

    on_wake: Callable[[], object] | None
    """Called after every poll, if somebody wants to know; see `Watchdog`."""

    is_edge_triggered: bool
    """Whether a descriptor stays watched between two waits; if not, each wait says `wants`."""

    def __init__(self) -> None:
        self.is_wanted = False
        self.deadline = inf
        self.runnable = []
        self.turn = 0
        self.is_polling = False
        self.on_wake = None
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._watched: dict[int, Watch] = {}

    def register(
        self, fileobj: FileDescriptorLike, events: int, data: object = None
    ) -> selectors.SelectorKey:
        """Watch a descriptor for asyncio, level-triggered.

        Raises:
            KeyError: It is registered already.
            ValueError: The object has no descriptor, or the events are none that we know.
            OSError: The system refuses, for example because a greenlet's socket is watched under
                the same descriptor.
        """
        if not events or events & ~(selectors.EVENT_READ | selectors.EVENT_WRITE):
            raise ValueError(f"events={events!r}: expected EVENT_READ, EVENT_WRITE or both")
        fd = descriptor(fileobj)
        if fd in self._keys:
            raise KeyError(f"descriptor {fd} is already registered")
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._add(fd, events)
        self._keys[fd] = key
        return key

    def modify(
        self, fileobj: FileDescriptorLike, events: int, data: object = None
    ) -> selectors.SelectorKey:
        """Change what asyncio watches a descriptor for.

        Raises:
            KeyError: It is not registered.
        """
        key = self.get_key(fileobj)
        if events != key.events:
            self._change(key.fd, events)
        key = self._keys[key.fd] = key._replace(events=events, data=data)
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """Stop watching a descriptor for asyncio.

        Raises:
            KeyError: It is not registered.
        """
        key = self.get_key(fileobj)
        del self._keys[key.fd]
        try:
            self._remove(key.fd)
        except (OSError, KeyError):
            pass  # closing a descriptor removed it already
        return key

    def get_key(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """Return what asyncio registered for a descriptor.

        Raises:
            KeyError: Nothing.
        """
        return self._keys[descriptor(fileobj)]

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        """Return what asyncio registered, by descriptor."""
        return self._keys  # type: ignore[return-value]  # keyed by number only, as asyncio asks

    def watches(self) -> tuple[Watch, ...]:
        """Return every watch of this poller, at this moment."""
        return tuple(self._watched.values())

    @abc.abstractmethod
    def watch(self, watch: Watch) -> None:
        """Start to watch a descriptor for greenlets, until it is closed or forgotten.

        Raises:
            OSError: The system refuses.
        """

    @abc.abstractmethod
    def listen(self, watch: Watch) -> None:
        """Call the reader of a watch whenever its descriptor is readable, level-triggered.

        Of several hubs that listen to one descriptor the system wakes as few as it can.
        """

    @abc.abstractmethod
    def watch_writing(self, watch: Watch) -> None:
        """Let a watch know from now on when its descriptor turns writable."""

    def pass_on(self, home: Callable[[], object]) -> None:
        """Let the calling greenlet wait, and whoever's turn is next go on.

        If that is a greenlet that waits for this very event, it is resumed from here and not by
        `select`: of the two switches that a message costs, one is saved.

        Args:
            home: Switches to the hub's greenlet, which goes on with `select`.
        """
        home()

    @abc.abstractmethod
    def wants(self, watch: Watch) -> None:
        """Take note that a greenlet is about to wait; needed only if not edge-triggered."""

    @abc.abstractmethod
    def forget(self, watch: Watch, *, is_closing: bool) -> None:
        """Watch a descriptor no longer; callable from any thread.

        Args:
            watch: What to forget; it need not be known.
            is_closing: Whether the caller closes the descriptor next.
        """

    @abc.abstractmethod
    def renew(self) -> None:
        """Poll through an object of this process's own, after a fork; forget the greenlets."""

    @abc.abstractmethod
    def _add(self, fd: int, events: int) -> None:
        """Poll a descriptor of asyncio's."""

    @abc.abstractmethod
    def _change(self, fd: int, events: int) -> None:
        """Poll a descriptor of asyncio's for other events."""

    @abc.abstractmethod
    def _remove(self, fd: int) -> None:
        """Poll a descriptor of asyncio's no longer."""

    def _start(self, timeout: float | None) -> None:
        """Begin a `select`: set its deadline."""
        self.is_wanted = False
        if timeout is None:
            self.deadline = inf
        else:
            self.deadline = monotonic() + timeout if timeout > 0 else 0.0

    def _pause(self) -> float | None:
        """Return how long the next poll may wait, in seconds; ``None`` is without limit."""
        if self.runnable or self.is_wanted:
            return 0
        if self.deadline == inf:
            return None
        return max(0.0, self.deadline - monotonic())

    def _is_over(self) -> bool:
        """Whether the `select` in progress has to return although nothing of asyncio's is ready."""
        return self.is_wanted or (self.deadline != inf and self.deadline <= monotonic())

    def _run_runnable(self) -> None:
        """Let every greenlet that gave way go on once."""
        for turn in range(len(self.runnable)):  # not those that give way again meanwhile
            if not self.runnable:  # one of them took another out of the queue
                break
            del turn
            self.runnable.pop(0).switch()

    def abandon(self) -> None:
        """Forget every greenlet's descriptor without a word to the system: after a fork."""
        for watch in self._watched.values():
            watch.hub = watch.owner = None
        self._watched.clear()
        self.runnable.clear()


if HAS_EPOLL:
    EDGE: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
    # Not EPOLLOUT: for Unix and UDP sockets every byte that the peer takes would be an event.
    # EPOLLPRI because a read stops at the mark of urgent data, and looks like a short one.

    class EpollPoller(Poller):
        """Greenlets' descriptors edge-triggered, once for their life; asyncio's level-triggered."""

        is_edge_triggered = True

        def __init__(self) -> None:
            super().__init__()
            self._epoll = select.epoll()
            self._events: list[tuple[int, int]] = []
            # Edges that were reported and not passed on yet, the first at the end; after an
            # exception they stay here, since the system will not repeat them.

        def select(self, timeout: float | None = None) -> Ready:
            """Resume greenlets until something of asyncio's is ready or its time has come."""
            self._start(timeout)
            watched, readable = self._watched, select.EPOLLIN
            ready: Ready = []
            while True:
                events = self._poll()
                while events:
                    fd, event = events.pop()
                    # Between the report and this line an earlier greenlet may have closed the
                    # descriptor, or a new socket may have got its number: the watch is then
                    # missing or another, and a needless wake-up only costs it one failed read.
                    try:
                        watch = watched[fd]
                    except KeyError:
                        key = self._keys.get(fd)
                        if key is not None:
                            ready.append((key, _to_selector_events(event) & key.events))
                        continue
                    if event == readable:  # the common case, written out for speed
                        reader = watch.reader
                        if reader is None:
                            watch.may_read = True
                        else:
                            reader.switch()
                    else:
                        self._resume(watch, event)
                if self.runnable:
                    self._run_runnable()
                if ready or self._is_over():
                    return ready

        def pass_on(self, home: Callable[[], object]) -> None:
            events = self._events
            if events:
                entry = events.pop()
                if entry[1] == select.EPOLLIN:
                    try:
                        watch = self._watched[entry[0]]
                    except KeyError:
                        pass
                    else:
                        reader = watch.reader
                        if reader is watch.owner and reader is not None:
                            reader.switch()
                            return
                events.append(entry)
            home()

        def abandon(self) -> None:
            super().abandon()
            self._events.clear()

        def watch(self, watch: Watch) -> None:
            try:
                self._epoll.register(watch.fd, EDGE)
            except FileExistsError:
                if watch.fd in self._keys:
                    raise
                # The remains of a socket that was closed while a copy of it lived on.
                self._epoll.modify(watch.fd, EDGE)
            self._watched[watch.fd] = watch

        def listen(self, watch: Watch) -> None:
            self._epoll.register(watch.fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            self._watched[watch.fd] = watch

        def watch_writing(self, watch: Watch) -> None:
            # Reports what is true at this moment once more, so nothing is missed between.
            self._epoll.modify(watch.fd, EDGE | select.EPOLLOUT)

        def wants(self, watch: Watch) -> None:
            """Nothing: a watched descriptor reports by itself."""

        def forget(self, watch: Watch, *, is_closing: bool) -> None:
            if self._watched.get(watch.fd) is not watch:
                return
            # First out of the table: once the descriptor is closed, its number may come back.
            del self._watched[watch.fd]
            # Closing removes it from epoll, unless a copy lives on (a child process, dup).  Then
            # a few events come for a number that we do not know, or for a new socket under that
            # number: harmless, and much cheaper than a system call for each connection.
            if not is_closing:
                try:
                    self._epoll.unregister(watch.fd)
                except OSError:
                    pass

        def renew(self) -> None:
            self._epoll.close()  # this process's descriptor; the parent goes on with its own
            self._epoll = select.epoll()
            self.abandon()
            for key in self._keys.values():
                self._add(key.fd, key.events)

        def close(self) -> None:
            self._epoll.close()
            self._keys.clear()
            self.abandon()

        def _poll(self) -> list[tuple[int, int]]:
            """Wait for events; hand out first what an exception had interrupted."""
            if self._events:
                return self._events
            self.is_polling = True
            self._events = events = self._epoll.poll(self._pause(), BATCH)
            self.is_polling = False
            events.reverse()
            self.turn += 1
            if self.on_wake is not None:
                self.on_wake()
            return events

        def _resume(self, watch: Watch, event: int) -> None:
            """Pass on an event that is more than "readable"."""
            if event & ~(select.EPOLLIN | select.EPOLLOUT):
                # The end of the stream, an error or urgent data: from now on a short read says
                # nothing about the next one, and there may be no further edge.
                watch.is_eager = True
            if event & ~select.EPOLLOUT:
                watch.may_read = True
                if watch.reader is not None:
                    watch.reader.switch()
            if event & (select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR):
                writer = watch.writer
                if writer is not None:
                    writer.switch()
                else:
                    # Nobody is told, and it will not be reported again: the next wait is to ask.
                    watch.is_watching_writes = False

        def _add(self, fd: int, events: int) -> None:
            self._epoll.register(fd, _to_epoll_events(events))

        def _change(self, fd: int, events: int) -> None:
            self._epoll.modify(fd, _to_epoll_events(events))

        def _remove(self, fd: int) -> None:
            self._epoll.unregister(fd)

    def _to_epoll_events(events: int) -> int:
        """Translate selectors' events to epoll's."""
        mask = 0
        if events & selectors.EVENT_READ:
            mask |= select.EPOLLIN
        if events & selectors.EVENT_WRITE:
            mask |= select.EPOLLOUT
        return mask

    def _to_selector_events(event: int) -> int:
        """Translate epoll's events to selectors'; an error is both, so that somebody sees it."""
        events = 0
        if event & ~select.EPOLLIN:
            events |= selectors.EVENT_WRITE
        if event & ~select.EPOLLOUT:
            events |= selectors.EVENT_READ
        return events


class PortablePoller(Poller):
    """The same through any selector of the standard library, level-triggered.

    A descriptor is registered while somebody waits for it, and no longer.
    """

    is_edge_triggered = False

    def __init__(self, selector: selectors.BaseSelector | None = None) -> None:
        super().__init__()
        self._selector = selectors.DefaultSelector() if selector is None else selector
        self._changed: dict[int, Watch] = {}
        # Watches whose waits began or ended since the last poll.
        self._polled: dict[int, int] = {}
        # What the selector knows of greenlets' descriptors.

    def select(self, timeout: float | None = None) -> Ready:
        """Resume greenlets until something of asyncio's is ready or its time has come."""
        self._start(timeout)
        ready: Ready = []
        while True:
            self._settle()
            self.is_polling = True
            ready_keys = self._selector.select(self._pause())
            self.is_polling = False
            self.turn += 1
            if self.on_wake is not None:
                self.on_wake()
            for key, events in ready_keys:
                watch = self._watched.get(key.fd)
                if watch is not None:
                    self._changed[key.fd] = watch
                    self._resume(watch, events)
                elif (ours := self._keys.get(key.fd)) is not None:
                    ready.append((ours, events & ours.events))
            if self.runnable:
                self._run_runnable()
            if ready or self._is_over():
                return ready

    def watch(self, watch: Watch) -> None:
        if watch.fd in self._keys:
            raise FileExistsError(f"descriptor {watch.fd} is watched by asyncio")
        self._watched[watch.fd] = watch

    def listen(self, watch: Watch) -> None:
        self.watch(watch)
        self.wants(watch)

    def watch_writing(self, watch: Watch) -> None:
        """Nothing: each wait says what it waits for."""

    def wants(self, watch: Watch) -> None:
        self._changed[watch.fd] = watch

    def forget(self, watch: Watch, *, is_closing: bool) -> None:
        del is_closing
        if self._watched.get(watch.fd) is watch:
            del self._watched[watch.fd]
            self._changed.pop(watch.fd, None)
            if self._polled.pop(watch.fd, 0):
                self._selector.unregister(watch.fd)

    def renew(self) -> None:
        self._selector.close()
        self._selector = type(self._selector)()
        self._changed.clear()
        self._polled.clear()
        self.abandon()
        for key in self._keys.values():
            self._add(key.fd, key.events)

    def close(self) -> None:
        self._selector.close()
        self._keys.clear()
        self._changed.clear()
        self._polled.clear()
        self.abandon()

    def _resume(self, watch: Watch, events: int) -> None:
        """Resume who waits on a watch."""
        if events & selectors.EVENT_READ and watch.reader is not None:
            watch.reader.switch()
        if events & selectors.EVENT_WRITE and watch.writer is not None:
            watch.writer.switch()

    def _settle(self) -> None:
        """Tell the selector which waits began and ended since the last poll."""
        while self._changed:
            fd, watch = self._changed.popitem()
            wanted = 0
            if watch.reader is not None:
                wanted |= selectors.EVENT_READ
            if watch.writer is not None:
                wanted |= selectors.EVENT_WRITE
            known = self._polled.pop(fd, 0)
            if wanted:
                self._polled[fd] = wanted
            if not known and wanted:
                self._selector.register(fd, wanted)
            elif known and not wanted:
                self._selector.unregister(fd)
            elif wanted != known:
                self._selector.modify(fd, wanted)

    def _add(self, fd: int, events: int) -> None:
        self._selector.register(fd, events)

    def _change(self, fd: int, events: int) -> None:
        self._selector.modify(fd, events)

    def _remove(self, fd: int) -> None:
        self._selector.unregister(fd)


def descriptor(fileobj: FileDescriptorLike) -> int:
    """Return the number of a descriptor or of an object that has one.

    Raises:
        ValueError: It has none, or it is closed.
    """
    try:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
    except (AttributeError, TypeError):
        raise ValueError(f"{fileobj!r}: expected a descriptor or an object with one") from None
    if fd < 0:
        raise ValueError(f"{fileobj!r}: expected an open descriptor")
    return fd


def make_poller() -> Poller:
    """Return the best poller of this system.

    The environment variable ``PORTICO_POLLER=portable`` asks for the one that needs no epoll, so
    that what other systems use can be tested on Linux; ``PORTICO_POLLER=select`` for the same
    over ``select(2)``.
    """
    wish = os.environ.get("PORTICO_POLLER", "")
    if wish == "select":
        return PortablePoller(selectors.SelectSelector())
    if wish == "portable" or not HAS_EPOLL:
        return PortablePoller(selectors.PollSelector() if hasattr(select, "poll") else None)
    return EpollPoller()
