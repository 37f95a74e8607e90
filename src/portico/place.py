"""Say where an address is, in the terms of the system.

Owns the pair of an address, as a person writes it, and of what a socket is bound to.  Asks nobody:
`portico.listener` finds the place of an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from portico.address import BoundAddress, from_socket_name

if TYPE_CHECKING:
    import socket

SocketName: TypeAlias = "tuple[Any, ...] | str | bytes"
"""What ``bind`` takes and ``getsockname`` returns; its shape depends on the family."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an address is, in the terms of the system.

    Attributes:
        address: The address.
        family: The address family of its socket.
        name: What the socket is bound to.
        dual_stack: Whether an IPv6 socket serves IPv4 as well.
    """

    address: BoundAddress
    family: socket.AddressFamily
    name: SocketName
    dual_stack: bool = False

    @property
    def path(self) -> Path | None:
        """The file of a Unix socket; ``None`` if there is none."""
        return Path(self.name) if isinstance(self.name, str) else None

    def address_of(self, name: SocketName) -> BoundAddress:
        """Return the address of a socket that was bound here, port and all."""
        return from_socket_name(self.address.scheme, name, dual_stack=self.dual_stack)
