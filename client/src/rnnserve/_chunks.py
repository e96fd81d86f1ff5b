"""What travels on lanes: chunks on their way out, columns on their way back. Plain data, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from sys import modules
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np

from rnnserve import _trace
from rnnserve._notices import Notice
from rnnserve.codec import Array, encode_joined
from rnnserve.errors import GroupError, RequestError
from rnnserve.v1 import inference_pb2, session_pb2

if TYPE_CHECKING:
    from rnnserve._lanes import Lanes
    from rnnserve._lanes.pace import Pace


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


#: An Answer of a tuple of its fields, in a third of the time.
new_answer = cast("Callable[[tuple[Any, Any, RequestError | None]], Answer]", partial(tuple.__new__, Answer))

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
        holder: the `Lanes` that has it.
        asked: a call that is not of the stream was made for its session since it was opened.
        claim: what was to be made and why it was refused, if an earlier try may have made it.
        opening: an open is wished or sent; `open`: it is open on this stream.
        ready: chunks wished on it may leave at once: it is open, and none wished earlier is parked.
        closing: a close is wished or sent.
        ghost: what is left, until it is closed, of a lane that went elsewhere.
        notice: what the server told of the session last, or None.
        pace: of its last paced chunk, or None.
        heard_at: when that was answered last, by the clock of `pace`.
        prompt: the last one was wished soon after the answer to the one before.
        turn: of `pace`, when the lane was awaited; -1 if it is not.
        frame: of `pace`, that its last paced chunk left with.
    """

    __slots__ = (
        "active",
        "asked",
        "backlog",
        "claim",
        "close_ticket",
        "closing",
        "delete_session",
        "frame",
        "fresh",
        "generation",
        "ghost",
        "heard_at",
        "holder",
        "known",
        "next_step",
        "notice",
        "number",
        "open",
        "open_ticket",
        "opening",
        "pace",
        "pending",
        "prompt",
        "ready",
        "request",
        "tries",
        "turn",
        "window",
    )

    def __init__(
        self, number: int, request: inference_pb2.LaneOpen, open_ticket: Any, window: int, holder: Lanes
    ) -> None:
        self.number = number
        self.holder = holder
        self.window = window
        self.request = request
        self.open_ticket = open_ticket
        self.close_ticket: Any = None
        self.next_step = 0
        # Counts the failures. What was wished before one is answered with errors that tell nothing of the session.
        self.generation = 0
        self.pending: deque[Pending] = deque()
        self.known = self.open = self.opening = self.ready = self.closing = self.delete_session = False
        self.asked = self.ghost = False
        self.fresh = True
        self.notice: Notice | None = None
        self.tries = self.active = 0
        self.backlog: deque[Chunk] | None = None
        self.claim: tuple[session_pb2.SessionConfig, RequestError] | None = None
        self.pace: Pace | None = None
        self.heard_at = 0.0
        self.prompt = False
        self.turn = self.frame = -1


class Form:
    """What chunks of one kind have in common.

    Attributes:
        names: of the inputs.
        shapes: of one row of each input, [batch, time, ...].
        timesteps: of a chunk.
        key: equal for chunks that may share a frame.
        weight: bytes of `REPLAY_WINDOW` that the answer to one row takes.
        paced: such chunks may wait for one another, see `Pace`.
    """

    __slots__ = ("key", "names", "paced", "shapes", "timesteps", "weight")

    def __init__(
        self,
        names: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        timesteps: int,
        key: Hashable,
        reply_bytes: int = 0,
        *,
        paced: bool = False,
    ) -> None:
        self.names = names
        self.shapes = shapes
        self.timesteps = timesteps
        self.key = key
        self.weight = max(reply_bytes, REPLAY_WINDOW // REPLAY_CHUNKS)
        self.paced = paced


class Chunk:
    """A chunk for one lane or for several, a row of each input for each lane.

    `inputs` are [N, batch, time, ...] and `mask` is bool [N, batch, time], in C order, little-endian; the leading axis
    may be left out when N is 1. `ticket` comes back in the answer. `trace` is the span that it was made within.
    """

    __slots__ = ("first_steps", "form", "inputs", "lanes", "mask", "nbytes", "number", "ticket", "trace")

    lanes: Sequence[Lane]
    first_steps: Sequence[int]

    def __init__(self, form: Form, inputs: Sequence[Array], mask: Array | None = None, ticket: Any = None) -> None:
        self.form = form
        self.inputs = inputs
        self.mask = mask
        self.ticket = ticket
        self.nbytes = inputs[0].nbytes if len(inputs) == 1 else sum([array.nbytes for array in inputs])
        self.lanes = self.first_steps = ()
        self.number = 0  # counts the wishes of a connection
        self.trace = _trace.traceparent() if _trace.MODULE in modules else ""

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
            part = Chunk(self.form, inputs, mask, self.ticket)
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


#: A Pending of a tuple of its fields, in a third of the time.
_Fields: TypeAlias = "tuple[int, int, Chunk | None, int, Gather | None, Any]"
new_pending = cast("Callable[[_Fields], Pending]", partial(tuple.__new__, Pending))

#: What an unanswered chunk takes beside its inputs, roughly: itself, its arrays' headers and whoever waits for it.
OVERHEAD = 1024


def left_over(lanes: Iterable[Lane], only: Container[tuple[int, Lane]] | None = None) -> list[Chunk]:
    """The chunks that are not answered, each with the rows that are not, in the order of the wishes; only those of a
    number and a lane, if told so."""
    rows: dict[Chunk, list[tuple[int, Lane, int]]] = {}
    for lane in lanes:
        for pending in lane.pending:
            if pending.chunk is not None and (only is None or (pending.chunk.number, lane) in only):
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
    form = chunks[0].form
    for index, name in enumerate(form.names):
        named = frame.inputs.add(name=name)
        encode_joined(named.tensor, [chunk.inputs[index] for chunk in chunks], (count, *form.shapes[index]))
    if chunks[0].mask is not None:
        masks = [chunk.mask for chunk in chunks if chunk.mask is not None]
        encode_joined(frame.mask, masks, (count, *form.shapes[0][:2]))
