import portico


class Shout(portico.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class Server(portico.ThreadPoolTCPServer):
    ssl_context = "cert.pem", "key.pem"


if __name__ == "__main__":
    with Server(("127.0.0.1", 9000), Shout) as server:
        server.serve_forever()
