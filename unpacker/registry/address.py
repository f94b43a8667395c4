"""Which addresses are never called, whoever names them: link-local, metadata services, multicast, unspecified.

A wishlist is written by anyone who can open a merge request, and a registry chooses where its token server, its
redirects and its next pages are. Neither may make a publisher host talk to the metadata service of its cloud, which
gives credentials to whoever asks from there.
"""

from __future__ import annotations

import ipaddress

_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data"})
_METADATA_DOMAINS = (".metadata.google.internal", ".ec2.internal")
_METADATA_ADDRESSES = frozenset(
    ipaddress.ip_address(a)
    for a in (
        "fd00:ec2::254",  # Amazon, IPv6 (169.254.169.254 and its kin are link-local)
        "fd20:ce::254",  # Google, IPv6
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure
        "192.0.0.192",  # Oracle
    )
)
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def why_refused(host: str) -> str | None:
    """Why a host, as name or literal address and without a port, is never called; None if it may be."""
    name = host.lower().rstrip(".")
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    if name in _METADATA_NAMES or name.endswith(_METADATA_DOMAINS):
        return "it is the name of a metadata service"
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
    return _why_refused(address)


def _why_refused(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None and (reason := _why_refused(inner)):
            return reason
    if address in _METADATA_ADDRESSES:
        return "it is the address of a metadata service"
    if address.is_link_local:
        return "it is a link-local address"
    if address.is_multicast:
        return "it is a multicast address"
    if address.is_unspecified or (address.version == 4 and address in _THIS_NETWORK):
        return "it is no address of a host"
    if address == ipaddress.IPv4Address("255.255.255.255"):
        return "it is the broadcast address"
    return None
