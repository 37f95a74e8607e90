"""Have a target imported, and served for a moment to clients of our own; say what came of it.

Owns the clients and the bounds: a target that never ends is ended.  The target itself runs in
another process (`portico.doctor.probe`).
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from portico.address import InternetAddress, parse
from portico.doctor.facts import Account, Stall, TargetFacts, Trial

IMPORT_PATIENCE: Final = 30.0
"""Seconds that importing a target may take; half of what a worker may take to start."""

END_PATIENCE: Final = 1.0
"""Seconds that it has to end once it is told to."""

CLIENTS: Final = 4
"""Clients at once: so many that one that is held up holds up others."""

MOST_ROUNDS: Final = 100
"""Requests of one client at the most, so that a quick handler is not a load test."""

REPLY_PATIENCE: Final = 0.5
"""Seconds until a client that got no answer to a datagram sends another."""


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """How a target is to be tried.

    Attributes:
        seconds: For how long.
        say: What each client sends; it then has no more to say.
    """

    seconds: float
    say: bytes = b""


def examine(
    target: str,
    schemes: Iterable[str],
    request: TrialRequest | None = None,
    *,
    account: Account | None = None,
    import_patience: float = IMPORT_PATIENCE,
) -> TargetFacts:
    """Say what importing a target does, and serving it.

    Args:
        target: Its name.
        schemes: Those of the addresses that it is to serve, as far as they are known.
        request: How it is to be tried; ``None`` to import it alone.
        account: As whom; ``None`` for who this process is.
        import_patience: Seconds that the import may take.
    """
    words: dict[str, Any] = {"target": target, "schemes": list(schemes), "serve": bool(request)}
    if account is not None:
        words["account"] = [account.uid, account.gid, sorted(account.groups), account.words]
    with _probing(words) as reports:
        told = reports.next(time.monotonic() + import_patience)
        if told is None:
            why = "has not ended" if reports.is_open else "ended the process"
            within = f" after {import_patience:g} s" if reports.is_open else ""
            return TargetFacts(problem=f"importing {target!r} {why}{within}")
        if "problem" in told:
            return TargetFacts(problem=told["problem"])
        threads = tuple(told["threads"])
        if request is None:
            return TargetFacts(threads=threads)
        return TargetFacts(threads=threads, trial=_try(reports, request))


def _try(reports: _Reports, request: TrialRequest) -> Trial:
    """Be the clients of a target that is served, and collect what is told of it."""
    told = reports.next(time.monotonic() + IMPORT_PATIENCE)
    if told is None or "address" not in told:
        return Trial(problem="it was not served" if told is None else str(told.get("problem")))
    address = parse(told["address"])
    assert isinstance(address, InternetAddress)
    deadline = time.monotonic() + request.seconds
    clients = [_Client(address, request.say, deadline) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    stalls: dict[str, Stall] = {}
    failures: list[str] = []
    while (told := reports.next(deadline)) is not None:
        if "place" in told:
            place, duration = str(told["place"]), float(told["duration"])
            stalls[place] = Stall(place, duration)
        elif "failure" in told:
            failures.append(str(told["failure"]))
    for client in clients:
        client.join()
    return Trial(
        clients=sum(client.sent for client in clients),
        answered=sum(client.answered for client in clients),
        stalls=tuple(stalls.values()),
        failures=tuple(failures),
        problem="" if reports.is_open else "the handler ended the process",
    )


class _Client(threading.Thread):
    """Connects, speaks and listens, again and again, until the deadline."""

    def __init__(self, address: InternetAddress, say: bytes, deadline: float) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self.answered = 0
        self._address = address
        self._say = say
        self._deadline = deadline

    def run(self) -> None:
        is_datagram = self._address.scheme.is_datagram
        for _ in range(MOST_ROUNDS):
            if time.monotonic() >= self._deadline:
                return
            with suppress(OSError):  # it was closed, or time is over
                with socket.socket(self._address.family, self._address.scheme.socket_type) as own:
                    own.settimeout(max(self._deadline - time.monotonic(), 0.001))
                    own.connect((self._address.host, self._address.port))
                    self.sent += 1
                    if is_datagram:
                        self._exchange(own)
                    else:
                        self._converse(own)
                    self.answered += 1

    def _converse(self, own: socket.socket) -> None:
        own.sendall(self._say)
        own.shutdown(socket.SHUT_WR)
        while own.recv(65536):
            own.settimeout(max(self._deadline - time.monotonic(), 0.001))

    def _exchange(self, own: socket.socket) -> None:
        own.settimeout(min(REPLY_PATIENCE, max(self._deadline - time.monotonic(), 0.001)))
        own.send(self._say)
        own.recv(65536)


class _Reports:
    """What the other process tells, line by line."""

    def __init__(self, descriptor: int) -> None:
        self.is_open = True
        self._descriptor = descriptor
        self._waiting = b""
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def next(self, deadline: float) -> dict[str, Any] | None:
        """Wait for the next; ``None`` at the deadline, or when there is nobody to tell more."""
        while b"\n" not in self._waiting:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self.is_open or not self._poll.poll(remaining * 1000):
                return None
            more = os.read(self._descriptor, 65536)
            self._waiting += more
            self.is_open = bool(more)
        line, _, self._waiting = self._waiting.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told


@contextmanager
def _probing(words: Mapping[str, Any]) -> Generator[_Reports]:
    """Run the other process while the block runs."""
    reader, writer = os.pipe()
    try:
        try:
            process = subprocess.Popen(  # noqa: S603  # our own program
                [sys.executable, "-m", "portico.doctor.probe", str(writer), json.dumps(words)],
                pass_fds=[writer],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what the target prints is not what was asked
                stderr=subprocess.DEVNULL,
            )
        finally:
            os.close(writer)
        with process:
            try:
                yield _Reports(reader)
            finally:
                process.terminate()
                try:
                    process.wait(END_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
    finally:
        os.close(reader)
