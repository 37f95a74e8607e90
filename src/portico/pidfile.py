"""Keep the number of this process in a file, for who sends signals to it.

Owns the file: that there is one process for it, and that it goes when its process does.  Leaves to
the program when there is one, and to whom it is handed over.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from portico.errors import PorticoError
from portico.exclusion import alone_in
from portico.processes import command, is_alive, start_time

MODE: Final = 0o644
"""Everybody may read the number, and only the owner change it."""

CLOCK_SLACK: Final = 2.0
"""Seconds by which the age of a process and that of a file may disagree, when both are right."""

MOST_BYTES: Final = 32
"""What is read of a file that may be anything."""


class PidFileError(PorticoError, OSError):
    """A pid file cannot be had."""


class PidFile:
    """A file that holds the number of this process while the ``with`` block runs.

    Args:
        path: Where; ``None`` for no file at all.
        predecessor: The process whose file it is until `take_over`.  Its number in the file is no
            error, and until then the file is left alone.
        descriptor: What the predecessor has open of its file: by it this process may write there,
            whatever user it has become.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        predecessor: int | None = None,
        descriptor: int | None = None,
    ) -> None:
        # Absolute: the process may change its directory before it removes the file.
        self._path = None if path is None else Path(path).absolute()
        self._predecessor = predecessor
        self._descriptor = descriptor
        self._process = os.getpid()

    @property
    def path(self) -> str | None:
        """Where the file is; ``None`` if there is none."""
        return None if self._path is None else str(self._path)

    @property
    def descriptor(self) -> int | None:
        """What a successor is to inherit; ``None`` if there is no file."""
        return self._descriptor

    def __enter__(self) -> Self:
        """Make the file, in the place of one whose process is gone.

        Raises:
            PidFileError: Another process has it and is alive, or the system refuses.
        """
        self._process = os.getpid()
        if self._path is None:
            self.close()
            return self
        try:
            with alone_in(self._path.parent):
                self._take(self._path)
        except PidFileError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise _failure(self._path, error.strerror or str(error)) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the file, if it still holds the number of this process."""
        if os.getpid() == self._process:  # not in a child
            self._remove_own()
        self.close()

    def close(self) -> None:
        """Close the descriptor, and leave the file: for a child, whose it is not.

        Callable again.
        """
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def take_over(self) -> None:
        """Write the number of this process over that of its predecessor.

        It may be dead by now, and nobody else would.

        Raises:
            PidFileError: The system refuses.
        """
        if self._predecessor is not None:
            self._exchange(self._predecessor, self._process)

    def hand_over(self, pid: int, path: str | None) -> None:
        """Write the number of another process into the file, which is that one's from now on.

        Nothing is done if it has taken the file over already.  If it has another file, or none,
        this one is removed: nobody else would.

        Args:
            pid: The other process.
            path: Where its file is; ``None`` if it has none.

        Raises:
            PidFileError: The system refuses.
        """
        if self._path is None or (path is not None and _are_one(self._path, Path(path))):
            self._exchange(self._process, pid)
            return
        self._remove_own()

    def _exchange(self, before: int, after: int) -> None:
        """Write a number over another one, if it is there."""
        if self._path is None:
            return
        try:
            with alone_in(self._path.parent):
                if _read(self._path) == before:
                    self._write(after)
        except OSError as error:
            raise _failure(self._path, error.strerror or str(error)) from error

    def _take(self, path: Path) -> None:
        """Make the file, or find that it is this process's already."""
        found = _read(path)
        if self._descriptor is not None and not _is_open_on(self._descriptor, path):
            self.close()  # another file, of other settings
        if found is not None and found == self._predecessor:
            return
        if found == os.getpid() and self._predecessor is not None:
            return  # handed over already
        if found is not None and _has_written(found, path):
            raise _failure(path, f"process {found} ({command(found)}) has it, and is alive")
        self.close()
        self._make(path)

    def _make(self, path: Path) -> None:
        """Put a whole file in the place of what is there: a reader never sees half of a number."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with suppress(FileNotFoundError):  # of a process that died here, and had this number
            draft.unlink()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(draft, flags, MODE)
        try:
            os.fchmod(self._descriptor, MODE)  # whatever the umask took away
            self._write(os.getpid())
            draft.rename(path)
        except BaseException:
            draft.unlink()
            raise

    def _write(self, pid: int) -> None:
        """Write a number into the file that was made here; or into another one, by its path.

        Its descriptor may write to it even after the process has become another user.
        """
        if self._descriptor is None:
            assert self._path is not None
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        text = f"{pid}\n".encode()
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))

    def _remove_own(self) -> None:
        """Remove the file, if it still holds the number of this process."""
        if self._path is not None:
            with suppress(OSError), alone_in(self._path.parent):
                if _read(self._path) == self._process:
                    self._remove(self._path)

    def _remove(self, path: Path) -> None:
        """Remove the file, or empty it where this process may not change the directory any more."""
        try:
            path.unlink()
        except PermissionError:
            if self._descriptor is not None:
                os.ftruncate(self._descriptor, 0)


def holder(path: Path) -> int | None:
    """Return the process whose number is in a file, if it is alive and has written it.

    Raises:
        PidFileError: There is something else.
        OSError: It cannot be looked at.
    """
    found = _read(path)
    return found if found is not None and _has_written(found, path) else None


def _are_one(path: Path, other: Path) -> bool:
    """Say whether two names are one file's."""
    with suppress(OSError):
        return path.samefile(other)
    return path == other


def _is_open_on(descriptor: int, path: Path) -> bool:
    """Say whether a descriptor is open on the very file that has a path."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _read(path: Path) -> int | None:
    """Return the number in a file; ``None`` if there is no file, or an empty one.

    Raises:
        PidFileError: There is something else, which is nobody's to replace.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _failure(path, "it is not a regular file; it was left alone")
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    try:
        text = os.read(descriptor, MOST_BYTES).strip()
    finally:
        os.close(descriptor)
    if text == b"":
        return None
    if len(text) > 10 or not text.isdigit() or int(text) == 0:
        raise _failure(path, "it holds something else than the number of a process; left alone")
    return int(text)


def _has_written(pid: int, path: Path) -> bool:
    """Say whether the process lives that wrote its number into a file."""
    if pid == os.getpid():  # the number of one before, in a container as a rule
        return False
    if not is_alive(pid):
        return False
    began = start_time(pid)
    # The number is another process's by now if that one began after the file was written.
    return began is None or began <= path.lstat().st_mtime + CLOCK_SLACK


def _failure(path: Path, reason: str) -> PidFileError:
    return PidFileError(f"cannot have the pid file {path}: {reason}")
