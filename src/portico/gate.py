"""Let connections in as the rules say, whatever threads they come and go in.

Owns the lock around an `Admission`, and how an acceptor that waits for room learns of it.  Leaves
deciding to `portico.admission`; what is done with one who may not come in, to the server.

A connection that ends takes no lock: it is noted, and its place is taken back by who asks for one
next, or at once if somebody waits.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from enum import StrEnum
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from portico.admission import Admission, AdmissionRules
from portico.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from portico.events import RefusalReason


LEAD_PAUSE: Final = 0.005
"""Seconds in which a process that has more than its share of the connections accepts nobody.

The system wakes the worker that began to wait first, which is the same one again as long as it
takes clients faster than they come: of those that come to stay it would get nearly all.  Who comes
in these milliseconds wakes another worker, or waits until they are over if none of them waits.
"""


class WhenFull(StrEnum):
    """What to do with a client for whom there is no place among `max_connections`."""

    WAIT = "wait"
    """Leave it in the backlog of the kernel until there is one."""
    REFUSE = "refuse"
    """Accept it, say farewell, and close it."""
    SHED = "shed"
    """Close the connection that has been idle for longest, and give it the place."""


def read_when_full(value: object) -> WhenFull:
    """Read the setting `when_full`.

    Raises:
        SettingError: It is none of the three words.
    """
    try:
        return WhenFull(str(value))
    except ValueError:
        words = ", ".join(f"{word.value!r}" for word in WhenFull)
        raise SettingError("when_full", value, f"one of {words}") from None


class Gate:
    """Where the connections of one server come in and leave.

    Callable from any thread.

    Args:
        rules: Who may come in.
        when_full: What to do when `max_connections` are open.
        counts_peers: Whether those who come in are the peers.  If not, they are proxies, and
            the rules for peers hold for whom they speak for (`admit_peer`).
    """

    def __init__(
        self, rules: AdmissionRules, when_full: WhenFull, *, counts_peers: bool = True
    ) -> None:
        self.reserves = False
        """Whether a place has to be reserved for a client before it is accepted."""
        self.on_relief: Callable[[], object] | None = None
        """Called once, in any thread, when this process no longer `leads`."""
        self.when_full = when_full
        self.knows_proxies = not counts_peers
        self._lock = Lock()  # guards all that follows, except what is put into left
        self.places = Admission(rules if counts_peers else _of_places(rules))
        self._peers = None if counts_peers else Admission(_of_peers(rules))
        self._room: Room | None = None  # made when somebody waits for it first
        self._is_to_close = False  # the room, by whoever holds the lock next
        self.is_awaited = False
        """Whether somebody wants to know at once of a place that is given back: `settle`."""
        self.left: deque[tuple[Any, Any]] = deque()
        """Whose places are to be taken back: client addresses, and the peers of `admit_peer`."""

    @property
    def counts_whom_proxies_tell(self) -> bool:
        """Whether connections are counted by the peers that proxies speak for."""
        peers = self._peers
        return peers is not None and peers.rules.max_connections_per_peer is not None

    @property
    def active(self) -> int:
        """Connections that have a place."""
        self.settle()
        return self.places.active

    @property
    def is_full(self) -> bool:
        """Whether every place is taken."""
        self.settle()
        return self.places.is_full

    @property
    def room(self) -> int:
        """Places that are free."""
        self.settle()
        return self.places.limit - self.places.active

    def admit(self, client_address: Any, now: float) -> RefusalReason | None:
        """Give a connection a place, or say why it gets none.

        Args:
            client_address: What accept(2) told.
            now: The instant, by `time.monotonic`.
        """
        with self._lock:
            self._take_back()
            refusal = self.places.decide(client_address, now)
        self.settle()
        return refusal

    def admit_all(
        self, taken: Iterable[tuple[object, Any]], now: float
    ) -> list[RefusalReason | None]:
        """Do for several connections what `admit` does for one.

        Args:
            taken: What accept(2) brought: a connection and its client address each.
            now: The instant, by `time.monotonic`.
        """
        decide = self.places.decide
        with self._lock:
            self._take_back()
            refusals = [decide(client_address, now) for _, client_address in taken]
        self.settle()
        return refusals

    @property
    def leads(self) -> bool:
        """Whether another process is to have those who come next."""
        return False

    def reserve(self) -> bool:
        """Take a place for a client before it is accepted, and say whether there was one."""
        return True

    def forgo(self) -> None:
        """Give back what `reserve` has taken, if nobody came for it."""

    def admit_peer(self, peer: Any, now: float) -> RefusalReason | None:
        """Admit whom a proxy speaks for, or say why not; only if it `knows_proxies`.

        Args:
            peer: Its address, as the proxy told it.
            now: The instant, by `time.monotonic`.
        """
        assert self._peers is not None
        with self._lock:
            self._take_back()
            refusal = self._peers.decide(peer, now)
        self.settle()
        return refusal

    def take_over(self, client_address: Any, peer: Any = None) -> None:
        """Give a place to a connection that came in by another gate.

        Args:
            client_address: What accept(2) told.
            peer: For whom a proxy speaks, if that is counted.
        """
        with self._lock:
            self.places.take_over(client_address)
            if peer is not None and self._peers is not None:
                self._peers.take_over(peer)
        self.settle()

    def leave(self, client_address: Any, peer: Any = None) -> None:
        """Take the place of an admitted connection back.

        Never waits, so the garbage collector may call it in the middle of whatever is done here:
        who holds the lock then sees to it before it goes.

        Args:
            client_address: What accept(2) told.
            peer: Whom `admit_peer` has admitted for it; ``None`` if nobody.
        """
        self.left.append((client_address, peer))
        if self.is_awaited:
            self.settle()

    def settle(self) -> None:
        """Take the places back of those that have left, unless somebody else is about to."""
        while (self.left or self._is_to_close) and self._lock.acquire(blocking=False):
            try:
                self._take_back()
                if self._is_to_close:
                    self._close_room()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        """Take the places back of those that have left; with the lock."""
        left = self.left
        if not left:
            return
        leave, take = self.places.leave, left.popleft
        while left:
            client_address, peer = take()
            leave(client_address)
            if peer is not None and self._peers is not None:
                self._peers.leave(peer)
        if self.is_awaited:
            self._tell_room()

    def _tell_room(self) -> None:
        """Tell who waits that there is room; with the lock."""
        self.is_awaited = False
        assert self._room is not None
        self._room.tell()

    def await_room(self) -> int | None:
        """Return a descriptor that is readable as soon as there is a place; ``None`` if there is.

        Raises:
            OSError: There is none, and the system has no descriptor left to wait for it.
        """
        room = None
        with self._lock:
            self._take_back()
            if self.places.is_full:
                if self._room is None:
                    self._room = Room()
                self._room.clear()
                self.is_awaited = True
                room = self._room.fileno()
        self.settle()  # who has left since did not see that it is waited for
        return room

    def close(self) -> bool:
        """Release the descriptors; to be called when nobody waits for room any more.

        Who waits later gets others.  Never waits, so a signal handler may call it in the middle of
        whatever is done here: who holds the lock then does it before it goes.

        Returns:
            Whether there were any.
        """
        has_room = self._room is not None
        self._is_to_close = has_room
        self.settle()
        return has_room

    def _close_room(self) -> None:
        """Release the descriptors; with the lock."""
        self._is_to_close = self.is_awaited = False
        room, self._room = self._room, None
        if room is not None:
            room.close()


class Room:
    """A pipe that is readable when there is room again."""

    _reader = _writer = -1  # if the system has no descriptor for them

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)

    def __del__(self) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._reader

    def tell(self) -> None:
        """Make it readable."""
        os.write(self._writer, b"\0")

    def clear(self) -> None:
        """Make it unreadable."""
        with suppress(BlockingIOError):  # it is already
            os.read(self._reader, 64)

    def close(self) -> None:
        """Close the pipe.  Callable again."""
        if self._reader >= 0:
            os.close(self._reader)
            os.close(self._writer)
            self._reader = self._writer = -1


def _of_places(rules: AdmissionRules) -> AdmissionRules:
    """Return the rules that hold for everyone, whoever it is."""
    return AdmissionRules(
        max_connections=rules.max_connections,
        accept_rate=rules.accept_rate,
        accept_burst=rules.accept_burst,
    )


def _of_peers(rules: AdmissionRules) -> AdmissionRules:
    """Return the rules that depend on who it is."""
    return AdmissionRules(
        max_connections_per_peer=rules.max_connections_per_peer,
        allowed_networks=rules.allowed_networks,
        denied_networks=rules.denied_networks,
    )
