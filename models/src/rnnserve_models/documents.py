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
# What PyYAML raises of its own for a number, date or truth value that is none, such as ``!!bool x``.
_ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class DocumentError(ValueError):
    """A file is no such document: the message says why, and not of which file."""


def read_yaml(path: Path, *, most: int = MAX_BYTES) -> Any:
    """What a YAML file says: mappings, lists, texts, numbers, dates, truth values and None.

    Args:
        path: the file.
        most: bytes that it may have. What its aliases unfold to may have twice as many parts and characters.

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
    _check(document, 2 * most)
    return document


def _check(document: Any, most: int) -> None:
    """Refuses what cannot be shown or walked over within bounds."""
    left = most
    waiting = [(document, 1)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1 + (len(value) if isinstance(value, str | bytes) else 0)
        if left < 0:
            raise DocumentError(f"unfolds by its aliases to more than {most} characters and parts")
        if isinstance(value, dict | list | tuple | set):
            if depth > MAX_DEPTH:
                raise _too_deep()
            parts = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
            waiting += [(part, depth + 1) for part in parts]
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise DocumentError(f"has a whole number of {value.bit_length()} bits; expected at most {_MAX_BITS}")


def _too_deep() -> DocumentError:
    return DocumentError(f"has more than {MAX_DEPTH} lists and mappings inside one another")
