"""What a client can rely on, whatever the engine and the kind of socket."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from portico import TCPServer
from tests.support import Call, RunningServer, ask, connect, received, reset

Echo = RunningServer[TCPServer]


def test_a_client_gets_back_what_it_sent(echo: Echo) -> None:
    assert echo.ask(b"hello\n") == b"hello\n"


def test_clients_are_served_one_after_another(echo: Echo) -> None:
    assert [echo.ask(b"%d\n" % turn) for turn in range(10)] == [b"%d\n" % n for n in range(10)]


def test_clients_that_come_together_are_all_served(echo: Echo) -> None:
    """Each has said all before the first is asked for its answer."""
    questions = [b"client %d\n" % number for number in range(20)]
    with ExitStack() as stack:
        clients = [stack.enter_context(echo.connect()) for _ in questions]
        for client, question in zip(clients, questions, strict=True):
            client.send(question)
            if client.type == socket.SOCK_STREAM:
                client.shutdown(socket.SHUT_WR)
        assert [client.recv(64) for client in clients] == questions


def test_every_byte_comes_back_as_it_was(echo: Echo) -> None:
    question = bytes(range(256))
    assert echo.ask(question) == question


def test_a_failing_handler_leaves_the_server_alone(
    echo: Echo, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next client is served, and the failure is reported."""
    with echo.connect() as client:
        client.send(b"fail\n")
        assert echo.ask(b"next\n") == b"next\n"
    echo.shutdown()
    echo.server.server_close()  # in the forking engine, a child writes the report
    assert "ValueError: the client asked for it" in capfd.readouterr().err


def test_it_serves_again_after_a_shutdown(echo: Echo) -> None:
    echo.shutdown()
    assert echo.wait_ended() is None
    again = Call(echo.server.serve_forever)
    assert echo.ask(b"hello again\n") == b"hello again\n"
    echo.shutdown()
    again.result()


def test_who_comes_between_two_loops_is_served_by_the_second(echo: Echo) -> None:
    """The listener is open all the time, so the kernel keeps what comes."""
    echo.shutdown()
    echo.wait_ended()
    with echo.connect() as client:
        client.send(b"early\n")
        again = Call(echo.server.serve_forever)
        if client.type == socket.SOCK_STREAM:
            client.shutdown(socket.SHUT_WR)
        assert client.recv(64) == b"early\n"
    echo.shutdown()
    again.result()


def test_a_closed_server_serves_nobody(echo: Echo) -> None:
    echo.shutdown()
    echo.server.server_close()
    with pytest.raises(OSError, match="refused"):
        echo.ask(b"too late\n")


# --- connections ------------------------------------------------------------------------


@pytest.mark.needs("connections")
def test_a_connection_carries_many_questions(echo: Echo) -> None:
    """Each is answered before the next is asked."""
    with echo.connect() as client:
        for turn in range(10):
            client.sendall(b"%d\n" % turn)
            assert client.recv(64) == b"%d\n" % turn


@pytest.mark.needs("connections")
def test_pipelined_questions_are_answered_in_order(echo: Echo) -> None:
    lines = b"".join(b"line %d\n" % number for number in range(500))
    assert echo.ask(lines) == lines


@pytest.mark.needs("connections")
def test_a_question_may_come_in_any_pieces(echo: Echo) -> None:
    with echo.connect() as client:
        for byte in b"piece by piece":
            client.sendall(bytes([byte]))
        assert ask(client, b"\n") == b"piece by piece\n"


@pytest.mark.needs("connections")
def test_a_large_answer_arrives_whole(echo: Echo) -> None:
    """More than any socket buffer holds, so both sides have to wait for each other."""
    question = b"x" * (8 << 20) + b"\n"
    with echo.connect() as client:
        asking = Call(client.sendall, question)
        answer = bytearray()
        while len(answer) < len(question):
            answer += client.recv(1 << 20)
        asking.result()
    assert answer == question


@pytest.mark.needs("connections")
def test_what_is_no_line_yet_is_answered_at_the_end(echo: Echo) -> None:
    """The end of what a client sends ends the last line, and the client still hears the answer."""
    assert echo.ask(b"no newline") == b"no newline"


@pytest.mark.needs("connections")
def test_a_client_may_leave_without_a_word(echo: Echo) -> None:
    echo.connect().close()
    assert echo.ask(b"next\n") == b"next\n"


@pytest.mark.needs("connections")
def test_a_client_that_resets_leaves_the_others_alone(
    echo: Echo, capfd: pytest.CaptureFixture[str]
) -> None:
    """And it is no fault of the program, so nothing is printed."""
    for _ in range(5):
        with echo.connect() as client:
            client.sendall(b"to be or not\n")
            assert client.recv(64) == b"to be or not\n"
            reset(client)
    assert echo.ask(b"next\n") == b"next\n"
    echo.shutdown()
    echo.server.server_close()
    assert capfd.readouterr().err == ""


@pytest.mark.needs("connections")
def test_a_client_of_a_failing_handler_sees_the_end(echo: Echo) -> None:
    with echo.connect() as client:
        client.sendall(b"first\nfail\nnever\n")
        # What it had not read yet makes the kernel reset the connection, after the end or before.
        answer = client.recv(64)
        try:
            answer += received(client)
        except ConnectionResetError:
            pass
    assert answer == b"first\n"


# --- datagrams --------------------------------------------------------------------------


@pytest.mark.needs("datagrams")
def test_an_empty_datagram_is_answered_with_an_empty_one(echo: Echo) -> None:
    assert echo.ask(b"") == b""


@pytest.mark.needs("datagrams")
def test_a_datagram_of_the_largest_size_comes_back_whole(echo: Echo) -> None:
    question = b"x" * 8192
    assert echo.ask(question) == question


@pytest.mark.needs("datagrams")
def test_each_sender_gets_its_own_answer(echo: Echo) -> None:
    with echo.connect() as one, echo.connect() as other:
        for turn in range(5):
            one.send(b"one %d" % turn)
            other.send(b"other %d" % turn)
            assert one.recv(64) == b"one %d" % turn
            assert other.recv(64) == b"other %d" % turn


# --- neighbours -------------------------------------------------------------------------


@pytest.mark.needs("connections", "neighbours")
def test_an_idle_client_holds_up_nobody(echo: Echo) -> None:
    with echo.connect() as idle:
        assert echo.ask(b"busy\n") == b"busy\n"
        assert ask(idle, b"idle no more\n") == b"idle no more\n"


@pytest.mark.needs("connections", "neighbours")
def test_open_connections_take_turns(echo: Echo) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(echo.connect()) for _ in range(10)]
        for turn in range(3):
            for number, client in enumerate(clients):
                client.sendall(b"%d of %d\n" % (turn, number))
            for number, client in enumerate(clients):
                assert client.recv(64) == b"%d of %d\n" % (turn, number)


@pytest.mark.needs("connections", "neighbours")
def test_a_shutdown_leaves_open_connections_alone(echo: Echo) -> None:
    """Whoever is connected is served to the end; whoever comes later waits in the backlog."""
    with echo.connect() as early:
        early.sendall(b"early\n")
        assert early.recv(64) == b"early\n"
        echo.shutdown()
        assert echo.wait_ended() is None
        with connect(echo.server) as late:
            late.sendall(b"late\n")
            assert ask(early, b"last words\n") == b"last words\n"
            late.settimeout(0)
            with pytest.raises(BlockingIOError):
                late.recv(64)


@pytest.mark.needs("connections", "neighbours")
def test_closing_the_server_waits_for_open_connections(echo: Echo) -> None:
    with echo.connect() as client:
        client.sendall(b"first\n")
        assert client.recv(64) == b"first\n"
        echo.shutdown()
        closing = Call(echo.server.server_close)
        client.sendall(b"second\n")
        assert client.recv(64) == b"second\n"
        assert closing.is_running()
        assert ask(client, b"third\n") == b"third\n"
    closing.result()
