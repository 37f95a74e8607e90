"""Make a configuration of what several sources say: a program, a file, variables and options.

Owns which of them are asked, and what a service has to have.  Leaves each of them to its own
module, and who wins to `portico.layers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn

from portico import environment
from portico.address import parse
from portico.configuration import Configuration, ProcessSettings, ServiceSettings
from portico.counters import MOST_ADDRESSES
from portico.errors import CertificateError, PorticoError, SettingError
from portico.layers import (
    Given,
    Layer,
    Merged,
    Origin,
    Source,
    SourceError,
    Values,
    addresses,
    merge,
)
from portico.notation import NOTATIONS, words_in_toml
from portico.settings import Settings
from portico.settings_file import FILE, PROJECT, TABLE, SettingsFile
from portico.target import TargetError

ONLY: Final = "portico"
"""What a service is called that has no name of its own."""

FAR: Final = frozenset({Source.FILE, Source.VARIABLE})
"""Where values stand that are not in front of the user."""

FILES: Final = ("cert", "key", "client_ca")
"""The settings that name what TLS is made of."""


class ConfigurationError(PorticoError):
    """The sources do not say what to serve."""


@dataclass(frozen=True, slots=True)
class SourcedConfiguration:
    """What the sources say.

    Attributes:
        configuration: All of it.
        origins: What was given for it, and where; what is not there has its default.
        file: The file that was read; ``None`` if there was none.
    """

    configuration: Configuration
    origins: Merged
    file: SettingsFile | None

    def explained(self, error: PorticoError) -> PorticoError:
        """Return an error about a value, or what it names, that says where the value stands."""
        for values in (self.origins.process, *self.origins.services.values()):
            for name, given in values.items():
                if given.origin.source in FAR and _is_about(error, name, given.value):
                    return _placed(error, given)
        return error


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The places that are asked.

    Attributes:
        keywords: What a program says, by the names of the settings.
        directory: Where a file is looked for.
        config: The file that somebody named; ``None`` to look for one.
        variables: The environment.
        options: What the command line says.  A target in it is all that is served: no file is
            looked for then, and of one that was named, the services are left out.
        services: The names of those to be served; none for all.
    """

    keywords: Mapping[str, object] = field(default_factory=dict[str, object])
    directory: Path = field(default_factory=Path.cwd)
    config: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    options: Layer = field(default_factory=Layer)
    services: Sequence[str] = ()

    def read(self) -> SourcedConfiguration:
        """Ask all of them, anew each time.

        Raises:
            PorticoError: A value is wrong, or there is nothing to serve; the error says where.
        """
        file = self._file()
        from_file = file.read() if file else Layer()
        from_variables = environment.read(self.variables, from_file.services)
        layers = [_from_keywords(self.keywords), from_file, from_variables, self.options]
        named = tuple(from_file.services)
        if "target" in self.options.general:
            if self.services:
                raise ConfigurationError("expected no TARGET beside --service, or no --service")
            layers = [*map(_without_services, layers[:-1]), self.options]
            named = ()
        _check_addresses(layers, named)
        merged = _chosen(self.services, merge(layers, named or (ONLY,)))
        process = _process(merged.process)
        places = {name: file.place(name) for name in named} if file else {}
        services = tuple(
            _service(name, values, places.get(name) or self._place(file))
            for name, values in merged.services.items()
        )
        _check_number(process, services)
        read = SourcedConfiguration(Configuration(process=process, services=services), merged, file)
        # So that a worker, too, can say where a value stands that it cannot use.
        return replace(read, configuration=replace(read.configuration, explain=read.explained))

    def _place(self, file: SettingsFile | None) -> str:
        """Say where a service stands that has no table; nothing if that is no file."""
        return file.shown if file and "target" not in self.options.general else ""

    def _file(self) -> SettingsFile | None:
        if self.config is not None:
            return SettingsFile.named(self.config, self.directory)
        if "target" in self.options.general:
            return None
        return SettingsFile.found(self.directory)


def _from_keywords(keywords: Mapping[str, object]) -> Layer:
    """Return what a program says, which is not written but meant."""
    for name, value in keywords.items():
        if name not in NOTATIONS:
            nearest = get_close_matches(name, NOTATIONS, n=1) or ["idle_timeout"]
            raise SettingError(name, value, f"the name of a setting, such as {nearest[0]!r}")
    return Layer(
        {
            name: Given(_meant(name, value), value, Origin(Source.KEYWORD, name))
            for name, value in keywords.items()
        }
    )


def _meant(name: str, value: Any) -> object:
    """Return the value that a program means: of addresses, which may be texts, those."""
    if name != "addresses":
        return value
    several = (value,) if isinstance(value, str) else value
    return tuple(parse(each) if isinstance(each, str) else each for each in several)


def _without_services(layer: Layer) -> Layer:
    """Leave out of a source what it says of services of its own."""
    own = {"target", "addresses"}
    return Layer({name: given for name, given in layer.general.items() if name not in own})


def _chosen(wanted: Sequence[str], merged: Merged) -> Merged:
    """Return what holds for the services to be served, in the order of the file."""
    names = list(merged.services)
    for name in wanted:
        if name not in names:
            nearest = get_close_matches(name, names, n=1) or names
            raise SettingError("service", name, " or ".join(map(repr, nearest)))
    chosen = {name: merged.services[name] for name in names if not wanted or name in wanted}
    return Merged(merged.process, chosen)


def _check_addresses(layers: Iterable[Layer], services: Sequence[str]) -> None:
    """Make sure that several services are not asked to have the same addresses."""
    if len(services) < 2:
        return
    for layer in layers:
        given = layer.general.get("addresses")
        if given is not None:
            where = f"it in each table of {', '.join(services)}, since an address has one service"
            given.origin.refuse("addresses", given.written, where)


def _check_number(process: ProcessSettings, services: Iterable[ServiceSettings]) -> None:
    """Make sure that workers have a place to count in for each address."""
    count = sum(len(each.addresses) for each in services)
    if process.workers is not None and count > MOST_ADDRESSES:
        raise ConfigurationError(
            f"{count} addresses: expected {MOST_ADDRESSES} at the most with workers"
        )


# ------------------------------------------------------------------------------------- the result


def _process(values: Values) -> ProcessSettings:
    try:
        return ProcessSettings(**_plain(values))
    except SettingError as error:
        _refuse(error, values)


def _service(name: str, values: Values, place: str) -> ServiceSettings:
    """Make a service of what was given.

    Raises:
        PorticoError: A value is wrong, or there is no target or address.
    """
    plain = _plain(values)
    target, where = plain.pop("target", None), plain.pop("addresses", ())
    try:
        # Whether there is something to serve comes last: what stands there is seen to first.
        settings = Settings.read(plain)
        if target is None or not where:
            raise ConfigurationError(_missing(target, place))
        settings.check_addresses(addresses(values))
    except SettingError as error:
        if error.name not in values and place:
            raise ConfigurationError(f"{place}: expected {error.name}: {error.expected}") from None
        _refuse(error, values)
    return ServiceSettings(name=name, target=target, addresses=where, settings=settings)


def _plain(values: Values) -> dict[str, Any]:
    return {name: given.value for name, given in values.items()}


def _refuse(error: SettingError, values: Values) -> NoReturn:
    """Raise an error about a value with the place where it stands."""
    given = values.get(error.name)
    if given is None:
        raise error
    is_as_written = given.origin.source in FAR and error.value == given.value
    value = given.written if is_as_written else error.value
    given.origin.refuse(error.name, value, error.expected)


def _is_about(error: PorticoError, name: str, value: Any) -> bool:
    """Say whether something is wrong with this value, or with the handler or file it names."""
    match error:
        case SourceError():
            return False  # it says so
        case SettingError():
            return name == error.name and value == error.value
        case TargetError():
            return name == "target" and value == error.target
        case CertificateError():
            if name not in FILES or value is None:
                return False
            return Path(value).absolute() == Path(error.filename)
        case _:
            return False


def _placed(error: PorticoError, given: Given) -> PorticoError:
    """Return an error with the place of the value that it is about."""
    if not isinstance(error, SettingError):
        return ConfigurationError(f"{given.origin}: {error}")
    try:
        given.origin.refuse(error.name, given.written, error.expected)
    except SettingError as placed:
        return placed


def _missing(target: str | None, place: str) -> str:
    """Say what is missing.

    Args:
        target: The target, if that is given.
        place: Where the service stands; empty if there is no file.
    """
    if target is None and not place:
        return (
            f"nothing to serve: expected TARGET ADDRESS..., or a file {FILE} here "
            f"(or [{'.'.join(TABLE)}] in {PROJECT}), or one that --config names"
        )
    name = "target" if target is None else "addresses"
    return f"{place or target}: expected {name}: {words_in_toml(NOTATIONS[name].words)}"
