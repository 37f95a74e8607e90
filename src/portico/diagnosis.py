"""Say why the system refuses a listener its place, and what would help.

Owns the words for each error.  Leaves what is done about it to whoever asked for the place.

Sources: bind(2), ip(7) and unix(7) (their errors); ipv6(7) (link-local addresses).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from portico.address import (
    Address,
    DescriptorAddress,
    InternetAddress,
    SystemdAddress,
    UnixAddress,
)
from portico.errors import ListenerError
from portico.holders import Holder, find_holders
from portico.place import Place

_TLS_SOCKETS: Final = {
    (socket.SOCK_STREAM, socket.AF_INET),
    (socket.SOCK_STREAM, socket.AF_INET6),
}
"""Those that TLS is spoken over."""


@contextmanager
def explained(place: Place) -> Generator[None]:
    """Say why, and what would help, when the system refuses a place.

    Raises:
        ListenerError: Instead of an `OSError` of the block, which makes a listener.
    """
    try:
        yield
    except OSError as error:
        raise failure(error, place.address, _reason(error, place)) from error


def is_socket(path: Path) -> bool:
    """Say whether there is a socket at a path."""
    with suppress(OSError):
        return stat.S_ISSOCK(path.lstat().st_mode)
    return False


def failure(error: OSError, address: Address, reason: str) -> ListenerError:
    """Return the error to raise in the place of the system's own."""
    failure = ListenerError(f"cannot listen on {address}: {reason}")
    failure.errno = error.errno
    return failure


def not_passed(address: SystemdAddress, names: Iterable[str]) -> ListenerError:
    """Return the error for a name under which systemd passed no socket.

    Args:
        address: The address.
        names: The names of those that it passed.
    """
    passed = ", ".join(dict.fromkeys(names))
    if passed:
        return ListenerError(f"{address}: systemd passed no socket of this name; passed: {passed}")
    return ListenerError(
        f"{address}: systemd passed no socket; start the .socket unit that has "
        f"FileDescriptorName={address.name}, and it starts the service"
    )


def unfit(address: DescriptorAddress, made: socket.socket) -> str | None:
    """Say why nothing can be served on an inherited socket; ``None`` if it can be."""
    if made.family not in {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}:
        return f"it is a socket of family {made.family}; expected IPv4, IPv6 or Unix"
    if made.type not in {socket.SOCK_STREAM, socket.SOCK_DGRAM}:
        return f"it is a socket of type {made.type}; expected streams or datagrams"
    if made.type == socket.SOCK_STREAM and not made.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        return (
            "it does not listen; expected a listener, which systemd passes where the .socket unit "
            "has Accept=no"
        )
    if made.type == socket.SOCK_DGRAM and made.getsockname() in {"", b"", ("0.0.0.0", 0)}:  # noqa: S104  # compared
        return "it is bound to no address; expected a socket that is"
    if address.scheme.is_tls and (made.type, made.family) not in _TLS_SOCKETS:
        kind = "a Unix socket" if made.family == socket.AF_UNIX else "a socket for datagrams"
        return f"TLS is spoken over TCP, and it is {kind}; leave out '+tls'"
    return None


def unusable(address: DescriptorAddress, error: OSError) -> str:
    """Say why a descriptor is no socket."""
    match error.errno:
        case errno.EBADF:
            return f"this process was started without a descriptor {address.descriptor}"
        case errno.ENOTSOCK:
            return "it is not a socket"
        case _:
            return _strerror(error)


def ungiven(error: OSError) -> str:
    """Say why the file of a socket cannot be given to somebody else."""
    if error.errno == errno.EPERM:
        return (
            "no permission to give its file away: only root can set socket_owner, and others can "
            "set socket_group to a group that they belong to"
        )
    return f"its file cannot be given away: {_strerror(error)}"


def unresolved(address: InternetAddress, error: socket.gaierror) -> str:
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
        if place.path is None or is_socket(place.path):
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
