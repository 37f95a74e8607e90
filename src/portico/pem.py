"""Load certificates and keys from files in PEM format, and say what is wrong with one.

Owns the words: OpenSSL's own rarely say which file it is, or that a password was missing.  No
message shows what is in a file, nor a password.  Leaves to others what a context does with it.

Source: PEM_read_bio(3); RFC 7468 (the labels); stat(2).
"""

from __future__ import annotations

import errno
import re
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from portico.errors import CertificateError

Password: TypeAlias = str | bytes | bytearray | Callable[[], str | bytes | bytearray]
"""A password, or a function that returns it: called for each key that is encrypted, whenever the
files are read, in the thread that reads them."""

LONGEST_PASSWORD: Final = 1024
"""Bytes of a password that OpenSSL takes."""

LARGEST_READ: Final = 1 << 20
"""Bytes of a file that are searched to say what is wrong with it; chains have some thousands."""

_CERTIFICATE: Final = re.compile(rb"^-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----", re.MULTILINE)
_KEY: Final = re.compile(rb"^-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pair:
    """The files of a certificate and its key; both may be the same."""

    certificate: str
    key: str


def load_pair(context: ssl.SSLContext, pair: Pair, password: Password | None) -> None:
    """Load a certificate with its chain, and its key, into a context.

    Raises:
        CertificateError: One of the files cannot be used, or they do not belong together.
    """
    for file in (pair.certificate, pair.key):
        _require_file(file)
    lock = Lock(pair.key, password)
    try:
        context.load_cert_chain(pair.certificate, pair.key, lock.open)
    except CertificateError:  # the lock's own
        raise
    except OSError as error:
        raise _explained(error, pair, lock) from error


def load_authorities(context: ssl.SSLContext, file: str) -> None:
    """Load the authorities whose certificates a context takes from peers.

    Raises:
        CertificateError: The file cannot be used.
    """
    _require_file(file)
    try:
        context.load_verify_locations(file)
    except OSError as error:
        text = _contents(file)
        problem = "holds no certificate in PEM format; expected those of authorities"
        if _CERTIFICATE.search(text):
            problem = f"a certificate in it is damaged{_reason(error)}"
        raise CertificateError(_number(error), problem, file) from error


class Lock:
    """What keeps a key: gives OpenSSL the password, and remembers that it had to."""

    def __init__(self, key: str, password: Password | None) -> None:
        self._key, self._password = key, password
        self.was_opened = False

    def open(self) -> bytes | bytearray:
        """Return the password.  Without such a function OpenSSL would ask at the terminal."""
        if self._password is None:
            raise CertificateError(None, "is encrypted; expected a password", self._key)
        self.was_opened = True
        password = self._called(self._password) if callable(self._password) else self._password
        if isinstance(password, str):
            try:
                password = password.encode(errors="surrogateescape")  # as the environment has it
            except UnicodeEncodeError:
                problem = "expected a password of whole characters"
                raise CertificateError(None, problem, self._key) from None
        if len(password) > LONGEST_PASSWORD:
            problem = f"expected a password of at most {LONGEST_PASSWORD} bytes"
            raise CertificateError(None, problem, self._key)
        return password

    def _called(self, password: Callable[[], Any]) -> str | bytes | bytearray:
        try:
            returned = password()
        except Exception as error:
            # Its words are not ours, and may hold what must not be shown.
            problem = f"no password, because its function raised {type(error).__name__}"
            raise CertificateError(None, problem, self._key) from error
        if not isinstance(returned, str | bytes | bytearray):
            kind = type(returned).__name__
            problem = f"expected a function that returns the password, not {kind}"
            raise CertificateError(None, problem, self._key)
        return returned


def _require_file(file: str) -> None:
    """Look that reading ends: a pipe or a device may keep the reader for ever."""
    try:
        mode = Path(file).stat().st_mode
    except OSError as error:
        raise _unreadable(error, file) from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise CertificateError(None, f"is {kind}; expected a file in PEM format", file)


def _contents(file: str) -> bytes:
    """Return what is in a file, to look what is wrong with it."""
    try:
        with Path(file).open("rb") as opened:
            return opened.read(LARGEST_READ)
    except OSError as error:
        raise _unreadable(error, file) from error


def _unreadable(error: OSError, file: str) -> CertificateError:
    match error.errno:
        case errno.ENOENT:
            problem = "no such file; expected one in PEM format"
        case errno.EACCES | errno.EPERM:
            problem = "no permission to read it; the user that the server runs as needs to"
        case _:
            problem = f"cannot be read: {error.strerror}"
    return CertificateError(error.errno, problem, file)


def _explained(error: OSError, pair: Pair, lock: Lock) -> CertificateError:
    """Say what is wrong with a pair that OpenSSL refuses: it often says no more than that."""
    certificates, keys = _contents(pair.certificate), _contents(pair.key)
    if not _CERTIFICATE.search(certificates):
        problem = "holds no certificate in PEM format"
        if _KEY.search(certificates):
            problem += ", but a private key; expected the certificate here"
        return CertificateError(None, problem, pair.certificate)
    if not _KEY.search(keys):
        problem = "holds no private key in PEM format"
        if pair.key == pair.certificate:
            problem += "; expected it here, or its file as the key"
        elif _CERTIFICATE.search(keys):
            problem += ", but a certificate; expected the key here"
        return CertificateError(None, problem, pair.key)
    if getattr(error, "reason", None) in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}:
        problem = "this key does not belong to the certificate"
        if pair.key != pair.certificate:
            problem += f" in {pair.certificate}"
        return CertificateError(None, problem, pair.key)
    if lock.was_opened:
        return CertificateError(None, "the password does not open this key", pair.key)
    culprit, problem = _culprit(error, pair)
    return CertificateError(_number(error), f"{problem}{_reason(error)}", culprit)


def _culprit(error: OSError, pair: Pair) -> tuple[str, str]:
    """Say which file of a pair is the one that OpenSSL refuses, all labels being right."""
    if not isinstance(error, ssl.SSLError):
        return pair.certificate, "it or its key cannot be read"
    if (getattr(error, "reason", None) or "").startswith(("EE_", "CA_")):  # its security level
        return pair.certificate, "OpenSSL takes a certificate in it for too weak"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(pair.certificate)
    except ssl.SSLError:
        return pair.certificate, "a certificate in it is damaged"
    return pair.key, "the key in it is damaged"


def _reason(error: OSError) -> str:
    """Return OpenSSL's word for an error, or the system's, if there is one."""
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None)
        return f" ({reason.lower().replace('_', ' ')})" if reason else ""
    return f" ({error.strerror})"


def _number(error: OSError) -> int | None:
    """Return the system's number of an error; OpenSSL's own are none."""
    return None if isinstance(error, ssl.SSLError) else error.errno
