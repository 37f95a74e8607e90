from __future__ import annotations

import os
import signal

import pytest

from portico.signals import SAME_WISH, SignalPipe, Wish
from tests.support import nothing_left_behind, run_program


def test_signals_are_taken_in_their_order_and_end_a_wait() -> None:
    done = run_program(
        "import os, select, signal\n"
        "from portico.signals import SignalPipe\n"
        "with SignalPipe([signal.SIGUSR1, signal.SIGHUP]) as pipe:\n"
        "    assert pipe.take() == b''\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    assert select.select([pipe], [], [])[0]\n"
        "    assert list(pipe.take()) == [signal.SIGHUP, signal.SIGUSR1]\n"
        "assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL\n"
    )
    assert done.returncode == 0, done.stderr


def test_it_leaves_nothing_behind() -> None:
    before = signal.set_wakeup_fd(-1)
    try:
        with nothing_left_behind(), SignalPipe([signal.SIGUSR2]) as pipe:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert list(pipe.take()) == [signal.SIGUSR2]
    finally:
        signal.set_wakeup_fd(before)


def test_signals_that_come_together_are_one_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """As timeout(1) sends them; who means another one takes longer."""
    now = 5.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    wish = Wish()
    assert [wish.comes_again(), wish.comes_again()] == [False, False]
    now += SAME_WISH / 2
    assert not wish.comes_again()
    now += SAME_WISH / 2
    assert wish.comes_again()


def test_a_signal_of_its_own_is_none_of_those_that_tell_of_the_wish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("portico.signals.SAME_WISH", 0)
    wish = Wish()
    wish.leave_out_one()
    assert [wish.comes_again() for _ in range(3)] == [False, False, True]


def test_the_time_of_a_wish_may_begin_when_the_first_signal_was_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 5.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    wish = Wish()
    assert not wish.comes_again()
    now += 2 * SAME_WISH
    wish.settle()
    assert not wish.comes_again()
    now += SAME_WISH
    assert wish.comes_again()
