"""Read the settings of the system, and what this process may have.

Touches the system and changes nothing.  What a container hides, or another system than Linux does
not have, is unknown.

Sources: proc_sys_net(5) and the kernel's "IP Sysctl" (``somaxconn``, ``tcp_max_syn_backlog``,
``ip_local_port_range``, ``tcp_tw_reuse``); proc_pid_net(5) (``sockstat``); getrlimit(2).
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import select
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from portico import privileges
from portico.configuration import ProcessSettings
from portico.doctor.cgroups import Groups
from portico.doctor.facts import Account, Allowance, Ceiling, Kernel
from portico.doctor.pseudofiles import number, numbers, text
from portico.errors import PorticoError

PACKAGES: Final = ("greenlet", "watchfiles")
"""What portico can use, by the name that is imported."""

EXEMPTING: Final = 1 << 24 | 1 << 21
"""CAP_SYS_RESOURCE and CAP_SYS_ADMIN: who has one exceeds the limit of tasks; setrlimit(2)."""


def read_kernel(root: Path = Path("/")) -> Kernel:
    """Read the system's settings.

    Args:
        root: The folder that stands for ``/``.
    """
    sysctl = root / "proc/sys"
    ports = numbers(sysctl / "net/ipv4/ip_local_port_range")
    cookies = number(sysctl / "net/ipv4/tcp_syncookies")
    conntrack = number(sysctl / "net/netfilter/nf_conntrack_max")
    remembered = number(sysctl / "net/netfilter/nf_conntrack_count") or 0
    return Kernel(
        release=_release(text(sysctl / "kernel/osrelease")),
        somaxconn=number(sysctl / "net/core/somaxconn"),
        max_syn_backlog=number(sysctl / "net/ipv4/tcp_max_syn_backlog"),
        syncookies=None if cookies is None else cookies > 0,
        ephemeral_ports=(ports[0], ports[1]) if len(ports) == 2 else None,
        reserved_ports=_ranges(text(sysctl / "net/ipv4/ip_local_reserved_ports")),
        time_wait=_time_wait(text(root / "proc/net/sockstat")),
        time_wait_reuse=number(sysctl / "net/ipv4/tcp_tw_reuse"),
        conntrack=None if conntrack is None else Ceiling(conntrack, remembered),
        has_exclusive_epoll=hasattr(select, "EPOLLEXCLUSIVE"),
        has_tcp_info=hasattr(socket, "TCP_INFO"),
    )


def read_allowance(root: Path = Path("/")) -> Allowance:
    """Read what this process may have.

    Args:
        root: The folder that stands for ``/``.
    """
    groups = Groups(root)
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory = groups.memory()
    total = _memory(text(root / "proc/meminfo"))
    if memory is None or (total is not None and (memory.most or 0) > total):
        memory = None if total is None else Ceiling(total, source="the machine")
    tasks = [groups.tasks(), _of_user(root), _of_machine(root)]
    return Allowance(
        descriptors=descriptors,
        tasks=tuple(each for each in tasks if each is not None),
        processors=len(os.sched_getaffinity(0)),
        quota=groups.quota(),
        memory=memory,
    )


def read_account(process: ProcessSettings) -> Account | None:
    """Look for the user that the processes become; ``None`` if they stay who they are."""
    words = ", ".join(map(str, filter(None, (process.user, process.group))))
    try:
        identity = privileges.find(process.user, process.group)
    except PorticoError as error:
        return Account(words=words, problem=str(error))
    if identity is None:
        return None
    return Account(words=str(identity), uid=identity.uid, gid=identity.gid, groups=identity.groups)


def read_packages() -> Mapping[str, bool]:
    """Look which packages are installed that portico can use; imports none of them."""
    return {name: importlib.util.find_spec(name) is not None for name in PACKAGES}


def _of_user(root: Path) -> Ceiling | None:
    """Return the tasks that the processes of this user may have together."""
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if most == resource.RLIM_INFINITY or _is_exempt(root / "proc/self"):
        return None
    return Ceiling(most, _tasks_of(os.getuid(), root), "the limit of the user (RLIMIT_NPROC)")


def _of_machine(root: Path) -> Ceiling | None:
    kernel = root / "proc/sys/kernel"
    limits = [number(kernel / "threads-max"), number(kernel / "pid_max")]
    known = [each for each in limits if each is not None]
    if not known:
        return None
    running = re.search(r"\d+/(\d+)", text(root / "proc/loadavg"))
    return Ceiling(min(known), int(running[1]) if running else 0, "the machine")


def _is_exempt(process: Path) -> bool:
    """Say whether a process may exceed the limit of its user: the system's own root, for one."""
    if os.getuid() == 0 and numbers(process / "uid_map")[:2] == [0, 0]:
        return True
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", text(process / "status"), re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) & EXEMPTING)


def _tasks_of(user: int, root: Path) -> int:
    """Count the threads of a user, as far as they can be read."""
    count = 0
    for process in (root / "proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if process.stat().st_uid == user:
                threads = re.search(r"^Threads:\s*(\d+)$", text(process / "status"), re.MULTILINE)
                count += int(threads[1]) if threads else 1
    return count


def _release(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _time_wait(sockstat: str) -> int | None:
    found = re.search(r"^TCP:.* tw (\d+)", sockstat, re.MULTILINE)
    return int(found[1]) if found else None


def _memory(meminfo: str) -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB$", meminfo, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def _ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Read ports such as ``8080,9000-9010``."""
    found = re.findall(r"(\d+)(?:-(\d+))?", text)
    return tuple((int(first), int(last or first)) for first, last in found)
