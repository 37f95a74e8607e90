"""A supervisor and its workers, as real processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from portico.configuration import Configuration, ProcessSettings
from portico.signals import SAME_WISH
from portico.supervision import Generation, Stage, Stop, Worker, note_end
from portico.supervisor import Supervisor
from portico.systemd import Notifier
from tests.supervised import ECHO, Supervised, supervised
from tests.support import PATIENCE, Client, eventually, goodbye, received, run_program
from tests.tls import Authority


def waiting_for(gate: Path) -> str:
    """Return a handler whose ``slow`` lasts until there is a file."""
    wait = f"while not os.path.exists({str(gate)!r}): portico.sleep(0.01)"
    return ECHO.replace("portico.sleep(0.7)", wait)


SECOND = ECHO.replace('VERSION = b""', 'VERSION = b"second "')
BROKEN = "import nothing_of_this_name\n"


def test_workers_serve_until_sigterm_and_everything_is_said(tmp_path: Path) -> None:
    with supervised(tmp_path) as program:
        program.wait_ready(2)
        first, second = program.workers()
        assert program.ask(b"hello\n") == b"hello\n"
        assert int(program.ask(b"who\n")) in {first, second}
        program.stop()
        assert program.wait_ended() == 0
        assert len(program.find(r"worker \d \(process \d+\) has ended")) == 2
        assert program.find(r"stopped after .* s: 2 requests served")


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=1) as program:
        program.wait_ready(1)
        assert program.ask() == b"hello\n"
        os.kill(program.workers()[0], signal.SIGKILL)
        program.wait_for(r"worker 1 \(process \d+\) was killed by SIGKILL")
        program.wait_ready(2)
        assert program.ask() == b"hello\n"
        program.stop()


def test_a_client_in_the_queue_of_a_killed_worker_is_served_by_the_next(tmp_path: Path) -> None:
    """The serial engine has it wait there while another one is served."""
    with supervised(tmp_path, workers=1, engine="serial") as program:
        program.wait_ready(1)
        with program.connect() as first, program.connect() as waiting:
            first.sendall(b"one\n")
            assert first.recv(64) == b"one\n"
            waiting.sendall(b"two\n")
            os.kill(program.workers()[0], signal.SIGKILL)
            assert waiting.recv(64) == b"two\n"
            assert goodbye(first) == b""
        program.stop()


def test_workers_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    with supervised(tmp_path) as program:
        program.wait_ready(2)
        program.send(signal.SIGKILL)
        program.wait_silent()
        assert len(program.find("has lost its supervisor")) == 2


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    with supervised(tmp_path, settings={"drain_timeout": None}, same_wish=0) as program:
        program.wait_ready(2)
        with program.connect() as client:
            client.sendall(b"hello")  # half of a line: it is not idle
            program.send(signal.SIGTERM)
            program.wait_for("stops \\(SIGTERM\\)")
            program.send(signal.SIGINT)
            program.wait_silent()
            assert program.wait_ended() == 0
            assert program.find("stops at once")


@pytest.mark.parametrize("workers", [2, None])
def test_two_signals_that_come_together_are_one(tmp_path: Path, workers: int | None) -> None:
    """As timeout(1) sends them: to the program, and to the group that the program is in."""
    source = waiting_for(tmp_path / "gate")
    settings = {"drain_timeout": None}
    with supervised(tmp_path, source, workers=workers, settings=settings, same_wish=1e9) as program:
        program.wait_ready(workers or 0)
        with program.connect() as client:
            client.sendall(b"who\n")
            assert client.recv(64)
            client.sendall(b"slow\n")
            program.send(signal.SIGTERM)
            eventually(lambda: refuses(program))  # it has heard the first
            program.send(signal.SIGTERM)
            program.send(signal.SIGUSR1)
            program.wait_for("has opened its log again")  # and the second
            (tmp_path / "gate").touch()
            assert client.recv(64) == b"slow\n"
        program.wait_silent()
        assert program.wait_ended() == 0
        assert not program.find("at once|cut off")


def test_ctrl_c_is_the_supervisors(tmp_path: Path) -> None:
    """The terminal sends it to the whole group, and each worker drains once."""
    with supervised(tmp_path) as program:
        program.wait_ready(2)
        with program.connect() as client:
            client.sendall(b"hello\n")
            assert client.recv(64) == b"hello\n"
            os.killpg(program.pid, signal.SIGINT)
            assert goodbye(client) == b""  # idle, so it is given end-of-file
        program.wait_silent()
        assert program.wait_ended() == 0
        assert len(program.find("has ended")) == 2


def begin_request(client: socket.socket) -> None:
    """Have one request answered, and send half of the next."""
    client.sendall(b"one\n")
    assert client.recv(64) == b"one\n"
    # Who was last, the kernel tells by a clock of a few milliseconds.
    threading.Event().wait(0.02)
    client.sendall(b"half ")


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_sigterm_to_every_process_drains_all_the_same(tmp_path: Path, engine: str) -> None:
    """As systemd sends it, and timeout(1): a worker is told twice, and ends at once by neither."""
    with supervised(tmp_path, engine=engine) as program:
        program.wait_ready(2)
        with program.connect() as client:
            begin_request(client)
            os.killpg(program.pid, signal.SIGTERM)
            program.wait_for("has ended")  # the other worker: both have been told by now
            client.sendall(b"and half\n")
            assert client.recv(64) == b"half and half\n"
        program.wait_silent()
        assert program.wait_ended() == 0
        assert len(program.find("has ended")) == 2


def test_a_worker_that_drains_goes_on_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=1) as program:
        program.wait_ready(1)
        with program.connect() as client:
            begin_request(client)
            program.send(signal.SIGTERM)
            program.wait_for("stops")
            eventually(lambda: refuses(program))
            program.send(signal.SIGKILL)
            program.wait_for("has lost its supervisor")
            client.sendall(b"and half\n")
            assert client.recv(64) == b"half and half\n"
        program.wait_silent()


def test_a_worker_that_gets_sigterm_from_outside_is_replaced_at_once_and_drains(
    tmp_path: Path,
) -> None:
    """Nor is it taken for stuck, and killed, because its loop goes round no more."""
    with supervised(tmp_path, workers=1, worker_timeout=4) as program:
        program.wait_ready(1)
        with program.connect() as client:
            client.sendall(b"who\n")
            worker = int(client.recv(64))
            begin_request(client)
            os.kill(worker, signal.SIGTERM)
            program.wait_ready(2)  # which does not wait for the end of the first
            assert int(program.ask(b"who\n")) != worker
            client.sendall(b"and half\n")
            assert client.recv(64) == b"half and half\n"
        program.wait_for(rf"\(process {worker}\) has ended")
        assert not program.find("is killed")
        program.stop()


def refuses(program: Supervised) -> bool:
    """Say whether nobody listens any more."""
    with Client(socket.AF_INET, socket.SOCK_STREAM) as client:
        return client.connect_ex(("127.0.0.1", program.port)) == errno.ECONNREFUSED


def test_a_target_that_does_not_import_ends_it_with_the_reason(tmp_path: Path) -> None:
    with supervised(tmp_path, BROKEN) as program:
        assert program.wait_ended() == 2
        program.wait_silent()
        assert program.find("no worker can start")
        assert program.find(r"error: cannot serve .* importing .* failed with ModuleNotFoundError")


def test_a_worker_that_does_not_come_to_serve_is_ended_and_says_where_it_was(
    tmp_path: Path,
) -> None:
    source = "import threading\nthreading.Event().wait()  # for nothing\n"
    with supervised(tmp_path, source, workers=1, start_timeout=2.5) as program:
        assert program.wait_ended() == 2
        program.wait_silent()
        assert program.find("for nothing")
        assert program.find("is killed: it does not serve after 2.5 s")


SIGNALLED = """
import os
import signal
import sys
from contextlib import contextmanager
from portico import supervisor
from tests import supervised

kept = supervisor.log_kept

@contextmanager
def log_kept(process):
    assert all(map(os.path.exists, sys.argv[2:]))
    os.kill(os.getpid(), signal.SIGTERM)
    with kept(process):
        yield

supervisor.log_kept = log_kept
supervised.main()
"""


def test_a_signal_before_anything_is_started_leaves_no_files(tmp_path: Path) -> None:
    """It comes while the supervisor opens its log, with its listeners open."""
    path, pid_file, settings = tmp_path / "echo", tmp_path / "pid", tmp_path / "settings"
    (tmp_path / "app.py").write_text(ECHO)
    service = {"target": f"{tmp_path}/app.py:Echo", "addresses": [f"unix:{path}"], "settings": {}}
    process = {"workers": 2, "pid_file": str(pid_file)}
    told = {"process": process, "services": [service], "same_wish": 0.0}
    settings.write_text(json.dumps(told))
    ended = run_program(SIGNALLED, *map(str, (settings, path, pid_file)))
    assert ended.returncode == 0, ended.stderr
    assert "stops (SIGTERM)" in ended.stderr
    assert "worker" not in ended.stderr
    assert not path.exists()
    assert not pid_file.exists()


def test_signals_that_come_while_the_end_is_said_are_one_wish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever reads what is said may take his time."""
    now = 5.0
    configuration = Configuration(process=ProcessSettings(workers=2), services=())
    supervisor = Supervisor(lambda: configuration, configuration, Notifier.take({}))

    def say_slowly(_: str) -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("portico.supervisor.say", say_slowly)
    stops = []
    for _ in range(3):
        supervisor._end("SIGTERM")
        stops.append(supervisor._stop)
        now += 0.6 * SAME_WISH
    assert stops == [Stop.DRAIN, Stop.DRAIN, Stop.NOW]


def test_when_another_worker_starts_is_said_once_and_not_of_one_that_went_as_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configuration = Configuration(process=ProcessSettings(workers=2), services=())
    supervisor = Supervisor(lambda: configuration, configuration, Notifier.take({}))
    now = time.monotonic()
    failed = partial(note_end, worker=Worker(1, 1, Stage.STARTING, now, now), now=now, reason="")
    asked = Worker(1, 1, Stage.DRAINING, now, now)
    supervisor._serving = Generation(1)
    supervisor._change(1, failed)
    assert "starts another worker in 0.5 s" in capsys.readouterr().err
    supervisor._change(1, failed)
    supervisor._change(1, lambda each: note_end(each, asked, now, ""))
    supervisor._serving, supervisor._stop = Generation(1), Stop.DRAIN
    supervisor._change(1, failed)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workers", [1, None])
def test_a_successor_that_does_not_serve_yet_ends_with_its_predecessor(
    tmp_path: Path, workers: int | None
) -> None:
    """At once, and who is connected has the time of the drain."""
    source, pid_file = waiting_for(tmp_path / "gate"), tmp_path / "pid"
    with supervised(tmp_path, source, workers=workers, pid_file=str(pid_file)) as program:
        program.wait_ready(workers or 0)
        with program.connect() as client:
            client.sendall(b"who\n")
            assert client.recv(64)
            client.sendall(b"slow\n")
            settings = tmp_path / "settings.json"
            settings.unlink()
            os.mkfifo(settings)
            program.send(signal.SIGUSR2)
            program.wait_for("starts another")
            program.send(signal.SIGTERM)
            program.wait_for(r"the other \w+ was killed by SIGTERM before it served$")
            (tmp_path / "gate").touch()
            assert client.recv(64) == b"slow\n"
        program.wait_silent()
        assert program.wait_ended() == 0
        assert not program.find("cut off")
        assert not pid_file.exists()


@pytest.mark.parametrize("workers", [2, None])
def test_limits_of_time_may_be_longer_than_the_system_waits_at_once(
    tmp_path: Path, workers: int | None
) -> None:
    month = 30 * 24 * 3600
    with supervised(
        tmp_path, workers=workers, worker_timeout=month, start_timeout=1e300
    ) as program:
        program.wait_ready(workers or 0)
        assert program.ask() == b"hello\n"
        program.write(SECOND)
        hand_over(program)
        eventually(lambda: program.ask() == b"second hello\n")
        program.stop()


# --- more and less -----------------------------------------------------------------------


def test_signals_ask_for_one_worker_more_or_less_but_never_none(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=1) as program:
        program.wait_ready(1)
        program.send(signal.SIGTTIN)
        program.wait_ready(2)
        program.send(signal.SIGTTOU)
        program.wait_for("worker 2 .* drains: it is one too many")
        program.wait_for("worker 2 .* has ended")
        program.send(signal.SIGTTOU)
        assert program.ask() == b"hello\n"
        assert len(program.workers()) == 1
        program.stop()


def test_a_worker_that_has_served_enough_is_replaced(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=1, max_requests=3, max_requests_jitter=1) as program:
        program.wait_ready(1)
        for _ in range(4):
            eventually(lambda: program.ask() == b"hello\n")
        program.wait_for(r"drains: it has served \d requests \(max_requests\)")
        program.wait_for("has ended")
        assert program.ask() == b"hello\n"
        program.stop()


def test_a_worker_that_has_grown_is_replaced(tmp_path: Path) -> None:
    source = ECHO.replace("for line in self.rfile:", "for line in grown(self.rfile):") + (
        "\nkept = []\ndef grown(lines):\n    kept.append(bytearray(b'x') * (256 << 20))\n"
        "    return lines\n"
    )
    with supervised(tmp_path, source, workers=1, max_worker_memory=200 << 20) as program:
        program.wait_ready(1)
        assert program.ask() == b"hello\n"
        program.wait_for(r"drains: it takes \d+ MiB of memory \(max_worker_memory\)")
        program.wait_ready(2)
        program.stop()


# --- reload ------------------------------------------------------------------------------


def test_a_reload_serves_with_other_code_and_finishes_with_the_earlier(tmp_path: Path) -> None:
    with supervised(tmp_path) as program:
        program.wait_ready(2)
        with program.connect() as early:
            early.sendall(b"half ")  # so it is not idle
            program.write(SECOND)
            program.send(signal.SIGHUP)
            program.wait_for("serves as reloaded")
            eventually(lambda: program.ask() == b"second hello\n")
            early.sendall(b"and half\n")
            assert early.recv(64) == b"half and half\n"
            early.shutdown(socket.SHUT_WR)
            assert received(early) == b""
        program.wait_for("has ended", 2)
        program.stop()


@pytest.mark.parametrize("reason", ["code", "settings", "nonsense", "address"])
def test_a_reload_that_cannot_start_leaves_what_serves(tmp_path: Path, reason: str) -> None:
    with supervised(tmp_path) as program, socket.create_server(("127.0.0.1", 0)) as taken:
        program.wait_ready(2)
        before = program.workers()
        process, services = program.told["process"], program.told["services"]
        if reason == "code":
            program.write(BROKEN)
        elif reason == "settings":
            program.write(process=process | {"max_requests": 0})
        elif reason == "nonsense":  # of which the reader of this program knows nothing
            program.write(services=[{}])
        else:
            occupied = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            program.write(services=[services[0] | {"addresses": [occupied]}])
        program.send(signal.SIGHUP)
        program.wait_for("cannot reload, and serves as before: .+")
        assert program.workers() == before
        assert program.ask() == b"hello\n"
        program.write(SECOND, process=process, services=services)
        program.send(signal.SIGHUP)
        program.wait_for("serves as reloaded")
        eventually(lambda: program.ask() == b"second hello\n")
        program.stop()


@pytest.mark.parametrize("other", [1, 3])
def test_a_failed_reload_leaves_as_many_workers_as_there_were(tmp_path: Path, other: int) -> None:
    with supervised(tmp_path) as program:
        program.wait_ready(2)
        before = program.workers()
        process = program.told["process"]
        program.write(BROKEN, process=process | {"workers": other})
        program.send(signal.SIGHUP)
        program.wait_for("cannot reload, and serves as before: .+")
        program.write(SECOND)
        program.send(signal.SIGHUP)
        program.wait_for("serves as reloaded")
        assert not program.find("starts another worker|it is one too many")
        assert len(program.find("could not start")) <= other
        eventually(lambda: len(program.workers()) == other)
        assert not {*before} & {*program.workers()}
        program.stop()


def test_a_reload_opens_addresses_that_came_and_closes_those_that_went(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    with supervised(tmp_path, addresses=("tcp://127.0.0.1:0", f"unix:{path}")) as program:
        program.wait_ready(2)
        first = program.told["services"][0]
        with Client(socket.AF_UNIX, socket.SOCK_STREAM) as early:
            early.connect(str(path))
            early.sendall(b"slow\n")  # of a Unix socket half a line would be nobody's news
            other = tmp_path / "other"
            program.write(services=[first | {"addresses": ["tcp://127.0.0.1:0", f"unix:{other}"]}])
            program.send(signal.SIGHUP)
            program.wait_for("serves as reloaded")
            with Client(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(str(other))
                client.sendall(b"hello\n")
                assert client.recv(64) == b"hello\n"
            eventually(lambda: program.ask() == b"hello\n")
            assert early.recv(64) == b"slow\n"
        program.wait_for(f"serves unix:{path} no more")
        assert not path.exists()
        program.stop()
        assert not other.exists()


def test_who_connects_to_an_address_that_went_is_refused_while_the_last_drain(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    addresses = ("tcp://127.0.0.1:0", "tcp://[::1]:0")
    with supervised(tmp_path, waiting_for(gate), addresses=addresses) as program:
        program.wait_ready(2)
        port = int(program.wait_for(r"ready on tcp://\[::1\]:(\d+)")[1])
        with Client(socket.AF_INET6, socket.SOCK_STREAM) as early:
            early.connect(("::1", port))
            early.sendall(b"slow\n")
            first = program.told["services"][0]
            program.write(services=[first | {"addresses": addresses[:1]}])
            program.send(signal.SIGHUP)
            program.wait_for(r"serves tcp://\[::1\].* no more")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("::1", port), PATIENCE)
            assert program.ask() == b"hello\n"
            gate.touch()
            assert early.recv(64) == b"slow\n"
        program.wait_for("has ended", 2)
        program.stop()


def test_those_who_wait_for_a_place_are_left_to_the_workers_that_stay(tmp_path: Path) -> None:
    """One that drains would close them at the end of its time."""
    limits = {"max_connections": 2}
    with supervised(tmp_path, workers=1, settings=limits, log_level="info") as program:
        program.wait_ready(1)
        with program.connect() as first, program.connect() as second, program.connect() as third:
            for client in (first, second):
                begin_request(client)
            third.sendall(b"who\n")
            program.write(SECOND)
            program.send(signal.SIGHUP)
            program.wait_for(" drains: 2 open")
            first.close()
            worker = third.recv(64)
            assert worker.startswith(b"second ")
            assert int(worker.split()[1]) == program.workers()[-1]
            second.sendall(b"and half\n")
            assert second.recv(64) == b"half and half\n"
        program.stop()


def shown_certificate(program: Supervised, authority: Authority) -> bytes | None:
    """Return the certificate that a client is shown, which it trusts and is answered with.

    ``None`` is for one that was not answered: a worker that drains ends it if it is held up.
    """
    port = int(program.wait_for(r"ready on tls://127.0.0.1:(\d+)")[1])
    with Client(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.connect(("127.0.0.1", port))
        try:
            with authority.client().wrap_socket(client, server_hostname="localhost") as tls:
                tls.sendall(b"hello\n")
                if tls.recv(64) == b"hello\n":
                    return tls.getpeercert(binary_form=True)
        except ssl.SSLCertVerificationError:
            raise
        except OSError:
            pass
    return None


@pytest.mark.parametrize("engine", ["threads", "green"])
def test_a_reload_serves_with_another_certificate_and_keeps_the_one_before_a_broken_one(
    tmp_path: Path, authority: Authority, engine: str
) -> None:
    """The settings name other files each time, which nobody but a reload looks at."""
    first, second = authority.issue(), authority.issue()
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing of the kind\n")
    files = {"cert": str(first.certificate), "key": str(first.key)}
    with supervised(
        tmp_path, engine=engine, addresses=("tls://127.0.0.1:0",), settings=files
    ) as program:
        program.wait_ready(2)
        assert shown_certificate(program, authority) == first.der
        service = program.told["services"][0]

        def reload(**files: str) -> None:
            program.write(services=[service | {"settings": service["settings"] | files}])
            program.send(signal.SIGHUP)

        reload(cert=str(broken))
        found = program.wait_for("cannot reload, and serves as before: (.*)")
        assert "broken.pem" in found[1]
        assert shown_certificate(program, authority) == first.der
        reload(cert=str(second.certificate), key=str(second.key))
        program.wait_for("serves as reloaded")
        eventually(lambda: shown_certificate(program, authority) == second.der)
        program.wait_for("has ended", 2)
        assert shown_certificate(program, authority) == second.der
        program.stop()


def test_a_reload_says_what_it_cannot_change(tmp_path: Path) -> None:
    with supervised(tmp_path) as program:
        program.wait_ready(2)
        process = program.told["process"] | {"workers": None, "pid_file": str(tmp_path / "pid")}
        program.write(process=process)
        program.send(signal.SIGHUP)
        program.wait_for("keeps pid_file=None: a reload does not change it")
        program.wait_for("keeps one worker: a reload does not change workers to none")
        program.wait_for("serves as reloaded")
        eventually(lambda: len(program.workers()) == 1)
        assert not (tmp_path / "pid").exists()
        program.stop()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def with_settings(program: Supervised, **settings: Any) -> None:
    """Write other settings of its service."""
    (service,) = program.told["services"]
    program.write(services=[service | {"settings": service["settings"] | settings}])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_who_may_use_a_unix_socket_is_read_again(tmp_path: Path, number: int) -> None:
    """Whoever narrows it relies on that, when they are told that it serves as reloaded."""
    path = tmp_path / "echo"
    settings = {"socket_mode": "0666"}
    with supervised(tmp_path, workers=1, addresses=(f"unix:{path}",), settings=settings) as program:
        program.wait_ready(1)
        assert mode_of(path) == 0o666
        with_settings(program, socket_mode="0600")
        program.send(number)
        if number == signal.SIGHUP:
            program.wait_for("serves as reloaded")
        else:
            program.pid = int(program.wait_for(r"leaves everything to process (\d+)")[1])
            program.wait_for("ready on", 2)
        assert mode_of(path) == 0o600
        program.stop()
        assert not path.exists()


def test_a_successor_without_workers_reads_it_again_too(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    with supervised(tmp_path, workers=None, addresses=(f"unix:{path}",)) as program:
        program.wait_ready(0)
        with_settings(program, socket_mode="0620")
        hand_over(program)
        program.wait_for("ready on", 2)
        assert mode_of(path) == 0o620
        program.stop()


def test_a_reload_that_fails_leaves_a_unix_socket_to_those_who_have_it(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    with supervised(tmp_path, workers=1, addresses=(f"unix:{path}",)) as program:
        program.wait_ready(1)
        with_settings(program, socket_mode="0666")
        program.write(BROKEN)
        program.send(signal.SIGHUP)
        program.wait_for("cannot reload, and serves as before")
        assert mode_of(path) == 0o600
        with_settings(program, socket_owner="nobody-of-this-name")
        program.send(signal.SIGHUP)
        program.wait_for("cannot reload, and serves as before: .*socket_owner")
        program.stop()


@pytest.mark.parametrize("workers", [1, None])
def test_a_unix_socket_whose_path_is_no_text_is_served(tmp_path: Path, workers: int | None) -> None:
    path = tmp_path / os.fsdecode(b"no text: \xff")
    with supervised(tmp_path, workers=workers, addresses=(f"unix:{path}",)) as program:
        program.wait_ready(workers or 0)
        for number in range(2):
            with Client(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(str(path))
                client.sendall(b"hello\n")
                assert client.recv(64) == b"hello\n"
            if number == 0:
                hand_over(program)
                assert program.wait_ended() == 0
        program.stop()
        assert not path.exists()


LOSING_GROUPS = """
import grp, os

def getgrnam(name):
    if os.path.exists({lost!r}):
        raise KeyError(name)
    return grp.struct_group((name, "x", os.getgid(), []))

grp.getgrnam = getgrnam
"""


def test_the_owners_of_a_unix_socket_are_looked_up_once_in_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who tells of them, as a directory in the network does, may be gone when it serves."""
    path, lost = tmp_path / "echo", tmp_path / "lost"
    (tmp_path / "sitecustomize.py").write_text(LOSING_GROUPS.format(lost=str(lost)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    settings = {"socket_group": "web"}
    with supervised(tmp_path, workers=1, addresses=(f"unix:{path}",), settings=settings) as program:
        program.wait_ready(1)
        with_settings(program, socket_mode="0620")
        program.write(f"open({str(lost)!r}, 'w').close()\n{SECOND}")
        program.send(signal.SIGHUP)
        program.wait_for("serves as reloaded")
        assert mode_of(path) == 0o620
        program.send(signal.SIGHUP)
        program.wait_for("cannot reload, and serves as before: socket_group='web'")
        program.stop()
        assert program.wait_ended() == 0


def test_a_reload_says_that_it_cannot_change_who_may_use_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    with supervised(tmp_path, workers=1, addresses=(f"unix:{path}",)) as program:
        program.wait_ready(1)
        path.unlink()
        path.write_text("another's")
        with_settings(program, socket_mode="0666")
        program.send(signal.SIGHUP)
        program.wait_for(
            f"cannot change who may use unix:{path}: another file has taken its place; its file "
            "keeps its mode and its owners until the service is stopped and started"
        )
        program.wait_for("serves as reloaded")
        assert mode_of(path) != 0o666
        program.stop()


def waiting_at_most(port: int) -> int:
    """Return the backlog of a listener, which ss(8) shows in the place of unsent bytes."""
    listing = subprocess.run(
        ["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True
    ).stdout
    return int(listing.split()[2])


@pytest.mark.skipif(shutil.which("ss") is None, reason="nobody else tells a backlog")
def test_a_backlog_is_read_again(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=1, settings={"backlog": 5}) as program:
        program.wait_ready(1)
        port = program.port
        assert waiting_at_most(port) == 5
        with_settings(program, backlog=6)
        program.send(signal.SIGHUP)
        program.wait_for("serves as reloaded")
        assert waiting_at_most(port) == 6
        with_settings(program, backlog=7)
        hand_over(program)
        program.wait_for("ready on", 2)
        assert waiting_at_most(port) == 7
        program.stop()


@pytest.mark.parametrize("other", ["tcp://localhost:{}", "tls://127.0.0.1:{}", "tcp://0.0.0.0:{}"])
def test_an_address_that_is_spelled_otherwise_is_said_to_be_had(
    tmp_path: Path, authority: Authority, other: str
) -> None:
    """A reload and a successor open what is new before what is not wanted any more is closed."""
    with supervised(tmp_path, workers=1) as program:
        program.wait_ready(1)
        (service,) = program.told["services"]
        wanted = other.format(program.port)
        settings = service["settings"]
        if wanted.startswith("tls:"):
            pair = authority.issue()
            settings = settings | {"cert": str(pair.certificate), "key": str(pair.key)}
        program.write(services=[service | {"addresses": [wanted], "settings": settings}])
        reason = f"cannot listen on {wanted}: this service has it as tcp://127.0.0.1:0; write it so"
        program.send(signal.SIGHUP)
        program.wait_for(f"cannot reload, and serves as before: {reason}")
        program.send(signal.SIGUSR2)
        program.wait_for(f"error: {reason}")
        program.wait_for("this one goes on")
        assert program.ask() == b"hello\n"
        program.stop()


def test_reloads_that_come_too_fast_are_one(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=1) as program:
        program.wait_ready(1)
        program.write(SECOND)
        for _ in range(5):
            program.send(signal.SIGHUP)
        eventually(lambda: program.ask() == b"second hello\n")
        program.stop()


# --- a successor -------------------------------------------------------------------------


def children_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def hand_over(program: Supervised) -> int:
    """Have another supervisor take over, and return its process."""
    before = program.pid
    program.send(signal.SIGUSR2)
    heir = int(program.wait_for(r"leaves everything to process (\d+)")[1])
    program.pid = heir
    assert heir != before
    return heir


def test_another_supervisor_takes_over_with_the_listeners_and_the_pid_file(tmp_path: Path) -> None:
    path, pid_file = tmp_path / "echo", tmp_path / "pid"
    addresses = ("tcp://127.0.0.1:0", f"unix:{path}", "udp://127.0.0.1:0")
    source = ECHO.replace("class Echo(", "class Lines(") + (
        "\ndef Echo(request, client, server):\n"
        "    if not isinstance(request, tuple):\n        Lines(request, client, server)\n"
    )
    with supervised(tmp_path, source, addresses=addresses, pid_file=str(pid_file)) as program:
        program.wait_ready(2)
        first = program.pid
        assert int(pid_file.read_text()) == first
        assert program.ask() == b"hello\n"
        program.write(source.replace('b""', 'b"second "'))
        heir = hand_over(program)
        program.wait_for("has handed over after")
        assert program.wait_ended() == 0
        assert int(pid_file.read_text()) == heir
        eventually(lambda: program.ask() == b"second hello\n")
        with Client(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
            client.sendall(b"hello\n")
            assert client.recv(64) == b"second hello\n"
        program.stop()
        assert program.find(r"stopped after .* s: 3 requests served")  # of both, in one mapping
        assert not program.find("Warning")  # nothing was left open
        assert not path.exists()
        assert not pid_file.exists()


def test_places_of_a_predecessor_that_is_killed_are_free_again(tmp_path: Path) -> None:
    source = waiting_for(tmp_path / "gate")
    with supervised(tmp_path, source, workers=1, settings={"max_connections": 1}) as program:
        program.wait_ready(1)
        first, (worker,) = program.pid, program.workers()
        with program.connect() as early, program.connect() as late:
            early.sendall(b"hello\n")
            assert early.recv(64) == b"hello\n"
            early.sendall(b"slow\n")
            hand_over(program)
            for process in (first, worker):
                os.kill(process, signal.SIGKILL)
            assert program.wait_ended() == -signal.SIGKILL
            late.sendall(b"hello\n")
            assert late.recv(64) == b"hello\n"
        program.stop()


@pytest.mark.parametrize(("workers", "times"), [(1, 1), (1, 2), (None, 1)])
def test_after_a_hand_over_the_first_signal_lets_clients_be_served(
    tmp_path: Path, workers: int | None, times: int
) -> None:
    gate = tmp_path / "gate"
    with supervised(tmp_path, waiting_for(gate), workers=workers, same_wish=0) as program:
        program.wait_ready(workers or 0)
        first = program.pid
        with program.connect() as client:
            client.sendall(b"who\n")
            assert client.recv(64)
            client.sendall(b"slow\n")
            hand_over(program)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(first, number)
            program.wait_for("has opened its log again")
            if times == 1:
                gate.touch()
                assert client.recv(64) == b"slow\n"
            else:
                program.wait_for(r"stops \(SIGTERM\)")
                os.kill(first, signal.SIGTERM)
                program.wait_for(r"stops at once \(SIGTERM again\)")
                assert goodbye(client) == b""
        assert program.wait_ended() == 0
        assert times == 2 or not program.find("cut off")
        assert not workers or program.find("has handed over after")
        program.stop()


@pytest.mark.parametrize("workers", [1, None])
def test_the_pid_file_is_a_successors_whose_predecessor_was_killed_meanwhile(
    tmp_path: Path, workers: int | None
) -> None:
    gate, pid_file = tmp_path / "gate", tmp_path / "pid"
    slow = (
        f"import pathlib, time\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.01)\n"
    )
    with supervised(tmp_path, workers=workers, pid_file=str(pid_file)) as program:
        program.wait_ready(workers or 0)
        program.write(slow + SECOND)
        program.send(signal.SIGUSR2)
        heir = int(program.wait_for(r"starts another .* \(process (\d+)\)")[1])
        program.send(signal.SIGKILL)
        program.wait_ended()
        gate.touch()
        program.wait_ready(0, 2)
        eventually(lambda: int(pid_file.read_text()) == heir)
        # A worker of the predecessor may not have heard yet that it is alone.
        eventually(lambda: program.ask() == b"second hello\n")
        program.pid = heir
        program.stop()
        assert not pid_file.exists()


@pytest.mark.parametrize("workers", [1, None])
def test_every_successor_has_the_pid_file_open(tmp_path: Path, workers: int | None) -> None:
    """So it can write there even as a user who may not open it."""
    pid_file = tmp_path / "pid"
    with supervised(tmp_path, workers=workers, pid_file=str(pid_file)) as program:
        program.wait_ready(workers or 0)
        for number in range(2):
            program.send(signal.SIGUSR2)
            program.pid = int(
                program.wait_for(r"leaves everything to process (\d+)", number + 1)[1]
            )
            assert int(pid_file.read_text()) == program.pid
            assert open_files(program.pid).count(str(pid_file)) == 1
        program.stop()
        assert not pid_file.exists()


@pytest.mark.parametrize("workers", [1, None])
def test_who_has_handed_over_tells_systemd_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    """It would be taken for what its successor tells."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with supervised(tmp_path, workers=workers) as program:
            program.wait_ready(workers or 0)
            hand_over(program)
            assert program.wait_ended() == 0
            assert program.ask() == b"hello\n"  # so its loop has begun
            program.stop()
        systemd.setblocking(False)
        told: list[str] = []
        with suppress(BlockingIOError):
            while True:
                told.append(systemd.recv(4096).decode().partition("=")[0])
    assert sorted(told) == ["MAINPID", "READY", "READY", "STOPPING"]
    assert told[-1] == "STOPPING"


def inheritable(process: int) -> list[str]:
    """Return what programs that a process starts would have open, beside the standard streams."""
    found: list[str] = []
    for each in Path(f"/proc/{process}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            flags = int(each.read_text().split("flags:")[1].split()[0], 8)
            if int(each.name) > 2 and not flags & os.O_CLOEXEC:
                found.append(str(Path(f"/proc/{process}/fd", each.name).readlink()))
    return found


def test_a_successor_without_workers_keeps_nothing_to_count_in(tmp_path: Path) -> None:
    """What its handlers start would have it open, and so would every successor."""
    with supervised(tmp_path, settings={"max_connections": 4}) as program:
        program.wait_ready(2)
        assert any("counters" in each for each in open_files(program.pid))
        program.write(process=program.told["process"] | {"workers": None})
        hand_over(program)
        assert program.wait_ended() == 0
        program.wait_for("ready on", 2)
        assert program.ask() == b"hello\n"
        assert not any("counters" in each for each in open_files(program.pid))
        assert inheritable(program.pid) == []
        program.stop()


def test_a_successor_that_cannot_serve_leaves_who_is_there(tmp_path: Path) -> None:
    with supervised(tmp_path) as program:
        program.wait_ready(2)
        before = program.workers()
        program.write(BROKEN)
        program.send(signal.SIGUSR2)
        program.wait_for(r"the other supervisor exited with status 2 before it served")
        assert program.find("ModuleNotFoundError")
        assert program.workers() == before
        assert program.ask() == b"hello\n"
        program.write(SECOND)
        hand_over(program)
        eventually(lambda: program.ask() == b"second hello\n")
        program.stop()


def test_one_successor_at_a_time_and_none_before_it_serves(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = (
        f"import pathlib, time\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.01)\n"
    )
    with supervised(tmp_path, slow + ECHO, workers=1) as program:
        eventually(lambda: len(children_of(program.pid)) == 1)
        program.send(signal.SIGUSR2)
        program.wait_for("cannot hand over before it serves")
        gate.touch()
        program.wait_ready(1)
        gate.unlink()
        program.send(signal.SIGUSR2)
        program.wait_for("starts another supervisor")
        program.send(signal.SIGUSR2)
        program.wait_for(r"another supervisor \(process \d+\) is starting already")
        program.stop()
        assert program.wait_ended() == 0


@pytest.mark.parametrize("works", [True, False])
def test_a_successor_starts_when_a_reload_has_ended(tmp_path: Path, *, works: bool) -> None:
    """It would find what the reload has opened in use, and not have inherited it."""
    path = tmp_path / "echo"
    with supervised(tmp_path, workers=1) as program:
        program.wait_ready(1)
        (service,) = program.told["services"]
        addresses = [*service["addresses"], f"unix:{path}"]
        program.write(importing_slowly(tmp_path), services=[service | {"addresses": addresses}])
        program.send(signal.SIGHUP)
        eventually((tmp_path / "begun").exists)
        program.send(signal.SIGUSR2)
        program.wait_for("starts another supervisor when the reload has ended")
        if works:
            (tmp_path / "gate").touch()
            program.wait_for("serves as reloaded")
        else:
            worker = next(
                each for each in children_of(program.pid) if int(each) not in program.workers()
            )
            program.write(SECOND)
            os.kill(int(worker), signal.SIGKILL)
            program.wait_for("cannot reload, and serves as before")
        program.pid = int(program.wait_for(r"leaves everything to process (\d+)")[1])
        assert program.wait_ended() == 0
        with Client(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
            client.sendall(b"hello\n")
            assert client.recv(64) == (b"hello\n" if works else b"second hello\n")
        program.stop()


@pytest.mark.parametrize("workers", [1, None])
def test_a_successor_that_hangs_is_killed_and_another_one_can_be_tried(
    tmp_path: Path, workers: int | None
) -> None:
    """It waits for somebody who writes its settings."""
    with supervised(tmp_path, workers=workers, start_timeout=2.5) as program:
        program.wait_ready(workers or 0)
        settings = tmp_path / "settings.json"
        settings.unlink()
        os.mkfifo(settings)
        program.send(signal.SIGUSR2)
        program.wait_for(
            r"was killed by SIGKILL \(it did not serve in time\) before it served; this one goes on"
        )
        assert program.ask() == b"hello\n"
        program.send(signal.SIGUSR2)
        program.wait_for("starts another", 2)
        program.stop()
        assert program.wait_ended() == 0


# --- stuck -------------------------------------------------------------------------------


def test_a_stuck_worker_says_where_and_is_replaced_and_the_other_goes_on(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    loop = f"open({str(begun)!r}, 'w').close()\n                while True:"
    source = ECHO.replace("while True:", loop)
    with supervised(tmp_path, source, engine="green", worker_timeout=4) as program:
        program.wait_ready(2)
        with program.connect() as client:
            client.sendall(b"who\n")
            stuck = int(client.recv(64))
            (other,) = {*program.workers()} - {stuck}
            client.sendall(b"loop\n")
            eventually(begun.exists)  # until then it accepts, as the other does
            for _ in range(20):
                assert int(program.ask(b"who\n")) == other
            program.wait_for("while True:|pass  # without end")
            program.wait_for(rf"\(process {stuck}\) is killed: no sign of life for 4 s")
            assert goodbye(client) == b""
        program.wait_ready(3)
        assert other in program.workers()
        program.stop()


@pytest.mark.long
def test_one_whose_interpreter_is_held_is_made_to_say_where(tmp_path: Path) -> None:
    """A regular expression holds it, so that no other thread can answer."""
    source = ECHO.replace("pass  # without end", "re.match('(a+)+$', 'a' * 60 + 'b')  # held")
    source = f"import re\n{source}"
    with supervised(tmp_path, source, workers=1, engine="green", worker_timeout=2.5) as program:
        program.wait_ready(1)
        with program.connect() as client:
            client.sendall(b"loop\n")
            program.wait_for("does not answer; its threads are at:")
            program.wait_for(r'app\.py", line \d+ in handle')
            program.wait_for("is killed: no sign of life for 2.5 s")
        program.wait_ready(2)
        program.stop()


@pytest.mark.long
def test_a_handler_that_waits_for_its_peer_is_not_stuck(tmp_path: Path) -> None:
    """The serial engine comes round after the handler only."""
    source = ECHO.replace("self.wfile.write(VERSION + line)", "self.answer(line)") + (
        "\n    def answer(self, line):\n"
        "        self.wfile.write(b'x' * (1 << 26) + line if line == b'give\\n' else line)\n"
    )
    source = source.replace('\nVERSION = b""\n', "")
    with supervised(tmp_path, source, workers=1, engine="serial", worker_timeout=2.5) as program:
        program.wait_ready(1)
        with program.connect() as client:
            client.sendall(b"who\n")
            worker = int(client.recv(64))
            with pytest.raises(TimeoutError):
                client.settimeout(4)
                client.recv(64)
            client.settimeout(PATIENCE)
            client.sendall(b"who\n")
            assert int(client.recv(64)) == worker
            client.sendall(b"give\n")  # and read none of it
            threading.Event().wait(4)
            while not client.recv(1 << 20).endswith(b"\n"):
                pass
            assert not program.find("is stuck")
            client.sendall(b"loop\n")
            program.wait_for("while True:|pass  # without end")
            program.wait_for("is killed")
        program.stop()


# --- logs --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, None])
def test_the_log_is_opened_again_in_every_process(tmp_path: Path, workers: int | None) -> None:
    log, moved = tmp_path / "log", tmp_path / "moved"
    process: dict[str, Any] = {"log_file": str(log), "log_level": "info"}
    with supervised(tmp_path, workers=workers, **process) as program:
        program.wait_ready(workers or 0)
        eventually(lambda: log.read_text().count(" started") == (workers or 1))
        assert stat.S_IMODE(log.stat().st_mode) & 0o137 == 0
        log.rename(moved)
        program.send(signal.SIGUSR1)
        program.wait_for("has opened its log again")
        program.stop()
        assert log.read_text().count(" drains") == (workers or 1)
        assert " drains" not in moved.read_text()


@pytest.mark.parametrize("workers", [2, None])
def test_what_was_counted_is_said_for_each_address_while_it_serves(
    tmp_path: Path, workers: int | None
) -> None:
    addresses = ("tcp://127.0.0.1:0", "udp://127.0.0.1:0")
    source = ECHO.replace("class Echo(", "class Lines(") + (
        "\ndef Echo(request, client, server):\n"
        "    if not isinstance(request, tuple):\n        Lines(request, client, server)\n"
    )
    with supervised(tmp_path, source, workers=workers, addresses=addresses) as program:
        program.wait_ready(workers or 0, 2)
        assert program.ask() == b"hello\n"
        with program.connect() as client:
            client.sendall(b"here\n")
            assert client.recv(64) == b"here\n"

            def is_told() -> bool:  # the end of the first one is counted after its last byte
                program.send(signal.SIGUSR1)
                program.wait_for("udp://127.0.0.1:.* 0 accepted, 0 served;")
                return bool(
                    program.find("tcp://127.0.0.1:.* 2 accepted, 1 served, 1 open; 6 bytes")
                )

            eventually(is_told)
        program.stop()


def test_the_last_words_tell_of_each_address(tmp_path: Path) -> None:
    with supervised(tmp_path) as program:
        program.wait_ready(2)
        assert program.ask() == b"hello\n"
        port = program.port
        program.stop()
        assert program.find(
            rf"^portico: tcp://127.0.0.1:{port}: 1 accepted, 1 served; 6 bytes received, 6 sent$"
        )


def test_a_worker_has_no_file_open_of_its_supervisors(tmp_path: Path) -> None:
    """Neither the pid file, which it could write to, nor the log a second time."""
    log, moved, pid_file = tmp_path / "log", tmp_path / "moved", tmp_path / "pid"
    with supervised(tmp_path, workers=1, log_file=str(log), pid_file=str(pid_file)) as program:
        program.wait_ready(1)
        program.send(signal.SIGTTIN)  # the second inherits what the supervisor has by now
        program.wait_ready(2)
        assert str(pid_file) in open_files(program.pid)
        for worker in program.workers():
            files = open_files(worker)
            assert files.count(str(log)) == 1
            assert str(pid_file) not in files
        log.rename(moved)
        program.send(signal.SIGUSR1)
        program.wait_for("has opened its log again")
        for worker in program.workers():
            eventually(lambda: {str(log), str(moved)} & {*open_files(worker)} == {str(log)})  # noqa: B023
        program.stop()


def open_files(process: int) -> list[str]:
    """Return what the descriptors of a process are open on."""
    found: list[str] = []
    for each in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            found.append(str(each.readlink()))
    return found


def test_a_log_that_cannot_be_opened_again_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    with supervised(tmp_path, workers=1, log_file=str(folder / "log")) as program:
        program.wait_ready(1)
        folder.rename(tmp_path / "moved")
        program.send(signal.SIGUSR1)
        program.wait_for("^portico: cannot open the log again")
        program.wait_for(r"process \d+ cannot open its log again")
        assert program.ask() == b"hello\n"
        program.stop()


def test_a_log_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with supervised(tmp_path, log_file=str(tmp_path / "nowhere" / "log")) as program:
        assert program.wait_ended() == 2
        program.wait_for("error: log_file=")


# --- without workers ---------------------------------------------------------------------


def test_a_process_that_serves_alone_hands_over_too(tmp_path: Path) -> None:
    path, pid_file = tmp_path / "echo", tmp_path / "pid"
    addresses = ("tcp://127.0.0.1:0", f"unix:{path}")
    with supervised(tmp_path, workers=None, addresses=addresses, pid_file=str(pid_file)) as program:
        program.wait_ready(0)
        assert program.ask() == b"hello\n"
        program.write(SECOND)
        heir = hand_over(program)
        assert program.wait_ended() == 0
        assert int(pid_file.read_text()) == heir
        eventually(lambda: program.ask() == b"second hello\n")
        program.stop()
        assert not path.exists()


def test_it_stays_when_its_successor_cannot_serve(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=None) as program:
        program.wait_ready(0)
        program.write(BROKEN)
        program.send(signal.SIGUSR2)
        program.wait_for(
            "the other process exited with status 2 before it served; this one goes on"
        )
        assert program.ask() == b"hello\n"
        program.stop()
        assert program.wait_ended() == 0


def test_it_hears_other_signals_while_its_successor_starts(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=None) as program:
        program.wait_ready(0)
        settings = tmp_path / "settings.json"
        settings.unlink()
        os.mkfifo(settings)
        program.send(signal.SIGUSR2)
        program.wait_for("starts another process")
        program.send(signal.SIGUSR1)
        program.wait_for("has opened its log again")
        program.send(signal.SIGHUP)
        program.wait_for("has read its certificates again")
        program.send(signal.SIGUSR2)
        program.wait_for(r"another process \(process \d+\) is starting already")
        assert program.ask() == b"hello\n"
        program.stop()
        assert program.wait_ended() == 0


def test_it_reads_its_certificates_again_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=None) as program:
        program.wait_ready(0)
        program.send(signal.SIGHUP)
        program.wait_for("has read its certificates again; for other code .* it needs workers")
        assert program.ask() == b"hello\n"
        program.stop()


def importing_slowly(folder: Path) -> str:
    """Return a program whose import says that it has begun, and lasts until there is a file."""
    return ECHO + (
        f"\nimport pathlib, time\n"
        f"pathlib.Path({str(folder)!r}, 'begun').touch()\n"
        f"while not os.path.exists({str(folder / 'gate')!r}): time.sleep(0.01)\n"
    )


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGHUP, "has read its certificates again"),
        (signal.SIGUSR1, "has opened its log again"),
        (signal.SIGUSR2, r"leaves everything to process (\d+)"),
    ],
)
def test_what_it_is_told_while_its_target_is_imported_is_done_when_it_serves(
    tmp_path: Path, number: int, expected: str
) -> None:
    """The pid file is there already, and a rotation of logs sends to whom it names."""
    pid_file = tmp_path / "pid"
    source = importing_slowly(tmp_path)
    with supervised(tmp_path, source, workers=None, pid_file=str(pid_file)) as program:
        eventually((tmp_path / "begun").exists)
        os.kill(int(pid_file.read_text()), number)
        (tmp_path / "gate").touch()
        found = program.wait_for(expected)
        if found.groups():
            program.pid = int(found[1])
        eventually(lambda: program.ask() == b"hello\n")
        program.stop()
        assert not pid_file.exists()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("caught", ["", "BaseException"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_its_target_is_imported_ends_it_and_leaves_no_files(
    tmp_path: Path, number: int, caught: str
) -> None:
    """Whatever the target makes of it."""
    path, pid_file = tmp_path / "echo", tmp_path / "pid"
    source = importing_slowly(tmp_path)
    if caught:
        *before, last = source.splitlines()
        source = "\n".join([*before, "try:", f"    {last}", f"except {caught}: pass", ""])
    addresses = (f"unix:{path}",)
    with supervised(
        tmp_path, source, workers=None, addresses=addresses, pid_file=str(pid_file)
    ) as program:
        eventually((tmp_path / "begun").exists)
        program.stop(number)
        assert program.wait_ended() == 0
        assert program.lines == [f"portico: stops ({signal.Signals(number).name})"]
        assert not path.exists()
        assert not pid_file.exists()
