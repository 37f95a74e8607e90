"""Put a load on a server and return what came of it."""

import csv
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import pinned
from benchmarks.process import Server
from benchmarks.toolchain import HERE, find_program, generator

GRACE = 60.0
"""Seconds a load may take beyond the time asked for, to connect and to report."""

REDIS_REQUESTS_A_SECOND = 10_000
"""Requests of each command for a second of load: `redis-benchmark` counts, and has no clock."""


class LoadFailed(Exception):
    """A server did not do what the work asks for."""


@dataclass(frozen=True)
class Load:
    """What a load saw.

    Attributes:
        messages: Messages, connections or requests that were answered.
        failures: Those that were not, or not rightly.
        seconds: How long it counted.
        processor_seconds: What the server used of its core while it counted.
        p50: Seconds from question to answer: half of the answers came sooner.
        p99: As above, for 99 of 100 answers.
        p999: As above, for 999 of 1000; ``None`` where the generator does not say.
    """

    messages: int
    failures: int
    seconds: float
    processor_seconds: float
    p50: float
    p99: float
    p999: float | None

    @property
    def cost(self) -> float:
        """Seconds of processor time that the server used for a message.

        Raises:
            LoadFailed: Nothing was answered.
        """
        if self.messages == 0:
            raise LoadFailed(f"nothing was answered, {self.failures} attempts failed")
        return self.processor_seconds / self.messages


def send_messages(
    server: Server, core: int, connections: int, size: int, line_size: int, seconds: float
) -> Load:
    """Keep one message of `size` bytes, cut into lines, under way on each connection."""
    sizes = (connections, size, line_size)
    return _generate(core, "messages", server.port, *sizes, seconds, server.pid)


def open_connections(server: Server, core: int, concurrency: int, seconds: float) -> Load:
    """Connect, send 64 bytes, read the echo and close, `concurrency` at once."""
    return _generate(core, "connections", server.port, concurrency, seconds, server.pid)


def send_datagrams(server: Server, core: int, sockets: int, size: int, seconds: float) -> Load:
    """Keep one datagram of `size` bytes under way on each socket."""
    return _generate(core, "datagrams", server.port, sockets, size, seconds, server.pid)


@contextmanager
def held_connections(server: Server, core: int, connections: int) -> Iterator[None]:
    """Hold connections that were answered once and are idle now."""
    command = [generator("hold"), str(server.port), str(connections)]
    with pinned(core):
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            raise LoadFailed(f"{connections} connections could not be held")
        yield


def request_pages(server: Server, core: int, connections: int, seconds: float) -> Load:
    """Request one page again and again on each connection, with `wrk`."""
    began = server.processor_seconds()
    script = str(HERE / "generators" / "wrk.lua")
    # wrk takes whole seconds.
    length = str(max(1, round(seconds)))
    options = ["--threads", "1", "--connections", str(connections), "--duration", length]
    command = [find_program("wrk"), *options, "--script", script]
    output = _run(core, [*command, f"http://127.0.0.1:{server.port}/"], seconds)
    result = json.loads(output.splitlines()[-1])
    return Load(**result, processor_seconds=server.processor_seconds() - began)


def send_commands(
    server: Server, core: int, connections: int, pipelined: int, seconds: float
) -> Load:
    """Send SET and then GET to a server that speaks Redis's protocol, with `redis-benchmark`."""
    began = server.processor_seconds()
    requests = int(REDIS_REQUESTS_A_SECOND * seconds)
    options = {"-p": server.port, "-c": connections, "-n": requests, "-P": pipelined}
    arguments = [str(part) for option in options.items() for part in option]
    command = [find_program("redis-benchmark"), *arguments, "-t", "set,get", "--csv"]
    output = _run(core, command, seconds)
    used = server.processor_seconds() - began
    return read_redis_benchmark(output, requests, used)


def read_redis_benchmark(output: str, requests: int, processor_seconds: float) -> Load:
    """Read the table that `redis-benchmark --csv` prints: one row for each command.

    The commands run one after the other, so their times add up; of the latencies, those of the
    slower command are kept.
    """
    rows = list(csv.DictReader(output.splitlines()))
    if not rows:
        raise LoadFailed(f"redis-benchmark printed no table: {output!r}")
    return Load(
        messages=requests * len(rows),
        failures=0,
        seconds=sum(requests / float(row["rps"]) for row in rows),
        processor_seconds=processor_seconds,
        p50=max(float(row["p50_latency_ms"]) for row in rows) / 1000,
        p99=max(float(row["p99_latency_ms"]) for row in rows) / 1000,
        p999=None,
    )


def _generate(core: int, name: str, *arguments: float) -> Load:
    *_, seconds, _ = arguments
    command = [generator(name), *map(str, arguments)]
    return Load(**json.loads(_run(core, command, seconds)))


def _run(core: int, command: Sequence[str], seconds: float) -> str:
    name = Path(command[0]).name
    try:
        with pinned(core):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + GRACE, check=False
            )
    except subprocess.TimeoutExpired as expired:
        raise LoadFailed(f"{name}: no end after {expired.timeout:g} s") from expired
    if done.returncode != 0:
        raise LoadFailed(f"{name}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
