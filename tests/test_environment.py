from __future__ import annotations

import pytest

from portico.environment import VariableError, read, variables
from portico.errors import PorticoError, SettingError
from portico.layers import Values


def values(environment: dict[str, str], *services: str) -> dict[tuple[str | None, str], object]:
    layer = read(environment, services)
    found: list[tuple[str | None, Values]] = [(None, layer.general), *layer.services.items()]
    return {(service, name): given.value for service, each in found for name, given in each.items()}


def test_a_variable_is_a_setting_of_all_services_or_of_one() -> None:
    environment = {
        "PATH": "/bin",
        "PORTICO_WORKERS": "auto",
        "PORTICO_IDLE_TIMEOUT": "60",
        "PORTICO_WEB_IDLE_TIMEOUT": "none",
        "PORTICO_NAME_SERVER_ALLOWED_NETWORKS": "10.0.0.0/8,::1",
    }
    assert values(environment, "web", "name-server") == {
        (None, "workers"): "auto",
        (None, "idle_timeout"): 60,
        ("web", "idle_timeout"): None,
        ("name-server", "allowed_networks"): ("10.0.0.0/8", "::1"),
    }


def test_a_value_has_its_variable_for_its_origin() -> None:
    layer = read({"PORTICO_HUBS": "2", "PORTICO_WEB_HUBS": "3"}, ["web"])
    general, own = layer.general["hubs"], layer.services["web"]["hubs"]
    assert (str(general.origin), general.origin.is_general) == ("PORTICO_HUBS", True)
    assert (str(own.origin), own.origin.is_general) == ("PORTICO_WEB_HUBS", False)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("PORTICO_IDEL_TIMEOUT", "PORTICO_IDLE_TIMEOUT, the nearest one"),
        ("PORTICO_WEP_IDLE_TIMEOUT", "PORTICO_WEB_IDLE_TIMEOUT, the nearest one"),
        ("PORTICO_WEB_PID_FILE", "PORTICO_PID_FILE, the nearest one"),
        ("PORTICO_Idle_Timeout", "PORTICO_IDLE_TIMEOUT, the nearest one"),
        ("PORTICO_", "such as PORTICO_IDLE_TIMEOUT"),
        ("PORTICO_PORT", "such as PORTICO_IDLE_TIMEOUT"),
    ],
)
def test_a_variable_that_is_no_setting_is_told_with_the_nearest(
    variable: str, expected: str
) -> None:
    with pytest.raises(
        VariableError, match=f"^{variable}: expected the name of a setting: "
    ) as caught:
        read({variable: "5"}, ["web"])
    assert caught.value.expected.endswith(expected)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PORTICO_CONFIG", "a.toml"),
        ("PORTICO_POLLER", "select"),
        ("PORTICO_HERITAGE", "3"),
        ("PORTICO_SERVICE_HOST", "10.0.0.11"),
        ("PORTICO_SERVICE_PORT", "6379"),
        ("PORTICO_SERVICE_PORT_HTTP", "80"),
        ("PORTICO_PORT", "tcp://10.0.0.11:6379"),
        ("PORTICO_PORT_6379_TCP", "tcp://10.0.0.11:6379"),
        ("PORTICO_PORT_6379_TCP_PROTO", "tcp"),
        ("PORTICO_PORT_6379_TCP_PORT", "6379"),
        ("PORTICO_PORT_6379_TCP_ADDR", "10.0.0.11"),
        ("PORTICO_WEB_PORT", "udp://10.0.0.11:53"),
        ("PORTICO_WEB_SERVICE_HOST", "10.0.0.11"),
    ],
)
def test_variables_for_others_are_left_to_them(variable: str, text: str) -> None:
    """Every container of a cluster with a service named portico has some of them."""
    assert values({variable: text}, "web") == {}


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("PORTICO_IDLE_TIMEOUT", "x", "a number of seconds, or none for no limit"),
        ("PORTICO_WEB_BACKLOG", "-1", "a whole number"),
        ("PORTICO_ADDRESSES", "9000", "tcp://:9000 or udp://:9000"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_with_its_variable(
    variable: str, text: str, expected: str
) -> None:
    with pytest.raises(SettingError) as caught:
        read({variable: text}, ["web"])
    assert str(caught.value) == f"{variable}={text}: expected {expected}"


@pytest.mark.parametrize(
    ("services", "variable"),
    [(("a-b", "a_b"), "PORTICO_A_B_TARGET"), (("web", "WEB"), "PORTICO_WEB_TARGET")],
)
def test_no_variable_stands_for_two_services(services: tuple[str, ...], variable: str) -> None:
    with pytest.raises(PorticoError, match=f"^{variable}: expected another name for the services"):
        variables(services)


def test_no_variable_stands_for_a_service_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two settings of today make one; a later one may."""
    both = {"key": None, "web_key": None}
    monkeypatch.setattr("portico.environment.OF_SERVICE", both)
    monkeypatch.setattr("portico.environment.NOTATIONS", both)
    with pytest.raises(VariableError, match=r"^PORTICO_WEB_KEY: expected another name for 'web'"):
        variables(["web"])
