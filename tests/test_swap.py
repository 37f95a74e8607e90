"""An unmodified program runs on portico as it would run by itself."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import py_compile
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import portico
from portico import acceptor, families, handlers, request, server
from portico.engines import ENGINES, forks, threads
from portico.events import HandlerStalled, emit
from portico.swap import (
    PUBLIC,
    REPLACEABLE,
    Face,
    ProgramError,
    run_module,
    run_path,
    tell_stalls,
)
from tests.compat.peers import PATIENCE, ask, background, connect, receive, serving, shout

LOCALHOST = ("127.0.0.1", 0)
SWAP = ("-m", "portico.swap")

PROGRAM = """
import json, sys
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "file": __file__,
    "package": __package__,
    "spec": __spec__ and __spec__.name,
    "loader": type(__loader__).__name__,
    "builtins": type(__builtins__).__name__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "code": sys._getframe().f_code.co_filename,
    "names": sorted({*globals()} - {"__annotations__"}),  # made when it is asked for
}, indent=1))
"""
"""Prints all that python tells a program about itself."""


def python(*arguments: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run an interpreter to its end, its errors on standard error."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )


def program(source: str) -> str:
    """Run a program that puts portico in place by itself, and return what it prints."""
    done = python("-W", "error", "-c", textwrap.dedent(source))
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


# ------------------------------------------------------------------------- as python would run it


def script(folder: Path) -> list[str]:
    (folder / "program.py").write_text(PROGRAM)
    return ["program.py"]


def script_elsewhere(folder: Path) -> list[str]:
    (folder / "elsewhere").mkdir()
    script(folder / "elsewhere")
    return ["elsewhere/program.py"]


def linked_script(folder: Path) -> list[str]:
    script_elsewhere(folder)
    (folder / "link.py").symlink_to("elsewhere/program.py")
    return ["link.py"]


def script_by_absolute_path(folder: Path) -> list[str]:
    return [str(folder / name) for name in script(folder)]


def bytecode(folder: Path) -> list[str]:
    (name,) = script(folder)
    py_compile.compile(str(folder / name), cfile=str(folder / "program.pyc"))
    return ["program.pyc"]


def package(folder: Path) -> None:
    (folder / "package" / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py"):
        (folder / "package" / name).touch()
    for name in ("__main__.py", "part.py", "inner/__main__.py"):
        (folder / "package" / name).write_text(PROGRAM)


def directory(folder: Path) -> list[str]:
    package(folder)
    return ["package"]


def archive(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "program.zip", "w") as file:
        file.writestr("__main__.py", PROGRAM)
    return ["program.zip"]


def module(folder: Path) -> list[str]:
    script(folder)
    return ["-m", "program"]


def module_in_a_package(folder: Path) -> list[str]:
    package(folder)
    return ["-m", "package.part"]


def package_with_a_main(folder: Path) -> list[str]:
    package(folder)
    return ["-m", "package"]


def package_in_a_package(folder: Path) -> list[str]:
    package(folder)
    return ["-m", "package.inner"]


def namespace_package(folder: Path) -> list[str]:
    package(folder)
    (folder / "package" / "__init__.py").unlink()
    return ["-m", "package.part"]


@pytest.mark.parametrize("flags", [(), ("-P",), ("-I",)], ids=["plain", "-P", "-I"])
@pytest.mark.parametrize(
    "make",
    [
        script,
        script_elsewhere,
        linked_script,
        script_by_absolute_path,
        bytecode,
        directory,
        archive,
        module,
        module_in_a_package,
        package_with_a_main,
        package_in_a_package,
        namespace_package,
    ],
)
def test_a_program_is_told_what_python_tells_it(
    make: Callable[[Path], list[str]], flags: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = [*make(tmp_path), "-m", "--engine", "last word"]
    expected = python(*flags, *arguments, folder=tmp_path)
    seen = python(*flags, *SWAP, *arguments, folder=tmp_path)
    if expected.returncode == 0:
        assert json.loads(seen.stdout) == json.loads(expected.stdout)
        assert seen.returncode == 0
        assert seen.stderr == ""
    else:  # -P and -I leave out the folder that the module is in
        assert "No module named" in expected.stderr
        assert "no module named" in seen.stderr
        assert seen.returncode == 2


def test_a_program_is_read_in_its_own_encoding(tmp_path: Path) -> None:
    source = '# coding: latin-1\nprint(ascii("grüß"))\n'
    (tmp_path / "program.py").write_text(source, encoding="latin-1")
    assert python(*SWAP, "program.py", folder=tmp_path).stdout == "'gr\\xfc\\xdf'\n"


def test_a_program_inherits_nothing_of_ours(tmp_path: Path) -> None:
    """`from __future__` of this package does not reach it."""
    (tmp_path / "program.py").write_text("def f(a: 1 + 1): pass\nprint(f.__annotations__)\n")
    assert python(*SWAP, "program.py", folder=tmp_path).stdout == "{'a': 2}\n"


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("pass", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("raise ValueError('oh')", 1, "ValueError: oh"),
        ("import nothing_of_this_name", 1, "ModuleNotFoundError: No module named 'nothing_of_"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("print(", 1, "SyntaxError: '(' was never closed"),
    ],
)
@pytest.mark.parametrize("way", [("program.py",), ("-m", "program")], ids=["path", "module"])
def test_a_program_ends_as_it_says(
    way: tuple[str, ...], ending: str, status: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(ending)
    done = python(*SWAP, *way, folder=tmp_path)
    assert done.returncode == status
    assert said in done.stderr
    assert bool(done.stderr) == bool(said)


def test_a_program_stays_the_main_module_while_its_threads_run(tmp_path: Path) -> None:
    """What they pickle is found by the name ``__main__``, when the program's text has ended too."""
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
            import pickle, threading

            class Note:
                pass

            def later():
                main.join()
                print(type(pickle.loads(pickle.dumps(Note()))) is Note)

            main = threading.main_thread()
            threading.Thread(target=later).start()
            """)
    )
    assert python(*SWAP, "program.py", folder=tmp_path).stdout == "True\n"
    assert python(*SWAP, "-m", "program", folder=tmp_path).stdout == "True\n"


@pytest.mark.parametrize("way", [("program.py",), ("-m", "program")], ids=["path", "module"])
def test_a_program_spawns_processes(way: tuple[str, ...], tmp_path: Path) -> None:
    """They find the program again; their ``socketserver`` is the standard library's."""
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
            import multiprocessing, socketserver

            def tell(number):
                return number + 1, socketserver.TCPServer.__module__

            if __name__ == "__main__":
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(tell(0), pool.apply(tell, [1]))
            """)
    )
    done = python(*SWAP, *way, folder=tmp_path)
    assert done.stderr == ""
    assert done.stdout == "(1, 'portico.families') (2, 'socketserver')\n"


# --------------------------------------------------------------------------- what cannot be run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.py"], "cannot run 'nowhere.py': No such file or directory"),
        (["-m", "nowhere"], "cannot run 'nowhere': no module named 'nowhere'"),
        (["-m", "nowhere.at.all"], "cannot run 'nowhere.at.all': no module named 'nowhere'"),
        (["-m", "email.nowhere"], "cannot run 'email.nowhere': no module named 'email.nowhere'"),
        (["-m", "email"], "cannot run 'email': it is a package without a __main__ module"),
        (["-m", ".relative"], "cannot run '.relative': it is not the name of a module"),
        (["-m", ""], "cannot run '': it is not the name of a module"),
        (["-m", "sys"], "cannot run 'sys': there is no Python code in it"),
        (["-m", "__main__"], "cannot run '__main__': it is not the name of a module"),
        (["-m", "builtins.x"], "cannot run 'builtins.x': no module named 'builtins.x'"),
        (["."], "cannot run '.': there is no __main__ module in it"),
        (["--engine", "steam", "x.py"], "engine='steam': expected one of threads, "),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    arguments: list[str], complaint: str, tmp_path: Path
) -> None:
    done = python(*SWAP, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"portico.swap: {complaint}")


@pytest.mark.parametrize(
    "arguments", [[], ["-m"], ["--engine"], ["--engine", "serial"], ["--help"], ["-x", "y"]]
)
def test_a_command_line_without_a_program_gets_the_usage(arguments: list[str]) -> None:
    done = python(*SWAP, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m portico.swap [--engine NAME]")
    assert all(engine in done.stderr for engine in ENGINES)


def test_a_program_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ProgramError) as raised, kept_process():
        run_path(tmp_path / "folder.py")
    assert raised.value.program == str(tmp_path / "folder.py")


def test_a_module_that_nobody_can_find_again_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, but without a way to its code."""
    monkeypatch.setitem(sys.modules, "made_by_hand", ModuleType("made_by_hand"))
    with pytest.raises(ProgramError) as raised, kept_process():
        run_module("made_by_hand")
    assert str(raised.value) == "cannot run 'made_by_hand': made_by_hand.__spec__ is None"


def test_a_main_module_that_is_a_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "package" / "__main__").mkdir(parents=True)
    for name in ("__init__.py", "__main__/__init__.py"):
        (tmp_path / "package" / name).touch()
    done = python(*SWAP, "-m", "package.__main__", folder=tmp_path)
    assert done.returncode == 2
    assert "a package cannot be a program's __main__ module" in done.stderr


def test_a_package_that_fails_to_import_shows_why(tmp_path: Path) -> None:
    """The program is there; that something is not that it imports is an error of its own."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("import nothing_of_this_name")
    done = python(*SWAP, "-m", "broken.part", folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("No module named 'nothing_of_this_name'\n")


@contextmanager
def kept_process() -> Iterator[None]:
    """Keep what a program that is run here would leave behind."""
    argv, path, main = sys.argv[:], sys.path[:], sys.modules["__main__"]
    try:
        yield
    finally:
        sys.argv[:], sys.path[:], sys.modules["__main__"] = argv, path, main


def test_run_path_becomes_the_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys\nargv = sys.argv[:]\npath = sys.path[0]\n")
    with kept_process():
        run_path(tmp_path / "program.py", ["one", "two"])
        main: Any = sys.modules["__main__"]
        assert main.argv == [str(tmp_path / "program.py"), "one", "two"]
        assert main.path == str(tmp_path)
        assert main.__name__ == "__main__"


def test_run_module_becomes_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_program_to_run.py").write_text("import sys\nargv = sys.argv[:]\n")
    monkeypatch.chdir(tmp_path)
    with kept_process():
        run_module("a_program_to_run", ["one"])
        main: Any = sys.modules["__main__"]
        assert main.argv == [str(tmp_path / "a_program_to_run.py"), "one"]
        assert main.__spec__.name == "a_program_to_run"


# ---------------------------------------------------------------------- install, and who it reaches


def test_every_later_import_gets_portico() -> None:
    program("""
        import portico, portico.swap
        portico.swap.install()

        import socketserver
        from socketserver import TCPServer, ThreadingMixIn
        assert socketserver.TCPServer is TCPServer is portico.TCPServer
        assert ThreadingMixIn is portico.ThreadingMixIn

        import http.server, logging.config, wsgiref.simple_server, xmlrpc.server
        for kind in (
            http.server.HTTPServer,
            http.server.ThreadingHTTPServer,
            logging.config.ThreadingTCPServer,
            wsgiref.simple_server.WSGIServer,
            xmlrpc.server.SimpleXMLRPCServer,
        ):
            assert issubclass(kind, portico.TCPServer), kind
        assert issubclass(http.server.BaseHTTPRequestHandler, portico.StreamRequestHandler)
        """)


def test_modules_of_the_standard_library_that_were_imported_before_are_built_anew() -> None:
    program("""
        import http.server, logging.config, wsgiref.simple_server, xmlrpc.server
        import portico, portico.swap
        portico.swap.install()

        from http import server
        assert issubclass(server.HTTPServer, portico.TCPServer)
        import http.server, logging.config, wsgiref.simple_server, xmlrpc.server
        assert http.server is server
        assert issubclass(logging.config.ThreadingTCPServer, portico.TCPServer)
        assert issubclass(wsgiref.simple_server.WSGIServer, portico.TCPServer)
        assert issubclass(xmlrpc.server.SimpleXMLRPCServer, portico.TCPServer)
        """)


@pytest.mark.parametrize(
    "statement",
    [
        "import socketserver",
        "import socketserver as other",
        "from socketserver import TCPServer",
        "from http.server import ThreadingHTTPServer",
        "import http.server as web",
        "import socketserver\nclass Server(socketserver.TCPServer): pass\ndel socketserver",
    ],
)
def test_a_module_that_keeps_the_standard_servers_is_named(statement: str, tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(statement)
    (tmp_path / "innocent.py").write_text("import http, socket, threading")
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
            import early, innocent, warnings
            import portico.swap
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                portico.swap.install()
            (warning,) = caught
            print(warning.category.__name__, warning.filename)
            print(warning.message)
            """)
    )
    done = python("program.py", folder=tmp_path)
    assert done.stderr == ""
    origin, message = done.stdout.splitlines()
    assert origin == f"RuntimeWarning {tmp_path / 'program.py'}"
    assert message == (
        "still on the standard library's socketserver, because imported before portico took its"
        " place: early"
    )


def test_a_main_module_that_keeps_the_standard_servers_is_named() -> None:
    done = python("-c", "import socketserver, portico.swap; portico.swap.install()")
    said = done.stderr.splitlines()[0]  # some versions show the line below it
    assert "RuntimeWarning: still on the standard library's socketserver" in said
    assert ": __main__" in said


def test_modules_that_are_put_off_are_not_loaded_by_the_search() -> None:
    program("""
        import importlib.util, sys, types
        import socketserver
        spec = importlib.util.find_spec("http.server")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        lazy = sys.modules["lazy"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(lazy)
        sys.modules["no module at all"] = object()
        del socketserver

        import portico.swap
        portico.swap.install()
        assert type(lazy) is not types.ModuleType  # it becomes one when it is loaded
        """)


def test_portico_stays_in_place() -> None:
    program("""
        import importlib, importlib.util, sys
        import portico, portico.swap
        portico.swap.install()
        import socketserver as face
        importlib.import_module("http.server")

        assert importlib.reload(face) is face
        assert face.TCPServer is portico.TCPServer

        del sys.modules["socketserver"]
        import socketserver
        assert socketserver is face

        assert importlib.util.find_spec("socketserver") is face.__spec__
        assert importlib.reload(sys.modules["http.server"]).HTTPServer.__bases__ == (
            portico.TCPServer,
        )
        """)


def test_a_second_install_changes_nothing() -> None:
    program("""
        import portico.swap
        portico.swap.install("serial")
        import socketserver as first
        portico.swap.install("serial")
        import socketserver as second
        assert first is second
        """)


def test_a_second_install_of_another_engine_is_refused() -> None:
    program("""
        import portico.swap
        from portico.errors import SettingError
        portico.swap.install("threads")
        try:
            portico.swap.install("serial")
        except SettingError as error:
            assert str(error) == "engine='serial': expected 'threads', which is in place already"
        else:
            raise AssertionError("not refused")
        """)


def test_green_servers_get_the_hubs_that_were_asked_for() -> None:
    """Those made with ``ThreadingMixIn``; a program that says another number has its way."""
    program("""
        import portico.swap
        from portico.errors import SettingError
        portico.swap.install("green", hubs=3)
        portico.swap.install("green", hubs=3)
        import http.server, socketserver

        class Own(socketserver.ThreadingMixIn, socketserver.TCPServer):
            max_hubs = 2

        servers = socketserver.ThreadingTCPServer, http.server.ThreadingHTTPServer, Own
        assert [server.max_hubs for server in servers] == [3, 3, 2]
        try:
            portico.swap.install("green", hubs=4)
        except SettingError as error:
            assert str(error) == "hubs=4: expected 3, which is in place already"
        else:
            raise AssertionError("not refused")
        """)


def test_hubs_on_another_engine_change_nothing() -> None:
    program("""
        import sys
        import portico.swap
        from portico.errors import SettingError
        finders = sys.meta_path[:]
        try:
            portico.swap.install("threads", hubs=3)
        except SettingError as error:
            assert error.name, error.value == ("hubs", 3)
        else:
            raise AssertionError("not refused")
        assert sys.meta_path == finders
        """)


def test_an_unknown_engine_changes_nothing() -> None:
    program("""
        import sys
        import portico.swap
        from portico.errors import SettingError
        finders = sys.meta_path[:]
        try:
            portico.swap.install("steam")
        except SettingError as error:
            assert error.name, error.value == ("engine", "steam")
        else:
            raise AssertionError("not refused")
        assert sys.meta_path == finders
        import socketserver
        assert socketserver.TCPServer.__module__ == "socketserver"
        """)


# ----------------------------------------------------------------------------------------- the face


@pytest.mark.parametrize("engine", ENGINES)
def test_the_face_shows_what_socketserver_shows(engine: str) -> None:
    """And nothing else of portico, so that a program sees no name that it would not see."""
    standard = importlib.import_module("socketserver")
    face = Face(engine)

    def names(module: object) -> set[str]:
        return {name for name in dir(module) if not name.startswith("__")}

    assert names(standard) <= names(face)
    # Which are there since 3.12.
    newer = {"ForkingUnixStreamServer", "ForkingUnixDatagramServer"}
    assert names(face) - names(standard) <= newer
    assert set(standard.__all__) <= set(face.__all__)
    assert set(face.__all__) == set(PUBLIC)
    assert face.__name__ == standard.__name__
    assert face.__doc__
    assert face.__file__


def test_the_face_is_no_package() -> None:
    face = Face("threads")
    assert not hasattr(face, "__path__")
    with pytest.raises(AttributeError, match="module 'socketserver' has no attribute 'events'"):
        face.events  # noqa: B018


def test_the_face_has_the_version_of_socketserver() -> None:
    face = Face("threads")
    if sys.version_info < (3, 15):
        assert face.__version__ == "0.4"
        del face.__version__  # as it is from then on
    with pytest.warns(DeprecationWarning, match="'__version__' is deprecated"):
        assert face.__version__ == "0.4"


@pytest.mark.parametrize("name", REPLACEABLE)
def test_what_is_patched_on_the_face_is_patched_where_it_is_used(name: str) -> None:
    face = Face("threads")
    users = [
        each
        for each in (acceptor, families, forks, handlers, request, server, threads)
        if name in vars(each)
    ]
    assert users
    original = getattr(portico, name)
    with mock.patch.object(face, name) as patched:
        assert [getattr(user, name) for user in users] == [patched] * len(users)
        assert getattr(portico, name) is patched
    assert [getattr(user, name) for user in users] == [original] * len(users)
    assert getattr(face, name) is original


def test_a_name_of_the_programs_own_stays_on_the_face() -> None:
    face: Any = Face("threads")
    face.flag = True
    assert face.flag
    assert not hasattr(portico, "flag")
    del face.flag
    assert not hasattr(face, "flag")


# ------------------------------------------------------------------- what stands behind the mix-in


def tell(request: Any, client_address: Any, server: Any) -> Any:
    """Say where the handler runs."""
    request.sendall(json.dumps([os.getpid(), threading.get_ident()]).encode())


WHERE = {
    "threads": lambda process, thread, serving: process == os.getpid() and thread != serving,
    "serial": lambda process, thread, serving: process == os.getpid() and thread == serving,
    "forks": lambda process, thread, serving: process != os.getpid(),
    "pool": lambda process, thread, serving: process == os.getpid() and thread != serving,
    "green": lambda process, thread, serving: process == os.getpid(),
}
"""Whether a handler ran where its engine runs it."""


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_runs_the_requests(engine: str) -> None:
    face: Any = Face(engine)
    serving_threads = []

    class Server(face.ThreadingMixIn, face.TCPServer):  # type: ignore[misc]  # Any as a base
        def service_actions(self) -> None:
            serving_threads.append(threading.get_ident())
            super().service_actions()

    with Server(LOCALHOST, tell) as instance, serving(instance):
        answer = ask(instance)
    process, thread = json.loads(answer)
    assert WHERE[engine](process, thread, serving_threads[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_serves_through_the_programs_process_request_thread(engine: str) -> None:
    face: Any = Face(engine)

    class Server(face.ThreadingTCPServer):  # type: ignore[misc]
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            request.sendall(b"before ")
            super().process_request_thread(request, client_address)

    with Server(LOCALHOST, shout) as instance, serving(instance):
        assert ask(instance, b"hello") == b"before HELLO"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_of_a_handler_is_reported_once(
    engine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    face: Any = Face(engine)

    def fail(request: Any, client_address: Any, server: Any) -> Any:
        raise ValueError("of the handler")

    with face.ThreadingTCPServer(LOCALHOST, fail) as instance, serving(instance):
        assert ask(instance) == b""
    assert capfd.readouterr().err.count("ValueError: of the handler") == 1


@pytest.mark.parametrize("engine", ENGINES.keys() - {"threads"})
def test_the_classes_in_front_of_an_engine_are_the_faces_own(engine: str) -> None:
    face: Any = Face(engine)
    mixin = face.ThreadingMixIn
    assert mixin.__module__ == "socketserver"
    assert repr(mixin) == "<class 'socketserver.ThreadingMixIn'>"
    assert mixin is not portico.ThreadingMixIn
    assert mixin.daemon_threads is False
    assert mixin.block_on_close is True
    assert isinstance(mixin._threads, face._NoThreads)
    assert not issubclass(mixin, portico.BaseServer)
    for family in ("TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer"):
        kind = getattr(face, f"Threading{family}")
        assert kind.__bases__ == (mixin, getattr(portico, family))
        assert repr(kind) == f"<class 'socketserver.Threading{family}'>"
    assert face.TCPServer is portico.TCPServer
    assert face.ForkingTCPServer is portico.ForkingTCPServer


@pytest.mark.parametrize("engine", ENGINES)
def test_the_classes_of_a_face_go_through_pickle(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    face: Any = Face(engine)
    monkeypatch.setitem(sys.modules, "socketserver", face)
    for name in PUBLIC:
        kind = getattr(face, name)
        assert pickle.loads(pickle.dumps(kind)) is kind


def test_a_mix_in_patched_on_a_face_of_its_own_leaves_portico_alone() -> None:
    face: Any = Face("serial")
    original = face.ThreadingMixIn
    with mock.patch.object(face, "ThreadingMixIn") as patched:
        assert face.ThreadingMixIn is patched
    assert face.ThreadingMixIn is original
    assert portico.ThreadingMixIn is threads.ThreadingMixIn


@pytest.mark.parametrize("daemon_threads", [True, False])
def test_a_forked_handler_is_waited_for_unless_it_stands_for_a_daemon(
    daemon_threads: bool,
) -> None:
    face: Any = Face("forks")

    class Server(face.ThreadingTCPServer):  # type: ignore[misc]
        waited: list[bool] = []  # noqa: RUF012

        def collect_children(self, *, blocking: bool = False) -> None:
            self.waited.append(blocking)
            super().collect_children(blocking=blocking)

    Server.daemon_threads = daemon_threads
    with Server(LOCALHOST, shout) as instance, serving(instance):
        assert ask(instance, b"hello") == b"HELLO"
    assert any(Server.waited) is not daemon_threads
    for child in instance.active_children or ():
        os.waitpid(child, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_program_can_look_into_the_list_of_threads(engine: str) -> None:
    face: Any = Face(engine)
    with face.ThreadingTCPServer(LOCALHOST, shout) as instance, serving(instance):
        assert ask(instance, b"hello") == b"HELLO"
        assert ask(instance, b"again") == b"AGAIN"
        assert len(instance._threads) <= 2
        assert isinstance(instance._threads, face._Threads)


def test_threads_that_a_program_starts_itself_are_waited_for() -> None:
    face: Any = Face("serial")

    class Server(face.ThreadingTCPServer):  # type: ignore[misc]
        def process_request(self, request: Any, client_address: Any) -> None:
            self.__dict__.setdefault("_threads", face._Threads())
            thread = threading.Thread(
                target=self.process_request_thread, args=(request, client_address)
            )
            self._threads.append(thread)
            thread.start()

    with Server(LOCALHOST, shout) as instance, serving(instance):
        assert ask(instance, b"hello") == b"HELLO"
    assert list(instance._threads) == []


def test_a_stand_in_serves_in_front_of_a_server_from_before_the_swap() -> None:
    """A module that kept the standard library's servers may still meet the program's mix-in."""
    standard: Any = importlib.import_module("socketserver")
    face: Any = Face("serial")

    class Server(face.ThreadingMixIn, standard.TCPServer):  # type: ignore[misc]
        """Serves, if not by our loop."""

    with Server(LOCALHOST, shout) as instance, serving(instance):
        assert ask(instance, b"hello") == b"HELLO"


# ----------------------------------------------------------------------------- who holds whom up


@pytest.mark.parametrize("command", [SWAP, ("-m", "portico", "run")], ids=["swap", "run"])
def test_where_a_handler_holds_up_the_others_is_said(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """The program itself would never know why its other clients wait."""
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""\
            import socketserver, sys

            class Asking(socketserver.StreamRequestHandler):
                def handle(self):
                    self.wfile.write(sys.stdin.readline().encode())

            with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Asking) as server:
                print(server.server_address[1], flush=True)
                server.serve_forever()
            """)
    )
    process = subprocess.Popen(
        [sys.executable, *command, "--engine", "green", "program.py"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            port = int(process.stdout.readline())
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                said = background(process.stderr.readline).result(PATIENCE)
                process.stdin.write("an answer\n")
                process.stdin.flush()
                assert client.recv(100) == b"an answer\n"
        finally:
            process.kill()
    place = re.escape(str(tmp_path / "program.py"))
    assert re.fullmatch(
        rf"portico: Asking has held up its neighbours for \d+\.\d s at {place}:5\n", said
    )


def test_a_place_that_holds_up_others_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    end = tell_stalls()
    try:
        for place in ("app.py:1", "app.py:2", "app.py:1", "", ""):
            emit(HandlerStalled(None, None, "Handler", place, 0.25))
    finally:
        end()
    emit(HandlerStalled(None, None, "Handler", "app.py:3", 0.25))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" at ")[2] for line in lines] == [
        "app.py:1",
        "app.py:2",
        "a place outside of the program's own files",
    ]


# ------------------------------------------------------------------------------- a real program


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("engine", ENGINES)
def test_http_server_runs_as_a_program(engine: str, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("a page")
    command = [*SWAP, "--engine", engine, "-m", "http.server", "--bind", "127.0.0.1", "0"]
    process = subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            match = re.search(r"port (\d+)", process.stdout.readline())
            assert match is not None
            url = f"http://127.0.0.1:{match[1]}/page.txt"
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                assert response.read() == b"a page"
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Keyboard interrupt received, exiting." in out
    assert errors.count("GET /page.txt") == 1


@pytest.mark.parametrize("engine", ENGINES.keys() - {"serial"})
def test_an_idle_connection_does_not_hold_up_the_end_of_daemons(engine: str) -> None:
    """`http.server` makes its threads daemons, so the end does not wait for a silent client."""
    face: Any = Face(engine)

    class Server(face.ThreadingTCPServer):  # type: ignore[misc]
        daemon_threads = True

    def hello(request: Any, client_address: Any, server: Any) -> Any:
        request.sendall(b"hello")
        request.recv(1)

    instance = Server(LOCALHOST, hello)
    with connect(instance) as client:
        with serving(instance):
            assert receive(client, 5) == b"hello"
        assert instance.fileno() == -1
    for child in getattr(instance, "active_children", None) or ():
        os.kill(child, signal.SIGKILL)  # it has a copy of the client, too
        os.waitpid(child, 0)
