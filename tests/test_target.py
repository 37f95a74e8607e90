from __future__ import annotations

import socketserver
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import portico
from portico import target
from portico.address import Scheme
from portico.target import EXPECTED, TargetError

PROGRAM = """
import socketserver
import portico
from portico import StreamRequestHandler

class Echo(StreamRequestHandler):
    class Inner(StreamRequestHandler):
        pass

class Upper(portico.DatagramRequestHandler):
    pass

class Old(socketserver.StreamRequestHandler):
    pass

class Server(portico.TCPServer):
    pass

class OldServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    pass

def function(request, client_address, server):
    return request

def no_handler(request):
    pass

async def coroutine(request, client_address, server):
    pass

text = "text"
server = portico.TCPServer(("127.0.0.1", 0), Echo, bind_and_activate=False)
server.server_close()

if __name__ == "__main__":
    raise AssertionError("imported as the main program")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = sys.modules.copy()
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


@pytest.fixture(params=["application:", "application.py:", "./application.py:"])
def place(request: pytest.FixtureRequest, folder: Path) -> str:
    """What stands before the name of the handler: a module, or its file."""
    (folder / "application.py").write_text(PROGRAM)
    return str(request.param)


def reason(text: str) -> str:
    """Why nothing can be loaded."""
    with pytest.raises(TargetError) as caught:
        target.load(text)
    assert caught.value.target == text
    assert str(caught.value) == f"cannot serve {text!r}: {caught.value.reason}"
    return caught.value.reason


@pytest.mark.parametrize("name", ["Echo", "Upper", "Old", "function", "Echo.Inner"])
def test_a_handler_is_found(place: str, name: str) -> None:
    """A class, that of a nested class and of the standard library too, or a function."""
    found: Any = target.load(f"{place}{name}")
    assert found.__qualname__ == name
    assert sys.modules["application"] is sys.modules[found.__module__]


def test_a_module_in_a_package_is_found(folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "application.py").write_text(PROGRAM)
    found: Any = target.load("package.application:Echo")
    assert found.__module__ == "package.application"


def test_a_file_finds_its_neighbours(folder: Path) -> None:
    """As for python, its own folder goes before the current one, link or not."""
    there = folder / "there"
    there.mkdir()
    (there / "neighbour.py").write_text(PROGRAM)
    (there / "program.py").write_text("from neighbour import Echo")
    (folder / "link.py").symlink_to(there / "program.py")
    found: Any = target.load("link.py:Echo")
    assert found.__module__ == "neighbour"
    assert sys.path[0] == str(there)


def test_the_current_directory_goes_first_once(folder: Path) -> None:
    (folder / "application.py").write_text(PROGRAM)
    target.load("application:Echo")
    target.load("application:Upper")
    assert sys.path[0] == str(folder)
    assert sys.path[1] != str(folder)


def test_a_file_may_be_called_like_a_module_that_is_there(folder: Path) -> None:
    (folder / "socket.py").write_text(PROGRAM)
    before = sys.modules["socket"]
    found: Any = target.load("socket.py:Echo")
    assert sys.modules["socket"] is before
    assert sys.modules[found.__module__].Echo is found


@pytest.mark.parametrize("name", ["application.py", "socket.py"])
def test_handlers_of_one_file_share_its_module(folder: Path, name: str) -> None:
    """Services that name the same file serve the same data."""
    (folder / name).write_text(PROGRAM)
    handlers: list[Any] = [target.load(f"{place}:Echo") for place in (name, f"./{name}")]
    handlers.append(target.load(f"{folder / name}:Echo.Inner"))
    assert handlers[0] is handlers[1]
    assert handlers[0].Inner is handlers[2]


def test_a_callable_object_is_a_handler(folder: Path) -> None:
    (folder / "application.py").write_text(
        "from functools import partial\n"
        "def three(request, client_address, server, greeting): ...\n"
        "handler = partial(three, greeting='hello')\n"
        "unknown = max\n"
    )
    assert isinstance(target.load("application:handler"), partial)
    # What is written in C does not say how it is called.
    assert target.load("application:unknown") is max


# ------------------------------------------------------------------------------------ what is not


@pytest.mark.parametrize(
    "text", ["", "application", "application.py", ":Echo", "application:", ".application:Echo", "."]
)
def test_a_target_has_a_module_and_a_name(text: str) -> None:
    assert reason(text) == EXPECTED


def test_an_address_is_no_target() -> None:
    assert reason("tcp://:9000") == f"it is an address, and the target comes first; {EXPECTED}"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("no_such:Echo", "no_such"),
        ("no_such.module:Echo", "no_such"),
        ("email.no_such:Echo", "email.no_such"),
        ("string.no_such:Echo", "string.no_such"),
    ],
)
def test_a_module_that_is_not_there_is_named(text: str, missing: str) -> None:
    assert reason(text) == (
        f"there is no module {missing!r}, neither in the current directory"
        " nor among what is installed"
    )


@pytest.mark.parametrize("text", ["no_such.py:Echo", "no/such.py:Echo", "./:Echo", "/:Echo"])
def test_a_file_that_is_not_there_is_named(text: str) -> None:
    place = text.removesuffix(":Echo")
    assert reason(text) == f"there is no file {str(Path(place))!r}"


def test_a_file_of_something_else_is_not_run(folder: Path) -> None:
    (folder / "program").write_text(PROGRAM)
    assert reason("./program:Echo").startswith("'program' is not a file of Python; expected")


@pytest.mark.parametrize("form", ["broken:Echo", "broken.py:Echo"])
@pytest.mark.parametrize(
    ("program", "raised", "line"),
    [
        ("\n1 / 0", "ZeroDivisionError: division by zero", 2),
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_depen", 1),
        ("raise ValueError('two\\nlines')", "ValueError: two lines", 1),
        ("raise ValueError", "ValueError", 1),
        ("import sys\nsys.exit(3)", "SystemExit: 3", 2),
        ("\n\ndef f(:", "SyntaxError: invalid syntax", 3),
        ("def f():\n    1 / 0\nf()", "ZeroDivisionError: division by zero", 2),
    ],
)
def test_a_module_that_fails_is_said_to_fail_and_where(
    folder: Path, form: str, program: str, raised: str, line: int
) -> None:
    """It is there, so nobody shall look for a wrong name."""
    (folder / "broken.py").write_text(program)
    told = reason(form)
    assert told.startswith(f"importing {form.removesuffix(':Echo')} failed with {raised}")
    assert told.endswith(f" at {folder / 'broken.py'}:{line}")
    assert "\n" not in told
    assert "broken" not in sys.modules


def test_a_module_that_cannot_be_read_is_said_to_fail(folder: Path) -> None:
    """Without a place: no line of it ran."""
    (folder / "broken.py").write_bytes(b"\0")
    assert reason("broken:Echo").startswith("importing broken failed with SyntaxError: ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Ecko", "application has no 'Ecko'; did you mean Echo?"),
        ("Echo.Iner", "application.Echo has no 'Iner'; did you mean Inner?"),
        ("Echo.xyz", "application.Echo has no 'xyz'"),
        ("xyz", "application has no 'xyz'; its handlers are Echo, Upper, Old"),
        ("Echo.", "application.Echo has no ''"),
    ],
)
def test_an_attribute_that_is_not_there_is_named_with_the_nearest(
    folder: Path, name: str, expected: str
) -> None:
    (folder / "application.py").write_text(PROGRAM)
    assert reason(f"application:{name}") == expected


def test_a_module_without_handlers_has_none_to_name(folder: Path) -> None:
    (folder / "empty.py").write_text("from portico import StreamRequestHandler")
    assert reason("empty:xyz") == "empty has no 'xyz'"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Server", "it is a server; name the handler that it serves"),
        ("OldServer", "it is a server; name the handler that it serves"),
        ("server", "it is a server; name the handler that it serves"),
        ("text", "it is of type str; expected a class that derives from BaseRequestHandler"),
        ("coroutine", "it is a coroutine function, which nobody would await"),
        ("no_handler", "it cannot be called with (request, client_address, server): too many"),
    ],
)
def test_what_is_no_handler_is_told_so(folder: Path, name: str, expected: str) -> None:
    (folder / "application.py").write_text(PROGRAM)
    assert reason(f"application:{name}").startswith(expected)


# -------------------------------------------------------------------------- streams and datagrams


@pytest.mark.parametrize(
    ("handler", "scheme", "expected"),
    [
        (portico.DatagramRequestHandler, Scheme.TLS, "it handles datagrams, which come to udp:"),
        (portico.DatagramRequestHandler, Scheme.TCP, "it handles datagrams, which come to udp:"),
        (portico.DatagramRequestHandler, Scheme.UNIX, "datagrams, which come to unix-datagram:"),
        (portico.StreamRequestHandler, Scheme.UDP, "it handles streams, which come to tcp:"),
        (portico.StreamRequestHandler, Scheme.UNIX_DATAGRAM, "streams, which come to unix:"),
        (socketserver.DatagramRequestHandler, Scheme.TCP, "datagrams, which come to udp:"),
    ],
)
def test_a_handler_is_for_streams_or_for_datagrams(
    handler: type, scheme: Scheme, expected: str
) -> None:
    with pytest.raises(TargetError) as caught:
        target.check_scheme("application:Echo", handler, scheme)
    assert expected in caught.value.reason
    assert caught.value.reason.endswith(f" and not to {scheme}:")


@pytest.mark.parametrize(
    ("handler", "schemes"),
    [
        (portico.StreamRequestHandler, {Scheme.TCP, Scheme.TLS, Scheme.UNIX}),
        (portico.DatagramRequestHandler, {Scheme.UDP, Scheme.UNIX_DATAGRAM}),
        (portico.BaseRequestHandler, {*Scheme}),
        (print, {*Scheme}),
    ],
)
def test_a_handler_fits_the_schemes_that_bring_what_it_reads(
    handler: target.Handler, schemes: set[Scheme]
) -> None:
    for scheme in schemes:
        target.check_scheme("application:Echo", handler, scheme)
