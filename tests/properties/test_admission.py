from __future__ import annotations

from collections import Counter
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from portico.admission import Admission, AdmissionRules
from portico.events import RefusalReason

HOSTS = [
    "192.0.2.1",
    "::ffff:192.0.2.1",
    "192.0.2.2",
    "198.51.100.1",
    "2001:db8::1",
    "2001:db8::8000:0:0:2",
    "2001:db8:0:1::1",
    "fe80::1%eth0",
]
NETWORKS = ["192.0.2.0/24", "192.0.2.2", "::/0", "2001:db8::/64", "fe80::/10", "0.0.0.0/0"]
PEERS = [*((host, 50000) for host in HOSTS), "", b"\0name", None]

LIMITS = st.none() | st.integers(1, 5)
# Sums of these are exact, so that the model may ask for equality.
RATES = st.none() | st.sampled_from([0.25, 1.0, 4.0])
PAUSES = st.sampled_from([0.0, 0.125, 0.25, 1.0, 5.0])
SETS = st.lists(st.sampled_from(NETWORKS), max_size=3)


def address_of(peer: Any) -> Any:
    """The IP address that a peer counts as, found the long way."""
    if not isinstance(peer, tuple):
        return None
    address = ip_address(peer[0].partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def counted_as(peer: Any) -> object:
    address = address_of(peer)
    if isinstance(address, IPv6Address):
        return ip_network((address, 64), strict=False)
    return address


def is_in(peer: Any, networks: list[str]) -> bool:
    return any(address_of(peer) in ip_network(network) for network in networks)


class Doorkeeper(RuleBasedStateMachine):
    """Peers come and go, while a model that remembers everything says what is right."""

    @initialize(
        max_connections=LIMITS,
        per_peer=LIMITS,
        rate=RATES,
        burst=st.none() | st.integers(1, 4),
        allowed=st.none() | SETS,
        denied=SETS,
    )
    def begin(
        self,
        max_connections: int | None,
        per_peer: int | None,
        rate: float | None,
        burst: int | None,
        allowed: list[str] | None,
        denied: list[str],
    ) -> None:
        self.settings = AdmissionRules(
            max_connections=max_connections,
            max_connections_per_peer=per_peer,
            accept_rate=rate,
            accept_burst=burst if rate else None,
            allowed_networks=allowed,
            denied_networks=denied,
        )
        self.allowed, self.denied = allowed, denied
        self.admission = Admission(self.settings)
        self.inside: list[Any] = []
        self.now = 0.0
        self.tokens = float(self.burst)
        self.admitted_at: list[float] = []

    @property
    def burst(self) -> int:
        rate = self.settings.accept_rate or 0
        return self.settings.accept_burst or max(1, int(rate))

    @rule(pause=PAUSES)
    def time_passes(self, pause: float) -> None:
        self.now += pause
        rate = self.settings.accept_rate or 0.0
        self.tokens = min(float(self.burst), self.tokens + pause * rate)

    @rule(peer=st.sampled_from(PEERS))
    def a_peer_comes(self, peer: Any) -> None:
        expected = self.expected(peer)
        assert self.admission.decide(peer, self.now) is expected
        if expected is None:
            self.inside.append(peer)
            self.tokens -= 1
            self.admitted_at.append(self.now)

    def expected(self, peer: Any) -> RefusalReason | None:
        """Every rule, by counting those inside."""
        settings = self.settings
        of_peer = [one for one in self.inside if counted_as(one) == counted_as(peer)]
        has_address = address_of(peer) is not None
        broken = {
            RefusalReason.DENIED: has_address and is_in(peer, self.denied),
            RefusalReason.NOT_ALLOWED: (
                has_address and self.allowed is not None and not is_in(peer, self.allowed)
            ),
            RefusalReason.TOO_MANY_OF_PEER: (
                has_address and len(of_peer) == settings.max_connections_per_peer
            ),
            RefusalReason.TOO_FAST: settings.accept_rate is not None and self.tokens < 1,
            RefusalReason.TOO_MANY: len(self.inside) == settings.max_connections,
        }
        return next((reason for reason, is_broken in broken.items() if is_broken), None)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def a_peer_leaves(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.inside) - 1))
        self.admission.leave(self.inside.pop(at))

    @rule()
    def what_is_known_is_forgotten(self) -> None:
        """As it happens when many strangers came; it changes no decision."""
        self.admission._known.clear()

    @invariant()
    def nobody_is_counted_who_is_not_inside(self) -> None:
        assert self.admission.active == len(self.inside)
        assert self.admission.is_full == (len(self.inside) == self.settings.max_connections)
        peers = Counter(counted_as(peer) for peer in self.inside if address_of(peer) is not None)
        counts = peers.values() if self.settings.max_connections_per_peer else []
        counted = [count.open for count in self.admission._counts.values() if count.open]
        assert sorted(counted) == sorted(counts)
        assert max(counts, default=0) <= (
            self.settings.max_connections_per_peer or len(self.inside)
        )

    @invariant()
    def no_window_holds_more_than_a_burst_and_the_rate(self) -> None:
        rate = self.settings.accept_rate
        if rate is None:
            return
        for first, begin in enumerate(self.admitted_at):
            for count, end in enumerate(self.admitted_at[first:], start=1):
                assert count <= self.burst + rate * (end - begin)


TestDoorkeeper = Doorkeeper.TestCase


@given(
    st.floats(0.001, 1e6),
    st.integers(1, 20),
    st.lists(st.floats(0, 100), min_size=1, max_size=60),
)
def test_no_window_holds_more_than_its_share_at_any_rate(
    rate: float, burst: int, pauses: list[float]
) -> None:
    """With instants as odd as they come; the slack is that of a float's last digits."""
    of = Admission(AdmissionRules(accept_rate=rate, accept_burst=burst))
    now, admitted = 1e5, []
    for pause in pauses:
        now += pause / rate
        if of.decide(None, now) is None:
            admitted.append(now)
    assert admitted
    for first, begin in enumerate(admitted):
        for count, end in enumerate(admitted[first:], start=1):
            assert count <= burst + rate * (end - begin) + rate * 1e-9 + 1e-9
