from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from ipaddress import IPv4Network
from typing import Any

import pytest

from portico.admission import MAX_KNOWN_HOSTS, Admission, AdmissionRules
from portico.errors import SettingError
from portico.events import RefusalReason

PEER = ("192.0.2.1", 50000)
OTHER = ("192.0.2.2", 50000)
NOON = 1000.0
"""An instant, where the instant does not matter."""


def admission(**rules: Any) -> Admission:
    return Admission(AdmissionRules(**rules))


def decisions(of: Admission, *client_addresses: object) -> list[RefusalReason | None]:
    return [of.decide(client_address, NOON) for client_address in client_addresses]


# --- rules ------------------------------------------------------------------------------

LIMIT = "1 or more, or None for no limit"
RATE = "a number of connections a second above 0, or None for no limit"
BURST = "1 to 1000000, or None for one second's"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_connections", 0, LIMIT),
        ("max_connections", -1, LIMIT),
        ("max_connections", 1.5, LIMIT),
        ("max_connections", True, LIMIT),
        ("max_connections", "10", LIMIT),
        ("max_connections_per_peer", 0, LIMIT),
        ("accept_rate", 0, RATE),
        ("accept_rate", -0.5, RATE),
        ("accept_rate", math.nan, RATE),
        ("accept_rate", math.inf, RATE),
        ("accept_rate", 5e-324, RATE),
        ("accept_rate", 10**400, RATE),
        ("accept_rate", True, RATE),
        ("accept_rate", "10", RATE),
        ("accept_burst", 0, BURST),
        ("accept_burst", 1_000_001, BURST),
        ("accept_burst", 2.0, BURST),
        ("accept_burst", 5, "accept_rate beside it"),
        ("allowed_networks", "::1", "several networks, such as ['::1']"),
        ("denied_networks", "::1", "several networks, such as ['::1']"),
    ],
)
def test_a_rule_out_of_its_range_is_told_what_would_be_right(
    name: str, value: object, expected: str
) -> None:
    with pytest.raises(SettingError) as caught:
        admission(**{name: value})
    assert str(caught.value) == f"{name}={value!r}: expected {expected}"


def test_a_wrong_network_is_named() -> None:
    with pytest.raises(SettingError, match=r"denied_networks='10.0.0.1/8': expected 10.0.0.0/8"):
        admission(denied_networks=["10.0.0.1/8"])


def test_rules_do_not_change_and_keep_what_they_read() -> None:
    rules = AdmissionRules(allowed_networks=iter(["10.0.0.0/8"]))
    with pytest.raises(FrozenInstanceError):
        rules.max_connections = 5  # type: ignore[misc]  # what is tested
    for _ in range(2):
        assert rules.allowed_networks is not None
        assert list(rules.allowed_networks) == [IPv4Network("10.0.0.0/8")]
        assert Admission(rules).decide(PEER, NOON) is RefusalReason.NOT_ALLOWED


# --- numbers ----------------------------------------------------------------------------


def test_without_rules_everyone_may_come() -> None:
    of = admission()
    assert decisions(of, *[PEER] * 1000, "", None, (1, 2)) == [None] * 1003
    assert of.active == 1003
    assert not of.is_full


def test_no_more_come_than_there_are_places() -> None:
    of = admission(max_connections=2)
    assert decisions(of, PEER, OTHER, PEER) == [None, None, RefusalReason.TOO_MANY]
    assert (of.active, of.is_full) == (2, True)
    of.leave(OTHER)
    assert (of.active, of.is_full) == (1, False)
    assert decisions(of, OTHER, "") == [None, RefusalReason.TOO_MANY]


def test_one_peer_does_not_take_every_place() -> None:
    of = admission(max_connections_per_peer=2)
    third = RefusalReason.TOO_MANY_OF_PEER
    assert decisions(of, PEER, ("192.0.2.1", 1), PEER, OTHER) == [None, None, third, None]
    of.leave(PEER)
    assert decisions(of, PEER, PEER) == [None, third]


@pytest.mark.parametrize(
    ("host", "same", "another"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1"),
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ("fe80::1", "fe80::2%eth0", "fe80:0:0:1::1"),
        ("::1", "::2", "0.0.0.0"),
    ],
)
def test_a_peer_is_an_ipv4_address_or_an_ipv6_network(host: str, same: str, another: str) -> None:
    of = admission(max_connections_per_peer=1)
    first, second, third = ((name, 1, 0, 0) for name in (host, same, another))
    assert decisions(of, first, second, third) == [None, RefusalReason.TOO_MANY_OF_PEER, None]
    of.leave(second)  # the place belongs to the peer, whichever of its addresses
    assert decisions(of, first) == [None]


@pytest.mark.parametrize("client_address", ["", "/run/client.sock", b"\0name", None])
def test_a_unix_peer_is_not_counted_as_a_peer(client_address: object) -> None:
    of = admission(max_connections_per_peer=1, max_connections=3)
    assert decisions(of, *[client_address] * 3) == [None] * 3
    assert decisions(of, client_address) == [RefusalReason.TOO_MANY]
    for _ in range(3):
        of.leave(client_address)
    assert of.active == 0


def test_nobody_leaves_who_was_not_admitted() -> None:
    of = admission(max_connections_per_peer=2)
    with pytest.raises(AssertionError):
        of.leave(PEER)
    assert decisions(of, PEER) == [None]
    with pytest.raises(AssertionError):
        of.leave(OTHER)
    assert of.active == 1


# --- pace -------------------------------------------------------------------------------


def test_a_burst_comes_at_once_and_then_one_at_a_time() -> None:
    of = admission(accept_rate=4, accept_burst=2)
    fast = RefusalReason.TOO_FAST
    came = [of.decide(PEER, now) for now in (0.0, 0.0, 0.0, 0.125, 0.25, 0.25, 0.5, 0.75)]
    assert came == [None, None, fast, fast, None, fast, None, None]


def test_a_quiet_time_fills_no_more_than_one_burst() -> None:
    of = admission(accept_rate=1, accept_burst=3)
    assert of.decide(PEER, 0.0) is None
    came = [of.decide(PEER, 1e9) for _ in range(4)]
    assert came == [None, None, None, RefusalReason.TOO_FAST]


@pytest.mark.parametrize(("rate", "burst"), [(2.5, 3), (0.25, 1), (1, 1)])
def test_a_burst_is_that_of_a_second_unless_it_is_set(rate: float, burst: int) -> None:
    of = admission(accept_rate=rate)
    assert decisions(of, *[PEER] * (burst + 1)) == [None] * burst + [RefusalReason.TOO_FAST]


def test_the_first_may_come_whatever_the_clock_says() -> None:
    """A monotonic clock may begin anywhere, below zero included."""
    for now in (-1e6, 0.0, 1e6):
        assert admission(accept_rate=1).decide(PEER, now) is None


def test_who_is_refused_for_another_reason_uses_up_nothing() -> None:
    of = admission(accept_rate=1, max_connections=1)
    assert of.decide(PEER, 0.0) is None
    assert of.decide(PEER, 1.0) is RefusalReason.TOO_MANY
    of.leave(PEER)
    assert of.decide(PEER, 1.0) is None


# --- networks ---------------------------------------------------------------------------


def test_only_those_of_allowed_networks_may_come() -> None:
    of = admission(allowed_networks=["192.0.2.0/24", "::1"])
    came = decisions(of, PEER, ("::1", 1, 0, 0), ("::ffff:192.0.2.9", 1, 0, 0))
    assert came == [None] * 3
    strangers = decisions(of, ("198.51.100.1", 1), ("::2", 1, 0, 0))
    assert strangers == [RefusalReason.NOT_ALLOWED] * 2
    assert of.active == 3


def test_those_of_denied_networks_may_not_come_even_if_they_are_allowed() -> None:
    of = admission(allowed_networks=["192.0.2.0/24"], denied_networks=["192.0.2.1"])
    assert decisions(of, PEER, OTHER) == [RefusalReason.DENIED, None]


def test_an_empty_set_of_allowed_networks_allows_nobody() -> None:
    assert decisions(admission(allowed_networks=[]), PEER) == [RefusalReason.NOT_ALLOWED]


@pytest.mark.parametrize("client_address", ["", "/run/client.sock", b"\0name", None])
def test_a_unix_peer_may_come_whatever_the_networks(client_address: object) -> None:
    of = admission(allowed_networks=["192.0.2.0/24"], denied_networks=["::/0", "0.0.0.0/0"])
    assert decisions(of, client_address) == [None]


@pytest.mark.parametrize("client_address", [(), (1, 1024), ("lo", 3), ("name", 1)])
def test_a_peer_of_an_unknown_family_comes_only_where_all_may(client_address: object) -> None:
    of = admission(allowed_networks=["0.0.0.0/0", "::/0"])
    assert decisions(of, client_address) == [RefusalReason.NOT_ALLOWED]
    assert decisions(admission(denied_networks=["::/0"]), client_address) == [None]


def test_room_is_asked_for_last() -> None:
    """Who makes room for a newcomer makes none for one who may not come anyway."""
    of = admission(
        max_connections=1,
        max_connections_per_peer=1,
        accept_rate=1,
        accept_burst=2,
        denied_networks=["192.0.2.9"],
    )
    assert of.decide(PEER, 0.0) is None
    assert of.decide(("192.0.2.9", 1), 0.0) is RefusalReason.DENIED
    assert of.decide(PEER, 0.0) is RefusalReason.TOO_MANY_OF_PEER
    assert of.decide(OTHER, 0.0) is RefusalReason.TOO_MANY
    of.leave(PEER)
    assert of.decide(OTHER, 0.0) is None
    assert of.decide(PEER, 0.0) is RefusalReason.TOO_FAST


# --- bounds -----------------------------------------------------------------------------


def test_what_is_remembered_of_strangers_is_bounded() -> None:
    of = admission(max_connections_per_peer=1, denied_networks=["2001:db8:1::/48"])
    peers = [(f"2001:db8:{number & 1}:{number:x}::1", 1, 0, 0) for number in range(10_000)]
    for number, peer in enumerate(peers):
        assert of.decide(peer, NOON) is (RefusalReason.DENIED if number & 1 else None)
        assert len(of._known) <= MAX_KNOWN_HOSTS
        assert len(of._counts) <= MAX_KNOWN_HOSTS + of.active
    for peer in peers[::2]:
        of.leave(peer)
    assert of.active == 0
    assert not any(count.open for count in of._counts.values())
