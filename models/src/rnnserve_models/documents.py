"""YAML files that people write, read as plain data within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
"""Of a file, unless told."""

MAX_DEPTH = 32
"""Of lists and mappings inside one another."""

_MAX_BITS = 64
_HOLDERS = (dict, list, tuple, set)
# What PyYAML raises of its own for a number, date or truth value that is none, such as ``!!bool x``.
_ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class DocumentError(ValueError):
    """A file is no such document: the message says why, and not of which file."""


def read_yaml(path: Path, *, most: int = MAX_BYTES) -> Any:
    """What a YAML file says: mappings, lists, texts, numbers, dates, truth values and None.

    Args:
        path: the file.
        most: bytes that it may have, and parts and characters that it may unfold to by its aliases.

    Raises:
        DocumentError: it cannot be read, is not YAML, is too large or too deep, unfolds to too much, or has a whole
            number of more than 64 bits.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"cannot be read: {error}") from error
    if len(content) > most:
        raise DocumentError(f"is larger than {most} bytes, which is the most that is read")
    try:
        document = yaml.safe_load(text)
    except RecursionError as error:
        raise _too_deep() from error
    except (yaml.YAMLError, *_ODD) as error:
        raise DocumentError(f"is not YAML: {error}") from error
    _check(document, most)
    return document


def _check(document: Any, most: int) -> None:
    """Refuses what cannot be shown or walked over within bounds. Looks at what aliases name once only."""
    seen: dict[int, tuple[int, int]] = {}  # of a list or mapping: parts and characters, and how deep it is
    unfinished: set[int] = set()
    waiting = [(document, False)]
    while waiting:
        value, finished = waiting.pop()
        if not isinstance(value, _HOLDERS) or id(value) in seen:
            continue
        parts = [part for pair in value.items() for part in pair] if isinstance(value, dict) else list(value)
        if not finished:
            if id(value) in unfinished:  # it is in itself
                raise _too_deep()
            unfinished.add(id(value))
            waiting.append((value, True))
            waiting += [(part, False) for part in parts]
            continue
        unfinished.remove(id(value))
        inner = [seen[id(part)] if isinstance(part, _HOLDERS) else (_size(part), 0) for part in parts]
        seen[id(value)] = sizes = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        if sizes[0] > most:
            raise DocumentError(f"unfolds by its aliases to more than {most} characters and parts")
        if sizes[1] > MAX_DEPTH:
            raise _too_deep()


def _size(leaf: Any) -> int:
    if isinstance(leaf, int) and leaf.bit_length() > _MAX_BITS:
        raise DocumentError(f"has a whole number of {leaf.bit_length()} bits; expected at most {_MAX_BITS}")
    return 1 + (len(leaf) if isinstance(leaf, str | bytes) else 0)


def _too_deep() -> DocumentError:
    return DocumentError(f"has more than {MAX_DEPTH} lists and mappings inside one another")
