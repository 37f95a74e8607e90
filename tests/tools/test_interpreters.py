"""The scripts behind make find the interpreters that a machine really has."""

import sys
from pathlib import Path

import pytest

from tools import interpreters

HERE = sys.version_info[:2]
NAME = f"python{HERE[0]}.{HERE[1]}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty PATH, and pyenv without a version."""
    for folder in ("bin", "shims", "pyenv"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:{tmp_path / 'bin'}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


def place(path: Path, script: str = f'#!/bin/sh\nexec {sys.executable} "$@"\n') -> None:
    """Put a program somewhere; by default one that runs this Python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def test_an_interpreter_on_the_path_is_found(machine: Path) -> None:
    place(machine / "bin" / NAME)
    found = interpreters.find(HERE)
    assert found is not None
    assert found.executable == Path(sys.executable)


def test_an_interpreter_of_pyenv_is_found(machine: Path) -> None:
    place(machine / "pyenv" / "versions" / f"{HERE[0]}.{HERE[1]}.7" / "bin" / NAME)
    assert interpreters.find(HERE) is not None


def test_a_shim_without_a_version_behind_it_is_passed_over(machine: Path) -> None:
    """Pyenv leaves one for every version that any environment ever had."""
    place(machine / "shims" / NAME, "#!/bin/sh\nexit 127\n")
    assert interpreters.find(HERE) is None
    place(machine / "bin" / NAME)
    assert interpreters.find(HERE) is not None


def test_an_interpreter_of_another_version_than_its_name_says_is_passed_over(
    machine: Path,
) -> None:
    place(machine / "bin" / "python3.99")
    assert interpreters.find((3, 99)) is None


def test_one_with_the_test_package_is_preferred(machine: Path) -> None:
    major, minor = HERE
    place(machine / "bin" / NAME, f"#!/bin/sh\necho {major} {minor} 0 /without\n")
    place(
        machine / "pyenv" / "versions" / f"{major}.{minor}.7" / "bin" / NAME,
        f"#!/bin/sh\necho {major} {minor} 1 /with\n",
    )
    found = interpreters.find(HERE)
    assert found is not None
    assert (found.executable, found.has_test_package) == (Path("/with"), True)


def test_the_newest_patch_release_of_pyenv_comes_first(machine: Path) -> None:
    major, minor = HERE
    for patch in (9, 10):
        place(
            machine / "pyenv" / "versions" / f"{major}.{minor}.{patch}" / "bin" / NAME,
            f"#!/bin/sh\necho {major} {minor} 1 /patch/{patch}\n",
        )
    found = interpreters.find(HERE)
    assert found is not None
    assert found.executable == Path("/patch/10")


def test_the_supported_versions_start_with_the_oldest_that_the_project_requires() -> None:
    versions = interpreters.supported_versions()
    required = (interpreters.ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={versions[0][0]}.{versions[0][1]}"' in required
    assert versions == sorted(versions)
