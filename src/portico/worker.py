"""Serve in a process that a supervisor has forked.

Owns what makes such a process different from one that serves alone: it tells its supervisor that it
is ready, or why it is not, and that it is alive; it answers where its threads are; it ends when its
supervisor is gone.  Leaves serving to `portico.service`.

The target is imported here, and never in the supervisor, so that the next worker has the code that
is there when it starts.

Source: signal(7) (what a fork inherits).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn

from portico import stacks
from portico.assembly import AdoptingMixIn
from portico.channel import Channel, Message
from portico.configuration import Configuration
from portico.console import say, show
from portico.counters import Counters, Row
from portico.duty import assign, forget_logs, logged
from portico.errors import PorticoError
from portico.events import ServerStarted, subscribe
from portico.listener import OpenListener
from portico.logfile import reopen_all
from portico.service import STOP_PATIENCE, Service
from portico.signals import do_nothing
from portico.tally import Tally
from portico.waits import thread_waits_in_read, thread_waits_in_write

DUMP_SIGNAL: Final = signal.SIGRTMAX - 1
"""Has the interpreter write the stacks of all threads to standard error, whatever runs."""

INTERRUPT_SIGNAL: Final = signal.SIGRTMAX - 2
"""Ends a worker at once.

Not a second SIGTERM: where that is sent to all processes of a service, as systemd and timeout(1)
do, a worker gets it from outside and is told to drain by its supervisor as well."""

BEAT_INTERVAL: Final = 2.0
"""Seconds between two signs of life at the most; an idle worker wakes twice as often.

Short beside any time after which a worker counts as stuck, and nothing beside a millisecond of
requests."""

OF_THE_SUPERVISOR: Final = (
    signal.SIGINT,  # of the terminal, which sends it to the whole group
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
"""Signals to which a worker pays no attention."""

STARTED: Final = 0
FAILED: Final = 1
"""Exit statuses: of a worker that has drained, and of one that could not serve."""


@dataclass(frozen=True, slots=True)
class Post:
    """What a worker is given.

    Attributes:
        configuration: What to serve.
        listeners: Where: one for each address, in their order; lent.
        counters: The mapping of all workers.
        row: The worker's row in it.
        workers: How many there are to be.
        channel: To the supervisor.
    """

    configuration: Configuration
    listeners: tuple[OpenListener, ...]
    counters: Counters
    row: int
    workers: int
    channel: Channel


def work(take_up: Callable[[], Post], let_go: Callable[[], object]) -> NoReturn:
    """Serve until SIGTERM, and end the process; for the child, right after the fork.

    The caller has all signals blocked, and does nothing in the child but this: whatever it raised
    there would have the child go on as a second supervisor.

    Args:
        take_up: Says what to do; may fail.
        let_go: Closes what belongs to the supervisor.
    """
    status = FAILED
    try:
        post = take_up()
        _settle_signals()
        let_go()
        forget_logs()
        status = Worker(post).run()
    except BaseException:  # nothing of the supervisor's stack is to see it
        show(traceback.format_exc())
    finally:
        leave(status)


def leave(status: int) -> NoReturn:
    """End the process at once, but not before what was written is out.

    Handlers that still run end with it, and the program's exit handlers do not run.
    """
    try:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # none, closed, or not read
                stream.flush()
    finally:  # a handler of the program's logs may raise anything
        os._exit(status)


def _settle_signals() -> None:
    """Hear what is meant for a worker, and nothing else."""
    signal.set_wakeup_fd(-1)
    for number in OF_THE_SUPERVISOR:
        # A handler that does nothing, since programs that a worker starts would inherit SIG_IGN.
        signal.signal(number, do_nothing)
    for ending in (signal.SIGTERM, INTERRUPT_SIGNAL, signal.SIGCHLD):
        signal.signal(ending, signal.SIG_DFL)
    with suppress(OSError, ValueError):  # there is no standard error
        faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


class Worker:
    """What serves, and is watched.

    Args:
        post: What to do.
    """

    def __init__(self, post: Post) -> None:
        self._post = post
        self._channel = post.channel
        self._row = Row(post.counters, post.row)
        self._service: Service | None = None
        self._threads: dict[object, int] = {}  # in which the loop of a server runs
        self._changed = threading.Lock()  # guards the two below
        self._not_started: set[object] = set()
        self._not_left: set[object] = set()

    def run(self) -> int:
        """Serve, and return the status to exit with."""
        threading.Thread(target=self._listen, name="supervisor's ear", daemon=True).start()
        configuration = self._post.configuration
        try:
            assignments = assign(configuration.services)
            with logged(configuration.process):
                with Service(
                    assignments, self._post.listeners, row=self._row, workers=self._post.workers
                ) as service:
                    return self._serve(service)
        except PorticoError as error:
            self._channel.send("failed", reason=str(configuration.explain(error)))
            return FAILED

    def _serve(self, service: Service) -> int:
        self._service = service
        self._not_started, self._not_left = set(service.servers), set(service.servers)
        service.beat(self._row.beat, BEAT_INTERVAL)
        for server in service.servers:
            server.on_left = partial(self._note_left, server)
        unsubscribe = subscribe(self._note_start, ServerStarted)
        with service.stopped_by_signals([signal.SIGTERM], at_once=[INTERRUPT_SIGNAL]):
            try:
                tallies = service.run()
            finally:
                unsubscribe()
        self._channel.send("served", drained=_drained(tallies))
        return STARTED

    def _note_start(self, event: ServerStarted) -> None:
        """Tell the supervisor when all servers serve; called in their loops."""
        self._threads[event.server] = threading.get_native_id()
        if self._is_last(self._not_started, event.server):
            self._row.beat()
            self._channel.send("ready")

    def _note_left(self, server: AdoptingMixIn) -> None:
        """Tell it when none accepts anybody any more."""
        if self._is_last(self._not_left, server):
            self._channel.send("left")

    def _is_last(self, left: set[object], server: object) -> bool:
        """Take a server out of those that are left; say whether it was the last."""
        with self._changed:
            if server not in left:
                return False
            left.discard(server)
            return not left

    # --- what the supervisor asks, in a thread ---------------------------------------------

    def _listen(self) -> None:
        """Answer the supervisor until it is gone."""
        while (messages := self._channel.receive()) is not None:
            for message in messages:
                self._obey(message)
        self._end_alone()

    def _obey(self, message: Message) -> None:
        match message["kind"]:
            case "drain":
                self._drain(message["rest"])
            case "report":
                self._report()
            case "reopen":
                try:
                    reopen_all()
                except OSError as error:
                    say(f"process {os.getpid()} cannot open its log again: {error}")
            case _:
                pass

    def _drain(self, rest: Sequence[int]) -> None:
        """Accept no more, and end.

        Those who wait in a backlog are left to the other workers: a client that is taken here would
        have what is left of the time of the drain.

        Args:
            rest: Which servers nobody else accepts for.
        """
        service = self._service
        if service is not None and not service.is_stopping:
            for number, server in enumerate(service.servers):
                server.leaves_rest = number not in rest
        self._stop()

    def _stop(self) -> None:
        """Drain, and end; or end at once, before there is anything to drain.

        By the signal, since what it starts is the main thread's.  It may be on its way from outside
        already: a second one does nothing, and none is sent that would come when all is done.
        """
        if self._service is None or not self._service.is_stopping:
            os.kill(os.getpid(), signal.SIGTERM)

    def _report(self) -> None:
        """Say where the threads are; or that they only wait for a peer, as they may."""
        if self._service is not None and self._waits_for_peers(self._service):
            self._row.beat()
            self._channel.send("waits")
        else:
            self._channel.send("stacks", text=stacks.describe())

    def _waits_for_peers(self, service: Service) -> bool:
        """Say whether the loops that do not come round are held by handlers that wait for peers.

        So the serial engine's is, for as long as its peer is silent or does not read;
        `idle_timeout` is for that.
        """
        overdue = service.overdue()
        return bool(overdue) and all(
            _waits_for_peer(each, self._threads.get(each, 0)) for each in overdue
        )

    def _end_alone(self) -> None:
        """Drain and end, since the supervisor has gone and nobody else would see to it."""
        say(f"process {os.getpid()} has lost its supervisor, and ends")
        service = self._service
        self._stop()
        timeout = None if service is None else service.drain_timeout
        if timeout is not None:
            threading.Event().wait(min(timeout + 2 * STOP_PATIENCE, threading.TIMEOUT_MAX))
            leave(FAILED)  # a handler holds the main thread


def _waits_for_peer(server: AdoptingMixIn, thread: int) -> bool:
    """Say whether the loop of a server is held by a handler that waits for its connection."""
    for connection in server._guard.connections:
        if connection.thread == thread:
            with suppress(AttributeError, OSError, ValueError):  # gone, or of a kind of its own
                number = connection.request.fileno()
                return bool(
                    thread_waits_in_read(thread, number) or thread_waits_in_write(thread, number)
                )
    return False


def _drained(tallies: Iterable[Tally]) -> list[str]:
    """Return what became of the connections that were open, by the address."""
    return [
        f"{each.address}: {each.drained}"
        for each in tallies
        if each.drained is not None and each.drained.connections
    ]
