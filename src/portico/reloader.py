"""Serve while the program is edited: start anew whenever a file of it changes.

Owns the parent, which has the listeners and imports nothing of the program, and what its children
do.  A child serves on listeners that it is lent.  While one takes the place of another, clients
wait in the backlog, and nobody is refused; so it is while the program cannot be imported.  Leaves
what a program consists of, and watching it, to `portico.changes`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn, TypeAlias

from portico import privileges
from portico.acceptor import Wakeup
from portico.changes import (
    Watch,
    folder_of,
    folders_of,
    outermost,
    placed,
    places_of,
    require_watchfiles,
)
from portico.configuration import Configuration, ServiceSettings
from portico.errors import PorticoError
from portico.listener import OpenListener
from portico.pidfile import PidFile
from portico.program import Opening, assign, expanded, logged, report, say
from portico.service import STOP_PATIENCE, Service, open_listeners, raise_descriptor_limit

LONGEST_DRAIN: Final = 1.0
"""Seconds that open connections have to finish in, whatever the settings say: somebody waits to see
what became of the edit."""

END_PATIENCE: Final = LONGEST_DRAIN + STOP_PATIENCE + 1.0
"""Seconds until a child that was told to end is killed."""

WAITING: Final = "waiting for a change"

STOPPING: Final = (signal.SIGINT, signal.SIGTERM)

Files: TypeAlias = Callable[[], Iterable[str | os.PathLike[str]]]


def run(load: Callable[[], Configuration], files: Files = tuple) -> None:
    """Serve until SIGINT or SIGTERM, in the main thread; anew when a file changes.

    Serves in one process, whatever `ProcessSettings.workers` says.

    Args:
        load: Reads the configuration; called again for each start.
        files: Says what it has read, to be watched as well.

    Raises:
        PorticoError: What was asked cannot be done at the first start, or there is no watching any
            more.  What is wrong at a later start is said, and the next change waited for.
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
        self._shelf = Shelf()
        self._watches: list[Watch] = []
        self._watched: tuple[set[Path], set[Path]] = (set(), set())
        self._folders: set[Path] = set()
        self._child: Child | None = None
        self._stops = 0
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
        self._shelf.close()
        self._wakeup.close()

    # --- before a start -----------------------------------------------------------------

    def _prepared(self) -> Configuration | None:
        """Read the configuration anew, and have its listeners open; say what is wrong with it."""
        try:
            configuration = self._load()
            self._prepare(configuration)
        except PorticoError as error:
            say(f"error: {' '.join(str(error).split())}; {WAITING}")
            return None
        return configuration

    def _prepare(self, configuration: Configuration) -> None:
        """Open the listeners of a configuration, and watch its files."""
        privileges.find(configuration.process.user, configuration.process.group)
        self._shelf.arrange(expanded(configuration.services))
        self._folders |= {folder_of(each.target) for each in configuration.services}
        self._files |= {placed(file) for file in self._read()}
        for each in configuration.services:
            own = each.settings
            named = [path for path in (own.cert, own.key, own.client_ca) if path is not None]
            self._files |= {placed(path) for path in named}
        self._watch()

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
        services = expanded(configuration.services)
        listeners = self._shelf.listeners(services)
        # No signal before the child has handlers of its own: it would run those of its parent.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            self._child = Child(configuration, services, listeners)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

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
        """Have the child drain, and end; a second signal is passed on, and ends it at once."""
        child, stops = self._child, self._stops
        if child is None:
            return
        child.signal(signal.SIGTERM)
        deadline = time.monotonic() + END_PATIENCE
        while not child.has_ended():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                child.signal(signal.SIGKILL)
            self._poll(max(remaining, 0.1), watching=False)
            if self._stops > max(stops, 1):
                stops = self._stops
                child.signal(signal.SIGTERM)
        child.end()
        self._child = None

    # --- waiting ------------------------------------------------------------------------

    def _poll(self, timeout: float | None = None, *, watching: bool = True) -> None:
        """Wait until something happens."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        if watching:
            for watch in self._watches:
                poll.register(watch, select.POLLIN)
            if self._child is not None and not self._child.has_reported:
                poll.register(self._child, select.POLLIN)
        poll.poll(None if timeout is None else timeout * 1000)
        self._wakeup.clear()

    @contextmanager
    def _signalled(self) -> Generator[None]:
        """Be told of signals while the block runs."""

        def note(number: int, _: FrameType | None) -> None:
            self._stops += number != signal.SIGCHLD
            self._wakeup.wake()

        before = {number: signal.signal(number, note) for number in (*STOPPING, signal.SIGCHLD)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Shelf:
    """The listeners that stay open from child to child."""

    def __init__(self) -> None:
        self._open: dict[Any, OpenListener] = {}

    def arrange(self, services: Sequence[ServiceSettings]) -> None:
        """Open the listeners that services need, and close those that they do not.

        Raises:
            PorticoError: An address cannot be had; those that could stay open.
        """
        wanted = _openings(services)
        for key in self._open.keys() - wanted.keys():
            self._open.pop(key).close()
        for key, opening in wanted.items():
            if key not in self._open:
                (self._open[key],) = open_listeners([opening])

    def listeners(self, services: Sequence[ServiceSettings]) -> list[OpenListener]:
        """Return those of services, in the order of `program.assign`."""
        return [self._open[key] for key in _openings(services)]

    def close(self) -> None:
        """Close all."""
        for each in self._open.values():
            each.close()
        self._open.clear()


def _openings(services: Sequence[ServiceSettings]) -> dict[Any, Opening]:
    """Return what is to be opened, by what makes two of them the same."""
    found: dict[Any, Opening] = {}
    times: Counter[Any] = Counter()
    for service in services:
        own = service.settings
        for address in service.addresses:
            key = (address, own.backlog, own.socket_access())
            times[key] += 1  # two of the same are two: the system chooses their ports
            found[(*key, times[key])] = Opening(address, own)
    return found


class Child:
    """A process that imports the program, and serves.

    Args:
        configuration: What it is told.
        services: Its services, of which it has the listeners.
        listeners: One for each of their addresses; it is lent them.
    """

    def __init__(
        self,
        configuration: Configuration,
        services: Sequence[ServiceSettings],
        listeners: Sequence[OpenListener],
    ) -> None:
        self.has_reported = False
        self._status: int | None = None
        self._reported = b""
        self._reader, writer = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            _live(configuration, services, listeners, writer)
        os.close(writer)
        os.set_blocking(self._reader, False)

    def fileno(self) -> int:
        """Return the descriptor that is readable when it has something to report."""
        return self._reader

    def folders(self) -> set[Path]:
        """Return the folders of what it has imported, as far as it has told of them."""
        with suppress(BlockingIOError):
            while not self.has_reported and (more := os.read(self._reader, 65536)):
                self._reported += more
            self.has_reported = True
        if not self.has_reported or not self._reported:
            return set()
        return {Path(each) for each in json.loads(self._reported)}

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if not self.has_ended():
            os.kill(self.process, number)

    def has_ended(self) -> bool:
        """Say whether it has ended; never waits."""
        if self._status is None:
            found, status = os.waitpid(self.process, os.WNOHANG)
            if found:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def end(self) -> str:
        """Tidy up after it, and say how it has ended."""
        os.close(self._reader)
        status = self._status or 0
        if status < 0:
            return f"the server was ended by {signal.Signals(-status).name}"
        return f"the server has ended with status {status}"


# --- in the child -----------------------------------------------------------------------


def _live(
    configuration: Configuration,
    services: Sequence[ServiceSettings],
    listeners: Sequence[OpenListener],
    writer: int,
) -> NoReturn:
    """Be the child: serve, and end the process."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)  # the parent's
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # SIGINT stays blocked: Ctrl-C at the terminal is for the parent, which sends SIGTERM.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _serve(configuration, services, listeners, writer)
        status = 0
    except PorticoError as error:
        say(f"error: {' '.join(str(error).split())}")
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


def _serve(
    configuration: Configuration,
    services: Sequence[ServiceSettings],
    listeners: Sequence[OpenListener],
    writer: int,
) -> None:
    """Import the program, and serve until SIGTERM.

    Raises:
        PorticoError: It cannot be served.
    """
    process = configuration.process
    # Compiled code is told from stale by the second and the size: of two edits within a second, the
    # later might not be seen.
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()  # what the parent has seen of the folders
    raise_descriptor_limit()
    privileges.drop(privileges.find(process.user, process.group))
    try:
        assignments = assign([_hurried(each) for each in services])
    except PorticoError as error:
        _report_folders(writer, places_of(error.__cause__))  # where it may be mended
        raise
    _report_folders(writer)
    lent = [each.lend() for each in listeners]
    with logged(process.log_level), Service(assignments, lent) as serving:
        with serving.stopped_by_signals():
            for bound in serving.addresses:
                say(f"ready on {bound}")
            started = time.monotonic()
            tallies = serving.run()
            report(tallies, time.monotonic() - started)


def _hurried(service: ServiceSettings) -> ServiceSettings:
    """Return a service whose drain is short."""
    timeout = service.settings.drain_timeout
    short = LONGEST_DRAIN if timeout is None else min(timeout, LONGEST_DRAIN)
    return replace(service, settings=replace(service.settings, drain_timeout=short))


def _report_folders(writer: int, others: Iterable[Path] = ()) -> None:
    """Tell the parent which folders belong to the program."""
    folders = folders_of(tuple(sys.modules.values())) | set(others)
    with open(writer, "w", encoding="utf-8") as opened:
        json.dump(sorted(map(str, folders)), opened)


def _leave(status: int) -> NoReturn:
    """End the process at once, with the handlers that may still run in it."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(status)


def _short(path: str) -> str:
    """Return a path as it is seen from the current folder, if it is below it."""
    with suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path
