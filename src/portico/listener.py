"""Open a listener at an address.

Owns what the socket calls leave open: which family an address belongs to, IPv4 and IPv6 on one
socket, the life of a Unix socket's file, and whose the listener is where several processes accept
from it.  Leaves accepting to the server that has it, and the words for errors to
`portico.diagnosis`.

Sources: ipv6(7) (``IPV6_V6ONLY``); unix(7) (the file outlives its socket; connect(2) to one that
nobody listens on is refused); bind(2) (errors).
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from portico.address import Address, Scheme, UnixAddress
from portico.diagnosis import explained, failure, is_socket, unresolved
from portico.place import Place

SOCKET_MODE: Final = 0o600
"""What others than the owner may do with the file of a Unix socket: nothing."""

LOCK_PATIENCE: Final = 1.0
"""Seconds to wait for another process that binds in the same directory.

It takes well under a millisecond.  Who holds the lock for longer keeps a cleaner of temporary
files away, and does not mean us.
"""

_changing_umask = threading.Lock()  # guards the umask, which all threads share


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The file that binding a Unix socket has made."""

    path: Path
    device: int
    inode: int

    @classmethod
    def at(cls, path: Path) -> SocketFile:
        """Remember which file is at `path` now, even if the process changes its directory."""
        found = path.lstat()
        return cls(path.absolute(), found.st_dev, found.st_ino)

    def remove(self) -> None:
        """Remove the file, unless it is gone or somebody else's has taken its place.

        To be called while the socket is still open: until then nobody takes the file for a stale
        one and puts another in its place.
        """
        with suppress(OSError):
            if SocketFile.at(self.path) == self:
                self.path.unlink()


def resolve(address: Address) -> Place:
    """Find the family and the socket address of `address`; asks the resolver for a host name.

    A name that stands for several addresses means the first, IPv4 before IPv6, as in
    `socketserver`.

    Raises:
        ListenerError: The host has no address.
    """
    if isinstance(address, UnixAddress):
        return Place(address, socket.AF_UNIX, address.socket_address)
    if address.host == "":
        if socket.has_dualstack_ipv6():
            return Place(address, socket.AF_INET6, ("::", address.port, 0, 0), dual_stack=True)
        return Place(address, socket.AF_INET, ("0.0.0.0", address.port))  # noqa: S104  # asked for
    try:
        found = socket.getaddrinfo(
            address.host,
            address.port,
            family=address.family,
            type=address.scheme.socket_type,
            flags=socket.AI_PASSIVE,
        )
    except socket.gaierror as error:
        raise failure(error, address, unresolved(address, error)) from error
    family, _, _, _, name = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return Place(address, family, name)


class OpenListener:
    """A listener that is bound and listens, before a server has it and beside it.

    Args:
        place: Where it is.
        bound: Its socket.
        file: The file that binding it has made, to be removed with it.
        is_lent: Whether other processes accept from it, too, and another closes it.
    """

    def __init__(
        self,
        place: Place,
        bound: socket.socket,
        file: SocketFile | None = None,
        *,
        is_lent: bool = False,
    ) -> None:
        self.place = place
        self.socket = bound
        self.is_lent = is_lent
        self._file = file
        self._process = os.getpid()

    @property
    def address(self) -> Address:
        """The address that was bound, with the port that the system chose."""
        return self.place.address_of(self.socket.getsockname())

    def lend(self) -> Self:
        """Return another hold on the same listener, for who must not end it by closing it."""
        return type(self)(self.place, self.socket.dup(), is_lent=True)

    def close(self) -> None:
        """Close it, and remove the file of a Unix socket.  Callable again.

        A child that serves a connection has inherited the listener, and would keep it open: clients
        would connect, and nobody would accept them.  So it is shut down, unless it was lent.
        """
        file, self._file = self._file, None
        if os.getpid() == self._process and not self.is_lent:
            if file is not None:
                file.remove()
            if not self.place.address.scheme.is_datagram:
                with suppress(OSError):  # it is closed already
                    self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def open_listener(address: Address, *, backlog: int = socket.SOMAXCONN) -> OpenListener:
    """Open a listener at an address, for one process or for many.

    Accepting from it never waits: of several processes that see a client come, one gets it, and the
    others must not be held.

    Args:
        address: Where.
        backlog: Connections that the kernel completes and holds until they are accepted.

    Raises:
        ListenerError: The system refuses; the message says why, and what would help.
    """
    place = resolve(address)
    scheme = address.scheme
    with explained(place):
        made = socket.socket(place.family, scheme.socket_type)
        try:
            if scheme in {Scheme.TCP, Scheme.TLS}:
                # A service can start again while connections of the last one linger.  For datagrams
                # the same option would let two services take each other's.
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            file = bind(made, place)
            if not scheme.is_datagram:
                made.listen(backlog)
                made.setblocking(False)
        except BaseException:
            made.close()
            raise
    return OpenListener(place, made, file)


def bind(listener: socket.socket, place: Place) -> SocketFile | None:
    """Bind `listener`, with everything around it that its place asks for.

    An IPv6 socket serves IPv4 if, and only if, its place says so.  The file of a Unix socket is
    for its owner alone from its first moment on; one that a dead server left behind is replaced.

    Args:
        listener: A fresh socket.
        place: Where it belongs.

    Returns:
        The file that was made, to be removed by whoever closes the socket.

    Raises:
        OSError: The system refuses; `portico.diagnosis` knows the words for it.
    """
    if place.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not place.dual_stack)
    if place.path is None:
        listener.bind(place.name)
        return None
    with _stale_removed(place.path, listener.type), _narrow_mode(listener):
        listener.bind(place.name)
        if listener.type == socket.SOCK_STREAM:
            # At once: until it listens, it looks as dead as what is replaced here.
            listener.listen()
        return SocketFile.at(place.path)


# --------------------------------------------------------------------- the file of a Unix socket


@contextmanager
def _stale_removed(path: Path, kind: int) -> Generator[None]:
    """Remove the file of a socket that nobody listens on, and let nobody in between."""
    # Alone even where there is no file: the one that is made now looks stale until it listens.
    with _alone_in(path.parent):
        if is_socket(path) and is_stale(path, kind):
            path.unlink()
        yield


def is_stale(path: Path, kind: int) -> bool:
    """Say whether a socket surely has no listener."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)  # a listener with a full backlog would make it wait
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # somebody is there, or it cannot be told: bind will say what is wrong
            return False
    return False


@contextmanager
def _alone_in(directory: Path) -> Generator[None]:
    """Keep others out who do the same: of two that find a stale file, one may replace it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # may be entered, not read: go without
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_PATIENCE
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _narrow_mode(
    listener: socket.socket, *, by_socket: bool = sys.platform == "linux"
) -> Generator[None]:
    """Have the file that ``bind`` makes belong to its owner alone, without a moment in between.

    Linux gives the file the mode of the socket, less the umask; elsewhere there is only the
    umask, which belongs to all threads of the process.
    """
    if by_socket:
        os.fchmod(listener.fileno(), SOCKET_MODE)
        yield
        return
    with _changing_umask:
        before = os.umask(0o777 & ~SOCKET_MODE)
        try:
            yield
        finally:
            os.umask(before)
