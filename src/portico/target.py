"""Find the handler that a command line names: ``module:Handler`` or ``path.py:Handler``.

Owns the import of the target and the words for what can be wrong with it.

Source: "Command line and environment" (what ``python -m NAME`` and ``python PATH`` put first on
``sys.path``).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeAlias

from portico.address import Scheme
from portico.errors import PorticoError
from portico.handlers import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler
from portico.server import BaseServer

Handler: TypeAlias = Callable[[Any, Any, Any], Any]
"""What is called with ``(request, client_address, server)`` for each request."""

EXPECTED: Final = "expected MODULE:HANDLER or PATH.py:HANDLER, such as app:Echo"


class TargetError(PorticoError):
    """A target does not name a handler.

    Attributes:
        target: The text that was given.
        reason: What is wrong with it.
    """

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(f"cannot serve {target!r}: {reason}")
        self.target, self.reason = target, reason


def read(target: str) -> tuple[str, str, bool]:
    """Take the name of a target apart, without a look at what it names.

    Returns:
        The module or path, the attribute, and whether it is a path.

    Raises:
        TargetError: It is no name of one.
    """
    if "://" in target:
        raise TargetError(target, f"it is an address, and the target comes first; {EXPECTED}")
    place, _, attribute = target.rpartition(":")
    is_file = place.endswith(".py") or os.sep in place
    if not place or not attribute or (place.startswith(".") and not is_file):
        raise TargetError(target, EXPECTED)
    return place, attribute, is_file


def load(target: str) -> Handler:
    """Import the module, or run the file, that `target` names, and return its handler.

    A file is imported under its own name, so that what stands under
    ``if __name__ == "__main__"`` does not run; its folder comes first on ``sys.path``, as for
    ``python PATH``.  For a module the current directory does, as for ``python -m NAME``.

    Args:
        target: ``module:attribute`` or ``path.py:attribute``; the attribute may be dotted.

    Raises:
        TargetError: There is no such module or attribute, the module fails, or what was found
            is no handler.
    """
    place, attribute, is_file = read(target)
    module = _import_file(target, Path(place)) if is_file else _import_module(target, place)
    found = _attribute(target, module, attribute)
    _check_handler(target, found)
    return found  # type: ignore[no-any-return]  # checked to be one


def check_scheme(target: str, handler: Handler, scheme: Scheme) -> None:
    """Make sure that a handler for streams does not get datagrams, and the other way round.

    Raises:
        TargetError: It would.
    """
    if scheme.is_inherited:
        return  # its sockets say of what kind they are, once they are there
    is_stream = not scheme.is_datagram
    if is_stream and _is_kind(handler, DatagramRequestHandler):
        fitting = Scheme.UNIX_DATAGRAM if scheme.is_unix else Scheme.UDP
        kind = "datagrams"
    elif not is_stream and _is_kind(handler, StreamRequestHandler):
        fitting = Scheme.UNIX if scheme.is_unix else Scheme.TCP
        kind = "streams"
    else:
        return
    raise TargetError(target, f"it handles {kind}, which come to {fitting}: and not to {scheme}:")


# -------------------------------------------------------------------------- importing a module


def _import_module(target: str, name: str) -> ModuleType:
    _put_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            reason = (
                f"there is no module {error.name!r}, neither in the current directory "
                "nor among what is installed"
            )
            raise TargetError(target, reason) from error
        raise TargetError(target, _failed_import(name, error)) from error
    except (Exception, SystemExit) as error:
        raise TargetError(target, _failed_import(name, error)) from error


def _import_file(target: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(target, f"there is no file {str(path)!r}")
    # A name that is taken, such as that of a standard module, stays with who has it.
    names = path.stem, f"portico target {path.stem}"
    for known in map(sys.modules.get, names):
        if known is not None and _is_of(known, path):
            return known  # services of one file share what it holds, as those of a module do
    name = names[path.stem in sys.modules]
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    if spec is None or spec.loader is None:
        raise TargetError(target, f"{str(path)!r} is not a file of Python; {EXPECTED}")
    _put_first(path.resolve().parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TargetError(target, _failed_import(str(path), error)) from error
    return module


def _is_of(module: ModuleType, path: Path) -> bool:
    """Say whether a module was imported from a file."""
    own = getattr(module, "__file__", None)
    return own is not None and Path(own).resolve() == path.resolve()


def _put_first(directory: Path) -> None:
    """Import from `directory` before all others, unless python was told not to."""
    if not sys.flags.safe_path and sys.path[:1] != [str(directory)]:
        sys.path.insert(0, str(directory))


def _failed_import(name: str, error: BaseException) -> str:
    """Say in one line what a module raised when it was imported, and where."""
    told = " ".join(str(error).split())
    raised = f"{type(error).__name__}: {told}" if told else type(error).__name__
    where = _place_of(error)
    return f"importing {name} failed with {raised}" + (f" at {where}" if where else "")


def _place_of(error: BaseException) -> str | None:
    """Return ``file:line`` of where an error was raised, below the machinery of imports."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ")
        and frame.filename not in {__file__, importlib.__file__}
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


# ---------------------------------------------------------------------------- checking a handler


def _attribute(target: str, module: ModuleType, attribute: str) -> Any:
    """Follow a dotted name from a module."""
    found: Any = module
    path = module.__name__
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise TargetError(target, f"{path} has no {name!r}{_hint(found, name)}") from error
        path = f"{path}.{name}"
    return found


def _hint(owner: Any, name: str) -> str:
    """Name the attributes that may have been meant, or else the handlers of a module."""
    names = [other for other in dir(owner) if not other.startswith("__")]
    meant = get_close_matches(name, names)
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    if not isinstance(owner, ModuleType):
        return ""
    handlers = [
        other
        for other, value in vars(owner).items()
        # What a module imports to derive from is no handler of its own.
        if _is_kind(value, BaseRequestHandler) and value.__module__ == owner.__name__
    ]
    return f"; its handlers are {', '.join(handlers)}" if handlers else ""


def _check_handler(target: str, found: Any) -> None:
    """Make sure that `found` can be called as a handler."""
    if _is_kind(found, BaseServer) or _is_kind(type(found), BaseServer):
        reason = "it is a server; name the handler that it serves, which derives from"
        raise TargetError(target, f"{reason} BaseRequestHandler as a rule")
    if not callable(found):
        expected = "expected a class that derives from BaseRequestHandler, or a function"
        raise TargetError(target, f"it is of type {type(found).__name__}; {expected}")
    if inspect.iscoroutinefunction(found):
        reason = "it is a coroutine function, which nobody would await"
        raise TargetError(target, f"{reason}; expected a class, or a function without async")
    try:
        inspect.signature(found).bind(None, None, None)
    except TypeError as error:
        reason = "it cannot be called with (request, client_address, server)"
        raise TargetError(target, f"{reason}: {error}") from error
    except ValueError:  # what is written in C does not always say how it is called
        pass


def _is_kind(value: Any, kind: type) -> bool:
    """Say whether `value` is a class of this kind, or of the kind's namesake in `socketserver`."""
    if not isinstance(value, type):
        return False
    namesake = getattr(sys.modules.get("socketserver"), kind.__name__, kind)
    return issubclass(value, (kind, namesake))
