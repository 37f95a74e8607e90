"""Bind a listener to an address, and say what is wrong when that fails.

Owns what the socket calls leave open: which family an address belongs to, IPv4 and IPv6 on one
socket, the life of a Unix socket's file, and the words for each error.  Leaves the socket itself
to the server that has it (`portico.families`).

Sources: ipv6(7) (``IPV6_V6ONLY``); unix(7) (the file outlives its socket; connect(2) to one that
nobody listens on is refused); bind(2) (errors).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from portico.address import Address, InternetAddress, UnixAddress, from_socket_name
from portico.errors import ListenerError
from portico.holders import Holder, find_holders

SOCKET_MODE: Final = 0o600
"""What others than the owner may do with the file of a Unix socket: nothing."""

LOCK_PATIENCE: Final = 1.0
"""Seconds to wait for another process that binds in the same directory.

It takes well under a millisecond.  Who holds the lock for longer keeps a cleaner of temporary
files away, and does not mean us.
"""

SocketName: TypeAlias = "tuple[Any, ...] | str | bytes"
"""What ``bind`` takes and ``getsockname`` returns; its shape depends on the family."""

_changing_umask = threading.Lock()  # guards the umask, which all threads share


@dataclass(frozen=True, slots=True)
class Place:
    """Where an address is, in the terms of the system.

    Attributes:
        address: The address.
        family: The address family of its socket.
        name: What the socket is bound to.
        dual_stack: Whether an IPv6 socket serves IPv4 as well.
    """

    address: Address
    family: socket.AddressFamily
    name: SocketName
    dual_stack: bool = False

    @property
    def path(self) -> Path | None:
        """The file of a Unix socket; ``None`` if there is none."""
        return Path(self.name) if isinstance(self.name, str) else None

    def address_of(self, name: SocketName) -> Address:
        """Return the address of a socket that was bound here, port and all."""
        return from_socket_name(self.address.scheme, name, dual_stack=self.dual_stack)


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
        raise _failure(error, address, _unresolved(address, error)) from error
    family, _, _, _, name = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return Place(address, family, name)


def bind(listener: socket.socket, place: Place, bind: Callable[[], object]) -> SocketFile | None:
    """Bind `listener`, with everything around it that its place asks for.

    An IPv6 socket serves IPv4 if, and only if, its place says so.  The file of a Unix socket is
    for its owner alone from its first moment on; one that a dead server left behind is replaced.

    Args:
        listener: A fresh socket.
        place: Where it belongs.
        bind: Does the binding proper, to the name of the place; a server's ``server_bind``.

    Returns:
        The file that was made, to be removed by whoever closes the socket.

    Raises:
        OSError: The system refuses; `explained` knows the words for it.
    """
    if place.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not place.dual_stack)
    if place.path is None:
        bind()
        return None
    with _stale_removed(place.path, listener.type), _narrow_mode(listener):
        bind()
        if listener.type == socket.SOCK_STREAM:
            # At once: until it listens, it looks as dead as what is replaced here.
            listener.listen()
        return SocketFile.at(place.path)


@contextmanager
def explained(place: Place) -> Generator[None]:
    """Say why, and what would help, when the system refuses a place.

    Raises:
        ListenerError: Instead of an `OSError` of the block, which makes a listener.
    """
    try:
        yield
    except OSError as error:
        raise _failure(error, place.address, _reason(error, place)) from error


# --------------------------------------------------------------------- the file of a Unix socket


@contextmanager
def _stale_removed(path: Path, kind: int) -> Generator[None]:
    """Remove the file of a socket that nobody listens on, and let nobody in between."""
    # Alone even where there is no file: the one that is made now looks stale until it listens.
    with _alone_in(path.parent):
        if _is_socket(path) and _is_stale(path, kind):
            path.unlink()
        yield


def _is_socket(path: Path) -> bool:
    with suppress(OSError):
        return stat.S_ISSOCK(path.lstat().st_mode)
    return False


def _is_stale(path: Path, kind: int) -> bool:
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


# -------------------------------------------------------------------------- the words for errors


def _failure(error: OSError, address: Address, reason: str) -> ListenerError:
    failure = ListenerError(f"cannot listen on {address}: {reason}")
    failure.errno = error.errno
    return failure


def _unresolved(address: InternetAddress, error: socket.gaierror) -> str:
    """Say why a host has no address."""
    if "%" in address.host:
        return _no_interface(address)
    if error.errno == socket.EAI_AGAIN:
        return f"the resolver has no answer for {address.host!r} at the moment"
    return (
        f"the host name {address.host!r} does not resolve; an address such as "
        f"{address.scheme}://127.0.0.1:{address.port} needs no resolver"
    )


def _no_interface(address: InternetAddress) -> str:
    interface = address.host.partition("%")[2]
    return f"this machine has no interface {interface!r}; `ip -brief link` lists those it has"


def _reason(error: OSError, place: Place) -> str:
    """Say why the system refuses a place, and what would help."""
    if error.errno == errno.EADDRINUSE:
        if place.path is None or _is_socket(place.path):
            return _in_use(place)
        return "there is a file at this path that is not a socket; it was left alone"
    if isinstance(place.address, UnixAddress):
        return _unix_reason(error, place.address)
    return _internet_reason(error, place.address)


def _internet_reason(error: OSError, address: InternetAddress) -> str:
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return _no_permission(address)
        case errno.EADDRNOTAVAIL:
            return (
                f"{address.host} is not an address of this machine; "
                "`ip -brief address` lists those it has"
            )
        case errno.EAFNOSUPPORT:
            return "this machine has no IPv6"
        case errno.EINVAL | errno.ENODEV if "%" in address.host:
            return _no_interface(address)
        case errno.EINVAL if address.host.startswith("fe80:"):
            return (
                "a link-local address needs the interface it belongs to: "
                f"{address.scheme}://[{address.host}%INTERFACE]:{address.port}"
            )
        case _:
            return _strerror(error)


def _unix_reason(error: OSError, address: UnixAddress) -> str:
    directory = Path(address.path).absolute().parent
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return (
                f"no permission to make a socket in {directory}; "
                "choose a directory in which you may write"
            )
        case errno.ENOENT if not directory.is_dir():
            return f"there is no directory {directory}; make it first, or choose another"
        case errno.ENOTDIR:
            return f"{directory} is not a directory"
        case _:
            return _strerror(error)


def _in_use(place: Place) -> str:
    """Say who holds a place, or how to find out."""
    scheme = place.address.scheme
    holders = find_holders(
        place.family, scheme.socket_type, place.name, dual_stack=place.dual_stack
    )
    if any(holder.pid == os.getpid() for holder in holders):
        return "in use by this very process; is the address given twice?"
    if holders:
        return f"in use by {_named(holders)}"
    command = "-lxp" if scheme.is_unix else "-lunp" if scheme.is_datagram else "-ltnp"
    return f"in use; `ss {command}`, run as root, names the process"


def _named(holders: tuple[Holder, ...]) -> str:
    """Name processes: the first, which is the parent of the others as a rule, and their number."""
    first, *others = holders
    named = f"{first.command} (process {first.pid})"
    return f"{named} and {len(others)} more" if others else named


def _no_permission(address: InternetAddress) -> str:
    limit = _first_unprivileged_port()
    if address.port >= limit:
        return "the system does not permit it"
    return (
        f"no permission for a port below {limit}; choose one from {limit} on, "
        "or run it with the capability CAP_NET_BIND_SERVICE"
    )


def _first_unprivileged_port() -> int:
    """Return the first port that everybody may bind; Linux lets the administrator choose it."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    return 1024


def _strerror(error: OSError) -> str:
    return error.strerror or str(error)
