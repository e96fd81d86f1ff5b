from __future__ import annotations

import random

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_server import failure
from rnnserve import codec
from rnnserve._chunks import Chunk, Form
from rnnserve._lanes import Lanes, ProtocolViolation
from rnnserve.errors import GroupError, InvalidInput, SessionNotFound, StepMismatch
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import session_pb2

AHEAD = failure("STEP_AHEAD", grpc.StatusCode.OUT_OF_RANGE)
INVALID = failure("INVALID_INPUT", grpc.StatusCode.INVALID_ARGUMENT)


def chunk(ticket, value=0.0, time=1, rows=1, features=2, mask=None):
    """A chunk with `value` everywhere; of several rows, value + the row's number."""
    x = np.full((1, time, features), value, "f4")
    x = np.stack([x + row for row in range(rows)]) if rows > 1 else x
    shape = (1, time, features)
    return Chunk(Form(("x",), (shape,), time, (shape, mask is not None)), [x], mask, ticket)


def opened(lanes, count, step=0):
    """Lanes that are open already."""
    made = [lanes.open(session_pb2.SessionConfig(model="m"), f"open{number}") for number in range(count)]
    lanes.flush()
    answers = lanes.receive(
        pb.StreamResponse(
            opened=[
                pb.LaneOpened(lane=lane.number, session=session_pb2.Session(session_id=f"s{lane.number}", step=step))
                for lane in made
            ]
        )
    )
    assert [answer.ticket for answer in answers] == [f"open{number}" for number in range(count)]
    return made


def result(frame, rows=None, **states):
    """The server's answer to some rows of a frame: what came in, as output."""
    rows = range(len(frame.lanes)) if rows is None else rows
    x = codec.decode(frame.inputs[0].tensor)[list(rows)]
    return pb.ResultFrame(
        lanes=[frame.lanes[row] for row in rows],
        first_steps=[frame.first_steps[row] for row in rows],
        timesteps=x.shape[2],
        outputs=codec.encode_named({"y": x}),
        states=codec.encode_named(states),
    )


def error(lane, first_step, status=INVALID, operation=pb.LANE_OPERATION_STEP):
    return pb.LaneError(lane=lane, operation=operation, first_step=first_step, status=status)


def value(answer):
    """What an answered chunk holds."""
    columns, row = answer.value
    return float(columns.outputs["y"][row].flat[0])


def test_everything_wished_leaves_in_one_message():
    """Opens, chunks of many lanes and closes leave together, the chunks of equal shape in one columnar frame."""
    lanes = Lanes()
    first, *rest, last = opened(lanes, 6, step=9)
    for lane in (first, *rest):
        lanes.step(lane, chunk(None, lane.number))
    lanes.open(session_pb2.SessionConfig(model="n"), None)
    lanes.close(last, True, None)
    request = lanes.flush()
    assert (len(request.opens), len(request.frames), len(request.closes)) == (1, 1, 1)
    frame = request.frames[0]
    assert list(frame.lanes) == [0, 1, 2, 3, 4]
    assert list(frame.first_steps) == [9] * 5
    x = codec.decode(frame.inputs[0].tensor)
    assert x.shape == (5, 1, 1, 2)
    assert x[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert not frame.HasField("mask")
    assert lanes.flush() is None


def test_chunks_that_differ_go_in_frames_of_their_own():
    """Other shapes, and chunks with a mask beside chunks without, never share a frame."""
    lanes = Lanes()
    a, b, c, d = opened(lanes, 4)
    lanes.step(a, chunk(None, time=2))
    lanes.step(b, chunk(None, time=3))
    lanes.step(c, chunk(None, time=2, mask=np.array([[True, False]])))
    lanes.step(d, chunk(None, time=2))
    frames = lanes.flush().frames
    assert [list(frame.lanes) for frame in frames] == [[0, 3], [1], [2]]
    np.testing.assert_array_equal(codec.decode(frames[2].mask), [[[True, False]]])


def test_chunks_of_one_lane_stay_in_order():
    """A frame names a lane once: what a lane sends ahead goes in later frames, numbered on from its session's step."""
    lanes = Lanes()
    a, b = opened(lanes, 2, step=5)
    for time in (1, 2, 1):
        lanes.step(a, chunk(None, time=time))
    lanes.step(b, chunk(None))
    frames = lanes.flush().frames
    assert [(list(frame.lanes), list(frame.first_steps)) for frame in frames] == [
        ([0, 1], [5, 5]),
        ([0], [6]),
        ([0], [8]),
    ]
    assert (a.next_step, b.next_step) == (9, 6)


def test_results_find_their_chunks():
    """Answers in other frames and another order than the chunks were sent in go to the chunks they answer."""
    lanes = Lanes()
    for lane in opened(lanes, 4):
        lanes.step(lane, chunk(lane.number, lane.number + 10))
    frame = lanes.flush().frames[0]
    answers = lanes.receive(pb.StreamResponse(frames=[result(frame, [3, 1])]))
    assert [(answer.ticket, value(answer)) for answer in answers] == [(3, 13), (1, 11)]
    answers = lanes.receive(pb.StreamResponse(frames=[result(frame, [0]), result(frame, [2])]))
    assert [(answer.ticket, value(answer)) for answer in answers] == [(0, 10), (2, 12)]
    assert lanes.in_flight == 0


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 30), st.integers(40, 400))
def test_no_answer_is_lost_or_mixed_up(seed, count, chunks, budget):
    """Whatever is wished, cut into whatever messages, and answered in whatever pieces: each ticket has its own value,
    once, and the chunks of each lane arrive in order."""
    rng = random.Random(seed)
    lanes = Lanes(message_bytes=budget, rows_in_flight=5)
    made = opened(lanes, count)
    expected, got, arrived = {}, {}, {lane.number: [] for lane in made}
    unanswered: list[tuple] = []
    for ticket in range(chunks):
        group = rng.sample(made, rng.randint(1, count))
        time = rng.randint(1, 2)
        if rng.random() < 0.3:
            lanes.step_all(group, chunk(ticket, ticket * 100, time, len(group)))
            expected[ticket] = [ticket * 100 + row for row in range(len(group))]
        else:
            lanes.step(group[0], chunk(ticket, ticket * 100, time))
            expected[ticket] = ticket * 100
        while rng.random() < 0.7:
            pump(lanes, rng, unanswered, arrived, got)
    while len(got) < len(expected):
        pump(lanes, rng, unanswered, arrived, got)
    assert got == expected
    assert lanes.flush() is None
    assert lanes.in_flight == 0
    for steps in arrived.values():
        assert steps == sorted(steps)


def pump(lanes, rng, unanswered, arrived, got):
    """One turn of a server that answers each lane in order and the lanes in any."""
    if (request := lanes.flush()) is not None:
        for frame in request.frames:
            for row, (lane, step) in enumerate(zip(frame.lanes, frame.first_steps, strict=True)):
                arrived[lane].append(step)
                unanswered.append((frame, row, lane))
    heads = {lane: (frame, row, lane) for frame, row, lane in reversed(unanswered)}
    answered = rng.sample(list(heads.values()), rng.randint(0, len(heads)))
    for item in answered:
        unanswered.remove(item)
    frames = [result(frame, [row]) for frame, row, _ in answered]
    for answer in lanes.receive(pb.StreamResponse(frames=frames)):
        assert answer.error is None
        assert answer.ticket not in got
        if isinstance(answer.value, tuple):
            got[answer.ticket] = value(answer)
        else:
            got[answer.ticket] = answer.value.outputs["y"][:, 0, 0, 0].tolist()


def test_a_failed_chunk_leaves_the_step_where_it_was():
    """After a failure the lane goes on at the step of the chunk that failed, although more had been sent behind it,
    and their late errors do not move it again."""
    lanes = Lanes()
    (lane,) = opened(lanes, 1)
    for ticket in "abc":
        lanes.step(lane, chunk(ticket))
    lanes.flush()
    (answer,) = lanes.receive(pb.StreamResponse(errors=[error(0, 0)]))
    assert answer.ticket == "a"
    assert isinstance(answer.error, InvalidInput)
    assert lane.next_step == 0
    lanes.step(lane, chunk("again"))
    lanes.step(lane, chunk("next"))
    assert [list(frame.first_steps) for frame in lanes.flush().frames] == [[0], [1]]
    answers = lanes.receive(pb.StreamResponse(errors=[error(0, 1, AHEAD), error(0, 2, AHEAD)]))
    assert [(answer.ticket, type(answer.error)) for answer in answers] == [("b", StepMismatch), ("c", StepMismatch)]
    assert lane.next_step == 2


def test_a_step_mismatch_tells_where_to_go_on():
    """Where somebody else stepped the session, the lane goes on at the step that the server expects."""
    lanes = Lanes()
    (lane,) = opened(lanes, 1)
    lanes.step(lane, chunk("a"))
    lanes.flush()
    behind = failure("STEP_BEHIND", grpc.StatusCode.OUT_OF_RANGE, expected_step="40")
    lanes.receive(pb.StreamResponse(errors=[error(0, 0, behind)]))
    assert lane.next_step == 40


def test_an_error_may_overtake_a_result():
    """An error that comes before the results of earlier chunks goes to its own chunk."""
    lanes = Lanes()
    (lane,) = opened(lanes, 1)
    lanes.step(lane, chunk("a"))
    lanes.step(lane, chunk("b"))
    frames = lanes.flush().frames
    (answer,) = lanes.receive(pb.StreamResponse(errors=[error(0, 1)]))
    assert answer.ticket == "b"
    (answer,) = lanes.receive(pb.StreamResponse(frames=[result(frames[0])]))
    assert answer.ticket == "a"


def test_a_group_is_one_frame_and_one_answer():
    """A chunk for many lanes is one frame; its rows are put together whatever the pieces of the answer."""
    lanes = Lanes()
    group = opened(lanes, 4)
    lanes.step_all(group, chunk("g", rows=4))
    (frame,) = lanes.flush().frames
    assert lanes.receive(pb.StreamResponse(frames=[result(frame, [2, 0])])) == []
    (answer,) = lanes.receive(pb.StreamResponse(frames=[result(frame, [1]), result(frame, [3])]))
    assert answer.ticket == "g"
    assert answer.value.outputs["y"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_group_answered_in_one_frame_is_not_copied():
    """The usual answer to a group is the frame itself."""
    lanes = Lanes()
    lanes.step_all(opened(lanes, 3), chunk("g", rows=3))
    (answer,) = lanes.receive(pb.StreamResponse(frames=[result(lanes.flush().frames[0])]))
    assert not answer.value.outputs["y"].flags.owndata


def test_a_group_fails_in_part():
    """The lanes that failed are told by their place, with zeros in the result of the others."""
    lanes = Lanes()
    group = opened(lanes, 3)
    lanes.step_all(group, chunk("g", 5, rows=3))
    (frame,) = lanes.flush().frames
    lanes.receive(pb.StreamResponse(errors=[error(1, 0)]))
    (answer,) = lanes.receive(pb.StreamResponse(frames=[result(frame, [0, 2])]))
    assert isinstance(answer.error, GroupError)
    assert list(answer.error.errors) == [1]
    assert answer.error.reason == "INVALID_INPUT"
    assert answer.error.partial.outputs["y"][:, 0, 0, 0].tolist() == [5, 0, 7]
    assert [lane.next_step for lane in group] == [1, 0, 1]


def test_message_size():
    """A message takes chunks up to its size; a larger chunk travels alone; a close stays behind all of them."""
    lanes = Lanes(message_bytes=100)
    made = opened(lanes, 3)
    for lane, features in zip(made, (10, 100, 10), strict=True):
        lanes.step(lane, chunk(None, features=features))
    lanes.close(made[2], False, None)
    messages = [lanes.flush() for _ in range(3)]
    assert [[list(frame.lanes) for frame in message.frames] for message in messages] == [[[0]], [[1]], [[2]]]
    assert [len(message.closes) for message in messages] == [0, 0, 1]


def test_rows_in_flight():
    """Beyond a number of unanswered rows wishes wait, and an answer lets them go."""
    lanes = Lanes(rows_in_flight=2)
    made = opened(lanes, 3)
    for lane in made:
        lanes.step(lane, chunk(lane.number))
    (frame,) = lanes.flush().frames
    assert list(frame.lanes) == [0, 1]
    assert lanes.flush() is None
    lanes.receive(pb.StreamResponse(frames=[result(frame, [0])]))
    assert list(lanes.flush().frames[0].lanes) == [2]


def test_lane_numbers_are_small_and_used_again():
    """A closed lane's number, and one that could not be opened, serve again, the smallest first."""
    lanes = Lanes()
    made = opened(lanes, 3)
    refused = lanes.open("gone", "refused")
    assert refused.number == 3
    lanes.close(made[1], True, "closed")
    lanes.flush()
    unknown = failure("SESSION_UNKNOWN", grpc.StatusCode.NOT_FOUND)
    answers = lanes.receive(
        pb.StreamResponse(errors=[error(3, 0, unknown, pb.LANE_OPERATION_OPEN)], closed=[pb.LaneClosed(lane=1)])
    )
    assert [answer.ticket for answer in answers] == ["refused", "closed"]
    assert isinstance(answers[0].error, SessionNotFound)
    assert [lanes.open("s", None).number for _ in range(3)] == [1, 3, 4]


def test_a_barrier_waits_for_what_was_sent_before_it():
    """A barrier is answered when the chunks before it are, whatever comes after it; an idle lane has none."""
    lanes = Lanes()
    (lane,) = opened(lanes, 1)
    assert not lanes.barrier(lane, "idle")
    lanes.step(lane, chunk("a"))
    assert lanes.barrier(lane, "barrier")
    lanes.step(lane, chunk("b"))
    frames = lanes.flush().frames
    answers = lanes.receive(pb.StreamResponse(frames=[result(frames[0])]))
    assert {answer.ticket for answer in answers} == {"a", "barrier"}
    assert [answer.ticket for answer in lanes.receive(pb.StreamResponse(frames=[result(frames[1])]))] == ["b"]


def test_a_lost_stream_gives_back_every_ticket():
    """When nobody tries again, whatever was not answered, sent or not, is given back once, and the lanes are closed."""
    lanes = Lanes()
    a, b, c = opened(lanes, 3)
    lanes.step(a, chunk("sent"))
    lanes.flush()
    lanes.step(a, chunk("unsent"))
    lanes.barrier(a, "barrier")
    lanes.step_all([b, c], chunk("group", rows=2))
    lanes.close(c, True, "close")
    lanes.open("s", "open")
    assert lanes.lost() == []
    tickets = lanes.give_up(keep=False)
    assert sorted(tickets) == ["barrier", "close", "group", "open", "sent", "unsent"]
    assert not any(lane.open for lane in (a, b, c))
    assert lanes.flush() is None
    assert (lanes.account.held, lanes.in_flight) == (0, 0)


@pytest.mark.parametrize(
    "response",
    [
        pb.StreamResponse(opened=[pb.LaneOpened(lane=7)]),
        pb.StreamResponse(closed=[pb.LaneClosed(lane=7)]),
        pb.StreamResponse(errors=[error(0, 3)]),
        pb.StreamResponse(frames=[pb.ResultFrame(lanes=[0], first_steps=[3], timesteps=1)]),
        pb.StreamResponse(
            frames=[pb.ResultFrame(lanes=[0], first_steps=[0], outputs=codec.encode_named({"y": np.zeros((2, 1))}))]
        ),
    ],
)
def test_answers_to_nothing(response):
    """An answer to what was not asked is a violation of the contract, never somebody else's result."""
    lanes = Lanes()
    (lane,) = opened(lanes, 1)
    lanes.step(lane, chunk("a"))
    lanes.flush()
    with pytest.raises(ProtocolViolation):
        lanes.receive(response)


def test_what_is_answered_before_a_violation_is_told():
    """Who was answered in the same message hears of it, although the stream is given up behind that."""
    lanes = Lanes()
    a, b = opened(lanes, 2)
    lanes.step(a, chunk("a"))
    lanes.step(b, chunk("b"))
    (frame,) = lanes.flush().frames
    with pytest.raises(ProtocolViolation):
        lanes.receive(pb.StreamResponse(frames=[result(frame, [0]), result(frame, [0])]))
    assert [answer.ticket for answer in lanes.lost()] == ["a"]
