"""Open a listener at an address.

Owns what the socket calls leave open: which family an address belongs to, IPv4 and IPv6 on one
socket, what an inherited descriptor is, and whose the listener is where several processes accept
from it.  Leaves accepting to the server that has it, the file of a Unix socket to
`portico.socketfile`, and the words for errors to `portico.diagnosis`.

Sources: ipv6(7) (``IPV6_V6ONLY``); bind(2) (errors); socket(7) (``SO_ACCEPTCONN``); PEP 446 (what
Python opens is not inherited by other programs).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from contextlib import closing, suppress
from typing import Final, Self

from portico.address import (
    Address,
    BoundAddress,
    DescriptorAddress,
    Scheme,
    SystemdAddress,
    UnixAddress,
    from_socket_name,
)
from portico.diagnosis import (
    explained,
    failure,
    not_passed,
    unfit,
    ungiven,
    unresolved,
    unusable,
)
from portico.errors import ListenerError
from portico.place import Place
from portico.socketfile import OWNER_ONLY, FileAccess, SocketFile, narrow_mode, stale_removed
from portico.systemd import passed_sockets


def resolve(address: Address) -> Place:
    """Find the family and the socket address of `address`.

    Asks the resolver for a host name, and an inherited socket for what it is bound to.

    A name that stands for several addresses means the first, IPv4 before IPv6, as in
    `socketserver`.

    Raises:
        ListenerError: The host has no address, or nothing can be served on the inherited socket.
    """
    if isinstance(address, SystemdAddress | DescriptorAddress):
        with closing(open_listener(address)) as opened:
            return opened.place
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
    def address(self) -> BoundAddress:
        """The address that was bound, with the port that the system chose."""
        return self.place.address_of(self.socket.getsockname())

    @property
    def file(self) -> SocketFile | None:
        """The file that is removed with it; ``None`` if there is none, or it is another's."""
        return self._file

    def hand_over(self) -> None:
        """Leave it to another process, which has it, too: closing it here ends nothing any more."""
        self.is_lent, self._file = True, None

    def take_over(self, file: SocketFile | None) -> None:
        """Be who closes it, from now on, and removes its file."""
        self.is_lent, self._file = False, file

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


def expand(addresses: Iterable[Address]) -> list[Address]:
    """Put a descriptor for each socket in the place of those that systemd passes under a name.

    Raises:
        ListenerError: It passed none of that name.
    """
    expanded: list[Address] = []
    for each in addresses:
        expanded += _passed(each) if isinstance(each, SystemdAddress) else [each]
    return expanded


def scheme_of(address: Address) -> Scheme:
    """Say what is spoken at an address; asks an inherited socket for it.

    Raises:
        ListenerError: It cannot be served.
    """
    if address.scheme.is_inherited:
        return resolve(address).address.scheme
    return address.scheme


def open_listener(
    address: Address, *, backlog: int = socket.SOMAXCONN, access: FileAccess = OWNER_ONLY
) -> OpenListener:
    """Open a listener at an address, for one process or for many.

    Accepting from it never waits: of several processes that see a client come, one gets it, and the
    others must not be held.

    Args:
        address: Where.
        backlog: Connections that the kernel completes and holds until they are accepted; for an
            inherited socket, who opened it has decided.
        access: Who may use the file of a Unix socket.

    Raises:
        ListenerError: The system refuses; the message says why, and what would help.
    """
    if isinstance(address, SystemdAddress):
        wanted = address
        address, *others = _passed(wanted)
        if others:
            raise ListenerError(f"{wanted}: systemd passed {1 + len(others)} sockets of this name")
    if isinstance(address, DescriptorAddress):
        return adopt(address)
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
    opened = OpenListener(place, made, file)
    if file is not None and access != OWNER_ONLY:
        try:
            file.open_to(access)
        except OSError as error:
            opened.close()
            raise failure(error, address, ungiven(error)) from error
    return opened


def adopt(address: DescriptorAddress) -> OpenListener:
    """Make a listener of a socket that this process was started with.

    It is lent: closing the listener ends neither the socket, whose descriptor stays open for the
    next one, nor the file of a Unix socket.

    Raises:
        ListenerError: It is not a socket on which something can be served.
    """
    try:
        os.set_inheritable(address.descriptor, False)
        _adopted.add(address.descriptor)
        made = socket.socket(fileno=os.dup(address.descriptor))
    except OSError as error:
        raise failure(error, address, unusable(address, error)) from error
    reason = unfit(address, made)
    if reason is not None:
        made.close()
        raise ListenerError(f"cannot listen on {address}: {reason}")
    # A stream does not wait, and datagrams do, as where a listener is opened; who made it may have
    # chosen either.
    made.setblocking(made.type != socket.SOCK_STREAM)
    return OpenListener(_place_of(made, is_tls=address.scheme.is_tls), made, is_lent=True)


_adopted: Final[set[int]] = set()
"""The descriptors that were adopted, and are kept from other programs since."""


def require_inherited(address: DescriptorAddress) -> None:
    """Make sure that the program was started with a descriptor, and has not opened it itself.

    For a program that is told of its descriptors from outside; one that serves a socket of its own
    by its number means that.

    Raises:
        ListenerError: It was not.
    """
    number = address.descriptor
    if number in _adopted or number in {each.descriptor for each in passed_sockets()}:
        return
    # What came through execve(2) is inheritable, and what Python opens is not.
    with suppress(OSError):
        if os.get_inheritable(number):
            return
    error = OSError(errno.EBADF, os.strerror(errno.EBADF))
    raise failure(error, address, unusable(address, error))


def _passed(address: SystemdAddress) -> list[DescriptorAddress]:
    """Find the descriptors that systemd passed under a name."""
    passed = passed_sockets()
    scheme = Scheme.DESCRIPTOR_TLS if address.scheme.is_tls else Scheme.DESCRIPTOR
    found = [
        DescriptorAddress(scheme, each.descriptor) for each in passed if each.name == address.name
    ]
    if not found:
        raise not_passed(address, [each.name for each in passed])
    return found


def _place_of(made: socket.socket, *, is_tls: bool) -> Place:
    """Ask a socket that somebody else has bound where it is."""
    name, is_stream = made.getsockname(), made.type == socket.SOCK_STREAM
    if made.family == socket.AF_UNIX:
        scheme = Scheme.UNIX if is_stream else Scheme.UNIX_DATAGRAM
    else:
        scheme = (Scheme.TLS if is_tls else Scheme.TCP) if is_stream else Scheme.UDP
    dual_stack = made.family == socket.AF_INET6 and not made.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    )
    family = socket.AddressFamily(made.family)
    return Place(from_socket_name(scheme, name, dual_stack=dual_stack), family, name, dual_stack)


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
    with stale_removed(place.path, listener.type), narrow_mode(listener):
        listener.bind(place.name)
        if listener.type == socket.SOCK_STREAM:
            # At once: until it listens, it looks as dead as what is replaced here.
            listener.listen()
        return SocketFile.at(place.path)
