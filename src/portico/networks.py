"""Tell whether a peer's IP address lies in a set of networks.

Owns what a setting such as ``("10.0.0.0/8", "::1")`` means, and which IP address a client
address has.  What follows from being in a set is its caller's to decide.

An IPv4 address within an IPv6 one (``::ffff:192.0.2.1``, what a listener of both families
sees) counts as IPv4 everywhere: whoever allows ``192.0.2.0/24`` means it on either listener.
So ``::/0`` holds no IPv4 peer.

Sources: RFC 4291, 2.5.5.2 (IPv4-mapped addresses); RFC 4007, 11 (the interface after ``%``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_network,
)
from typing import Final, TypeAlias

from portico.errors import SettingError

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network

_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_ONE_NETWORK: Final = (str, IPv4Network, IPv6Network)


@dataclass(frozen=True, slots=True)
class Networks:
    """A set of networks.

    Looking an address up takes one step for each different length of a prefix, however many
    networks there are.

    Attributes:
        networks: The networks; those of IPv4-mapped addresses as IPv4.
    """

    networks: tuple[IPNetwork, ...]
    _prefixes: dict[int, dict[int, set[int]]] = field(init=False, repr=False, compare=False)
    """By version, then by the number of bits that differ within a network, the other bits."""

    def __post_init__(self) -> None:
        networks = tuple(map(_unmapped_network, self.networks))
        prefixes: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for network in networks:
            shift = network.max_prefixlen - network.prefixlen
            prefix = int(network.network_address) >> shift
            prefixes[network.version].setdefault(shift, set()).add(prefix)
        object.__setattr__(self, "networks", networks)
        object.__setattr__(self, "_prefixes", prefixes)

    @classmethod
    def read(cls, setting: str, values: Iterable[str | IPNetwork]) -> Networks:
        """Read the value of a setting.

        Args:
            setting: Its name, for the error.
            values: Networks (``10.0.0.0/8``) and addresses (``::1``), as text or objects.

        Raises:
            SettingError: A value is no network, or there is one in place of several.
        """
        # One network is iterable, too: over its letters, or over all its addresses.
        if isinstance(values, _ONE_NETWORK):
            raise SettingError(setting, values, f"several networks, such as [{str(values)!r}]")
        try:
            several = iter(values)
        except TypeError:
            raise SettingError(setting, values, "several networks") from None
        return cls(tuple(_read_network(setting, value) for value in several))

    def __contains__(self, address: IPAddress) -> bool:
        """Whether the address, as `ip_address_of` gives it, is in one of the networks."""
        number = int(address)
        prefixes = self._prefixes[address.version]
        return any(number >> shift in known for shift, known in prefixes.items())

    def __iter__(self) -> Iterator[IPNetwork]:
        return iter(self.networks)


def ip_address_of(client_address: object) -> IPAddress | None:
    """Return the IP address in a client address, as it counts: a mapped one as IPv4.

    Args:
        client_address: What `accept` gave, of whatever family.

    Returns:
        ``None`` where there is none: a Unix peer, and any family that has no IP addresses.
    """
    if not isinstance(client_address, tuple) or not client_address:
        return None
    host: object = client_address[0]  # pyright: ignore[reportUnknownVariableType]  # of any
    if not isinstance(host, str):
        return None
    try:
        if ":" not in host:
            return IPv4Address(host)
        address = IPv6Address(host.partition("%")[0])
    except AddressValueError:
        return None
    return address.ipv4_mapped or address


def _unmapped_network(network: IPNetwork) -> IPNetwork:
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        address = network.network_address.ipv4_mapped
        assert address is not None, "what lies in the network of mapped addresses is mapped"
        return IPv4Network((address, network.prefixlen - _MAPPED.prefixlen))
    return network


def _read_network(setting: str, value: str | IPNetwork) -> IPNetwork:
    try:
        return ip_network(str(value))
    except ValueError:
        pass
    try:
        network = ip_network(str(value), strict=False)
    except ValueError:
        expected = "networks such as 10.0.0.0/8, or addresses such as ::1"
    else:
        address = str(value).partition("/")[0]
        expected = f"{network}, the network of this address, or {address} for it alone"
    raise SettingError(setting, value, expected)
