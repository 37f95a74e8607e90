from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network

from hypothesis import given
from hypothesis import strategies as st

from portico.networks import IPAddress, IPNetwork, Networks, ip_address_of

MAPPED = IPv6Network("::ffff:0:0/96")


def networks() -> st.SearchStrategy[IPNetwork]:
    """Networks of every length around a few addresses, so that some are in one another."""
    addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6), st.just(IPv6Address("::1")))
    return st.builds(
        lambda address, length: ip_network(
            (address, min(length, address.max_prefixlen)), strict=False
        ),
        addresses,
        st.integers(0, 128),
    )


def is_mapped(network: IPNetwork) -> bool:
    return isinstance(network, IPv6Network) and network.subnet_of(MAPPED)


@given(st.lists(networks(), max_size=8), st.ip_addresses())
def test_networks_hold_what_the_standard_librarys_hold(
    values: list[IPNetwork], stranger: IPAddress
) -> None:
    values = [network for network in values if not is_mapped(network)]
    ours = Networks.read("allowed_networks", map(str, values))
    assert list(ours) == values
    edges = [(network[0], network[-1]) for network in values]
    for address in [stranger, *(address for pair in edges for address in pair)]:
        assert (address in ours) == any(address in network for network in values)


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_ipv4_within_ipv6_is_ipv4(address: IPv4Address, length: int) -> None:
    assert ip_address_of((f"::ffff:{address}", 1, 0, 0)) == address
    mapped = ip_network((f"::ffff:{address}", 96 + length), strict=False)
    assert list(Networks.read("allowed_networks", [mapped])) == [
        ip_network((address, length), strict=False)
    ]


@given(st.one_of(st.text(), st.tuples(st.text(), st.integers())))
def test_any_client_address_is_looked_at_without_an_error(client_address: object) -> None:
    ip_address_of(client_address)
