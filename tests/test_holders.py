from __future__ import annotations

import os
import socket
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

from portico.holders import Holder, find_holders

IPV4, IPV6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM

LISTEN, ESTABLISHED, UNCONNECTED = "0A", "01", "07"


class Proc:
    """A folder with what Linux would say in /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "net").mkdir()

    def internet(self, table: str, *sockets: tuple[str, int, str, int]) -> None:
        """Write a table of sockets: their own address and port, their state, their inode."""
        lines = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt"]
        for number, (host, port, state, inode) in enumerate(sockets):
            packed = ip_address(host).packed
            words = (packed[start : start + 4] for start in range(0, len(packed), 4))
            digits = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
            remote = "0" * len(digits) + ":0000"
            lines.append(
                f"  {number:2}: {digits}:{port:04X} {remote} {state} 00000000:00000000"
                f" 00:00000000 00000000  1000        0 {inode} 1 0000000000000000 100 0 0 10 0"
            )
        (self.root / "net" / table).write_text("\n".join(lines) + "\n")

    def unix(self, *sockets: tuple[str, bool, int]) -> None:
        """Write the table of Unix sockets: their path, whether they listen, their inode."""
        lines = ["Num       RefCount Protocol Flags    Type St Inode Path"]
        for path, listens, inode in sockets:
            flags = 0x10000 if listens else 0
            line = f"0000000000000000: 00000002 00000000 {flags:08X} 0001 01 {inode} {path}"
            lines.append(line.rstrip())
        text = "\n".join(lines) + "\n"
        (self.root / "net" / "unix").write_text(text, "utf-8", "surrogateescape")

    def process(self, pid: int, command: str, *inodes: int) -> None:
        """Add a process with these sockets open."""
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "comm").write_text(f"{command}\n")
        (folder / "fd" / "0").symlink_to("/dev/null")
        for descriptor, inode in enumerate(inodes, start=3):
            (folder / "fd" / str(descriptor)).symlink_to(f"socket:[{inode}]")


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "::1"),
        ("::1", "::"),
        ("::", "::1"),
        ("fe80::1%4", "fe80::1"),
        # Through an IPv6 socket that serves IPv4 as well.
        ("127.0.0.1", "::"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
@pytest.mark.parametrize(("kind", "table"), [(STREAM, "tcp"), (DATAGRAM, "udp")])
def test_who_holds_a_port_is_found(
    proc: Proc, wanted: str, taken: str, kind: socket.SocketKind, table: str
) -> None:
    state = LISTEN if kind == STREAM else UNCONNECTED
    proc.internet(table + ("6" if ":" in taken else ""), (taken, 9000, state, 77))
    proc.process(12, "redis-server", 76, 77)
    proc.process(13, "bash")
    family, name = (IPV6, (wanted, 9000, 0, 0)) if ":" in wanted else (IPV4, (wanted, 9000))
    assert find_holders(family, kind, name, proc=proc.root) == (Holder(12, "redis-server"),)


@pytest.mark.parametrize(
    ("family", "name", "table", "taken"),
    [
        (IPV4, ("127.0.0.1", 9000), "tcp", ("127.0.0.1", 9001, LISTEN, 77)),
        (IPV4, ("127.0.0.1", 9000), "tcp", ("127.0.0.2", 9000, LISTEN, 77)),
        (IPV4, ("127.0.0.1", 9000), "udp", ("127.0.0.1", 9000, UNCONNECTED, 77)),
        (IPV6, ("::1", 9000, 0, 0), "tcp6", ("::2", 9000, LISTEN, 77)),
        # An IPv6 socket of its own leaves the IPv4 one of another alone.
        (IPV6, ("::", 9000, 0, 0), "tcp", ("127.0.0.1", 9000, LISTEN, 77)),
    ],
)
def test_who_holds_something_else_is_left_out(
    proc: Proc,
    family: socket.AddressFamily,
    name: tuple[object, ...],
    table: str,
    taken: tuple[str, int, str, int],
) -> None:
    proc.internet(table, taken)
    proc.process(12, "redis-server", 77)
    assert find_holders(family, STREAM, name, proc=proc.root) == ()


def test_a_socket_for_both_families_meets_either(proc: Proc) -> None:
    proc.internet("tcp6", ("::1", 1, LISTEN, 76))
    proc.internet("tcp", ("127.0.0.1", 9000, LISTEN, 77))
    proc.process(12, "redis-server", 77)
    found = find_holders(IPV6, STREAM, ("::", 9000, 0, 0), dual_stack=True, proc=proc.root)
    assert found == (Holder(12, "redis-server"),)


def test_a_listener_goes_before_the_connections_at_its_port(proc: Proc) -> None:
    """A connection may have been handed to another process; who has the port is the listener."""
    connection, listener = ("10.0.0.1", 9000, ESTABLISHED, 76), ("0.0.0.0", 9000, LISTEN, 77)
    proc.internet("tcp", connection, listener)
    proc.process(11, "worker", 76)
    proc.process(12, "server", 77)
    assert find_holders(IPV4, STREAM, ("0.0.0.0", 9000), proc=proc.root) == (Holder(12, "server"),)


def test_connections_are_what_is_left_when_nobody_listens(proc: Proc) -> None:
    proc.internet("tcp", ("10.0.0.1", 9000, ESTABLISHED, 76))
    proc.process(11, "worker", 76)
    assert find_holders(IPV4, STREAM, ("0.0.0.0", 9000), proc=proc.root) == (Holder(11, "worker"),)


def test_all_who_share_a_listener_are_found_the_oldest_first(proc: Proc) -> None:
    proc.internet("tcp", ("0.0.0.0", 9000, LISTEN, 77))
    for pid in (120, 12, 121):
        proc.process(pid, "server", 77)
    found = find_holders(IPV4, STREAM, ("0.0.0.0", 9000), proc=proc.root)
    assert [holder.pid for holder in found] == [12, 120, 121]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/run/a b.sock", "/run/a b.sock"),
        (b"\0a\0b", "@a@b"),
        (b"\0\xff", "@\udcff"),
    ],
)
@pytest.mark.parametrize("listens", [True, False])
def test_who_holds_a_path_is_found(proc: Proc, name: str | bytes, path: str, listens: bool) -> None:
    proc.unix(("", False, 75), ("/run/other", True, 76), (path, listens, 77))
    proc.process(12, "server", 77)
    proc.process(13, "other", 75, 76)
    assert find_holders(UNIX, STREAM, name, proc=proc.root) == (Holder(12, "server"),)


def test_a_relative_path_is_also_looked_for_as_an_absolute_one(proc: Proc) -> None:
    proc.unix((str(Path("a.sock").absolute()), True, 77))
    proc.process(12, "server", 77)
    assert find_holders(UNIX, STREAM, "a.sock", proc=proc.root) == (Holder(12, "server"),)


def test_what_cannot_be_read_is_left_out(proc: Proc) -> None:
    """A process that ended meanwhile, or whose descriptors belong to another user."""
    proc.internet("tcp", ("0.0.0.0", 9000, LISTEN, 77))
    (proc.root / "11").mkdir()
    proc.process(12, "server", 77)
    (proc.root / "12" / "fd" / "1").touch()  # no link, as one that was closed meanwhile
    found = find_holders(IPV4, STREAM, ("0.0.0.0", 9000), proc=proc.root)
    assert found == (Holder(12, "server"),)


@pytest.mark.parametrize(("family", "name"), [(IPV4, ("0.0.0.0", 9000)), (UNIX, "/run/a.sock")])
def test_without_proc_nobody_is_found(
    tmp_path: Path, family: socket.AddressFamily, name: tuple[object, ...] | str
) -> None:
    assert find_holders(family, STREAM, name, proc=tmp_path / "missing") == ()


def test_this_process_finds_its_own_sockets(tmp_path: Path) -> None:
    """On the real /proc, in the byte order and the columns of this kernel."""
    me = Holder(os.getpid(), Path("/proc/self/comm").read_text().strip())
    path = str(tmp_path / "a.sock")
    with (
        socket.create_server(("127.0.0.1", 0)) as stream,
        socket.socket(IPV4, DATAGRAM) as datagram,
        socket.socket(UNIX) as unix,
        socket.socket(UNIX, DATAGRAM) as abstract,
    ):
        datagram.bind(("127.0.0.1", 0))
        unix.bind(path)
        unix.listen()
        abstract.bind(b"\0portico test of holders %d" % os.getpid())
        for each in (stream, datagram, unix, abstract):
            assert me in find_holders(each.family, each.type, each.getsockname())
