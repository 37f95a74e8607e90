"""Decide who may come in.

Owns the rules and what they count: open connections, those of each peer, and the pace of new
ones.  Never touches a connection, so it leaves refusing, waiting and closing to the acceptor;
instants are arguments.

What the rules answer:

- a flood of connections: `AdmissionRules.max_connections`, below the limit of descriptors;
- one peer that takes every place: `AdmissionRules.max_connections_per_peer`;
- a burst that starts more handlers than the machine can: `AdmissionRules.accept_rate`;
- those who have no business here: `AdmissionRules.allowed_networks` and `denied_networks`.

A peer is an IPv4 address, or the 64 bits of an IPv6 address that name its network: a
subscriber gets at least that much (RFC 6177), so counting addresses would count nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from math import ceil, isfinite
from types import NoneType
from typing import Any, Final, TypeAlias

from portico.errors import SettingError
from portico.events import RefusalReason
from portico.networks import IPAddress, IPNetwork, Networks, ip_address_of

MAX_KNOWN_HOSTS: Final = 4096
"""Hosts whose verdict is remembered; at this number all are forgotten and it starts again.

Reading an address takes ten times as long as looking it up, and peers come back.  The bound
holds against a peer that has a network of IPv6 addresses to show: it makes us keep less than 1 MiB.
"""

MAX_BURST: Final = 1_000_000
"""The largest burst: far above any backlog, so that a larger one is a mistake."""

_UNIX_SHAPES: Final = (str, bytes, NoneType)
"""What a client address of a Unix socket can be: a path, an abstract name, of a datagram none."""

Peer: TypeAlias = str | int


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """Who may come in; with the defaults, everyone.

    Attributes:
        max_connections: Connections that are open at once; ``None`` for no limit.
        max_connections_per_peer: Those of one IPv4 address, or one IPv6 network of 64 bits;
            ``None`` for no limit.  A Unix peer has no address, and is not counted.
        accept_rate: Connections a second, on average; ``None`` for no limit.
        accept_burst: Connections that may come at once after a quiet time; ``None`` for those
            of one second.
        allowed_networks: Networks and addresses from which one may come; ``None`` for all.  A
            Unix peer may always come: the mode of the socket's file guards it.  Peers of any
            other family may not.
        denied_networks: Those from which one may not, even if they are allowed.

    Raises:
        SettingError: A value is out of its range; the message says what would be right.
    """

    max_connections: int | None = None
    max_connections_per_peer: int | None = None
    accept_rate: float | None = None
    accept_burst: int | None = None
    allowed_networks: Iterable[str | IPNetwork] | None = None
    denied_networks: Iterable[str | IPNetwork] = ()

    def __post_init__(self) -> None:
        _check_limit("max_connections", self.max_connections)
        _check_limit("max_connections_per_peer", self.max_connections_per_peer)
        _check_rate(self.accept_rate)
        _check_burst(self.accept_burst, self.accept_rate)
        # Read once: an iterator would be empty the second time.
        if self.allowed_networks is not None:
            allowed = Networks.read("allowed_networks", self.allowed_networks)
            object.__setattr__(self, "allowed_networks", allowed)
        denied = Networks.read("denied_networks", self.denied_networks)
        object.__setattr__(self, "denied_networks", denied)


class _Count:
    """How many connections of one peer are open."""

    __slots__ = ("open",)

    def __init__(self) -> None:
        self.open = 0


_Verdict: TypeAlias = tuple[RefusalReason | None, _Count | None]
"""Why a host may not come in, and the count of its peer, if that is counted."""


class Admission:
    """Applies rules to connections as they come and go.

    Not safe between threads: its owner lets one call in at a time.

    Attributes:
        rules: The rules.
        active: Connections that were admitted and have not left.
        limit: How many there may be at the most.
    """

    rules: AdmissionRules
    active: int
    limit: int

    def __init__(self, rules: AdmissionRules) -> None:
        self.rules = rules
        self.active = 0
        self.limit = _limit(rules.max_connections)
        self._peer_limit = _limit(rules.max_connections_per_peer)
        self._counts: dict[Peer, _Count] = {}  # of the hosts that are known, and of who is here
        self._known: dict[object, _Verdict] = {}  # by the host of an address, never a single sign
        self._allowed = (
            None
            if rules.allowed_networks is None
            else Networks.read("allowed_networks", rules.allowed_networks)
        )
        self._denied = Networks.read("denied_networks", rules.denied_networks)
        self._counts_peers = rules.max_connections_per_peer is not None
        self._knows_peers = (
            self._counts_peers or self._allowed is not None or bool(self._denied.networks)
        )
        # The bucket is one instant: when it would be full if nobody came.  Each connection moves
        # that on by an interval; it is empty when the instant is a whole burst ahead.
        self._interval, self._patience = 0.0, 0.0
        if rules.accept_rate is not None:
            burst = rules.accept_burst or ceil(rules.accept_rate)
            self._interval = 1 / rules.accept_rate
            self._patience = (burst - 1) / rules.accept_rate
        self._full_at = -float("inf")

    @property
    def is_full(self) -> bool:
        """Whether `max_connections` are open."""
        return self.active >= self.limit

    def decide(self, client_address: Any, now: float) -> RefusalReason | None:
        """Admit and count a connection, or say why not.

        What concerns the peer is asked first and whether there is room last: who may not come in
        is told so even if there is none.

        Args:
            client_address: What `accept` gave, of whatever family.
            now: The instant, in seconds of a clock that never goes back.

        Returns:
            ``None``: it is in and takes a place until `leave`.  Otherwise the reason, and
            nothing has changed.
        """
        # Every connection comes through here: what is not a call costs half of what one does.
        count = None
        if self._knows_peers:
            try:
                refusal, count = self._known[client_address[0]]
            except (LookupError, TypeError):  # the first of its host, or of a shape without one
                refusal, count = self._look_at(client_address)
            if refusal is not None:
                return refusal
            if count is not None and count.open >= self._peer_limit:
                return RefusalReason.TOO_MANY_OF_PEER
        if self._interval:
            full_at = self._full_at
            if full_at - now > self._patience:
                return RefusalReason.TOO_FAST
            if self.active >= self.limit:
                return RefusalReason.TOO_MANY
            self._full_at = (full_at if full_at > now else now) + self._interval  # noqa: FURB136
        elif self.active >= self.limit:
            return RefusalReason.TOO_MANY
        self.active += 1
        if count is not None:
            count.open += 1
        return None

    def take_over(self, client_address: Any) -> None:
        """Count a connection that is open already, whatever the rules say of it.

        Args:
            client_address: As for `decide`.
        """
        if self._counts_peers:
            _, count = self._look_at(client_address)
            if count is not None:
                count.open += 1
        self.active += 1

    def leave(self, client_address: Any) -> None:
        """Give the place of an admitted connection back.

        Args:
            client_address: The one that `decide` was asked with.
        """
        assert self.active, "nobody leaves who was not admitted"
        if self._counts_peers:
            try:
                _, count = self._known[client_address[0]]
            except (LookupError, TypeError):  # its host was forgotten, or it has none
                _, count = self._look_at(client_address)
            if count is not None:
                assert count.open, "no peer leaves more often than it was admitted"
                count.open -= 1
        self.active -= 1

    def take_back(self, client_address: Any) -> None:
        """Undo a decision to admit, as if nobody had asked.

        Args:
            client_address: The one that `decide` was asked with, just before.
        """
        Admission.leave(self, client_address)
        self._full_at -= self._interval

    def _look_at(self, client_address: Any) -> _Verdict:
        """Judge a peer, and remember the verdict of its host."""
        if isinstance(client_address, _UNIX_SHAPES):
            return None, None
        address = ip_address_of(client_address)
        if address is None:
            return (None if self._allowed is None else RefusalReason.NOT_ALLOWED), None
        refusal = self._judge(address)
        if len(self._known) >= MAX_KNOWN_HOSTS:
            self._known.clear()
            self._counts = {peer: count for peer, count in self._counts.items() if count.open}
        count = self._counts.setdefault(_peer(address), _Count()) if self._counts_peers else None
        self._known[client_address[0]] = refusal, count
        return refusal, count

    def _judge(self, address: IPAddress) -> RefusalReason | None:
        if address in self._denied:
            return RefusalReason.DENIED
        if self._allowed is not None and address not in self._allowed:
            return RefusalReason.NOT_ALLOWED
        return None


def peer_of(client_address: Any) -> Peer | None:
    """Return what counts as one peer; ``None`` for who has no IP address."""
    if isinstance(client_address, _UNIX_SHAPES):
        return None
    address = ip_address_of(client_address)
    return None if address is None else _peer(address)


def _peer(address: IPAddress) -> Peer:
    """Return what counts as one peer; text and number, so that the two never meet."""
    return str(address) if isinstance(address, IPv4Address) else int(address) >> 64


def _limit(setting: int | None) -> int:
    return sys.maxsize if setting is None else setting


def _check_limit(name: str, value: int | None) -> None:
    if value is not None and not (_is_whole(value) and value >= 1):
        raise SettingError(name, value, "1 or more, or None for no limit")


def _check_rate(rate: float | None) -> None:
    if rate is not None and not _is_rate(rate):
        expected = "a number of connections a second above 0, or None for no limit"
        raise SettingError("accept_rate", rate, expected)


def _is_rate(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return False
    try:
        # With a rate so small that the time of a burst is infinite, nothing would be decided.
        return isfinite(value) and isfinite(MAX_BURST / value)
    except OverflowError:  # a whole number beyond all that a float can be
        return False


def _check_burst(burst: int | None, rate: float | None) -> None:
    if burst is None:
        return
    if not (_is_whole(burst) and 1 <= burst <= MAX_BURST):
        raise SettingError("accept_burst", burst, f"1 to {MAX_BURST}, or None for one second's")
    if rate is None:
        raise SettingError("accept_burst", burst, "accept_rate beside it")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
