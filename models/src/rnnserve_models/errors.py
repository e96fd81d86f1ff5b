"""The errors of the numerics: every one of them is the caller's to mend, and says how."""

from __future__ import annotations


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
