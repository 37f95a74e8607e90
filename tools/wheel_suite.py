"""Run the test-suite against the built wheel on the other supported Pythons of this machine.

The developer's own interpreter runs the suite on the sources, with coverage.  Here every other
version gets an environment under .venvs/ with the wheel in it; on a machine with one Python only,
that one is used, so that what is shipped is tried everywhere.

    python -m tools.wheel_suite [pytest's arguments]
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from tools import interpreters
from tools.interpreters import ROOT, Interpreter


def run_suite(interpreter: Interpreter, wheel: Path, arguments: list[str]) -> bool:
    """Install the wheel for one interpreter, run pytest on it, and say whether it passed."""
    environment = ROOT / ".venvs" / interpreter.name
    prepare = (ROOT / "tools" / "environment.py", environment, ROOT / "requirements" / "test.txt")
    subprocess.run([interpreter.executable, *prepare, wheel], check=True)
    pytest = (environment / "bin" / "python", "-m", "pytest")
    return subprocess.run([*pytest, *arguments], cwd=ROOT, check=False).returncode == 0


def main(arguments: list[str]) -> int:
    """Run the suite on each interpreter; fail when one of them fails."""
    (wheel,) = (ROOT / "dist").glob("portico-*.whl")
    found = interpreters.find_all()
    others = [each for each in found if each.name != sysconfig.get_python_version()]
    failed = []
    for interpreter in others or found:
        print(f"\n==> {wheel.name} on Python {interpreter.name}", flush=True)
        if not run_suite(interpreter, wheel, arguments):
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
