"""Find the handler that holds a hub, name it, and send what it has written so far.

Where a server may have more hubs, another one is started when all are held.  A thread looks at
the hubs now and then.  It looks only while they are busy: an idle server does not wake for it.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from portico.engines.green.crew import Worker
from portico.events import HandlerStalled, emit

if TYPE_CHECKING:
    from portico.engines.green.crew import Crew, Crews

REPEAT: Final = 60.0
"""Seconds until the same place is told again."""

MAX_PLACES: Final = 1000
"""Places that are remembered for that; beyond it, all are forgotten."""

HELD: Final = 0.02
"""Seconds that all hubs may be held before another one is started, if `max_hubs` allows it.

Who connects meanwhile waits so long, and up to half of it more until somebody looks; so this is
far less than the time after which a handler is worth a report.
"""

OURS: Final = str(Path(__file__).parents[2])
STANDARD_LIBRARY: Final = sysconfig.get_path("stdlib")

SHORTEST_LOOK: Final = 0.005
"""Seconds between two looks at least."""


class Watchdog:
    """Looks at the hubs of a server.

    Args:
        server: Whose; its settings `stall_threshold` and `max_hubs` count.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self._lock = threading.Lock()  # guards _thread
        self._crews: Crews | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Event()
        self._told: dict[str, float] = {}
        self._looks: dict[Crew, Look] = {}

    def watch(self, crews: Crews) -> None:
        """Begin to look; nothing if somebody does already."""
        with self._lock:
            self._crews = crews
            server = self._server
            if self._thread is None and (server.stall_threshold is not None or server.max_hubs > 1):
                self._thread = threading.Thread(
                    target=self._run, name=f"{type(self._server).__name__} watchdog", daemon=True
                )
                self._thread.start()

    def wake(self) -> None:
        """Look again: there is another hub, or one less."""
        self._changed.set()

    def _run(self) -> None:
        while True:
            self._changed.clear()
            with self._lock:
                crews = () if self._crews is None else self._crews.live()
                if not crews:
                    self._thread = None
                    return
            threshold: float = self._server.stall_threshold or 0.1
            if self._look_at(crews, threshold):
                may_start = len(crews) < self._server.max_hubs
                patience = min(HELD, threshold) if may_start else threshold
                self._changed.wait(max(patience / 2, SHORTEST_LOOK))
            else:
                self._wait_until_busy(crews)

    def _look_at(self, crews: tuple[Crew, ...], threshold: float) -> bool:
        """Look at each hub once; return whether one of them does anything."""
        now = monotonic()
        looks: dict[Crew, Look] = {}
        held = 0
        for crew in crews:
            poller = crew.hub.poller
            look = Look(poller.turn, poller.is_polling, now)
            before = self._looks.get(crew)
            if before is not None and before.turn == look.turn:
                look.since = before.since
                look.is_idle = look.is_polling
                if not look.is_polling:
                    duration = self._look_into(crew, look, now)
                    if duration >= threshold:
                        self._tell(look, duration)
                    if duration >= min(HELD, threshold):
                        held += 1
            looks[crew] = look
        self._looks = looks
        if held == len(crews) < self._server.max_hubs:
            self._server._start_hub()
        return not all(look.is_idle for look in looks.values())

    def _look_into(self, crew: Crew, look: Look, now: float) -> float:
        """Look into a hub that has been in one turn since the last look; return how long."""
        look.worker, look.place = find(sys._current_frames().get(crew.thread.ident or 0))
        before = self._looks[crew]
        if before.worker is not None and look.worker is not before.worker:
            look.since = now  # many short ones make a long turn, and hold nobody up
        crew.hub.send_from_watchdog()
        return now - look.since

    def _tell(self, look: Look, duration: float) -> None:
        """Tell of the handler that holds a hub, unless its place was told of lately."""
        now = monotonic()
        if not HandlerStalled.subscribers or self._server.stall_threshold is None:
            return
        if now - self._told.get(look.place, -REPEAT) < REPEAT:
            return
        if len(self._told) >= MAX_PLACES:
            self._told.clear()
        self._told[look.place] = now
        handler = self._server.RequestHandlerClass
        name = getattr(handler, "__qualname__", None) or repr(handler)
        peer = None if look.worker is None else look.worker.task[1]
        emit(HandlerStalled(self._server, peer, name, look.place, duration))

    def _wait_until_busy(self, crews: tuple[Crew, ...]) -> None:
        """Wait without looking, until one of the hubs wakes up or another one is there."""
        for crew in crews:
            crew.hub.poller.on_wake = self._changed.set
        # A hub that woke up before it could know has moved on since.
        if all(crew.hub.poller.turn == self._looks[crew].turn for crew in crews):
            self._changed.wait()
        for crew in crews:
            crew.hub.poller.on_wake = None


class Look:
    """What was seen of a hub at one moment."""

    __slots__ = ("is_idle", "is_polling", "place", "since", "turn", "worker")

    def __init__(self, turn: int, is_polling: bool, since: float) -> None:
        self.turn = turn
        self.is_polling = is_polling
        self.since = since
        self.is_idle = False
        self.worker: Worker | None = None
        self.place = ""


def find(frame: FrameType | None) -> tuple[Worker | None, str]:
    """Return the worker that runs in a stack, and the program's innermost place in it."""
    place = ""
    while frame is not None:
        code = frame.f_code
        if not place and is_program(code.co_filename):
            place = f"{code.co_filename}:{frame.f_lineno}"
        if code is Worker.run.__code__:
            worker = frame.f_locals.get("self")
            return (worker if isinstance(worker, Worker) else None), place
        frame = frame.f_back
    return None, place


def is_program(path: str) -> bool:
    """Say whether a file is the program's own, not Python's or ours."""
    if path.startswith((OURS, "<frozen")):
        return False
    return not path.startswith(STANDARD_LIBRARY) or "-packages" in path
