from __future__ import annotations

import socket

from portico.channel import LONGEST_MESSAGE, Channel


def test_messages_arrive_whole_and_in_order() -> None:
    ours, theirs = Channel.pair()
    assert ours.receive() == []
    theirs.send("ready")
    theirs.send("failed", reason="a line\nand another")
    assert ours.receive() == [
        {"kind": "ready"},
        {"kind": "failed", "reason": "a line\nand another"},
    ]
    theirs.close()
    assert ours.receive() is None
    ours.close()


def test_half_a_message_waits_for_the_other_half() -> None:
    one, other = socket.socketpair()
    channel = Channel(one)
    other.sendall(b'{"kind": "re')
    assert channel.receive() == []
    other.sendall(b'ady"}\n')
    assert channel.receive() == [{"kind": "ready"}]
    other.close()
    channel.close()


def test_what_is_no_message_is_dropped() -> None:
    """A handler may write to any descriptor of its process."""
    one, other = socket.socketpair()
    channel = Channel(one)
    other.sendall(b'nonsense\n[]\n{}\n{"kind": 1}\n"kind"\n\xff\n{"kind": "ready"}\n')
    assert channel.receive() == [{"kind": "ready"}]
    other.close()
    channel.close()


def test_a_line_without_end_does_not_fill_the_memory() -> None:
    one, other = socket.socketpair()
    channel = Channel(one)
    for _ in range(LONGEST_MESSAGE // 65536 + 2):
        other.sendall(b"x" * 65536)
        received = 0
        while received < 65536:
            before = len(channel._received)
            assert channel.receive() == []
            after = len(channel._received)
            received += after - before if after > before else 65536
        assert len(channel._received) <= LONGEST_MESSAGE
    other.close()
    channel.close()


def test_telling_one_who_is_gone_or_does_not_listen_waits_for_nobody() -> None:
    ours, theirs = Channel.pair()
    while ours.send("report", reason="x" * 10_000):
        pass  # until the other end is full
    theirs.close()
    assert not ours.send("report")
    ours.close()


def test_an_end_with_unread_messages_that_is_gone_is_the_end() -> None:
    ours, theirs = Channel.pair()
    ours.send("report")
    theirs.close()
    assert ours.receive() is None
    ours.close()
