"""Write results down: tables to read, and all samples as JSON to reckon with."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.plot import Bar, Panel, draw
from benchmarks.rounds import Sample, Summary, summarise
from benchmarks.works import Work

Titles = Mapping[str, str]
"""What tables call each peer."""


INTRODUCTION = """\
Written by `python -m benchmarks run`. Processor time of the server for a message, as a ratio within
the same round: the median of the rounds, and their range. `docs/explanation/measurements.md` says
what is measured, and how."""


@dataclass(frozen=True)
class Finding:
    """A work, and what the rounds found."""

    work: Work
    samples: Sequence[Sample]

    @property
    def summaries(self) -> list[Summary]:
        return summarise(self.samples, self.work.reference)


def table(finding: Finding, titles: Titles) -> list[list[str]]:
    """Return the rows of a table, the heading first."""
    unit = finding.work.unit
    reference = titles.get(finding.work.reference, finding.work.reference)
    heading = ["server", f"ratio to {reference}", "from - to", f"µs for {unit}", "a second"]
    heading += ["p50 ms", "p99 ms", "p99.9 ms", "KB a connection", "failures"]
    rows = [_row(summary, titles) for summary in finding.summaries]
    return _without_empty_columns([heading, *rows])


def _row(summary: Summary, titles: Titles) -> list[str]:
    ratios = summary.ratios
    return [
        titles.get(summary.peer, summary.peer),
        _number(summary.ratio, 2),
        f"{min(ratios):.2f} - {max(ratios):.2f}" if ratios else "",
        _number(summary.cost, 1, unit=1e-6),
        _number(summary.throughput, 0),
        _number(summary.p50, 2, unit=1e-3),
        _number(summary.p99, 2, unit=1e-3),
        _number(summary.p999, 2, unit=1e-3),
        _number(summary.bytes_per_connection, 1, unit=1024),
        str(summary.failures or ""),
    ]


def render_text(rows: Sequence[Sequence[str]]) -> str:
    """Align a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def render_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, its figures aligned to the right."""
    heading, *body = rows
    ruler = ["---", *("---:" for _ in heading[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ruler, *body))


def write_results(
    folder: Path,
    findings: Sequence[Finding],
    titles: Titles,
    circumstances: Mapping[str, str],
) -> list[Path]:
    """Write ``measurements.md``, ``.json`` and ``.svg`` into a folder, over older ones.

    Args:
        folder: Made when it does not exist.
        findings: What was measured.
        titles: What tables call each peer.
        circumstances: The machine, versions, commit and scale, by name.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "measurements.md": _markdown(findings, titles, circumstances),
        "measurements.json": _json(findings, circumstances),
        "measurements.svg": _svg(findings, titles, circumstances),
    }
    paths = []
    for name, content in contents.items():
        paths.append(folder / name)
        paths[-1].write_text(content, encoding="utf-8")
    return paths


def _markdown(findings: Iterable[Finding], titles: Titles, circumstances: Mapping[str, str]) -> str:
    parts = [
        "# Measurements",
        INTRODUCTION,
        "\n".join(f"- {name}: {value}" for name, value in circumstances.items()),
    ]
    for finding in findings:
        parts += [f"## {finding.work.title}", render_markdown(table(finding, titles))]
    return "\n\n".join(parts) + "\n"


def _svg(findings: Iterable[Finding], titles: Titles, circumstances: Mapping[str, str]) -> str:
    panels = []
    for finding in findings:
        panels.append(_cost_panel(finding, titles))
        panels.append(_memory_panel(finding, titles))
    machine, commit = circumstances.get("machine", ""), circumstances.get("commit", "")
    return draw(
        "Processor time of the server, as a multiple of what C (or Redis) needs",
        f"Shorter is better; lines show the range of the rounds. {machine}; commit {commit}.",
        [panel for panel in panels if panel.bars],
    )


def _cost_panel(finding: Finding, titles: Titles) -> Panel:
    summaries = [summary for summary in finding.summaries if summary.ratios]
    bars = [
        _bar(summary, finding, titles, median(summary.ratios), summary.ratios)
        for summary in summaries
    ]
    return Panel(finding.work.title, 2, bars)


def _memory_panel(finding: Finding, titles: Titles) -> Panel:
    bars = []
    for summary in finding.summaries:
        if summary.bytes_per_connection is not None:
            size = summary.bytes_per_connection / 1024
            bars.append(_bar(summary, finding, titles, size, [size]))
    return Panel("KB of memory for an idle connection", 1, sorted(bars, key=lambda bar: bar.value))


def _bar(
    summary: Summary, finding: Finding, titles: Titles, value: float, values: Sequence[float]
) -> Bar:
    is_own = summary.peer.startswith("portico")
    is_reference = summary.peer == finding.work.reference
    kind = "own" if is_own else "reference" if is_reference else ""
    return Bar(titles.get(summary.peer, summary.peer), kind, value, min(values), max(values))


def _json(findings: Iterable[Finding], circumstances: Mapping[str, str]) -> str:
    samples = [asdict(sample) for finding in findings for sample in finding.samples]
    return json.dumps({"circumstances": circumstances, "samples": samples}, indent=1) + "\n"


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


def _without_empty_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*columns, strict=True)]
