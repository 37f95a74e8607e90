"""The words about what was done."""

from __future__ import annotations

import pytest

from portico.counts import NO_PREAMBLE, REASONS, Counts
from portico.duty import described, say_counts
from portico.events import RefusalReason


def test_what_did_not_happen_is_not_said() -> None:
    assert described(Counts()) == "0 accepted, 0 served; 0 bytes received, 0 sent"


def test_everything_that_happened_is_said_and_refusals_by_their_reason() -> None:
    refused = dict.fromkeys(REASONS, 0) | {RefusalReason.TOO_MANY.value: 3, NO_PREAMBLE: 1}
    counts = Counts(
        accepted=21,
        active=1,
        finished=8,
        failed=2,
        peer_gone=1,
        cut_off=2,
        lost=3,
        received=500,
        sent=700,
        refused_by=refused,
    )
    assert described(counts) == (
        "21 accepted, 11 served (2 failed), 4 refused (3 too many connections, 1 no preamble), "
        "2 cut off, 3 lost, 1 open; 500 bytes received, 700 sent"
    )


def test_each_address_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say_counts({"tcp://:1": Counts(accepted=1, finished=1), "udp://:2": Counts()})
    assert capsys.readouterr().err.splitlines() == [
        "portico: tcp://:1: 1 accepted, 1 served; 0 bytes received, 0 sent",
        "portico: udp://:2: 0 accepted, 0 served; 0 bytes received, 0 sent",
    ]
