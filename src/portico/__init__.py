"""portico: `socketserver` grown up.

Every name of the standard library's `socketserver` is here and means the same, so
``import portico as socketserver`` is all that a program needs.

A server is an engine in front of a family::

    class EchoServer(ThreadingMixIn, TCPServer): ...

- families (the kind of socket): `TCPServer`, `UDPServer`, `UnixStreamServer`,
  `UnixDatagramServer`; what they share is `BaseServer`;
- engines (where a request runs): none, in the serving thread; `ThreadingMixIn`;
  `ThreadPoolMixIn`; `ForkingMixIn`; `GreenMixIn`, many on one thread; and the combinations,
  from `ThreadingTCPServer` to `GreenUnixDatagramServer`;
- handlers (what a program writes): `BaseRequestHandler`, `StreamRequestHandler`,
  `DatagramRequestHandler`; `AsyncStreamRequestHandler` and `AsyncDatagramRequestHandler` for
  ``async def handle``;
- helpers that mean the same in every engine: `to_thread`, `await_`, `sleep`, `spawn`,
  `timeout`;
- `serve`, which serves a handler at addresses with every protection on, until a signal;
- TLS: `server_context`, and `Certificates`, which notices when its files are exchanged.

What happens in a server can be watched: `portico.events`, `portico.logs`.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
from importlib import import_module
from io import BufferedIOBase
from time import monotonic as time
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from portico import acceptor, events, families, handlers, logs, request, server
from portico.acceptor import _ServerSelector
from portico.combinations import (
    ForkingTCPServer,
    ForkingUDPServer,
    ForkingUnixDatagramServer,
    ForkingUnixStreamServer,
    ThreadingTCPServer,
    ThreadingUDPServer,
    ThreadingUnixDatagramServer,
    ThreadingUnixStreamServer,
    ThreadPoolTCPServer,
    ThreadPoolUDPServer,
    ThreadPoolUnixDatagramServer,
    ThreadPoolUnixStreamServer,
)
from portico.engines import forks, threads
from portico.engines.forks import ForkingMixIn
from portico.engines.pool import ThreadPoolMixIn
from portico.engines.threads import ThreadingMixIn, _NoThreads, _Threads
from portico.errors import (
    AddressError,
    CertificateError,
    CoroutineError,
    ListenerError,
    PhaseError,
    PorticoError,
    PreambleError,
    ProxyHeaderError,
    SettingError,
)
from portico.families import TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from portico.handlers import (
    BaseRequestHandler,
    DatagramRequestHandler,
    StreamRequestHandler,
    _SocketWriter,
)
from portico.lifecycle import DrainReport, Phase
from portico.server import BaseServer

if TYPE_CHECKING:
    from portico.certificates import Certificates, server_context
    from portico.engines.green import GreenMixIn
    from portico.engines.green.bridge import await_, sleep, spawn, timeout, to_thread
    from portico.engines.green.combinations import (
        GreenTCPServer,
        GreenUDPServer,
        GreenUnixDatagramServer,
        GreenUnixStreamServer,
    )
    from portico.engines.green.coroutines import (
        AsyncDatagramRequestHandler,
        AsyncStreamRequestHandler,
    )
    from portico.service import serve

__version__ = "0.1.0"

__all__ = [
    "AddressError",
    "AsyncDatagramRequestHandler",
    "AsyncStreamRequestHandler",
    "BaseRequestHandler",
    "BaseServer",
    "CertificateError",
    "Certificates",
    "CoroutineError",
    "DatagramRequestHandler",
    "DrainReport",
    "ForkingMixIn",
    "ForkingTCPServer",
    "ForkingUDPServer",
    "ForkingUnixDatagramServer",
    "ForkingUnixStreamServer",
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
    "StreamRequestHandler",
    "TCPServer",
    "ThreadPoolMixIn",
    "ThreadPoolTCPServer",
    "ThreadPoolUDPServer",
    "ThreadPoolUnixDatagramServer",
    "ThreadPoolUnixStreamServer",
    "ThreadingMixIn",
    "ThreadingTCPServer",
    "ThreadingUDPServer",
    "ThreadingUnixDatagramServer",
    "ThreadingUnixStreamServer",
    "UDPServer",
    "UnixDatagramServer",
    "UnixStreamServer",
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

_ON_DEMAND: Final = {
    "AsyncDatagramRequestHandler": "engines.green.coroutines",
    "AsyncStreamRequestHandler": "engines.green.coroutines",
    "Certificates": "certificates",
    "GreenMixIn": "engines.green",
    "GreenTCPServer": "engines.green.combinations",
    "GreenUDPServer": "engines.green.combinations",
    "GreenUnixDatagramServer": "engines.green.combinations",
    "GreenUnixStreamServer": "engines.green.combinations",
    "await_": "engines.green.bridge",
    "serve": "service",
    "server_context": "certificates",
    "sleep": "engines.green.bridge",
    "spawn": "engines.green.bridge",
    "timeout": "engines.green.bridge",
    "to_thread": "engines.green.bridge",
}
"""Names that stand on greenlet and asyncio, on ssl, or on all that a service needs, and their
modules: imported when they are asked for, so that whoever needs threads alone pays for none."""

_REPLACEABLE: Final = {
    "BufferedIOBase": BufferedIOBase,
    "_NoThreads": _NoThreads,
    "_ServerSelector": _ServerSelector,
    "_SocketWriter": _SocketWriter,
    "_Threads": _Threads,
    "os": os,
    "selectors": selectors,
    "socket": socket,
    "sys": sys,
    "threading": threading,
    "time": time,
}
"""The names of `socketserver` beyond its interface that programs, and above all their tests,
reach and replace through the module: ``mock.patch("socketserver.threading")``."""


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"portico.{_ON_DEMAND[name]}")
    value = globals()[name] = getattr(module, name)
    return value


class _Face(ModuleType):
    """A module that stands for several: what is replaced in it is replaced where it is used."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _REPLACEABLE:
            for module in (acceptor, families, forks, handlers, request, server, threads):
                if name in vars(module):
                    setattr(module, name, value)


sys.modules[__name__].__class__ = _Face
