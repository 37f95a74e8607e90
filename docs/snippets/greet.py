import portico


class Greet(portico.StreamRequestHandler):
    """Ask for a name, and greet whoever has one."""

    timeout = 30  # seconds that a client may stay silent

    def handle(self) -> None:
        name = self.rfile.readline(200).strip().decode()
        if not name.isalpha():
            raise ValueError(f"not a name: {name!r}")
        self.wfile.write(f"Hello {name}!\n".encode())
