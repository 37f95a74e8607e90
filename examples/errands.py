"""A server that runs errands: one command a line, answered by one line, with or without TLS.

    python examples/errands.py --engine green             # then, in another terminal:
    socat - TCP:127.0.0.1:6400

and, in that one, for example ``hash secret``, ``date``, ``wait 1``, ``resolve localhost`` or
``help``.  With TLS, once with a certificate of your own (it says how to make one):

    python examples/errands.py --engine green --cert cert.pem --key key.pem
    openssl s_client -quiet -CAfile cert.pem -connect 127.0.0.1:6400

Each errand waits for something else than its client, and says so with one of portico's helpers:
`to_thread` for what blocks or computes, `await_` for what is written with asyncio, `sleep`, and
`spawn` for what can go on at once; `timeout` limits all of them.  They mean the same on every
engine.  On the green one, all clients share a thread: while one waits, the others are served.

It does for its clients what costs it time and memory: it is an example, not for strangers.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import signal
import socket
import ssl
import sys
from typing import Any

import portico

ERRAND_TIMEOUT = 5.0  # seconds for one command
IDLE_TIMEOUT = 60.0  # seconds that a client may take to say something, or to take an answer
HANDSHAKE_TIMEOUT = 10.0  # seconds that a client may take to begin with TLS
LINE_LIMIT = 1024  # bytes
NAMES_LIMIT = 8  # names to resolve at once

ENGINES: dict[str, tuple[type, ...]] = {
    "green": (portico.GreenMixIn,),
    "threads": (portico.ThreadingMixIn,),
    "pool": (portico.ThreadPoolMixIn,),
    "forks": (portico.ForkingMixIn,),
    "serial": (),
}

MAKE_CERTIFICATE = (
    "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost"
    " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {key} -out {cert}"
)


class ErrandError(Exception):
    """What a client is told of an errand that cannot be run."""


class ErrandHandler(portico.StreamRequestHandler):
    """The conversation with one client."""

    timeout = IDLE_TIMEOUT

    def handle(self) -> None:
        """Answer one line after the other."""
        while line := self.next_line():
            name, *words = line.decode("utf-8", "replace").split() or ["help"]
            if name == "quit":
                break
            self.wfile.write(f"{self.answer(name, words)}\n".encode())

    def next_line(self) -> bytes:
        """Return what the client says next; nothing if that is all."""
        try:
            line: bytes = self.rfile.readline(LINE_LIMIT)
        except TimeoutError:  # it has fallen asleep
            return b""
        return line if line.endswith(b"\n") else b""

    def answer(self, name: str, words: list[str]) -> str:
        """Run one errand, within its time; say how it went."""
        try:
            if name not in ERRANDS:
                raise ErrandError(f"there is: {', '.join(ERRANDS)}, quit")
            with portico.timeout(ERRAND_TIMEOUT):
                return ERRANDS[name](words)
        except TimeoutError:
            return f"error: not done in {ERRAND_TIMEOUT:g} s"
        except ErrandError as error:
            return f"error: {error}"


def fingerprint(words: list[str]) -> str:
    """Compute for a while, in a thread: Python lets others run meanwhile."""
    text = " ".join(words).encode()
    return portico.to_thread(hashlib.scrypt, text, salt=b"", n=2**14, r=8, p=1, dklen=16).hex()


def date(words: list[str]) -> str:
    """Ask a program, through asyncio; any library that is written for asyncio will do."""
    if words:
        raise ErrandError("date takes no words")
    return portico.await_(output_of("date", "-u")).decode().strip()


async def output_of(*command: str) -> bytes:
    """Run a program and return what it prints."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return output


def wait(words: list[str]) -> str:
    """Do nothing."""
    try:
        (seconds,) = map(float, words)
    except ValueError:
        raise ErrandError("wait takes a number of seconds") from None
    if not seconds >= 0:
        raise ErrandError("wait takes a number of seconds, 0 or more")
    portico.sleep(min(seconds, 2 * ERRAND_TIMEOUT))
    return "here I am"


def resolve(names: list[str]) -> str:
    """Look all names up at once; each waits for a function that blocks."""
    if not 0 < len(names) <= NAMES_LIMIT:
        raise ErrandError(f"resolve takes 1 to {NAMES_LIMIT} names")
    lookups = [portico.spawn(address_of, name) for name in names]
    return ", ".join(lookup.result() for lookup in lookups)


def address_of(name: str) -> str:
    """Return an address of a host, or that there is none."""
    try:
        found = portico.to_thread(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return "unknown"
    return str(found[0][4][0])


def explain(words: list[str]) -> str:
    """Say what there is."""
    return "hash TEXT, date, wait SECONDS, resolve NAME..., quit"


ERRANDS = {"hash": fingerprint, "date": date, "wait": wait, "resolve": resolve, "help": explain}


class ErrandServer(portico.TCPServer):
    """TLS, if there is a certificate, and short words about clients that misbehave."""

    allow_reuse_address = True
    context: ssl.SSLContext | None = None

    def prepare_request(self, request: Any, client_address: Any) -> tuple[Any, Any]:
        """Shake hands, where the handler runs: a client that is slow to holds up nobody else."""
        if self.context is not None:
            request.settimeout(HANDSHAKE_TIMEOUT)
            request = self.context.wrap_socket(request, server_side=True)
        return request, client_address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in a line what went wrong with a connection; all else is worth a traceback."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            print(f"lost {client_address[0]}: {type(error).__name__}", file=sys.stderr)
        else:
            super().handle_error(request, client_address)


def server_context(cert: str, key: str) -> ssl.SSLContext:
    """Return the context of a server with this certificate, or end and say what to do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:
        hint = MAKE_CERTIFICATE.format(cert=cert, key=key)
        sys.exit(f"cannot use {cert} and {key}: {error}\nTo make them: {hint}")
    return context


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="Run errands for clients.")
    parser.add_argument("--engine", choices=ENGINES, default="green", help="what runs the handlers")
    parser.add_argument("--port", type=int, default=6400, help="0 lets the system choose")
    parser.add_argument("--cert", help="a file with a certificate, for TLS")
    parser.add_argument("--key", help="the file with its key")
    options = parser.parse_args()
    if (options.cert is None) != (options.key is None):
        parser.error("--cert and --key belong together")
    context = None if options.cert is None else server_context(options.cert, options.key)
    bases = (*ENGINES[options.engine], ErrandServer)  # the engine first, the family last
    settings = {"context": context, "daemon_threads": True, "block_on_close": False}  # a quick end
    server_class: Any = type("Server", bases, settings)
    try:
        server = server_class(("127.0.0.1", options.port), ErrandHandler)
    except (OSError, OverflowError) as error:
        sys.exit(f"cannot serve on port {options.port}: {error}")
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() != process:  # a child of the forks engine
            os._exit(0)
        sys.exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    place = f"127.0.0.1:{server.server_address[1]}"
    secure = f"openssl s_client -quiet -CAfile {options.cert} -connect {place}"
    print(f"Try: {secure if options.cert else f'socat - TCP:{place}'}", flush=True)
    with server:
        try:
            server.serve_forever()
        finally:
            for child in getattr(server, "active_children", None) or ():  # of the forks engine
                os.kill(child, signal.SIGTERM)


if __name__ == "__main__":
    main()
