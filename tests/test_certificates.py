from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import portico
from portico import (
    CertificateError,
    Certificates,
    SettingError,
    certificates,
    pem,
    server_context,
)
from portico.certificates import LOOK_INTERVAL, SETTLING
from portico.events import CertificateLoaded, CertificateRejected, Event
from tests.support import PATIENCE, Call, eventually, recorded, run_program
from tests.tls import Authority, Pair, put, shake_hands

SERVER = "a server"


@pytest.fixture
def pair(authority: Authority, tmp_path: Path) -> Pair:
    """A pair that a test may exchange."""
    pair = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    authority.issue().write_over(pair)
    return pair


@pytest.fixture
def other(authority: Authority) -> Pair:
    """Another pair for the same names."""
    return authority.issue()


def served(context: ssl.SSLContext, authority: Authority, name: str | None = "localhost") -> bytes:
    """Return the certificate that a client is shown who asks for this name."""
    client = authority.client()
    client.check_hostname = False
    certificate = shake_hands(context, client, name).certificate
    assert certificate is not None
    return certificate


# --- safe values ------------------------------------------------------------------------


def test_a_client_gets_tls_1_3(authority: Authority, pair: Pair) -> None:
    met = shake_hands(server_context(pair.certificate, pair.key), authority.client())
    assert (met.certificate, met.version) == (pair.der, "TLSv1.3")
    assert (met.client, met.protocol) == (None, None)


def test_tls_1_2_is_the_oldest_that_is_spoken(authority: Authority, pair: Pair) -> None:
    context = server_context(pair.certificate, pair.key)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    old = authority.client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    met = shake_hands(context, old)
    assert met.version == "TLSv1.2"
    assert met.cipher == "ECDHE-ECDSA-AES256-GCM-SHA384"


def test_the_server_prefers_the_stronger_suite(authority: Authority, pair: Pair) -> None:
    old = authority.client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384")
    met = shake_hands(server_context(pair.certificate, pair.key), old)
    assert met.cipher == "ECDHE-ECDSA-AES256-GCM-SHA384"


def test_every_suite_is_forward_secret_and_authenticated(pair: Pair) -> None:
    suites = server_context(pair.certificate, pair.key).get_ciphers()
    assert len(suites) > 3
    for suite in suites:
        assert suite["aead"]
        assert suite["kea"] in {"kx-ecdhe", "kx-any"}


@pytest.mark.parametrize("suites", ["ECDHE+AES+SHA256:ECDHE+AES+SHA384", "DHE+AESGCM", "kRSA+AES"])
def test_other_suites_are_refused(authority: Authority, pair: Pair, suites: str) -> None:
    old = authority.client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers(suites)
    with pytest.raises(ssl.SSLError, match="NO_SHARED_CIPHER"):
        shake_hands(server_context(pair.certificate, pair.key), old)


def test_neither_compression_nor_renegotiation_is_offered(pair: Pair) -> None:
    options = server_context(pair.certificate, pair.key).options
    for option in (
        ssl.OP_NO_COMPRESSION,
        ssl.OP_NO_RENEGOTIATION,
        ssl.OP_CIPHER_SERVER_PREFERENCE,
    ):
        assert options & option


def test_the_key_may_stand_in_the_file_of_the_certificate(authority: Authority, pair: Pair) -> None:
    put(pair.certificate, pair.certificate.read_bytes() + pair.key.read_bytes())
    context = server_context(str(pair.certificate))
    assert served(context, authority) == pair.der


def test_every_context_is_another(pair: Pair) -> None:
    made = [server_context(pair.certificate, pair.key) for _ in range(2)]
    assert made[0] is not made[1]


# --- what is asked for ------------------------------------------------------------------


@pytest.fixture
def alice(authority: Authority) -> Pair:
    """The certificate of a client."""
    return authority.issue("alice@example.org")


def test_no_client_is_asked_for_a_certificate(
    authority: Authority, pair: Pair, alice: Pair
) -> None:
    met = shake_hands(server_context(pair.certificate, pair.key), authority.client(alice))
    assert met.client is None


def asking(pair: Pair, authority: Authority, how: Any) -> ssl.SSLContext:
    return server_context(
        pair.certificate,
        pair.key,
        client_ca=authority.certificate,
        client_certificates=how,
    )


@pytest.mark.parametrize("how", ["optional", "required"])
def test_the_certificate_of_a_client_is_seen(
    authority: Authority, pair: Pair, alice: Pair, how: str
) -> None:
    met = shake_hands(asking(pair, authority, how), authority.client(alice))
    assert met.client is not None
    assert met.client["subjectAltName"] == (("email", "alice@example.org"),)


def test_a_client_may_have_none_where_it_is_optional(authority: Authority, pair: Pair) -> None:
    assert shake_hands(asking(pair, authority, "optional"), authority.client()).client is None


def test_a_client_must_have_one_where_it_is_required(authority: Authority, pair: Pair) -> None:
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake_hands(asking(pair, authority, "required"), authority.client())


@pytest.mark.parametrize("how", ["optional", "required"])
def test_the_certificate_of_a_stranger_is_refused(
    authority: Authority, pair: Pair, tmp_path: Path, how: str
) -> None:
    stranger = Authority(tmp_path).issue("alice@example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(asking(pair, authority, how), authority.client(stranger))


@pytest.mark.parametrize(
    ("known", "protocol"),
    [(["http/1.1", "h2"], "h2"), (["http/1.1"], "http/1.1"), (["other"], None), ([], None)],
)
def test_the_server_chooses_the_application_protocol(
    authority: Authority, pair: Pair, known: list[str], protocol: str | None
) -> None:
    context = server_context(pair.certificate, pair.key, alpn=["h2", "http/1.1"])
    assert shake_hands(context, authority.client(alpn=known)).protocol == protocol


# --- a certificate for each name --------------------------------------------------------


@pytest.fixture(scope="module")
def named(authority: Authority) -> dict[str, Pair]:
    names = ("default", "example.org", "*.example.org", "www.example.org", "localhost")
    return {name: authority.issue(name) for name in names}


def of_names(named: dict[str, Pair], **settings: Any) -> ssl.SSLContext:
    default = named["default"]
    sni = {n: (p.certificate, p.key) for n, p in named.items() if n != "default"}
    return server_context(default.certificate, default.key, sni=sni, **settings)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("example.org", "example.org"),
        ("EXAMPLE.org", "example.org"),
        ("example.org.", "example.org"),
        ("www.example.org", "www.example.org"),
        ("mail.example.org", "*.example.org"),
        ("xn--bcher-kva.example.org", "*.example.org"),
        ("*.example.org", "*.example.org"),
        ("a.mail.example.org", "default"),
        ("fooexample.org", "default"),
        ("example.com", "default"),
        ("localhost", "localhost"),
        ("org", "default"),
        (None, "default"),
    ],
)
def test_a_client_gets_the_certificate_of_the_name_that_it_asks_for(
    authority: Authority, named: dict[str, Pair], asked: str | None, shown: str
) -> None:
    assert served(of_names(named), authority, asked) == named[shown].der


def test_a_name_without_a_first_label_matches_no_pattern(named: dict[str, Pair]) -> None:
    """No client of Python's can ask for it."""
    context = server_context(named["default"].certificate, named["default"].key)
    assert certificates._chosen({"*.example.org": context}, ".example.org") is None


def test_every_name_has_all_other_settings(
    authority: Authority, named: dict[str, Pair], alice: Pair
) -> None:
    """OpenSSL takes protocols and authorities from the context that was chosen by name."""
    context = of_names(
        named,
        alpn=["h2"],
        client_ca=authority.certificate,
        client_certificates="required",
    )
    met = shake_hands(context, authority.client(alice, ["h2"]), "www.example.org")
    assert met.certificate == named["www.example.org"].der
    assert met.protocol == "h2"
    assert met.client
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake_hands(context, authority.client(), "www.example.org")


def test_a_name_may_have_its_key_in_the_file_of_the_certificate(
    authority: Authority, pair: Pair, other: Pair, tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(other.certificate.read_bytes() + other.key.read_bytes())
    context = server_context(pair.certificate, pair.key, sni={"localhost": (both, None)})
    assert served(context, authority) == other.der


# --- another program as the client ------------------------------------------------------


def answered(context: ssl.SSLContext, *options: str, says: str = "") -> str:
    """Return what `openssl s_client` tells of a connection; with nothing to say, it leaves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)

        def serve() -> None:
            accepted, _ = listener.accept()
            accepted.settimeout(PATIENCE)
            with accepted, context.wrap_socket(accepted, server_side=True) as wrapped:
                # How openssl takes its leave is its affair.
                with suppress(ssl.SSLError, ConnectionError):
                    while wrapped.recv(64):
                        pass

        serving = Call(serve)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with subprocess.Popen(
            ["openssl", "s_client", "-connect", address, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            stuck = threading.Timer(PATIENCE, client.kill)
            stuck.start()
            try:
                if says:  # at the end of its input it would leave before it is answered
                    client.stdin.write(says)
                    client.stdin.flush()
                else:
                    client.stdin.close()
                told = client.stdout.read()
            finally:
                stuck.cancel()
        serving.result()
    return told


def test_openssl_is_served_by_name_protocol_and_certificate(
    authority: Authority, named: dict[str, Pair], alice: Pair
) -> None:
    context = of_names(
        named,
        alpn=["h2", "http/1.1"],
        client_ca=authority.certificate,
        client_certificates="required",
    )
    told = answered(
        context,
        *("-servername", "mail.example.org", "-verify_hostname", "mail.example.org"),
        *("-CAfile", str(authority.certificate), "-verify_return_error"),
        *("-alpn", "http/1.1", "-cert", str(alice.certificate), "-key", str(alice.key)),
    )
    assert "Verification: OK" in told
    assert "Verified peername: *.example.org" in told
    assert "ALPN protocol: http/1.1" in told


def test_openssl_may_not_renegotiate(authority: Authority, pair: Pair) -> None:
    """A client could have the server compute without end, on one connection."""
    context = server_context(pair.certificate, pair.key)
    told = answered(context, "-tls1_2", "-CAfile", str(authority.certificate), says="R\n")
    assert "RENEGOTIATING" in told
    assert "no renegotiation" in told


# --- wrong values -----------------------------------------------------------------------


PATH = "the path of a file in PEM format"
CONTENTS = f"{PATH}, not its contents"
DNS = "a host name as in DNS ('example.org', '*.example.org', 'xn--bcher-kva.example')"
PROTOCOLS = "a list of the names of protocols, such as ['h2', 'http/1.1']"
PAIR = "a certificate and its key, or None: (file, file)"
KEY = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"certificate": 7}, f"certificate=<class 'int'>: expected {PATH}"),
        ({"certificate": b"cert.pem"}, f"certificate=<class 'bytes'>: expected {PATH}"),
        ({"certificate": ""}, f"certificate='': expected {CONTENTS}"),
        ({"key": KEY}, f"key='...': expected {CONTENTS}"),
        ({"key": KEY.encode()}, f"key=<class 'bytes'>: expected {PATH}"),
        ({"key": "key\0"}, f"key='...': expected {CONTENTS}"),
        (
            {"password": 1234},
            "password=<class 'int'>: expected text, bytes, or a function that returns either",
        ),
        (
            {"client_certificates": "always"},
            "client_certificates='always': expected 'none', 'optional' or 'required'",
        ),
        (
            {"client_certificates": "required"},
            "client_ca=None: expected a file of authorities, since client_certificates='required'",
        ),
        (
            {"client_ca": "ca.pem"},
            (
                "client_certificates='none': "
                "expected 'optional' or 'required', since there is a client_ca"
            ),
        ),
        ({"client_ca": 7}, f"client_ca=<class 'int'>: expected {PATH}"),
        ({"alpn": "h2"}, f"alpn='h2': expected {PROTOCOLS}"),
        ({"alpn": [""]}, f"alpn=['']: expected {PROTOCOLS}"),
        ({"alpn": ["é"]}, f"alpn=['é']: expected {PROTOCOLS}"),
        ({"alpn": [7]}, f"alpn=[7]: expected {PROTOCOLS}"),
        ({"alpn": ["x" * 256]}, f"alpn=['{'x' * 256}']: expected {PROTOCOLS}"),
        ({"sni": {"": ("c", "k")}}, f"sni='': expected {DNS}"),
        ({"sni": {"*": ("c", "k")}}, f"sni='*': expected {DNS}"),
        ({"sni": {"w*.example.org": ("c", "k")}}, f"sni='w*.example.org': expected {DNS}"),
        ({"sni": {"a.*.example.org": ("c", "k")}}, f"sni='a.*.example.org': expected {DNS}"),
        ({"sni": {"127.0.0.1": ("c", "k")}}, f"sni='127.0.0.1': expected {DNS}"),
        ({"sni": {"::1": ("c", "k")}}, f"sni='::1': expected {DNS}"),
        ({"sni": {"bücher.example": ("c", "k")}}, f"sni='bücher.example': expected {DNS}"),
        ({"sni": {7: ("c", "k")}}, f"sni=7: expected {DNS}"),
        (
            {"sni": {"a.example": ("c", "k"), "A.example.": ("c", "k")}},
            "sni='A.example.': expected each name once; small and capital letters are equal",
        ),
        ({"sni": {"a.example": "c"}}, f"sni['a.example']=<class 'str'>: expected {PAIR}"),
        ({"sni": {"a.example": ("c",)}}, f"sni['a.example']=<class 'tuple'>: expected {PAIR}"),
        ({"sni": {"a.example": ("c", KEY)}}, f"sni['a.example']='...': expected {CONTENTS}"),
    ],
)
@pytest.mark.parametrize("make", [server_context, Certificates])
def test_a_wrong_value_is_named_with_what_would_be_right(
    make: Any, settings: dict[str, Any], words: str
) -> None:
    """And never shown where it may be a secret."""
    with pytest.raises(SettingError) as caught:
        make(**{"certificate": "cert.pem", **settings})
    assert str(caught.value) == words


def test_protocols_that_fill_more_than_a_message(pair: Pair) -> None:
    with pytest.raises(SettingError, match="expected a list of the names"):
        server_context(pair.certificate, pair.key, alpn=["x" * 255] * 256)


@pytest.mark.parametrize("make", [server_context, Certificates])
def test_a_file_that_cannot_be_used_is_named(make: Any, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(CertificateError) as caught:
        make(pair.certificate, tmp_path / "nothing.key")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "nothing.key")


def test_a_secret_is_in_no_text(pair: Pair) -> None:
    found = Certificates(pair.certificate, pair.key, password="open sesame")
    assert "open sesame" not in repr(found) + repr(found._settings)


def test_who_needs_no_tls_does_not_load_it() -> None:
    program = "import sys, portico; assert 'ssl' not in sys.modules; portico.server_context"
    assert run_program(program).returncode == 0
    assert portico.Certificates is Certificates


# --- files that are exchanged -----------------------------------------------------------


class Exchange:
    """Certificates, and looks at them that are always due."""

    def __init__(self, made: Certificates) -> None:
        self.certificates = made
        self.now = 0.0

    def look(self) -> ssl.SSLContext:
        self.now += LOOK_INTERVAL
        return self.certificates.refresh(SERVER, now=self.now)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file count as left alone from the moment that it was written."""
    monkeypatch.setattr(certificates, "SETTLING", 0.0)


@pytest.fixture
def exchange(pair: Pair, settled: None) -> Exchange:
    return Exchange(Certificates(pair.certificate, pair.key))


@pytest.fixture
def told() -> Iterator[list[Event]]:
    """What is told of certificates."""
    with recorded(CertificateLoaded, CertificateRejected) as events:
        yield events


def test_a_look_at_files_that_are_the_same_changes_nothing(
    exchange: Exchange, told: list[Event]
) -> None:
    before = exchange.certificates.context
    assert exchange.look() is before
    assert exchange.look() is before
    assert told == []


def test_a_pair_that_was_exchanged_is_used_by_the_next_handshake(
    exchange: Exchange, authority: Authority, pair: Pair, other: Pair, told: list[Event]
) -> None:
    before, old = exchange.certificates.context, pair.der
    other.write_over(pair)
    context = exchange.look()
    assert context is exchange.certificates.context
    assert served(context, authority) == other.der
    assert served(before, authority) == old, "a context in use is never touched"
    assert told == [CertificateLoaded(SERVER, str(pair.certificate))]


def test_files_that_are_written_in_place_are_noticed(
    exchange: Exchange, authority: Authority, pair: Pair, other: Pair
) -> None:
    pair.certificate.write_bytes(other.certificate.read_bytes())
    pair.key.write_bytes(other.key.read_bytes())
    os.utime(pair.certificate, (0, 0))
    assert served(exchange.look(), authority) == other.der


def test_a_folder_that_a_link_exchanges_is_noticed(
    authority: Authority, pair: Pair, other: Pair, tmp_path: Path, settled: None
) -> None:
    """As Kubernetes exchanges a mounted secret: the files are links through a link."""
    for number, issued in enumerate((pair, other)):
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        shutil.copy2(issued.certificate, folder / "tls.crt")
        shutil.copy2(issued.key, folder / "tls.key")
    (tmp_path / "..data").symlink_to("..0")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    exchange = Exchange(Certificates(tmp_path / "tls.crt", tmp_path / "tls.key"))
    assert served(exchange.look(), authority) == pair.der
    (tmp_path / "..fresh").symlink_to("..1")
    (tmp_path / "..fresh").replace(tmp_path / "..data")
    assert served(exchange.look(), authority) == other.der


@pytest.mark.parametrize("first", ["certificate", "key"])
def test_half_an_exchange_keeps_the_old_pair_and_is_told_once(
    exchange: Exchange,
    authority: Authority,
    pair: Pair,
    other: Pair,
    told: list[Event],
    first: str,
) -> None:
    before, old = exchange.certificates.context, pair.der
    put(getattr(pair, first), getattr(other, first).read_bytes())
    for _ in range(3):
        assert exchange.look() is before
    assert served(exchange.look(), authority) == old
    (rejected,) = told
    assert isinstance(rejected, CertificateRejected)
    assert (rejected.server, rejected.certificate) == (SERVER, str(pair.certificate))
    assert "does not belong to the certificate" in str(rejected.error)
    other.write_over(pair)
    assert served(exchange.look(), authority) == other.der
    assert told[1:] == [CertificateLoaded(SERVER, str(pair.certificate))]


def test_another_fault_is_told_again(exchange: Exchange, pair: Pair, told: list[Event]) -> None:
    for contents in (b"", b"a key\n"):
        put(pair.key, contents)
        exchange.look()
        exchange.look()
    pair.key.unlink()
    exchange.look()
    exchange.look()
    assert [str(event.error) for event in told if isinstance(event, CertificateRejected)] == [
        f"{pair.key}: holds no private key in PEM format",
        f"{pair.key}: holds no private key in PEM format",
        f"{pair.key}: no such file; expected one in PEM format",
    ]


def test_the_files_of_names_and_of_authorities_are_watched_too(
    authority: Authority, pair: Pair, other: Pair, tmp_path: Path, settled: None, alice: Pair
) -> None:
    name, strangers = Pair(tmp_path / "name.pem", tmp_path / "name.key"), tmp_path / "strangers"
    authority.issue("www.example.org").write_over(name)
    strangers.mkdir()
    ca = tmp_path / "ca.pem"
    ca.write_bytes(Authority(strangers).certificate.read_bytes())
    exchange = Exchange(
        Certificates(
            pair.certificate,
            pair.key,
            sni={"*.example.org": (name.certificate, name.key)},
            client_ca=ca,
            client_certificates="required",
        )
    )
    assert exchange.certificates.files == tuple(
        map(str, (pair.certificate, pair.key, ca, name.certificate, name.key))
    )
    client = authority.client(alice)
    client.check_hostname = False
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(exchange.look(), client, "www.example.org")
    put(ca, authority.certificate.read_bytes())
    assert shake_hands(exchange.look(), client, "www.example.org").certificate == name.der
    other.write_over(name)
    assert shake_hands(exchange.look(), client, "www.example.org").certificate == other.der


@pytest.fixture
def named_exchange(
    authority: Authority, pair: Pair, tmp_path: Path, settled: None
) -> tuple[Exchange, Pair]:
    """Certificates of which one is for a name, and that one."""
    name = Pair(tmp_path / "name.pem", tmp_path / "name.key")
    authority.issue("www.example.org").write_over(name)
    shutil.copy(authority.certificate, tmp_path / "ca.pem")
    made = Certificates(
        pair.certificate,
        pair.key,
        sni={"www.example.org": (name.certificate, name.key)},
        client_ca=tmp_path / "ca.pem",
        client_certificates="optional",
    )
    return Exchange(made), name


def test_a_pair_that_is_broken_holds_up_no_other(
    named_exchange: tuple[Exchange, Pair],
    authority: Authority,
    pair: Pair,
    other: Pair,
    told: list[Event],
) -> None:
    """The certificate of one site that was taken away must not let those of all others expire."""
    exchange, name = named_exchange
    of_name = name.der
    name.key.unlink()
    other.write_over(pair)
    context = exchange.look()
    assert served(context, authority) == other.der
    assert served(context, authority, "www.example.org") == of_name
    assert [(type(event), getattr(event, "certificate", None)) for event in told] == [
        (CertificateLoaded, str(pair.certificate)),
        (CertificateRejected, str(name.certificate)),
    ]
    assert not exchange.certificates.reload()


def test_an_exchange_for_a_name_leaves_the_first_context_as_it_is(
    named_exchange: tuple[Exchange, Pair], authority: Authority, other: Pair
) -> None:
    exchange, name = named_exchange
    before = exchange.certificates.context
    other.write_over(name)
    assert exchange.look() is before
    assert served(before, authority, "www.example.org") == other.der


def test_authorities_that_cannot_be_used_are_told_once_for_all_pairs(
    named_exchange: tuple[Exchange, Pair], tmp_path: Path, told: list[Event]
) -> None:
    exchange, _ = named_exchange
    put(tmp_path / "ca.pem", b"")
    for _ in range(2):
        exchange.look()
    words = "holds no certificate in PEM format; expected those of authorities"
    assert [str(event.error) for event in told if isinstance(event, CertificateRejected)] == [
        f"{tmp_path / 'ca.pem'}: {words}"
    ]


def test_a_relative_path_stays_the_same_file(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, pair: Pair, other: Pair, settled: None
) -> None:
    """A server that becomes a daemon changes its directory."""
    monkeypatch.chdir(pair.certificate.parent)
    exchange = Exchange(Certificates("cert.pem", "key.pem"))
    monkeypatch.chdir("/")
    other.write_over(pair)
    assert served(exchange.look(), authority) == other.der


def test_the_files_are_looked_at_once_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch, exchange: Exchange, pair: Pair, other: Pair
) -> None:
    looks: list[int] = []
    stamp = certificates._stamp

    def counted(file: str) -> tuple[int, ...] | None:
        looks.append(1)
        return stamp(file)

    monkeypatch.setattr(certificates, "_stamp", counted)
    refresh = exchange.certificates.refresh
    before = refresh(now=100.0)
    other.write_over(pair)
    for tenth in range(10):
        assert refresh(now=100.0 + tenth / 10) is before
    assert len(looks) == 2
    assert refresh(now=101.0) is not before
    assert len(looks) > 2


def test_a_file_that_was_written_just_now_is_given_time_to_settle(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, pair: Pair, other: Pair
) -> None:
    """It may be half of an exchange: that is no failure to tell."""
    clock = [0.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    made = Certificates(pair.certificate, pair.key)
    put(pair.certificate, other.certificate.read_bytes())
    with recorded(CertificateLoaded, CertificateRejected) as told:
        clock[0] = pair.certificate.stat().st_ctime + SETTLING / 2
        before = made.refresh(now=100.0)
        assert told == []
        other.write_over(pair)
        clock[0] = pair.key.stat().st_ctime + 2 * SETTLING
        assert made.refresh(now=100.0 + SETTLING / 2) is before, "not before it is due"
        assert served(made.refresh(now=100.0 + SETTLING), authority) == other.der
        assert [type(event) for event in told] == [CertificateLoaded]


def test_an_exchange_between_the_look_and_the_load_is_no_fault(
    monkeypatch: pytest.MonkeyPatch,
    exchange: Exchange,
    authority: Authority,
    pair: Pair,
    other: Pair,
    told: list[Event],
) -> None:
    """It is looked at again at the next handshake, and not a second later."""
    load = pem.load_pair
    halves = [other.certificate.read_bytes()]

    def exchanged(*args: Any) -> None:
        if halves:
            put(pair.certificate, halves.pop())
        load(*args)

    monkeypatch.setattr(certificates, "load_pair", exchanged)
    before = exchange.certificates.context
    authority.issue().write_over(pair)
    assert exchange.look() is before
    assert told == []
    put(pair.key, other.key.read_bytes())
    assert served(exchange.certificates.refresh(now=exchange.now), authority) == other.der
    assert [type(event) for event in told] == [CertificateLoaded]


def test_a_file_of_the_future_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, pair: Pair, other: Pair
) -> None:
    """A clock that was set back, or that of a file server, must not keep the old pair for years."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    made = Certificates(pair.certificate, pair.key)
    other.write_over(pair)
    assert served(made.refresh(), authority) == other.der


def test_a_file_that_goes_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, told: list[Event]
) -> None:
    made = Certificates(pair.certificate, pair.key)
    pair.certificate.unlink()
    pair.key.unlink()
    made.refresh()
    assert [type(event) for event in told] == [CertificateRejected]


def test_want_of_descriptors_is_told_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
    exchange: Exchange,
    authority: Authority,
    pair: Pair,
    other: Pair,
    told: list[Event],
) -> None:
    """No look at the files shows that it has passed."""

    def full(*_: object) -> None:
        raise CertificateError(errno.EMFILE, "Too many open files", str(pair.key))

    other.write_over(pair)
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "load_pair", full)
        for _ in range(3):
            exchange.look()
    assert [type(event) for event in told] == [CertificateRejected]
    assert served(exchange.look(), authority) == other.der
    assert [type(event) for event in told] == [CertificateRejected, CertificateLoaded]


def test_what_is_found_after_the_want_of_descriptors_is_told_too(
    monkeypatch: pytest.MonkeyPatch, exchange: Exchange, pair: Pair, other: Pair, told: list[Event]
) -> None:
    def full(*_: object) -> None:
        raise CertificateError(errno.EMFILE, "Too many open files", str(pair.key))

    put(pair.key, other.key.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "load_pair", full)
        exchange.look()
    for _ in range(3):
        exchange.look()
    assert [str(event.error) for event in told if isinstance(event, CertificateRejected)] == [
        f"{pair.key}: Too many open files",
        f"{pair.key}: this key does not belong to the certificate in {pair.certificate}",
    ]


def test_nothing_is_built_for_nobody(exchange: Exchange, pair: Pair, other: Pair) -> None:
    other.write_over(pair)
    assert exchange.certificates.reload()
    pair.key.unlink()
    assert not exchange.certificates.reload()


# --- on request -------------------------------------------------------------------------


def test_a_reload_reads_the_files_at_once(
    authority: Authority, pair: Pair, other: Pair, told: list[Event]
) -> None:
    made = Certificates(pair.certificate, pair.key)
    other.write_over(pair)
    assert made.reload()
    assert served(made.context, authority) == other.der
    assert made.refresh() is made.context
    assert told == [CertificateLoaded(None, str(pair.certificate))]


def test_a_reload_makes_a_context_even_of_the_same_files(pair: Pair) -> None:
    made = Certificates(pair.certificate, pair.key)
    before = made.context
    assert made.reload()
    assert made.context is not before


def test_a_reload_that_fails_says_why_each_time_and_keeps_the_old(
    pair: Pair, told: list[Event]
) -> None:
    made = Certificates(pair.certificate, pair.key)
    before = made.context
    pair.key.unlink()
    assert not made.reload(SERVER)
    assert not made.reload(SERVER)
    assert made.refresh() is before
    assert [(type(event), event.server) for event in told] == [(CertificateRejected, SERVER)] * 2


def test_an_open_connection_outlives_the_exchange(
    authority: Authority, pair: Pair, other: Pair
) -> None:
    made = Certificates(pair.certificate, pair.key)
    ours, theirs = socket.socketpair()
    connecting = Call(lambda: authority.client().wrap_socket(theirs, server_hostname="localhost"))
    with made.context.wrap_socket(ours, server_side=True) as server, connecting.result() as client:
        other.write_over(pair)
        assert made.reload()
        server.sendall(b"still here")
        assert client.recv(64) == b"still here"


def test_a_session_is_not_resumed_after_an_exchange(authority: Authority, pair: Pair) -> None:
    """The client would be trusted for what the authorities of yesterday had said."""
    made = Certificates(pair.certificate, pair.key)
    client = authority.client()
    client.maximum_version = ssl.TLSVersion.TLSv1_2

    def reused(session: ssl.SSLSession | None) -> tuple[bool | None, ssl.SSLSession | None]:
        ours, theirs = socket.socketpair()
        context = made.context
        serving = Call(lambda: context.wrap_socket(ours, server_side=True))
        with client.wrap_socket(theirs, server_hostname="localhost", session=session) as wrapped:
            with serving.result():
                return wrapped.session_reused, wrapped.session

    first, session = reused(None)
    again, _ = reused(session)
    assert made.reload()
    after, _ = reused(session)
    assert (first, again, after) == (False, True, False)


# --- threads ----------------------------------------------------------------------------


class Held:
    """A load that goes on until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self._load = pem.load_pair
        monkeypatch.setattr(certificates, "load_pair", self.load)

    def load(self, *args: Any) -> None:
        self.began.set()
        assert self.go_on.wait(PATIENCE)
        self._load(*args)


def test_nobody_waits_for_the_one_that_loads(
    monkeypatch: pytest.MonkeyPatch, exchange: Exchange, pair: Pair, other: Pair
) -> None:
    before = exchange.certificates.context
    other.write_over(pair)
    held = Held(monkeypatch)
    loading = Call(exchange.look)
    assert held.began.wait(PATIENCE)
    assert exchange.certificates.refresh(now=100.0) is before
    held.go_on.set()
    assert loading.result() is not before


def test_who_comes_just_after_a_look_does_not_look_again(
    monkeypatch: pytest.MonkeyPatch, exchange: Exchange
) -> None:
    """Two threads find a look due; the second gets the lock when the first has looked."""
    exchange.certificates.refresh(now=100.0)
    monkeypatch.setattr(certificates, "_stamp", lambda _: pytest.fail("looked"))
    exchange.certificates._look(SERVER, 100.0)


def test_a_reload_waits_for_a_look_and_then_reads_again(
    monkeypatch: pytest.MonkeyPatch, exchange: Exchange, pair: Pair, other: Pair
) -> None:
    other.write_over(pair)
    held = Held(monkeypatch)
    looking = Call(exchange.look)
    assert held.began.wait(PATIENCE)
    reloading = Call(exchange.certificates.reload)
    held.go_on.set()
    assert reloading.result()
    looking.result()


def test_the_handler_of_a_signal_may_reload_in_the_middle_of_a_load(
    monkeypatch: pytest.MonkeyPatch, exchange: Exchange, pair: Pair, other: Pair
) -> None:
    """It runs in the thread that is interrupted, which has the lock."""
    reloaded: list[bool] = []
    load = pem.load_pair

    def interrupted(*args: Any) -> None:
        load(*args)
        if not reloaded:
            reloaded.append(True)
            signal.raise_signal(signal.SIGHUP)

    before = signal.signal(
        signal.SIGHUP, lambda *_: reloaded.append(exchange.certificates.reload())
    )
    try:
        monkeypatch.setattr(certificates, "load_pair", interrupted)
        other.write_over(pair)
        exchange.look()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert reloaded == [True, True]


def test_no_handshake_fails_while_certificates_are_exchanged(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, pair: Pair
) -> None:
    """Four threads shake hands while a fifth exchanges both files and asks for reloads."""
    monkeypatch.setattr(certificates, "LOOK_INTERVAL", 0.0)
    issued = [authority.issue() for _ in range(4)]
    made = Certificates(pair.certificate, pair.key)
    enough = threading.Event()
    seen: set[bytes] = set()

    def shake() -> int:
        count, client = 0, authority.client()
        while not enough.is_set():
            certificate = shake_hands(made.refresh(), client).certificate
            assert certificate is not None
            seen.add(certificate)
            count += 1
        return count

    def has_been_seen(shown: Pair) -> Callable[[], bool]:
        return lambda: shown.der in seen or any(not call.is_running() for call in calls)

    calls = [Call(shake) for _ in range(4)]
    try:
        for number, fresh in enumerate(issued * 2):
            seen.clear()
            fresh.write_over(pair)
            if number % 2:
                made.reload()
            eventually(has_been_seen(fresh), "the exchanged certificate is shown")
    finally:
        enough.set()
    assert all(call.result() > 0 for call in calls)
