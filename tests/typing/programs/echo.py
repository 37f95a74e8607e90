"""A stream handler on the servers of the module, started in every way that it documents."""

import socketserver
import threading


class Echo(socketserver.StreamRequestHandler):
    """Answers each line with itself."""

    timeout = 30
    rbufsize = 4096
    disable_nagle_algorithm = True

    def handle(self) -> None:
        for line in iter(self.rfile.readline, b""):
            self.wfile.write(line)


class Raw(socketserver.BaseRequestHandler):
    """Answers what it gets at once."""

    def handle(self) -> None:
        self.request.sendall(self.request.recv(1024).upper())


def serve_here(port: int) -> None:
    with socketserver.TCPServer(("localhost", port), Echo) as server:
        server.serve_forever()


def serve_in_a_thread(port: int) -> socketserver.ThreadingTCPServer:
    server = socketserver.ThreadingTCPServer(("localhost", port), Raw)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.daemon = True
    thread.start()
    return server


def serve_some(server: socketserver.BaseServer, count: int) -> None:
    server.timeout = 5
    for _ in range(count):
        server.handle_request()


def stop(server: socketserver.BaseServer) -> None:
    server.shutdown()
    server.server_close()


def serve_ipv6() -> None:
    class Server(socketserver.ForkingTCPServer):
        address_family = 10
        allow_reuse_address = True
        request_queue_size = 100
        max_children = 4

    with Server(("::1", 0, 0, 0), Echo, bind_and_activate=False) as server:
        server.allow_reuse_port = True
        server.server_bind()
        server.server_activate()
        print(server.server_address, server.socket.fileno(), server.fileno())
        server.serve_forever(poll_interval=0.5)
