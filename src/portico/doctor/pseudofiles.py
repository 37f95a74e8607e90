"""Read the files in which the kernel shows its numbers: those of /proc, and of control groups.

What is not there, or not readable, or something else than expected is unknown, and no error: a
container hides much, and another system has none of it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def text(path: Path) -> str:
    """Return what a file holds; ``""`` if that is unknown."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text()
    return ""


def numbers(path: Path) -> list[int]:
    """Return the numbers in a file; none of them if anything else is among them."""
    with suppress(ValueError):
        return [int(word) for word in text(path).split()]
    return []


def number(path: Path) -> int | None:
    """Return the first number in a file; ``None`` if it is unknown, or a word such as ``max``."""
    found = numbers(path)
    return found[0] if found else None
