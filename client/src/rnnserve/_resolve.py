"""Targets in, replicas out: a host's name stands for every address that it has."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from typing import NamedTuple


class Replica(NamedTuple):
    """One server.

    Attributes:
        target: where it is, as gRPC writes it.
        authority: the `host:port` under which it was looked up, which its certificate names; None: the target.
    """

    target: str
    authority: str | None = None


def split(target: str) -> tuple[str, int] | None:
    """The host's name and the port of a target that may have several addresses; None for any other.

    Raises:
        ValueError: it is no target.
    """
    if ":///" in target or target.startswith(("unix:", "ipv4:", "ipv6:")):
        return None
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"each replica must be host:port, or as gRPC writes a target, got {target!r}")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host, int(port)
    return None


def fixed(targets: Sequence[str]) -> bool:
    """Whether targets stand for themselves, now and for ever."""
    return all(split(target) is None for target in targets)


async def resolve(targets: Sequence[str]) -> list[Replica]:
    """The replicas that targets stand for now, each once, in order. A name that cannot be looked up stands for itself.

    Of a name that has addresses of both families those of IPv4 count, because the two lead to the same servers.
    """
    found: dict[Replica, None] = {}
    for target in targets:
        name = split(target)
        addresses: list[str] = [] if name is None else await _addresses(*name)
        if name is None or len(addresses) < 2:
            found[Replica(target)] = None
        else:
            found.update(dict.fromkeys(Replica(address, target) for address in addresses))
    return list(found)


async def _addresses(host: str, port: int) -> list[str]:
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    four = {str(address[0]) for family, *_, address in entries if family == socket.AF_INET}
    six = {f"[{address[0]}]" for family, *_, address in entries if family == socket.AF_INET6}
    return [f"{each}:{port}" for each in sorted(four or six)]
