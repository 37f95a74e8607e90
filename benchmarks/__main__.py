"""The command line of the benchmarks."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from benchmarks import machine
from benchmarks.events_cost import measure_events
from benchmarks.peers import PEERS
from benchmarks.report import Finding, render_text, table, write_results
from benchmarks.rounds import measure
from benchmarks.side_by_side import CannotCompare, compare
from benchmarks.toolchain import MissingProgram, find_program
from benchmarks.workers import compare_workers
from benchmarks.works import WORKS, Scale

RESULTS = Path(__file__).parent / "results"

SPARE_DESCRIPTORS = 250
"""Descriptors that the idle work leaves to the server itself and to its busy connections."""

python_option = click.option(
    "--python",
    default=sys.executable,
    show_default="this one",
    help="The interpreter that runs the servers.",
)
connections_option = click.option(
    "--connections",
    type=click.IntRange(1, 1000),
    default=64,
    show_default=True,
    help="Connections that are busy at once.",
)


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Measure what a message costs on portico and beside it; without a command, everything."""
    try:
        find_program("cc")
    except MissingProgram as missing:
        raise click.ClickException(f"{missing}: the load generators are compiled") from missing
    if context.invoked_subcommand is None:
        context.invoke(run)


@main.command()
@click.option(
    "--work",
    "work_names",
    multiple=True,
    type=click.Choice([work.name for work in WORKS]),
    help="Measure only this; can be given more than once.",
)
@click.option(
    "--server",
    "peer_names",
    multiple=True,
    type=click.Choice([peer.name for peer in PEERS]),
    help="Measure only on this; can be given more than once.",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=9, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.05, 60), default=1.0, show_default=True)
@click.option(
    "--idle",
    type=click.IntRange(1, 100_000),
    default=10_000,
    show_default=True,
    help="Idle connections; fewer where the limit of descriptors is lower.",
)
@connections_option
@python_option
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results",
    help="The folder that keeps table, samples and plot.",
)
def run(
    work_names: Sequence[str],
    peer_names: Sequence[str],
    rounds: int,
    seconds: float,
    idle: int,
    connections: int,
    python: str,
    results: Path,
) -> None:
    """Measure every work on every server, and keep the results."""
    works = [work for work in WORKS if not work_names or work.name in work_names]
    peers = [peer for peer in PEERS if not peer_names or peer.name in peer_names]
    titles = {peer.name: peer.title for peer in PEERS}
    cores = machine.choose_cores()
    held = min(idle, machine.raise_descriptor_limit() - SPARE_DESCRIPTORS)
    scale = Scale(cores, seconds, connections, held)
    circumstances = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        **machine.describe(python),
        "rounds": f"{rounds} of {seconds:g} s",
        "connections": f"{connections} busy, {held:,} idle",
        "cores": _explain(cores),
    }
    for name, value in circumstances.items():
        click.echo(f"{name}: {value}")
    findings = []
    for work in works:
        samples = measure(work, peers, rounds, scale, python, click.echo)
        if samples:
            findings.append(Finding(work, samples))
            click.echo(f"\n{work.title}\n{render_text(table(findings[-1], titles))}\n")
    for path in write_results(results, findings, titles, circumstances):
        click.echo(f"wrote {path}")


@main.command(name="compare")
@click.argument("first", metavar="MODULE:CLASS")
@click.argument("second", metavar="MODULE:CLASS")
@click.option(
    "--work",
    "work_names",
    multiple=True,
    type=click.Choice([work.name for work in WORKS if work.role != "web"]),
    default=("echo", "line", "connect"),
    show_default=True,
)
@click.option("--pairs", type=click.IntRange(1, 1000), default=9, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 60),
    default=0.2,
    show_default=True,
    help="How long a turn takes.",
)
@click.option("--at-most", type=float, help="Exit with status 1 when a median is above this ratio.")
@connections_option
@python_option
def compare_servers(
    first: str,
    second: str,
    work_names: Sequence[str],
    pairs: int,
    seconds: float,
    at_most: float | None,
    connections: int,
    python: str,
) -> None:
    """Say what the second server costs to the first, measured in turns.

    For example: compare socketserver:ThreadingTCPServer portico:ThreadingTCPServer
    """
    machine.raise_descriptor_limit()
    scale = Scale(machine.choose_cores(), seconds, connections)
    click.echo(f"{second} to {first}: median (each pair)")
    ratios = []
    for work in (work for work in WORKS if work.name in work_names):
        try:
            comparison = compare(first, second, work, pairs, scale, python)
        except CannotCompare as error:
            raise click.ClickException(str(error)) from error
        click.echo(comparison)
        ratios.append(comparison.ratio)
    if at_most is not None and max(ratios) > at_most:
        raise click.ClickException(f"above {at_most:g}")


@main.command()
@click.option("--engine", default="green", show_default=True, help="What runs the handlers.")
@click.option("--pairs", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 60),
    default=1.0,
    show_default=True,
    help="How long a turn takes.",
)
@python_option
def workers(engine: str, pairs: int, seconds: float, python: str) -> None:
    """Say what two workers do beside one: what they compute, and what a message costs them."""
    apart = machine.choose_cores()
    for title, handler, load, connections, cores in (
        ("1 ms of computing, on all cores", "compute", "messages", 64, None),
        ("1 ms of computing, a connection each, on all cores", "compute", "connections", 16, None),
        ("Echo, workers and load on a core each", "echo", "messages", 64, apart),
        ("Connect, echo, close, on a core each", "echo", "connections", 64, apart),
    ):
        finding = compare_workers(
            engine,
            handler,
            load,
            connections=connections,
            pairs=pairs,
            seconds=seconds,
            cores=cores,
            python=python,
        )
        click.echo(f"{title}: {finding}")


@main.command()
def events() -> None:
    """Show what an event costs that nobody subscribed to."""
    click.echo(measure_events())


def _explain(cores: machine.Cores) -> str:
    if cores.are_shared:
        return f"server and load share core {cores.server}: only one is usable"
    return f"server on core {cores.server}, load on core {cores.load}"


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
