"""A client that has every chunk answered exactly once, by the protocol alone: whatever happens, it opens its sessions
again by their ids and sends again what was not answered. It also does on purpose what confused clients do.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from rnnserve.codec import decode_named, encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import inference_pb2_grpc, session_pb2, session_pb2_grpc
from torture.history import Fault
from torture.plan import Plan, digest
from torture.track import AGAIN, Track, Trial
from torture.wire import channel, config, frame, reason

PATIENCE = 10.0


@dataclass(eq=False)
class Carried:
    """A session on one link's streams.

    Attributes:
        track: it.
        lane: where it is open, or is being opened; None: nowhere.
        known: so many of its chunks were answered when it was asked to be opened there.
        sent: the next chunk to send there; None: it is not open yet.
        not_before: when it is to be opened, by the monotonic clock.
    """

    track: Track
    lane: int | None = None
    known: int = 0
    sent: int | None = None
    not_before: float = 0.0

    def again(self) -> None:
        """Its lane is of no use any more: it is to be opened anew, in a moment."""
        self.lane = self.sent = None
        self.not_before = time.monotonic() + self.track.trial.chance.uniform(0, 0.05)


class Link:
    """One stream at a time, for some sessions."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.carried: list[Carried] = []
        self.others: list[Link] = []
        self._wake = asyncio.Event()
        self._lanes: dict[int, Carried] = {}
        self._unheard = 0  # chunks
        self._silent = False  # nothing is said until all of those are answered
        self._wrong: set[tuple[int, int]] = set()  # (lane, first step) of chunks that do not belong there

    def take(self, track: Track) -> None:
        """Carries a session from now on."""
        self.carried.append(Carried(track))
        track.moved.append(self._wake)
        self._wake.set()

    def carries(self, track: Track) -> bool:
        return any(each.track is track for each in self.carried)

    async def run(self) -> None:
        """Keeps a stream up until all is over."""
        while not self.trial.over:
            try:
                await self._converse(self.trial.chance.choice(self.trial.addresses()))
                self.trial.counts["streams that ended well"] += 1
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                self.trial.counts["lost streams"] += 1
            except TimeoutError:
                self.trial.counts["stalled streams"] += 1
                if self._silent:
                    self.kept_waiting()
            self._unheard = 0
            self._wake.set()
            for each in self.carried:
                each.lane = each.sent = None
            await asyncio.sleep(self.trial.chance.uniform(0, 0.1))

    def kept_waiting(self) -> None:
        """What was asked on the stream should have been answered by now."""
        if self._unheard > 0:
            self.trial.faults.append(Fault("kept waiting", f"{self._unheard} chunks of a stream"))

    async def settled(self) -> None:
        """Waits until all that was asked on the stream is answered, or it is lost."""
        while self._unheard > 0:
            self._wake.clear()
            await self._wake.wait()

    async def _converse(self, address: str) -> None:
        async with channel(address) as connection:
            stream: Any = inference_pb2_grpc.InferenceServiceStub(connection).Stream()
            self._lanes, self._wrong, self._silent = {}, set(), False
            patience = (6 if self.trial.shared else 1) * PATIENCE
            writer = asyncio.create_task(self._write(stream))
            try:
                while (response := await asyncio.wait_for(stream.read(), patience)) is not grpc.aio.EOF:
                    self._hear(response)
                    self._wake.set()
                if self._unheard > 0 and (await stream.code()) == grpc.StatusCode.OK:
                    self.trial.faults.append(Fault("unanswered at the end", f"{self._unheard} chunks of a stream"))
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
                stream.cancel()

    async def _write(self, stream: Any) -> None:
        while True:
            request = self._say()
            if request.ByteSize():
                apart = self.trial.abreast and self.trial.chance.random() < 0.5
                for each in _apart(request) if apart else [request]:
                    await stream.write(each)
                if self.trial.abreast:  # until there are several to be sent one right behind the other
                    await asyncio.sleep(self.trial.chance.uniform(0, 0.02))
                if self.trial.happens(0.02):
                    self.trial.counts["streams half-closed"] += 1
                    await stream.done_writing()  # all that was said is answered, and then the stream ends
                    return
                if self.trial.shared and self.trial.happens(0.2):
                    await self._hear_out()
                continue
            self._wake.clear()
            waiting = [each.not_before for each in self.carried if each.lane is None and not each.track.done]
            try:
                soon = max(0.001, min(waiting) - time.monotonic()) if waiting else None
                await asyncio.wait_for(self._wake.wait(), soon)
            except TimeoutError:
                pass

    async def _hear_out(self) -> None:
        """Says nothing until all that was asked is answered, whatever others ask of the same sessions meanwhile."""
        self.trial.counts["silences"] += 1
        self._silent = True
        await self.settled()
        self._silent = False

    # What is said

    def _say(self) -> pb.StreamRequest:
        request, now = pb.StreamRequest(), time.monotonic()
        rounds: dict[int, dict[Any, list[tuple[Carried, int, bool]]]] = {}
        columns, onward = self._columns(), defaultdict[int, bool](self._goes_on)
        for each in list(self.carried):
            track = each.track
            if track.done:
                continue
            if self.others and self.trial.happens(0.01):
                self._hand_over(each)
            elif each.lane is None:
                if now >= each.not_before:
                    self._open(request, each)
            elif (until := columns[track.column]) is not None:
                wanted = self._wanted(request, each, until, onward=onward[track.column])
                for place, (number, wrong) in enumerate(wanted):
                    alike = rounds.setdefault(number if self.trial.abreast else place, defaultdict(list))
                    kind = track.column if self.trial.abreast else track.plan.kind
                    alike[kind, track.plan.lengths[number]].append((each, number, wrong))
        for _, alike in sorted(rounds.items()):
            for chunks in alike.values():
                request.frames.append(self._frame(chunks))
        return request

    def _goes_on(self) -> bool:
        """Whether sessions are to go on where other drivers have sent them, not waiting for the answers."""
        return self.trial.shared and self.trial.chance.random() < 0.5

    def _hand_over(self, each: Carried) -> None:
        """Another link carries a session from now on."""
        if others := [other for other in self.others if not other.carries(each.track)]:
            self.carried.remove(each)
            each.track.moved.remove(self._wake)
            self.trial.counts["hops"] += 1
            self.trial.chance.choice(others).take(each.track)

    def _columns(self) -> dict[int, int | None]:
        """Up to which chunk the sessions of each column may be sent now; None: not all of them are open yet."""
        until: dict[int, int | None] = {}
        for each in self.carried:
            track = each.track
            if not track.done:
                limit = None if each.sent is None else track.frontier + self.trial.ahead
                before = until.get(track.column, limit)
                until[track.column] = None if limit is None or before is None else min(limit, before)
        return until

    def _open(self, request: pb.StreamRequest, each: Carried) -> None:
        track = each.track
        each.lane, each.known = len(self._lanes), track.frontier
        self._lanes[each.lane] = each
        if track.created or track.exists:
            request.opens.add(lane=each.lane, session_id=track.plan.name)
            return
        request.opens.add(lane=each.lane, create=_config(track.plan))

    def _wanted(self, request: pb.StreamRequest, each: Carried, until: int, *, onward: bool) -> list[tuple[int, bool]]:
        """The chunks to send now, and whether each is another than it should be."""
        track = each.track
        assert each.sent is not None
        start = each.sent if track.taken_back else max(each.sent, track.frontier)
        if onward and track.high < until:  # else it might say nothing, and wait for nothing
            start = max(start, track.high)
        wanted = [(number, False) for number in range(start, min(until, track.total))]
        if wanted:
            each.sent = start + len(wanted)
        if not wanted or not self.trial.mischief:
            return wanted
        if track.frontier and self.trial.happens():
            old = max(0, track.frontier - 1 - int(self.trial.chance.expovariate(0.1)))
            wrong = self.trial.chance.random() < 0.2 and not track.taken_back  # where it might be taken
            if (old, False) not in wanted:
                self.trial.counts["chunks sent wrong" if wrong else "chunks sent twice"] += 1
                wanted.insert(self.trial.chance.randrange(len(wanted) + 1), (old, wrong))
        if self.trial.happens(0.2):
            self.trial.counts["chunks out of order"] += len(wanted) > 1
            self.trial.chance.shuffle(wanted)
        if self.trial.happens(0.1):
            assert each.lane is not None
            request.closes.add(lane=each.lane)
            each.again()
        return wanted

    def _frame(self, chunks: list[tuple[Carried, int, bool]]) -> pb.StepFrame:
        """Chunks of one shape, each of another session."""
        inputs, masks = [], []
        lanes = [next(lane for lane, other in reversed(self._lanes.items()) if other is each) for each, _, _ in chunks]
        for lane, (each, number, wrong) in zip(lanes, chunks, strict=True):
            x, mask = each.track.plan.chunk(number)
            inputs.append(-x if wrong else x)
            masks.append(mask)
            each.track.sending(number)
            if wrong:
                self._wrong.add((lane, each.track.plan.starts[number]))
        self._unheard += len(chunks)
        starts = [each.track.plan.starts[number] for each, number, _ in chunks]
        return frame(lanes, starts, np.stack(inputs), None if masks[0] is None else np.stack(masks))

    # What is heard

    def _hear(self, response: pb.StreamResponse) -> None:
        for opened in response.opened:
            each = self._lanes[opened.lane]
            if self._is_current(each, opened.lane):
                stands = each.track.stands(opened.session.step, each.known)
                each.sent = each.track.frontier if stands is None else min(stands, each.track.frontier)
            else:
                each.track.created = True
        for answers in response.frames:
            self._unheard -= len(answers.lanes)
            outputs, states = decode_named(answers.outputs, "outputs"), decode_named(answers.states, "states")
            for row, (lane, first_step) in enumerate(zip(answers.lanes, answers.first_steps, strict=True)):
                what = digest({n: y[row] for n, y in outputs.items()}, {n: s[row] for n, s in states.items()})
                self._lanes[lane].track.answered(first_step, what)
        for error in response.errors:
            each, why = self._lanes[error.lane], reason(error)
            track, current = each.track, self._is_current(each, error.lane)
            if error.operation == pb.LANE_OPERATION_OPEN:
                self._not_opened(track, why)
                if current:
                    each.again()
            elif error.operation == pb.LANE_OPERATION_STEP:
                self._unheard -= 1
                place = (error.lane, error.first_step)
                broken = (current or why not in AGAIN) and track.refused(why, error.first_step, place in self._wrong)
                if broken and current:
                    each.again()

    def _is_current(self, each: Carried, lane: int) -> bool:
        """Whether that is where a session is open, or is being opened."""
        return each.lane == lane and each in self.carried

    def _not_opened(self, track: Track, why: str) -> None:
        self.trial.counts[f"open: {why.lower()}"] += 1
        if why == "SESSION_EXISTS":
            track.exists = True
        elif why == "SESSION_UNKNOWN" and not track.created:
            track.exists = False  # whoever was making it was killed
        elif why not in AGAIN:
            track.fault("lost session", why)


def _apart(request: pb.StreamRequest) -> list[pb.StreamRequest]:
    """A message for each frame."""
    first = pb.StreamRequest(opens=request.opens, closes=request.closes)
    return [*([first] if first.ByteSize() else []), *(pb.StreamRequest(frames=[each]) for each in request.frames)]


def _config(plan: Plan) -> session_pb2.SessionConfig:
    kind = plan.kind
    asked = config(kind.model, plan.name, batch=kind.batch, **dict.fromkeys(kind.options, True))
    asked.reset_rules.every_steps, asked.reset_rules.masked_steps = kind.every_steps, kind.masked_steps
    return asked


async def call_by_call(trial: Trial, track: Track) -> None:
    """Drives a session by Predict, one chunk after the other, with deadlines that pass and calls that are cancelled."""
    plan, number = track.plan, 0
    while not trial.over and not track.done:
        async with channel(trial.chance.choice(trial.addresses())) as connection:
            sessions = session_pb2_grpc.SessionServiceStub(connection)
            stub = inference_pb2_grpc.InferenceServiceStub(connection)
            try:
                if not track.exists:
                    asked = session_pb2.CreateSessionRequest(config=_config(plan))
                    await sessions.CreateSession(asked, timeout=PATIENCE)
                    track.exists = track.created = True
                while not trial.over and not track.done and not trial.happens(0.05):
                    number = track.frontier
                    if number and trial.happens(0.5):
                        number -= 1
                    await _call(trial, track, stub, number)
            except grpc.aio.AioRpcError as error:
                why = reason(error)
                passed = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                trial.counts["calls whose deadline passed" if passed else f"call: {why.lower()}"] += 1
                if why == "SESSION_EXISTS":
                    track.exists = True
                elif why == "SESSION_UNKNOWN" and not track.created:
                    track.exists = False
                elif why == "STEP_BEHIND":
                    track.refused(why, plan.starts[number], wrong=False)
                elif not why.startswith("status") and why not in AGAIN - {"STEP_AHEAD"} | {"DEADLINE_PASSED"}:
                    track.fault("refused", why)
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise
                trial.counts["calls cancelled"] += 1
        await asyncio.sleep(trial.chance.uniform(0, 0.02))


async def _call(trial: Trial, track: Track, stub: Any, number: int) -> None:
    x, mask = track.plan.chunk(number)
    start = track.plan.starts[number]
    request = pb.PredictRequest(session_id=track.plan.name, inputs=encode_named({"input": x}), first_step=start)
    if mask is not None:
        request.mask.CopyFrom(frame([0], None, x, mask).mask)
    track.sending(number)
    hasty = trial.happens(0.5)
    call = stub.Predict(request, timeout=trial.chance.uniform(0.0003, 0.01) if hasty else PATIENCE)
    if trial.happens(0.5):
        asyncio.get_running_loop().call_later(trial.chance.uniform(0, 0.01), call.cancel)
    response = await call
    if response.step != start + track.plan.lengths[number]:
        track.fault("wrong step", f"{response.step} after chunk {number}")
    outputs, states = decode_named(response.outputs, "outputs"), decode_named(response.states, "states")
    track.answered(start, digest(outputs, states))
