"""Serve one small page with `http.server`; a program that knows nothing of portico.

    python web.py
    portico run --engine green web.py

Prints the port that the kernel chose.
"""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PAGE = b"Hello, world!\n"


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True  # the head and the page are two writes

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *arguments: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 1024


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Page) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
