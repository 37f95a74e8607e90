"""Know the directory in which a program was started by its name, and what has that name by now.

Owns the name.  A process stays in a directory that is renamed, or to which a link does not lead any
more; who deploys by either means the one that has the name.  Leaves to others when it matters.

Source: POSIX, "Environment Variables", ``PWD``: the name that has the links in it, which getcwd(3)
does not tell.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from portico.errors import PorticoError


class DirectoryError(PorticoError, OSError):
    """The directory in which a program was started is gone, and no other has its name."""


class Directory:
    """A directory that is known by its name.

    Args:
        path: The name, an absolute path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def current(cls) -> Self:
        """Return that of this process, by the name that the shell has for it.

        Raises:
            FileNotFoundError: It was removed.
        """
        named = Path(os.environ.get("PWD", ""))
        with suppress(OSError):
            if named.is_absolute() and named.samefile(os.curdir):
                return cls(named)
        return cls(Path.cwd())

    def is_left(self) -> bool:
        """Say whether this process is in another one than that which has the name by now.

        Raises:
            DirectoryError: None has it.
        """
        try:
            return not self.path.samefile(os.curdir)
        except PermissionError:
            return False  # it has become a user who may not look: what it has is all it gets
        except OSError as error:
            reason = error.strerror or str(error)
            raise DirectoryError(f"cannot return to {self.path}: {reason}") from error

    def enter(self) -> None:
        """Be in the one that has the name by now.

        Raises:
            DirectoryError: None has it, or it cannot be entered; this process stays where it is.
        """
        if not self.is_left():
            return
        try:
            os.chdir(self.path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DirectoryError(f"cannot enter {self.path}: {reason}") from error
        importlib.invalidate_caches()  # of what had the name before
