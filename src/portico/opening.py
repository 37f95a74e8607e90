"""Open the listeners of a service: all of them, or none.

Owns what is known of a listener before anybody knows by whom it is served, and what listeners are
called.  Leaves opening one to `portico.listener`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from portico.address import Address, DescriptorAddress
from portico.errors import ListenerError
from portico.listener import OpenListener, open_listener
from portico.settings import Settings
from portico.socketfile import FileAccess


@dataclass(frozen=True, slots=True)
class Opening:
    """Where a listener is to be opened, before anybody knows by whom it is served.

    Attributes:
        address: Where.
        backlog: Connections that the system holds for it.
        access: Who may use the file of a Unix socket.
    """

    address: Address
    backlog: int
    access: FileAccess

    @classmethod
    def of(cls, address: Address, settings: Settings) -> Self:
        """Return what settings want at an address.

        Names are looked up here, once: when it comes to opening, or to changing what is open, who
        tells them may be out of reach.

        Raises:
            SettingError: There is no such owner of a Unix socket.
        """
        return cls(address, settings.backlog, settings.socket_access())


def open_listeners(openings: Sequence[Opening]) -> list[OpenListener]:
    """Open a listener for each of several openings, or none.

    Raises:
        ListenerError: An address cannot be had.
    """
    _refuse_shared([each.address for each in openings])
    with ExitStack() as closing:
        opened: list[OpenListener] = []
        for each in openings:
            opened.append(open_listener(each.address, backlog=each.backlog, access=each.access))
            closing.callback(opened[-1].close)
        closing.pop_all()
        return opened


def station_names(listeners: Iterable[OpenListener]) -> list[str]:
    """Return what the stations of listeners are called: by their addresses, each name once."""
    names: list[str] = []
    for each in listeners:
        bound = str(each.place.address_of(each.socket.getsockname()))
        again = sum(name.partition(" ")[0] == bound for name in names)
        names.append(f"{bound} {again + 1}" if again else bound)
    return names


def _refuse_shared(addresses: Sequence[Address]) -> None:
    """Make sure that no inherited socket is two servers': a client would get either of them.

    A socket that is opened here is refused by the system, the second time.
    """
    seen: set[int] = set()
    for each in addresses:
        if isinstance(each, DescriptorAddress):
            if each.descriptor in seen:
                raise ListenerError(
                    f"cannot listen on {each}: in use by this very process; is the address, or "
                    "the name that systemd has for it, given twice?"
                )
            seen.add(each.descriptor)
