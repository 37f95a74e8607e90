"""What is known of a machine and of what is to run on it.

Owns the names of the facts.  Every one may be unknown (``None``), because a container hides some of
its machine; a rule says nothing of what is not known.  Leaves reading them to `machine`, `papers`,
`occupancy`, `files` and `probe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from portico.address import Address
from portico.place import Place


@dataclass(frozen=True, slots=True)
class Ceiling:
    """How much of something there may be, and how much there is.

    Attributes:
        most: ``None`` for no limit.
        used: What others, and this process, have of it now.
        source: Who says so, such as ``"pids.max of the container"``.
    """

    most: int | None = None
    used: int = 0
    source: str = ""

    @property
    def room(self) -> int | None:
        """What is left; ``None`` for no limit."""
        return None if self.most is None else max(self.most - self.used, 0)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What the system's own settings are, those of the network namespace included.

    Attributes:
        release: The version, such as ``(6, 1)``.
        somaxconn: Connections that any listener may hold for its process.
        max_syn_backlog: Handshakes under way that a listener may have, where there are no cookies.
        syncookies: Whether more than those are answered with cookies.
        ephemeral_ports: The first and the last port of those that the system gives to clients.
        reserved_ports: Those of them that it leaves alone, as ranges.
        time_wait: TCP connections that are closed and remembered for a minute.
        time_wait_reuse: Whether a client may take such a port again: 0 never, 1 always, 2 on
            loopback.
        conntrack: Connections that the firewall remembers.
        has_exclusive_epoll: Whether of several that wait for a listener only one is woken.
        has_tcp_info: Whether a connection can be asked for its counters.
    """

    release: tuple[int, int] | None = None
    somaxconn: int | None = None
    max_syn_backlog: int | None = None
    syncookies: bool | None = None
    ephemeral_ports: tuple[int, int] | None = None
    reserved_ports: tuple[tuple[int, int], ...] = ()
    time_wait: int | None = None
    time_wait_reuse: int | None = None
    conntrack: Ceiling | None = None
    has_exclusive_epoll: bool = True
    has_tcp_info: bool = True


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What this process may have.

    Attributes:
        descriptors: How many it may have open, once it has asked for all it may ask for; below 0
            for no limit.
        tasks: Threads and processes, by each ceiling that there is.
        processors: Those that it may run on.
        quota: Processors' time that its container may use, in processors; ``None`` for no limit.
        memory: Bytes of memory, of the container or else of the machine.
    """

    descriptors: int | None = None
    tasks: tuple[Ceiling, ...] = ()
    processors: int | None = None
    quota: float | None = None
    memory: Ceiling | None = None


@dataclass(frozen=True, kw_only=True)
class Account:
    """Whom the processes become, once the listeners are open.

    Attributes:
        words: Who that is, as it was asked for.
        problem: Why they cannot; empty if they can.
        uid: The number of the user.
        gid: The number of the group.
        groups: The other groups of the user.
    """

    words: str = ""
    problem: str = ""
    uid: int = 0
    gid: int = 0
    groups: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """One certificate of a chain.

    Attributes:
        subject: Whose it is, in a form that can be compared.
        issuer: Who says so.
        name: Whose it is, in a form that can be read.
        not_before: When it begins to be valid, in seconds since 1970.
        not_after: When it ends to be.
    """

    subject: str
    issuer: str
    name: str
    not_before: float
    not_after: float


@dataclass(frozen=True, kw_only=True)
class Papers:
    """What a service shows to its clients, or asks of them.

    Attributes:
        certificate: The file of the certificate.
        key: The file of its key.
        problem: Why they cannot be used; empty if they can.
        key_mode: The permission bits of the key's file.
        key_owner: The numbers of its user and its group.
        chain: The certificates in the file, in its order; empty if they could not be read.
        authorities: Those that clients' certificates have to come from.
        moment: When this was looked at, in seconds since 1970.
    """

    certificate: str
    key: str
    moment: float
    problem: str = ""
    key_mode: int | None = None
    key_owner: tuple[int, int] | None = None
    chain: tuple[Certificate, ...] = ()
    authorities: tuple[Certificate, ...] = ()


class Occupancy(Enum):
    """Whether an address can be had."""

    FREE = auto()
    STALE = auto()
    """A dead server has left its file, which is replaced."""
    OURS = auto()
    """A portico has it: perhaps the service that is asked about."""
    REFUSED = auto()
    """It cannot."""


@dataclass(frozen=True, slots=True)
class AddressFacts:
    """Whether an address can be had, and why not.

    Attributes:
        address: Which.
        occupancy: Whether.
        reason: Why not, or who has it.
        place: Where it is; ``None`` if that is not known.
    """

    address: Address
    occupancy: Occupancy
    reason: str = ""
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Whether a file can be had that a setting names.

    Attributes:
        setting: Which.
        path: The file.
        problem: Why not; empty if it can.
        holder: Who has it, where one process alone may.
    """

    setting: str
    path: str
    problem: str = ""
    holder: str = ""


@dataclass(frozen=True, slots=True)
class Stall:
    """A handler that held its event loop.

    Attributes:
        place: The file and line that it was at.
        duration: Seconds, at the least.
    """

    place: str
    duration: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of serving a target for a moment.

    Attributes:
        clients: Requests that were sent.
        answered: Those that ended.
        stalls: Each place once.
        failures: What handlers raised, each kind once.
        problem: Why there was no trial; empty if there was.
    """

    clients: int = 0
    answered: int = 0
    stalls: tuple[Stall, ...] = ()
    failures: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """What importing a target does.

    Attributes:
        problem: Why it cannot be served; empty if it can.
        threads: The names of the threads that it has started.
        trial: What came of a trial; ``None`` if none was asked for.
    """

    problem: str = ""
    threads: tuple[str, ...] = ()
    trial: Trial | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is known.

    Attributes:
        kernel: The system's settings.
        allowance: What this process may have.
        account: Whom it becomes; ``None`` if it stays who it is.
        papers: For each service that has a certificate, by its name.
        addresses: For each address, in the order of the services.
        files: Those that the processes have.
        owners: What is wrong with the owners of Unix sockets, by the service; empty if nothing.
        targets: By the target.
        packages: Whether a package that portico can use is installed, by its name.
    """

    kernel: Kernel = field(default_factory=Kernel)
    allowance: Allowance = field(default_factory=Allowance)
    account: Account | None = None
    papers: Mapping[str, Papers] = field(default_factory=dict[str, Papers])
    addresses: tuple[AddressFacts, ...] = ()
    files: tuple[FileFacts, ...] = ()
    owners: Mapping[str, str] = field(default_factory=dict[str, str])
    targets: Mapping[str, TargetFacts] = field(default_factory=dict[str, TargetFacts])
    packages: Mapping[str, bool] = field(default_factory=dict[str, bool])
