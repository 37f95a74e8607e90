"""``portico doctor``: say what was found, and exit with 1 if something does not work.

Owns the words on the terminal.  Leaves what is found to `portico.doctor`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import click

from portico import address, doctor, target
from portico.configuration import Configuration, ProcessSettings, ServiceSettings
from portico.doctor.findings import Finding, Severity
from portico.doctor.trial import TrialRequest
from portico.engines import ENGINES
from portico.errors import PorticoError
from portico.settings import Settings

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
@click.argument("target_name", metavar="TARGET")
@click.argument("address_texts", metavar="ADDRESS...", nargs=-1, required=True)
@click.option("--engine", type=click.Choice(list(ENGINES)), default="threads", show_default=True)
@click.option("--workers", metavar="N", help="Worker processes, or auto.")
@click.option("--max-connections", metavar="N", help="Connections at once, or none.")
@click.option("--backlog", type=click.IntRange(min=1), metavar="N", help="Connections in waiting.")
@click.option("--cert", metavar="FILE", help="Certificate of tls:// addresses.")
@click.option("--key", metavar="FILE", help="Its key, if it is in another file.")
@click.option("--client-ca", metavar="FILE", help="Authorities of client certificates.")
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
def command(
    target_name: str,
    address_texts: tuple[str, ...],
    *,
    trial: float | None,
    say: str,
    quiet: bool,
    **options: Any,
) -> int:
    """Look whether this machine allows what a service is to do.

    TARGET and ADDRESS are those of portico serve. The target is imported; nothing is changed.
    Exits with 0, or with 1 if something does not work.
    """
    try:
        configuration = _configured(target_name, address_texts, options)
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


def _configured(
    target_name: str, address_texts: Iterable[str], options: dict[str, Any]
) -> Configuration:
    """Make a configuration of what the command line says.

    Raises:
        PorticoError: Something of it cannot be read.
    """
    target.read(target_name)
    workers = options.pop("workers")
    values = {name: value for name, value in options.items() if value is not None}
    if "max_connections" in values:
        values["max_connections"] = _limit(values["max_connections"])
    return Configuration(
        process=ProcessSettings(workers=_limit(workers) if workers is not None else None),
        services=(
            ServiceSettings(
                name="portico",
                target=target_name,
                addresses=tuple(address.parse(text) for text in address_texts),
                settings=Settings.read(values),
            ),
        ),
    )


def _limit(text: str) -> Any:
    """Read a number, ``auto`` or ``none``; anything else is left for the settings to refuse."""
    if text == "none":
        return None
    return int(text) if text.isascii() and text.isdecimal() else text
