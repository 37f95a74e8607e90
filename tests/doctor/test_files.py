"""Whether the files can be had that settings name, with folders that really are in the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from portico.configuration import ProcessSettings
from portico.doctor import program
from portico.doctor.facts import Account, Facts, FileFacts
from portico.doctor.files import look_at, owner_problems
from portico.doctor.findings import Severity
from tests.doctor.test_rules import configured, said
from tests.support import in_child

SOMEBODY = Account(words="user somebody", uid=65_533, gid=65_533, groups=frozenset({65_532}))


def of_log(path: Path, account: Account | None = None) -> FileFacts:
    (found,) = look_at(ProcessSettings(log_file=path), account)
    return found


def of_pid_file(path: Path) -> FileFacts:
    (found,) = look_at(ProcessSettings(pid_file=path), None)
    return found


def severities(found: FileFacts) -> list[Severity]:
    return said(program.files, Facts(files=(found,)), configured())


def test_of_a_process_without_files_nothing_is_said() -> None:
    assert look_at(ProcessSettings(), None) == ()
    assert said(program.files, Facts(owners={"echo": ""}), configured()) == []


def test_a_file_that_can_be_made_is_fine_and_not_made(tmp_path: Path) -> None:
    for found in (of_log(tmp_path / "a"), of_pid_file(tmp_path / "a")):
        assert (found.problem, severities(found)) == ("", [Severity.OK])
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_is_there_is_fine(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    assert of_log(tmp_path / "log").problem == ""


def test_a_log_that_is_a_fifo_needs_a_reader(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    assert of_log(fifo).problem == "it is a FIFO that nobody reads"
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert of_log(fifo).problem == ""
    finally:
        os.close(reader)


def test_a_log_that_is_a_socket_fails(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "log"))
    assert of_log(tmp_path / "log").problem == "it is a socket"


@pytest.mark.parametrize("look", [of_log, of_pid_file])
def test_a_folder_that_is_not_there_or_none_fails(tmp_path: Path, look: type) -> None:
    (tmp_path / "file").write_text("")
    found = look(tmp_path / "no" / "a")
    assert found.problem == f"there is no directory {tmp_path}/no"
    assert severities(found) == [Severity.FAIL]
    assert look(tmp_path / "file" / "a").problem.endswith("ot a directory")


def test_a_link_to_a_folder_that_is_not_there_fails(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("no/log")
    assert of_log(tmp_path / "log").problem == f"there is no directory {tmp_path}/no"


def test_a_log_that_is_a_directory_fails(tmp_path: Path) -> None:
    assert of_log(tmp_path).problem == "it is a directory"


@pytest.mark.parametrize(
    ("mode", "owner", "group", "expected"),
    [
        (0o600, 65_533, 0, True),
        (0o066, 65_533, 0, False),
        (0o060, 0, 65_533, True),
        (0o020, 0, 65_532, True),
        (0o606, 0, 65_532, False),
        (0o602, 0, 0, True),
        (0o660, 0, 0, False),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_it_is_whom_the_service_becomes_who_writes_the_log(
    tmp_path: Path, mode: int, owner: int, group: int, *, expected: bool
) -> None:
    log = tmp_path / "log"
    log.write_text("")
    os.chown(log, owner, group)
    log.chmod(mode)
    assert (of_log(log, SOMEBODY).problem == "") is expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_without_permission_a_file_fails(tmp_path: Path) -> None:
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    tmp_path.chmod(0o755)
    (tmp_path / "log").write_text("")

    def look() -> None:
        os.setuid(65_533)
        assert of_log(tmp_path / "log").problem == "no permission to write it"
        expected = f"no permission to make a file in {tmp_path}"
        assert of_log(tmp_path / "other").problem == expected
        assert of_pid_file(tmp_path / "other").problem == expected

    assert in_child(look) == 0


def test_a_pid_file_of_a_process_that_is_alive_may_be_that_of_the_service(tmp_path: Path) -> None:
    wait = [sys.executable, "-c", "input()"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE) as process:
        (tmp_path / "pid").write_text(f"{process.pid}\n")
        found = of_pid_file(tmp_path / "pid")
        assert process.stdin is not None
        process.stdin.write(b"\n")
    assert found.holder.startswith(f"process {process.pid} (")
    assert severities(found) == [Severity.WARN]
    assert of_pid_file(tmp_path / "pid").holder == ""


def test_a_pid_file_with_something_else_in_it_fails(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("a diary")
    assert "it holds something else" in of_pid_file(tmp_path / "pid").problem


def test_an_owner_of_a_socket_who_is_not_there_fails() -> None:
    problems = owner_problems(configured("unix:a", socket_owner="no such user"))
    assert problems["echo"].startswith("socket_owner='no such user': expected the name of a user")
    assert said(program.files, Facts(owners=problems), configured()) == [Severity.FAIL]
