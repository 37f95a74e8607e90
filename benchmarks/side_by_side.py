"""Measure two servers side by side, for a difference of a percent.

The peers of the large comparison differ by factors, and a server started fresh in each round tells
them apart.  Here two servers of the same shape differ by less than the machine does from one
second to the next.  So both run at once on the same core, and the load goes from one to the other
in short turns: what disturbs one disturbs the other as much.  Several fresh pairs even out what
differs from process to process, such as where its memory happened to lie.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from benchmarks.loads import LoadFailed
from benchmarks.peers import Missing, sequential
from benchmarks.process import Server, ServerFailed
from benchmarks.works import Scale, Work

TURNS = 12
"""Turns that each server of a pair has."""


@dataclass(frozen=True)
class Comparison:
    """What the second server costs to the first at one work.

    Attributes:
        work: What they did.
        ratios: One for each pair.
    """

    work: Work
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median over the pairs."""
        return median(self.ratios)

    def __str__(self) -> str:
        each = " ".join(f"{ratio:.3f}" for ratio in sorted(self.ratios))
        return f"{self.work.title}: {self.ratio:.3f}   ({each})"


class CannotCompare(Exception):
    """One of the two servers cannot be measured; the message says why."""


def compare(
    first: str, second: str, work: Work, pairs: int, scale: Scale, python: str
) -> Comparison:
    """Compare two servers at a work.

    Args:
        first: The one whose cost is 1, named ``module:Class``.
        second: The other.
        work: What they do.
        pairs: How often both are started and measured, in turns.
        scale: How much load, and how long each turn takes.
        python: The interpreter that runs both.

    Raises:
        CannotCompare: One of them cannot be imported, or did not do the work.
    """
    try:
        commands = [sequential(server, work.role)(python) for server in (first, second)]
        ratios = [_compare_pair(commands, work, scale) for _ in range(pairs)]
    except (*Missing, ServerFailed, LoadFailed) as error:
        raise CannotCompare(f"{work.title}: {error}") from error
    return Comparison(work, tuple(ratios))


def _compare_pair(commands: list[list[str]], work: Work, scale: Scale) -> float:
    """Return what the second costs to the first: the median over the turns of a fresh pair."""
    costs: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as running:
        servers = [running.enter_context(Server(it, scale.cores.server, {})) for it in commands]
        for place in in_turns(TURNS):
            costs[place].append(work.run(servers[place], scale).load.cost)
    return median(second / first for first, second in zip(*costs, strict=True))


def in_turns(turns: int) -> Iterator[int]:
    """Say whose turn it is, so that a drift of the machine favours neither.

    >>> list(in_turns(4))
    [0, 1, 1, 0, 0, 1, 1, 0]
    """
    for turn in range(turns):
        yield from (0, 1) if turn % 2 == 0 else (1, 0)
