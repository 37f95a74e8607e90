from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import socketserver
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import portico
from portico import changes
from portico.changes import (
    Watch,
    WatchError,
    folder_of,
    folders_of,
    is_edited,
    outermost,
    placed,
    places_of,
    require_watchfiles,
)
from tests.support import PATIENCE, Call, eventually, in_child

# ----------------------------------------------------------------------- what belongs to a program


def test_the_folder_of_a_file_is_the_one_that_it_is_in(tmp_path: Path) -> None:
    assert folder_of(f"{tmp_path}/app.py:Echo") == tmp_path


def test_a_module_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/reload_target.py").write_text("raise LookupError")
    (tmp_path / "lib/reload_package").mkdir()
    (tmp_path / "lib/reload_package/__init__.py").write_text("raise LookupError")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    assert folder_of("reload_target:Echo") == tmp_path / "lib"
    assert folder_of("reload_package.inner:Echo") == tmp_path / "lib/reload_package"


@pytest.mark.parametrize("target", ["no_such_module:Echo", "json:loads", "sys:exit", "nothing"])
def test_where_nothing_is_edited_the_current_folder_stands_in(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is not there may be about to be written."""
    monkeypatch.chdir(tmp_path)
    assert folder_of(target) == tmp_path


def test_what_is_installed_is_not_edited(tmp_path: Path) -> None:
    assert folders_of([json, socketserver, pytest, portico, sys]) == set()
    assert not is_edited(tmp_path / "lib/python3/dist-packages/app")
    own = types.ModuleType("own")
    own.__file__ = str(tmp_path / "own.py")
    assert folders_of([own, sys]) == {tmp_path}


def test_an_error_tells_where_it_may_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("def f(:\n")
    spec = importlib.util.spec_from_file_location("wrong", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(SyntaxError) as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert tmp_path in places_of(caught.value)
    assert places_of(None) == set()


def test_a_folder_in_another_is_watched_with_it(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    folders = {tmp_path / each for each in ("a", "a/b", "c", "gone")}
    assert outermost(folders) == {tmp_path / "a", tmp_path / "c"}


def test_without_watchfiles_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_watchfiles()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(WatchError, match=r"pip install 'portico\[reload\]'"):
        require_watchfiles()


# ------------------------------------------------------------------------------------- watching


@contextmanager
def watching(*folders: Path, files: tuple[Path, ...] = ()) -> Iterator[Watch]:
    watch = Watch(folders, files)
    try:
        yield watch
    finally:
        watch.close()


def heard(watch: Watch) -> list[str]:
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), "no change is told"
    return watch.changed()


def test_a_module_that_changes_is_told(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with watching(tmp_path) as watch:
        assert watch.changed() == []
        (tmp_path / "inner/app.py").write_text("x = 1")
        assert heard(watch) == [str(tmp_path / "inner/app.py")]


def test_what_is_no_module_is_not_told_unless_it_was_named(tmp_path: Path) -> None:
    settings = placed(tmp_path / "portico.toml")
    with watching(tmp_path, files=(settings,)) as watch:
        (tmp_path / "notes.txt").write_text("a word")
        (tmp_path / "portico.toml").write_text("x = 1")
        assert heard(watch) == [str(settings)]


def test_a_file_that_another_takes_the_place_of_has_changed(tmp_path: Path) -> None:
    """As editors, and whoever renews a certificate, write files."""
    cert = tmp_path / "cert.pem"
    cert.write_text("old")
    with watching(files=(placed(cert),)) as watch:
        (tmp_path / "beside.py").write_text("nothing to us")
        for text in ("new", "newer"):
            (tmp_path / "fresh").write_text(text)
            (tmp_path / "fresh").replace(cert)
            assert heard(watch) == [str(cert)]


def test_a_folder_that_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(WatchError, match="cannot watch for changes: No path was found"):
        Watch([tmp_path / "gone"])


def test_a_watcher_that_ends_is_missed(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        os.kill(watch._process, signal.SIGKILL)
        with pytest.raises(WatchError, match="the watcher has ended"):
            heard(watch)


def test_a_watcher_that_fails_says_why(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        watch._waiting = b'{"error": "no more watches"}\n'
        with pytest.raises(WatchError, match="any more: no more watches"):
            watch.changed()


def test_folders_without_an_end_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "PATIENCE", 0)
    with pytest.raises(WatchError, match="takes more than 0 s"):
        Watch([tmp_path])


def test_a_watcher_tells_when_it_watches_then_what_changes(tmp_path: Path) -> None:
    """In this process, what one of its own does."""
    reader, writer = os.pipe()
    found = changes._changes(writer, [tmp_path], [])
    first = Call(next, found)
    assert json.loads(os.read(reader, 1000)) == {"ready": True}
    (tmp_path / "app.py").write_text("x = 1")
    assert first.result() == str(tmp_path / "app.py")
    os.close(reader)
    os.close(writer)


def test_a_watcher_stops_when_its_parent_has_ended() -> None:
    reader, writer = os.pipe()
    pulse = changes._Pulse(writer)
    assert not pulse.is_set()
    pulse._parent = -1
    assert pulse.is_set()
    os.close(reader)
    os.close(writer)


def test_a_watcher_is_a_process_that_ends_by_itself(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    assert in_child(lambda: changes._watch(writer, [tmp_path / "gone"], [])) == 0
    assert "No path" in json.loads(os.read(reader, 2000))["error"]
    os.close(reader)
    os.close(writer)


def test_a_watcher_does_not_outlive_its_parent(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def be_parent() -> None:
        watch = Watch([tmp_path])
        os.write(writer, str(watch._process).encode())

    assert in_child(be_parent) == 0
    orphan = int(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    eventually(lambda: not is_alive(orphan), "the watcher has ended")


def is_alive(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
