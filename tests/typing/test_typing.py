"""Type checkers see portico as they see `socketserver`.

``programs/`` holds programs of the standard library's module, which mypy and pyright accept in
their strict modes; they accept the same programs on portico.  What typeshed declares is compared
with portico by tools, not by hand: with what is there (stubtest), and with what is annotated.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = sorted((HERE / "programs").glob("*.py"))

STATEMENTS = {
    "stdlib": "import socketserver\n",
    "portico": "import portico as socketserver\n",
}

pytest.importorskip("mypy", reason="type checkers are installed where types are checked only")


def stub() -> Path:
    """Where mypy keeps typeshed's description of `socketserver`."""
    import mypy

    return Path(mypy.__file__).parent / "typeshed" / "stdlib" / "socketserver.pyi"


def run(*command: str | Path, folder: Path) -> tuple[int, str]:
    """Run a tool in a folder, and return its status and all that it said."""
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def mypy(folder: Path, *files: Path) -> tuple[int, str]:
    # A version on which the module has all its classes.
    options = ("--strict", "--config-file=", "--python-version=3.13")
    return run(sys.executable, "-m", "mypy", *options, *files, folder=folder)


def pyright(folder: Path) -> tuple[int, str]:
    settings = {"typeCheckingMode": "strict", "include": ["."]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    program = shutil.which("pyright", path=str(Path(sys.executable).parent))
    assert program is not None, "pyright is part of the development environment"
    return run(program, "--warnings", "--pythonpath", sys.executable, folder=folder)


@pytest.fixture(params=STATEMENTS)
def programs(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Copies of the programs, with one module or the other."""
    copies: list[Path] = []
    for program in PROGRAMS:
        source = program.read_text()
        assert source.count(STATEMENTS["stdlib"]) == 1
        copies.append(tmp_path / program.name)
        copies[-1].write_text(source.replace(STATEMENTS["stdlib"], STATEMENTS[request.param]))
    return copies


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 4


def test_mypy_accepts_the_programs(programs: list[Path], tmp_path: Path) -> None:
    status, said = mypy(tmp_path, *programs)
    assert status == 0, said


def test_pyright_accepts_the_programs(programs: list[Path], tmp_path: Path) -> None:
    assert programs
    status, said = pyright(tmp_path)
    assert status == 0, said


def test_the_checkers_look_at_portico(tmp_path: Path) -> None:
    """If its types were unknown, everything would be accepted."""
    program = tmp_path / "wrong.py"
    program.write_text(
        "import portico\n\nserver: int = portico.TCPServer(('', 0), portico.BaseRequestHandler)\n"
    )
    for status, said in (mypy(tmp_path, program), pyright(tmp_path)):
        assert status == 1
        assert "TCPServer" in said


@pytest.mark.parametrize("name", ["engines.py", "coroutines.py", "serving.py"])
def test_what_socketserver_has_not_is_accepted(tmp_path: Path, name: str) -> None:
    """Engines in front of foreign servers; overrides that are coroutines."""
    program = tmp_path / name
    program.write_text((HERE / name).read_text())
    status, said = mypy(tmp_path, program)
    assert status == 0, said
    status, said = pyright(tmp_path)
    assert status == 0, said


def test_typesheds_description_of_socketserver_describes_portico(tmp_path: Path) -> None:
    """Every name, argument and default that it declares is there at run time."""
    options = ("--ignore-missing-stub", "--concise")
    (tmp_path / "portico.pyi").write_text(stub().read_text())
    _, of_portico = run(
        *("env", f"MYPYPATH={tmp_path}", sys.executable, "-m", "mypy.stubtest", "portico"),
        *options,
        folder=tmp_path,
    )
    # Subclasses have it: the standard library's module does not fit its description there either.
    assert of_portico == "portico.BaseServer.get_request is not present at runtime\n"


class Protocols(ast.NodeTransformer):
    """Turns the classes of a stub into protocols: what has their members is what they accept."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.bases.append(ast.Name("Protocol"))
        node.body = [self.visit(part) for part in node.body]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        # A constructor makes no type, and get_request is for subclasses.
        return ast.Pass() if node.name in {"__init__", "get_request"} else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """What is read as one type: portico may well allow more to be assigned."""
        if not isinstance(node.target, ast.Name) or ast.unparse(node.annotation) == "TypeAlias":
            return node
        kind = ast.unparse(node.annotation).removeprefix("ClassVar[")
        kind = kind.removesuffix("]") if kind != ast.unparse(node.annotation) else kind
        return ast.parse(f"@property\ndef {node.target.id}(self) -> {kind}: ...").body[0]


def test_portico_has_the_types_that_typeshed_declares(tmp_path: Path) -> None:
    """An object of portico is accepted where the members of typeshed's class are asked for."""
    tree = Protocols().visit(ast.parse(stub().read_text()))
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    # What the stub says of itself to be inconsistent stays so.
    heading = '# mypy: disable-error-code="override"\nfrom typing import Protocol\n'
    protocols = ast.unparse(ast.fix_missing_locations(tree))
    (tmp_path / "declared.pyi").write_text(heading + protocols)
    program = tmp_path / "program.py"
    program.write_text(
        "import declared\nimport portico\n"
        + "".join(
            f"\n\ndef {name}(ours: portico.{name}) -> declared.{name}:\n    return ours\n"
            for name in classes
            if hasattr(__import__("portico"), name)
        )
    )
    assert len(classes) > 15
    status, said = mypy(tmp_path, program)
    assert status == 0, said
