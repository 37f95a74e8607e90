"""Run CPython's own tests on portico with the Pythons that are not supported yet.

They come from Debian's unstable distribution, with their test packages, into a folder of its own
that is used by chroot(2): nothing is installed on the machine.  Needs root, debootstrap, and
some 700 MB.  A second run uses what is there.

    python -m tools.compat_next [--folder FOLDER] [--mirror URL] [VERSION ...]

Without a mirror, the one that this machine installs its own packages from is asked.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.compat.cpython import (
    SUITES,
    TOLERATED,
    Laboratory,
    Outcomes,
    Python,
    SuiteError,
    Verdict,
    judge,
)
from tools.interpreters import ROOT

VERSIONS = ("3.14", "3.15")
"""The Pythons to try, when none is named."""

FOLDER = ROOT / "build" / "compat-next"
"""Where the distribution goes; git ignores it."""

DISTRIBUTION = "unstable"
"""Debian's distribution that has the newest Pythons."""

ENGINE = "threads"
"""What stands behind ``ThreadingMixIn``: needs nothing but the standard library."""

WORKERS = max(4, os.cpu_count() or 1)
"""Suites that run at once; most of them wait most of the time."""


class Refused(Exception):
    """The machine cannot do what is asked, in words for its user."""


def check_machine() -> None:
    """Say what is missing, before anything is fetched."""
    if os.geteuid() != 0:
        raise Refused("making a system to change the root to needs root")
    if shutil.which("debootstrap") is None:
        raise Refused("debootstrap is missing: apt-get install debootstrap")


def mirror_of_this_machine() -> str | None:
    """Return where this machine gets its Debian packages from, or None when it does not say."""
    command = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    # Its security updates are in a repository of their own, which has no unstable.
    uris = [line.split()[-1] for line in answer.splitlines() if line.startswith("Debian ")]
    return next((uri for uri in uris if uri.rstrip("/").endswith("/debian")), None)


def make_system(folder: Path, mirror: str | None) -> None:
    """Make the smallest Debian in a folder, unless it is there."""
    if (folder / "usr" / "bin" / "apt-get").exists() and not (folder / "debootstrap").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = ["debootstrap", "--variant=minbase", DISTRIBUTION, str(folder)]
    subprocess.run([*command, *([mirror] if mirror else [])], check=True)


def install(folder: Path, versions: list[str]) -> None:
    """Install the Pythons and their test packages in the system of a folder."""
    packages = [f"python{version}" for version in versions]
    packages += [f"libpython{version}-testsuite" for version in versions]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    apt = ["chroot", str(folder), "apt-get", "--quiet", "--yes", "--no-install-recommends"]
    # A mirror that stands still, a snapshot, is as good; who signed it is checked all the same.
    apt += ["--option", "Acquire::Check-Valid-Until=false"]
    subprocess.run([*apt, "update"], check=True, env=environment)
    subprocess.run([*apt, "install", *packages], check=True, env=environment)


def compare(laboratory: Laboratory, python: Python, suite: str) -> Verdict:
    """Run a suite on both modules, and say what the difference is."""

    def both(*tests: str) -> tuple[Outcomes, Outcomes]:
        return (
            laboratory.run(python, suite, None, tests),
            laboratory.run(python, suite, ENGINE, tests),
        )

    return judge(*both(), both, TOLERATED[ENGINE])


def run_suites(folder: Path, versions: list[str]) -> bool:
    """Run every suite in every Python, print what came of it, and say whether all is well."""
    pythons = [
        Python(version, ("chroot", str(folder), f"/usr/bin/python{version}"), folder)
        for version in versions
    ]
    well = True
    (folder / "tmp").mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder / "tmp") as name,
        ThreadPoolExecutor(WORKERS) as executor,
    ):
        laboratory = Laboratory(Path(name))
        verdicts = {
            (python.name, suite): executor.submit(compare, laboratory, python, suite)
            for suite in SUITES
            for python in pythons
        }
        for (python_name, suite), verdict in sorted(verdicts.items()):
            try:
                result = verdict.result()
            except SuiteError as error:
                print(f"{python_name} {suite}: no result\n{error}", flush=True)
                well = False
            else:
                print(f"{python_name} {suite}: {result}", flush=True)
                well = well and result.passed > 0 and not result.regressions
    return well


def main(arguments: list[str]) -> int:
    """Make what is missing, run the suites, and return the status of the program."""
    parser = argparse.ArgumentParser(prog="compat_next", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: build/compat-next")
    parser.add_argument("--mirror", help="where Debian packages come from")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="default: 3.14 3.15")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    versions = options.versions or list(VERSIONS)
    try:
        check_machine()
    except Refused as error:
        print(f"compat_next: {error}", file=sys.stderr)
        return 2
    make_system(folder, options.mirror or mirror_of_this_machine())
    install(folder, versions)
    return 0 if run_suites(folder, versions) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
