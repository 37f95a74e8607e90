"""Tell systemd of a service that runs in this very process: ready, alive, stopping.

Owns what is said when.  Leaves how it is said to `portico.systemd`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from portico.address import Address
from portico.assembly import AdoptingMixIn
from portico.errors import PorticoError
from portico.events import DrainStarted, Event, ServerStarted, subscribe
from portico.service import STOP_PATIENCE, Service
from portico.systemd import Notifier


class Announcement:
    """Tell systemd what becomes of a service while the ``with`` block runs.

    Ready is told when every serving loop has begun, and stopping when the first drain has, which
    may then take its time.

    Args:
        notifier: Tells it; nothing is done if there is no systemd.
        serving: The service, which does not run yet.
    """

    def __init__(self, notifier: Notifier, serving: Service) -> None:
        self._notifier = notifier
        self._serving = serving
        self._changed = threading.Lock()  # guards the two below; loops have threads of their own
        self._started: set[Any] = set()
        self._is_stopping = False
        self._unsubscribe: Callable[[], None] = _nothing

    def __enter__(self) -> Self:
        """Begin; asks for the beats of the loops if systemd watches."""
        if self._notifier.is_connected:
            self._unsubscribe = subscribe(self._note, ServerStarted, DrainStarted)
        interval = self._notifier.watchdog_interval
        if interval is not None:
            self._serving.beat(self._notifier.keep_alive, interval)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""
        self._unsubscribe()

    def _note(self, event: Event) -> None:
        if not isinstance(event.server, AdoptingMixIn):  # one of a handler's own
            return
        if isinstance(event, DrainStarted):
            self._tell_stopping()
        else:
            self._tell_ready(event.server)

    def _tell_ready(self, server: AdoptingMixIn) -> None:
        addresses = self._serving.addresses
        with self._changed:
            self._started.add(server)
            if len(self._started) < len(addresses) or self._is_stopping:
                return
        self._notifier.ready(ready_on(addresses))

    def _tell_stopping(self) -> None:
        with self._changed:
            if self._is_stopping:
                return
            self._is_stopping = True
        timeout = self._serving.drain_timeout
        within = None if timeout is None else timeout + STOP_PATIENCE
        self._notifier.stopping("draining", within=within)


@contextmanager
def failure_told(notifier: Notifier) -> Generator[None]:
    """Tell why, in the status, if what the block does fails: the last word of a service."""
    try:
        yield
    except Exception as error:  # what others than portico say may be anything
        words = str(error) if isinstance(error, PorticoError) else type(error).__name__
        notifier.status(f"failed: {words}")
        raise


def ready_on(addresses: Iterable[Address]) -> str:
    """Return the status of a service that is ready."""
    return f"ready on {', '.join(map(str, addresses))}"


def _nothing() -> None:
    """Do nothing."""
