from __future__ import annotations

import asyncio
import contextvars
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import portico
from portico.engines.green import GreenMixIn, coroutines
from portico.engines.green.bridge import await_, sleep, spawn, timeout, to_thread
from portico.engines.green.coroutines import (
    AsyncDatagramRequestHandler,
    AsyncRequestHandler,
    AsyncStreamRequestHandler,
    FairReader,
)
from tests.engines.green.test_engine import ask, connected, serving
from tests.support import PATIENCE, Call, goodbye


class GreenTCP(GreenMixIn, portico.TCPServer):
    pass


class GreenUDP(GreenMixIn, portico.UDPServer):
    pass


SOON = 0.01

LARGE = 30_000_000
"""Bytes; far more than the system keeps for a connection."""

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

ENGINES = (portico.TCPServer, portico.ThreadingTCPServer, GreenTCP)


@pytest.fixture(params=ENGINES, ids=lambda kind: kind.__name__)
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[Any], Any]], Any]:
    """Run a function as a handler on each engine; return what it returned or raise its error."""

    def run(function: Callable[[Any], Any]) -> Any:
        outcome: list[Any] = []

        class Handler(portico.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    outcome.append((function(self), None))
                except BaseException as error:
                    outcome.append((None, error))

        kind = request.param
        with kind(("127.0.0.1", 0), Handler) as server:
            loop = threading.Thread(target=server.serve_forever)
            loop.start()
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
            server.shutdown()
            loop.join()
        ((result, error),) = outcome
        if error is not None:
            raise error
        return result

    return run


Run = Callable[[Callable[[Any], Any]], Any]


def test_to_thread_returns_what_the_function_returned(run: Run) -> None:
    assert run(lambda _: to_thread(int, "12", base=3)) == 5


def test_to_thread_raises_what_the_function_raised(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda _: to_thread(divmod, 1, 0))


def test_to_thread_shows_the_variables_of_the_caller(run: Run) -> None:
    def handle(_: Any) -> str:
        variable.set("of the caller")
        return to_thread(variable.get)

    assert run(handle) == "of the caller"


def test_await_returns_or_raises_what_the_coroutine_did(run: Run) -> None:
    async def work(value: int) -> int:
        await asyncio.sleep(0)
        return 10 // value

    assert run(lambda _: await_(work(5))) == 2
    with pytest.raises(ZeroDivisionError):
        run(lambda _: await_(work(0)))


def test_a_coroutine_has_a_loop_of_its_own_in_a_thread(run: Run) -> None:
    """What a program does that says `asyncio.run`, which a thread with a hub refuses."""

    async def loop() -> asyncio.AbstractEventLoop:
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    def handle(_: Any) -> bool:
        return to_thread(asyncio.run, loop()) is not await_(loop())

    assert run(handle)


def test_sleep_sleeps(run: Run) -> None:
    def handle(_: Any) -> float:
        before = time.monotonic()
        sleep(SOON)
        return time.monotonic() - before

    assert run(handle) >= SOON * 0.9


def test_what_was_spawned_runs_beside_the_handler(run: Run) -> None:
    def handle(_: Any) -> Any:
        event: list[str] = []
        variable.set("seen")

        def beside(name: str, *, end: str) -> str:
            while not event:  # what spawned it goes on meanwhile
                sleep(SOON)
            event.append(name)
            return variable.get() + end

        spawned = spawn(beside, "spawned", end="!")
        event.append("handler")
        assert spawned.join()
        assert spawned.join(0)
        return event, spawned.result()

    assert run(handle) == (["handler", "spawned"], "seen!")


def test_a_result_that_takes_too_long_is_a_timeout(run: Run) -> None:
    def handle(_: Any) -> bool:
        may_end: list[bool] = []

        def beside() -> None:
            while not may_end:
                sleep(SOON)

        spawned = spawn(beside)
        assert not spawned.join(SOON / 10)
        with pytest.raises(TimeoutError):
            spawned.result(SOON / 10)
        may_end.append(True)
        spawned.result()
        return True

    assert run(handle)


def test_what_was_spawned_raises_in_result(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda _: spawn(divmod, 1, 0).result())


WAITS: dict[str, Callable[[], object]] = {
    "sleep": lambda: sleep(PATIENCE),
    "await": lambda: await_(asyncio.sleep(PATIENCE)),
    "join": lambda: spawn(sleep, 20 * SOON).join(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=list(WAITS))
def test_a_timeout_ends_a_wait(run: Run, wait: Callable[[], object]) -> None:
    def handle(_: Any) -> str:
        with pytest.raises(TimeoutError), timeout(SOON):
            try:
                wait()
            except Exception as error:
                if not isinstance(error, TimeoutError):
                    pytest.fail(f"an ordinary {error!r}")
                raise
        return "went on"

    assert run(handle) == "went on"


def test_a_timeout_that_does_not_come_changes_nothing(run: Run) -> None:
    def handle(_: Any) -> str:
        with timeout(PATIENCE), timeout(None):
            sleep(SOON)
        return "done"

    assert run(handle) == "done"


def test_an_error_of_the_block_is_passed_on(run: Run) -> None:
    def handle(_: Any) -> None:
        with timeout(PATIENCE):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(handle)


def test_a_timeout_ends_a_computation_in_a_thread_with_its_block() -> None:
    with pytest.raises(TimeoutError), timeout(SOON):
        before = time.monotonic()
        while time.monotonic() < before + 2 * SOON:
            sum(range(1000))


def test_a_timeout_ends_a_read_in_the_green_engine() -> None:
    class Handler(portico.StreamRequestHandler):
        def handle(self) -> None:
            try:
                with timeout(SOON):
                    self.rfile.readline()
            except TimeoutError:
                self.wfile.write(b"too late\n")

    with serving(GreenTCP, Handler) as server, connected(server) as client:
        assert client.recv(100) == b"too late\n"


@pytest.mark.parametrize("catches", [True, False])
def test_a_timeout_of_a_write_ends_its_handler(catches: bool) -> None:
    """Where the peer takes nothing more, `finish` does not wait for what was given up either."""
    finished = threading.Event()

    class Handler(portico.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(*(TimeoutError,) if catches else ()), timeout(SOON):
                self.wfile.write(b"x" * LARGE)

        def finish(self) -> None:
            super().finish()
            finished.set()

    with serving(GreenTCP, Handler) as server, connected(server) as client:
        assert finished.wait(PATIENCE)
        assert 0 < len(goodbye(client)) < LARGE


@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("-inf")])
def test_a_sleep_of_less_than_nothing_says_what_would_be_right(run: Run, seconds: float) -> None:
    with pytest.raises(portico.SettingError, match="expected 0 or more"):
        run(lambda _: sleep(seconds))


async def nothing() -> None:
    """Do nothing."""


class TestCoroutines:
    """What waits in sequential code would hold up a coroutine's loop, and says so."""

    @pytest.fixture(params=ENGINES, ids=lambda kind: kind.__name__)
    def run_async(self, request: pytest.FixtureRequest) -> Run:
        """Await a coroutine as a handler on each engine; return its result or raise its error."""

        def run(coroutine: Callable[[Any], Any]) -> Any:
            outcome: list[Any] = []

            class Handler(AsyncStreamRequestHandler):
                async def handle(self) -> None:
                    try:
                        outcome.append((await coroutine(self), None))
                    except Exception as error:
                        outcome.append((None, error))

            with request.param(("127.0.0.1", 0), Handler) as server:
                loop = Call(server.serve_forever)
                with connected(server) as client:
                    assert client.recv(1) == b""
                server.shutdown()
                loop.result()
            ((result, error),) = outcome
            if error is not None:
                raise error
            return result

        return run

    @pytest.mark.parametrize(
        ("wait", "expected"),
        [
            (lambda: sleep(0), "await asyncio.sleep"),
            (lambda: to_thread(time.sleep, 0), "await asyncio.to_thread"),
            (lambda: await_(nothing()), "await"),
            (lambda: timeout(PATIENCE).__enter__(), "async with asyncio.timeout"),
            (lambda: timeout(None).__enter__(), "async with asyncio.timeout"),
            (lambda: spawn(int).join(), "await asyncio.to_thread"),
            (lambda: spawn(int).result(), "await asyncio.to_thread"),
        ],
        ids=["sleep", "to_thread", "await_", "timeout", "no timeout", "join", "result"],
    )
    def test_a_wait_says_what_a_coroutine_does_in_its_place(
        self, run_async: Run, wait: Callable[[], object], expected: str
    ) -> None:
        async def handle(_: Any) -> None:
            await asyncio.sleep(0)
            wait()

        with pytest.raises(portico.CoroutineError, match=expected):
            run_async(handle)

    def test_a_callback_of_a_hub_may_not_wait_either(self) -> None:
        """It runs in the hub's own greenlet, on which all others wait."""
        outcome: list[RuntimeError] = []

        def call_back(done: asyncio.Event) -> None:
            try:
                sleep(0)
            except RuntimeError as error:
                outcome.append(error)
            done.set()

        class Handler(AsyncStreamRequestHandler):
            async def handle(self) -> None:
                done = asyncio.Event()
                asyncio.get_running_loop().call_soon(call_back, done)
                await done.wait()

        with serving(GreenTCP, Handler) as server, connected(server) as client:
            assert client.recv(1) == b""
        assert [type(error) for error in outcome] == [portico.CoroutineError]

    def test_what_a_coroutine_spawned_runs_beside_it(self, run_async: Run) -> None:
        """In a greenlet of its hub, or in a thread, it may wait like a sequential handler."""

        def beside(name: str) -> tuple[str, str]:
            sleep(0)
            return name, variable.get()

        async def handle(_: Any) -> Any:
            variable.set("seen")
            spawned = spawn(beside, "spawned")
            return await asyncio.to_thread(spawned.result)

        assert run_async(handle) == ("spawned", "seen")

    def test_what_a_coroutine_on_a_hub_spawned_is_a_greenlet(self) -> None:
        threads: list[set[int]] = []

        class Handler(AsyncStreamRequestHandler):
            async def handle(self) -> None:
                there = await asyncio.to_thread(spawn(threading.get_ident).result)
                threads.append({there, threading.get_ident()})

        with serving(GreenTCP, Handler) as server, connected(server) as client:
            assert client.recv(1) == b""
        assert [len(each) for each in threads] == [1]

    def test_a_sequential_handler_waits_beside_a_loop_that_it_does_not_run_in(self) -> None:
        """A program may serve from a callback of its own loop, which waits for all of it."""
        slept: list[bool] = []

        class Handler(portico.BaseRequestHandler):
            def handle(self) -> None:
                with timeout(PATIENCE):
                    sleep(0)
                slept.append(True)

        async def serve(server: portico.TCPServer) -> None:
            loop = asyncio.get_running_loop()
            served = asyncio.Event()

            def step() -> None:
                server.handle_request()
                served.set()

            loop.add_reader(server, step)
            await served.wait()
            loop.remove_reader(server)

        with portico.TCPServer(("127.0.0.1", 0), Handler) as server, connected(server):
            asyncio.run(serve(server))
        assert slept == [True]


class TestAsyncHandlers:
    @pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.__name__)
    def test_streams(self, kind: Any) -> None:
        class Shout(AsyncStreamRequestHandler):
            async def handle(self) -> None:
                async for line in self.reader:
                    self.writer.write(line.upper())
                    await self.writer.drain()

        with kind(("127.0.0.1", 0), Shout) as server:
            loop = threading.Thread(target=server.serve_forever)
            loop.start()
            for _ in range(3):
                with socket.create_connection(server.server_address, PATIENCE) as client:
                    assert ask(client, b"one\ntwo\n") == b"ONE\nTWO\n"
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(1) == b""
            server.shutdown()
            loop.join()

    def test_they_run_beside_each_other_on_one_hub(self) -> None:
        together = 3
        loops: set[int] = set()

        class Meet(AsyncStreamRequestHandler):
            async def handle(self) -> None:
                loops.add(id(asyncio.get_running_loop()))
                waiting.append(self)
                if len(waiting) == together:
                    all_here.set()
                await all_here.wait()
                self.writer.write(b"met")

        waiting: list[Any] = []
        all_here = asyncio.Event()
        with serving(GreenTCP, Meet) as server:
            clients = [socket.create_connection(server.server_address) for _ in range(together)]
            for client in clients:
                assert client.recv(3) == b"met"
                client.close()
        assert len(loops) == 1

    @pytest.mark.parametrize(
        "kind", [portico.ThreadingTCPServer, portico.ThreadPoolTCPServer, GreenTCP]
    )
    def test_one_client_is_written_to_from_the_loop_of_another(self, kind: Any) -> None:
        members: list[tuple[asyncio.AbstractEventLoop, asyncio.StreamWriter]] = []

        class Chat(AsyncStreamRequestHandler):
            async def handle(self) -> None:
                members.append((asyncio.get_running_loop(), self.writer))
                self.writer.write(b"welcome\n")
                async for line in self.reader:
                    for loop, writer in members:
                        loop.call_soon_threadsafe(writer.write, line)

        with kind(("127.0.0.1", 0), Chat) as server:
            serving = Call(server.serve_forever)
            with connected(server) as one, connected(server) as other:
                files = [client.makefile("rb") for client in (one, other)]
                for file in files:
                    assert file.readline() == b"welcome\n"
                other.sendall(b"hello\n")
                for file in files:
                    assert file.readline() == b"hello\n"
                    file.close()
            server.shutdown()
            serving.result()

    @pytest.mark.parametrize("size", [0.0, PATIENCE])
    @pytest.mark.parametrize(
        "read",
        [FairReader.readline, lambda reader: reader.read(2), lambda reader: reader.readexactly(2)],
        ids=["readline", "read", "readexactly"],
    )
    def test_a_reader_that_is_full_lets_others_have_their_turn_in_time(
        self, monkeypatch: pytest.MonkeyPatch, read: Callable[[FairReader], Any], size: float
    ) -> None:
        """Not before its slice is over, whose size is set here."""
        monkeypatch.setattr(coroutines, "SLICE", size)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async def read_all() -> None:
            reader = FairReader()
            counting = asyncio.ensure_future(count())
            reader.feed_data(b"x\n" * 100)
            for _ in range(100):
                assert await read(reader) == b"x\n"
            counting.cancel()

        asyncio.run(read_all())
        assert turns == (0 if size else 100)

    @pytest.mark.parametrize("kind", [portico.ThreadingUDPServer, GreenUDP])
    def test_datagrams(self, kind: Any) -> None:
        class Shout(AsyncDatagramRequestHandler):
            async def handle(self) -> None:
                await asyncio.sleep(0)
                self.wfile.write(self.packet.upper())

        with kind(("127.0.0.1", 0), Shout) as server:
            loop = threading.Thread(target=server.serve_forever)
            loop.start()
            with socket.socket(type=socket.SOCK_DGRAM) as client:
                client.settimeout(PATIENCE)
                client.sendto(b"hello", server.server_address)
                assert client.recv(100) == b"HELLO"
            server.shutdown()
            loop.join()

    def test_setup_and_finish_may_be_coroutines_and_finish_always_runs(self) -> None:
        order: list[str] = []

        class Steps(AsyncRequestHandler):
            async def setup(self) -> None:
                order.append("setup")

            async def handle(self) -> None:
                order.append("handle")
                raise ConnectionResetError

            async def finish(self) -> None:
                await asyncio.sleep(0)
                order.append("finish")

        with pytest.raises(ConnectionResetError):
            Steps(None, None, None)
        assert order == ["setup", "handle", "finish"]


def test_a_coroutine_that_would_end_the_program_ends_its_handler_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """asyncio lets such an exception out of its loop, in which the other handlers run."""
    escaped: list[type[BaseException] | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: escaped.append(args.exc_type))

    async def leave() -> None:
        raise SystemExit(1)

    class Leaving(portico.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                if line == b"leave\n":
                    await_(leave())
                self.wfile.write(line)

    with serving(GreenTCP, Leaving) as server, connected(server) as other:
        assert ask(other, b"one\n") == b"one\n"
        with connected(server) as leaving:
            leaving.sendall(b"leave\n")
            assert leaving.recv(100) == b""
        assert ask(other, b"two\n") == b"two\n"
        with connected(server) as later:
            assert ask(later, b"three\n") == b"three\n"
    assert set(escaped) == {SystemExit}
