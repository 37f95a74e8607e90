"""What is wrong, or soon will be, with certificates and keys.

Source: RFC 5246, 7.4.2 (each certificate of a chain certifies the one before).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from portico.configuration import Configuration
from portico.doctor.facts import Account, Certificate, Facts, Papers
from portico.doctor.findings import Finding, fail, ok, warn

NEAR: Final = 14 * 86_400
"""Seconds before its end from which on a certificate should have been renewed.

One of Let's Encrypt is due 30 days before its end: two weeks later, renewal does not work.
"""

NARROW: Final = 0o640
"""What the mode of a key may allow at the most: its owner, and a group that reads it."""

DAY: Final = 86_400


def papers(facts: Facts, configuration: Configuration) -> Iterator[Finding]:
    """Look at the certificate, the key and the authorities of each service."""
    for service in configuration.services:
        own = facts.papers.get(service.name)
        if own is None:
            continue
        if own.problem:
            yield fail(
                "certificate",
                f"{service.name}: {own.problem}",
                "a certificate and the key that belongs to it, in PEM format",
                "issue it again, or name other files",
            )
            continue
        yield from _of_dates(own)
        yield from _of_order(own)
        yield from _of_mode(own)
        yield from _of_reader(own, facts.account)


def _of_dates(own: Papers) -> Iterator[Finding]:
    for each in own.chain:
        yield _dated(each, own.certificate, own.moment)
    for each in own.authorities:
        finding = _dated(each, "client_ca", own.moment)
        if finding.wanted:
            yield finding


def _dated(each: Certificate, file: str, moment: float) -> Finding:
    what = f"{each.name} in {file}"
    if moment < each.not_before:
        return fail(
            "certificate",
            f"{what} is not valid before {_day(each.not_before)}",
            "one that is valid",
            "wait, or set the clock right",
        )
    if moment >= each.not_after:
        return fail(
            "certificate",
            f"{what} expired on {_day(each.not_after)}",
            "one that is valid: clients refuse it",
            "renew it; a service that runs takes the exchanged files by itself",
        )
    days = int((each.not_after - moment) // DAY)
    if each.not_after - moment < NEAR:
        return warn(
            "certificate",
            f"{what} expires in {days} days, on {_day(each.not_after)}",
            "a renewal two weeks before, at the least",
            "renew it, and look why that was not done",
        )
    return ok("certificate", f"{what} is valid for {days} days")


def _of_order(own: Papers) -> Iterator[Finding]:
    """Look whether each certificate is certified by the next."""
    for one, following in zip(own.chain, own.chain[1:], strict=False):
        if one.issuer != following.subject:
            yield fail(
                "certificate",
                f"{own.certificate}: after {one.name} comes {following.name}, which is not "
                "its issuer",
                "the server's certificate, then its issuer's, then that one's",
                "put the certificates of the file in this order",
            )
            return


def _of_mode(own: Papers) -> Iterator[Finding]:
    mode = own.key_mode
    if mode is None:
        return
    if not mode & ~NARROW & 0o777:
        yield ok("key", f"{own.key} is kept from others (mode {mode:04o})")
        return
    say = fail if mode & 0o007 else warn
    yield say(
        "key",
        f"{own.key} has the mode {mode:04o}",
        f"0600, or {NARROW:04o} with a group of its own: who reads the key can be the server",
        f"`chmod 0600 {own.key}`; if others may have read it, a new key",
    )


def _of_reader(own: Papers, account: Account | None) -> Iterator[Finding]:
    """Look whether the key can be read by whom the processes become before they load it."""
    if account is None or account.problem or own.key_mode is None or own.key_owner is None:
        return
    owner, group = own.key_owner
    if account.uid == 0:
        return
    if account.uid == owner:
        bit = 0o400
    elif group == account.gid or group in account.groups:
        bit = 0o040
    else:
        bit = 0o004
    if not own.key_mode & bit:
        yield fail(
            "key",
            f"{account.words} may not read {own.key} (mode {own.key_mode:04o})",
            "a key that the service can read, and no other",
            f"`chgrp` it to a group of that user alone, and `chmod {NARROW:04o} {own.key}`",
        )


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).date().isoformat()


RULES: Final = (papers,)
