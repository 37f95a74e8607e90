"""Run the test-suite on every supported Python of this machine, side by side.

The interpreter of `.venv` runs it on the sources.  Every other version gets an environment under
.venvs/ with the built wheel in it, so that what is shipped is tried, too; on a machine with one
Python only, that one runs it on the wheel as well.  The newest measures coverage.

    python -m tools.suites [pytest's arguments]
"""

import os
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools import interpreters
from tools.interpreters import ROOT, Interpreter

MEASURABLE = (3, 12)
"""The oldest Python on which coverage is measured.

On 3.11 a traced function in which the main thread clears up after a thread that had greenlets may
never end: its loop looks for pending calls before its first instruction, again and again, as long
as another such thread waits to be cleared up.
"""

REMARKABLE = ("FAILED ", "ERROR ", "RERUN ")
"""How the lines of pytest's summary begin that are said again when all suites have ended."""

_printing = threading.Lock()  # guards the output, of which each suite writes whole lines


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the tests ended on one Python."""

    has_passed: bool
    remarks: list[str]
    """Lines of the summary: what failed, and what passed in its second run only."""


@dataclass(frozen=True, slots=True)
class Suite:
    """The tests on one Python."""

    name: str
    """What its lines begin with, such as ``3.12``."""
    part: tuple[str, ...]
    """Arguments for pytest that say which part of the tests it is; empty for all."""
    python: Path
    """The interpreter of an environment with portico and the tools of the tests in it."""
    is_measured: bool
    """Whether coverage is measured."""

    def run(self, arguments: list[str]) -> Outcome:
        """Run pytest, and say how it ended."""
        remarks = []
        measure = ("-m", "coverage", "run") if self.is_measured else ()
        with subprocess.Popen(
            [self.python, *measure, "-m", "pytest", *self.part, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as pytest:
            assert pytest.stdout is not None
            for line in pytest.stdout:
                with _printing:
                    print(f"{self.name}: {line}", end="", flush=True)
                if line.startswith(REMARKABLE):
                    remarks.append(f"{self.name}: {line}")
        return Outcome(pytest.returncode == 0, remarks)


WHOLE: dict[str, tuple[str, ...]] = {"": ()}

HALVES = {"": ("--ignore=tests/scenarios",), " scenarios": ("tests/scenarios",)}
"""Two parts, by what stands behind the version in their lines.

Measured, all tests in a row would take much longer than on the other Pythons.
"""


def prepare(wheel: Path, interpreter: Interpreter) -> Path:
    """Make an environment with the wheel in it; return its interpreter."""
    environment = ROOT / ".venvs" / interpreter.name
    tool = (ROOT / "tools" / "environment.py", environment, ROOT / "requirements" / "test.txt")
    subprocess.run([interpreter.executable, *tool, wheel], check=True)
    return environment / "bin" / "python"


def plan(found: list[Interpreter], wheel: Path) -> list[Suite]:
    """Return a suite for each interpreter, their environments made."""
    here = sysconfig.get_python_version()
    newest = max(interpreter.version for interpreter in found)
    measured = newest if newest >= MEASURABLE else None
    suites = []
    for interpreter in found:
        is_measured = interpreter.version == measured
        parts = HALVES if is_measured else WHOLE
        if interpreter.name == here:
            python = Path(sys.executable)
            suites += [
                Suite(f"{here} sources{label}", part, python, is_measured)
                for label, part in parts.items()
            ]
        if interpreter.name != here:
            python = prepare(wheel, interpreter)
            suites += [
                Suite(f"{interpreter.name}{label}", part, python, is_measured)
                for label, part in parts.items()
            ]
        elif len(found) == 1:
            python = prepare(wheel, interpreter)
            suites.append(Suite(interpreter.name, (), python, is_measured=False))
    return suites


def report_coverage() -> bool:
    """Print what the tests have not reached; say whether it is little enough."""
    steps = (("combine", "--quiet"), ("report",))
    return all(
        subprocess.run([sys.executable, "-m", "coverage", *step], cwd=ROOT, check=False).returncode
        == 0
        for step in steps
    )


def main(arguments: list[str]) -> int:
    """Run the suite on each interpreter; fail when one of them fails, or too little is reached."""
    (wheel,) = (ROOT / "dist").glob("portico-*.whl")
    found = interpreters.find_all()
    suites = plan(found, wheel)
    subprocess.run([sys.executable, "-m", "coverage", "erase"], cwd=ROOT, check=True)
    # More than there are processors: a test waits for most of its time.
    with ThreadPoolExecutor((os.cpu_count() or 1) + 2) as runs:
        outcomes = list(runs.map(lambda suite: suite.run(arguments), suites))
    failed = [
        suite.name
        for suite, outcome in zip(suites, outcomes, strict=True)
        if not outcome.has_passed
    ]
    on_machine = {interpreter.version for interpreter in found}
    for major, minor in interpreters.supported_versions():
        if (major, minor) not in on_machine:
            print(f"Python {major}.{minor} is not on this machine: nothing was run on it")
    # Among the lines of all suites they would be far from the end.
    print(*(remark for outcome in outcomes for remark in outcome.remarks), sep="", end="")
    if failed:
        print(f"the suite failed on Python {', '.join(failed)}", file=sys.stderr)
        return 1
    if not any(suite.is_measured for suite in suites):
        print("no coverage: it is measured on Python {}.{} or newer".format(*MEASURABLE))
        return 0
    return 0 if report_coverage() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
