"""One stream: its lanes, what was asked on them, and what is ready to be sent back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
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
from rnnserve_server.api.lanes import Lanes, Part
from rnnserve_server.api.messages import create_sessions, duration, rows_of, session_message
from rnnserve_server.api.outbox import RESPONSE_BYTES, Outbox
from rnnserve_server.api.watch import LaneWatch, Reason
from rnnserve_server.blocks import Answers, Failure, Tell
from rnnserve_server.core import Core
from rnnserve_server.ending import end
from rnnserve_server.errors import (
    Draining,
    InvalidInput,
    InvalidRequest,
    LaneOpen,
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

_TURN_SECONDS = 0.0004  # for which a message of a stream may keep the event loop, before others have their turns
# What is done of a message before anybody looks how long it took:
_TAKEN_AT_ONCE = 64  # opens or closes, which are alike mostly
_TOLD_AT_ONCE = 64  # chunks that are told the same
_UNLIKE_AT_ONCE = 8  # chunks that are told what is wrong with each
_TRIES = 3  # to have all sessions of a frame in memory at once: there may not be room for them
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
    """A bidirectional stream of frames. It is the sink of its own blocks."""

    def __init__(self, core: Core, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.cancelled = False
        self.deadline: float | None = None
        self._core = core
        self._caller = caller()
        self._bucket = self._caller.bucket
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._lanes = Lanes()
        self._watch = LaneWatch(core)
        self._frames = FrameReader()
        self._results = FrameWriter()
        self._outbox = Outbox(sender(context), self._stop_reading)
        self._owed_bytes = 0  # of answers that will wait to be sent, if what is unanswered succeeds
        self._unanswered = 0  # chunks and closes that were accepted and not answered
        self._received = 0
        self._closings = 0
        self._partway = False  # a message was taken in part
        self._turn_ends = 0.0  # when others have waited long enough for what this one does of a message
        self._heard_out = False  # the server drains, and no further message is taken
        self._reader: asyncio.Task[None] | None = None
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
            while (self._unanswered or self._outbox) and self._outbox.error is None:
                self._outbox.sent.clear()
                await self._outbox.sent.wait()
            if self._outbox.error is not None:
                raise self._outbox.error
            if self._core.draining.is_set():
                await self._save(range(len(self._lanes)))
            if not reader.cancelled():
                await reader
            elif self._core.draining.is_set():
                raise _leaving()
        finally:
            self.cancelled = True
            self._outbox.close()
            if isinstance(self._context, Call):
                self._context.take = None  # with its groups the stream goes at once, not when garbage is collected
            self._core.watches.discard(self._look)
            reader.cancel()
            drainer.cancel()
            self._core.streams -= 1

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.cancel()

    # Reading

    async def _read(self) -> None:
        while (content := await self._context.read()) is not grpc.aio.EOF:
            if not self._core.has_room:
                await self._core.wait_for_room()
            await self._caught_up()
            self._received += 1
            self._turn_begins()
            await self._receive(pb.StreamRequest.FromString(content))
            if self._heard_out:
                raise _leaving()

    async def _caught_up(self) -> None:
        """Waits until the client has read enough of what it was answered."""
        while self._is_behind():
            self._outbox.sent.clear()
            await self._outbox.sent.wait()

    def _turn_begins(self) -> None:
        self._turn_ends = self._core.clock() + _TURN_SECONDS

    async def _give_way(self) -> None:
        """Lets other streams have their turns, within a message, once this one has had its own. A message may ask for
        millions of things: its client must read what it is told of some before the others are looked at.
        """
        if self._core.clock() < self._turn_ends and not self._is_behind():
            return
        self._partway = True
        await asyncio.sleep(0)
        self._partway = False
        await self._caught_up()
        self._turn_begins()

    def _is_behind(self) -> bool:
        """Whether the client has asked for more than it has read, by more than it may."""
        if not self._unanswered:
            self._owed_bytes = 0  # some chunks may have failed
        settings = self._core.settings
        return (
            self._unanswered + self._outbox.answers > settings.stream_queue_chunks
            or self._owed_bytes + self._outbox.nbytes > settings.stream_queue_bytes
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
        self._outbox.tell(pb.StreamResponse(notices=[pb.LaneNotice(reason=pb.NOTICE_REASON_DRAINING, time_left=left)]))
        heard, closings, leaving = -1, self._closings, 0.0
        until = self._loop.time() + _HEARD_SECONDS
        while heard != self._received or self._partway or (self._lanes.groups and self._loop.time() < leaving):
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
                    await self._give_way()
        for frame in request.frames:
            if (chunks := len(frame.lanes)) > self._core.settings.max_lanes:
                raise TooLarge("frames.lanes", self._core.settings.max_lanes, chunks)
            await self._give_way()
            away = await self._bring_back(frame.lanes[:]) if self._core.keeper is not None else {}
            await self._frame(frame, away)
        if request.closes:
            async for closings in self._turns(request.closes):
                if self._core.keeper is not None:
                    lanes = [closing.lane for closing in closings if closing.delete_session]
                    with suppress(StoreDown):  # then its end is settled later, if it is ours
                        await self._core.keeper.verify(
                            [self._lanes.ids[lane] for lane in lanes if self._lanes.is_open(lane)]
                        )
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
        if self._lanes.all_alive(lanes):
            return failed  # all are here, as they mostly are
        for _ in range(_TRIES):  # those that were here may have come to rest while the others were fetched
            away = self._away(lanes, failed)
            if not away:
                return failed
            await self._await_told(away)
            errors = await self._attach(list({self._lanes.ids[lane] for lane in away}))
            for lane in away:
                if self._core.sessions.is_stored(session_id := self._lanes.ids[lane]):  # not one that is being made
                    session = self._core.sessions.get(session_id)
                    self._lanes.vacate([lane])
                    self._put([lane], session.group, np.array([session.slot]))
                elif error := errors.get(session_id):
                    failed[lane] = error
        return failed | {lane: SessionAway(self._lanes.ids[lane]) for lane in self._away(lanes, failed)}

    async def _await_told(self, lanes: Sequence[int]) -> None:
        """Waits until the chunks that have come for the sessions which were on lanes are told what has become of them:
        before any later ones are answered, and before the lane may be another's.
        """
        for lane in lanes:
            if self._lanes.is_open(lane):
                group, slot = self._lanes.place(lane)
                worker = self._core.worker(group.model)
                worker.line_up()
                if group.tail[slot] >= 0:
                    async with worker.turn(group, slot):
                        pass

    def _away(self, lanes: Sequence[int], failed: Collection[int]) -> list[int]:
        """The lanes whose sessions have left memory, and may be had again."""
        away = [
            lane for lane in lanes if lane not in failed and self._lanes.is_open(lane) and not self._lanes.is_here(lane)
        ]
        return [lane for lane in away if not self._core.sessions.was_taken(self._lanes.ids[lane])]

    async def _save(self, lanes: Iterable[int]) -> None:
        """Has the store keep the sessions of lanes as they are: another server may take them over now."""
        if self._core.keeper is None:
            return
        here: dict[int, list[int]] = {}
        for lane in lanes:
            if self._lanes.is_open(lane) and self._lanes.is_here(lane):
                here.setdefault(int(self._lanes.group[lane]), []).append(int(self._lanes.slot[lane]))
        with suppress(StoreDown):  # then nobody else can have them either
            for group, slots in [(self._lanes.groups[number], slots) for number, slots in here.items()]:
                await self._core.keeper.save(group, np.array(slots))

    async def _turns(self, items: Sequence[Item], most: int = _TAKEN_AT_ONCE) -> AsyncIterator[Sequence[Item]]:
        """A few of a message's items at a time; between them other streams have their turns."""
        for start in range(0, len(items), most):
            if start:
                await self._give_way()
            yield items[start : start + most]

    async def _open(self, alike: Sequence[pb.LaneOpen], errors: Mapping[str, ServiceError]) -> None:
        """Opens lanes that want the same: new sessions that differ by their ids, or there is only one."""
        lanes, ids = [], []
        for opening in alike:
            lane = opening.lane
            if lane >= self._core.settings.max_lanes:
                self._fail_opens([lane], TooLarge("lane", self._core.settings.max_lanes - 1, lane))
            elif not self._lanes.is_free(lane):
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
            session.session_id = self._caller.shown(self._lanes.ids[lane])
            response.opened.append(opened)  # a copy
        self._outbox.tell(response, len(lanes))

    def _put(self, lanes: Sequence[int], group: Group, slots: Array) -> None:
        """Puts N sessions of a group on N lanes."""
        self._lanes.put(lanes, group, slots)
        self._watch.opened(lanes)

    def _close(self, closings: Sequence[pb.LaneClose]) -> None:
        lanes = [closing.lane for closing in closings]
        if (slots := self._idle(lanes)) is not None and all(closing.delete_session for closing in closings):
            group = self._lanes.groups[int(self._lanes.group[lanes[0]])]
            self._lanes.vacate(lanes)
            self._core.sessions.delete_many(group, slots)
            self._outbox.tell(pb.StreamResponse(closed=[pb.LaneClosed(lane=lane) for lane in lanes]), len(lanes))
            return
        for closing in closings:
            self._close_one(closing.lane, closing.delete_session)

    def _idle(self, lanes: list[int]) -> Array | None:
        """The slots of N lanes' sessions, if these are different live ones of one group for which nothing is queued."""
        if (group := self._lanes.one_group(lanes)) is None:
            return None
        slots = self._lanes.slot[lanes]  # [N]
        self._core.worker(group.model).line_up()
        live = (group.generation[slots] == self._lanes.generation[lanes]) & (group.tail[slots] < 0)
        return slots if live.all() and len(set(slots.tolist())) == len(slots) else None

    def _close_one(self, lane: int, delete: bool) -> None:
        if not self._lanes.is_open(lane):
            self._fail(lane, pb.LANE_OPERATION_CLOSE, LaneUnknown(lane))
            return
        group, slot = self._lanes.place(lane)
        session_id = self._lanes.id(lane)
        self._lanes.shut([lane])

        def close() -> None:
            self._unanswered -= 1
            self._lanes.vacate([lane])
            try:
                if delete:
                    self._core.sessions.delete(session_id)
            except ServiceError as error:
                self._fail(lane, pb.LANE_OPERATION_CLOSE, error)
            else:
                self._outbox.tell(pb.StreamResponse(closed=[pb.LaneClosed(lane=lane)]), 1)

        self._unanswered += 1
        self._core.when_idle(group, slot, close)

    async def _frame(self, frame: pb.StepFrame, away: Mapping[int, ServiceError]) -> None:
        lanes = tuple(frame.lanes[:])
        chunks = len(lanes)
        if not chunks:
            raise InvalidRequest("frames.lanes", "at least one lane", "none")
        said = len(frame.first_steps)
        first_steps = np.array(frame.first_steps[:chunks], np.uint64) if said else None  # [N], if they are as many
        try:
            if said not in (0, chunks):
                raise InvalidRequest("frames.first_steps", f"{chunks}, as many as lanes, or none", str(said))
            found = self._lanes.find(lanes, away)
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
            await self._refuse(lanes, range(chunks), first_steps, service_error(error))
            return
        refused: list[tuple[Part, ServiceError]] = []  # told at last: what is to be run was fetched just now
        for part in found:
            index = part.index
            if part.group is None:
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
                    error,
                    model=part.group.model.name,
                    sessions=[self._lanes.ids[tag] for tag in part.tags[:4].tolist()],
                )
                refused.append((part, told))
        for part, told in refused:
            await self._refuse(lanes, part.positions(), first_steps, told)
        for part in found:
            if part.group is None:
                await self._refuse_unknown(lanes, part.positions(), first_steps, away)

    def _plan(self, outline: Outline) -> _Plan | None:
        """What to do with frames of an outline; None if it is not the same for all of its lanes, or an error."""
        plan: _Plan | None = outline.kept
        if plan is not None and plan.era == self._lanes.era:
            return plan
        try:
            found = self._lanes.find(outline.lanes)
            if len(found) != 1 or (group := found[0].group) is None:
                return None
            chunks = len(outline.lanes)
            shapes = {each.name: each.like() for each in outline.tensors}
            for field, array in shapes.items():
                _check_first_axis(f"inputs.{field}", array, chunks)
            key, owed = self._core.fit(group, chunks, shapes, None)
        except ServiceError:
            return None
        plan = outline.kept = _Plan(self._lanes.era, found[0], key, owed, rows_of(shapes, 3))
        return plan

    # Answering: the sink of this stream's blocks

    def session_id(self, tag: int) -> str:
        """See `Sink.session_id`."""
        return self._lanes.id(tag)

    def result(self, answers: Answers) -> None:
        """See `Sink.result`."""
        if self.cancelled:
            self._unanswered -= len(answers.tags)
            return
        parts, nbytes = self._written(answers)
        self._answer(parts, len(answers.tags), nbytes)

    def ready(self, answers: Sequence[Answers]) -> Tell:
        """See `Sink.ready`."""
        responses: list[tuple[bytes, int, int]] = []
        parts: list[Buffer] = []
        chunks = nbytes = 0
        for each in () if self.cancelled else answers:
            more, size = self._written(each)
            parts += more
            chunks, nbytes = chunks + len(each.tags), nbytes + size
            if nbytes > RESPONSE_BYTES or each is answers[-1]:
                responses.append((b"".join(cast("list[bytes]", parts)), chunks, nbytes))
                parts, chunks, nbytes = [], 0, 0

        def tell() -> None:
            if self.cancelled:
                self._unanswered -= sum([len(each.tags) for each in answers])
                return
            for response, chunks, nbytes in responses:
                self._answer([response], chunks, nbytes)

        return tell

    def _written(self, answers: Answers) -> tuple[list[Buffer], int]:
        """A response in pieces, and about how many bytes it has."""
        tensors = [(4, name, y) for name, y in answers.outputs.items()]
        tensors += [(5, name, state) for name, state in answers.states.items()]
        nbytes = sum([array.nbytes for _, _, array in tensors])
        return self._results.write(answers.tags, answers.first_steps, answers.timesteps, tensors), nbytes

    def _answer(self, parts: Sequence[Buffer], chunks: int, nbytes: int) -> None:
        """Has a response in pieces sent with the next flush, with answers of so many chunks."""
        self._unanswered -= chunks
        self._owed_bytes -= nbytes
        self._outbox.add(parts, chunks, nbytes)

    def failed(self, failures: Sequence[Failure]) -> None:
        """See `Sink.failed`."""
        self._unanswered -= len(failures)
        for failure in failures:
            self._fail(failure.tag, pb.LANE_OPERATION_STEP, failure.error, failure.first_step)

    async def _refuse(
        self, lanes: Sequence[int], positions: Sequence[int], first_steps: Array | None, error: ServiceError
    ) -> None:
        """The same error for chunks at some positions of a frame."""
        failure = pb.LaneError(operation=pb.LANE_OPERATION_STEP, status=status(error, self._caller))
        rejections[error.reason] += len(positions) - 1  # `status` has counted one
        async for some in self._turns(positions, _TOLD_AT_ONCE):
            response = pb.StreamResponse()
            for position in some:
                failure.lane = lanes[position]
                failure.ClearField("first_step")
                if (first_step := _step_at(first_steps, position)) is not None:
                    failure.first_step = first_step
                response.errors.append(failure)  # a copy
            self._outbox.tell(response, len(some))

    async def _refuse_unknown(
        self,
        lanes: Sequence[int],
        positions: Sequence[int],
        first_steps: Array | None,
        away: Mapping[int, ServiceError],
    ) -> None:
        """The same for lanes that are not open, or whose sessions could not be had: why, by lane."""
        async for some in self._turns(positions, _UNLIKE_AT_ONCE):
            for position in some:
                error = away.get(lanes[position]) or LaneUnknown(lanes[position])
                self._fail(lanes[position], pb.LANE_OPERATION_STEP, error, _step_at(first_steps, position))

    def _fail(
        self, lane: int, operation: pb.LaneOperation.ValueType, error: ServiceError, first_step: int | None = None
    ) -> None:
        told = status(error, self._caller)
        failure = pb.LaneError(lane=lane, operation=operation, first_step=first_step, status=told)
        self._outbox.tell(pb.StreamResponse(errors=[failure]), 1)

    async def _look(self) -> None:
        """Tells the client what it should know of its sessions."""
        for notice in await self._watch.look(self._lanes):
            told = pb.LaneNotice(
                lanes=notice.lanes,
                reason=_NOTICES[notice.reason],
                ended=notice.ended,
                time_left=None if notice.left is None else duration(notice.left),
            )
            self._outbox.tell(pb.StreamResponse(notices=[told]))

    def _fail_opens(self, lanes: Sequence[int], error: ServiceError) -> None:
        """The same error for N lanes."""
        failure = pb.LaneError(operation=pb.LANE_OPERATION_OPEN, status=status(error, self._caller))
        rejections[error.reason] += len(lanes) - 1  # `status` has counted one
        response = pb.StreamResponse()
        for lane in lanes:
            failure.lane = lane
            response.errors.append(failure)  # a copy
        self._outbox.tell(response, len(lanes))

    def flush(self) -> None:
        """See `Sink.flush`."""
        self._outbox.flush()


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
    part: Part
    signature: Signature
    owed: int
    rows: int


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


def _step_at(first_steps: Array | None, position: int) -> int | None:
    """The first step of a chunk, if its frame says one."""
    return int(first_steps[position]) if first_steps is not None and position < len(first_steps) else None


def _check_first_axis(field: str, array: Array, chunks: int) -> None:
    if array.shape[:1] != (chunks,):
        raise InvalidInput(field, f"a first axis of {chunks}, as many as lanes", f"shape {list(array.shape)}")
