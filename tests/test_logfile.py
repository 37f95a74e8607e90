from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from portico.logfile import LogFile, reopen_all
from tests.support import Call, nothing_left_behind


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LogFile]:
    """A log of the root logger, in a folder of the test."""
    handler = LogFile(tmp_path / "log")
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)
    handler.close()


def test_a_file_that_was_moved_is_followed_by_another(log: LogFile, tmp_path: Path) -> None:
    logging.getLogger("test").warning("one")
    (tmp_path / "log").rename(tmp_path / "moved")
    logging.getLogger("test").warning("two")
    reopen_all()
    logging.getLogger("test").warning("three")
    assert (tmp_path / "moved").read_text() == "one\ntwo\n"
    assert (tmp_path / "log").read_text() == "three\n"


def test_others_may_not_read_it(log: LogFile, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) & 0o137 == 0


def test_when_it_cannot_be_opened_again_it_goes_on_with_the_one_it_has(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    handler = LogFile(tmp_path / "folder" / "log")
    logging.getLogger().addHandler(handler)
    try:
        (tmp_path / "folder").rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError):
            reopen_all()
        logging.getLogger("test").warning("on")
        assert (tmp_path / "moved" / "log").read_text() == "on\n"
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The name of a file on a disk that takes nothing more."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    name = tmp_path / "full"
    name.symlink_to("/dev/full")
    return name


def test_a_full_disk_does_not_keep_the_log(full: Path) -> None:
    """It is opened again elsewhere, however much the disk has not taken yet."""
    with nothing_left_behind():
        handler = LogFile(full)
        logging.getLogger().addHandler(handler)
        try:
            logging.getLogger("test").warning("lost")
            full.unlink()
            reopen_all()
            logging.getLogger("test").warning("on")
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()
    assert full.read_text() == "on\n"


def test_a_full_disk_is_no_reason_to_fail_at_the_end(full: Path) -> None:
    with nothing_left_behind():
        handler = LogFile(full)
        handler.emit(logging.makeLogRecord({"msg": "lost"}))
        handler.close()


def test_a_fifo_that_nobody_reads_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with nothing_left_behind(), pytest.raises(OSError, match="No such device"):
        Call(LogFile, tmp_path / "log").result()


def test_a_fifo_that_somebody_reads_takes_the_log(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    handler = LogFile(tmp_path / "log")
    try:
        assert handler.stream is not None
        assert os.get_blocking(handler.stream.fileno())
        handler.emit(logging.makeLogRecord({"msg": "read"}))
        assert os.read(reader, 100) == b"read\n"
    finally:
        handler.close()
        os.close(reader)
