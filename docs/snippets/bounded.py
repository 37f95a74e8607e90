import portico


class Upper(portico.StreamRequestHandler):
    """Send each line back in capitals."""

    timeout = 60  # seconds; a client that says nothing for longer makes room for another

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class UpperServer(portico.ThreadPoolTCPServer):
    max_workers = 16
    max_queued = 8


if __name__ == "__main__":
    with UpperServer(("127.0.0.1", 9000), Upper) as server:
        server.serve_forever()
