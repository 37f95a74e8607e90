"""Open the listeners of a service: all of them, or none.

Owns what is known of a listener before anybody knows by whom it is served, and what listeners are
called.  Leaves opening one to `portico.listener`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from portico.address import Address, DescriptorAddress
from portico.errors import ListenerError
from portico.listener import OpenListener, open_listener
from portico.settings import Settings


@dataclass(frozen=True, slots=True)
class Opening:
    """Where a listener is to be opened, before anybody knows by whom it is served.

    Attributes:
        address: Where.
        settings: Its backlog, and who may use the file of a Unix socket.
    """

    address: Address
    settings: Settings


def open_listeners(openings: Sequence[Opening]) -> list[OpenListener]:
    """Open a listener for each of several openings, or none.

    Raises:
        ListenerError: An address cannot be had.
        SettingError: There is no such owner of a Unix socket.
    """
    _refuse_shared([each.address for each in openings])
    accesses = [each.settings.socket_access() for each in openings]
    with ExitStack() as closing:
        opened: list[OpenListener] = []
        for each, access in zip(openings, accesses, strict=True):
            backlog = each.settings.backlog
            opened.append(open_listener(each.address, backlog=backlog, access=access))
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
