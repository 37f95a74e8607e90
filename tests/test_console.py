"""What is said, and to whom nobody has to listen."""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from portico import console
from portico.console import LONGEST_PIECE, LogConsole, say
from tests.support import Call, in_child

NAMES = ("stdin", "stdout", "stderr")


class Reader:
    """The other end of a standard error, who may read or not."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self._reader = os.fdopen(reader, "rb", buffering=0)
        self.stream = os.fdopen(writer, "w", encoding="utf-8")

    def stall(self) -> None:
        """Have the pipe full."""
        number = self.stream.fileno()
        os.set_blocking(number, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(number, b"." * select.PIPE_BUF)
        os.set_blocking(number, True)

    def read(self) -> str:
        """Return what was written since it was full."""
        return b"".join(iter(lambda: self._reader.read(65536) or b"", b"")).decode().lstrip(".")

    def leave(self) -> None:
        self._reader.close()

    def close(self) -> None:
        self.leave()
        with suppress(BrokenPipeError):
            self.stream.close()


@contextmanager
def listening() -> Generator[Reader]:
    """Have a reader for what this process says.

    Not a fixture: between those and the test, pytest takes standard error for itself.
    """
    with closing(Reader()) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", reader.stream)
        try:
            yield reader
        finally:
            console._lost.forget()


def test_a_reader_that_has_stopped_holds_nobody_up() -> None:
    with listening() as reader:
        reader.stall()
        Call(say, "one").result()
        Call(say, "two").result()
        assert reader.read() == ""
        say("three")
        say("four")
        assert reader.read() == (
            "portico: 2 lines were dropped, since nobody read them\nportico: three\nportico: four\n"
        )


def test_it_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at each of the lines that a supervisor may have to say one after the other."""
    with listening() as reader:
        monkeypatch.setattr(console, "PATIENCE", 0.01)
        reader.stall()
        say("one")
        monkeypatch.setattr(console, "PATIENCE", 1e6)
        Call(say, "two").result()
        reader.read()
        say("three")
        assert "2 lines were dropped" in reader.read()


def test_a_line_of_the_log_is_dropped_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as reader:
        log = LogConsole()
        monkeypatch.setattr(console, "PATIENCE", 0.01)
        reader.stall()
        log.handle(logging.makeLogRecord({"msg": "one"}))
        reader.read()
        log.handle(logging.makeLogRecord({"msg": "two %s", "args": ("three",)}))
        expected = "portico: 1 line was dropped, since nobody read it\ntwo three\n"
        assert reader.read() == expected


def test_a_record_that_cannot_be_written_is_told_as_logging_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    LogConsole().handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert "--- Logging error ---" in capsys.readouterr().err


def test_a_child_does_not_tell_of_what_its_parent_has_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listening() as reader:
        monkeypatch.setattr(console, "PATIENCE", 0.01)
        reader.stall()
        say("one")
        reader.read()
        assert in_child(lambda: say("two")) == 0
        assert reader.read() == "portico: two\n"
        say("three")
        assert reader.read().startswith("portico: 1 line was dropped, since nobody read it\n")


@pytest.mark.parametrize("character", ["x", "\N{SNOWMAN}", "\N{CAT FACE}", "\n"])
def test_a_text_of_any_length_is_said_whole(character: str) -> None:
    with listening() as reader:
        text = character * 5000
        say(text)
        assert reader.read() == f"portico: {text}\n"


def test_a_piece_ends_with_a_line_and_is_what_a_pipe_takes_whole() -> None:
    lines = [f"{number:04}" * 30 + "\n" for number in range(100)]
    pieces = list(console._pieces("".join(lines)))
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") for piece in pieces)
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= LONGEST_PIECE
    assert len(("\N{CAT FACE}" * console.SHORT).encode()) <= LONGEST_PIECE


@pytest.mark.parametrize("character", ["x", "\N{SNOWMAN}"])
def test_what_a_pipe_takes_whole_is_one_piece(character: str) -> None:
    """Whoever writes to the same pipe writes before it or after it."""
    text = character * (LONGEST_PIECE // len(character.encode()) - 1) + "\n"
    assert list(console._pieces(text)) == [text]


def test_what_broke_off_ends_its_line_before_anything_else_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listening() as reader:
        taken = iter([True, False])
        with monkeypatch.context() as patch:
            patch.setattr(console, "_has_room", lambda _: next(taken))
            say("x" * 2 * LONGEST_PIECE)
        say("two")
        first, told, second = reader.read().splitlines()
        assert first.rstrip("x") == "portico: "
        assert "1 line was dropped" in told
        assert second == "portico: two"


def test_where_there_is_no_standard_error_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    say("a word")


def test_a_reader_that_has_gone_is_no_reason_to_stop() -> None:
    with listening() as reader:
        reader.leave()
        say("a word")


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1, 2)])
def test_what_is_closed_of_the_standard_descriptors_is_opened_on_nothing(
    numbers: tuple[int, ...],
) -> None:
    """As a shell's `2>&-` leaves it: Python has no stream then, and the number is free."""

    def look() -> None:
        for number in numbers:
            os.close(number)
            setattr(sys, NAMES[number], None)
        console.complete()
        for number in numbers:
            assert Path(f"/proc/self/fd/{number}").readlink() == Path(os.devnull)
            assert os.get_inheritable(number)
            stream = getattr(sys, NAMES[number])
            assert stream.fileno() == number
            assert stream.read() == "" if number == 0 else stream.write("a word") == 6
        say("a word")

    assert in_child(look) == 0


def test_what_is_open_of_the_standard_descriptors_stays() -> None:
    def look() -> None:
        before = [os.fstat(number).st_ino for number in range(3)]
        streams = (sys.stdin, sys.stdout, sys.stderr)
        console.complete()
        assert [os.fstat(number).st_ino for number in range(3)] == before
        assert (sys.stdin, sys.stdout, sys.stderr) == streams

    assert in_child(look) == 0
