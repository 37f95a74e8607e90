"""Make or refresh a virtual environment with pinned requirements and portico in it.

What is in place already is left alone: each step remembers, in a stamp inside the environment,
a digest of what it installed.  Two of these at once on one environment wait for each other.

    python tools/environment.py .venv requirements/dev.txt                  # portico editable
    python tools/environment.py .venvs/3.12 requirements/test.txt dist/portico-….whl
"""

# Runs on whatever `python3` is, so that one which is too old is told so in a sentence.
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

OLDEST = (3, 11)
"""The oldest Python that portico runs on; `requires-python` in pyproject.toml says the same."""


def prepare(environment: Path, requirements: Path, wheel: Path | None = None) -> None:
    """Bring an environment of the running Python up to date.

    Args:
        environment: Its folder; made when it is missing or belongs to another Python.
        requirements: A file of pinned requirements.
        wheel: The portico to install.  Without one, this checkout is installed editable.
    """
    options = "-m pip --disable-pip-version-check install --quiet --quiet"
    pip = [str(environment / "bin" / "python"), *options.split()]

    def create() -> None:
        print(f"making {_shown(environment)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)

    def install_requirements() -> None:
        print(f"installing {_shown(requirements)} in {_shown(environment)}", flush=True)
        subprocess.run([*pip, "--requirement", str(requirements)], check=True)

    def install_project() -> None:
        # hatchling is among the pinned requirements, so nothing else is fetched for the build.
        editable = ["--no-build-isolation", "--editable", str(ROOT)]
        what = ["--force-reinstall", str(wheel)] if wheel else editable
        subprocess.run([*pip, "--no-deps", *what], check=True)

    with _locked(environment):
        interpreter = f"{sys.version}\n{Path(sys.executable).resolve()}"
        _once(environment / "interpreter.stamp", interpreter.encode(), create)
        _once(
            environment / f"{requirements.stem}.stamp",
            requirements.read_bytes(),
            install_requirements,
        )
        # An editable install follows the sources by itself; only its metadata, the version
        # included, is a copy.
        metadata = [ROOT / "pyproject.toml", ROOT / "src" / "portico" / "__init__.py"]
        project = b"".join(file.read_bytes() for file in ([wheel] if wheel else metadata))
        _once(environment / "project.stamp", project, install_project)


def _once(stamp: Path, content: bytes, action: Callable[[], None]) -> None:
    """Run an action unless the stamp says that it has run for this content."""
    digest = hashlib.sha256(content).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    action()
    stamp.write_text(digest)


@contextlib.contextmanager
def _locked(environment: Path) -> Iterator[None]:
    """Hold the environment for ourselves; a second `make` waits here."""
    environment.parent.mkdir(parents=True, exist_ok=True)
    lock = environment.with_name(f"{environment.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _shown(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def main(arguments: list[str]) -> int:
    """Prepare the environment that the command line names."""
    if sys.version_info < OLDEST:
        oldest, this = (".".join(map(str, version[:2])) for version in (OLDEST, sys.version_info))
        print(
            f"portico needs Python {oldest} or newer and {sys.executable} is {this}; "
            "name another one: make PYTHON=…",
            file=sys.stderr,
        )
        return 1
    environment, requirements, *wheel = (Path(argument).resolve() for argument in arguments)
    try:
        prepare(environment, requirements, *wheel)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
