"""Say what follows from the facts for what is to run.

The contract.  A rule is a function of the facts and the configuration that yields findings: one at
least for everything that it looks at, those that are well included, and none for what is not known.
It asks nobody and changes nothing, so that its tests are literals.  Modules of this folder hold the
rules of one subject each, and none imports another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from portico.address import InternetAddress
from portico.configuration import Configuration, ServiceSettings
from portico.doctor.facts import Facts
from portico.doctor.findings import Finding

Rule: TypeAlias = Callable[[Facts, Configuration], Iterator[Finding]]


def resolved(facts: Facts, configuration: Configuration) -> list[ServiceSettings]:
    """Return the services, with a number in the place of each ``auto``, as they would run."""
    count = sum(len(each.addresses) for each in configuration.services)
    descriptors = -1 if facts.allowance.descriptors is None else facts.allowance.descriptors
    return [
        ServiceSettings(
            name=each.name,
            target=each.target,
            addresses=each.addresses,
            settings=each.settings.resolved(descriptors, count),
        )
        for each in configuration.services
    ]


def connections(service: ServiceSettings) -> int | None:
    """Return how many a service may have at all of its addresses; ``None`` for no limit."""
    limit = service.settings.max_connections
    streams = [each for each in service.addresses if not each.scheme.is_datagram]
    return None if limit is None else int(limit) * len(streams)


def ports(configuration: Configuration) -> list[InternetAddress]:
    """Return the addresses that are ports, and not those for which the system chooses one."""
    return [
        address
        for service in configuration.services
        for address in service.addresses
        if isinstance(address, InternetAddress) and address.port
    ]
