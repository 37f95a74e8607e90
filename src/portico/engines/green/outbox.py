"""What is written to a connection and has not been sent: small writes leave together.

Owns the bytes between `wfile.write` and the system, and when they leave.  Leaves waiting for a slow
peer to its socket, and the moment before a wait, when all that is collected leaves, to the hub.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

from greenlet import GreenletExit, getcurrent

from portico.engines.green.hub import Hub, running
from portico.engines.green.watch import NOW, WRITING
from portico.handlers import _SocketWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from portico.engines.green.sockets import GreenSocket

OUTBOX_SIZE: Final = 65536
"""Bytes that are collected before they are sent: about what the system takes in one call."""


class Outbox:
    """What was written to a connection but has not been sent: small writes leave together.

    Belongs to the thread of the hub.  Its watchdog alone comes from another thread, with
    `send_now`, so taking from it is under the hub's lock `sending`.
    """

    __slots__ = (
        "_error",
        "_hub",
        "_send_now",
        "_sock",
        "chunks",
        "is_given_up",
        "is_listed",
        "size",
    )

    def __init__(self, sock: GreenSocket) -> None:
        self._sock = sock
        self._send_now = cast("Callable[[ReadableBuffer, int], int]", sock._get_send_now())
        self._hub: Hub | None = None
        self._error: OSError | None = None
        self.chunks: list[bytes | memoryview] = []
        """What has not left, first to last.  It stays here until the system has taken it: whoever
        comes meanwhile, from this thread or the watchdog's, sees that there is something."""
        self.size = 0
        """Bytes in `chunks`, or more if the watchdog sent some."""
        self.is_listed = False
        """Whether the hub will send this before the greenlet waits."""
        self.is_given_up = False
        """Whether this is the rest of a write that was interrupted: it leaves before what is
        written next, if anything is, and nobody waits for it by himself."""

    def open(self) -> bool:
        """Prepare to collect, and have it sent; return whether chunks may be collected here.

        Raises:
            OSError: The bytes before could not be sent.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self.is_given_up = False
        hub = self._hub
        if hub is None or getcurrent().parent is not hub.greenlet:
            hub = running()
            if hub is None or hub.is_current() or (self.chunks and hub is not self._hub):
                return False
            self._hub = hub
        if not self.is_listed:
            self.is_listed = True
            hub.unsent.append(self)
        return True

    def send(self) -> None:
        """Send everything, waiting for the peer where need be.

        Raises:
            OSError: As `sendall`.
        """
        hub = self._hub
        if self.chunks and hub is not None:
            with hub.sending:
                self.size = self._push()
            if self.chunks:
                self._push_rest(hub)

    def flush(self) -> None:
        """Send everything, and tell of an earlier failure.

        Raises:
            OSError: As `sendall`.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self.send()

    def send_at_once(self) -> bool:
        """Send what the system takes before a wait; return whether nothing is left.

        An error is kept for the next write.
        """
        self.is_listed = False
        hub = self._hub
        if not self.chunks or hub is None:
            return True
        try:
            with hub.sending:
                self.size = left = self._push()
        except OSError as error:
            self._error = error
            return True
        return not left

    def send_collected(self) -> None:
        """Send everything, waiting for the peer; an error is kept for the next write.

        Without a wait for what was given up.  Interrupted, it has given up nothing: whoever wrote
        this was told that it will leave.
        """
        if self.is_given_up:
            self.send_at_once()
            return
        try:
            self.send()
        except OSError as error:
            self._error = error
        except BaseException:
            self.is_given_up = False
            self.list_again()
            raise

    def end(self) -> None:
        """Send what the system takes of what was given up, and forget the rest.

        And its failure: nobody is left to be told.
        """
        if self.is_given_up:
            self.send_at_once()
            self._drop()
            self._error = None

    def list_again(self) -> None:
        """Have what is left sent before the next wait, after one that was interrupted."""
        if self.chunks and self._hub is not None and not self.is_listed:
            self.is_listed = True
            self._hub.unsent.append(self)

    def send_now(self) -> None:
        """Send what the system takes at once; from the watchdog's thread, under its lock."""
        try:
            self._push()
        except OSError as error:
            self._error = error

    def leave_to_parent(self) -> None:
        """Hold nothing in a child process: the parent sends what is left."""
        self.chunks.clear()
        self.size = 0
        self.is_listed = False
        self._hub = None

    def _push(self) -> int:
        """Send what the system takes, under the hub's lock; return how many bytes it left.

        Raises:
            OSError: As `send`; what was there is dropped.
        """
        chunks = self.chunks
        # As many as there are now: the greenlet may be adding to them while the watchdog is here.
        count = len(chunks)
        if not count:  # the other one was faster
            return 0
        data = chunks[0] if count == 1 else b"".join(chunks[:count])
        try:
            sent = self._send_now(data, NOW)
        except BlockingIOError:
            sent = 0
        except OSError:
            del chunks[:count]
            raise
        if sent == len(data):
            del chunks[:count]
            return 0
        chunks[:count] = [memoryview(data)[sent:]]  # no copy: it may be large
        return len(data) - sent

    def _push_rest(self, hub: Hub) -> None:
        """Send what the system did not take, waiting for the peer.

        Raises:
            OSError: As `send`; what was there is dropped.
        """
        self._unlist()  # the wait begins with what is listed, and this is waited for already
        watch = self._sock.watch
        deadline = watch.deadline()
        try:
            while True:
                before = self.size
                with hub.sending:
                    self.size = self._push()
                if not self.chunks:
                    return
                if self.size < before:  # TLS sends record by record: there may be room for more
                    if getattr(self._sock, "_sslobj", None) is not None:
                        deadline = watch.deadline()  # as in the standard library: for each record
                    continue
                if watch.timeout == 0:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                self._sock._wait_for_room(deadline)
        except OSError:
            self._drop()
            raise
        except GreenletExit:  # it may not wait any more, and nobody is to go on after a gap
            self._drop()
            self._error = OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
            raise
        except BaseException:  # of a timeout around the caller, who may go on to write
            self.is_given_up = True
            raise

    def _unlist(self) -> None:
        """Take back what `open` told the hub."""
        if self.is_listed and self._hub is not None:
            self.is_listed = False
            with suppress(ValueError):  # it was told to another hub
                self._hub.unsent.remove(self)

    def _drop(self) -> None:
        """Forget what is left."""
        if self._hub is not None:
            with self._hub.sending:
                self.chunks.clear()
                self.size = 0


class GreenWriter(_SocketWriter):
    """A connection's `wfile`: collects what is written until its greenlet waits, or 64 KiB."""

    def __init__(self, sock: GreenSocket) -> None:
        super().__init__(sock)
        if sock.outbox is None:
            sock.outbox = Outbox(sock)
        self._outbox = sock.outbox

    def write(self, b: ReadableBuffer) -> int:
        """Write all of `b`, a buffer of any kind, and return its size in bytes.

        Raises:
            OSError: The connection is broken; it may be for bytes of an earlier write.
        """
        # A copy, unless nobody can change it before it is sent.
        data = b if type(b) is bytes else memoryview(b).tobytes()
        outbox = self._outbox
        # Listed or not: somebody may be waiting with what was written before, but not for us.
        if not (outbox.chunks and outbox.is_listed) and not outbox.open():
            self._sock.sendall(data)
            return len(data)
        outbox.chunks.append(data)
        size = len(data)
        outbox.size += size
        if outbox.size >= OUTBOX_SIZE:
            outbox.send()
            self._sock.watch.give_way(WRITING)
        return size

    def flush(self) -> None:
        """Send what was written.

        Raises:
            OSError: As `write`.
        """
        if not self.closed:
            self._outbox.flush()

    def flush_at_end(self) -> None:
        """Send what was written, and do not wait for the rest of a write that was interrupted.

        Raises:
            OSError: As `write`.
        """
        self._outbox.end()
        self.flush()
