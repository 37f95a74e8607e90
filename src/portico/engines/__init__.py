"""Decide where a request runs.

The contract.  An engine is a mix-in that owns the hook `process_request`: it is called in the
acceptor, hands the request to a worker and returns.  The worker calls `serve` (below), which
runs the request to its end and closes it.  An engine

- extends `server_activate`, `server_close`, `service_actions` and `handle_timeout` through
  ``super()``, and uses nothing else of the server than documented hooks, so that it works in
  front of servers that are not ours (``class Web(ThreadingMixIn, http.server.HTTPServer)``);
- gives each request a context (`contextvars`) of its own: a copy of the acceptor's, so that a
  handler sees what the caller of `serve_forever` has set, and nobody sees what the handler sets;
- keeps its settings as class attributes;
- may ask a server of ours to leave clients in the backlog while it is full
  (`BaseServer.pause_accepting`).

Modules of this folder replace each other; none imports another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from portico.connection import ClientAddress, Request
from portico.errors import SettingError

_Hook = TypeVar("_Hook")

LEFT_OUT: Final = "left_out_of_batches"
"""The attribute that marks a hook."""

ENGINES: Final[Mapping[str, str | None]] = {
    "threads": "portico.engines.threads:ThreadingMixIn",
    "forks": "portico.engines.forks:ForkingMixIn",
    "pool": "portico.engines.pool:ThreadPoolMixIn",
    "green": "portico.engines.green:GreenMixIn",
    "serial": None,
}
"""The engines by name, and where the mix-in of each is (`pkgutil.resolve_name`), so that it is
imported when it is asked for.  The serial engine is a server without a mix-in."""

HUBS_OF: Final = "green"
"""The engine that has hubs."""

WORKERS_OF: Final = "pool"
"""The engine whose threads are bounded."""


if TYPE_CHECKING:

    class Hooks:
        """What an engine extends or calls of the server that it stands in front of.

        At run time a mix-in stands on nothing, and for the type checker on nothing with a
        constructor, so that the constructor is that of the server, ours or not.
        """

        def server_activate(self) -> None: ...  # noqa: D102
        def handle_timeout(self) -> None: ...  # noqa: D102
        def service_actions(self) -> None: ...  # noqa: D102
        def server_close(self) -> None: ...  # noqa: D102
        def close_request(self, request: Request) -> None: ...  # noqa: D102
        def pause_accepting(  # noqa: D102
            self, seconds: float | None = None, *, until: Collection[int] = ()
        ) -> None: ...
        def resume_accepting(self) -> None: ...  # noqa: D102
        def _await_place(self, until: tuple[int, ...], seconds: float | None) -> None: ...
else:
    Hooks = object


def settings(
    engine: str, *, hubs: int | None = None, max_workers: int | None = None
) -> dict[str, object]:
    """Return the class attributes that set up an engine.

    Args:
        engine: A key of `ENGINES`.
        hubs: ``max_hubs`` of the green engine; ``None`` leaves it at its default.
        max_workers: That of the pool engine; ``None`` leaves it at its default.

    Raises:
        SettingError: There is no room for that number, or the engine has nothing of the kind.
    """
    attributes: dict[str, object] = {}
    for name, number, owner, attribute in (
        ("hubs", hubs, HUBS_OF, "max_hubs"),
        ("max_workers", max_workers, WORKERS_OF, "max_workers"),
    ):
        if number is None:
            continue
        value: Any = number  # a program may say anything
        if engine != owner:
            what = name.removeprefix("max_")
            raise SettingError(name, value, f"engine={owner!r} with it; {engine!r} has no {what}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(name, value, "1 or more")
        attributes[attribute] = value
    return attributes


def left_out_of_batches(hook: _Hook) -> _Hook:
    """Mark a hook of this library that an engine may leave out while it takes a batch of requests.

    An engine that does so does itself what such a `get_request` does beside accepting, and calls
    such a `service_actions` each `poll_interval`, and not after each request.
    """
    vars(hook)[LEFT_OUT] = True
    return hook


def may_be_left_out(hook: object) -> bool:
    """Say whether a hook is marked by `left_out_of_batches`."""
    return getattr(hook, LEFT_OUT, False) is True


def serve(server: Any, request: Request, client_address: ClientAddress) -> bool:
    """Run one request to its end in the calling worker, on a server of ours or of another.

    Returns:
        Whether the handler finished.

    Raises:
        BaseException: What `handle_error` raised, and what is no `Exception`.
    """
    serve_request = getattr(server, "serve_request", None)
    if serve_request is not None:
        return bool(serve_request(request, client_address))
    return serve_foreign(server, request, client_address)


def serve_foreign(server: Any, request: Request, client_address: ClientAddress) -> bool:
    """Do the same on a server that has only the hooks of `socketserver`."""
    try:
        server.finish_request(request, client_address)
    except Exception:
        server.handle_error(request, client_address)
        return False
    else:
        return True
    finally:
        server.shutdown_request(request)
