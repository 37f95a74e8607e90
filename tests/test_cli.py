from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import pytest
from click.testing import CliRunner

import portico
from portico import cli, events, service, soloist, swap
from portico.address import InternetAddress, Scheme, UnixAddress
from portico.engines import ENGINES
from portico.lifecycle import DrainReport
from portico.notation import NOTATIONS
from portico.tally import Tally
from tests.support import in_child, recorded

HANDLER = "portico:BaseRequestHandler"
LOOPBACK = "tcp://127.0.0.1:0"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a command changes in its process is put back, or not changed at all.

    It runs in a directory of its own, so that no file of settings is found but the test's.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soloist, "raise_descriptor_limit", lambda: None)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    log = logging.getLogger("portico")
    level = log.level
    yield
    log.setLevel(level)


def status(*arguments: str) -> int | str | None:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


@pytest.fixture
def stop_when_serving() -> Iterator[None]:
    """A SIGTERM that comes as soon as a server accepts."""
    unsubscribe = events.subscribe(
        lambda _: signal.raise_signal(signal.SIGTERM), events.ServerStarted
    )
    yield
    unsubscribe()


# ---------------------------------------------------------------------------------- the commands


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(cli.commands, ["--version"])
    assert (result.exit_code, result.output) == (0, f"portico {portico.__version__}\n")


@pytest.mark.parametrize("command", [[], ["serve"], ["doctor"], ["check"], ["run"]])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_explains_itself(command: list[str], option: str) -> None:
    result = CliRunner().invoke(cli.commands, [*command, option])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")
    # Each line is meant for a terminal of eighty columns.
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--no-such"], "No such option"),
        (["no-such"], "No such command 'no-such'"),
        (["serve", HANDLER], "Missing argument 'ADDRESS...'"),
        (["check", HANDLER], "Missing argument 'ADDRESS...'"),
        (["serve", HANDLER, LOOPBACK, "--engine", "no"], "'no' is not one of 'threads', 'forks'"),
        (["serve", HANDLER, LOOPBACK, "--log-level", "no"], "'no' is not one of 'debug', 'info'"),
        (["run"], "Missing argument 'PROGRAM'"),
        (["run", "--engine", "no", "a.py"], "'no' is not one of"),
        (["run", "--no-such", "a.py"], "No such option"),
        (["serve", HANDLER, LOOPBACK, "--hubs", "0"], "0 is not in the range x>=1"),
        (["serve", HANDLER, LOOPBACK, "--hubs", "many"], "'many' is not a valid integer"),
        (["run", "--engine", "green", "--hubs", "-1", "a.py"], "-1 is not in the range x>=1"),
    ],
)
def test_wrong_usage_has_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err


def test_only_the_main_program_starts_the_command() -> None:
    """Tools that import every module of a package may import that one, too."""
    main: Any = importlib.import_module("portico.__main__")
    assert main.main is cli.main


def test_an_interrupt_before_there_is_anything_to_stop_ends_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the status of a shell for SIGINT."""

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("portico.target.load", interrupt)
    assert status("serve", HANDLER, LOOPBACK) == 130


# ----------------------------------------------------------------------------------------- serve


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no_such:Echo", LOOPBACK], "cannot serve 'no_such:Echo': there is no module 'no_such'"),
        (["portico:Echo", LOOPBACK], "cannot serve 'portico:Echo': portico has no 'Echo'"),
        (["portico:TCPServer", LOOPBACK], "cannot serve 'portico:TCPServer': it is a server"),
        ([HANDLER, "tcp:/x"], "address='tcp:/x': expected tcp://HOST:PORT, or tcp://:PORT"),
        ([HANDLER, LOOPBACK, "9000"], "address='9000': expected tcp://:9000 or udp://:9000"),
        ([LOOPBACK, HANDLER], f"cannot serve '{LOOPBACK}': it is an address, and the target"),
        (
            ["portico:DatagramRequestHandler", "udp://127.0.0.1:0", LOOPBACK],
            "cannot serve 'portico:DatagramRequestHandler': it handles datagrams, which come to",
        ),
        (
            [HANDLER, "unix:/no/such/a.sock"],
            "cannot listen on unix:/no/such/a.sock: there is no directory /no/such",
        ),
        ([HANDLER, "tls://:0"], "cert=None: expected a certificate (and key, its key) for tls://"),
        ([HANDLER, LOOPBACK, "--cert", "a.pem"], "cert='a.pem': expected a tls://HOST:PORT addre"),
        ([HANDLER, LOOPBACK, "--key", "a.key"], "key='a.key': expected cert beside it"),
        ([HANDLER, "tls://:0", "--cert", "/no/such"], "/no/such: no such file"),
        (
            [HANDLER, LOOPBACK, "--client-certificates", "always"],
            "client_certificates='always': expected one of 'none', 'optional', 'required'",
        ),
        (
            [HANDLER, LOOPBACK, "--max-connections", "0"],
            "max_connections=0: expected 1 or more, 'auto', or None for no limit",
        ),
        (
            [HANDLER, LOOPBACK, "--max-connections-per-peer", "-1"],
            "max_connections_per_peer='-1': expected a whole number, 'auto', or none for no limit",
        ),
        (
            [HANDLER, LOOPBACK, "--idle-timeout", "soon"],
            "idle_timeout='soon': expected a number of seconds, or none for no limit",
        ),
        ([HANDLER, LOOPBACK, "--idle-timeout", "0"], "idle_timeout=0.0: expected more than 0, or"),
        ([HANDLER, LOOPBACK, "--drain-timeout", "-1"], "drain_timeout=-1.0: expected 0 or more"),
        ([HANDLER, LOOPBACK, "--handshake-timeout", "nan"], "handshake_timeout=nan: expected a"),
        ([HANDLER, LOOPBACK, "--when-full", "drop"], "when_full='drop': expected one of 'wait'"),
        (
            [HANDLER, LOOPBACK, "--max-workers", "0"],
            "max_workers=0: expected engine='pool' with it",
        ),
        ([HANDLER, LOOPBACK, "--allow", "here"], "allowed_networks='here': expected networks such"),
        ([HANDLER, LOOPBACK, "--deny", "10.0.0.1/8"], "denied_networks='10.0.0.1/8': expected 10"),
        (
            [HANDLER, LOOPBACK, "--proxy-protocol", "x"],
            "proxy_protocol='x': expected networks such",
        ),
        ([HANDLER, LOOPBACK, "--backlog", "x"], "backlog='x': expected a whole number"),
        ([HANDLER, LOOPBACK, "--accept-rate", "0"], "accept_rate=0.0: expected a number of conne"),
        ([HANDLER, LOOPBACK, "--minimum-rate", "x"], "minimum_rate='x': expected a number of byte"),
        (
            [HANDLER, LOOPBACK, "--workers", "some"],
            "workers='some': expected a whole number, 'auto', or none",
        ),
        ([HANDLER, LOOPBACK, "--workers", "0"], "workers=0: expected 1 to 1024, 'auto', or None"),
        (
            [HANDLER, LOOPBACK, "--max-worker-memory", "5 lb"],
            "max_worker_memory='5 lb': expected a number of bytes, or a size such as '512 MiB'",
        ),
        ([HANDLER, LOOPBACK, "--allow", "none", "--allow", "::1"], "allowed_networks='none': exp"),
        ([HANDLER, LOOPBACK, "--config", "no.toml"], "no.toml: cannot read it: No such file or"),
        ([HANDLER, LOOPBACK, "--service", "web"], "expected no TARGET beside --service"),
        (["--service", "web"], "service='web': expected 'portico'"),
        ([], "nothing to serve: expected TARGET ADDRESS..., or a file portico.toml here (or [tool"),
        # The line stays one line.
        ([HANDLER, "unix:/no/su\nch/a.sock"], "cannot listen on unix:/no/su ch/a.sock: there is"),
    ],
)
def test_what_cannot_be_served_has_status_2_and_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("serve", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"portico: error: {expected}")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("starts")
@pytest.mark.parametrize("command", [["serve", "no_such:Echo", LOOPBACK], ["run", "a.py"]])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "green"])
def test_hubs_belong_to_one_engine(
    command: list[str], engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before anything else is looked at."""
    name, *rest = command
    assert status(name, "--engine", engine, "--hubs", "4", *rest) == 2
    assert capsys.readouterr() == (
        "",
        f"portico: error: hubs=4: expected engine='green' with it; {engine!r} has no hubs\n",
    )


@pytest.mark.usefixtures("stop_when_serving")
def test_a_server_has_as_many_hubs_as_were_asked_for() -> None:
    with recorded(events.ServerStarted) as started:
        assert status("serve", HANDLER, LOOPBACK, "--engine", "green", "--hubs", "3") == 0
    assert [event.server.max_hubs for event in started] == [3]


@pytest.mark.usefixtures("stop_when_serving")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"idle_timeout": 300, "handshake_timeout": 10, "when_full": "wait"}),
        (["--idle-timeout", "7.5"], {"idle_timeout": 7.5}),
        (["--idle-timeout", "none"], {"idle_timeout": None}),
        (["--handshake-timeout", "3"], {"handshake_timeout": 3}),
        (["--request-timeout", "60"], {"request_timeout": 60}),
        (
            ["--max-connections", "100"],
            {"max_connections": 100, "max_connections_per_peer": 50},
        ),
        (["--max-connections-per-peer", "3"], {"max_connections_per_peer": 3}),
        (
            ["--max-connections", "none", "--max-connections-per-peer", "auto"],
            {"max_connections": None, "max_connections_per_peer": None},
        ),
        (["--when-full", "shed"], {"when_full": "shed"}),
        (["--engine", "pool", "--max-workers", "3"], {"max_workers": 3}),
        (["--backlog", "7", "--minimum-rate", "9"], {"request_queue_size": 7, "minimum_rate": 9}),
        (["--accept-rate", "5", "--accept-burst", "8"], {"accept_rate": 5, "accept_burst": 8}),
        (["--farewell", "bye"], {"farewell": b"bye"}),
        (["--allow", "none"], {"allowed_networks": None}),
    ],
)
def test_a_server_has_the_limits_that_were_asked_for(
    arguments: list[str], expected: dict[str, object]
) -> None:
    with recorded(events.ServerStarted) as started:
        assert status("serve", HANDLER, LOOPBACK, *arguments) == 0
    (server,) = (event.server for event in started)
    assert {name: getattr(server, name) for name in expected} == expected


@pytest.mark.usefixtures("stop_when_serving")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], 15), (["--drain-timeout", "0"], 0), (["--drain-timeout", "None"], None)],
)
def test_a_drain_has_the_time_that_was_asked_for(
    arguments: list[str], expected: float | None
) -> None:
    with recorded(events.DrainStarted) as started:
        assert status("serve", HANDLER, LOOPBACK, *arguments) == 0
    assert [event.timeout for event in started] == [expected]


@pytest.mark.usefixtures("stop_when_serving")
def test_networks_may_be_named_again_and_again() -> None:
    arguments = ["--allow", "10.0.0.0/8", "--allow", "::1", "--deny", "10.1.0.0/16"]
    with recorded(events.ServerStarted) as started:
        assert status("serve", HANDLER, LOOPBACK, *arguments, "--proxy-protocol", "10.2.0.1") == 0
    (server,) = (event.server for event in started)
    networks = (server.allowed_networks, server.denied_networks, server.proxy_protocol)
    assert [list(map(str, each)) for each in networks] == [
        ["10.0.0.0/8", "::1/128"],
        ["10.1.0.0/16"],
        ["10.2.0.1/32"],
    ]


def test_every_option_that_is_not_given_leaves_the_default_to_the_settings() -> None:
    given = cli.commands.commands["serve"].make_context("serve", [HANDLER, LOOPBACK]).params
    own = {"target_name", "address_texts", "config", "services", "reload"}
    assert set(given) - own == set(NOTATIONS) - {"target", "addresses"}
    assert {given[name] for name in set(given) - own} <= {None, ()}


FILE = f"""
idle_timeout = 7
drain_timeout = 0
[services.web]
target = "{HANDLER}"
addresses = "{LOOPBACK}"
[services.names]
target = "{HANDLER}"
addresses = ["udp://127.0.0.1:0", "unix:a.sock"]
idle_timeout = 8
"""


def serving(*arguments: str) -> set[tuple[str, float]]:
    """Serve until a signal; the kinds of the servers, and how long a connection may be idle."""
    servers: list[Any] = []

    def note(event: events.ServerStarted) -> None:
        servers.append(event.server)
        if len(servers) == arguments.count("--service") or len(servers) == 3:
            signal.raise_signal(signal.SIGTERM)

    unsubscribe = events.subscribe(note, events.ServerStarted)
    try:
        assert status("serve", *arguments) == 0
    finally:
        unsubscribe()
    return {(str(each.address.scheme), each.idle_timeout) for each in servers}


def test_a_file_says_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "portico.toml").write_text(FILE)
    assert serving() == {("tcp", 7), ("udp", None), ("unix", 8)}
    assert serving("--service", "web") == {("tcp", 7)}
    monkeypatch.setenv("PORTICO_IDLE_TIMEOUT", "9")
    assert serving() == {("tcp", 9), ("udp", None), ("unix", 9)}
    assert serving("--idle-timeout", "10") == {("tcp", 10), ("udp", None), ("unix", 10)}


def test_a_variable_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text(FILE)
    monkeypatch.setenv("PORTICO_CONFIG", "a.toml")
    assert serving("--service", "web") == {("tcp", 7)}


# ----------------------------------------------------------------------------------------- check


def test_a_check_shows_what_would_run_and_opens_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "portico.toml").write_text(FILE)
    monkeypatch.setenv("PORTICO_WEB_BACKLOG", "5")
    monkeypatch.setattr("portico.opening.open_listener", lambda *_: pytest.fail("it is opened"))
    assert status("check", "--drain-timeout", "3", "--service", "web") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "# One process serves.",
        'workers = "none" # default',
        "",
        "[services.web]",
        f'target = "{HANDLER}" # portico.toml: services.web.target',
        f'addresses = ["{LOOPBACK}"] # portico.toml: services.web.addresses',
        'engine = "threads" # default',
        "backlog = 5 # PORTICO_WEB_BACKLOG",
        "idle_timeout = 7 # portico.toml: idle_timeout",
        "drain_timeout = 3.0 # --drain-timeout",
    ]


def test_a_check_shows_the_defaults_if_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("check", HANDLER, LOOPBACK, "--all") == 0
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines() if " = " in line} == {
        name for name in NOTATIONS if name != "client_certificates"
    }
    (target,) = (line for line in out.splitlines() if line.startswith("target"))
    assert target.endswith("# the command line")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('idle_timeout = "x"', 'portico.toml: idle_timeout = "x": expected a number of seconds'),
        (
            'target = "no_such:Echo"\naddresses = "tcp://:1"',
            "portico.toml: target: cannot serve 'no_such:Echo': there is no module 'no_such'",
        ),
        (
            'target = "portico:DatagramRequestHandler"\naddresses = "tcp://:1"',
            "portico.toml: target: cannot serve 'portico:DatagramRequestHandler': it handles data",
        ),
        (
            f'target = "{HANDLER}"\naddresses = "tls://:1"\ncert = "/no/such.pem"',
            "portico.toml: cert: /no/such.pem: no such file",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_what_cannot_be_served_is_told_with_its_place_in_the_file(
    command: str, text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "portico.toml").write_text(text)
    assert status(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"portico: error: {expected}")
    assert err.count("\n") == 1


def test_a_check_does_without_what_is_passed_later(capsys: pytest.CaptureFixture[str]) -> None:
    """Systemd passes its sockets to the service, and not to whoever checks it."""
    assert status("check", HANDLER, "systemd:web", "fd://3", LOOPBACK) == 0
    assert 'addresses = ["systemd:web", "fd://3", ' in capsys.readouterr().out


def test_a_user_who_is_not_there_is_told_with_the_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "portico.toml").write_text('user = "no such user"\n' + FILE)
    assert status("serve") == 2
    expected = 'portico: error: portico.toml: user = "no such user": expected '
    assert capsys.readouterr().err.startswith(expected)


def test_a_check_remarks_what_has_no_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("check", HANDLER, LOOPBACK, "--max-requests", "5") == 0
    assert capsys.readouterr().err == "portico: max_requests has no use without workers\n"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_few_descriptors_to_begin_with_are_one_line(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("portico.program.run", run)
    assert status("serve", HANDLER, LOOPBACK) == 2
    expected = (
        "portico: error: cannot open what is needed to serve: expected a higher limit of desc"
    )
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("setting", ["user", "group", "socket_owner", "socket_group"])
def test_a_check_looks_for_those_who_are_named(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "portico.toml").write_text(f'{setting} = "no such name"\n' + FILE)
    assert status("check") == 2
    expected = f'portico: error: portico.toml: {setting} = "no such name": expected '
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_who_checks_need_not_be_able_to_become_whom_the_service_becomes() -> None:
    def check() -> None:
        os.setuid(65_533)
        assert status("check", HANDLER, LOOPBACK, "--user", "root") == 0

    assert in_child(check) == 0


def test_a_check_need_not_import_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine where they are not installed, and their users are not known."""
    assert status("check", "no_such:Echo", LOOPBACK, "--no-import", "--user", "no such") == 0
    assert 'target = "no_such:Echo"' in capsys.readouterr().out


@pytest.mark.usefixtures("stop_when_serving")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_says_when_it_is_ready_and_what_it_did(
    engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("serve", HANDLER, LOOPBACK, "--engine", engine) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"portico: ready on tcp://127\.0\.0\.1:[1-9]\d*\n"
        r"portico: drained in \d+\.\d s: 0 finished, 0 idle, 0 forced\n"
        r"portico: stopped after \d+\.\d s: 0 requests served\n",
        err,
    )


def test_each_of_several_servers_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"unix:{tmp_path}/a.sock"
    report = DrainReport(4, 2, 1, 1, 1.23, 0.94)
    tallies = [
        Tally(InternetAddress(Scheme.TCP, "127.0.0.1", 0), 3, 0, 1, report),
        Tally(UnixAddress(Scheme.UNIX, f"{tmp_path}/a.sock"), 1, 2, 0),
    ]
    monkeypatch.setattr(service.Service, "run", lambda _: tallies)
    assert status("serve", HANDLER, LOOPBACK, path) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == f"portico: ready on {path}"
    assert lines[2] == (
        f"portico: {LOOPBACK}: drained in 1.2 s: 2 finished, 1 idle, 1 forced;"
        " the longest took 0.9 s"
    )
    assert lines[3] == f"portico: {LOOPBACK}: 3 requests served, 1 cut off"
    assert lines[4] == f"portico: {path}: 1 request served, 2 refused"
    assert re.fullmatch(
        r"portico: stopped after \d+\.\d s: 4 requests served, 2 refused, 1 cut off", lines[5]
    )


@pytest.mark.usefixtures("stop_when_serving")
@pytest.mark.parametrize(
    ("level", "told"),
    [("debug", {"INFO"}), ("info", {"INFO"}), ("warning", set()), ("critical", set())],
)
def test_the_log_tells_what_it_was_asked_to(
    level: str, told: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The events of the servers; after the stop nobody listens to them any more."""
    assert status("serve", HANDLER, LOOPBACK, "--log-level", level) == 0
    records = [record for record in caplog.records if record.name == "portico"]
    assert {record.levelname for record in records} == told
    assert not events.ServerStopped.subscribers


def test_a_failing_loop_is_no_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a fault of the program, and its traceback is needed."""

    def fail(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(service.Service, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["serve", HANDLER, LOOPBACK])


def test_handlers_that_were_left_behind_end_with_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the end of an interpreter whose threads still run."""
    exits: list[int] = []
    monkeypatch.setattr(service.Service, "run", lambda _: [])
    monkeypatch.setattr(service.Service, "has_left_handlers", True)
    monkeypatch.setattr("os._exit", exits.append)
    assert status("serve", HANDLER, LOOPBACK) == 0
    assert exits == [0]


def test_an_address_in_use_names_who_could_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        assert status("serve", HANDLER, text) == 2
    assert capsys.readouterr().err == (
        f"portico: error: cannot listen on {text}: in use by this very process;"
        " is the address given twice?\n"
    )


# ------------------------------------------------------------------------------------------- run


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What a command asks the swap to do, in order, instead of doing it."""
    calls: list[tuple[str, ...]] = []

    def install(engine: str, *, hubs: int | None) -> None:
        calls.append(("install", engine) if hubs is None else ("install", engine, str(hubs)))

    def run_path(program: str, args: Sequence[str]) -> None:
        calls.append(("path", program, *args))

    def run_module(program: str, args: Sequence[str]) -> None:
        calls.append(("module", program, *args))

    monkeypatch.setattr(swap, "install", install)
    monkeypatch.setattr(swap, "tell_stalls", lambda: None)
    monkeypatch.setattr(swap, "run_path", run_path)
    monkeypatch.setattr(swap, "run_module", run_module)
    return calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a.py"], [("install", "threads"), ("path", "a.py")]),
        (["--engine", "forks", "a.py"], [("install", "forks"), ("path", "a.py")]),
        (
            ["--engine", "green", "--hubs", "4", "a.py", "--hubs", "0"],
            [("install", "green", "4"), ("path", "a.py", "--hubs", "0")],
        ),
        # What follows the program belongs to the program.
        (
            ["a.py", "-m", "--engine", "no", "--help", "--", "-x"],
            [
                ("install", "threads"),
                ("path", "a.py", "-m", "--engine", "no", "--help", "--", "-x"),
            ],
        ),
        (["-m", "http.server"], [("install", "threads"), ("module", "http.server")]),
        (
            ["-m", "http.server", "--bind", "::1", "8000"],
            [("install", "threads"), ("module", "http.server", "--bind", "::1", "8000")],
        ),
        (
            ["-m", "--engine", "serial", "http.server", "-m"],
            [("install", "serial"), ("module", "http.server", "-m")],
        ),
    ],
)
def test_a_program_is_run_with_its_own_arguments(
    arguments: list[str], expected: list[tuple[str, ...]], starts: list[tuple[str, ...]]
) -> None:
    assert status("run", *arguments) == 0
    assert starts == expected


@pytest.mark.usefixtures("starts")
def test_a_program_that_is_not_there_has_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_path(program: str, _: object) -> None:
        raise swap.ProgramError(program, "No such file or directory")

    monkeypatch.setattr(swap, "run_path", run_path)
    assert status("run", "a.py") == 2
    expected = "portico: error: cannot run 'a.py': No such file or directory\n"
    assert capsys.readouterr().err == expected


@pytest.mark.usefixtures("starts")
@pytest.mark.parametrize("code", [0, 3, "a message", None])
def test_a_program_that_exits_has_its_own_status(
    monkeypatch: pytest.MonkeyPatch, code: int | str | None
) -> None:
    monkeypatch.setattr(swap, "run_path", lambda *_: sys.exit(code))
    assert status("run", "a.py") == code


@pytest.mark.usefixtures("starts")
def test_an_interrupt_of_a_program_is_pythons_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ends the process by SIGINT itself, so that a shell script ends as well."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(swap, "run_path", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["run", "a.py"])


@pytest.mark.usefixtures("starts")
@pytest.mark.parametrize("kind", [ZeroDivisionError, click.UsageError, click.Abort, OSError])
def test_a_program_that_fails_is_reported_as_python_does(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """By the hook that the program may have set, without the frames of the command."""
    reported: list[tuple[Any, ...]] = []

    def fail(*_: object) -> None:
        raise kind("of the program")

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        assert trace is not None
        reported.append((kind, str(error), trace.tb_frame.f_code.co_name))

    monkeypatch.setattr(swap, "run_path", fail)
    monkeypatch.setattr(sys, "excepthook", excepthook)
    assert status("run", "a.py") == 1
    assert reported == [(kind, "of the program", "fail")]
