from __future__ import annotations

import errno
import os
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portico import pem
from portico.errors import CertificateError
from portico.pem import load_authorities, load_pair
from tests.support import in_child
from tests.tls import Authority, Pair

SECRET = "correct horse battery staple"


@pytest.fixture
def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


@pytest.fixture
def pair(authority: Authority) -> Pair:
    """A pair that a test may spoil."""
    return authority.issue()


@pytest.fixture
def encrypted(pair: Pair) -> Pair:
    """A pair whose key needs the password `SECRET`."""
    plain = pair.key.with_suffix(".plain")
    pair.key.rename(plain)
    command = ["openssl", "pkcs8", "-topk8", "-in", str(plain), "-out", str(pair.key)]
    subprocess.run([*command, "-passout", f"pass:{SECRET}"], check=True, capture_output=True)
    return pair


def load(context: ssl.SSLContext, pair: Pair, password: Any = None) -> None:
    load_pair(context, pem.Pair(str(pair.certificate), str(pair.key)), password)


def refusal(
    context: ssl.SSLContext, certificate: Path, key: Path, password: Any = None
) -> CertificateError:
    """What loading this pair raises."""
    with pytest.raises(CertificateError) as caught:
        load_pair(context, pem.Pair(str(certificate), str(key)), password)
    return caught.value


def spoilt(contents: bytes) -> bytes:
    """PEM with the right labels around something else."""
    begin, *_, end = contents.splitlines(keepends=True)
    return begin + b"AAAA\n" + end


# --- what loads -------------------------------------------------------------------------


def test_a_pair_loads(context: ssl.SSLContext, pair: Pair) -> None:
    load(context, pair)
    assert context.cert_store_stats()["x509"] == 0


def test_certificate_and_key_may_share_a_file(context: ssl.SSLContext, pair: Pair) -> None:
    both = pair.certificate.with_suffix(".both")
    both.write_bytes(pair.key.read_bytes() + pair.certificate.read_bytes())
    load(context, Pair(both, both))


def test_an_expired_certificate_loads(context: ssl.SSLContext, authority: Authority) -> None:
    """It is for the clients to decide, and a server that does not start helps nobody."""
    load(context, authority.issue("localhost", expired=True))


@pytest.mark.parametrize(
    "password",
    [SECRET, SECRET.encode(), bytearray(SECRET.encode()), lambda: SECRET, SECRET.encode],
    ids=["text", "bytes", "bytearray", "function", "function of bytes"],
)
def test_an_encrypted_key_loads_with_its_password(
    context: ssl.SSLContext, encrypted: Pair, password: Any
) -> None:
    load(context, encrypted, password)


def test_nobody_is_asked_for_the_password_of_a_key_without_one(
    context: ssl.SSLContext, pair: Pair
) -> None:
    load(context, pair, lambda: pytest.fail("asked"))


def test_authorities_load(context: ssl.SSLContext, authority: Authority) -> None:
    load_authorities(context, str(authority.certificate))
    assert context.cert_store_stats()["x509_ca"] == 1


# --- what does not: each time the file is named, and what would be right ----------------


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "holds no certificate in PEM format"),
        (b"\x30\x82\x01\x0a\x02\x82", "holds no certificate in PEM format"),
        (
            b"-----BEGIN PRIVATE KEY-----\n",
            "holds no certificate in PEM format, but a private key; expected the certificate here",
        ),
    ],
    ids=["empty", "binary", "a key"],
)
def test_a_file_without_a_certificate(
    context: ssl.SSLContext, pair: Pair, contents: bytes, words: str
) -> None:
    pair.certificate.write_bytes(contents)
    error = refusal(context, pair.certificate, pair.key)
    assert str(error) == f"{pair.certificate}: {words}"
    assert error.errno is None


@pytest.mark.parametrize("spoil", [spoilt, lambda contents: contents[:-60]], ids=["spoilt", "half"])
def test_a_damaged_certificate(
    context: ssl.SSLContext, pair: Pair, spoil: Callable[[bytes], bytes]
) -> None:
    pair.certificate.write_bytes(spoil(pair.certificate.read_bytes()))
    error = refusal(context, pair.certificate, pair.key)
    assert str(error).startswith(f"{pair.certificate}: a certificate in it is damaged")
    assert error.errno is None


def test_a_chain_that_is_cut_short(context: ssl.SSLContext, pair: Pair) -> None:
    """It loads nowhere, though the first certificate is whole."""
    whole = pair.certificate.read_bytes()
    pair.certificate.write_bytes(whole + whole[:-60])
    error = refusal(context, pair.certificate, pair.key)
    assert str(error) == f"{pair.certificate}: a certificate in it is damaged (bad end line)"


def test_a_file_without_a_key(context: ssl.SSLContext, pair: Pair) -> None:
    pair.key.write_text("a key\n")
    error = refusal(context, pair.certificate, pair.key)
    assert str(error) == f"{pair.key}: holds no private key in PEM format"


def test_a_certificate_in_the_place_of_the_key(context: ssl.SSLContext, pair: Pair) -> None:
    pair.key.write_bytes(pair.certificate.read_bytes())
    words = "holds no private key in PEM format, but a certificate; expected the key here"
    assert str(refusal(context, pair.certificate, pair.key)) == f"{pair.key}: {words}"


def test_a_certificate_without_any_key(context: ssl.SSLContext, pair: Pair) -> None:
    words = "holds no private key in PEM format; expected it here, or its file as the key"
    error = refusal(context, pair.certificate, pair.certificate)
    assert str(error) == f"{pair.certificate}: {words}"


def test_a_damaged_key(context: ssl.SSLContext, pair: Pair) -> None:
    pair.key.write_bytes(spoilt(pair.key.read_bytes()))
    error = refusal(context, pair.certificate, pair.key)
    assert str(error).startswith(f"{pair.key}: the key in it is damaged")


def test_a_key_of_another_certificate(
    context: ssl.SSLContext, authority: Authority, pair: Pair
) -> None:
    other = authority.issue()
    error = refusal(context, pair.certificate, other.key)
    words = f"this key does not belong to the certificate in {pair.certificate}"
    assert str(error) == f"{other.key}: {words}"


def test_a_key_of_another_certificate_in_the_same_file(
    context: ssl.SSLContext, authority: Authority, pair: Pair
) -> None:
    pair.key.write_bytes(pair.certificate.read_bytes() + authority.issue().key.read_bytes())
    error = refusal(context, pair.key, pair.key)
    assert str(error) == f"{pair.key}: this key does not belong to the certificate"


def test_a_key_that_is_too_weak(context: ssl.SSLContext, tmp_path: Path) -> None:
    weak = Pair(tmp_path / "weak.pem", tmp_path / "weak.key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:1024", "-nodes", "-subj", "/CN=weak"]
    files = ["-out", str(weak.certificate), "-keyout", str(weak.key)]
    subprocess.run([*command, *files], check=True, capture_output=True)
    context.set_ciphers("DEFAULT:@SECLEVEL=2")
    error = refusal(context, weak.certificate, weak.key)
    words = "OpenSSL takes a certificate in it for too weak (ee key too small)"
    assert str(error) == f"{weak.certificate}: {words}"


@pytest.mark.parametrize("which", ["certificate", "key"])
def test_a_file_that_is_not_there(context: ssl.SSLContext, pair: Pair, which: str) -> None:
    missing: Path = getattr(pair, which)
    missing.unlink()
    error = refusal(context, pair.certificate, pair.key)
    assert str(error) == f"{missing}: no such file; expected one in PEM format"
    assert error.errno == errno.ENOENT


def test_a_directory(context: ssl.SSLContext, pair: Pair, tmp_path: Path) -> None:
    error = refusal(context, tmp_path, pair.key)
    assert str(error) == f"{tmp_path}: is a directory; expected a file in PEM format"


def test_a_pipe_is_not_waited_for(context: ssl.SSLContext, pair: Pair, tmp_path: Path) -> None:
    """Reading one ends when its writer likes, and handshakes read these files."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    error = refusal(context, pair.certificate, pipe)
    assert str(error) == f"{pipe}: is no regular file; expected a file in PEM format"


def test_a_file_that_we_may_not_read(context: ssl.SSLContext, pair: Pair) -> None:
    pair.key.chmod(0)

    def check() -> None:
        if os.geteuid() == 0:
            pair.key.parent.chmod(0o755)
            os.setuid(65534)
        error = refusal(context, pair.certificate, pair.key)
        words = "no permission to read it; the user that the server runs as needs to"
        assert error.errno == errno.EACCES
        assert str(error) in {f"{pair.key}: {words}", f"{pair.certificate}: {words}"}

    assert in_child(check) == 0


def test_a_path_through_a_file(context: ssl.SSLContext, pair: Pair) -> None:
    error = refusal(context, pair.certificate, pair.certificate / "key")
    assert str(error) == f"{pair.certificate / 'key'}: cannot be read: Not a directory"


def test_an_error_of_the_system_keeps_its_number(pair: Pair, authority: Authority) -> None:
    """OpenSSL opens the files itself, and may find the process out of descriptors."""

    class Full(ssl.SSLContext):
        def load_cert_chain(self, *_: Any, **__: Any) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        load_verify_locations = load_cert_chain

    full = Full(ssl.PROTOCOL_TLS_SERVER)
    error = refusal(full, pair.certificate, pair.key)
    assert error.errno == errno.EMFILE
    words = "it or its key cannot be read (Too many open files)"
    assert str(error) == f"{pair.certificate}: {words}"
    with pytest.raises(CertificateError) as caught:
        load_authorities(full, str(authority.certificate))
    assert caught.value.errno == errno.EMFILE


# --- passwords --------------------------------------------------------------------------


def test_an_encrypted_key_needs_a_password(context: ssl.SSLContext, encrypted: Pair) -> None:
    """OpenSSL's own way would be to ask at the terminal, and to wait."""
    error = refusal(context, encrypted.certificate, encrypted.key)
    assert str(error) == f"{encrypted.key}: is encrypted; expected a password"


@pytest.mark.parametrize("password", ["guessed", "", lambda: b"guessed"])
def test_a_wrong_password(context: ssl.SSLContext, encrypted: Pair, password: Any) -> None:
    error = refusal(context, encrypted.certificate, encrypted.key, password)
    assert str(error) == f"{encrypted.key}: the password does not open this key"


def test_a_password_that_openssl_does_not_take(context: ssl.SSLContext, encrypted: Pair) -> None:
    error = refusal(context, encrypted.certificate, encrypted.key, "x" * 1025)
    assert str(error) == f"{encrypted.key}: expected a password of at most 1024 bytes"


def test_a_password_that_no_encoding_has(context: ssl.SSLContext, encrypted: Pair) -> None:
    error = refusal(context, encrypted.certificate, encrypted.key, "\ud800")
    assert str(error) == f"{encrypted.key}: expected a password of whole characters"
    assert error.__cause__ is None, "it would show the password"


def test_a_function_that_fails_shows_nothing_of_what_it_said(
    context: ssl.SSLContext, encrypted: Pair
) -> None:
    def ask() -> str:
        raise LookupError(SECRET)

    error = refusal(context, encrypted.certificate, encrypted.key, ask)
    words = "no password, because its function raised LookupError"
    assert str(error) == f"{encrypted.key}: {words}"
    assert isinstance(error.__cause__, LookupError)


def test_a_function_that_returns_no_password(context: ssl.SSLContext, encrypted: Pair) -> None:
    error = refusal(context, encrypted.certificate, encrypted.key, lambda: 1234)
    words = "expected a function that returns the password, not int"
    assert str(error) == f"{encrypted.key}: {words}"


# --- authorities ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda _: b"", "holds no certificate in PEM format; expected those of authorities"),
        (spoilt, "a certificate in it is damaged"),
    ],
    ids=["empty", "damaged"],
)
def test_authorities_that_cannot_be_used(
    context: ssl.SSLContext,
    authority: Authority,
    tmp_path: Path,
    spoil: Callable[[bytes], bytes],
    words: str,
) -> None:
    file = tmp_path / "authorities.pem"
    file.write_bytes(spoil(authority.certificate.read_bytes()))
    with pytest.raises(CertificateError) as caught:
        load_authorities(context, str(file))
    assert str(caught.value).startswith(f"{file}: {words}")


def test_authorities_that_are_not_there(context: ssl.SSLContext, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="no such file"):
        load_authorities(context, str(tmp_path / "authorities.pem"))


def test_a_file_that_goes_while_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, context: ssl.SSLContext, pair: Pair
) -> None:
    """The words are sought in a second reading."""
    pair.key.write_text("a key\n")
    is_there = pem._require_file

    def goes(file: str) -> None:
        is_there(file)
        if file == str(pair.key):
            pair.key.unlink()

    monkeypatch.setattr(pem, "_require_file", goes)
    error = refusal(context, pair.certificate, pair.key)
    assert str(error) == f"{pair.key}: no such file; expected one in PEM format"
