"""The errors of the numerics: every one of them is the caller's to mend, and says how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ModelError(ValueError):
    """A model's description, weights or graph is not a model: the message names the file or tensor."""


class InputError(ValueError):
    """A tensor that was passed does not fit the model.

    Attributes:
        field: the tensor, such as ``inputs.audio``, ``mask`` or ``initial_states.h``.
        expected: what would fit.
        got: what came.
    """

    def __init__(self, field: str, expected: str, got: str, hint: str = "") -> None:
        self.field = field
        self.expected = expected
        self.got = got
        super().__init__(f"{field}: expected {expected}, got {got}" + (f"; {hint}" if hint else ""))


UNKNOWN = "is damaged, or of a kind that is not known"
"""What `reading` says of a file that makes a reader fail in a way that nobody has foreseen."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a reader, or a library below it, raises for a file of others comes out as a ModelError.

    Errors of this house, and those of the file system, say enough of themselves and go on as they are.

    Raises:
        ModelError: something else was raised; the message names ``what`` was read.
    """
    try:
        yield
    except (ModelError, InputError, OSError):
        raise
    except MemoryError as error:
        raise ModelError(f"{what}: takes more memory than there is") from error
    except Exception as error:
        raise ModelError(f"{what}: {UNKNOWN}: {type(error).__name__}: {error!s:.500}") from error
