"""What holds for any bytes at the beginning of a stream.

The property tests and the fuzz target (`fuzz/proxy.py`) share it.
"""

from __future__ import annotations

from portico.errors import ProxyHeaderError
from portico.proxy import MAX_HEADER_SIZE, Command, Header, Transport, needed, parse


def check(data: bytes) -> None:
    """Read `data` as a header, and raise an `AssertionError` if a law is broken.

    The rest of what it may raise is a fault too: only a `ProxyHeaderError` is expected.
    """
    try:
        header = parse(data)
    except ProxyHeaderError as error:
        _check_refusal(data, error)
        return
    if header is None:
        _check_incomplete(data)
    else:
        _check_header(data, header)


def _check_refusal(data: bytes, error: ProxyHeaderError) -> None:
    """More bytes mend nothing, and the message is text of ours."""
    assert str(error).isascii()
    for more in (b"\n", b"\r\n", b"\0" * MAX_HEADER_SIZE):
        assert not _is_accepted(data + more)


def _check_incomplete(data: bytes) -> None:
    assert needed(data) >= 1
    assert len(data) + needed(data) <= MAX_HEADER_SIZE


def _check_header(data: bytes, header: Header) -> None:
    assert 15 <= header.size <= min(len(data), MAX_HEADER_SIZE)
    whole = data[: header.size]
    assert parse(whole) == header
    assert parse(whole + b"\r\nPROXY ") == header
    assert needed(whole) == 0
    for end in {0, 1, header.size // 2, header.size - 2, header.size - 1}:
        assert parse(whole[:end]) is None
    assert received_in_steps(data) == whole
    assert (header.source is None) == (header.transport is Transport.UNSPEC)
    assert (header.destination is None) == (header.source is None)
    assert header.command is Command.PROXY or header.source is None
    assert sum(3 + len(value) for _, value in header.tlvs) < header.size
    for told in (header.alpn, header.authority, header.unique_id, header.tls):
        repr(told)  # reading it raises nothing


def received_in_steps(data: bytes) -> bytes:
    """Take from a stream what `needed` asks for, until the header is complete."""
    taken = b""
    while parse(taken) is None:
        step = needed(taken)
        assert step >= 1
        taken = data[: len(taken) + step]
    return taken


def _is_accepted(data: bytes) -> bool:
    try:
        return parse(data) is not None
    except ProxyHeaderError:
        return False
