"""What programs count on from the process around the module."""

from __future__ import annotations

import pickle
import socketserver
import subprocess
import sys
import textwrap
from typing import Any

from tests.compat.habits.conftest import Variant
from tests.compat.peers import PATIENCE


def run(program: str) -> str:
    """Run a program in an interpreter of its own; it ends well, and says nothing of errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def test_importing_makes_no_thread_and_no_descriptor(variant: Variant) -> None:
    said = run(f"""
        import os, threading
        before = len(os.listdir("/proc/self/fd"))
        {variant.statement}
        print(len(os.listdir("/proc/self/fd")) - before, threading.active_count())
        """)
    assert said.split() == ["0", "1"]


def test_importing_changes_no_signal_and_no_default(variant: Variant) -> None:
    said = run(f"""
        import signal, socket, sys, threading
        def state():
            handlers = [signal.getsignal(number) for number in signal.valid_signals()]
            return handlers, socket.getdefaulttimeout(), sys.excepthook, threading.excepthook
        before = state()
        {variant.statement}
        print(state() == before, signal.set_wakeup_fd(-1))
        """)
    assert said.split() == ["True", "-1"]


def test_the_program_ends_while_a_daemon_thread_serves(variant: Variant) -> None:
    said = run(f"""
        import socket, threading
        {variant.statement}

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                self.wfile.write(self.rfile.readline())

        server = socketserver.TCPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"hello\\n")
            print(client.recv(100).decode())
        """)
    assert said.split() == ["hello"]


def test_the_program_ends_while_daemon_threads_handle(variant: Variant) -> None:
    said = run(f"""
        import socket, threading
        {variant.statement}

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                self.wfile.write(b"hello")
                self.rfile.read()

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = socket.create_connection(server.server_address)
        print(client.recv(100).decode(), flush=True)
        import os; client.detach()
        """)
    assert said.split() == ["hello"]


def test_a_program_that_never_serves_ends(variant: Variant) -> None:
    said = run(f"""
        {variant.statement}
        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), None) as server:
            print(server.server_address[0])
        """)
    assert said.split() == ["127.0.0.1"]


def test_everything_is_imported_by_a_star(variant: Variant) -> None:
    said = run(f"""
        {variant.statement}
        names = {{}}
        exec(f"from {{socketserver.__name__}} import *", names)
        print(sorted(name for name in names if "Server" in name or "Handler" in name))
        """)
    for name in socketserver.__all__:
        if "Server" in name or "Handler" in name:
            assert repr(name) in said


def test_classes_go_through_pickle() -> None:
    module: Any = socketserver
    for name in socketserver.__all__:
        value = getattr(module, name)
        if isinstance(value, type):
            assert pickle.loads(pickle.dumps(value)) is value
