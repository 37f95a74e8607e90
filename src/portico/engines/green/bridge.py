"""Wait for other things than the connection: the same words in every engine.

In a greenlet of the green engine they let the others run meanwhile.  In a thread, or in the
serial engine, they do what their names say with the thread itself.  So a handler does not know
its engine.  They are for sequential code: a coroutine that waits here would hold up its loop.
"""

from __future__ import annotations

import abc
import asyncio
import contextvars
import threading
import time
from collections.abc import Awaitable, Callable
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, ParamSpec, Self, TypeVar

from greenlet import getcurrent, greenlet

from portico.engines.green.hub import Alarm, Hub, running
from portico.errors import CoroutineError, SettingError

if TYPE_CHECKING:
    from asyncio import TimerHandle

JOIN: Final = ("Spawned.join", "await asyncio.to_thread(spawned.join)")
"""The name of the wait for what was spawned, and what a coroutine does in its place."""

P = ParamSpec("P")
_T = TypeVar("_T")


def to_thread(function: Callable[P, _T], /, *args: P.args, **kwargs: P.kwargs) -> _T:
    """Call a function that blocks; in the green engine, in a thread.

    The function sees the context variables of the caller.  Changes it makes to them in another
    thread are not seen here.

    Returns:
        What the function returned.

    Raises:
        BaseException: What the function raised.
        CoroutineError: It was called in a coroutine.
    """
    hub = hub_of_greenlet("to_thread", "await asyncio.to_thread(...)")
    if hub is None:
        return function(*args, **kwargs)
    context = contextvars.copy_context()
    return hub.run_in_thread(lambda: context.run(function, *args, **kwargs))


def await_(awaitable: Awaitable[_T]) -> _T:
    """Wait for a coroutine, task or future of asyncio.

    In the green engine it runs on the handler's hub, beside everything else; elsewhere, in an
    event loop of its own.

    Returns:
        Its result.

    Raises:
        BaseException: What it raised.
        CoroutineError: It was called in a coroutine.
    """
    try:
        hub = hub_of_greenlet("await_", "await")
    except CoroutineError:
        if asyncio.iscoroutine(awaitable):
            awaitable.close()  # or Python warns that nobody awaits it, which says less
        raise
    if hub is None:
        return asyncio.run(_wait_for(awaitable))
    return hub.wait_for(asyncio.ensure_future(awaitable, loop=hub))


def sleep(seconds: float) -> None:
    """Do nothing for some seconds; in the green engine, the others go on.

    Raises:
        SettingError: The seconds are negative, or not a number.
        CoroutineError: It was called in a coroutine.
    """
    if not seconds >= 0:  # so it is with NaN, for which every comparison is false
        raise SettingError("seconds", seconds, "0 or more")
    hub = hub_of_greenlet("sleep", "await asyncio.sleep(...)")
    if hub is None:
        _sleep_here(seconds)
    else:
        hub.sleep(seconds)


def spawn(function: Callable[P, _T], /, *args: P.args, **kwargs: P.kwargs) -> Spawned[_T]:
    """Run a function beside the handler: in a greenlet of its hub, or in a thread.

    It sees the context variables of the caller.  A coroutine may call it, too, as it does not wait.
    """
    hub = running()
    context = contextvars.copy_context()
    if hub is None:
        return _Thread(lambda: context.run(function, *args, **kwargs))
    return _Greenlet(hub, lambda: function(*args, **kwargs), context)


def timeout(seconds: float | None) -> Timeout:
    """Limit how long a block may take.

    For example::

        with portico.timeout(5):
            line = self.rfile.readline()

    When the time is over, the block ends with `TimeoutError`.  In the green engine, at once,
    whatever it waits for.  In a thread, at once if it waits in one of the functions of this
    module; a computation, or a system call such as a read from a socket, is not interrupted (a
    socket has `settimeout` for that), and the error comes when the block ends.

    A write to `wfile` that it ends is given up: what has not left yet leaves before what the
    handler writes next, and is dropped if that is nothing.  A `wfile` with a buffer of its own
    (`wbufsize`) still waits for the client when the handler ends.

    Args:
        seconds: How long; ``None`` for no limit.

    Raises:
        CoroutineError: The block is in a coroutine.
    """
    return Timeout(seconds)


class Spawned(abc.ABC, Generic[_T]):
    """A function that runs beside its caller."""

    def __init__(self) -> None:
        self._results: list[_T] = []
        self._error: BaseException | None = None

    @abc.abstractmethod
    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has ended.

        Args:
            timeout: Seconds to wait at most; ``None`` for no limit.

        Returns:
            Whether it has.

        Raises:
            CoroutineError: It was called in a coroutine.
        """

    def result(self, timeout: float | None = None) -> _T:
        """Wait for what the function returned.

        Args:
            timeout: Seconds to wait at most; ``None`` for no limit.

        Raises:
            BaseException: What the function raised.
            TimeoutError: It has not ended in time.
            CoroutineError: It was called in a coroutine.
        """
        if not self.join(timeout):
            raise TimeoutError("timed out")
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _call(self, function: Callable[[], _T]) -> None:
        """Call the function and keep how it ended for `result`."""
        try:
            self._results.append(function())
        except BaseException as error:  # it belongs to whoever asks for the result
            self._error = error


class _Thread(Spawned[_T]):
    """A function in a thread of its own."""

    def __init__(self, function: Callable[[], _T]) -> None:
        super().__init__()
        self._thread = threading.Thread(target=self._call, args=(function,))
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        hub_of_greenlet(*JOIN)
        deadline = inf if timeout is None else time.monotonic() + timeout
        self._thread.join(min(max(0.0, deadline - time.monotonic()), _remaining_here()))
        if self._thread.is_alive() and not _remaining_here():
            raise Interruption
        return not self._thread.is_alive()


class _Greenlet(Spawned[_T]):
    """A function in a greenlet of the caller's hub."""

    def __init__(self, hub: Hub, function: Callable[[], _T], context: contextvars.Context) -> None:
        super().__init__()
        self._hub = hub
        self._has_ended = False
        self._waiting: list[Callable[[], object]] = []
        self._lock = threading.Lock()  # guards _has_ended, _waiting
        hub.guests += 1
        spawned = greenlet(lambda: self._run(function), hub.greenlet)
        spawned.gr_context = context
        hub.run_soon(spawned)

    def join(self, timeout: float | None = None) -> bool:
        hub = hub_of_greenlet(*JOIN)
        if hub is not None:
            alarm = Alarm(hub)
            self._tell(lambda: hub.call_anywhere(alarm.ring))
            timer = None if timeout is None else hub.call_later(timeout, alarm.ring)
            try:
                alarm.wait()
            finally:
                if timer is not None:
                    timer.cancel()
        else:
            ended = threading.Event()
            self._tell(ended.set)
            ended.wait(timeout)
        return self._has_ended

    def _run(self, function: Callable[[], _T]) -> None:
        self._call(function)
        hub = self._hub
        if hub.unsent:
            hub.send_unsent()
        with self._lock:
            self._has_ended = True
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()
        hub.guests -= 1
        if not hub.guests:
            hub.call_soon(hub.on_guest_left)

    def _tell(self, wake: Callable[[], object]) -> None:
        """Call back when it ends, or now if it has."""
        with self._lock:
            if not self._has_ended:
                self._waiting.append(wake)
                return
        wake()


class Timeout:
    """The context manager that `timeout` returns.

    It interrupts by an error that is no `Exception`, so that ``except Exception`` in the block
    does not stop it, and turns it into `TimeoutError` at the block's end.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timer: TimerHandle | None = None
        self._interrupts = False
        self._outer = inf
        self._deadline = inf

    def __enter__(self) -> Self:
        hub = hub_of_greenlet("timeout", "async with asyncio.timeout(...)")
        if self._seconds is None:
            return self
        if hub is not None:
            self._timer = hub.call_later(self._seconds, self._interrupt_greenlet, getcurrent())
            return self
        self._outer = _here.deadline
        self._deadline = time.monotonic() + self._seconds
        _here.deadline = min(self._outer, self._deadline)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._seconds is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        else:
            _here.deadline = self._outer
        is_over = self._interrupts or time.monotonic() >= self._deadline
        if is_over and (error is None or isinstance(error, Interruption)):
            raise TimeoutError("timed out") from None

    def _interrupt_greenlet(self, waiting: greenlet) -> None:
        self._interrupts = True
        waiting.throw(Interruption(self))


class Interruption(BaseException):
    """Ends a block whose time is over; the `timeout` around it makes it a `TimeoutError`."""


class _Here(threading.local):
    """What the calling thread may still wait for, where there is no hub."""

    deadline: float = inf


_here = _Here()


def hub_of_greenlet(name: str, expected: str) -> Hub | None:
    """Return the hub on which the caller waits by switching; ``None`` in a thread without one.

    Args:
        name: Of the function that would wait.
        expected: What a coroutine would use in its place.

    Raises:
        CoroutineError: The caller is a task, or a callback of the hub.
    """
    hub = running()
    if hub is None:
        if asyncio._get_running_loop() is None or asyncio.current_task() is None:
            return None
    elif not hub.is_current():
        return hub
    raise CoroutineError(name, expected)


async def _wait_for(awaitable: Awaitable[_T]) -> _T:
    """Wait no longer than the `timeout` around the caller allows."""
    remaining = _remaining_here()
    return await asyncio.wait_for(
        awaitable, None if remaining >= threading.TIMEOUT_MAX else remaining
    )


def _sleep_here(seconds: float) -> None:
    """Sleep, no longer than the `timeout` around the caller allows."""
    remaining = _remaining_here()
    time.sleep(min(seconds, remaining))
    if remaining < seconds:
        raise Interruption


def _remaining_here() -> float:
    """Return the seconds that the `timeout` around the caller leaves to a thread."""
    return min(max(0.0, _here.deadline - time.monotonic()), threading.TIMEOUT_MAX)
