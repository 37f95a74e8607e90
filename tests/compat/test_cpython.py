"""CPython's own tests pass with portico in place of `socketserver`, wherever they pass without.

Every supported interpreter of the machine that has the test package runs them; what is missing
is said.  The runs of all cases share the processors: they start together, and each case waits
for its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from portico import engines
from tests.compat.conftest import SUMMARY
from tests.compat.cpython import (
    MOST_RETRIED,
    RETRIES,
    SUITE_TIMEOUT,
    SUITES,
    TOLERATED,
    Laboratory,
    Outcome,
    Outcomes,
    Python,
    Verdict,
    judge,
    read_report,
)
from tools import interpreters

ENGINES = [engine for engine in TOLERATED if engine in engines.ENGINES]
"""What stands behind ``ThreadingMixIn`` while the suites run."""

WORKERS = max(4, os.cpu_count() or 1)
"""Suites that run at once; most of them wait most of the time."""


def machine() -> Iterator[pytest.ParameterSet]:
    """Yield every supported version: to be run, or skipped with what is missing."""
    found = {interpreter.version: interpreter for interpreter in interpreters.find_all()}
    for version in interpreters.supported_versions():
        name = ".".join(map(str, version))
        interpreter = found.get(version)
        if interpreter is None:
            lack = f"Python {name} is not on this machine"
        elif not interpreter.has_test_package:
            lack = f"{interpreter.executable} has no test package"
        else:
            yield pytest.param(Python(name, (str(interpreter.executable),)), id=name)
            continue
        yield pytest.param(None, id=name, marks=pytest.mark.skip(lack))


class Runs:
    """Every suite in every interpreter, once on each module, started before it is asked for."""

    def __init__(self, laboratory: Laboratory, executor: ThreadPoolExecutor) -> None:
        self.laboratory = laboratory
        self._executor = executor
        self._runs: dict[tuple[Python, str, str | None], Future[Outcomes]] = {}

    def start(self, python: Python, suite: str, engine: str | None) -> None:
        key = python, suite, engine
        if key not in self._runs:
            self._runs[key] = self._executor.submit(self.laboratory.run, *key)

    def outcomes(self, python: Python, suite: str, engine: str | None) -> Outcomes:
        return self._runs[python, suite, engine].result()


@pytest.fixture(scope="session")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """Start what the selected cases will ask for."""
    laboratory = Laboratory(tmp_path_factory.mktemp("laboratory"))
    with ThreadPoolExecutor(WORKERS) as executor:
        started = Runs(laboratory, executor)
        cases: list[dict[str, Any]] = [
            dict(item.callspec.params)
            for item in request.session.items
            if isinstance(item, pytest.Function) and "suite" in item.fixturenames
        ]
        # The slowest suites first, whatever the order of the cases.
        for case in sorted(cases, key=lambda case: SUITES.index(case["suite"])):
            if case["python"] is not None:  # it is skipped
                for engine in (None, case["engine"]):
                    started.start(case["python"], case["suite"], engine)
        yield started
        executor.shutdown(cancel_futures=True)


@pytest.mark.timeout(2 * SUITE_TIMEOUT + 120)
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("python", [*machine()])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_test_of_cpython_regresses(
    engine: str,
    python: Python,
    suite: str,
    runs: Runs,
    record_property: Callable[[str, object], None],
) -> None:
    def again(test: str) -> tuple[Outcomes, Outcomes]:
        return (
            runs.laboratory.run(python, suite, None, [test]),
            runs.laboratory.run(python, suite, engine, [test]),
        )

    expected = runs.outcomes(python, suite, None)
    tolerated = TOLERATED[engine]
    verdict = judge(expected, runs.outcomes(python, suite, engine), again, tolerated)
    record_property(SUMMARY, f"{python.name} {suite} on {engine}: {verdict}")
    assert verdict.regressions == {}
    assert verdict.passed > 0
    # One that is tolerated in vain has to leave the list.
    assert verdict.tolerated == [test for test in tolerated if test.split(".")[1] == suite]


# ------------------------------------------------------------------------------- the comparison

PASSED, SKIPPED, FAILED, MISSING = Outcome


def never(test: str) -> tuple[Outcomes, Outcomes]:
    raise AssertionError(f"{test} is not to be run again")


def test_a_report_tells_what_came_of_each_test() -> None:
    report = """
        <testsuites><testsuite>
            <testcase name="a" status="run" result="completed"/>
            <testcase name="b" status="run" result="completed"><failure/></testcase>
            <testcase name="c" status="run" result="completed"><error/></testcase>
            <testcase name="d" status="run" result="skipped"><skipped>why</skipped></testcase>
            <testcase name="e"><failure/></testcase>
            <testcase name="e"/>
        </testsuite></testsuites>"""
    assert read_report(report) == {
        "a": PASSED,
        "b": FAILED,
        "c": FAILED,
        "d": SKIPPED,
        "e": FAILED,
    }


def test_two_runs_that_agree_have_no_regression() -> None:
    outcomes = {"a": PASSED, "b": SKIPPED}
    assert judge(outcomes, outcomes, never) == Verdict(1, {}, [], [])


def test_a_test_that_only_portico_passes_is_no_regression() -> None:
    assert judge({"a": FAILED, "b": SKIPPED}, {"a": PASSED, "b": PASSED}, never).regressions == {}


@pytest.mark.parametrize("outcome", [SKIPPED, FAILED, MISSING])
def test_a_test_that_does_not_pass_here_is_a_regression(outcome: Outcome) -> None:
    seen = {} if outcome is MISSING else {"a": outcome}
    verdict = judge({"a": PASSED}, seen, lambda test: ({"a": PASSED}, seen))
    assert verdict.regressions == {"a": outcome}


def test_a_test_that_passes_alone_is_unsteady() -> None:
    verdict = judge({"a": PASSED}, {"a": FAILED}, lambda test: ({"a": PASSED}, {"a": PASSED}))
    assert verdict == Verdict(0, {}, [], ["a"])


def test_a_test_that_fails_alone_on_both_is_no_regression() -> None:
    verdict = judge({"a": PASSED}, {"a": FAILED}, lambda test: ({"a": FAILED}, {"a": FAILED}))
    assert verdict == Verdict(0, {}, [], ["a"])


def test_a_test_that_failed_on_both_is_a_regression_if_it_passes_alone_on_one() -> None:
    verdict = judge({"a": FAILED}, {"a": FAILED}, lambda test: ({"a": PASSED}, {"a": FAILED}))
    assert verdict.regressions == {"a": FAILED}


def test_a_test_is_run_again_a_few_times_only() -> None:
    tried = []

    def again(test: str) -> tuple[Outcomes, Outcomes]:
        tried.append(test)
        return {"a": PASSED}, {"a": FAILED}

    judge({"a": PASSED}, {"a": FAILED}, again)
    assert tried == ["a"] * RETRIES


def test_many_tests_that_differ_are_no_coincidence() -> None:
    expected = {str(number): PASSED for number in range(MOST_RETRIED + 1)}
    assert len(judge(expected, {}, never).regressions) == MOST_RETRIED + 1


def test_a_tolerated_test_is_no_regression() -> None:
    verdict = judge({"a": PASSED}, {"a": FAILED}, never, may_fail={"a"})
    assert verdict == Verdict(0, {}, ["a"], [])
