from __future__ import annotations

import array
import ctypes
import errno
import gc
import inspect
import io
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from greenlet import GreenletExit, getcurrent

from portico.engines.green import outbox, watch
from portico.engines.green import sockets as module
from portico.engines.green.hub import Hub
from portico.engines.green.outbox import OUTBOX_SIZE, GreenWriter
from portico.engines.green.sockets import GreenSocket
from portico.handlers import _SocketWriter
from tests.engines.green.conftest import Stage, make_hub
from tests.support import PATIENCE, Call, in_child

SOON = 0.01
"""Seconds of a timeout that is meant to come."""


def reset(peer: socket.socket) -> None:
    """Close a connection so that the other end gets a reset."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def fill(ours: socket.socket) -> int:
    """Send until the system takes no more; return how many bytes it took.

    Of a Unix socket: over TCP there is room again after some milliseconds, when the peer's system
    acknowledges what nobody has read yet.
    """
    assert ours.family == socket.AF_UNIX
    count = 0
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            count += ours.send(b"x" * 65536)
    ours.setblocking(True)
    return count


def let_poll(hub: Hub) -> None:
    """Return after the hub has polled and passed on what came."""
    turn = hub.poller.turn
    while hub.poller.turn == turn:
        hub.sleep(0)


def drain(peer: socket.socket) -> int:
    """Read to the end; return how many bytes came."""
    count = 0
    while data := peer.recv(1 << 20):
        count += len(data)
    return count


def take(peer: socket.socket, size: int) -> bytes:
    """Read exactly as many bytes."""
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        assert part, f"the stream ended after {len(data)} of {size} bytes"
        data += part
    return data


READS: dict[str, Callable[[GreenSocket], Any]] = {
    "recv": lambda sock: sock.recv(10),
    "recv_into": lambda sock: (buffer := bytearray(10), buffer[: sock.recv_into(buffer)])[1],
    "recvfrom": lambda sock: sock.recvfrom(10)[0],
    "recvfrom_into": lambda sock: (
        buffer := bytearray(10),
        buffer[: sock.recvfrom_into(buffer)[0]],
    )[1],
    "recvmsg": lambda sock: sock.recvmsg(10)[0],
    "recvmsg_into": lambda sock: (
        buffer := bytearray(10),
        buffer[: sock.recvmsg_into(iter([buffer]))[0]],
    )[1],
    "file": lambda sock: sock.makefile("rb", 0).read(10),
}

reads = pytest.mark.parametrize("read", READS.values(), ids=list(READS))


class TestReading:
    @reads
    @pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
    def test_a_read_waits_until_there_is_something(
        self, stage: Stage, read: Callable[[GreenSocket], Any], family: int
    ) -> None:
        ours, peer = stage.pair(family)
        trace: list[Any] = []

        def receive() -> None:
            trace.append("waits")
            trace.append(read(ours))
            trace.append(read(ours))

        def send() -> None:
            trace.append("sends")
            peer.send(b"1")
            while b"1" not in trace:
                stage.hub.sleep(SOON)
            trace.append("sends")
            peer.send(b"2")

        stage.run(receive, send)
        assert trace == ["waits", "sends", b"1", "sends", b"2"]

    @reads
    def test_a_datagram_read_waits_and_a_short_one_says_nothing_of_the_next(
        self, stage: Stage, read: Callable[[GreenSocket], Any]
    ) -> None:
        if read is READS["file"]:
            pytest.skip("a file is a stream")
        ours, peer = stage.datagrams()

        def send() -> None:
            for number in range(5):
                peer.send(b"%d" % number)

        received, _ = stage.run(lambda: [bytes(read(ours)) for _ in range(5)], send)
        assert received == [b"0", b"1", b"2", b"3", b"4"]

    @pytest.mark.parametrize(
        "size", [1, watch.SMALL - 1, watch.SMALL, watch.SMALL + 1, 4 * watch.SMALL, 60_000]
    )
    def test_a_read_brings_all_that_is_there(self, stage: Stage, size: int) -> None:
        """Although it asks for little first; and the next one waits if that was all."""
        ours, peer = stage.pair()
        sent = os.urandom(size)
        received: list[bytes] = []

        def receive() -> list[bytes]:
            peer.sendall(sent)
            stage.hub.sleep(SOON)
            received.append(ours.recv(65536))
            return [*received, ours.recv(65536)]

        def send() -> None:
            while not received:
                stage.hub.sleep(SOON)
            peer.sendall(b"next")

        assert stage.run(receive, send)[0] == [sent, b"next"]

    def test_a_read_leaves_what_was_not_asked_for(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def receive() -> list[bytes]:
            peer.sendall(b"a" * watch.SMALL + b"b" * watch.SMALL)
            stage.hub.sleep(SOON)
            return [ours.recv(watch.SMALL + 1), ours.recv(65536)]

        first, rest = stage.run(receive)[0]
        assert first == b"a" * watch.SMALL + b"b"
        assert rest == b"b" * (watch.SMALL - 1)

    def test_what_was_read_is_kept_if_another_thread_takes_the_rest(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the question how much is there and the read of it."""
        ours, peer = stage.pair()
        monkeypatch.setattr(module, "ioctl", lambda *_: module.INT.pack(1))  # it is gone by then

        def receive() -> bytes:
            peer.sendall(b"x" * watch.SMALL)
            stage.hub.sleep(SOON)
            return ours.recv(65536)

        assert stage.run(receive) == [b"x" * watch.SMALL]

    @pytest.mark.parametrize("size", [watch.SMALL, watch.SMALL + 1])
    def test_an_end_behind_a_full_read_is_seen_by_the_next(self, stage: Stage, size: int) -> None:
        ours, peer = stage.pair()

        def receive() -> list[bytes]:
            peer.sendall(b"x" * size)
            peer.close()
            stage.hub.sleep(SOON)
            return [ours.recv(65536), ours.recv(65536), ours.recv(65536)]

        assert stage.run(receive) == [[b"x" * size, b"", b""]]

    @reads
    def test_the_end_of_a_stream_is_seen_even_if_it_came_with_the_last_bytes(
        self, stage: Stage, read: Callable[[GreenSocket], Any]
    ) -> None:
        """Both are one edge; the short read must not make the next one wait."""
        ours, peer = stage.pair()

        def receive() -> list[bytes]:
            peer.send(b"first")
            first = read(ours)
            peer.send(b"last")
            peer.close()
            return [bytes(first), bytes(read(ours)), bytes(read(ours)), bytes(read(ours))]

        assert stage.run(receive) == [[b"first", b"last", b"", b""]]

    def test_a_read_of_exactly_what_is_there_leaves_the_next_one_to_find_out(
        self, stage: Stage
    ) -> None:
        ours, peer = stage.pair()

        def receive() -> list[bytes]:
            peer.send(b"12345678")
            return [ours.recv(4), ours.recv(4), ours.recv(4)]

        def send() -> None:
            stage.hub.sleep(SOON)
            peer.send(b"9")

        received, _ = stage.run(receive, send)
        assert received == [b"1234", b"5678", b"9"]

    def test_what_came_before_the_first_wait_is_read(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        peer.send(b"early")
        assert stage.run(lambda: ours.recv(10)) == [b"early"]

    def test_reading_nothing_does_not_wait(self, stage: Stage) -> None:
        ours, _ = stage.pair()
        assert stage.run(lambda: (ours.recv(0), ours.recv_into(bytearray(0)))) == [(b"", 0)]

    def test_a_negative_size_is_refused_as_ever(self, stage: Stage) -> None:
        ours, _ = stage.pair()

        def receive() -> None:
            with pytest.raises(ValueError, match="negative buffersize"):
                ours.recv(-1)

        stage.run(receive)

    def test_buffers_of_any_kind_are_filled(self, stage: Stage) -> None:
        """A size in items is not a size in bytes, and a structure has no length at all."""
        ours, peer = stage.pair()

        class Pair(ctypes.Structure):
            _fields_ = (("left", ctypes.c_uint8), ("right", ctypes.c_uint8))

        def receive() -> list[Any]:
            words, pair = array.array("I", [0, 0]), Pair()
            peer.send(bytes(range(1, 13)))
            counts = [ours.recv_into(words), ours.recv_into(pair), ours.recv_into(words)]
            return [*counts, pair.left, pair.right]

        assert stage.run(receive) == [[8, 2, 2, 9, 10]]

    def test_a_stream_with_urgent_data_is_read_past_its_mark(self, stage: Stage) -> None:
        """A read stops at the mark, which makes it short although more is there."""
        ours, peer = stage.pair()

        def receive() -> bytes:
            peer.send(b"abc")
            peer.send(b"!", socket.MSG_OOB)
            peer.send(b"def")
            data = b""
            while len(data) < 6:
                data += ours.recv(100)
            return data

        assert stage.run(receive) == [b"abcdef"]

    def test_a_unix_stream_is_read_past_a_descriptor(self, stage: Stage) -> None:
        """A read stops where a descriptor was passed, too."""
        ours, peer = stage.pair(socket.AF_UNIX)

        def receive() -> bytes:
            peer.send(b"x")
            data = ours.recv(100)
            socket.send_fds(peer, [b"a"], [peer.fileno()])
            peer.send(b"b")
            while len(data) < 3:
                data += ours.recv(100)
            return data

        assert stage.run(receive) == [b"xab"]

    def test_flags_mean_what_they_mean(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def receive() -> None:
            with pytest.raises(BlockingIOError):
                ours.recv(1, socket.MSG_DONTWAIT)
            peer.send(b"abc")
            assert ours.recv(10, socket.MSG_PEEK) == b"abc"
            assert ours.recv(10, socket.MSG_PEEK) == b"abc"
            assert ours.recv(2, socket.MSG_WAITALL) == b"ab"
            stage.hub.call_later(SOON, peer.send, b"de")
            stage.hub.call_later(2 * SOON, peer.send, b"f")
            assert ours.recv(4, socket.MSG_WAITALL | socket.MSG_PEEK) == b"cdef"
            buffer = bytearray(4)
            assert ours.recv_into(buffer, 0, socket.MSG_WAITALL) == 4
            assert buffer == b"cdef"
            peer.send(b"the end")
            peer.close()
            assert ours.recv(100, socket.MSG_WAITALL) == b"the end"
            assert ours.recv(100, socket.MSG_WAITALL) == b""

        stage.run(receive)

    def test_waiting_for_all_hands_out_what_came_before_an_error(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def receive() -> list[bytes]:
            peer.send(b"some")
            stage.hub.call_later(SOON, reset, peer)
            return [ours.recv(100, socket.MSG_WAITALL), ours.recv(100, socket.MSG_WAITALL)]

        assert stage.run(receive) == [[b"some", b""]]

    def test_waiting_for_all_tells_an_error_if_nothing_came(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def receive() -> None:
            stage.hub.call_later(SOON, reset, peer)
            with pytest.raises(ConnectionResetError):
                ours.recv(100, socket.MSG_WAITALL)

        stage.run(receive)

    @reads
    def test_a_reset_is_the_error_that_it_is_on_a_blocking_socket(
        self, stage: Stage, read: Callable[[GreenSocket], Any]
    ) -> None:
        ours, peer = stage.pair()

        def receive() -> None:
            stage.hub.call_later(SOON, reset, peer)
            with pytest.raises(ConnectionResetError):
                read(ours)

        stage.run(receive)

    def test_several_greenlets_may_read_one_socket(self, stage: Stage) -> None:
        ours, peer = stage.datagrams()

        def send() -> None:
            stage.hub.sleep(0)
            for number in range(4):
                peer.send(b"%d" % number)
                stage.hub.sleep(0)

        *received, _ = stage.run(*[lambda: ours.recv(10)] * 4, send)
        assert sorted(received) == [b"0", b"1", b"2", b"3"]

    def test_one_of_several_readers_may_time_out(self, stage: Stage) -> None:
        ours, peer = stage.datagrams()
        ours.settimeout(SOON)

        def read() -> Any:
            try:
                return ours.recv(10)
            except TimeoutError as error:
                return str(error)

        assert stage.run(read, read) == ["timed out"] * 2
        peer.send(b"late")
        assert stage.run(read) == [b"late"]

    @pytest.mark.parametrize(("slice_size", "most"), [(0.0, 2 * watch.CREDIT), (PATIENCE, 4096)])
    def test_a_busy_connection_gives_way(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch, slice_size: float, most: int
    ) -> None:
        """It has data at any time; the others have their turn all the same, once in a while."""
        monkeypatch.setattr(watch, "SLICE", slice_size)
        ours, peer = stage.pair()
        peer.sendall(b"x" * 4096)
        turns: list[int] = []
        read = 0

        def receive() -> None:
            nonlocal read
            while read < 4096:
                read += len(ours.recv(1))

        def count() -> None:
            while read < 4096:
                turns.append(read)
                stage.hub.give_way()

        stage.run(receive, count)
        gaps = [after - before for before, after in pairwise([*turns, read])]
        assert most / 4 <= max(gaps) <= most

    @reads
    def test_a_read_after_a_reset_finds_the_end(
        self, stage: Stage, read: Callable[[GreenSocket], Any]
    ) -> None:
        """As from a blocking socket: the error is told once, and no event follows it."""
        ours, peer = stage.pair()

        def receive() -> None:
            ours.settimeout(PATIENCE)
            peer.send(b"1")
            assert read(ours) == b"1"
            reset(peer)
            assert select.select([ours], [], [], PATIENCE)[0]
            let_poll(stage.hub)
            with pytest.raises(ConnectionResetError):
                read(ours)
            assert ours.recv_into(bytearray(10)) == 0
            assert not read(ours)

        stage.run(receive)


class TestWriting:
    def test_sendall_waits_for_a_slow_reader(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        data = os.urandom(1 << 20) * 8
        reading = Call(drain, peer)

        def send() -> None:
            ours.sendall(data)
            ours.sendall(memoryview(data).cast("I"))
            ours.shutdown(socket.SHUT_WR)

        stage.run(send)
        assert reading.result() == 2 * len(data)

    def test_one_greenlet_reads_while_another_writes(self, stage: Stage) -> None:
        """Full duplex: neither waits for the other's direction."""
        ours, peer = stage.pair(socket.AF_UNIX)  # which has no room for so much
        size = 4 << 20
        trace: list[str] = []

        def send() -> None:
            ours.sendall(b"x" * size)
            trace.append("sent")

        def receive() -> None:
            assert ours.recv(10) == b"hello"
            trace.append("received")

        def act() -> None:
            stage.hub.sleep(SOON)
            peer.send(b"hello")
            while "received" not in trace:
                stage.hub.sleep(0)
            reading = Call(lambda: len(take(peer, size)))
            assert stage.hub.run_in_thread(reading.result) == size

        stage.run(send, receive, act)
        assert trace == ["received", "sent"]

    @pytest.mark.parametrize("kind", [bytearray, memoryview, lambda data: array.array("B", data)])
    def test_every_buffer_is_sent_whole(self, stage: Stage, kind: Callable[[bytes], Any]) -> None:
        ours, peer = stage.pair()
        stage.run(lambda: ours.sendall(kind(b"some bytes")))
        assert peer.recv(100) == b"some bytes"

    def test_send_and_sendmsg_return_how_much_was_sent(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        assert stage.run(lambda: ours.send(b"12"), lambda: ours.sendmsg(iter([b"3", b"45"]))) == [
            2,
            3,
        ]
        assert take(peer, 5) == b"12345"

    @pytest.mark.parametrize("write", ["send", "sendmsg"])
    def test_a_write_waits_for_room(self, stage: Stage, write: str) -> None:
        ours, peer = stage.pair(socket.AF_UNIX)
        fill(ours)
        trace: list[Any] = []

        def send() -> None:
            trace.append("waits")
            sent = ours.send(b"!") if write == "send" else ours.sendmsg([b"!"])
            trace.append(sent)
            ours.close()

        def receive() -> None:
            trace.append("reads")
            reading = Call(drain, peer)
            stage.hub.run_in_thread(reading.result)

        stage.run(send, receive)
        assert trace == ["waits", "reads", 1]

    def test_room_that_comes_while_nobody_waits_for_it_is_not_missed(self, stage: Stage) -> None:
        """The system tells of it once, maybe while the writer sends what it collected elsewhere."""
        ours, peer = stage.pair(socket.AF_UNIX)

        def write() -> None:
            stage.hub.call_soon(take, peer, fill(ours))
            ours.watch.wait_writable()  # from now on it is watched
            take(peer, fill(ours))
            assert select.select([], [ours], [], PATIENCE)[1]
            let_poll(stage.hub)  # the event comes, and nobody waits
            ours.settimeout(PATIENCE)
            ours.watch.wait_writable()

        stage.run(write)

    def test_writing_to_a_peer_that_is_gone_is_a_broken_pipe(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        reset(peer)
        assert select.select([ours], [], [], PATIENCE)[0]

        def send() -> None:
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                ours.sendall(b"x")
            with pytest.raises(BrokenPipeError):
                ours.sendall(b"x")

        stage.run(send)

    def test_a_reset_wakes_who_waits_to_write(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def send() -> None:
            stage.hub.call_later(SOON, reset, peer)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                ours.sendall(b"x" * (64 << 20))

        stage.run(send)

    def test_datagrams_go_to_an_address(self, stage: Stage) -> None:
        ours, peer = stage.datagrams()
        address = peer.getsockname()
        stage.run(lambda: (ours.sendto(b"one", address), ours.sendto(b"two", 0, address)))
        assert [peer.recv(10), peer.recv(10)] == [b"one", b"two"]

    def test_a_host_name_is_looked_up_off_the_hub(self, stage: Stage) -> None:
        ours, peer = stage.datagrams()
        stage.run(lambda: ours.sendto(b"named", ("localhost", peer.getsockname()[1])))
        assert peer.recv(10) == b"named"

    def test_a_full_unix_datagram_queue_is_waited_for(self, stage: Stage, tmp_path: Path) -> None:
        """The system says writable and takes nothing: there is no event to wait for."""
        path = str(tmp_path / "queue")
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        peer.bind(path)
        ours = GreenSocket(socket.AF_UNIX, socket.SOCK_DGRAM)
        count = 200

        def send() -> None:
            for number in range(count):
                ours.sendto(b"%d" % number, path)

        def receive() -> list[bytes]:
            stage.hub.sleep(SOON)
            return stage.hub.run_in_thread(lambda: [peer.recv(10) for _ in range(count)])

        _, received = stage.run(send, receive)
        assert received == [b"%d" % number for number in range(count)]
        peer.close()
        ours.close()

    def test_a_writer_that_never_waits_gives_way(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch, "SLICE", 0.0)
        monkeypatch.setattr(module, "WRITING", 0.0)
        ours, peer = stage.pair()
        sent = 0
        turns: list[int] = []

        def send() -> None:
            nonlocal sent
            for _ in range(200):
                ours.sendall(b"x")
                sent += 1

        def count() -> None:
            while sent < 200:
                turns.append(sent)
                stage.hub.give_way()

        stage.run(send, count)
        assert take(peer, 200) == b"x" * 200
        assert max(b - a for a, b in pairwise(turns)) <= 2 * watch.CREDIT

    def test_a_writer_may_hold_a_lock_of_threads(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another that wants it would hold the thread, if the writer gave way within its slice."""
        monkeypatch.setattr(watch, "SLICE", 0.0)
        monkeypatch.setattr(module, "WRITING", PATIENCE)
        lock, pairs = threading.Lock(), [stage.pair(), stage.pair()]

        def send(ours: GreenSocket) -> bool:
            is_free = lock.acquire(blocking=False)
            for _ in range(200):
                ours.sendall(b"x")
            lock.release()
            return is_free

        assert stage.run(*(partial(send, ours) for ours, _ in pairs)) == [True, True]
        assert [take(peer, 200) for _, peer in pairs] == [b"x" * 200] * 2

    def test_a_reader_gives_way_although_it_writes_between_its_reads(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What looks at the clock before a write leaves the look of a read to the read."""
        monkeypatch.setattr(watch, "SLICE", 0.0)
        monkeypatch.setattr(module, "WRITING", PATIENCE)
        ours, peer = stage.pair()
        peer.sendall(b"x" * 200)
        echoed = 0
        turns: list[int] = []

        def echo() -> None:
            nonlocal echoed
            for _ in range(200):
                ours.sendall(ours.recv(1))
                echoed += 1

        def count() -> None:
            while echoed < 200:
                turns.append(echoed)
                stage.hub.give_way()

        stage.run(echo, count)
        assert take(peer, 200) == b"x" * 200
        assert max(b - a for a, b in pairwise(turns)) <= 2 * watch.CREDIT

    def test_a_writer_of_collected_bytes_gives_way(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watch, "SLICE", 0.0)
        monkeypatch.setattr(outbox, "WRITING", 0.0)
        ours, peer = stage.pair()
        reading = Call(drain, peer)
        blocks, written = 64, 0
        turns: list[int] = []

        def write() -> None:
            nonlocal written
            with GreenWriter(ours) as writer:
                for _ in range(blocks):
                    writer.write(b"x" * OUTBOX_SIZE)
                    written += 1
            ours.close()

        def count() -> None:
            while written < blocks:
                turns.append(written)
                stage.hub.give_way()

        stage.run(write, count)
        assert reading.result() == blocks * OUTBOX_SIZE
        assert max(b - a for a, b in pairwise(turns)) <= 2


class TestSendfile:
    def test_a_file_larger_than_every_buffer(self, stage: Stage, tmp_path: Path) -> None:
        path = tmp_path / "data"
        path.write_bytes(os.urandom(5 << 20))
        ours, peer = stage.pair()
        reading = Call(drain, peer)

        def send() -> int:
            with path.open("rb") as file:
                sent = ours.sendfile(file)
                assert file.tell() == sent
            ours.close()
            return sent

        assert stage.run(send) == [5 << 20]
        assert reading.result() == 5 << 20

    @pytest.mark.parametrize("kind", ["file", "memory"])
    def test_a_part_of_a_file(self, stage: Stage, tmp_path: Path, kind: str) -> None:
        content = bytes(range(256)) * 1000
        path = tmp_path / "data"
        path.write_bytes(content)
        ours, peer = stage.pair()

        def send() -> int:
            with path.open("rb") if kind == "file" else io.BytesIO(content) as file:
                sent = ours.sendfile(file, offset=1000, count=100_000)
                assert file.tell() == 101_000
            return sent

        assert stage.run(send) == [100_000]
        assert take(peer, 100_000) == content[1000:101_000]
        assert os.get_blocking(ours.fileno())

    def test_the_timeout_is_for_each_wait_and_not_for_the_file(
        self, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in the standard library: a peer that reads may take its time for a large file."""
        path = tmp_path / "data"
        path.write_bytes(b"x" * 1000)
        ours, peer = stage.pair(socket.AF_UNIX)
        count = fill(ours)
        ours.settimeout(SOON)
        sendfile, began = os.sendfile, threading.Event()

        def note(*args: Any) -> int:
            began.set()
            return sendfile(*args)

        # The clock of the waits jumps once the file is under way: theirs are far from over.
        monkeypatch.setattr(os, "sendfile", note)
        monkeypatch.setattr(watch, "monotonic", lambda: monotonic() + 2 * PATIENCE * began.is_set())

        def send() -> int:
            with path.open("rb") as file:
                return ours.sendfile(file)

        def receive() -> None:
            stage.hub.sleep(2 * SOON)
            take(peer, count)

        assert stage.run(send, receive) == [1000, None]
        assert len(take(peer, 1000)) == 1000

    def test_what_is_no_regular_file_is_read_and_sent(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        reader, writer = os.pipe()
        os.write(writer, b"from a pipe")
        os.close(writer)

        def send() -> int:
            with open(reader, "rb", 0) as file:  # noqa: PTH123  # a descriptor has no path
                return ours.sendfile(OnlyRead(file))

        assert stage.run(send) == [11]
        assert peer.recv(100) == b"from a pipe"

    def test_what_cannot_be_sent_is_refused_as_ever(self, stage: Stage, tmp_path: Path) -> None:
        path = tmp_path / "data"
        path.write_text("text")
        ours, _ = stage.pair()
        datagrams, _ = stage.datagrams()

        def send() -> None:
            with path.open() as text, pytest.raises(ValueError, match="binary mode"):
                ours.sendfile(text)
            with path.open("rb") as file:
                with pytest.raises(ValueError, match="positive integer"):
                    ours.sendfile(file, 0, 0)
                with pytest.raises(ValueError, match="SOCK_STREAM"):
                    datagrams.sendfile(file)
                ours.setblocking(False)
                with pytest.raises(ValueError, match="non-blocking"):
                    ours.sendfile(file)

        stage.run(send)


class OnlyRead:
    """The least that is a file."""

    def __init__(self, file: Any) -> None:
        self.read = file.read


class TestTimeouts:
    @reads
    def test_a_read_times_out(self, stage: Stage, read: Callable[[GreenSocket], Any]) -> None:
        ours, peer = stage.pair()
        ours.settimeout(SOON)

        def receive() -> Any:
            with pytest.raises(TimeoutError, match=r"^timed out$"):
                read(ours)
            peer.send(b"late")
            return read(ours)

        assert bytes(stage.run(receive)[0]) == b"late"

    def test_the_timeout_of_sendall_is_for_all_of_it(self, stage: Stage) -> None:
        """A peer that reads a little now and then does not make it endless."""
        ours, peer = stage.pair()
        ours.settimeout(20 * SOON)
        timed_out = threading.Event()

        def send() -> None:
            with pytest.raises(TimeoutError):
                ours.sendall(b"x" * (256 << 20))
            timed_out.set()

        def receive() -> None:
            while not timed_out.is_set():
                peer.recv(65536)
                stage.hub.sleep(SOON)

        stage.run(send, receive)

    def test_reader_and_writer_time_out_on_their_own(self, stage: Stage) -> None:
        ours, _ = stage.pair(socket.AF_UNIX)
        fill(ours)
        trace: list[str] = []

        def receive() -> None:
            ours.settimeout(SOON)
            with pytest.raises(TimeoutError):
                ours.recv(1)
            trace.append("reader")

        def send() -> None:
            ours.settimeout(5 * SOON)
            with pytest.raises(TimeoutError):
                ours.send(b"x")
            trace.append("writer")

        stage.run(receive, send)
        assert trace == ["reader", "writer"]

    def test_a_timeout_that_was_taken_back_does_not_come(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def receive() -> bytes:
            ours.settimeout(SOON)
            peer.send(b"1")
            ours.recv(1)
            ours.settimeout(None)
            stage.hub.call_later(5 * SOON, peer.send, b"2")
            return ours.recv(1)

        assert stage.run(receive) == [b"2"]

    def test_many_waits_share_one_timer(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours, peer = stage.pair()
        ours.settimeout(PATIENCE)
        call_at, timers = stage.hub.call_at, []

        def count(*args: Any, **kwargs: Any) -> Any:
            timers.append(args)
            return call_at(*args, **kwargs)

        monkeypatch.setattr(stage.hub, "call_at", count)

        def receive() -> None:
            for _ in range(50):
                peer.send(b"x")
                ours.recv(1)

        stage.run(receive)
        assert len(timers) == 1

    def test_a_timer_that_rings_early_is_set_again(self, stage: Stage) -> None:
        """The wait that it was set for is over; the one under way has a later deadline."""
        ours, peer = stage.pair()
        ours.settimeout(3 * SOON)

        def receive() -> None:
            for _ in range(3):
                peer.send(b"x")
                assert ours.recv(1) == b"x"
                stage.hub.sleep(SOON)
                before = monotonic()
                with pytest.raises(TimeoutError):
                    ours.recv(1)
                assert monotonic() >= before + 3 * SOON

        stage.run(receive)

    def test_a_non_blocking_socket_does_not_wait(self, stage: Stage) -> None:
        ours, peer = stage.pair(socket.AF_UNIX)  # which has no more room once it is full
        ours.setblocking(False)

        def act() -> None:
            with pytest.raises(BlockingIOError):
                ours.recv(1)
            assert ours.makefile("rb", 0).read(1) is None
            peer.send(b"12")
            assert select.select([ours], [], [], PATIENCE)[0]
            assert ours.recv(1) == b"1"
            assert ours.recv(10) == b"2"
            with pytest.raises(BlockingIOError):
                ours.recv(1)
            with pytest.raises(BlockingIOError):
                ours.sendall(b"x" * (64 << 20))
            with pytest.raises(BlockingIOError):
                ours.send(b"x")

        stage.run(act)

    def test_the_settings_read_back_as_ever(self, stage: Stage) -> None:
        ours, _ = stage.pair()
        assert ours.gettimeout() is None
        assert ours.getblocking()
        ours.settimeout(2)
        assert (ours.gettimeout(), ours.timeout, ours.getblocking()) == (2.0, 2.0, True)
        ours.setblocking(False)
        assert (ours.gettimeout(), ours.getblocking()) == (0.0, False)
        ours.setblocking(True)
        assert ours.gettimeout() is None
        with pytest.raises(ValueError, match="out of range"):
            ours.settimeout(-1)
        with pytest.raises(ValueError, match="could not convert"):
            ours.settimeout("soon")  # type: ignore[arg-type]  # that is the point

    def test_the_default_timeout_counts(self, stage: Stage) -> None:
        socket.setdefaulttimeout(SOON)
        try:
            ours, _ = stage.pair()
        finally:
            socket.setdefaulttimeout(None)

        def receive() -> None:
            with pytest.raises(TimeoutError):
                ours.recv(1)

        assert ours.gettimeout() == SOON
        stage.run(receive)

    def test_a_socket_made_non_blocking_by_its_type_is(self) -> None:
        with GreenSocket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            assert sock.gettimeout() == 0.0
            assert sock.type == socket.SOCK_STREAM


class TestClosing:
    @reads
    def test_closing_wakes_a_reader(self, stage: Stage, read: Callable[[GreenSocket], Any]) -> None:
        ours, _ = stage.pair()
        is_file = read is READS["file"]

        def receive() -> None:
            with pytest.raises(OSError, match="Bad file descriptor") as caught:
                read(ours)
            assert caught.value.errno == errno.EBADF

        def close() -> None:
            stage.hub.sleep(0)
            if is_file:
                ours._real_close()
            else:
                ours.close()

        stage.run(receive, close)

    def test_closing_wakes_a_writer(self, stage: Stage) -> None:
        ours, _ = stage.pair(socket.AF_UNIX)
        fill(ours)

        def send() -> None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                ours.sendall(b"x")

        stage.run(send, ours.close)

    def test_closing_from_another_thread_wakes_who_waits(self, stage: Stage) -> None:
        ours, _ = stage.pair()
        closing = threading.Thread(target=ours.close)

        def receive() -> None:
            stage.hub.call_later(SOON, closing.start)
            with pytest.raises(OSError, match="Bad file descriptor"):
                ours.recv(1)

        stage.run(receive)
        closing.join()

    def test_closing_under_an_open_file_wakes_the_reader_of_the_socket_only(
        self, stage: Stage
    ) -> None:
        """The file goes on, as over any socket; it is the one that closes the descriptor."""
        ours, peer = stage.pair()
        file = ours.makefile("rb")

        def receive() -> None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                ours.recv(1)

        stage.run(receive, ours.close)
        stage.hub.call_soon(peer.send, b"line\n")
        assert stage.run(file.readline) == [b"line\n"]
        assert ours.fileno() >= 0
        file.close()
        assert ours.fileno() == -1

    def test_shutting_down_from_another_thread_ends_a_read(self, stage: Stage) -> None:
        """How deadlines interrupt a handler."""
        ours, _ = stage.pair()
        thread = threading.Thread(target=ours.shutdown, args=(socket.SHUT_RDWR,))
        stage.hub.call_later(SOON, thread.start)
        assert stage.run(lambda: ours.recv(1)) == [b""]
        thread.join()

    def test_operations_on_a_closed_socket_fail(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def act() -> None:
            peer.send(b"x")
            ours.recv(1)
            ours.close()
            for operation in (lambda: ours.recv(1), lambda: ours.sendall(b"x"), ours.accept):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    operation()

        stage.run(act)

    def test_a_detached_descriptor_blocks_as_it_always_did(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def use() -> int:
            peer.send(b"x")
            ours.recv(1)
            return ours.detach()

        (fd,) = stage.run(use)
        assert os.get_blocking(fd)
        with socket.socket(fileno=fd) as plain:
            assert plain.gettimeout() is None
            peer.send(b"y")
            assert plain.recv(1) == b"y"
        again, other = stage.pair()  # perhaps under the same number
        other.send(b"z")
        assert stage.run(lambda: again.recv(1)) == [b"z"]

    def test_a_program_may_have_the_descriptor(self, stage: Stage) -> None:
        """It finds one that blocks, as it expects of its standard input."""
        ours, peer = stage.pair()
        peer.send(b"to be shouted\n")
        peer.shutdown(socket.SHUT_WR)
        program = "import sys; sys.stdout.write(sys.stdin.read().upper())"
        stage.run(
            lambda: subprocess.run(
                [sys.executable, "-c", program],
                stdin=ours.fileno(),
                stdout=ours.fileno(),
                check=True,
            )
        )
        assert peer.recv(100) == b"TO BE SHOUTED\n"

    def test_a_number_that_comes_back_is_a_new_socket(self, stage: Stage) -> None:
        """A copy of the first one lives on, and its events with it."""
        first, peer_of_first = stage.pair()
        spare, peer_of_second = stage.pair()
        number = first.fileno()

        def act() -> bytes:
            peer_of_first.send(b"1")
            first.recv(1)
            copy = os.dup(number)
            first.close()
            os.dup2(spare.fileno(), number)
            with GreenSocket(fileno=number) as second:
                stage.hub.call_later(SOON, peer_of_first.send, b"stray")
                stage.hub.call_later(5 * SOON, peer_of_second.send, b"2")
                data = second.recv(10)
            os.close(copy)
            return data

        assert stage.run(act) == [b"2"]

    def test_a_socket_that_is_dropped_closes_its_descriptor(self, stage: Stage) -> None:
        held, peer = list(stage.pair()[:1]), stage._opened[-1]
        stage._opened.remove(held[0])
        peer.send(b"x")
        stage.run(lambda: held[0].recv(1))
        with pytest.warns(ResourceWarning):
            held.clear()
            gc.collect()
        assert peer.recv(1) == b""


class TestConnecting:
    def test_accept_waits_and_returns_green_sockets(self, stage: Stage) -> None:
        listener = stage.adopt(socket.create_server(("127.0.0.1", 0)))
        address = listener.getsockname()

        def serve() -> Any:
            accepted = [listener.accept() for _ in range(3)]
            for sock, _ in accepted:
                with sock:
                    sock.sendall(b"hi")
            return [(type(sock), peer) for sock, peer in accepted]

        def connect() -> Any:
            own = []
            for _ in range(3):
                with GreenSocket() as client:
                    client.connect(address)
                    own.append((GreenSocket, client.getsockname()))
                    assert os.get_blocking(client.fileno())
                    stage.hub.sleep(0)
            return own

        accepted, connected = stage.run(serve, connect)
        assert accepted == connected

    def test_accept_times_out(self, stage: Stage) -> None:
        listener = stage.adopt(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(SOON)

        def serve() -> None:
            with pytest.raises(TimeoutError):
                listener.accept()

        stage.run(serve)

    def test_a_refused_connection_is_an_error(self, stage: Stage) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = unused.getsockname()

            def connect() -> int:
                with GreenSocket() as client, pytest.raises(ConnectionRefusedError):
                    client.connect(address)
                with GreenSocket() as client:
                    return client.connect_ex(address)

            assert stage.run(connect) == [errno.ECONNREFUSED]

    def test_connecting_by_name(self, stage: Stage) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]

            def connect() -> Any:
                with GreenSocket() as client:
                    client.connect(("localhost", port))
                    return client.getpeername()

            assert stage.run(connect) == [("127.0.0.1", port)]

    @pytest.mark.parametrize("timeout", [None, SOON])
    def test_a_full_unix_backlog_is_waited_for(
        self, stage: Stage, tmp_path: Path, timeout: float | None
    ) -> None:
        path = str(tmp_path / "listener")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(0)
        first, second = GreenSocket(socket.AF_UNIX), GreenSocket(socket.AF_UNIX)
        second.settimeout(timeout)

        def connect() -> None:
            first.connect(path)
            if timeout is None:

                def make_room() -> None:
                    listener.accept()[0].close()

                stage.hub.call_later(SOON, make_room)
                second.connect(path)
            else:
                with pytest.raises(TimeoutError):
                    second.connect(path)

        stage.run(connect)
        for sock in (first, second, listener):
            sock.close()

    def test_a_connection_that_nobody_answers_times_out(self, stage: Stage) -> None:
        """The backlog is full, so the system drops what asks for more."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            address = listener.getsockname()
            clients = [GreenSocket() for _ in range(4)]

            def connect() -> int:
                timeouts = 0
                for client in clients:
                    client.settimeout(5 * SOON)
                    try:
                        client.connect(address)
                    except TimeoutError:
                        timeouts += 1
                return timeouts

            (timeouts,) = stage.run(connect)
            assert timeouts
            for client in clients:
                client.close()

    def test_a_copy_is_green_too(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        ours.settimeout(5)
        with ours.dup() as copy:
            assert isinstance(copy, GreenSocket)
            assert copy.gettimeout() == 5
            peer.send(b"x")
            assert stage.run(lambda: copy.recv(1)) == [b"x"]


class TestFiles:
    def test_lines_are_read_and_written(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def echo() -> None:
            with ours.makefile("rwb") as file:
                for line in file:
                    file.write(line.upper())
                    file.flush()

        def talk() -> list[bytes]:
            with peer, peer.makefile("rb") as file:
                answers = []
                for line in (b"one\n", b"two\n"):
                    peer.send(line)
                    answers.append(stage.hub.run_in_thread(file.readline))
            return answers

        assert stage.run(echo, talk)[1] == [b"ONE\n", b"TWO\n"]

    def test_text_is_read_and_written(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def act() -> str:
            with ours.makefile("w", encoding="utf-8", newline="\n") as out:
                out.write("grün\n")
            peer.sendall("blau\n".encode("latin-1"))
            with ours.makefile(encoding="latin-1") as file:
                assert file.mode == "r"
                line: str = file.readline()
            return line

        assert stage.run(act) == ["blau\n"]
        assert peer.recv(100) == "grün\n".encode()

    def test_the_kinds_are_those_of_any_socket(self, stage: Stage) -> None:
        ours, _ = stage.pair()
        raw = ours.makefile("rb", 0)
        assert isinstance(raw, socket.SocketIO)
        buffered = ours.makefile("rb")
        assert type(buffered) is io.BufferedReader
        assert isinstance(buffered.raw, socket.SocketIO)
        assert type(ours.makefile("wb", 100)) is io.BufferedWriter
        with pytest.raises(ValueError, match="invalid mode"):
            ours.makefile("a")
        with pytest.raises(ValueError, match="unbuffered streams must be binary"):
            ours.makefile("r", 0)
        with pytest.raises(io.UnsupportedOperation):
            ours.makefile("wb", 0).read(1)
        raw.close()
        with pytest.raises(ValueError, match="closed"):
            raw.readinto(bytearray(1))

    def test_a_file_that_timed_out_cannot_be_read_again(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        ours.settimeout(SOON)
        file = ours.makefile("rb")

        def read() -> None:
            with pytest.raises(TimeoutError):
                file.readline()
            peer.send(b"late\n")
            with pytest.raises(OSError, match="cannot read from timed out object"):
                file.readline()

        stage.run(read)


class TestOutsideOfAHub:
    """A green socket without a hub to wait on is a blocking one."""

    def test_in_a_thread(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        reading = Call(ours.recv, 10)
        select.select([], [peer], [])
        peer.send(b"x")
        assert reading.result() == b"x"

    def test_in_a_thread_after_use_on_a_hub(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def use() -> bytes:
            peer.send(b"1")
            first = ours.recv(1)
            stage.hub.call_later(SOON, peer.send, b"2")
            return first + stage.hub.run_in_thread(lambda: ours.recv(1))

        assert stage.run(use) == [b"12"]

    def test_timeouts_count(self, stage: Stage) -> None:
        ours, _ = stage.pair()
        ours.settimeout(SOON)
        with pytest.raises(TimeoutError):
            ours.recv(1)

    def test_in_the_greenlet_of_the_hub(self, stage: Stage) -> None:
        """A callback or a task cannot wait by switching; it blocks, as with any socket."""
        ours, peer = stage.pair()
        received: list[bytes] = []

        def callback() -> None:
            peer.send(b"x")
            received.append(ours.recv(1))
            stage.hub.stop()

        stage.hub.call_soon(callback)
        stage.hub.run_forever()
        assert received == [b"x"]

    def test_on_another_hub(self, stage: Stage, poller: str) -> None:
        ours, peer = stage.pair()
        peer.send(b"1")
        stage.run(lambda: ours.recv(1))
        other = Stage(make_hub(poller))
        other.hub.call_later(SOON, peer.send, b"2")
        assert other.run(lambda: ours.recv(1)) == [b"2"]
        other.hub.close()

    def test_sendall_blocks(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        reading = Call(drain, peer)
        ours.sendall(b"x" * (8 << 20))
        ours.close()
        assert reading.result() == 8 << 20


class TestWriter:
    """`wfile` of a stream handler: small writes leave together."""

    @pytest.fixture
    def sends(self, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
        """What was handed to send(2), call by call."""
        sends: list[bytes] = []
        send = module._send

        def note(sock: GreenSocket, data: Any, flags: int) -> int:
            count = send(sock, data, flags)
            sends.append(bytes(data[:count]))
            return count

        monkeypatch.setattr(module, "_send", note)
        return sends

    def test_small_writes_leave_together_when_the_greenlet_waits(
        self, stage: Stage, sends: list[bytes]
    ) -> None:
        ours, peer = stage.pair()

        def write() -> None:
            writer = ours.make_writer()
            assert isinstance(writer, GreenWriter)
            assert writer.write(b"one") == 3
            assert writer.write(bytearray(b"two")) == 3
            assert writer.write(memoryview(array.array("H", [0x3333]))) == 2
            assert not sends
            peer.send(b"x")
            ours.recv(1)

        stage.run(write)
        assert sends == [b"onetwo33"]

    @pytest.mark.parametrize("how", ["sleep", "give_way", "thread", "other socket", "flush"])
    def test_every_wait_sends(self, stage: Stage, sends: list[bytes], how: str) -> None:
        ours, peer = stage.pair()
        other, peer_of_other = stage.pair()
        writer = ours.make_writer()
        waits: dict[str, Callable[[], object]] = {
            "sleep": lambda: stage.hub.sleep(0),
            "give_way": stage.hub.give_way,
            "thread": lambda: stage.hub.run_in_thread(lambda: peer.recv(1)),
            "other socket": lambda: (peer_of_other.send(b"x"), other.recv(1)),
            "flush": writer.flush,
        }

        def write() -> None:
            writer.write(b"1")
            waits[how]()

        stage.run(write)
        assert sends == [b"1"]

    @pytest.mark.parametrize(
        "use",
        [
            lambda sock: sock.sendall(b"2"),
            lambda sock: sock.send(b"2"),
            lambda sock: sock.sendmsg([b"2"]),
            lambda sock: os.write(sock.fileno(), b"2"),
            lambda sock: sock.sendfile(io.BytesIO(b"2")),
        ],
    )
    def test_direct_use_of_the_socket_keeps_the_order(
        self, stage: Stage, use: Callable[[GreenSocket], Any]
    ) -> None:
        ours, peer = stage.pair()

        def write() -> None:
            ours.make_writer().write(b"1")
            use(ours)
            ours.make_writer().write(b"3")
            ours.close()

        stage.run(write)
        assert take(peer, 3) == b"123"

    @pytest.mark.parametrize("end", ["close", "shutdown", "detach"])
    def test_the_end_sends(self, stage: Stage, end: str) -> None:
        ours, peer = stage.pair()

        def write() -> None:
            ours.make_writer().write(b"last words")
            if end == "close":
                ours.close()
            elif end == "shutdown":
                ours.shutdown(socket.SHUT_WR)
            else:
                os.close(ours.detach())

        stage.run(write)
        assert peer.recv(100) == b"last words"

    def test_much_is_not_kept(self, stage: Stage, sends: list[bytes]) -> None:
        ours, peer = stage.pair()
        reading = Call(drain, peer)

        def write() -> None:
            writer = ours.make_writer()
            for _ in range(3 * OUTBOX_SIZE // 1024):
                writer.write(b"x" * 1024)
            writer.write(b"x" * (1 << 20))
            ours.close()

        stage.run(write)
        assert reading.result() == 3 * OUTBOX_SIZE + (1 << 20)

    def test_a_failure_is_told_by_the_next_write_or_by_flush(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        reset(peer)
        assert select.select([ours], [], [], PATIENCE)[0]

        def write() -> None:
            writer = ours.make_writer()
            writer.write(b"into the void")
            stage.hub.sleep(SOON)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                writer.write(b"more")
            writer.write(b"and more")
            stage.hub.sleep(SOON)
            with pytest.raises(BrokenPipeError):
                writer.flush()

        stage.run(write)

    def test_a_slow_reader_is_waited_for(self, stage: Stage) -> None:
        ours, peer = stage.pair(socket.AF_UNIX)
        fill(ours)

        def write() -> None:
            writer = ours.make_writer()
            writer.write(b"!")
            reading = Call(drain, peer)
            writer.close()
            ours.close()
            assert stage.hub.run_in_thread(reading.result)

        stage.run(write)

    @pytest.mark.parametrize("how", ["flush", "sleep", "much"])
    def test_an_interrupted_flush_loses_nothing(self, stage: Stage, how: str) -> None:
        """What throws into it is a timeout of a whole block, which may go on to write."""
        ours, peer = stage.pair(socket.AF_UNIX)
        count = fill(ours)
        words = b"0123456789" * (OUTBOX_SIZE // 10 + 1 if how == "much" else 1000)

        def write() -> None:
            writer = ours.make_writer()
            stage.hub.call_soon(getcurrent().throw, ZeroDivisionError())
            with pytest.raises(ZeroDivisionError):
                writer.write(words)
                if how == "flush":
                    writer.flush()
                else:
                    stage.hub.sleep(PATIENCE)
            reading = Call(lambda: take(peer, count + len(words) + 4))
            writer.write(b"late")
            writer.flush()
            assert stage.hub.run_in_thread(reading.result)[count:] == words + b"late"

        stage.run(write)

    def test_nobody_waits_for_the_rest_of_a_write_that_was_interrupted(self, stage: Stage) -> None:
        """But whoever writes on: the peer gets no gap."""
        ours, peer = stage.pair(socket.AF_UNIX)
        count = fill(ours)
        words = b"0123456789" * (OUTBOX_SIZE // 10 + 1)

        def write() -> None:
            writer = ours.make_writer()
            stage.hub.call_soon(getcurrent().throw, ZeroDivisionError())
            with pytest.raises(ZeroDivisionError):
                writer.write(words)
            stage.hub.sleep(0)
            stage.hub.give_way()
            reading = Call(lambda: take(peer, count + len(words) + 4))
            writer.write(b"late")
            stage.hub.sleep(0)
            assert stage.hub.run_in_thread(reading.result)[count:] == words + b"late"

        stage.run(write)

    @pytest.mark.parametrize("end", ["close", "shutdown", "writer"])
    def test_the_end_does_not_wait_for_the_rest_of_a_write_that_was_interrupted(
        self, stage: Stage, end: str
    ) -> None:
        ours, peer = stage.pair(socket.AF_UNIX)
        count = fill(ours)

        def write() -> None:
            writer = ours.make_writer()
            stage.hub.call_soon(getcurrent().throw, ZeroDivisionError())
            with pytest.raises(ZeroDivisionError):
                writer.write(b"x" * OUTBOX_SIZE)
            if end == "writer":
                assert isinstance(writer, GreenWriter)
                writer.flush_at_end()
                writer.close()
            elif end == "shutdown":
                ours.shutdown(socket.SHUT_WR)
            ours.close()

        stage.run(write)
        assert drain(peer) == count

    def test_a_wait_after_an_interrupted_flush_sends_the_rest(self, stage: Stage) -> None:
        ours, peer = stage.pair(socket.AF_UNIX)
        count = fill(ours)

        def write() -> None:
            writer = ours.make_writer()
            writer.write(b"rest")
            stage.hub.call_soon(getcurrent().throw, ZeroDivisionError())
            with pytest.raises(ZeroDivisionError):
                ours.recv(1)
            reading = Call(lambda: take(peer, count + 4))
            stage.hub.sleep(0)
            assert stage.hub.run_in_thread(reading.result)[count:] == b"rest"

        stage.run(write)

    def test_a_flush_that_is_killed_leaves_an_error_and_no_wait(self, stage: Stage) -> None:
        """A greenlet that ends has no time for its peer; nobody may write on after the gap."""
        ours, _ = stage.pair(socket.AF_UNIX)
        fill(ours)

        def write() -> None:
            writer = ours.make_writer()
            writer.write(b"lost")
            stage.hub.call_soon(getcurrent().throw, GreenletExit())
            with pytest.raises(GreenletExit):
                writer.flush()
            with pytest.raises(ConnectionAbortedError):
                writer.flush()
            ours.close()

        stage.run(write)

    def test_what_the_watchdog_is_sending_is_not_sent_yet(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A greenlet that looks meanwhile, without the lock, has to see that it must wait."""
        ours, peer = stage.pair()
        seen: list[bytes] = []
        send_now = GreenSocket._get_send_now

        def spy(sock: GreenSocket) -> Callable[[bytes, int], int]:
            send = send_now(sock)

            def note(data: bytes, flags: int) -> int:
                if threading.current_thread() is not greenlets:
                    assert sock.outbox is not None
                    seen.append(b"".join(sock.outbox.chunks))
                    data = data[:4]
                return send(data, flags)

            return note

        greenlets = threading.current_thread()
        monkeypatch.setattr(GreenSocket, "_get_send_now", spy)

        def write() -> None:
            writer = ours.make_writer()
            writer.write(b"one ")
            writer.write(b"two ")
            Call(stage.hub.send_from_watchdog).result()
            assert take(peer, 4) == b"one "
            writer.write(b"three")
            writer.flush()

        stage.run(write)
        assert seen == [b"one two "]
        assert take(peer, 9) == b"two three"

    def test_what_is_written_while_another_greenlet_waits_with_the_rest_comes_after_it(
        self, stage: Stage
    ) -> None:
        ours, peer = stage.pair(socket.AF_UNIX)
        count = fill(ours)
        writer = ours.make_writer()
        trace: list[str] = []

        def broadcast() -> None:
            writer.write(b"first ")
            stage.hub.sleep(0)
            trace.append("sent")

        def write() -> None:
            assert not trace
            writer.write(b"second")
            reading = Call(lambda: take(peer, count + 12))
            writer.flush()
            assert stage.hub.run_in_thread(reading.result)[count:] == b"first second"

        stage.run(broadcast, write)
        assert trace == ["sent"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
    def test_a_forked_child_leaves_to_its_parent_what_a_slow_peer_has_no_room_for(
        self, stage: Stage
    ) -> None:
        ours, peer = stage.pair(socket.AF_UNIX)
        count = fill(ours)

        def write() -> None:
            writer = ours.make_writer()
            writer.write(b"rest")
            assert in_child(writer.flush) == 0  # there is nothing for which it would wait
            reading = Call(lambda: take(peer, count + 4))
            writer.flush()
            assert stage.hub.run_in_thread(reading.result)[count:] == b"rest"

        stage.run(write)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
    def test_a_lock_that_a_thread_held_at_a_fork_is_free_in_the_child(self, stage: Stage) -> None:
        """The watchdog may be sending at that moment, and there is none in the child."""
        with stage.hub.sending:
            assert in_child(lambda: stage.hub.sending.acquire(blocking=False) or 1 / 0) == 0

    def test_many_slow_peers_are_waited_for_one_after_the_other(self, stage: Stage) -> None:
        """Not each within the wait for the one before; and only by the greenlet that wrote."""
        pairs = [stage.pair(socket.AF_UNIX) for _ in range(30)]
        counts = [fill(ours) for ours, _ in pairs]
        writers = [ours.make_writer() for ours, _ in pairs]
        depths: list[int] = []
        is_sent = False

        def broadcast() -> None:
            nonlocal is_sent
            switch = stage.hub.switch

            def note() -> object:
                depths.append(len(inspect.stack(0)))
                return switch()

            stage.hub.switch = note
            for writer in writers:
                writer.write(b"to all")
            stage.hub.sleep(0)
            is_sent = True

        def meanwhile() -> None:
            stage.hub.sleep(0)
            assert not is_sent
            for (_, peer), count in zip(pairs, counts, strict=True):
                reading = Call(lambda peer=peer, count=count: take(peer, count + 6))
                assert stage.hub.run_in_thread(reading.result)[count:] == b"to all"

        stage.run(broadcast, meanwhile)
        assert is_sent
        assert max(depths) < min(depths) + len(pairs)

    def test_an_interruption_between_slow_peers_loses_nothing(self, stage: Stage) -> None:
        pairs = [stage.pair(socket.AF_UNIX) for _ in range(3)]
        counts = [fill(ours) for ours, _ in pairs]
        writers = [ours.make_writer() for ours, _ in pairs]

        def write() -> None:
            for writer in writers:
                writer.write(b"to all")
            stage.hub.call_soon(getcurrent().throw, ZeroDivisionError())
            with pytest.raises(ZeroDivisionError):
                stage.hub.sleep(PATIENCE)
            readings = [
                Call(lambda peer=peer, count=count: take(peer, count + 6))
                for (_, peer), count in zip(pairs, counts, strict=True)
            ]
            stage.hub.sleep(0)
            for reading, count in zip(readings, counts, strict=True):
                assert stage.hub.run_in_thread(reading.result)[count:] == b"to all"

        stage.run(write)

    def test_outside_of_a_hub_every_write_is_sent(self, stage: Stage, sends: list[bytes]) -> None:
        ours, peer = stage.pair()
        writer = ours.make_writer()
        writer.write(b"1")
        writer.write(b"2")
        assert sends == [b"1", b"2"]
        assert take(peer, 2) == b"12"

    def test_a_thread_sends_at_once_what_it_writes(self, stage: Stage) -> None:
        ours, peer = stage.pair()

        def write() -> bytes:
            writer = ours.make_writer()
            return stage.hub.run_in_thread(lambda: (writer.write(b"1"), peer.recv(1))[1])

        assert stage.run(write) == [b"1"]

    def test_it_can_be_switched_off(self, stage: Stage) -> None:
        ours, peer = stage.pair()
        ours.coalesces = False

        def write() -> None:
            writer = ours.make_writer()
            assert type(writer) is _SocketWriter
            writer.write(b"1")
            assert peer.recv(1) == b"1"

        stage.run(write)

    def test_a_copy_of_what_was_written_is_sent(self, stage: Stage) -> None:
        """The owner of the buffer may use it again at once."""
        ours, peer = stage.pair()

        def write() -> None:
            buffer = bytearray(b"first")
            ours.make_writer().write(buffer)
            buffer[:] = b"later"
            ours.close()

        stage.run(write)
        assert peer.recv(100) == b"first"


def test_an_interrupted_wait_leaves_nothing_behind(stage: Stage) -> None:
    """What throws into a waiting greenlet: timeouts of a whole block."""
    ours, peer = stage.pair()

    def receive() -> bytes:
        stage.hub.call_later(SOON, getcurrent().throw, ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            ours.recv(1)
        assert ours.watch.reader is None
        stage.hub.call_later(SOON, peer.send, b"x")
        return ours.recv(1)

    assert stage.run(receive) == [b"x"]
