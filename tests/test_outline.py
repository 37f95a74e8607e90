from __future__ import annotations

from pathlib import Path

import pytest

from portico.configuration import Configuration
from portico.outline import outline
from portico.sources import Sources

FULL = """
workers = 1
max_worker_memory = "1 MiB"
farewell = "busy\\r\\n"
[services.web]
target = "app:Echo"
addresses = ["tls://:443", "unix:web.sock"]
engine = "green"
cert = "cert.pem"
key = "key.pem"
allowed_networks = ["10.0.0.0/8"]
idle_timeout = "none"
[services.names]
target = "names.py:Names"
addresses = "udp://:53"
"""


def read(folder: Path, text: str) -> Sources:
    (folder / "portico.toml").write_text(text)
    return Sources(
        directory=folder, variables={"PORTICO_WEB_BACKLOG": "5"} if "web" in text else {}
    )


def test_what_was_given_is_shown_with_where_it_stands(tmp_path: Path) -> None:
    lines = list(outline(read(tmp_path, FULL).read()))
    assert [" ".join(line.split()) for line in lines] == [
        "# 1 worker under a supervisor serves.",
        "workers = 1 # portico.toml: workers",
        "max_worker_memory = 1048576 # portico.toml: max_worker_memory",
        "",
        "[services.web]",
        'target = "app:Echo" # portico.toml: services.web.target',
        'addresses = ["tls://:443", "unix:web.sock"] # portico.toml: services.web.addresses',
        'engine = "green" # portico.toml: services.web.engine',
        "backlog = 5 # PORTICO_WEB_BACKLOG",
        'farewell = "busy\\r\\n" # portico.toml: farewell',
        'allowed_networks = ["10.0.0.0/8"] # portico.toml: services.web.allowed_networks',
        'idle_timeout = "none" # portico.toml: services.web.idle_timeout',
        'cert = "cert.pem" # portico.toml: services.web.cert',
        'key = "key.pem" # portico.toml: services.web.key',
        "",
        "[services.names]",
        'target = "names.py:Names" # portico.toml: services.names.target',
        'addresses = ["udp://:53"] # portico.toml: services.names.addresses',
        'engine = "threads" # default',
        'farewell = "busy\\r\\n" # portico.toml: farewell',
    ]


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ("", "# One process serves."),
        ("workers = 2", "# 2 workers under a supervisor serve."),
        ("workers = 1", "# 1 worker under a supervisor serves."),
    ],
)
def test_it_begins_with_how_many_processes_there_are(
    tmp_path: Path, workers: str, expected: str
) -> None:
    text = f'{workers}\ntarget = "app:Echo"\naddresses = "tcp://:1"\n'
    assert next(outline(read(tmp_path, text).read())) == expected


@pytest.mark.parametrize("with_defaults", [True, False])
def test_what_is_shown_is_a_file_that_says_the_same(tmp_path: Path, with_defaults: bool) -> None:
    asked = read(tmp_path, FULL).read()
    written = tmp_path / "written.toml"
    written.write_text("\n".join(outline(asked, with_defaults=with_defaults)))
    again = Sources(directory=tmp_path, config="written.toml").read()
    assert comparable(again.configuration) == comparable(asked.configuration)


def comparable(configuration: Configuration) -> tuple[object, ...]:
    """The parts of it that were given, in a form in which they can be compared."""
    services = [
        (each.name, each.target, each.addresses, str(each.settings))
        for each in configuration.services
    ]
    return (configuration.process, *services)


def test_the_origins_stand_below_each_other(tmp_path: Path) -> None:
    lines = list(outline(read(tmp_path, FULL).read(), with_defaults=True))
    names = lines[lines.index("[services.names]") :]
    assert len({line.index("  # ") for line in names[1:]}) == 1
    assert "# client_certificates follows from the others" in "\n".join(names)


def test_a_path_of_a_program_is_shown_as_a_path(tmp_path: Path) -> None:
    said = {"target": "app:Echo", "addresses": "tcp://:1", "pid_file": tmp_path / "a.pid"}
    lines = outline(Sources(directory=tmp_path, keywords=said).read())
    assert f'pid_file = "{tmp_path}/a.pid"  # pid_file' in list(lines)
