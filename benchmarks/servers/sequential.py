"""Serve with any class that has the shape of a `socketserver` server.

    python sequential.py MODULE:CLASS echo|lines|datagrams|keyvalue

The handlers are the plain, sequential code that a newcomer would write, on the handler classes
of the server's own module.  Every setting is the class's own, except the backlog: the load
connects in bursts that the standard library's backlog of 5 (before Python 3.15) would turn into
waits of a second, and what is measured here is the server.  Prints the port that the kernel chose.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def echo_handler(module: ModuleType) -> type:
    class Echo(module.BaseRequestHandler):  # type: ignore[misc,name-defined]  # found by name
        def handle(self) -> None:
            while data := self.request.recv(65536):
                self.request.sendall(data)

    return Echo


def lines_handler(module: ModuleType) -> type:
    class EchoLines(module.StreamRequestHandler):  # type: ignore[misc,name-defined]
        disable_nagle_algorithm = True  # as every other server here has it

        def handle(self) -> None:
            while line := self.rfile.readline():
                self.wfile.write(line)

    return EchoLines


def datagrams_handler(module: ModuleType) -> type:
    class EchoDatagram(module.BaseRequestHandler):  # type: ignore[misc,name-defined]
        def handle(self) -> None:
            data, socket = self.request
            socket.sendto(data, self.client_address)

    return EchoDatagram


def keyvalue_handler(_: ModuleType) -> Any:
    sys.path.append(str(EXAMPLES))
    return importlib.import_module("keyvalue").KeyValueHandler


HANDLERS = {
    "echo": echo_handler,
    "lines": lines_handler,
    "datagrams": datagrams_handler,
    "keyvalue": keyvalue_handler,
}


def main(server: str, role: str) -> None:
    sys.path.append(str(ROOT))  # for benchmarks.protected
    module_name, _, class_name = server.partition(":")
    module = importlib.import_module(module_name)
    base = getattr(module, class_name)

    class Server(base):  # type: ignore[misc,valid-type]  # found by name
        request_queue_size = 1024

    with Server(("127.0.0.1", 0), HANDLERS[role](module)) as bound:
        print(bound.server_address[1], flush=True)
        bound.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
