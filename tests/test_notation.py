from __future__ import annotations

import datetime as dt
import tomllib
from pathlib import PurePath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.address import parse
from portico.notation import (
    NOTATIONS,
    OF_PROCESS,
    OF_SERVICE,
    Form,
    NotationError,
    in_toml,
    words_in_text,
    words_in_toml,
)

MIB = 2**20


def test_no_setting_of_a_service_is_called_like_one_of_the_processes() -> None:
    """Both stand side by side at the top of a file."""
    assert set(OF_PROCESS) & set(OF_SERVICE) == set()


def test_the_form_of_a_setting_follows_from_its_type() -> None:
    forms = {form: {name for name in NOTATIONS if NOTATIONS[name].form is form} for form in Form}
    assert forms == {
        Form.WHOLE: {
            *("workers", "max_requests", "max_requests_jitter", "hubs", "max_workers", "backlog"),
            *("max_connections", "max_connections_per_peer", "accept_burst"),
        },
        Form.NUMBER: {
            *("worker_timeout", "start_timeout", "accept_rate", "minimum_rate"),
            *("handshake_timeout", "idle_timeout", "request_timeout", "drain_timeout"),
        },
        Form.SIZE: {"max_worker_memory"},
        Form.WORD: {"engine", "when_full", "client_certificates", "log_level"},
        Form.BYTES: {"farewell"},
        Form.PATH: {"cert", "key", "client_ca", "pid_file", "log_file"},
        Form.ACCOUNT: {"user", "group", "socket_owner", "socket_group"},
        Form.MODE: {"socket_mode"},
        Form.NETWORKS: {"allowed_networks", "denied_networks", "proxy_protocol"},
        Form.TARGET: {"target"},
        Form.ADDRESSES: {"addresses"},
    }


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("workers", 2, 2),
        ("workers", "auto", "auto"),
        ("workers", "none", None),
        ("max_connections", "None", None),
        ("idle_timeout", 5, 5),
        ("idle_timeout", 2.5, 2.5),
        ("idle_timeout", "none", None),
        ("max_worker_memory", 1024, 1024),
        ("max_worker_memory", "512 MiB", 512 * MIB),
        ("max_worker_memory", "0.5GiB", 512 * MIB),
        ("max_worker_memory", "3 kb", 3000),
        ("max_worker_memory", "7", 7),
        ("engine", "green", "green"),
        ("farewell", "busy\r\n", b"busy\r\n"),
        ("farewell", "none", b"none"),
        ("cert", "a.pem", "a.pem"),
        ("cert", "none", None),
        ("client_certificates", "none", "none"),
        ("user", 1000, 1000),
        ("socket_mode", "0660", "0660"),
        ("socket_mode", 0o660, 0o660),
        ("socket_group", "none", None),
        ("user", "www-data", "www-data"),
        ("allowed_networks", ["::1", "10.0.0.0/8"], ("::1", "10.0.0.0/8")),
        ("allowed_networks", "::1", ("::1",)),
        ("allowed_networks", "none", None),
        ("denied_networks", "none", ()),
        ("denied_networks", [], ()),
        ("target", "app:Echo", "app:Echo"),
        ("addresses", "tcp://:1", (parse("tcp://:1"),)),
        ("addresses", ["tcp://:1", "unix:a"], (parse("tcp://:1"), parse("unix:a"))),
    ],
)
def test_a_value_of_toml_is_read(name: str, written: object, value: object) -> None:
    assert NOTATIONS[name].from_toml(written) == value


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("workers", "2", 2),
        ("workers", "AUTO", "auto"),
        ("max_connections", "none", None),
        ("idle_timeout", "2.5", 2.5),
        ("max_worker_memory", "512MiB", 512 * MIB),
        ("farewell", "auto", b"auto"),
        ("user", "0", "0"),
        ("socket_mode", "660", "660"),
        ("allowed_networks", "::1, 10.0.0.0/8 10.0.0.1", ("::1", "10.0.0.0/8", "10.0.0.1")),
        ("denied_networks", "none", ()),
        ("addresses", "tcp://:1,unix:a", (parse("tcp://:1"), parse("unix:a"))),
    ],
)
def test_a_text_is_read(name: str, written: str, value: object) -> None:
    assert NOTATIONS[name].from_text(written) == value


@pytest.mark.parametrize(
    ("name", "written", "value", "expected"),
    [
        ("backlog", True, True, "a whole number"),
        ("backlog", "none", "none", "a whole number"),
        ("workers", 1.5, 1.5, "a whole number, 'auto', or 'none'"),
        ("max_connections", "x", "x", "a whole number, 'auto', or 'none' for no limit"),
        ("idle_timeout", "5", "5", "a number of seconds, or 'none' for no limit"),
        ("idle_timeout", True, True, "a number of seconds, or 'none' for no limit"),
        ("minimum_rate", "x", "x", "a number of bytes a second, or 'none' for no limit"),
        ("accept_rate", [], [], "a number of connections a second, or 'none' for no limit"),
        ("max_worker_memory", "5 lb", "5 lb", "a number of bytes, or a size such as '512 MiB', or"),
        ("max_worker_memory", 1.5, 1.5, "a number of bytes, or a size such as '512 MiB', or 'none"),
        ("engine", 5, 5, "a text"),
        ("farewell", 5, 5, "a text to be sent"),
        ("cert", "", "", "the path of a file, or 'none'"),
        ("cert", "a\0", "a\0", "the path of a file, or 'none'"),
        ("user", True, True, "a name or a number, or 'none'"),
        ("user", 1.5, 1.5, "a name or a number, or 'none'"),
        ("allowed_networks", [5], [5], "networks such as ['10.0.0.0/8', '::1'], or 'none'"),
        ("allowed_networks", 5, 5, "networks such as ['10.0.0.0/8', '::1'], or 'none'"),
        ("target", "app", "app", "MODULE:HANDLER or PATH.py:HANDLER, such as 'app:Echo'"),
        ("addresses", [], [], "addresses such as ['tcp://127.0.0.1:9000']"),
        ("addresses", ["tcp://:1", "x"], "x", "tcp://HOST:PORT, "),
    ],
)
def test_a_value_of_another_kind_is_refused(
    name: str, written: object, value: object, expected: str
) -> None:
    with pytest.raises(NotationError) as caught:
        NOTATIONS[name].from_toml(written)
    assert caught.value.value == value
    assert caught.value.expected.startswith(expected)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("backlog", "-1", "a whole number"),
        ("backlog", "\N{ARABIC-INDIC DIGIT ONE}", "a whole number"),
        ("max_connections", "1.5", "a whole number, 'auto', or none for no limit"),
        ("idle_timeout", "soon", "a number of seconds, or none for no limit"),
        ("addresses", "", "addresses such as"),
    ],
)
def test_a_text_of_another_kind_is_refused(name: str, text: str, expected: str) -> None:
    with pytest.raises(NotationError) as caught:
        NOTATIONS[name].from_text(text)
    assert caught.value.expected.startswith(expected)


VALUES: Any = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.dates()
    | st.datetimes()
    | st.times(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), inner)
    ),
)


@given(VALUES)
def test_a_value_is_shown_as_it_would_stand_in_a_file(value: object) -> None:
    """On one line, which is what an error has."""
    shown = in_toml(value)
    assert "\n" not in shown
    assert tomllib.loads(f"value = {shown}") == {"value": value}


def test_the_words_of_a_program_become_those_of_a_file_or_a_text() -> None:
    expected = "1 or more, 'auto', or None for no limit"
    assert words_in_toml(expected) == '1 or more, "auto", or "none" for no limit'
    assert words_in_text(expected) == "1 or more, 'auto', or none for no limit"


def test_what_toml_does_not_know_is_shown_as_it_is() -> None:
    """A program's keyword may be anything."""
    assert in_toml(PurePath("a")) == "a"
    assert in_toml(dt.date(2026, 1, 2)) == "2026-01-02"


LONG = "9" * 400


@pytest.mark.parametrize("name", ["max_requests", "worker_timeout", "max_worker_memory", "user"])
@pytest.mark.parametrize(
    "value",
    [int(LONG), -int(LONG), 1 << 63, 16**5000],
    ids=["large", "small", "one too large", "beyond words"],
)
def test_a_number_of_more_than_64_bits_is_none(name: str, value: int) -> None:
    with pytest.raises(NotationError) as caught:
        NOTATIONS[name].from_toml(value)
    assert in_toml(caught.value.value) == hex(value)
    assert tomllib.loads(f"a = {in_toml([value, 1])}".replace("-0x", "0x"))


@pytest.mark.parametrize("name", ["max_requests", "max_worker_memory"])
@pytest.mark.parametrize("text", [LONG, "9" * 5000], ids=["large", "beyond words"])
def test_a_text_of_such_a_number_is_none(name: str, text: str) -> None:
    for value in (text, f"{text} GiB"):
        with pytest.raises(NotationError):
            NOTATIONS[name].from_text(value)


@pytest.mark.parametrize("number", [(1 << 63) - 1, -(1 << 63), 0])
def test_a_number_of_64_bits_is_one(number: int) -> None:
    assert NOTATIONS["max_requests"].from_toml(number) == number
    assert in_toml(number) == str(number)
