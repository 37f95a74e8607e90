"""A real program that is edited, with real clients."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic

import pytest

from portico.traffic import STILLNESS
from tests.support import PATIENCE, ROOT, eventually, port_of_nobody, received
from tests.tls import Authority

HANDLER = """
def handle(request, address, server):
    request.recv(100)
    request.sendall(b"{answer}")
"""

RUN = """
import sys
from pathlib import Path
from portico import reloader
from portico.address import parse
from portico.configuration import Configuration, ProcessSettings, ServiceSettings
from portico.errors import SettingError
from portico.settings import Settings
def load():
    addresses = Path(sys.argv[2]).read_text().split()
    if not addresses:
        raise SettingError("addresses", "", "at least one")
    if addresses == ["broken"]:
        raise LookupError("not here,\\nnor there")
    return Configuration(process=ProcessSettings(), services=(ServiceSettings(
        name="a", target=sys.argv[1], addresses=tuple(map(parse, addresses)),
        settings=Settings()),))
try:
    reloader.run(load, lambda: [sys.argv[2]])
except Exception as error:
    sys.exit(f"refused: {error}")
"""


class Edited:
    """A program that is served while it is edited, as its author sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = folder / "app.py"
        self.lines: list[str] = []
        self._stack = ExitStack()

    def write(self, answer: str, before: str = "", after: str = "") -> None:
        """Edit the handler, as most editors do: in one step."""
        fresh = self.folder / "app.py.fresh"
        fresh.write_text(before + HANDLER.format(answer=answer) + after)
        fresh.replace(self.target)

    def serve(self, *options: str, address: str = "tcp://127.0.0.1:0", **variables: str) -> None:
        words = ["-m", "portico", "serve", "--reload", f"{self.target}:handle", address, *options]
        self.start(words, **variables)

    def start(self, words: list[str], **variables: str) -> None:
        self.process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, *words],
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        )

    def read(self, pattern: str) -> re.Match[str]:
        """Wait for a line, and return it."""
        assert self.process.stderr is not None
        stuck = threading.Timer(PATIENCE, self.end)
        stuck.start()
        try:
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.search(pattern, line):
                    return found
        finally:
            stuck.cancel()
        raise AssertionError(f"no line {pattern!r} in {''.join(self.lines)}")

    def ready(self) -> tuple[str, int]:
        """Wait until it serves, and return where."""
        found = self.read(r"ready on \w+://([^:]+):(\d+)")
        return found[1], int(found[2])

    def stop(self) -> str:
        """Stop it as Ctrl-C does, which is for all processes; return what it says at the end."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.rest()

    def rest(self) -> str:
        _, said = self.process.communicate(timeout=PATIENCE)
        return said

    def processes(self) -> set[int]:
        """Return the processes that are left of it."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == self.process.pid and state != "Z":
                found.add(int(entry.parent.name))
        return found

    def end(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        if hasattr(self, "process"):
            self.process.terminate()
            try:
                self.rest()
            finally:
                self.end()
        self._stack.close()


@pytest.fixture
def edited(tmp_path: Path) -> Iterator[Edited]:
    program = Edited(tmp_path)
    program.write("first")
    yield program
    program.close()


def ask(address: tuple[str, int]) -> bytes:
    with socket.create_connection(address, PATIENCE) as client:
        client.sendall(b"hello")
        return received(client)


def test_an_edit_is_served_at_the_same_address(edited: Edited) -> None:
    edited.serve()
    address = edited.ready()
    assert ask(address) == b"first"
    edited.write("second")
    edited.read("app.py has changed")
    assert edited.ready() == address
    assert ask(address) == b"second"


def test_of_two_edits_in_a_second_the_later_is_served(edited: Edited) -> None:
    """Compiled code that looks the same is not taken for it: `v01` is as long as `v02`."""
    edited.serve()
    address = edited.ready()
    for number in range(5):
        answer = f"v{number:02}"
        edited.write(answer)
        edited.ready()
        assert ask(address) == answer.encode()


def test_who_connects_while_the_program_is_exchanged_is_answered(edited: Edited) -> None:
    """The import waits until a client is in the backlog, and does not know of it."""
    gate = edited.folder / "gate"
    os.mkfifo(gate)
    edited.serve()
    address = edited.ready()
    edited.write("second", before=f"open({str(gate)!r}).read()\n")
    edited.read("stopped after")
    with socket.create_connection(address, PATIENCE) as client:
        client.sendall(b"hello")
        gate.write_text("go on")
        assert received(client) == b"second"


def test_nobody_is_refused_while_edits_come(edited: Edited) -> None:
    """Nor is anybody closed who does not keep silent for as long as one that has nothing to say."""
    edited.serve("--log-level", "warning")
    address = edited.ready()
    answers: list[bytes] = []
    failures: list[BaseException] = []
    enough = threading.Event()

    def come_and_go() -> None:
        while not enough.is_set():
            began = asked = monotonic()
            try:
                with socket.create_connection(address, PATIENCE) as client:
                    client.sendall(b"hello")
                    asked = monotonic()
                    answers.append(received(client))
            except OSError as error:
                if asked - began < STILLNESS:
                    failures.append(error)

    clients = [threading.Thread(target=come_and_go) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for number in range(4):
            edited.write(f"v{number:02}")
            edited.ready()
            count = len(answers)
            eventually(lambda: len(answers) > count + 4)  # noqa: B023  # called at once
    finally:
        enough.set()
        for client in clients:
            client.join()
    assert failures == []
    assert set(answers) <= {b"first", b"v00", b"v01", b"v02", b"v03"}
    assert b"v03" in answers


def test_a_syntax_error_is_said_and_a_client_waits_until_it_is_mended(edited: Edited) -> None:
    edited.serve()
    address = edited.ready()
    edited.write("second", after="class Broken(\n")
    edited.read(r"portico: error: .*SyntaxError.* at \S+app\.py:5")
    edited.read("exited with status 2; waiting for a change")
    with socket.create_connection(address, PATIENCE) as client:
        client.sendall(b"hello")
        edited.write("third")
        assert received(client) == b"third"


def test_an_error_at_the_first_start_can_be_mended_too(edited: Edited) -> None:
    edited.target.write_text("import no_such_module\n")
    edited.serve()
    edited.read("ModuleNotFoundError")
    edited.read("waiting for a change")
    edited.write("mended")
    assert ask(edited.ready()) == b"mended"


def test_a_server_that_dies_is_said_and_waits_for_a_change(edited: Edited) -> None:
    edited.write("first", before="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    edited.serve()
    edited.read("was killed by SIGKILL; waiting for a change")
    edited.write("second")
    assert ask(edited.ready()) == b"second"


def test_what_is_no_error_of_ours_is_shown_whole(edited: Edited) -> None:
    edited.write("first", before="import portico.edition as e\ne.logged = None\n")
    edited.serve()
    edited.read("Traceback")
    edited.read("exited with status 1; waiting")


def test_a_module_in_another_folder_is_watched_once_it_is_imported(edited: Edited) -> None:
    other = edited.folder / "other"
    (edited.folder / "program").mkdir()
    other.mkdir()
    (other / "words_of_the_program.py").write_text("WORD = b'one'\n")
    edited.folder = edited.folder / "program"
    edited.target = edited.folder / "app.py"
    edited.target.write_text(
        "from words_of_the_program import WORD\n"
        "def handle(request, address, server):\n    request.sendall(WORD)\n"
    )
    edited.serve(PYTHONPATH=str(other))
    address = edited.ready()
    assert ask(address) == b"one"
    # Its folder is told a moment before, and watched a moment after, it is ready.
    eventually(lambda: len(watchers(edited)) == 1 and watches(edited, other))
    (other / "words_of_the_program.py").write_text("WORD = (b'two'\n")
    edited.read("words_of_the_program.py:1")
    (other / "words_of_the_program.py").write_text("WORD = b'two'\n")
    edited.ready()
    assert ask(address) == b"two"


def watchers(edited: Edited) -> set[int]:
    """The processes that have something to watch with."""
    found = set()
    for process in edited.processes():
        if any("inotify" in link for link in open_files(process)):
            found.add(process)
    return found


def open_files(process: int) -> list[str]:
    """What the descriptors of a process are, but for the standard streams; nothing if it ended."""
    found: list[str] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for link in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed in the meantime
                if int(link.name) > 2:
                    found.append(str(link.readlink()))
    return found


def watches(edited: Edited, folder: Path) -> bool:
    """Whether a folder is among those that are watched."""
    inode = f"ino:{folder.stat().st_ino:x} "
    with suppress(FileNotFoundError, ProcessLookupError):  # a watcher that has just been replaced
        return any(
            inode in info.read_text()
            for process in watchers(edited)
            for info in Path(f"/proc/{process}/fdinfo").iterdir()
        )
    return False


def test_a_certificate_is_watched(edited: Edited, authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue()
    folder = tmp_path / "tls"
    folder.mkdir()
    cert = folder / "cert.pem"
    cert.write_bytes(pair.certificate.read_bytes())
    (edited.folder / "program").mkdir()
    edited.folder = edited.folder / "program"
    edited.target = edited.folder / "app.py"
    edited.write("first")
    edited.serve("--cert", str(cert), "--key", str(pair.key), address="tls://127.0.0.1:0")
    edited.ready()
    cert.write_bytes(pair.certificate.read_bytes())
    edited.read("cert.pem has changed")
    edited.ready()


def test_ctrl_c_drains_and_leaves_no_process(edited: Edited) -> None:
    """At a terminal all processes get it, and only the parent is to hear it."""
    edited.serve()
    assert ask(edited.ready()) == b"first"
    said = edited.stop()
    assert "drained in" in said
    assert "1 request served" in said
    assert edited.process.returncode == 0
    assert edited.processes() == set()


def test_a_signal_to_the_parent_alone_ends_all(edited: Edited) -> None:
    edited.serve()
    edited.ready()
    edited.process.terminate()
    assert "stopped after" in edited.rest()
    assert edited.process.returncode == 0
    assert edited.processes() == set()


def test_what_is_left_of_it_ends_when_the_parent_is_killed(edited: Edited) -> None:
    """As a development environment's stop button does it: nothing keeps the address."""
    edited.serve()
    address = edited.ready()
    assert ask(address) == b"first"
    edited.process.kill()
    said = edited.rest()  # to the end of the last process that has its standard error
    assert "has lost the one that watches its files, and ends" in said
    assert "1 request served" in said
    eventually(lambda: edited.processes() == set())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, PATIENCE)


def test_a_watcher_has_nothing_of_its_parent(edited: Edited) -> None:
    """It would keep for a moment what a killed parent leaves: the listeners, for one."""
    edited.serve()
    edited.ready()

    def has_a_pipe_alone() -> bool:
        kept = [link.partition(":")[0] for each in watchers(edited) for link in open_files(each)]
        return kept.count("pipe") == 1 and "socket" not in kept  # into which it writes

    eventually(has_a_pipe_alone)


@pytest.mark.long
def test_a_handler_that_goes_on_does_not_outlive_a_killed_parent(edited: Edited) -> None:
    held = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
    edited.target.write_text(held + BUSY)
    edited.serve(address="tcp://127.0.0.1:0")
    with socket.create_connection(edited.ready(), PATIENCE) as client:
        assert client.recv(4) == b"busy"
        edited.process.kill()
        edited.rest()
    eventually(lambda: edited.processes() == set())


def test_an_import_that_takes_long_ends_with_a_killed_parent(edited: Edited) -> None:
    gate = edited.folder / "gate"
    os.mkfifo(gate)
    edited.write("first", before=f"print('imports', flush=True)\nopen({str(gate)!r}).read()\n")
    edited.serve()
    eventually(lambda: len(edited.processes()) == 3)  # and the watcher
    edited.process.kill()
    edited.rest()
    eventually(lambda: edited.processes() == set())


@pytest.mark.parametrize("is_for_all", [True, False])
def test_a_terminal_that_is_closed_ends_all(edited: Edited, *, is_for_all: bool) -> None:
    """The system sends SIGHUP to all of its processes; a shell may send it to the parent alone."""
    edited.serve()
    assert ask(edited.ready()) == b"first"
    (os.killpg if is_for_all else os.kill)(edited.process.pid, signal.SIGHUP)
    said = edited.rest()
    assert "1 request served" in said
    assert edited.process.returncode == 0
    assert edited.processes() == set()


def test_under_nohup_the_end_of_a_terminal_is_not_heard(edited: Edited) -> None:
    lines = "import os, signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    run = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    serve = ["-m", "portico", "serve", "--reload", f"{edited.target}:handle", "tcp://127.0.0.1:0"]
    edited.start(["-c", lines + run, *serve])
    address = edited.ready()
    os.killpg(edited.process.pid, signal.SIGHUP)
    edited.write("second")
    assert edited.ready() == address
    assert ask(address) == b"second"


def test_a_stop_while_it_waits_for_a_change_ends_at_once(edited: Edited) -> None:
    edited.target.write_text("1 +\n")
    edited.serve()
    edited.read("waiting for a change")
    edited.stop()
    assert edited.process.returncode == 0


BUSY = """
import time
def handle(request, address, server):
    request.sendall(b"busy")
    while True:
        time.sleep(0.01)
"""


def test_a_second_signal_ends_it_at_once(edited: Edited) -> None:
    edited.target.write_text(BUSY)
    edited.serve()
    with socket.create_connection(edited.ready(), PATIENCE) as client:
        assert client.recv(4) == b"busy"
        os.killpg(edited.process.pid, signal.SIGINT)
        edited.read("drains: 1 open")
        os.killpg(edited.process.pid, signal.SIGINT)
        said = edited.rest()
        assert "1 cut off" in said
        assert "drained in" not in said
    assert edited.process.returncode == 0


def test_sigterm_to_every_process_drains_all_the_same(edited: Edited) -> None:
    """As timeout(1) sends it: who serves is told twice, and ends at once by neither."""
    edited.target.write_text(BUSY)
    edited.serve()
    with socket.create_connection(edited.ready(), PATIENCE) as client:
        assert client.recv(4) == b"busy"
        os.killpg(edited.process.pid, signal.SIGTERM)
        assert re.search(r"drained in .*1 forced", edited.rest())
    assert edited.process.returncode == 0


def test_a_handler_that_goes_on_does_not_keep_an_edit_back(edited: Edited) -> None:
    edited.target.write_text(BUSY)
    edited.serve()
    address = edited.ready()
    with socket.create_connection(address, PATIENCE) as client:
        assert client.recv(4) == b"busy"
        edited.write("second")
        edited.ready()
        assert ask(address) == b"second"


@pytest.mark.long
def test_a_server_that_does_not_end_is_killed(edited: Edited) -> None:
    source = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
    edited.write("first", before=source)
    edited.serve()
    address = edited.ready()
    edited.write("second")
    edited.ready()
    assert ask(address) == b"second"


def test_settings_are_read_again_and_listeners_follow(edited: Edited, tmp_path: Path) -> None:
    settings = tmp_path / "addresses"
    settings.write_text("tcp://127.0.0.1:0")
    edited.start(["-c", RUN, f"{edited.target}:handle", str(settings)])
    one = edited.ready()
    settings.write_text("tcp://127.0.0.1:0 tcp://127.0.0.1:0")
    edited.read("addresses has changed")
    assert edited.ready() == one
    two = edited.ready()
    assert ask(one) == ask(two) == b"first"
    settings.write_text("")
    edited.read("error: addresses='': expected at least one; waiting for a change")
    settings.write_text(f"tcp://127.0.0.1:{two[1]}")
    assert edited.ready() == two
    assert ask(two) == b"first"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(one, PATIENCE)


def test_whatever_reading_the_settings_raises_is_said_and_waits_for_a_change(
    edited: Edited, tmp_path: Path
) -> None:
    settings = tmp_path / "addresses"
    settings.write_text("tcp://127.0.0.1:0")
    edited.start(["-c", RUN, f"{edited.target}:handle", str(settings)])
    _, port = edited.ready()
    settings.write_text("broken")
    edited.read("error: LookupError: not here, nor there; waiting for a change")
    settings.write_text(f"tcp://127.0.0.1:{port}")
    assert ask(edited.ready()) == b"first"


def test_settings_that_are_nested_too_deep_are_said_and_wait_for_a_change(
    edited: Edited, tmp_path: Path
) -> None:
    settings = tmp_path / "portico.toml"
    text = f"target = '{edited.target}:handle'\naddresses = 'tcp://127.0.0.1:0'\n"
    settings.write_text(text)
    edited.start(["-m", "portico", "serve", "--reload", "--config", str(settings)])
    address = edited.ready()
    settings.write_text(f"{text}farewell = {'[' * 3000}\n")
    edited.read("error: .*; waiting for a change")
    settings.write_text(text)
    assert edited.ready() == address


def test_the_log_is_opened_again_and_what_was_counted_said(edited: Edited, tmp_path: Path) -> None:
    log = tmp_path / "log"
    edited.serve("--log-file", str(log), "--pid-file", str(tmp_path / "pid"))
    address = edited.ready()
    assert ask(address) == b"first"
    log.rename(tmp_path / "moved")
    process = int((tmp_path / "pid").read_text())
    os.kill(process, signal.SIGUSR1)
    edited.read("has opened its log again")
    counted = r"tcp://127\.0\.0\.1:\d+: 1 accepted, ([01]) served"
    while edited.read(counted)[1] == "0":  # a moment after the client has seen the end
        os.kill(process, signal.SIGUSR1)
    assert log.exists()
    assert ask(address) == b"first"
    edited.stop()
    assert not (tmp_path / "pid").exists()


def test_what_is_asked_while_the_program_is_imported_is_done_when_it_serves(edited: Edited) -> None:
    """And though the program takes the signal for itself."""
    gate = edited.folder / "gate"
    os.mkfifo(gate)
    taken = "import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_DFL)\n"
    edited.serve()
    edited.ready()
    edited.write("second", before=f"open({str(gate)!r}).read()\n{taken}")
    with gate.open("w") as opened:  # as soon as the import reads it
        edited.process.send_signal(signal.SIGUSR1)
        edited.process.send_signal(signal.SIGUSR2)
        edited.read("SIGUSR2 changes nothing: --reload does not hand over")
        opened.write("go on")
    address = edited.ready()
    edited.read("has opened its log again")
    assert ask(address) == b"second"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_what_is_asked_while_nothing_serves_ends_nothing(edited: Edited, number: int) -> None:
    edited.target.write_text("1 +\n")
    edited.serve()
    edited.read("waiting for a change")
    edited.process.send_signal(number)
    edited.process.send_signal(signal.SIGUSR2)
    edited.read("SIGUSR2 changes nothing")
    edited.write("mended")
    assert ask(edited.ready()) == b"mended"


def test_workers_are_said_to_be_left_aside(edited: Edited) -> None:
    """Once, and not at each edit."""
    edited.serve("--workers", "2")
    address = edited.ready()
    said = "portico: --reload serves in one process, and leaves workers=2 aside\n"
    assert edited.lines.count(said) == 1
    eventually(lambda: len(edited.processes()) == 3)  # with the parent and a watcher
    edited.write("second")
    assert edited.ready() == address
    assert edited.lines.count(said) == 1


def test_an_address_that_is_in_the_way_of_the_next_gives_it_room(
    edited: Edited, tmp_path: Path
) -> None:
    settings, port = tmp_path / "addresses", port_of_nobody()
    settings.write_text(f"tcp://127.0.0.1:{port}")
    edited.start(["-c", RUN, f"{edited.target}:handle", str(settings)])
    edited.ready()
    settings.write_text(f"tcp://0.0.0.0:{port}")
    assert edited.ready() == ("0.0.0.0", port)
    assert ask(("127.0.0.1", port)) == b"first"


def test_a_file_of_settings_is_watched(edited: Edited, tmp_path: Path) -> None:
    settings = tmp_path / "portico.toml"
    text = f"target = '{edited.target}:handle'\naddresses = 'tcp://127.0.0.1:0'\n"
    settings.write_text(text)
    edited.start(["-m", "portico", "serve", "--reload", "--config", str(settings)])
    address = edited.ready()
    settings.write_text(f"{text}idle_timeot = 1\n")
    edited.read(r"error: .*portico.toml.*; waiting for a change")
    settings.write_text(f"{text}idle_timeout = 1\n")
    assert edited.ready() == address
    assert ask(address) == b"first"


def test_an_address_that_cannot_be_had_is_an_error_of_the_first_start(edited: Edited) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        edited.serve(address=f"tcp://127.0.0.1:{taken.getsockname()[1]}")
        assert "portico: error: cannot listen on" in edited.rest()
    assert edited.process.returncode == 2
    assert edited.processes() == set()
