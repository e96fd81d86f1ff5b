"""What tells a chunk from another one for the same step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rnnserve_models.masking import Compacted, compact
from rnnserve_server.digests import digest, digests, is_digest


def call_of(name: str, steps: int = 5) -> Compacted:
    """Three chunks of two rows each, of a kind."""
    rng = np.random.default_rng(3)
    shape = (1 if name == "one step" else steps, 6)
    x = rng.normal(size=(*shape, 3)).astype(np.float32)
    inputs = {"input": x}
    if name == "inputs":
        inputs = {"input": x, "more": x[..., 0] * 2}
    elif name == "bytes":
        inputs = {"input": rng.integers(0, 2, (*shape, 3)).astype(bool)}
    elif name == "large":
        inputs = {"input": rng.normal(size=(*shape, 1000)).astype(np.float64)}
    elif name == "nothing":
        inputs = {"input": x[..., :0]}
    mask = rng.random(shape) < 0.5 if name == "masked" else None
    return compact(inputs, mask, go_backwards=False)


@pytest.mark.parametrize("name", ["one step", "steps", "masked", "inputs", "bytes", "large"])
def test_the_digests_are_the_digest_of_each(name: str) -> None:
    """All at once they are what a chunk that is sent again is compared with, in whatever company it was."""
    call = call_of(name)
    found = [each.tobytes() for each in digests(call, 3)[0]]
    assert found == [digest(call, position, 3) for position in range(3)]
    assert len(set(found)) == 3
    for position, each in enumerate(found):
        alone = call.take(np.array([position]), 3)
        assert digest(alone, 0, 1) == digests(alone, 1)[0, 0].tobytes() == each
        assert [is_digest(each, call, other, 3) for other in range(3)] == [other == position for other in range(3)]


@pytest.mark.parametrize("name", ["steps", "inputs", "bytes", "large"])
def test_the_digests_of_pieces_are_those_of_chunks_that_were_taken_along(name: str) -> None:
    """Chunks that follow one another are hashed together, and are told apart as if each had come alone."""
    call = call_of(name, steps=6)
    found = digests(call, 3, 3)
    for piece in range(3):
        inputs = {each: x[2 * piece : 2 * piece + 2] for each, x in call.inputs.items()}
        alone = compact(inputs, None, go_backwards=False)
        assert found[piece].tobytes() == digests(alone, 3)[0].tobytes()


def test_a_digest_tells_chunks_apart() -> None:
    """Equal chunks have equal digests wherever they stand in a block; other numbers, lengths, masks or names have
    others.
    """
    x = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    x[:, 1] = x[:, 0]
    mask = np.array([[1, 1], [1, 1], [1, 0]], bool)
    other_mask = np.array([[1, 1], [1, 0], [1, 1]], bool)
    plain, masked, otherwise = (compact({"x": x}, each, go_backwards=False) for each in (None, mask, other_mask))
    shorter, elsewhere = (compact(each, None, go_backwards=False) for each in ({"x": x[:2]}, {"z": x}))
    assert digest(plain, 0, 2) == digest(plain, 1, 2)
    assert digest(masked, 0, 2) == digest(plain, 0, 2)  # alone, a mask that masks nothing is none
    others = {digest(masked, 1, 2), digest(otherwise, 1, 2), digest(shorter, 0, 2), digest(elsewhere, 0, 2)}
    assert len(others | {digest(plain, 0, 2)}) == 5


def test_every_bit_of_a_chunk_counts() -> None:
    """One bit, a bit in two numbers at once (signs above all), and numbers that change places make other digests."""
    x = np.random.default_rng(5).normal(size=(2, 1, 8)).astype(np.float32)
    bits = x.view(np.uint32).reshape(-1)
    changed = [bits.copy() for _ in range(bits.size * 32)]
    for index, each in enumerate(changed):
        each[index // 32] ^= np.uint32(1 << index % 32)
    pairs = [(i, j, bit) for i in range(bits.size) for j in range(i) for bit in (0, 23, 30, 31)]
    for i, j, bit in pairs:
        changed.append(bits.copy())
        changed[-1][[i, j]] ^= np.uint32(1 << bit)
        changed.append(bits.copy())
        changed[-1][[i, j]] = bits[[j, i]]
    columns = np.stack([bits, *changed]).reshape(-1, 2, 8).swapaxes(0, 1).view(np.float32)  # [T, N, features]
    found = digests(compact({"x": columns}, None, go_backwards=False), columns.shape[1])[0]
    assert len({each.tobytes() for each in found}) == len(np.unique(np.stack([bits, *changed]), axis=0))


def test_a_chunk_without_numbers_has_a_digest() -> None:
    """Of its length."""
    none, longer = call_of("nothing"), call_of("nothing", steps=6)
    assert digest(none, 0, 3) == digests(none, 3)[0, 2].tobytes() != digest(longer, 0, 3)


def test_what_is_stored_stays_readable() -> None:
    """Digests that were stored by this release, whatever becomes of the code, and by the one with 16 bytes."""
    x = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    call = compact({"x": x}, np.array([[1, 1], [1, 1], [1, 0]], bool), go_backwards=False)
    stored = {
        "3eca7c5bd0dea0c1000030cfd80debb60000e08f749ded0b": 0,
        "d40a606aeac8a47e0000e0ccd3cb3d57000000ff71b34adb": 1,
        "69169a434064cc5d5e62791f4d9411d2": 0,
        "fc6e61c8e6ae5b76caa50e2605f9cc34": 1,
    }
    other = replace(call, inputs={"x": x + 1})
    for known, position in stored.items():
        assert is_digest(bytes.fromhex(known), call, position, 2)
        assert not is_digest(bytes.fromhex(known), call, 1 - position, 2)
        assert not is_digest(bytes.fromhex(known), other, position, 2)
