"""Hand what a program holds over to another process of the same command line.

Owns how that process is started, what it inherits and how it learns of it: descriptors, and an
environment variable that says what they are.  Leaves to both sides when one takes over from the
other; they tell each other over a channel.

Source: execve(2) and open(2), ``O_CLOEXEC``: which descriptors a program is left with.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Generator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Final

from portico.address import Address, BoundAddress, DescriptorAddress, parse
from portico.channel import Channel
from portico.counters import Counters
from portico.directory import Directory
from portico.errors import PorticoError
from portico.listener import OpenListener
from portico.place import Place
from portico.socketfile import SocketFile
from portico.systemd import passed_sockets

VARIABLE: Final = "PORTICO_HERITAGE"
"""The environment variable.  Not a setting: it names descriptors, which only an heir has."""


END_PATIENCE: Final = 1.0
"""Seconds that an heir has to end in which has closed its channel, before it is killed."""

LOOK_INTERVAL: Final = 0.05
"""Seconds between two looks at whether an heir has ended that has no more to say."""


ENTER: Final = "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
"""A program that goes to another directory and starts another program there.

This process may serve, and where it is then is what its handlers rely on; and posix_spawn(3) has no
word for it."""


class HandoverError(PorticoError, OSError):
    """What the environment says of inherited descriptors is not so."""


@dataclass(frozen=True, slots=True)
class Heirloom:
    """A listener that was inherited.

    Attributes:
        address: Where it is, as it was configured.
        descriptor: Its descriptor.
        file: The file that belongs to it, if there is one.
    """

    address: str
    descriptor: int
    file: SocketFile | None

    def open(self, address: BoundAddress) -> OpenListener:
        """Return the listener; until it is taken over, closing it ends nothing.

        Raises:
            HandoverError: The descriptor is no socket.
        """
        try:
            bound = socket.socket(fileno=self.descriptor)
            is_both = bound.family == socket.AF_INET6 and not bound.getsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
            )
            family = socket.AddressFamily(bound.family)
            place = Place(address, family, bound.getsockname(), is_both)
            # A socket made of a descriptor believes that it waits.  A copy of it would have that be
            # so, for every process that accepts from this listener.
            bound.setblocking(bound.type != socket.SOCK_STREAM)
        except OSError as error:
            reason = f"descriptor {self.descriptor} is no listener for {address}: {error.strerror}"
            raise HandoverError(f"{VARIABLE}: {reason}") from error
        return OpenListener(place, bound, is_lent=True)

    def place(self) -> Place:
        """Ask the socket where it is.

        Raises:
            HandoverError: The descriptor is no socket.
        """
        address: Any = parse(self.address)
        with closing(replace(self, descriptor=os.dup(self.descriptor)).open(address)) as opened:
            return opened.place

    def close(self) -> None:
        """Close the descriptor of a listener that is not wanted."""
        with suppress(OSError):
            os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class Heritage:
    """What a process has inherited from its predecessor.

    Attributes:
        channel: To the predecessor.
        predecessor: Its process.
        listeners: Those that it had open.
        counters: What `Counters.adopt` takes; ``None`` if it had none.
        pid_file: The descriptor of its pid file; ``None`` if it had none.
    """

    channel: Channel
    predecessor: int
    listeners: tuple[Heirloom, ...]
    counters: str | None
    pid_file: int | None = None


def inherit(environment: MutableMapping[str, str] | None = None) -> Heritage | None:
    """Return what was inherited, ``None`` if nothing; the environment forgets it.

    The descriptors are not passed on to programs that this process starts.

    Raises:
        HandoverError: It cannot be read.
    """
    variables: MutableMapping[str, str] = os.environ if environment is None else environment
    text = variables.pop(VARIABLE, None)
    if text is None:
        return None
    try:
        told: dict[str, Any] = json.loads(text)
        listeners = tuple(
            Heirloom(
                str(each["address"]),
                int(each["descriptor"]),
                None if each["file"] is None else _read_file(*each["file"]),
            )
            for each in told["listeners"]
        )
        channel, predecessor = int(told["channel"]), int(told["predecessor"])
        counters = told["counters"]
        pid_file = None if told.get("pid_file") is None else int(told["pid_file"])
        own = (channel,) if pid_file is None else (channel, pid_file)
        for descriptor in (*own, *(each.descriptor for each in listeners)):
            os.set_inheritable(descriptor, False)
        if told["passed"]:  # which were passed to another process, the first one
            variables["LISTEN_PID"] = str(os.getpid())
            variables["LISTEN_FDS"] = str(len(told["passed"]))
            variables["LISTEN_FDNAMES"] = ":".join(told["passed"])
        end = Channel(socket.socket(fileno=channel))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HandoverError(f"{VARIABLE}: expected what a predecessor sets ({error})") from error
    counters = None if counters is None else str(counters)
    return Heritage(end, predecessor, listeners, counters, pid_file)


@dataclass(slots=True)
class Heir:
    """A process that is to take over.

    Attributes:
        process: Its number.
        channel: To it.
        deadline: The instant at which it is killed, if it does not serve by then.
        taken: The addresses of the listeners that it has taken, since it serves; ``None`` before.
        pid_file: Where its pid file is; ``None`` if it has none, and before it serves.
        end: How it has ended instead, in words; empty before.
    """

    process: int
    channel: Channel
    deadline: float = inf
    taken: list[str] | None = None
    pid_file: str | None = None
    end: str = ""
    _overdue: str = "it did not serve in time"
    _killed_for: str = ""
    _is_silent: bool = False

    @property
    def is_serving(self) -> bool:
        """Whether it has taken over."""
        return self.taken is not None

    @property
    def due(self) -> float:
        """The instant at which `attend` is to be called at the latest; never, if it is ``inf``."""
        if self.is_serving or self.end:
            return inf
        return min(self.deadline, time.monotonic() + LOOK_INTERVAL if self._is_silent else inf)

    def fileno(self) -> int | None:
        """Return what is readable when it says something; ``None`` if it has no more to say."""
        return None if self._is_silent or self.is_serving else self.channel.fileno()

    def attend(self) -> bool:
        """Take note of what it says, that its time is over, and that it has ended; never waits.

        Returns:
            Whether its fate is settled: it serves, or has ended and is collected.
        """
        if not self._is_silent:
            self._listen()
        if not self.is_serving:
            if self.deadline <= time.monotonic():
                self._kill()
            self._collect()
        return self.is_serving or bool(self.end)

    def stop(self) -> None:
        """Have it end, if it does not serve: nobody is left to take over from."""
        if not self.is_serving and not self.end:
            with suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGTERM)

    def _listen(self) -> None:
        messages = self.channel.receive()
        for message in messages or ():
            if message["kind"] == "serving":
                self.taken = list(message.get("listeners", ()))
                self.pid_file = message.get("pid_file")
        if messages is None:
            # It ends, or else nobody will ever hear that it serves.
            self._is_silent = True
            self.channel.close()
            if self.deadline > (soon := time.monotonic() + END_PATIENCE):
                self.deadline, self._overdue = soon, "it had closed its channel"

    def _kill(self) -> None:
        self.deadline, self._killed_for = inf, self._overdue
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)

    def _collect(self) -> None:
        try:
            process, status = os.waitpid(self.process, os.WNOHANG)
        except ChildProcessError:
            self.end = "ended"
        else:
            if not process:
                return
            self.end = said_end(status)
        if self._killed_for:
            self.end += f" ({self._killed_for})"
        self.channel.close()


def start_heir(
    listeners: Sequence[tuple[Address, OpenListener]],
    counters: Counters | None = None,
    variables: Mapping[str, str] | None = None,
    timeout: float | None = None,
    pid_file: int | None = None,
    directory: Directory | None = None,
) -> Heir:
    """Start the command line of this process again, and let it have what this one holds.

    Args:
        listeners: Each with the address that was asked for.
        counters: What is counted in, if it can be shared.
        variables: More for its environment.
        timeout: Seconds until it has to serve; ``None`` for no limit.
        pid_file: The descriptor of the pid file, if there is one.
        directory: Where it starts; ``None`` for the current one.

    Raises:
        OSError: The system refuses, or there is no such directory any more.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    if directory is not None and directory.is_left():
        command = [sys.executable, "-ISc", ENTER, str(directory.path), *command]
    ours, theirs = Channel.pair()
    try:
        own = (theirs.fileno(),) if pid_file is None else (theirs.fileno(), pid_file)
        with ExitStack() as lent:
            lent.enter_context(_inheritable(*own, *_descriptors(listeners)))
            text = None if counters is None else lent.enter_context(counters.inheritable())
            process = _spawn(command, theirs, listeners, text, pid_file, variables or {})
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Heir(process, ours, inf if timeout is None else time.monotonic() + timeout)


def said_end(status: int) -> str:
    """Say how a process ended, by what waitpid(2) told."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-code}"


def _spawn(
    command: list[str],
    channel: Channel,
    listeners: Sequence[tuple[Address, OpenListener]],
    counters: str | None,
    pid_file: int | None,
    variables: Mapping[str, str],
) -> int:
    told = {
        "channel": channel.fileno(),
        "predecessor": os.getpid(),
        "counters": counters,
        "pid_file": pid_file,
        "passed": [each.name for each in passed_sockets()],
        "listeners": [
            {
                "address": str(address),
                "descriptor": each.socket.fileno(),
                "file": None if each.file is None else _written_file(each.file),
            }
            for address, each in listeners
            if not address.scheme.is_inherited  # which the heir opens by its number, as we did
        ],
    }
    environment = {**os.environ, **variables, VARIABLE: json.dumps(told)}
    return os.posix_spawn(
        sys.executable,
        command,
        environment,
        setsigmask=(),
        setsigdef=[each for each in signal.Signals if signal.getsignal(each) != signal.SIG_IGN],
    )


def _descriptors(listeners: Sequence[tuple[Address, OpenListener]]) -> list[int]:
    """Return what an heir has to inherit."""
    found = [each.descriptor for each in passed_sockets()]
    for address, each in listeners:
        if isinstance(address, DescriptorAddress):
            found.append(address.descriptor)
        else:
            found.append(each.socket.fileno())
    return found


@contextmanager
def _inheritable(*descriptors: int) -> Generator[None]:
    """Let programs that are started in the block have these descriptors."""
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        yield
    finally:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)


def _read_file(path: str, *numbers: int) -> SocketFile:
    return SocketFile(Path(path), *map(int, numbers))


def _written_file(file: SocketFile) -> tuple[str, int, int, int, int]:
    return str(file.path), file.device, file.inode, file.uid, file.gid
