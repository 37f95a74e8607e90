"""Read the command line, and say what happens: ``portico serve``, ``check`` and ``run``.

Owns the words on the terminal and the exit status: 0 after a stop, 2 for what was asked wrongly.
Leaves the options that are settings to `portico.options`.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, TypeVar

import click

import portico
from portico import console, options, privileges, program, reloader, swap, target
from portico.assembly import load_certificates
from portico.configuration import Configuration
from portico.console import say
from portico.doctor import command as doctor
from portico.engines import ENGINES
from portico.engines import settings as engine_settings
from portico.errors import PorticoError
from portico.outline import outline
from portico.sources import SourcedConfiguration, Sources
from portico.worker import leave

_T = TypeVar("_T")


class Loader:
    """Reads a configuration when it is asked to, and remembers what it read last."""

    def __init__(self, sources: Sources) -> None:
        self.reading: SourcedConfiguration | None = None
        self._sources = sources

    def load(self) -> Configuration:
        """Read it anew.

        Raises:
            PorticoError: A value is wrong; the error says where it stands.
        """
        reading = self.reading = self._sources.read()
        return reading.configuration

    def files(self) -> list[Path]:
        """Return the files that it was read from."""
        file = self.reading.file if self.reading else None
        return [] if file is None else [file.path]

    def explaining(self, action: Callable[[], _T]) -> _T:
        """Do something with it; what is wrong with a value, or what it names, says where it stands.

        Raises:
            PorticoError: What went wrong.
        """
        try:
            return action()
        except PorticoError as error:
            raise (self.reading.explained(error) if self.reading else error) from error


class Refusal(click.ClickException):
    """What was asked cannot be done; said in one line."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Say the reason on standard error, whatever the file."""
        say(f"error: {' '.join(self.message.split())}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(portico.__version__, prog_name="portico", message="%(prog)s %(version)s")
def commands() -> None:
    """Python's socketserver, grown up."""


@commands.command()
@options.configured
@click.option("--reload", is_flag=True, help="Start anew when a file changes, in development.")
def serve(*, reload: bool, **given: Any) -> Callable[[], None] | None:
    """Serve until SIGINT or SIGTERM: what a file says, or TARGET at each ADDRESS.

    \b
    TARGET is a handler: MODULE:HANDLER or PATH.py:HANDLER.
    ADDRESS is where it listens:
      tcp://127.0.0.1:9000    port 0 lets the system choose
      tcp://[::1]:9000        IPv6
      tcp://:9000             every address of this machine, IPv6 and IPv4
      tls://127.0.0.1:9443    TCP with TLS; needs --cert
      udp://127.0.0.1:9000    datagrams
      unix:/run/echo.sock     a path; unix:@echo is an abstract name
      unix-datagram:/run/echo.sock

    A limit is a number, or none.  An option wins over a variable such as PORTICO_IDLE_TIMEOUT,
    and that over the file.
    """  # noqa: D301  # \b is click's, and keeps the lines apart
    with _refused():
        loader = Loader(options.sources(**given))
        if reload:
            loader.explaining(lambda: reloader.run(loader.load, loader.files))
            return None
        has_left_handlers = loader.explaining(lambda: program.run(loader.load))
    # Python would take itself down under the handlers that still run, and a thread that is ended in
    # the middle of a greenlet takes the process with it (SIGSEGV).
    return partial(leave, 0) if has_left_handlers else None


@commands.command()
@options.configured
@click.option("--all", "with_defaults", is_flag=True, help="Show the defaults, too.")
@click.option("--no-import", is_flag=True, help="Do not import the targets, nor look for users.")
def check(*, with_defaults: bool, no_import: bool, **given: Any) -> None:
    """Say what portico serve would run, and where each value comes from.

    Imports the targets, loads the certificates and looks for the users and groups, and opens no
    address.  What is printed is a file with settings itself.
    """
    with _refused():
        loader = Loader(options.sources(**given))
        loader.explaining(lambda: _verify(loader.load(), imports=not no_import))
    if loader.reading is not None:
        for name in loader.reading.configuration.process.unused():
            say(f"{name} has no use without workers")
        for line in outline(loader.reading, with_defaults=with_defaults):
            click.echo(line)


@commands.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    default="threads",
    show_default=True,
    help="What stands behind ThreadingMixIn.",
)
@options.hubs_option
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
        engine_settings(engine, hubs=hubs)
    # Returned, and not called: what the program raises is not for click to catch.
    return partial(_run_program, program, args, engine=engine, hubs=hubs, is_module=is_module)


commands.add_command(doctor.command, "doctor")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command that `arguments` ask for, by default those of the process.

    Raises:
        SystemExit: Always; with the exit status.
    """
    console.complete()
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
        swap.tell_stalls()
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


def _verify(configuration: Configuration, *, imports: bool) -> None:
    """Make sure that what is named is there.

    Raises:
        PorticoError: It is not.
    """
    process = configuration.process
    if imports:  # whoever checks need not be able to become them
        privileges.look_up(process.user, process.group)
    for each in configuration.services:
        load_certificates(each.settings)
        if not imports:
            continue
        each.settings.socket_access()
        handler = target.load(each.target)
        for address in each.addresses:
            if not address.scheme.is_inherited:  # what is passed is not there yet
                target.check_scheme(each.target, handler, address.scheme)


@contextmanager
def _refused() -> Generator[None]:
    """Turn what is wrong with the command line into one line for its user."""
    try:
        yield
    except PorticoError as error:
        raise Refusal(str(error)) from error
    except OSError as error:
        if error.errno not in {errno.EMFILE, errno.ENFILE}:
            raise
        expected = "a higher limit of descriptors (`ulimit -n`, LimitNOFILE= of systemd)"
        raise Refusal(f"cannot open what is needed to serve: expected {expected}") from error
