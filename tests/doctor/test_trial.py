"""A target is imported, and served, in another process, whatever it does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from portico.doctor.facts import Account, TargetFacts, Trial
from portico.doctor.trial import TrialRequest, examine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(
    folder: Path, source: str, request: TrialRequest | None = None, scheme: str = "tcp"
) -> TargetFacts:
    path = folder / "service.py"
    path.write_text(source)
    return examine(f"{path}:Handler", [scheme], request)


def tried(folder: Path, source: str, request: TrialRequest, scheme: str = "tcp") -> Trial:
    trial = look(folder, source, request, scheme).trial
    assert trial is not None
    return trial


def tried_until(
    holds: Callable[[Trial], object], folder: Path, source: str, say: bytes, scheme: str = "tcp"
) -> Trial:
    """Return the first trial of which something holds; each is longer than the one before.

    What a machine that is held up hides from a trial of half a second, a longer one shows.
    """
    trials = (tried(folder, source, TrialRequest(each, say), scheme) for each in (0.5, 2.0, 8.0))
    for trial in trials:
        if holds(trial):
            return trial
    raise AssertionError(trial)


def places(trial: Trial) -> set[str]:
    """Where the program held its loop.

    A machine that is held up may hold the trial, too, which is at none of the program's lines.
    """
    return {Path(stall.place).name for stall in trial.stalls if stall.place}


ECHO = """
from portico import StreamRequestHandler
class Handler(StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)
"""

BLOCKS = ECHO.replace(
    "            self.wfile", "            time.sleep(0.3)\n            self.wfile"
)


def test_a_target_that_can_be_imported_has_no_problem(folder: Path) -> None:
    assert look(folder, ECHO) == TargetFacts()


def test_what_the_target_prints_is_not_in_the_way(folder: Path) -> None:
    assert look(folder, "print('hello', flush=True)\n" + ECHO) == TargetFacts()


def test_a_syntax_error_is_told_with_its_line(folder: Path) -> None:
    assert "service.py:3" in look(folder, "\n\nclass Handler(:\n").problem


def test_a_handler_for_other_requests_is_a_problem(folder: Path) -> None:
    assert "it handles streams" in look(folder, ECHO, scheme="udp").problem


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_target_is_imported_as_whom_it_is_to_be() -> None:
    """From a folder that everybody can read: those of a test are its user's alone."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        source = "import os\nraise LookupError(os.getuid(), os.getgid(), os.getgroups())\n"
        (Path(name) / "service.py").write_text(source)
        account = Account(uid=65_533, gid=65_532, groups=frozenset({7}))
        found = examine(f"{name}/service.py:Handler", ["tcp"], account=account)
    assert "LookupError: (65533, 65532, [7, 65532])" in found.problem


def test_threads_that_an_import_starts_are_named(folder: Path) -> None:
    source = "import threading, time\n" + ECHO
    source += "threading.Thread(target=time.sleep, args=(600,), name='poller').start()\n"
    assert look(folder, source).threads == ("poller",)


def test_an_import_that_ends_the_process_is_a_problem(folder: Path) -> None:
    assert "ended the process" in look(folder, "import os\nos._exit(0)").problem


def test_an_import_that_never_ends_is_ended(folder: Path) -> None:
    (folder / "service.py").write_text("import time\ntime.sleep(600)")
    found = examine("service:Handler", ["tcp"], import_patience=0.5)
    assert "has not ended after 0.5 s" in found.problem


def test_a_handler_that_blocks_is_found_with_its_line(folder: Path) -> None:
    trial = tried_until(
        lambda trial: places(trial) == {"service.py:7"},
        folder,
        "import time\n" + BLOCKS,
        b"hello\n",
    )
    assert all(stall.duration >= 0.1 for stall in trial.stalls if stall.place)
    assert trial.problem == ""


def test_a_handler_that_goes_on_holds_up_nobody(folder: Path) -> None:
    trial = tried_until(
        lambda trial: trial.answered and not places(trial), folder, ECHO, b"hello\n"
    )
    assert trial.failures == ()
    assert trial.problem == ""
    assert 0 < trial.answered <= trial.clients <= 400


def test_a_handler_that_never_ends_does_not_hold_up_the_trial(folder: Path) -> None:
    source = ECHO.replace("            self.wfile.write(line)", "            while True: pass")
    trial = tried_until(lambda trial: places(trial) == {"service.py:6"}, folder, source, b"hello\n")
    assert trial.answered == 0


def test_what_a_handler_raises_is_told_once(folder: Path) -> None:
    source = ECHO.replace("self.wfile.write(line)", "raise LookupError(line)")
    trial = tried_until(lambda trial: trial.failures, folder, source, b"secret\n")
    assert trial.failures == ("LookupError",)


def test_a_handler_that_ends_its_process_is_told(folder: Path) -> None:
    source = "import os\n" + ECHO.replace("self.wfile.write(line)", "os._exit(1)")
    # As soon as it has ended; the time is for a machine that is held up.
    assert "ended the process" in tried(folder, source, TrialRequest(30.0, b"hello\n")).problem


def test_datagrams_are_tried_as_datagrams(folder: Path) -> None:
    source = """
from portico import DatagramRequestHandler
class Handler(DatagramRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.read())
"""
    trial = tried_until(lambda trial: trial.answered > 0, folder, source, b"hello", "udp")
    assert trial.failures == ()
