from http.server import HTTPServer, SimpleHTTPRequestHandler

import portico


class Web(portico.ThreadingMixIn, HTTPServer):
    """The standard library's web server, with a thread of portico's for each request."""

    daemon_threads = True


if __name__ == "__main__":
    with Web(("127.0.0.1", 9000), SimpleHTTPRequestHandler) as server:
        server.serve_forever()
