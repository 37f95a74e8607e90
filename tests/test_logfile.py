from __future__ import annotations

import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from portico.logfile import LogFile, reopen_all


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
