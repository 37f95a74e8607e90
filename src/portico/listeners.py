"""Keep the listeners of a program, each opened once, however often its settings are read.

Owns which listener belongs to which address: those that are open, and those that a predecessor has
left; and when one that is open is changed for other settings.  Leaves opening one to
`portico.listener`.

Source: listen(2), which may be called again for another backlog.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from portico.console import say
from portico.errors import ListenerError
from portico.handover import Heirloom
from portico.listener import OpenListener, resolve
from portico.opening import Opening, open_listeners
from portico.place import Place
from portico.socketfile import SocketFile


class Listeners:
    """The listeners of all generations, each opened once.

    Args:
        heirlooms: Those of a predecessor.
    """

    def __init__(self, heirlooms: Iterable[Heirloom] = ()) -> None:
        self._heirlooms = list(heirlooms)
        self._files: dict[int, Heirloom] = {}  # of the listeners that are still a predecessor's
        self._open: list[tuple[str, OpenListener]] = []

    def gather(self, wanted: Sequence[Opening]) -> tuple[OpenListener, ...]:
        """Return a listener for each place: one that is open already, or another one.

        One that is open stays as it is until `settle`: those who want it may never come to serve.

        Raises:
            PorticoError: One cannot be had; none is opened then.
        """
        spare = list(self._open)
        found: list[OpenListener | None] = [_take(spare, each) for each in wanted]
        found = [
            self._inherit(each) if opened is None else opened
            for each, opened in zip(wanted, found, strict=True)
        ]
        pairs = list(zip(wanted, found, strict=True))
        opened = iter(self._opened([each for each, known in pairs if known is None], spare))
        gathered: list[OpenListener] = []
        for each, known in pairs:
            listener = next(opened) if known is None else known
            if known is None:
                self._open.append((str(each.address), listener))
            gathered.append(listener)
        return tuple(gathered)

    def settle(self, wanted: Sequence[Opening], gathered: Sequence[OpenListener]) -> None:
        """Have listeners be as their settings want them, now that those serve who have these.

        Who may use the file of a Unix socket, and the backlog.  What the system refuses is said.

        Args:
            wanted: What was asked for.
            gathered: What `gather` has returned for it.
        """
        for each, listener in zip(wanted, gathered, strict=True):
            if listener.file is not None:
                _open_again(listener.file, each)
            _listen_again(listener, each.backlog)

    def keep(self, used: Iterable[OpenListener]) -> list[OpenListener]:
        """Close those that nobody uses, and return them."""
        kept = {id(each) for each in used}
        gone = [each for _, each in self._open if id(each) not in kept]
        self._open = [pair for pair in self._open if id(pair[1]) in kept]
        for each in gone:
            each.close()
        return gone

    def take_over(self) -> list[str]:
        """Own what was inherited and is used, and let the rest go; returns its addresses."""
        for each in self._heirlooms:
            each.close()
        self._heirlooms.clear()
        taken: list[str] = []
        for text, listener in self._open:
            heirloom = self._files.pop(id(listener), None)
            if heirloom is not None:
                listener.take_over(heirloom.file)
                taken.append(text)
        return taken

    def hand_over(self, taken: Sequence[str]) -> list[OpenListener]:
        """Leave those to another process that it has taken; returns them."""
        left, handed = list(taken), list[OpenListener]()
        for text, listener in self._open:
            if text in left:
                left.remove(text)
                listener.hand_over()
                handed.append(listener)
        return handed

    def close(self) -> None:
        """Close all, and what nobody asked for.  Callable again."""
        for _, listener in self._open:
            listener.close()
        for heirloom in self._heirlooms:
            heirloom.close()
        self._open, self._heirlooms = [], []

    def _opened(
        self, wanted: Sequence[Opening], spare: Sequence[tuple[str, OpenListener]]
    ) -> list[OpenListener]:
        """Open those that nobody has; says of a place in use that the service has it otherwise."""
        try:
            return open_listeners(wanted)
        except ListenerError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            had = [(text, _bound(listener)) for text, listener in spare]
            had += [(each.address, each.place()) for each in self._heirlooms]
            for each in wanted:
                place = resolve(each.address)
                for text, other in had:
                    if place.overlaps(other):
                        reason = (
                            f"cannot listen on {each.address}: this service has it as {text}; "
                            "write it so, or stop the service first"
                        )
                        raise ListenerError(reason) from error
            raise

    def _inherit(self, opening: Opening) -> OpenListener | None:
        """Open what a predecessor had at an address."""
        address: Any = opening.address
        for each in self._heirlooms:
            if each.address == str(address):
                self._heirlooms.remove(each)
                listener = each.open(address)
                self._files[id(listener)] = each
                self._open.append((each.address, listener))
                return listener
        return None


def _take(spare: list[tuple[str, OpenListener]], opening: Opening) -> OpenListener | None:
    """Take a listener of an address out of those that are left."""
    for at, (text, listener) in enumerate(spare):
        if text == str(opening.address):
            del spare[at]
            return listener
    return None


def _bound(listener: OpenListener) -> Place:
    """Return the place of a listener, port and all."""
    return replace(listener.place, name=listener.socket.getsockname())


def _open_again(file: SocketFile, opening: Opening) -> None:
    """Have the file of a Unix socket be open to those whom its settings name, and to no others."""
    try:
        file.open_to(opening.access)
    except OSError as error:
        reason = error.strerror or str(error)
        say(
            f"cannot change who may use {opening.address}: {reason}; its file keeps its mode and "
            "its owners until the service is stopped and started"
        )


def _listen_again(listener: OpenListener, backlog: int) -> None:
    """Have a listener that is open hold so many clients from now on."""
    address = listener.place.address
    if not address.scheme.is_datagram and not listener.is_lent:
        with suppress(OSError):
            listener.socket.listen(backlog)
