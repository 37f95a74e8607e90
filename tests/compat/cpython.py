"""Run CPython's own tests, with portico in place of `socketserver`, and compare.

Owns how one suite is run in one interpreter, what came of each of its tests, and what counts as
a regression: a test that passes on the standard library's module and not on portico.  A test
that differs is run again alone, on both, before it counts.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from threading import Lock
from typing import Final, TypeAlias

import portico

SUITES: Final = (
    "test_logging",  # the slowest first
    "test_docxmlrpc",
    "test_httpservers",
    "test_xmlrpc",
    "test_socketserver",
    "test_wsgiref",
)
"""CPython's tests of everything that stands on `socketserver`."""

MODULE_NAME: Final = (
    "compares the `__module__` of each class with 'socketserver'; portico's classes say where they"
    " are defined, so that pickles, `inspect` and type hints find them"
)

TOLERATED: Final = {
    "threads": {"test.test_socketserver.MiscTestCase.test_all": MODULE_NAME},
    "pool": {"test.test_socketserver.MiscTestCase.test_all": MODULE_NAME},
    "green": {"test.test_socketserver.MiscTestCase.test_all": MODULE_NAME},
}
"""For each engine that the suites run on, the tests that may fail, each with the reason."""

NEEDS: Final = {"green": "greenlet"}
"""What an engine needs beside the standard library; interpreters get the version of this one."""

SUITE_TIMEOUT: Final = 240.0
"""Seconds for one suite; the slowest, test_logging, takes 15 on an idle machine."""

RETRIES: Final = 3
"""How often a test that differs is run again, alone, before it counts."""

MOST_RETRIED: Final = 8
"""Tests of a suite that are run again at the most; when more differ, it is no coincidence."""


class Outcome(StrEnum):
    """What came of a test."""

    PASSED = "passed"
    SKIPPED = "skipped"
    FAILED = "failed"
    MISSING = "missing"


Outcomes: TypeAlias = Mapping[str, Outcome]
"""For each test, by the id that ``unittest`` gives it."""


class SuiteError(Exception):
    """A suite came to no result."""


@dataclass(frozen=True)
class Python:
    """An interpreter to run suites in."""

    name: str
    """The version as people write it, such as ``3.12``."""
    command: tuple[str, ...]
    """What starts it."""
    root: Path = Path("/")
    """What it takes for the root of the file system."""


class Laboratory:
    """A folder with a copy of portico, where interpreters find that and nothing else of ours."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._installing = Lock()  # guards the folders of packages while they are filled
        shutil.copytree(
            Path(portico.__path__[0]),
            folder / "site" / "portico",
            ignore=shutil.ignore_patterns("__pycache__"),
        )

    def run(
        self, python: Python, suite: str, engine: str | None, tests: Sequence[str] = ()
    ) -> Outcomes:
        """Run a suite, or some of its tests.

        Args:
            python: The interpreter to run it in.
            suite: The name of a module of CPython's test package.
            engine: What stands behind ``ThreadingMixIn``; ``None`` leaves the standard library's
                module in its place.
            tests: Ids of the tests to run; all when there is none.

        Raises:
            SuiteError: It did not come to an end.
        """
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=f"{suite}-") as name:
            folder = Path(name)
            report = folder / "report.xml"
            command = [*python.command, *_swapped(engine), "-m", "test"]
            command += ["--use", "network", "--verbose", "--timeout", str(SUITE_TIMEOUT / 2)]
            command += ["--junit-xml", _seen_from(python.root, report), suite]
            for test in tests:
                command += ["--match", test]
            log = _run(command, self._environment(python, engine, folder), folder)
            if not report.exists():
                raise SuiteError(f"{' '.join(command)}\n{log}")
            return read_report(report.read_text())

    def _environment(self, python: Python, engine: str | None, folder: Path) -> dict[str, str]:
        """Keep what this process's own tools have set away from the interpreter."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        found = [self._folder / "site"]
        if engine in NEEDS:
            found.append(self._installed(NEEDS[engine], python.name))
        path = os.pathsep.join(_seen_from(python.root, each) for each in found)
        return kept | {"PYTHONPATH": path, "TMPDIR": _seen_from(python.root, folder)}

    def _installed(self, distribution: str, version: str) -> Path:
        """Return a folder with a distribution for a version of Python, filled once."""
        folder = self._folder / f"{distribution}-{version}"
        wanted = f"{distribution}=={importlib.metadata.version(distribution)}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", wanted]
        command += ["--target", str(folder), "--python-version", version]
        command += ["--only-binary", ":all:", "--disable-pip-version-check"]
        with self._installing:
            if not folder.exists():
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise SuiteError(f"{' '.join(command)}\n{done.stderr}")
        return folder


def _swapped(engine: str | None) -> tuple[str, ...]:
    return () if engine is None else ("-m", "portico.swap", "--engine", engine)


def _seen_from(root: Path, path: Path) -> str:
    return f"/{path.resolve().relative_to(root.resolve())}"


def _run(command: Sequence[str], environment: dict[str, str], folder: Path) -> str:
    """Run a command and all that it starts to the end, and return what they said."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(SUITE_TIMEOUT)
        except subprocess.TimeoutExpired:
            pass  # the missing report tells, and the output says where it hung
        finally:
            with contextlib.suppress(ProcessLookupError):  # nobody is left of the session
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return output.read()[-20_000:]


def read_report(report: str) -> Outcomes:
    """Read what came of each test from a JUnit report, as regrtest writes it."""
    outcomes: dict[str, Outcome] = {}
    for case in ET.fromstring(report).iter("testcase"):
        if "name" not in case.attrib:  # an empty one, which stands there when others have failed
            continue
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            outcome = Outcome.FAILED
        elif "skipped" in kinds or case.get("result") == "skipped":
            outcome = Outcome.SKIPPED
        else:
            outcome = Outcome.PASSED
        name = case.attrib["name"]
        # A test with subtests may be there more than once: the worst counts.
        if outcomes.get(name) is not Outcome.FAILED:
            outcomes[name] = outcome
    return outcomes


def differences(expected: Outcomes, seen: Outcomes) -> dict[str, Outcome]:
    """Return the tests that are expected to pass and do not, with what came of them."""
    return {
        test: seen.get(test, Outcome.MISSING)
        for test, outcome in expected.items()
        if outcome is Outcome.PASSED and seen.get(test) is not Outcome.PASSED
    }


def uncertain(expected: Outcomes, seen: Outcomes) -> list[str]:
    """Return the tests that failed on both: each on its own account, or both on the machine's."""
    return [
        test
        for test, outcome in expected.items()
        if outcome is Outcome.FAILED and seen.get(test) is not Outcome.PASSED
    ]


@dataclass(frozen=True)
class Verdict:
    """What a comparison came to."""

    passed: int
    """Tests that pass on both."""
    regressions: Mapping[str, Outcome]
    """Tests that pass on the standard library's module and not on portico."""
    tolerated: Sequence[str]
    """Tests that do, and may."""
    unsteady: Sequence[str]
    """Tests that differed, and did not when run again alone."""

    def __str__(self) -> str:
        lists = {name: getattr(self, name) for name in ("tolerated", "unsteady", "regressions")}
        named = (f"{name}: {', '.join(tests)}" for name, tests in lists.items() if tests)
        return "; ".join([f"{self.passed} passed", *named])


def judge(
    expected: Outcomes,
    seen: Outcomes,
    again: Callable[[str], tuple[Outcomes, Outcomes]],
    may_fail: Collection[str] = (),
) -> Verdict:
    """Compare two runs of a suite.

    Args:
        expected: On the standard library's module.
        seen: On portico.
        again: Runs one test alone, on the standard library's module and on portico.
        may_fail: The tests that are tolerated.
    """
    different = differences(expected, seen)
    tolerated = [test for test in different if test in may_fail]
    regressions = {test: different[test] for test in different if test not in may_fail}
    unsteady = []
    suspects = [*regressions, *uncertain(expected, seen)]
    if len(suspects) <= MOST_RETRIED:
        for test in suspects:
            outcome = _try_again(test, again)
            if outcome is None:
                regressions.pop(test, None)
                unsteady.append(test)
            else:
                regressions[test] = outcome
    passed = sum(outcome is Outcome.PASSED for outcome in seen.values())
    return Verdict(passed, regressions, tolerated, unsteady)


def _try_again(test: str, again: Callable[[str], tuple[Outcomes, Outcomes]]) -> Outcome | None:
    """Run a test alone until it does as well on portico; return how it ended if it never does."""
    different: Mapping[str, Outcome] = {}
    for _ in range(RETRIES):
        expected, seen = again(test)
        different = differences(expected, seen)
        if test not in different:
            return None
    return different[test]
