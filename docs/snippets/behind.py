import portico


class WhoAmI(portico.StreamRequestHandler):
    def handle(self) -> None:
        header = self.server.proxy_header(self.request)
        name = header.authority if header else None
        self.wfile.write(f"{self.client_address[0]} asked for {name}\n".encode())


class Server(portico.ThreadingTCPServer):
    proxy_protocol = ("127.0.0.1", "10.0.0.0/8")
    max_connections_per_peer = 100


if __name__ == "__main__":
    with Server(("127.0.0.1", 9000), WhoAmI) as server:
        server.serve_forever()
