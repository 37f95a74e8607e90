"""The file over a green socket that `makefile` and a handler's `rfile` read from.

Owns the way of a read, written out.  Leaves what is rare in it to the socket.
"""

from __future__ import annotations

import _socket
import socket
from typing import TYPE_CHECKING

from greenlet import getcurrent

from portico.engines.green.watch import CREDIT, NOW

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from portico.engines.green.sockets import GreenSocket

_recv_into = _socket.socket.recv_into


class GreenSocketIO(socket.SocketIO):
    """The unbuffered file over a green socket; reads without a detour over `recv_into`."""

    # What SocketIO keeps, by the names that it has used from the beginning.
    _sock: GreenSocket | None
    _reading: bool
    _timeout_occurred: bool

    # Written out for speed, hence long.
    def readinto(self, b: WriteableBuffer) -> int | None:  # noqa: C901, PLR0912
        sock = self._sock
        if sock is None or self._timeout_occurred or not self._reading:
            return super().readinto(b)
        watch = sock.watch
        try:
            if watch.may_read:
                watch.credit -= 1
                if watch.credit <= 0:
                    watch.give_way()
                watch.may_read = False
            elif watch.owner is not getcurrent():
                watch.wait_readable()
            else:  # the short way of wait_readable, written out for speed
                hub = watch.hub
                if hub.unsent:
                    hub.send_unsent()
                if not watch.may_read:
                    watch.credit = CREDIT
                    watch.reader = watch.owner
                    try:
                        hub.poller.pass_on(hub.switch)
                    finally:
                        watch.reader = None
                        if watch.crowd is not None:
                            watch.wake_crowd()
            try:
                count = _recv_into(sock, b, 0, NOW)
            except BlockingIOError:
                watch.may_read = False
                if watch.timeout == 0:
                    return None
            except OSError:
                watch.may_read = True
                raise
            else:
                if count >= len(b) or watch.is_eager:  # type: ignore[arg-type]  # it has one
                    watch.may_read = True
                return count
            return sock._read(_recv_into, b, 0, NOW, is_file=True)
        except TimeoutError:
            self._timeout_occurred = True
            raise
