"""Make the file of a Unix socket, for those who may use it, and remove it.

Owns its life: the narrow mode that it begins with, who it is opened to afterwards, and that a file
which a dead server has left is replaced, and no other.  Leaves binding to `portico.listener`.

Sources: unix(7) (the file outlives its socket; connect(2) to one that nobody listens on is refused;
connecting takes the permission to write); open(2) (``O_PATH``).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from portico.diagnosis import is_socket
from portico.exclusion import alone_in

SOCKET_MODE: Final = 0o600
"""What others than the owner may do with the file of a Unix socket, if they are not told: nothing.
"""

_changing_umask = threading.Lock()  # guards the umask, which all threads share


@dataclass(frozen=True, slots=True)
class FileAccess:
    """Who may connect to a Unix socket, by the mode and the owners of its file.

    Attributes:
        mode: Connecting takes the permission to write.
        uid: The user who owns it; ``None`` for the one that opens it.
        gid: The same for the group.
    """

    mode: int = SOCKET_MODE
    uid: int | None = None
    gid: int | None = None


OWNER_ONLY: Final = FileAccess()
"""Its owner, and nobody else."""


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The file that binding a Unix socket has made.

    Attributes:
        path: Where it is.
        device: With the inode, which file it is.
        inode: See there.
        uid: The user who owned it when it was made; -1 if that is not known.
        gid: The same for the group.
    """

    path: Path
    device: int
    inode: int
    uid: int = field(default=-1, compare=False)  # whose it is does not say which file it is
    gid: int = field(default=-1, compare=False)

    @classmethod
    def at(cls, path: Path) -> SocketFile:
        """Remember which file is at `path` now, even if the process changes its directory."""
        found = path.lstat()
        return cls(path.absolute(), found.st_dev, found.st_ino, found.st_uid, found.st_gid)

    def open_to(self, access: FileAccess, *, by_descriptor: bool = sys.platform == "linux") -> None:
        """Give the file to whom it is to belong, and only then to whom they share it with.

        Callable again, for others: it is taken from those before who are not among them, and what
        is as it should be is left alone, which a process may have no permission to touch.

        Raises:
            OSError: The system refuses, or somebody has put another file in its place.
        """
        if not by_descriptor:
            self._give(self.path, self.path.lstat(), access, follow_symlinks=False)
            return
        # By a descriptor, and not by its path: where others may write to the directory, root would
        # give away whatever they put there.
        descriptor = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._give(f"/proc/self/fd/{descriptor}", os.fstat(descriptor), access)
        finally:
            os.close(descriptor)

    def _give(
        self,
        path: str | Path,
        found: os.stat_result,
        access: FileAccess,
        *,
        follow_symlinks: bool = True,
    ) -> None:
        """Have what is found at a path be as it is wanted."""
        if (found.st_dev, found.st_ino) != (self.device, self.inode) or found.st_nlink != 1:
            raise FileExistsError(errno.EEXIST, "another file has taken its place")
        uid = self.uid if access.uid is None else access.uid
        gid = self.gid if access.gid is None else access.gid
        mode = stat.S_IMODE(found.st_mode)
        narrow = mode & access.mode  # nobody has more than before and after while it changes hands
        if narrow != mode:
            os.chmod(path, narrow)  # noqa: PTH101  # it may be a descriptor's
        if uid not in {-1, found.st_uid} or gid not in {-1, found.st_gid}:
            os.chown(path, uid, gid, follow_symlinks=follow_symlinks)
        if narrow != access.mode:
            os.chmod(path, access.mode)  # noqa: PTH101  # the same

    def remove(self) -> None:
        """Remove the file, unless it is gone or somebody else's has taken its place.

        To be called while the socket is still open: until then nobody takes the file for a stale
        one and puts another in its place.
        """
        with suppress(OSError):
            if SocketFile.at(self.path) == self:
                self.path.unlink()


@contextmanager
def stale_removed(path: Path, kind: int) -> Generator[None]:
    """Remove the file of a socket that nobody listens on, and let nobody in between."""
    # Alone even where there is no file: the one that is made now looks stale until it listens.
    with alone_in(path.parent):
        if is_socket(path) and is_stale(path, kind):
            path.unlink()
        yield


def is_stale(path: Path, kind: int) -> bool:
    """Say whether a socket surely has no listener."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)  # a listener with a full backlog would make it wait
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # somebody is there, or it cannot be told: bind will say what is wrong
            return False
    return False


@contextmanager
def narrow_mode(
    listener: socket.socket, *, by_socket: bool = sys.platform == "linux"
) -> Generator[None]:
    """Have the file that ``bind`` makes belong to its owner alone, without a moment in between.

    Linux gives the file the mode of the socket, less the umask; elsewhere there is only the
    umask, which belongs to all threads of the process.
    """
    if by_socket:
        os.fchmod(listener.fileno(), SOCKET_MODE)
        yield
        return
    with _changing_umask:
        before = os.umask(0o777 & ~SOCKET_MODE)
        try:
            yield
        finally:
            os.umask(before)
