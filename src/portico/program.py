"""Run what a configuration says, and say what happens.

Owns the words about a running program: where it is ready, and what it did.  Leaves what a program
is told to `portico.configuration` and to who reads it, and serving to `portico.service`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from portico import logs, privileges, systemd, target
from portico.address import Address
from portico.announcement import Announcement
from portico.configuration import Configuration, ServiceSettings
from portico.listener import OpenListener, expand, scheme_of
from portico.pidfile import PidFile
from portico.service import Assignment, Service, Tally, open_listeners, raise_descriptor_limit
from portico.settings import Settings

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def run(load: Callable[[], Configuration]) -> bool:
    """Serve until SIGINT or SIGTERM, in the main thread.

    Args:
        load: Reads the configuration.

    Returns:
        Whether handlers still run in threads of this process, with nobody to wait for them.

    Raises:
        PorticoError: What was asked cannot be done.
    """
    configuration = load()
    process = configuration.process
    identity = privileges.find(process.user, process.group)
    notifier = systemd.Notifier.take()
    services = expanded(configuration.services)
    raise_descriptor_limit()
    with logged(process.log_level), PidFile(process.pid_file):
        with ExitStack() as closing:
            listeners = open_services(services)
            for each in listeners:
                closing.callback(each.close)
            privileges.drop(identity)  # and only now does anything of the target's run
            serving = closing.enter_context(Service(assign(services), listeners))
            closing.enter_context(serving.stopped_by_signals())
            closing.enter_context(Announcement(notifier, serving))
            for bound in serving.addresses:
                say(f"ready on {bound}")
            started = time.monotonic()
            tallies = serving.run()
            report(tallies, time.monotonic() - started)
    return serving.has_left_handlers


def expanded(services: Sequence[ServiceSettings]) -> list[ServiceSettings]:
    """Put a descriptor for each socket in the place of those that systemd passes under a name.

    Takes the sockets that systemd passes, whether they are asked for or not.

    Raises:
        ListenerError: It passed none of that name.
    """
    systemd.passed_sockets()  # so that no child takes them for its own
    return [replace(each, addresses=tuple(expand(each.addresses))) for each in services]


@dataclass(frozen=True, slots=True)
class Opening:
    """Where a listener is to be opened.

    Attributes:
        address: Where.
        settings: Those of its service.
    """

    address: Address
    settings: Settings


def open_services(services: Sequence[ServiceSettings]) -> list[OpenListener]:
    """Open a listener for each address of each service, in the order of `assign`, or none.

    Raises:
        ListenerError: An address cannot be had.
        SettingError: There is no such owner of a Unix socket.
    """
    return open_listeners(
        [Opening(address, each.settings) for each in services for address in each.addresses]
    )


def assign(services: Sequence[ServiceSettings]) -> list[Assignment]:
    """Import the handler of each service, and say what each server is to do.

    Raises:
        PorticoError: There is no such handler, or it cannot serve at an address of its service.
    """
    assignments: list[Assignment] = []
    for each in services:
        handler = target.load(each.target)
        for address in each.addresses:
            target.check_scheme(each.target, handler, scheme_of(address))
            assignments.append(Assignment(handler, address, each.settings))
    return assignments


@contextmanager
def logged(level: str) -> Generator[None]:
    """Log the servers' events, to standard error unless the target has arranged otherwise."""
    logging.basicConfig(format=LOG_FORMAT)
    logging.getLogger("portico").setLevel(level.upper())
    detach = logs.attach()
    try:
        yield
    finally:
        detach()


def report(tallies: Sequence[Tally], seconds: float) -> None:
    """Say what became of the open connections and what was done, for each of several addresses."""
    for tally in tallies:
        where = f"{tally.address}: " if len(tallies) > 1 else ""
        if tally.drained is not None and not tally.address.scheme.is_datagram:
            say(f"{where}{tally.drained}")
        if where:
            say(f"{where}{_counts([tally])}")
    say(f"stopped after {seconds:.1f} s: {_counts(tallies)}")


def say(text: str) -> None:
    """Say a line on standard error."""
    sys.stderr.write(f"portico: {text}\n")
    sys.stderr.flush()


def _counts(tallies: Sequence[Tally]) -> str:
    served = sum(tally.served for tally in tallies)
    refused = sum(tally.refused for tally in tallies)
    cut_off = sum(tally.cut_off for tally in tallies)
    words = [f"{served} request{'s' * (served != 1)} served"]
    if refused:
        words.append(f"{refused} refused")
    if cut_off:
        words.append(f"{cut_off} cut off")
    return ", ".join(words)
