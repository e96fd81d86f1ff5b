"""What tells a chunk from another one for the same step.

A tick has many small chunks, and to hash each by itself took longer than to run them. So the digests of a column of
chunks are a few array operations: the words of a chunk, times fixed numbers, summed up modulo 2**64, twice (multilinear
hashing). Two chunks that differ have the same digest with a probability of 2**-66, whatever the difference, if the
numbers are random to it. They are no secret: who wants two chunks with one digest can make them, and has then deceived
a session of their own. A large chunk is hashed by BLAKE2b.

A digest depends on its chunk alone, not on what is batched beside it: 24 bytes, of which the first eight are of the
lengths and the mask. Earlier releases stored BLAKE2b of 16 bytes, which are still recognised.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_models.masking import Compacted

_WORDS = 4096  # of a chunk whose words are summed up
_WORD_BYTES = 4
_SUM_BYTES = 16
_FORMAT_1_BYTES = 16


def digests(call: Compacted, chunks: int, pieces: int = 1) -> Array:
    """The digests of N chunks, or of N times several that follow one another.

    Args:
        call: the inputs of all of them.
        chunks: N.
        pieces: into how many chunks of equal length each row's steps are cut; 1 if there is a mask.

    Returns:
        uint8 [pieces, N, 24].
    """
    if call.mask is not None:
        return np.stack([_of_one(_alone(call, position, chunks)) for position in range(chunks)])[None]
    steps, rows = call.timesteps // pieces, len(call.lengths) // chunks
    parts = []
    for name in sorted(call.inputs):
        x = call.inputs[name]
        numbers = rows * math.prod(x.shape[2:])  # of a step
        x = x.reshape(pieces, steps, chunks, numbers).swapaxes(1, 2)
        parts.append(np.ascontiguousarray(x).reshape(pieces * chunks, steps * numbers).view(np.uint8))
    found = _hashed(_said(steps, (steps,) * rows, b"", tuple(sorted(call.inputs))), parts)
    return found.reshape(pieces, chunks, -1)


def digest(call: Compacted, position: int, chunks: int) -> bytes:
    """That of one of N chunks: 24 bytes."""
    return _of_one(_alone(call, position, chunks)).tobytes()


def is_digest(known: bytes, call: Compacted, position: int, chunks: int) -> bool:
    """Whether a digest, of this release or an earlier one, is that of one of N chunks."""
    if len(known) == _FORMAT_1_BYTES:
        return known == _format_1(_alone(call, position, chunks))
    return known == digest(call, position, chunks)


def _alone(call: Compacted, position: int, chunks: int) -> Compacted:
    """One of N chunks as if there were no others: without the steps of longer ones, or a mask that masks nothing."""
    size = len(call.lengths) // chunks
    rows = slice(position * size, (position + 1) * size)
    longest = int(call.lengths[rows].max())
    mask = None if call.mask is None or call.mask[:, rows].all() else call.mask[:, rows]
    inputs = {name: x[:longest, rows] for name, x in call.inputs.items()}
    return Compacted(inputs, call.lengths[rows], call.timesteps, mask)


def _of_one(call: Compacted) -> Array:
    """The digest of a chunk that is alone: uint8 [24]."""
    names = tuple(sorted(call.inputs))
    mask = b"" if call.mask is None else call.mask.tobytes()
    said = _said(call.timesteps, tuple(call.lengths.tolist()), mask, names)
    parts = [np.frombuffer(call.inputs[name].tobytes(), np.uint8)[None] for name in names]
    found: Array = _hashed(said, parts)[0]
    return found


@lru_cache(maxsize=256)
def _said(timesteps: int, lengths: tuple[int, ...], mask: bytes, names: tuple[str, ...]) -> int:
    """All but the numbers, as 64 bits."""
    said = hashlib.blake2b(repr((timesteps, lengths, names)).encode() + mask, digest_size=8)
    return int.from_bytes(said.digest(), "little")


def _hashed(said: int, parts: list[Array]) -> Array:
    """The digests of M chunks of which that is said, and whose numbers are the bytes of these parts, uint8 [M, bytes]
    each: uint8 [M, 24].
    """
    content = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    count, size = content.shape
    found = np.empty((count, 3), "<u8")
    found[:, 0] = said
    if size > _WORDS * _WORD_BYTES:
        sums = [hashlib.blake2b(row, digest_size=_SUM_BYTES).digest() for row in content]
        found[:, 1:] = np.frombuffer(b"".join(sums), "<u8").reshape(count, -1)
    else:
        if size % _WORD_BYTES:
            content = np.pad(content, ((0, 0), (0, -size % _WORD_BYTES)))
        words = content.view("<u4") if size else np.zeros((count, 0), "<u4")
        # Not matmul, which converts words one by one and takes twice as long.
        found[:, 1:] = np.einsum("nw,sw->ns", words.astype(np.uint64), _FACTORS[:, : words.shape[1]])
    return found.view(np.uint8)


def _factors() -> Array:
    """Two numbers for each word of a chunk, uint64 [2, words]: the first ones of SplitMix64, in pairs."""
    with np.errstate(over="ignore"):
        z = np.arange(1, 2 * _WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.ascontiguousarray((z ^ (z >> np.uint64(31))).reshape(_WORDS, 2).T)


_FACTORS = _factors()


def _format_1(alone: Compacted) -> bytes:
    """The digest that releases stored whose digests have 16 bytes."""
    hashed = hashlib.blake2b(repr((alone.timesteps, alone.lengths.tolist())).encode(), digest_size=_FORMAT_1_BYTES)
    if alone.mask is not None:
        hashed.update(alone.mask.tobytes())
    for name in sorted(alone.inputs):
        hashed.update(f"{name}:".encode())
        hashed.update(alone.inputs[name].tobytes())
    return hashed.digest()
