"""Show what an event costs that nobody subscribed to.

A server takes requests that are no sockets and hands them to a handler that does nothing, so that
what is left is the path through the hooks, where events are told.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import thread_time_ns
from types import FrameType
from typing import Any

from portico import BaseServer, events

REQUESTS = 2_000
"""Requests in one pass: some milliseconds, so that most passes are not interrupted."""

PASSES = 15


class PathServer(BaseServer):
    """A server of requests that nobody sent."""

    def get_request(self) -> tuple[object, object]:
        return self, None


@dataclass(frozen=True)
class EventsCost:
    """What events cost on the path of a request.

    Attributes:
        built_unheard: Events built in a pass while nobody was subscribed.
        built_heard: Events built in a pass while somebody was subscribed to all of them.
        requests: Requests in a pass.
        unheard: Seconds for a request while nobody was subscribed.
        heard: Seconds for a request while somebody was.
        question: Seconds to ask whether somebody is subscribed.
    """

    built_unheard: int
    built_heard: int
    requests: int
    unheard: float
    heard: float
    question: float

    def __str__(self) -> str:
        return (
            f"events built in {self.requests:,} requests\n"
            f"    nobody subscribed        {self.built_unheard:8,}\n"
            f"    subscribed to all        {self.built_heard:8,}\n"
            f"processor time of a request that does nothing\n"
            f"    nobody subscribed        {self.unheard * 1e9:8,.0f} ns\n"
            f"    subscribed to all        {self.heard * 1e9:8,.0f} ns\n"
            f"to ask for subscribers       {self.question * 1e9:8,.0f} ns"
        )


def measure_events() -> EventsCost:
    """Count and time events, with and without a subscriber."""
    server = PathServer(None, lambda *_: None)
    unheard, heard = [], []
    built_unheard = _count_events(server)
    for _ in range(PASSES):
        unheard.append(_time(lambda: _serve(server)))
        unsubscribe = events.subscribe(lambda _: None)
        try:
            heard.append(_time(lambda: _serve(server)))
        finally:
            unsubscribe()
    unsubscribe = events.subscribe(lambda _: None)
    try:
        built_heard = _count_events(server)
    finally:
        unsubscribe()
    return EventsCost(
        built_unheard=built_unheard,
        built_heard=built_heard,
        requests=REQUESTS,
        unheard=median(unheard),
        heard=median(heard),
        question=median(_time(_ask) - _time(_idle) for _ in range(PASSES)),
    )


def _serve(server: BaseServer) -> None:
    step = server._handle_request_noblock
    for _ in range(REQUESTS):
        step()


def _ask() -> None:
    kind = events.ConnectionAccepted
    for _ in range(REQUESTS):
        if kind.subscribers:
            raise AssertionError("nobody is subscribed")


def _idle() -> None:
    for _ in range(REQUESTS):
        pass


def _time(run: Callable[[], None]) -> float:
    """Return the seconds of processor time for one of the requests of `run`."""
    began = thread_time_ns()
    run()
    return (thread_time_ns() - began) / REQUESTS / 1e9


def _count_events(server: BaseServer) -> int:
    """Count the events that are built while a pass is served."""
    constructors = {kind.__init__.__code__ for kind in _kinds(events.Event)}
    built = 0

    def watch(frame: FrameType, what: str, _: Any) -> None:
        nonlocal built
        built += what == "call" and frame.f_code in constructors

    sys.setprofile(watch)
    try:
        _serve(server)
    finally:
        sys.setprofile(None)
    return built


def _kinds(kind: type[events.Event]) -> list[type[events.Event]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _kinds(child))]
