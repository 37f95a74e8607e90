"""Import a target, and serve it for a moment, in a process that can be ended whatever it does.

``python -m portico.doctor.probe DESCRIPTOR WORDS`` is told in JSON what to do, and writes lines of
JSON to the descriptor, so that what the target prints does not come in between;
`portico.doctor.trial` starts it, and reads them.

Sources: signal(7) (SIGTERM stops it, as it does a service).
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from portico import privileges, target
from portico.address import Scheme, parse
from portico.descriptors import raise_descriptor_limit
from portico.errors import PorticoError
from portico.events import Event, HandlerFailed, HandlerStalled, subscribe
from portico.service import Assignment, Service
from portico.settings import Settings

MOST_FAILURES: Final = 20
"""Kinds of failures that are told; the rest is more of it."""

Tell = Callable[[dict[str, Any]], None]


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says, and tell what comes of it."""
    descriptor, told = arguments
    words: dict[str, Any] = json.loads(told)
    name, schemes = words["target"], words["schemes"]
    tell = _teller(int(descriptor))
    before = set(threading.enumerate())
    try:
        if "account" in words:  # as a service does: before anything of the target's runs
            uid, gid, groups, asked = words["account"]
            privileges.drop(privileges.Identity(uid, gid, frozenset(groups), asked))
        handler = target.load(name)
        for scheme in schemes:
            target.check_scheme(name, handler, Scheme(scheme))
    except PorticoError as error:
        tell({"problem": str(error)})
        return
    started = [thread.name for thread in threading.enumerate() if thread not in before]
    tell({"threads": started})
    if words["serve"]:
        try:
            _serve(handler, any(Scheme(each).is_datagram for each in schemes), tell)
        except (PorticoError, OSError) as error:
            tell({"problem": str(error)})


def _serve(handler: target.Handler, is_datagram: bool, tell: Tell) -> None:
    """Serve on loopback until SIGTERM, with the engine that knows when a handler blocks."""
    raise_descriptor_limit()
    address = parse("udp://127.0.0.1:0" if is_datagram else "tcp://127.0.0.1:0")
    settings = Settings(engine="green", drain_timeout=0)
    told: set[str] = set()

    def note(event: Event) -> None:
        if isinstance(event, HandlerStalled):
            tell({"place": event.place, "duration": event.duration})
        elif isinstance(event, HandlerFailed):
            kind = type(event.error).__name__
            if kind not in told and len(told) < MOST_FAILURES:
                told.add(kind)
                tell({"failure": kind})

    with Service([Assignment(handler, address, settings)]) as service:
        unsubscribe = subscribe(note, HandlerStalled, HandlerFailed)
        with service.stopped_by_signals():
            tell({"address": str(service.addresses[0])})
            service.run()
        unsubscribe()


def _teller(descriptor: int) -> Tell:
    def tell(words: dict[str, Any]) -> None:
        # In one call, because events come from several threads: a pipe keeps short writes whole.
        os.write(descriptor, json.dumps(words).encode() + b"\n")

    return tell


if __name__ == "__main__":
    main(sys.argv[1:])
    # At once, whatever threads the target has started.
    os._exit(0)
