from portico import StreamRequestHandler, TCPServer, ThreadingMixIn


class EchoServer(ThreadingMixIn, TCPServer):
    """The engine first, the family last; settings are class attributes."""

    allow_reuse_address = True
    request_queue_size = 1024


class Echo(StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)
