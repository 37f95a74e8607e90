from __future__ import annotations

import socket

import pytest

from portico.address import (
    UNIX_PATH_SIZE,
    DescriptorAddress,
    InternetAddress,
    Scheme,
    SystemdAddress,
    UnixAddress,
    from_socket_name,
    parse,
)
from portico.errors import AddressError, PorticoError

IPV4, IPV6, ANY = socket.AF_INET, socket.AF_INET6, socket.AF_UNSPEC


@pytest.mark.parametrize(
    ("text", "expected", "family"),
    [
        ("tcp://127.0.0.1:9000", InternetAddress(Scheme.TCP, "127.0.0.1", 9000), IPV4),
        ("tcp://0.0.0.0:0", InternetAddress(Scheme.TCP, "0.0.0.0", 0), IPV4),
        ("tls://127.0.0.1:443", InternetAddress(Scheme.TLS, "127.0.0.1", 443), IPV4),
        ("udp://[::1]:53", InternetAddress(Scheme.UDP, "::1", 53), IPV6),
        ("tcp://[::]:80", InternetAddress(Scheme.TCP, "::", 80), IPV6),
        ("tcp://[fe80::1%eth0]:80", InternetAddress(Scheme.TCP, "fe80::1%eth0", 80), IPV6),
        ("tcp://[fe80::1%1]:80", InternetAddress(Scheme.TCP, "fe80::1%1", 80), IPV6),
        ("tcp://:9000", InternetAddress(Scheme.TCP, "", 9000), ANY),
        ("tcp://localhost:65535", InternetAddress(Scheme.TCP, "localhost", 65535), ANY),
        ("tcp://db_1.internal.:1", InternetAddress(Scheme.TCP, "db_1.internal.", 1), ANY),
        # What container runtimes call a machine begins with a digit.
        ("tcp://7f3a9c:1", InternetAddress(Scheme.TCP, "7f3a9c", 1), ANY),
    ],
)
def test_a_host_and_a_port_are_read(
    text: str, expected: InternetAddress, family: socket.AddressFamily
) -> None:
    """The canonical spelling is also what `str` writes."""
    address = parse(text)
    assert address == expected
    assert address.family == family
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("TCP://LocalHost:080", "tcp://localhost:80"),
        ("tcp://[0:0::0:1]:1", "tcp://[::1]:1"),
        ("tcp://[FE80::1%eth0]:1", "tcp://[fe80::1%eth0]:1"),
        ("tcp://[::ffff:192.0.2.1]:1", "tcp://192.0.2.1:1"),
        ("unix:///run/echo.sock", "unix:/run/echo.sock"),
        ("unix:////run/echo.sock", "unix:/run/echo.sock"),
        ("Unix-Datagram:/run/echo.sock", "unix-datagram:/run/echo.sock"),
    ],
)
def test_other_spellings_become_the_canonical_one(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(text) == parse(canonical)


@pytest.mark.parametrize(
    ("text", "expected", "socket_address"),
    [
        ("unix:/run/a.sock", UnixAddress(Scheme.UNIX, "/run/a.sock"), "/run/a.sock"),
        ("unix:a.sock", UnixAddress(Scheme.UNIX, "a.sock"), "a.sock"),
        ("unix:./@a", UnixAddress(Scheme.UNIX, "./@a"), "./@a"),
        ("unix:@a b/", UnixAddress(Scheme.UNIX, "@a b/"), b"\0a b/"),
        ("unix:@caf\N{LATIN SMALL LETTER E WITH ACUTE}", None, b"\0caf\xc3\xa9"),
        ("unix:@\udcff", UnixAddress(Scheme.UNIX, "@\udcff"), b"\0\xff"),
        ("unix-datagram:/run/a", UnixAddress(Scheme.UNIX_DATAGRAM, "/run/a"), "/run/a"),
    ],
)
def test_a_unix_path_is_read(
    text: str, expected: UnixAddress | None, socket_address: str | bytes
) -> None:
    address = parse(text)
    assert isinstance(address, UnixAddress)
    assert expected in (address, None)
    assert address.socket_address == socket_address
    assert address.is_abstract == isinstance(socket_address, bytes)
    assert address.family == socket.AF_UNIX
    assert str(address) == text


def test_a_scheme_says_which_sockets_it_is_for() -> None:
    kinds = {
        scheme: (scheme.is_unix, scheme.socket_type) for scheme in Scheme if not scheme.is_inherited
    }
    assert kinds == {
        Scheme.TCP: (False, socket.SOCK_STREAM),
        Scheme.TLS: (False, socket.SOCK_STREAM),
        Scheme.UDP: (False, socket.SOCK_DGRAM),
        Scheme.UNIX: (True, socket.SOCK_STREAM),
        Scheme.UNIX_DATAGRAM: (True, socket.SOCK_DGRAM),
    }


@pytest.mark.parametrize(
    ("text", "expected", "is_tls"),
    [
        ("systemd:web", SystemdAddress(Scheme.SYSTEMD, "web"), False),
        ("systemd:portico.socket", SystemdAddress(Scheme.SYSTEMD, "portico.socket"), False),
        ("SYSTEMD+TLS:web", SystemdAddress(Scheme.SYSTEMD_TLS, "web"), True),
        ("fd://3", DescriptorAddress(Scheme.DESCRIPTOR, 3), False),
        ("fd+tls://0", DescriptorAddress(Scheme.DESCRIPTOR_TLS, 0), True),
    ],
)
def test_an_inherited_socket_is_known_by_its_name_or_its_number(
    text: str, expected: SystemdAddress | DescriptorAddress, is_tls: bool
) -> None:
    address = parse(text)
    assert address == expected
    assert str(address) == text.lower()
    assert (address.scheme.is_inherited, address.scheme.is_tls) == (True, is_tls)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The scheme.
        (
            "",
            "tcp://HOST:PORT, tls://HOST:PORT, udp://HOST:PORT, unix:PATH, unix-datagram:PATH",
        ),
        ("http://localhost:80", "tcp://HOST:PORT, tls://HOST:PORT, udp://HOST:PORT"),
        ("127.0.0.1:9000", "tcp://127.0.0.1:9000 or udp://127.0.0.1:9000"),
        ("[::1]:9000", "tcp://[::1]:9000 or udp://[::1]:9000"),
        (":9000", "tcp://:9000 or udp://:9000"),
        ("9000", "tcp://:9000 or udp://:9000"),
        ("/run/a.sock", "unix:/run/a.sock or unix-datagram:/run/a.sock"),
        (
            "/",
            "tcp://HOST:PORT, tls://HOST:PORT, udp://HOST:PORT, unix:PATH, unix-datagram:PATH",
        ),
        # What is inherited.
        ("systemd:", "systemd:NAME, with the FileDescriptorName= of a .socket unit, such as syst"),
        ("systemd://web", "systemd:NAME, with the FileDescriptorName= of a .socket unit"),
        ("systemd+tls:a:b", "systemd+tls:NAME, with the FileDescriptorName= of a .socket unit"),
        ("systemd:a\nb", "systemd:NAME, with the FileDescriptorName= of a .socket unit"),
        ("systemd:" + "a" * 256, "systemd:NAME, with the FileDescriptorName= of a .socket unit"),
        ("fd:3", "fd://NUMBER, with the number of a descriptor, such as fd://3"),
        ("fd://", "fd://NUMBER, with the number of a descriptor, such as fd://3"),
        ("fd://03", "fd://NUMBER, with the number of a descriptor"),
        ("fd+tls://-1", "fd+tls://NUMBER, with the number of a descriptor, such as fd+tls://3"),
        # The port.
        ("tcp", "tcp://HOST:PORT, or tcp://:PORT"),
        ("tcp:/x", "tcp://HOST:PORT, or tcp://:PORT"),
        ("udp://localhost", "udp://HOST:PORT, or udp://:PORT"),
        ("tls://localhost", "tls://HOST:PORT, or tls://:PORT"),
        ("tcp://localhost:80/", "tcp://HOST:PORT, or tcp://:PORT"),
        ("tcp://localhost:+80", "tcp://HOST:PORT, or tcp://:PORT"),
        ("tcp://localhost:\N{ARABIC-INDIC DIGIT ONE}", "tcp://HOST:PORT, or tcp://:PORT"),
        ("tcp://localhost:000080", "tcp://HOST:PORT, or tcp://:PORT"),
        ("tcp://localhost:65536", "a port from 0 to 65535"),
        # The host.
        ("tcp://::1:9000", "brackets around an IPv6 address: tcp://[::1]:9000"),
        ("tcp://[[::1]]:9000", "tcp://HOST:PORT, or tcp://:PORT"),
        ("tcp://[127.0.0.1]:1", "an IPv6 address between the brackets, such as tcp://[::1]:PORT"),
        ("tcp://[]:1", "an IPv6 address between the brackets"),
        ("tcp://[fe80::1%]:1", "an IPv6 address between the brackets"),
        ("tcp://[fe80::1%e\nth]:1", "an IPv6 address between the brackets"),
        ("tcp://*:1", "tcp://:PORT for every address of this machine"),
        ("tcp://256.0.0.1:1", "four numbers from 0 to 255, such as tcp://127.0.0.1:PORT"),
        ("tcp://127.1:1", "four numbers from 0 to 255"),
        ("tcp://0X7f000001:1", "four numbers from 0 to 255"),
        ("tcp://local host:1", "a host name of letters, digits, dots and hyphens"),
        ("tcp://-a:1", "a host name of letters, digits, dots and hyphens"),
        ("tcp://a..b:1", "a host name of letters, digits, dots and hyphens"),
        (f"tcp://{'a.' * 127}a:1", "a host name of letters, digits, dots and hyphens"),
        ("tcp://\N{KELVIN SIGN}:1", "a host name of letters, digits, dots and hyphens"),
        ("tcp://localhost\n:1", "a host name of letters, digits, dots and hyphens"),
        # The path.
        ("unix:", "unix:/PATH/OF/SOCKET, or unix:@NAME for an abstract name"),
        ("unix:@", "unix:/PATH/OF/SOCKET, or unix:@NAME for an abstract name"),
        ("unix-datagram:/run/", "unix-datagram:/PATH/OF/SOCKET, or unix-datagram:@NAME"),
        ("unix://run/a", "an absolute path after one slash or three, such as unix:/PATH"),
        ("unix:/a\0b", "a path without a zero byte"),
        ("unix:/\ud800", "a path that can be written in UTF-8"),
        ("unix:/" + "a" * UNIX_PATH_SIZE, f"a path of at most {UNIX_PATH_SIZE} bytes"),
        ("unix:@" + "a" * (UNIX_PATH_SIZE + 1), f"a path of at most {UNIX_PATH_SIZE} bytes"),
    ],
)
def test_anything_else_is_told_what_would_be_right(text: str, expected: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse(text)
    assert caught.value.address == text
    assert caught.value.expected.startswith(expected)
    assert str(caught.value).startswith(f"address={text!r}: expected {expected}")
    assert "\n" not in str(caught.value)


def test_an_address_error_is_what_programs_catch_already() -> None:
    assert issubclass(AddressError, ValueError)
    assert issubclass(AddressError, PorticoError)


def test_the_longest_path_can_be_bound() -> None:
    """The limit is the system's: one byte more, and `bind` refuses."""
    longest = parse("unix:@" + "a" * UNIX_PATH_SIZE)
    assert isinstance(longest, UnixAddress)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(longest.socket_address)
        assert from_socket_name(Scheme.UNIX, listener.getsockname()) == longest
    with socket.socket(socket.AF_UNIX) as listener, pytest.raises(OSError, match="too long"):
        listener.bind("/" + "a" * UNIX_PATH_SIZE)


@pytest.mark.parametrize(
    ("scheme", "name", "text"),
    [
        (Scheme.TCP, ("127.0.0.1", 80), "tcp://127.0.0.1:80"),
        (Scheme.TLS, ("127.0.0.1", 443), "tls://127.0.0.1:443"),
        (Scheme.UDP, ("0.0.0.0", 80), "udp://0.0.0.0:80"),
        (Scheme.TCP, ("::1", 80, 0, 0), "tcp://[::1]:80"),
        (Scheme.TCP, ("::", 80, 0, 0), "tcp://[::]:80"),
        (Scheme.TCP, ("fe80::1", 80, 0, 4), "tcp://[fe80::1%4]:80"),
        (Scheme.TCP, ("fe80::1%eth0", 80, 0, 4), "tcp://[fe80::1%eth0]:80"),
        (Scheme.TCP, ("::ffff:192.0.2.1", 80, 0, 0), "tcp://192.0.2.1:80"),
        (Scheme.UNIX, "/run/a.sock", "unix:/run/a.sock"),
        (Scheme.UNIX, "@a", "unix:./@a"),
        (Scheme.UNIX_DATAGRAM, b"\0a\xff", "unix-datagram:@a\udcff"),
    ],
)
def test_a_bound_socket_has_an_address(
    scheme: Scheme, name: tuple[object, ...] | str | bytes, text: str
) -> None:
    address = from_socket_name(scheme, name)
    assert str(address) == text
    assert parse(text) == address


def test_a_socket_for_both_families_has_the_address_that_asks_for_both() -> None:
    both = from_socket_name(Scheme.TCP, ("::", 80, 0, 0), dual_stack=True)
    assert str(both) == "tcp://:80"
    one = from_socket_name(Scheme.TCP, ("::1", 80, 0, 0), dual_stack=True)
    assert str(one) == "tcp://[::1]:80"
