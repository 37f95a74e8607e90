"""Become another user, once what needs root is done.

Owns who that is and that there is no way back.  Leaves to the program when it happens: after its
listeners are open, and before anything of the handler's is imported.

Sources: setresuid(2), setresgid(2); setgroups(2), whose supplementary groups outlive a change of
user and have to be replaced first; credentials(7); passwd(5).
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from portico.errors import PorticoError, SettingError

MOST_ACCOUNTS: Final = 2**32 - 2
"""The largest number of a user or group; the next one, -1, means "leave it" in setresuid(2)."""


class PrivilegeError(PorticoError, PermissionError):
    """The process cannot become whom it was asked to become."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a process is to be.

    Attributes:
        uid: The number of the user.
        gid: The number of the group.
        groups: The other groups that the user belongs to.
        words: The user and the group, as they were asked for.
    """

    uid: int
    gid: int
    groups: frozenset[int]
    words: str

    def __str__(self) -> str:
        return self.words


def find(user: str | int | None, group: str | int | None) -> Identity | None:
    """Find who is meant, and make sure that this process can become them.

    To be called before anything is opened: afterwards `drop` does not fail for a misspelt name.

    Args:
        user: A name or a number; ``None`` for the user that this process is.
        group: The same; ``None`` for the group of `user`.

    Returns:
        ``None`` if neither is given.

    Raises:
        SettingError: There is no such user or group.
        PrivilegeError: This process is neither root nor them.
    """
    wanted = look_up(user, group)
    if wanted is not None and os.geteuid() != 0 and not _is(wanted):
        raise PrivilegeError(f"cannot become {wanted}: only root can, and this is {_name_here()}")
    return wanted


def look_up(user: str | int | None, group: str | int | None) -> Identity | None:
    """Find who is meant, whether this process can become them or not; see `find`.

    Raises:
        SettingError: There is no such user or group.
    """
    if user is None:
        if group is None:
            return None
        entry, uid, gid = None, os.geteuid(), find_gid(group)
    else:
        entry, uid = _entry(user), find_uid(user)
        gid = _group_of(user, entry) if group is None else find_gid(group)
    groups = frozenset[int]()
    if entry is not None:
        groups = frozenset(os.getgrouplist(entry.pw_name, gid)) - {gid}
    words = ", ".join(
        f"{kind} {name}" for kind, name in (("user", user), ("group", group)) if name is not None
    )
    return Identity(uid, gid, groups, words)


def drop(identity: Identity | None) -> None:
    """Become somebody else, in all threads and for good.

    Does nothing for ``None``, and for who this process is already.

    Raises:
        PrivilegeError: The system refuses, or the way back is open.  The process is in between
            then, and has to end.
    """
    if identity is None or (os.geteuid() != 0 and _is(identity)):
        return
    try:
        os.setgroups(sorted(identity.groups | {identity.gid}))
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as error:
        raise PrivilegeError(f"cannot become {identity}: {error.strerror}") from error
    if not _is(identity) or not _is_final(identity):
        raise PrivilegeError(f"cannot become {identity} for good: the way back is open")


def find_uid(user: str | int, setting: str = "user") -> int:
    """Return the number of a user.

    Raises:
        SettingError: There is no such user.
    """
    entry = _entry(user, setting)
    return int(user) if entry is None else entry.pw_uid


def find_gid(group: str | int, setting: str = "group") -> int:
    """Return the number of a group.

    Raises:
        SettingError: There is no such group.
    """
    number = _number(group)
    if number is not None:
        return number
    with suppress(KeyError):
        return grp.getgrnam(str(group)).gr_gid
    raise SettingError(setting, group, "the name of a group of this machine, or a number")


def _entry(user: str | int, setting: str = "user") -> pwd.struct_passwd | None:
    """Find a user; ``None`` for a number without an entry.

    Raises:
        SettingError: There is no such user.
    """
    number = _number(user)
    with suppress(KeyError):
        return pwd.getpwnam(str(user)) if number is None else pwd.getpwuid(number)
    if number is None:
        raise SettingError(setting, user, "the name of a user of this machine, or a number")
    return None


def _group_of(user: str | int, entry: pwd.struct_passwd | None) -> int:
    """Return the group of a user.

    Raises:
        SettingError: It has none, because it is a number without an entry.
    """
    if entry is None:
        raise SettingError("group", None, f"a group, since user {user} has no entry with one")
    return entry.pw_gid


def _is(wanted: Identity) -> bool:
    """Say whether this process is somebody, in every respect."""
    return (
        os.getresuid() == (wanted.uid,) * 3
        and os.getresgid() == (wanted.gid,) * 3
        and set(os.getgroups()) <= wanted.groups | {wanted.gid}
    )


def _is_final(identity: Identity) -> bool:
    """Try the way back, which has to be closed to everybody but root."""
    if identity.uid == 0:
        return True
    return _is_refused(os.seteuid) and (identity.gid == 0 or _is_refused(os.setegid))


def _is_refused(attempt: Callable[[int], None]) -> bool:
    """Say whether the system refuses to make this process root, or one of root's group."""
    with suppress(PermissionError):
        attempt(0)
        return False
    return True


def _name_here() -> str:
    """Name the user that this process is."""
    with suppress(KeyError):
        return f"user {pwd.getpwuid(os.geteuid()).pw_name}"
    return f"user {os.geteuid()}"


def _number(account: str | int) -> int | None:
    """Read the number of a user or a group; ``None`` for a name."""
    text = str(account)
    if text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= MOST_ACCOUNTS:
        return int(text)
    return None
