"""What models have done, for the statistics of the Open Inference Protocol: runs of the engine, and requests.

Requests tell their own times; runs are told by the workers, a few microseconds for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rnnserve_models.load import LoadedModel
from rnnserve_server.blocks import Block

Key = tuple[str, str, str]


@dataclass(slots=True)
class Took:
    """Times that were taken.

    Attributes:
        count: how many.
        seconds: in all.
    """

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Takes one more."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class ModelTally:
    """What one version of a model has done.

    Attributes:
        success: requests that were answered, from reading to answering.
        fail: requests that failed, likewise.
        queue: until a request's turn came.
        compute_input: decoding a request.
        compute_infer: in the engine.
        compute_output: from the engine to the encoded answer.
        rows: of the requests that were run.
        last: when the last request was answered, in seconds since the epoch.
        runs: of the engine, by their rows.
    """

    success: Took = field(default_factory=Took)
    fail: Took = field(default_factory=Took)
    queue: Took = field(default_factory=Took)
    compute_input: Took = field(default_factory=Took)
    compute_infer: Took = field(default_factory=Took)
    compute_output: Took = field(default_factory=Took)
    rows: int = 0
    last: float = 0.0
    runs: dict[int, Took] = field(default_factory=dict)


class Metered(Protocol):
    """A sink that wants to know of the runs that its chunk has part in."""

    def ran(self, started: float, ended: float, rows: int) -> None:
        """The engine ran, from when to when, with so many rows in all."""


class Meter:
    """The tallies of all models.

    Attributes:
        waiting: the metered sinks that wait for an answer: what runs is looked through only if there are any.
    """

    def __init__(self) -> None:
        self.waiting: set[object] = set()
        self._tallies: dict[Key, ModelTally] = {}

    def of(self, model: LoadedModel) -> ModelTally:
        """The tally of a version."""
        key = (model.name, model.version, model.digest)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = ModelTally()
        return tally

    def ran(self, model: LoadedModel, blocks: Sequence[Block], started: float, ended: float) -> None:
        """The engine ran blocks of a model, from when to when."""
        runs, rows = self.of(model).runs, sum([block.rows for block in blocks])
        if rows not in runs:
            runs[rows] = Took()
        runs[rows].add(ended - started)
        waiting = self.waiting
        if not waiting:
            return
        for block in blocks:
            for each in block.pieces:
                for sink, _ in each.sinks:
                    if sink in waiting:
                        sink.ran(started, ended, rows)  # type: ignore[attr-defined]
