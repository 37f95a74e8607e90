"""Say how a server speaks TLS, and notice when the files of its certificates are exchanged.

Owns the settings of TLS apart from the connection: safe values, and which files a context is
made of.  Leaves what is in a file to `portico.pem`, and the handshake, and how long it may take,
to the server.

Sources: RFC 9325 (what is safe to offer); RFC 9525, section 6.3, and before it RFC 6125,
section 6.4.3 (wildcards stand for the left-most label); RFC 6066, section 3 (names of servers);
RFC 7301 (application protocols); SSL_CTX_set_options(3).
"""

from __future__ import annotations

import errno
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

from portico.errors import CertificateError, SettingError
from portico.events import CertificateLoaded, CertificateRejected, emit
from portico.pem import Pair, Password, load_authorities, load_pair

LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at the files.

A look costs a system call for each file, and a certificate that is a second old is not too old.
"""

SETTLING: Final = 0.1
"""Seconds that a file must have been left alone before a look loads it.

One that was written just now may be half of an exchange: the key may be about to follow, or the
rest of the chain.  It is looked at again after as many seconds.
"""

CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Cipher suites of TLS 1.2 (those of 1.3 are all safe): forward secret and authenticated.

RFC 9325, section 4.2, recommends the first four; those of RFC 7905 are for processors without
instructions for AES.  Section 4.1 advises against what else Python offers: suites with DHE, and
those in CBC mode.
"""

OPTIONS: Final = (
    ssl.OP_NO_COMPRESSION  # CRIME: lengths give secrets away; RFC 9325, section 3.3
    | ssl.OP_NO_RENEGOTIATION  # a client could demand handshakes without end on one connection
    | ssl.OP_CIPHER_SERVER_PREFERENCE  # the stronger suite; RFC 9325, section 4.2.1
    | ssl.OP_SINGLE_DH_USE
    | ssl.OP_SINGLE_ECDH_USE  # a fresh key for each handshake
)
"""What is switched on whatever the defaults of Python and OpenSSL are."""

StrPath: TypeAlias = str | os.PathLike[str]

ClientCertificates: TypeAlias = Literal["none", "optional", "required"]
"""Whether clients are asked for a certificate of their own, and whether they must have one."""

_VERIFY_MODES: Final = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}

_PASSING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE})
"""Errors that go away without any change that a look at the files could see."""

_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
"""One part of a host name; with the underscore, which DNS has and host names should not."""

T = TypeVar("T")

_Stamp: TypeAlias = "tuple[tuple[int, ...] | None, ...]"
_Choose: TypeAlias = "Callable[[Any, str | None, ssl.SSLContext], None]"


def server_context(
    certificate: StrPath,
    key: StrPath | None = None,
    *,
    password: Password | None = None,
    client_ca: StrPath | None = None,
    client_certificates: ClientCertificates = "none",
    alpn: Sequence[str] = (),
    sni: Mapping[str, tuple[StrPath, StrPath | None]] | None = None,
) -> ssl.SSLContext:
    """Make the context of a TLS server, with safe values for all that is not asked here.

    These are: TLS 1.2 or 1.3; suites that are forward secret and authenticated, in the server's
    order of preference; no compression, no renegotiation.  The files are read once; see
    `Certificates` for what notices their exchange.

    A certificate that has expired loads: the clients decide.

    Args:
        certificate: A file in PEM format: the server's certificate, then those of the
            authorities between it and the root.
        key: The file of the private key, in PEM format; ``None`` if it stands in the file of the
            certificate.
        password: Of the keys that are encrypted.
        client_ca: A file in PEM format: the authorities whose certificates are taken from
            clients.
        client_certificates: ``"none"`` asks no client for a certificate.  ``"optional"`` takes
            a client without one, and no client with a wrong one.  ``"required"`` takes no
            client without.
        alpn: Application protocols, such as ``"h2"``, the preferred first.  A client that knows
            none of them is served without; `selected_alpn_protocol` is ``None`` then.
        sni: Certificate and key for each host name that clients ask for.  ``*.example.org``
            stands for every name with one label in place of the asterisk, unless that name is
            here itself.  Names that are not here get the first certificate.

    Returns:
        A context that nobody else has.

    Raises:
        SettingError: A value is none of those described here.
        CertificateError: A file cannot be used.
    """
    settings = _Settings.checked(
        certificate, key, password, client_ca, client_certificates, alpn, sni
    )
    return settings.load()[0].context


class Certificates:
    """The files of a TLS server's certificates, and the contexts that are made of them.

    Takes the arguments of `server_context`, and raises what it raises.

    Each handshake asks `refresh` for its context, which looks at the files at most once a second
    and loads the pairs that changed.  One that does not load, or whose key and certificate do
    not match, as happens while the one is exchanged and the other not yet, is told as an event,
    and the earlier one stays.  No thread waits for another that loads.

    Each load makes a context; no certificate is ever loaded into one in use.  So open
    connections keep what they have, and after an exchange of the first pair, or of the
    authorities, no session is resumed: the client makes a full handshake, and is checked against
    the authorities of today.
    """

    def __init__(
        self,
        certificate: StrPath,
        key: StrPath | None = None,
        *,
        password: Password | None = None,
        client_ca: StrPath | None = None,
        client_certificates: ClientCertificates = "none",
        alpn: Sequence[str] = (),
        sni: Mapping[str, tuple[StrPath, StrPath | None]] | None = None,
    ) -> None:
        self._settings = _Settings.checked(
            certificate, key, password, client_ca, client_certificates, alpn, sni
        )
        # Guards all below against a second writer; readers take the context as it is.  Re-entrant,
        # because `reload` may be called by the handler of a signal that came in the middle of one.
        self._loading = threading.RLock()
        self._next_look = 0.0
        self._entries = self._settings.load()
        # Each once, in order.
        self._files = tuple(dict.fromkeys(file for entry in self._entries for file in entry.files))

    @property
    def context(self) -> ssl.SSLContext:
        """The context made of the files that loaded last; does not look at them."""
        return self._entries[0].context

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are watched, as absolute paths."""
        return self._files

    def refresh(self, server: Any = None, *, now: float | None = None) -> ssl.SSLContext:
        """Return the context for the next handshake, after a look at the files if one is due.

        Callable from any thread; waits for no other.  While one loads, the others get the
        context so far.  Where a process is forked for each connection, ask before the fork: what
        a child loads is lost with it.

        Args:
            server: Whose handshake it is; the events carry it.
            now: An instant of `time.monotonic`; ``None`` for the present one.
        """
        if now is None:
            now = time.monotonic()
        if now >= self._next_look and self._loading.acquire(blocking=False):
            try:
                self._look(server, now)
            finally:
                self._loading.release()
        return self._entries[0].context

    def reload(self, server: Any = None) -> bool:
        """Read all files again, changed or not.

        Callable from any thread and from the handler of a signal.  Waits if another thread is
        loading, so that what it loads is what the files hold after the call.

        Args:
            server: Whose events these are, if it is one server's.

        Returns:
            Whether all of them loaded; if not, events say why, and the earlier ones stay.
        """
        with self._loading:
            due = [(entry, _stamps(entry.files)) for entry in self._entries]
            for entry, _ in due:
                entry.told = ""  # who asks is told, whatever was told before
            errors = self._load(due, server)
            self._tell(errors, server)
            return not errors

    def _look(self, server: Any, now: float) -> None:
        if now < self._next_look:  # another thread has looked since this one asked
            return
        self._next_look = now + LOOK_INTERVAL
        found = {file: _stamp(file) for file in self._files}
        due: list[tuple[_Entry, _Stamp]] = []
        for entry in self._entries:
            stamp = tuple(found[file] for file in entry.files)
            if stamp == entry.stamp and not entry.again:
                continue
            if _age(stamp) < SETTLING:
                self._next_look = now + SETTLING
            else:
                due.append((entry, stamp))
        errors = self._load(due, server)
        for entry, stamp in due:
            # Exchanged between the look and the load: no fault, if it did not load.
            if _stamps(entry.files) != stamp:
                errors.pop(entry, None)
                self._next_look = now
        self._tell(errors, server)

    def _load(
        self, due: list[tuple[_Entry, _Stamp]], server: Any
    ) -> dict[_Entry, CertificateError]:
        """Load what had these stamps just before; what does not load stays, and is returned."""
        errors: dict[_Entry, CertificateError] = {}
        for entry, stamp in due:
            try:
                entry.load(stamp)
            except CertificateError as error:
                errors[entry] = error
            else:
                if CertificateLoaded.subscribers:
                    emit(CertificateLoaded(server, entry.pair.certificate))
        return errors

    def _tell(self, errors: dict[_Entry, CertificateError], server: Any) -> None:
        """Tell what is wrong, unless it has been told of the same files."""
        told: set[str] = set()  # the authorities fail in the same words for every pair
        for entry, error in errors.items():
            words = str(error)
            if CertificateRejected.subscribers and words != entry.told and words not in told:
                emit(CertificateRejected(server, entry.pair.certificate, error))
            entry.told = words
            told.add(words)


class _Entry:
    """One pair, and the context that was made of it last."""

    def __init__(self, settings: _Settings, pair: Pair, choose: _Choose | None = None) -> None:
        self.pair = pair
        self._settings, self._choose = settings, choose
        authorities = () if settings.client_ca is None else (settings.client_ca,)
        self.files = tuple(dict.fromkeys((pair.certificate, pair.key, *authorities)))
        # Before the files are read: what changes in between is seen by the next look.
        self.stamp = _stamps(self.files)
        self.again = False  # to be read at the next look, changed or not
        self.told = ""  # what is wrong with files of this stamp
        self.context = self._made()

    def load(self, stamp: _Stamp) -> None:
        """Read files that had this stamp just before.

        Raises:
            CertificateError: They cannot be used; the context stays.
        """
        if stamp != self.stamp:
            self.told = ""
        self.stamp, self.again = stamp, False
        try:
            self.context = self._made()
        except CertificateError as error:
            # The same files are not tried again, unless the reason may have passed.
            self.again = error.errno in _PASSING
            raise
        self.told = ""

    def _made(self) -> ssl.SSLContext:
        context = self._settings.context(self.pair)
        if self._choose is not None:
            context.sni_callback = self._choose
        return context


def _stamps(files: Iterable[str]) -> _Stamp:
    """Return what changes whenever a file does, with the file or with where a link leads."""
    return tuple(map(_stamp, files))


# ------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, slots=True, repr=False)  # no text that would show the password
class _Settings:
    """What `server_context` was asked for, after a check that needs no file."""

    pair: Pair
    password: Password | None
    client_ca: str | None
    verify_mode: ssl.VerifyMode
    alpn: tuple[str, ...]
    names: Mapping[str, Pair]

    @classmethod
    def checked(
        cls,
        certificate: StrPath,
        key: StrPath | None,
        password: Password | None,
        client_ca: StrPath | None,
        client_certificates: str,
        alpn: Sequence[str],
        sni: Mapping[str, tuple[StrPath, StrPath | None]] | None,
    ) -> _Settings:
        """Look at the values; raise `SettingError` for the first that is wrong."""
        pair = _pair(certificate, key)
        names = _names(sni or {})
        authorities = None if client_ca is None else _path("client_ca", client_ca)
        return cls(
            pair,
            _password(password),
            authorities,
            _verify_mode(client_certificates, authorities),
            _protocols(alpn),
            names,
        )

    def load(self) -> tuple[_Entry, ...]:
        """Read the files: the pair for names that have none of their own, then each of theirs.

        Raises:
            CertificateError: A file cannot be used.
        """
        if not self.names:
            return (_Entry(self, self.pair),)
        others = {pair: _Entry(self, pair) for pair in dict.fromkeys(self.names.values())}
        by_name = {name: others[pair] for name, pair in self.names.items()}

        def choose(connection: Any, name: str | None, _: ssl.SSLContext) -> None:
            entry = _chosen(by_name, name)
            if entry is not None:
                connection.context = entry.context

        return (_Entry(self, self.pair, choose), *others.values())

    def context(self, pair: Pair) -> ssl.SSLContext:
        """Make a context of a pair; raise `CertificateError` if a file cannot be used."""
        # Those behind a name need every setting, too: OpenSSL goes on with the protocols and the
        # authorities of the context that was chosen.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= OPTIONS
        context.set_ciphers(CIPHERS)
        context.verify_mode = self.verify_mode
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        if self.client_ca is not None:
            load_authorities(context, self.client_ca)
        load_pair(context, pair, self.password)
        return context


def _stamp(file: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)  # noqa: PTH116  # a third of Path.stat's time, for each file
    except OSError:
        return None
    # The time of change tells what a copied time of modification hides: a renaming, another mode.
    return (found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_dev, found.st_ino)


def _age(stamp: _Stamp) -> float:
    """Return the seconds since the latest change; one in the future has long been."""
    latest = max((times[0] for times in stamp if times is not None), default=0)
    age = time.time() - latest / 1e9
    return age if age >= 0 else float("inf")


def _wrong_kind(name: str, value: object, expected: str) -> SettingError:
    """Name the class of a value; the value itself may be a secret."""
    return SettingError(name, value.__class__, expected)


def _pair(certificate: Any, key: Any, names: tuple[str, str] = ("certificate", "key")) -> Pair:
    path = _path(names[0], certificate)
    return Pair(path, path if key is None else _path(names[1], key))


def _path(name: str, value: object) -> str:
    """Make a path absolute, so that it stays the same file if the process changes its directory."""
    path: object = None
    fspath: Any = os.fspath  # whose types know no wrong argument
    with suppress(TypeError):
        path = fspath(value)
    # A wrong value is not shown: it may be the key itself in place of its file.
    if not isinstance(path, str):
        raise _wrong_kind(name, value, "the path of a file in PEM format")
    if not path or "\n" in path or "\0" in path or path.startswith("-----BEGIN"):
        expected = "the path of a file in PEM format, not its contents"
        raise SettingError(name, "..." if path else "", expected)
    return os.path.abspath(path)  # noqa: PTH100  # resolve() would follow links, for ever


def _password(password: Any) -> Any:
    """Return the password if it is of a kind that can be one."""
    kinds: Any = (str, bytes, bytearray)
    if password is None or callable(password) or isinstance(password, kinds):
        return password
    raise _wrong_kind("password", password, "text, bytes, or a function that returns either")


def _verify_mode(client_certificates: str, client_ca: str | None) -> ssl.VerifyMode:
    mode = _VERIFY_MODES.get(client_certificates)
    if mode is None:
        expected = "'none', 'optional' or 'required'"
        raise SettingError("client_certificates", client_certificates, expected)
    if mode == ssl.CERT_NONE and client_ca is not None:
        expected = "'optional' or 'required', since there is a client_ca"
        raise SettingError("client_certificates", client_certificates, expected)
    if mode != ssl.CERT_NONE and client_ca is None:
        expected = f"a file of authorities, since client_certificates={client_certificates!r}"
        raise SettingError("client_ca", None, expected)
    return mode


def _protocols(alpn: Any) -> tuple[str, ...]:
    protocols: tuple[Any, ...] = () if isinstance(alpn, str) else tuple(alpn)
    right = all(isinstance(p, str) and p.isascii() and 0 < len(p) < 256 for p in protocols)
    # RFC 7301, section 3.1: all of them and their lengths fit in 65,535 bytes.
    if not right or isinstance(alpn, str) or sum(len(p) + 1 for p in protocols) > 65535:
        expected = "a list of the names of protocols, such as ['h2', 'http/1.1']"
        raise SettingError("alpn", alpn, expected)
    return protocols


def _names(sni: Mapping[str, Any]) -> dict[str, Pair]:
    names: dict[str, Pair] = {}
    kinds: Any = (tuple, list)
    for given, files in sni.items():
        name = _host_name(given)
        if name in names:
            raise SettingError("sni", given, "each name once; small and capital letters are equal")
        place = f"sni[{given!r}]"
        if not isinstance(files, kinds) or len(files) != 2:
            raise _wrong_kind(place, files, "a certificate and its key, or None: (file, file)")
        pair: tuple[Any, Any] = (files[0], files[1])
        names[name] = _pair(*pair, names=(place, place))
    return names


def _host_name(given: Any) -> str:
    """Return a name, or a pattern, as it is looked for."""
    name = given.lower().removesuffix(".") if isinstance(given, str) else ""
    labels = name.removeprefix("*.").split(".")
    if not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():  # or it is an address
        expected = "a host name as in DNS ('example.org', '*.example.org', 'xn--bcher-kva.example')"
        raise SettingError("sni", given, expected)
    return name


def _chosen(others: Mapping[str, T], name: str | None) -> T | None:
    """Find what belongs to the name that a client asks for."""
    if name is None:
        return None
    name = name.lower().removesuffix(".")
    label, _, parent = name.partition(".")
    # Who asks for a pattern itself gets what the names get that it stands for.
    return others.get(name) or (others.get(f"*.{parent}") if label else None)
