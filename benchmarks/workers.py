"""Compare two workers with one: how much more they compute, and what a message costs them.

Both programs run all the time, and the load goes from one to the other in short turns, as in
`side_by_side`; the one that is not loaded uses no processor time to speak of.

How much they compute is measured on all cores, of which the load needs a little.  What a message
costs is measured as everywhere here: the workers on one core, the load on another.  With all three
on two cores, what is measured would be how the system shares these out.
"""

import ctypes
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Self

from benchmarks.machine import Cores, pinned
from benchmarks.process import ServerFailed
from benchmarks.side_by_side import in_turns
from benchmarks.toolchain import HERE, generator

START_TIMEOUT = 20.0
"""Seconds for all workers to serve."""

MESSAGE = 64


class Workers:
    """A program with workers; a context manager that stops it."""

    def __init__(
        self, count: int, engine: str, handler: str, python: str, cores: Cores | None
    ) -> None:
        self._count = count
        self._lines: list[str] = []
        self._changed = threading.Condition()  # guards _lines
        script = str(HERE / "servers" / "workers.py")
        with _on(None if cores is None else cores.server):
            self._process = subprocess.Popen(
                [python, script, str(count), engine, handler],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_ready, START_TIMEOUT):
                self._end()
                raise ServerFailed("\n".join(self._lines))
            text = "\n".join(self._lines)
        self.port = int(re.findall(r"ready on tcp://127.0.0.1:(\d+)", text)[0])
        self.pids = [int(pid) for pid in re.findall(r"\(process (\d+)\) is ready", text)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def processor_seconds(self) -> float:
        """Return the processor time that the workers have used so far, in sum."""
        return sum(map(_processor_seconds, self.pids))

    @property
    def _is_ready(self) -> bool:
        text = "\n".join(self._lines)
        return text.count("is ready") >= self._count and "ready on" in text

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.join()


@dataclass(frozen=True)
class Turn:
    """What one turn of the load saw: messages a second, and what each cost the workers."""

    rate: float
    cost: float


@dataclass(frozen=True)
class Finding:
    """Two workers beside one.

    Attributes:
        rates: How many times as much they served, in each pair of turns.
        costs: How many times as much processor time a message cost.
        shares: Of the processor time of the two, how much was the busier one's.
    """

    rates: Sequence[float]
    costs: Sequence[float]
    shares: Sequence[float]

    def __str__(self) -> str:
        return (
            f"{median(self.rates):.2f} times as many messages, "
            f"{median(self.costs):.2f} times the processor time for each "
            f"(the busier worker did {median(self.shares):.0%})"
        )


def compare_workers(
    engine: str,
    handler: str,
    load: str,
    *,
    connections: int,
    pairs: int,
    seconds: float,
    cores: Cores | None = None,
    python: str = sys.executable,
) -> Finding:
    """Compare two workers with one.

    Args:
        engine: What runs the handlers.
        handler: ``echo`` or ``compute``.
        load: ``messages`` on connections that stay, or ``connections`` with one message each.
        connections: How many at once.
        pairs: Turns of each.
        seconds: How long a turn takes.
        cores: Where the workers and the load run; ``None`` for anywhere.
        python: The interpreter of both.
    """
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    shares: list[float] = []
    with ExitStack() as running:
        programs = [
            running.enter_context(Workers(count, engine, handler, python, cores))
            for count in (1, 2)
        ]
        for place in in_turns(pairs):
            before = [_processor_seconds(pid) for pid in programs[place].pids]
            turns[place].append(_load(programs[place], load, connections, seconds, cores))
            used = [
                _processor_seconds(pid) - then
                for pid, then in zip(programs[place].pids, before, strict=True)
            ]
            if place == 1:
                shares.append(max(used) / sum(used))
    ones, twos = turns
    return Finding(
        [two.rate / one.rate for one, two in zip(ones, twos, strict=True)],
        [two.cost / one.cost for one, two in zip(ones, twos, strict=True)],
        shares,
    )


def _load(
    program: Workers, load: str, connections: int, seconds: float, cores: Cores | None
) -> Turn:
    sizes = [connections, MESSAGE, MESSAGE] if load == "messages" else [connections]
    arguments = [program.port, *sizes, seconds, program.pids[0]]
    before = program.processor_seconds()
    with _on(None if cores is None else cores.load):
        done = subprocess.run(
            [generator(load), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            check=True,
        )
    used = program.processor_seconds() - before
    told = json.loads(done.stdout)
    if told["failures"]:
        raise ServerFailed(f"{told['failures']} messages were not answered")
    return Turn(told["messages"] / told["seconds"], used / told["messages"])


def _on(core: int | None) -> AbstractContextManager[None]:
    """Keep what is started in the block to one core, if there is one to keep it to."""
    return nullcontext() if core is None else pinned(core)


def _processor_seconds(pid: int) -> float:
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)) != 0:
        raise ServerFailed(f"process {pid} has ended")
    return time.clock_gettime(clock.value)
