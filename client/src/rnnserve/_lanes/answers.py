"""What becomes of chunks: a row is answered or fails, and with its last row a chunk of several lanes is."""

from __future__ import annotations

from typing import Any

from rnnserve._chunks import OVERHEAD, Answer, Columns, Gather, Lane, Pending, new_answer
from rnnserve._lanes.numbers import ProtocolViolation
from rnnserve._lanes.order import Account, Order
from rnnserve._lanes.pace import Pace, Timing
from rnnserve.codec import decode_named
from rnnserve.errors import RequestError, StepMismatch
from rnnserve.v1 import inference_pb2

#: The generation of a chunk that was sent behind one that failed, and will fail for that reason.
DOOMED = -1


class Answers(Order):
    """The chunks that are sent and not answered, and the answers that are known."""

    def __init__(self, account: Account | None, timing: Timing | None) -> None:
        super().__init__(account, timing)
        self._answers: list[Answer] = []
        self._heard: list[Pace] = []  # those that were answered and are not settled
        self._later: list[Answer] = []  # to the second cohort, where a message answers both
        self.in_flight = 0

    def barrier(self, lane: Lane, ticket: Any) -> bool:
        """Wishes to know when every chunk wished on the lane so far is answered. False: all are, no answer comes."""
        if lane.pending:
            lane.pending.append(Pending(-1, lane.generation, None, 0, None, ticket))
        return bool(lane.pending)

    def _receive_frame(self, frame: inference_pb2.ResultFrame) -> None:
        columns = Columns(decode_named(frame.outputs, "outputs"), decode_named(frame.states, "states"))
        lanes = list(frame.lanes)
        for arrays in (columns.outputs, columns.states):
            for name, array in arrays.items():
                if array.ndim < 2 or len(array) != len(lanes):
                    raise ProtocolViolation(f"{name!r} has shape {array.shape} for {len(lanes)} lanes")
        gathered: dict[Gather, tuple[Pending, list[int], list[int]]] = {}
        known, answers = self._lanes, self._answers
        paced: dict[Pace, list[Lane]] = {}
        pace, same, into = None, [], answers
        for source, (number, first_step) in enumerate(zip(lanes, frame.first_steps, strict=True)):
            lane = known.get(number)
            if lane is not None and lane.pace is not None and len(lane.pending) == 1:
                # What is most often answered, in a few lines: the only chunk of a lane. All else is the way below.
                first, _, chunk, _, gather, ticket = lane.pending[0]
                if first == first_step and gather is None and chunk is not None and lane.backlog is None:
                    lane.pending.clear()
                    self.in_flight -= 1
                    lane.active = 0
                    self.account.held -= chunk.nbytes + OVERHEAD
                    if lane.pace is not pace:
                        pace = lane.pace
                        same = paced.setdefault(pace, [])
                        into = self._later if pace.cohort else answers
                    into.append(new_answer((ticket, (columns, source), None)))
                    same.append(lane)
                    continue
            pending = self._take(self._lane(number), first_step)
            if pending.gather is None:
                self.account.held -= pending.chunk.nbytes + OVERHEAD  # type: ignore[union-attr]  # not a barrier
                answers.append(Answer(pending.ticket, (columns, source)))
            else:
                _, rows, sources = gathered.setdefault(pending.gather, (pending, [], []))
                rows.append(pending.row)
                sources.append(source)
        for pace, same in paced.items():
            self._heard.append(pace)
            if (other := pace.answered(same)) is not pace:
                self._heard.append(other)
        for gather, (pending, rows, sources) in gathered.items():
            gather.put(columns, rows, sources)
            if not gather.left:
                self.account.held -= pending.chunk.nbytes + OVERHEAD  # type: ignore[union-attr]
                self._answers.append(gather.answer(pending.ticket))

    def take_later(self) -> list[Answer]:
        """What a message answers that is to be told a little later than what `receive` gave: see `pace`."""
        later, self._later = self._later, []
        return later

    def _take_answers(self) -> list[Answer]:
        answers, self._answers = self._answers, []
        return answers

    def settle(self) -> None:
        """Lets go chunks that were held until these answers. Whom they set free may wish on before it is called."""
        if self._heard:
            heard, self._heard = self._heard, []
            for pace in heard:
                pace.heard()
            self.account.collect()
            for pace in heard:
                pace.settle()

    def _receive_failure(self, lane: Lane, first_step: int | None, cause: RequestError) -> None:
        past = isinstance(cause, StepMismatch) and cause.past
        pending = self._take(lane, first_step, failed=not past)
        expected = cause.expected_step if isinstance(cause, StepMismatch) else None
        if past:
            # The session is beyond it already: that does no harm to what was wished behind it.
            lane.next_step = max(lane.next_step, expected or 0)
        elif pending.generation == lane.generation:
            # The session is where this chunk found it; what was wished behind it will fail too.
            lane.generation += 1
            lane.next_step = pending.first_step if expected is None else expected
        self._fail(pending, cause)

    def _take(self, lane: Lane, first_step: int | None, *, failed: bool = False) -> Pending:
        """Takes the earliest unanswered chunk of the lane that starts there, and passes the barriers that it held."""
        waiting = lane.pending
        for index, pending in enumerate(waiting):
            if pending.chunk is not None and (first_step is None or pending.first_step == first_step):
                if failed and pending.generation == lane.generation:
                    for behind in range(index + 1, len(waiting)):
                        waiting[behind] = waiting[behind]._replace(generation=DOOMED)
                if index:
                    del waiting[index]
                else:
                    waiting.popleft()
                self.in_flight -= 1
                lane.active -= pending.chunk.form.weight
                if lane.pace is not None:
                    lane.pace.touched(lane)
                    self._heard.append(lane.pace)
                if lane.backlog is not None:
                    self._next(lane, lane.backlog)
                while waiting and waiting[0].chunk is None:
                    self._answers.append(Answer(waiting.popleft().ticket, None))
                return pending
        raise ProtocolViolation(f"the server answered step {first_step} of lane {lane.number}, which was not asked")

    def _fail(self, pending: Pending, cause: RequestError) -> None:
        assert pending.chunk is not None
        gather = pending.gather
        if gather is None:
            self._answers.append(Answer(pending.ticket, None, cause))
        else:
            gather.errors[pending.row] = cause
            gather.left -= 1
            if gather.left:
                return
            self._answers.append(gather.answer(pending.ticket))
        self.account.held -= pending.chunk.nbytes + OVERHEAD

    def _drop(self, lane: Lane) -> None:
        """Drops what is wished on a lane; whoever waits for it is told by others."""
        for pending in lane.pending:
            chunk, gather = pending.chunk, pending.gather
            if chunk is not None:
                if gather is not None:
                    gather.left -= 1
                if gather is None or not gather.left:
                    self.account.held -= chunk.nbytes + OVERHEAD
        lane.pending.clear()
