import portico


class Echo(portico.StreamRequestHandler):
    """Send every line back."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


if __name__ == "__main__":
    portico.serve(Echo, "tcp://127.0.0.1:9000", engine="green", idle_timeout=60)
