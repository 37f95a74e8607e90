"""Say what protects a service: every limit, with a safe default, beside the attack it answers.

Owns the names, the defaults and the ranges of what `portico.serve` and the command line can be
told.  Leaves where the values come from to whoever reads them, and what follows from them to
`portico.service`.  The classes of `socketserver`'s names know nothing of this: their defaults are
`socketserver`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import isnan
from os import PathLike, fspath
from typing import Any, Final, Literal, Self, TypeAlias, TypedDict

from portico.address import Address
from portico.admission import AdmissionRules
from portico.deadlines import Rules, check_limit
from portico.engines import ENGINES
from portico.engines import settings as engine_settings
from portico.errors import SettingError
from portico.gate import read_when_full
from portico.guard import check_timeout
from portico.networks import IPNetwork, Networks
from portico.privileges import MOST_ACCOUNTS, find_gid, find_uid
from portico.socketfile import FileAccess

AUTO: Final = "auto"
"""Stands for a number that is worked out when the service starts."""

Auto: TypeAlias = Literal["auto"]
StrPath: TypeAlias = str | PathLike[str]
NetworkTexts: TypeAlias = Iterable[str | IPNetwork]

RESERVED_SHARE: Final = 4
"""One in how many descriptors is left for other things than connections.

Listeners, logs and loops need a few dozen; a handler that opens a file or asks a database, one more
for a while.  A program whose every handler does sets `Settings.max_connections` itself.
"""

RESERVED_DESCRIPTORS: Final = 32
"""Descriptors that are left in any case: what a service holds before the first client, doubled."""

MOST_CONNECTIONS: Final = 10_000
"""Connections at the most, where the system would allow more: descriptors are not all that one
costs, and where a million of them are allowed, as in many containers, memory ends first."""

MOST_THREADS: Final = 4096
"""The same for an engine with a thread for each: a service of systemd may have 15 % of the
system's process ids as tasks, 4,915 where those are 32,768.

Source: systemd-system.conf(5), ``DefaultTasksMax``; proc_sys_kernel(5), ``pid_max``.
"""

LEAST_OF_PEER: Final = 16
"""Connections that one peer may have in any case: browsers open six to a host, and several may run
behind one address."""

MAX_BACKLOG: Final = 2**31 - 1
"""The largest number that listen(2) takes."""

_MODE: Final = re.compile(r"(?:0o?)?[0-7]{3}")

CLIENT_CERTIFICATES: Final = ("none", "optional", "required")

_NUMBERS: Final = (
    "handshake_timeout",
    "idle_timeout",
    "request_timeout",
    "minimum_rate",
    "drain_timeout",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What protects the servers of one service; each limit is one server's.

    ``None`` means no limit, everywhere.  A value is checked when the settings are made.

    Raises:
        SettingError: A value is outside its range; the message says what would be right.
    """

    engine: str = "threads"
    """What runs the handlers: a key of `portico.engines.ENGINES`."""

    hubs: int | None = None
    """Threads of the green engine at most, each with an event loop; ``None`` for its default."""

    max_workers: int | None = None
    """Threads of the pool engine at most; ``None`` for its default.

    Answers a crowd that starts more handlers than the machine can run: what is beyond them, and
    beyond a short queue, waits in the backlog.
    """

    backlog: int = 1024
    """Connections that the kernel completes and holds until they are accepted.

    Answers a burst: with `socketserver`'s 5, the sixth client of a moment has its first packet
    dropped and tries again after a second (RFC 6298, section 2).  The kernel cuts the number to
    ``net.core.somaxconn``, 4,096 since Linux 5.4.
    """

    socket_mode: int | str = "0600"
    """Who may connect to a Unix socket: the mode of its file, in octal (``"0660"``) or as a number
    (``0o660``).

    Answers the other users of a machine: by default nobody but the owner connects.  Linux asks for
    the permission to write.
    """

    socket_owner: str | int | None = None
    """Whose that file is, by name or number; ``None`` for whoever opens it.  Only root can give it
    away."""

    socket_group: str | int | None = None
    """The same for its group."""

    max_connections: int | Auto | None = AUTO
    """Connections that are open at once at each address.

    Answers a flood of connections, which ends every other use of descriptors in the process: the
    logs, the files of handlers, the next accept(2).  `AUTO` stays below the limit of descriptors,
    by a quarter, shared between the addresses, and is 10,000 at the most, or 4,096 with a thread
    for each.
    """

    when_full: str = "wait"
    """What becomes of a client for whom there is no place.

    ``"wait"`` leaves it in the backlog, so a short crowd loses nobody; ``"refuse"`` closes it after
    a `farewell`; ``"shed"`` closes the connection that has been idle for longest, and so answers
    who fills the places in order to keep them.
    """

    farewell: bytes = b""
    """What a client is sent that is refused because there is no place.  Not over TLS."""

    max_connections_per_peer: int | Auto | None = AUTO
    """Connections of one IPv4 address, or of one IPv6 network of 64 bits; more are refused.

    Answers one peer that takes every place.  `AUTO` is half of `max_connections`, and 16 at the
    least: nobody gets all of them, and a whole office behind one address gets many.  Behind a proxy
    every client has the proxy's address: name it in `proxy_protocol`, or say ``None`` here, since
    half of the places is all there are then.  Peers of Unix sockets have no address, and are not
    counted.
    """

    accept_rate: float | None = None
    """Connections, or datagrams, a second on average; more are refused.

    Answers who connects, and goes, and connects again, each time at the price of a handshake.  Off,
    because no number fits all: after a restart every honest client comes back in the same second,
    and whom a rate refuses is an outage to them.
    """

    accept_burst: int | None = None
    """How many may come at once after a quiet time; ``None`` for those of one second."""

    allowed_networks: NetworkTexts | None = None
    """Networks and addresses from which one may come; ``None`` for all.

    Answers those who have no business here; they are closed before a byte of theirs is read.
    """

    denied_networks: NetworkTexts = ()
    """Those from which one may not, even if they are allowed."""

    handshake_timeout: float | None = 10.0
    """Seconds for the PROXY header and the TLS handshake together.

    Answers the peer that connects and says nothing.  10 s are three retransmissions of a lost
    packet (1, 2 and 4 s: RFC 6298, 2.1 and 5.5) and some time to calculate.
    """

    idle_timeout: float | None = 300.0
    """Seconds that a connection may stay open without a byte in either direction.

    Answers peers that take places and do nothing with them, that do not read what they are sent, or
    that vanished without a word: TCP itself waits for ever on a quiet connection, and asks after
    two hours where keepalive is on (RFC 9293, 3.8.4).  300 s is more than a person pauses, and less
    than the 350 s after which a load balancer such as AWS's forgets a connection.
    """

    request_timeout: float | None = None
    """Seconds that a connection may stay open in all.

    Answers who keeps a handler busy in whatever way.  Off, because a download, a terminal and a
    stream are as long as they are; one question and one answer are not, and their server sets it.
    """

    minimum_rate: float | None = None
    """Bytes a second that a peer has to send while its handler waits.

    Answers the slow drip, a byte every few seconds, which is never idle and never done.  Off,
    because a person who types slowly into a terminal looks like one.
    """

    drain_timeout: float | None = 15.0
    """Seconds that open connections have to finish in when the service stops.

    Answers a stop that never ends because one peer stays, and one that cuts off who was about to be
    answered.  15 s is half of the 30 s that Kubernetes waits before it kills
    (``terminationGracePeriodSeconds``).
    """

    cert: StrPath | None = None
    """The certificate of ``tls://`` addresses, a PEM file; read again when it changes."""

    key: StrPath | None = None
    """Its key; ``None`` if `cert` holds it, too."""

    client_ca: StrPath | None = None
    """The authorities whose client certificates are accepted, a PEM file.

    Answers strangers: who has no certificate does not get as far as a handler.
    """

    client_certificates: str | None = None
    """Whether a client must have one: ``"none"``, ``"optional"`` or ``"required"``; ``None`` for
    ``"required"`` if there is a `client_ca`."""

    proxy_protocol: NetworkTexts | None = None
    """Networks and addresses of the proxies whose PROXY header is believed; ``None`` for none.

    Answers a peer that lies about who it is: a header from elsewhere is not one.
    """

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise SettingError("engine", self.engine, _one_of(self.engine, ENGINES))
        self.engine_attributes()
        _check_backlog(self.backlog)
        # As a text, in which it is told back as it is meant.
        mode = f"{read_mode('socket_mode', self.socket_mode):04o}"
        object.__setattr__(self, "socket_mode", mode)
        for name in ("socket_owner", "socket_group"):
            check_account(name, getattr(self, name))
        for name in ("max_connections", "max_connections_per_peer"):
            _check_limit(name, getattr(self, name))
        for name in _NUMBERS:
            _check_number(name, getattr(self, name))
        if not isinstance(self.farewell, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]  # a program may say anything
            raise SettingError("farewell", self.farewell, "bytes")
        read_when_full(self.when_full)
        rules = AdmissionRules(
            accept_rate=self.accept_rate,
            accept_burst=self.accept_burst,
            allowed_networks=self.allowed_networks,
            denied_networks=self.denied_networks,
        )
        Rules(self.idle_timeout, self.request_timeout, self.minimum_rate)
        check_limit("handshake_timeout", self.handshake_timeout)
        check_timeout("drain_timeout", self.drain_timeout)
        self._check_certificates()
        # Read once: an iterator would be empty the second time.
        object.__setattr__(self, "allowed_networks", rules.allowed_networks)
        object.__setattr__(self, "denied_networks", rules.denied_networks)
        if self.proxy_protocol is not None:
            proxies = Networks.read("proxy_protocol", self.proxy_protocol)
            object.__setattr__(self, "proxy_protocol", proxies)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Make settings of names and values, wherever they come from.

        Raises:
            SettingError: There is no setting of a name, or a value is outside its range.
        """
        names = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in names:
                raise SettingError(name, value, f"the name of a setting: {_one_of(name, names)}")
        return cls(**values)

    def engine_attributes(self) -> dict[str, object]:
        """Return the class attributes that set up the engine.

        Raises:
            SettingError: The engine has no hubs, or no workers, or not so many.
        """
        return engine_settings(self.engine, hubs=self.hubs, max_workers=self.max_workers)

    def socket_access(self) -> FileAccess:
        """Return who may use the file of a Unix socket; asks the system for the names.

        Raises:
            SettingError: There is no such user or group.
        """
        return FileAccess(
            mode=read_mode("socket_mode", self.socket_mode),
            uid=None if self.socket_owner is None else find_uid(self.socket_owner, "socket_owner"),
            gid=None if self.socket_group is None else find_gid(self.socket_group, "socket_group"),
        )

    def check_addresses(self, addresses: Iterable[Address]) -> None:
        """Make sure that there is a certificate for TLS, and TLS for a certificate.

        Raises:
            SettingError: There is not.  A certificate alone may mean that somebody expects TLS
                where there would be none.
        """
        tls = [address for address in addresses if address.scheme.is_tls]
        if tls and self.cert is None:
            raise SettingError("cert", None, f"a certificate (and key, its key) for {tls[0]}")
        if self.cert is not None and not tls:
            raise SettingError("cert", fspath(self.cert), "a tls://HOST:PORT address beside it")

    def resolved(self, descriptors: int, servers: int = 1) -> Self:
        """Return the same with a number in the place of each `AUTO`.

        Args:
            descriptors: How many the process may have open; below 0 for no limit.
            servers: How many share them.
        """
        connections = self.max_connections
        if connections == AUTO:
            most = MOST_THREADS if self.engine == "threads" else MOST_CONNECTIONS
            connections = connection_limit(descriptors, most) // servers or 1
        of_peer = self.max_connections_per_peer
        if of_peer == AUTO:
            of_peer = None if connections is None else peer_limit(int(connections))
        return replace(self, max_connections=connections, max_connections_per_peer=of_peer)

    def _check_certificates(self) -> None:
        for name, path in (("key", self.key), ("client_ca", self.client_ca)):
            if path is not None and self.cert is None:
                raise SettingError(name, fspath(path), "cert beside it, the path of a certificate")
        wanted = self.client_certificates
        if wanted is None:
            return
        if wanted not in CLIENT_CERTIFICATES:
            expected = _one_of(wanted, CLIENT_CERTIFICATES)
            raise SettingError("client_certificates", wanted, expected)
        if wanted != "none" and self.client_ca is None:
            expected = "client_ca beside it, the path of the authorities"
            raise SettingError("client_certificates", wanted, expected)
        if wanted == "none" and self.client_ca is not None:
            expected = "'optional' or 'required', since there is a client_ca"
            raise SettingError("client_certificates", wanted, expected)


class SettingValues(TypedDict, total=False):
    """Settings by name, as `portico.serve` takes them beside ``engine``; see `Settings`."""

    hubs: int | None
    max_workers: int | None
    backlog: int
    socket_mode: int | str
    socket_owner: str | int | None
    socket_group: str | int | None
    max_connections: int | Auto | None
    when_full: str
    farewell: bytes
    max_connections_per_peer: int | Auto | None
    accept_rate: float | None
    accept_burst: int | None
    allowed_networks: NetworkTexts | None
    denied_networks: NetworkTexts
    handshake_timeout: float | None
    idle_timeout: float | None
    request_timeout: float | None
    minimum_rate: float | None
    drain_timeout: float | None
    cert: StrPath | None
    key: StrPath | None
    client_ca: StrPath | None
    client_certificates: str | None
    proxy_protocol: NetworkTexts | None


def connection_limit(descriptors: int, most: int = MOST_CONNECTIONS) -> int:
    """Return how many connections a process may hold that may have so many descriptors.

    Args:
        descriptors: Below 0 for no limit.
        most: The largest answer.
    """
    if descriptors < 0:
        return most
    reserved = max(descriptors // RESERVED_SHARE, RESERVED_DESCRIPTORS)
    return max(1, min(descriptors - reserved, most))


def peer_limit(connections: int) -> int | None:
    """Return how many of so many connections one peer may have; ``None`` for all."""
    limit = max(connections // 2, LEAST_OF_PEER)
    return limit if limit < connections else None


def read_mode(name: str, value: Any) -> int:
    """Read the mode of a file, in octal as a text or as a number.

    Raises:
        SettingError: It is not one.  ``660`` without a prefix is no mode either, since it is not
            the number that was meant.
    """
    if isinstance(value, str) and _MODE.fullmatch(value):
        return int(value, 8)
    if _is_within(value, 0o777):
        return int(value)
    raise SettingError(name, value, 'a mode in octal, such as "0660" or 0o660')


def check_account(name: str, value: Any) -> None:
    """Make sure that a value may name a user or a group, without a look at those there are.

    Raises:
        SettingError: It does not.
    """
    if value is None or (isinstance(value, str) and value.strip()):
        return
    if not _is_within(value, MOST_ACCOUNTS):
        raise SettingError(name, value, f"a name, a number from 0 to {MOST_ACCOUNTS}, or None")


def _check_backlog(value: Any) -> None:
    if not (_is_whole(value) and 1 <= value <= MAX_BACKLOG):
        raise SettingError("backlog", value, "1 or more")


def _check_limit(name: str, value: Any) -> None:
    if value is not None and value != AUTO and not (_is_whole(value) and value >= 1):
        raise SettingError(name, value, f"1 or more, {AUTO!r}, or None for no limit")


def _check_number(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_float(value):
        unit = "bytes a second" if name == "minimum_rate" else "seconds"
        raise SettingError(name, value, f"a number of {unit}, or None for no limit")


def _is_float(value: float) -> bool:
    """Say whether a number is one of those that can be reckoned with."""
    try:
        return not isnan(value)
    except OverflowError:  # a whole number above them all
        return False


def _is_within(value: Any, most: int) -> bool:
    return _is_whole(value) and 0 <= value <= most


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(given: object, words: Iterable[str]) -> str:
    """Name what would be right: the nearest word if there is one, or else all of them."""
    known = list(words)
    nearest = get_close_matches(str(given), known, n=1)
    return repr(nearest[0]) if nearest else f"one of {', '.join(map(repr, known))}"
