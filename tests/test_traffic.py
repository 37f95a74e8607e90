from __future__ import annotations

import ctypes
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from portico import GreenTCPServer, StreamRequestHandler, traffic
from portico.traffic import (
    BASIC,
    COUNTED,
    FULL,
    MOVED,
    RECEIVED,
    STILLNESS,
    TIMES,
    UNKNOWN,
    Traffic,
    bytes_moved,
    bytes_received,
    idle_seconds,
    is_idle,
    look,
    read,
    read_moved,
    with_activity,
)
from tests.support import Call, Client, RunningServer, eventually, reset

Pair = tuple[socket.socket, socket.socket]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells all of it")


def tcp_pair(host: str = "127.0.0.1") -> Pair:
    """A request as the server has it, and its peer."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        theirs = Client(family, socket.SOCK_STREAM)
        theirs.connect(listener.getsockname())
        ours, _ = listener.accept()
    return ours, theirs


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])
def tcp(request: pytest.FixtureRequest) -> Iterator[Pair]:
    ours, theirs = tcp_pair(request.param)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def unix() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def readable(sock: socket.socket) -> None:
    """Wait until something came in."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(60_000)


def stuff(sock: socket.socket) -> int:
    """Write until no more fits; return how much did."""
    sock.setblocking(False)
    written = 0
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    while poll.poll(200):  # the buffers grow a few times before they are full
        try:
            written += sock.send(b"x" * 65536)
        except BlockingIOError:
            pass
    return written


# --- what moved -------------------------------------------------------------------------


def test_a_connection_that_was_just_accepted_has_moved_nothing(tcp: Pair) -> None:
    ours, theirs = tcp
    for sock in (ours, theirs):
        seen = look(sock)
        assert (seen.received, seen.sent, seen.unread, seen.unsent) == (0, 0, 0, 0)
        assert (seen.since_received, seen.since_sent) == (None, None)
        assert seen.retransmissions == 0
        assert seen.round_trip is not None
        assert 0 < seen.round_trip < 60


def test_bytes_are_counted_in_both_directions(tcp: Pair) -> None:
    ours, theirs = tcp
    theirs.sendall(b"q" * 1000)
    readable(ours)
    assert ours.recv(400) == b"q" * 400
    ours.sendall(b"a" * 77)
    eventually(lambda: look(ours).unsent == 0, "the answer was acknowledged")
    seen = look(ours)
    assert (seen.received, seen.unread, seen.sent, seen.acknowledged) == (1000, 600, 77, 77)
    assert bytes_received(ours) == 1000
    assert (look(theirs).received, look(theirs).sent) == (77, 1000)


def test_what_is_not_read_yet_is_unread(tcp: Pair) -> None:
    ours, theirs = tcp
    for size in (1, 10, 100):
        theirs.sendall(b"x" * size)
    eventually(lambda: look(ours).unread == 111, "all of it came")
    ours.recv(111)
    assert look(ours).unread == 0


def test_a_peer_that_does_not_read_leaves_bytes_unsent(tcp: Pair) -> None:
    ours, _ = tcp
    written = stuff(ours)
    seen = look(ours)
    assert seen.unsent is not None
    assert seen.sent is not None
    assert seen.acknowledged is not None
    assert 0 < seen.acknowledged <= seen.sent < written
    assert seen.unsent + seen.acknowledged == written


def test_probing_a_peer_that_does_not_read_moves_no_byte(tcp: Pair) -> None:
    """The kernel asks again and again whether there is room, and that is answered."""
    ours, _ = tcp
    stuff(ours)
    # The first probe comes after 0.2 s, and each next one after twice the time.
    eventually(lambda: (idle_seconds(ours) or 0.0) > 0.7, "it is idle for longer than that")
    before = look(ours)
    eventually(lambda: (idle_seconds(ours) or 0.0) > 0.9, "nor does the next one count")
    after = look(ours)
    assert (before.acknowledged, before.unsent) == (after.acknowledged, after.unsent)


def make_vanish(sock: socket.socket) -> None:
    """Let the kernel drop whatever comes for `sock`, as if its host were gone."""
    nothing = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)  # BPF: return 0
    program = struct.pack("@HP", 1, ctypes.addressof(nothing))
    attach_filter = 26  # SO_ATTACH_FILTER, socket(7)
    sock.setsockopt(socket.SOL_SOCKET, attach_filter, program)


def test_bytes_that_are_sent_again_move_the_instant_but_are_counted_once(tcp: Pair) -> None:
    """So an instant alone would call a connection alive whose peer vanished."""
    ours, theirs = tcp
    make_vanish(theirs)
    began = time.monotonic()
    ours.sendall(b"is anybody there?")
    eventually(lambda: (look(ours).retransmissions or 0) >= 2, "it was sent again")
    seen = look(ours)
    assert seen.since_sent is not None
    # The first attempt and the second are 0.2 s apart or more (RFC 6298 has 1 s).
    assert seen.since_sent < time.monotonic() - began - 0.1
    assert (seen.sent, seen.acknowledged, seen.unsent) == (17, 0, 17)


def test_the_instants_are_those_of_the_last_byte(tcp: Pair) -> None:
    ours, theirs = tcp
    began = time.monotonic()
    theirs.sendall(b"question")
    readable(ours)
    eventually(lambda: (look(ours).since_received or 0.0) >= 0.05)
    ours.sendall(b"answer")
    seen = look(ours)
    elapsed = time.monotonic() - began
    assert seen.since_received is not None
    assert seen.since_sent is not None
    assert 0.0 <= seen.since_sent < seen.since_received
    assert 0.05 <= seen.since_received <= elapsed + 0.05  # some ticks of the kernel's clock
    idle = idle_seconds(ours)
    assert idle is not None
    assert seen.since_sent <= idle <= seen.since_sent + (time.monotonic() - began)


def test_idle_seconds_count_from_the_beginning_when_nothing_moved(tcp: Pair) -> None:
    ours, _ = tcp
    eventually(lambda: (idle_seconds(ours) or 0.0) >= 0.05)
    assert look(ours).since_received is None


def test_the_end_of_the_stream_counts_as_one_byte(tcp: Pair) -> None:
    ours, theirs = tcp
    theirs.sendall(b"last words")
    theirs.shutdown(socket.SHUT_WR)
    eventually(lambda: look(ours).received == 11)
    assert look(ours).unread == 10


def test_a_connection_that_was_reset_still_tells_its_totals(tcp: Pair) -> None:
    ours, theirs = tcp
    theirs.sendall(b"12345")
    readable(ours)
    ours.recv(5)
    reset(theirs)
    readable(ours)
    assert look(ours).received == 5
    assert not is_idle(look(ours), False, 60.0)


# --- every kind of socket ---------------------------------------------------------------


def test_a_unix_socket_tells_what_waits_in_it_and_no_more(unix: Pair) -> None:
    ours, theirs = unix
    assert look(ours) == Traffic(unread=0, unsent=0)
    theirs.sendall(b"12345")
    ours.sendall(b"1")
    seen = look(ours)
    assert seen.unread == 5
    assert seen.unsent is not None
    assert seen.unsent > 0
    assert seen == Traffic(unread=5, unsent=seen.unsent)
    assert (idle_seconds(ours), bytes_received(ours)) == (None, None)


def test_a_datagram_socket_tells_what_waits_in_it_and_no_more() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert look(sock) == Traffic(unread=0, unsent=0)


def test_a_listener_has_no_unread_bytes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen = look(listener)
    assert (seen.unread, seen.received) == (None, 0)


def test_a_socket_that_was_never_connected_has_moved_nothing() -> None:
    with socket.socket() as sock:
        seen = look(sock)
    assert (seen.received, seen.sent, seen.since_received, seen.round_trip) == (0, 0, None, None)


def test_nothing_is_known_of_a_socket_that_was_closed(tcp: Pair) -> None:
    ours, _ = tcp
    ours.close()
    assert (look(ours), idle_seconds(ours), bytes_received(ours)) == (UNKNOWN, None, None)


def test_nothing_is_known_of_a_descriptor_that_was_closed_behind_the_socket() -> None:
    ours, theirs = tcp_pair()
    twin = socket.socket(fileno=ours.fileno())
    with theirs, ours:
        twin.close()
        assert look(ours) == UNKNOWN
        ours.detach()


@pytest.mark.parametrize("request_", [(b"datagram", None), None, {"a": "request"}, 0, -1])
def test_nothing_is_known_of_a_request_that_is_no_socket(request_: object) -> None:
    """A program's own `get_request` makes whatever it likes."""
    assert look(request_) == UNKNOWN
    assert (idle_seconds(request_), bytes_received(request_)) == (None, None)


def test_a_tls_connection_is_looked_at_like_any_other(tcp: Pair) -> None:
    """Its bytes are those of its records."""
    ours, theirs = tcp
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    handshake = Call(lambda: server.wrap_socket(ours, server_side=True))
    with client.wrap_socket(theirs, server_hostname="localhost") as asking:
        with handshake.result() as answering:
            before = look(answering)
            asking.sendall(b"x" * 100)
            readable(answering)
            after = look(answering)
            assert before.received is not None
            assert after.received is not None
            assert 100 < after.received - before.received < 200
            assert after.unread == after.received - before.received
            assert answering.recv(100) == b"x" * 100
            assert look(answering).unread == 0


def test_looking_at_a_green_socket_sends_nothing_of_what_it_has_collected() -> None:
    """A look is no use of the socket: small writes still leave together."""
    seen: list[Traffic] = []

    class Looking(StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"collected")
            seen.append(look(self.request))
            self.request.fileno()  # this is one
            seen.append(look(self.request))

    with RunningServer(GreenTCPServer(("127.0.0.1", 0), Looking)) as running:
        assert running.ask(b"hello\n") == b"collected"
    assert [each.sent for each in seen] == [0, 9]


def test_a_system_without_tcp_info_tells_what_is_portable(
    tcp: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "TCP_INFO", None)
    monkeypatch.setattr(traffic, "UNSENT", None)
    ours, theirs = tcp
    theirs.sendall(b"12345")
    readable(ours)
    assert look(ours) == Traffic(unread=5)
    assert (idle_seconds(ours), bytes_received(ours)) == (None, None)


# --- the kernel's answer ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "known"),
    [
        (FULL.size + 64, Traffic(11, 12, 13, None, None, 0.2, 0.1, 0.0003, 4)),
        (FULL.size, Traffic(11, 12, 13, None, None, 0.2, 0.1, 0.0003, 4)),
        (FULL.size - 1, Traffic(11, 13, 13, None, None, 0.2, 0.1, 0.0003, 4)),
        (COUNTED.size, Traffic(11, 13, 13, None, None, 0.2, 0.1, 0.0003, 4)),
        (COUNTED.size - 1, Traffic(None, None, None, None, None, 0.2, 0.1, 0.0003, 4)),
        (BASIC.size, Traffic(None, None, None, None, None, 0.2, 0.1, 0.0003, 4)),
        (BASIC.size - 1, UNKNOWN),
        (0, UNKNOWN),
    ],
)
def test_the_length_of_the_answer_tells_which_fields_the_kernel_has(
    size: int, known: Traffic
) -> None:
    answer = FULL.pack(100, 200, 300, 4, 13, 11, 15, 3) + bytes(64)
    assert read(answer[:size]) == known


LAYOUT = """
#include <linux/tcp.h>
#include <stddef.h>
#include <stdio.h>
#define TELL(field) printf("%zu ", offsetof(struct tcp_info, tcpi_##field))
int main(void) {
    TELL(last_data_sent); TELL(last_data_recv); TELL(rtt); TELL(total_retrans);
    TELL(bytes_acked); TELL(bytes_received); TELL(bytes_sent); TELL(bytes_retrans);
    return 0;
}
"""


@pytest.mark.skipif(
    shutil.which("cc") is None or not Path("/usr/include/linux/tcp.h").exists(),
    reason="needs a C compiler and the kernel's headers",
)
def test_every_field_is_where_the_header_has_it(tmp_path: Path) -> None:
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text(LAYOUT)
    subprocess.run(["cc", "-o", str(program), str(source)], check=True)
    told = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    offsets = [int(word) for word in told.split()]
    widths = [4, 4, 4, 4, 8, 8, 8, 8]

    def place(values: tuple[int, ...]) -> bytes:
        answer = bytearray(FULL.size)
        for offset, width, value in zip(offsets, widths, values, strict=True):
            answer[offset : offset + width] = value.to_bytes(width, sys.byteorder)
        return bytes(answer)

    values = (1, 2, 3, 4, 5, 6, 7, 8)
    answer = place(values)
    assert FULL.unpack(answer) == values
    assert COUNTED.unpack_from(answer) == values[:6]
    assert BASIC.unpack_from(answer) == values[:4]
    assert TIMES.unpack_from(answer) == values[:2]
    assert RECEIVED.unpack_from(answer) == (6,)


@pytest.mark.parametrize("function", [look, idle_seconds, bytes_received])
def test_a_look_costs_little(function: Callable[[socket.socket], Any]) -> None:
    """As much as a few of the cheapest system calls that Python makes.

    In processor time, beside such calls in the same round, and in the best of several rounds: how
    fast the machine is, and what others do on it, does not count.
    """
    ours, theirs = tcp_pair()
    with ours, theirs:
        theirs.sendall(b"question")
        ours.recv(8)
        ours.sendall(b"answer")
        ratios = [processor_time(function, ours) / processor_time(call, ours) for _ in range(7)]
    assert min(ratios) < (15 if sys.gettrace() is None else 100)  # coverage traces each line


def call(sock: socket.socket) -> None:
    """Make a system call that does next to nothing."""
    sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)


def processor_time(function: Callable[[socket.socket], Any], sock: socket.socket) -> float:
    """Return the seconds of some thousand calls."""
    began = time.thread_time()
    for _ in range(5_000):
        function(sock)
    return time.thread_time() - began


# --- idle -------------------------------------------------------------------------------

ANSWERED = Traffic(
    received=8, sent=6, acknowledged=6, unread=0, unsent=0, since_received=2.0, since_sent=1.0
)
ASKED = ANSWERED._replace(since_received=1.0, since_sent=2.0)
SAME_TICK = ANSWERED._replace(since_received=1.0, since_sent=1.0)
SILENT = Traffic(received=0, sent=0, acknowledged=0, unread=0, unsent=0)
GREETED = SILENT._replace(sent=6, since_sent=1.0)
FIRST_REQUEST = SILENT._replace(received=8, since_received=1.0)
UNIX = Traffic(unread=0, unsent=0)


@pytest.mark.parametrize(
    ("seen", "waits", "idle"),
    [
        (ANSWERED, True, True),
        (ANSWERED, None, True),
        (ANSWERED, False, False),  # it computes something more to say
        (ASKED, True, False),  # half a request
        (ASKED, None, False),
        (ASKED, False, False),
        (SAME_TICK, True, True),
        (SAME_TICK, None, False),  # it may be at work
        (SAME_TICK, False, False),
        (SILENT, True, True),
        (SILENT, None, True),
        (SILENT, False, False),
        (GREETED, True, True),
        (GREETED, None, True),
        (FIRST_REQUEST, True, False),
        (FIRST_REQUEST, None, False),
        (UNIX, True, True),
        (UNIX, None, False),
        (UNIX, False, False),
        (UNKNOWN, True, True),
        (UNKNOWN, None, False),
        (ANSWERED._replace(unread=1), True, False),
        (SILENT._replace(unread=1), True, False),
        (UNIX._replace(unread=1), True, False),
        (ANSWERED._replace(unsent=1), True, True),  # it leaves without the handler
        (ANSWERED._replace(unsent=1), None, False),  # the handler may be writing
    ],
)
def test_idle_is_who_had_our_answer_and_says_nothing(
    seen: Traffic, waits: bool | None, idle: bool
) -> None:
    assert is_idle(seen, waits, age=60.0) is idle


@pytest.mark.parametrize("seen", [SILENT, UNIX])
def test_a_connection_over_which_nothing_moved_is_idle_when_it_is_old_enough(
    seen: Traffic,
) -> None:
    """The request of one that was just accepted is on its way."""
    assert not is_idle(seen, True, age=STILLNESS * 0.9)
    assert is_idle(seen, True, age=STILLNESS * 1.1)
    assert not is_idle(seen, True, age=4.0, stillness=5.0)


def test_a_connection_that_moved_a_moment_ago_is_not_idle() -> None:
    """Its next request may be on its way."""
    seen = ANSWERED._replace(since_sent=STILLNESS / 2)
    assert not is_idle(seen, True, age=60.0)
    assert is_idle(seen, True, age=60.0, stillness=STILLNESS / 4)


def test_a_peer_that_is_far_away_is_given_two_round_trips() -> None:
    assert is_idle(ANSWERED._replace(round_trip=0.49), True, age=60.0)
    assert not is_idle(ANSWERED._replace(round_trip=0.51), True, age=60.0)


def test_a_real_connection_is_idle_after_its_answer_and_not_before(tcp: Pair) -> None:
    ours, theirs = tcp
    assert not is_idle(look(ours), True, age=0.0)
    theirs.sendall(b"question")
    readable(ours)
    assert not is_idle(look(ours), True, age=60.0)
    ours.recv(64)
    eventually(lambda: (idle_seconds(ours) or 0.0) > STILLNESS)
    assert not is_idle(look(ours), True, age=60.0)
    ours.sendall(b"answer")
    seen = look(ours)
    assert seen.since_sent is not None
    # It has been still for a moment already if this thread was held up just here.
    assert is_idle(seen, True, age=60.0) is (seen.since_sent >= STILLNESS)
    eventually(lambda: is_idle(look(ours), True, age=60.0), "it is idle")


# --- what an engine knows ---------------------------------------------------------------


def test_activity_stands_for_bytes_where_the_kernel_counts_none() -> None:
    traffic = Traffic(unread=3, unsent=0)
    marks = {
        with_activity(traffic, 0),
        with_activity(traffic, 1),
        with_activity(traffic._replace(unread=2), 1),
        with_activity(traffic._replace(unsent=1), 1),
    }
    assert len({mark.received for mark in marks}) == len(marks)
    assert all(mark.received == mark.sent and mark.received for mark in marks)


@pytest.mark.parametrize("traffic", [Traffic(received=0, sent=0), UNKNOWN])
def test_activity_does_not_replace_what_the_kernel_says(traffic: Traffic) -> None:
    assert with_activity(traffic, 5) is traffic


def test_where_nobody_knows_of_activity_nothing_is_known() -> None:
    traffic = Traffic(unread=0, unsent=0)
    assert with_activity(traffic, None) is traffic


# --- the backlog ------------------------------------------------------------------------


def test_a_listener_tells_how_many_connections_wait() -> None:
    """They are complete, and nobody has accepted them."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        assert traffic.connections_waiting(listener) == 0
        for _ in range(3):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        # A client knows of its connection a moment before the listener does.
        eventually(lambda: traffic.connections_waiting(listener) == 3)
        listener.accept()[0].close()
        assert traffic.connections_waiting(listener) == 2


def test_of_other_sockets_nobody_knows_how_many_wait() -> None:
    """A Unix listener has a backlog, and does not tell; a datagram socket has none."""
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        assert traffic.connections_waiting(unix) is None
        assert traffic.connections_waiting(datagrams) is None
    assert traffic.connections_waiting(None) is None


# ------------------------------------------------------------------- before a connection is closed


@pytest.mark.parametrize("order", ["they end first", "we end first", "nobody ends", "only we end"])
def test_what_has_moved_is_told_without_the_ends_of_the_streams(tcp: Pair, order: str) -> None:
    ours, theirs = tcp
    theirs.sendall(b"x" * 1000)
    ours.sendall(b"y" * 50)
    if order == "they end first":
        theirs.shutdown(socket.SHUT_WR)
        eventually(lambda: look(ours).received == 1001)
    if order != "nobody ends":
        ours.shutdown(socket.SHUT_WR)
    if order == "we end first":
        theirs.shutdown(socket.SHUT_WR)
        eventually(lambda: look(ours).received == 1001)
    eventually(lambda: look(ours).received in {1000, 1001})
    assert bytes_moved(ours) == (1000, 50)
    while ours.recv(100, socket.MSG_DONTWAIT) and look(ours).unread:
        pass
    assert bytes_moved(ours) == (1000, 50)


def test_what_is_written_and_not_sent_has_moved_unless_it_never_will(tcp: Pair) -> None:
    """The system goes on sending after the socket was closed, but not after a reset."""
    ours, theirs = tcp
    written = stuff(ours)
    assert bytes_moved(ours) == (0, written)
    ours.shutdown(socket.SHUT_WR)
    assert bytes_moved(ours) == (0, written)
    reset(theirs)
    eventually(lambda: (bytes_moved(ours) or (0, 0))[1] < written)


def test_an_end_that_comes_while_the_system_looks_is_no_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state was read first: that of before."""
    answers = iter(
        [
            MOVED.pack(1, 10, 11, 0, 10, 0),
            bytes([8]),
            MOVED.pack(8, 10, 11, 0, 10, 0),
        ]
    )
    monkeypatch.setattr(traffic, "_getsockopt", lambda *_: next(answers))
    assert bytes_moved(None) == (10, 10)


@pytest.mark.parametrize(
    ("state", "acknowledged", "received", "unsent", "data", "again", "moved"),
    [
        (1, 5, 9, 3, 7, 2, (9, 8)),  # established: 5 sent once, 3 to send
        (4, 5, 9, 3, 5, 0, (9, 7)),  # our end waits to be sent
        (4, 5, 9, 0, 5, 0, (9, 5)),  # it was sent
        (8, 5, 9, 0, 5, 0, (8, 5)),  # theirs came
        (7, 6, 9, 0, 5, 0, (8, 5)),  # both, and all is acknowledged
        (7, 5, 9, 4, 5, 0, (9, 5)),  # reset
        (8, 0, 0, 0, 0, 0, (0, 0)),  # what no kernel says
    ],
)
def test_the_state_tells_which_ends_were_counted(
    state: int,
    acknowledged: int,
    received: int,
    unsent: int,
    data: int,
    again: int,
    moved: tuple[int, int],
) -> None:
    info = MOVED.pack(state, acknowledged, received, unsent, data, again)
    assert read_moved(info) == moved
    assert read_moved(info[:-1]) is None


def test_of_other_sockets_nobody_knows_what_has_moved(unix: Pair) -> None:
    assert bytes_moved(unix[0]) is None
    assert bytes_moved(object()) is None
