"""Run an unmodified program on portico.

Owns what stands behind the name ``socketserver`` in this process, and the start of a program as
its main program.  `install` puts a face of portico in place of the standard library's module;
`run_module` and `run_path` then do what ``python -m NAME`` and ``python PATH`` do.  From a shell:

    python -m portico.swap [--engine NAME] (-m MODULE | PROGRAM) ARGUMENTS...

There, and in ``portico run``, what only an engine can see of the program is said on standard error:
`tell_stalls`.

The process belongs to the program from then on: nothing is put back.  Another interpreter that
the program starts (``multiprocessing`` with spawn, ``subprocess``) has the standard library's
module again.

Needs nothing but the standard library, so that any interpreter with this package on its path can
try it.

Source: the language reference, "The import system"; "Command line and environment" for what
``sys.argv``, ``sys.path[0]`` and ``__main__`` hold.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.abc
import importlib.util
import io
import os
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import copy_context
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    ModuleSpec,
    PathFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import portico
from portico.console import say
from portico.engines import ENGINES, serve, serve_foreign, settings
from portico.engines.threads import _NoThreads, _Threads
from portico.errors import PorticoError, SettingError
from portico.events import HandlerStalled, subscribe

if TYPE_CHECKING:
    from portico.server import BaseServer

    _Base: TypeAlias = BaseServer
else:
    _Base = object

REPLACED: Final = "socketserver"
"""The module whose place portico takes."""

PUBLIC: Final = (
    "BaseServer",
    "TCPServer",
    "UDPServer",
    "UnixStreamServer",
    "UnixDatagramServer",
    "ForkingMixIn",
    "ThreadingMixIn",
    "ForkingTCPServer",
    "ForkingUDPServer",
    "ForkingUnixStreamServer",
    "ForkingUnixDatagramServer",
    "ThreadingTCPServer",
    "ThreadingUDPServer",
    "ThreadingUnixStreamServer",
    "ThreadingUnixDatagramServer",
    "BaseRequestHandler",
    "StreamRequestHandler",
    "DatagramRequestHandler",
)
"""What ``from socketserver import *`` gives, where the system has all of it."""

REPLACEABLE: Final = (
    *("_NoThreads", "_ServerSelector", "_SocketWriter", "_Threads"),
    *("BufferedIOBase", "os", "selectors", "socket", "sys", "threading", "time"),
)
"""What else programs reach through the module, and replace in their tests."""

VERSION: Final = "0.4"
"""``socketserver.__version__``, which has not changed in twenty years."""

THREADED: Final = ("TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer")
"""The families that the standard library combines with ``ThreadingMixIn``."""


class ProgramError(PorticoError):
    """A program cannot be started.

    Attributes:
        program: The module or the path that was given.
        reason: Why there is nothing to run.
    """

    def __init__(self, program: str, reason: str) -> None:
        super().__init__(program, reason)
        self.program, self.reason = program, reason

    def __str__(self) -> str:
        return f"cannot run {self.program!r}: {self.reason}"


# ------------------------------------------------------------------------------------ the face


class SerialMixIn:
    """Serve each request in the thread that accepted it; owns `process_request`."""

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve the request, in a copy of the context variables, and return when it is done."""
        copy_context().run(serve, self, request, client_address)


class Face(types.ModuleType):
    """The module that a program gets when it imports ``socketserver``.

    It has the names of ``socketserver`` and no other of portico's.  On an engine other than
    threads, ``ThreadingMixIn`` and the servers made with it are its own.
    """

    def __init__(self, engine: str, *, hubs: int | None = None) -> None:
        """Make the face whose ``ThreadingMixIn`` is `engine`, with at most so many hubs.

        Raises:
            SettingError: There is no such engine, or it has no hubs, or not so many.
        """
        if engine not in ENGINES:
            raise SettingError("engine", engine, "one of " + ", ".join(ENGINES))
        attributes = settings(engine, hubs=hubs)
        super().__init__(REPLACED, portico.__doc__)
        public = [name for name in PUBLIC if hasattr(portico, name)]
        # Written past __setattr__: nothing is being replaced.
        names = self.__dict__
        names.update((name, getattr(portico, name)) for name in (*public, *REPLACEABLE))
        names.update(__all__=public, __file__=portico.__file__)
        if sys.version_info < (3, 15):  # from there on, asking for it warns
            names["__version__"] = VERSION
        if engine != "threads":
            names.update(_threading_classes(engine, attributes))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a name here and, when a program replaces what servers use, where they use it."""
        super().__setattr__(name, value)
        if name in REPLACEABLE:
            setattr(portico, name, value)

    def __getattr__(self, name: str) -> Any:
        if name != "__version__":
            raise AttributeError(
                f"module {REPLACED!r} has no attribute {name!r}", name=name, obj=self
            )
        warnings.warn(
            "'__version__' is deprecated and slated for removal in Python 3.20",
            DeprecationWarning,
            stacklevel=2,
        )
        return VERSION


def _threading_classes(engine: str, attributes: Mapping[str, object]) -> dict[str, type]:
    """Make ``ThreadingMixIn`` and what is built with it, so that `engine` runs the requests."""
    path = ENGINES[engine]
    runner = SerialMixIn if path is None else pkgutil.resolve_name(path)
    calls_it = hasattr(runner, "process_request_thread")
    bases = (_Threaded, runner) if calls_it else (_Threaded, _InThread, runner)
    mixin = _make_class("ThreadingMixIn", bases, attributes)
    mixin.__doc__ = f"Serve each request as the {engine} engine does."
    families = (name for name in THREADED if hasattr(portico, name))
    return {"ThreadingMixIn": mixin} | {
        f"Threading{family}": _make_class(f"Threading{family}", (mixin, getattr(portico, family)))
        for family in families
    }


def _make_class(
    name: str, bases: tuple[type, ...], attributes: Mapping[str, object] = MappingProxyType({})
) -> type:
    """Make a class that says, and pickles as, ``socketserver.NAME``."""
    return type(name, bases, {"__module__": REPLACED, **attributes})


class _Threaded(_Base):
    """What servers made with a ``ThreadingMixIn`` say about threads, in front of any engine."""

    daemon_threads: bool = False
    block_on_close: bool = True
    _threads: _Threads | _NoThreads = _NoThreads()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have the engine serve the request, beside a list of threads that programs look into."""
        if self.block_on_close:
            vars(self).setdefault("_threads", _Threads())
        super().process_request(request, client_address)

    def server_close(self) -> None:
        """Close the server, and wait as for threads: not for daemons, but for the program's."""
        if self.daemon_threads:
            self.block_on_close = False
        super().server_close()
        self._threads.join()


class _InThread(_Base):
    """Has an engine's workers call `process_request_thread`, which programs extend."""

    def process_request_thread(self, request: Any, client_address: Any) -> bool:
        """Serve one request to its end."""
        serve_request = getattr(super(), "serve_request", None)
        if serve_request is not None:
            return bool(serve_request(request, client_address))
        # In front of a server that a module imported before portico came.
        return serve_foreign(self, request, client_address)

    def serve_request(self, request: Any, client_address: Any) -> bool:
        """Serve one request as the program's `process_request_thread` does."""
        # An override returns nothing.
        return self.process_request_thread(request, client_address) is not False


# ----------------------------------------------------------------------------- the replacement


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers every import of ``socketserver`` with one face.

    An entry in ``sys.modules`` alone would not outlive ``importlib.reload``, nor a program that
    deletes the entry to import the module afresh.
    """

    def __init__(self, engine: str, hubs: int | None) -> None:
        self.engine = engine
        self.hubs = hubs
        self._face = Face(engine, hubs=hubs)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != REPLACED:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=portico.__file__)

    def create_module(self, spec: ModuleSpec) -> Face:
        return self._face

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: the face was finished when it was made."""


def install(engine: str = "threads", *, hubs: int | None = None) -> None:
    """Put portico in place of ``socketserver`` for the rest of this process.

    Every later ``import socketserver`` or ``from socketserver import ...`` gets portico's names,
    in the program and in the standard library (`http.server`, `xmlrpc.server`, `wsgiref`,
    `logging.config`).  Modules of the standard library that were imported before and stand on
    ``socketserver`` are forgotten, and built on portico when they are imported next.  Any other
    module that holds on to the standard library's servers keeps them, with a warning that names
    it.  To be called before other threads import anything.

    Args:
        engine: What runs the requests of servers made with ``ThreadingMixIn``: a key of
            `portico.engines.ENGINES`.
        hubs: Hubs at most for each of them, on the engine that has hubs; a program that sets
            ``max_hubs`` itself has its way.

    Raises:
        SettingError: There is no such engine, or it has no hubs, or not so many; or portico is in
            place with another engine or number.
    """
    for finder in sys.meta_path:
        if isinstance(finder, _Importer):
            if finder.engine != engine:
                expected = f"{finder.engine!r}, which is in place already"
                raise SettingError("engine", engine, expected)
            if finder.hubs != hubs:
                expected = f"{finder.hubs!r}, which is in place already"
                raise SettingError("hubs", hubs, expected)
            return
    sys.meta_path.insert(0, _Importer(engine, hubs))
    displaced = sys.modules.pop(REPLACED, None)
    importlib.import_module(REPLACED)
    if displaced is not None:
        _forget_users(displaced)


def _forget_users(displaced: types.ModuleType) -> None:
    """Forget the standard modules that stand on `displaced`; warn of the others."""
    servers = {kind for kind in vars(displaced).values() if _is_made_by(kind, displaced)}
    users = dict(_modules_that_hold((displaced,), servers))
    forgotten = {
        name: users[name] for name in users if name.partition(".")[0] in sys.stdlib_module_names
    }
    for name, module in forgotten.items():
        del sys.modules[name]
        package, _, submodule = name.rpartition(".")
        if getattr(sys.modules.get(package), submodule, None) is module:
            delattr(sys.modules[package], submodule)
    kept = dict(_modules_that_hold((displaced, *forgotten.values()), servers))
    if kept:
        warnings.warn(
            f"still on the standard library's {REPLACED}, because imported before portico took"
            f" its place: {', '.join(sorted(kept))}",
            RuntimeWarning,
            stacklevel=3,
        )


def _is_made_by(value: object, module: types.ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _modules_that_hold(
    modules: Iterable[types.ModuleType], servers: set[type]
) -> Iterator[tuple[str, types.ModuleType]]:
    """Yield the imported modules with a global that is, or derives from, one of these."""
    wanted = {id(module) for module in modules}
    imported: dict[str, Any] = dict(sys.modules)  # programs put other things there, too
    for name, module in imported.items():
        if not issubclass(type(module), types.ModuleType):
            continue
        # Not vars(), which would load a module that importlib.util.LazyLoader put off.
        for value in tuple(object.__getattribute__(module, "__dict__").values()):
            # type(), because the isinstance() of a lazy proxy would load what it stands for.
            is_class = issubclass(type(value), type)
            if id(value) in wanted or (is_class and not servers.isdisjoint(value.__mro__)):
                yield name, module
                break


# --------------------------------------------------------------------------------- the program


def run_module(name: str, args: Sequence[str] = ()) -> None:
    """Run a module, or a package's ``__main__``, as ``python -m NAME ARGS...`` does.

    ``sys.argv``, ``sys.path[0]`` (the current directory) and ``__main__`` become the program's
    and stay so.  What the program raises passes through, `SystemExit` included.

    Args:
        name: A dotted name.
        args: What follows the name on the command line.

    Raises:
        ProgramError: There is no such module, or no code in it.
    """
    sys.argv[:] = ["-m", *args]  # what python has there while it looks for the module
    _set_first_path(str(Path.cwd()))
    spec = _find_program(name)
    sys.argv[0] = spec.origin or name
    _run_spec(spec)


def run_path(path: str | os.PathLike[str], args: Sequence[str] = ()) -> None:
    """Run a program as ``python PATH ARGS...`` does.

    ``sys.argv``, ``sys.path[0]`` and ``__main__`` become the program's and stay so.  What the
    program raises passes through, `SystemExit` included.

    Args:
        path: A file of Python source or bytecode, or a directory or zip file with a
            ``__main__`` in it.
        args: What follows the path on the command line.

    Raises:
        ProgramError: There is no such file, it cannot be read, or has no ``__main__``.
    """
    program = os.fspath(path)
    sys.argv[:] = [program, *args]
    if pkgutil.get_importer(program) is not None:
        _run_archive(program)
        return
    _set_first_path(str(Path(program).resolve().parent))
    main = types.ModuleType("__main__")
    main.__file__ = str(Path(program).absolute())
    if sys.version_info < (3, 15):
        vars(main)["__cached__"] = None
    try:
        main.__loader__, code = _load_file(main.__file__)
    except OSError as error:
        raise ProgramError(program, error.strerror or str(error)) from error
    _become_main(main, code)


def _run_archive(program: str) -> None:
    """Run the ``__main__`` of a directory or a zip file, which is on the path then."""
    absolute = str(Path(program).absolute())
    spec = PathFinder.find_spec("__main__", [absolute])
    if spec is None:
        raise ProgramError(program, "there is no __main__ module in it")
    if sys.flags.safe_path:  # there is no directory of ours in front, but the archive has to be
        sys.path.insert(0, absolute)
    _set_first_path(absolute)
    _run_spec(spec)


def _load_file(path: str) -> tuple[SourceFileLoader | SourcelessFileLoader, types.CodeType]:
    """Compile a file of source, or load one of bytecode; neither leaves a cache behind."""
    if path.endswith(tuple(BYTECODE_SUFFIXES)):
        sourceless = SourcelessFileLoader("__main__", path)
        code = sourceless.get_code("__main__")
        assert code is not None  # this loader raises instead
        return sourceless, code
    with io.open_code(path) as file:
        source = file.read()
    return SourceFileLoader("__main__", path), compile(source, path, "exec", dont_inherit=True)


def _find_program(name: str) -> ModuleSpec:
    """Return the spec of a module, or of the ``__main__`` of a package."""
    if not name or name.startswith(".") or name == "__main__":
        raise ProgramError(name, "it is not the name of a module")
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the program is there, and imports something that is not
        raise ProgramError(name, f"no module named {error.name!r}") from error
    except ValueError as error:  # imported already, without a spec
        raise ProgramError(name, str(error)) from error
    if spec is None:
        raise ProgramError(name, f"no module named {name!r}")
    if spec.submodule_search_locations is None:
        return spec
    if name.endswith(".__main__"):
        raise ProgramError(name, "a package cannot be a program's __main__ module")
    try:
        return _find_program(f"{name}.__main__")
    except ProgramError as error:
        raise ProgramError(name, "it is a package without a __main__ module") from error


def _run_spec(spec: ModuleSpec) -> None:
    """Run the code that a spec finds, as the main program."""
    loader: Any = spec.loader  # None for a namespace package; few loaders have a get_code
    code = loader.get_code(spec.name) if hasattr(loader, "get_code") else None
    if code is None:
        raise ProgramError(spec.name, "there is no Python code in it")
    _become_main(importlib.util.module_from_spec(spec), code)


def _set_first_path(directory: str) -> None:
    """Put the program's directory where ours was, unless python was told to have none."""
    if not sys.flags.safe_path:
        sys.path[:1] = [directory]


def _become_main(main: types.ModuleType, code: types.CodeType) -> None:
    """Run `code` in `main`, as the ``__main__`` of the process.

    It stays there when the code has ended: threads go on, and pickle by that name.
    """
    main.__name__ = "__main__"
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    exec(code, vars(main))  # noqa: S102  # running the program is the purpose


def tell_stalls() -> Callable[[], None]:
    """Say on standard error where a handler of the program holds up all others, each place once.

    Such a program knows nothing of our events, and may not have configured a log.

    Returns:
        A function that ends it.
    """
    told: set[str] = set()

    def tell(event: HandlerStalled) -> None:
        if event.place in told:
            return
        told.add(event.place)
        place = event.place or "a place outside of the program's own files"
        say(f"{event.handler} has held up its neighbours for {event.duration:.1f} s at {place}")

    return subscribe(tell, HandlerStalled)


# ------------------------------------------------------------------------------ from the shell

USAGE: Final = (
    "usage: python -m portico.swap [--engine NAME] (-m MODULE | PROGRAM) [ARGUMENT...]\n"
    f"engines: {', '.join(ENGINES)}\n"
)


def main(arguments: Sequence[str]) -> None:
    """Run what the arguments name.

    Raises:
        SystemExit: With status 2 when they name nothing that can be run; whatever the program
            exits with.
    """
    words = list(arguments)
    engine = "threads"
    if words[:1] == ["--engine"]:
        engine, words = "".join(words[1:2]), words[2:]
    is_module = words[:1] == ["-m"]
    if is_module:
        del words[0]
    if not words or (words[0].startswith("-") and not is_module):
        _refuse(USAGE)
    run = run_module if is_module else run_path
    try:
        install(engine)
        tell_stalls()
        run(words[0], words[1:])
    except (ProgramError, SettingError) as error:
        _refuse(f"portico.swap: {error}\n")


def _refuse(reason: str) -> NoReturn:
    sys.stderr.write(reason)
    raise SystemExit(2)


if __name__ == "__main__":
    # The module of this name, not the copy of it that is running: install() leaves a class there.
    importlib.import_module("portico.swap").main(sys.argv[1:])
