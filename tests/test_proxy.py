from __future__ import annotations

import re
import socket
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from portico.errors import PorticoError, ProxyHeaderError
from portico.proxy import (
    ALPN,
    AUTHORITY,
    CRC32C,
    MAX_HEADER_SIZE,
    MAX_LINE_SIZE,
    NOOP,
    SSL,
    SSL_CIPHER,
    SSL_CN,
    SSL_VERSION,
    UNIQUE_ID,
    Command,
    Header,
    ProxyTls,
    Tlv,
    Transport,
    crc32c,
    needed,
    parse,
)

from .proxy_laws import check, received_in_steps
from .support import ROOT

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
IPV4_BLOCK = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + (56324).to_bytes(2) + (443).to_bytes(2)
CORPUS = sorted((ROOT / "fuzz" / "corpus" / "proxy").iterdir())


def binary(kind: int, block: bytes, *, command: int = 0x21, size: int | None = None) -> bytes:
    """A header of version 2; `size` makes it say another length than it has."""
    size = len(block) if size is None else size
    return SIGNATURE + bytes([command, kind]) + size.to_bytes(2) + block


def tlv(type_: int, value: bytes) -> bytes:
    return bytes([type_]) + len(value).to_bytes(2) + value


def tls_tlv(client: int, verify: int, *inner: bytes) -> bytes:
    return tlv(SSL, bytes([client]) + verify.to_bytes(4) + b"".join(inner))


def complete(data: bytes) -> Header:
    header = parse(data)
    assert header is not None
    return header


# --- version 1 --------------------------------------------------------------------------


def test_the_example_of_the_specification_is_read() -> None:
    line = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
    request = b"GET / HTTP/1.1\r\nHost: 192.168.0.11\r\n\r\n"
    assert parse(line + request) == Header(
        version=1,
        command=Command.PROXY,
        transport=Transport.TCP4,
        source=("192.168.0.1", 56324),
        destination=("192.168.0.11", 443),
        tlvs=(),
        size=len(line),
    )


@pytest.mark.parametrize(
    ("line", "size"),
    [
        (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", 56),
        (b"PROXY TCP6 %b %b 65535 65535\r\n" % ((b":".join([b"ffff"] * 8),) * 2), 104),
        (b"PROXY UNKNOWN\r\n", 15),
        (b"PROXY UNKNOWN %b %b 65535 65535\r\n" % ((b":".join([b"ffff"] * 8),) * 2), 107),
    ],
)
def test_the_longest_lines_of_the_specification_are_read(line: bytes, size: int) -> None:
    """Section 2.1 gives their sizes."""
    assert complete(line).size == len(line) == size


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("2001:DB8::1", "2001:db8::1"),
        ("2001:db8:0:0:0:0:0:1", "2001:db8::1"),
        ("::", "::"),
        ("1:2:3:4:5:6:7::", "1:2:3:4:5:6:7:0"),
        # As a proxy that uses inet_ntop(3) writes it, and as a socket of both families shows it.
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("::ffff:c000:201", "::ffff:192.0.2.1"),
    ],
)
def test_an_ipv6_address_has_the_shape_and_the_spelling_of_a_socket(text: str, host: str) -> None:
    header = complete(f"PROXY TCP6 {text} ::1 1 2\r\n".encode())
    assert header.transport is Transport.TCP6
    assert (header.source, header.destination) == ((host, 1, 0, 0), ("::1", 2, 0, 0))


@pytest.mark.parametrize(
    "rest", ["", " ", " TCP4", " 1 2 3 4 5 6 7", " caf\xe9", " \r \n", " a\rb"]
)
def test_unknown_is_read_whatever_stands_before_the_end_of_the_line(rest: str) -> None:
    header = complete(b"PROXY UNKNOWN" + rest.encode("latin-1") + b"\r\nhello")
    assert (header.command, header.transport) == (Command.PROXY, Transport.UNSPEC)
    assert (header.source, header.destination) == (None, None)
    assert header.size == len("PROXY UNKNOWN\r\n") + len(rest)


ADDRESSES = "an IPv4 address"
PORTS = "a port from 0 to 65535"
FIELDS = "two addresses and two ports, one space before each"
PROTOCOLS = "TCP4, TCP6 or UNKNOWN after PROXY"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("PROXY TCP5 1.1.1.1 2.2.2.2 1 2", PROTOCOLS),
        ("PROXY tcp4 1.1.1.1 2.2.2.2 1 2", PROTOCOLS),
        ("PROXY  TCP4 1.1.1.1 2.2.2.2 1 2", PROTOCOLS),
        ("PROXY UNKNOWNS", PROTOCOLS),
        ("PROXY ", PROTOCOLS),
        ("PROXY TCP4", FIELDS),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 1", FIELDS),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 1 2 3", FIELDS),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 1 2 ", FIELDS),
        ("PROXY TCP4 1.1.1.1  2.2.2.2 1 2", FIELDS),
        ("PROXY TCP4 1.1.1 2.2.2.2 1 2", ADDRESSES),
        ("PROXY TCP4 1.1.1.256 2.2.2.2 1 2", ADDRESSES),
        ("PROXY TCP4 01.1.1.1 2.2.2.2 1 2", ADDRESSES),
        ("PROXY TCP4 ::1 2.2.2.2 1 2", ADDRESSES),
        ("PROXY TCP4 1.1.1.1 localhost 1 2", ADDRESSES),
        ("PROXY TCP6 1.1.1.1 ::1 1 2", "an IPv6 address"),
        ("PROXY TCP6 fe80::1%eth0 ::1 1 2", "an IPv6 address"),
        ("PROXY TCP6 1:2:3:4:5:6:7 ::1 1 2", "an IPv6 address"),
        ("PROXY TCP6 ::ffff:01.2.3.4 ::1 1 2", "an IPv6 address"),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 65536 2", PORTS),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 01 2", PORTS),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 +1 2", PORTS),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 1 -2", PORTS),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 1 2\n", PORTS),
        ("PROXY TCP4 1.1.1.1 2.2.2.2 1 \u0662", PORTS),
    ],
)
def test_a_line_that_is_not_exactly_right_is_refused(line: str, expected: str) -> None:
    with pytest.raises(ProxyHeaderError) as caught:
        parse(line.encode() + b"\r\n")
    assert caught.value.expected == expected
    assert str(caught.value) == f"PROXY header: expected {expected}"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("G", "PROXY, or the signature of version 2, at its beginning"),
        ("PROXY\t", "PROXY, or the signature of version 2, at its beginning"),
        ("\r\n\r\n\0\r\nQUIZ", "PROXY, or the signature of version 2, at its beginning"),
        ("PROXY TCP7", PROTOCOLS),
        ("PROXY TCP ", PROTOCOLS),
        ("PROXY UNKNOWN_", PROTOCOLS),
        ("PROXY TCP4 256", ADDRESSES),
        ("PROXY TCP4 1.2.3.4.", ADDRESSES),
        ("PROXY TCP4 1.2.3 ", ADDRESSES),
        ("PROXY TCP4 1.2.3.4\n", ADDRESSES),
        ("PROXY TCP6 1:::", "an IPv6 address"),
        ("PROXY TCP6 1::2::", "an IPv6 address"),
        ("PROXY TCP6 12345", "an IPv6 address"),
        ("PROXY TCP6 ::1.256", "an IPv6 address"),
        ("PROXY TCP6 1:2:3:4:5:6:7:8:", "an IPv6 address"),
        ("PROXY TCP4 1.2.3.4 5.6.7.8 00", PORTS),
        ("PROXY TCP4 1.2.3.4 5.6.7.8 65536", PORTS),
        ("PROXY TCP4 1.2.3.4 5.6.7.8 1 2 ", "CRLF after two addresses and two ports"),
        ("PROXY TCP4 1.2.3.4 5.6.7.8 1\r", FIELDS),
        ("PROXY TCP4 1.2.3.4 5.6.7.8 1 2\rx", PORTS),
    ],
)
def test_what_nothing_can_mend_is_refused_before_the_line_ends(start: str, expected: str) -> None:
    data = start.encode()
    assert parse(data[:-1]) is None
    with pytest.raises(ProxyHeaderError) as caught:
        parse(data)
    assert caught.value.expected == expected


def test_a_line_without_an_end_is_refused_when_none_fits_any_more() -> None:
    line = b"PROXY UNKNOWN ".ljust(MAX_LINE_SIZE - 2, b"x")
    assert parse(line) is None
    assert parse(line + b"\r") is None
    assert complete(line + b"\r\n").size == MAX_LINE_SIZE
    for wrong in (line + b"x", line + b"\r\r", line + b"x\r\n"):
        with pytest.raises(ProxyHeaderError, match="expected CRLF within 107 bytes"):
            parse(wrong)


# --- version 2 --------------------------------------------------------------------------


def test_a_header_that_haproxy_sent_for_a_tls_client_is_read() -> None:
    """Recorded from HAProxy 2.6, ``proxy-v2-options crc32c,unique-id,authority,ssl,ssl-cipher``.

    The client showed no certificate, and HAProxy says 0 of its verification all the same.
    """
    data = bytes.fromhex(
        "0d0a0d0a000d0a515549540a 21110054 7f0000017f00000183e446a5 0300044561cfc3 0100026832"
        "02000b6578616d706c652e6f7267 050000 2000280100000000 210007544c5376312e33"
        "230016544c535f4145535f3235365f47434d5f534841333834"
    )
    header = complete(data + b"hello")
    assert (header.version, header.command) == (2, Command.PROXY)
    assert (header.source, header.destination) == (("127.0.0.1", 33764), ("127.0.0.1", 18085))
    assert (header.authority, header.alpn, header.unique_id) == ("example.org", b"h2", b"")
    assert header.tls == ProxyTls("TLSv1.3", "TLS_AES_256_GCM_SHA384", None, verified=False)
    assert header.size == len(data)


def test_what_haproxy_sent_for_a_unix_client_is_a_local_connection() -> None:
    """Recorded from HAProxy 2.6: there is no family, but there are TLVs."""
    data = bytes.fromhex(
        "0d0a0d0a000d0a515549540a 20000023 0300041efff475"
        "050011756e69782d332d31373935363437383038 2000050000000000"
    )
    assert parse(data) == Header(2, Command.LOCAL, Transport.UNSPEC, None, None, (), len(data))


def unix(source: bytes, destination: bytes) -> bytes:
    return source.ljust(108, b"\0") + destination.ljust(108, b"\0")


IPV6_BLOCK = socket.inet_pton(socket.AF_INET6, "2001:db8::1") + socket.inet_pton(
    socket.AF_INET6, "::ffff:192.0.2.1"
)
IPV6_BLOCK += (1).to_bytes(2) + (65535).to_bytes(2)


@pytest.mark.parametrize(
    ("kind", "block", "transport", "source", "destination"),
    [
        (0x11, IPV4_BLOCK, Transport.TCP4, ("192.0.2.1", 56324), ("198.51.100.2", 443)),
        (0x12, IPV4_BLOCK, Transport.UDP4, ("192.0.2.1", 56324), ("198.51.100.2", 443)),
        (
            0x21,
            IPV6_BLOCK,
            Transport.TCP6,
            ("2001:db8::1", 1, 0, 0),
            ("::ffff:192.0.2.1", 65535, 0, 0),
        ),
        (
            0x22,
            IPV6_BLOCK,
            Transport.UDP6,
            ("2001:db8::1", 1, 0, 0),
            ("::ffff:192.0.2.1", 65535, 0, 0),
        ),
        (0x31, unix(b"", b"/run/a"), Transport.UNIX_STREAM, "", "/run/a"),
        (0x31, unix(b"\0name", b"/\xff\0junk"), Transport.UNIX_STREAM, b"\0name", "/\udcff"),
        (0x32, unix(b"x" * 108, b"b"), Transport.UNIX_DATAGRAM, "x" * 108, "b"),
    ],
)
def test_addresses_have_the_shape_of_their_family(
    kind: int, block: bytes, transport: Transport, source: Any, destination: Any
) -> None:
    header = complete(binary(kind, block) + b"hello")
    assert (header.transport, header.source, header.destination) == (transport, source, destination)
    assert (header.command, header.tlvs, header.size) == (Command.PROXY, (), 16 + len(block))


@pytest.mark.parametrize("block", [b"", IPV4_BLOCK, b"neither addresses nor TLVs"])
@pytest.mark.parametrize("kind", [0x00, 0x11, 0x31, 0xFF])
def test_of_a_local_connection_nothing_is_read_but_its_size(kind: int, block: bytes) -> None:
    """Section 2.2: "discard the protocol block including the family which is ignored"."""
    header = complete(binary(kind, block, command=0x20) + b"hello")
    size = 16 + len(block)
    assert header == Header(2, Command.LOCAL, Transport.UNSPEC, None, None, (), size)


@pytest.mark.parametrize("kind", [0x00, 0x01, 0x02, 0x10, 0x20, 0x30])
def test_without_family_or_protocol_there_are_no_addresses(kind: int) -> None:
    header = complete(binary(kind, b"unknown") + b"hello")
    assert header == Header(2, Command.PROXY, Transport.UNSPEC, None, None, (), 23)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (binary(0x11, IPV4_BLOCK, command=0x11), "version 2 and the command LOCAL or PROXY"),
        (binary(0x11, IPV4_BLOCK, command=0x31), "version 2 and the command LOCAL or PROXY"),
        (binary(0x11, IPV4_BLOCK, command=0x22), "version 2 and the command LOCAL or PROXY"),
        (binary(0x13, IPV4_BLOCK), "a known address family and protocol"),
        (binary(0x41, IPV4_BLOCK), "a known address family and protocol"),
        (binary(0x11, IPV4_BLOCK[:-1]), "12 bytes of addresses for tcp4"),
        (binary(0x22, IPV4_BLOCK), "36 bytes of addresses for udp6"),
        (binary(0x31, IPV6_BLOCK), "216 bytes of addresses for unix-stream"),
        (binary(0x11, b"", size=4081), "at most 4096 bytes"),
        (binary(0x00, b"", size=65535), "at most 4096 bytes"),
        (binary(0x00, b"", size=65535, command=0x20), "at most 4096 bytes"),
    ],
)
def test_a_wrong_beginning_is_refused_before_the_rest_is_there(data: bytes, expected: str) -> None:
    with pytest.raises(ProxyHeaderError) as caught:
        parse(data[:16])
    assert caught.value.expected == expected


def test_the_longest_header_is_read() -> None:
    block = IPV4_BLOCK + tlv(0xE0, bytes(MAX_HEADER_SIZE - 16 - 12 - 3))
    assert complete(binary(0x11, block)).size == MAX_HEADER_SIZE


@pytest.mark.parametrize(
    ("tlvs", "expected"),
    [
        (b"\1", "a type and a length at the beginning of each TLV"),
        (b"\1\0", "a type and a length at the beginning of each TLV"),
        (b"\1\0\1", "TLVs that end within the header"),
        (tlv(NOOP, b"pad") + b"\2\xff\xffhost", "TLVs that end within the header"),
        (tlv(UNIQUE_ID, bytes(129)), "a unique ID of at most 128 bytes"),
        (tlv(SSL, b"\1\0\0\0"), "5 bytes or more about TLS"),
        (tls_tlv(1, 0, b"\x21\0"), "a type and a length at the beginning of each TLV"),
        (tls_tlv(1, 0, b"\x21\0\7TLSv1."), "TLVs that end within the header"),
        (tlv(CRC32C, b"\0\0\0"), "one checksum of 4 bytes"),
        (tlv(CRC32C, bytes(4)) * 2, "one checksum of 4 bytes"),
        (tlv(CRC32C, bytes(4)), "a checksum that fits the header"),
    ],
)
def test_a_wrong_tlv_is_refused(tlvs: bytes, expected: str) -> None:
    with pytest.raises(ProxyHeaderError) as caught:
        parse(binary(0x11, IPV4_BLOCK + tlvs) + b"hello")
    assert caught.value.expected == expected


def test_tlvs_are_kept_in_their_order() -> None:
    block = IPV4_BLOCK + tlv(NOOP, b"") + tlv(0xEA, b"\1vpce-1") + tlv(NOOP, b"pad")
    header = complete(binary(0x11, block))
    assert header.tlvs == (Tlv(NOOP, b""), Tlv(0xEA, b"\1vpce-1"), Tlv(NOOP, b"pad"))
    assert header.first(0xEA) == b"\1vpce-1"
    assert header.first(0xEB) is None


def test_what_a_proxy_says_of_its_client_has_names() -> None:
    block = IPV4_BLOCK + tlv(ALPN, b"h2") + tlv(AUTHORITY, "bücher.example".encode())
    block += tlv(UNIQUE_ID, b"\0id") + tlv(AUTHORITY, b"second")
    header = complete(binary(0x11, block))
    assert (header.alpn, header.authority) == (b"h2", "bücher.example")
    assert (header.unique_id, header.tls) == (b"\0id", None)


def test_what_a_proxy_does_not_say_is_none() -> None:
    header = complete(binary(0x11, IPV4_BLOCK))
    assert (header.alpn, header.authority, header.unique_id, header.tls) == (None,) * 4


def test_different_bytes_never_give_the_same_text() -> None:
    """An authority comes from the client: what is no UTF-8 must not look like another name."""
    names = [b"caf\xe9", b"caf\\xe9", "café".encode(), b"caf\xef\xbf\xbd"]
    headers = [complete(binary(0x11, IPV4_BLOCK + tlv(AUTHORITY, name))) for name in names]
    assert len({header.authority for header in headers}) == len(names)


@pytest.mark.parametrize(
    ("client", "verify", "verified"),
    [
        (0x01 | 0x02, 0, True),
        (0x01 | 0x04, 0, True),
        (0x01 | 0x02, 1, False),
        (0x01, 0, False),  # nothing was shown, so that nothing was found wrong
    ],
)
def test_a_certificate_is_verified_only_if_there_was_one(
    client: int, verify: int, verified: bool
) -> None:
    inner = tlv(SSL_VERSION, b"TLSv1.3"), tlv(SSL_CN, b"example.com"), tlv(SSL_CIPHER, b"AES")
    header = complete(binary(0x11, IPV4_BLOCK + tls_tlv(client, verify, *inner)))
    assert header.tls == ProxyTls("TLSv1.3", "AES", "example.com", verified)


def test_tls_that_the_client_did_not_speak_is_none() -> None:
    assert complete(binary(0x11, IPV4_BLOCK + tls_tlv(0, 0))).tls is None


@pytest.mark.parametrize("before", [b"", tlv(NOOP, b"pad"), tls_tlv(1, 0)])
@pytest.mark.parametrize("behind", [b"", tlv(ALPN, b"http/1.1")])
def test_a_checksum_covers_the_whole_header(before: bytes, behind: bytes) -> None:
    def header(checksum: bytes) -> bytes:
        return binary(0x11, IPV4_BLOCK + before + tlv(CRC32C, checksum) + behind)

    right = header(crc32c(header(bytes(4))).to_bytes(4))
    assert complete(right + b"hello").size == len(right)
    for place in range(16, 28):  # addresses and ports: other bytes are refused for other reasons
        wrong = bytearray(right)
        wrong[place] ^= 0x40
        with pytest.raises(ProxyHeaderError, match="a checksum that fits"):
            parse(bytes(wrong))


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_the_checksum_is_castagnolis(data: bytes, checksum: int) -> None:
    """RFC 3720, appendix B.4, gives the values for 32 bytes."""
    assert crc32c(data) == checksum


# --- reading from a stream --------------------------------------------------------------


def test_nothing_is_decided_before_the_first_byte() -> None:
    assert parse(b"") is None
    assert needed(b"") == len(b"PROXY UNKNOWN\r\n")


def test_version_2_takes_three_steps() -> None:
    data = binary(0x11, IPV4_BLOCK + tlv(NOOP, b"pad"))
    assert [needed(data[:at]) for at in (0, 15, 16)] == [15, 1, len(data) - 16]


@pytest.mark.parametrize(
    ("start", "bytes_needed"),
    [
        (b"PROXY TCP4 1.2.", 8),  # three fields, each behind a space, and the end
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 1", 4),
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2", 2),
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r", 1),
        (b"PROXY UNKNOWN x x x x x x x x", 2),
        (b"PROXY UNKNOWN x x x x x x x x\r", 1),
    ],
)
def test_version_1_goes_as_far_as_the_shortest_line(start: bytes, bytes_needed: int) -> None:
    assert parse(start) is None
    assert needed(start) == bytes_needed


def test_a_header_is_taken_from_a_socket_and_not_a_byte_more() -> None:
    line = b"PROXY TCP6 2001:db8::1 2001:db8::2 50000 443\r\n"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(line + b"hello")
        data = b""
        while (header := parse(data)) is None:
            data += ours.recv(needed(data))
        assert data == line
        assert header.source == ("2001:db8::1", 50000, 0, 0)
        assert ours.recv(64) == b"hello"


# --- the rest ---------------------------------------------------------------------------


def test_an_error_says_nothing_of_what_came() -> None:
    with pytest.raises(ProxyHeaderError) as caught:
        parse(b"PROXY TCP4 s3cret-t0ken 1.1.1.1 1 2\r\n")
    assert not re.search("s3cret|t0ken", str(caught.value) + repr(caught.value))
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, PorticoError)
    assert isinstance(caught.value, ValueError)


def test_a_header_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        complete(b"PROXY UNKNOWN\r\n").size = 0  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize("seed", CORPUS, ids=lambda path: path.name)
def test_the_laws_hold_for_the_seeds_of_the_fuzzer(seed: Path) -> None:
    """Where the fuzzer finds a fault, its input becomes a seed."""
    check(seed.read_bytes())


def test_the_seeds_of_the_fuzzer_are_headers_of_every_kind() -> None:
    headers = [complete(seed.read_bytes()) for seed in CORPUS if not seed.name.startswith("not-")]
    assert {header.transport for header in headers} == set(Transport)
    assert {header.command for header in headers} == set(Command)
    assert {header.version for header in headers} == {1, 2}
    types = {tlv.type for header in headers for tlv in header.tlvs}
    assert types >= {ALPN, AUTHORITY, CRC32C, NOOP, UNIQUE_ID, SSL}
    assert all(received_in_steps(seed.read_bytes()) for seed in CORPUS if "not-" not in seed.name)
