"""What is read of the system: a real one as far as it can be changed, and a folder elsewhere."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from portico.configuration import ProcessSettings
from portico.doctor import capacity, network
from portico.doctor.facts import Ceiling, Facts
from portico.doctor.findings import Severity
from portico.doctor.machine import read_account, read_allowance, read_kernel, read_packages
from tests.doctor.test_rules import configured, only
from tests.support import PATIENCE, in_child


def in_namespace(program: str) -> str:
    """Run a program in a network of its own, and return what it prints."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, for a network namespace")
    command = ["unshare", "--net", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip("no network namespaces here")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backlog_that_is_cut_is_found_in_a_network_of_its_own() -> None:
    """The kernel's own numbers, changed for real."""
    printed = in_namespace(
        """
from pathlib import Path
from portico.doctor import network
from portico.doctor.facts import Facts
from portico.doctor.machine import read_kernel
from tests.doctor.test_rules import configured
net = Path("/proc/sys/net")
for somaxconn, ports in (("4096", "32768 60999"), ("16", "60000 60100")):
    (net / "core/somaxconn").write_text(somaxconn)
    (net / "ipv4/ip_local_port_range").write_text(ports)
    facts = Facts(kernel=read_kernel())
    for rule in (network.backlog, network.ephemeral):
        print(*[f"{each.subject}: {each.severity}" for each in rule(facts, configured())])
"""
    )
    assert printed.splitlines() == [
        "backlog: ok",
        "client ports: ok",
        "backlog: warn",
        "client ports: warn",
    ]


@pytest.mark.parametrize(("hard", "severity"), [(256, Severity.FAIL), (600, Severity.OK)])
def test_a_lowered_limit_of_descriptors_is_found(hard: int, severity: Severity) -> None:
    def look() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        facts = Facts(allowance=read_allowance())
        only(capacity.descriptors(facts, configured(max_connections=300)), severity)

    assert in_child(look) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_lowered_limit_of_tasks_is_found() -> None:
    """Not for root, whom the kernel lets exceed it."""

    def look() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
        configuration = configured(max_connections=300)
        assert all("RLIMIT_NPROC" not in each.source for each in read_allowance().tasks)
        os.setuid(65_533)
        found = only(
            capacity.tasks(Facts(allowance=read_allowance()), configuration), Severity.FAIL
        )
        assert "RLIMIT_NPROC" in found.found

    assert in_child(look) == 0


def test_the_processors_are_those_that_the_process_may_use() -> None:
    one = min(os.sched_getaffinity(0))

    def look() -> None:
        os.sched_setaffinity(0, {one})
        assert read_allowance().processors == 1

    assert in_child(look) == 0


def test_the_kernel_tells_its_numbers() -> None:
    kernel = read_kernel()
    assert kernel.somaxconn is not None
    assert kernel.release is not None
    assert kernel.time_wait is not None
    assert kernel.ephemeral_ports is not None


def test_connections_in_time_wait_are_counted() -> None:
    """Who closes first waits."""
    before = read_kernel().time_wait
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        client.close()
        accepted.recv(1)
        accepted.close()
    after = read_kernel().time_wait
    assert before is not None
    assert after is not None
    assert after >= 1


def test_a_system_that_tells_nothing_is_unknown(tmp_path: Path) -> None:
    kernel, limits = read_kernel(tmp_path), read_allowance(tmp_path)
    assert (kernel.somaxconn, kernel.syncookies, kernel.ephemeral_ports) == (None, None, None)
    assert (kernel.release, kernel.time_wait, kernel.conntrack) == (None, None, None)
    assert (limits.memory, limits.quota) == (None, None)


def test_everything_is_read_from_its_file(tmp_path: Path) -> None:
    files = {
        "proc/sys/kernel/osrelease": "4.4.0-generic\n",
        "proc/sys/kernel/threads-max": "5000\n",
        "proc/sys/kernel/pid_max": "4000\n",
        "proc/loadavg": "0.00 0.01 0.05 2/300 12345\n",
        "proc/meminfo": "MemTotal:        2048 kB\nMemFree: 1 kB\n",
        "proc/net/sockstat": "sockets: used 14\nTCP: inuse 1 orphan 0 tw 77 alloc 1 mem 2\n",
        "proc/sys/net/core/somaxconn": "128\n",
        "proc/sys/net/ipv4/tcp_max_syn_backlog": "64\n",
        "proc/sys/net/ipv4/tcp_syncookies": "0\n",
        "proc/sys/net/ipv4/ip_local_port_range": "1024\t2000\n",
        "proc/sys/net/ipv4/ip_local_reserved_ports": "1100,1200-1300\n",
        "proc/sys/net/ipv4/tcp_tw_reuse": "2\n",
        "proc/sys/net/netfilter/nf_conntrack_max": "1000\n",
        "proc/sys/net/netfilter/nf_conntrack_count": "900\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    kernel, limits = read_kernel(tmp_path), read_allowance(tmp_path)
    assert (kernel.release, kernel.somaxconn, kernel.max_syn_backlog) == ((4, 4), 128, 64)
    assert (kernel.syncookies, kernel.time_wait, kernel.time_wait_reuse) == (False, 77, 2)
    assert kernel.ephemeral_ports == (1024, 2000)
    assert kernel.reserved_ports == ((1100, 1100), (1200, 1300))
    assert kernel.conntrack == Ceiling(1000, 900)
    assert Ceiling(4000, 300, "the machine") in limits.tasks
    assert limits.memory == Ceiling(2048 * 1024, 0, "the machine")
    found = only(network.conntrack(Facts(kernel=kernel), configured()), Severity.WARN)
    assert found.found.startswith("900 connections are remembered, of 1000")


def test_a_group_with_less_memory_than_the_machine_counts(tmp_path: Path) -> None:
    for name, text in {
        "proc/meminfo": "MemTotal: 2048 kB\n",
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/memory.max": "1048576\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    memory = read_allowance(tmp_path).memory
    assert memory is not None
    assert memory.most == 1 << 20


def test_whom_the_processes_become_is_looked_for() -> None:
    missing = read_account(ProcessSettings(user="no-such-user"))
    assert missing is not None
    assert "no-such-user" in missing.problem
    own = read_account(ProcessSettings(user=str(os.getuid())))
    assert own is not None
    assert (own.problem, own.uid) == ("", os.getuid())
    assert read_account(ProcessSettings()) is None


def test_packages_are_looked_for_and_not_imported() -> None:
    program = (
        "import sys, portico.doctor.machine as m; found = m.read_packages();"
        "assert found['greenlet']; sys.exit('watchfiles' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert set(read_packages()) == {"greenlet", "watchfiles"}
