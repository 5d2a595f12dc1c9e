"""The one address type, to and from text."""

from __future__ import annotations

import pytest

from agent.core.addresses import AddressRange, family_of, format_address, format_endpoint, parse_address
from agent.core.records import Family

CASES = [
    pytest.param("10.0.0.1", "00000000000000000000ffff0a000001", Family.IPV4, "10.0.0.1", id="ipv4"),
    pytest.param("0.0.0.0", "00000000000000000000ffff00000000", Family.IPV4, "0.0.0.0", id="ipv4-any"),
    pytest.param("::ffff:10.0.0.1", "00000000000000000000ffff0a000001", Family.IPV4, "10.0.0.1", id="ipv4-mapped"),
    pytest.param("fd00::1", "fd000000000000000000000000000001", Family.IPV6, "fd00::1", id="ipv6"),
    pytest.param("::", "00000000000000000000000000000000", Family.IPV6, "::", id="ipv6-any"),
    pytest.param("FD00:0:0::0:1", "fd000000000000000000000000000001", Family.IPV6, "fd00::1", id="not-canonical"),
]


@pytest.mark.parametrize(("text", "packed", "family", "written"), CASES)
def test_an_address_is_sixteen_bytes_in_network_order(text, packed, family, written):
    address = parse_address(text)

    assert address == bytes.fromhex(packed)
    assert family_of(address) is family
    assert format_address(address) == written


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("10.0.0", id="short"),
        pytest.param("10.0.0.256", id="octet-too-large"),
        pytest.param("010.0.0.1", id="leading-zero"),
        pytest.param("10.0.0.0/24", id="prefix"),
        pytest.param("fe80::1%eth0", id="zone"),
        pytest.param("None", id="headless"),
        pytest.param(" 10.0.0.1", id="blank"),
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the message is ipaddress's
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "port", "written"),
    [
        pytest.param("10.0.0.1", 80, "10.0.0.1:80", id="ipv4"),
        pytest.param("fd00::1", 65535, "[fd00::1]:65535", id="ipv6"),
        pytest.param("::ffff:1.2.3.4", 1, "1.2.3.4:1", id="ipv4-mapped"),
    ],
)
def test_an_endpoint_is_written_as_urls_write_it(text, port, written):
    assert format_endpoint(parse_address(text), port) == written


@pytest.mark.parametrize(
    ("text", "written", "inside", "beside"),
    [
        ("10.0.0.0/8", "10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
        ("192.0.2.7/24", "192.0.2.0/24", "192.0.2.255", "192.0.3.0"),
        ("192.0.2.7", "192.0.2.7/32", "192.0.2.7", "192.0.2.6"),
        ("fd00::/9", "fd00::/9", "fd7f:ffff::", "fd80::"),
        ("2001:db8::1/128", "2001:db8::1/128", "2001:db8::1", "2001:db8::"),
        ("0.0.0.0/0", "0.0.0.0/0", "255.255.255.255", "::ffff"),
        ("::/0", "::/0", "ffff::", "10.0.0.1"),
    ],
)
def test_a_range_holds_the_addresses_that_begin_alike(text, written, inside, beside):
    found = AddressRange.parse(text)

    assert str(found) == written
    assert (found.contains(parse_address(inside)), found.contains(parse_address(beside))) == (True, False)
    assert found.is_whole_family is text.endswith("/0")


@pytest.mark.parametrize("text", ["", " ", "10.0.0.0/33", "10.0.0", "::ffff:10.0.0.0/104", "x", "010.0.0.0/8"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        AddressRange.parse(text)
