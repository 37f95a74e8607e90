"""Measure servers in interleaved rounds, and summarise what they found.

A shared machine changes under a measurement: another program takes the caches, the host takes the
core.  So every round measures all servers one after the other, each started fresh; a ratio is
made within a round, between neighbours in time; and of the rounds the median counts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.loads import Load, LoadFailed
from benchmarks.peers import Missing, Peer
from benchmarks.process import Server, ServerFailed
from benchmarks.works import Result, Scale, Work


@dataclass(frozen=True)
class Sample:
    """One server at one work in one round; ``cost`` is in seconds for a message."""

    work: str
    peer: str
    round: int
    cost: float
    result: Result


@dataclass(frozen=True)
class Summary:
    """One server at one work: medians over the rounds.

    Attributes:
        peer: Which server.
        rounds: How many rounds it took part in.
        ratios: Of each round, its cost to that of the reference in the same round; empty when
            the reference was not measured.
        cost: Seconds of processor time for a message.
        throughput: Messages a second.
        p50: Seconds from question to answer: half of the answers came sooner.
        p99: As above, for 99 of 100.
        p999: As above, for 999 of 1000; ``None`` where the load does not say.
        bytes_per_connection: Memory of an idle connection; ``None`` except in the idle work.
        failures: Messages of all rounds that were not answered.
    """

    peer: str
    rounds: int
    ratios: tuple[float, ...]
    cost: float
    throughput: float
    p50: float
    p99: float
    p999: float | None
    bytes_per_connection: float | None
    failures: int

    @property
    def ratio(self) -> float | None:
        """The median of the ratios."""
        return median(self.ratios) if self.ratios else None


def in_rounds(peers: Sequence[Peer], rounds: int) -> Iterator[tuple[int, Peer]]:
    """Say who is measured when: all in every round, each round beginning with another.

    >>> [(round, peer) for round, peer in in_rounds(["a", "b", "c"], 2)]
    [(0, 'a'), (0, 'b'), (0, 'c'), (1, 'b'), (1, 'c'), (1, 'a')]
    """
    for number in range(rounds):
        first = number % len(peers)
        for peer in (*peers[first:], *peers[:first]):
            yield number, peer


def measure(
    work: Work,
    peers: Sequence[Peer],
    rounds: int,
    scale: Scale,
    python: str,
    say: Callable[[str], object],
) -> list[Sample]:
    """Measure peers at a work.

    A peer that cannot play the role is left out, one that is not installed is left out with a
    word, and one that fails is left out from then on.

    Args:
        work: What they do.
        peers: Who does it.
        rounds: How often each is measured.
        scale: How much load, and for how long.
        python: The interpreter that runs the servers in Python.
        say: Called with one line for each peer that is left out.
    """
    commands = {}
    for peer in peers:
        try:
            if work.role in peer.programs:
                commands[peer] = peer.programs[work.role](python)
        except Missing as missing:
            say(f"{work.name}: {peer.title} is skipped: {missing}")
    samples = []
    for number, peer in in_rounds(list(commands), rounds) if commands else ():
        if peer not in commands:
            continue
        try:
            with Server(commands[peer], scale.cores.server, peer.environment) as server:
                result = work.run(server, scale)
            samples.append(Sample(work.name, peer.name, number, result.load.cost, result))
        except (ServerFailed, LoadFailed) as failure:
            say(f"{work.name}: {peer.title} failed: {failure}")
            del commands[peer]
    return samples


def summarise(samples: Sequence[Sample], reference: str) -> list[Summary]:
    """Summarise the samples of one work, one summary for each peer, the cheapest first."""
    costs = {sample.round: sample.cost for sample in samples if sample.peer == reference}
    names = dict.fromkeys(sample.peer for sample in samples)
    summaries = [
        _summarise_peer([sample for sample in samples if sample.peer == name], costs)
        for name in names
    ]
    return sorted(summaries, key=lambda summary: summary.ratio or summary.cost)


def _summarise_peer(samples: Sequence[Sample], costs: dict[int, float]) -> Summary:
    """Summarise one peer, given the cost of the reference in each round."""
    loads = [sample.result.load for sample in samples]

    def middle(value: Callable[[Load], float]) -> float:
        return median(value(load) for load in loads)

    p999s = [load.p999 for load in loads if load.p999 is not None]
    sizes = [sample.result.bytes_per_connection for sample in samples]
    known_sizes = [size for size in sizes if size is not None]
    return Summary(
        peer=samples[0].peer,
        rounds=len(samples),
        ratios=tuple(
            sample.cost / costs[sample.round] for sample in samples if sample.round in costs
        ),
        cost=median(sample.cost for sample in samples),
        throughput=middle(lambda load: load.messages / load.seconds),
        p50=middle(lambda load: load.p50),
        p99=middle(lambda load: load.p99),
        p999=median(p999s) if p999s else None,
        bytes_per_connection=median(known_sizes) if known_sizes else None,
        failures=sum(load.failures for load in loads),
    )
