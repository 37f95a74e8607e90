"""Tell where the threads and greenlets of this process are.

Owns the words and their bound.  It is for a process that does not go on: nothing is stopped while
it is looked at, so what is told of a thread that runs is where it was a moment ago.
"""

from __future__ import annotations

import gc
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

MOST_BYTES: Final = 1 << 16
"""Bytes that are told at the most: some hundred stacks."""

MOST_FRAMES: Final = 40
"""Frames of one stack, the innermost: a recursion without end has a thousand."""

MOST_KINDS: Final = 50
"""Different stacks of greenlets: ten thousand that wait have a few places to wait at."""


def describe() -> str:
    """Return the stacks of every thread, and of every greenlet that does not run.

    Greenlets in the same place are told once, with their number.  Callable from any thread.
    """
    told = "\n".join([*_of_threads(), *_of_greenlets()])
    if len(told) <= MOST_BYTES:
        return told
    return f"{told[:MOST_BYTES]}\n(and more)"


def _of_threads() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    here = threading.get_ident()
    for ident, frame in sys._current_frames().items():
        if ident != here:
            yield f"thread {names.get(ident, ident)}:\n{_stack(frame)}"


def _of_greenlets() -> Iterator[str]:
    kind: Any = getattr(sys.modules.get("greenlet"), "greenlet", None)
    if kind is None:  # nobody has any
        return
    counted: Counter[str] = Counter()
    for found in gc.get_objects():
        if issubclass(type(found), kind) and (frame := found.gr_frame) is not None:
            counted[_stack(frame)] += 1
    for stack, count in counted.most_common(MOST_KINDS):
        yield f"{count} greenlet{'s' * (count != 1)} at:\n{stack}"


def _stack(frame: FrameType) -> str:
    """Return a stack as a traceback shows it, the innermost frame last."""
    frames = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=MOST_FRAMES)
    frames.reverse()
    return "".join(frames.format()).rstrip()
