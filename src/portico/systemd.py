"""Speak with systemd: take the sockets that it passes, and tell it how the service is.

Owns both protocols and their environment variables, which are removed once they are read, so that
no child takes them for its own.  Leaves to others what is said when, and what a passed socket is
good for.

Sources: sd_listen_fds(3) (passed sockets); sd_notify(3) (what can be told, and the two kinds of
addresses); sd_watchdog_enabled(3); systemd.service(5), ``Type=notify-reload``.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Final, Self

FIRST_DESCRIPTOR: Final = 3
"""The first descriptor that is passed: the one after standard error."""

UNNAMED: Final = "unknown"
"""What a socket is called that came without a name, as sd_listen_fds(3) says."""

NOTIFY_PATIENCE: Final = 1.0
"""Seconds to wait for the queue of systemd to have room.

It reads at once.  A service must neither fail nor stand still because it does not.
"""

_LISTEN: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_MICROSECONDS: Final = 1_000_000

_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------- passed sockets


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """A socket that systemd has opened.

    Attributes:
        descriptor: Its descriptor, which stays open as long as the process lives.
        name: ``FileDescriptorName=`` of its unit, which is the unit's own name by default.
    """

    descriptor: int
    name: str


@cache
def passed_sockets() -> tuple[PassedSocket, ...]:
    """Return the sockets that systemd passed to this process.

    The environment is read at the first call and remembered; a child that is forked afterwards has
    inherited what it says.  Children that run another program inherit neither the variables nor
    the descriptors.
    """
    return take_sockets(os.environ)


def take_sockets(environment: MutableMapping[str, str]) -> tuple[PassedSocket, ...]:
    """Read which sockets were passed to this process, and remove the variables that say it."""
    given = {name: environment.pop(name) for name in _LISTEN if name in environment}
    count = _number(given.get("LISTEN_FDS"))
    if not count:
        return ()
    if _number(given.get("LISTEN_PID")) != os.getpid():
        # A program in between, such as a shell, was meant, or left them to all of its children.
        _log.warning(
            "%d passed sockets are not taken: they are for process %s, and this is process %d; "
            "let systemd start portico itself, or end a script that starts it with `exec`",
            count,
            given.get("LISTEN_PID", "(none)"),
            os.getpid(),
        )
        return ()
    names = given.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * (count - len(names))
    passed = [
        PassedSocket(FIRST_DESCRIPTOR + position, names[position] or UNNAMED)
        for position in range(count)
    ]
    return tuple(each for each in passed if _is_kept_from_children(each.descriptor))


def _is_kept_from_children(descriptor: int) -> bool:
    """Make a descriptor close-on-exec; false if there is no such descriptor."""
    with suppress(OSError):
        os.set_inheritable(descriptor, False)
        return True
    _log.warning("descriptor %d, which LISTEN_FDS counts, is not open", descriptor)
    return False


# ------------------------------------------------------------------------------- notifications


class Notifier:
    """Tell systemd how the service is; does nothing where there is no systemd.

    Nothing here raises or waits for long: a service goes on if systemd does not listen.  Callable
    from any thread.

    Args:
        address: Where to tell it: a path, or ``@`` and an abstract name; ``None`` for nowhere.
        watchdog: Seconds after which systemd restarts a service that has not said `keep_alive`;
            ``None`` if it does not watch.
    """

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        self._address = address
        self._watchdog = watchdog
        self._has_failed = False

    @classmethod
    def take(cls, environment: MutableMapping[str, str] | None = None) -> Self:
        """Read where systemd wants to be told, and remove the variables that say it.

        Args:
            environment: By default that of the process.
        """
        variables: MutableMapping[str, str] = os.environ if environment is None else environment
        address = variables.pop("NOTIFY_SOCKET", None)
        interval = _number(variables.pop("WATCHDOG_USEC", None))
        watched = variables.pop("WATCHDOG_PID", None)
        if not interval or (watched is not None and _number(watched) != os.getpid()):
            interval = None
        if address is not None and not address.startswith(("/", "@")):
            _log.warning("NOTIFY_SOCKET=%r: expected a path, or @ and a name", address)
            address = None
        return cls(address, interval and interval / _MICROSECONDS)

    @property
    def is_connected(self) -> bool:
        """Whether there is a systemd that wants to be told."""
        return self._address is not None

    @property
    def watchdog_interval(self) -> float | None:
        """Seconds between two calls of `keep_alive`: half of those that systemd waits.

        ``None`` if it does not watch.
        """
        if self._address is None or self._watchdog is None:
            return None
        return self._watchdog / 2

    def variables(self, pid: int) -> dict[str, str]:
        """Return what a process that takes over needs in its environment.

        Args:
            pid: Its number.
        """
        if self._address is None:
            return {}
        told = {"NOTIFY_SOCKET": self._address}
        if self._watchdog is not None:
            told["WATCHDOG_USEC"] = str(round(self._watchdog * _MICROSECONDS))
            told["WATCHDOG_PID"] = str(pid)
        return told

    def ready(self, status: str = "") -> bool:
        """Tell that the service serves, for the first time or again after `reloading`.

        Args:
            status: A line for ``systemctl status``.

        Returns:
            Whether systemd was told, here and in the other methods.
        """
        return self._send("READY=1", _status(status))

    def reloading(self, status: str = "") -> bool:
        """Tell that the settings are read anew; `ready` has to follow, even if they cannot be."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self._send("RELOADING=1", f"MONOTONIC_USEC={now}", _status(status))

    def stopping(self, status: str = "", *, within: float | None = None) -> bool:
        """Tell that the service has begun to stop.

        Args:
            status: A line for ``systemctl status``.
            within: Seconds that it may take at the most; systemd waits for as long, even if
                ``TimeoutStopSec=`` is less.  ``None`` says nothing of it.
        """
        extended = "" if within is None else f"EXTEND_TIMEOUT_USEC={round(within * _MICROSECONDS)}"
        return self._send("STOPPING=1", extended, _status(status))

    def status(self, text: str) -> bool:
        """Tell how the service is, in a line for ``systemctl status``."""
        return self._send(_status(text))

    def main_process(self, pid: int) -> bool:
        """Tell that another process is the service from now on; only from the one that was.

        The last word of this one: what it told after that would be taken for the other's.
        """
        is_told = self._send(f"MAINPID={pid}")
        self._address = None
        return is_told

    def keep_alive(self) -> bool:
        """Tell that the service is alive, at least every `watchdog_interval` seconds.

        Does nothing if systemd does not watch.
        """
        return self._watchdog is not None and self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> bool:
        """Send what is not empty, in one message."""
        address = self._address  # which another thread may take away
        if address is None:
            return False
        message = "\n".join(filter(None, assignments)).encode("utf-8", "replace")
        try:
            # A socket for each: messages are rare, and one that is kept would have to survive
            # forks, and systemd's own restart.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(NOTIFY_PATIENCE)
                sender.sendto(message, _socket_name(address))
        except OSError as error:
            if not self._has_failed:  # once: the watchdog would repeat it for ever
                self._has_failed = True
                _log.warning("systemd cannot be told at %s: %s", address, error)
            return False
        self._has_failed = False
        return True


def _socket_name(address: str) -> bytes:
    """Return what the system calls an address: an abstract name begins with a zero byte."""
    name = os.fsencode(address)
    return b"\0" + name[1:] if address.startswith("@") else name


def _status(text: str) -> str:
    """Return the assignment of a status, in one line: the next line would be one of its own."""
    return f"STATUS={' '.join(text.split())}" if text else ""


def _number(text: str | None) -> int | None:
    """Read a number above 0; ``None`` if it is not one."""
    if text is not None and text.isascii() and text.isdecimal() and len(text) < 20:
        return int(text) or None
    return None
