from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest

from portico.errors import SettingError
from portico.networks import Networks, ip_address_of


def networks(*values: Any) -> Networks:
    return Networks.read("allowed_networks", values)


@pytest.mark.parametrize(
    ("client_address", "expected"),
    [
        (("192.0.2.1", 50000), IPv4Address("192.0.2.1")),
        (("2001:db8::1", 50000, 0, 0), IPv6Address("2001:db8::1")),
        (("fe80::1%eth0", 50000, 0, 2), IPv6Address("fe80::1")),
        (("::ffff:192.0.2.1", 50000, 0, 0), IPv4Address("192.0.2.1")),
        ("", None),
        ("/run/client.sock", None),
        (b"\0abstract", None),
        (None, None),
        ((), None),
        ((1, 1024), None),
        (("lo", 3, 0, 1, b""), None),
        (("192.0.2.1.", 1), None),
        (("1::2::3", 1, 0, 0), None),
    ],
)
def test_a_client_address_has_an_ip_address_or_none(client_address: object, expected: Any) -> None:
    assert ip_address_of(client_address) == expected


@pytest.mark.parametrize(
    ("values", "inside", "outside"),
    [
        (["10.0.0.0/8"], ["10.0.0.0", "10.255.255.255"], ["9.255.255.255", "11.0.0.0", "::10"]),
        (["::1"], ["::1"], ["::2", "0.0.0.1"]),
        (["192.0.2.7"], ["192.0.2.7"], ["192.0.2.6"]),
        (["0.0.0.0/0"], ["0.0.0.0", "255.255.255.255"], ["::", "ffff::"]),
        (["::/0"], ["::", "ffff::"], ["0.0.0.0", "192.0.2.1"]),
        (["2001:db8::/32", "fe80::/10"], ["2001:db8:ffff::1", "febf::1"], ["2001:db9::", "fec0::"]),
        (["10.0.0.0/255.255.0.0"], ["10.0.255.255"], ["10.1.0.0"]),
        ([IPv4Network("10.0.0.0/9"), IPv6Network("fc00::/7")], ["10.1.1.1", "fd00::1"], ["::"]),
        ([IPv4Address("10.0.0.1")], ["10.0.0.1"], ["10.0.0.2"]),
        (["::ffff:10.0.0.0/104"], ["10.1.2.3"], ["11.0.0.0", "::ffff:a00:0"]),
        ([], [], ["127.0.0.1", "::1"]),
    ],
)
def test_an_address_is_in_a_network_or_not(
    values: list[Any], inside: list[str], outside: list[str]
) -> None:
    of = networks(*values)
    for text in inside:
        assert (IPv6Address(text) if ":" in text else IPv4Address(text)) in of
    for text in outside:
        assert (IPv6Address(text) if ":" in text else IPv4Address(text)) not in of


def test_networks_of_mapped_addresses_are_kept_as_ipv4() -> None:
    assert list(networks("::ffff:192.0.2.0/120", "::/64")) == [
        IPv4Network("192.0.2.0/24"),
        IPv6Network("::/64"),
    ]


def test_networks_are_read_once_from_an_iterator() -> None:
    of = Networks.read("allowed_networks", iter(["10.0.0.0/8"]))
    assert list(of) == list(of) == [IPv4Network("10.0.0.0/8")]
    assert of == networks("10.0.0.0/8")


ANYTHING = "networks such as 10.0.0.0/8, or addresses such as ::1"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("10.0.0.1/8", "10.0.0.0/8, the network of this address, or 10.0.0.1 for it alone"),
        (
            "2001:db8::1/32",
            "2001:db8::/32, the network of this address, or 2001:db8::1 for it alone",
        ),
        ("localhost", ANYTHING),
        ("10.0.0.0/33", ANYTHING),
        ("10.0.0", ANYTHING),
        ("unix", ANYTHING),
        ("", ANYTHING),
        (10, ANYTHING),
        (None, ANYTHING),
    ],
)
def test_what_is_no_network_is_told_what_would_be_right(value: object, expected: str) -> None:
    with pytest.raises(SettingError) as caught:
        networks("::1", value)
    assert str(caught.value) == f"allowed_networks={value!r}: expected {expected}"


@pytest.mark.parametrize("value", ["10.0.0.0/8", IPv4Network("10.0.0.0/8")])
def test_one_network_in_place_of_several_is_a_mistake(value: Any) -> None:
    """It would be read as one network for each of its letters, or of its addresses."""
    with pytest.raises(SettingError, match=r"expected several networks, such as \['10.0.0.0/8'\]"):
        Networks.read("denied_networks", value)


@pytest.mark.parametrize("value", [None, 10])
def test_what_cannot_be_several_networks_is_a_mistake(value: Any) -> None:
    with pytest.raises(SettingError) as caught:
        Networks.read("denied_networks", value)
    assert str(caught.value) == f"denied_networks={value!r}: expected several networks"
