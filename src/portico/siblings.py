"""Have the children of a process that serve a connection each count their peers together.

Owns the memory in which a child says for whom its proxy speaks, because only the child has read
that, and the admission by what all say.  Leaves starting and collecting children to their engine,
and the rules to `portico.admission`.

A child writes that it tries, looks at what the others have written, and is in if there are not too
many, those that try included.  So there are never more than the limit: of those that are in, the
last to write has seen all the others.  Who saw too many only because others tried at that moment
tries again a little later.  Nobody holds a lock, with which it could be stopped or killed.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Collection
from hashlib import blake2b
from threading import Lock
from time import sleep
from typing import TYPE_CHECKING, Any, Final

from portico.admission import Admission, AdmissionRules, peer_of
from portico.events import RefusalReason
from portico.gate import Gate, WhenFull

if TYPE_CHECKING:
    from portico.admission import Peer

ROWS: Final = 4096
"""Children that are counted; the peer of one beyond them is not let in.

A look passes all rows, which takes some microseconds beside the milliseconds of a fork.
"""

KEY_SIZE: Final = 16
"""Bytes that stand for a peer."""

ROW_SIZE: Final = 1 + KEY_SIZE

FREE: Final = b"\0"
TRYING: Final = b"\1"
IN: Final = b"\2"

ATTEMPTS: Final = 20
"""How often one tries while others do."""

LONGEST_PAUSE: Final = 0.01
"""Seconds between two attempts at the most; each child takes another time of its own."""


class Siblings:
    """The peers of the children of one process.

    Made by the parent before it forks; callable in it and in its children.

    Args:
        pause: Lets time pass between two attempts.
    """

    def __init__(self, pause: Callable[[float], object] = sleep) -> None:
        self._memory = mmap.mmap(-1, ROWS * ROW_SIZE)  # shared with what is forked later
        self._pause = pause
        self._fence = Lock()  # guards nothing: see `admit`

    def free_row(self, taken: Collection[int | None]) -> int | None:
        """Return a row for a child, for the parent; ``None`` if there is none."""
        row = next((row for row in range(ROWS) if row not in taken), None)
        if row is not None:
            self.leave(row)
        return row

    def admit(self, row: int, peer: Peer, limit: int) -> bool:
        """Count the peer of a child, and say whether it is in.

        Args:
            row: That of the child.
            peer: For whom its proxy speaks.
            limit: How many children there may be with the same peer.
        """
        key = blake2b(repr(peer).encode(), digest_size=KEY_SIZE).digest()
        at = row * ROW_SIZE
        self._memory[at + 1 : at + ROW_SIZE] = key  # first: a row that is free says nothing
        for _ in range(ATTEMPTS):
            if self._memory[:].count(IN + key) >= limit:
                return False
            self._memory[at : at + 1] = TRYING
            # Others are to see that before this one reads what they have written; as in
            # `portico.places`, the instructions of a lock see to it.
            self._fence.acquire()
            self._fence.release()
            rows = self._memory[:]
            if rows.count(IN + key) + rows.count(TRYING + key) <= limit:
                self._memory[at : at + 1] = IN
                return True
            self.leave(row)
            self._pause(random.uniform(0, LONGEST_PAUSE))  # noqa: S311  # no secret
        return False

    def leave(self, row: int) -> None:
        """Count the peer of a child no more."""
        at = row * ROW_SIZE
        self._memory[at : at + 1] = FREE


class SiblingAdmission(Admission):
    """Applies the rules for peers in a child, and `max_connections_per_peer` to all children.

    Args:
        rules: The rules.
        siblings: What the children say.
        row: That of this child; ``None`` if there was none.
    """

    def __init__(self, rules: AdmissionRules, siblings: Siblings, row: int | None) -> None:
        super().__init__(rules)
        self._siblings = siblings
        self._row = row

    def decide(self, client_address: Any, now: float) -> RefusalReason | None:
        """Admit and count a connection, or say why not."""
        refusal = super().decide(client_address, now)
        if refusal is not None:
            return refusal
        peer, limit = peer_of(client_address), self.rules.max_connections_per_peer
        if peer is None or limit is None:
            return None
        if self._row is not None and self._siblings.admit(self._row, peer, limit):
            return None
        self.take_back(client_address)
        return RefusalReason.TOO_MANY_OF_PEER

    def leave(self, client_address: Any) -> None:
        """Give the place of an admitted connection back."""
        super().leave(client_address)
        if self._row is not None:
            self._siblings.leave(self._row)


class SiblingGate(Gate):
    """Where the connection of a child comes in, whose parent keeps its place.

    Args:
        rules: Who may come in.
        when_full: As for `Gate`.
        siblings: What the children say.
        row: That of this child; ``None`` if there was none.
    """

    def __init__(
        self, rules: AdmissionRules, when_full: WhenFull, siblings: Siblings, row: int | None
    ) -> None:
        super().__init__(rules, when_full, counts_peers=False)
        assert self._peers is not None
        self._peers = SiblingAdmission(self._peers.rules, siblings, row)
        self.is_awaited = True  # always: the others want to know

    def _tell_room(self) -> None:
        """Do nothing: nobody waits here, and who leaves is told where all look."""
