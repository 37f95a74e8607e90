from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from portico.cli import commands
from portico.doctor.command import report, spoken
from portico.doctor.findings import fail, ok, warn
from tests.support import PATIENCE, ROOT

HANDLER = "portico:BaseRequestHandler"


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "portico", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_what_is_fine_has_status_0() -> None:
    status, text = run(HANDLER, "tcp://127.0.0.1:0", "--max-connections", "10")
    assert status == 0, text
    assert text.startswith(f"ok    target: {HANDLER} can be imported\n")
    assert text.endswith(", 0 to mend\n")


def test_what_does_not_work_has_status_1(tmp_path: Path) -> None:
    status, text = run(
        *(HANDLER, f"unix:{tmp_path}/no/a.sock", "--quiet", "--workers", "auto"),
        *("--max-connections", "none"),
    )
    assert status == 1
    assert "fail  address: cannot listen on" in text
    assert "\n      remedy: " in text
    assert "\nok " not in text


def test_what_the_processes_need_is_looked_at(tmp_path: Path) -> None:
    status, text = run(
        *(HANDLER, f"unix:{tmp_path}/a.sock", "--max-connections", "10", "--quiet"),
        *("--log-file", f"{tmp_path}/no/log", "--pid-file", f"{tmp_path}/no/pid"),
        *("--socket-owner", "no-such-user"),
    )
    assert status == 1
    assert text.count(f"/no/log: there is no directory {tmp_path}/no") == 1
    assert text.count(f"/no/pid: there is no directory {tmp_path}/no") == 1
    assert "fail  file: portico: socket_owner='no-such-user': expected" in text


def test_a_file_of_several_services_is_looked_at_whole(tmp_path: Path) -> None:
    (tmp_path / "portico.toml").write_text(
        f"""
workers = 2
[services.one]
target = "{HANDLER}"
addresses = "tcp://127.0.0.1:0"
[services.two]
target = "{HANDLER}"
addresses = "unix:{tmp_path}/two.sock"
backlog = 2000000000
"""
    )
    _, text = run("--config", str(tmp_path / "portico.toml"))
    assert "ok    backlog: one: 1024" in text
    assert "warn  backlog: two: 2000000000 asked for" in text
    assert f"ok    address: unix:{tmp_path}/two.sock can be had" in text


def test_a_user_that_is_not_there_fails_and_nothing_is_imported() -> None:
    status, text = run(HANDLER, "tcp://127.0.0.1:0", "--user", "no-such-user")
    assert status == 1
    assert "fail  account: " in text
    assert "target: " not in text


def test_a_trial_names_the_line_that_blocks(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\ndef handle(request, address, server):\n"
        "    request.recv(10)\n    time.sleep(0.3)\n"
    )
    status, text = run(
        *(f"{tmp_path}/slow.py:handle", "tcp://127.0.0.1:0", "--engine", "green"),
        *("--max-connections", "10", "--trial", "2", "--say", r"hi\n"),
    )
    assert status == 0
    assert re.search(r"warn  trial: .*/slow.py:handle held its event loop .*/slow.py:4\n", text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([HANDLER, "tcp:/x"], "portico: error: address='tcp:/x': expected"),
        ([HANDLER, "tcp://:0", "--workers", "no"], "workers='no'"),
        ([HANDLER, "tcp://:0", "--trial", "0"], "0.0 is not in the range"),
        ([HANDLER, "tcp://:0", "--say", "\\", "--trial", "1"], "after a backslash"),
        ([HANDLER], "Missing argument"),
        (["--config", "no.toml"], "no.toml"),
    ],
)
def test_wrong_usage_has_status_2(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(commands, ["doctor", *arguments])
    assert (result.exit_code, expected in result.output) == (2, True), result.output


def test_the_report_says_what_is_what_is_wanted_and_what_helps() -> None:
    findings = [ok("a", "is well"), warn("b", "is", "should be", "do"), fail("c", "x", "y", "z")]
    lines = [click.unstyle(line) for line in report(findings)]
    assert lines == [
        "ok    a: is well",
        "warn  b: is",
        "      wanted: should be",
        "      remedy: do",
        "fail  c: x",
        "      wanted: y",
        "      remedy: z",
        "1 fine, 1 to mend soon, 1 to mend",
    ]
    assert len(report(findings, quiet=True)) == 7


def test_what_clients_say_may_hold_any_byte() -> None:
    assert spoken(r"PING\r\n\x00ä") == b"PING\r\n\x00" + "ä".encode()
