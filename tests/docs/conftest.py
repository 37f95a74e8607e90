"""Run the documentation's programs as a reader would, on ports that the system chooses."""

import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import pytest

import portico

ROOT = Path(__file__).resolve().parents[2]
SNIPPETS = ROOT / "docs" / "snippets"
PORT = "9000"
"""The port that the documentation's programs name."""

WAIT = 60.0
"""Seconds after which a program that says nothing has failed; none needs a twentieth of it."""

Run = Callable[..., AbstractContextManager[Any]]


@pytest.fixture
def load() -> Callable[[str], ModuleType]:
    """Import a snippet, its main block left out."""

    def load(name: str) -> ModuleType:
        module = ModuleType(name)
        execute(name, module)
        return module

    return load


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a snippet as the main program in a thread; gives the server that it starts."""
    started: Queue[Any] = Queue()
    for base in (portico.BaseServer, socketserver.BaseServer):

        def serve_forever(
            self: Any, poll_interval: float = 0.5, original: Any = base.serve_forever
        ) -> None:
            started.put(self)
            original(self, poll_interval)

        monkeypatch.setattr(base, "serve_forever", serve_forever)

    @contextmanager
    def run(name: str, *arguments: str) -> Iterator[Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        program = threading.Thread(target=execute, args=(name, ModuleType("__main__")))
        program.start()
        server = started.get(timeout=WAIT)
        try:
            yield server
        finally:
            server.shutdown()
            program.join(WAIT)
        assert not program.is_alive()

    return run


def execute(name: str, module: ModuleType) -> None:
    """Run the text of a snippet in a module, with any free port in place of the one it names."""
    source = (SNIPPETS / name).read_text().replace(PORT, "0")
    exec(compile(source, str(SNIPPETS / name), "exec"), module.__dict__)
