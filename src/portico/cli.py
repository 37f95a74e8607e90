"""Read the command line, and say what happens: ``portico serve`` and ``portico run``.

Owns the words on the terminal and the exit status: 0 after a stop, 2 for what was asked wrongly.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import IO, Any, Final, NoReturn

import click

import portico
from portico import address, logs, swap, target
from portico.engines import ENGINES, HUBS_OF, settings
from portico.errors import PorticoError
from portico.service import Service, Tally

LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Refusal(click.ClickException):
    """What was asked cannot be done; said in one line."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the reason to standard error."""
        click.echo(f"portico: error: {' '.join(self.message.split())}", file=file, err=True)


_hubs_option = click.option(
    "--hubs",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Threads of the {HUBS_OF} engine at most, each with an event loop.  [default: 1]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(portico.__version__, prog_name="portico", message="%(prog)s %(version)s")
def commands() -> None:
    """Python's socketserver, grown up."""


@commands.command()
@click.argument("target_name", metavar="TARGET")
@click.argument("address_texts", metavar="ADDRESS...", nargs=-1, required=True)
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="threads",
    show_default=True,
    help="What runs the handlers.",
)
@_hubs_option
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS),
    default="info",
    show_default=True,
    help="What is told of the servers; what each connection does is told at debug.",
)
def serve(
    target_name: str,
    address_texts: tuple[str, ...],
    *,
    engine: str,
    hubs: int | None,
    log_level: str,
) -> None:
    """Serve a handler at each ADDRESS until SIGINT or SIGTERM.

    \b
    TARGET is a handler: MODULE:HANDLER or PATH.py:HANDLER.
    ADDRESS is where it listens:
      tcp://127.0.0.1:9000    port 0 lets the system choose
      tcp://[::1]:9000        IPv6
      tcp://:9000             every address of this machine, IPv6 and IPv4
      udp://127.0.0.1:9000    datagrams
      unix:/run/echo.sock     a path; unix:@echo is an abstract name
      unix-datagram:/run/echo.sock
    """  # noqa: D301  # \b is click's, and keeps the lines apart
    with _refused():
        settings(engine, hubs=hubs)  # looked at first: nothing of the target's has run yet
        handler = target.load(target_name)
        addresses = [address.parse(text) for text in address_texts]
        for each in addresses:
            target.check_scheme(target_name, handler, each.scheme)
    with _logged(log_level):
        with _refused():
            serving = Service(handler, addresses, engine, hubs=hubs)
        with serving, serving.stopped_by_signals():
            for bound in serving.addresses:
                _say(f"ready on {bound}")
            started = time.monotonic()
            tallies = serving.run()
            _report(tallies, time.monotonic() - started)


@commands.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="threads",
    show_default=True,
    help="What stands behind ThreadingMixIn.",
)
@_hubs_option
@click.option(
    "-m", "is_module", is_flag=True, help="PROGRAM is the name of a module, as for python -m."
)
@click.argument("program")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(
    program: str, args: tuple[str, ...], *, engine: str, hubs: int | None, is_module: bool
) -> Callable[[], None]:
    """Run an unmodified program with portico in place of socketserver.

    What follows the program belongs to the program.
    """
    with _refused():
        settings(engine, hubs=hubs)
    # Returned, and not called: what the program raises is not for click to catch.
    return partial(_run_program, program, args, engine=engine, hubs=hubs, is_module=is_module)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command that `arguments` ask for, by default those of the process.

    Raises:
        SystemExit: Always; with the exit status.
    """
    try:
        outcome = commands.main(arguments, prog_name="portico", standalone_mode=False)
        if callable(outcome):
            outcome()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:  # SIGINT, before there was anything to stop
        sys.exit(130)
    sys.exit(outcome if isinstance(outcome, int) else 0)


def _run_program(
    program: str, args: Sequence[str], *, engine: str, hubs: int | None, is_module: bool
) -> None:
    """Run a program to its end, as python would: an error that it raises is printed, and exits."""
    try:
        swap.install(engine, hubs=hubs)
        (swap.run_module if is_module else swap.run_path)(program, args)
    except swap.ProgramError as error:
        raise Refusal(str(error)) from error
    except Exception as error:
        # Taken from the error itself, which is where python's own hook looks.
        error.__traceback__ = trace = _of_program(error.__traceback__)
        sys.excepthook(type(error), error, trace)
        sys.exit(1)


def _of_program(trace: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback that is the program's."""
    while trace is not None and trace.tb_frame.f_code.co_filename in {__file__, swap.__file__}:
        trace = trace.tb_next
    return trace


@contextmanager
def _refused() -> Generator[None]:
    """Turn what is wrong with the command line into one line for its user."""
    try:
        yield
    except PorticoError as error:
        raise Refusal(str(error)) from error


@contextmanager
def _logged(level: str) -> Generator[None]:
    """Log the servers' events, to standard error unless the target has arranged otherwise."""
    logging.basicConfig(format=LOG_FORMAT)
    logging.getLogger("portico").setLevel(level.upper())
    detach = logs.attach()
    try:
        yield
    finally:
        detach()


def _report(tallies: Sequence[Tally], seconds: float) -> None:
    """Say what was done, for each address when there are several."""
    if len(tallies) > 1:
        for tally in tallies:
            _say(f"{tally.address}: {_counts([tally])}")
    _say(f"stopped after {seconds:.1f} s: {_counts(tallies)}")


def _counts(tallies: Sequence[Tally]) -> str:
    served = sum(tally.served for tally in tallies)
    refused = sum(tally.refused for tally in tallies)
    cut_off = sum(tally.cut_off for tally in tallies)
    words = [f"{served} request{'s' * (served != 1)} served"]
    if refused:
        words.append(f"{refused} refused")
    if cut_off:
        words.append(f"{cut_off} cut off")
    return ", ".join(words)


def _say(text: str) -> None:
    click.echo(f"portico: {text}", err=True)
