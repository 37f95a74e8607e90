"""A socket whose waits let other greenlets run.

A `GreenSocket` is a `socket.socket`: same methods, same results, same errors.  Where a blocking
socket would hold the thread, it holds its greenlet.  Outside of a hub it is a blocking socket.

Owns the calls to the system; leaves waiting to its `Watch`, and what is written but not sent yet to
its `Outbox`.

How the calls stay cheap.  Every one asks for `MSG_DONTWAIT`, so the descriptor itself stays in
blocking mode, and programs that it is handed to (``subprocess``, ``detach``) find it as they
expect.  A read from a TCP stream that brings less than was asked for has emptied the socket, so
the next one waits first and nobody pays for `BlockingIOError`.  `Watch.is_eager` stands for the
cases where that does not hold: datagrams, Unix sockets (a read stops where descriptors were
passed), and a stream with an end, an error or urgent data in it.

A handler asks for more than its peer sends as a rule.  Room for all of it, taken from the system's
allocator at every read and given back, costs more than a switch between greenlets; so a read of a
TCP stream asks for `watch.SMALL` bytes first, and for the rest if that was not all.
"""

from __future__ import annotations

import _socket
import errno
import io
import os
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from fcntl import ioctl
from math import inf
from struct import Struct
from termios import FIONREAD
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, cast

from greenlet import getcurrent

from portico.engines.green.files import GreenSocketIO
from portico.engines.green.hub import running
from portico.engines.green.outbox import GreenWriter, Outbox
from portico.engines.green.sendfile import send_by_kernel, send_by_reading
from portico.engines.green.watch import CREDIT, NOW, WRITING, Watch
from portico.handlers import _SocketWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

T = TypeVar("T")
Address: TypeAlias = Any
"""As in the standard library: a tuple, a string or bytes, by family."""
Control: TypeAlias = tuple[int, int, bytes]
"""One ancillary message: level, type, data."""

NO_WAIT: Final = int(
    getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_ERRQUEUE", 0) | socket.MSG_OOB
)
"""Flags with which a call does not wait on a blocking socket either."""

WAIT_FOR_ALL: Final = int(socket.MSG_WAITALL)

READ_BUFFER: Final = 2048
"""Bytes that a file over a socket buffers, unless it is told how many.

Ten thousand idle connections keep ten thousand buffers.  Large reads go past it.
"""

UNIX_RETRY: Final = (0.001, 0.05)
"""Seconds between two attempts, first and last, where the system has no event to wait for.

A full datagram queue of a Unix socket that we are not connected to, and a full backlog of a Unix
listener, are reported as writable by poll(2) while the call itself says `EAGAIN`.
"""

INT: Final = Struct("i")
"""What the system counts waiting bytes in."""

TCP_FAMILIES: Final = frozenset({int(socket.AF_INET), int(socket.AF_INET6)})
TCP_PROTOCOLS: Final = frozenset({0, int(socket.IPPROTO_TCP)})
STREAM: Final = int(socket.SOCK_STREAM)
UNIX: Final = int(getattr(socket, "AF_UNIX", -1))
NONBLOCK_TYPE: Final = int(getattr(socket, "SOCK_NONBLOCK", 0))

_Socket = _socket.socket
# The methods of C, as functions: looked up once, not at every message.
_accept: Callable[[_Socket], tuple[int, Address]] = getattr(_Socket, "_accept")  # noqa: B009
_close = _Socket.close
_connect_ex = _Socket.connect_ex
_fileno = _Socket.fileno
_recv = _Socket.recv
_recv_into = _Socket.recv_into
_recvfrom = _Socket.recvfrom
_recvfrom_into = _Socket.recvfrom_into
_send = _Socket.send
_sendto: Callable[..., int] = _Socket.sendto
_shutdown = _Socket.shutdown
_get_family: Callable[[_Socket], int] = _Socket.family.__get__
_get_type: Callable[[_Socket], int] = _Socket.type.__get__
_get_proto: Callable[[_Socket], int] = _Socket.proto.__get__
_init: Callable[..., None] = _Socket.__init__
_make: Callable[[type[GreenSocket]], GreenSocket] = socket.socket.__new__


class GreenSocket(socket.socket):
    """A socket that waits by switching to the hub.

    Used by several greenlets at once, reads and writes do not hinder each other.  The methods
    are those of `socket.socket`, and mean the same.

    Args:
        family: As for `socket.socket`.
        type: As for `socket.socket`.
        proto: As for `socket.socket`.
        fileno: A descriptor to take over, as for `socket.socket`.
    """

    __slots__ = ("coalesces", "outbox", "watch")

    # What socket.socket keeps, by the names that it has used from the beginning.
    _closed: bool
    _io_refs: int

    watch: Watch
    coalesces: bool
    """Whether `make_writer` gives a writer that collects small writes."""
    outbox: Outbox | None
    """What was written but not sent; ``None`` until something is."""

    def __init__(
        self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None
    ) -> None:
        super().__init__(family, type, proto, fileno)
        timeout = socket.getdefaulttimeout()
        if type == -1:
            family, type, proto = _get_family(self), _get_type(self), _get_proto(self)
        elif type & NONBLOCK_TYPE:
            type, timeout = _get_type(self), 0.0
        if timeout is not None or not NOW:
            _Socket.setblocking(self, bool(NOW))
        self.coalesces = True
        self.outbox = None
        self.watch = Watch(
            _fileno(self) if fileno is None else fileno,
            not is_tcp(family, type, proto),
            timeout,
        )

    # --- reading ----------------------------------------------------------------------------

    # Written out for speed, hence long.
    def recv(  # noqa: C901, PLR0912
        self, bufsize: int, flags: int = 0, /
    ) -> bytes:
        watch = self.watch
        if flags or bufsize <= 0:
            return self._read_flagged(flags, _recv, bufsize)
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
        size = watch.guess if bufsize > watch.guess else bufsize  # noqa: FURB136  # no call
        try:
            data = _recv(self, size, NOW)
        except BlockingIOError:
            self._check_waiting()
        except OSError:
            watch.may_read = True  # what follows an error comes without an event
            raise
        else:
            if len(data) == size:
                watch.may_read = True
                return data if size == bufsize else self._read_on(data, bufsize)
            if watch.is_eager:
                watch.may_read = True
            return data
        return self._read(_recv, bufsize, NOW)

    # Written out for speed, hence long.
    def recv_into(  # noqa: C901, PLR0912
        self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0
    ) -> int:
        watch = self.watch
        try:
            size = nbytes or len(buffer)  # type: ignore[arg-type]  # nearly all have one
        except TypeError:
            size = 0
        if flags or size <= 0:
            return self._read_flagged(flags, _recv_into, buffer, nbytes)
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
            count = _recv_into(self, buffer, nbytes, NOW)
        except BlockingIOError:
            self._check_waiting()
        except OSError:
            watch.may_read = True
            raise
        else:
            # The size may be in items of several bytes; then this errs to the safe side.
            if count >= size or watch.is_eager:
                watch.may_read = True
            return count
        return self._read(_recv_into, buffer, nbytes, NOW)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Address]:
        return self._read_flagged(flags, _recvfrom, bufsize)

    def recvfrom_into(
        self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0
    ) -> tuple[int, Address]:
        return self._read_flagged(flags, _recvfrom_into, buffer, nbytes)

    if hasattr(_Socket, "recvmsg"):

        def recvmsg(
            self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
        ) -> tuple[bytes, list[Control], int, Address]:
            return self._read_flagged(flags, _Socket.recvmsg, bufsize, ancbufsize)

        def recvmsg_into(
            self,
            buffers: Iterable[WriteableBuffer],
            ancbufsize: int = 0,
            flags: int = 0,
            /,
        ) -> tuple[int, list[Control], int, Address]:
            kept = tuple(buffers)  # it may be read twice
            return self._read_flagged(flags, _Socket.recvmsg_into, kept, ancbufsize)

    def _read_on(self, data: bytes, bufsize: int) -> bytes:
        """Return what one read of a stream would have brought that began with `data`."""
        self.watch.guess = bufsize
        # Asked first, because a read that finds an error and no byte would use the error up.
        (waiting,) = INT.unpack(ioctl(self.watch.fd, FIONREAD, bytes(INT.size)))
        if waiting:
            with suppress(BlockingIOError):  # another thread that reads here was faster
                data += _recv(self, min(waiting, bufsize - len(data)), NOW)
        return data

    def _read(self, read: Callable[..., T], *args: object, is_file: bool = False) -> T:
        """Wait, then read, until it works; for the cases that are not the common one."""
        watch = self.watch
        deadline = watch.deadline()
        while True:
            watch.wait_readable(deadline)
            try:
                result = read(self, *args)
            except BlockingIOError:
                self._check_waiting(is_file=is_file)
            except OSError:
                watch.may_read = True
                raise
            else:
                watch.may_read = True
                return result

    def _read_flagged(self, flags: int, read: Callable[..., T], *args: Any) -> T:
        """Read with any flags, and whatever the last read brought."""
        watch = self.watch
        waits_for_all = flags & WAIT_FOR_ALL
        if waits_for_all and (read is _recv or read is _recv_into) and _get_type(self) == STREAM:
            return cast("T", self._read_all(flags & ~waits_for_all, read, *args))
        watch.credit -= 1
        if watch.credit <= 0:
            watch.give_way()
        try:
            result = read(self, *args, flags | NOW)
        except BlockingIOError:
            if flags & NO_WAIT:
                raise
            self._check_waiting()
        except OSError:
            watch.may_read = True
            raise
        else:
            # What was read was a datagram, was only looked at, or came with other strings.
            watch.may_read = True
            return result
        return self._read(read, *args, flags | NOW)

    def _read_all(
        self, flags: int, read: Callable[..., object], into: Any, nbytes: int = 0
    ) -> bytes | int:
        """Read until there is as much as was asked for, or the stream ends, or an error comes."""
        buffer = bytearray(into) if read is _recv else into
        view = memoryview(buffer).cast("B")
        view = view[: nbytes or view.nbytes]
        count = 0
        while count < view.nbytes:
            try:
                part = self.recv_into(view[count:], 0, flags)
            except OSError:
                if not count or flags & socket.MSG_PEEK:
                    raise
                break  # what came before is handed out; the next read finds the end
            if not part:
                break
            count += part
            if flags & socket.MSG_PEEK and count < view.nbytes:
                count = 0  # it is all there still, and the next look begins at its start
                self.watch.may_read = False
                self.watch.wait_readable()
        return bytes(view[:count]) if read is _recv else count

    def _check_waiting(self, *, is_file: bool = False) -> None:
        """Let the `BlockingIOError` being handled pass if nobody may wait.

        Raises:
            BlockingIOError: The socket is in non-blocking mode.
            OSError: It was closed.  A file over it may go on, as over any socket.
        """
        watch = self.watch
        watch.may_read = False
        if watch.timeout == 0:
            raise  # noqa: PLE0704  # the one being handled
        if self._closed and not is_file:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    # --- writing ----------------------------------------------------------------------------

    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        return self._write(_send, data, flags | NOW)

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        if self.outbox is not None:
            self.outbox.send()
        watch = self.watch
        watch.credit -= 1
        if watch.credit <= 0:
            watch.give_way(WRITING)
        try:
            sent = _send(self, data, flags | NOW if flags else NOW)
        except BlockingIOError:
            if watch.timeout == 0:
                raise
            sent = 0
        if type(data) is not bytes or sent != len(data):
            self._send_rest(data, sent, flags)

    def sendto(self, data: ReadableBuffer, *flags_and_address: Any) -> int:
        address: Any = flags_and_address[-1]
        flags = NOW | flags_and_address[0] if len(flags_and_address) > 1 else NOW
        if isinstance(address, tuple):
            address = self._resolve(cast("Any", address))
        return self._write(_sendto, data, flags, address)

    if hasattr(_Socket, "sendmsg"):

        def sendmsg(
            self,
            buffers: Iterable[ReadableBuffer],
            ancdata: Iterable[tuple[int, int, ReadableBuffer]] = (),
            flags: int = 0,
            address: Address | None = None,
            /,
        ) -> int:
            kept, control = tuple(buffers), tuple(ancdata)
            return self._write(_Socket.sendmsg, kept, control, flags | NOW, address)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        if self.watch.timeout == 0:
            raise ValueError("non-blocking sockets are not supported")
        if _get_type(self) != STREAM:
            raise ValueError("only SOCK_STREAM type sockets are supported")
        if "b" not in getattr(file, "mode", "b"):
            raise ValueError("file should be opened in binary mode")
        if count is not None and count <= 0:
            raise ValueError(f"count must be a positive integer (got {count!r})")
        if self.outbox is not None:
            self.outbox.send()
        sent = send_by_kernel(self, file, offset, count)
        if sent is None:
            sent = send_by_reading(self, file, offset, count)
        return sent

    def _write(self, write: Callable[..., int], *args: Any) -> int:
        """Write until it works, waiting where it cannot."""
        if self.outbox is not None:
            self.outbox.send()
        watch = self.watch
        watch.credit -= 1
        if watch.credit <= 0:
            watch.give_way(WRITING)
        deadline, pause = inf, UNIX_RETRY[0]
        while True:
            try:
                return write(self, *args)
            except BlockingIOError:
                if watch.timeout == 0:
                    raise
            if deadline == inf:
                deadline = watch.deadline()
            if _get_family(self) == UNIX and _get_type(self) != STREAM:
                pause = pause_before_retry(pause, deadline)
            else:
                watch.wait_writable(deadline)

    def _wait_for_room(self, deadline: float) -> None:
        """Wait until a write that the system did not take may go on."""
        self.watch.wait_writable(deadline)

    def _send_rest(self, data: ReadableBuffer, sent: int, flags: int) -> None:
        """Send what a first call left over, under one deadline for all of it."""
        with memoryview(data) as view, view.cast("B") as octets:
            watch = self.watch
            deadline = watch.deadline() if sent < octets.nbytes else inf
            while sent < octets.nbytes:
                watch.wait_writable(deadline)
                try:
                    sent += _send(self, octets[sent:], flags | NOW)
                except BlockingIOError:
                    if watch.timeout == 0:
                        raise

    def _get_send_now(self) -> Callable[[bytes, int], int]:
        """Return what sends some bytes at once, or raises `BlockingIOError`."""
        return cast("Callable[[bytes, int], int]", _send.__get__(self))

    def make_writer(self) -> _SocketWriter:
        """Return the `wfile` for a `StreamRequestHandler` that has no buffer of its own."""
        return GreenWriter(self) if self.coalesces else _SocketWriter(self)

    # --- connecting -------------------------------------------------------------------------

    def accept(self) -> tuple[socket.socket, Address]:
        watch = self.watch
        if os.get_blocking(watch.fd):
            os.set_blocking(watch.fd, False)  # accept(2) has no flag for it
        if watch.may_read:
            watch.credit -= 1
            if watch.credit <= 0:
                watch.give_way()
        try:
            fd, address = _accept(self)
        except BlockingIOError:
            self._check_waiting()
            fd, address = -1, None
        if fd < 0:
            fd, address = self._read(_accept)
        watch.may_read = True
        return Lineage(self).adopt(fd), address

    def connect(self, address: Address, /) -> None:
        status = self._connect(address)
        if status == errno.EAGAIN and self.watch.timeout:
            raise TimeoutError("timed out")
        if status:
            raise OSError(status, os.strerror(status))

    def connect_ex(self, address: Address, /) -> int:
        return self._connect(address)

    def _connect(self, address: Address) -> int:
        """Connect; return the error, or 0."""
        watch = self.watch
        deadline = watch.deadline()
        if isinstance(address, tuple):
            address = self._resolve(cast("Any", address))
        was_blocking = os.get_blocking(watch.fd)
        os.set_blocking(watch.fd, False)  # connect(2) has no flag for it
        try:
            status = _connect_ex(self, address)
            pause = UNIX_RETRY[0]
            while status == errno.EAGAIN and watch.timeout != 0 and _get_family(self) == UNIX:
                pause = pause_before_retry(pause, deadline)
                status = _connect_ex(self, address)
            if status == errno.EINPROGRESS and watch.timeout != 0:
                status = self._finish_connecting(deadline)
        except TimeoutError:
            return errno.EAGAIN  # as connect_ex of a socket with a timeout
        finally:
            if was_blocking and _fileno(self) >= 0:
                os.set_blocking(watch.fd, True)
        return status

    def _finish_connecting(self, deadline: float) -> int:
        """Wait until the peer has answered; return the error, or 0."""
        while True:
            self.watch.wait_writable(deadline)
            status = self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if status:
                return status
            try:
                self.getpeername()
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
            else:
                return 0

    def _resolve(self, address: Any) -> Any:
        """Look a host name up in a thread, so that the hub does not wait for name servers."""
        host = address[0] if address else None
        if (
            not isinstance(host, str)
            or not host
            or host.rpartition(".")[2].isdigit()  # no name ends so (RFC 3696, section 2)
            or ":" in host
            or host[0] == "<"  # <broadcast> is an address
            or _get_family(self) not in TCP_FAMILIES
        ):
            return address
        hub = running()
        if hub is None or hub.is_current():
            return address  # the call itself looks it up, and waits for it
        found = hub.run_in_thread(
            lambda: socket.getaddrinfo(host, address[1], _get_family(self), _get_type(self))
        )
        return (*found[0][4][:2], *address[2:])

    # --- the life of the socket -------------------------------------------------------------

    def settimeout(self, value: float | None, /) -> None:
        if value is not None:
            value = float(value)
            if value < 0:
                raise ValueError("Timeout value out of range")
        self.watch.set_timeout(value)

    def gettimeout(self) -> float | None:
        return self.watch.timeout

    def setblocking(self, flag: bool, /) -> None:
        self.watch.set_timeout(None if flag else 0.0)

    def getblocking(self) -> bool:
        return self.watch.timeout != 0

    @property
    def timeout(self) -> float | None:
        """The timeout in seconds, as `gettimeout` returns it."""
        return self.watch.timeout

    def fileno(self) -> int:
        if self.outbox is not None:
            self.outbox.send()  # whoever asks may write to it directly
        return _fileno(self)

    @property
    def descriptor(self) -> int:
        """The number of its descriptor, also after another object took that over."""
        return self.watch.fd

    def shutdown(self, how: int, /) -> None:
        if self.outbox is not None:
            self.outbox.send_collected()
        _shutdown(self, how)

    def detach(self) -> int:
        if self.outbox is not None:
            self.outbox.send()
        self.watch.drop(is_closing=False)
        return super().detach()

    def close(self) -> None:
        if self.outbox is not None:
            self.outbox.end()
            self.outbox.send_collected()
        self._closed = True
        if self._io_refs > 0:
            self.watch.nudge()  # a file over it is open still, and closes it at its end
        else:
            self._real_close()

    def _real_close(self, _ss: type[_Socket] = _Socket) -> None:
        self.watch.drop(is_closing=True)
        _close(self)

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        if not set(mode) <= {"r", "w", "b"}:
            raise ValueError(f"invalid mode {mode!r} (only r, w, b allowed)")
        is_writing = "w" in mode
        is_reading = "r" in mode or not is_writing
        raw = self._make_raw(("r" if is_reading else "") + ("w" if is_writing else ""))
        self._io_refs += 1  # SocketIO.close takes it back
        size = READ_BUFFER if buffering is None or buffering < 0 else buffering
        if size == 0:
            if "b" not in mode:
                raise ValueError("unbuffered streams must be binary")
            return raw
        buffered: io.BufferedRWPair | io.BufferedReader | io.BufferedWriter
        if is_reading and is_writing:
            buffered = io.BufferedRWPair(raw, raw, size)
        elif is_reading:
            buffered = io.BufferedReader(raw, size)
        else:
            buffered = io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(cast("io.BufferedReader", buffered), encoding, errors, newline)
        text.mode = mode  # type: ignore[misc]  # as socket.makefile does
        return text

    def _make_raw(self, mode: str) -> socket.SocketIO:
        """Return the unbuffered file for `makefile`."""
        return GreenSocketIO(self, cast("Any", mode))


class DatagramListener(GreenSocket):
    """The listener of a datagram server, as its handlers get it.

    Many of them share it, each for one operation, so none gives way to the others.  Its descriptor
    is the listener's and stays that.

    Args:
        listener: The listener.
    """

    __slots__ = ()

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(
            _get_family(listener), _get_type(listener), _get_proto(listener), _fileno(listener)
        )
        self.settimeout(listener.gettimeout())
        self.watch.credit = sys.maxsize

    def sendto(  # pyright: ignore[reportIncompatibleMethodOverride]  # the same calls are right
        self, data: ReadableBuffer, address: Any, *flagged: Any
    ) -> int:
        # The reply to a datagram, written out for speed: no flags, and no name to be looked up.
        try:
            if address[0][-1] < ":":  # as digits are; the rest is looked at more closely
                return _sendto(self, data, NOW, address)
        except (BlockingIOError, TypeError, IndexError):  # to wait, or no address: as ever
            pass
        return super().sendto(data, address, *flagged)


class Lineage:
    """What the connections of one listener have in common.

    Args:
        listener: A socket that connections are accepted from.
    """

    __slots__ = ("_family", "_is_eager", "_proto", "_type", "listener")

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self._family, self._type = _get_family(listener), _get_type(listener)
        self._proto = _get_proto(listener)
        self._is_eager = not is_tcp(self._family, self._type, self._proto)

    def accept(self) -> tuple[GreenSocket, Address]:
        """Accept a connection as a green socket, without the detour over a plain one.

        Raises:
            OSError: As accept(2).
        """
        fd, address = _accept(self.listener)
        return self.adopt(fd), address

    def adopt(self, fd: int) -> GreenSocket:
        """Make a green socket of a connection's descriptor, without the questions of `__init__`."""
        sock = _make(GreenSocket)
        _init(sock, self._family, self._type, self._proto, fd)
        sock._io_refs = 0
        sock._closed = False
        sock.coalesces = True
        sock.outbox = None
        timeout = socket.getdefaulttimeout()
        if timeout is not None or not NOW:
            _Socket.setblocking(sock, bool(NOW))
        sock.watch = Watch(fd, self._is_eager, timeout)
        return sock


def is_tcp(family: int, kind: int, proto: int) -> bool:
    """Say whether a short read from such a socket tells that it is empty."""
    return kind == STREAM and family in TCP_FAMILIES and proto in TCP_PROTOCOLS


def pause_before_retry(pause: float, deadline: float) -> float:
    """Let time pass before an attempt that no event announces; return the next pause.

    Raises:
        TimeoutError: The deadline came.
    """
    remaining = deadline - monotonic()
    if remaining <= 0:
        raise TimeoutError("timed out")
    hub = running()
    if hub is None or hub.is_current():
        sleep(min(pause, remaining))
    else:
        hub.sleep(min(pause, remaining))
    return min(2 * pause, UNIX_RETRY[1])
