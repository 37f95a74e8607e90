"""Run and drain the serving loops of several servers, in threads of their own.

Owns the threads, and how one waits for them.  Leaves when to drain to `portico.service`.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from math import ceil, inf
from queue import SimpleQueue
from typing import Final

from portico.acceptor import Wakeup
from portico.assembly import AdoptingMixIn
from portico.deadlines import LONGEST_WAIT
from portico.drain import LAST_WORDS
from portico.errors import PhaseError

SIGNAL_INTERVAL: Final = 0.5
"""Seconds until a signal is noticed where the program has another wake-up descriptor for them."""


class ServingLoop(threading.Thread):
    """A serving loop in a thread of its own."""

    def __init__(self, server: AdoptingMixIn, wakeup: Wakeup, poll_interval: float) -> None:
        super().__init__(name=str(server.address), daemon=True)
        self.error: BaseException | None = None
        self.has_ended = False
        self.is_drained = False
        self._server = server
        self._wakeup = wakeup
        self._poll_interval = poll_interval

    def run(self) -> None:
        """Serve, and tell of the end."""
        try:
            self._server.serve_forever(self._poll_interval)
        except BaseException as error:  # raised again, in the thread of `Service.run`
            self.error = error
        finally:
            self.has_ended = True
            self._wakeup.wake()

    def drain(self) -> None:
        """Begin to drain the server."""
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        try:
            try:
                self._server.drain()
            except PhaseError:  # the loop has not begun: it will end at once
                self._server.shutdown()
                self.join()
                self._server.drain()
        except BaseException as error:
            self.error = self.error or error
        finally:
            self.is_drained = True
            self._wakeup.wake()


class Drainer(threading.Thread):
    """Drains a server whose loop runs elsewhere, once it is asked to."""

    def __init__(self, server: AdoptingMixIn, stops: SimpleQueue[None]) -> None:
        super().__init__(name=f"drain of {server.address}", daemon=True)
        self.error: BaseException | None = None
        self.has_ended = threading.Event()
        self._has_begun = False
        self._is_cancelled = False
        self._server = server
        self._stops = stops
        self._wakeup: Wakeup | None = None

    def tell(self, wakeup: Wakeup) -> None:
        """Say what to wake at the end; who has said so looks whether it has come already."""
        self._wakeup = wakeup

    def cancel(self) -> None:
        """Have the thread end, unless it drains already."""
        self._is_cancelled = True
        self._stops.put(None)
        if not self._has_begun:
            self.join(LAST_WORDS)

    def run(self) -> None:
        """Wait until it is asked to, drain, and tell of the end."""
        self._stops.get()
        try:
            if not self._is_cancelled:
                self._has_begun = True
                self._server.drain()
        except PhaseError:  # the loop has not begun: it will end at once
            self._server.shutdown()
        except BaseException as error:  # raised again, in the thread of `Service.run`
            self.error = error
        finally:
            self.has_ended.set()
            if self._wakeup is not None:
                self._wakeup.wake()


def wait_until(is_so: Callable[[], bool], wakeup: Wakeup, deadline: float = inf) -> None:
    """Wait until something is so, of which `wakeup` tells, or until the deadline.

    In the main thread a signal ends the wait for as long as its handler takes.  To wait for an
    event, or a thread, would not do: a signal that comes just before goes unnoticed until the end.
    """
    poll = select.poll()  # and not select(2), since descriptors may be many
    poll.register(wakeup, select.POLLIN)
    while not is_so() and (remaining := deadline - time.monotonic()) > 0:
        pause = min(remaining, SIGNAL_INTERVAL if wakeup.misses_signals else LONGEST_WAIT)
        poll.poll(ceil(pause * 1000))
        wakeup.clear()
