"""Look whether the files can be had that the settings name, and who is to own them; make none.

Leaves the files of certificates to `papers`, and those of Unix sockets to `occupancy`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from portico.configuration import Configuration, ProcessSettings
from portico.doctor.facts import Account, FileFacts
from portico.errors import PorticoError
from portico.pidfile import holder
from portico.processes import command
from portico.settings import Settings


def look_at(process: ProcessSettings, account: Account | None) -> tuple[FileFacts, ...]:
    """Look at the files of the processes.

    Args:
        process: Names them.
        account: Whom they become, before the log is opened and after the pid file is made.
    """
    found: list[FileFacts] = []
    if process.log_file is not None:
        path = Path(process.log_file)
        known = account if account is not None and not account.problem else None
        found.append(FileFacts("log_file", str(path), _unwritable(path, known)))
    if process.pid_file is not None:
        found.append(_of_pid_file(Path(process.pid_file)))
    return tuple(found)


def owner_problems(configuration: Configuration) -> dict[str, str]:
    """Say for each service what is wrong with the owners of its Unix sockets; empty if nothing."""
    return {each.name: _owner_problem(each.settings) for each in configuration.services}


def _owner_problem(settings: Settings) -> str:
    try:
        settings.socket_access()
    except PorticoError as error:
        return str(error)
    return ""


def _of_pid_file(path: Path) -> FileFacts:
    problem, alive = _unmakeable(path, None), ""
    if not problem:
        try:
            found = holder(path)
        except OSError as error:
            problem = str(error)
        else:
            alive = "" if found is None else f"process {found} ({command(found)})"
    return FileFacts("pid_file", str(path), problem, alive)


def _unwritable(path: Path, account: Account | None) -> str:
    """Say why a file cannot be written; empty if it can, or can be made."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return _unmakeable(path.resolve(), account)
    except OSError as error:
        return error.strerror or str(error)
    if stat.S_ISDIR(found.st_mode):
        return "it is a directory"
    if stat.S_ISSOCK(found.st_mode):
        return "it is a socket"
    if stat.S_ISFIFO(found.st_mode) and not _is_read(path):
        return "it is a FIFO that nobody reads"
    return "" if _may(path, found, os.W_OK, account) else "no permission to write it"


def _is_read(path: Path) -> bool:
    """Say whether somebody has a FIFO open to read it."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.ENXIO
    return True


def _unmakeable(path: Path, account: Account | None) -> str:
    """Say why a file cannot be made; empty if it can."""
    folder = path.absolute().parent
    try:
        found = folder.stat()
    except FileNotFoundError:
        return f"there is no directory {folder}"
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a directory"
    may = _may(folder, found, os.W_OK | os.X_OK, account)
    return "" if may else f"no permission to make a file in {folder}"


def _may(path: Path, found: os.stat_result, bits: int, account: Account | None) -> bool:
    """Say whether somebody may do something with a file; this process, if it becomes nobody."""
    if account is None or account.uid == 0:
        return os.access(path, bits)
    if account.uid == found.st_uid:
        shift = 6
    elif found.st_gid == account.gid or found.st_gid in account.groups:
        shift = 3
    else:
        shift = 0
    return not bits & ~(found.st_mode >> shift)
