"""The directory in which a program was started, by its name."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from portico.directory import Directory, DirectoryError


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The name of the current directory, to which a link leads."""
    (tmp_path / "first").mkdir()
    made = tmp_path / "link"
    made.symlink_to("first")
    monkeypatch.chdir(made)
    monkeypatch.setenv("PWD", str(made))
    return made


def lead(link: Path, where: str) -> None:
    """Have a link lead elsewhere."""
    link.unlink()
    link.symlink_to(where)


def test_a_directory_has_the_name_that_the_shell_has_for_it(link: Path) -> None:
    assert Directory.current().path == link


@pytest.mark.parametrize("name", ["", "link", "{}/second", "{}/nothing"])
def test_a_name_that_is_not_its_own_is_not_taken(
    link: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Who has started the program may have been elsewhere."""
    (link.parent / "second").mkdir()
    monkeypatch.setenv("PWD", name.format(link.parent))
    assert Directory.current().path == link.resolve()


def test_another_one_that_has_its_name_is_entered(link: Path) -> None:
    directory = Directory.current()
    assert not directory.is_left()
    (link.parent / "second").mkdir()
    lead(link, "second")
    assert directory.is_left()
    directory.enter()
    assert not directory.is_left()
    assert Path.cwd() == link.parent / "second"


def test_a_name_that_nothing_has_is_told_and_nothing_changes(link: Path) -> None:
    directory, before = Directory.current(), Path.cwd()
    link.unlink()
    with pytest.raises(DirectoryError, match=f"cannot return to {link}: No such file"):
        directory.enter()
    assert Path.cwd() == before


def test_what_cannot_be_entered_is_told(link: Path) -> None:
    directory = Directory.current()
    (link.parent / "second").touch()
    lead(link, "second")
    with pytest.raises(DirectoryError, match=f"cannot enter {link}: Not a directory"):
        directory.enter()


def test_who_may_not_look_stays(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user whom the process has become, and who has never had more than it has open."""
    directory, before = Directory.current(), Path.cwd()

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "samefile", refuse)
    directory.enter()
    assert Path.cwd() == before


def test_what_was_seen_of_the_one_before_is_forgotten(
    link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import system remembers what is in a directory, by its name."""
    directory = Directory.current()
    forgotten: list[str] = []
    monkeypatch.setattr(importlib, "invalidate_caches", lambda: forgotten.append(os.getcwd()))  # noqa: PTH109
    directory.enter()
    assert forgotten == []
    (link.parent / "second").mkdir()
    lead(link, "second")
    directory.enter()
    assert forgotten == [str(link.parent / "second")]
