"""Read an address such as ``tcp://127.0.0.1:9000``, and write it.

Owns the notation.  Decides without asking the system: a host name stays a name, and whether a
port or a path can be had is for `portico.listener` to find out.  The notation::

    tcp://127.0.0.1:9000       one IPv4 address; port 0 lets the system choose
    tcp://[::1]:9000           one IPv6 address
    tcp://[fe80::1%eth0]:9000  one that needs its interface
    tcp://localhost:9000       a host name: its first address, IPv4 before IPv6
    tcp://:9000                every address of the machine, IPv6 and IPv4
    tls://...                  the same, and TLS is spoken over it
    udp://...                  the same for datagrams
    unix:/run/echo.sock        a path; unix:///run/echo.sock is another spelling
    unix:@echo                 a name in Linux's abstract namespace
    unix-datagram:...          the same for datagrams
    systemd:web                the sockets that systemd passes under this name, of whatever kind
    systemd+tls:web            the same, and TLS is spoken over them
    fd://3                     a socket that this process was started with, by its descriptor
    fd+tls://3                 the same, and TLS is spoken over it

Sources: RFC 3986, 3.1 (a ``+`` in a scheme), 3.2.2 (brackets around IPv6); RFC 4007, 11 (the
interface after ``%``); RFC 1123, 2.1 (host names); unix(7) (abstract names, the length of a path);
sd_listen_fds(3) (the names of passed sockets).
"""

from __future__ import annotations

import re
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any, TypeAlias

from portico.errors import AddressError

UNIX_PATH_SIZE = 107 if sys.platform == "linux" else 103
"""Bytes that a Unix path, or an abstract name, may have: ``sun_path`` without its last byte."""

_SCHEMES = (
    "tcp://HOST:PORT, tls://HOST:PORT, udp://HOST:PORT, unix:PATH, unix-datagram:PATH, "
    "systemd:NAME or fd://NUMBER"
)
_HOST_AND_PORT = re.compile(r"//(?:\[([^\[\]]*)\]|([^:\[\]]*)):([0-9]{1,5})")
_PASSED_NAME = re.compile(r"[!-9;-~](?:[ -9;-~]{0,253}[!-9;-~])?")
_DESCRIPTOR = re.compile(r"//(0|[1-9][0-9]{0,6})")
_INTERFACE = re.compile(r"[A-Za-z0-9._-]{1,15}")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
# The system would read "127.1" and "0x7f000001" as addresses, and nobody means them as names.
_ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?")


class Scheme(StrEnum):
    """What an address begins with: the kind of server that listens there, or who knows it."""

    TCP = "tcp"
    TLS = "tls"
    UDP = "udp"
    UNIX = "unix"
    UNIX_DATAGRAM = "unix-datagram"
    SYSTEMD = "systemd"
    SYSTEMD_TLS = "systemd+tls"
    DESCRIPTOR = "fd"
    DESCRIPTOR_TLS = "fd+tls"

    @property
    def is_inherited(self) -> bool:
        """Whether somebody else opens its sockets: only they can tell of what kind they are."""
        return self in _INHERITED

    @property
    def is_tls(self) -> bool:
        """Whether TLS is spoken there."""
        return self in {Scheme.TLS, Scheme.SYSTEMD_TLS, Scheme.DESCRIPTOR_TLS}

    @property
    def is_unix(self) -> bool:
        """Whether its addresses are paths."""
        return self in {Scheme.UNIX, Scheme.UNIX_DATAGRAM}

    @property
    def is_datagram(self) -> bool:
        """Whether a request is a datagram, and not a connection."""
        return self in {Scheme.UDP, Scheme.UNIX_DATAGRAM}

    @property
    def socket_type(self) -> socket.SocketKind:
        """Streams or datagrams."""
        return socket.SOCK_DGRAM if self.is_datagram else socket.SOCK_STREAM


_INHERITED = frozenset(
    {Scheme.SYSTEMD, Scheme.SYSTEMD_TLS, Scheme.DESCRIPTOR, Scheme.DESCRIPTOR_TLS}
)


@dataclass(frozen=True, slots=True)
class InternetAddress:
    """A host and a port.

    Attributes:
        scheme: `Scheme.TCP`, `Scheme.TLS` or `Scheme.UDP`.
        host: An IPv4 or IPv6 address in its canonical form, a host name in lower case, or an
            empty text for every address of the machine.
        port: 0 to 65535; 0 lets the system choose.
    """

    scheme: Scheme
    host: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        """The address family; `socket.AF_UNSPEC` where the system has to be asked for it."""
        if ":" in self.host:
            return socket.AF_INET6
        if _is_ipv4(self.host):
            return socket.AF_INET
        return socket.AF_UNSPEC

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A path, or a name in Linux's abstract namespace.

    Attributes:
        scheme: `Scheme.UNIX` or `Scheme.UNIX_DATAGRAM`.
        path: The path; one that begins with ``@`` is an abstract name.
    """

    scheme: Scheme
    path: str

    @property
    def family(self) -> socket.AddressFamily:
        """The address family."""
        return socket.AF_UNIX

    @property
    def is_abstract(self) -> bool:
        """Whether it is a name without a file."""
        return self.path.startswith("@")

    @property
    def socket_address(self) -> str | bytes:
        """What `socket.socket.bind` takes."""
        if self.is_abstract:
            return b"\0" + _encode(self.path[1:])
        return self.path

    def __str__(self) -> str:
        return f"{self.scheme}:{self.path}"


@dataclass(frozen=True, slots=True)
class SystemdAddress:
    """The sockets that systemd passes under a name; there may be several, of different kinds.

    Attributes:
        scheme: `Scheme.SYSTEMD` or `Scheme.SYSTEMD_TLS`.
        name: ``FileDescriptorName=`` of their units.
    """

    scheme: Scheme
    name: str

    def __str__(self) -> str:
        return f"{self.scheme}:{self.name}"


@dataclass(frozen=True, slots=True)
class DescriptorAddress:
    """A socket that the process was started with.

    Attributes:
        scheme: `Scheme.DESCRIPTOR` or `Scheme.DESCRIPTOR_TLS`.
        descriptor: The number of its descriptor.
    """

    scheme: Scheme
    descriptor: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.descriptor}"


BoundAddress: TypeAlias = InternetAddress | UnixAddress
"""What a socket is bound to."""

Address: TypeAlias = BoundAddress | SystemdAddress | DescriptorAddress


def parse(text: str) -> Address:
    """Read an address in the notation that this module describes.

    Raises:
        AddressError: It is not one; the error says what would be right.
    """
    name, _, rest = text.partition(":")
    try:
        scheme = Scheme(name.lower())
    except ValueError:
        raise AddressError(text, _nearest(text)) from None
    try:
        if scheme.is_unix:
            return UnixAddress(scheme, _read_path(rest))
        if scheme in {Scheme.SYSTEMD, Scheme.SYSTEMD_TLS}:
            return SystemdAddress(scheme, _read_passed_name(rest))
        if scheme in {Scheme.DESCRIPTOR, Scheme.DESCRIPTOR_TLS}:
            return DescriptorAddress(scheme, _read_descriptor(rest))
        return InternetAddress(scheme, *_read_host_and_port(rest))
    except _ExpectedError as error:
        raise AddressError(text, str(error).replace("SCHEME", scheme)) from None


def from_socket_name(
    scheme: Scheme, name: tuple[Any, ...] | str | bytes, *, dual_stack: bool = False
) -> BoundAddress:
    """Write what `socket.socket.getsockname` returned for a bound socket as an address.

    An IPv4 address inside an IPv6 one (``::ffff:192.0.2.1``) is written as IPv4.

    Args:
        scheme: What the socket was made for.
        name: The socket's own name.
        dual_stack: Whether an IPv6 socket bound to every address serves IPv4 as well.
    """
    if isinstance(name, bytes):
        return UnixAddress(scheme, "@" + name[1:].decode("utf-8", "surrogateescape"))
    if isinstance(name, str):
        return UnixAddress(scheme, f"./{name}" if name.startswith("@") else name)
    host, port, *rest = name
    if ":" in host:
        interface = rest[1]
        if interface and "%" not in host:
            host = f"{host}%{interface}"
        host = "" if dual_stack and host == "::" else _canonical_ipv6(host)
    return InternetAddress(scheme, host, port)


class _ExpectedError(Exception):
    """Part of an address is not right.

    The text says what would be right, with ``SCHEME`` where the scheme of the address goes.
    """


def _read_path(text: str) -> str:
    """Return the path in what follows ``unix:``."""
    # Two slashes would announce a host, as in other addresses.  Three are the path of an empty one.
    if text.startswith("//") and not text.startswith("///"):
        raise _ExpectedError("an absolute path after one slash or three, such as SCHEME:/PATH")
    path = f"/{text.lstrip('/')}" if text.startswith("/") else text
    is_abstract = path.startswith("@")
    if path in {"", "@"} or (path.endswith("/") and not is_abstract):
        raise _ExpectedError("SCHEME:/PATH/OF/SOCKET, or SCHEME:@NAME for an abstract name")
    try:
        size = len(_encode(path.removeprefix("@")))
    except UnicodeEncodeError:
        raise _ExpectedError("a path that can be written in UTF-8") from None
    if size > UNIX_PATH_SIZE:
        raise _ExpectedError(f"a path of at most {UNIX_PATH_SIZE} bytes (this one has {size})")
    if "\0" in path and not is_abstract:
        raise _ExpectedError("a path without a zero byte")
    return path


def _read_passed_name(text: str) -> str:
    """Return the name in what follows ``systemd:``."""
    if not _PASSED_NAME.fullmatch(text) or text.startswith("/"):
        raise _ExpectedError(
            "SCHEME:NAME, with the FileDescriptorName= of a .socket unit, such as SCHEME:web"
        )
    return text


def _read_descriptor(text: str) -> int:
    """Return the number in what follows ``fd:``."""
    match = _DESCRIPTOR.fullmatch(text)
    if match is None:
        raise _ExpectedError("SCHEME://NUMBER, with the number of a descriptor, such as SCHEME://3")
    return int(match[1])


def _read_host_and_port(text: str) -> tuple[str, int]:
    """Return the host and the port in what follows ``tcp:``."""
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None:
        raise _ExpectedError(_bracketed(text) or "SCHEME://HOST:PORT, or SCHEME://:PORT")
    literal, name, digits = match.groups()
    port = int(digits)
    if port > 65535:
        raise _ExpectedError("a port from 0 to 65535")
    if literal is None:
        return _read_host_name(name), port
    try:
        return _canonical_ipv6(literal), port
    except AddressValueError:
        raise _ExpectedError(
            "an IPv6 address between the brackets, such as SCHEME://[::1]:PORT"
        ) from None


def _read_host_name(name: str) -> str:
    """Return a host that is not in brackets, in lower case, if it can be one."""
    if name == "" or _is_ipv4(name):
        return name
    if _ENDS_IN_A_NUMBER.fullmatch(name):
        raise _ExpectedError("four numbers from 0 to 255, such as SCHEME://127.0.0.1:PORT")
    if name == "*":
        raise _ExpectedError("SCHEME://:PORT for every address of this machine")
    if not _HOST_NAME.fullmatch(name):
        raise _ExpectedError("a host name of letters, digits, dots and hyphens")
    return name.lower()


def _canonical_ipv6(text: str) -> str:
    """Return an IPv6 address in its one canonical form, or the IPv4 address inside it."""
    address = IPv6Address(text)
    if address.scope_id is not None and not _INTERFACE.fullmatch(address.scope_id):
        raise AddressValueError(text)
    return str(address.ipv4_mapped or address)


def _is_ipv4(text: str) -> bool:
    with suppress(AddressValueError):
        IPv4Address(text)
        return True
    return False


def _bracketed(text: str) -> str | None:
    """Say how an IPv6 address without brackets would be written, if there is one in `text`."""
    host, _, port = text.removeprefix("//").rpartition(":")
    correct = f"//[{host}]:{port}"
    if _HOST_AND_PORT.fullmatch(correct):
        with suppress(AddressValueError):
            _canonical_ipv6(host)
            return f"brackets around an IPv6 address: SCHEME:{correct}"
    return None


def _nearest(text: str) -> str:
    """Say what would be right for an address whose scheme is missing or unknown."""
    with suppress(AddressError):
        return f"{parse(f'tcp://{text}')} or {parse(f'udp://{text}')}"
    with suppress(AddressError):
        return f"{parse(f'tcp://:{text}')} or {parse(f'udp://:{text}')}"
    if text.startswith(("/", "./", "@")):
        with suppress(AddressError):
            return f"{parse(f'unix:{text}')} or {parse(f'unix-datagram:{text}')}"
    return _SCHEMES


def _encode(text: str) -> bytes:
    """Return the bytes of a path as the system sees them."""
    return text.encode("utf-8", "surrogateescape")
