"""Compile the load generators and the servers that are not Python, when their source is newer."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE / ".build"
MEASURE = (HERE / "generators" / "measure.c", HERE / "generators" / "measure.h")


class MissingProgram(Exception):
    """A program that a benchmark needs is not installed."""


def find_program(name: str) -> str:
    """Return the path of an installed program.

    Raises:
        MissingProgram: It is not on the path.
    """
    path = shutil.which(name)
    if path is None:
        raise MissingProgram(f"{name} is not installed")
    return path


def generator(name: str) -> str:
    """Return the compiled load generator `name`."""
    return _compile_c(name, HERE / "generators" / f"{name}.c", *MEASURE)


def c_server(name: str) -> str:
    """Return the compiled server `name`, written in C."""
    return _compile_c(name, HERE / "servers" / f"{name}.c")


def go_server(name: str) -> str:
    """Return the compiled server `name`, written in Go."""
    source = HERE / "servers" / f"{name}.go"
    command = [find_program("go"), "build", "-o", str(BUILD / name), str(source)]
    return _build(BUILD / name, [source], command)


def _compile_c(name: str, *sources: Path) -> str:
    programs = [str(source) for source in sources if source.suffix == ".c"]
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]
    command = [find_program("cc"), *options, "-o", str(BUILD / name), *programs, "-lm"]
    return _build(BUILD / name, sources, command)


def _build(result: Path, sources: Sequence[Path], command: list[str]) -> str:
    newest = max(source.stat().st_mtime for source in sources)
    if not result.exists() or result.stat().st_mtime < newest:
        result.parent.mkdir(exist_ok=True)
        subprocess.run(command, check=True)
    return str(result)
