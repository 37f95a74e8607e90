"""Handlers that are no subclass: whatever makes a handler when it is called with a request."""

import functools
import socketserver
from collections.abc import Callable
from typing import Any


class Greet(socketserver.StreamRequestHandler):
    """Takes a greeting beside the request."""

    def __init__(
        self,
        request: Any,
        client_address: Any,
        server: socketserver.BaseServer,
        *,
        greeting: bytes = b"hello",
    ) -> None:
        self.greeting = greeting
        super().__init__(request, client_address, server)

    def handle(self) -> None:
        self.wfile.write(self.greeting)
        self.wfile.flush()


def make(request: Any, client_address: Any, server: socketserver.BaseServer) -> Greet:
    return Greet(request, client_address, server, greeting=b"servus")


HANDLERS: list[Callable[[Any, Any, socketserver.BaseServer], socketserver.BaseRequestHandler]] = [
    Greet,
    make,
    functools.partial(Greet, greeting=b"moin"),
]


def serve_all() -> None:
    for handler in HANDLERS:
        with socketserver.TCPServer(("", 0), handler) as server:
            server.handle_request()
    with socketserver.TCPServer(("", 0), Greet) as server:
        server.RequestHandlerClass = make
        server.handle_request()


def handler_of(kind: type[socketserver.BaseServer]) -> type[socketserver.BaseRequestHandler]:
    if issubclass(kind, socketserver.UDPServer):
        return socketserver.DatagramRequestHandler
    return socketserver.StreamRequestHandler


SERVERS: dict[str, type[socketserver.TCPServer]] = {
    "tcp": socketserver.TCPServer,
    "udp": socketserver.UDPServer,
    "unix": socketserver.UnixStreamServer,
    "unix-datagram": socketserver.UnixDatagramServer,
    "tcp-threads": socketserver.ThreadingTCPServer,
    "udp-threads": socketserver.ThreadingUDPServer,
    "unix-threads": socketserver.ThreadingUnixStreamServer,
    "unix-datagram-threads": socketserver.ThreadingUnixDatagramServer,
    "tcp-forks": socketserver.ForkingTCPServer,
    "udp-forks": socketserver.ForkingUDPServer,
}
