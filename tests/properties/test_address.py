from __future__ import annotations

import string
from ipaddress import IPv4Address, IPv6Address

from hypothesis import assume, given
from hypothesis import strategies as st

from portico.address import (
    UNIX_PATH_SIZE,
    Address,
    DescriptorAddress,
    InternetAddress,
    Scheme,
    SystemdAddress,
    UnixAddress,
    from_socket_name,
    parse,
)
from portico.errors import AddressError

INTERNET = st.sampled_from([Scheme.TCP, Scheme.TLS, Scheme.UDP])
UNIX = st.sampled_from([Scheme.UNIX, Scheme.UNIX_DATAGRAM])
SYSTEMD = st.sampled_from([Scheme.SYSTEMD, Scheme.SYSTEMD_TLS])
DESCRIPTOR = st.sampled_from([Scheme.DESCRIPTOR, Scheme.DESCRIPTOR_TLS])
PORTS = st.integers(0, 65535)
INTERFACES = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=15)


def unmapped_ipv6() -> st.SearchStrategy[str]:
    """IPv6 addresses that hold no IPv4 address."""
    addresses = st.ip_addresses(v=6).map(str)
    return addresses.filter(lambda address: IPv6Address(address).ipv4_mapped is None)


def hosts() -> st.SearchStrategy[str]:
    labels = st.from_regex(r"[a-z_]([a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True)
    return st.one_of(
        st.just(""),
        st.ip_addresses(v=4).map(str),
        unmapped_ipv6(),
        st.builds(lambda host, interface: f"{host}%{interface}", unmapped_ipv6(), INTERFACES),
        st.lists(labels, min_size=1, max_size=5).map(".".join),
    )


def paths() -> st.SearchStrategy[str]:
    """Paths, and abstract names, that the system could have bound, undecodable bytes included."""
    names = st.binary(min_size=1, max_size=UNIX_PATH_SIZE - 2).map(
        lambda name: name.decode("utf-8", "surrogateescape")
    )
    files = names.filter(lambda name: "\0" not in name and name.strip("/") != "").map(
        lambda name: name.strip("/")
    )
    return st.one_of(
        names.map(lambda name: f"@{name}"),
        files.map(lambda name: f"/{name}"),
        files.map(lambda name: f"./{name}"),
    )


def passed_names() -> st.SearchStrategy[str]:
    """What ``FileDescriptorName=`` may be, without spaces at its ends and slashes at its begin."""
    characters = "".join(set(string.printable) - set(string.whitespace) - {":"}) + " "
    names = st.text(characters, min_size=1, max_size=255)
    return names.filter(lambda name: name == name.strip() and not name.startswith("/"))


ADDRESSES: st.SearchStrategy[Address] = st.one_of(
    st.builds(InternetAddress, INTERNET, hosts(), PORTS),
    st.builds(UnixAddress, UNIX, paths()),
    st.builds(SystemdAddress, SYSTEMD, passed_names()),
    st.builds(DescriptorAddress, DESCRIPTOR, st.integers(0, 9_999_999)),
)


@given(ADDRESSES)
def test_an_address_is_read_back_as_it_was_written(address: Address) -> None:
    assert parse(str(address)) == address


@given(
    st.one_of(
        st.text(),
        # Closer to the notation, so that each of its parts is reached.
        st.builds(
            lambda scheme, text: f"{scheme}:{text}",
            st.sampled_from([*Scheme, "TCP", ""]),
            st.text(st.one_of(st.sampled_from("/@[]:%.0f{}"), st.characters())),
        ),
        st.builds(
            lambda host, port: f"tcp://{host}:{port}",
            st.text(st.sampled_from("[]:%.0129fFxX-_*{}\n")),
            st.text(st.sampled_from("0123456789:{}\n")),
        ),
    )
)
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    """What is read is canonical: writing and reading it again changes nothing."""
    complaint = ""
    try:
        canonical = str(parse(text))
    except AddressError as error:
        canonical, complaint = "", str(error)
    assert "\n" not in complaint
    if complaint:
        assert complaint.startswith(f"address={text!r}: expected ")
    else:
        assert str(parse(canonical)) == canonical


@given(INTERNET, st.ip_addresses(), PORTS, st.integers(0, 2**32 - 1), st.booleans())
def test_the_name_of_a_bound_internet_socket_becomes_an_address(
    scheme: Scheme, host: object, port: int, interface: int, dual_stack: bool
) -> None:
    name = (str(host), port, 0, interface) if ":" in str(host) else (str(host), port)
    address = from_socket_name(scheme, name, dual_stack=dual_stack)
    assert isinstance(address, InternetAddress)
    assert parse(str(address)) == address
    assert address.port == port


@given(INTERNET, st.ip_addresses(v=4), PORTS)
def test_an_ipv4_address_in_an_ipv6_one_is_shown_as_ipv4(
    scheme: Scheme, host: IPv4Address, port: int
) -> None:
    expected = InternetAddress(scheme, str(host), port)
    assert from_socket_name(scheme, (f"::ffff:{host}", port, 0, 0)) == expected
    assert parse(f"{scheme}://[::ffff:{host}]:{port}") == expected


@given(UNIX, paths())
def test_the_name_of_a_bound_unix_socket_becomes_its_address(scheme: Scheme, path: str) -> None:
    address = UnixAddress(scheme, path)
    name = address.socket_address
    # Python hands a path that begins with a zero byte back as bytes, and any other as text.
    assume(name != b"\0")
    assert from_socket_name(scheme, name) == address
