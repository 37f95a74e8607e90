import hashlib

import portico


class Fingerprint(portico.StreamRequestHandler):
    """Answer a line with its fingerprint, which takes a while to compute."""

    def handle(self) -> None:
        with portico.timeout(60):  # seconds for the whole conversation
            for line in self.rfile:
                key = portico.to_thread(hashlib.scrypt, line.strip(), salt=b"", n=2**14, r=8, p=1)
                self.wfile.write(key.hex().encode() + b"\n")


class FingerprintServer(portico.GreenTCPServer):
    max_hubs = 2


if __name__ == "__main__":
    with FingerprintServer(("127.0.0.1", 9000), Fingerprint) as server:
        server.serve_forever()
