from __future__ import annotations

import threading

import pytest
from greenlet import getcurrent, greenlet

from portico import stacks


def test_a_thread_is_told_by_its_name_and_its_lines() -> None:
    is_there, may_go = threading.Event(), threading.Event()

    def wait_here() -> None:
        is_there.set()
        may_go.wait()  # the line that is looked for

    thread = threading.Thread(target=wait_here, name="one that waits")
    thread.start()
    is_there.wait()
    told = stacks.describe()
    may_go.set()
    thread.join()
    assert "thread one that waits:" in told
    assert "may_go.wait()  # the line that is looked for" in told
    assert "test_a_thread_is_told_by_its_name_and_its_lines" not in told  # who asks is no news


def test_greenlets_in_the_same_place_are_told_once() -> None:
    def wait_here() -> None:
        getcurrent().parent.switch()  # type: ignore[union-attr]  # where greenlets wait

    waiting = [greenlet(wait_here) for _ in range(20)]
    for each in waiting:
        each.switch()
    told = stacks.describe()
    for each in waiting:
        each.switch()
    assert "20 greenlets at:" in told
    assert told.count("in wait_here") == 1


def test_what_is_told_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "MOST_BYTES", 100)
    is_there, may_go = threading.Event(), threading.Event()

    def descend(depth: int) -> None:
        if depth:
            descend(depth - 1)
        else:
            is_there.set()
            may_go.wait()

    thread = threading.Thread(target=descend, args=(stacks.MOST_FRAMES * 10,))
    thread.start()
    is_there.wait()
    told = stacks.describe()
    may_go.set()
    thread.join()
    assert len(told) <= 120
    assert told.endswith("(and more)")
