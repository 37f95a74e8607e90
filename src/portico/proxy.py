r"""Read the PROXY protocol header that a proxy puts before what its client sends.

Owns the grammar of both versions.  Decides from bytes alone: receiving them, the time that a
peer has for it, and whom to believe are its caller's.  A header is a statement of whoever
connected, so it is asked only of networks that are trusted, and of those always: with
guessing, any client could say that it is another one.

`parse` and `needed` work together, so that the loop which reads never takes a byte that
belongs to the handler, on sockets with and without ``MSG_PEEK``::

    data = b""
    while (header := parse(data)) is None:
        data += receive(needed(data))  # fewer bytes are welcome, none is the end of the stream

What is not decided here: an end of the stream inside a header.  It is an error, too ("the
receiver must also reject incoming connections containing partial protocol headers").

Source: "The PROXY protocol, Versions 1 & 2", Willy Tarreau, HAProxy; sections 2.1 and 2.2.
Where it leaves a choice to the receiver, this is ours:

- An unspecified family or protocol in version 2, as ``UNKNOWN`` in version 1, is accepted
  without addresses ("the receiver is free to accept the connection anyway and use the real
  endpoint addresses").  Values beyond the known ones "must be rejected as invalid".
- What follows ``LOCAL`` or an unspecified family is skipped: the specification says to
  "discard the protocol block", and without a family nobody knows where addresses end and
  TLVs begin.  HAProxy reads it so, too; but as a sender it adds TLVs, which are lost.
- Text is decoded so that two different byte sequences never give the same text, as Python
  does with paths (``surrogateescape``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from struct import Struct
from typing import Any, Final, NamedTuple, TypeAlias

from portico.errors import ProxyHeaderError

MAX_LINE_SIZE: Final = 107
"""Bytes of the longest header of version 1, with its CRLF (section 2.1)."""

MAX_HEADER_SIZE: Final = 4096
"""Bytes of the longest header that is read; a longer one is refused as soon as it says so.

The length field of version 2 allows 65,551, and a peer that sends slowly makes us keep what it
sent.  The specification expects a header to be "always smaller than an MSS", about 1,460
bytes; this leaves room for a client's certificate in a TLV, and is what nginx allows.
"""

MAX_UNIQUE_ID_SIZE: Final = 128
"""Bytes of the longest unique ID (section 2.2.5)."""

ALPN: Final = 0x01
"""The type of the TLV that names the protocol which the client negotiated."""
AUTHORITY: Final = 0x02
"""The type of the TLV with the host name that the client asked for."""
CRC32C: Final = 0x03
"""The type of the TLV with the checksum of the header."""
NOOP: Final = 0x04
"""The type of the TLV that means nothing; it pads."""
UNIQUE_ID: Final = 0x05
"""The type of the TLV with a name for the connection."""
SSL: Final = 0x20
"""The type of the TLV about the client's TLS connection."""
SSL_VERSION: Final = 0x21
"""Inside `SSL`: the version of TLS."""
SSL_CN: Final = 0x22
"""Inside `SSL`: the common name in the client's certificate."""
SSL_CIPHER: Final = 0x23
"""Inside `SSL`: the cipher."""

ProxyAddress: TypeAlias = "tuple[str, int] | tuple[str, int, int, int] | str | bytes"
"""An address in the shape that `socket.socket.getpeername` returns for its family."""

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED_SIZE: Final = 16  # the signature, version and command, family and protocol, length
_LINE_START: Final = b"PROXY "
_CRLF: Final = b"\r\n"
_SHORTEST: Final = len(b"PROXY UNKNOWN\r\n")


class Command(StrEnum):
    """Whether the proxy speaks for a client or for itself."""

    LOCAL = "local"
    """The proxy connected by itself, to check our health: its own addresses are the real ones."""
    PROXY = "proxy"
    """The proxy connected for the client that the header names."""


class Transport(StrEnum):
    """How the client reached the proxy."""

    UNSPEC = "unspec"
    """Not said: unknown, or none that the protocol has a number for."""
    TCP4 = "tcp4"
    UDP4 = "udp4"
    TCP6 = "tcp6"
    UDP6 = "udp6"
    UNIX_STREAM = "unix-stream"
    UNIX_DATAGRAM = "unix-datagram"


class Tlv(NamedTuple):
    """A type, a length and a value: something that the proxy says beside the addresses.

    Attributes:
        type: 0 to 255; the constants of this module name the registered ones.
        value: Its bytes.
    """

    type: int
    value: bytes


@dataclass(frozen=True, slots=True)
class ProxyTls:
    """What a proxy says of the TLS connection between its client and itself.

    Attributes:
        version: Such as ``TLSv1.3``; ``None`` if not said.
        cipher: Such as ``TLS_AES_256_GCM_SHA384``; ``None`` if not said.
        cn: The common name in the client's certificate; ``None`` if not said.  It is worth
            something only when `verified`.
        verified: Whether the client showed a certificate, on this connection or earlier in its
            TLS session, and the proxy verified it.
    """

    version: str | None
    cipher: str | None
    cn: str | None
    verified: bool


@dataclass(frozen=True, slots=True)
class Header:
    """A PROXY protocol header.

    Attributes:
        version: 1 or 2.
        command: Whether the proxy speaks for a client.
        transport: How the client reached the proxy.
        source: The client's address; ``None`` when the real one of the connection holds.
        destination: The address that the client connected to; ``None`` like `source`.
        tlvs: What else the proxy says, in its order, `NOOP` included.
        size: How many bytes the header takes; those that follow are the handler's.
    """

    version: int
    command: Command
    transport: Transport
    source: ProxyAddress | None
    destination: ProxyAddress | None
    tlvs: tuple[Tlv, ...]
    size: int

    def first(self, type: int) -> bytes | None:
        """Return the value of the first TLV of a type, or ``None``."""
        return _first(self.tlvs, type)

    @property
    def alpn(self) -> bytes | None:
        """The protocol that the client negotiated, such as ``b"h2"``."""
        return self.first(ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client asked for; with TLS, the server name indication."""
        return _text(self.first(AUTHORITY))

    @property
    def unique_id(self) -> bytes | None:
        """The proxy's name for the connection: at most 128 opaque bytes."""
        return self.first(UNIQUE_ID)

    @property
    def tls(self) -> ProxyTls | None:
        """The client's TLS connection to the proxy; ``None`` if it had none, or it is not said."""
        value = self.first(SSL)
        if value is None or not value[0] & _CLIENT_TLS:
            return None
        client, verify = _TLS_START.unpack_from(value)
        tlvs = tuple(_read_tlvs(value[_TLS_START.size :]))
        return ProxyTls(
            version=_text(_first(tlvs, SSL_VERSION)),
            cipher=_text(_first(tlvs, SSL_CIPHER)),
            cn=_text(_first(tlvs, SSL_CN)),
            # Without a certificate nothing was found wrong either, and HAProxy 2.6 says 0.
            verified=verify == 0 and bool(client & _CLIENT_CERTIFICATE),
        )


def parse(data: bytes) -> Header | None:
    """Read the header at the beginning of a stream.

    Args:
        data: All that came so far.  What may follow the header is not looked at.

    Returns:
        The header, or ``None`` while it is incomplete; `needed` says how many bytes it lacks.

    Raises:
        ProxyHeaderError: This is no header, whatever may follow.  It is raised as soon as that
            is certain.
    """
    if data.startswith(_LINE_START):
        return _parse_line(data)
    if data.startswith(_SIGNATURE):
        return _parse_binary(data)
    if _LINE_START.startswith(data) or _SIGNATURE.startswith(data):
        return None
    raise ProxyHeaderError("PROXY, or the signature of version 2, at its beginning")


def needed(data: bytes) -> int:
    r"""Tell how many more bytes belong to the header for certain.

    Whoever receives no more than that, again and again, takes the whole header and nothing of
    the handler's.  Version 2 takes three steps.  In version 1 the end cannot be known before
    it is there, so a step goes as far as the shortest line that begins like this one; with
    ``MSG_PEEK`` for `MAX_LINE_SIZE` bytes first, and then `Header.size`, two calls do.

    Args:
        data: What `parse` found incomplete.

    Returns:
        At least 1; 0 when the header is complete.
    """
    if data.startswith(_SIGNATURE):
        if len(data) < _FIXED_SIZE:
            return _FIXED_SIZE - len(data)
        return max(0, _FIXED_SIZE + int.from_bytes(data[14:16]) - len(data))
    return _needed_of_line(data)


# -------------------------------------------------------------------------------- version 1


class _Field(NamedTuple):
    """One of the fields of a line: what it is, and how far it can be told from other text."""

    name: str
    read: Callable[[bytes], str | int | None]
    """Gives the value of a whole field; ``None`` if it is none."""
    can_become: Callable[[bytes], object]
    """Whether more bytes can make a field of this beginning."""


_OCTET: Final = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = re.compile(rb"%b(?:\.%b){3}" % (_OCTET, _OCTET))
_IPV4_START: Final = re.compile(rb"(?:%b\.){0,3}(?:%b)?" % (_OCTET, _OCTET))
# At most 45: with dots, as the system's inet_ntop writes an IPv4 address within an IPv6 one.
_IPV6: Final = re.compile(rb"[0-9A-Fa-f:.]{2,45}")
_IPV6_ENDS: Final = (b"", b"::", b":", b"0", b".0.0", b"0.0", b".0", b"0.0.0")
"""What completes any beginning of an IPv6 address: one of these."""
_PORT: Final = re.compile(
    rb"6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3}|0"
)


def _read_ipv4(field: bytes) -> str | None:
    return field.decode("ascii") if _IPV4.fullmatch(field) else None


def _read_ipv6(field: bytes) -> str | None:
    if not _IPV6.fullmatch(field):
        return None  # above all a `%` and an interface, which `IPv6Address` would take
    try:
        return _ipv6_text(IPv6Address(field.decode("ascii")))
    except AddressValueError:
        return None


def _read_port(field: bytes) -> int | None:
    return int(field) if _PORT.fullmatch(field) else None


def _ipv6_can_become(field: bytes) -> bool:
    return any(_read_ipv6(field + end) is not None for end in _IPV6_ENDS)


def _port_can_become(field: bytes) -> bool:
    return not field or _read_port(field) is not None


_IPV4_FIELD: Final = _Field("an IPv4 address", _read_ipv4, _IPV4_START.fullmatch)
_IPV6_FIELD: Final = _Field("an IPv6 address", _read_ipv6, _ipv6_can_become)
_PORT_FIELD: Final = _Field("a port from 0 to 65535", _read_port, _port_can_become)

_LINES: Final = {
    b"UNKNOWN": (Transport.UNSPEC, ()),
    b"TCP4": (Transport.TCP4, (_IPV4_FIELD, _IPV4_FIELD, _PORT_FIELD, _PORT_FIELD)),
    b"TCP6": (Transport.TCP6, (_IPV6_FIELD, _IPV6_FIELD, _PORT_FIELD, _PORT_FIELD)),
}
"""What a line names as its protocol, and the fields that follow."""


def _parse_line(data: bytes) -> Header | None:
    end = data.find(_CRLF, 0, MAX_LINE_SIZE)
    if end >= 0:
        return _read_line(data[:end])
    if len(data) + needed(data) > MAX_LINE_SIZE:
        raise ProxyHeaderError(f"CRLF within {MAX_LINE_SIZE} bytes")
    if data.endswith(b"\r"):
        _read_line(data[:-1])
    else:
        _check_start(data)
    return None


def _read_line(line: bytes) -> Header:
    """Read a line without its CRLF."""
    protocol, *fields = line[len(_LINE_START) :].split(b" ")
    transport, grammar = _grammar(protocol)
    source: ProxyAddress | None = None
    destination: ProxyAddress | None = None
    if grammar:
        if len(fields) != len(grammar):
            raise ProxyHeaderError("two addresses and two ports, one space before each")
        hosts = [_read_field(*pair) for pair in zip(grammar[:2], fields[:2], strict=True)]
        ports = [_read_field(*pair) for pair in zip(grammar[2:], fields[2:], strict=True)]
        source, destination = (
            _internet_address(transport, str(host), int(port))
            for host, port in zip(hosts, ports, strict=True)
        )
    size = len(line) + len(_CRLF)
    return Header(1, Command.PROXY, transport, source, destination, (), size)


def _check_start(line: bytes) -> None:
    """Raise if nothing can complete a line that lacks its CRLF."""
    protocol, *fields = line[len(_LINE_START) :].split(b" ")
    if not fields and any(known.startswith(protocol) for known in _LINES):
        return
    _, grammar = _grammar(protocol)
    if not grammar:
        return  # whatever stands before the CRLF is to be ignored
    if len(fields) > len(grammar):
        raise ProxyHeaderError("CRLF after two addresses and two ports")
    *complete, last = fields
    for field, text in zip(grammar, complete, strict=False):
        _read_field(field, text)
    unfinished = grammar[len(complete)]
    if not unfinished.can_become(last):
        raise ProxyHeaderError(unfinished.name)


def _needed_of_line(data: bytes) -> int:
    """Count what the shortest line that begins like this one still lacks."""
    if len(data) < _SHORTEST:
        return _SHORTEST - len(data)
    if _CRLF in data:
        return 0
    if data.endswith(b"\r"):
        return 1
    if data.startswith(b"PROXY UNKNOWN"):
        return len(_CRLF)
    # Five spaces are in any other line, and behind each that is missing there is something.
    return 2 * (5 - data.count(b" ")) + len(_CRLF)


def _grammar(protocol: bytes) -> tuple[Transport, tuple[_Field, ...]]:
    try:
        return _LINES[protocol]
    except KeyError:
        raise ProxyHeaderError("TCP4, TCP6 or UNKNOWN after PROXY") from None


def _read_field(field: _Field, text: bytes) -> str | int:
    value = field.read(text)
    if value is None:
        raise ProxyHeaderError(field.name)
    return value


# -------------------------------------------------------------------------------- version 2

_COMMANDS: Final = {0x20: Command.LOCAL, 0x21: Command.PROXY}
_TRANSPORTS: Final = {
    0x11: Transport.TCP4,
    0x12: Transport.UDP4,
    0x21: Transport.TCP6,
    0x22: Transport.UDP6,
    0x31: Transport.UNIX_STREAM,
    0x32: Transport.UNIX_DATAGRAM,
}
_MAX_FAMILY: Final = 3
_MAX_PROTOCOL: Final = 2

_IPV4_BLOCK: Final = Struct("!4s4sHH")
_IPV6_BLOCK: Final = Struct("!16s16sHH")
_UNIX_BLOCK: Final = Struct("!108s108s")
_BLOCKS: Final = {
    Transport.TCP4: _IPV4_BLOCK,
    Transport.UDP4: _IPV4_BLOCK,
    Transport.TCP6: _IPV6_BLOCK,
    Transport.UDP6: _IPV6_BLOCK,
    Transport.UNIX_STREAM: _UNIX_BLOCK,
    Transport.UNIX_DATAGRAM: _UNIX_BLOCK,
}
"""The addresses that stand first behind the fixed part."""

_TLV_START: Final = Struct("!BH")
_TLS_START: Final = Struct("!BL")
_CLIENT_TLS: Final = 0x01
_CLIENT_CERTIFICATE: Final = 0x02 | 0x04  # on this connection, or earlier in its session


def _parse_binary(data: bytes) -> Header | None:
    fixed = data[:_FIXED_SIZE]
    command = _command(fixed[12:13])
    transport = _transport(command, fixed[13:14])
    # Before its last byte is there, the length is at least what the first one says.
    size = _FIXED_SIZE + int.from_bytes(fixed[14:].ljust(2, b"\0"))
    if size > MAX_HEADER_SIZE:
        raise ProxyHeaderError(f"at most {MAX_HEADER_SIZE} bytes")
    if len(data) < _FIXED_SIZE:
        return None
    if transport is Transport.UNSPEC:
        if len(data) < size:
            return None
        return Header(2, command, transport, None, None, (), size)
    block = _BLOCKS[transport]
    if size < _FIXED_SIZE + block.size:
        raise ProxyHeaderError(f"{block.size} bytes of addresses for {transport}")
    if len(data) < size:
        return None
    source, destination = _read_addresses(transport, block.unpack_from(data, _FIXED_SIZE))
    tlvs = tuple(_read_tlvs(data[_FIXED_SIZE + block.size : size]))
    _check_tlvs(tlvs, data[:size])
    return Header(2, command, transport, source, destination, tlvs, size)


def _command(byte: bytes) -> Command:
    """Read version and command; while they are not there, they can be any."""
    command = _COMMANDS.get(byte[0]) if byte else Command.PROXY
    if command is None:
        raise ProxyHeaderError("version 2 and the command LOCAL or PROXY")
    return command


def _transport(command: Command, byte: bytes) -> Transport:
    """Read family and protocol; while they are not there, and with `LOCAL`, they say nothing."""
    if not byte or command is Command.LOCAL:
        return Transport.UNSPEC
    family, protocol = byte[0] >> 4, byte[0] & 0x0F
    if family > _MAX_FAMILY or protocol > _MAX_PROTOCOL:
        raise ProxyHeaderError("a known address family and protocol")
    return _TRANSPORTS.get(byte[0], Transport.UNSPEC)


def _read_addresses(
    transport: Transport, block: tuple[Any, ...]
) -> tuple[ProxyAddress, ProxyAddress]:
    source, destination, *ports = block
    if not ports:
        return _unix_address(source), _unix_address(destination)
    source_port, destination_port = ports
    return (
        _internet_address(transport, _ip_text(source), source_port),
        _internet_address(transport, _ip_text(destination), destination_port),
    )


def _read_tlvs(data: bytes) -> Iterator[Tlv]:
    at = 0
    while at < len(data):
        if len(data) - at < _TLV_START.size:
            raise ProxyHeaderError("a type and a length at the beginning of each TLV")
        type_, size = _TLV_START.unpack_from(data, at)
        at += _TLV_START.size
        if size > len(data) - at:
            raise ProxyHeaderError("TLVs that end within the header")
        yield Tlv(type_, data[at : at + size])
        at += size


def _check_tlvs(tlvs: tuple[Tlv, ...], header: bytes) -> None:
    """Raise for what a property of `Header` would stumble over, and for a wrong checksum."""
    for type_, value in tlvs:
        if type_ == SSL:
            if len(value) < _TLS_START.size:
                raise ProxyHeaderError(f"{_TLS_START.size} bytes or more about TLS")
            for _ in _read_tlvs(value[_TLS_START.size :]):
                pass
        elif type_ == UNIQUE_ID and len(value) > MAX_UNIQUE_ID_SIZE:
            raise ProxyHeaderError(f"a unique ID of at most {MAX_UNIQUE_ID_SIZE} bytes")
    if _first(tlvs, CRC32C) is not None:
        _check_sum(tlvs, header)


def _check_sum(tlvs: tuple[Tlv, ...], header: bytes) -> None:
    """Raise unless the one checksum is that of the header with zeros in its place."""
    places = [place for place, tlv in enumerate(tlvs) if tlv.type == CRC32C]
    checksum = tlvs[places[0]].value
    if len(places) != 1 or len(checksum) != 4:
        raise ProxyHeaderError("one checksum of 4 bytes")
    # Found from the end: the addresses before the TLVs differ in size.
    end = len(header) - sum(_TLV_START.size + len(tlv.value) for tlv in tlvs[places[0] + 1 :])
    zeroed = header[: end - 4] + bytes(4) + header[end:]
    if crc32c(zeroed) != int.from_bytes(checksum):
        raise ProxyHeaderError("a checksum that fits the header")


# ------------------------------------------------------------------------ what both share


def _internet_address(transport: Transport, host: str, port: int) -> ProxyAddress:
    if transport in {Transport.TCP6, Transport.UDP6}:
        return host, port, 0, 0
    return host, port


def _ip_text(packed: bytes) -> str:
    return str(IPv4Address(packed)) if len(packed) == 4 else _ipv6_text(IPv6Address(packed))


def _ipv6_text(address: IPv6Address) -> str:
    """Write an address as a socket does: with dots where it holds an IPv4 address.

    `str` does so from Python 3.13 on.
    """
    mapped = address.ipv4_mapped
    return f"::ffff:{mapped}" if mapped else str(address)


def _unix_address(field: bytes) -> str | bytes:
    """Read a path, or an abstract name, as a socket gives it.

    An abstract name may end in zeros, which its field does not tell from padding; they go.
    """
    if field.startswith(b"\0"):
        name = field.rstrip(b"\0")
        return name or ""  # not bound, as most clients are
    path, _, _ = field.partition(b"\0")
    return path.decode("utf-8", "surrogateescape")


def _first(tlvs: tuple[Tlv, ...], type: int) -> bytes | None:
    return next((tlv.value for tlv in tlvs if tlv.type == type), None)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")


def _crc32c_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC32C_TABLE: Final = tuple(map(_crc32c_of_byte, range(256)))


def crc32c(data: bytes) -> int:
    """Return the CRC32c of `data` (RFC 9260, appendix A; the polynomial of Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
