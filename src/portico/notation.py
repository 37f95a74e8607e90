"""Read how the value of a setting is written: in TOML, or as the text of a variable or an option.

Owns the forms of values, what TOML and a text have in place of ``None`` and of bytes, and the words
for what would be right.  Which form a setting has follows from its type.  Leaves ranges to
`portico.settings` and `portico.configuration`.

Sources: TOML 1.0 (it has no null, and whole numbers of 64 bits); IEC 80000-13 (what KiB, MiB and
GiB are).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from enum import Enum
from math import isfinite
from os import PathLike
from types import MappingProxyType, UnionType
from typing import Any, Final, Union, cast, get_args, get_origin, get_type_hints

from portico import address, target
from portico.configuration import ProcessSettings
from portico.errors import AddressError
from portico.settings import AUTO, Settings

NONE: Final = "none"
"""What stands for ``None`` everywhere but in a program."""

UNITS: Final[Mapping[str, int]] = MappingProxyType(
    {"": 1, "b": 1}
    | {f"{prefix}b": 1000**power for power, prefix in enumerate("kmg", 1)}
    | {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmg", 1)}
)
"""The bytes of each unit of a size, in small letters."""

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_SEPARATORS: Final = re.compile(r"[\s,]+")


class Form(Enum):
    """What kind of value it is; the words say what would be right."""

    WHOLE = "a whole number"
    NUMBER = "a number"
    SIZE = "a number of bytes, or a size such as '512 MiB'"
    WORD = "a text"
    BYTES = "a text to be sent"
    PATH = "the path of a file"
    ACCOUNT = "a name or a number"
    MODE = "a mode in octal, such as '0660'"
    NETWORKS = "networks such as ['10.0.0.0/8', '::1']"
    TARGET = "MODULE:HANDLER or PATH.py:HANDLER, such as 'app:Echo'"
    ADDRESSES = "addresses such as ['tcp://127.0.0.1:9000']"


class NotationError(Exception):
    """A value is not written as its setting is.

    Attributes:
        value: The part that is wrong, or all of it.
        expected: What would be right.
    """

    def __init__(self, value: object, expected: str) -> None:
        super().__init__(value, expected)
        self.value, self.expected = value, expected


@dataclass(frozen=True)
class Notation:
    """How the value of one setting is written.

    Attributes:
        form: What kind of value it is.
        words: What would be right.
        has_auto: Whether `portico.settings.AUTO` may stand in its place.
        has_none: Whether `NONE` may.
        none: What that means.
        is_limit: Whether it means that there is no limit.
    """

    form: Form
    words: str
    has_auto: bool = False
    has_none: bool = False
    none: object = None
    is_limit: bool = False

    def from_toml(self, value: object) -> object:
        """Read a value of TOML.

        Raises:
            NotationError: It is not written like this.
        """
        word = value.lower() if isinstance(value, str) else None
        if word == NONE and self.has_none:
            return self.none
        if word == AUTO and self.has_auto:
            return AUTO
        return self._read(FROM_TOML[self.form], value, NONE_IN_TOML)

    def from_text(self, text: str) -> object:
        """Read the text of a variable or an option.

        Raises:
            NotationError: It is not written like this.
        """
        if text.lower() == NONE and self.has_none:
            return self.none
        if text.lower() == AUTO and self.has_auto:
            return AUTO
        return self._read(FROM_TEXT[self.form], text, NONE)

    def _read(self, reader: Callable[[Any], object], value: object, none: str) -> object:
        try:
            return reader(value)
        except ValueError as error:
            raise NotationError(*_reason(error, value, self._expected(none))) from None

    def _expected(self, none: str) -> str:
        choices = [self.words]
        if self.has_auto:
            choices.append(repr(AUTO))
        if self.has_none:
            choices.append(f"{none} for no limit" if self.is_limit else none)
        *first, last = choices
        return f"{', '.join(first)}, or {last}" if first else last


NONE_IN_TOML: Final = repr(NONE)


def in_toml(value: Any) -> str:
    """Write a value as it stands in a file of TOML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        table = cast("Mapping[str, object]", value)
        return "{" + ", ".join(f"{key} = {in_toml(each)}" for key, each in table.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_toml, cast('Sequence[object]', value)))}]"
    if isinstance(value, int) and not _is_short(value):
        return hex(value)  # Python writes as many digits of this as there are
    return value.isoformat() if isinstance(value, date | time) else str(value)


def words_in_toml(expected: str) -> str:
    """Say what would be right in the words of TOML, where a program's were meant."""
    return re.sub(r"\bNone\b", NONE_IN_TOML, expected).replace("'", '"')


def words_in_text(expected: str) -> str:
    """Say what would be right in the words of a text, where a program's were meant."""
    return re.sub(r"\bNone\b", NONE, expected)


def _reason(error: ValueError, value: object, expected: str) -> tuple[object, str]:
    """Return which value is wrong, and what would be right."""
    if isinstance(error, AddressError):
        return error.address, error.expected
    return value, expected


# ------------------------------------------------------------------------------- the kinds of value


def _is_short(number: int) -> bool:
    """Say whether a number is one that TOML knows: of 64 bits, and not of any length."""
    return -(1 << 63) <= number < 1 << 63


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not _is_short(value):
        raise ValueError
    return value


def _whole_of_text(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError
    return _whole(int(text))


def _number(value: object) -> float:
    return value if isinstance(value, float) else _whole(value)


def _size(value: object) -> int:
    return _size_of_text(value) if isinstance(value, str) else _whole(value)


def _size_of_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in UNITS:
        raise ValueError
    size = float(match[1]) * UNITS[match[2].lower()]
    if not isfinite(size):
        raise ValueError
    return _whole(int(size))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError  # of a notation, which has one error
    return value


def _bytes(value: object) -> bytes:
    return _text(value).encode("utf-8", "surrogateescape")


def _path(value: object) -> str:
    path = _text(value)
    if not path or "\0" in path:
        raise ValueError
    return path


def _name_or_number(value: object) -> str | int:
    return _whole(value) if isinstance(value, int) else _path(value)


def _texts(value: object) -> tuple[str, ...]:
    """Read one text or several."""
    if isinstance(value, list | tuple):
        return tuple(map(_text, cast("Sequence[object]", value)))
    return (_text(value),)


def _texts_of_text(text: str) -> tuple[str, ...]:
    return tuple(filter(None, _SEPARATORS.split(text)))


def _target(value: object) -> str:
    name = _text(value)
    try:
        target.read(name)
    except target.TargetError:
        raise ValueError from None
    return name


def _addresses(texts: tuple[str, ...]) -> tuple[address.Address, ...]:
    if not texts:
        raise ValueError
    return tuple(map(address.parse, texts))


FROM_TOML: Final[Mapping[Form, Callable[[Any], object]]] = {
    Form.WHOLE: _whole,
    Form.NUMBER: _number,
    Form.SIZE: _size,
    Form.WORD: _text,
    Form.BYTES: _bytes,
    Form.PATH: _path,
    Form.ACCOUNT: _name_or_number,
    Form.MODE: _name_or_number,
    Form.NETWORKS: _texts,
    Form.TARGET: _target,
    Form.ADDRESSES: lambda value: _addresses(_texts(value)),
}

FROM_TEXT: Final[Mapping[Form, Callable[[str], object]]] = {
    **FROM_TOML,
    Form.WHOLE: _whole_of_text,
    Form.NUMBER: float,
    Form.NETWORKS: _texts_of_text,
    Form.ADDRESSES: lambda text: _addresses(_texts_of_text(text)),
}


# ----------------------------------------------------------------------------- of which setting


UNIT_OF: Final = {
    "accept_rate": "a number of connections a second",
    "minimum_rate": "a number of bytes a second",
}

FORM_OF: Final = {
    "max_worker_memory": Form.SIZE,
    "socket_mode": Form.MODE,
}
"""What does not follow from the type."""

NUMBERS: Final = frozenset({Form.WHOLE, Form.NUMBER, Form.SIZE})

NO_LIMITS: Final = frozenset({"workers", "hubs", "max_workers", "accept_burst"})
"""Numbers of which ``None`` is something else than no limit."""

OWN_NONE: Final = frozenset({"client_certificates"})
"""Settings of which `NONE` is a value like others."""


def _notation(name: str, hint: Any) -> Notation:
    """Return how a setting of this type is written."""
    kinds = set(get_args(hint)) if get_origin(hint) in {UnionType, Union} else {hint}
    form = FORM_OF.get(name) or _form(kinds)
    words = UNIT_OF.get(name, form.value)
    if name.endswith("_timeout"):
        words = "a number of seconds"
    has_auto = any(get_args(kind) == (AUTO,) for kind in kinds)
    is_required = form is Form.NETWORKS and type(None) not in kinds
    has_none = (type(None) in kinds and name not in OWN_NONE) or is_required
    is_limit = form in NUMBERS and name not in NO_LIMITS
    return Notation(form, words, has_auto, has_none, () if is_required else None, is_limit)


def _form(kinds: set[Any]) -> Form:
    if PathLike[str] in kinds:
        return Form.PATH
    if {str, int} <= kinds:
        return Form.ACCOUNT
    for kind, form in ((bytes, Form.BYTES), (float, Form.NUMBER), (int, Form.WHOLE)):
        if kind in kinds:
            return form
    is_several = any(get_origin(kind) is Iterable for kind in kinds)
    return Form.NETWORKS if is_several else Form.WORD


OF_PROCESS: Final[Mapping[str, Notation]] = {
    name: _notation(name, hint) for name, hint in get_type_hints(ProcessSettings).items()
}
"""How each setting of the processes is written."""

OF_SERVICE: Final[Mapping[str, Notation]] = {
    "target": Notation(Form.TARGET, Form.TARGET.value),
    "addresses": Notation(Form.ADDRESSES, Form.ADDRESSES.value),
    **{name: _notation(name, hint) for name, hint in get_type_hints(Settings).items()},
}
"""How each setting of a service is written; its handler and its addresses come first."""

NOTATIONS: Final[Mapping[str, Notation]] = {**OF_PROCESS, **OF_SERVICE}
"""How each is written that may hold for everything."""
