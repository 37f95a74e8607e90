"""A certificate authority whose certificates and keys are files, as a server has them.

    authority = Authority(tmp_path)
    pair = authority.issue("localhost", "127.0.0.1")
    server_context(pair.certificate, pair.key)
    authority.client().wrap_socket(plain, server_hostname="localhost")

`tests/conftest.py` has one for all tests, as the fixture `authority`.
"""

from __future__ import annotations

import datetime as dt
import itertools
import socket
import ssl
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from tests.support import PATIENCE, Call, not_forking


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, each in a file of its own."""

    certificate: Path
    key: Path

    @property
    def der(self) -> bytes:
        """The certificate, without its chain, as `getpeercert(True)` returns it."""
        end = "-----END CERTIFICATE-----\n"
        first = self.certificate.read_text().partition(end)[0] + end
        return ssl.PEM_cert_to_DER_cert(first)

    def write_over(self, other: Pair) -> None:
        """Put this certificate, then this key, in the place of another's, atomically each."""
        for mine, theirs in ((self.certificate, other.certificate), (self.key, other.key)):
            put(theirs, mine.read_bytes())


def put(path: Path, contents: bytes) -> None:
    """Replace what is at a path in one step, as a careful program does."""
    fresh = path.with_name(f"{path.name}.fresh")
    fresh.write_bytes(contents)
    fresh.replace(path)


class Authority:
    """An authority of its own, and a folder in which what it issues are files."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self._folder = folder
        self._numbers = itertools.count()
        self.certificate = folder / "authority.pem"
        """What who trusts it loads."""
        self._authority.cert_pem.write_to_path(str(self.certificate))

    def issue(self, *names: str, expired: bool = False) -> Pair:
        """Issue a certificate for these names; without any, for this machine."""
        number = next(self._numbers)
        pair = Pair(self._folder / f"{number}.pem", self._folder / f"{number}.key")
        past = dt.datetime(2020, 1, 1, tzinfo=dt.UTC) if expired else None
        issued = self._authority.issue_cert(*(names or ("localhost", "127.0.0.1")), not_after=past)
        pair.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(pair.key))
        return pair

    def client(self, pair: Pair | None = None, alpn: Sequence[str] = ()) -> ssl.SSLContext:
        """Make the context of a client that trusts this authority and may show a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.certificate)
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context


def wrap(client: ssl.SSLContext, plain: socket.socket, **settings: Any) -> ssl.SSLSocket:
    """Shake hands as a client of a server that may be in this process, and may fork.

    It does not while the first words are found: OpenSSL may have a lock then, which a child would
    find taken for ever.  From then on the client waits, outside of OpenSSL, until it is answered.
    """
    settings.setdefault("server_hostname", "localhost")
    with not_forking():
        wrapped = client.wrap_socket(plain, do_handshake_on_connect=False, **settings)
        wrapped.setblocking(False)
        with suppress(ssl.SSLWantReadError):
            wrapped.do_handshake()
    wrapped.settimeout(PATIENCE)
    wrapped.do_handshake()
    return wrapped


@dataclass(frozen=True)
class Met:
    """What both sides of a connection found in the other when they shook hands."""

    certificate: bytes | None
    """The server's, as the client saw it."""
    client: dict[str, Any] | None
    """The client's, as the server saw it; ``{}`` if it has not been looked at."""
    protocol: str | None
    """The application protocol."""
    version: str | None
    cipher: str


def shake_hands(
    context: ssl.SSLContext, client: ssl.SSLContext, name: str | None = "localhost"
) -> Met:
    """Connect two contexts, and exchange a word; raises what either side raises, ours first."""
    ours, theirs = socket.socketpair()

    def serve() -> tuple[dict[str, Any] | None, str | None]:
        with ours, context.wrap_socket(ours, server_side=True) as wrapped:
            assert wrapped.recv(5) == b"hello"
            wrapped.sendall(b"hello")
            return wrapped.getpeercert(), wrapped.selected_alpn_protocol()

    with ExitStack() as stack:
        for end in (ours, theirs):
            end.settimeout(PATIENCE)
        stack.enter_context(theirs)
        serving = Call(serve)
        try:
            wrapped = stack.enter_context(client.wrap_socket(theirs, server_hostname=name))
            wrapped.sendall(b"hello")
            assert wrapped.recv(5) == b"hello"
        except Exception:
            theirs.close()
            serving.result()
            raise
        peer, protocol = serving.result()
        cipher = wrapped.cipher()
        assert cipher is not None
        return Met(wrapped.getpeercert(True), peer, protocol, wrapped.version(), cipher[0])
