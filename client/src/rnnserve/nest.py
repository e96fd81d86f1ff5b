"""States as Keras nests them, and states by name as the contract has them.

`StateSpec.path` is a state's place: (1,) is the second state of a layer of one cell, (0, 1) the second state of the
first of several cells. So an LSTM's states are [h, c], and those of an LSTM cell over a GRU cell [[h, c], [h]].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rnnserve.errors import InvalidInput
from rnnserve.models import StateSpec

#: A leaf, or a list of nests.
Nest = Any


def pack(specs: Sequence[StateSpec], leaf: Callable[[StateSpec], Any]) -> list[Nest]:
    """The nest that has `leaf(spec)` at the place of each state."""
    return [_pack(node, leaf) for node in _tree(specs)]


def flatten(specs: Sequence[StateSpec], nest: Nest, field: str = "initial_state") -> dict[str, Any]:
    """The leaves of a nest by the names of the states.

    The nest is Keras's (lists or tuples), or a mapping from every state's name to its value. A layer or a cell that
    has one state may have it bare instead of in a list, as Keras 3 allows.

    Raises:
        InvalidInput: the nest has another structure; the message shows the right one.
    """
    if isinstance(nest, Mapping):
        names = {spec.name for spec in specs}
        if set(nest) != names:
            raise InvalidInput.of(field, f"the states {sorted(names)}", str(sorted(map(str, nest))))
        return {spec.name: nest[spec.name] for spec in specs}
    tree = _tree(specs)
    found: dict[str, Any] = {}
    if not _match(tree, nest, found):
        raise InvalidInput.of(field, f"the nesting {_outline(tree)}", _describe(nest))
    return {spec.name: found[spec.name] for spec in specs}


def outline(specs: Sequence[StateSpec]) -> str:
    """The nesting in words, such as `[h, c]`."""
    return _outline(_tree(specs))


def _tree(specs: Sequence[StateSpec]) -> list[Any]:
    """Specs in lists, nested by path. A spec without a path stands at the end."""
    root: dict[int, Any] = {}
    for spec in specs:
        path = spec.path or (len(root),)
        node = root
        for index in path[:-1]:
            node = node.setdefault(index, {})
        node[path[-1]] = spec
    return _lists(root)


def _lists(node: dict[int, Any]) -> list[Any]:
    return [_lists(child) if isinstance(child, dict) else child for _, child in sorted(node.items())]


def _pack(node: Any, leaf: Callable[[StateSpec], Any]) -> Nest:
    return [_pack(child, leaf) for child in node] if isinstance(node, list) else leaf(node)


def _match(node: Any, nest: Nest, found: dict[str, Any]) -> bool:
    if not isinstance(node, list):
        # A list here may be the array itself, written out; its shape is checked later.
        found[node.name] = nest
        return True
    if isinstance(nest, (list, tuple)) and len(nest) == len(node):
        return all(_match(child, part, found) for child, part in zip(node, nest, strict=True))
    if len(node) == 1 and not isinstance(nest, (list, tuple)):
        return _match(node[0], nest, found)
    return False


def _outline(node: Any) -> str:
    return f"[{', '.join(map(_outline, node))}]" if isinstance(node, list) else str(node.name)


def _describe(nest: Nest) -> str:
    if isinstance(nest, (list, tuple)):
        return f"[{', '.join(map(_describe, nest))}]" if len(nest) <= 8 else f"a list of {len(nest)}"
    shape = getattr(nest, "shape", None)
    return type(nest).__name__ if shape is None else f"{type(nest).__name__}{list(shape)}"
