"""Run each test of this folder as a program of `socketserver`, and as the same one on portico.

A test is written as public programs are: it says ``socketserver.X``, and knows nothing of
portico.  It passes on the standard library's module, which shows that the habit is real, and
on everything that takes its place.
"""

import socketserver
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

import portico
from portico import engines
from portico.swap import Face

DIFFERENT: dict[str, dict[str, str]] = {
    "threads": {},
    "pool": {
        name: reason
        for reason, names in {
            "a thread serves one request after another": (
                "test_a_patched_list_of_threads_is_what_the_server_fills",
                "test_a_patched_threading_module_starts_the_threads",
                "test_a_server_lists_the_threads_that_live",
            ),
            "workers are daemons; the program's end waits for their requests by itself": (
                "test_daemon_threads_changed_while_the_program_runs",
            ),
        }.items()
        for name in names
    },
    "green": {
        name: reason
        for reason, names in {
            "there is no thread for a request": (
                "test_a_patched_list_of_threads_is_what_the_server_fills",
                "test_a_patched_threading_module_starts_the_threads",
                "test_a_process_request_that_serves_some_requests_itself",
                "test_a_server_lists_the_threads_that_live",
                "test_a_thread_class_patched_through_the_module",
                "test_daemon_threads_changed_while_the_program_runs",
            ),
            "the hub has a selector of its own; only `handle_request` uses this one": (
                "test_a_replaced_selector_serves",
            ),
            "the sockets of a hub are non-blocking already, and wait all the same": (
                "test_o_nonblock_set_behind_the_files_back",
            ),
            "a handler gets the listener as a socket that waits by switching": (
                "test_the_socket_of_a_datagram_request_is_the_listener_itself",
            ),
        }.items()
        for name in names
    },
}
"""The engines that every habit is tried on, and the tests that do not hold on one, with the reason.

With forks or no engine at all behind ``ThreadingMixIn``, a program knows what it does.
"""


@dataclass(frozen=True)
class Variant:
    """One way to give a program its ``socketserver``."""

    name: str
    module: ModuleType
    statement: str
    """What a program of its own does instead of ``import socketserver``."""


VARIANTS = (
    Variant("stdlib", socketserver, "import socketserver"),
    Variant("portico", portico, "import portico as socketserver"),
    *(
        Variant(
            f"run on {engine}",
            Face(engine),
            f"import portico.swap; portico.swap.install({engine!r}); import socketserver",
        )
        for engine in DIFFERENT
        if engine in engines.ENGINES
    ),
)


@pytest.fixture(autouse=True, params=VARIANTS, ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """Give the name ``socketserver`` in the test's module to the module under test."""
    chosen: Variant = request.param
    monkeypatch.setattr(request.module, "socketserver", chosen.module)
    monkeypatch.setitem(sys.modules, chosen.module.__name__, chosen.module)
    engine = chosen.name.removeprefix("run on ")
    reason = DIFFERENT.get(engine, {}).get(getattr(request.node, "originalname", ""))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    return chosen
