"""Listeners that somebody else has opened: `portico.listener.adopt`, and what stands around it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

import portico
from portico import address, listener
from portico.address import DescriptorAddress, Scheme
from portico.engines import ENGINES
from portico.errors import ListenerError
from portico.listener import (
    adopt,
    expand,
    open_listener,
    require_inherited,
    resolve,
    scheme_of,
)
from portico.service import Assignment, Service
from portico.settings import Settings
from portico.systemd import PassedSocket
from portico.target import TargetError
from tests.support import PATIENCE, Call

Make = Callable[..., socket.socket]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make sockets as another process would leave them."""
    with ExitStack() as closing_all:

        def made(family: int, kind: int, name: Any = None, listens: bool = True) -> socket.socket:
            each = closing_all.enter_context(socket.socket(family, kind))
            if name is not None:
                each.bind(name)
            if listens and kind == socket.SOCK_STREAM:
                each.listen()
            return each

        yield made


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[PassedSocket]:
    """What systemd passes."""
    sockets: list[PassedSocket] = []
    monkeypatch.setattr(listener, "passed_sockets", lambda: tuple(sockets))
    return sockets


def of(made: socket.socket, scheme: Scheme = Scheme.DESCRIPTOR) -> DescriptorAddress:
    return DescriptorAddress(scheme, made.fileno())


LOOPBACK = ("127.0.0.1", 0)
TLS = Scheme.DESCRIPTOR_TLS


# --- what it is ---------------------------------------------------------------------------------


def test_a_socket_says_itself_what_it_is_for(make: Make, tmp_path: Path) -> None:
    inet, inet6, unix = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    found = {}
    for scheme, family, kind, name in (
        (Scheme.DESCRIPTOR, inet, stream, LOOPBACK),
        (Scheme.DESCRIPTOR, inet6, stream, ("::1", 0)),
        (Scheme.DESCRIPTOR, inet, datagram, LOOPBACK),
        (Scheme.DESCRIPTOR, unix, stream, f"{tmp_path}/a"),
        (Scheme.DESCRIPTOR, unix, datagram, f"{tmp_path}/b"),
        (TLS, inet, stream, LOOPBACK),
    ):
        made = make(family, kind, name)
        with closing(adopt(of(made, scheme))) as adopted:
            assert adopted.place.family == family
            assert adopted.place.name == made.getsockname()
            assert adopted.address == adopted.place.address
            assert scheme_of(of(made, scheme)) == adopted.address.scheme
            found[adopted.address.scheme, family] = str(adopted.address)
    assert [*found] == [
        (Scheme.TCP, inet),
        (Scheme.TCP, inet6),
        (Scheme.UDP, inet),
        (Scheme.UNIX, unix),
        (Scheme.UNIX_DATAGRAM, unix),
        (Scheme.TLS, inet),
    ]
    assert found[Scheme.UNIX, unix] == f"unix:{tmp_path}/a"


@pytest.mark.parametrize("only_ipv6", [True, False])
def test_an_ipv6_socket_says_whether_it_serves_ipv4_too(only_ipv6: bool) -> None:
    with socket.socket(socket.AF_INET6) as made:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
        made.bind(("::", 0))
        made.listen()
        with closing(adopt(of(made))) as adopted:
            assert adopted.place.dual_stack is not only_ipv6
            port = made.getsockname()[1]
            expected = f"tcp://[::]:{port}" if only_ipv6 else f"tcp://:{port}"
            assert str(adopted.address) == expected


def test_a_stream_does_not_wait_and_datagrams_do(make: Make) -> None:
    """As where portico opens it, whatever its maker has chosen: ``NonBlocking=`` of systemd."""
    stream = make(socket.AF_INET, socket.SOCK_STREAM, LOOPBACK)
    datagram = make(socket.AF_INET, socket.SOCK_DGRAM, LOOPBACK)
    datagram.setblocking(False)
    with closing(adopt(of(stream))), closing(adopt(of(datagram))):
        assert not os.get_blocking(stream.fileno())
        assert os.get_blocking(datagram.fileno())


def test_no_child_inherits_its_descriptor(make: Make) -> None:
    made = make(socket.AF_INET, socket.SOCK_STREAM, LOOPBACK)
    made.set_inheritable(True)
    with closing(adopt(of(made))) as adopted:
        assert not made.get_inheritable()
        assert not adopted.socket.get_inheritable()


def test_closing_it_ends_nothing(make: Make, tmp_path: Path) -> None:
    """Its maker still has it: clients wait for the next one that accepts, at the same path."""
    made = make(socket.AF_UNIX, socket.SOCK_STREAM, f"{tmp_path}/a")
    adopt(of(made)).close()
    with closing(adopt(of(made))) as again, socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/a")
        accepted, _ = again.socket.accept()
        accepted.close()
    assert Path(tmp_path, "a").is_socket()


@pytest.mark.parametrize(
    ("family", "kind", "name", "scheme", "expected"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, None, Scheme.DESCRIPTOR, "it does not listen; expec"),
        (socket.AF_INET, socket.SOCK_DGRAM, None, Scheme.DESCRIPTOR, "it is bound to no address"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, None, Scheme.DESCRIPTOR, "it is bound to no address"),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, None, Scheme.DESCRIPTOR, "it is a socket of type"),
        (socket.AF_NETLINK, socket.SOCK_DGRAM, None, Scheme.DESCRIPTOR, "it is a socket of family"),
        (
            socket.AF_INET,
            socket.SOCK_DGRAM,
            LOOPBACK,
            TLS,
            "TLS is spoken over TCP, and it is a so",
        ),
        (
            socket.AF_UNIX,
            socket.SOCK_STREAM,
            "",
            TLS,
            "TLS is spoken over TCP, and it is a Unix so",
        ),
    ],
)
def test_a_socket_that_cannot_be_served_is_told_why(
    make: Make, family: int, kind: int, name: object, scheme: Scheme, expected: str
) -> None:
    made = make(family, kind, name, listens=name is not None)
    where = of(made, scheme)
    with pytest.raises(ListenerError) as caught:
        adopt(where)
    assert str(caught.value).startswith(f"cannot listen on {where}: {expected}")


def test_a_descriptor_that_is_no_socket_is_told(tmp_path: Path) -> None:
    with Path(tmp_path, "a").open("w") as file:
        where = DescriptorAddress(Scheme.DESCRIPTOR, file.fileno())
        with pytest.raises(ListenerError, match=f"{where}: it is not a socket$"):
            adopt(where)
    with pytest.raises(ListenerError, match=f"was started without a descriptor {where.descriptor}"):
        adopt(where)


def test_a_descriptor_that_the_program_has_opened_itself_was_not_inherited(
    make: Make, passed: list[PassedSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was adopted before, or systemd has passed it: both are kept from children."""
    monkeypatch.setattr(listener, "_adopted", set[int]())  # those of other tests
    own, inherited, adopted, counted = (
        make(socket.AF_INET, socket.SOCK_STREAM, LOOPBACK) for _ in range(4)
    )
    inherited.set_inheritable(True)
    adopt(of(adopted)).close()
    passed.append(PassedSocket(counted.fileno(), "web"))
    for each in (inherited, adopted, counted):
        require_inherited(of(each))
    where = of(own)
    for _ in range(2):
        with pytest.raises(ListenerError, match=f"started without a descriptor {where.descriptor}"):
            require_inherited(where)
        own.close()


def test_another_error_is_told_in_the_words_of_the_system(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> int:
        raise OSError(24, "Too many open files")

    made = make(socket.AF_INET, socket.SOCK_STREAM, LOOPBACK)
    monkeypatch.setattr(os, "dup", refuse)
    with pytest.raises(ListenerError, match="Too many open files"):
        adopt(of(made))


# --- the names of systemd -----------------------------------------------------------------------


def test_a_name_stands_for_all_sockets_that_have_it(passed: list[PassedSocket]) -> None:
    passed += [PassedSocket(3, "web"), PassedSocket(4, "admin"), PassedSocket(5, "web")]
    texts = ["tcp://:80", "systemd:web", "systemd+tls:admin", "fd://9"]
    assert [*map(str, expand(map(address.parse, texts)))] == [
        "tcp://:80",
        "fd://3",
        "fd://5",
        "fd+tls://4",
        "fd://9",
    ]


def test_a_name_that_was_not_passed_is_told_with_those_that_were(
    passed: list[PassedSocket],
) -> None:
    with pytest.raises(ListenerError) as caught:
        expand([address.parse("systemd:web")])
    assert str(caught.value) == (
        "systemd:web: systemd passed no socket; start the .socket unit that has "
        "FileDescriptorName=web, and it starts the service"
    )
    passed += [PassedSocket(3, "http"), PassedSocket(4, "admin"), PassedSocket(5, "http")]
    with pytest.raises(ListenerError) as caught:
        expand([address.parse("systemd:web")])
    assert str(caught.value) == (
        "systemd:web: systemd passed no socket of this name; passed: http, admin"
    )


def test_one_listener_is_opened_for_a_name_that_one_socket_has(
    make: Make, passed: list[PassedSocket]
) -> None:
    made = make(socket.AF_INET, socket.SOCK_STREAM, LOOPBACK)
    passed.append(PassedSocket(made.fileno(), "web"))
    where = address.parse("systemd:web")
    with closing(open_listener(where)) as opened:
        assert opened.address == resolve(where).address
    passed.append(PassedSocket(made.fileno(), "web"))
    with pytest.raises(ListenerError, match="systemd:web: systemd passed 2 sockets of this name"):
        open_listener(where)


# --- served -------------------------------------------------------------------------------------


class Upper(portico.BaseRequestHandler):
    def handle(self) -> None:
        if isinstance(self.request, tuple):
            word, answering = self.request
            answering.sendto(word.upper(), self.client_address)
        else:
            self.request.sendall(self.request.recv(64).upper())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_every_engine_serves_one_and_leaves_it_open(make: Make, engine: str, kind: int) -> None:
    """The second time as well: a service that was stopped is started again on the same socket."""
    made = make(socket.AF_INET, kind, LOOPBACK)
    for _ in range(2):
        assignment = Assignment(Upper, of(made), Settings(engine=engine))
        with Service([assignment]) as service, socket.socket(socket.AF_INET, kind) as client:
            running = Call(service.run)
            client.settimeout(PATIENCE)
            client.connect(made.getsockname())
            client.send(b"word")
            assert client.recv(64) == b"WORD"
            service.stop()
            (tally,) = running.result()
            assert (str(tally.address), tally.served) == (str(service.addresses[0]), 1)


def test_a_handler_that_does_not_fit_is_refused_before_anything_is_served(make: Make) -> None:
    made = make(socket.AF_INET, socket.SOCK_DGRAM, LOOPBACK)

    class Lines(portico.StreamRequestHandler):
        pass

    with pytest.raises(TargetError, match="it handles streams, which come to tcp:"):
        portico.serve(Lines, str(of(made)))


def test_an_inherited_socket_has_one_server(make: Make) -> None:
    """A client would get either handler; of sockets that portico opens the second is refused."""
    made = make(socket.AF_INET, socket.SOCK_STREAM, LOOPBACK)
    with pytest.raises(ListenerError, match="in use by this very process; is the address, or the"):
        portico.serve(Upper, str(of(made)), str(of(made)))
