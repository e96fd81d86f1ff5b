"""One stream: its lanes, what was asked on them, and what is ready to be sent back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

import grpc
import numpy as np

from rnnserve.codec import TensorError, decode, decode_named
from rnnserve.frames import Buffer, FrameReader, FrameWriter, Outline
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import session_pb2
from rnnserve_models.engine.base import Array
from rnnserve_server.access.caller import caller
from rnnserve_server.api.errors import rejections, service_error, status
from rnnserve_server.api.messages import create_sessions, duration, rows_of, session_message
from rnnserve_server.api.watch import Lanes, LaneWatch, Reason
from rnnserve_server.blocks import Answers, Failure, Sessions
from rnnserve_server.column import span
from rnnserve_server.core import Core
from rnnserve_server.ending import end
from rnnserve_server.errors import (
    Draining,
    InvalidInput,
    InvalidRequest,
    LaneOpen,
    LaneRepeated,
    LaneUnknown,
    ServiceError,
    SessionAway,
    SessionExists,
    StoreDown,
    TooLarge,
)
from rnnserve_server.intake import Frame
from rnnserve_server.layout import Signature
from rnnserve_server.sessions import Group
from rnnserve_server.wire.call import Call
from rnnserve_server.wire.send import sender

_RESPONSE_BYTES = 1 << 20  # a response is sent once it is so large, although more is ready
_TAKEN_AT_ONCE = 64  # opens or closes of a stream that are done in one turn of the event loop
_FOUND_LANES = 65536  # of frames whose sessions are remembered
_TRIES = 3  # to have all sessions of a frame in memory at once: there may not be room for them
_NONE = np.zeros(0, np.int64)
_QUIET_SECONDS = 0.5  # a stream that says nothing for so long while the server drains has said all
_HEARD_SECONDS = 1.0  # after which a stream that goes on and on is not listened to any more
_LEAVING_SECONDS = 2.0  # the same, after it has closed a lane: its client takes its sessions elsewhere meanwhile


_NOTICES = {
    Reason.EXPIRED: pb.NOTICE_REASON_EXPIRED,
    Reason.AGED: pb.NOTICE_REASON_AGED,
    Reason.CLOSED: pb.NOTICE_REASON_CLOSED,
    Reason.TAKEN_OVER: pb.NOTICE_REASON_TAKEN_OVER,
    Reason.EVICTED: pb.NOTICE_REASON_EVICTED,
    Reason.MODEL_UNLOADED: pb.NOTICE_REASON_MODEL_UNLOADED,
}

Item = TypeVar("Item")


class LaneStream:
    """A bidirectional stream of frames. It is the sink of its own blocks.

    Lanes index columns, so that a frame of N lanes finds its sessions by array operations.
    """

    def __init__(self, core: Core, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.cancelled = False
        self.deadline: float | None = None
        self._core = core
        self._caller = caller()
        self._bucket = self._caller.bucket
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._groups: dict[int, Group] = {}
        self._group_lanes: Counter[int] = Counter()  # lanes in each of _groups
        self._group = np.full(64, -1)  # [capacity], the index of the lane's group in _groups; -1: not open
        self._slot = np.zeros(64, np.int64)
        self._generation = np.zeros(64, np.int64)
        self._ids = [""] * 64  # [capacity]
        self._found: dict[tuple[int, ...], list[_Part]] = {}  # what `_find` found, by a frame's lanes
        self._found_lanes = 0
        self._watch = LaneWatch(core)
        self._era = 0  # changes when lanes are opened or closed
        self._frames = FrameReader()
        self._results = FrameWriter()
        self._responses: list[list[Buffer]] = []  # each in pieces
        self._response_bytes = 0
        self._unsent_bytes = 0  # of answers that wait to be sent
        self._owed_bytes = 0  # of those that will, if what is unanswered succeeds
        self._unsent = 0  # answers that wait to be sent: of chunks, opens and closes
        self._unanswered = 0  # chunks and closes that were accepted and not answered
        self._received = 0
        self._closings = 0
        self._partway = False  # a message was taken in part
        self._heard_out = False  # the server drains, and no further message is taken
        self._send = sender(context)
        self._sending: list[list[Buffer]] = []  # responses on their way, the first of them in gRPC's hands
        self._taken = self._taken_bytes = 0  # of _unsent and _unsent_bytes, what they hold
        self._lost: Exception | None = None  # why nothing can be sent any more
        self._sent = asyncio.Event()
        if isinstance(context, Call):
            context.take = self.take

    async def run(self) -> None:
        """Reads, runs and answers until the client has said all and was answered.

        Raises:
            ServiceError: the stream itself is to blame, or the server is shutting down.
        """
        if self._core.draining.is_set():  # before anything is answered: a proxy may still send it elsewhere
            raise _leaving()
        self._core.streams += 1
        self._core.streamed += 1
        reader = self._reader = asyncio.create_task(self._read())
        drainer = asyncio.create_task(self._drain(reader))
        self._core.watches.add(self._look)
        try:
            await asyncio.wait([reader])
            while (self._unanswered or self._responses or self._sending) and self._lost is None:
                self._sent.clear()
                await self._sent.wait()
            if self._lost is not None:
                raise self._lost
            if self._core.draining.is_set():
                await self._save(range(len(self._group)))
            if not reader.cancelled():
                await reader
            elif self._core.draining.is_set():
                raise _leaving()
        finally:
            self.cancelled = True
            self._core.watches.discard(self._look)
            reader.cancel()
            drainer.cancel()
            self._core.streams -= 1

    # Reading

    async def _read(self) -> None:
        while (content := await self._context.read()) is not grpc.aio.EOF:
            if not self._core.has_room:
                await self._core.wait_for_room()
            while self._is_behind():
                self._sent.clear()
                await self._sent.wait()
            self._received += 1
            await self._receive(pb.StreamRequest.FromString(content))
            if self._heard_out:
                raise _leaving()

    def _is_behind(self) -> bool:
        """Whether the client has asked for more than it has read, by more than it may."""
        if not self._unanswered:
            self._owed_bytes = 0  # some chunks may have failed
        settings = self._core.settings
        return (
            self._unanswered + self._unsent > settings.stream_queue_chunks
            or self._owed_bytes + self._unsent_bytes > settings.stream_queue_bytes
        )

    def take(self, content: bytes) -> bool:
        """Queues what a message asks for, if that is steps of sessions that are all here, and there is room: whether it
        was. Any other message is to be read, in its turn.
        """
        if self._heard_out or self._core.tracing is not None or self._is_behind() or not self._core.has_room:
            return False
        outline = self._frames.read(content)
        if outline is None or (plan := self._plan(outline)) is None or not plan.part.alive():
            return False
        part = plan.part
        try:
            first_steps = outline.first_steps(content)
            inputs = outline.arrays(content, 3)
            if self._bucket is not None:
                self._bucket.take(plan.rows)
            self._core.take_in(Frame(self, part.tags, part.sessions(first_steps), inputs, None), plan.signature)
        except Exception:  # whatever it is, it comes again, and is told, in the message's turn
            return False
        self._unanswered += len(part.tags)
        self._owed_bytes += plan.owed
        self._received += 1
        return True

    async def _drain(self, reader: asyncio.Task[None]) -> None:
        """Once the server drains: lets the client say what it was saying, then stops listening."""
        await self._core.draining.wait()
        left = duration(self._core.settings.drain_seconds)
        self._tell(pb.StreamResponse(notices=[pb.LaneNotice(reason=pb.NOTICE_REASON_DRAINING, time_left=left)]))
        heard, closings, leaving = -1, self._closings, 0.0
        until = self._loop.time() + _HEARD_SECONDS
        while heard != self._received or self._partway or (self._groups and self._loop.time() < leaving):
            heard = self._received
            await asyncio.sleep(_QUIET_SECONDS)
            if closings != self._closings:
                closings = self._closings
                until = leaving = self._loop.time() + _LEAVING_SECONDS
            self._heard_out = self._loop.time() >= until
        await end([reader])

    async def _receive(self, request: pb.StreamRequest) -> None:
        if request.opens:
            if self._caller.scope:
                self._name_in_full(request.opens)
            async for openings in self._turns(request.opens):
                ids = [each.session_id for each in openings if each.HasField("session_id")]
                errors = await self._attach(ids, sure=True)
                for alike in _alike(openings):
                    await self._open(alike, errors)
        for frame in request.frames:
            away = await self._bring_back(frame.lanes[:]) if self._core.keeper is not None else {}
            self._frame(frame, away)
        if request.closes:
            async for closings in self._turns(request.closes):
                if self._core.keeper is not None:
                    lanes = [closing.lane for closing in closings if closing.delete_session]
                    with suppress(StoreDown):  # then its end is settled later, if it is ours
                        await self._core.keeper.verify([self._ids[lane] for lane in lanes if self._is_open(lane)])
                    await self._bring_back(lanes)
                    await self._save([closing.lane for closing in closings if not closing.delete_session])
                self._close(closings)
                self._closings += 1
            with suppress(StoreDown):  # it is told later
                await self._core.settle()

    def _name_in_full(self, openings: Iterable[pb.LaneOpen]) -> None:
        """Puts the ids that the server keeps in place of those that the caller says."""
        for opening in openings:
            if opening.HasField("session_id"):
                opening.session_id = self._caller.scoped(opening.session_id)
            elif opening.create.session_id:
                opening.create.session_id = self._caller.scope + opening.create.session_id

    async def _attach(self, ids: Sequence[str], *, sure: bool = False) -> Mapping[str, ServiceError]:
        """Brings sessions into memory: why it could not, by id. Arguments as `Core.attach`."""
        if not ids:
            return {}
        try:
            return await self._core.attach(ids, sure=sure)
        except ServiceError as error:
            return dict.fromkeys(ids, error)

    async def _bring_back(self, lanes: Sequence[int]) -> dict[int, ServiceError]:
        """Puts the sessions of lanes that have left memory back where they were, from the store.

        Returns:
            Why it could not, by lane.
        """
        failed: dict[int, ServiceError] = {}
        found = self._found.get(tuple(lanes))
        if found and all(part.alive() for part in found):
            return failed  # all are here, as they mostly are
        for _ in range(_TRIES):  # those that were here may have come to rest while the others were fetched
            away = self._away(lanes, failed)
            if not away:
                return failed
            errors = await self._attach(list({self._ids[lane] for lane in away}))
            for lane in away:
                if (session_id := self._ids[lane]) in self._core.sessions:
                    session = self._core.sessions.get(session_id)
                    self._vacate([lane])
                    self._put([lane], session.group, np.array([session.slot]))
                elif error := errors.get(session_id):
                    failed[lane] = error
        return failed | {lane: SessionAway(self._ids[lane]) for lane in self._away(lanes, failed)}

    def _away(self, lanes: Sequence[int], failed: Collection[int]) -> list[int]:
        """The lanes whose sessions have left memory, and may be had again."""
        away = [lane for lane in lanes if lane not in failed and self._is_open(lane) and not self._is_here(lane)]
        return [lane for lane in away if not self._core.sessions.was_taken(self._ids[lane])]

    async def _save(self, lanes: Iterable[int]) -> None:
        """Has the store keep the sessions of lanes as they are: another server may take them over now."""
        if self._core.keeper is None:
            return
        here: dict[int, list[int]] = {}
        for lane in lanes:
            if self._is_open(lane) and self._is_here(lane):
                here.setdefault(int(self._group[lane]), []).append(int(self._slot[lane]))
        with suppress(StoreDown):  # then nobody else can have them either
            for group, slots in [(self._groups[number], slots) for number, slots in here.items()]:
                await self._core.keeper.save(group, np.array(slots))

    def _is_here(self, lane: int) -> bool:
        group = self._groups[int(self._group[lane])]
        return bool(group.generation[self._slot[lane]] == self._generation[lane])

    async def _turns(self, items: Sequence[Item]) -> AsyncIterator[Sequence[Item]]:
        """A few of a message's items at a time; between them other streams have their turns."""
        for start in range(0, len(items), _TAKEN_AT_ONCE):
            if start:
                self._partway = True
                await asyncio.sleep(0)
                self._partway = False
            yield items[start : start + _TAKEN_AT_ONCE]

    async def _open(self, alike: Sequence[pb.LaneOpen], errors: Mapping[str, ServiceError]) -> None:
        """Opens lanes that want the same: new sessions that differ by their ids, or there is only one."""
        lanes, ids = [], []
        for opening in alike:
            lane = opening.lane
            if lane >= self._core.settings.max_lanes:
                self._fail_opens([lane], TooLarge("lane", self._core.settings.max_lanes - 1, lane))
            elif self._is_open(lane):
                self._fail_opens([lane], LaneOpen(lane))
            elif (session_id := opening.create.session_id) in self._core.sessions:
                self._fail_opens([lane], SessionExists(session_id))
            else:
                lanes.append(lane)
                ids.append(session_id)
        if not lanes:
            return
        opening = alike[0]
        try:
            if opening.WhichOneof("target") is None:
                raise InvalidRequest("target", "create or session_id", "neither")
            if opening.HasField("create"):
                group, slots, full = await create_sessions(self._core, opening.create, ids)
                made = await self._core.keep(group, slots)
                for position in np.flatnonzero(~made).tolist():
                    self._fail_opens([lanes[position]], SessionExists(ids[position]))
                if full is not None:
                    self._fail_opens(lanes[len(slots) :], full)
                lanes, slots = [lane for lane, stored in zip(lanes, made, strict=False) if stored], slots[made]
            else:
                if error := errors.get(opening.session_id):
                    raise error
                session = await self._core.session(opening.session_id)  # it may rest again by now
                group, slots = session.group, np.array([session.slot])
                self._core.sessions.resumed[group.model.name, group.model.version] += 1
        except (ServiceError, TensorError) as error:
            self._fail_opens(lanes, service_error(error))
            return
        if len(slots):
            self._opened(lanes, group, slots)

    def _opened(self, lanes: Sequence[int], group: Group, slots: Array) -> None:
        """Puts N sessions that differ by their ids alone on N lanes, and says so."""
        self._put(lanes, group, slots)
        opened = pb.LaneOpened(session=session_message(self._core.sessions.at(group, int(slots[0]))))
        session, response = opened.session, pb.StreamResponse()
        for lane in lanes:
            opened.lane = lane
            session.session_id = self._caller.shown(self._ids[lane])
            response.opened.append(opened)  # a copy
        self._tell(response, len(lanes))

    def _put(self, lanes: Sequence[int], group: Group, slots: Array) -> None:
        """Puts N sessions of a group on N lanes."""
        number = next((number for number, other in self._groups.items() if other is group), None)
        if number is None:
            number = next(number for number in count() if number not in self._groups)
            self._groups[number] = group
        self._group_lanes[number] += len(lanes)
        self._forget()
        self._make_room(max(lanes))
        self._watch.opened(lanes)
        self._group[lanes] = number
        self._slot[lanes] = slots
        self._generation[lanes] = group.generation[slots]
        for lane, slot in zip(lanes, slots.tolist(), strict=True):
            self._ids[lane] = group.ids[slot]

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
            self._tell(pb.StreamResponse(closed=[pb.LaneClosed(lane=lane) for lane in lanes]), len(lanes))
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
        self._core.worker(group.model).line_up()
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
                self._tell(pb.StreamResponse(closed=[pb.LaneClosed(lane=lane)]), 1)

        self._unanswered += 1
        self._core.when_idle(group, slot, close)

    def _vacate(self, lanes: list[int]) -> None:
        """Takes the sessions, all of one group, off N lanes."""
        self._forget()
        number = int(self._group[lanes[0]])
        self._group[lanes] = -1
        for lane in lanes:
            self._ids[lane] = ""
        self._group_lanes[number] -= len(lanes)
        if not self._group_lanes[number]:  # its memory is given back although the stream goes on
            del self._groups[number], self._group_lanes[number]

    def _frame(self, frame: pb.StepFrame, away: Mapping[int, ServiceError]) -> None:
        lanes = tuple(frame.lanes[:])
        chunks = len(lanes)
        if not chunks:
            raise InvalidRequest("frames.lanes", "at least one lane", "none")
        first_steps = np.array(frame.first_steps[:], np.uint64) if frame.first_steps else None  # [N]
        try:
            if first_steps is not None and len(first_steps) != chunks:
                raise InvalidRequest(
                    "frames.first_steps", f"{chunks}, as many as lanes, or none", str(len(first_steps))
                )
            found = (None if away else self._found.get(lanes)) or self._find(lanes, away)
            inputs = decode_named(frame.inputs, "inputs")
            mask = decode(frame.mask, "mask") if frame.HasField("mask") else None
            for field, array in inputs.items():
                _check_first_axis(f"inputs.{field}", array, chunks)
            if mask is not None:
                _check_first_axis("mask", mask, chunks)
            if self._bucket is not None:
                self._bucket.take(rows_of(inputs, 3))
            trace = None if self._core.tracing is None else self._core.tracing.received(frame.traceparent)
        except (ServiceError, TensorError) as error:
            self._fail_chunks(lanes, range(chunks), first_steps, service_error(error))
            return
        for part in found:
            index = part.index
            if part.group is None:
                for position in range(chunks) if index is None else index.tolist():
                    lane = lanes[position]
                    self._fail_chunks(lanes, [position], first_steps, away.get(lane) or LaneUnknown(lane))
                continue
            steps = first_steps if first_steps is None or index is None else first_steps[index]
            self._unanswered += len(part.tags)
            try:
                owed = self._core.submit_frame(
                    Frame(
                        self,
                        part.tags,
                        part.sessions(steps),
                        inputs if index is None else {name: x[index] for name, x in inputs.items()},
                        mask if mask is None or index is None else mask[index],
                        trace,
                    )
                )
                self._owed_bytes += owed  # not at once: some may have been answered meanwhile
            except Exception as error:  # the frame's lanes are to blame, or a bug: the stream goes on
                self._unanswered -= len(part.tags)
                told = service_error(
                    error, model=part.group.model.name, sessions=[self._ids[tag] for tag in part.tags[:4].tolist()]
                )
                self._fail_chunks(lanes, range(chunks) if index is None else index.tolist(), first_steps, told)

    def _plan(self, outline: Outline) -> _Plan | None:
        """What to do with frames of an outline; None if it is not the same for all of its lanes, or an error."""
        plan: _Plan | None = outline.kept
        if plan is not None and plan.era == self._era:
            return plan
        try:
            found = self._found.get(outline.lanes) or self._find(outline.lanes, ())
            if len(found) != 1 or (group := found[0].group) is None:
                return None
            chunks = len(outline.lanes)
            shapes = {each.name: each.like() for each in outline.tensors}
            for field, array in shapes.items():
                _check_first_axis(f"inputs.{field}", array, chunks)
            key, owed = self._core.fit(group, chunks, shapes, None)
        except ServiceError:
            return None
        plan = outline.kept = _Plan(self._era, found[0], key, owed, rows_of(shapes, 3))
        return plan

    def _find(self, lanes: tuple[int, ...], away: Collection[int]) -> list[_Part]:
        """The sessions of a frame's lanes, group by group. A stream says the same lanes again and again.

        Raises:
            LaneRepeated: one is there twice.
        """
        tags = np.array(lanes, np.int64)  # [N]
        ordered = np.sort(tags)
        if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).size:
            raise LaneRepeated(int(twice[0]))
        inside = np.minimum(tags, len(self._group) - 1)
        groups = np.where(inside == tags, self._group[inside], -1)  # [N]
        if away:
            groups[np.isin(tags, list(away))] = -1
        numbers = np.unique(groups).tolist()
        found = []
        for number in numbers:
            index = np.flatnonzero(groups == number) if len(numbers) > 1 else None
            chosen = tags if index is None else tags[index]
            if number < 0:
                found.append(_Part(index, chosen))
            else:
                found.append(_Part(index, chosen, self._groups[number], self._slot[chosen], self._generation[chosen]))
        if away:
            return found
        if self._found_lanes + len(lanes) > _FOUND_LANES:
            self._forget()
        self._found[lanes] = found
        self._found_lanes += len(lanes)
        return found

    def _forget(self) -> None:
        """Lanes were opened or closed: what `_find` found may be so no more."""
        self._found.clear()
        self._found_lanes = 0
        self._era += 1

    # Answering: the sink of this stream's blocks

    def session_id(self, tag: int) -> str:
        """See `Sink.session_id`."""
        return self._ids[tag] if tag < len(self._ids) else ""

    def result(self, answers: Answers) -> None:
        """See `Sink.result`."""
        chunks = len(answers.tags)
        self._unanswered -= chunks
        if self.cancelled:
            return
        tensors = [(4, name, y) for name, y in answers.outputs.items()]
        tensors += [(5, name, state) for name, state in answers.states.items()]
        nbytes = sum([array.nbytes for _, _, array in tensors])
        self._owed_bytes -= nbytes
        self._say(self._results.write(answers.tags, answers.first_steps, answers.timesteps, tensors), chunks, nbytes)

    def failed(self, failures: Sequence[Failure]) -> None:
        """See `Sink.failed`."""
        self._unanswered -= len(failures)
        for failure in failures:
            self._fail(failure.tag, pb.LANE_OPERATION_STEP, failure.error, failure.first_step)

    def _fail_chunks(
        self, lanes: Sequence[int], positions: Iterable[int], first_steps: Array | None, error: ServiceError
    ) -> None:
        for position in positions:
            first_step = None
            if first_steps is not None and position < len(first_steps):
                first_step = int(first_steps[position])
            self._fail(lanes[position], pb.LANE_OPERATION_STEP, error, first_step)

    def _fail(
        self, lane: int, operation: pb.LaneOperation.ValueType, error: ServiceError, first_step: int | None = None
    ) -> None:
        told = status(error, self._caller)
        failure = pb.LaneError(lane=lane, operation=operation, first_step=first_step, status=told)
        self._tell(pb.StreamResponse(errors=[failure]), 1)

    async def _look(self) -> None:
        """Tells the client what it should know of its sessions."""
        columns = Lanes(self._groups, self._group, self._slot, self._generation, self._ids)
        for notice in await self._watch.look(columns):
            told = pb.LaneNotice(
                lanes=notice.lanes,
                reason=_NOTICES[notice.reason],
                ended=notice.ended,
                time_left=None if notice.left is None else duration(notice.left),
            )
            self._tell(pb.StreamResponse(notices=[told]))

    def _fail_opens(self, lanes: Sequence[int], error: ServiceError) -> None:
        """The same error for N lanes."""
        failure = pb.LaneError(operation=pb.LANE_OPERATION_OPEN, status=status(error, self._caller))
        rejections[error.reason] += len(lanes) - 1  # `status` has counted one
        response = pb.StreamResponse()
        for lane in lanes:
            failure.lane = lane
            response.errors.append(failure)  # a copy
        self._tell(response, len(lanes))

    def _tell(self, response: pb.StreamResponse, answers: int = 0) -> None:
        """Has a response, with so many answers in it, sent in this turn of the event loop."""
        if not self._responses:
            self._loop.call_soon(self.flush)
        content = response.SerializeToString()
        self._say([content], answers, len(content))

    def _say(self, parts: Sequence[Buffer], answers: int, nbytes: int) -> None:
        """Puts a response in pieces, with so many answers in it, among what the next `flush` sends. Responses end to
        end are one with all that is in them.
        """
        if not self._responses or self._response_bytes > _RESPONSE_BYTES:
            self._responses.append([])
            self._response_bytes = 0
        self._responses[-1] += parts
        self._response_bytes += nbytes
        self._unsent_bytes += nbytes
        self._unsent += answers

    def flush(self) -> None:
        """Sends what is ready. What becomes ready meanwhile goes together, afterwards."""
        if self._responses and not (self._sending or self._lost or self.cancelled):
            self._sending, self._responses = self._responses, []
            self._taken, self._taken_bytes = self._unsent, self._unsent_bytes
            self._send_first()

    def _send_first(self) -> None:
        try:
            self._send(b"".join(cast("list[bytes]", self._sending[0])), self._was_sent)
        except Exception as error:  # it cannot be put on the wire
            self._was_sent(error)

    def _was_sent(self, error: Exception | None) -> None:
        if error is not None:
            self._sending, self._lost = [], error
            self._reader.cancel()
        else:
            del self._sending[0]
            if self._sending:
                self._send_first()
                return
            self._unsent -= self._taken
            self._unsent_bytes -= self._taken_bytes
            self.flush()
        self._sent.set()


class _Plan(NamedTuple):
    """What is to be done with frames of one outline.

    Attributes:
        era: of the stream's lanes, for which it holds.
        part: the frame's sessions.
        signature: that of its inputs.
        owed: bytes of the answers.
        rows: rows of time steps.
    """

    era: int
    part: _Part
    signature: Signature
    owed: int
    rows: int


class _Part:
    """The lanes of a frame whose sessions are of one group, or that are not open.

    Attributes:
        index: their positions among the frame's N lanes; None: all of them.
        tags: int64 [n], the lanes.
        group: their group; None: they are not open.
    """

    __slots__ = ("_at", "_distinct", "_ended", "_generations", "_slots", "group", "index", "tags")

    def __init__(
        self,
        index: Array | None,
        tags: Array,
        group: Group | None = None,
        slots: Array = _NONE,
        generations: Array = _NONE,
    ) -> None:
        """The sessions' slots and the slots' generations are int64 [n]."""
        self.index = index
        self.tags = tags
        self.group = group
        self._slots = slots
        self._generations = generations
        self._distinct = len(np.unique(slots)) == len(slots)
        self._at = span(slots) if len(slots) else slots
        self._ended = -1  # `Group.ended` when all of the sessions were alive

    def alive(self) -> bool:
        """Whether all of the lanes are open and their sessions alive."""
        group = self.group
        if group is None:
            return False
        if self._ended != group.ended and (group.generation[self._at] == self._generations).all():
            self._ended = group.ended
        return self._ended == group.ended

    def sessions(self, first_steps: Array | None) -> Sessions:
        """The sessions, n chunks of which begin at those steps."""
        group = self.group
        assert group is not None
        self.alive()
        return Sessions(group, self._slots, self._generations, first_steps, self._ended, self._distinct, self._at)


def _leaving() -> Draining:
    """The end of a stream whose client should go on elsewhere, and need not wait for that."""
    return Draining("the server is shutting down; go on elsewhere")


def _alike(openings: Sequence[pb.LaneOpen]) -> Iterator[list[pb.LaneOpen]]:
    """Cuts openings, in their order, into runs of new sessions that differ by their lanes and their ids alone. Either
    all sessions of a run have ids, or none.
    """
    run: list[pb.LaneOpen] = []
    lanes: set[int] = set()
    ids: set[str] = set()
    config: session_pb2.SessionConfig | None = None
    for opening in openings:
        create, session_id = None, ""
        if opening.HasField("create"):
            create, session_id = opening.create, opening.create.session_id
            if session_id:
                create = session_pb2.SessionConfig()
                create.CopyFrom(opening.create)
                create.session_id = "?"
        if run and (create is None or create != config or opening.lane in lanes or session_id in ids):
            yield run
            run, lanes, ids = [], set(), set()
        if not run:
            config = create
        run.append(opening)
        lanes.add(opening.lane)
        if session_id:
            ids.add(session_id)
    if run:
        yield run


def _check_first_axis(field: str, array: Array, chunks: int) -> None:
    if array.shape[:1] != (chunks,):
        raise InvalidInput(field, f"a first axis of {chunks}, as many as lanes", f"shape {list(array.shape)}")
