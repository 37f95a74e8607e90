from __future__ import annotations

import select
import threading
from typing import Any

import pytest

from portico.admission import AdmissionRules
from portico.errors import SettingError
from portico.events import RefusalReason
from portico.gate import Gate, Room, WhenFull, read_when_full
from tests.support import nothing_left_behind

PEER = ("192.0.2.1", 4000)
OTHER = ("192.0.2.2", 4000)
PROXY = ("10.0.0.1", 4000)


def make(when_full: WhenFull = WhenFull.WAIT, *, counts_peers: bool = True, **rules: Any) -> Gate:
    return Gate(AdmissionRules(**rules), when_full, counts_peers=counts_peers)


def is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_a_place_that_is_given_back_is_told_to_who_waits() -> None:
    gate = make(max_connections=1)
    assert gate.await_room() is None
    assert gate.admit(PEER, 0.0) is None
    assert gate.is_full
    room = gate.await_room()
    assert room is not None
    assert not is_readable(room)
    gate.leave(PEER)
    assert is_readable(room)
    assert gate.active == 0
    gate.close()


def test_what_was_told_before_is_forgotten_when_one_waits_again() -> None:
    gate = make(max_connections=1)
    for _ in range(3):
        assert gate.admit(PEER, 0.0) is None
        room = gate.await_room()
        assert room is not None
        assert not is_readable(room)
        gate.leave(PEER)
        assert is_readable(room)
        assert gate.await_room() is None
    gate.close()
    gate.close()


def test_a_place_that_nobody_waits_for_costs_no_descriptor() -> None:
    with nothing_left_behind():
        gate = make(max_connections=1)
        gate.admit(PEER, 0.0)
        gate.leave(PEER)


def test_a_proxy_gets_the_place_and_its_client_is_judged() -> None:
    gate = make(
        counts_peers=False,
        max_connections=3,
        max_connections_per_peer=1,
        denied_networks=["192.0.2.2"],
    )
    assert gate.knows_proxies
    assert gate.admit(PROXY, 0.0) is None
    assert gate.admit(PROXY, 0.0) is None  # one proxy speaks for many
    assert gate.admit_peer(PEER, 0.0) is None
    assert gate.admit_peer(PEER, 0.0) is RefusalReason.TOO_MANY_OF_PEER
    assert gate.admit_peer(OTHER, 0.0) is RefusalReason.DENIED
    gate.leave(PROXY, PEER)
    assert gate.admit_peer(PEER, 0.0) is None
    assert gate.active == 1


def test_the_limit_holds_whatever_threads_come_and_go() -> None:
    gate = make(WhenFull.REFUSE, max_connections=5)
    most: list[int] = []

    def come_and_go() -> None:
        for _ in range(2000):
            if gate.admit(PEER, 0.0) is None:
                most.append(gate.active)
                gate.leave(PEER)

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gate.active == 0
    assert max(most) <= 5


@pytest.mark.parametrize("word", ["wait", "refuse", "shed"])
def test_a_policy_is_a_word(word: str) -> None:
    assert read_when_full(word) == word


def test_another_word_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(SettingError, match="'wait', 'refuse', 'shed'"):
        read_when_full("drop")


def test_the_pipe_of_a_room_that_is_never_closed_goes_with_it() -> None:
    room = Room()
    room.tell()
    room.clear()
    room.clear()
    with nothing_left_behind():
        Room()
    room.close()
    room.close()


def test_a_connection_that_came_in_elsewhere_takes_a_place() -> None:
    """Rules that change do not forget who is there, not even beyond the limit."""
    gate = make(max_connections=1, max_connections_per_peer=1)
    gate.take_over(PEER)
    gate.take_over(OTHER)
    assert gate.active == 2
    assert gate.is_full
    gate.leave(OTHER)
    assert gate.admit(PEER, 0.0) is RefusalReason.TOO_MANY_OF_PEER
    gate.leave(PEER)
    assert gate.admit(PEER, 0.0) is None


def test_the_client_of_a_proxy_that_came_in_elsewhere_is_counted() -> None:
    gate = make(counts_peers=False, max_connections_per_peer=1)
    gate.take_over(PROXY, PEER)
    assert gate.admit_peer(PEER, 0.0) is RefusalReason.TOO_MANY_OF_PEER
    gate.leave(PROXY, PEER)
    assert gate.active == 0
    assert gate.admit_peer(PEER, 0.0) is None


@pytest.mark.parametrize("step", ["admit", "admit_all", "admit_peer", "await_room"])
def test_a_place_that_is_lost_in_the_middle_of_a_step_is_taken_back_after_it(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector finds a connection in whatever thread, whatever that one holds."""
    gate = make(counts_peers=False, max_connections=9, max_connections_per_peer=9)
    for _ in range(3):
        gate.admit(PROXY, 0.0)
        gate.admit_peer(PEER, 0.0)
    owner: Any = gate._peers if step == "admit_peer" else gate.places
    inner = "decide"
    if step == "await_room":
        owner, inner = type(gate.places), "is_full"
        original: Any = owner.is_full

        def interrupted_look(self: Any) -> bool:
            if self is gate.places and len(gate.left) == 0 and gate.active == 3:
                gate.leave(PROXY, PEER)
                assert gate.active == 3, "not in the middle of it"
            return bool(original.fget(self))

        monkeypatch.setattr(owner, inner, property(interrupted_look))
    else:
        function = getattr(owner, inner)

        def interrupted(*arguments: Any) -> Any:
            monkeypatch.setattr(owner, inner, function)
            gate.leave(PROXY, PEER)
            assert gate.active == 3, "not in the middle of it"
            return function(*arguments)

        monkeypatch.setattr(owner, inner, interrupted)
    arguments: tuple[Any, ...] = {
        "admit": (PROXY, 0.0),
        "admit_all": ([(None, PROXY)], 0.0),
        "admit_peer": (PEER, 0.0),
        "await_room": (),
    }[step]
    getattr(gate, step)(*arguments)
    assert not gate.left
    assert gate.active == (3 if step in {"admit", "admit_all"} else 2)


def test_who_waits_for_room_learns_of_a_place_that_was_lost() -> None:
    gate = make(max_connections=1)
    gate.admit(PEER, 0.0)
    room = gate.await_room()
    assert room is not None
    gate.leave(PEER)
    assert is_readable(room)
    gate.close()
