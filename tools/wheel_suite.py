"""Run the test-suite against the built wheel on the other supported Pythons of this machine.

The developer's own interpreter runs the suite on the sources, with coverage.  Here every other
version gets an environment under .venvs/ with the wheel in it; on a machine with one Python only,
that one is used, so that what is shipped is tried everywhere.

    python -m tools.wheel_suite [pytest's arguments]
"""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tools import interpreters
from tools.interpreters import ROOT, Interpreter


def run_suite(wheel: Path, arguments: list[str], interpreter: Interpreter) -> tuple[bool, str]:
    """Run pytest on the wheel with one interpreter; return whether it passed, and how."""
    environment = ROOT / ".venvs" / interpreter.name
    prepare = (ROOT / "tools" / "environment.py", environment, ROOT / "requirements" / "test.txt")
    subprocess.run([interpreter.executable, *prepare, wheel], check=True)
    pytest = (environment / "bin" / "python", "-m", "pytest")
    done = subprocess.run(
        [*pytest, *arguments],
        cwd=ROOT,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode == 0, done.stdout


def main(arguments: list[str]) -> int:
    """Run the suite on each interpreter; fail when one of them fails."""
    (wheel,) = (ROOT / "dist").glob("portico-*.whl")
    found = interpreters.find_all()
    others = [each for each in found if each.name != sysconfig.get_python_version()]
    failed = []
    # Side by side: a test waits for most of its time.
    with ThreadPoolExecutor(os.cpu_count()) as runs:
        suites = others or found
        for interpreter, (has_passed, said) in zip(
            suites, runs.map(partial(run_suite, wheel, arguments), suites), strict=True
        ):
            print(f"\n==> {wheel.name} on Python {interpreter.name}\n{said}", flush=True)
            if not has_passed:
                failed.append(interpreter.name)
    on_machine = {interpreter.version for interpreter in found}
    for major, minor in interpreters.supported_versions():
        if (major, minor) not in on_machine:
            print(f"Python {major}.{minor} is not on this machine: nothing was run on it")
    if failed:
        print(f"the suite failed on Python {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
