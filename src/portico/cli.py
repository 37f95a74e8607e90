"""Read the command line, and say what happens: ``portico serve`` and ``portico run``.

Owns the words on the terminal and the exit status: 0 after a stop, 2 for what was asked wrongly.
An option of ``portico serve`` that is not given leaves the default to `portico.settings`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import IO, Any, Final, NoReturn, TypeVar

import click

import portico
from portico import address, program, reloader, swap, target
from portico.configuration import Configuration, ProcessSettings, ServiceSettings
from portico.doctor import command as doctor
from portico.engines import ENGINES, HUBS_OF, WORKERS_OF
from portico.engines import settings as engine_settings
from portico.errors import PorticoError, SettingError
from portico.gate import WhenFull
from portico.settings import AUTO, CLIENT_CERTIFICATES, Settings

_Command = TypeVar("_Command", bound=Callable[..., Any])

LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")


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


_DEFAULTS: Final = Settings()

NO_LIMIT: Final = "none"
"""What stands for no limit on the command line."""


def _whole(name: str, text: str) -> object:
    """Read a number of connections."""
    if text.isascii() and text.isdecimal():
        return int(text)
    if text == AUTO:
        return text
    raise SettingError(name, text, f"a whole number, {AUTO!r}, or {NO_LIMIT} for no limit")


def _seconds(name: str, text: str) -> object:
    """Read a time."""
    try:
        return float(text)
    except ValueError:
        expected = f"a number of seconds, or {NO_LIMIT} for no limit"
        raise SettingError(name, text, expected) from None


def _workers(name: str, text: str) -> object:
    """Read a number of threads."""
    if text.isascii() and text.isdecimal():
        return int(text)
    raise SettingError(name, text, "1 or more")


READERS: Final[Mapping[str, Callable[[str, str], object]]] = {
    "max_workers": _workers,
    "max_connections": _whole,
    "max_connections_per_peer": _whole,
    "handshake_timeout": _seconds,
    "idle_timeout": _seconds,
    "request_timeout": _seconds,
    "drain_timeout": _seconds,
}
"""The settings that are numbers, or ``none``."""


def _limit_option(name: str, metavar: str, words: str) -> Callable[[_Command], _Command]:
    """Return the option for a setting that is a number or ``none``."""
    default = getattr(_DEFAULTS, name)
    shown = NO_LIMIT if default is None else f"{default:g}" if default != AUTO else AUTO
    return click.option(
        f"--{name.replace('_', '-')}", name, metavar=metavar, help=f"{words}  [default: {shown}]"
    )


def _networks_option(
    flag: str, name: str, words: str, metavar: str = "NETWORK"
) -> Callable[[_Command], _Command]:
    """Return the option for a setting that is several networks."""
    return click.option(flag, name, multiple=True, metavar=metavar, help=words)


def _protected(command: _Command) -> _Command:
    """Give a command the options of what protects it."""
    words = "|".join(word.value for word in WhenFull)
    for option in (
        click.option(
            "--max-workers",
            metavar="N",
            help=f"Threads of the {WORKERS_OF} engine at most.  [default: 64]",
        ),
        _limit_option("max_connections", "N", "Connections at once, at each address."),
        _limit_option("max_connections_per_peer", "N", "Those of one client's address."),
        click.option(
            "--when-full",
            metavar=f"[{words}]",
            help="What becomes of a client for whom there is no place.  [default: wait]",
        ),
        _networks_option(
            "--allow", "allowed_networks", "Who may come, such as 10.0.0.0/8 or ::1; repeatable."
        ),
        _networks_option("--deny", "denied_networks", "Who may not; repeatable."),
        _limit_option("handshake_timeout", "SECONDS", "For the TLS handshake and PROXY header."),
        _limit_option("idle_timeout", "SECONDS", "A connection without a byte ends after these."),
        _limit_option("request_timeout", "SECONDS", "Any connection ends after these."),
        _limit_option("drain_timeout", "SECONDS", "For open connections to finish at the stop."),
        click.option(
            "--cert", metavar="FILE", help="Certificate of tls:// addresses; read when it changes."
        ),
        click.option("--key", metavar="FILE", help="Its key, if it is in another file."),
        click.option(
            "--client-ca",
            metavar="FILE",
            help="Authorities of client certificates, which are required then.",
        ),
        click.option(
            "--client-certificates",
            metavar=f"[{'|'.join(CLIENT_CERTIFICATES)}]",
            help="Whether a client needs one.  [default: required with --client-ca]",
        ),
        _networks_option(
            "--proxy-protocol",
            "proxy_protocol",
            "Proxies whose PROXY header is believed; repeatable.",
            "FROM",
        ),
    )[::-1]:
        command = option(command)
    return command


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
@_protected
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS),
    default="info",
    show_default=True,
    help="What is told of the servers; what each connection does is told at debug.",
)
@click.option("--reload", is_flag=True, help="Start anew when a file changes, in development.")
def serve(
    target_name: str,
    address_texts: tuple[str, ...],
    *,
    reload: bool,
    log_level: str,
    **options: Any,
) -> Callable[[], None] | None:
    """Serve a handler at each ADDRESS until SIGINT or SIGTERM.

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

    A limit is a number, or none.
    """  # noqa: D301  # \b is click's, and keeps the lines apart
    with _refused():
        # Looked at first: nothing of the target's has run yet.
        settings = _read(options)
        target.read(target_name)  # an address in its place is no address that is wrong
        addresses = tuple(address.parse(text) for text in address_texts)
        configuration = Configuration(
            process=ProcessSettings(log_level=log_level),
            services=(
                ServiceSettings(
                    name="portico", target=target_name, addresses=addresses, settings=settings
                ),
            ),
        )
        if reload:
            reloader.run(lambda: configuration)
            return None
        has_left_handlers = program.run(lambda: configuration)
    return _leave if has_left_handlers else None


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
        engine_settings(engine, hubs=hubs)
    # Returned, and not called: what the program raises is not for click to catch.
    return partial(_run_program, program, args, engine=engine, hubs=hubs, is_module=is_module)


commands.add_command(doctor.command, "doctor")


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


def _leave() -> None:
    """End the process at once, with the handlers that still run in it.

    Python would take itself down under them, and a thread that is ended in the middle of a greenlet
    takes the process with it (SIGSEGV).  The program's exit handlers do not run.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(0)


def _read(options: Mapping[str, Any]) -> Settings:
    """Make settings of the options that were given.

    Raises:
        SettingError: One of them is wrong.
    """
    values: dict[str, Any] = {}
    for name, given in options.items():
        if given is None or given == ():
            continue
        read = READERS.get(name)
        if read is None:
            values[name] = given
        else:
            values[name] = None if given.lower() == NO_LIMIT else read(name, given.lower())
    return Settings.read(values)


@contextmanager
def _refused() -> Generator[None]:
    """Turn what is wrong with the command line into one line for its user."""
    try:
        yield
    except PorticoError as error:
        raise Refusal(str(error)) from error
