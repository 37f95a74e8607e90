"""What the system does for listeners and connections, beside what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Final

from portico.address import InternetAddress
from portico.configuration import Configuration
from portico.doctor.facts import AddressFacts, Facts, Occupancy
from portico.doctor.findings import Finding, fail, ok, warn
from portico.doctor.rules import connections, ports, resolved

FEW_PORTS: Final = 10_000
"""Ports for clients below which a service that connects out runs short: with a minute of TIME_WAIT
for each they are 170 connections a second to one server.  Linux has 28,232."""

FULL: Final = 0.8
"""Share from which on a table is nearly full."""

EXCLUSIVE_SINCE: Final = (4, 5)
"""The version of Linux since which one of several is woken; epoll_ctl(2)."""


def backlog(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether the kernel holds as many connections as a service asks it to."""
    most, handshakes = facts.kernel.somaxconn, facts.kernel.max_syn_backlog
    for service in configuration.services:
        if most is None or all(each.scheme.is_datagram for each in service.addresses):
            continue
        asked = service.settings.backlog
        if asked > most:
            yield warn(
                "backlog",
                f"{service.name}: {asked} asked for, and the kernel holds {most} "
                "(net.core.somaxconn)",
                f"net.core.somaxconn of {asked} or more: beyond it a client waits a second",
                f"`sysctl -w net.core.somaxconn={asked}` (`--sysctl` of a container), "
                f"or backlog = {most}",
            )
        elif facts.kernel.syncookies is False and handshakes is not None and asked > handshakes:
            yield warn(
                "backlog",
                f"{service.name}: {asked} asked for, and {handshakes} handshakes may be under way "
                "(net.ipv4.tcp_max_syn_backlog), without cookies beyond",
                "cookies, so that a flood of handshakes keeps nobody out",
                "`sysctl -w net.ipv4.tcp_syncookies=1`",
            )
        else:
            yield ok("backlog", f"{service.name}: {asked}, of {most} that the kernel would hold")


def addresses(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether each address can be had, and is asked for once."""
    asked = [str(each) for service in configuration.services for each in service.addresses]
    for address in sorted({each for each in asked if asked.count(each) > 1}):
        if not address.endswith(":0"):
            yield fail(
                "address",
                f"{address} is given twice",
                "each address once",
                "give it to one service",
            )
    for one, other in combinations(facts.addresses, 2):
        if str(one.address) != str(other.address) and _are_one_place(one, other):
            yield fail(
                "address",
                f"{one.address} and {other.address} are the same place, or one is part of the "
                "other",
                "each place once",
                "leave one of them out",
            )
    for each in facts.addresses:
        yield _of_address(each)


def _are_one_place(one: AddressFacts, other: AddressFacts) -> bool:
    """Say whether two addresses cannot both be had, whoever else has them."""
    if one.place is None or other.place is None:
        return False
    if isinstance(one.address, InternetAddress) and not one.address.port:
        return False  # the system chooses
    return one.place.overlaps(other.place)


def _of_address(facts: AddressFacts) -> Finding:
    match facts.occupancy:
        case Occupancy.FREE:
            return ok("address", f"{facts.address} can be had")
        case Occupancy.STALE:
            return ok("address", f"{facts.address} is a dead server's file, which is replaced")
        case Occupancy.OURS:
            return warn(
                "address",
                f"a portico has {facts.address} ({facts.reason})",
                "nobody there, unless this is the service that is asked about",
                "stop it before another one is started",
            )
        case Occupancy.REFUSED:
            return fail(
                "address",
                facts.reason or f"{facts.address} cannot be had",
                "an address that can be had",
                "do what is said there, or choose another address",
            )


def ephemeral(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether clients on this machine have ports, and take none that a service wants."""
    found = facts.kernel.ephemeral_ports
    if found is None:
        return
    first, last = found
    count, waiting = last - first + 1, facts.kernel.time_wait or 0
    if count < FEW_PORTS:
        yield warn(
            "client ports",
            f"{count} for connections out ({first} to {last})",
            f"{FEW_PORTS} or more, if handlers, or a load test, connect much",
            "`sysctl -w net.ipv4.ip_local_port_range='32768 60999'`, or keep connections open",
        )
    elif waiting > count // 2 and facts.kernel.time_wait_reuse != 1:
        yield warn(
            "client ports",
            f"{waiting} connections in TIME_WAIT, and {count} ports for connections out",
            "fewer than half of them: beyond all of them connect fails (EADDRNOTAVAIL)",
            "`sysctl -w net.ipv4.tcp_tw_reuse=1`, or keep connections open",
        )
    else:
        yield ok("client ports", f"{count}, and {waiting} connections in TIME_WAIT")
    reserved = facts.kernel.reserved_ports
    taken = sorted({each.port for each in ports(configuration) if first <= each.port <= last})
    for port in taken:
        if not any(low <= port <= high for low, high in reserved):
            yield warn(
                "client ports",
                f"port {port} is one of those that the system gives to connections out",
                "a port that is a service's alone: a client may have it when the service starts",
                f"`sysctl -w net.ipv4.ip_local_reserved_ports={port}`, or a port below {first}",
            )


def conntrack(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether the firewall can remember all connections."""
    table = facts.kernel.conntrack
    if table is None or table.most is None:
        return
    needed = sum(
        connections(each) or 0
        for each in resolved(facts, configuration)
        if any(not address.scheme.is_unix for address in each.addresses)
    )
    if table.used > FULL * table.most or needed > table.most:
        wanted = max(2 * needed, 2 * table.most)
        yield warn(
            "conntrack",
            f"{table.used} connections are remembered, of {table.most}; "
            f"{needed} may come to the services",
            "room for all: beyond it packets are dropped without a word",
            f"`sysctl -w net.netfilter.nf_conntrack_max={wanted}`, or a rule with NOTRACK",
        )
    else:
        yield ok("conntrack", f"{table.used} connections remembered, of {table.most}")


def kernel(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether the system has what portico uses."""
    release, told = facts.kernel.release, False
    number = "unknown" if release is None else f"{release[0]}.{release[1]}"
    is_old = release is not None and release < EXCLUSIVE_SINCE
    several = configuration.process.worker_count() > 1 or any(
        (each.settings.hubs or 1) > 1 for each in configuration.services
    )
    if several and (is_old or not facts.kernel.has_exclusive_epoll):
        told = True
        yield warn(
            "kernel",
            f"Linux {number} without EPOLLEXCLUSIVE",
            "4.5 or later: each connection wakes all workers that wait, and one gets it",
            "a later kernel, or fewer workers and hubs",
        )
    if not facts.kernel.has_tcp_info:
        told = True
        yield warn(
            "kernel",
            "connections cannot be asked for their counters (TCP_INFO)",
            "Linux: which connection is idle is known less exactly elsewhere",
            "run it on Linux",
        )
    if not told:
        yield ok("kernel", f"version {number}")


RULES: Final = (backlog, addresses, ephemeral, conntrack, kernel)
