"""Do what every process does that serves a configuration: import the handlers, log, count.

Owns the words about what was done.  Leaves serving to `portico.service`; how many processes there
are, to `portico.program`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from portico import logs, systemd, target
from portico.address import DescriptorAddress
from portico.configuration import ProcessSettings, ServiceSettings
from portico.console import LogConsole, say
from portico.counts import Counts
from portico.errors import PorticoError, SettingError
from portico.listener import expand, require_inherited, scheme_of
from portico.logfile import LogFile, reopen_all
from portico.opening import Opening
from portico.service import Assignment
from portico.settings import StrPath
from portico.tally import Tally

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

LOG_FORMAT_OF_MANY: Final = LOG_FORMAT.replace("%(name)s", "%(name)s[%(process)d]")
"""Where several processes write to one log, each line says whose it is."""


def expanded(services: Sequence[ServiceSettings]) -> tuple[ServiceSettings, ...]:
    """Put a descriptor for each socket in the place of those that systemd passes under a name.

    Takes the sockets that systemd passes, whether they are asked for or not.

    Raises:
        ListenerError: It passed none of that name, or there is no such descriptor.
    """
    systemd.passed_sockets()  # so that no child takes them for its own
    found = tuple(replace(each, addresses=tuple(expand(each.addresses))) for each in services)
    for address in (address for each in found for address in each.addresses):
        if isinstance(address, DescriptorAddress):
            require_inherited(address)
    return found


def openings(services: Sequence[ServiceSettings]) -> list[Opening]:
    """Return where the listeners of all services are, in the order of `assign`.

    Raises:
        SettingError: There is no such owner of a Unix socket.
    """
    return [Opening.of(address, each.settings) for each in services for address in each.addresses]


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


def attempt(change: Callable[[], object]) -> None:
    """Do what a service can do without: an error is said, and it serves on."""
    try:
        change()
    except PorticoError as error:
        say(str(error))


@contextmanager
def logged(settings: ProcessSettings) -> Generator[None]:
    """Log the servers' events: to a file, or to standard error unless the target has arranged it.

    Raises:
        SettingError: The file cannot be written.
    """
    with log_kept(settings):
        detach = logs.attach()
        try:
            yield
        finally:
            detach()


@contextmanager
def log_kept(settings: ProcessSettings) -> Generator[None]:
    """Keep the log that the settings name, whoever writes to it.

    Raises:
        SettingError: The file cannot be written.
    """
    root = logging.getLogger()
    before = tuple(root.handlers)
    form = LOG_FORMAT if settings.workers is None else LOG_FORMAT_OF_MANY
    if settings.log_file is not None:
        root.addHandler(_open_log(settings.log_file, form))
    else:
        logging.basicConfig(format=form, handlers=[LogConsole()])
    ours = [handler for handler in root.handlers if handler not in before]
    _kept.extend(ours)
    logging.getLogger("portico").setLevel(settings.log_level.upper())
    try:
        yield
    finally:
        for handler in ours:
            if isinstance(handler, LogFile):
                root.removeHandler(handler)
                handler.close()


_kept: Final[list[logging.Handler]] = []
"""The handlers of the logs that this process has kept so far."""


def forget_logs() -> None:
    """Take off what `log_kept` has put there, and close it: for a child, right after the fork.

    The target can arrange its own logs then; and a file that is moved away, and removed, is gone
    when those who write to it have opened another.
    """
    for handler in _kept:
        logging.getLogger().removeHandler(handler)
        handler.close()
    _kept.clear()


def reopen_log() -> None:
    """Open the log files again, and say so; or why not."""
    try:
        reopen_all()
    except OSError as error:
        say(f"cannot open the log again: {error}")
    else:
        say("has opened its log again")


def _open_log(path: StrPath, form: str) -> LogFile:
    try:
        handler = LogFile(path)
    except OSError as error:
        expected = f"a file that can be written ({error.strerror})"
        raise SettingError("log_file", str(path), expected) from error
    handler.setFormatter(logging.Formatter(form))
    return handler


def report(tallies: Sequence[Tally], seconds: float) -> None:
    """Say what became of the open connections and what was done, for each of several addresses."""
    for tally in tallies:
        where = f"{tally.address}: " if len(tallies) > 1 else ""
        if tally.drained is not None and not tally.address.scheme.is_datagram:
            say(f"{where}{tally.drained}")
        if where:
            say(f"{where}{counts([tally])}")
    say(f"stopped after {seconds:.1f} s: {counts(tallies)}")


def counts(tallies: Sequence[Tally]) -> str:
    """Say how many requests were served, and what became of the others."""
    return counted(
        sum(tally.served for tally in tallies),
        refused=sum(tally.refused for tally in tallies),
        cut_off=sum(tally.cut_off for tally in tallies),
    )


def counted(served: int, **others: int) -> str:
    """Say how many requests were served, and how many of others there were, if any."""
    words = [f"{served} request{'s' * (served != 1)} served"]
    words += [f"{count} {name.replace('_', ' ')}" for name, count in others.items() if count]
    return ", ".join(words)


def say_counts(at: Mapping[str, Counts]) -> None:
    """Say what was counted so far, in a line for each address."""
    for address, each in at.items():
        say(f"{address}: {described(each)}")


def described(counts: Counts) -> str:
    """Say all that was counted; of what did not happen only what would be missed."""
    served = f"{counts.finished + counts.failed + counts.peer_gone} served"
    if counts.failed:
        served += f" ({counts.failed} failed)"
    words = [f"{counts.accepted} accepted", served]
    refused = [f"{number} {reason}" for reason, number in counts.refused_by.items() if number]
    if refused:
        words.append(f"{counts.refused} refused ({', '.join(refused)})")
    others = {"cut off": counts.cut_off, "lost": counts.lost, "open": counts.active}
    words += [f"{number} {name}" for name, number in others.items() if number]
    return f"{', '.join(words)}; {counts.received} bytes received, {counts.sent} sent"
