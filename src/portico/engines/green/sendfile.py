"""Send a file over a green socket.

Owns how much of it goes at once, and when others have their turn.  Leaves waiting to the socket's
`Watch`.

Source: sendfile(2).
"""

from __future__ import annotations

import _socket
import errno
import io
import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from portico.engines.green.sockets import GreenSocket

SENDFILE_SIZE: Final = 1 << 20
"""Bytes for one call of sendfile(2): it does not wait for the peer, but it may for the disk."""

FILE_CHUNK: Final = 65536
"""Bytes that are read at once from a file that sendfile(2) does not take."""


_fileno = _socket.socket.fileno  # of a green socket it would send what was collected first


def send_by_kernel(sock: GreenSocket, file: Any, offset: int, count: int | None) -> int | None:
    """Send a file with sendfile(2); return how much, or ``None`` if it cannot be done."""
    try:
        source = file.fileno()
        size = os.fstat(source).st_size
    except (AttributeError, io.UnsupportedOperation, OSError):
        return None
    if not size or not hasattr(os, "sendfile"):
        return None
    watch, target, sent = sock.watch, _fileno(sock), 0
    was_blocking = os.get_blocking(target)
    os.set_blocking(target, False)  # sendfile(2) has no flag for it
    try:
        while count is None or sent < count:
            part = SENDFILE_SIZE if count is None else min(SENDFILE_SIZE, count - sent)
            try:
                done = os.sendfile(target, source, offset + sent, part)
            except BlockingIOError:
                watch.wait_writable()  # the timeout is each wait's, as in the standard library
                continue
            except OSError as error:
                if not sent and error.errno in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
                    return None
                raise
            if not done:
                break
            sent += done
            watch.give_way()  # a megabyte, and perhaps a disk: others first
    finally:
        if was_blocking and _fileno(sock) == target:
            os.set_blocking(target, True)
        if sent and hasattr(file, "seek"):
            file.seek(offset + sent)
    return sent


def send_by_reading(sock: GreenSocket, file: Any, offset: int, count: int | None) -> int:
    """Send a file that the kernel does not read for us; return how much."""
    if offset:
        file.seek(offset)
    sent = 0
    try:
        while count is None or sent < count:
            data = file.read(FILE_CHUNK if count is None else min(FILE_CHUNK, count - sent))
            if not data:
                break
            sock.sendall(data)
            sent += len(data)
    finally:
        if sent and hasattr(file, "seek"):
            file.seek(offset + sent)
    return sent
