"""Run one server for one round: start it pinned, find its port, read its clock and its memory."""

import ctypes
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.machine import pinned

START_TIMEOUT = 20.0
"""Seconds for a server to print its port; an interpreter on a busy machine needs some of them."""


class ServerFailed(Exception):
    """A server ended, or said nothing, instead of printing its port."""


class Server:
    """A server program that prints its port when it listens; a context manager that kills it.

    It is killed rather than stopped: how a server ends is not what is measured.
    """

    def __init__(self, command: Sequence[str], core: int, environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by _end
        with pinned(core):
            self._process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        try:
            self.port = self._read_port()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def processor_seconds(self) -> float:
        """Return the processor time used so far, by threads that have ended as well.

        The same clock is read by the generators that are our own (see `measure.c`); this one
        serves the works whose load is a foreign program.
        """
        clock = ctypes.c_int()
        if ctypes.CDLL(None).clock_getcpuclockid(self.pid, ctypes.byref(clock)) != 0:
            raise ServerFailed(self._last_words())
        return time.clock_gettime(clock.value)

    def memory(self) -> int:
        """Return the bytes of memory in use: its own pages, and its share of the shared ones."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        raise ServerFailed(self._last_words())

    def _read_port(self) -> int:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT)
        line = self._process.stdout.readline() if ready else b""
        if not line.strip().isdigit():
            raise ServerFailed(self._last_words())
        return int(line)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "the server ended without a word"

    def _end(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
