"""A server that overrides every hook, with the types that typeshed gives them."""

import socket
import socketserver
import sys
from typing import Any

Request = socket.socket | tuple[bytes, socket.socket]


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Says what it does."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    served = 0

    def __init__(self, address: tuple[str, int], greeting: bytes) -> None:
        self.greeting = greeting
        super().__init__(address, Greet)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        super().server_bind()

    def server_activate(self) -> None:
        super().server_activate()
        self.say("listens")

    def get_request(self) -> tuple[socket.socket, Any]:
        request, client_address = super().get_request()
        request.settimeout(10)
        return request, client_address

    def verify_request(self, request: Request, client_address: Any) -> bool:
        return bool(client_address[0] == "127.0.0.1")

    def process_request(self, request: Request, client_address: Any) -> None:
        self.served += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Request, client_address: Any) -> None:
        super().process_request_thread(request, client_address)

    def finish_request(self, request: Request, client_address: Any) -> None:
        super().finish_request(request, client_address)

    def shutdown_request(self, request: Request) -> None:
        super().shutdown_request(request)

    def close_request(self, request: Request) -> None:
        super().close_request(request)

    def handle_error(self, request: Request, client_address: Any) -> None:
        self.say(f"{client_address}: {sys.exc_info()[1]}")

    def handle_timeout(self) -> None:
        self.say("nobody came")

    def service_actions(self) -> None:
        super().service_actions()

    def server_close(self) -> None:
        super().server_close()
        self.say("closed")

    def fileno(self) -> int:
        return self.socket.fileno()

    def say(self, what: str) -> None:
        print(what, file=sys.stderr)


class Greet(socketserver.BaseRequestHandler):
    """Knows which server it serves."""

    def setup(self) -> None:
        self.request.settimeout(1)

    def handle(self) -> None:
        assert isinstance(self.server, Server)
        self.request.sendall(self.server.greeting)

    def finish(self) -> None:
        print(f"served {self.client_address}")


class Forking(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Counts its children."""

    max_children = 10

    def service_actions(self) -> None:
        super().service_actions()
        self.collect_children(blocking=False)
        print(len(self.active_children or ()))


def run() -> None:
    with Server(("127.0.0.1", 0), b"hello") as server:
        server.serve_forever()
    with Forking("/run/greet.socket", socketserver.StreamRequestHandler) as server:
        server.serve_forever()
