"""Say whether a thread waits for bytes of one connection or goes on, without asking the thread.

Owns what Linux shows of a blocked thread.  Everywhere else, and where it is not shown, the answer
is that nobody knows.

Source: proc_pid_status(5); proc_pid_syscall(5): the number of the system call in which a thread is
blocked and its arguments, or ``running``; poll(2) for `struct pollfd`.  The numbers are those of
the kernel's asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import os
import platform
import select
import sys
from collections.abc import Mapping
from struct import Struct, error
from typing import Final, NamedTuple

POLLFD: Final = Struct("=ihh")
"""`struct pollfd`: descriptor, what is waited for, what happened."""


class Calls(NamedTuple):
    """The numbers of system calls on one architecture."""

    reads: frozenset[int]
    """read, readv, recvfrom, recvmsg, recvmmsg: their first argument is the descriptor."""
    writes: frozenset[int]
    """write, writev, sendto, sendmsg, sendmmsg, sendfile: as above."""
    polls: frozenset[int]
    """poll, ppoll: a socket with a timeout waits in it first, and its first argument points to
    one `struct pollfd`.  And restart_syscall, as which poll goes on after a stop of the process."""


CALLS: Final[Mapping[str, Calls]] = {
    "x86_64": Calls(
        reads=frozenset({0, 19, 45, 47, 299}),
        writes=frozenset({1, 20, 44, 46, 307, 40}),
        polls=frozenset({7, 271, 219}),
    ),
    "aarch64": Calls(
        reads=frozenset({63, 65, 207, 212, 243}),
        writes=frozenset({64, 66, 206, 211, 269, 71}),
        polls=frozenset({73, 128}),
    ),
}
"""By the name that uname(2) gives the machine."""

_calls: Final = (
    CALLS.get(platform.machine()) if sys.platform == "linux" and sys.maxsize > 2**32 else None
)
"""Those of this process; a program of 32 bits has numbers of its own."""


def thread_waits_in_read(native_thread_id: int, fd: int) -> bool | None:
    """Say whether a thread of this process is blocked until bytes come in over `fd`.

    Callable from any thread.  About fifteen microseconds, so it is for a look, not for a loop.  It
    is true of the moment of asking; the thread may have gone on since.

    Args:
        native_thread_id: What `threading.get_native_id` returned in that thread.
        fd: The descriptor of the connection.

    Returns:
        True when it waits for this descriptor to become readable, in a read or, as a socket with
        a timeout does, in poll(2).  False when it runs, or waits for anything else, the
        interpreter lock included.  ``None`` when nobody knows: no such thread, no /proc, no
        permission, another architecture.
    """
    return None if _calls is None else _waits(native_thread_id, fd, _calls.reads, select.POLLIN)


def thread_waits_in_write(native_thread_id: int, fd: int) -> bool | None:
    """Say whether a thread of this process is blocked until its peer takes bytes from `fd`.

    As `thread_waits_in_read` in every other respect.
    """
    return None if _calls is None else _waits(native_thread_id, fd, _calls.writes, select.POLLOUT)


def thread_activity(native_thread_id: int) -> int | None:
    """Return a number that grows when a thread of this process goes on after a wait.

    It is how often the thread was taken from a processor: while it is blocked, the number stays.
    Callable from any thread.  About thirty microseconds.

    Args:
        native_thread_id: As for `thread_waits_in_read`.

    Returns:
        The number; ``None`` when nobody knows: no such thread, no /proc.
    """
    try:
        with open(f"/proc/self/task/{native_thread_id}/status", "rb", buffering=0) as shown:  # noqa: PTH123
            _, marker, switches = shown.read(8192).partition(b"\nvoluntary_ctxt_switches:")
    except OSError:
        return None
    # Between the number of the voluntary ones and that of the others stands a name.
    numbers = [int(word) for word in switches.split() if word.isdigit()]
    return sum(numbers) if marker and numbers else None


def _waits(native_thread_id: int, fd: int, calls: frozenset[int], event: int) -> bool | None:
    """Say whether a thread is in one of these system calls, or polls for this event."""
    assert _calls is not None
    state = _state(native_thread_id)
    if state is None:
        return None
    try:
        number, first, second = int(state[0]), int(state[1], 16), int(state[2], 16)
    except (IndexError, ValueError):  # "running"; or "-1" and two pointers: in no system call
        return False
    if number in calls:
        return first == fd
    return number in _calls.polls and _polls(first, second, fd, event)


def _state(native_thread_id: int) -> list[str] | None:
    """Return the words that the kernel shows of a thread."""
    try:
        with open(f"/proc/self/task/{native_thread_id}/syscall", "rb", buffering=0) as shown:  # noqa: PTH123
            return shown.read(256).decode("ascii").split()
    except OSError:
        return None


def _polls(address: int, count: int, fd: int, event: int) -> bool:
    """Say whether the `struct pollfd` at this address waits for `fd` alone, and for this event.

    The thread may have left its frame meanwhile.  So its memory is read as a file, which fails
    where a pointer would crash.
    """
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            waiting = os.pread(memory, POLLFD.size, address)
        finally:
            os.close(memory)
        descriptor, events, _ = POLLFD.unpack(waiting)
    except (OSError, OverflowError, error):  # not there, not an address, not all of it there
        return False
    return count == 1 and descriptor == fd and bool(events & event)
