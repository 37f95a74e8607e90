"""Whether an address can be had, with sockets that really are in the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

import pytest

from portico.address import parse
from portico.doctor import network
from portico.doctor.facts import AddressFacts, Facts, Occupancy
from portico.doctor.findings import Severity
from portico.doctor.occupancy import is_known, look_at
from tests.doctor.test_rules import configured, said
from tests.support import in_child


def severity(place: AddressFacts) -> Severity:
    (found,) = said(network.addresses, Facts(addresses=(place,)), configured())
    return found


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:0", "tcp://:0", "udp://127.0.0.1:0", "unix:@a"])
def test_what_nobody_has_is_free(text: str) -> None:
    assert look_at(parse(text)).occupancy is Occupancy.FREE


def test_what_was_looked_at_can_be_had_afterwards() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
    place = look_at(parse(f"tcp://127.0.0.1:{port}"))
    assert (place.occupancy, severity(place)) == (Occupancy.FREE, Severity.OK)
    socket.create_server(("127.0.0.1", port)).close()


HOLDER = """
import socket, sys
family, kind, name = socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)
if sys.argv[1] == "udp":
    kind = socket.SOCK_DGRAM
elif sys.argv[1] != "tcp":
    family, name = socket.AF_UNIX, sys.argv[1]
if len(sys.argv) > 2:
    open("/proc/self/comm", "w").write(sys.argv[2])
held = socket.socket(family, kind)
held.bind(name)
if kind == socket.SOCK_STREAM:
    held.listen()
print(held.getsockname()[1] if family == socket.AF_INET else name, flush=True)
sys.stdin.read()
"""


class Held:
    """A process that has an address."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.name = self.process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_a_port_in_use_is_refused_and_its_holder_named(scheme: str) -> None:
    with Held(scheme) as held:
        place = look_at(parse(f"{scheme}://127.0.0.1:{held.name}"))
        assert (place.occupancy, severity(place)) == (Occupancy.REFUSED, Severity.FAIL)
        assert f"(process {held.process.pid})" in place.reason


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_portico_that_serves_already_may_be_the_one_that_is_meant(
    kind: str, tmp_path: Path
) -> None:
    with Held("tcp" if kind == "tcp" else str(tmp_path / "a.sock"), "portico") as held:
        text = f"tcp://127.0.0.1:{held.name}" if kind == "tcp" else f"unix:{held.name}"
        place = look_at(parse(text))
        assert (place.occupancy, place.reason) == (Occupancy.OURS, f"process {held.process.pid}")
        assert severity(place) is Severity.WARN


def test_a_unix_path_that_is_held_is_refused(tmp_path: Path) -> None:
    with Held(str(tmp_path / "a.sock")) as held:
        place = look_at(parse(f"unix:{held.name}"))
        assert place.occupancy is Occupancy.REFUSED
        assert f"(process {held.process.pid})" in place.reason


def test_a_dead_servers_file_is_told_and_left(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    place = look_at(parse(f"unix:{path}"))
    assert (place.occupancy, severity(place)) == (Occupancy.STALE, Severity.OK)
    assert path.exists()


def test_another_file_at_a_unix_path_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    path.write_text("a diary")
    place = look_at(parse(f"unix:{path}"))
    assert "is not a socket" in place.reason
    assert severity(place) is Severity.FAIL


def test_a_free_unix_path_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    assert look_at(parse(f"unix:{path}")).occupancy is Occupancy.FREE
    assert not path.exists()


def test_a_folder_that_is_not_there_or_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "there is no directory" in look_at(parse(f"unix:{tmp_path}/no/a.sock")).reason
    assert "is not a directory" in look_at(parse(f"unix:{tmp_path}/file/a.sock")).reason


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_what_needs_a_right_is_refused_without_it(tmp_path: Path) -> None:
    limit = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    tmp_path.chmod(0o755)

    def look() -> None:
        os.setuid(65_533)
        assert "no permission to make a socket" in look_at(parse(f"unix:{tmp_path}/a.sock")).reason
        if limit > 80:
            assert "CAP_NET_BIND_SERVICE" in look_at(parse("tcp://127.0.0.1:80")).reason

    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    assert in_child(look) == 0


def test_a_host_without_an_address_is_refused() -> None:
    place = look_at(parse("tcp://no-such-host.invalid:9000"))
    assert place.occupancy is Occupancy.REFUSED


def test_what_is_open_already_is_not_looked_for() -> None:
    assert is_known(parse("unix:@a"))
    assert not is_known("systemd:web")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("tcp://:9321", "tcp://127.0.0.1:9321", True),
        ("tcp://localhost:9321", "tls://127.0.0.1:9321", True),
        ("unix:a", "unix:./a", True),
        ("tcp://:9321", "udp://:9321", False),
        ("tcp://127.0.0.1:9321", "tcp://127.0.0.2:9321", False),
        ("tcp://:0", "tcp://127.0.0.1:0", False),
        ("unix:a", "unix:b", False),
        ("tcp://:9321", "tcp://no-such-host.invalid:9321", False),
    ],
)
def test_two_addresses_may_be_one_place(one: str, other: str, *, expected: bool) -> None:
    """Each can be had, and not both."""
    facts = Facts(addresses=tuple(look_at(parse(each)) for each in (one, other)))
    said = [each.found for each in network.addresses(facts, configured())]
    assert any("are the same place" in each for each in said) is expected
