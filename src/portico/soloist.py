"""Serve in this very process, without workers.

Owns what signals do to such a process, before it serves and while it does.  Leaves serving to
`portico.service`, and handing over to `portico.succession`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import Final, TypeAlias

from portico import privileges
from portico.address import Address
from portico.announcement import Announcement, ready_on
from portico.configuration import Configuration
from portico.console import say
from portico.descriptors import raise_descriptor_limit
from portico.duty import assign, expanded, logged, openings, report, say_counts
from portico.handover import Heritage
from portico.listener import OpenListener
from portico.listeners import Listeners
from portico.logfile import reopen_all
from portico.service import STOP_SIGNALS, Service
from portico.succession import Succession
from portico.systemd import Notifier

Pairs: TypeAlias = list[tuple[Address, OpenListener]]

OBEYED: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that such a process obeys, beside those that stop it."""


class Soloist:
    """A process that serves by itself.

    Args:
        configuration: What to serve.
        notifier: Tells systemd.
        heritage: What a predecessor has left; ``None`` if there is none.
    """

    def __init__(
        self, configuration: Configuration, notifier: Notifier, heritage: Heritage | None
    ) -> None:
        self._configuration = configuration
        self._notifier = notifier
        self._listeners = Listeners(() if heritage is None else heritage.listeners)
        self._succession = Succession("process", self._listeners, notifier, heritage)
        self._succession.decline_counters()
        self._process = os.getpid()
        self._signals: SimpleQueue[int] = SimpleQueue()  # a signal handler may put into it
        self._stopped_by = ""
        self._is_interruptible = False

    def run(self) -> bool:
        """Serve; return whether handlers are left behind."""
        with _caught(OBEYED, self._note), _caught(STOP_SIGNALS, self._note_stop):
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
        with ExitStack() as closing:
            closing.callback(self._listeners.close)
            wanted = openings(services)
            listeners = self._listeners.gather(wanted)
            closing.enter_context(self._succession.pid_file(process.pid_file))
            privileges.drop(identity)  # and only now does anything of the target's run
            with self._interrupted():
                assignments = assign(services)
                closing.enter_context(logged(process))
            serving = closing.enter_context(Service(assignments, listeners))
            closing.enter_context(serving.stopped_by_signals())
            self._raise_if_stopped()  # from here on it is the service that is told
            closing.enter_context(Announcement(self._notifier, serving))
            self._succession.take_over()
            self._listeners.settle(wanted, listeners)
            for bound in serving.addresses:
                say(f"ready on {bound}")
            pairs: Pairs = [
                (each.address, own) for each, own in zip(wanted, listeners, strict=True)
            ]
            closing.enter_context(self._obeying(serving, pairs))
            started = time.monotonic()
            tallies = serving.run()
            report(tallies, time.monotonic() - started)
        return serving.has_left_handlers

    # --- signals --------------------------------------------------------------------------

    def _note(self, number: int, _: FrameType | None) -> None:
        """Note what is to be obeyed as soon as it serves."""
        if os.getpid() == self._process:  # and not a child that serves one request
            self._signals.put(number)

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

        def obey() -> None:
            while (number := self._signals.get()) in OBEYED:
                match number:
                    case signal.SIGHUP:
                        self._notifier.reloading("reads its certificates again")
                        _renew_certificates(serving)
                        self._notifier.ready(ready_on(serving.addresses))
                    case signal.SIGUSR1:
                        _reopen()
                        say_counts(serving.counts())
                    case _:
                        self._hand_over(pairs)

        with _caught(OBEYED, self._note):  # again: the target may have taken them for itself
            threading.Thread(target=obey, name="signals", daemon=True).start()
            try:
                yield
            finally:
                self._signals.put(0)
                self._succession.stop()

    def _hand_over(self, pairs: Pairs) -> None:
        """Start another process of the same command line, and go when it serves."""
        self._succession.begin(pairs, self._configuration.process)
        if self._succession.wait():
            os.kill(os.getpid(), signal.SIGTERM)


class _Stopped(BaseException):
    """A signal has come before anything is served; not for those who catch `Exception`."""


@contextmanager
def _caught(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> Generator[None]:
    """Have a handler for signals while the block runs."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _renew_certificates(serving: Service) -> None:
    """Read the certificates again, and say what only workers can do."""
    if serving.reload_certificates():
        say("has read its certificates again; for other code and settings it needs workers")
    else:
        say("keeps the earlier certificates; for other code and settings it needs workers")


def _reopen() -> None:
    try:
        reopen_all()
    except OSError as error:
        say(f"cannot open the log again: {error}")
    else:
        say("has opened its log again")
