"""Find an interpreter of every supported version of Python on this machine.

Looks on PATH, then among pyenv's versions.  A candidate counts when it runs, is the version that
its name says, and can make virtual environments; a pyenv shim without a version behind it does
not.  One that carries CPython's test package is preferred, because the compat tests need it.

    python tools/interpreters.py             # one line each: version, path
    python tools/interpreters.py 3.12        # the path alone, or exit status 1
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import importlib.util, sys
if not all(importlib.util.find_spec(name) for name in ("ensurepip", "venv")):
    raise SystemExit("cannot make virtual environments")
suite = importlib.util.find_spec("test.test_socketserver") is not None
print(*sys.version_info[:2], int(suite), sys.executable)
"""

PROBE_TIMEOUT = 30
"""Seconds for a candidate to answer; a healthy one takes a fraction of the first."""


@dataclass(frozen=True, order=True, slots=True)
class Interpreter:
    """A Python that runs."""

    version: tuple[int, int]
    """Major and minor."""
    executable: Path
    """Where it says that it is, behind any shim."""
    has_test_package: bool
    """Whether CPython's own tests are installed with it."""

    @property
    def name(self) -> str:
        """The version as people write it, such as ``3.12``."""
        major, minor = self.version
        return f"{major}.{minor}"


def supported_versions() -> list[tuple[int, int]]:
    """Return the versions that the project's classifiers name, oldest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pattern = re.compile(r"Programming Language :: Python :: (\d+)\.(\d+)")
    found = (pattern.fullmatch(classifier) for classifier in project["classifiers"])
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def find(version: tuple[int, int]) -> Interpreter | None:
    """Return the best interpreter of a version, or None when there is none."""
    usable = [found for path in _candidates(version) if (found := _probe(path, version))]
    # max() keeps the first among equals, so PATH goes before pyenv.
    return max(usable, key=lambda found: found.has_test_package, default=None)


def find_all() -> list[Interpreter]:
    """Return one interpreter for each supported version found, oldest first."""
    return [found for version in supported_versions() if (found := find(version))]


def _candidates(version: tuple[int, int]) -> Iterator[Path]:
    """Yield the paths where an interpreter of this version may be, in order of preference."""
    major, minor = version
    name = f"python{major}.{minor}"
    for folder in map(Path, os.get_exec_path()):
        if os.access(folder / name, os.X_OK):
            yield folder / name
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    # By the patch release as a number: 3.11.10 is newer than 3.11.7.
    patches = {
        int(patch): folder
        for folder in pyenv.glob(f"versions/{major}.{minor}.*")
        if (patch := folder.name.rpartition(".")[2]).isdigit()
    }
    for _, folder in sorted(patches.items(), reverse=True):
        yield folder / "bin" / name


def _probe(path: Path, version: tuple[int, int]) -> Interpreter | None:
    """Run a candidate and return what it says of itself, or None when it is of no use."""
    try:
        answer = subprocess.run(
            [path, "-I", "-c", PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    major, minor, suite, executable = answer.stdout.rstrip("\n").split(" ", 3)
    if (int(major), int(minor)) != version:
        return None
    return Interpreter(version, Path(executable), has_test_package=suite == "1")


def main(arguments: list[str]) -> int:
    """Print the interpreters of the versions asked for, or of every supported one."""
    if not arguments:
        for interpreter in find_all():
            print(interpreter.name, interpreter.executable)
        return 0
    for argument in arguments:
        major, _, minor = argument.partition(".")
        found = find((int(major), int(minor)))
        if found is None:
            print(f"no Python {argument} found on PATH or under pyenv", file=sys.stderr)
            return 1
        print(found.executable)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
