"""Look whether an address can be had, without taking it from anybody.

A port is bound for a moment and not listened on, so that nobody connects.  The file of a Unix
socket is left as it is.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Final

from portico.address import Address, InternetAddress, Scheme, UnixAddress
from portico.diagnosis import explained, is_socket
from portico.doctor.facts import AddressFacts, Occupancy
from portico.errors import ListenerError
from portico.holders import Holder, find_holders
from portico.listener import resolve
from portico.place import Place
from portico.socketfile import is_stale

OUR_NAME: Final = "portico"
"""The name of the program that a service of ours runs as."""


def look_at(address: Address) -> AddressFacts:
    """Say whether a listener could be opened at an address."""
    try:
        place = resolve(address)
    except ListenerError as error:
        return AddressFacts(address, Occupancy.REFUSED, str(error))
    return replace(_of_place(place), place=place)


def _of_place(place: Place) -> AddressFacts:
    """Say whether a socket could be bound there."""
    address = place.address
    if place.path is not None and is_socket(place.path):
        return _of_file(place, place.path)
    try:
        _try(place)
    except ListenerError as error:
        if error.errno == errno.EADDRINUSE and (held := _held_by_ours(place)) is not None:
            return held
        return AddressFacts(address, Occupancy.REFUSED, str(error))
    return AddressFacts(address, Occupancy.FREE)


def _of_file(place: Place, path: Path) -> AddressFacts:
    """Say whose the socket at a path is."""
    address, kind = place.address, place.address.scheme.socket_type
    if is_stale(path, kind):
        return AddressFacts(address, Occupancy.STALE)
    held = _held_by_ours(place)
    if held is not None:
        return held
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            with explained(place):
                probe.bind(place.name)  # never succeeds: there is a file
        except ListenerError as error:
            return AddressFacts(address, Occupancy.REFUSED, str(error))
    return AddressFacts(address, Occupancy.FREE)  # pragma: no cover  # it went away meanwhile


def _held_by_ours(place: Place) -> AddressFacts | None:
    holders = find_holders(
        place.family, place.address.scheme.socket_type, place.name, dual_stack=place.dual_stack
    )
    if holders and all(each.command == OUR_NAME for each in holders):
        return AddressFacts(place.address, Occupancy.OURS, _named(holders))
    return None


def _named(holders: tuple[Holder, ...]) -> str:
    numbers = ", ".join(str(holder.pid) for holder in holders)
    return f"process{'es' * (len(holders) > 1)} {numbers}"


def _try(place: Place) -> None:
    """Do what opening a listener needs, and leave nothing.

    Raises:
        ListenerError: It would not be opened.
    """
    with explained(place):
        if place.path is not None:
            _require_folder(place.path)
            return
        with socket.socket(place.family, place.address.scheme.socket_type) as probe:
            if place.address.scheme in {Scheme.TCP, Scheme.TLS}:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if place.family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not place.dual_stack)
            probe.bind(place.name)


def _require_folder(path: Path) -> None:
    """Look whether a socket could be made at a path.

    Raises:
        OSError: What bind would raise.
    """
    if path.exists():
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    folder = path.absolute().parent
    folder.stat()
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def is_known(address: object) -> bool:
    """Say whether an address is one that a listener has yet to be opened at."""
    return isinstance(address, InternetAddress | UnixAddress)
