from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico import options
from portico.address import parse
from portico.configuration import ServiceSettings
from portico.errors import CertificateError, PorticoError, SettingError
from portico.layers import Layer, Source
from portico.notation import in_toml
from portico.sources import SourcedConfiguration, Sources
from portico.target import TargetError

SERVED = 'target = "app:Echo"\naddresses = "tcp://:9000"\n'
TWO = """
target = "app:Echo"
[services.web]
addresses = "tcp://:80"
[services.names]
addresses = "udp://:53"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, in which a file is looked for."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_line(target: str = "app:Echo", *addresses: str, **more: Any) -> Layer:
    """What the command line gives."""
    sources = options.sources(target, addresses or ("tcp://:1",), config=None, services=(), **more)
    return sources.options


def read(
    text: str | None = None,
    *,
    variables: Mapping[str, str] | None = None,
    given: Mapping[str, Any] | None = None,
    services: Sequence[str] = (),
    **keywords: object,
) -> SourcedConfiguration:
    """Read the sources, with a file in the current directory if there is a text."""
    if text is not None:
        Path("portico.toml").write_text(text)
    return Sources(
        keywords=keywords,
        variables=variables or {},
        options=Layer(options.layer(given or {})),
        services=services,
    ).read()


def only(reading: SourcedConfiguration) -> ServiceSettings:
    (service,) = reading.configuration.services
    return service


# --- who wins ---------------------------------------------------------------------------

SOURCES = st.fixed_dictionaries({}, optional={source: st.integers(1, 999) for source in Source})


@given(SOURCES, SOURCES)
def test_the_highest_source_wins(services: dict[Source, int], processes: dict[Source, int]) -> None:
    """A program, a file, a variable, an option; what nobody says has its default."""
    names = {"backlog": services, "max_requests": processes}

    def said(source: Source) -> dict[str, int]:
        return {name: each[source] for name, each in names.items() if source in each}

    with tempfile.TemporaryDirectory() as directory:
        file = [f"{name} = {in_toml(value)}\n" for name, value in said(Source.FILE).items()]
        (Path(directory) / "portico.toml").write_text("".join([SERVED, *file]))
        reading = Sources(
            directory=Path(directory),
            keywords=said(Source.KEYWORD),
            variables={f"PORTICO_{k.upper()}": str(v) for k, v in said(Source.VARIABLE).items()},
            options=Layer(options.layer({k: str(v) for k, v in said(Source.OPTION).items()})),
        ).read()
    found = {
        "backlog": only(reading).settings.backlog,
        "max_requests": reading.configuration.process.max_requests,
    }
    defaults = {"backlog": 1024, "max_requests": None}
    assert found == {
        name: each[max(each)] if each else defaults[name] for name, each in names.items()
    }
    origins = {**reading.origins.process, **reading.origins.services["portico"]}
    assert {name: origins[name].origin.source for name in names if name in origins} == {
        name: max(each) for name, each in names.items() if each
    }


def test_a_variable_of_one_service_is_for_that_alone(folder: Path) -> None:
    reading = read(
        TWO + "accept_rate = 1\n",
        variables={"PORTICO_ACCEPT_RATE": "2", "PORTICO_WEB_ACCEPT_RATE": "3"},
    )
    rates = [each.settings.accept_rate for each in reading.configuration.services]
    assert rates == [3, 2]


# --- what is served ---------------------------------------------------------------------


def test_a_file_may_have_one_service_without_a_table(folder: Path) -> None:
    reading = read(SERVED + "idle_timeout = 7\nworkers = 3\n")
    service = only(reading)
    assert (service.name, service.target) == ("portico", "app:Echo")
    assert service.addresses == (parse("tcp://:9000"),)
    assert service.settings.idle_timeout == 7
    assert reading.configuration.process.workers == 3
    assert reading.file is not None


def test_a_file_may_have_several_services(folder: Path) -> None:
    services = read(TWO).configuration.services
    assert [(each.name, each.target, *each.addresses) for each in services] == [
        ("web", "app:Echo", parse("tcp://:80")),
        ("names", "app:Echo", parse("udp://:53")),
    ]


def test_some_of_the_services_may_be_chosen(folder: Path) -> None:
    """With a certificate for all, too, of which this one has no use."""
    text = 'cert = "a.pem"\n' + TWO.replace("tcp:", "tls:")
    assert only(read(text, services=["names"])).name == "names"
    chosen = read(text, services=["names", "web"]).configuration.services
    assert [each.name for each in chosen] == ["web", "names"]
    assert [each.settings.cert for each in chosen] == ["a.pem", None]


def test_variables_alone_are_enough(folder: Path) -> None:
    """As in a container that has no file."""
    variables = {"PORTICO_TARGET": "app:Echo", "PORTICO_ADDRESSES": "tcp://:1,udp://:2"}
    assert only(read(variables=variables)).addresses == (parse("tcp://:1"), parse("udp://:2"))


def test_a_program_may_say_everything(folder: Path) -> None:
    said: dict[str, Any] = {"target": "app:Echo", "farewell": b"bye", "workers": 2}
    for addresses in (["tcp://:1"], [parse("tcp://:1")]):
        assert only(read(addresses=addresses, **said)).addresses == (parse("tcp://:1"),)
    reading = read(addresses="tcp://:1", **said)
    assert only(reading).addresses == (parse("tcp://:1"),)
    assert only(reading).settings.farewell == b"bye"
    assert reading.configuration.process.workers == 2


def test_a_target_on_the_command_line_leaves_the_file_alone(folder: Path) -> None:
    """Nobody's trial takes the pid file, the user and the workers of the service itself."""
    (folder / "portico.toml").write_text("this is no TOML")
    reading = Sources(
        variables={"PORTICO_IDLE_TIMEOUT": "5"}, options=command_line("app:Other", "udp://:1")
    ).read()
    service = only(reading)
    assert (reading.file, service.target) == (None, "app:Other")
    assert service.settings.idle_timeout == 5


def test_a_file_that_is_named_beside_a_target_keeps_its_services_to_itself(folder: Path) -> None:
    """And it says of the processes and of all services what it says."""
    (folder / "portico.toml").write_text("workers = 2\nbacklog = 7\n" + TWO)
    variables = {"PORTICO_WEB_BACKLOG": "3", "PORTICO_ADDRESSES": "tcp://:99"}
    reading = Sources(
        config="portico.toml", variables=variables, options=command_line("app:Other", "udp://:1")
    ).read()
    service = only(reading)
    assert (service.name, service.target) == ("portico", "app:Other")
    assert (service.addresses, service.settings.backlog) == ((parse("udp://:1"),), 7)
    assert reading.configuration.process.workers == 2


def test_a_file_is_read_anew_each_time(folder: Path) -> None:
    sources = Sources()
    for timeout in (5, 6):
        (folder / "portico.toml").write_text(f"{SERVED}idle_timeout = {timeout}")
        assert only(sources.read()).settings.idle_timeout == timeout


# --- what is wrong ----------------------------------------------------------------------


def refused(*arguments: Any, **more: Any) -> str:
    with pytest.raises(PorticoError) as caught:
        read(*arguments, **more)
    return str(caught.value)


WEB = '[services.web]\ntarget = "app:Echo"\naddresses = "tcp://:80"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 'expected target: MODULE:HANDLER or PATH.py:HANDLER, such as "app:Echo"'),
        ('target = "app:Echo"', "expected addresses: addresses such as ["),
        ("[services.web]", "services.web: expected target: MODULE:HANDLER or"),
        (TWO + "[services.c]", "services.c: expected addresses: addresses such as ["),
        (SERVED + "idle_timeout = 0", 'idle_timeout = 0: expected more than 0, or "none" for no'),
        (
            WEB + "max_connections = 0",
            'services.web.max_connections = 0: expected 1 or more, "auto", or "none" for no limit',
        ),
        (WEB + 'denied_networks = ["::1", "x"]', 'services.web.denied_networks = "x": expected'),
        (WEB + "hubs = 4", 'services.web.hubs = 4: expected engine="green" with it; "threads"'),
        (WEB + 'engine = "gren"', 'services.web.engine = "gren": expected "green"'),
        (WEB + 'key = "a.key"', 'services.web.key = "a.key": expected cert beside it'),
        (WEB + 'cert = "a.pem"', 'services.web.cert = "a.pem": expected a tls://HOST:PORT address'),
        (
            WEB.replace("tcp:", "tls:"),
            "services.web: expected cert: a certificate (and key, its key) for tls://:80",
        ),
        (
            SERVED.replace("tcp:", "tls:"),
            "expected cert: a certificate (and key, its key) for tls://:9000",
        ),
        (SERVED + "max_worker_memory = 0", "max_worker_memory = 0: expected a number of bytes, or"),
        (SERVED + 'max_worker_memory = "0 MiB"', 'max_worker_memory = "0 MiB": expected a number'),
        (SERVED + 'log_level = "all"', 'log_level = "all": expected one of "debug", "info"'),
        (
            'addresses = "tcp://:1"\n' + TWO,
            'addresses = "tcp://:1": expected it in each table of web, names, since an address has',
        ),
    ],
)
def test_what_is_wrong_in_a_file_says_where_it_stands(
    folder: Path, text: str, expected: str
) -> None:
    assert refused(text).startswith(f"portico.toml: {expected}")


def test_more_addresses_than_workers_can_count_at_are_too_many(folder: Path) -> None:
    most = [f"unix:{number}" for number in range(63)]
    assert len(only(read(target="app:Echo", addresses=most, workers=2)).addresses) == 63
    more = [*most, "unix:more"]
    expected = "64 addresses: expected 63 at the most with workers"
    assert refused(target="app:Echo", addresses=more, workers=2) == expected
    assert len(only(read(target="app:Echo", addresses=more)).addresses) == 64


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PORTICO_BACKLOG": "0"}, "PORTICO_BACKLOG=0: expected 1 or more"),
        ({"PORTICO_WORKERS": "0"}, "PORTICO_WORKERS=0: expected 1 to 1024, 'auto', or none"),
        ({"PORTICO_WEB_BACKLOG": "0"}, "PORTICO_WEB_BACKLOG=0: expected 1 or more"),
        ({"PORTICO_CERT": "a"}, "PORTICO_CERT=a: expected a tls://HOST:PORT address beside it"),
        ({"PORTICO_WEP_HUBS": "0"}, "PORTICO_WEP_HUBS: expected the name of a setting: PORTICO_WE"),
        ({"PORTICO_ADDRESSES": "tcp://:1"}, "PORTICO_ADDRESSES=tcp://:1: expected it in each ta"),
    ],
)
def test_what_is_wrong_in_a_variable_says_which(
    folder: Path, variables: dict[str, str], expected: str
) -> None:
    assert refused(TWO, variables=variables).startswith(expected)


def test_what_is_wrong_elsewhere_says_its_name(folder: Path) -> None:
    assert refused(TWO, given={"backlog": "0"}) == "backlog=0: expected 1 or more"
    assert refused(TWO, backlog=0) == "backlog=0: expected 1 or more"
    assert refused(TWO, backlok=5) == (
        "backlok=5: expected the name of a setting, such as 'backlog'"
    )


def test_what_is_not_there_is_told_with_what_could_be(folder: Path) -> None:
    assert refused().startswith("nothing to serve: expected TARGET ADDRESS..., or a file portico")
    assert refused(TWO, services=["wep"]) == "service='wep': expected 'web'"
    assert refused(services=["x"]) == "service='x': expected 'web' or 'names'"


def test_a_target_of_a_program_without_an_address_is_named(tmp_path: Path) -> None:
    with pytest.raises(PorticoError, match=r"^app:Echo: expected addresses: addresses such as"):
        Sources(directory=tmp_path, keywords={"target": "app:Echo"}).read()


def test_a_chosen_service_and_a_target_are_one_too_many(folder: Path) -> None:
    with pytest.raises(PorticoError, match=r"^expected no TARGET beside --service"):
        Sources(options=command_line(), services=["web"]).read()


# --- what the values name ---------------------------------------------------------------


def test_what_a_value_names_is_told_with_where_the_value_stands(folder: Path) -> None:
    text = SERVED.replace("tcp:", "tls:") + 'cert = "a.pem"\n'
    reading = read(text, variables={"PORTICO_KEY": "/a.key"})
    target = TargetError("app:Echo", "there is none")
    assert str(reading.explained(target)) == (
        "portico.toml: target: cannot serve 'app:Echo': there is none"
    )
    cert = CertificateError(2, "no such file", str(folder / "a.pem"))
    assert str(reading.explained(cert)) == f"portico.toml: cert: {folder}/a.pem: no such file"
    key = CertificateError(2, "no such file", "/a.key")
    assert str(reading.explained(key)) == "PORTICO_KEY: /a.key: no such file"


def test_a_value_that_proves_wrong_later_is_told_with_where_it_stands(folder: Path) -> None:
    """Whether there is such a user is known to nobody before."""
    reading = read(SERVED + 'user = "nobdy"\nsocket_owner = "me"\n')
    error = SettingError("user", "nobdy", "the name of a user, or None")
    explained = reading.explained(error)
    assert str(explained) == (
        'portico.toml: user = "nobdy": expected the name of a user, or "none"'
    )
    assert reading.explained(explained) is explained
    other = SettingError("socket_owner", "you", "the name of a user")
    assert reading.explained(other) is other


def test_what_is_in_front_of_the_user_needs_no_place(folder: Path) -> None:
    reading = Sources(options=command_line("app:Echo")).read()
    for error in (TargetError("app:Echo", "x"), TargetError("other:x", "x"), PorticoError("x")):
        assert reading.explained(error) is error
