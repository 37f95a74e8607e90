"""Run the hooks of one request in their order, from its admission to its end.

Owns the one place where the life of a request is closed (`RequestPath.serve_request`), and what is
told of it.  Leaves accepting, and when to, to `portico.server`; the kind of socket to the families
(`portico.families`) and where a request runs to the engines (`portico.engines`).

The path of one request::

    get_request -> admit_request -> verify_request -> process_request        the acceptor
        -> prepare_request -> finish_request -> (handle_error) -> shutdown_request   a worker

Source: the documentation of `socketserver` for the names and their order; its observed
behaviour for the rest.
"""

from __future__ import annotations

import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextvars import copy_context
from time import monotonic as time
from typing import Any, Final

from portico.connection import ClientAddress, Connection, Request, is_peer_gone
from portico.console import show
from portico.errors import PreambleError
from portico.events import (
    CloseReason,
    ConnectionClosed,
    ConnectionRefused,
    Deadline,
    DeadlineExpired,
    HandlerFailed,
    PeerGone,
    PreambleFailed,
    RefusalReason,
    emit,
)
from portico.guard import Guard
from portico.waits import thread_activity, thread_waits_in_read

_fileno: Final = socket.socket.fileno  # also when a program's test puts something else there


class RequestPath:
    """The hooks that every request passes, and what becomes of it at its end.

    A part of `BaseServer`, which accepts what is served here.
    """

    RequestHandlerClass: Callable[[Any, Any, Any], Any]
    """What is called with ``(request, client_address, server)`` for every request."""

    farewell: bytes = b""
    """What a client is sent that is refused because there is no place.  Not over TLS."""

    _guard = Guard(None)  # stands in before __init__ ran, or when a subclass never calls it

    def admit_request(self, request: Request, client_address: ClientAddress) -> bool:
        """Say whether the server has room for this peer.

        Applies the limits and networks of the settings.  Runs in the acceptor, before
        `verify_request`, and makes no system call that waits.
        """
        refusal = self._guard.admit(request, client_address)
        if refusal is not None:
            self._guard.refusals[id(request)] = refusal
        return refusal is None

    def verify_request(self, request: Request, client_address: ClientAddress) -> bool:
        """Say whether the program wants this request; for subclasses.

        Runs in the acceptor: while it waits for something, nobody else is accepted.
        """
        return True

    def process_request(self, request: Request, client_address: ClientAddress) -> None:
        """Serve the request, here and now; an engine's mix-in hands it to a worker instead.

        It has a copy of the context variables, as in every engine.
        """
        outer = inline.serving  # of a handler that serves another server
        inline.serving = serving = [request, request, client_address]
        try:
            copy_context().run(self.serve_request, request, client_address)
        except BaseException:
            if serving[1] is not request:
                inline.prepared = serving
            raise
        finally:
            inline.serving = outer

    def serve_request(self, request: Request, client_address: ClientAddress) -> bool:
        """Run one request to its end and close it; what a worker calls.

        Callable from any thread.  An `Exception` of the handler goes to `handle_error`;
        `SystemExit`, `KeyboardInterrupt` and the like pass through, and so does what
        `handle_error` raises.  In each case the request is closed first.

        In the serial engine the worker is the acceptor.  There, programs expect to see in
        `process_request` what the handler raised, so it passes through, and the step that
        called `process_request` does the rest.

        Returns:
            Whether the handler finished.
        """
        started = time() if ConnectionClosed.subscribers else None
        here = inline.serving
        if here is not None and here[0] is request:
            request, client_address = self._prepare(request, client_address)
            here[1:] = request, client_address
            if self._guard.verifies_late and not self._verify(request, client_address):
                return False
            self.finish_request(request, client_address)
        else:
            try:
                request, client_address = self._prepare(request, client_address)
                if self._guard.verifies_late and not self._verify(request, client_address):
                    return False
                self.finish_request(request, client_address)
            except Exception as error:
                self._fail(request, client_address, error, started)
                return False
            except BaseException as error:
                self._fail(request, client_address, error, started)
                raise
        if started is None and self._guard.counter is None:  # nobody wants to know
            self._end(request)
        else:
            self._finish(request, client_address, started)
        return True

    def prepare_request(
        self, request: Request, client_address: ClientAddress
    ) -> tuple[Request, ClientAddress]:
        """Do what has to be done with the peer before the handler sees it; in the worker.

        Returns:
            The request and the client address that the handler gets.
        """
        return request, client_address

    def finish_request(self, request: Request, client_address: ClientAddress) -> None:
        """Make the handler, which does all its work in its constructor."""
        self.RequestHandlerClass(request, client_address, self)

    def shutdown_request(self, request: Request) -> None:
        """Tell the peer that no more is coming, and close the request."""
        self.close_request(request)

    def close_request(self, request: Request) -> None:
        """Close the request."""

    def handle_error(self, request: Request, client_address: ClientAddress) -> None:
        """Report what a handler raised; called while it is being handled.

        Prints the client's address and the traceback to standard error, unless all that
        happened is that the peer of this very request went away.  If nobody takes it there, it
        is dropped after a moment instead of waited for, and that is told later.  What an override
        raises ends the loop (in the serial engine) or the worker.
        """
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and is_peer_gone(request, error):
            return
        line = "-" * 40
        told = f"Exception occurred during processing of request from {client_address}"
        # The `sys` of this module, in whose place a program may have put another.
        show(f"{line}\n{told}\n{traceback.format_exc()}{line}\n", sys.stderr)

    # --- how a request ends ---------------------------------------------------------------

    def _refuse(
        self, request: Request, client_address: ClientAddress, reason: RefusalReason
    ) -> None:
        if reason is RefusalReason.TOO_MANY and self.farewell and self._speaks_plainly(request):
            say_farewell(request, self.farewell)
        self._end(request)
        if self._guard.counter is not None:
            self._guard.counter.note_refused(reason)
        if ConnectionRefused.subscribers:
            emit(ConnectionRefused(self, client_address, reason))

    def _speaks_plainly(self, request: Request) -> bool:
        """Say whether a client reads words as they are, and not as those of another protocol."""
        return not hasattr(request, "unwrap")  # as a socket of ssl has it

    def _finish(
        self, request: Request, client_address: ClientAddress, started: float | None
    ) -> None:
        """End a request whose handler has returned, and tell how."""
        connection = self._end(request)
        reason = CloseReason.FINISHED
        if connection is not None and connection.was_cut:
            reason = _reason_of_cut(connection)
        self._tell_closed(client_address, reason, started)

    def _fail(
        self,
        request: Request,
        client_address: ClientAddress,
        error: BaseException,
        started: float | None,
    ) -> None:
        """End a request whose serving raised `error`, which is being handled."""
        reason = CloseReason.INTERRUPTED
        connection = self._guard.connections.get(request)
        try:
            if isinstance(error, PreambleError):
                reason = CloseReason.NO_PREAMBLE
                client_address = self._tell_preamble(client_address, connection, error)
            elif connection is not None and connection.was_cut and isinstance(error, OSError):
                reason = _reason_of_cut(connection)  # no fault of the handler, and no news
            elif isinstance(error, Exception):
                reason = self._tell_failure(request, client_address, error)
                self.handle_error(request, client_address)
        finally:
            self._end(request)
            self._tell_closed(client_address, reason, started)

    def _end(self, request: Request) -> Connection | None:
        """Shut a request down, and give its place back; the only way in which one ends."""
        guard = self._guard
        by_request, key = guard.connections.by_request, id(request)
        connection = by_request.get(key)
        try:
            self.shutdown_request(request)
        finally:
            # The family has done so when it closed the connection, unless a program keeps that
            # from happening, to go on with the connection elsewhere.
            if key in by_request and guard.note_closing(request) is not None:
                assert connection is not None, "it was there before"
                guard.note_closed(connection)
        return connection

    def _prepare(
        self, request: Request, client_address: ClientAddress
    ) -> tuple[Request, ClientAddress]:
        """Have a request prepared, and know it under what it has become."""
        connection = self._guard.connections.by_request.get(id(request))
        if connection is not None:
            connection.thread = threading.get_native_id()
            connection.descriptor = _fileno(request)
        prepared = self.prepare_request(request, client_address)
        if prepared[0] is not request:
            self._exchange_request(request, prepared[0])
        return prepared

    def _exchange_request(self, before: Request, request: Request) -> None:
        """Note that a connection has another socket object from now on."""
        self._guard.connections.exchange(before, request)

    def _verify(self, request: Request, client_address: ClientAddress) -> bool:
        """Ask the program about a peer that was not known before its preamble."""
        refusal = self._guard.admit_peer(request, client_address)
        if refusal is None and not self.verify_request(request, client_address):
            refusal = RefusalReason.NOT_VERIFIED
        if refusal is not None:
            self._refuse(request, client_address, refusal)
        return refusal is None

    def _tell_failure(
        self, request: Request, client_address: ClientAddress, error: Exception
    ) -> CloseReason:
        """Tell the events that a request failed, and return why it will be closed."""
        if is_peer_gone(request, error):
            if PeerGone.subscribers:
                emit(PeerGone(self, client_address, error))
            return CloseReason.PEER_GONE
        if HandlerFailed.subscribers:
            emit(HandlerFailed(self, client_address, error))
        return CloseReason.FAILED

    def _tell_preamble(
        self, client_address: ClientAddress, connection: Connection | None, error: PreambleError
    ) -> ClientAddress:
        """Tell the events that a peer did not get as far as its handler.

        Returns:
            Who that was, as far as is known: a proxy may have said so before.
        """
        if connection is not None:
            client_address = connection.speaker
        if not error.is_late:
            if PreambleFailed.subscribers:
                emit(PreambleFailed(self, client_address, error.stage, error.reason))
        elif DeadlineExpired.subscribers:
            since = time() if connection is None else connection.accepted
            emit(DeadlineExpired(self, client_address, Deadline.HANDSHAKE, time() - since))
        return client_address

    def _tell_closed(
        self, client_address: ClientAddress, reason: CloseReason, started: float | None
    ) -> None:
        """Tell that a request has ended.

        Args:
            client_address: Whose.
            reason: Why.
            started: When its serving began; ``None`` if nobody listened to that event then.
        """
        if self._guard.counter is not None:
            self._guard.counter.note_closed(reason)
        if started is not None:
            emit(ConnectionClosed(self, client_address, reason, time() - started))

    # --- what the engine knows of it ------------------------------------------------------

    def _waits_to_read(self, connection: Connection) -> bool | None:
        """Say whether the handler of a connection waits for bytes of it; an engine may know better.

        Here, whether the thread does that serves it; ``None`` if nobody knows.
        """
        if connection.thread is None:
            return None
        try:
            descriptor = connection.request.fileno()
        except (AttributeError, OSError, ValueError):  # gone, or of a program's own kind
            return None
        if descriptor < 0 and connection.descriptor is not None:  # another object has it
            descriptor = connection.descriptor
        return thread_waits_in_read(connection.thread, descriptor)

    def _activity(self, connection: Connection) -> int | None:
        """Return a number that grows when the handler of a connection goes on after a wait.

        For sockets of which the kernel does not tell when bytes move.  ``None`` if nobody knows;
        an engine may know better.
        """
        return None if connection.thread is None else thread_activity(connection.thread)

    def _request_here(self) -> Request | None:
        """Return the request that the calling thread serves, as far as the engine knows."""
        thread = threading.get_native_id()
        for connection in self._guard.connections:
            if connection.thread == thread:
                return connection.request
        return None


def _reason_of_cut(connection: Connection) -> CloseReason:
    """Return why a connection ended that was shut down under its handler."""
    return CloseReason.CUT if connection.deadline is None else CloseReason.DEADLINE


def say_farewell(request: Request, farewell: bytes) -> None:
    """Send a few last words to a client, without waiting for it.

    What it has said already is read: closing a connection with unread bytes resets it, and then the
    words may be lost.
    """
    try:
        if isinstance(request, socket.socket):  # that has a timeout waits in spite of the flag
            request.settimeout(0)
        request.send(farewell, socket.MSG_DONTWAIT)
        request.recv(65536, socket.MSG_DONTWAIT)
    except (OSError, AttributeError, TypeError):  # gone, or no connection
        pass


class Inline(threading.local):
    """What the serial engine serves in this thread.

    A list each: the request as `process_request` was given it, the request as the handler sees
    it, and its client address.
    """

    serving: list[Any] | None = None
    """The request under way."""

    prepared: list[Any] | None = None
    """A request that failed after `prepare_request` had made another one of it: on its way
    through `process_request` to the step, which closes it."""

    def leave(
        self, request: Request, client_address: ClientAddress
    ) -> tuple[Request, ClientAddress]:
        """Return a request that failed, if it was served here, as the handler saw it."""
        prepared, self.prepared = self.prepared, None
        if prepared is None or prepared[0] is not request:
            return request, client_address
        return prepared[1], prepared[2]


inline: Final = Inline()
