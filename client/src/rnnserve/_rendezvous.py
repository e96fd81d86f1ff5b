"""Where a session belongs, by rendezvous hashing: every client finds the same place, without asking. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b


def score(place: str, key: str) -> int:
    """How much a key wants to be at a place: the same number on every machine."""
    return int.from_bytes(blake2b(f"{place}\0{key}".encode(errors="replace"), digest_size=8).digest())


def choose(places: Iterable[str], key: str) -> str:
    """The place where a key wants to be most.

    When a place goes, only its keys go elsewhere, to all others alike; when one comes, it gets its share from each.
    """
    return max(places, key=lambda place: score(place, key))
