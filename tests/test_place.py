"""Which places exclude each other."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from portico.address import parse
from portico.listener import resolve

OVERLAPPING = (
    ("tcp://127.0.0.1:9", "tls://127.0.0.1:9"),
    ("tcp://127.0.0.1:9", "tcp://0.0.0.0:9"),
    ("unix:echo", "unix-datagram:{here}/echo"),
    ("unix:@echo", "unix:@echo"),
)
APART = (
    ("tcp://127.0.0.1:9", "tcp://127.0.0.1:10"),
    ("tcp://127.0.0.1:9", "tcp://127.0.0.2:9"),
    ("tcp://127.0.0.1:9", "udp://127.0.0.1:9"),
    ("tcp://127.0.0.1:9", "tcp://[::]:9"),
    ("tcp://127.0.0.1:9", "unix:echo"),
    ("unix:@echo", "unix:@other"),
)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(*pair, True) for pair in OVERLAPPING] + [(*pair, False) for pair in APART],
)
def test_two_places_overlap_if_a_socket_in_one_keeps_another_out(
    one: str, other: str, expected: bool
) -> None:
    here = os.fspath(Path.cwd())
    first, second = (resolve(parse(each.format(here=here))) for each in (one, other))
    assert first.overlaps(second) is second.overlaps(first) is expected


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is IPv4 alone")
def test_a_place_of_both_families_overlaps_each() -> None:
    both = resolve(parse("tcp://:9"))
    assert both.overlaps(resolve(parse("tcp://127.0.0.1:9")))
    assert resolve(parse("tcp://[::1]:9")).overlaps(both)
