"""Lay what several sources give over each other, and remember where each value comes from.

Owns which of them wins, and the words for where a value stands.  Reads nothing: what a source gives
is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NoReturn, TypeAlias, cast

from portico.address import Address
from portico.engines import HUBS_OF, WORKERS_OF
from portico.errors import SettingError
from portico.notation import OF_PROCESS, OF_SERVICE, in_toml, words_in_text, words_in_toml
from portico.settings import Settings


class Source(IntEnum):
    """Where values come from; the later one wins."""

    KEYWORD = 1
    FILE = 2
    VARIABLE = 3
    OPTION = 4


class SourceError(SettingError):
    """A value that stands in a file or a variable is wrong; the error says where it stands.

    Attributes:
        place: The file and the key with the value, or the variable with it.
    """

    place: str

    def __init__(self, place: str, name: str, value: object, expected: str) -> None:
        super().__init__(name, value, expected)
        self.args = (place, name, value, expected)
        self.place = place

    def __str__(self) -> str:
        return f"{self.place}: expected {self.expected}"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from.

    Attributes:
        source: What kind of place that is.
        name: The name in a program, the key with those of its tables, the variable, or the option.
        file: The file.
        is_general: Whether it was not said of one service alone.
    """

    source: Source
    name: str
    file: str = ""
    is_general: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.name}" if self.file else self.name

    def refuse(self, name: str, value: object, expected: str) -> NoReturn:
        """Raise the error that says where a wrong value stands.

        Raises:
            SettingError: Always; of a program and an option the name says enough.
        """
        match self.source:
            case Source.FILE:
                place = f"{self} = {in_toml(value)}"
                raise SourceError(place, name, value, words_in_toml(expected)) from None
            case Source.VARIABLE:
                place = f"{self}={value}"
                raise SourceError(place, name, value, words_in_text(expected)) from None
            case _:
                raise SettingError(name, value, expected) from None


@dataclass(frozen=True, slots=True)
class Given:
    """A value that somebody gave.

    Attributes:
        value: What it means.
        written: What stands there.
        origin: Where that is.
    """

    value: object
    written: object
    origin: Origin


Values: TypeAlias = Mapping[str, Given]


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source gives.

    Attributes:
        general: What it says of the processes, and of every service.
        services: What it says of one service, by the names of the services.
    """

    general: Values = field(default_factory=dict[str, Given])
    services: Mapping[str, Values] = field(default_factory=dict[str, Values])


@dataclass(frozen=True, slots=True)
class Merged:
    """What holds in the end; what is not here was given by nobody.

    Attributes:
        process: Of the processes.
        services: Of each service, by its name.
    """

    process: Values
    services: Mapping[str, Values]


def merge(layers: Iterable[Layer], services: Iterable[str]) -> Merged:
    """Lay sources over each other.

    A later source wins, and what one says of a service alone wins over what it says of all.

    Args:
        layers: The sources, in the order of their `Source`.
        services: The services that there are.
    """
    layers = tuple(layers)
    process = _laid(layer.general for layer in layers)
    merged = {
        name: _laid(
            values for layer in layers for values in (layer.general, layer.services.get(name, {}))
        )
        for name in services
    }
    return Merged(
        {name: given for name, given in process.items() if name in OF_PROCESS},
        _where_it_fits(
            {
                service: {name: given for name, given in values.items() if name in OF_SERVICE}
                for service, values in merged.items()
            }
        ),
    )


def _laid(values: Iterable[Values]) -> dict[str, Given]:
    laid: dict[str, Given] = {}
    for each in values:
        laid |= each
    return laid


# ------------------------------------------------------------- what is of no use to every service


def _engine(values: Values) -> object:
    return values["engine"].value if "engine" in values else Settings.engine


def _has_hubs(values: Values) -> bool:
    return _engine(values) == HUBS_OF


def _has_workers(values: Values) -> bool:
    return _engine(values) == WORKERS_OF


def _has_tls(values: Values) -> bool:
    return any(address.scheme.is_tls for address in addresses(values))


FITS: Final[Mapping[str, Callable[[Values], bool]]] = {
    "hubs": _has_hubs,
    "max_workers": _has_workers,
    "cert": _has_tls,
    "key": _has_tls,
    "client_ca": _has_tls,
    "client_certificates": _has_tls,
}
"""Settings that are an error where they mean nothing, and whether they mean anything there."""


def addresses(values: Values) -> tuple[Address, ...]:
    """Return the addresses of a service."""
    given = values.get("addresses")
    return cast("tuple[Address, ...]", given.value) if given is not None else ()


def _where_it_fits(services: Mapping[str, Values]) -> Mapping[str, Values]:
    """Leave out what was said of all services, and is for others than this one.

    A certificate for everything is for the services with TLS.  Where it fits none, it stays, and is
    the error that it is.
    """
    fitting = [
        name for name, fits in FITS.items() if any(fits(values) for values in services.values())
    ]
    return {
        service: {
            name: given
            for name, given in values.items()
            if name not in fitting or not given.origin.is_general or FITS[name](values)
        }
        for service, values in services.items()
    }
