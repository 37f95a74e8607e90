"""Find out which processes hold an address that is in use.

Reads what Linux tells about its sockets in ``/proc`` and changes nothing.  Answers with nothing
where there is no ``/proc``, or where the holder belongs to a user whose processes cannot be read.

Source: proc(5), proc_pid_net(5) (the columns of ``tcp``, ``udp`` and ``unix``) and
proc_pid_fd(5) (``socket:[INODE]``).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final, TypeAlias

PROC: Final = Path("/proc")

_LISTENING: Final = "0A"
"""The state of a listener in ``/proc/net/tcp``."""
_ACCEPTS: Final = 0x10000
"""The flag of a listener in ``/proc/net/unix``."""

IPAddress: TypeAlias = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A process that has a socket open."""

    pid: int
    command: str
    """The name of its program, without its arguments, which are nobody else's business."""


def find_holders(
    family: socket.AddressFamily,
    kind: socket.SocketKind,
    name: tuple[Any, ...] | str | bytes,
    *,
    dual_stack: bool = False,
    proc: Path = PROC,
) -> tuple[Holder, ...]:
    """Return the processes whose socket stands in the way of binding one here.

    Args:
        family: The address family of the socket that could not be bound.
        kind: Streams or datagrams.
        name: What it could not be bound to, as ``getsockname`` would write it.
        dual_stack: Whether it was to serve IPv4 as well as IPv6.
        proc: Where ``/proc`` is.
    """
    if family == socket.AF_UNIX:
        assert not isinstance(name, tuple)
        return _holders_of(_unix_inodes(name, proc), proc)
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    # The own family first: only what cannot be explained by it comes from the other one.
    tables = [protocol, f"{protocol}6"] if family == socket.AF_INET else [f"{protocol}6"]
    if dual_stack:
        tables.append(protocol)
    for table in tables:
        if inodes := _internet_inodes(table, str(name[0]), int(name[1]), proc):
            return _holders_of(inodes, proc)
    return ()


def _internet_inodes(table: str, host: str, port: int, proc: Path) -> set[str]:
    """Return the inodes of the sockets at a port whose addresses overlap with `host`."""
    wanted = _plain(IPv6Address(host) if ":" in host else IPv4Address(host))
    listening: set[str] = set()
    others: set[str] = set()
    for line in _lines(proc / "net" / table):
        fields = line.split()
        address, _, port_digits = fields[1].partition(":")
        taken = _plain(_read_address(address))
        overlaps = taken == wanted or taken.is_unspecified or wanted.is_unspecified
        if int(port_digits, 16) == port and overlaps:
            (listening if fields[3] == _LISTENING else others).add(fields[9])
    # Connections of a listener have its port too, and may be in other hands than the listener.
    return listening or others


def _unix_inodes(name: str | bytes, proc: Path) -> set[str]:
    """Return the inodes of the sockets bound to a path or to an abstract name."""
    if isinstance(name, bytes):
        wanted = {name.replace(b"\0", b"@").decode("utf-8", "surrogateescape")}
    else:
        wanted = {name, str(Path(name).absolute())}
    listening: set[str] = set()
    others: set[str] = set()
    for line in _lines(proc / "net" / "unix"):
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] in wanted:
            (listening if int(fields[3], 16) & _ACCEPTS else others).add(fields[6])
    return listening or others


def _lines(table: Path) -> Iterator[str]:
    """Yield the lines of a table, without its heading; none if it cannot be read."""
    with suppress(OSError):
        yield from table.read_text("utf-8", "surrogateescape").splitlines()[1:]


def _read_address(digits: str) -> IPAddress:
    """Read an address as the kernel prints it: words in the byte order of the machine."""
    words = (int(digits[start : start + 8], 16) for start in range(0, len(digits), 8))
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _plain(address: IPAddress) -> IPAddress:
    """Return an address without its interface, and the IPv4 address inside an IPv6 one."""
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))


def _holders_of(inodes: Collection[str], proc: Path) -> tuple[Holder, ...]:
    """Return the processes that have one of these sockets open, as far as they can be read."""
    links = {f"socket:[{inode}]" for inode in inodes}
    holders: list[Holder] = []
    for process in proc.glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or belongs to somebody else
            if any(_links_to(descriptor, links) for descriptor in (process / "fd").iterdir()):
                command = (process / "comm").read_text("utf-8", "replace").strip()
                holders.append(Holder(int(process.name), command))
    return tuple(sorted(holders))


def _links_to(descriptor: Path, targets: Collection[str]) -> bool:
    with suppress(OSError):  # it was closed meanwhile
        return str(descriptor.readlink()) in targets
    return False
