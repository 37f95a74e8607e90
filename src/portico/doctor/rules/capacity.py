"""What the process may have, beside what its settings let clients take."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Final

from portico.configuration import Configuration, ServiceSettings
from portico.doctor.facts import Ceiling, Facts
from portico.doctor.findings import Finding, fail, ok, warn
from portico.doctor.rules import connections, resolved
from portico.engines.forks import ForkingMixIn
from portico.engines.pool import ThreadPoolMixIn
from portico.settings import AUTO, RESERVED_DESCRIPTORS

FEW_CONNECTIONS: Final = 256
"""What ``auto`` gives below this is less than a service is meant to have: a quarter of what the
usual limit of 1,024 descriptors leaves."""

MIB: Final = 1 << 20


def descriptors(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether there are descriptors for all connections that are let in."""
    limit = facts.allowance.descriptors
    if limit is None or limit < 0:
        return
    services = resolved(facts, configuration)
    for service in services:
        if connections(service) is None:
            yield warn(
                "descriptors",
                f"{service.name}: no limit of connections, and {limit} descriptors",
                "a limit of connections below that of descriptors",
                "set max_connections, or leave it at auto",
            )
    needed = RESERVED_DESCRIPTORS + sum(connections(each) or 0 for each in services)
    is_automatic = all(each.settings.max_connections == AUTO for each in configuration.services)
    if is_automatic and 0 < min(connections(each) or 0 for each in services) < FEW_CONNECTIONS:
        number = sum(connections(each) or 0 for each in services)
        yield warn(
            "descriptors",
            f"{limit} leave room for {number} connections in all",
            f"at least {FEW_CONNECTIONS} for a service",
            _more_descriptors(FEW_CONNECTIONS * len(services) * 2),
        )
    elif needed > limit:
        yield fail(
            "descriptors",
            f"{limit} for a process, and max_connections lets in more",
            f"{needed}: one for each connection and {RESERVED_DESCRIPTORS} for the rest",
            f"{_more_descriptors(needed)}, or a smaller max_connections",
        )
    else:
        yield ok("descriptors", f"{needed} are enough for all connections, and {limit} allowed")


def _more_descriptors(number: int) -> str:
    return f"LimitNOFILE={number} in a unit of systemd, `--ulimit nofile={number}` of a container"


def tasks(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether there may be as many threads and processes as the engines start."""
    processes = max(configuration.process.worker_count(), 1)
    services = resolved(facts, configuration)
    needed = sum(_tasks_of(each, processes) for each in services)
    if not needed:
        return
    ceiling = min(
        (each for each in facts.allowance.tasks if each.room is not None),
        key=lambda each: each.room or 0,
        default=Ceiling(),
    )
    if ceiling.room is None:
        return
    if needed > ceiling.room:
        yield fail(
            "threads",
            f"{ceiling.source} leaves room for {ceiling.room} ({ceiling.used} of {ceiling.most} "
            "are taken)",
            f"{needed} threads and processes, which the engines may start",
            "a smaller max_connections, the pool or the green engine, or a higher limit: "
            "TasksMax= of systemd, `--pids-limit` of a container, LimitNPROC= of a user",
        )
    else:
        yield ok("threads", f"{needed} at the most, and room for {ceiling.room}")


def _tasks_of(service: ServiceSettings, processes: int) -> int:
    """Return how many threads or processes run handlers at once, at the most."""
    settings, addresses = service.settings, len(service.addresses)
    limit = settings.max_connections
    match settings.engine:
        case "threads":  # `max_connections` holds over all workers
            return connections(service) or 0
        case "pool":
            return (settings.max_workers or ThreadPoolMixIn.max_workers) * addresses * processes
        case "forks":
            most = ForkingMixIn.max_children * processes
            return (most if limit is None else min(int(limit), most)) * addresses
        case "green":
            return (settings.hubs or 1) * addresses * processes
        case _:
            return 0


def processors(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether the workers are as many as can run at once."""
    there, quota = facts.allowance.processors, facts.allowance.quota
    if there is None:
        return
    allowed = there if quota is None else min(there, max(ceil(quota), 1))
    process = configuration.process
    workers = process.worker_count() if process.workers != AUTO else there
    if quota is not None and quota < there:
        what = f"{quota:g} of {there} processors (the quota of the container)"
    else:
        what = f"{there} processor{'s' * (there != 1)}"
    if workers > allowed:
        count = f"auto, which is {workers}," if process.workers == AUTO else f"{workers}"
        yield warn(
            "processors",
            f"{count} workers on {what}",
            f"{allowed}: more take turns, and one that the quota stops is stopped for a while",
            f"workers = {allowed}, or a larger quota (`--cpus` of a container, CPUQuota=)",
        )
    elif not workers and allowed > 1:
        yield ok("processors", f"{what}, of which one process uses one; workers = auto uses all")
    else:
        yield ok("processors", f"{what} for {max(workers, 1)} process{'es' * (workers > 1)}")


def memory(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look whether all workers may be as large as they are allowed to be."""
    ceiling, each = facts.allowance.memory, configuration.process.max_worker_memory
    workers = max(configuration.process.worker_count(), 1)
    if ceiling is None or ceiling.most is None or each is None:
        return
    needed = each * workers
    if needed > ceiling.most:
        yield warn(
            "memory",
            f"{workers} x {each // MIB} MiB of workers, and {ceiling.most // MIB} MiB "
            f"({ceiling.source})",
            "less than there is: the system kills a worker before it is replaced",
            f"max_worker_memory = {ceiling.most // workers * 3 // 4}, or fewer workers",
        )
    else:
        yield ok("memory", f"{needed // MIB} MiB at the most, of {ceiling.most // MIB}")


RULES: Final = (descriptors, tasks, processors, memory)
