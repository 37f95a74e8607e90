"""Serve each request in a child process of its own."""

from __future__ import annotations

import os
import select
import threading
import traceback
from collections.abc import Collection
from math import inf
from time import monotonic, sleep
from typing import TYPE_CHECKING, Final, NoReturn

from portico.connection import ClientAddress, Request
from portico.console import show
from portico.engines import Hooks, serve

if TYPE_CHECKING:
    from portico.guard import Guard

LOOK_INTERVAL: Final = 0.05
"""Seconds between two looks for a child that ended, where no descriptor tells."""


class ForkingMixIn(Hooks):
    """Serve each request in a child process of its own.

    Owns `process_request` and `active_children`; extends `handle_timeout`, `service_actions` and
    `server_close`.  It waits for its own children only, so the program may have others.
    A child ends as by ``os._exit``: no exit handlers run and no buffers are flushed; its status
    is 0 if the handler finished, 1 if it raised.
    """

    timeout: float | None = 300
    """Seconds that `handle_request` waits before it collects children."""

    max_children: int = 40
    """Children at once; at this number clients wait in the backlog until one has ended."""

    block_on_close: bool = True
    """Whether `server_close` waits for the children, without limit."""

    active_children: set[int] | None = None
    """Process ids of the children that have not been collected; ``None`` before the first."""

    _exits: tuple[int, ...] = ()
    # A descriptor for each child, readable when it has ended; open while we wait for one to end.
    _rests_at_limit = False
    # Accepting rests until there are fewer children.
    _awaits_place = False
    # It rests until a connection has given its place back, which the end of a child does.

    def collect_children(self, *, blocking: bool = False) -> None:
        """Collect the children that have ended.

        Args:
            blocking: Whether to wait, without limit, until all have.
        """
        children = self.active_children
        if not children:
            return
        guard = self._get_guard()
        before = len(children)
        for child in tuple(children):  # a copy: collecting removes it from the set
            try:
                ended, _ = os.waitpid(child, 0 if blocking else os.WNOHANG)
            except ChildProcessError:  # somebody else has collected it
                ended = child
            if ended:
                children.discard(child)
                if guard is not None:
                    guard.note_child_end(child)
        if len(children) >= self.max_children:
            self._rest_at_limit()
        elif self._rests_at_limit or (self._awaits_place and len(children) < before):
            self._end_rest()

    def handle_timeout(self) -> None:
        """Collect the children that have ended."""
        self.collect_children()
        super().handle_timeout()

    def service_actions(self) -> None:
        """Collect the children that have ended."""
        self.collect_children()
        super().service_actions()

    def process_request(self, request: Request, client_address: ClientAddress) -> None:
        """Fork a child for the request.

        Raises:
            OSError: The system has no process left; the server then closes the request and
                goes on.
        """
        self._wait_below_limit()
        self._look_at_certificates()
        guard = self._get_guard()
        if guard is not None:
            guard.expect_child(request)
        child = os.fork()
        if child == 0:
            if guard is not None:
                guard.enter_child(request)
            self._serve_and_exit(request, client_address)
        if self.active_children is None:
            self.active_children = set()
        if guard is not None:
            guard.hand_to_child(child, request)  # first: another thread may collect it at once
        self.active_children.add(child)
        self.close_request(request)  # not shut down: the child uses the same connection
        if len(self.active_children) >= self.max_children:
            self._rest_at_limit()
        elif self._awaits_place:  # and not yet for the end of this one
            self._end_rest()

    def server_close(self) -> None:
        """Close the listener, then wait for the children as `block_on_close` says."""
        super().server_close()
        self.collect_children(blocking=self.block_on_close)
        self._close_exits()

    def _requests_under_way(self) -> int:
        return len(self.active_children or ())

    def _get_guard(self) -> Guard | None:
        """Return what counts the connections, on a server of ours."""
        return getattr(self, "_guard", None)

    def _look_at_certificates(self) -> None:
        """Load, on a server of ours, what has changed: what a child loads is lost with it."""
        find_preamble = getattr(self, "_preamble", None)
        preamble = None if find_preamble is None else find_preamble()
        if preamble is not None:
            preamble.refresh(self)

    def _wait_event(self, event: threading.Event, seconds: float | None) -> None:
        """Wait for an event that the end of a child may set: children are collected meanwhile."""
        deadline = inf if seconds is None else monotonic() + seconds
        while not event.is_set() and (remaining := deadline - monotonic()) > 0:
            self.collect_children()
            event.wait(min(remaining, LOOK_INTERVAL))

    def _serve_and_exit(self, request: Request, client_address: ClientAddress) -> NoReturn:
        """Serve the request in the child, and end it whatever happens."""
        status = 1
        try:
            if serve(self, request, client_address):
                status = 0
        except Exception:  # of handle_error: in this process nobody else would tell
            show(traceback.format_exc())
        finally:
            os._exit(status)

    def _rest_at_limit(self) -> None:
        """Have a server of ours leave clients in the backlog until a child has ended."""
        pause_accepting = getattr(self, "pause_accepting", None)
        if pause_accepting is None:
            return
        self._close_exits()
        self._rests_at_limit, self._awaits_place = True, False
        self._exits = _open_exits(self.active_children or ())
        if self._exits:
            pause_accepting(until=self._exits)
        else:
            pause_accepting(LOOK_INTERVAL)

    def _await_place(self, until: tuple[int, ...], seconds: float | None) -> None:
        """Rest until there is a place: that of a child is free when it has been collected."""
        self.collect_children()
        children = self.active_children or ()
        if children and len(children) >= self.max_children:
            return  # with this look at the children, a rest at the limit has begun
        self._close_exits()
        self._rests_at_limit, self._awaits_place = False, True
        self._exits = _open_exits(children)
        if children and not self._exits:
            seconds = LOOK_INTERVAL
        super()._await_place((*until, *self._exits), seconds)

    def _end_rest(self) -> None:
        self._rests_at_limit = self._awaits_place = False
        self.resume_accepting()
        self._close_exits()

    def _close_exits(self) -> None:
        # Taken away in one step: the loop may be here while another thread closes the server, and
        # a descriptor that is closed twice is somebody else's by then.
        for descriptor in vars(self).pop("_exits", ()):
            os.close(descriptor)

    def _wait_below_limit(self) -> None:
        """Make room for one more child; only a server that cannot rest comes here without."""
        self.collect_children()
        while self.active_children and len(self.active_children) >= self.max_children:
            exits = _open_exits(self.active_children)
            if exits:
                select.select(exits, (), ())
            else:
                sleep(LOOK_INTERVAL)
            for descriptor in exits:
                os.close(descriptor)
            self.collect_children()


def _open_exits(children: Collection[int]) -> tuple[int, ...]:
    """Open a pidfd for each child: readable when it has ended.

    Returns nothing where the system has no pidfds, or none left.
    """
    exits: list[int] = []
    if hasattr(os, "pidfd_open"):
        try:
            exits.extend(os.pidfd_open(child) for child in children)
        except OSError:
            for descriptor in exits:
                os.close(descriptor)
            exits.clear()
    return tuple(exits)
