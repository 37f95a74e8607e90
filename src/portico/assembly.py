"""Put a server together: an engine in front of a family, for a listener that is open already.

Owns which settings become which attributes of a server.  Leaves what they mean to
`portico.settings`, and serving to the class that results.
"""

from __future__ import annotations

import pkgutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from portico.address import BoundAddress, Scheme
from portico.engines import ENGINES
from portico.events import ListenerBound, emit
from portico.families import TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from portico.listener import OpenListener
from portico.places import SharedPlaces, SharingMixIn
from portico.settings import AUTO, Settings, connection_limit

if TYPE_CHECKING:
    from portico.certificates import Certificates

    _Base: TypeAlias = TCPServer
else:
    _Base = object

FAMILIES: Final[Mapping[Scheme, type[TCPServer]]] = {
    Scheme.TCP: TCPServer,
    Scheme.TLS: TCPServer,
    Scheme.UDP: UDPServer,
    Scheme.UNIX: UnixStreamServer,
    Scheme.UNIX_DATAGRAM: UnixDatagramServer,
}
"""The family that serves each scheme."""

OF_EVERY_KIND: Final = ("accept_rate", "accept_burst", "allowed_networks", "denied_networks")
"""Settings of every server under the same name."""

OF_CONNECTIONS: Final = (
    "max_connections",
    "max_connections_per_peer",
    "when_full",
    "farewell",
    "handshake_timeout",
    "idle_timeout",
    "request_timeout",
    "minimum_rate",
    "proxy_protocol",
)
"""Those of servers whose requests are connections: a datagram has no place and no time."""


class AdoptingMixIn(_Base):
    """Serve on a listener that is open already.

    Owns `server_bind`, `server_activate` and the closing of the listener; extends `shutdown` and
    `fileno`.
    """

    opened: OpenListener
    """The listener."""

    leaves_rest: bool = False
    """Whether a drain leaves those who wait in the backlog to another process that accepts them."""

    on_left: Callable[[], object] | None = None
    """Called when the server accepts nobody any more; perhaps more than once."""

    _on_round: Callable[[], object] | None = None
    """Called in the serving loop whenever it comes round; see `portico.acceptor.round_of`."""

    _has_stopped = False

    @property
    def shares_listener(self) -> bool:
        """Whether other processes accept from it, too."""
        return self.opened.is_lent

    @property
    def address(self) -> BoundAddress:
        """The address that was bound, with the port that the system chose."""
        return self.opened.place.address_of(self.server_address)

    def shutdown(self) -> None:
        """End the loop; what comes after it may have no listener."""
        super().shutdown()
        self._has_stopped = True

    def fileno(self) -> int:
        """Return the descriptor of the listener; -1 when nobody is accepted from it any more."""
        return -1 if self._has_stopped and self.leaves_rest else super().fileno()

    def server_bind(self) -> None:
        """Take the listener over."""
        self.socket.close()  # every server makes one for itself
        self.socket = self.opened.socket
        self.server_address = self.socket.getsockname()
        if ListenerBound.subscribers:
            emit(ListenerBound(self, self.server_address))

    def server_activate(self) -> None:
        """Do nothing: it listens."""

    def _close_listener(self) -> None:
        self.opened.close()
        super()._close_listener()
        if self.on_left is not None:
            self.on_left()


def server_class(
    opened: OpenListener,
    settings: Settings,
    certificates: Certificates | None = None,
    places: SharedPlaces | None = None,
) -> type[AdoptingMixIn]:
    """Put together the class that serves a listener: an engine, in front of a family.

    Its requests do not outlive the program, nor hold up its end.

    Args:
        opened: The listener.
        settings: With a number in the place of each `AUTO`.
        certificates: For an address that speaks TLS.
        places: Those that it shares with other processes; ``None`` for none.
    """
    scheme = opened.place.address.scheme
    family = FAMILIES[scheme]
    mixin = ENGINES[settings.engine]
    engines = (pkgutil.resolve_name(mixin),) if mixin else ()
    prefix = "".join(kind.__name__.removesuffix("MixIn") for kind in engines)
    names = OF_EVERY_KIND if scheme.is_datagram else OF_EVERY_KIND + OF_CONNECTIONS
    attributes: dict[str, Any] = {
        "__module__": __name__,
        "opened": opened,
        "address_family": opened.place.family,
        "daemon_threads": True,
        "block_on_close": False,
        "request_queue_size": settings.backlog,
        "drain_timeout": settings.drain_timeout,
        "ssl_context": certificates if scheme is Scheme.TLS else None,
    }
    attributes |= {name: getattr(settings, name) for name in names}
    attributes |= settings.engine_attributes()
    if scheme.is_datagram:
        # The listener waits, for the sake of handlers that reply by it; the acceptor does not:
        # another process that has it may be faster.
        attributes["receive_flags"] = socket.MSG_DONTWAIT
    mixins: tuple[type[Any], ...] = (*engines, AdoptingMixIn)
    if places is not None and not scheme.is_datagram:
        attributes["shared_places"] = places
        mixins = (SharingMixIn, *mixins)
    bases: Any = (*mixins, family)
    return type(f"{prefix}{family.__name__}", bases, attributes)


def share_places(
    asked: Settings, settled: Settings, descriptors: int, workers: int
) -> tuple[Settings, int]:
    """Say how many connections one worker may have, and how many all of them.

    Args:
        asked: The settings of a server.
        settled: The same, with a number in the place of each `AUTO`.
        descriptors: How many one process may have open for this server; below 0 for no limit.
        workers: How many there are.

    Returns:
        The settings of the server in one worker, which has descriptors of its own to be bounded
        by, and the limit for all.
    """
    most = settled.max_connections
    assert isinstance(most, int), "it is settled"
    if asked.max_connections == AUTO:
        return settled, most * workers
    own = min(most, connection_limit(descriptors, most))
    return replace(settled, max_connections=own), most


def load_certificates(settings: Settings) -> Certificates | None:
    """Load what the settings name; ``None`` if they name no certificate.

    Raises:
        CertificateError: A file cannot be used.
    """
    if settings.cert is None:
        return None
    from portico.certificates import Certificates  # noqa: PLC0415  # it stands on ssl

    wanted: Any = settings.client_certificates
    if wanted is None:
        wanted = "none" if settings.client_ca is None else "required"
    return Certificates(
        settings.cert, settings.key, client_ca=settings.client_ca, client_certificates=wanted
    )
