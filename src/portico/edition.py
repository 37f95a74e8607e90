"""Serve one edition of a program that is being edited, in a process of its own.

Owns that process, on both sides of the fork: what it is lent, what it tells of itself, and how it
ends.  Leaves when there is to be another one to `portico.reloader`.

The program is imported here, and never in the parent, so that each edition has the code that is
there when it starts.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

from portico import privileges
from portico.changes import folders_of, places_of
from portico.configuration import Configuration, ServiceSettings
from portico.console import say
from portico.duty import assign, logged, report
from portico.errors import PorticoError
from portico.listener import OpenListener
from portico.service import Service, raise_descriptor_limit
from portico.worker import leave

LONGEST_DRAIN: Final = 1.0
"""Seconds that open connections have to finish in, whatever the settings say: somebody waits to see
what became of the edit."""


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
        leave(status)


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
    with logged(process), Service(assignments, lent) as serving:
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
