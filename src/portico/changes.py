"""Tell which files of a program change, as an event.

Owns what belongs to a program, and the processes that watch it.  Leaves watching to `watchfiles`,
and what is done about a change to `portico.reloader`.

The watchers are processes of their own, because watchfiles has a thread: who forks beside a thread
may leave its child with a lock that nobody releases.

Source: inotify(7) (a folder is watched, and a file only until another one takes its place).
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Final, NoReturn

from portico.errors import PorticoError
from portico.target import TargetError, read

EXTRA: Final = "pip install 'portico[reload]'"
"""What brings watchfiles."""

PATIENCE: Final = 60.0
"""Seconds that a watcher has to look through its folders before it watches."""

INSTALLED: Final = tuple(
    Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
"""Where Python, and what is installed, is: that is not what somebody edits."""

OURS: Final = Path(__file__).parent


class WatchError(PorticoError):
    """The files of a program cannot be watched."""


def require_watchfiles() -> None:
    """Make sure that files can be watched; imports nothing.

    Raises:
        WatchError: watchfiles is not installed.
    """
    if importlib.util.find_spec("watchfiles") is None:
        raise WatchError(f"--reload needs the package watchfiles: {EXTRA}")


# ----------------------------------------------------------------------- what belongs to a program


def folder_of(target: str) -> Path:
    """Find the folder of a target, without importing it; the current one if it is not found."""
    try:
        place, _, is_file = read(target)
    except TargetError:
        return Path.cwd()
    if is_file:
        return Path(place).resolve().parent
    top = place.partition(".")[0]
    found = PathFinder.find_spec(top, [str(Path.cwd()), *sys.path])
    if found is not None and found.origin is not None and found.has_location:
        folder = Path(found.origin).resolve().parent
        if is_edited(folder):
            return folder
    return Path.cwd()


def folders_of(modules: Iterable[Any]) -> set[Path]:
    """Return the folders of those modules that somebody may edit."""
    files = (getattr(module, "__file__", None) for module in modules)
    folders = {Path(file).resolve().parent for file in files if isinstance(file, str)}
    return {folder for folder in folders if is_edited(folder)}


def places_of(error: BaseException | None) -> set[Path]:
    """Return the folders of the code that an error came through."""
    if error is None:
        return set()
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:  # the code itself has not run
        files.append(error.filename)
    folders = {Path(file).resolve().parent for file in files if not file.startswith("<")}
    return {folder for folder in folders if is_edited(folder)}


def is_edited(folder: Path) -> bool:
    """Say whether what is in a folder is a program's own: neither Python's, nor installed."""
    if any(part.endswith("-packages") for part in folder.parts):
        return False
    return not any(folder.is_relative_to(each) for each in (*INSTALLED, OURS))


def outermost(folders: Iterable[Path]) -> set[Path]:
    """Return those folders that are in none of the others, and that are there."""
    there = {folder for folder in folders if folder.is_dir()}
    return {folder for folder in there if there.isdisjoint(folder.parents)}


def placed(file: str | os.PathLike[str]) -> Path:
    """Return the path of a file as a watcher of its folder tells it."""
    path = Path(file)
    return path.parent.resolve() / path.name


# ------------------------------------------------------------------------------------- watching


class Watch:
    """A process that watches, until it is closed or its parent has ended.

    Args:
        folders: Whose modules are watched, with those of all folders in them; ``()`` for none.
        files: What is watched beside them, as `placed` writes it.

    Raises:
        WatchError: They cannot be watched.
    """

    def __init__(self, folders: Iterable[Path], files: Iterable[Path] = ()) -> None:
        self._reader, writer = os.pipe()
        self._waiting = b""
        self._process = os.fork()
        if self._process == 0:
            _watch(writer, sorted(folders), sorted(files))
        os.close(writer)
        told = self._first()
        if "ready" not in told:
            self.close()
            raise WatchError(f"cannot watch for changes: {told.get('error', 'it ended')}")
        os.set_blocking(self._reader, False)

    def fileno(self) -> int:
        """Return the descriptor that is readable when something has changed."""
        return self._reader

    def changed(self) -> list[str]:
        """Return the files that have changed since the last call; never waits.

        Raises:
            WatchError: It does not watch any more.
        """
        paths: list[str] = []
        while True:
            try:
                more = os.read(self._reader, 65536)
            except BlockingIOError:
                break
            if not more:
                raise WatchError("cannot watch for changes any more: the watcher has ended")
            self._waiting += more
        *lines, self._waiting = self._waiting.split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "error" in told:
                raise WatchError(f"cannot watch for changes any more: {told['error']}")
            paths.append(told["changed"])
        return paths

    def close(self) -> None:
        """End the process."""
        os.close(self._reader)
        os.kill(self._process, signal.SIGKILL)  # it has nothing to tidy up
        os.waitpid(self._process, 0)

    def _first(self) -> dict[str, Any]:
        """Wait for the first thing that it tells."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._waiting:
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                return {"error": f"looking through the folders takes more than {PATIENCE:g} s"}
            more = os.read(self._reader, 65536)
            if not more:
                return {}
            self._waiting += more
        line, _, self._waiting = self._waiting.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told


class _Pulse:
    """What watchfiles asks, again and again, whether it is to stop."""

    def __init__(self, writer: int) -> None:
        self._writer = writer
        self._parent = os.getppid()
        self._has_told = False

    def is_set(self) -> bool:
        """Tell at the first time that it watches now; stop once there is nobody to tell."""
        if not self._has_told:
            self._has_told = True
            _tell(self._writer, {"ready": True})
        return os.getppid() != self._parent


def _watch(writer: int, folders: Sequence[Path], files: Sequence[Path]) -> NoReturn:
    """Watch, in a process of its own, and tell of each change in a line."""
    try:
        _settle(writer)
        for path in _changes(writer, folders, files):
            _tell(writer, {"changed": path})
    except Exception as error:  # of watchfiles, of whatever kind: no folder, no more watches
        _tell(writer, {"error": " ".join(str(error).split())[:1000]})
    finally:
        os._exit(0)


def _settle(writer: int) -> None:
    """Hear no signal, and have nothing of the parent but its standard streams and what it reads.

    What is open here stays open when the parent is killed: its listeners, for one.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes; the parent ends this
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.closerange(3, writer)
    os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))


def _changes(writer: int, folders: Sequence[Path], files: Sequence[Path]) -> Iterator[str]:
    """Yield the first of the files that have changed together, again and again."""
    from watchfiles import Change, PythonFilter, watch  # noqa: PLC0415  # an extra

    names = {str(file) for file in files}
    is_module = PythonFilter()

    def counts(change: Change, path: str) -> bool:
        return path in names or (bool(folders) and is_module(change, path))

    # Without folders there are single files alone, and what is in folders beside them is nothing
    # to us.
    for each in watch(
        *(folders or outermost(file.parent for file in files)),
        watch_filter=counts,
        stop_event=_Pulse(writer),
        raise_interrupt=False,
        recursive=bool(folders),
    ):
        yield min(path for _, path in each)


def _tell(writer: int, words: dict[str, Any]) -> None:
    os.write(writer, json.dumps(words).encode() + b"\n")
