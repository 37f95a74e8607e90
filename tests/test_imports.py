"""Imports inside portico point one way, from what a user sees down to what everything needs.

The order is the one that `docs/explanation/architecture.md` draws.  Imports that only a type
checker makes do not count.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent.parent / "src"

LAYERS = (
    ("portico.errors",),
    (
        "portico.address",
        "portico.bell",
        "portico.channel",
        "portico.console",
        "portico.directory",
        "portico.events",
        "portico.exclusion",
        "portico.holders",
        "portico.logfile",
        "portico.networks",
        "portico.pem",
        "portico.processes",
        "portico.proxy",
        "portico.signals",
        "portico.stacks",
        "portico.systemd",
    ),
    (
        "portico.admission",
        "portico.certificates",
        "portico.counts",
        "portico.deadlines",
        "portico.diagnosis",
        "portico.lifecycle",
        "portico.listener",
        "portico.logs",
        "portico.pidfile",
        "portico.place",
        "portico.privileges",
        "portico.socketfile",
        "portico.supervision",
    ),
    (
        "portico.acceptor",
        "portico.connection",
        "portico.counters",
        "portico.traffic",
        "portico.waits",
    ),
    ("portico.drain", "portico.gate", "portico.lobby", "portico.timekeeper"),
    ("portico.siblings",),
    ("portico.guard", "portico.preamble"),
    ("portico.request",),
    ("portico.server",),
    ("portico.families", "portico.handlers"),
    ("portico.engines",),
    ("portico.combinations",),
    (
        "portico.assembly",
        "portico.configuration",
        "portico.descriptors",
        "portico.loops",
        "portico.opening",
        "portico.places",
        "portico.rounds",
        "portico.service",
        "portico.settings",
        "portico.tally",
        "portico.target",
    ),
    ("portico.announcement", "portico.duty", "portico.handover"),
    ("portico.listeners", "portico.worker"),
    ("portico.succession", "portico.workers"),
    ("portico.soloist", "portico.supervisor"),
    ("portico.notation",),
    ("portico.layers",),
    ("portico.environment", "portico.settings_file"),
    ("portico.sources",),
    ("portico",),
    ("portico.outline", "portico.program"),
    ("portico.changes", "portico.options"),
    ("portico.doctor", "portico.edition"),
    ("portico.reloader",),
    ("portico.cli", "portico.swap"),
    ("portico.__main__",),
)
"""The bottom first.  A name stands for the modules below it too, unless they are named."""

PURE = (
    "portico.admission",
    "portico.counts",
    "portico.deadlines",
    "portico.doctor.facts",
    "portico.doctor.findings",
    "portico.doctor.rules",
    "portico.doctor.rules.capacity",
    "portico.doctor.rules.network",
    "portico.doctor.rules.program",
    "portico.doctor.rules.tls",
    "portico.layers",
    "portico.lifecycle",
    "portico.networks",
    "portico.proxy",
    "portico.supervision",
)
"""What only decides: bytes and instants are its arguments."""

ACTING = {
    "_socket",
    "asyncio",
    "os",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "threading",
    "time",
}
"""Modules of the standard library that do something, or tell the time."""

Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCES.rglob("portico/**/*.py"))}


def layer(module: str) -> int:
    """The number of the layer that names this module, or the package nearest around it."""
    places = {name: number for number, names in enumerate(LAYERS) for name in names}
    found = module
    while found not in places:
        found, _, _ = found.rpartition(".")
    assert found != "portico" or module == "portico", f"{module} has no place in LAYERS"
    return places[found]


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, without what stands under `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for alternative in child.orelse:
                yield from executed(alternative)
        else:
            yield from executed(child)


def imports(source: str, package: str) -> Iterator[str]:
    """Every name that a module imports, absolute; `from a import b` gives `a.b`."""
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> Iterator[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imports(path.read_text(), package)


def graph() -> Graph:
    """For each module the modules of portico that it imports."""
    edges: Graph = {}
    for module in MODULES:
        edges[module] = set()
        for name in imports_of(module):
            # `from portico.events import subscribe` names a module and something in it.
            target = name if name in MODULES else name.rpartition(".")[0]
            if target in MODULES:
                edges[module].add(target)
    return edges


def test_every_import_points_down_or_sideways() -> None:
    upward = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if layer(target) > layer(module)
    ]
    assert upward == []


def test_no_modules_import_each_other() -> None:
    TopologicalSorter(graph()).prepare()  # raises CycleError, which names the circle


def test_every_place_in_the_order_is_taken() -> None:
    """A module that was renamed or removed leaves the order too."""
    assert [name for names in LAYERS for name in names if name not in MODULES] == []


@pytest.mark.parametrize("module", PURE)
def test_what_only_decides_imports_nothing_that_acts(module: str) -> None:
    assert {name.partition(".")[0] for name in imports_of(module)} & ACTING == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_the_standard_librarys_socketserver(module: str) -> None:
    """Portico is an implementation of its own, so nothing of it may come from there."""
    assert "socketserver" not in {name.partition(".")[0] for name in imports_of(module)}


def test_importing_portico_does_not_load_socketserver() -> None:
    program = "import sys, portico; sys.exit('socketserver' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_walk_sees_every_form_of_import() -> None:
    source = """
import os.path
from . import events
from ..server import BaseServer
if TYPE_CHECKING:
    from portico import cli
else:
    from portico import swap
def later():
    import selectors
"""
    assert list(imports(source, "portico.engines")) == [
        "os.path",
        "portico.engines.events",
        "portico.server.BaseServer",
        "portico.swap",
        "selectors",
    ]
