"""What all tests share: a server that serves in a thread, its clients, and waits that end.

Every wait is for something that happens, and gives up after `PATIENCE`, which is far more than a
busy machine needs: no test depends on how long something takes.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar
from weakref import WeakSet

from portico import TCPServer, events
from portico.events import Event, ServerStarted

PATIENCE = 60.0
"""Seconds until a wait counts as endless."""

ROOT = Path(__file__).resolve().parent.parent
"""Where programs run, so that they can import what tests can."""

T = TypeVar("T")
E = TypeVar("E", bound=Event)
S = TypeVar("S", bound=TCPServer)


# --- waits ------------------------------------------------------------------------------


def eventually(predicate: Callable[[], object], what: str = "") -> None:
    """Look again and again until `predicate` holds.

    For what tells nobody that it happened; where there is an event, wait for that.
    """
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if predicate():
            return
        pause.wait(0.01)
    raise AssertionError(f"it never came to be that {what or predicate}")


class Call(Generic[T]):
    """A function that runs in a thread of its own, so that a test outlives it if it hangs."""

    def __init__(self, function: Callable[..., T], *args: Any) -> None:
        self._outcome: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        try:
            self._outcome.append(function(*args))
        except BaseException as failure:  # belongs to the test that asks for the result
            self._failure = failure

    @property
    def thread(self) -> int:
        """What `threading.get_ident` returns in the function."""
        ident = self._thread.ident
        assert ident is not None
        return ident

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def failure(self) -> BaseException | None:
        """Wait for the end, and return what the function raised."""
        self._thread.join(PATIENCE)
        assert not self.is_running(), "it does not end"
        return self._failure

    def result(self) -> T:
        """Wait for the end, and return what the function returned, or raise what it raised."""
        failure = self.failure()
        if failure is not None:
            raise failure
        return self._outcome[0]


# --- clients ----------------------------------------------------------------------------

# A forking server in the process of a test leaves each child a copy of every open socket, the
# test's own clients among them, and while a child has a copy no client seems to close.  So every
# client of this module is closed in each forked child.  The lock keeps a fork from coming in the
# middle of the making or the closing of one; it is re-entrant for the close in the child.
_forking = threading.RLock()


class Client(socket.socket):
    """A socket of which a forked child has no copy."""

    made: ClassVar[WeakSet[Client]] = WeakSet()

    def __init__(self, family: int, kind: int) -> None:
        with _forking:
            super().__init__(family, kind)
            self.made.add(self)
        self.settimeout(PATIENCE)

    def close(self) -> None:
        with _forking:
            super().close()


def _close_in_child() -> None:
    for client in tuple(Client.made):
        client.close()
    _forking.release()


os.register_at_fork(
    before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_in_child
)


@contextmanager
def not_forking() -> Iterator[None]:
    """Have no thread of this process fork while a block runs.

    For what must not be cut in two: a lock that is taken meanwhile stays taken in the child.
    """
    with _forking:
        yield


def port_of_nobody() -> int:
    """Return a TCP port that is free, and that the system gives to nobody of its own accord.

    For who closes a listener and opens another there: any connection of another process could have
    got the port in between, if it were one of those.
    """
    while True:
        port = random.randrange(10_000, 32_768)  # no secret; Linux begins above
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port


def connect(server: TCPServer) -> socket.socket:
    """Connect a client to `server`, whatever the kind of its socket."""
    client = Client(server.address_family, server.socket_type)
    try:
        if (client.family, client.type) == (socket.AF_UNIX, socket.SOCK_DGRAM):
            client.bind("")  # an address that Linux chooses, for the reply
        client.connect(server.server_address)
    except BaseException:
        client.close()
        raise
    return client


def ask(client: socket.socket, question: bytes = b"") -> bytes:
    """Send `question` as all that this client has to say, and return the whole answer."""
    if client.type == socket.SOCK_DGRAM:
        client.send(question)
        return client.recv(65536)
    client.sendall(question)
    client.shutdown(socket.SHUT_WR)
    return received(client)


def received(client: socket.socket) -> bytes:
    """Return what comes until the other end closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def goodbye(client: socket.socket) -> bytes:
    """Return what comes until the other end closes, in whatever way it does.

    A connection that is closed before everything in it was read is reset by the kernel.
    """
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def reset(client: socket.socket) -> None:
    """Close so that the other end sees a connection reset instead of an end-of-file."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# --- servers ----------------------------------------------------------------------------


class RunningServer(Generic[S]):
    """A server that serves in a thread while a ``with`` block runs, and is closed after it.

    What ends the loop other than a shutdown is raised at the end of the block, unless the test
    has asked for it with `wait_ended`.
    """

    def __init__(self, server: S, poll_interval: float = 0.5) -> None:
        self.server = server
        self._poll_interval = poll_interval
        self._told = False

    def __enter__(self) -> Self:
        started = threading.Event()

        def note(event: ServerStarted) -> None:
            if event.server is self.server:
                started.set()

        def serve() -> None:
            try:
                self.server.serve_forever(self._poll_interval)
            finally:
                started.set()  # or it never will

        unsubscribe = events.subscribe(note, ServerStarted)
        try:
            self._call = Call(serve)
            assert started.wait(PATIENCE), "the server does not start"
        finally:
            unsubscribe()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.shutdown()
            ended = self.wait_ended if self._told else self._call.result
            ended()
        finally:
            Call(self.server.server_close).result()

    @property
    def thread(self) -> int:
        """The serving thread."""
        return self._call.thread

    def is_serving(self) -> bool:
        return self._call.is_running()

    def connect(self) -> socket.socket:
        return connect(self.server)

    def ask(self, question: bytes = b"") -> bytes:
        """Return what the server answers to a client that asks this and no more."""
        with self.connect() as client:
            return ask(client, question)

    def shutdown(self) -> None:
        Call(self.server.shutdown).result()

    def wait_ended(self) -> BaseException | None:
        """Wait until the loop has ended, and return what it raised."""
        self._told = True
        return self._call.failure()


def replace(server: TCPServer, **hooks: object) -> None:
    """Put other hooks in the place of a server's own."""
    for name, hook in hooks.items():
        setattr(server, name, hook)


@contextmanager
def recorded(*kinds: type[E]) -> Iterator[list[E]]:
    """Collect the events of these kinds, in the order in which they come."""
    seen: list[E] = []
    unsubscribe = events.subscribe(seen.append, *kinds)
    try:
        yield seen
    finally:
        unsubscribe()


class Journal:
    """Notes that threads and forked processes make, in one order."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._bytes = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reader)
        os.close(self._writer)

    def note(self, entry: str) -> None:
        """Write one line; a pipe keeps lines whole whoever writes them."""
        os.write(self._writer, f"{entry}\n".encode())

    def entries(self) -> list[str]:
        """Return all notes so far."""
        while select.select([self._reader], [], [], 0)[0]:
            self._bytes += os.read(self._reader, 65536)
        return self._bytes.decode().splitlines()

    def wait_for(self, entry: str, times: int = 1) -> list[str]:
        """Wait until there are so many notes of this kind, and return all notes."""
        eventually(lambda: self.entries().count(entry) >= times, f"{times} x {entry!r} is noted")
        return self.entries()


# --- what a process holds ---------------------------------------------------------------


def descriptors() -> dict[int, str]:
    """Return the open descriptors of this process, and what each one is."""
    open_now = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            open_now[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:  # the one that listed the folder
            pass
    return open_now


def children() -> set[int]:
    """Return the child processes of this one, those that nobody has collected included."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; the parent is the second word after.
            _, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(parent) == os.getpid():
            found.add(int(entry.parent.name))
    return found


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Check that a block leaves no descriptor, thread or child process that it did not find."""
    files, threads, processes = descriptors(), set(threading.enumerate()), children()
    yield
    eventually(lambda: not set(threading.enumerate()) - threads, "its threads have ended")
    eventually(lambda: not children() - processes, "its children are collected")
    left = {number: what for number, what in descriptors().items() if number not in files}
    assert not left, f"left open: {left}"


def in_child(function: Callable[[], object]) -> int:
    """Run a function in a forked child, and return how that ended: 0 unless it raised or died."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE))  # if it hangs, it dies
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(waited)


# --- programs ---------------------------------------------------------------------------


_PYTHON = (
    sys.executable,
    *("-W", "error"),
    # As in pyproject.toml: the children of a server in a thread only run a handler.
    *("-W", "ignore:This process:DeprecationWarning"),
    "-c",
)


def run_program(source: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, in an interpreter of its own, and return what it wrote."""
    return subprocess.run(
        [*_PYTHON, source, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE,
        check=False,
    )


@contextmanager
def running_program(source: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program beside the test; it is killed if it still runs at the end."""
    with subprocess.Popen(
        [*_PYTHON, source, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
