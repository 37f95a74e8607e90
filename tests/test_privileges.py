from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from portico import privileges
from portico.errors import PorticoError, SettingError
from portico.privileges import Identity, PrivilegeError
from tests.support import PATIENCE

NOBODY = pwd.getpwnam("nobody")

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")


def as_root(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that ends as somebody else, who may not write what coverage has measured."""
    environment = {name: text for name, text in os.environ.items() if "COVERAGE" not in name}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        cwd="/",
    )


# --- who is meant -------------------------------------------------------------------------------


def test_nobody_is_meant_where_nothing_is_said() -> None:
    assert privileges.find(None, None) is None
    privileges.drop(None)


@root_only
@pytest.mark.parametrize("user", ["nobody", str(NOBODY.pw_uid), NOBODY.pw_uid])
def test_a_user_is_a_name_or_a_number_and_has_a_group(user: str | int) -> None:
    found = privileges.find(user, None)
    assert found is not None
    assert (found.uid, found.gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert str(found) == f"user {user}"


@root_only
def test_a_group_is_a_name_or_a_number() -> None:
    group = grp.getgrnam("daemon")
    for name in ("daemon", group.gr_gid, str(group.gr_gid)):
        found = privileges.find("nobody", name)
        assert found is not None
        assert (found.uid, found.gid) == (NOBODY.pw_uid, group.gr_gid)


@root_only
def test_a_group_alone_leaves_the_user() -> None:
    found = privileges.find(None, "daemon")
    assert found is not None
    assert (found.uid, found.groups, str(found)) == (0, frozenset(), "group daemon")


@root_only
def test_the_other_groups_of_a_user_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 7, 8])
    found = privileges.find("nobody", "daemon")
    assert found is not None
    assert found.groups == {7, 8}


@root_only
def test_a_number_without_an_entry_needs_a_group() -> None:
    with pytest.raises(SettingError, match="expected a group, since user 54321 has no entry"):
        privileges.find(54321, None)
    found = privileges.find(54321, 54322)
    assert found is not None
    assert (found.uid, found.gid, found.groups) == (54321, 54322, frozenset())


@pytest.mark.parametrize("user", ["no such user", "-1", str(2**32 - 1), "9" * 20])
def test_a_user_that_does_not_exist_is_told_before_anything_is_opened(user: str) -> None:
    with pytest.raises(SettingError, match=r"user=.* expected the name of a user of this machine"):
        privileges.find(user, None)


def test_a_group_that_does_not_exist_is_told() -> None:
    with pytest.raises(SettingError, match="group='no such group': expected the name of a group"):
        privileges.find(None, "no such group")


def test_who_is_not_root_cannot_become_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY.pw_uid)
    with pytest.raises(PrivilegeError) as caught:
        privileges.find("daemon", None)
    assert str(caught.value) == (
        "cannot become user daemon: only root can, and this is user nobody"
    )
    assert isinstance(caught.value, PorticoError)
    assert isinstance(caught.value, PermissionError)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(PrivilegeError, match="this is user 54321"):
        privileges.find("daemon", None)


def test_who_is_somebody_already_need_not_become_it(monkeypatch: pytest.MonkeyPatch) -> None:
    uid, gid = NOBODY.pw_uid, NOBODY.pw_gid
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(os, "getresuid", lambda: (uid, uid, uid))
    monkeypatch.setattr(os, "getresgid", lambda: (gid, gid, gid))
    monkeypatch.setattr(os, "getgroups", lambda: [gid])
    privileges.drop(privileges.find("nobody", None))  # no call that only root may make


# --- becoming it --------------------------------------------------------------------------------

DROP = """
import os, sys, threading
from portico import privileges

descriptor = os.open("/", os.O_RDONLY)  # what is open stays open
started, dropped = threading.Event(), threading.Event()
others = []

def other():
    started.set()
    dropped.wait()
    others.append(os.getresuid())

thread = threading.Thread(target=other)
thread.start()
started.wait()
privileges.drop(privileges.find(sys.argv[1], sys.argv[2] or None))
dropped.set()
thread.join()
ways = [
    lambda: os.setuid(0), lambda: os.seteuid(0), lambda: os.setresuid(0, 0, 0),
    lambda: os.setgid(0), lambda: os.setegid(0), lambda: os.setgroups([0]),
]
refused = 0
for way in ways:
    try:
        way()
    except PermissionError:
        refused += 1
os.fstat(descriptor)
print(os.getresuid(), os.getresgid(), os.getgroups(), others[0] == os.getresuid(), refused)
with open("/proc/self/status") as status:
    print(*(line.split()[1] for line in status if line.startswith(("CapPrm", "CapEff"))))
"""


@root_only
@pytest.mark.parametrize(("user", "group"), [("nobody", ""), ("54321", "54322")])
def test_a_dropped_process_is_somebody_else_in_all_threads_and_for_good(
    user: str, group: str
) -> None:
    uid = int(user) if user.isdecimal() else NOBODY.pw_uid
    gid = int(group) if group else NOBODY.pw_gid
    done = as_root(DROP, user, group)
    assert done.stderr == ""
    who, capabilities = done.stdout.splitlines()
    assert who == f"{(uid,) * 3} {(gid,) * 3} [{gid}] True 6"
    assert {int(each, 16) for each in capabilities.split()} == {0}


@root_only
def test_a_group_alone_is_taken_on_by_root() -> None:
    program = (
        "import os; from portico import privileges;"
        "privileges.drop(privileges.find(None, 54322));"
        "print(os.getresuid(), os.getresgid(), os.getgroups())"
    )
    done = as_root(program)
    assert done.stdout == "(0, 0, 0) (54322, 54322, 54322) [54322]\n", done.stderr


class Kernel:
    """Stands in for the system calls, and notes their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.uid, self.gid, self.groups = 0, 0, [0, 4]
        self.lets_back = ""
        self.fails = ""
        for name in ("setgroups", "setresgid", "setresuid", "seteuid", "setegid"):
            monkeypatch.setattr(os, name, lambda *given, name=name: self._set(name, *given))
        monkeypatch.setattr(os, "geteuid", lambda: self.uid)
        monkeypatch.setattr(os, "getresuid", lambda: (self.uid,) * 3)
        monkeypatch.setattr(os, "getresgid", lambda: (self.gid,) * 3)
        monkeypatch.setattr(os, "getgroups", lambda: self.groups)

    def _set(self, name: str, *given: Any) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise PermissionError(1, "Operation not permitted")
        match name:
            case "setgroups":
                self.groups = given[0]
            case "setresgid":
                self.gid = given[0]
            case "setresuid":
                self.uid = given[0]
            case _ if name != self.lets_back:
                raise PermissionError(1, "Operation not permitted")


WANTED = Identity(7, 8, frozenset({9}), "user x")


def test_groups_go_first_and_the_user_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not root any more cannot change the others."""
    kernel = Kernel(monkeypatch)
    privileges.drop(WANTED)
    assert kernel.calls == ["setgroups", "setresgid", "setresuid", "seteuid", "setegid"]
    assert (kernel.uid, kernel.gid, kernel.groups) == (7, 8, [8, 9])


def test_the_group_of_root_is_no_way_back_for_who_was_asked_to_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(monkeypatch)
    privileges.drop(Identity(7, 0, frozenset(), "user x"))
    assert kernel.calls[-1] == "seteuid"


@pytest.mark.parametrize("way", ["seteuid", "setegid"])
def test_a_way_back_that_is_open_ends_the_program(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    Kernel(monkeypatch).lets_back = way
    with pytest.raises(PrivilegeError, match="cannot become user x for good"):
        privileges.drop(WANTED)


def test_what_the_system_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without CAP_SETUID, root is refused."""
    Kernel(monkeypatch).fails = "setgroups"
    with pytest.raises(PrivilegeError, match="cannot become user x: Operation not permitted"):
        privileges.drop(WANTED)


TARGET = """
import os
import signal
import portico
print(os.getresuid(), os.path.exists(os.path.dirname(__file__) + "/a.sock"), flush=True)
class Handler(portico.BaseRequestHandler):
    pass
with open(os.path.dirname(__file__) + "/portico.pid") as file:
    main = int(file.read())
portico.events.subscribe(lambda _: os.kill(main, signal.SIGTERM), portico.events.ServerStarted)
"""


@root_only
@pytest.mark.parametrize("more", [[], ["--workers", "1"]])
def test_a_program_opens_its_listeners_as_root_and_imports_its_target_as_the_user(
    more: list[str],
) -> None:
    """What it may not remove at its end is left in a state that the next one replaces."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # pytest's own are closed to others
        Path(folder, "target.py").write_text(TARGET)
        for _ in range(2):
            done = as_root(
                "from portico.cli import main; main()",
                *("serve", f"{folder}/target.py:Handler", f"unix:{folder}/a.sock"),
                *("--user", "nobody", "--pid-file", f"{folder}/portico.pid", *more),
            )
            assert done.stdout == f"{(NOBODY.pw_uid,) * 3} True\n", done.stderr
            assert done.returncode == 0
            assert Path(folder, "portico.pid").read_text() == ""
            assert Path(folder, "a.sock").is_socket()
