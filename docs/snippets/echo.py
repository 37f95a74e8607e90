import portico


class Echo(portico.StreamRequestHandler):
    """Send every line back."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


if __name__ == "__main__":
    with portico.ThreadingTCPServer(("127.0.0.1", 9000), Echo) as server:
        server.serve_forever()
