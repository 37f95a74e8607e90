"""``portico doctor``: say what was found, and exit with 1 if something does not work.

Owns the words on the terminal.  Leaves what is found to `portico.doctor`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import click

from portico import doctor, options
from portico.doctor.findings import Finding, Severity
from portico.doctor.trial import TrialRequest
from portico.errors import PorticoError

NAMES: Final = {Severity.OK: "fine", Severity.WARN: "to mend soon", Severity.FAIL: "to mend"}

COLOURS: Final = {Severity.OK: "green", Severity.WARN: "yellow", Severity.FAIL: "red"}

LONGEST_TRIAL: Final = 600.0
"""Seconds that a trial may take."""


class Refused(click.UsageError):
    """What was asked cannot be looked at; said in one line."""

    def show(self, file: Any = None) -> None:
        """Print the reason to standard error."""
        click.echo(f"portico: error: {' '.join(self.message.split())}", file=file, err=True)


@click.command()
@options.configured
@click.option(
    "--trial",
    type=click.FloatRange(min=0.1, max=LONGEST_TRIAL),
    metavar="SECONDS",
    help="Serve each handler for so long, on loopback, and tell where it blocks.",
)
@click.option(
    "--say",
    default="",
    metavar="TEXT",
    help="What each client of the trial sends; \\n, \\r, \\t and \\xHH stand for what they do in "
    "Python.",
)
@click.option("--quiet", is_flag=True, help="Leave out what is fine.")
def command(*, trial: float | None, say: str, quiet: bool, **given: Any) -> int:
    """Look whether this machine allows what portico serve would do.

    What a file says, or TARGET at each ADDRESS, as for portico serve.  The targets are imported;
    nothing is changed.  Exits with 0, or with 1 if something does not work.
    """
    try:
        configuration = options.sources(**given).read().configuration
    except PorticoError as error:
        raise Refused(str(error)) from error
    request = None if trial is None else TrialRequest(trial, spoken(say))
    findings = doctor.examine(configuration, request)
    click.echo("\n".join(report(findings, quiet=quiet)))
    return int(any(each.severity is Severity.FAIL for each in findings))


def report(findings: Iterable[Finding], *, quiet: bool = False) -> list[str]:
    """Return the lines that say what was found, and how many of each there are.

    Args:
        findings: What was found.
        quiet: Whether to leave out what is fine.
    """
    lines: list[str] = []
    counts: Counter[Severity] = Counter()
    for each in findings:
        counts[each.severity] += 1
        if quiet and each.severity is Severity.OK:
            continue
        mark = click.style(f"{each.severity:4}", fg=COLOURS[each.severity])
        lines.append(f"{mark}  {each.subject}: {each.found}")
        if each.wanted:
            lines.append(f"      wanted: {each.wanted}")
        if each.remedy:
            lines.append(f"      remedy: {each.remedy}")
    lines.append(", ".join(f"{counts[each]} {name}" for each, name in NAMES.items()))
    return lines


def spoken(text: str) -> bytes:
    """Return the bytes that a text stands for, in which a backslash means what it does in Python.

    Raises:
        Refused: It means nothing.
    """
    try:
        # It reads bytes as Latin-1, so that what is no backslash comes back as the byte it was.
        return text.encode().decode("unicode_escape").encode("latin-1")
    except (UnicodeDecodeError, UnicodeEncodeError):
        raise Refused(
            f"--say {text!r}: expected \\n, \\r, \\t or \\xHH after a backslash"
        ) from None
