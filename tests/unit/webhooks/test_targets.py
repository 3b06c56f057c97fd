"""Where webhooks may go, address by address and URL by URL."""

import ipaddress

import pytest

from luthier.core.errors import InvalidValueError
from luthier.webhooks import targets
from luthier.webhooks.targets import TargetRules, check_url, is_internal, permitted_addresses

_INTERNAL = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
    "168.63.129.16", "169.254.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192",
    "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250",
    "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.1.2.3",
    "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1",
    "2001:db8::1", "2002:7f00:1::", "2002:a00:1::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1",
    "ff02::1",
]  # fmt: skip
_PUBLIC = [
    "1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.167.255.255",
    "223.255.255.255", "2606:4700:4700::1111", "2a00:1450:4001:80e::200e", "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]  # fmt: skip


@pytest.mark.parametrize("address", [*_INTERNAL, *_PUBLIC])
def test_an_internal_address_is_distinguished_from_one_of_the_open_internet(address):
    assert is_internal(ipaddress.ip_address(address)) == (address in _INTERNAL)


_REFUSED = [
    "https://127.0.0.1/hook", "https://127.1/hook", "https://0x7f000001/hook", "https://0177.0.0.1/hook",
    "https://2130706433/hook", "https://[::1]/hook", "https://[::ffff:127.0.0.1]:8443/hook",
    "https://169.254.169.254/latest/meta-data", "https://10.0.0.1", "https://localhost/hook",
    "https://LOCALHOST./hook", "https://db.localhost/hook", "https://metadata.google.internal/",
    "https://printer.local/", "http://example.com/hook", "ftp://example.com/hook", "file:///etc/passwd",
    "//example.com/hook", "example.com/hook", "https://", "https:///hook",
    "https://user:secret@example.com/hook", "https://example.com/hook#part",
    "https://example.com:99999/hook", "https://[::1", "https://%31%32%37.0.0.1/", "https://fe80::1%25eth0/",
]  # fmt: skip
_ALLOWED = [
    "https://example.com/hook", "https://example.com:8443/hook?token=1", "https://EXAMPLE.com",
    "https://bücher.example/hook", "https://1.1.1.1/hook", "https://[2606:4700:4700::1111]/hook",
    "https://localhost.example.com/",
]  # fmt: skip


@pytest.mark.parametrize(
    "url", [*_REFUSED, "https://exa mple.com/", "", "\x00", "https://example.com/" + "a" * 2048]
)
def test_a_url_that_is_none_or_leads_inside_is_refused_before_anything_is_asked(url):
    with pytest.raises(InvalidValueError) as caught:
        check_url(url, TargetRules())
    assert caught.value.param == "url"


@pytest.mark.parametrize("url", _ALLOWED)
def test_a_url_of_the_open_internet_is_taken(url):
    check_url(url, TargetRules())


def test_what_the_operator_lists_is_allowed_and_nothing_beside_it():
    rules = TargetRules.parse(allow_http=True, allowed_targets=" 10.1.0.0/16, hooks.internal ,::1")
    for url in ("http://10.1.2.3/", "http://hooks.internal/", "https://[::1]:8443/", "http://example.com/"):
        check_url(url, rules)
    for url in ("http://10.2.0.1/", "http://127.0.0.1/", "http://169.254.169.254/"):
        with pytest.raises(InvalidValueError):
            check_url(url, rules)
    assert permitted_addresses("hooks.internal", ["192.168.0.9"], rules)
    assert permitted_addresses("other.example", ["10.1.255.255", "::ffff:10.1.0.1"], rules)
    with pytest.raises(InvalidValueError):
        permitted_addresses("evil.hooks.internal", ["192.168.0.9"], rules)


def test_a_name_with_one_internal_address_among_others_is_refused():
    with pytest.raises(InvalidValueError) as caught:
        permitted_addresses("two-faced.example", ["1.1.1.1", "10.0.0.1"], TargetRules())
    assert "LUTHIER_WEBHOOK_ALLOWED_TARGETS" in caught.value.message
    assert permitted_addresses("fine.example", ["1.1.1.1", "1.1.1.1", "8.8.8.8"], TargetRules()) == [
        ipaddress.ip_address("1.1.1.1"),
        ipaddress.ip_address("8.8.8.8"),
    ]


def test_the_machines_own_address_is_no_target_also_where_it_is_public(monkeypatch):
    # Loopback stands for a public address that this machine has.
    monkeypatch.setattr(targets, "is_internal", lambda _address: False)
    own, other = (ipaddress.ip_address(text) for text in ("127.0.0.1", "1.1.1.1"))
    assert not TargetRules().permits("hooks.example", own)
    assert TargetRules().permits("hooks.example", other)
    listed = TargetRules.parse(allow_http=False, allowed_targets="127.0.0.1")
    assert listed.permits("hooks.example", own)
