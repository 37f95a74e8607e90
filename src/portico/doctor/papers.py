"""Read the certificates of a service, as a client would see them.

Owns the look into the files.  Leaves to `portico.pem` what is wrong with one, and what follows from
the dates to the rules.

The first certificate of a file is looked at by shaking hands with it in memory: `ssl` takes a
certificate apart for who was shown it, and for no one else.  The others are authorities, of which a
context can be asked.

Source: X509_VERIFY_PARAM_set_flags(3).
"""

from __future__ import annotations

import os
import re
import ssl
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from os import fspath
from pathlib import Path
from typing import Any, Final

from portico.doctor.facts import Certificate, Papers
from portico.errors import CertificateError
from portico.pem import LARGEST_READ, Pair, load_authorities, load_pair
from portico.settings import Settings

WHENEVER: Final = 0x200000
"""``X509_V_FLAG_NO_CHECK_TIME``, which `ssl` has no name for: one that has expired is read, too."""

STEPS: Final = 10
"""Turns of a handshake at the most; TLS 1.3 takes two."""

_BLOCK: Final = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def read_papers(settings: Settings) -> Papers | None:
    """Look at the files that a service speaks TLS with; ``None`` if it has none."""
    if settings.cert is None:
        return None
    certificate = fspath(settings.cert)
    key = certificate if settings.key is None else fspath(settings.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain: tuple[Certificate, ...] = ()
    authorities: tuple[Certificate, ...] = ()
    problem = ""
    try:
        load_pair(context, Pair(certificate, key), None)
        chain = _chain(context, certificate)
        if settings.client_ca is not None:
            load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), fspath(settings.client_ca))
            authorities = _authorities(_blocks(fspath(settings.client_ca)))
    except CertificateError as error:
        problem = str(error)
    status = _status(key)
    return Papers(
        certificate=certificate,
        key=key,
        moment=time.time(),
        problem=problem,
        key_mode=None if status is None else stat.S_IMODE(status.st_mode),
        key_owner=None if status is None else (status.st_uid, status.st_gid),
        chain=chain,
        authorities=authorities,
    )


def _blocks(path: str) -> list[bytes]:
    """Return the certificates in a file."""
    with Path(path).open("rb") as opened:
        text = opened.read(LARGEST_READ).decode("latin-1")
    return [ssl.PEM_cert_to_DER_cert(block) for block in _BLOCK.findall(text)]


def _status(path: str) -> os.stat_result | None:
    with suppress(OSError):
        return Path(path).stat()
    return None


def _chain(context: ssl.SSLContext, path: str) -> tuple[Certificate, ...]:
    """Read the certificates of a chain; none of them if the first cannot be read.

    Raises:
        CertificateError: It is none that clients would take from a server.
    """
    blocks = _blocks(path)
    try:
        shown = _shown(context, blocks[0]) if blocks else None
    except ssl.SSLCertVerificationError as error:
        problem = f"clients refuse it: {error.verify_message}"
        raise CertificateError(None, problem, path) from error
    if shown is None:
        return ()
    return (_read(shown), *_authorities(blocks[1:]))


def _shown(server: ssl.SSLContext, certificate: bytes) -> Mapping[str, Any] | None:
    """Shake hands in memory; return the server's certificate as the client is told of it.

    Raises:
        ssl.SSLCertVerificationError: The client refuses it, as one that is for clients alone.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | WHENEVER
    client.load_verify_locations(cadata=certificate)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(back, there, server_side=False),
        server.wrap_bio(there, back, server_side=True),
    ]
    for _ in range(STEPS):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
        if shown := _peer(ends[0]):
            return shown
    return None


def _peer(end: ssl.SSLObject) -> Mapping[str, Any] | None:
    with suppress(ValueError):  # not yet
        return end.getpeercert()
    return None


def _authorities(blocks: list[bytes]) -> tuple[Certificate, ...]:
    """Read authorities, each by itself, because a context does not keep their order."""
    found: list[Certificate] = []
    for block in blocks:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with suppress(ssl.SSLError):
            context.load_verify_locations(cadata=block)
            found += [_read(each) for each in context.get_ca_certs()]
    return tuple(found)


def _read(certificate: Mapping[str, Any]) -> Certificate:
    parts = {key: value for part in certificate["subject"] for key, value in part}
    return Certificate(
        subject=repr(certificate["subject"]),
        issuer=repr(certificate["issuer"]),
        name=str(parts.get("commonName") or parts.get("organizationName") or "without a name"),
        not_before=ssl.cert_time_to_seconds(certificate["notBefore"]),
        not_after=ssl.cert_time_to_seconds(certificate["notAfter"]),
    )
