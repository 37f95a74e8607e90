"""Our engines and handlers beside those of the standard library, as a type checker sees them."""

import http.server
import wsgiref.simple_server
import xmlrpc.server

import portico


class Web(portico.ThreadingMixIn, http.server.HTTPServer):
    """The way that the documentation shows."""

    daemon_threads = True


class ForkingWeb(portico.ForkingMixIn, http.server.HTTPServer):
    """Each request in a process of its own."""

    max_children = 8


class PooledWeb(portico.ThreadPoolMixIn, http.server.HTTPServer):
    """Requests on a bounded number of threads."""

    max_workers = 8
    max_queued = 0
    worker_idle_timeout = 1.5


class Calls(portico.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    """A server of procedures."""


class Application(portico.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    """A server of a WSGI application."""


def serve() -> None:
    with Web(("", 8000), http.server.SimpleHTTPRequestHandler) as web:
        web.serve_forever()
    with ForkingWeb(("", 8001), http.server.SimpleHTTPRequestHandler) as forking:
        forking.serve_forever()
    with PooledWeb(("", 8005), http.server.SimpleHTTPRequestHandler) as pooled:
        pooled.serve_forever()
    with Calls(("", 8002)) as calls:
        calls.register_introspection_functions()
        calls.serve_forever()
    with portico.ThreadingTCPServer(("", 8003), http.server.SimpleHTTPRequestHandler) as ours:
        ours.serve_forever()


def application() -> Application:
    return wsgiref.simple_server.make_server("", 8004, wsgiref.simple_server.demo_app, Application)
