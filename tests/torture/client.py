"""A client that has every chunk answered exactly once, by the protocol alone: whatever happens, it opens its sessions
again by their ids and sends again what was not answered. It also does on purpose what confused clients do.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from rnnserve.codec import decode_named, encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import inference_pb2_grpc, session_pb2, session_pb2_grpc
from torture.history import Fault, History
from torture.plan import Plan, digest
from torture.wire import channel, config, frame, reason

WINDOW = 16
"""Chunks that a server must be able to answer again."""

_AGAIN = {"STEP_AHEAD", "SESSION_TAKEN_OVER", "STORE_DOWN", "DRAINING", "QUEUE_FULL", "LANE_UNKNOWN", "CANCELLED"}
_PATIENCE = 10.0


class Trial:
    """What the clients of a run have in common.

    Attributes:
        chance: the seeded dice.
        addresses: gives the servers' addresses.
        ahead: chunks of a session that are sent before the first of them is answered.
        abreast: there are sessions that go in step.
        counts: what happened, and how often.
        faults: what must not happen, and did.
        steps: time steps that were answered.
        longest: the longest time that a chunk waited for its answer, in seconds.
        patient: which chunk that was.
        over: nothing more is to be done.
        mischief: how likely a needless or a wrong request is, each time.
        alone: there is one server, which nobody can take a session from.
    """

    def __init__(
        self, seed: int, addresses: Callable[[], list[str]], *, ahead: int, mischief: float, abreast: bool = False
    ) -> None:
        self.chance = random.Random(seed)
        self.addresses = addresses
        self.ahead = ahead
        self.abreast = abreast
        self.mischief = mischief
        self.alone = len(addresses()) == 1
        self.counts: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.steps = 0
        self.longest, self.patient = 0.0, ""
        self.over = False
        self.moved = asyncio.Event()

    def happens(self, likelihood: float = 1.0) -> bool:
        return self.chance.random() < self.mischief * likelihood


class Track:
    """How far one session is.

    Attributes:
        plan: what it is to do.
        column: that of the sessions that it goes in step with.
        history: what it was answered.
        total: chunks that are wanted.
        frontier: so many first chunks are answered.
        high: so many chunks were sent ever.
        created: it was made, and that was acknowledged.
        exists: somebody has said that it exists, who may not have stored it yet.
        lane: where it is open, or is being opened; None: nowhere.
        sent: the next chunk to send on the lane; None: it is not open yet.
    """

    def __init__(self, trial: Trial, plan: Plan, column: int) -> None:
        self.trial = trial
        self.plan = plan
        self.column = column
        self.history = History(0)
        self.total = len(plan.lengths)
        self.frontier = self.high = self.known = 0
        self.created = self.exists = False
        self.lane: int | None = None
        self.sent: int | None = None
        self.not_before = 0.0
        self._numbers = {step: number for number, step in enumerate(plan.starts)}
        self._answers: dict[int, bytes] = {}
        self._since: dict[int, float] = {}

    @property
    def done(self) -> bool:
        return self.frontier >= self.total

    def fault(self, name: str, detail: str = "") -> None:
        """Gives up: what is wrong cannot be mended."""
        self.trial.faults.append(Fault(name, self.plan.name, detail))
        self.total = self.frontier
        self.trial.moved.set()

    def again(self) -> None:
        """Its lane is of no use any more: it is to be opened anew, in a moment."""
        self.lane = self.sent = None
        self.not_before = time.monotonic() + self.trial.chance.uniform(0, 0.05)

    def sending(self, number: int) -> None:
        """A chunk is about to be sent."""
        self._since.setdefault(number, time.monotonic())
        if number < self.high:
            self.trial.counts["resends"] += 1
        self.high = max(self.high, number + 1)

    def opened(self, step: int) -> None:
        """The server says where the session is."""
        self.created = True
        if step < self.plan.starts[self.known]:
            self.fault("lost commit", f"is at step {step}, chunks up to {self.plan.starts[self.known]} were answered")
        elif step > self.plan.starts[self.high] or step not in self._numbers:
            self.fault("doubled step", f"is at step {step}, chunks up to {self.plan.starts[self.high]} were sent")
        else:
            self.sent = self.frontier

    def answered(self, first_step: int, what: bytes) -> None:
        """A chunk was answered."""
        number, self.created = self._numbers.get(first_step, self.high), True
        if number >= self.high:
            self.fault("answer to nothing", f"at step {first_step}")
        elif number in self._answers:
            self.trial.counts["replays"] += 1
            if self._answers[number] != what:
                self.fault("another answer", f"to chunk {number}, which was answered before")
        else:
            self._answers[number] = what
            self.history.answers.append((number, what))
            waited = time.monotonic() - self._since.pop(number)
            if waited > self.trial.longest:
                self.trial.longest, self.trial.patient = waited, f"{self.plan.name}, chunk {number}"
            self.trial.steps += self.plan.lengths[number]
            while self.frontier in self._answers:
                self.frontier += 1
            self.trial.moved.set()

    def refused(self, why: str, first_step: int, wrong: bool) -> bool:
        """A chunk was refused: whether its lane is of no use any more.

        Args:
            why: the reason.
            first_step: the chunk's.
            wrong: the chunk was another than the one that belongs there.
        """
        number = self._numbers.get(first_step, -1)
        self.trial.counts[why.lower()] += 1
        if why == "STEP_BEHIND" and 0 <= number < self.high - WINDOW:
            return False  # nobody needs to remember that
        if why == "STEP_CONFLICT" and wrong:
            return False
        if why == "STEP_BEHIND":
            self.fault("forgotten answer", f"to chunk {number} of {self.high} that were sent")
        elif why not in _AGAIN or (why == "SESSION_TAKEN_OVER" and self.trial.alone):
            self.fault("refused", f"chunk {number}: {why}")
        return True


class Link:
    """One stream at a time, for some sessions."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.tracks: list[Track] = []
        self.others: list[Link] = []
        self._wake = asyncio.Event()
        self._lanes: dict[int, Track] = {}
        self._wrong: set[tuple[int, int]] = set()  # (lane, first step) of chunks that do not belong there

    def take(self, track: Track) -> None:
        """Carries a session from now on."""
        self.tracks.append(track)
        self._wake.set()

    @property
    def done(self) -> bool:
        return all(track.done for track in self.tracks)

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
            for track in self.tracks:
                track.lane = track.sent = None
            await asyncio.sleep(self.trial.chance.uniform(0, 0.1))

    async def _converse(self, address: str) -> None:
        async with channel(address) as connection:
            stream: Any = inference_pb2_grpc.InferenceServiceStub(connection).Stream()
            self._lanes, self._wrong, self._unheard = {}, set(), 0
            writer = asyncio.create_task(self._write(stream))
            try:
                while (response := await asyncio.wait_for(stream.read(), _PATIENCE)) is not grpc.aio.EOF:
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
                continue
            self._wake.clear()
            waiting = [track.not_before for track in self.tracks if track.lane is None and not track.done]
            try:
                soon = max(0.001, min(waiting) - time.monotonic()) if waiting else None
                await asyncio.wait_for(self._wake.wait(), soon)
            except TimeoutError:
                pass

    # What is said

    def _say(self) -> pb.StreamRequest:
        request, now = pb.StreamRequest(), time.monotonic()
        rounds: dict[int, dict[Any, list[tuple[Track, int, bool]]]] = {}
        columns = self._columns()
        for track in list(self.tracks):
            if track.done:
                continue
            if self.others and self.trial.happens(0.01):
                self.tracks.remove(track)
                track.again()
                self.trial.counts["hops"] += 1
                self.trial.chance.choice(self.others).take(track)
            elif track.lane is None:
                if now >= track.not_before:
                    self._open(request, track)
            elif (until := columns[track.column]) is not None:
                for place, (number, wrong) in enumerate(self._wanted(request, track, until)):
                    alike = rounds.setdefault(number if self.trial.abreast else place, defaultdict(list))
                    kind = track.column if self.trial.abreast else track.plan.kind
                    alike[kind, track.plan.lengths[number]].append((track, number, wrong))
        for _, alike in sorted(rounds.items()):
            for chunks in alike.values():
                request.frames.append(self._frame(chunks))
        return request

    def _columns(self) -> dict[int, int | None]:
        """Up to which chunk the sessions of each column may be sent now; None: not all of them are open yet."""
        until: dict[int, int | None] = {}
        for track in self.tracks:
            if not track.done:
                limit = None if track.sent is None else track.frontier + self.trial.ahead
                before = until.get(track.column, limit)
                until[track.column] = None if limit is None or before is None else min(limit, before)
        return until

    def _open(self, request: pb.StreamRequest, track: Track) -> None:
        track.lane, track.known = len(self._lanes), track.frontier
        self._lanes[track.lane] = track
        if track.created or track.exists:
            request.opens.add(lane=track.lane, session_id=track.plan.name)
            return
        kind = track.plan.kind
        asked = config(kind.model, track.plan.name, batch=kind.batch, **dict.fromkeys(kind.options, True))
        request.opens.add(lane=track.lane, create=asked)

    def _wanted(self, request: pb.StreamRequest, track: Track, until: int) -> list[tuple[int, bool]]:
        """The chunks to send now, and whether each is another than it should be."""
        assert track.sent is not None
        wanted = [(number, False) for number in range(track.sent, min(until, track.total))]
        track.sent += len(wanted)
        if not wanted or not self.trial.mischief:
            return wanted
        if track.frontier and self.trial.happens():
            old = max(0, track.frontier - 1 - int(self.trial.chance.expovariate(0.1)))
            wrong = self.trial.chance.random() < 0.2
            self.trial.counts["chunks sent wrong" if wrong else "chunks sent twice"] += 1
            wanted.insert(self.trial.chance.randrange(len(wanted) + 1), (old, wrong))
        if self.trial.happens(0.2):
            self.trial.counts["chunks out of order"] += len(wanted) > 1
            self.trial.chance.shuffle(wanted)
        if self.trial.happens(0.1):
            assert track.lane is not None
            request.closes.add(lane=track.lane)
            track.again()
        return wanted

    def _frame(self, chunks: list[tuple[Track, int, bool]]) -> pb.StepFrame:
        """Chunks of one shape, each of another session."""
        inputs, masks = [], []
        lanes = [
            next(lane for lane, other in reversed(self._lanes.items()) if other is track) for track, _, _ in chunks
        ]
        for lane, (track, number, wrong) in zip(lanes, chunks, strict=True):
            x, mask = track.plan.chunk(number)
            inputs.append(-x if wrong else x)
            masks.append(mask)
            track.sending(number)
            if wrong:
                self._wrong.add((lane, track.plan.starts[number]))
        self._unheard += len(chunks)
        starts = [track.plan.starts[number] for track, number, _ in chunks]
        return frame(lanes, starts, np.stack(inputs), None if masks[0] is None else np.stack(masks))

    # What is heard

    def _hear(self, response: pb.StreamResponse) -> None:
        for opened in response.opened:
            track = self._lanes[opened.lane]
            if track.lane == opened.lane and track in self.tracks:
                track.opened(opened.session.step)
            else:
                track.created = True
        for answers in response.frames:
            self._unheard -= len(answers.lanes)
            outputs, states = decode_named(answers.outputs, "outputs"), decode_named(answers.states, "states")
            for row, (lane, first_step) in enumerate(zip(answers.lanes, answers.first_steps, strict=True)):
                what = digest({n: y[row] for n, y in outputs.items()}, {n: s[row] for n, s in states.items()})
                self._lanes[lane].answered(first_step, what)
        for error in response.errors:
            track, why = self._lanes[error.lane], reason(error)
            current = track.lane == error.lane and track in self.tracks
            if error.operation == pb.LANE_OPERATION_OPEN:
                self._not_opened(track, why, current)
            elif error.operation == pb.LANE_OPERATION_STEP:
                self._unheard -= 1
                place = (error.lane, error.first_step)
                broken = (current or why not in _AGAIN) and track.refused(why, error.first_step, place in self._wrong)
                if broken and current:
                    track.again()

    def _not_opened(self, track: Track, why: str, current: bool) -> None:
        self.trial.counts[f"open: {why.lower()}"] += 1
        if why == "SESSION_EXISTS":
            track.exists = True
        elif why == "SESSION_UNKNOWN" and not track.created:
            track.exists = False  # whoever was making it was killed
        elif why not in _AGAIN:
            track.fault("lost session", why)
        if current:
            track.again()


def _apart(request: pb.StreamRequest) -> list[pb.StreamRequest]:
    """A message for each frame."""
    first = pb.StreamRequest(opens=request.opens, closes=request.closes)
    return [*([first] if first.ByteSize() else []), *(pb.StreamRequest(frames=[each]) for each in request.frames)]


async def call_by_call(trial: Trial, track: Track) -> None:
    """Drives a session by Predict, one chunk after the other, with deadlines that pass and calls that are cancelled."""
    plan, kind = track.plan, track.plan.kind
    while not trial.over and not track.done:
        async with channel(trial.chance.choice(trial.addresses())) as connection:
            sessions = session_pb2_grpc.SessionServiceStub(connection)
            stub = inference_pb2_grpc.InferenceServiceStub(connection)
            try:
                if not track.exists:
                    asked = config(kind.model, plan.name, batch=kind.batch, **dict.fromkeys(kind.options, True))
                    await sessions.CreateSession(session_pb2.CreateSessionRequest(config=asked), timeout=_PATIENCE)
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
                elif not why.startswith("status") and why not in _AGAIN - {"STEP_AHEAD"} | {"DEADLINE_PASSED"}:
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
    call = stub.Predict(request, timeout=trial.chance.uniform(0.0003, 0.01) if hasty else _PATIENCE)
    if trial.happens(0.5):
        asyncio.get_running_loop().call_later(trial.chance.uniform(0, 0.01), call.cancel)
    response = await call
    if response.step != start + track.plan.lengths[number]:
        track.fault("wrong step", f"{response.step} after chunk {number}")
    outputs, states = decode_named(response.outputs, "outputs"), decode_named(response.states, "states")
    track.answered(start, digest(outputs, states))
