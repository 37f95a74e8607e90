import portico


class Upper(portico.DatagramRequestHandler):
    """Answer every datagram in capitals."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.read().upper())
