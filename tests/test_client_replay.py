"""What the client's core does when streams are lost, without I/O, against a model of a server that applies once."""

from __future__ import annotations

import random

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_server import failure
from rnnserve import codec
from rnnserve._chunks import REPLAY_CHUNKS, REPLAY_WINDOW
from rnnserve._lanes import Lanes
from rnnserve.errors import GroupError, InvalidInput, RequestError, SessionExists, SessionNotFound, StepMismatch
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import session_pb2
from test_client_lanes import AHEAD, INVALID, chunk, error, result, value

EXISTS = failure("SESSION_EXISTS", grpc.StatusCode.ALREADY_EXISTS)
UNKNOWN = failure("SESSION_UNKNOWN", grpc.StatusCode.NOT_FOUND)
AWAY = failure("DRAINING", grpc.StatusCode.UNAVAILABLE, retry_after=0.5)


SHARE = REPLAY_WINDOW // REPLAY_CHUNKS


class Oracle:
    """A server that applies each chunk once: it takes one at the session's step, and repeats what it said of others.

    A chunk of a negative value is refused, always.
    """

    def __init__(self, window=REPLAY_CHUNKS):
        self.window = window
        self.steps, self.replies, self.applied = {}, {}, {}

    def stream(self):
        """A new stream: a function from requests to responses."""
        lanes = {}
        return lambda request: self.take(request, lanes)

    def take(self, request, lanes):
        response = pb.StreamResponse()
        for opening in request.opens:
            assert opening.lane not in lanes
            name, config = opening.session_id, opening.create
            if not name and config.session_id in self.steps:
                response.errors.append(error(opening.lane, 0, EXISTS, pb.LANE_OPERATION_OPEN))
                continue
            if not name:
                name = config.session_id
                self.steps[name], self.replies[name], self.applied[name] = 0, {}, []
            if name not in self.steps:
                response.errors.append(error(opening.lane, 0, UNKNOWN, pb.LANE_OPERATION_OPEN))
                continue
            lanes[opening.lane] = name
            session = session_pb2.Session(session_id=name, model=config.model or "m", batch_size=1)
            session.step = self.steps[name]
            response.opened.add(lane=opening.lane, session=session)
        for frame in request.frames:
            x = codec.decode(frame.inputs[0].tensor)
            assert len(set(frame.lanes)) == len(frame.lanes)
            for row, (lane, first) in enumerate(zip(frame.lanes, frame.first_steps, strict=True)):
                status = self.apply(lanes[lane], first, x[row])
                if status is None:
                    response.frames.append(result(frame, [row]))
                else:
                    response.errors.append(error(lane, first, status))
        for closing in request.closes:
            name = lanes.pop(closing.lane)
            if closing.delete_session:
                self.steps.pop(name, None)
            response.closed.add(lane=closing.lane)
        return response

    def apply(self, name, first, x):
        replies, step = self.replies[name], self.steps[name]
        if first in replies:
            return None if replies[first] == x.tobytes() else failure("STEP_CONFLICT", grpc.StatusCode.ABORTED)
        if first != step:
            return AHEAD if first > step else failure("STEP_BEHIND", grpc.StatusCode.OUT_OF_RANGE)
        if x.flat[0] < 0:
            return INVALID
        replies[first] = x.tobytes()
        if len(replies) > self.window:
            del replies[min(replies)]
        self.steps[name] += x.shape[1]
        self.applied[name].append(float(x.flat[0]))
        return None


class Wire:
    """One stream after another between `Lanes` and the oracle, that can lose what is on its way."""

    def __init__(self, lanes, server, rng):
        self.lanes, self.server, self.rng = lanes, server, rng
        self.answers = []
        self.begin()

    def begin(self):
        self.take = self.server.stream()
        self.out, self.back = [], []

    def move(self):
        """One thing happens: a message leaves, is taken by the server, or arrives."""
        way = self.rng.randrange(3)
        if way == 0 and (request := self.lanes.flush()) is not None:
            self.out.append(request)
        elif way == 1 and self.out:
            # The server's answers come in pieces, those of one lane in order.
            response = self.take(self.out.pop(0))
            self.back += pieces(response, self.rng)
        elif way == 2 and self.back:
            self.answers += self.lanes.receive(self.back.pop(0))

    def lose(self):
        """The stream is lost. Of what was on its way to the server, some is taken all the same."""
        for request in self.out[: self.rng.randint(0, len(self.out))]:
            self.take(request)
        self.answers += self.lanes.lost()
        assert self.lanes.in_flight == 0
        self.begin()

    def settle(self):
        """Goes on without losses until nothing is left to be said."""
        while True:
            while (request := self.lanes.flush()) is not None:
                self.out.append(request)
            if not (self.out or self.back):
                return
            for request in self.out:
                self.back.append(self.take(request))
            self.out = []
            for response in self.back:
                self.answers += self.lanes.receive(response)
            self.back = []


def pieces(response, rng):
    """A response, or the same in several."""
    if rng.random() < 0.5:
        return [response]
    cut = [pb.StreamResponse(opened=response.opened)]
    chunks = [(each, "frames") for each in response.frames] + [(each, "errors") for each in response.errors]
    cut += [pb.StreamResponse(**{where: [each]}) for each, where in chunks]
    return [*cut, pb.StreamResponse(closed=response.closed)]


def told(answers):
    """What became of each ticket, which has one answer only."""
    tickets = [answer.ticket for answer in answers]
    assert len(set(tickets)) == len(tickets)
    return {answer.ticket: answer for answer in answers}


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 25), st.floats(0, 0.3), st.floats(0, 0.3))
def test_each_chunk_is_applied_once_and_answered_once(seed, count, chunks, losses, refusals):
    """Whatever is wished and wherever streams are lost: each ticket is answered once, on each lane in order; a session
    has taken what was answered, in the order of the wishes, nothing twice, and nothing that was refused."""
    rng = random.Random(seed)
    window = rng.choice([1, 2, 16])
    server = Oracle(window)
    budget, rows = rng.choice([60, 300, 1 << 20]), rng.choice([3, 100])
    lanes = Lanes(budget, rows, window * SHARE)
    wire = Wire(lanes, server, rng)
    made = [
        lanes.open(session_pb2.SessionConfig(model="m", session_id=f"s{number}"), f"open{number}")
        for number in range(count)
    ]
    wished = {}
    for ticket in range(1, chunks + 1):
        group = rng.sample(made, rng.randint(1, count))
        sign = -1 if rng.random() < refusals else 1
        if rng.random() < 0.3:
            lanes.step_all(group, chunk(ticket, sign * ticket * 100, rng.randint(1, 2), len(group)))
        else:
            group = group[:1]
            lanes.step(group[0], chunk(ticket, sign * ticket * 100, rng.randint(1, 2)))
        wished[ticket] = [lane.number for lane in group]
        while rng.random() < 0.8:
            if rng.random() < losses:
                wire.lose()
            wire.move()
    if rng.random() < losses:
        wire.lose()
    wire.settle()
    answers = told(wire.answers)
    assert set(answers) == set(wished) | {f"open{number}" for number in range(count)}
    applied = {number: [] for number in range(count)}
    for ticket, group in wished.items():
        answer = answers[ticket]
        assert answer.error is None or isinstance(answer.error, (InvalidInput, StepMismatch, GroupError))
        failed = set()
        if isinstance(answer.error, GroupError):
            failed = set(answer.error.errors)
        elif answer.error is not None:
            failed = {0}
        for row, number in enumerate(group):
            if row not in failed:
                applied[number].append(float(ticket * 100 + row if len(group) > 1 else ticket * 100))
    assert {f"s{number}": values for number, values in applied.items()} == server.applied
    for number, lane in enumerate(made):
        assert lane.next_step == server.steps[f"s{number}"]
    assert (lanes.account.held, lanes.in_flight, lanes.wishes) == (0, 0, False)


@given(st.integers(0, 2**32), st.integers(1, 20), st.floats(0, 0.5))
def test_giving_up_keeps_the_places(seed, chunks, losses):
    """When those who wait are told that there is no server, each is told once, and what they sent is still applied,
    once and in its place, before what is wished later."""
    rng = random.Random(seed)
    server = Oracle()
    lanes = Lanes()
    wire = Wire(lanes, server, rng)
    lane = lanes.open(session_pb2.SessionConfig(model="m", session_id="s"), "open")
    wire.settle()
    given_up = []
    for ticket in range(1, chunks + 1):
        lanes.step(lane, chunk(ticket, ticket))
        while rng.random() < 0.6:
            wire.move()
        if rng.random() < losses:
            wire.lose()
            given_up += [each for each in lanes.give_up(keep=True) if each not in given_up]
    wire.settle()
    answered = told(wire.answers)
    assert set(answered) == {"open", *range(1, chunks + 1)}  # those given up too, though nobody listens
    assert server.applied["s"] == list(range(1, chunks + 1))
    assert lanes.account.held == 0


@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_opens_and_closes_are_done_once(seed, count, delete):
    """A session whose create or delete was lost on its way is made once, and ended for good; nobody is told of the
    difference."""
    rng = random.Random(seed)
    server = Oracle()
    lanes = Lanes()
    wire = Wire(lanes, server, rng)
    made = [lanes.open(session_pb2.SessionConfig(model="m", session_id=f"s{n}"), f"open{n}") for n in range(count)]
    for _ in range(rng.randint(0, 20)):
        wire.move()
        if rng.random() < 0.3:
            wire.lose()
    wire.settle()
    assert all(answer.error is None for answer in wire.answers)
    assert sorted(server.steps) == [f"s{n}" for n in range(count)]
    waiting = [lane.number for lane in made if lanes.close(lane, delete, f"close{lane.number}")]
    for _ in range(rng.randint(0, 20)):
        wire.move()
        if rng.random() < 0.3:
            wire.lose()
    wire.settle()
    answers = told(wire.answers)
    assert set(answers) == {f"open{n}" for n in range(count)} | {f"close{n}" for n in waiting}
    failures = [answer.error for answer in answers.values() if answer.error is not None]
    assert all(isinstance(each, SessionNotFound) for each in failures)  # an earlier try has deleted it
    assert bool(server.steps) != delete
    assert lanes.open("s", None).number == 0


def lost_with(*wishes, window=REPLAY_CHUNKS):
    """Lanes of one session that has lost its stream with these chunks applied but not answered."""
    server, lanes = Oracle(window), Lanes()
    wire = Wire(lanes, server, random.Random(0))
    lane = lanes.open(session_pb2.SessionConfig(model="m", session_id="s"), "open")
    wire.settle()
    for each in wishes:
        lanes.step(lane, each)
    while (request := lanes.flush()) is not None:
        wire.take(request)
    wire.answers += lanes.lost()
    wire.begin()
    return lanes, lane, wire, server


def test_no_more_is_asked_than_the_server_remembers():
    """Of one session so many chunks are on their way as their answers fit into what the server remembers of it, at
    least one; the others follow as answers come, in order."""
    lanes = Lanes()
    wire = Wire(lanes, Oracle(), random.Random(0))
    made = [lanes.open(session_pb2.SessionConfig(model="m", session_id=f"s{n}"), f"open{n}") for n in range(2)]
    wire.settle()

    def wish(ticket, share):
        made_of = chunk(ticket, ticket)
        made_of.form.weight = int(REPLAY_WINDOW * share)
        return made_of

    for ticket, share in enumerate([0.4, 0.4, 0.4, 0.1, 5.0, 0.1]):
        lanes.step(made[0], wish(ticket, share))
    lanes.step_all(made, chunk("group", 1, rows=2))
    lanes.step(made[1], chunk("behind", 1))
    asked = []
    while (request := lanes.flush()) is not None:
        asked.append([list(frame.first_steps) for frame in request.frames])
        wire.answers += lanes.receive(wire.take(request))
    assert asked == [[[0], [1]], [[2], [3]], [[4]], [[5], [6, 0], [1]]]
    assert all(answer.error is None for answer in wire.answers)
    assert lanes.account.held == 0
    for number in range(40):
        lanes.step(made[1], chunk(number, 1))
    assert sum(len(frame.lanes) for frame in lanes.flush().frames) == REPLAY_CHUNKS


def test_resending_is_bulk():
    """After a loss one message opens every lane on which something waits, the next has all chunks, in whole frames."""
    lanes, server = Lanes(), Oracle()
    wire = Wire(lanes, server, random.Random(0))
    made = [lanes.open(session_pb2.SessionConfig(model="m", session_id=f"s{n}"), f"open{n}") for n in range(40)]
    wire.settle()
    for lane in made[:30]:
        lanes.step(lane, chunk(lane.number, 1.0))
    lanes.flush()
    assert lanes.lost() == []
    assert lanes.unanswered == (30, 30)
    wire.begin()
    request = lanes.flush()
    assert [each.session_id for each in request.opens] == [f"s{n}" for n in range(30)]
    assert not request.frames
    assert lanes.flush() is None
    lanes.receive(wire.take(request))
    assert [len(frame.lanes) for frame in lanes.flush().frames] == [30]
    lanes.step(made[35], chunk("late", 1.0))  # an idle session is taken up when it is needed
    assert [each.session_id for each in lanes.flush().opens] == ["s35"]


def test_opens_of_one_message_are_bounded(monkeypatch):
    """Many lanes are opened again in several messages."""
    monkeypatch.setattr("rnnserve._lanes.messages.OPENS_IN_MESSAGE", 10)
    lanes = Lanes()
    for number in range(25):
        lanes.open(f"s{number}", None)
    assert [len(lanes.flush().opens) for _ in range(3)] == [10, 10, 5]


def test_only_the_rows_that_are_left_are_sent_again():
    """Of a group's chunk, a row that was answered is not asked again, and the answer is whole."""
    lanes, server = Lanes(), Oracle()
    wire = Wire(lanes, server, random.Random(0))
    group = [lanes.open(session_pb2.SessionConfig(model="m", session_id=f"s{n}"), f"open{n}") for n in range(3)]
    wire.settle()
    lanes.step_all(group, chunk("g", 5, rows=3))
    response = wire.take(lanes.flush())
    assert lanes.receive(pb.StreamResponse(frames=response.frames[1:2])) == []
    lanes.lost()
    wire.begin()
    opens = lanes.flush()
    lanes.receive(wire.take(opens))
    (frame,) = lanes.flush().frames
    assert list(frame.lanes) == [0, 2]
    (answer,) = lanes.receive(pb.StreamResponse(frames=[result(frame)]))
    assert answer.value.outputs["y"][:, 0, 0, 0].tolist() == [5, 6, 7]
    assert lanes.account.held == 0


def test_what_a_failure_dooms_is_not_sent_again():
    """What was sent behind a chunk that failed must not be taken after all, when a chunk wished since has brought the
    session to its step."""
    server, lanes = Oracle(), Lanes()
    wire = Wire(lanes, server, random.Random(0))
    lane = lanes.open(session_pb2.SessionConfig(model="m", session_id="s"), "open")
    wire.settle()
    lanes.step(lane, chunk("bad", -1))
    lanes.step(lane, chunk("doomed", 7))
    response = wire.take(lanes.flush())
    wire.answers += lanes.receive(pb.StreamResponse(errors=response.errors[:1]))
    lanes.step(lane, chunk("good", 1))
    wire.take(lanes.flush())
    wire.lose()
    wire.settle()
    answers = told(wire.answers)
    assert isinstance(answers["bad"].error, InvalidInput)
    assert isinstance(answers["doomed"].error, StepMismatch)
    assert value(answers["good"]) == 1
    assert server.applied["s"] == [1]
    assert lane.next_step == 1


def test_a_session_that_is_gone():
    """A server that has forgotten the session: every chunk is told once, the next wish is told again, and a close is
    told too, all by the server's own answer."""
    lanes, lane, wire, server = lost_with(chunk("a", 1), chunk("b", 2))
    barrier = lanes.barrier(lane, "barrier")
    assert barrier
    server.steps.clear()
    wire.settle()
    answers = told(wire.answers)
    assert [type(answers[each].error) for each in "ab"] == [SessionNotFound] * 2
    assert answers["a"].error is not answers["b"].error
    assert answers["barrier"].error is None
    lanes.step(lane, chunk("c", 3))
    wire.settle()
    assert isinstance(told(wire.answers)["c"].error, SessionNotFound)
    lanes.close(lane, True, "close")
    wire.settle()
    assert isinstance(told(wire.answers)["close"].error, SessionNotFound)
    assert lanes.account.held == 0


def test_a_session_that_went_back():
    """A server that comes back with an older state: what comes after the gap is told so, and the lane goes on there."""
    lanes, lane, wire, server = lost_with(chunk("a", 1), chunk("b", 2))
    wire.settle()
    server.steps["s"], server.replies["s"] = 1, {}
    wire.lose()
    lanes.step(lane, chunk("c", 3))
    wire.settle()
    assert isinstance(told(wire.answers)["c"].error, StepMismatch)


def test_behind_the_window():
    """A chunk that was applied so long ago that its reply is gone is told as an error, never applied again."""
    lanes, lane, wire, server = lost_with(*[chunk(ticket, ticket) for ticket in range(1, 5)], window=2)
    wire.settle()
    lanes.step(lane, chunk("next", 5))
    wire.settle()
    answers = told(wire.answers)
    assert answers["next"].error is None
    assert [answers[ticket].error is None for ticket in range(1, 5)] == [False, False, True, True]
    assert answers[1].error.reason == "STEP_BEHIND"
    assert server.applied["s"] == [1, 2, 3, 4, 5]
    assert lane.next_step == 5


@pytest.mark.parametrize("step", [0, 3])
def test_an_id_that_exists(step):
    """An id of one's own that is in use is an error; after a lost answer, what exists may be one's own, if nobody has
    stepped it."""
    lanes = Lanes()
    config = session_pb2.SessionConfig(model="m", session_id="mine")
    lanes.open(config, "first")
    lanes.flush()
    (answer,) = lanes.receive(pb.StreamResponse(errors=[error(0, 0, EXISTS, pb.LANE_OPERATION_OPEN)]))
    assert isinstance(answer.error, SessionExists)
    lanes.open(config, "second")
    lanes.flush()
    assert lanes.lost() == []
    assert lanes.flush().opens[0].WhichOneof("target") == "create"
    assert lanes.receive(pb.StreamResponse(errors=[error(0, 0, EXISTS, pb.LANE_OPERATION_OPEN)])) == []
    assert lanes.flush().opens[0].session_id == "mine"
    session = session_pb2.Session(session_id="mine", model="m", batch_size=1, step=step)
    (answer,) = lanes.receive(pb.StreamResponse(opened=[pb.LaneOpened(lane=0, session=session)]))
    if step:
        assert isinstance(answer.error, SessionExists)
        (closing,) = lanes.flush().closes
        assert not closing.delete_session
    else:
        assert answer.value.session_id == "mine"


def test_lanes_that_are_put_off():
    """A server that will not open a lane now is asked again when the caller says, or never."""
    lanes, lane, wire, _ = lost_with(chunk("a", 1))
    for _ in range(2):
        assert len(lanes.flush().opens) == 1
        refusal = error(0, 0, AWAY, pb.LANE_OPERATION_OPEN)
        assert lanes.receive(pb.StreamResponse(errors=[refusal])) == []
        assert [(each, cause.retry_after) for each, cause in lanes.put_off] == [(lane, 0.5)]
        lanes.put_off.clear()
        assert lanes.flush() is None
        lanes.open_again(lane)
    wire.settle()
    assert told(wire.answers)["a"].error is None
    lanes.lost()
    lanes.step(lane, chunk("b", 2))
    lanes.flush()
    lanes.receive(pb.StreamResponse(errors=[error(0, 0, AWAY, pb.LANE_OPERATION_OPEN)]))
    (answer,) = lanes.refuse(lane, RequestError("enough"))
    assert (answer.ticket, str(answer.error)) == ("b", "enough")
    assert lanes.refuse(lane, RequestError("enough")) == []


def test_a_chunk_that_the_server_puts_off_is_for_another_stream():
    """UNAVAILABLE for a chunk is no answer: the stream is of no more use. Not so when nothing is to be resumed."""
    for resume in (True, False):
        lanes = Lanes(resume=resume)
        wire = Wire(lanes, Oracle(), random.Random(0))
        lane = lanes.open(session_pb2.SessionConfig(model="m", session_id="s"), "open")
        wire.settle()
        lanes.step(lane, chunk("a", 1))
        lanes.flush()
        answers = lanes.receive(pb.StreamResponse(errors=[error(0, 0, AWAY)]))
        assert [answer.ticket for answer in answers] == ([] if resume else ["a"])
        assert (lanes.broken is not None) == resume
        wire.answers += answers
        wire.lose()
        wire.settle()
        assert lanes.broken is None
        assert (told(wire.answers)["a"].error is None) == resume


def test_dropped_chunks_are_forgotten():
    """Without `keep`, what was not answered is dropped, and the next chunk starts wherever the session is."""
    lanes, lane, wire, server = lost_with(chunk("a", 1))
    assert lanes.give_up(keep=False) == ["a"]
    server.steps["s"] = 5
    lanes.step(lane, chunk("b", 2))
    lanes.step(lane, chunk("c", 3))
    assert lane.next_step == 3  # a guess, until the server has told
    wire.settle()
    answers = told(wire.answers)
    assert [answers[each].error for each in "bc"] == [None, None]
    assert lane.next_step == 7
    assert server.applied["s"] == [1, 2, 3]


def test_an_open_is_taken_back():
    """An open that no server can have heard of is taken back, and its number is free; any other is not."""
    lanes = Lanes()
    lane = lanes.open("s", None)
    assert lanes.withdraw(lane)
    assert lanes.flush() is None
    lane = lanes.open("s", None)
    assert lane.number == 0
    lanes.flush()
    assert not lanes.withdraw(lane)
    lanes.lost()
    assert not lanes.withdraw(lane)


def test_the_arrays_may_be_written_to_once_a_chunk_is_given_up():
    """A chunk that is given up owns its arrays, so that what is sent again is what was sent before."""
    array = np.ones((1, 1, 2), "f4")
    lanes = Lanes()
    wire = Wire(lanes, Oracle(), random.Random(0))
    lane = lanes.open(session_pb2.SessionConfig(model="m", session_id="s"), "open")
    wire.settle()
    sent = chunk("a", 1)
    sent.inputs = [array]
    lanes.step(lane, sent)
    sent.own()
    array[:] = 9
    wire.settle()
    assert value(told(wire.answers)["a"]) == 1
