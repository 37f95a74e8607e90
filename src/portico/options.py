"""Define the options of the command line that are settings.

Owns their spelling and their help.  An option that is not given leaves its setting to the other
sources, and at last to the default; how a value is read is `portico.notation`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from portico import address, target
from portico.configuration import LOG_LEVELS, ProcessSettings
from portico.directory import Directory
from portico.engines import ENGINES, HUBS_OF, WORKERS_OF
from portico.environment import CONFIG
from portico.gate import WhenFull
from portico.layers import Given, Layer, Origin, Source
from portico.notation import NONE, NOTATIONS, NotationError
from portico.settings import CLIENT_CERTIFICATES, Settings
from portico.sources import ConfigurationError, Sources

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

FLAGS: Final = {"allowed_networks": "--allow", "denied_networks": "--deny"}
"""The options that are not called as their settings are."""

_DEFAULTS: Final = {
    name: getattr(settings, name)
    for settings in (Settings(), ProcessSettings())
    for name in vars(settings)
}


def flag(name: str) -> str:
    """Return the option of a setting."""
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def _option(name: str, metavar: str, words: str, default: str = "", **more: Any) -> Any:
    """Return the option of a setting, whose help ends with the default if it has one."""
    help_text = f"{words}  [default: {default}]" if default else words
    return click.option(flag(name), name, metavar=metavar, help=help_text, **more)


def _number(name: str, metavar: str, words: str) -> Any:
    """Return the option of a setting that is a number, or a word in the place of one."""
    default = _DEFAULTS[name]
    shown = f"{default:g}" if isinstance(default, float) else default
    return _option(name, metavar, words, NONE if shown is None else str(shown))


def _word(name: str, words: Iterable[str], text: str, default: str) -> Any:
    return _option(name, f"[{'|'.join(words)}]", text, default)


def _several(name: str, metavar: str, words: str) -> Any:
    return _option(name, metavar, f"{words}; repeatable.", multiple=True)


hubs_option: Final = click.option(
    "--hubs",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Threads of the {HUBS_OF} engine at most, each with an event loop.  [default: 1]",
)
"""The one that `portico run` has, too."""

OF_SERVICE: Final = (
    click.option(
        "--engine",
        type=click.Choice(list(ENGINES)),
        help=f"What runs the handlers.  [default: {_DEFAULTS['engine']}]",
    ),
    hubs_option,
    _option("max_workers", "N", f"Threads of the {WORKERS_OF} engine at most.", "64"),
    _number("backlog", "N", "Connections that the system holds until they are accepted."),
    _option("socket_mode", "MODE", "Who may use a Unix socket, such as 0660.", "0600"),
    _option("socket_owner", "NAME", "Whose a Unix socket is."),
    _option("socket_group", "NAME", "The same for its group."),
    _number("max_connections", "N", "Connections at once, at each address."),
    _number("max_connections_per_peer", "N", "Those of one client's address."),
    _word("when_full", WhenFull, "What becomes of a client for whom there is no place.", "wait"),
    _option("farewell", "TEXT", "What a client is sent that is refused for want of a place."),
    _number("accept_rate", "N", "Connections, or datagrams, a second; more are refused."),
    _option("accept_burst", "N", "How many may come at once.", "those of one second"),
    _several("allowed_networks", "NETWORK", "Who may come, such as 10.0.0.0/8 or ::1"),
    _several("denied_networks", "NETWORK", "Who may not"),
    _number("handshake_timeout", "SECONDS", "For the TLS handshake and PROXY header."),
    _number("idle_timeout", "SECONDS", "A connection without a byte ends after these."),
    _number("request_timeout", "SECONDS", "Any connection ends after these."),
    _number("minimum_rate", "N", "Bytes a second that a client has to send when it is waited for."),
    _number("drain_timeout", "SECONDS", "For open connections to finish at the stop."),
    _option("cert", "FILE", "Certificate of tls:// addresses; read when it changes."),
    _option("key", "FILE", "Its key, if it is in another file."),
    _option("client_ca", "FILE", "Authorities of client certificates, which are required then."),
    _word(
        "client_certificates",
        CLIENT_CERTIFICATES,
        "Whether a client needs one.",
        "required with --client-ca",
    ),
    _several("proxy_protocol", "FROM", "Proxies whose PROXY header is believed"),
)

OF_PROCESS: Final = (
    _option("workers", "N|auto", "Processes that serve.", "none but this one"),
    _number("max_requests", "N", "A worker is replaced after so many."),
    _number("max_requests_jitter", "N", "Up to so many more, at random."),
    _number("max_worker_memory", "SIZE", "A worker is replaced beyond this, such as 512MiB."),
    _number(
        "worker_timeout", "SECONDS", "A worker without a sign of life is replaced after these."
    ),
    _number("start_timeout", "SECONDS", "For a worker to import its target and serve."),
    _option("user", "NAME", "Whom the processes run as, once the addresses are bound."),
    _option("group", "NAME", "The group.", "that of --user"),
    _option("pid_file", "FILE", "Holds the number of the process to send signals to."),
    _option("log_file", "FILE", "Where the log goes.", "standard error"),
    click.option(
        "--log-level",
        type=click.Choice(LOG_LEVELS),
        help=(
            "What is told of the servers; what each connection does is told at debug."
            f"  [default: {_DEFAULTS['log_level']}]"
        ),
    ),
)

OF_SOURCES: Final = (
    click.argument("target_name", metavar="[TARGET", required=False),
    click.argument("address_texts", metavar="ADDRESS...]", nargs=-1),
    click.option(
        "--config",
        metavar="FILE",
        envvar=CONFIG,
        help="The file with the settings.  [default: portico.toml, or [tool.portico] in "
        "pyproject.toml]",
    ),
    click.option(
        "--service",
        "services",
        metavar="NAME",
        multiple=True,
        help="Serve this one of the file, and not all; repeatable.",
    ),
)
"""What is to be served: by the command line, or by a file."""


def configured(command: Command) -> Command:
    """Give a command all that says what to serve, and how."""
    for option in reversed((*OF_SOURCES, *OF_SERVICE, *OF_PROCESS)):
        command = option(command)
    return command


def sources(
    target_name: str | None,
    address_texts: Sequence[str],
    *,
    config: str | None,
    services: Sequence[str],
    **given: Any,
) -> Sources:
    """Return where the values come from, with what the command line gives.

    Raises:
        click.UsageError: There is a target, and nowhere to serve it.
        PorticoError: An option, the target or an address cannot be read, or the current directory
            was removed.
    """
    values = layer(given)  # first: nothing of the target's has run yet
    if target_name is not None:
        if not address_texts:
            context = click.get_current_context(silent=True)
            raise click.UsageError("Missing argument 'ADDRESS...'.", context)
        target.read(target_name)  # an address in its place is no address that is wrong
        served = {"target": target_name, "addresses": tuple(map(address.parse, address_texts))}
        values |= {name: _of_argument(name, value) for name, value in served.items()}
    return Sources(
        directory=_here(),
        config=config,
        variables=os.environ,
        options=Layer(values),
        services=services,
    )


def _here() -> Path:
    """Return the current directory.

    Raises:
        ConfigurationError: It was removed.
    """
    try:
        return Directory.current().path
    except FileNotFoundError:
        reason = "the current directory was removed: expected to be started in one that is there"
        raise ConfigurationError(reason) from None


def layer(options: Mapping[str, Any]) -> dict[str, Given]:
    """Read the options that were given.

    Raises:
        SettingError: One is not written as its setting is.
    """
    return {
        name: Given(_read(name, written), written, Origin(Source.OPTION, flag(name)))
        for name, written in options.items()
        if written is not None and written != ()
    }


def _read(name: str, written: str | int | Sequence[str]) -> object:
    """Read the value of an option: a text, several of them, or the number that it is already."""
    if isinstance(written, int):
        return written
    text = written if isinstance(written, str) else " ".join(written)
    try:
        return NOTATIONS[name].from_text(text)
    except NotationError as error:
        return Origin(Source.OPTION, flag(name)).refuse(name, error.value, error.expected)


def _of_argument(name: str, value: object) -> Given:
    return Given(value, value, Origin(Source.OPTION, "the command line"))
