"""Write what happens in a server to a logger.

Owns the words and the level of each event.  The payload of a request is never logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from portico import events
from portico.events import Event

LINES: Final[dict[type[Event], tuple[int, str]]] = {
    events.ServerStarted: (logging.INFO, "{server} started"),
    events.ServerStopped: (logging.INFO, "{server} stopped"),
    events.ListenerBound: (logging.INFO, "{server} bound to {address!r}"),
    events.ListenerLost: (logging.WARNING, "{server} stops: its listener was closed"),
    events.ConnectionAccepted: (logging.DEBUG, "accepted {peer!r}"),
    events.ConnectionRefused: (logging.INFO, "refused {peer!r}: {reason}"),
    events.RequestStarted: (logging.DEBUG, "serves {peer!r} after {queued:.3f} s in the queue"),
    events.ConnectionClosed: (logging.DEBUG, "closed {peer!r} after {duration:.3f} s: {reason}"),
    events.HandlerFailed: (logging.ERROR, "handler of {peer!r} failed: {error!r}"),
    events.HandlerStalled: (
        logging.WARNING,
        "{handler} of {peer!r} has held its hub for {duration:.1f} s at {place}",
    ),
    events.PeerGone: (logging.DEBUG, "{peer!r} went away: {error!r}"),
    events.DeadlineExpired: (logging.INFO, "shut {peer!r} down after {duration:.1f} s: {deadline}"),
    events.PreambleFailed: (logging.INFO, "no {stage} from {peer!r}: {reason}"),
    events.DrainStarted: (logging.INFO, "{server} drains: {connections} open"),
    events.Drained: (logging.INFO, "{server} {report}"),
    events.AcceptPaused: (logging.WARNING, "{server} pauses accepting: {error}"),
    events.AcceptResumed: (logging.INFO, "{server} accepts again after {duration:.1f} s"),
    events.DatagramCut: (
        logging.WARNING,
        "cut a datagram of {peer!r} to {max_packet_size} bytes (max_packet_size)",
    ),
    events.CertificateLoaded: (logging.INFO, "{certificate} was read again and is in use"),
    events.CertificateRejected: (logging.WARNING, "{error}; the earlier certificate stays"),
}
"""The level of each kind of event, and its line: a format string over the event's attributes.

What every connection causes is told at debug level, so that the usual level costs nothing for
each of them.  What a peer chose (the path of its Unix socket) is quoted, so that it cannot pass
for a line of its own."""


def attach(logger: logging.Logger | None = None) -> Callable[[], None]:
    """Write events to `logger` from now on.

    Only the kinds whose level the logger has enabled at this moment are subscribed to; the
    others stay free of cost.  Callable from any thread.

    Args:
        logger: Where to write; ``None`` for the logger named ``portico``.

    Returns:
        A function that ends it.
    """
    target = logger if logger is not None else logging.getLogger("portico")
    ends = [
        events.subscribe(partial(_write, target, level, line), kind)
        for kind, (level, line) in LINES.items()
        if target.isEnabledFor(level)
    ]

    def detach() -> None:
        for end in ends:
            end()

    return detach


def _write(target: logging.Logger, level: int, line: str, event: Event) -> None:
    # Formatted here, once: the logger would format it with %, which knows no attributes.
    values = {name: _shown(value) for name, value in vars(event).items()}
    target.log(level, "%s", line.format(**values))


def _shown(value: Any) -> Any:
    """Return what stands for `value` in a line."""
    if hasattr(value, "server_address"):
        return f"{type(value).__name__} at {value.server_address!r}"
    return value
