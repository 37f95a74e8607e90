from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from portico import processes
from portico.errors import PorticoError
from portico.pidfile import PidFile, PidFileError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "portico.pid"


@contextmanager
def another_process() -> Iterator[int]:
    """A process that is alive, and does nothing."""
    program = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has its own name from here on, and not that of its parent
        yield process.pid
        process.kill()


@pytest.fixture
def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_file_holds_the_number_while_the_block_runs(path: Path) -> None:
    with PidFile(path):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()
    assert list(path.parent.iterdir()) == []


def test_everybody_may_read_it_whatever_the_umask_is(path: Path) -> None:
    before = os.umask(0o077)
    try:
        with PidFile(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_without_a_path_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with PidFile(None) as held:
        held.hand_over(1, str(tmp_path / "pid"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_dead_process_is_replaced(path: Path, dead: int) -> None:
    path.write_text(f"{dead}\n")
    with PidFile(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_an_empty_file_is_replaced(path: Path) -> None:
    """One that could not be removed is emptied instead."""
    path.touch()
    with PidFile(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_live_process_is_named_and_keeps_its_file(path: Path) -> None:
    with another_process() as pid:
        path.write_text(f"{pid}\n")
        command = Path(f"/proc/{pid}/comm").read_text().strip()
        with pytest.raises(PidFileError) as caught, PidFile(path):
            pass
        assert str(caught.value) == (
            f"cannot have the pid file {path}: process {pid} ({command}) has it, and is alive"
        )
        assert path.read_text() == f"{pid}\n"
    assert isinstance(caught.value, PorticoError)
    assert isinstance(caught.value, OSError)


def test_a_process_of_somebody_else_is_alive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    path.write_text("1\n")
    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(PidFileError, match=r"process 1 \("), PidFile(path):
        pass


def test_a_number_that_was_given_to_a_process_since_then_is_stale(path: Path) -> None:
    """After a restart of the machine, or of a container with the file in a volume."""
    with another_process() as pid:
        path.write_text(f"{pid}\n")
        an_hour_ago = time.time() - 3600
        os.utime(path, (an_hour_ago, an_hour_ago))
        with PidFile(path):
            assert path.read_text() == f"{os.getpid()}\n"


def test_where_the_age_cannot_be_told_the_process_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "Path", lambda _: Path("/no/such"))
    with another_process() as pid:
        path.write_text(f"{pid}\n")
        os.utime(path, (0, 0))
        with pytest.raises(PidFileError, match=rf"process {pid} \(unknown\)"), PidFile(path):
            pass


def test_the_number_of_this_very_process_is_of_one_before_it(path: Path) -> None:
    """In a container the first process has the same number each time."""
    path.write_text(f"{os.getpid()}\n")
    with PidFile(path):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


@pytest.mark.parametrize("text", ["nginx", "-1", "0", "12 34", "9" * 40, "\n7 \nx"])
def test_a_file_that_holds_something_else_is_left_alone(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(PidFileError, match="holds something else"), PidFile(path):
        pass
    assert path.read_text() == text


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.write_text("")
    path.symlink_to(other)
    with pytest.raises(PidFileError, match="not a regular file"), PidFile(path):
        pass
    assert other.read_text() == ""


def test_what_the_system_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(PidFileError, match="No such file or directory"), PidFile(tmp_path / "no/x"):
        pass


def test_no_draft_stays_where_the_file_cannot_be_made(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, mode: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(PidFileError, match="no"), PidFile(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_the_draft_of_a_dead_process_with_the_same_number_is_replaced(path: Path) -> None:
    path.with_name(f".portico.pid.{os.getpid()}").touch()
    with PidFile(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_file_that_somebody_else_has_written_is_not_removed(path: Path) -> None:
    with PidFile(path):
        path.write_text("1\n")
    assert path.read_text() == "1\n"


def test_a_child_does_not_remove_it(path: Path) -> None:
    held = PidFile(path)
    with held:
        child = os.fork()
        if child == 0:
            held.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert path.exists()
    assert not path.exists()


def test_it_is_removed_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with PidFile("portico.pid"):
        monkeypatch.chdir("/")
    assert not (tmp_path / "portico.pid").exists()


def test_where_it_may_not_be_removed_any_more_it_is_emptied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may have become another user, who may not change the directory."""

    def refuse(self: Path) -> None:
        raise PermissionError

    with PidFile(path):
        monkeypatch.setattr(Path, "unlink", refuse)
    assert path.read_text() == ""


def test_a_file_that_was_handed_over_is_the_successors(path: Path) -> None:
    with another_process() as pid:
        with PidFile(path) as held:
            held.hand_over(pid, str(path))
            assert path.read_text() == f"{pid}\n"
        assert path.read_text() == f"{pid}\n"


def test_a_file_is_handed_over_whatever_its_name_is_to_the_successor(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path.parent)
    with PidFile(path) as held:
        held.hand_over(2, str(link / path.name))
        assert path.read_text() == "2\n"


@pytest.mark.parametrize("other", ["other", None])
def test_a_file_that_the_successor_has_not_is_removed(path: Path, other: str | None) -> None:
    """Nobody else would, and its number may be a stranger's some day."""
    elsewhere = None if other is None else path.with_name(other)
    if elsewhere is not None:
        elsewhere.write_text("2\n")
    with PidFile(path) as held:
        held.hand_over(2, None if elsewhere is None else str(elsewhere))
        assert not path.exists()
    assert elsewhere is None or elsewhere.read_text() == "2\n"


def test_a_file_that_is_another_process_is_not_handed_over(path: Path) -> None:
    with PidFile(path) as held:
        path.write_text("1\n")
        held.hand_over(2, str(path))
        assert path.read_text() == "1\n"


def test_a_refusal_to_hand_over_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("disk full")

    with PidFile(path) as held:
        monkeypatch.setattr(os, "pwrite", refuse)
        with pytest.raises(PidFileError, match="disk full"):
            held.hand_over(2, str(path))


def test_a_successor_waits_for_the_file_and_removes_it_at_its_end(path: Path) -> None:
    with another_process() as predecessor:
        path.write_text(f"{predecessor}\n")
        with PidFile(path, predecessor):
            assert path.read_text() == f"{predecessor}\n"
            path.write_text(f"{os.getpid()}\n")  # it hands it over
        assert not path.exists()


def test_a_successor_that_ends_first_leaves_the_file(path: Path) -> None:
    with another_process() as predecessor:
        path.write_text(f"{predecessor}\n")
        with PidFile(path, predecessor):
            pass
        assert path.read_text() == f"{predecessor}\n"


def test_a_successor_may_find_the_file_handed_over_already(path: Path) -> None:
    path.write_text(f"{os.getpid()}\n")
    with PidFile(path, predecessor=1) as held:
        held.hand_over(2, str(path))
        assert path.read_text() == "2\n"


def inherited(path: Path) -> int:
    """Return what a predecessor has open of its file, as another process has it."""
    return os.open(path, os.O_RDWR)


def test_a_successor_takes_the_file_over_from_a_predecessor_that_is_dead(
    path: Path, dead: int
) -> None:
    path.write_text(f"{dead}\n")
    with PidFile(path, dead, inherited(path)) as held:
        held.take_over()
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_a_successor_writes_by_the_descriptor_that_it_has_inherited(
    path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another user by now, who may read the file and not open it to write."""
    path.write_text(f"{dead}\n")
    with PidFile(path, dead, inherited(path)) as held:
        opened = os.open

        def narrow(path: Path, flags: int, mode: int = 0) -> int:
            if flags & os.O_RDWR:
                raise PermissionError(13, "Permission denied")
            return opened(path, flags, mode)

        monkeypatch.setattr(os, "open", narrow)
        held.take_over()
        assert path.read_text() == f"{os.getpid()}\n"
        held.hand_over(7, str(path))
        assert path.read_text() == "7\n"


def test_a_file_that_is_somebody_elses_by_now_is_not_taken_over(path: Path, dead: int) -> None:
    path.write_text(f"{dead}\n")
    with PidFile(path, dead, inherited(path)) as held:
        path.write_text("1\n")
        held.take_over()
        assert path.read_text() == "1\n"


def test_without_a_predecessor_there_is_nothing_to_take_over(path: Path) -> None:
    with PidFile(path) as held:
        held.take_over()
        assert path.read_text() == f"{os.getpid()}\n"


def test_the_descriptor_of_another_file_is_closed(path: Path, tmp_path: Path) -> None:
    """The settings name another one now, or none at all, or one that cannot be had."""
    other = tmp_path / "other"
    other.touch()
    for named in (path, None):
        descriptor = inherited(other)
        with PidFile(named, 1, descriptor) as held:
            assert held.descriptor != descriptor or named is path
            if named is not None:
                assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    path.write_text("nginx")
    descriptor = inherited(other)
    with pytest.raises(PidFileError), PidFile(path, 1, descriptor):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert other.read_text() == ""
