"""Bytes with some of them changed."""

from __future__ import annotations

import struct
from random import Random

_WORDS = (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


def damaged(content: bytes, chance: Random) -> bytes:
    """Bytes turned over, left out, doubled, cut off, or overwritten by numbers at the edge of what a field can hold."""
    bytes_ = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 1, 2, 4, 12))):
        # Formats have at their beginning and end what says where the rest is.
        near = chance.choice((len(bytes_), 64, 400))
        at = min(chance.randrange(near), len(bytes_) - 1)
        if chance.random() < 0.2:
            at = len(bytes_) - 1 - at
        match chance.randrange(6):
            case 0 | 1:
                bytes_[at] ^= 1 << chance.randrange(8)
            case 2:
                size = chance.choice("BHIQ")
                word = struct.pack(f"<{size}", chance.choice(_WORDS) & ((1 << 8 * struct.calcsize(size)) - 1))
                bytes_[at : at + len(word)] = word
            case 3:
                del bytes_[at : at + chance.choice((1, 4, 8, 100))]
            case 4:
                bytes_[at:at] = bytes_[at : at + chance.choice((1, 4, 16, 256))]
            case _ if chance.random() < 0.3:
                del bytes_[at:]
            case _:
                bytes_[at] = chance.randrange(256)
        bytes_ = bytes_ or bytearray(1)
    return bytes(bytes_)
