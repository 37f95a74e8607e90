from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from itertools import product

from hypothesis import assume, example, given
from hypothesis import strategies as st
from proxyprotocol.result import (
    ProxyResult,
    ProxyResultIPv4,
    ProxyResultIPv6,
    ProxyResultLocal,
    ProxyResultUnix,
)
from proxyprotocol.tlv import ProxyProtocolSSLTLV, ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from portico.errors import ProxyHeaderError
from portico.proxy import (
    CRC32C,
    MAX_HEADER_SIZE,
    MAX_LINE_SIZE,
    Command,
    Header,
    Tlv,
    Transport,
    crc32c,
    needed,
    parse,
)
from tests.proxy_laws import check, received_in_steps

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
PORTS = st.integers(0, 65535)
IPV4 = st.ip_addresses(v=4)
IPV6 = st.one_of(
    st.ip_addresses(v=6), st.ip_addresses(v=4).map(lambda host: IPv6Address(f"::ffff:{host}"))
)


# --- headers ----------------------------------------------------------------------------


def tcp4_lines() -> st.SearchStrategy[bytes]:
    return st.builds("PROXY TCP4 {} {} {} {}\r\n".format, IPV4, IPV4, PORTS, PORTS).map(str.encode)


def tcp6_lines() -> st.SearchStrategy[bytes]:
    spellings = st.one_of(
        IPV6.map(str),
        IPV6.map(lambda host: host.exploded.upper()),
        IPV6.map(lambda host: socket.inet_ntop(socket.AF_INET6, host.packed)),
    )
    lines = st.builds("PROXY TCP6 {} {} {} {}\r\n".format, spellings, spellings, PORTS, PORTS)
    # From Python 3.13 on, an exploded address may end in dots: nobody's spelling, and too long.
    return lines.map(str.encode).filter(lambda line: len(line) <= MAX_LINE_SIZE)


def unknown_lines() -> st.SearchStrategy[bytes]:
    rests = st.binary(max_size=MAX_LINE_SIZE - 16).filter(lambda rest: b"\n" not in rest)
    return st.builds(b"PROXY UNKNOWN %b\r\n".__mod__, rests)


def lines() -> st.SearchStrategy[bytes]:
    return st.one_of(tcp4_lines(), tcp6_lines(), unknown_lines(), st.just(b"PROXY UNKNOWN\r\n"))


def tlvs() -> st.SearchStrategy[list[Tlv]]:
    """TLVs of any type whose value may be anything."""
    kinds = st.one_of(
        st.sampled_from([0x01, 0x02, 0x04, 0x05, 0x30]), st.integers(0x40, 0xFF), st.just(0)
    )
    plain = st.builds(Tlv, kinds, st.binary(max_size=128))
    inner = st.lists(st.builds(Tlv, st.integers(0x21, 0x28), st.binary(max_size=40)), max_size=4)
    tls = st.builds(
        lambda client, verify, inner: Tlv(
            0x20, bytes([client]) + verify.to_bytes(4) + packed(inner)
        ),
        st.integers(0, 255),
        st.sampled_from([0, 1, 2**32 - 1]),
        inner,
    )
    return st.lists(st.one_of(plain, tls), max_size=6)


def packed(tlvs: list[Tlv]) -> bytes:
    return b"".join(bytes([kind]) + len(value).to_bytes(2) + value for kind, value in tlvs)


@st.composite
def binary_headers(draw: st.DrawFn) -> bytes:
    """Headers of version 2, about half of them with a checksum."""
    kind, size = draw(
        st.sampled_from([(0x11, 12), (0x12, 12), (0x21, 36), (0x22, 36), (0x31, 216), (0x32, 216)])
    )
    addresses = draw(st.binary(min_size=size, max_size=size))
    before, behind = draw(tlvs()), draw(tlvs())

    def header(sums: list[Tlv]) -> bytes:
        block = addresses + packed(before + sums + behind)
        return SIGNATURE + bytes([0x21, kind]) + len(block).to_bytes(2) + block

    if draw(st.booleans()):
        return header([])
    right = crc32c(header([Tlv(CRC32C, bytes(4))]))
    return header([Tlv(CRC32C, right.to_bytes(4))])


@st.composite
def skipped_headers(draw: st.DrawFn) -> bytes:
    """Headers of version 2 of which only the size counts."""
    command, kind = draw(
        st.one_of(
            st.tuples(st.just(0x20), st.integers(0, 255)),
            st.tuples(st.just(0x21), st.sampled_from([0x00, 0x01, 0x02, 0x10, 0x20, 0x30])),
        )
    )
    block = draw(st.binary(max_size=300))
    return SIGNATURE + bytes([command, kind]) + len(block).to_bytes(2) + block


HEADERS = st.one_of(lines(), binary_headers(), skipped_headers())


@st.composite
def damaged(draw: st.DrawFn, headers: st.SearchStrategy[bytes]) -> bytes:
    """A header with a few places changed, taken out or put in."""
    data = bytearray(draw(headers))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = at + draw(st.integers(0, 2))
        data[at:end] = draw(
            st.one_of(st.binary(max_size=2), st.sampled_from([b" ", b":", b".", b"0", b"\r\n"]))
        )
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def read(data: bytes) -> Header:
    header = parse(data)
    assert header is not None
    return header


# --- laws -------------------------------------------------------------------------------


@given(HEADERS, st.binary(max_size=40))
def test_any_cut_of_the_stream_gives_the_same_header(data: bytes, rest: bytes) -> None:
    header = read(data)
    assert header.size == len(data)
    for end in range(len(data)):
        assert parse(data[:end]) is None
    for end in range(len(rest) + 1):
        assert parse(data + rest[:end]) == header


@given(HEADERS, st.binary(max_size=40))
def test_who_takes_what_is_needed_takes_nothing_of_the_handlers(data: bytes, rest: bytes) -> None:
    assert received_in_steps(data + rest) == data


@given(HEADERS, st.data())
def test_it_does_not_matter_that_less_comes_than_is_needed(
    data: bytes, draw: st.DataObject
) -> None:
    taken = b""
    while parse(taken) is None:
        step = draw.draw(st.integers(1, needed(taken)))
        taken = data[: len(taken) + step]
    assert taken == data


@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(b"PROXY ".__add__, st.binary(max_size=120)),
        st.builds(SIGNATURE.__add__, st.binary(max_size=300)),
        st.builds((SIGNATURE + b"\x21\x11").__add__, st.binary(max_size=300)),
        damaged(HEADERS),
    )
)
def test_any_bytes_are_a_header_or_its_beginning_or_an_error(data: bytes) -> None:
    check(data)


@given(damaged(st.one_of(tcp4_lines(), tcp6_lines())))
@example(b"PROXY TCP6 1:2:3:4:5:6:1.")
@example(b"PROXY TCP6 ::1:2")
@example(b"PROXY TCP6 :")
def test_a_line_is_incomplete_only_if_it_can_be_completed(data: bytes) -> None:
    """So an error comes as early as it can: no peer is waited for in vain."""
    data = data[: MAX_LINE_SIZE - 30]  # so that there is room for the rest
    while not _is_incomplete(data):
        data = data[:-1]
    assert any(_is_header(data + rest) for rest in rests_of_lines(data))


def rests_of_lines(data: bytes) -> Iterator[bytes]:
    """What completes a line that begins with `data`, if anything does: one of these.

    The first bytes of a damaged line may also be those of version 2.
    """
    local = SIGNATURE + b"\x20\0\0\0"
    starts = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN\r\n", local)
    heads = [start[len(data) :] for start in starts if start.startswith(data)] or [b""]
    fields = [b"", b"0", b":", b"::", b".0", b"0.0", b".0.0", b"0.0.0", b".0.0.0", b"0.0.0.0"]
    hosts = [b"", b" ::", b" 0.0.0.0"]
    ends = [b"", b"\n", b"\r\n", b" 0\r\n", b" 0 0\r\n"]
    return map(b"".join, product(heads, fields, hosts, ends))


def _is_header(data: bytes) -> bool:
    try:
        return parse(data) is not None
    except ProxyHeaderError:
        return False


def _is_incomplete(data: bytes) -> bool:
    try:
        return parse(data) is None
    except ProxyHeaderError:
        return False


@given(st.integers(MAX_HEADER_SIZE - 16 + 1, 65535), st.binary(min_size=2, max_size=2))
def test_a_header_that_would_be_too_long_is_never_waited_for(size: int, kind: bytes) -> None:
    assert not _is_header(SIGNATURE + kind + size.to_bytes(2) + bytes(size))
    assert not _is_incomplete(SIGNATURE + kind + size.to_bytes(2))


@given(IPV6, PORTS)
def test_an_ipv6_address_is_spelt_as_by_a_socket(host: IPv6Address, port: int) -> None:
    # Addresses that are IPv4-compatible, which RFC 4291 deprecated, are spelt differently by
    # different systems.
    assume(not 0xFFFF < int(host) < 2**32)
    spelling = socket.inet_ntop(socket.AF_INET6, host.packed)
    line = f"PROXY TCP6 {host.exploded} :: {port} 0\r\n"
    assert read(line.encode()).source == (spelling, port, 0, 0)
    block = host.packed + bytes(16) + port.to_bytes(2) + bytes(2)
    assert read(SIGNATURE + b"\x21\x21\x00\x24" + block).source == (spelling, port, 0, 0)


# --- another implementation -------------------------------------------------------------

PATHS = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=108)
PROTOCOLS = st.sampled_from([socket.SOCK_STREAM, socket.SOCK_DGRAM])


def told() -> st.SearchStrategy[ProxyProtocolTLV]:
    """What a proxy says beside the addresses."""
    asciis = st.none() | st.text(st.characters(max_codepoint=127), max_size=20)
    tls = st.builds(
        ProxyProtocolSSLTLV,
        has_ssl=st.just(value=True),
        has_cert_conn=st.booleans(),
        has_cert_sess=st.booleans(),
        verified=st.booleans(),
        version=asciis,
        cipher=asciis,
        cn=st.none() | st.text(max_size=20),
    )
    return st.builds(
        ProxyProtocolTLV,
        alpn=st.none() | st.binary(max_size=20),
        authority=st.none() | st.text(max_size=20),
        unique_id=st.none() | st.binary(max_size=128),
        ssl=st.none() | tls,
    )


def results() -> st.SearchStrategy[ProxyResult]:
    ends4, ends6 = st.tuples(IPV4, PORTS), st.tuples(IPV6, PORTS)
    return st.one_of(
        st.builds(ProxyResultIPv4, ends4, ends4, protocol=PROTOCOLS, tlv=told()),
        st.builds(ProxyResultIPv6, ends6, ends6, protocol=PROTOCOLS, tlv=told()),
        st.builds(ProxyResultUnix, PATHS, PATHS, protocol=PROTOCOLS, tlv=told()),
    )


def ends(header: Header) -> tuple[object, object]:
    """The addresses of a header as the other implementation has them."""

    def end(address: object) -> object:
        if isinstance(address, tuple):
            host = IPv6Address(address[0]) if len(address) == 4 else IPv4Address(address[0])
            return host, address[1]
        return address

    return end(header.source), end(header.destination)


@given(results())
def test_what_another_implementation_writes_is_read_in_version_2(result: ProxyResult) -> None:
    header = read(ProxyProtocolV2().pack(result))
    assert (header.version, header.command) == (2, Command.PROXY)
    assert ends(header) == (result.source, result.dest)
    is_stream = header.transport in {Transport.TCP4, Transport.TCP6, Transport.UNIX_STREAM}
    assert is_stream == (result.protocol is socket.SOCK_STREAM)
    assert dict(header.tlvs) == dict(result.tlv)
    assert (header.alpn, header.authority) == (result.tlv.alpn, result.tlv.authority)
    assert (header.unique_id or b"") == result.tlv.unique_id
    theirs = result.tlv.ssl
    if header.tls is None:
        assert not theirs.has_ssl
    else:
        showed = theirs.has_cert_conn or theirs.has_cert_sess
        assert header.tls.verified == (theirs.verified and showed)
        assert (header.tls.version, header.tls.cipher) == (theirs.version, theirs.cipher)
        assert header.tls.cn == theirs.cn


@given(st.builds(ProxyResultLocal, tlv=told()))
def test_a_local_connection_of_another_implementation_has_no_addresses(result: ProxyResult) -> None:
    data = ProxyProtocolV2().pack(result)
    assert read(data) == Header(2, Command.LOCAL, Transport.UNSPEC, None, None, (), len(data))


@given(results().filter(lambda result: not isinstance(result, ProxyResultUnix)))
def test_what_another_implementation_writes_is_read_in_version_1(result: ProxyResult) -> None:
    header = read(ProxyProtocolV1().pack(result))
    assert (header.version, header.command, header.tlvs) == (1, Command.PROXY, ())
    assert ends(header) == (result.source, result.dest)


@given(st.one_of(tcp4_lines(), tcp6_lines(), damaged(st.one_of(tcp4_lines(), tcp6_lines()))))
def test_another_implementation_reads_the_same_from_any_line_that_is_read(data: bytes) -> None:
    try:
        header = parse(data)
    except ProxyHeaderError:
        return
    if header is not None:
        theirs = ProxyProtocolV1().unpack(data[: header.size])
        assert ends(header) == (theirs.source, theirs.dest)
