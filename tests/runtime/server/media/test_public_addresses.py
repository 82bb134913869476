"""Which addresses are public, against IANA's registries as they are read by hand."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm.runtime.server.media.public_addresses import public_address

# Base and prefix length of whatever is not public
BLOCKS_4 = {
    (0x00000000, 8): "this network",
    (0x0A000000, 8): "private",
    (0x64400000, 10): "shared by carriers",
    (0x7F000000, 8): "loopback",
    (0xA83F8110, 32): "a cloud's platform",
    (0xA9FE0000, 16): "link-local, metadata",
    (0xAC100000, 12): "private",
    (0xC0000000, 24): "protocol assignments",
    (0xC0000200, 24): "documentation",
    (0xC0586300, 24): "6to4 relays",
    (0xC0A80000, 16): "private",
    (0xC6120000, 15): "benchmarks",
    (0xC6336400, 24): "documentation",
    (0xCB007100, 24): "documentation",
    (0xE0000000, 4): "multicast",
    (0xF0000000, 4): "reserved, broadcast",
}
BLOCKS_6 = {
    (0x20010000 << 96, 23): "protocol assignments, Teredo",
    (0x20010DB8 << 96, 32): "documentation",
    (0x20020000 << 96, 16): "6to4",
    (0x3FFF0000 << 96, 20): "documentation",
}
OUTSIDE_6 = ("::", "::1", "100::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1")
OUTSIDE_6 += ("ff0e::1", "5f00::1", "4000::1", "64:ff9b:1::808:808", "1fff::1", "e000::1")


def within(value: int, blocks: dict[tuple[int, int], str], width: int) -> bool:
    return any(value >> (width - bits) == base >> (width - bits) for base, bits in blocks)


def edges(blocks: dict[tuple[int, int], str], width: int) -> list[int]:
    """The first and last of each block, and those beside them."""
    found = set()
    for base, bits in blocks:
        last = base + (1 << (width - bits)) - 1
        found |= {base - 1, base, base + 1, last - 1, last, last + 1}
    return sorted(value for value in found if 0 <= value < 1 << width)


V4 = st.sampled_from(edges(BLOCKS_4, 32)) | st.integers(0, (1 << 32) - 1)
V6 = (
    st.sampled_from(edges(BLOCKS_6, 128))
    | st.integers(0, (1 << 128) - 1)
    | st.integers(1 << 125, (1 << 126) - 1)
)


def test_every_edge_of_ipv4() -> None:
    for value in edges(BLOCKS_4, 32):
        address = str(IPv4Address(value))
        expected = None if within(value, BLOCKS_4, 32) else address
        assert public_address(address) == expected, address


@given(V4)
def test_ipv4_and_what_it_is_written_into(value: int) -> None:
    address = str(IPv4Address(value))
    public = not within(value, BLOCKS_4, 32)
    assert (public_address(address) == address) == public
    assert public_address(f"::ffff:{address}") == (address if public else None)
    nat64 = f"64:ff9b::{address}"
    assert public_address(nat64) == (str(IPv6Address(nat64)) if public else None)
    never = [
        f"::ffff:{address}%eth0",
        f"64:ff9b::{address}%eth0",
        f"::{address}",
        f"::ffff:0:{address}",
        f"64:ff9b:1::{address}",
        f"fe80::5efe:{address}",
        str(IPv6Address((0x2002 << 112) | (value << 80) | 1)),  # 6to4
        str(IPv6Address((0x20010000 << 96) | (value ^ 0xFFFFFFFF))),  # Teredo, of a client
        str(IPv6Address((0x20010000 << 96) | (value << 64))),  # of a server
    ]
    assert [one for one in never if public_address(one) is not None] == []


@given(V6)
def test_ipv6(value: int) -> None:
    address = IPv6Address(value)
    if address.ipv4_mapped or value >> 32 == 0x64FF9B << 64:
        return  # above
    public = value >> 125 == 1 and not within(value, BLOCKS_6, 128)
    for text in (str(address), address.exploded, str(address).upper()):
        assert public_address(text) == (str(address) if public else None)
    assert public_address(f"{address}%eth0") is None


@pytest.mark.parametrize("address", OUTSIDE_6)
def test_ipv6_that_is_assigned_to_nobody_or_not_routed(address: str) -> None:
    assert public_address(address) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8.8.8",
        "010.8.8.8",
        "0x08080808",
        "134744072",
        "8.8.8.8 ",
        "[2606:2800::1]",
        "a",
        "٨.٨.٨.٨",
    ],
)
def test_what_is_no_address(text: str) -> None:
    assert public_address(text) is None


def test_public_ones_are() -> None:
    for address in ("1.1.1.1", "93.184.216.34", "2606:2800:220:1::1", "2a00:1450::1"):
        assert public_address(address) == address
