"""One stream: its lanes, what was asked on them, and what is ready to be sent back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

import grpc
import numpy as np

from rnnserve.codec import TensorError, decode, decode_named, encode_into
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import session_pb2
from rnnserve_models.engine.base import Array, Arrays
from rnnserve_server.api.errors import service_error, status
from rnnserve_server.api.messages import create_sessions, session_message
from rnnserve_server.blocks import Block
from rnnserve_server.core import Core
from rnnserve_server.errors import (
    Draining,
    InvalidInput,
    InvalidRequest,
    LaneOpen,
    LaneRepeated,
    LaneUnknown,
    ServiceError,
    TooLarge,
)
from rnnserve_server.layout import to_wire
from rnnserve_server.sessions import Group

_RESPONSE_BYTES = 1 << 20  # a response is sent once it is so large, although more is ready
_TAKEN_AT_ONCE = 64  # opens or closes of a stream that are done in one turn of the event loop
_QUIET_SECONDS = 0.1  # a stream that says nothing for so long while the server drains has said all


Item = TypeVar("Item")


class LaneStream:
    """A bidirectional stream of frames. It is the sink of its own blocks.

    Lanes index columns, so that a frame of N lanes finds its sessions by array operations.
    """

    def __init__(self, core: Core, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.cancelled = False
        self.deadline: float | None = None
        self._core = core
        self._context = context
        self._groups: dict[int, Group] = {}
        self._group_lanes: Counter[int] = Counter()  # lanes in each of _groups
        self._group = np.full(64, -1)  # [capacity], the index of the lane's group in _groups; -1: not open
        self._slot = np.zeros(64, np.int64)
        self._generation = np.zeros(64, np.int64)
        self._ids = [""] * 64  # [capacity]
        self._responses: list[pb.StreamResponse] = []
        self._response_bytes = 0
        self._unsent = 0  # answers that wait to be sent: of chunks, opens and closes
        self._unanswered = 0  # chunks and closes that were accepted and not answered
        self._received = 0
        self._partway = False  # a message was taken in part
        self._ready = asyncio.Event()  # there is something to send, or nothing more will come
        self._room = asyncio.Event()
        self._reading = True

    async def run(self) -> None:
        """Reads, runs and answers until the client has said all and was answered.

        Raises:
            ServiceError: the stream itself is to blame, or the server is shutting down.
        """
        reader = asyncio.create_task(self._read())
        reader.add_done_callback(self._read_all)
        drainer = asyncio.create_task(self._drain(reader))
        try:
            while self._reading or self._unanswered or self._responses:
                await self._ready.wait()
                self._ready.clear()
                await self._send()
            if not reader.cancelled():
                await reader
            elif self._core.draining.is_set():
                raise Draining("the server is shutting down; go on elsewhere", retry_after=1.0)
        finally:
            self.cancelled = True
            reader.cancel()
            drainer.cancel()

    # Reading

    async def _read(self) -> None:
        while (request := await self._context.read()) is not grpc.aio.EOF:
            self._received += 1
            await self._receive(request)
            await self._core.wait_for_room()
            while self._unanswered + self._unsent > self._core.settings.stream_queue_chunks:
                self._room.clear()
                await self._room.wait()

    def _read_all(self, reader: asyncio.Task[None]) -> None:
        self._reading = False
        self._ready.set()

    async def _drain(self, reader: asyncio.Task[None]) -> None:
        """Once the server drains: lets the client say what it was saying, then stops listening."""
        await self._core.draining.wait()
        heard = -1
        while heard != self._received or self._partway:
            heard = self._received
            await asyncio.sleep(_QUIET_SECONDS)
        reader.cancel()

    async def _receive(self, request: pb.StreamRequest) -> None:
        if request.opens:
            async for openings in self._turns(request.opens):
                for alike in _alike(openings):
                    self._open(alike)
        for frame in request.frames:
            self._frame(frame)
        if request.closes:
            async for closings in self._turns(request.closes):
                self._close(closings)

    async def _turns(self, items: Sequence[Item]) -> AsyncIterator[Sequence[Item]]:
        """A few of a message's items at a time; between them other streams have their turns."""
        for start in range(0, len(items), _TAKEN_AT_ONCE):
            if start:
                self._partway = True
                await asyncio.sleep(0)
                self._partway = False
            yield items[start : start + _TAKEN_AT_ONCE]

    def _open(self, alike: Sequence[pb.LaneOpen]) -> None:
        """Opens lanes that want the same: new sessions of one config, or there is only one."""
        lanes = []
        for opening in alike:
            lane = opening.lane
            if lane >= self._core.settings.max_lanes:
                self._fail_opens([lane], TooLarge("lane", self._core.settings.max_lanes - 1, lane))
            elif self._is_open(lane):
                self._fail_opens([lane], LaneOpen(lane))
            else:
                lanes.append(lane)
        if not lanes:
            return
        opening, full = alike[0], None
        try:
            if opening.WhichOneof("target") is None:
                raise InvalidRequest("target", "create or session_id", "neither")
            if opening.HasField("create"):
                group, slots, full = create_sessions(self._core, opening.create, len(lanes))
            else:
                session = self._core.sessions.get(opening.session_id)
                group, slots = session.group, np.array([session.slot])
        except (ServiceError, TensorError) as error:
            self._fail_opens(lanes, service_error(error))
            return
        if len(slots):
            self._opened(lanes[: len(slots)], group, slots)
        if full is not None:
            self._fail_opens(lanes[len(slots) :], full)

    def _opened(self, lanes: Sequence[int], group: Group, slots: Array) -> None:
        """Puts N sessions that differ by their ids alone on N lanes, and says so."""
        number = next((number for number, other in self._groups.items() if other is group), None)
        if number is None:
            number = next(number for number in count() if number not in self._groups)
            self._groups[number] = group
        self._group_lanes[number] += len(lanes)
        self._make_room(max(lanes))
        self._group[lanes] = number
        self._slot[lanes] = slots
        self._generation[lanes] = group.generation[slots]
        opened = pb.LaneOpened(session=session_message(self._core.sessions.at(group, int(slots[0]))))
        session, response = opened.session, self._response(len(lanes), len(lanes) * opened.ByteSize())
        for lane, slot in zip(lanes, slots.tolist(), strict=True):
            opened.lane = lane
            session.session_id = self._ids[lane] = group.ids[slot]
            response.opened.append(opened)  # a copy

    def _make_room(self, lane: int) -> None:
        """Makes the columns of lanes reach to a lane."""
        while lane >= len(self._group):
            missing = (0, len(self._group))
            self._group = np.pad(self._group, missing, constant_values=-1)
            self._slot = np.pad(self._slot, missing)
            self._generation = np.pad(self._generation, missing)
            self._ids += [""] * missing[1]

    def _is_open(self, lane: int) -> bool:
        return lane < len(self._group) and bool(self._group[lane] >= 0)

    def _session(self, lane: int) -> tuple[str, int, int]:
        """What tells the session on a lane from others that were there, or will be."""
        return self._ids[lane], int(self._slot[lane]), int(self._generation[lane])

    def _close(self, closings: Sequence[pb.LaneClose]) -> None:
        lanes = [closing.lane for closing in closings]
        if (slots := self._idle(lanes)) is not None and all(closing.delete_session for closing in closings):
            group = self._groups[int(self._group[lanes[0]])]
            self._vacate(lanes)
            self._core.sessions.delete_many(group, slots)
            closed = self._response(len(lanes)).closed
            for lane in lanes:
                closed.add(lane=lane)
            return
        for closing in closings:
            self._close_one(closing.lane, closing.delete_session)

    def _idle(self, lanes: list[int]) -> Array | None:
        """The slots of N lanes' sessions, if these are different live ones of one group for which nothing is queued."""
        if (
            max(lanes) >= len(self._group)
            or self._group[lanes[0]] < 0
            or (self._group[lanes] != self._group[lanes[0]]).any()
        ):
            return None
        group, slots = self._groups[int(self._group[lanes[0]])], self._slot[lanes]  # [N]
        live = (group.generation[slots] == self._generation[lanes]) & (group.tail[slots] < 0)
        return slots if live.all() and len(set(slots.tolist())) == len(slots) else None

    def _close_one(self, lane: int, delete: bool) -> None:
        if not self._is_open(lane):
            self._fail(lane, pb.LANE_OPERATION_CLOSE, LaneUnknown(lane))
            return
        group, slot = self._groups[int(self._group[lane])], int(self._slot[lane])
        session = self._session(lane)

        def close() -> None:
            self._unanswered -= 1
            if self._session(lane) != session:  # closed twice
                self._fail(lane, pb.LANE_OPERATION_CLOSE, LaneUnknown(lane))
                return
            self._vacate([lane])
            try:
                if delete:
                    self._core.sessions.delete(session[0])
            except ServiceError as error:
                self._fail(lane, pb.LANE_OPERATION_CLOSE, error)
            else:
                self._response(1).closed.add(lane=lane)

        self._unanswered += 1
        self._core.when_idle(group, slot, close)

    def _vacate(self, lanes: list[int]) -> None:
        """Takes the sessions, all of one group, off N lanes."""
        number = int(self._group[lanes[0]])
        self._group[lanes] = -1
        for lane in lanes:
            self._ids[lane] = ""
        self._group_lanes[number] -= len(lanes)
        if not self._group_lanes[number]:  # its memory is given back although the stream goes on
            del self._groups[number], self._group_lanes[number]

    def _frame(self, frame: pb.StepFrame) -> None:
        chunks = len(frame.lanes)
        if not chunks:
            raise InvalidRequest("frames.lanes", "at least one lane", "none")
        lanes = np.fromiter(frame.lanes, np.int64, chunks)
        first_steps = np.fromiter(frame.first_steps, np.uint64, len(frame.first_steps)) if frame.first_steps else None
        try:
            if first_steps is not None and len(first_steps) != chunks:
                raise InvalidRequest(
                    "frames.first_steps", f"{chunks}, as many as lanes, or none", str(len(first_steps))
                )
            _check_distinct(lanes)
            inputs = decode_named(frame.inputs, "inputs")
            mask = decode(frame.mask, "mask") if frame.HasField("mask") else None
            for field, array in (*((f"inputs.{name}", x) for name, x in inputs.items()), ("mask", mask)):
                if array is not None and array.shape[:1] != (chunks,):
                    raise InvalidInput(
                        field, f"a first axis of {chunks}, as many as lanes", f"shape {list(array.shape)}"
                    )
        except (ServiceError, TensorError) as error:
            self._fail_chunks(lanes, None, first_steps, service_error(error))
            return
        for group, index in self._by_group(lanes, first_steps):
            chosen = slice(None) if index is None else index
            tags = lanes[chosen]
            self._unanswered += len(tags)
            try:
                self._core.submit_chunks(
                    group,
                    self._slot[tags],
                    self._generation[tags],
                    None if first_steps is None else first_steps[chosen],
                    {name: x[chosen] for name, x in inputs.items()},
                    None if mask is None else mask[chosen],
                    self,
                    tags,
                )
            except Exception as error:  # the frame's lanes are to blame, or a bug: the stream goes on
                self._unanswered -= len(tags)
                self._fail_chunks(lanes, index, first_steps, service_error(error))

    def _by_group(self, lanes: Array, first_steps: Array | None) -> Iterator[tuple[Group, Array | None]]:
        """The positions of a frame's lanes, group by group; None for all. Lanes that are not open are told so."""
        if lanes.max() < len(self._group):
            groups = self._group[lanes]  # [N]
        else:
            groups = np.where(lanes < len(self._group), self._group[np.minimum(lanes, len(self._group) - 1)], -1)
        if groups[0] >= 0 and (groups == groups[0]).all():
            yield self._groups[groups[0]], None
            return
        for number in np.unique(groups):
            index = np.flatnonzero(groups == number)
            if number >= 0:
                yield self._groups[number], index
                continue
            for position in index:
                lane = int(lanes[position])
                self._fail(lane, pb.LANE_OPERATION_STEP, LaneUnknown(lane), first_steps, int(position))

    # Answering: the sink of this stream's blocks

    def session_id(self, tag: int) -> str:
        """See `Sink.session_id`."""
        return self._ids[tag] if tag < len(self._ids) else ""

    def result(self, block: Block, outputs: Arrays, states: Arrays) -> None:
        """See `Sink.result`."""
        chunks = len(block.tags)
        if self.cancelled:
            self._unanswered -= chunks
            return
        outputs, states = to_wire(outputs, states, block.options, chunks)
        self._unanswered -= chunks
        nbytes = sum(y.nbytes for y in (*outputs.values(), *states.values()))
        # Filled in place: a large frame that is made elsewhere and appended is copied twice more.
        frame = self._response(chunks, nbytes).frames.add(
            lanes=block.tags.tolist(), first_steps=_steps(block), timesteps=block.call.timesteps
        )
        for name, y in outputs.items():
            encode_into(frame.outputs.add(name=name).tensor, y, name)
        for name, state in states.items():
            encode_into(frame.states.add(name=name).tensor, state, name)

    def failed(self, block: Block, errors: list[tuple[int, ServiceError]]) -> None:
        """See `Sink.failed`."""
        self._unanswered -= len(errors)
        first_steps = None if block.sessions is None else block.sessions.first_steps
        for index, error in errors:
            self._fail(int(block.tags[index]), pb.LANE_OPERATION_STEP, error, first_steps, index)

    def _fail_chunks(self, lanes: Array, index: Array | None, first_steps: Array | None, error: ServiceError) -> None:
        for position in range(len(lanes)) if index is None else index:
            self._fail(int(lanes[position]), pb.LANE_OPERATION_STEP, error, first_steps, int(position))

    def _fail(
        self,
        lane: int,
        operation: pb.LaneOperation.ValueType,
        error: ServiceError,
        first_steps: Array | Sequence[int] | None = None,
        position: int = 0,
    ) -> None:
        failure = pb.LaneError(lane=lane, operation=operation, status=status(error))
        if first_steps is not None and position < len(first_steps):
            failure.first_step = int(first_steps[position])
        self._response(1, failure.ByteSize()).errors.append(failure)

    def _fail_opens(self, lanes: Sequence[int], error: ServiceError) -> None:
        """The same error for N lanes."""
        failure = pb.LaneError(operation=pb.LANE_OPERATION_OPEN, status=status(error))
        response = self._response(len(lanes), len(lanes) * failure.ByteSize())
        for lane in lanes:
            failure.lane = lane
            response.errors.append(failure)  # a copy

    def _response(self, answers: int, nbytes: int = 0) -> pb.StreamResponse:
        """The response that so many answers, and bytes, go into."""
        if not self._responses or self._response_bytes > _RESPONSE_BYTES:
            self._responses.append(pb.StreamResponse())
            self._response_bytes = 0
        self._response_bytes += nbytes
        self._unsent += answers
        self._ready.set()
        return self._responses[-1]

    async def _send(self) -> None:
        while self._responses:
            responses, self._responses = self._responses, []
            chunks = self._unsent
            for response in responses:
                await self._context.write(response)
            self._unsent -= chunks
            self._room.set()


def _alike(openings: Sequence[pb.LaneOpen]) -> Iterator[list[pb.LaneOpen]]:
    """Cuts openings, in their order, into runs of new sessions that differ by their lanes alone."""
    run: list[pb.LaneOpen] = []
    lanes: set[int] = set()
    config: session_pb2.SessionConfig | None = None
    for opening in openings:
        create = opening.create if opening.HasField("create") else None
        if run and (create is None or create != config or opening.lane in lanes):
            yield run
            run, lanes = [], set()
        if not run:
            config = None if create is None or create.session_id else create
        run.append(opening)
        lanes.add(opening.lane)
    if run:
        yield run


def _check_distinct(lanes: Array) -> None:
    ordered = np.sort(lanes)
    if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        raise LaneRepeated(int(twice[0]))


def _steps(block: Block) -> list[int]:
    assert block.sessions is not None
    assert block.sessions.first_steps is not None
    steps: list[int] = block.sessions.first_steps.tolist()
    return steps
