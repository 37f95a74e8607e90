"""Serve one edition of a program that is being edited, in a process of its own.

Owns that process, on both sides of the fork: what it is lent, what it tells of itself, and how it
ends.  Leaves when there is to be another one to `portico.reloader`.

The program is imported here, and never in the parent, so that each edition has the code that is
there when it starts.

It ends when its parent has gone, however that ended: it would keep the addresses, and nobody would
know of it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Final, NamedTuple, NoReturn

from portico import privileges
from portico.changes import folders_of, places_of
from portico.configuration import Configuration, ServiceSettings
from portico.console import say, show
from portico.descriptors import raise_descriptor_limit
from portico.duty import assign, logged, reopen_log, report, say_counts
from portico.errors import PorticoError
from portico.handover import said_end
from portico.listener import OpenListener
from portico.service import STOP_PATIENCE, Service
from portico.signals import do_nothing
from portico.worker import FAILED, INTERRUPT_SIGNAL, leave

LONGEST_DRAIN: Final = 1.0
"""Seconds that open connections have to finish in, whatever the settings say: somebody waits to see
what became of the edit."""

END_PATIENCE: Final = LONGEST_DRAIN + STOP_PATIENCE + 1.0
"""Seconds until a process that was told to end is ended, whatever it does."""

OF_THE_PARENT: Final = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
"""Signals that the parent hears.  Those of the terminal come to all processes: to stop, the parent
sends SIGTERM."""

REOPEN_SIGNAL: Final = signal.SIGUSR1
"""Has the log opened again, and said what was counted; the parent passes it on."""


class Edition:
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
        # Nothing is ever written: the child reads its end when nobody has this one any more.
        parent, self._life = os.pipe()
        try:
            self.process = os.fork()
        except OSError:
            for each in (self._reader, writer, parent, self._life):
                os.close(each)
            raise
        if self.process == 0:
            _live(configuration, services, listeners, Pipes(writer, parent, self._life))
        os.close(writer)
        os.close(parent)
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

    def drain(self) -> None:
        """Have it drain, and end."""
        self._signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """Have it end at once."""
        self._signal(INTERRUPT_SIGNAL)

    def reopen(self) -> None:
        """Have it open its log again, and say what it has counted; as soon as it serves."""
        self._signal(REOPEN_SIGNAL)

    def kill(self) -> None:
        """Have the system end it."""
        self._signal(signal.SIGKILL)

    def has_ended(self) -> bool:
        """Say whether it has ended; never waits."""
        if self._status is None:
            found, status = os.waitpid(self.process, os.WNOHANG)
            if found:
                self._status = status
        return self._status is not None

    def end(self) -> str:
        """Tidy up after it, and say how it has ended."""
        os.close(self._reader)
        os.close(self._life)
        return f"the server {said_end(self._status or 0)}"

    def _signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if not self.has_ended():
            os.kill(self.process, number)


# --- in the child -----------------------------------------------------------------------


class Pipes(NamedTuple):
    """What a child has of its parent.

    Attributes:
        writer: Where it writes what it has to report.
        parent: What ends when the parent has gone.
        life: The parent's end of that.
    """

    writer: int
    parent: int
    life: int


def _live(
    configuration: Configuration,
    services: Sequence[ServiceSettings],
    listeners: Sequence[OpenListener],
    pipes: Pipes,
) -> NoReturn:
    """Be the child: serve, and end the process."""
    status = FAILED
    asked: SimpleQueue[int] = SimpleQueue()  # a signal handler may put into it
    try:
        os.close(pipes.life)
        _settle_signals(asked)
        threading.Thread(
            target=_end_after, args=(pipes.parent,), name="parent's ear", daemon=True
        ).start()
        _serve(configuration, services, listeners, pipes.writer, asked)
        status = 0
    except PorticoError as error:
        say(f"error: {' '.join(str(error).split())}")
        status = 2
    except BaseException:
        show(traceback.format_exc())
    finally:
        leave(status)


def _settle_signals(asked: SimpleQueue[int]) -> None:
    """Hear SIGTERM, and nothing that is for the parent; note what is to be done when it serves."""
    signal.set_wakeup_fd(-1)  # the parent's
    for number in OF_THE_PARENT:
        # A handler that does nothing, since programs that are started here would inherit SIG_IGN.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, do_nothing)
    for ending in (signal.SIGTERM, INTERRUPT_SIGNAL, signal.SIGCHLD):
        signal.signal(ending, signal.SIG_DFL)
    _note_reopening(asked)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*OF_THE_PARENT, signal.SIGTERM, REOPEN_SIGNAL})


def _note_reopening(asked: SimpleQueue[int]) -> None:
    signal.signal(REOPEN_SIGNAL, lambda number, _: asked.put(number))


def _end_after(parent: int) -> None:
    """Drain and end once the parent has gone; in a thread, since the main one serves."""
    os.read(parent, 1)
    say(f"process {os.getpid()} has lost the one that watches its files, and ends")
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(END_PATIENCE)
    leave(FAILED)  # a handler holds the main thread


def _serve(
    configuration: Configuration,
    services: Sequence[ServiceSettings],
    listeners: Sequence[OpenListener],
    writer: int,
    asked: SimpleQueue[int],
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
    with logged(process), Service(assignments, lent) as serving:
        with serving.stopped_by_signals([signal.SIGTERM], at_once=[INTERRUPT_SIGNAL]):
            for bound in serving.addresses:
                say(f"ready on {bound}")
            started = time.monotonic()
            with _reopening(serving, asked):
                tallies = serving.run()
            report(tallies, time.monotonic() - started)


@contextmanager
def _reopening(serving: Service, asked: SimpleQueue[int]) -> Generator[None]:
    """Open the log again when that is asked for, in a thread beside those that serve."""

    def obey() -> None:
        while asked.get():
            reopen_log()
            say_counts(serving.counts())

    _note_reopening(asked)  # again: the target may have taken the signal for itself
    threading.Thread(target=obey, name="signals", daemon=True).start()
    try:
        yield
    finally:
        asked.put(0)


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
