"""Read settings from the variables of the environment: ``PORTICO_IDLE_TIMEOUT=60``.

Owns the names of the variables, and which of those that begin like ours are somebody else's.
Leaves the values to `portico.notation`.

Source: Kubernetes, "Service", "Discovering services" (the variables that every container gets of
each service, in the form of Docker's links, too).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Final

from portico.errors import PorticoError
from portico.layers import Given, Layer, Origin, Source
from portico.notation import NOTATIONS, OF_SERVICE, NotationError

PREFIX: Final = "PORTICO_"

CONFIG: Final = "PORTICO_CONFIG"
"""The variable that names the file with the settings."""

OTHERS: Final = frozenset({CONFIG, "PORTICO_HERITAGE", "PORTICO_POLLER"})
"""Variables of ours that are no settings: the file, what a supervisor leaves to the next one, and
how the green engine waits."""

LINK: Final = re.compile(
    r"PORTICO_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?"
    r"|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)=.*"
    r"|PORTICO_(?:\w+_)?PORT=(?:tcp|udp|sctp)://.*",
    re.DOTALL,
)
"""Variables that a container has because some service in its cluster is called ``portico``."""


class VariableError(PorticoError):
    """A variable is no setting, or stands for two.

    Attributes:
        variable: Its name.
        expected: What would be right.
    """

    def __init__(self, variable: str, expected: str) -> None:
        super().__init__(variable, expected)
        self.variable, self.expected = variable, expected

    def __str__(self) -> str:
        return f"{self.variable}: expected {self.expected}"


def read(environment: Mapping[str, str], services: Iterable[str]) -> Layer:
    """Read the variables.

    Args:
        environment: All variables there are.
        services: The services that there are, and may have variables of their own.

    Raises:
        VariableError: One begins like ours and is no setting.
        SettingError: A value is wrong.
    """
    general: dict[str, Given] = {}
    own: dict[str, dict[str, Given]] = {}
    known = variables(services)
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or _is_no_setting(variable, text):
            continue
        if variable not in known:
            raise VariableError(variable, _meant(variable, known))
        service, name = known[variable]
        given = _given(variable, name, text, is_general=service is None)
        (general if service is None else own.setdefault(service, {}))[name] = given
    return Layer(general, own)


def variables(services: Iterable[str]) -> dict[str, tuple[str | None, str]]:
    """Return the service and the setting that each variable stands for; ``None`` for all services.

    Raises:
        VariableError: A variable would stand for the settings of two services.
    """
    known: dict[str, tuple[str | None, str]] = {_variable(name): (None, name) for name in NOTATIONS}
    for service in services:
        for name in OF_SERVICE:
            variable = _variable(service, name)
            if variable in known:
                other = known[variable][0]
                what = f"the services {other!r} and {service!r}" if other else f"{service!r}"
                raise VariableError(variable, f"another name for {what}: it stands for two things")
            known[variable] = (service, name)
    return known


def _variable(*names: str) -> str:
    return PREFIX + "_".join(names).upper().replace("-", "_")


def _is_no_setting(variable: str, text: str) -> bool:
    return variable in OTHERS or LINK.fullmatch(f"{variable}={text}") is not None


def _given(variable: str, name: str, text: str, *, is_general: bool) -> Given:
    origin = Origin(Source.VARIABLE, variable, is_general=is_general)
    try:
        value = NOTATIONS[name].from_text(text)
    except NotationError as error:
        origin.refuse(name, error.value, error.expected)
    return Given(value, text, origin)


def _meant(variable: str, known: Iterable[str]) -> str:
    """Say which variable may have been meant; what all have in front makes none of them nearer."""
    names = [name.removeprefix(PREFIX) for name in known]
    nearest = get_close_matches(variable.removeprefix(PREFIX).upper(), names, n=1)
    example = (
        f"{PREFIX}{nearest[0]}, the nearest one" if nearest else "such as PORTICO_IDLE_TIMEOUT"
    )
    return f"the name of a setting: {example}"
