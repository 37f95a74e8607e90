"""Serve with gevent: a greenlet for each connection, or datagram.

    python greenlets.py echo|lines|datagrams|web

Prints the port that the kernel chose.
"""

# gevent comes without types.
# mypy: disable-error-code="import-untyped,import-not-found"

import sys
from collections.abc import Callable, Iterable
from typing import Any

from gevent.pywsgi import WSGIServer
from gevent.server import DatagramServer, StreamServer
from gevent.socket import IPPROTO_TCP, TCP_NODELAY, socket

HERE = ("127.0.0.1", 0)
BACKLOG = 1024


def echo(connection: socket, _: Any) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def echo_lines(connection: socket, _: Any) -> None:
    with connection.makefile("rb") as rfile:
        while line := rfile.readline():
            connection.sendall(line)


class EchoDatagrams(DatagramServer):  # type: ignore[misc]
    def handle(self, data: bytes, address: Any) -> None:
        self.sendto(data, address)


def page(_: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    body = b"Hello, world!\n"
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


SERVERS: dict[str, Callable[[], Any]] = {
    "echo": lambda: StreamServer(HERE, echo, backlog=BACKLOG),
    "lines": lambda: StreamServer(HERE, echo_lines, backlog=BACKLOG),
    "datagrams": lambda: EchoDatagrams(HERE),
    "web": lambda: WSGIServer(HERE, page, backlog=BACKLOG, log=None),
}


def main(role: str) -> None:
    server = SERVERS[role]()
    server.start()
    if role != "datagrams":
        # Every connection inherits it from the listener.
        server.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
