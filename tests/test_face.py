"""The face of portico has every name, member, default and signature of `socketserver`.

What is compared is generated from the module of the interpreter that runs the tests.
"""

from __future__ import annotations

import inspect
import io
import socket
import socketserver
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import portico

NAMES = sorted(name for name in vars(socketserver) if not name.startswith("__"))
"""All that the standard library's module has, private names and imports included."""

CLASSES = sorted(
    name
    for name, value in vars(socketserver).items()
    if isinstance(value, type) and value.__module__ == "socketserver"
)
"""The classes that it defines, private ones included."""

NEWER = {"request_queue_size": socket.SOMAXCONN}
"""The default that is that of Python 3.15 on every version: before, it was 5."""

SINCE_3_12 = ("ForkingUnixDatagramServer", "ForkingUnixStreamServer")
"""What portico has on every version, and the standard library only since this one."""


def members(name: str) -> Iterator[str]:
    """Yield the members that a class of the standard library has of its own."""
    special = {"__init__", "__enter__", "__exit__"}
    for member in vars(getattr(socketserver, name)):
        if not member.startswith(("__", "_abc_")) or member in special:
            yield member


MEMBERS = [(name, member) for name in CLASSES for member in members(name)]
DATA = [
    (name, member)
    for name, member in MEMBERS
    if not callable(getattr(getattr(socketserver, name), member))
]
METHODS = [pair for pair in MEMBERS if pair not in DATA]
VOCABULARY = sorted({member for _, member in MEMBERS})


def test_the_comparison_has_something_to_compare() -> None:
    assert len(NAMES) > 25
    assert len(CLASSES) > 18
    assert len(DATA) > 20
    assert len(METHODS) > 50


# ---------------------------------------------------------------------------------------- the names


def test_the_public_names_of_portico_are_these() -> None:
    assert sorted(portico.__all__) == sorted(
        [
            # of socketserver
            "BaseRequestHandler",
            "BaseServer",
            "DatagramRequestHandler",
            "ForkingMixIn",
            "ForkingTCPServer",
            "ForkingUDPServer",
            "ForkingUnixDatagramServer",
            "ForkingUnixStreamServer",
            "StreamRequestHandler",
            "TCPServer",
            "ThreadingMixIn",
            "ThreadingTCPServer",
            "ThreadingUDPServer",
            "ThreadingUnixDatagramServer",
            "ThreadingUnixStreamServer",
            "UDPServer",
            "UnixDatagramServer",
            "UnixStreamServer",
            # our own
            "AddressError",
            "AsyncDatagramRequestHandler",
            "AsyncStreamRequestHandler",
            "CertificateError",
            "Certificates",
            "CoroutineError",
            "DrainReport",
            "GreenMixIn",
            "GreenTCPServer",
            "GreenUDPServer",
            "GreenUnixDatagramServer",
            "GreenUnixStreamServer",
            "ListenerError",
            "Phase",
            "PhaseError",
            "PorticoError",
            "PreambleError",
            "ProxyHeaderError",
            "SettingError",
            "ThreadPoolMixIn",
            "ThreadPoolTCPServer",
            "ThreadPoolUDPServer",
            "ThreadPoolUnixDatagramServer",
            "ThreadPoolUnixStreamServer",
            "await_",
            "events",
            "logs",
            "serve",
            "server_context",
            "sleep",
            "spawn",
            "timeout",
            "to_thread",
        ]
    )


@pytest.mark.parametrize("name", portico.__all__)
def test_a_public_name_of_portico_is_there_and_documented(name: str) -> None:
    assert inspect.getdoc(getattr(portico, name))


@pytest.mark.parametrize("name", sorted({*socketserver.__all__, *SINCE_3_12}))
def test_a_public_name_is_public_here(name: str) -> None:
    assert name in portico.__all__


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_module_is_here(name: str) -> None:
    standard = getattr(socketserver, name)
    ours: Any = getattr(portico, name)
    if isinstance(standard, type) and standard.__module__ == "socketserver":
        assert ours.__name__ == standard.__name__
        assert ours.__module__.startswith("portico.")
    else:  # a module, or something of another one, such as `time` and `_ServerSelector`
        assert ours is standard


def test_what_came_with_3_12_is_here() -> None:
    for name in SINCE_3_12:
        assert inspect.isclass(getattr(portico, name))
        assert (name in socketserver.__all__) == (sys.version_info >= (3, 12))


# -------------------------------------------------------------------------------------- the classes


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_derives_from_the_same_classes(name: str) -> None:
    def line(module: Any) -> list[str]:
        kinds = getattr(module, name).__mro__
        return [kind.__name__ for kind in kinds if vars(module).get(kind.__name__) is kind]

    assert line(portico) == line(socketserver)


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith("_")])
def test_a_class_has_a_member_where_the_standard_library_has_it(name: str) -> None:
    """And nowhere else: programs ask a server for what it can do with `hasattr`."""
    standard, ours = getattr(socketserver, name), getattr(portico, name)
    assert {member: hasattr(ours, member) for member in VOCABULARY} == {
        member: hasattr(standard, member) for member in VOCABULARY
    }


@pytest.mark.parametrize(("name", "member"), DATA)
def test_a_default_is_the_same(name: str, member: str) -> None:
    standard = getattr(getattr(socketserver, name), member)
    ours = getattr(getattr(portico, name), member)
    if member in NEWER:
        assert ours == NEWER[member]
        assert standard == (NEWER[member] if sys.version_info >= (3, 15) else 5)
    elif type(standard).__module__ == "socketserver":
        assert type(ours).__name__ == type(standard).__name__
    else:
        assert ours == standard
        assert type(ours) is type(standard)


def parameters(name: str, member: str, module: Any) -> list[tuple[str, Any, Any]]:
    signature = inspect.signature(getattr(getattr(module, name), member))
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


@pytest.mark.parametrize(("name", "member"), METHODS)
def test_a_method_takes_the_same_arguments(name: str, member: str) -> None:
    if member == "__exit__":  # the language calls it, with three positions
        inspect.signature(getattr(portico, name).__exit__).bind(None, None, None, None)
    else:
        assert parameters(name, member, portico) == parameters(name, member, socketserver)


@pytest.mark.parametrize(("name", "member"), METHODS)
def test_a_method_is_of_the_same_kind(name: str, member: str) -> None:
    standard = inspect.getattr_static(getattr(socketserver, name), member)
    ours = inspect.getattr_static(getattr(portico, name), member)
    assert type(ours) is type(standard)


@pytest.mark.parametrize(
    ("name", "member"),
    [
        pytest.param(name, member, id=f"{name}.{member}")
        for name, member in METHODS
        if not name.startswith("_") and not member.startswith("_")
    ],
)
def test_a_public_method_is_documented(name: str, member: str) -> None:
    method = inspect.getattr_static(getattr(portico, name), member)
    assert inspect.cleandoc(method.__doc__ or "")


# ------------------------------------------------------------------------------------ the instances


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("Server")])
def test_a_server_has_the_same_attributes(name: str) -> None:
    def attributes(module: Any) -> dict[str, type]:
        kind = getattr(module, name)
        arguments = ("nowhere", None) if name == "BaseServer" else ("nowhere", None, False)
        with kind(*arguments) as server:
            return {key: type(value) for key, value in vars(server).items()}

    standard, ours = attributes(socketserver), attributes(portico)
    assert standard.keys() <= ours.keys()
    for key, kind in standard.items():
        assert issubclass(ours[key], kind)


class FakeConnection:
    """Enough of a socket for every handler."""

    def makefile(self, mode: str, bufsize: int) -> io.BytesIO:
        return io.BytesIO()

    def sendto(self, data: bytes, address: object) -> None:
        """Go nowhere."""


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("Handler")])
def test_a_handler_has_the_same_attributes(name: str) -> None:
    def attributes(module: Any) -> dict[str, str]:
        connection = FakeConnection()
        request = (b"packet", connection) if name.startswith("Datagram") else connection
        handler = getattr(module, name)(request, "somebody", "a server")
        return {key: type(value).__name__ for key, value in vars(handler).items()}

    assert attributes(portico) == attributes(socketserver)
