"""Run servers of one handler side by side: one for each address, started and stopped together.

Owns how a server is put together from an engine and an address, which of its loops runs in which
thread, and the count of what was served.  Leaves serving to the servers.
"""

from __future__ import annotations

import os
import pkgutil
import select
import signal
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from portico import listener
from portico.acceptor import Wakeup
from portico.address import Address, Scheme
from portico.engines import ENGINES, settings
from portico.engines.forks import ForkingMixIn
from portico.events import (
    CloseReason,
    ConnectionAccepted,
    ConnectionClosed,
    ConnectionRefused,
    Event,
    subscribe,
)
from portico.families import TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from portico.listener import Place, SocketFile
from portico.target import Handler

if TYPE_CHECKING:
    _Base: TypeAlias = TCPServer
else:
    _Base = object

FAMILIES: Final[Mapping[Scheme, type[TCPServer]]] = {
    Scheme.TCP: TCPServer,
    Scheme.UDP: UDPServer,
    Scheme.UNIX: UnixStreamServer,
    Scheme.UNIX_DATAGRAM: UnixDatagramServer,
}
"""The family that serves each scheme."""

STOP_PATIENCE: Final = 0.5
"""Seconds that a loop has to end in, after it was asked to.

A loop ends at once unless a handler runs in it.  It is half of the second within which a signal
is to stop a service."""


class AddressedMixIn(_Base):
    """Bind to a `Place`, and remove the file of a Unix socket when the server is closed.

    Extends `server_bind`, and the closing of the listener, with what `portico.listener` does.
    """

    place: Place
    """Where the server belongs."""

    _file: SocketFile | None = None

    @property
    def address(self) -> Address:
        """The address that was bound, with the port that the system chose."""
        return self.place.address_of(self.server_address)

    def server_bind(self) -> None:
        """Bind as the place asks for."""
        self._file = listener.bind(self.socket, self.place, super().server_bind)

    def _close_listener(self) -> None:
        """Remove the file of a Unix socket, if this server made it, and close the listener."""
        file, self._file = self._file, None
        if file is not None:
            file.remove()
        super()._close_listener()


@dataclass(frozen=True, slots=True)
class Tally:
    """What a server did.

    Attributes:
        address: Where.
        served: Requests whose handler ended by itself; a datagram is one, too.
        refused: Requests that a hook of the server did not let through.
        cut_off: Requests whose handler was interrupted, or still ran when the service stopped.
    """

    address: Address
    served: int
    refused: int
    cut_off: int


class Service:
    """Servers of one handler, one for each address, bound when it is made.

    A context manager; leaving the ``with`` block closes the servers.
    """

    def __init__(
        self,
        handler: Handler,
        addresses: Sequence[Address],
        engine: str,
        *,
        hubs: int | None = None,
    ) -> None:
        """Bind every address, or none.

        Args:
            handler: What serves each request.
            addresses: Where; at least one.
            engine: A key of `portico.engines.ENGINES`.
            hubs: Hubs at most for each server, on the engine that has them.

        Raises:
            ListenerError: An address cannot be had.
            SettingError: The engine has no hubs, or not so many.
        """
        self._servers: list[AddressedMixIn] = []
        self._counters: list[_Counter] = []
        self._is_running = False
        self._is_stopping = False
        self._wakeup: Wakeup | None = None
        with ExitStack() as closing:
            for address in addresses:
                place = listener.resolve(address)
                with listener.explained(place):
                    server = server_class(engine, place, hubs=hubs)(place.name, handler)
                counter = _Counter(server)
                closing.callback(_close, server)
                closing.callback(counter.close)
                self._servers.append(server)
                self._counters.append(counter)
            self._closing = closing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def addresses(self) -> list[Address]:
        """The addresses that were bound, with the ports that the system chose."""
        return [server.address for server in self._servers]

    def run(self) -> list[Tally]:
        """Serve until `stop`, then close; says what each server did.

        With one address, serving is done in the calling thread; with several, in a thread each.

        Raises:
            Exception: What ended a serving loop; the other servers are stopped first.
        """
        try:
            try:
                self._is_running = True
                if len(self._servers) == 1:
                    self._servers[0].serve_forever()
                else:
                    self._run_in_threads()
            finally:
                self._is_running = False
        except KeyboardInterrupt:  # of `stopped_by_signals`, in the middle of anything
            pass
        tallies = [counter.tally() for counter in self._counters]
        self.close()
        return tallies

    def stop(self) -> None:
        """Have `run` return.  Callable from a signal handler in the thread that runs."""
        self._is_stopping = True
        if len(self._servers) == 1:
            self._servers[0].shutdown()
        elif self._wakeup is not None:
            self._wakeup.wake()

    def close(self) -> None:
        """Close the servers, and end the processes that still serve.  Callable again."""
        self._closing.close()

    @contextmanager
    def stopped_by_signals(self) -> Generator[None]:
        """Stop at SIGINT and SIGTERM while the block runs; in the main thread.

        A handler that runs in the main thread, and so holds it, has `STOP_PATIENCE` seconds from
        then on, or until the next signal: `KeyboardInterrupt` is raised in it.
        """
        process = os.getpid()
        before: dict[int, Any] = {}
        alarm: tuple[float, float] | None = None

        def catch(number: int) -> None:
            before[number] = signal.signal(number, on_signal)

        def on_signal(number: int, _: FrameType | None) -> None:
            nonlocal alarm
            if os.getpid() != process:  # a child, which has inherited this and is to end
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            elif not self._is_stopping:
                # An alarm, and not a thread that waits, because a signal handler may come in
                # between any two steps of starting one.
                catch(signal.SIGALRM)
                alarm = signal.setitimer(signal.ITIMER_REAL, STOP_PATIENCE)
                self.stop()
            elif self._is_running:
                raise KeyboardInterrupt

        catch(signal.SIGINT)
        catch(signal.SIGTERM)
        try:
            yield
        finally:
            if alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, *alarm)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run_in_threads(self) -> None:
        """Serve each address in a thread of its own, until `stop` or until none is left."""
        wakeup = self._wakeup = Wakeup()
        loops = [_Loop(server, wakeup) for server in self._servers]
        try:
            for loop in loops:
                loop.start()
            while not self._is_stopping and all(loop.error is None for loop in loops):
                if all(loop.has_ended for loop in loops):
                    break
                select.select([wakeup], [], [])
                wakeup.clear()
            deadline = time.monotonic() + STOP_PATIENCE
            for loop in loops:
                loop.stop()
            for loop in loops:
                loop.join(max(0, deadline - time.monotonic()))
        finally:
            self._wakeup = None
            wakeup.close()
        for loop in loops:
            if loop.error is not None:
                raise loop.error


def server_class(engine: str, place: Place, *, hubs: int | None = None) -> type[AddressedMixIn]:
    """Put together the class that serves `place`: an engine, in front of a family.

    Its requests do not outlive the program, nor hold up its end.

    Raises:
        SettingError: The engine has no hubs, or not so many.
    """
    family = FAMILIES[place.address.scheme]
    mixin = ENGINES[engine]
    engines = (pkgutil.resolve_name(mixin),) if mixin else ()
    prefix = "".join(kind.__name__.removesuffix("MixIn") for kind in engines)
    attributes = {
        "__module__": __name__,
        "place": place,
        "address_family": place.family,
        # A service can start again while connections of the last one linger.  For datagrams the
        # same option would let two services take each other's.
        "allow_reuse_address": place.address.scheme == Scheme.TCP,
        "daemon_threads": True,
        "block_on_close": False,
    } | settings(engine, hubs=hubs)
    return type(f"{prefix}{family.__name__}", (*engines, AddressedMixIn, family), attributes)


def _close(server: AddressedMixIn) -> None:
    """Close a server, and end the children that still serve for it."""
    server.server_close()
    if isinstance(server, ForkingMixIn):
        for child in server.active_children or ():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)


class _Loop(threading.Thread):
    """A serving loop in a thread of its own."""

    def __init__(self, server: AddressedMixIn, wakeup: Wakeup) -> None:
        super().__init__(name=str(server.address), daemon=True)
        self.error: BaseException | None = None
        self.has_ended = False
        self._server = server
        self._wakeup = wakeup

    def run(self) -> None:
        try:
            self._server.serve_forever()
        except BaseException as error:  # raised again, in the thread of `run`
            self.error = error
        finally:
            self.has_ended = True
            self._wakeup.wake()

    def stop(self) -> None:
        """Ask the loop to end; does not wait until it has."""
        threading.Thread(target=self._server.shutdown, daemon=True).start()


class _Counter:
    """Counts the requests of one server."""

    def __init__(self, server: AddressedMixIn) -> None:
        self._server = server
        self._lock = threading.Lock()  # guards the counts.  One for each server: a child that is
        # forked by one acceptor must not inherit a lock that another thread holds.
        self._accepted = 0
        self._refused = 0
        self._ended = 0
        self.close = subscribe(self._count, ConnectionAccepted, ConnectionRefused, ConnectionClosed)

    def tally(self) -> Tally:
        """Say what the server did so far."""
        with self._lock:
            cut_off = self._accepted - self._refused - self._ended
            if isinstance(self._server, ForkingMixIn):  # whose connections close in the children
                self._server.collect_children()
                cut_off = len(self._server.active_children or ())
            served = self._accepted - self._refused - cut_off
            return Tally(self._server.address, served, self._refused, cut_off)

    def _count(self, event: Event) -> None:
        if event.server is not self._server:
            return
        with self._lock:
            match event:
                case ConnectionAccepted():
                    self._accepted += 1
                case ConnectionRefused():
                    self._refused += 1
                case ConnectionClosed(reason=reason) if reason != CloseReason.INTERRUPTED:
                    self._ended += 1
                case _:
                    pass
