"""Say what a program serves: its services side by side, and the processes that run them.

Owns what holds for the whole program, and the sum of it all.  Leaves what protects one service to
`portico.settings`, and where the values come from to whoever reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Final

from portico.address import Address
from portico.errors import PorticoError, SettingError
from portico.settings import AUTO, Auto, Settings, StrPath, check_account

MOST_WORKERS: Final = 1024
"""Worker processes at the most: far above any machine, so that a larger number is a mistake."""

LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")


OF_WORKERS: Final = ("max_requests", "max_requests_jitter", "max_worker_memory", "worker_timeout")
"""The settings that say when a worker is replaced."""


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """How the processes of a program are run.

    A value is checked when the settings are made.

    Raises:
        SettingError: A value is outside its range; the message says what would be right.
    """

    workers: int | Auto | None = None
    """Processes that serve, under a supervisor that replaces them; `AUTO` for as many as the
    processors that this process may use, ``None`` to serve in this very process."""

    max_requests: int | None = None
    """Requests after which a worker is replaced, once it has finished those it has; ``None`` for no
    limit.  Answers a handler that leaks a little each time."""

    max_requests_jitter: int = 0
    """Requests more, at random from 0 to this, so that workers are not replaced all at once."""

    max_worker_memory: int | None = None
    """Bytes of memory (resident set) beyond which a worker is replaced; ``None`` for no limit."""

    worker_timeout: float | None = 30.0
    """Seconds without a sign of life after which a worker is stuck, and replaced; ``None`` for no
    limit.  Answers the endless loop in a handler."""

    start_timeout: float | None = 60.0
    """Seconds that a worker may take to import its target and serve; ``None`` for no limit."""

    user: str | int | None = None
    """Whom the processes run as, once the listeners are open: a name or a number."""

    group: str | int | None = None
    """The group; ``None`` for that of `user`."""

    pid_file: StrPath | None = None
    """A file that holds the number of the process to send signals to."""

    log_level: str = "info"
    """What is told of the servers: ``"debug"``, ``"info"``, ``"warning"``, ``"error"`` or
    ``"critical"``."""

    log_file: StrPath | None = None
    """Where it is told, opened again at SIGUSR1; ``None`` for standard error."""

    def __post_init__(self) -> None:
        if self.workers != AUTO:
            _check_whole("workers", self.workers, 1, f"1 to {MOST_WORKERS}, {AUTO!r}, or None")
        _check_whole("max_requests", self.max_requests, 1, "1 or more, or None for no limit")
        if not _is_whole(self.max_requests_jitter) or self.max_requests_jitter < 0:
            raise SettingError("max_requests_jitter", self.max_requests_jitter, "0 or more")
        expected = "a number of bytes, or None for no limit"
        _check_whole("max_worker_memory", self.max_worker_memory, 1, expected)
        for name in ("worker_timeout", "start_timeout"):
            _check_seconds(name, getattr(self, name))
        if self.log_level not in LOG_LEVELS:
            words = ", ".join(map(repr, LOG_LEVELS))
            raise SettingError("log_level", self.log_level, f"one of {words}")
        for name in ("user", "group"):
            check_account(name, getattr(self, name))

    def worker_count(self) -> int:
        """Return how many workers there are to be; 0 to serve in this very process."""
        if self.workers is None:
            return 0
        if self.workers == AUTO:
            return len(os.sched_getaffinity(0))
        return int(self.workers)

    def unused(self) -> list[str]:
        """Return the settings that have no use, since they are of workers and there are none."""
        if self.workers is not None:
            return []
        own = [each for each in fields(self) if each.name in OF_WORKERS]
        return [each.name for each in own if getattr(self, each.name) != each.default]


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """One service.

    Attributes:
        name: What it is called in messages.
        target: Its handler, ``MODULE:HANDLER`` or ``PATH.py:HANDLER``; see `portico.target`.
        addresses: Where it serves; at least one.
        settings: What runs and protects its servers.
    """

    name: str
    target: str
    addresses: tuple[Address, ...]
    settings: Settings


def _unchanged(error: PorticoError) -> PorticoError:
    return error


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """All that a program is told.

    Attributes:
        process: How its processes are run.
        services: What they serve, each of them all of it; at least one.
        explain: Returns an error about one of these values so that it says where the value stands,
            as far as whoever has read it knows.
    """

    process: ProcessSettings
    services: tuple[ServiceSettings, ...]
    explain: Callable[[PorticoError], PorticoError] = field(
        default=_unchanged, repr=False, compare=False
    )


def _check_whole(name: str, value: Any, least: int, expected: str) -> None:
    most = MOST_WORKERS if name == "workers" else None
    if value is None:
        return
    if not _is_whole(value) or value < least or (most is not None and value > most):
        raise SettingError(name, value, expected)


def _check_seconds(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise SettingError(name, value, "a number of seconds above 0, or None for no limit")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
