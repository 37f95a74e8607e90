from __future__ import annotations

import dataclasses
import inspect
import os
from math import nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico import address
from portico.engines import ENGINES
from portico.errors import SettingError
from portico.options import flag
from portico.settings import (
    AUTO,
    MOST_CONNECTIONS,
    MOST_THREADS,
    Settings,
    SettingValues,
    connection_limit,
    peer_limit,
)
from portico.socketfile import FileAccess

NAMES = [field.name for field in dataclasses.fields(Settings)]
PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "settings.md"


def test_what_nobody_says_is_safe() -> None:
    settings = Settings()
    protected = {name: getattr(settings, name) for name in NAMES}
    assert {
        "engine": "threads",
        "backlog": 1024,
        "max_connections": AUTO,
        "max_connections_per_peer": AUTO,
        "handshake_timeout": 10,
        "idle_timeout": 300,
        "drain_timeout": 15,
        "when_full": "wait",
    }.items() <= protected.items()


@pytest.mark.parametrize("name", [*(name for name in NAMES if name.endswith("_timeout"))])
def test_none_means_no_limit(name: str) -> None:
    assert getattr(Settings.read({name: None}), name) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"engine": "thread"}, "engine='thread': expected 'threads'"),
        ({"engine": "x"}, "engine='x': expected one of 'threads', 'forks', 'pool', 'green', 's"),
        ({"hubs": 4}, "hubs=4: expected engine='green' with it; 'threads' has no hubs"),
        ({"engine": "green", "hubs": 0}, "hubs=0: expected 1 or more"),
        ({"max_workers": 4}, "max_workers=4: expected engine='pool' with it; 'threads' has no wor"),
        ({"engine": "pool", "max_workers": "4"}, "max_workers='4': expected 1 or more"),
        ({"engine": "pool", "max_workers": True}, "max_workers=True: expected 1 or more"),
        ({"backlog": 0}, "backlog=0: expected 1 or more"),
        ({"backlog": None}, "backlog=None: expected 1 or more"),
        ({"socket_mode": 660}, 'socket_mode=660: expected a mode in octal, such as "0660"'),
        ({"socket_mode": "rw"}, "socket_mode='rw': expected a mode in octal"),
        ({"socket_mode": "01777"}, "socket_mode='01777': expected a mode in octal"),
        ({"socket_mode": -1}, "socket_mode=-1: expected a mode in octal"),
        ({"socket_mode": True}, "socket_mode=True: expected a mode in octal"),
        ({"socket_owner": ""}, "socket_owner='': expected a name, a number from 0 to 4294967294"),
        ({"socket_group": -1}, "socket_group=-1: expected a name, a number from 0 to 4294967294"),
        ({"max_connections": 0}, "max_connections=0: expected 1 or more, 'auto', or None for no"),
        ({"max_connections": "many"}, "max_connections='many': expected 1 or more, 'auto', or N"),
        ({"max_connections_per_peer": 1.5}, "max_connections_per_peer=1.5: expected 1 or more"),
        ({"when_full": "drop"}, "when_full='drop': expected one of 'wait', 'refuse', 'shed'"),
        ({"farewell": "bye"}, "farewell='bye': expected bytes"),
        ({"accept_rate": 0}, "accept_rate=0: expected a number of connections a second above 0"),
        ({"accept_burst": 3}, "accept_burst=3: expected accept_rate beside it"),
        ({"allowed_networks": "::1"}, "allowed_networks='::1': expected several networks"),
        ({"denied_networks": ["x"]}, "denied_networks='x': expected networks such as 10.0.0.0/8"),
        ({"proxy_protocol": ["x"]}, "proxy_protocol='x': expected networks such as 10.0.0.0/8"),
        ({"handshake_timeout": 0}, "handshake_timeout=0: expected more than 0, or None for no"),
        ({"idle_timeout": -1}, "idle_timeout=-1: expected more than 0, or None for no limit"),
        ({"idle_timeout": "5"}, "idle_timeout='5': expected a number of seconds, or None for no"),
        pytest.param(
            {"idle_timeout": 10**400},
            f"idle_timeout={10**400}: expected a number of seconds, or",
            id="beyond all floats",
        ),
        ({"idle_timeout": True}, "idle_timeout=True: expected a number of seconds, or None for"),
        ({"request_timeout": nan}, "request_timeout=nan: expected a number of seconds, or None"),
        ({"minimum_rate": "x"}, "minimum_rate='x': expected a number of bytes a second, or None"),
        ({"drain_timeout": -1}, "drain_timeout=-1: expected 0 or more seconds, or None for no"),
        ({"key": Path("a.key")}, "key='a.key': expected cert beside it"),
        ({"client_ca": "ca.pem"}, "client_ca='ca.pem': expected cert beside it"),
        ({"client_certificates": "always"}, "client_certificates='always': expected one of 'none'"),
        (
            {"cert": "a.pem", "client_certificates": "require"},
            "client_certificates='require': expected 'required'",
        ),
        (
            {"cert": "a.pem", "client_certificates": "optional"},
            "client_certificates='optional': expected client_ca beside it",
        ),
        (
            {"cert": "a.pem", "client_ca": "ca.pem", "client_certificates": "none"},
            "client_certificates='none': expected 'optional' or 'required', since",
        ),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SettingError) as caught:
        Settings(**values)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("idel_timeout", "idel_timeout=5: expected the name of a setting: 'idle_timeout'"),
        ("max_connection", "max_connection=5: expected the name of a setting: 'max_connections'"),
        ("frobnicate", "frobnicate=5: expected the name of a setting: one of 'engine', 'hubs'"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings.read({name: 5})
    assert str(caught.value).startswith(expected)


def test_settings_are_read_by_name() -> None:
    assert Settings.read({"idle_timeout": 5}) == Settings(idle_timeout=5)


def test_networks_are_read_once() -> None:
    """An iterator would allow whom it names the first time, and nobody later."""
    settings = Settings(allowed_networks=iter(["::1"]), proxy_protocol=iter(["10.0.0.0/8"]))
    for networks in (settings.allowed_networks, settings.proxy_protocol):
        assert networks is not None
        assert len(list(networks)) == len(list(networks)) == 1
    assert settings.resolved(1024).allowed_networks == settings.allowed_networks


def test_tls_has_a_certificate_and_a_certificate_has_tls() -> None:
    tls, tcp = address.parse("tls://:443"), address.parse("tcp://:80")
    Settings(cert="a.pem").check_addresses([tcp, tls])
    Settings().check_addresses([tcp])
    with pytest.raises(SettingError, match=r"^cert=None: .* for tls://:443$"):
        Settings().check_addresses([tcp, tls])
    with pytest.raises(SettingError, match=r"^cert='a\.pem': expected a tls://HOST:PORT address"):
        Settings(cert=Path("a.pem")).check_addresses([tcp])


def test_the_settings_of_serve_are_these_in_the_same_types() -> None:
    types = {field.name: field.type for field in dataclasses.fields(Settings)}
    assert types.pop("engine") == "str"
    given = inspect.get_annotations(SettingValues)
    assert {name: kind.__forward_arg__ for name, kind in given.items()} == types


# --- what is worked out -----------------------------------------------------------------


@given(st.integers(1, 2**40))
def test_connections_stay_below_the_limit_of_descriptors(descriptors: int) -> None:
    """There is room for one, whatever the limit; a small one has been chosen for the purpose."""
    limit = connection_limit(descriptors)
    assert 1 <= limit <= MOST_CONNECTIONS
    assert limit < descriptors or limit == 1


@pytest.mark.parametrize(
    ("descriptors", "expected"),
    [(1024, 768), (20_000, 10_000), (-1, 10_000), (2**30, 10_000), (40, 8), (16, 1)],
)
def test_a_quarter_of_the_descriptors_is_left_for_other_things(
    descriptors: int, expected: int
) -> None:
    assert connection_limit(descriptors) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_with_a_thread_for_each_has_fewer(engine: str) -> None:
    most = MOST_THREADS if engine == "threads" else MOST_CONNECTIONS
    assert Settings(engine=engine).resolved(-1).max_connections == most


def test_servers_share_the_descriptors() -> None:
    assert Settings().resolved(1024, servers=3).max_connections == 256
    assert Settings().resolved(1024, servers=10_000).max_connections == 1


def test_what_was_asked_for_stays() -> None:
    asked = Settings(max_connections=5000, max_connections_per_peer=7).resolved(1024, servers=3)
    assert (asked.max_connections, asked.max_connections_per_peer) == (5000, 7)
    free = Settings(max_connections=None).resolved(1024)
    assert (free.max_connections, free.max_connections_per_peer) == (None, None)


@pytest.mark.parametrize(
    ("connections", "expected"), [(1, None), (16, None), (17, 16), (100, 50), (10_000, 5000)]
)
def test_no_peer_gets_every_place(connections: int, expected: int | None) -> None:
    """Unless they are so few that one honest client may need them."""
    assert peer_limit(connections) == expected


# --- the documentation ------------------------------------------------------------------


def test_every_setting_has_a_row_on_its_page_with_its_default() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    found = {row[0].strip("| `"): row[1].strip("` ") for row in rows}
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert found == {
        name: f"{value:g}" if isinstance(value, float) else repr(value).replace("'", '"')
        for name, value in defaults.items()
    }


def test_every_setting_has_a_row_on_its_page_with_its_option() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `"): row[2].strip("` ") for row in rows} == {
        name: flag(name) for name in NAMES
    }


def test_the_paths_are_what_programs_have() -> None:
    assert os.fspath(Settings(cert=Path("a.pem")).cert or "") == "a.pem"


@pytest.mark.parametrize("mode", ["660", "0660", "0o660", 0o660])
def test_the_mode_of_a_socket_is_octal_in_any_spelling(mode: str | int) -> None:
    settings = Settings(socket_mode=mode)
    assert settings.socket_mode == "0660"
    assert settings.socket_access() == FileAccess(0o660)


def test_who_has_a_socket_is_looked_up_when_it_is_made() -> None:
    """And not before: a file of settings can be checked on another machine."""
    settings = Settings(socket_owner="root", socket_group=0)
    assert settings.socket_access() == FileAccess(0o600, 0, 0)
    unknown = Settings(socket_owner="no such user")
    with pytest.raises(SettingError, match=r"^socket_owner='no such user': expected the name"):
        unknown.socket_access()
    unknown = Settings(socket_group="no such group")
    with pytest.raises(SettingError, match=r"^socket_group='no such group': expected the name"):
        unknown.socket_access()


@pytest.mark.parametrize("text", ["systemd+tls:web", "fd+tls://3"])
def test_tls_on_an_inherited_socket_needs_a_certificate_too(text: str) -> None:
    with pytest.raises(SettingError, match=r"^cert=None: .* for (systemd|fd)\+tls:"):
        Settings().check_addresses([address.parse(text)])
    Settings(cert="a.pem").check_addresses([address.parse(text)])
