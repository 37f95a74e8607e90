"""Start servers, and talk to them as a client would; every wait is bounded and ends in an error."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 60.0
"""Seconds before a test gives up on something that takes milliseconds, even on a busy machine."""

POLL_INTERVAL = 0.01
"""Seconds between two looks of the standard library's loop at its flag; 0.5 is its default."""


def background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call a function in a thread; what it returns or raises, exits included, is in the future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=repr(function), daemon=True).start()
    return future


@contextmanager
def looping(server: Any) -> Iterator[Future[None]]:
    """Serve in a thread, and at the end wait until the loop has ended.

    Yields:
        The future of `serve_forever`.
    """
    loop = background(server.serve_forever, poll_interval=POLL_INTERVAL)
    try:
        yield loop
    finally:
        loop.exception(PATIENCE)


@contextmanager
def serving(server: Any) -> Iterator[Future[None]]:
    """Serve in a thread; at the end shut down, unless the loop has ended, and close.

    Yields:
        The future of `serve_forever`.
    """
    with looping(server) as loop:
        try:
            yield loop
        finally:
            if not loop.done():
                server.shutdown()
            server.server_close()


def connect(server: Any) -> socket.socket:
    """Connect to a stream server."""
    sock = socket.socket(server.address_family, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    sock.connect(server.server_address)
    return sock


def read_all(sock: socket.socket) -> bytes:
    """Read until the server says that there is no more."""
    chunks = []
    while chunk := sock.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


def receive(sock: socket.socket, size: int) -> bytes:
    """Read as many bytes, or those that are there before the end.

    Not with MSG_WAITALL, which a socket with a timeout does not keep.
    """
    data = b""
    while len(data) < size and (chunk := sock.recv(size - len(data))):
        data += chunk
    return data


def ask(server: Any, question: bytes = b"") -> bytes:
    """Connect, say something and no more, and return the whole answer."""
    with connect(server) as sock:
        sock.sendall(question)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def shout(request: Any, client_address: Any, server: Any) -> Any:
    """Handle a connection: answer all that comes, in capitals.  A handler may be a function."""
    request.sendall(read_all(request).upper())
