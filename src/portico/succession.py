"""Take over from the process that served before, and leave everything to the one that is next.

Owns both ends of it, what is said of them, and what is told to systemd.  Leaves how another process
is started and what it inherits to `portico.handover`, and draining to who has handed over.

Source: sd_notify(3), ``MAINPID=``; pid_namespaces(7), "The namespace init process".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from typing import Final

from portico.address import Address
from portico.configuration import ProcessSettings
from portico.console import say
from portico.counters import Counters
from portico.directory import Directory
from portico.duty import attempt
from portico.errors import PorticoError
from portico.handover import Heir, Heritage, start_heir
from portico.listener import OpenListener
from portico.listeners import Listeners
from portico.pidfile import PidFile
from portico.systemd import Notifier

FIRST_PROCESS: Final = 1
"""The number of the process with whose end the system ends all others of its container."""


class Succession:
    """Who has served before a process, and who is to serve after it.

    In one thread at a time, but for `stop`, which any may call.

    Args:
        kind: What such a process is called in what is said.
        listeners: Those of this process.
        notifier: Tells systemd.
        heritage: What a predecessor has left; ``None`` if there is none.
        directory: Where a successor starts.
    """

    def __init__(
        self,
        kind: str,
        listeners: Listeners,
        notifier: Notifier,
        heritage: Heritage | None,
        directory: Directory,
    ) -> None:
        self.handed: list[OpenListener] = []
        """The listeners that another process accepts from by now."""
        self._kind = kind
        self._listeners = listeners
        self._notifier = notifier
        self._directory = directory
        self._heritage = heritage
        self._heir: Heir | None = None
        self._pid_file = PidFile(None)
        self._is_ending = False

    # --- from the predecessor -------------------------------------------------------------

    @property
    def predecessor(self) -> int | None:
        """The process that serves until this one does; ``None`` if there is none any more."""
        return None if self._heritage is None else self._heritage.predecessor

    def pid_file(self, path: str | os.PathLike[str] | None) -> PidFile:
        """Return the file that holds the number of who serves, to be entered by this process.

        Args:
            path: Where; ``None`` for no file at all.
        """
        heritage = self._heritage
        inherited = (None, None) if heritage is None else (heritage.predecessor, heritage.pid_file)
        self._pid_file = PidFile(path, *inherited)
        return self._pid_file

    def counters(self) -> Counters:
        """Return the mapping to count in: the predecessor's, if it can be read."""
        text = None if self._heritage is None else self._heritage.counters
        if text is not None:
            try:
                return Counters.adopt(text)
            except PorticoError as error:
                say(f"counts from nothing: {error}")
        return Counters.create()

    def decline_counters(self) -> None:
        """Close the mapping of the predecessor, for a process that counts for itself.

        What the target starts would inherit it otherwise, and so would every successor.
        """
        text = None if self._heritage is None else self._heritage.counters
        if text is not None:
            with suppress(PorticoError):  # it is closed even if it cannot be read
                Counters.adopt(text).close()

    def take_over(self) -> bool:
        """Tell the predecessor that it can go: clients wait in a queue that is ours, too.

        Returns:
            Whether there was one.
        """
        heritage, self._heritage = self._heritage, None
        if heritage is None:
            return False
        attempt(self._pid_file.take_over)
        taken, pid_file = self._listeners.take_over(), self._pid_file.path
        heritage.channel.send("serving", listeners=taken, pid_file=pid_file)
        heritage.channel.close()
        return True

    # --- to the heir ----------------------------------------------------------------------

    @property
    def has_handed_over(self) -> bool:
        """Whether another process serves."""
        return self._heir is not None and self._heir.is_serving

    @property
    def deadline(self) -> float:
        """The instant at which `attend` is to be called at the latest."""
        return inf if self._heir is None else self._heir.due

    def fileno(self) -> int | None:
        """Return what is readable when `attend` is to be called; ``None`` for nothing."""
        return None if self._heir is None else self._heir.fileno()

    def begin(
        self,
        listeners: Sequence[tuple[Address, OpenListener]],
        process: ProcessSettings,
        counters: Counters | None = None,
    ) -> None:
        """Start another process of the same command line, which is to take over.

        It has the time of a start for itself, and as long again for its workers.

        Args:
            listeners: Each with the address that was asked for.
            process: How long a start may take.
            counters: What is counted in, if it can be shared.
        """
        if self._heir is not None:
            say(f"another {self._kind} (process {self._heir.process}) is starting already")
            return
        if os.getpid() == FIRST_PROCESS:
            say(
                "cannot hand over as process 1: whatever it starts ends with it; reload with "
                "SIGHUP, or start it anew"
            )
            return
        variables = self._notifier.variables(0)
        variables.pop("WATCHDOG_PID", None)  # it will be the heir's
        timeout = None if process.start_timeout is None else 2 * process.start_timeout
        try:
            file = self._pid_file.descriptor
            self._heir = start_heir(listeners, counters, variables, timeout, file, self._directory)
        except OSError as error:
            say(f"cannot start another {self._kind}: {error}")
        else:
            say(f"starts another {self._kind} (process {self._heir.process})")

    def attend(self) -> bool:
        """See what has become of the heir; never waits.

        Returns:
            Whether it has taken over just now.
        """
        heir = self._heir
        if heir is None or heir.is_serving or not heir.attend():
            return False
        return self._settle(heir)

    def stop(self) -> None:
        """End with this process an heir that does not serve."""
        self._is_ending = True
        heir = self._heir
        if heir is not None:
            heir.stop()

    def let_go(self) -> None:
        """Close in a child what is not its own."""
        self._pid_file.close()
        if self._heir is not None:
            self._heir.channel.close()
        if self._heritage is not None:
            self._heritage.channel.close()

    def _settle(self, heir: Heir) -> bool:
        if heir.taken is None:
            self._heir = None
            goes_on = "" if self._is_ending else "; this one goes on"
            say(f"the other {self._kind} {heir.end} before it served{goes_on}")
            return False
        heir.channel.close()  # it has said all
        self.handed = self._listeners.hand_over(heir.taken)
        attempt(lambda: self._pid_file.hand_over(heir.process, heir.pid_file))
        self._notifier.main_process(heir.process)
        say(f"leaves everything to process {heir.process}")
        return True
