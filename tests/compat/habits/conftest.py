"""Run each test of this folder as a program of `socketserver`, and as the same one on portico.

A test is written as public programs are: it says ``socketserver.X``, and knows nothing of
portico.  It passes on the standard library's module, which shows that the habit is real, and
on everything that takes its place.
"""

import socketserver
from dataclasses import dataclass
from types import ModuleType

import pytest

import portico
from portico.swap import Face


@dataclass(frozen=True)
class Variant:
    """One way to give a program its ``socketserver``."""

    name: str
    module: ModuleType
    statement: str
    """What a program of its own does instead of ``import socketserver``."""


VARIANTS = (
    Variant("stdlib", socketserver, "import socketserver"),
    Variant("portico", portico, "import portico as socketserver"),
    Variant(
        "swapped",
        Face("threads"),
        "import portico.swap; portico.swap.install(); import socketserver",
    ),
)


@pytest.fixture(autouse=True, params=VARIANTS, ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """Give the name ``socketserver`` in the test's module to the module under test."""
    chosen: Variant = request.param
    monkeypatch.setattr(request.module, "socketserver", chosen.module)
    return chosen
