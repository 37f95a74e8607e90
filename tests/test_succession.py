"""What a process says and does of the one before it and the one after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from portico.channel import Channel
from portico.configuration import ProcessSettings
from portico.directory import Directory
from portico.handover import Heritage
from portico.listeners import Listeners
from portico.succession import Succession
from portico.systemd import Notifier
from tests.support import nothing_left_behind


def succession(heritage: Heritage | None = None) -> Succession:
    return Succession("process", Listeners(), Notifier.take({}), heritage, Directory.current())


def test_without_anybody_before_and_after_there_is_nothing_to_do() -> None:
    alone = succession()
    assert alone.predecessor is None
    assert not alone.take_over()
    assert alone.fileno() is None
    assert not alone.attend()
    alone.stop()
    alone.let_go()
    assert not alone.has_handed_over


def test_a_predecessor_is_told_once_that_it_can_go() -> None:
    with nothing_left_behind():
        ours, theirs = Channel.pair()
        heir = succession(Heritage(theirs, 4711, (), None))
        before = heir.predecessor
        assert heir.take_over()
        assert (before, heir.predecessor) == (4711, None)
        assert not heir.take_over()
        assert ours.receive() == [{"kind": "serving", "listeners": [], "pid_file": None}]
        ours.close()


def test_counters_that_cannot_be_read_are_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_left_behind():
        ours, theirs = Channel.pair()
        heir = succession(Heritage(theirs, 4711, (), "nonsense"))
        heir.counters().close()
        assert "counts from nothing: counters='nonsense'" in capsys.readouterr().err
        heir.let_go()
        assert ours.receive() is None
        ours.close()


def test_counters_that_cannot_be_read_can_be_declined(capsys: pytest.CaptureFixture[str]) -> None:
    """A process that counts for itself misses nothing."""
    with nothing_left_behind():
        ours, theirs = Channel.pair()
        heir = succession(Heritage(theirs, 4711, (), "nonsense"))
        heir.decline_counters()
        assert capsys.readouterr().err == ""
        heir.let_go()
        ours.close()


def test_an_heir_that_the_system_refuses_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere")
    alone = succession()
    alone.begin([], ProcessSettings())
    assert "cannot start another process:" in capsys.readouterr().err
    assert not alone.attend()


@pytest.mark.parametrize("is_ending", [False, True])
def test_how_an_heir_ended_is_said_and_another_can_be_tried(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    is_ending: bool,
) -> None:
    (tmp_path / "heir.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr("sys.orig_argv", ["python", str(tmp_path / "heir.py")])
    alone = succession()
    with nothing_left_behind():
        for _ in range(2):
            alone.begin([], ProcessSettings(start_timeout=None))
            if is_ending:
                monkeypatch.setattr("portico.handover.Heir.stop", lambda _: None)
                alone.stop()
            said = ""
            while "the other process" not in said:
                assert not alone.attend()
                said += capsys.readouterr().err
            assert "the other process exited with status 3 before it served" in said
            assert ("; this one goes on" in said) == (not is_ending)


def test_the_first_process_of_a_container_does_not_hand_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its successor would be killed when it ends."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    alone = succession()
    alone.begin([], ProcessSettings())
    assert alone.fileno() is None
    assert "cannot hand over as process 1" in capsys.readouterr().err
