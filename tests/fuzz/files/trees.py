"""Documents of JSON and YAML with some of their parts changed."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        3,
        64,
        127,
        2**16,
        2**24 + 1,
        2**31 - 1,
        2**31,
        2**32,
        2**53,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
    ),
    *(-(2**31), -(2**63), -(10**30), 0.5, -0.0, 1e-320, 1e38, 1e308, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", "\0", ".", "..", "../../x", "/etc/passwd", "a/../../b", "C:\\x", "\ud800", "é" * 40, "x" * 300, "x" * 5000),
    *("%n%s", "{}", "nan", "-1", "None", "__import__('os').system('id')", "<script>", "a\nb", "٣"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": None}, [None], {"class_name": "LSTM"})

Path = tuple[Any, ...]

_DEEP = 100


def changed(document: Any, chance: Random, words: tuple[str, ...] = ()) -> Any:
    """A copy of a document with one to four of its parts replaced, left out, doubled, moved, wrapped or renamed.

    Args:
        document: lists, dicts and leaves.
        chance: what to change.
        words: that mean something where the document is read.
    """
    whole = [copy.deepcopy(document)]  # so that the root may be replaced, too
    for _ in range(chance.choice((1, 1, 1, 2, 2, 4))):
        if max(map(len, places(whole))) > _DEEP:  # of what is deeper by as much again Python could not make a copy
            break
        _change(whole, chance, words)
    return whole[0]


def hostile(chance: Random, words: tuple[str, ...] = ()) -> Any:
    """A leaf, or a small tree, that nobody expects."""
    kinds: tuple[tuple[Any, ...], ...] = (NUMBERS, TEXTS, OTHERS, words or TEXTS)
    return copy.deepcopy(chance.choice(chance.choice(kinds)))


def nested(leaf: Any, depth: int, chance: Random) -> Any:
    """A leaf inside so many lists, mappings and layers."""
    wrap = chance.choice(
        (
            lambda inner: [inner],
            lambda inner: {"a": inner},
            lambda inner: {"class_name": "TimeDistributed", "config": {"layer": inner}},
            lambda inner: {"class_name": "Sequential", "config": {"layers": [inner]}},
        )
    )
    for _ in range(depth):
        leaf = wrap(leaf)
    return leaf


def places(document: Any) -> list[Path]:
    """The ways to all parts of a document but its root."""
    found: list[Path] = []
    waiting: list[tuple[Path, Any]] = [((), document)]
    while waiting:
        way, value = waiting.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, each in items:
            found.append((*way, key))
            waiting.append(((*way, key), each))
    return found


def _change(whole: list[Any], chance: Random, words: tuple[str, ...]) -> None:
    ways = places(whole)
    way = chance.choice(ways)
    *outer, key = way
    holder: Any = whole
    for step in outer:
        holder = holder[step]
    value = holder[key]
    kind = chance.randrange(10)
    if kind < 4:
        holder[key] = _near(value, chance) if chance.random() < 0.5 else hostile(chance, words)
    elif kind == 4 and holder is not whole:
        del holder[key]
    elif kind == 5 and isinstance(holder, list) and holder is not whole:
        holder[key:key] = [copy.deepcopy(value) for _ in range(chance.choice((1, 1, 3, 40)))]
    elif kind == 6:
        other: Any = whole
        for step in chance.choice(ways):
            other = other[step]
        holder[key] = copy.deepcopy(other)
    elif kind == 7:
        holder[key] = nested(value, chance.choice((1, 1, 2, 20, 200)), chance)
    elif kind == 8 and isinstance(holder, dict):
        holder[str(hostile(chance, words))] = holder.pop(key)
    elif isinstance(value, dict):
        value[str(hostile(chance, words))] = hostile(chance, words)
    else:
        holder[key] = hostile(chance, words)


def _near(value: Any, chance: Random) -> Any:
    """Something like a value, and not it."""
    if isinstance(value, bool):
        return chance.choice((not value, int(value), str(value)))
    if isinstance(value, int | float):
        return chance.choice(
            (value + 1, value - 1, -value, value * 1000, value * 2**40, float(value), str(value), [value])
        )
    if isinstance(value, str):
        return chance.choice((value[:-1], value * 2, value.upper(), [value], f"{value}\0", f"../{value}"))
    return hostile(chance)
