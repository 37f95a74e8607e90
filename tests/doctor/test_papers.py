from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from portico.doctor import tls
from portico.doctor.facts import Facts, Papers
from portico.doctor.findings import Finding, Severity
from portico.doctor.papers import read_papers
from portico.settings import Settings
from tests.doctor.test_rules import configured
from tests.tls import Authority, Pair


def read(pair: Pair, **settings: Any) -> Papers:
    found = read_papers(Settings(cert=pair.certificate, key=pair.key, **settings))
    assert found is not None
    return found


def wrong(papers: Papers) -> list[Finding]:
    facts = Facts(papers={"echo": papers})
    return [each for each in tls.papers(facts, configured()) if each.severity is not Severity.OK]


@pytest.fixture
def pair(authority: Authority) -> Pair:
    """A pair that a test may spoil."""
    pair = authority.issue("www.example.org")
    pair.key.chmod(0o600)
    return pair


def test_what_is_right_is_read_and_fine(pair: Pair, authority: Authority) -> None:
    papers = read(pair, client_ca=authority.certificate)
    (leaf,) = papers.chain
    assert papers.problem == ""
    assert leaf.not_before < time.time() < leaf.not_after
    assert leaf.issuer == papers.authorities[0].subject
    assert wrong(papers) == []


def test_without_a_certificate_there_is_nothing_to_read() -> None:
    assert read_papers(Settings()) is None


def test_a_certificate_that_has_expired_is_read_and_found(authority: Authority) -> None:
    pair = authority.issue("www.example.org", expired=True)
    pair.key.chmod(0o600)
    (found,) = wrong(read(pair))
    assert found.severity is Severity.FAIL
    assert "expired on 2020-01-01" in found.found


def test_a_key_that_others_can_read_is_found(pair: Pair) -> None:
    pair.key.chmod(0o644)
    (found,) = wrong(read(pair))
    assert f"{pair.key} has the mode 0644" in found.found
    assert found.remedy.startswith(f"`chmod 0600 {pair.key}`")


def test_a_key_of_another_certificate_is_found(pair: Pair, authority: Authority) -> None:
    other = Pair(pair.certificate, authority.issue().key)
    (found,) = wrong(read(other))
    assert "this key does not belong to the certificate" in found.found


def test_a_file_that_is_not_there_is_found(pair: Pair) -> None:
    (found,) = wrong(read(Pair(pair.certificate, pair.key.with_suffix(".gone"))))
    assert "no such file" in found.found


def test_authorities_that_cannot_be_read_are_found(pair: Pair) -> None:
    (found,) = wrong(read(pair, client_ca=pair.key))
    assert "holds no certificate" in found.found


@pytest.fixture
def chained(tmp_path: Path) -> Pair:
    """A certificate whose issuer, and whose issuer's issuer, are in the file after it."""
    middle = trustme.CA().create_child_ca().create_child_ca()
    issued = middle.issue_cert("www.example.org")
    pair = Pair(tmp_path / "chain.pem", tmp_path / "chain.key")
    pair.certificate.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(pair.key))
    pair.key.chmod(0o600)
    return pair


END = "-----END CERTIFICATE-----\n"


def test_a_chain_is_read_in_its_order(chained: Pair) -> None:
    papers = read(chained)
    assert len(papers.chain) == 3
    assert wrong(papers) == []


def test_a_chain_in_another_order_is_found(chained: Pair) -> None:
    leaf, one, two = (f"{part}{END}" for part in chained.certificate.read_text().split(END)[:3])
    chained.certificate.write_text(leaf + two + one)
    (found,) = wrong(read(chained))
    assert "which is not its issuer" in found.found


def test_certificate_and_key_may_be_one_file(pair: Pair) -> None:
    pair.key.write_text(pair.key.read_text() + pair.certificate.read_text())
    papers = read_papers(Settings(cert=pair.key))
    assert papers is not None
    assert wrong(papers) == []


def test_a_certificate_for_clients_alone_is_found(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "client.pem", tmp_path / "client.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", "/CN=www", "-addext", "extendedKeyUsage=clientAuth"]
    files = ["-keyout", str(pair.key), "-out", str(pair.certificate)]
    subprocess.run([*command, *files], check=True, capture_output=True)
    pair.key.chmod(0o600)
    (found,) = wrong(read(pair))
    assert f"{pair.certificate}: clients refuse it: " in found.found
    assert "purpose" in found.found


def test_text_around_the_certificates_is_passed_over(pair: Pair) -> None:
    pair.certificate.write_text("a word before\n" + pair.certificate.read_text() + "and after\n")
    assert len(read(pair).chain) == 1
