"""What a rule says: how bad it is, what is, what is wanted, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    """It is as it should be."""
    WARN = "warn"
    """It works, and not as well, or not for as long, as was asked."""
    FAIL = "fail"
    """It does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says of one thing.

    Attributes:
        severity: How bad it is.
        subject: What it is about, in a word or two.
        found: What is.
        wanted: What would be right; empty if it is.
        remedy: What to do; empty if there is nothing.
    """

    severity: Severity
    subject: str
    found: str
    wanted: str = ""
    remedy: str = ""


def ok(subject: str, found: str) -> Finding:
    """Say that something is as it should be."""
    return Finding(Severity.OK, subject, found)


def warn(subject: str, found: str, wanted: str, remedy: str) -> Finding:
    """Say that something works, and not as was asked."""
    return Finding(Severity.WARN, subject, found, wanted, remedy)


def fail(subject: str, found: str, wanted: str, remedy: str) -> Finding:
    """Say that something does not work."""
    return Finding(Severity.FAIL, subject, found, wanted, remedy)
