"""Tell that serving loops are alive, by the rounds that they make.

Owns which of them have gone round.  Leaves whom that is told to who asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from math import inf

from portico.assembly import AdoptingMixIn


class Rounds:
    """Tells that all serving loops are alive, by the rounds that they make."""

    def __init__(self, beat: Callable[[], object], loops: int, interval: float) -> None:
        self.interval = interval
        self._beat = beat
        self._loops = loops
        self._threads: dict[AdoptingMixIn, int] = {}  # of each the first, by one step
        self._changed = threading.Lock()  # guards what follows
        self._seen: set[AdoptingMixIn] = set()
        self._last = -inf

    def go_round(self, server: AdoptingMixIn) -> None:
        """Take note that a loop has gone round; called in it, for every connection as well.

        Of a server with several, as one with several hubs has, the first counts.
        """
        here = threading.get_ident()
        if self._threads.setdefault(server, here) != here:
            return
        now = time.monotonic()
        with self._changed:
            self._seen.add(server)
            if len(self._seen) < self._loops or now - self._last < self.interval:
                return
            self._seen.clear()
            self._last = now
        self._beat()

    def overdue(self, servers: Iterable[AdoptingMixIn]) -> list[AdoptingMixIn]:
        """Return the servers whose loops have not gone round."""
        with self._changed:
            return [each for each in servers if each not in self._seen]
