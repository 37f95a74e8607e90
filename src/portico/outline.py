"""Write a configuration down, as a file of settings that says where each value comes from.

Owns that text, which `portico.settings_file` can read again.  Opens nothing, and shows of a key
the path alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from os import PathLike
from typing import Any, Final, cast

from portico.configuration import Configuration, ServiceSettings
from portico.layers import Values
from portico.notation import NONE, NOTATIONS, OF_PROCESS, OF_SERVICE, in_toml
from portico.settings_file import SERVICES
from portico.sources import SourcedConfiguration

WIDTH: Final = 56
"""Letters of a value that pushes the origins of the others to the right; of no longer one."""

ALWAYS: Final = frozenset({"workers", "target", "addresses", "engine"})
"""What is shown even if it is a default: it says what would run."""


def outline(reading: SourcedConfiguration, *, with_defaults: bool = False) -> Iterator[str]:
    """Yield the lines.

    Args:
        reading: The configuration, and where its values come from.
        with_defaults: Whether to show what nobody gave, too.
    """
    configuration, origins = reading.configuration, reading.origins
    yield f"# {_processes(configuration)}"
    process = _values(configuration.process, OF_PROCESS)
    yield from _lines(process, origins.process, with_defaults=with_defaults)
    for service in configuration.services:
        yield ""
        yield f"[{SERVICES}.{service.name}]"
        values = _values(service.settings, OF_SERVICE) | _served(service)
        shown = {name: values[name] for name in OF_SERVICE}  # in the order of their page
        yield from _lines(shown, origins.services[service.name], with_defaults=with_defaults)


def _processes(configuration: Configuration) -> str:
    """Say how many processes serve."""
    number = configuration.process.worker_count()
    if number == 0:
        return "One process serves."
    return f"{number} worker{'s' * (number != 1)} under a supervisor serve{'s' * (number == 1)}."


def _served(service: ServiceSettings) -> dict[str, object]:
    return {"target": service.target, "addresses": [str(each) for each in service.addresses]}


def _values(settings: Any, names: Iterable[str]) -> dict[str, object]:
    own = {field.name for field in fields(settings)}
    return {name: getattr(settings, name) for name in names if name in own}


def _lines(values: Mapping[str, object], origins: Values, *, with_defaults: bool) -> list[str]:
    shown = {
        _assignment(name, value): str(origins[name].origin) if name in origins else "default"
        for name, value in values.items()
        if name in origins or with_defaults or name in ALWAYS
    }
    width = max((len(each) for each in shown if len(each) <= WIDTH), default=0)
    return [f"{each:<{width}}  # {' '.join(origin.split())}" for each, origin in shown.items()]


def _assignment(name: str, value: object) -> str:
    if value is None and not NOTATIONS[name].has_none:
        return f"# {name} follows from the others"
    return f"{name} = {in_toml(_plain(value))}"


def _plain(value: object) -> object:
    """Return a value as TOML has it."""
    match value:
        case None:
            return NONE
        case bytes():
            return value.decode("utf-8", "replace")
        case PathLike():
            return os.fspath(cast("PathLike[str]", value))
        case str() | int() | float():
            return value
        case _:
            return [str(each) for each in cast("Iterable[object]", value)]
