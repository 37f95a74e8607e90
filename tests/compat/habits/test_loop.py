"""What programs do to the loop: end it, write their own, step it, watch it."""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import signal
import socket
import socketserver
import threading
from typing import Any, Self
from unittest import mock

import pytest

from tests.compat.peers import (
    PATIENCE,
    POLL_INTERVAL,
    ask,
    background,
    connect,
    looping,
    serving,
    shout,
)

LOCALHOST = ("127.0.0.1", 0)


class Refused(Exception):
    """What the programs of this module raise on purpose."""


# --------------------------------------------------------- the flag: _BaseServer__shutdown_request


def test_a_handler_ends_the_loop_by_setting_the_flag() -> None:
    def last(request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(b"bye")
        server._BaseServer__shutdown_request = True

    with socketserver.TCPServer(LOCALHOST, last) as server, serving(server) as loop:
        assert ask(server) == b"bye"
        loop.result(PATIENCE)


def test_a_threads_handler_ends_the_loop_by_setting_the_flag() -> None:
    """The handler runs beside the loop, which waits for a client that will not come."""

    def last(request: Any, client_address: Any, server: Any) -> Any:
        server._BaseServer__shutdown_request = True

    with socketserver.ThreadingTCPServer(LOCALHOST, last) as server, serving(server) as loop:
        assert ask(server) == b""
        loop.result(PATIENCE)


def test_another_thread_ends_the_loop_by_setting_the_flag() -> None:
    with socketserver.TCPServer(LOCALHOST, shout) as server, serving(server) as loop:
        assert ask(server, b"hello") == b"HELLO"
        setter = background(setattr, server, "_BaseServer__shutdown_request", True)
        setter.result(PATIENCE)
        loop.result(PATIENCE)


def test_a_signal_handler_ends_the_loop_of_the_main_thread_by_setting_the_flag() -> None:
    server = socketserver.TCPServer(LOCALHOST, shout)

    def stop(number: int, frame: object) -> None:
        setattr(server, "_BaseServer__shutdown_request", True)  # noqa: B010  # unknown to typeshed

    def client() -> bytes:
        answer = ask(server, b"hello")  # so the loop runs when the signal arrives
        os.kill(os.getpid(), signal.SIGUSR1)
        return answer

    previous = signal.signal(signal.SIGUSR1, stop)
    try:
        answered = background(client)
        with server:
            server.serve_forever(POLL_INTERVAL)
        assert answered.result(PATIENCE) == b"HELLO"
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_ctrl_c_ends_the_loop_of_the_main_thread() -> None:
    server = socketserver.TCPServer(LOCALHOST, shout)

    def client() -> None:
        ask(server, b"hello")
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        answered = background(client)
        with server, pytest.raises(KeyboardInterrupt):
            server.serve_forever(POLL_INTERVAL)
        answered.result(PATIENCE)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_service_actions_ends_the_loop_by_setting_the_flag() -> None:
    class Server(socketserver.TCPServer):
        turns = 0

        def service_actions(self) -> None:
            self.turns += 1
            self._BaseServer__shutdown_request = self.turns == 3

    with Server(LOCALHOST, shout) as server:
        server.serve_forever(POLL_INTERVAL)
        assert server.turns == 3


def test_the_flag_can_be_read_back() -> None:
    seen = []

    def look(request: Any, client_address: Any, server: Any) -> Any:
        seen.append(server._BaseServer__shutdown_request)
        server._BaseServer__shutdown_request = True
        seen.append(server._BaseServer__shutdown_request)

    server: Any = socketserver.TCPServer(LOCALHOST, look)
    assert server._BaseServer__shutdown_request is False
    with server, serving(server) as loop:
        ask(server)
        loop.result(PATIENCE)
        assert seen == [False, True]
        assert server._BaseServer__shutdown_request is False


def test_the_flag_is_in_the_instances_dict() -> None:
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        assert vars(server)["_BaseServer__shutdown_request"] is False
        setattr(server, "_BaseServer__shutdown_request", True)  # noqa: B010
        assert vars(server)["_BaseServer__shutdown_request"] is True
        server.serve_forever(POLL_INTERVAL)
        assert vars(server)["_BaseServer__shutdown_request"] is False


def test_a_flag_set_before_serving_ends_the_loop_before_it_serves() -> None:
    server: Any
    with socketserver.TCPServer(LOCALHOST, shout) as server, connect(server) as client:
        server._BaseServer__shutdown_request = True
        server.serve_forever(POLL_INTERVAL)
        client.settimeout(0)
        with pytest.raises(BlockingIOError):
            client.recv(1)


def test_a_flag_taken_back_before_serving_does_nothing() -> None:
    """Programs clear the flag by hand before they serve again."""
    server: Any
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        server._BaseServer__shutdown_request = True
        server._BaseServer__shutdown_request = False
        with serving(server):
            assert ask(server, b"hello") == b"HELLO"


# ------------------------------------------------------------ the event: _BaseServer__is_shut_down


def test_the_event_tells_whether_the_loop_runs() -> None:
    seen = []

    def look(request: Any, client_address: Any, server: Any) -> Any:
        seen.append(server._BaseServer__is_shut_down.is_set())

    server: Any
    with socketserver.TCPServer(LOCALHOST, look) as server:
        event = server._BaseServer__is_shut_down
        assert not event.is_set()
        with serving(server):
            ask(server)
        assert seen == [False]
        assert event.is_set()
        assert server._BaseServer__is_shut_down is event


def test_the_event_is_cleared_again_when_the_loop_starts_again() -> None:
    seen = []

    def look(request: Any, client_address: Any, server: Any) -> Any:
        seen.append(server._BaseServer__is_shut_down.is_set())
        server._BaseServer__shutdown_request = True

    server: Any
    with socketserver.TCPServer(LOCALHOST, look) as server:
        event = server._BaseServer__is_shut_down
        for _ in range(2):
            loop = background(server.serve_forever, POLL_INTERVAL)
            ask(server)
            loop.result(PATIENCE)
            assert event.is_set()
        assert server._BaseServer__is_shut_down is event
    assert seen == [False, False]


def test_waiting_on_the_event_waits_for_the_end_of_the_loop() -> None:
    server: Any
    with socketserver.TCPServer(LOCALHOST, shout) as server, serving(server):
        ask(server)
        waiting = background(server._BaseServer__is_shut_down.wait, PATIENCE)
        server.shutdown()
        assert waiting.result(PATIENCE) is True


def test_the_event_is_set_when_the_loop_ends_by_an_error() -> None:
    class Server(socketserver.TCPServer):
        def service_actions(self) -> None:
            raise Refused

    server: Any = Server(LOCALHOST, shout)
    with server:
        with pytest.raises(Refused):
            server.serve_forever(POLL_INTERVAL)
        assert server._BaseServer__is_shut_down.is_set()
        assert server._BaseServer__shutdown_request is False
        server.shutdown()  # which therefore does not wait


def test_shutdown_of_a_server_that_was_never_made_waits_on_a_mock() -> None:
    """Programs test their own shutdown code on an instance whose ``__init__`` never ran."""
    server: Any = socketserver.TCPServer.__new__(socketserver.TCPServer)
    server._BaseServer__is_shut_down = mock.Mock()
    server._BaseServer__shutdown_request = False
    server.shutdown()
    server._BaseServer__is_shut_down.wait.assert_called_once()
    assert server._BaseServer__shutdown_request is True


def test_shutdown_of_a_subclass_that_never_called_init_waits_on_a_mock() -> None:
    class Server(socketserver.ThreadingTCPServer):
        def __init__(self) -> None:
            setattr(self, "_BaseServer__is_shut_down", mock.Mock())  # noqa: B010

    server: Any = Server()
    server.shutdown()
    server._BaseServer__is_shut_down.wait.assert_called_once()


def test_a_server_serves_without_init_when_it_has_the_two_names() -> None:
    class Server(socketserver.TCPServer):
        def __init__(self) -> None:
            self.socket = socket.create_server(("127.0.0.1", 0))
            self.server_address = self.socket.getsockname()
            self.RequestHandlerClass = shout
            setattr(self, "_BaseServer__is_shut_down", threading.Event())  # noqa: B010
            setattr(self, "_BaseServer__shutdown_request", False)  # noqa: B010

    server: Any = Server()
    with serving(server):
        assert ask(server, b"hello") == b"HELLO"
    assert server._BaseServer__is_shut_down.is_set()


# ---------------------------------------------------------------------- a loop of the program's own


def own_loop(server: Any, poll_interval: float = POLL_INTERVAL) -> None:
    """The loop that public programs carry, to look at something else between two requests."""
    server._BaseServer__is_shut_down.clear()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while not server._BaseServer__shutdown_request:
                if selector.select(poll_interval):
                    server._handle_request_noblock()
                server.service_actions()
    finally:
        server._BaseServer__shutdown_request = False
        server._BaseServer__is_shut_down.set()


def test_an_own_serve_forever_serves_and_is_waited_for_by_shutdown() -> None:
    class Server(socketserver.TCPServer):
        serve_forever = own_loop

    server: Any
    with Server(LOCALHOST, shout) as server:
        loop = background(server.serve_forever)
        assert ask(server, b"hello") == b"HELLO"
        assert ask(server, b"again") == b"AGAIN"
        server.shutdown()
        assert server._BaseServer__is_shut_down.is_set()
        loop.result(PATIENCE)


def test_a_loop_beside_the_class_serves_and_is_waited_for_by_shutdown() -> None:
    server: Any
    with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server:
        loop = background(own_loop, server)
        assert ask(server, b"hello") == b"HELLO"
        server.shutdown()
        assert server._BaseServer__is_shut_down.is_set()
        loop.result(PATIENCE)


def test_an_own_serve_forever_that_counts() -> None:
    class Server(socketserver.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            for _ in range(2):
                self.handle_request()

        def service_actions(self) -> None:
            raise AssertionError("nobody calls it but the loop of socketserver")

    with Server(LOCALHOST, shout) as server:
        loop = background(server.serve_forever)
        assert ask(server, b"hello") == b"HELLO"
        assert ask(server, b"again") == b"AGAIN"
        loop.result(PATIENCE)


def test_a_server_in_a_foreign_select_loop() -> None:
    server: Any
    with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server:
        asking = background(ask, server, b"hello")
        ready, _, _ = select.select([server], [], [], PATIENCE)
        assert ready == [server]
        server._handle_request_noblock()
        assert asking.result(PATIENCE) == b"HELLO"


def test_a_server_in_a_foreign_select_loop_by_its_descriptor() -> None:
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        asking = background(ask, server, b"hello")
        ready, _, _ = select.select([server.fileno()], [], [], PATIENCE)
        assert ready == [server.fileno()]
        server.handle_request()
        assert asking.result(PATIENCE) == b"HELLO"


def test_one_loop_over_several_servers() -> None:
    def name_of(name: bytes) -> Any:
        return lambda request, client_address, server: request.sendall(name)

    servers: list[Any] = [
        socketserver.TCPServer(LOCALHOST, name_of(b"serial")),
        socketserver.ThreadingTCPServer(LOCALHOST, name_of(b"threads")),
        socketserver.TCPServer(LOCALHOST, name_of(b"another")),
    ]
    with selectors.DefaultSelector() as selector:
        for server in servers:
            selector.register(server, selectors.EVENT_READ, server._handle_request_noblock)
        asking = [background(ask, server) for server in servers]
        while not all(future.done() for future in asking):
            for key, _ in selector.select(POLL_INTERVAL):
                key.data()
    for server in servers:
        server.server_close()
    assert [future.result() for future in asking] == [b"serial", b"threads", b"another"]


def test_a_server_on_an_asyncio_loop() -> None:
    server: Any = socketserver.ThreadingTCPServer(LOCALHOST, shout)

    async def client() -> bytes:
        loop = asyncio.get_running_loop()
        loop.add_reader(server, server._handle_request_noblock)
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"hello")
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        loop.remove_reader(server)
        return answer

    with server:
        assert asyncio.run(asyncio.wait_for(client(), PATIENCE)) == b"HELLO"


# -------------------------------------------------------------- the step: _handle_request_noblock


def test_the_step_serves_a_client_that_waits() -> None:
    server: Any
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        asking = background(ask, server, b"hello")
        select.select([server], [], [], PATIENCE)
        assert server._handle_request_noblock() is None
        assert asking.result(PATIENCE) == b"HELLO"


def test_the_step_returns_when_nobody_waits() -> None:
    server: Any
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        server.socket.setblocking(False)
        assert server._handle_request_noblock() is None


def test_the_step_returns_when_the_listener_is_closed() -> None:
    server: Any = socketserver.TCPServer(LOCALHOST, shout)
    server.server_close()
    assert server._handle_request_noblock() is None


def test_a_step_that_does_not_accept_is_called_again() -> None:
    """Programs throttle so: the client waits in the backlog, and the loop comes back."""

    class Server(socketserver.TCPServer):
        steps = 0

        def _handle_request_noblock(self) -> None:
            self.steps += 1
            if self.steps > 3:
                super()._handle_request_noblock()  # type: ignore[misc]  # unknown to typeshed

    with Server(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"
        assert server.steps == 4


def test_a_step_that_does_not_accept_leaves_service_actions_their_turn() -> None:
    class Server(socketserver.TCPServer):
        permits = 0

        def service_actions(self) -> None:
            self.permits += 1

        def _handle_request_noblock(self) -> None:
            if self.permits > 1:
                super()._handle_request_noblock()  # type: ignore[misc]

    with Server(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"


def test_a_step_that_catches_what_verify_request_raised() -> None:
    class Server(socketserver.TCPServer):
        verified = 0

        def verify_request(self, request: Any, client_address: Any) -> bool:
            self.verified += 1
            if self.verified == 1:
                request.close()
                raise Refused
            return True

        def _handle_request_noblock(self) -> None:
            try:
                super()._handle_request_noblock()  # type: ignore[misc]
            except Refused:
                pass

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing."""

    with Server(LOCALHOST, shout) as server, serving(server):
        connect(server).close()
        assert ask(server, b"hello") == b"HELLO"
        assert server.verified == 2


@pytest.mark.parametrize("owner", ["BaseServer", "TCPServer", "ThreadingTCPServer"])
def test_a_step_patched_on_a_class_is_what_the_loop_calls(owner: str) -> None:
    cls: Any = getattr(socketserver, owner)
    step = socketserver.BaseServer._handle_request_noblock  # type: ignore[attr-defined]
    stepped = []

    def patched(self: Any) -> None:
        stepped.append(self)
        step(self)

    with (
        mock.patch.object(cls, "_handle_request_noblock", patched),
        socketserver.ThreadingTCPServer(LOCALHOST, shout) as server,
        serving(server),
    ):
        assert ask(server, b"hello") == b"HELLO"
        assert set(stepped) == {server}


def test_a_step_patched_while_the_loop_runs_is_called_from_then_on() -> None:
    step = socketserver.BaseServer._handle_request_noblock  # type: ignore[attr-defined]
    stepped = []

    def patched(self: Any) -> None:
        stepped.append(self)
        step(self)

    with socketserver.TCPServer(LOCALHOST, shout) as server, serving(server):
        assert ask(server, b"hello") == b"HELLO"
        with mock.patch.object(socketserver.BaseServer, "_handle_request_noblock", patched):
            assert ask(server, b"again") == b"AGAIN"
        seen = len(stepped)
        assert set(stepped) == {server}
        assert ask(server, b"last") == b"LAST"
        assert len(stepped) == seen


def test_a_step_set_on_the_instance_is_what_the_loop_calls() -> None:
    server: Any
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        step = mock.Mock(side_effect=server._handle_request_noblock)
        server._handle_request_noblock = step
        with serving(server):
            assert ask(server, b"hello") == b"HELLO"
        step.assert_called_once_with()


def test_handle_request_takes_the_same_step() -> None:
    with (
        mock.patch.object(socketserver.BaseServer, "_handle_request_noblock") as step,
        socketserver.TCPServer(LOCALHOST, shout) as server,
        connect(server),
    ):
        server.handle_request()
        step.assert_called_once_with()


# -------------------------------------------------------------------- the selector: _ServerSelector


def server_selector() -> Any:
    """The class, which typeshed does not know."""
    return socketserver._ServerSelector  # type: ignore[attr-defined]


def test_the_selector_is_a_class_that_others_use() -> None:
    assert issubclass(server_selector(), selectors.BaseSelector)
    with (
        socketserver.TCPServer(LOCALHOST, shout) as server,
        server_selector()() as selector,
    ):
        selector.register(server, selectors.EVENT_READ)
        assert selector.select(0) == []
        with connect(server):
            ((key, events),) = selector.select(PATIENCE)
            assert key.fileobj is server
            assert events == selectors.EVENT_READ


@pytest.mark.parametrize("replacement", [selectors.SelectSelector, selectors.EpollSelector])
def test_a_replaced_selector_serves(
    replacement: type[selectors.BaseSelector], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Selector(replacement):  # type: ignore[misc, valid-type]  # a variable as a base
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(socketserver, "_ServerSelector", Selector)
    with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server:
        with looping(server):
            assert ask(server, b"hello") == b"HELLO"
            server.shutdown()
        asking = background(ask, server, b"again")
        server.handle_request()
        assert asking.result(PATIENCE) == b"AGAIN"
    assert len(made) == 2


def test_the_server_object_is_what_is_registered() -> None:
    """So a program's own `fileno` decides what is polled."""
    registered = []

    class Selector(server_selector()):  # type: ignore[misc]
        def register(self, fileobj: Any, events: Any, data: Any = None) -> Any:
            registered.append(fileobj)
            return super().register(fileobj, events, data)

    with (
        mock.patch.object(socketserver, "_ServerSelector", Selector),
        socketserver.TCPServer(LOCALHOST, shout) as server,
    ):
        with looping(server):
            ask(server)
            server.shutdown()
        assert any(fileobj is server for fileobj in registered)
        registered.clear()
        asking = background(ask, server)
        server.handle_request()
        asking.result(PATIENCE)
        assert any(fileobj is server for fileobj in registered)


def test_a_selector_that_is_always_ready() -> None:
    """Tests of programs replace the class by one that has no descriptors."""

    class Selector:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *error: object) -> None:
            self.close()

        def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            self.key = selectors.SelectorKey(fileobj, 0, events, data)
            return self.key

        def select(self, timeout: float | None = None) -> Any:
            return [(self.key, selectors.EVENT_READ)]

        def close(self) -> None:
            """Nothing is open."""

    class Server(socketserver.BaseServer):
        numbers = iter(range(3))

        def get_request(self) -> Any:
            return next(self.numbers), None

        def finish_request(self, request: Any, client_address: Any) -> None:
            served.append(request)
            self._BaseServer__shutdown_request = request == 2

    served: list[int] = []
    with mock.patch.object(socketserver, "_ServerSelector", Selector):
        Server("nowhere", shout).serve_forever()
    assert served == [0, 1, 2]


# -------------------------------------------------------------------------------------- the ends


def test_service_actions_that_raises_ends_the_loop() -> None:
    class Server(socketserver.TCPServer):
        def service_actions(self) -> None:
            raise Refused

    with Server(LOCALHOST, shout) as server, pytest.raises(Refused):
        server.serve_forever(POLL_INTERVAL)


def test_get_request_that_raises_ends_the_loop() -> None:
    class Server(socketserver.TCPServer):
        def get_request(self) -> Any:
            raise Refused

    with (
        Server(LOCALHOST, shout) as server,
        serving(server) as loop,
        connect(server),
        pytest.raises(Refused),
    ):
        loop.result(PATIENCE)


def test_get_request_that_raises_an_oserror_does_not_end_the_loop() -> None:
    class Server(socketserver.TCPServer):
        accepted = 0

        def get_request(self) -> Any:
            accepted = super().get_request()
            self.accepted += 1
            if self.accepted == 1:
                accepted[0].close()
                raise OSError("the first one is not wanted")
            return accepted

    with Server(LOCALHOST, shout) as server, serving(server):
        with connect(server) as first:
            assert first.recv(1) == b""
        assert ask(server, b"hello") == b"HELLO"


def test_handle_error_that_raises_ends_the_loop() -> None:
    class Server(socketserver.TCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            raise ValueError("of the handler")

        def handle_error(self, request: Any, client_address: Any) -> None:
            request.close()
            raise  # noqa: PLE0704  # what is being handled

    with (
        Server(LOCALHOST, shout) as server,
        serving(server) as loop,
        connect(server),
        pytest.raises(ValueError, match="of the handler"),
    ):
        loop.result(PATIENCE)


@pytest.mark.parametrize("exit_", [SystemExit, KeyboardInterrupt])
def test_an_exit_goes_through_the_loop_and_closes_the_request(exit_: type[BaseException]) -> None:
    closed = []

    class Server(socketserver.TCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            raise exit_

        def close_request(self, request: Any) -> None:
            closed.append(request)
            super().close_request(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            raise AssertionError("an exit is no error")

    with Server(LOCALHOST, shout) as server, serving(server) as loop:
        with connect(server) as client:
            with pytest.raises(exit_):
                loop.result(PATIENCE)
            assert client.recv(1) == b""
        assert len(set(closed)) == 1
        assert closed[0].fileno() == -1


def test_a_server_serves_again_after_an_exit() -> None:
    class Server(socketserver.TCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            if request.recv(4) == b"exit":
                raise SystemExit
            request.sendall(b"here")

    with Server(LOCALHOST, shout) as server:
        with looping(server) as loop:
            ask(server, b"exit")
            with pytest.raises(SystemExit):
                loop.result(PATIENCE)
        with serving(server):
            assert ask(server, b"stay") == b"here"


def test_a_server_serves_again_after_shutdown() -> None:
    with socketserver.ThreadingTCPServer(LOCALHOST, shout) as server:
        for question, answer in ((b"one", b"ONE"), (b"two", b"TWO"), (b"three", b"THREE")):
            with looping(server) as loop:
                assert ask(server, question) == answer
                server.shutdown()
                loop.result(PATIENCE)


def test_clients_that_connect_before_serving_are_served() -> None:
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        asking = [background(ask, server, b"hello") for _ in range(5)]
        with serving(server):
            assert [future.result(PATIENCE) for future in asking] == [b"HELLO"] * 5


def test_clients_that_connect_between_two_loops_are_served() -> None:
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        with looping(server):
            ask(server)
            server.shutdown()
        asking = background(ask, server, b"hello")
        with serving(server):
            assert asking.result(PATIENCE) == b"HELLO"


def test_shutdown_from_a_handlers_thread() -> None:
    def last(request: Any, client_address: Any, server: Any) -> Any:
        server.shutdown()
        request.sendall(b"stopped")

    with socketserver.ThreadingTCPServer(LOCALHOST, last) as server, serving(server) as loop:
        assert ask(server) == b"stopped"
        loop.result(PATIENCE)


def test_shutdown_by_several_threads_at_once() -> None:
    with socketserver.TCPServer(LOCALHOST, shout) as server, serving(server) as loop:
        ask(server)
        stopping = [background(server.shutdown) for _ in range(5)]
        for future in stopping:
            future.result(PATIENCE)
        loop.result(PATIENCE)


def test_leaving_the_with_block_closes_and_no_more() -> None:
    """The loop is the program's to end."""
    with socketserver.TCPServer(LOCALHOST, shout) as server:
        with mock.patch.object(server, "shutdown") as shutdown:
            with server as entered:
                assert entered is server
            shutdown.assert_not_called()
        assert server.fileno() == -1
