from __future__ import annotations

import os
import pwd
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from portico import address
from portico.errors import ListenerError
from portico.listener import OpenListener, open_listener
from portico.socketfile import FileAccess, SocketFile

NOBODY = pwd.getpwnam("nobody")

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.sock"


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def opened(path: Path, access: FileAccess, scheme: str = "unix") -> OpenListener:
    return open_listener(address.parse(f"{scheme}:{path}"), access=access)


@pytest.mark.parametrize("scheme", ["unix", "unix-datagram"])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o200])
@pytest.mark.usefixtures("umask")
def test_a_file_has_the_mode_that_was_asked_for(path: Path, mode: int, scheme: str) -> None:
    with closing(opened(path, FileAccess(mode=mode), scheme)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert not path.exists()


@root_only
def test_a_file_belongs_to_whom_it_was_given(path: Path) -> None:
    access = FileAccess(0o660, NOBODY.pw_uid, NOBODY.pw_gid)
    with closing(opened(path, access)):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
        assert stat.S_IMODE(found.st_mode) == 0o660


@root_only
def test_a_file_is_never_open_to_more_than_was_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner alone has it until it belongs to the others; then its mode is widened, once."""
    seen: list[tuple[str, int, int]] = []

    def note(name: str) -> None:
        found = path.stat()
        seen.append((name, stat.S_IMODE(found.st_mode), found.st_uid))

    chown, chmod = os.chown, os.chmod

    def watched_chown(name: str, uid: int, gid: int, **follows: bool) -> None:
        note("chown")
        chown(name, uid, gid, **follows)

    def watched_chmod(name: str, mode: int) -> None:
        note("chmod")
        chmod(name, mode)

    monkeypatch.setattr(os, "chown", watched_chown)
    monkeypatch.setattr(os, "chmod", watched_chmod)
    with closing(opened(path, FileAccess(0o666, NOBODY.pw_uid))):
        assert seen == [("chown", 0o600, 0), ("chmod", 0o600, NOBODY.pw_uid)]
        assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_a_file_is_taken_again_from_those_who_are_not_to_have_it_any_more(path: Path) -> None:
    with closing(opened(path, FileAccess(0o666))) as made:
        assert made.file is not None
        made.file.open_to(FileAccess(0o620))
        assert stat.S_IMODE(path.stat().st_mode) == 0o620


@root_only
def test_a_file_whose_owners_are_set_no_more_belongs_to_who_made_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And between the two it is open to nobody who is not to have it before and after."""
    before = path.parent.stat()
    with closing(opened(path, FileAccess(0o660, NOBODY.pw_uid, NOBODY.pw_gid))) as made:
        assert made.file is not None
        chown, seen = os.chown, list[int]()

        def watched(name: str, uid: int, gid: int, **follows: bool) -> None:
            seen.append(stat.S_IMODE(path.stat().st_mode))
            chown(name, uid, gid, **follows)

        monkeypatch.setattr(os, "chown", watched)
        made.file.open_to(FileAccess(0o606))
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (before.st_uid, before.st_gid)
        assert stat.S_IMODE(found.st_mode) == 0o606
        assert seen == [0o600]


def test_a_file_that_is_as_it_should_be_is_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has become another user may not touch it."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    with closing(opened(path, FileAccess(0o660))) as made:
        monkeypatch.setattr(os, "chown", refuse)
        monkeypatch.setattr(os, "chmod", refuse)
        assert made.file is not None
        made.file.open_to(FileAccess(0o660))


@root_only
def test_systems_without_descriptors_of_paths_give_it_by_its_path(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        SocketFile.at(path).open_to(FileAccess(0o660, NOBODY.pw_uid), by_descriptor=False)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_uid == NOBODY.pw_uid


@pytest.mark.parametrize("kind", ["another file", "a link", "a hard link"])
def test_a_file_that_somebody_has_put_in_its_place_is_not_given_away(
    path: Path, tmp_path: Path, kind: str
) -> None:
    """Root would hand out what it was lured to."""
    precious = tmp_path / "precious"
    precious.write_text("")
    precious.chmod(0o600)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made_file = SocketFile.at(path)
        if kind == "a hard link":
            precious.unlink()
            os.link(path, precious)
        elif kind == "a link":
            path.unlink()
            path.symlink_to(precious)
        else:
            path.unlink()
            os.link(precious, path)
        before = precious.stat().st_mode
        with pytest.raises(OSError, match=r"another file has taken its place|Too many levels"):
            made_file.open_to(FileAccess(0o666))
    assert precious.stat().st_mode == before


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, "only root can set socket_owner, and others can set socket_group to a group that"),
        (30, "its file cannot be given away: Read-only file system"),
    ],
)
def test_a_file_that_cannot_be_given_away_is_removed_and_the_reason_said(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(ListenerError) as caught:
        opened(path, FileAccess(0o660, 1))
    assert f"cannot listen on unix:{path}: " in str(caught.value)
    assert expected in str(caught.value)
    assert not path.exists()


def test_an_abstract_name_has_no_file_to_open_to_others() -> None:
    name = Path(f"@portico test of access {os.getpid()}")
    with closing(opened(name, FileAccess(0o666))) as made:
        assert isinstance(made.socket.getsockname(), bytes)
