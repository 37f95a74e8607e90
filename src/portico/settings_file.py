"""Read the file with the settings: ``portico.toml``, or ``[tool.portico]`` in ``pyproject.toml``.

Owns where it is looked for, its tables, and what is wrong with it.  Leaves the values to
`portico.notation`.

Source: TOML 1.0; PEP 518 and the specification of ``pyproject.toml`` (``[tool.NAME]``).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from portico import target
from portico.address import Address, UnixAddress, parse
from portico.errors import AddressError, PorticoError
from portico.layers import Given, Layer, Origin, Source
from portico.notation import NOTATIONS, OF_PROCESS, OF_SERVICE, Form, NotationError, in_toml

FILE: Final = "portico.toml"
PROJECT: Final = "pyproject.toml"
TABLE: Final = ("tool", "portico")
"""Where the settings are in `PROJECT`."""

SERVICES: Final = "services"
"""The table with a table for each service."""

SERVICE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

_POSITION: Final = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


class SettingsFileError(PorticoError):
    """A file with settings cannot be read.

    Attributes:
        place: The file, with the line and the column or the key if they are known.
        reason: What is wrong, and what would be right.
    """

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(place, reason)
        self.place, self.reason = place, reason

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """A file with settings.

    Attributes:
        path: Where it is.
        shown: What it is called in messages.
        folder: What stands before the relative paths in it; empty for the current directory.
    """

    path: Path
    shown: str
    folder: str = ""

    @classmethod
    def named(cls, name: str, directory: Path) -> SettingsFile:
        """Return the file that somebody named.

        Args:
            name: Its path, from the directory.
            directory: The current one.
        """
        return cls(directory / name, name, os.path.dirname(name))  # noqa: PTH120  # as it is written

    @classmethod
    def found(cls, directory: Path) -> SettingsFile | None:
        """Look for the file in a directory; ``None`` if it is not there.

        Raises:
            SettingsFileError: There is a `PROJECT` that cannot be read.
        """
        if (directory / FILE).exists():
            return cls.named(FILE, directory)
        project = cls.named(PROJECT, directory)
        if project.path.is_file() and _inner(project._parsed(), TABLE) is not None:
            return project
        return None

    def read(self) -> Layer:
        """Read the settings.

        Raises:
            SettingsFileError: It cannot be read, or is no TOML.
            SettingError: A value is wrong, or there is no setting of a name.
        """
        tables = TABLE if self.path.name == PROJECT else ()
        table = _inner(self._parsed(), tables)
        if table is None:
            raise SettingsFileError(self.shown, f"expected a table [{'.'.join(TABLE)}]")
        general = {name: value for name, value in table.items() if name != SERVICES}
        return Layer(
            self._values(general, tables, [*OF_PROCESS, *OF_SERVICE, SERVICES], is_general=True),
            self._services(table.get(SERVICES, {}), (*tables, SERVICES)),
        )

    def place(self, service: str) -> str:
        """Say where a service stands."""
        tables = TABLE if self.path.name == PROJECT else ()
        return str(Origin(Source.FILE, _key(*tables, SERVICES, service), self.shown))

    def _parsed(self) -> Mapping[str, Any]:
        try:
            text = self.path.read_bytes().decode()
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise SettingsFileError(f"{self.shown}:{line}", "expected text in UTF-8") from None
        except OSError as error:
            raise SettingsFileError(self.shown, f"cannot read it: {error.strerror}") from error
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise self._malformed(str(error), text) from None
        except (RecursionError, ValueError):  # of which the parser says nothing better
            expected = "expected no deeper nesting, and no longer number, than can be read"
            raise SettingsFileError(self.shown, expected) from None

    def _malformed(self, told: str, text: str) -> SettingsFileError:
        """Return the error for what is no TOML, with its place in front as in other tools."""
        match = _POSITION.search(told)
        if match is None:
            return SettingsFileError(self.shown, told)
        line, column = match.groups()
        if line is None:
            lines = text.split("\n")
            line, column = str(len(lines)), str(len(lines[-1]) + 1)
        return SettingsFileError(f"{self.shown}:{line}:{column}", told[: match.start()])

    def _services(self, tables: object, above: tuple[str, ...]) -> dict[str, dict[str, Given]]:
        found = _table(tables)
        if found is None:
            self._refuse(above, tables, f"tables such as [{'.'.join(above)}.web]")
        services: dict[str, dict[str, Given]] = {}
        for service, written in found.items():
            where = (*above, service)
            if not SERVICE_NAME.fullmatch(service):
                expected = "a name of letters, digits and hyphens, with a letter first"
                raise SettingsFileError(str(self._origin(where)), f"expected {expected}")
            table = _table(written)
            if table is None:
                self._refuse(where, written, f"a table [{'.'.join(where)}]")
            services[service] = self._values(table, where, [*OF_SERVICE], is_general=False)
        return services

    def _values(
        self,
        table: Mapping[str, object],
        above: tuple[str, ...],
        known: Iterable[str],
        *,
        is_general: bool,
    ) -> dict[str, Given]:
        values: dict[str, Given] = {}
        for name, written in table.items():
            where = (*above, name)
            if name not in known:
                self._refuse(where, written, _meant(name, known, is_general=is_general))
            notation = NOTATIONS[name]
            origin = self._origin(where, is_general=is_general)
            try:
                value = self._placed(notation.form, notation.from_toml(written))
            except NotationError as error:
                origin.refuse(name, error.value, error.expected)
            except AddressError as error:  # of one with its folder before it
                origin.refuse(name, error.address, error.expected)
            values[name] = Given(value, written, origin)
        return values

    def _placed(self, form: Form, value: Any) -> object:
        """Return a value with its paths as they are from the current directory.

        Raises:
            AddressError: With the folder before it, the path of a Unix socket is none any more.
        """
        if value is None or not self.folder:
            return value
        if form is Form.PATH:
            return self._path(value)
        if form is Form.ADDRESSES:
            return tuple(map(self._address, value))
        if form is Form.TARGET:
            place, attribute, is_file = target.read(value)
            return f"{self._path(place)}:{attribute}" if is_file else value
        return value

    def _path(self, path: str) -> str:
        return os.path.join(self.folder, path)  # noqa: PTH118  # as it is written, with its dots

    def _address(self, address: Address) -> Address:
        if not isinstance(address, UnixAddress) or address.is_abstract:
            return address
        path = self._path(address.path)
        # Read again, since it is longer now.  A folder may begin with what means something else in
        # an address: an abstract name, or a host.
        path = f"./{path}" if path.startswith("@") else re.sub("^/+", "/", path)
        return parse(f"{address.scheme}:{path}")

    def _origin(self, where: tuple[str, ...], *, is_general: bool = True) -> Origin:
        return Origin(Source.FILE, _key(*where), self.shown, is_general)

    def _refuse(self, where: tuple[str, ...], value: object, expected: str) -> NoReturn:
        self._origin(where).refuse(where[-1], value, expected)


def _table(value: object) -> Mapping[str, Any] | None:
    """Return a value if it is a table."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else None


def _inner(table: Mapping[str, Any], keys: Iterable[str]) -> Mapping[str, Any] | None:
    """Return the table in a table of a table; ``None`` if there is none."""
    found: Mapping[str, Any] | None = table
    for key in keys:
        found = _table(found.get(key)) if found is not None else None
    return found


def _key(*names: str) -> str:
    """Write a dotted key."""
    return ".".join(name if re.fullmatch(r"[\w-]+", name) else in_toml(name) for name in names)


def _meant(name: str, known: Iterable[str], *, is_general: bool) -> str:
    """Say which setting may have been meant."""
    if name in OF_PROCESS and not is_general:
        return "it at the top of the file, since it holds for all services"
    nearest = get_close_matches(name.lower().replace("-", "_"), list(known), n=1)
    if nearest:
        return f"the name of a setting: {nearest[0]!r}"
    return f"the name of a setting: one of {', '.join(map(repr, known))}"
