"""Say where an address is, in the terms of the system.

Owns the pair of an address, as a person writes it, and of what a socket is bound to.  Asks nobody:
`portico.listener` finds the place of an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from portico.address import BoundAddress, from_socket_name

if TYPE_CHECKING:
    import socket

SocketName: TypeAlias = "tuple[Any, ...] | str | bytes"
"""What ``bind`` takes and ``getsockname`` returns; its shape depends on the family."""

WILDCARDS: Final = ("0.0.0.0", "::")  # noqa: S104  # compared
"""The hosts that stand for every address of their family."""


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

    def overlaps(self, other: Place) -> bool:
        """Say whether two sockets cannot both be here and there.

        A place with port 0 is nowhere yet; one that is bound has the name that its socket says.
        """
        if self.path is not None and other.path is not None:
            return self.path.absolute() == other.path.absolute()
        if self.address.scheme.socket_type != other.address.scheme.socket_type:
            return False
        if not (isinstance(self.name, tuple) and isinstance(other.name, tuple)):
            return self.name == other.name
        if self.name[1] != other.name[1]:
            return False
        if self.family == other.family and self.name == other.name:
            return True
        has_both = self.dual_stack or other.dual_stack
        is_any = not {self.name[0], other.name[0]}.isdisjoint(WILDCARDS)
        return is_any and (has_both or self.family == other.family)
