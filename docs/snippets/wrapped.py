import http.server
import ssl

import portico


class Web(portico.ThreadPoolMixIn, portico.TCPServer):
    allow_reuse_address = True


if __name__ == "__main__":
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert.pem", "key.pem")
    with Web(("127.0.0.1", 9000), http.server.SimpleHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.serve_forever()
