"""Which URLs webhooks may be sent to: the open internet, and what the operator has listed; nothing internal.

Without this, a client that registers a webhook could make the service call its own database, a neighbour or
the cloud's metadata service.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2

from luthier.core.errors import InvalidValueError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_URL_CHARACTERS = 2048
# Beside the tables of ipaddress, which may change with a Python version.
_INTERNAL = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT, and metadata at 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's own services, at an address that looks public
        "169.254.0.0/16",  # link-local, and metadata at 169.254.169.254
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/96",
        "64:ff9b:1::/48",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?")
_LOCAL_NAMES = ("localhost", "local", "internal", "home.arpa")


def is_internal(address: Address) -> bool:
    """Whether an address is anything but a unicast address of the open internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_internal(inner)
    if not address.is_global or address.is_multicast or address.is_reserved:
        return True
    return any(address in network for network in _INTERNAL if network.version == address.version)


def _is_own(address: Address) -> bool:
    """Whether an address is one of this machine's, also where it is public."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        # A socket can be bound to the machine's own addresses alone.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def _literal(host: str) -> Address | None:
    """Return the address that a host is written as, in any spelling that a resolver takes for one."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        # 127.1, 0x7f000001 and 2130706433 are 127.0.0.1 to a resolver.
        return ipaddress.IPv4Address(socket.inet_aton(host)) if host[:1].isdigit() else None
    except (OSError, ValueError):
        return None


def _is_local_name(host: str) -> bool:
    return any(host == name or host.endswith(f".{name}") for name in _LOCAL_NAMES)


@dataclass(frozen=True)
class TargetRules:
    """What an operator allows beyond https to the open internet: hosts, and internal networks."""

    allow_http: bool = False
    hosts: frozenset[str] = frozenset()
    networks: tuple[_Network, ...] = ()

    @classmethod
    def parse(cls, *, allow_http: bool, allowed_targets: str) -> "TargetRules":
        hosts, networks = set(), []
        for entry in filter(None, (part.strip().lower() for part in allowed_targets.split(","))):
            try:
                networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                hosts.add(entry)
        return cls(allow_http, frozenset(hosts), tuple(networks))

    def permits(self, host: str, address: Address) -> bool:
        """Whether a host may be called at an address that it resolved to."""
        inner = getattr(address, "ipv4_mapped", None) or address
        listed = any(inner in network for network in self.networks if network.version == inner.version)
        return host in self.hosts or listed or not (is_internal(address) or _is_own(address))


def check_url(text: str, rules: TargetRules) -> httpx2.URL:
    """Return a receiver's URL as it will be called, checked without resolving its name.

    Raises:
        InvalidValueError: when it is no URL, not https, or names an internal address.
    """
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError) as error:
        raise InvalidValueError("url: it is no valid URL.", param="url") from error
    schemes = ("https", "http") if rules.allow_http else ("https",)
    if url.scheme not in schemes or not url.host or len(text) > _MAX_URL_CHARACTERS:
        raise InvalidValueError(
            f"url: send an absolute {' or '.join(schemes)} URL of at most {_MAX_URL_CHARACTERS} characters.",
            param="url",
        )
    if url.userinfo or url.fragment:
        raise InvalidValueError("url: leave out the user name, the password and the fragment.", param="url")
    host = host_of(url)
    address = _literal(host)
    if address is not None and not rules.permits(host, address):
        raise internal_target(host)
    if (address is None and not _HOST_NAME.fullmatch(host)) or not 0 < (url.port or 443) < 2**16:
        raise InvalidValueError(
            "url: its host is no name that can be looked up, or its port none.", param="url"
        )
    # Where networks are listed, a local name may resolve to one of them.
    if _is_local_name(host) and host not in rules.hosts and not rules.networks:
        raise internal_target(host)
    return url


def host_of(url: httpx2.URL) -> str:
    """Return a URL's host as it is compared and resolved: ASCII, lower case, without a final dot."""
    return url.raw_host.decode("ascii").lower().rstrip(".").strip("[]")


def internal_target(host: str) -> InvalidValueError:
    """Return the error for a host that is none of the open internet's."""
    return InvalidValueError(
        f"url: {host[:80]} is or leads to an internal address, where no webhook is sent. Operator: "
        "LUTHIER_WEBHOOK_ALLOWED_TARGETS lists what is allowed all the same.",
        param="url",
    )


def permitted_addresses(host: str, found: Sequence[str], rules: TargetRules) -> list[Address]:
    """Return the addresses that a name resolved to, all of which must be permitted.

    Raises:
        InvalidValueError: when one of them is internal and not listed.
    """
    addresses = []
    for text in dict.fromkeys(found):
        # A link-local address comes with its interface behind a %.
        address = ipaddress.ip_address(text.partition("%")[0])
        if not rules.permits(host, address):
            raise internal_target(host)
        addresses.append(address)
    return addresses
