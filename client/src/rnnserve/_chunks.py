"""What travels on lanes: chunks on their way out, columns on their way back. Plain data, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rnnserve import _trace
from rnnserve._notices import Notice
from rnnserve.codec import Array, encode_joined
from rnnserve.errors import GroupError, RequestError
from rnnserve.v1 import inference_pb2, session_pb2


@dataclass(slots=True)
class Columns:
    """A decoded result: outputs and states by name, a row of each for each lane."""

    outputs: dict[str, Array]
    states: dict[str, Array]


class Answer(NamedTuple):
    """What became of one wish: its ticket, and a value or an error.

    The value of an open is its Session message; of a chunk of one lane, (columns, row); of a chunk of several lanes,
    columns with a row for each; of a close or a barrier, None.
    """

    ticket: Any
    value: Any
    error: RequestError | None = None


#: What a server remembers of a session, unless told otherwise: so many answers, and bytes of them, but at least one.
#: No more may be asked of it at once, or an answer that is lost may be forgotten when it is asked for again.
REPLAY_CHUNKS = 16
REPLAY_WINDOW = 1 << 20


class Lane:
    """A session and its lane. It outlives the stream: after a loss the session is opened again on the same number.

    Attributes:
        next_step: the step at which the next chunk wished on it will start.
        known: whether that is so; if not, the server tells when the lane is opened.
        pending: what is wished on it and not answered, in order.
        active: how much of the server's memory the answers to what is on its way take, in bytes.
        window: how much they may take.
        backlog: chunks of it alone that wait until that is less, or None.
        request: how to open it; once it was, by the session's id.
        fresh: it was never open.
        tries: how often its open was sent.
        claim: what was to be made and why it was refused, if an earlier try may have made it.
        opening: an open is wished or sent; `open`: it is open on this stream.
        ready: chunks wished on it may leave at once: it is open, and none wished earlier is parked.
        closing: a close is wished or sent.
        notice: what the server told of the session last, or None.
    """

    __slots__ = (
        "active",
        "backlog",
        "claim",
        "close_ticket",
        "closing",
        "delete_session",
        "fresh",
        "generation",
        "known",
        "next_step",
        "notice",
        "number",
        "open",
        "open_ticket",
        "opening",
        "pending",
        "ready",
        "request",
        "tries",
        "window",
    )

    def __init__(self, number: int, request: inference_pb2.LaneOpen, open_ticket: Any, window: int) -> None:
        self.number = number
        self.window = window
        self.request = request
        self.open_ticket = open_ticket
        self.close_ticket: Any = None
        self.next_step = 0
        # Counts the failures. What was wished before one is answered with errors that tell nothing of the session.
        self.generation = 0
        self.pending: deque[Pending] = deque()
        self.known = self.open = self.opening = self.ready = self.closing = self.delete_session = False
        self.fresh = True
        self.notice: Notice | None = None
        self.tries = self.active = 0
        self.backlog: deque[Chunk] | None = None
        self.claim: tuple[session_pb2.SessionConfig, RequestError] | None = None


class Chunk:
    """A chunk for one lane or for several, a row of each input for each lane.

    `inputs` are [N, batch, time, ...] and `mask` is bool [N, batch, time], in C order, little-endian; the leading axis
    may be left out when N is 1. `key` is equal for chunks that may share a frame. `ticket` comes back in the answer,
    which has `reply_bytes` for each lane. `trace` is the span that it was made within.
    """

    __slots__ = (
        "first_steps",
        "inputs",
        "key",
        "lanes",
        "mask",
        "names",
        "nbytes",
        "number",
        "shapes",
        "ticket",
        "timesteps",
        "trace",
        "weight",
    )

    def __init__(
        self,
        names: tuple[str, ...],
        inputs: Sequence[Array],
        mask: Array | None,
        shapes: tuple[tuple[int, ...], ...],
        timesteps: int,
        key: Hashable,
        ticket: Any = None,
        reply_bytes: int = 0,
    ) -> None:
        self.names = names
        self.inputs = inputs
        self.mask = mask
        self.shapes = shapes  # of one row of each input
        self.timesteps = timesteps
        self.key = key
        self.ticket = ticket
        self.nbytes = sum([array.nbytes for array in inputs])
        self.lanes: list[Lane] = []
        self.first_steps: list[int] = []
        self.number = 0  # counts the wishes of a connection
        self.trace = _trace.traceparent() if _trace.active() else ""
        self.weight = max(reply_bytes, REPLAY_WINDOW // REPLAY_CHUNKS)  # of REPLAY_WINDOW

    def own(self) -> Chunk:
        """Copies the arrays, for a caller who may write to them before the chunk has left."""
        self.inputs = [array.copy() for array in self.inputs]
        return self

    def part(self, rows: list[tuple[int, Lane, int]]) -> Chunk:
        """These rows of it, each with its lane and first step: itself if they are all."""
        lanes, first_steps = [lane for _, lane, _ in rows], [step for _, _, step in rows]
        part = self
        if len(rows) != len(self.lanes):
            chosen = [row for row, _, _ in rows]
            inputs = [array[chosen] for array in self.inputs]
            mask = None if self.mask is None else self.mask[chosen]
            part = Chunk(self.names, inputs, mask, self.shapes, self.timesteps, self.key, self.ticket, self.weight)
            part.number, part.trace = self.number, self.trace
        part.lanes, part.first_steps = lanes, first_steps
        return part


class Gather:
    """Puts the rows of a chunk of several lanes together as they are answered."""

    __slots__ = ("columns", "errors", "left", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.left = size
        self.columns: Columns | None = None
        self.errors: dict[int, RequestError] = {}

    def put(self, columns: Columns, rows: list[int], sources: list[int]) -> None:
        """Takes rows `sources` of a result as rows `rows` of the whole."""
        self.left -= len(rows)
        answered = len(next(iter(columns.outputs.values()), ()))
        if len(rows) == answered == self.size and rows == sources == list(range(self.size)):
            self.columns = columns  # the whole frame, as it was asked: nothing to move
            return
        if self.columns is None:
            self.columns = Columns(
                {name: np.zeros((self.size, *a.shape[1:]), a.dtype) for name, a in columns.outputs.items()},
                {name: np.zeros((self.size, *a.shape[1:]), a.dtype) for name, a in columns.states.items()},
            )
        for whole, part in ((self.columns.outputs, columns.outputs), (self.columns.states, columns.states)):
            for name, array in part.items():
                whole[name][rows] = array[sources]

    def answer(self, ticket: Any) -> Answer:
        """The one answer, when nothing is left."""
        if not self.errors:
            return Answer(ticket, self.columns)
        index, first = next(iter(self.errors.items()))
        error = GroupError(f"{len(self.errors)} of {self.size} sessions failed; {index}: {first}", self.errors)
        error.partial = self.columns
        return Answer(ticket, self.columns, error)


class Pending(NamedTuple):
    """A row of a chunk that is not answered; with `chunk` None, a barrier."""

    first_step: int
    generation: int
    chunk: Chunk | None
    row: int
    gather: Gather | None
    ticket: Any


#: What an unanswered chunk takes beside its inputs, roughly: itself, its arrays' headers and whoever waits for it.
OVERHEAD = 1024


def left_over(lanes: Iterable[Lane], only: Container[int] | None = None) -> list[Chunk]:
    """The chunks that are not answered, each with the rows that are not, in the order of the wishes; by number, if
    told so."""
    rows: dict[Chunk, list[tuple[int, Lane, int]]] = {}
    for lane in lanes:
        for pending in lane.pending:
            if pending.chunk is not None and (only is None or pending.chunk.number in only):
                rows.setdefault(pending.chunk, []).append((pending.row, lane, pending.first_step))
    parts = [chunk.part(sorted(left, key=lambda row: row[0])) for chunk, left in rows.items()]
    return sorted(parts, key=lambda chunk: chunk.number)


def write_frame(frame: inference_pb2.StepFrame, chunks: list[Chunk]) -> None:
    """Puts chunks of one key into one frame, a row of each column for each lane."""
    if len(chunks) == 1:
        frame.lanes.extend([lane.number for lane in chunks[0].lanes])
        frame.first_steps.extend(chunks[0].first_steps)
    else:
        frame.lanes.extend([lane.number for chunk in chunks for lane in chunk.lanes])
        frame.first_steps.extend([step for chunk in chunks for step in chunk.first_steps])
    if _trace.active():
        frame.traceparent = next((chunk.trace for chunk in chunks if chunk.trace), "")
    count = len(frame.lanes)
    first = chunks[0]
    for index, name in enumerate(first.names):
        named = frame.inputs.add(name=name)
        encode_joined(named.tensor, [chunk.inputs[index] for chunk in chunks], (count, *first.shapes[index]))
    if first.mask is not None:
        masks = [chunk.mask for chunk in chunks if chunk.mask is not None]
        encode_joined(frame.mask, masks, (count, *first.shapes[0][:2]))
