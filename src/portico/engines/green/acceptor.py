"""Wait for a listener in a greenlet, and accept in batches.

Owns when the serving loop of a server comes round: it is the loop of `BaseServer.serve_forever`,
unchanged, with this in the place of `portico.acceptor.Acceptor`.
"""

from __future__ import annotations

import os
import socket
from _thread import get_ident
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from greenlet import getcurrent, greenlet

from portico.acceptor import Acceptor, Pause, is_ready, is_shared, round_of
from portico.engines.green.watch import NOW, Watch
from portico.gate import LEAD_PAUSE, Gate

if TYPE_CHECKING:
    from threading import Lock

    from portico.engines.green.crew import Crew
    from portico.engines.green.plain import PlainPath

ACCEPT_BATCH: Final = 64
"""Requests that are taken in a row before handlers have their turn.

As many as wait are taken at once, because asking the system whether there is one more costs as
much as taking it; but a flood of connections must not keep those that are there from being served.
"""

FRUITLESS: Final = 3
"""Times in a row that a ready listener may give no request before the loop rests."""

FRUITLESS_PAUSE: Final = 0.01
"""Seconds of that rest.

A program's own `get_request` or `_handle_request_noblock` may refuse to take what is ready; without
a rest the loop would take a full core.
"""


class GreenAcceptor(Acceptor):
    """One wait after another for a listener, in a greenlet of a crew.

    Args:
        server: What to accept for.  Its `fileno` decides what is watched.
        crew: Where; its thread is the calling one.
        token: What whoever runs the hooks of the accept path holds; ``None`` if nobody else does.
        can_batch: Whether a `get_request` too many returns at once, and nobody minds it.
        plain: What takes requests as long as no hook of the server is anybody else's.

    Raises:
        ValueError: The listener is closed.
    """

    def __init__(
        self,
        server: Any,
        crew: Crew,
        token: Lock | None = None,
        *,
        can_batch: bool = False,
        plain: PlainPath | None = None,
    ) -> None:
        self.process = os.getpid()
        self.thread = get_ident()
        self.wakeup = None
        self._on_round = round_of(server)
        self.misses_signals = self._on_round is not None  # as of `portico.acceptor`
        self._server = server
        self._crew = crew
        self._hub = crew.hub
        self._token = token
        self._holds_token = False
        self._waiting: greenlet | None = None
        self._is_ready = False
        self.is_woken = False
        self._is_always_ready = False
        self._watch: Watch | None = None
        self._fruitless = 0
        self._asked = False
        self._left_in_batch = 0
        self._is_shared = is_shared(server)
        if server.fileno() < 0:
            raise ValueError("the listener is closed")
        self._batch = ACCEPT_BATCH if can_batch else 0
        self._plain = plain if can_batch else None
        self._listen()

    @property
    def has_more(self) -> bool:
        """Whether the last request was taken from a batch that goes on; uses up one of it."""
        crew = self._crew
        if self._left_in_batch <= 0 or not crew.took_request or self.is_woken:
            return False
        crew.took_request = self._asked = False
        self._left_in_batch -= 1
        return True

    def close(self) -> None:
        """Stop watching.  The listener stays open."""
        self._stop_listening()
        self._release_token()

    def wake(self) -> None:
        """End the wait.  Callable from any thread and from a signal handler."""
        self.is_woken = True
        self._hub.call_anywhere(self._ring)

    def wait(self, timeout: float | None) -> bool:
        """Wait until the listener is ready, or may be; say whether it is.

        Args:
            timeout: Seconds; ``None`` waits until the listener is ready or `wake` is called.
        """
        crew = self._crew
        self._come_round()
        if crew.took_request:
            crew.took_request = False
            self._fruitless = 0
        elif self._asked:
            self._fruitless += 1
        self._asked = False
        self._release_token()
        if self._fruitless > FRUITLESS:
            self._fruitless = 0
            self._park(FRUITLESS_PAUSE, is_listening=False)
        deadline = inf if timeout is None else monotonic() + timeout
        while not self.is_woken:
            self._park(None if deadline == inf else max(0.0, deadline - monotonic()))
            if self._is_ready and self._take_token():
                if self._take_plainly():
                    if deadline != inf and monotonic() >= deadline:
                        break  # the loop has something to do beside
                    continue
                self._asked = True
                self._left_in_batch = self._batch
                return True
            if monotonic() >= deadline:
                if self._is_shared and is_ready(self._server) and self._take_token():
                    # As in `portico.acceptor`: who was woken for a client may have come to naught.
                    self._asked = True
                    return True
                break
        self.is_woken = False
        self._hold_token()
        return False

    def _take_plainly(self) -> bool:
        """Take what is waiting without the serving loop, if that may be; say whether it was."""
        plain = self._plain
        if plain is None or not plain.take(self, self._batch):
            return False
        self._release_token()
        self._come_round()
        if plain.leading is not None:
            self._leave_to_others(plain.leading)
        return True

    def rest(self, pause: Pause, timeout: float | None) -> bool:
        """Wait without the listener, and say whether `pause` is over.

        Args:
            pause: What is waited for.
            timeout: Seconds after which to return in any case; ``None`` for no limit.
        """
        self._come_round()
        remaining = pause.remaining(monotonic())
        if not remaining:
            return True
        self._release_token()
        self._left_in_batch = 0
        over = False

        def end() -> None:
            nonlocal over
            over = True
            self._ring()

        for descriptor in pause.descriptors:
            self._hub.add_reader(descriptor, end)
        try:
            if not self.is_woken:
                patience = min(remaining, inf if timeout is None else timeout)
                self._park(None if patience == inf else patience, is_listening=False)
        finally:
            for descriptor in pause.descriptors:
                self._hub.remove_reader(descriptor)
        self.is_woken = False
        self._hold_token()
        return over or not pause.remaining(monotonic())

    def _park(self, seconds: float | None, *, is_listening: bool = True) -> None:
        """Let others run until something rings."""
        self._is_ready = False
        if is_listening:
            self._listen()
            if self._is_always_ready:
                self._hub.give_way()
                self._is_ready = True
                return
        elif self._watch is not None:
            self._stop_listening()
        timer = None if seconds is None else self._hub.call_later(seconds, self._ring)
        self._waiting = getcurrent()
        try:
            self._hub.switch()
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()

    def _leave_to_others(self, gate: Gate) -> None:
        """Accept nobody for a moment, or until this process has its share and no more."""
        gate.on_relief = partial(self._hub.call_anywhere, self._ring)
        try:
            self._park(LEAD_PAUSE, is_listening=False)
        finally:
            gate.on_relief = None

    def _ring(self) -> None:
        if self._waiting is not None:
            self._waiting.switch()

    def _on_readable(self) -> None:
        if self._waiting is not None:
            self._is_ready = True
            self._waiting.switch()
        else:
            # A hook of the accept path waits for something else.  The listener goes on being
            # ready, and would be reported in every round.
            self._stop_listening()

    def _listen(self) -> None:
        """Watch the listener, unless it is watched already or closed."""
        if self._watch is not None or self._is_always_ready:
            return
        fd = self._server.fileno()
        if fd < 0:
            return
        watch = Watch(fd, True, None)
        try:
            self._hub.listen(watch, self._on_readable)
        except PermissionError:  # a regular file, which poll(2) would call ready
            self._is_always_ready = True
        else:
            self._watch = watch

    def _stop_listening(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.reader = None
            self._hub.poller.forget(watch, is_closing=False)

    def _take_token(self) -> bool:
        """Get the right to run the hooks; if another hub has it, let it have the request too."""
        if self._token is None:
            return True
        if self._token.acquire(blocking=False):
            self._holds_token = True
            return True
        self._park(FRUITLESS_PAUSE / 5, is_listening=False)
        return False

    def _hold_token(self) -> None:
        """Wait for the right to run the hooks, for `service_actions`; not if the loop may end."""
        while not self.is_woken and not self._take_token():
            pass

    def _release_token(self) -> None:
        if self._holds_token:
            self._holds_token = False
            assert self._token is not None
            self._token.release()


def prepare_listener(server: Any) -> bool:
    """See to it, where we may, that a `get_request` too many does not wait; say whether."""
    listener = getattr(server, "socket", None)
    try:
        if not isinstance(listener, socket.socket) or listener.fileno() != server.fileno():
            return False
        if listener.type == socket.SOCK_STREAM:
            # Accepting must not wait: another hub or process may have been faster.  It stays so
            # after the loop, because others that share the listener may still be serving.
            os.set_blocking(listener.fileno(), False)
            return True
        if NOW and hasattr(server, "receive_flags"):
            server.receive_flags |= NOW
            return True
    except OSError:
        pass
    return False
