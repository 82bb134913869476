"""Public addresses: those of no network that only the server can reach.

Tables of ``ipaddress`` differ between versions of Python and leave out what no host should have:
they are asked, and those of IANA's special-purpose registries that some of them lack stand here.
A network's own globally routed addresses, and a NAT64 prefix of its own, look like anybody's:
against those a firewall helps.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

_NOT_PUBLIC_4 = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments; a cloud's metadata service is in it
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
    IPv4Network("168.63.129.16/32"),  # routed inside of a cloud only, to its platform
)
_PUBLIC_6 = IPv6Network("2000::/3")  # all that is assigned: ::a.b.c.d, site-local, … lie outside
_NOT_PUBLIC_6 = (
    IPv6Network("2001::/23"),  # protocol assignments: Teredo, ORCHID, benchmarks
    IPv6Network("2001:db8::/32"),  # documentation
    # 6to4, which like Teredo leads to any IPv4 address; nobody serves by either
    IPv6Network("2002::/16"),
    IPv6Network("3fff::/20"),  # documentation
)
# What resolvers make of a public host without IPv6, for servers without IPv4
_NAT64 = IPv6Network("64:ff9b::/96")


def public_address(text: str) -> str | None:
    """The address to connect to, in its plain spelling, if it is public; None if it is not.

    ``::ffff:a.b.c.d`` is a.b.c.d, to which a system connects. NAT64's ``64:ff9b::a.b.c.d`` is as
    public as a.b.c.d is.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.scope_id:
            return None
        address = address.ipv4_mapped or address
    if isinstance(address, IPv4Address):
        public = _public_4(address)
    elif address in _NAT64:
        public = _public_4(IPv4Address(address.packed[12:]))
    else:
        public = _public_6(address)
    return str(address) if public else None


def _public_4(address: IPv4Address) -> bool:
    if address.is_multicast or not address.is_global:
        return False
    return not any(address in network for network in _NOT_PUBLIC_4)


def _public_6(address: IPv6Address) -> bool:
    if address not in _PUBLIC_6 or not address.is_global:
        return False
    return not any(address in network for network in _NOT_PUBLIC_6)
