"""Choose the cores that servers and loads run on, and describe the machine for the record."""

import json
import os
import platform
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("portico", "greenlet", "gevent", "uvloop")
PROGRAMS = {
    "C compiler": ("cc", "--version"),
    "Go": ("go", "version"),
    "Redis": ("redis-server", "--version"),
    "wrk": ("wrk", "--version"),
}


@dataclass(frozen=True)
class Cores:
    """Where servers run and where the load does; the same core when there is only one."""

    server: int
    load: int

    @property
    def are_shared(self) -> bool:
        return self.server == self.load


def choose_cores() -> Cores:
    """Take the first two cores that this process may use."""
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[0], usable[min(1, len(usable) - 1)])


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep to one core for a while; what is started meanwhile inherits it.

    A program that is pinned only once it runs may have threads elsewhere by then, as Go's has.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors to the hard one, for what is started too; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def describe(python: str) -> dict[str, str]:
    """Say what the figures were measured on: the machine, the versions and the commit."""
    return {
        "machine": f"{os.cpu_count()} cores of {_processor()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": _commit(),
        **_python_versions(python),
        **_program_versions(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    except FileNotFoundError:
        return None
    return next((line.strip() for line in done.stdout.splitlines()), None)


def _commit() -> str:
    commit = _first_line("git", "describe", "--always", "--dirty=, with changes", "--abbrev=12")
    return commit or "none"


def _python_versions(python: str) -> dict[str, str]:
    question = (
        "import importlib.metadata as m, json, platform\n"
        "versions = {'Python': platform.python_version()}\n"
        f"for name in {PACKAGES!r}:\n"
        "    try: versions[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(versions))"
    )
    done = subprocess.run([python, "-c", question], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def _program_versions() -> dict[str, str]:
    found = {name: _first_line(*command) for name, command in PROGRAMS.items()}
    return {name: line for name, line in found.items() if line is not None}
