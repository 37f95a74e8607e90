"""Serve in this very process, without workers.

Owns what signals do to such a process, before it serves and while it does.  Leaves serving to
`portico.service`, and handing over to `portico.succession`.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from math import ceil
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Final, TypeAlias

from portico import privileges
from portico.acceptor import Wakeup
from portico.address import Address
from portico.announcement import Announcement, ready_on
from portico.configuration import Configuration
from portico.console import say
from portico.deadlines import LONGEST_WAIT
from portico.descriptors import raise_descriptor_limit
from portico.directory import Directory
from portico.duty import assign, expanded, logged, openings, reopen_log, report, say_counts
from portico.handover import Heritage
from portico.listener import OpenListener
from portico.listeners import Listeners
from portico.service import STOP_PATIENCE, STOP_SIGNALS, Service
from portico.signals import caught
from portico.succession import Succession
from portico.systemd import Notifier

Pairs: TypeAlias = list[tuple[Address, OpenListener]]

OBEYED: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that such a process obeys, beside those that stop it."""

STOPPING: Final = 0
"""What is noted among the signals when the service has been told to stop."""

ENDED: Final = -1
"""The same when it has ended, and nothing is to be obeyed any more."""


class Soloist:
    """A process that serves by itself.

    Args:
        configuration: What to serve.
        notifier: Tells systemd.
        heritage: What a predecessor has left; ``None`` if there is none.
        directory: Where a successor starts.
    """

    def __init__(
        self,
        configuration: Configuration,
        notifier: Notifier,
        heritage: Heritage | None,
        directory: Directory,
    ) -> None:
        self._configuration = configuration
        self._notifier = notifier
        self._listeners = Listeners(() if heritage is None else heritage.listeners)
        self._succession = Succession("process", self._listeners, notifier, heritage, directory)
        self._succession.decline_counters()
        self._process = os.getpid()
        self._signals: SimpleQueue[int] = SimpleQueue()  # a signal handler may put into it
        self._wakeup: Wakeup | None = None  # of the thread that obeys them
        self._stopped_by = ""
        self._is_interruptible = False

    def run(self) -> bool:
        """Serve; return whether handlers are left behind."""
        with caught(OBEYED, self._note), caught(STOP_SIGNALS, self._note_stop):
            try:
                return self._serve()
            except _Stopped as stopped:
                say(f"stops ({stopped})")
                return False

    def _serve(self) -> bool:
        process = self._configuration.process
        identity = privileges.find(process.user, process.group)
        services = expanded(self._configuration.services)
        raise_descriptor_limit()
        with ExitStack() as stack:
            stack.callback(self._listeners.close)
            wanted = openings(services)
            listeners = self._listeners.gather(wanted)
            stack.enter_context(self._succession.pid_file(process.pid_file))
            privileges.drop(identity)  # and only now does anything of the target's run
            with self._interrupted():
                assignments = assign(services)
                stack.enter_context(logged(process))
            serving = stack.enter_context(Service(assignments, listeners))
            stack.enter_context(serving.stopped_by_signals())
            self._raise_if_stopped()  # from here on it is the service that is told
            stack.enter_context(Announcement(self._notifier, serving))
            self._succession.take_over()
            self._listeners.settle(wanted, listeners)
            for bound in serving.addresses:
                say(f"ready on {bound}")
            pairs: Pairs = [
                (each.address, own) for each, own in zip(wanted, listeners, strict=True)
            ]
            stack.enter_context(self._obeying(serving, pairs))
            started = time.monotonic()
            tallies = serving.run()
            report(tallies, time.monotonic() - started)
        return serving.has_left_handlers

    # --- signals --------------------------------------------------------------------------

    def _note(self, number: int, _: FrameType | None) -> None:
        """Note what is to be obeyed as soon as it serves."""
        if os.getpid() == self._process:  # and not a child that serves one request
            self._tell(number)

    def _tell(self, number: int) -> None:
        """Tell the thread that obeys; callable from any thread and signal handler."""
        self._signals.put(number)
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup.wake()

    def _note_stop(self, number: int, _: FrameType | None) -> None:
        """Note that it is not to serve at all."""
        if os.getpid() != self._process:  # a child, which has inherited this and is to end
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self._stopped_by = signal.Signals(number).name
        if self._is_interruptible:
            raise _Stopped(self._stopped_by)

    def _raise_if_stopped(self) -> None:
        if self._stopped_by:
            raise _Stopped(self._stopped_by)

    @contextmanager
    def _interrupted(self) -> Generator[None]:
        """Have a signal interrupt the block: the target's import may take any time.

        Elsewhere it waits for the next step, so that whatever is had is also given back.
        """
        self._is_interruptible = True
        try:
            self._raise_if_stopped()
            yield
        finally:
            self._is_interruptible = False
        self._raise_if_stopped()  # the target may have caught it

    @contextmanager
    def _obeying(self, serving: Service, pairs: Pairs) -> Generator[None]:
        """Do what signals ask for while the block runs, in a thread beside those that serve."""
        ear = threading.Thread(
            target=self._listen, args=(serving, pairs), name="signals", daemon=True
        )
        serving.on_stop = partial(self._tell, STOPPING)
        with caught(OBEYED, self._note):  # again: the target may have taken them for itself
            ear.start()
            try:
                yield
            finally:
                self._tell(ENDED)
                ear.join(STOP_PATIENCE)  # a file system that is gone may hold it
                self._succession.stop()

    def _listen(self, serving: Service, pairs: Pairs) -> None:
        """Obey each signal as it comes, and see what becomes of a successor that starts."""
        with closing(Wakeup()) as wakeup:
            self._wakeup = wakeup
            while (number := self._next(wakeup)) != ENDED:
                if number is not None:
                    self._obey(number, serving, pairs)
                if self._succession.attend() and not serving.is_stopping:
                    serving.stop_by_signal()
            self._wakeup = None

    def _next(self, wakeup: Wakeup) -> int | None:
        """Wait for a signal; ``None`` if the successor is to be attended to first."""
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        heir = self._succession.fileno()
        if heir is not None:
            poll.register(heir, select.POLLIN)
        with suppress(Empty):
            return self._signals.get_nowait()
        pause = min(self._succession.deadline - time.monotonic(), LONGEST_WAIT)
        poll.poll(ceil(max(0.0, pause) * 1000))
        wakeup.clear()
        return None

    def _obey(self, number: int, serving: Service, pairs: Pairs) -> None:
        if number == STOPPING:
            self._succession.stop()  # at once: it is to serve as little as this one
            return
        match number:
            case signal.SIGHUP if not serving.is_stopping:
                self._notifier.reloading("reads its certificates again")
                _renew_certificates(serving)
                self._notifier.ready(ready_on(serving.addresses))
            case signal.SIGUSR1:
                reopen_log()
                say_counts(serving.counts())
            case signal.SIGUSR2 if not serving.is_stopping:
                self._succession.begin(pairs, self._configuration.process)
            case _:
                pass


class _Stopped(BaseException):
    """A signal has come before anything is served; not for those who catch `Exception`."""


def _renew_certificates(serving: Service) -> None:
    """Read the certificates again, and say what only workers can do."""
    if serving.reload_certificates():
        say("has read its certificates again; for other code and settings it needs workers")
    else:
        say("keeps the earlier certificates; for other code and settings it needs workers")
