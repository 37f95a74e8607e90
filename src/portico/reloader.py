"""Serve while the program is edited: start anew whenever a file of it changes.

Owns the parent, which has the listeners and imports nothing of the program.  While one edition of
it takes the place of another, clients wait in the backlog, and nobody is refused; so it is while
the program cannot be imported.  Leaves what a program consists of, and watching it, to
`portico.changes`, and serving it to `portico.edition`.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, TypeAlias

from portico import privileges
from portico.acceptor import Wakeup
from portico.changes import Watch, folder_of, outermost, placed, require_watchfiles
from portico.configuration import Configuration
from portico.console import say
from portico.duty import expanded, openings
from portico.edition import END_PATIENCE, Edition
from portico.errors import ListenerError, PorticoError
from portico.listener import OpenListener
from portico.listeners import Listeners
from portico.pidfile import PidFile
from portico.settings import Auto
from portico.signals import caught

WAITING: Final = "waiting for a change"

STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end it; the last is that of a terminal which is closed."""

OBEYED: Final = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that do something else."""

Files: TypeAlias = Callable[[], Iterable[str | os.PathLike[str]]]


def run(load: Callable[[], Configuration], files: Files = tuple) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, in the main thread; anew when a file changes.

    Serves in one process, whatever `ProcessSettings.workers` says; that is said.

    Args:
        load: Reads the configuration; called again for each start.
        files: Says what it has read, to be watched as well.

    Raises:
        PorticoError: What was asked cannot be done at the first start, or there is no watching any
            more.  Whatever is wrong at a later start is said, and the next change waited for.
    """
    require_watchfiles()
    configuration = load()
    with PidFile(configuration.process.pid_file), ExitStack() as closing:
        reloader = Reloader(load, files)
        closing.callback(reloader.close)
        reloader.run(configuration)


class Reloader:
    """The parent.

    Args:
        load: Reads the configuration.
        files: Says what it has read.
    """

    def __init__(self, load: Callable[[], Configuration], files: Files) -> None:
        self._load = load
        self._read = files
        self._files: set[Path] = set()
        self._listeners = Listeners()
        self._used: tuple[OpenListener, ...] = ()
        self._watches: list[Watch] = []
        self._watched: tuple[set[Path], set[Path]] = (set(), set())
        self._folders: set[Path] = set()
        self._child: Edition | None = None
        self._stops = 0
        self._asked: list[int] = []  # only a signal handler appends
        self._workers: int | Auto | None = None  # as they were set when it was said
        self._wakeup = Wakeup()

    def run(self, configuration: Configuration) -> None:
        """Serve until a signal; see `run`.

        Args:
            configuration: What is served first.
        """
        with self._signalled():
            self._prepare(configuration)
            prepared: Configuration | None = configuration
            while not self._stops:
                if prepared is not None:
                    self._start(prepared)
                self._wait_for_change()
                self._end_child()
                if not self._stops:
                    prepared = self._prepared()

    def close(self) -> None:
        """End the child, and close the listeners."""
        self._end_child()
        for watch in self._watches:
            watch.close()
        self._listeners.close()
        self._wakeup.close()

    # --- before a start -----------------------------------------------------------------

    def _prepared(self) -> Configuration | None:
        """Read the configuration anew, and have its listeners open; say what is wrong with it."""
        try:
            configuration = self._load()
            self._prepare(configuration)
        except Exception as error:  # whatever it is, the next change may mend it
            say(f"error: {_said(error)}; {WAITING}")
            return None
        return configuration

    def _prepare(self, configuration: Configuration) -> None:
        """Open the listeners of a configuration, and watch its files."""
        self._say_workers(configuration.process.workers)
        privileges.find(configuration.process.user, configuration.process.group)
        self._gather(configuration)
        self._folders |= {folder_of(each.target) for each in configuration.services}
        self._files |= {placed(file) for file in self._read()}
        for each in configuration.services:
            own = each.settings
            named = [path for path in (own.cert, own.key, own.client_ca) if path is not None]
            self._files |= {placed(path) for path in named}
        self._watch()

    def _say_workers(self, workers: int | Auto | None) -> None:
        """Say that there is one process, whenever more are asked for."""
        if workers not in {None, self._workers}:
            say(f"--reload serves in one process, and leaves workers={workers} aside")
        self._workers = workers

    def _gather(self, configuration: Configuration) -> None:
        """Have the listeners that a configuration needs, and no others."""
        wanted = openings(expanded(configuration.services))
        try:
            self._used = self._listeners.gather(wanted)
        except ListenerError:  # one that is needed no longer may be in the way
            self._listeners.keep(())
            self._used = self._listeners.gather(wanted)
        self._listeners.settle(wanted, self._used)
        self._listeners.keep(self._used)

    def _watch(self) -> None:
        """Watch what belongs to the program; the next watcher watches before the last one ends."""
        folders = outermost(self._folders)
        single = {each for each in self._files if folders.isdisjoint(each.parents)}
        if (folders, self._files) == self._watched:
            return
        before = list(self._watches)
        if folders:
            self._watches.append(Watch(folders, self._files))
        if any(each.parent.is_dir() for each in single):
            self._watches.append(Watch((), single))
        self._watched = (folders, set(self._files))
        for each in before:
            self._watches.remove(each)
            each.close()

    # --- a child ------------------------------------------------------------------------

    def _start(self, configuration: Configuration) -> None:
        """Start a child; what has changed before now is what it will see."""
        for watch in self._watches:
            watch.changed()
        # No signal before the child has handlers of its own: it would run those of its parent.
        signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPPING, *OBEYED})
        try:
            self._child = Edition(configuration, expanded(configuration.services), self._used)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOPPING, *OBEYED})

    def _wait_for_change(self) -> None:
        """Wait for a change, or a signal to stop; says meanwhile if the child ends."""
        while not self._stops:
            self._poll()
            if self._child is not None:
                folders = self._child.folders()
                if not folders <= self._folders:
                    self._folders |= folders
                    self._watch()
                if self._child.has_ended():
                    say(f"{self._child.end()}; {WAITING}")
                    self._child = None
            changed = [path for watch in self._watches for path in watch.changed()]
            if changed:
                say(f"{_short(min(changed))} has changed")
                return

    def _end_child(self) -> None:
        """Have the child drain, and end; a second signal has it end at once."""
        child, stops = self._child, self._stops
        if child is None:
            return
        child.drain()
        deadline = time.monotonic() + END_PATIENCE
        while not child.has_ended():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                child.kill()
            self._poll(max(remaining, 0.1), watching=False)
            if self._stops > max(stops, 1):
                stops = self._stops
                child.interrupt()
        child.end()
        self._child = None

    # --- waiting ------------------------------------------------------------------------

    def _poll(self, timeout: float | None = None, *, watching: bool = True) -> None:
        """Wait until something happens; do what signals ask for but to stop."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        if watching:
            for watch in self._watches:
                poll.register(watch, select.POLLIN)
            if self._child is not None and not self._child.has_reported:
                poll.register(self._child, select.POLLIN)
        poll.poll(None if timeout is None else timeout * 1000)
        self._wakeup.clear()
        while self._asked:
            self._obey(self._asked.pop(0))

    def _obey(self, number: int) -> None:
        if number == signal.SIGUSR2:
            say("SIGUSR2 changes nothing: --reload does not hand over")
        elif self._child is not None:  # nobody else has a log
            self._child.reopen()

    @contextmanager
    def _signalled(self) -> Generator[None]:
        """Be told of signals while the block runs."""

        def note(number: int, _: FrameType | None) -> None:
            if number in OBEYED:
                self._asked.append(number)
            else:
                self._stops += number != signal.SIGCHLD
            self._wakeup.wake()

        heard = [*STOPPING, *OBEYED, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup arranges it
            heard.remove(signal.SIGHUP)
        with caught(heard, note):
            yield


def _said(error: Exception) -> str:
    """Return the words of an error in one line; of one that is not ours, its name as well."""
    words = " ".join(str(error).split())
    return words if isinstance(error, PorticoError) else f"{type(error).__name__}: {words}"


def _short(path: str) -> str:
    """Return a path as it is seen from the current folder, if it is below it."""
    with suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path
