"""When short chunks leave: who shares a frame, who never waits, and that nobody waits for long. Time is the test's."""

import heapq
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnserve._chunks import Chunk, Form
from rnnserve._lanes import Lanes, pace
from rnnserve.codec import encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import session_pb2
from test_client_lanes import INVALID, error

ROUND_TRIP = 0.010
SHORT = Form(("x",), ((1, 1, 2),), 1, "one step", paced=True)
OTHER = Form(("x",), ((1, 1, 2),), 1, "one step", paced=True)  # another model, whose steps may share a frame
LONG = Form(("x",), ((1, 3, 2),), 3, "three steps")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 100.0
        self._alarms = []
        self._order = count()

    def time(self):
        return self.now

    def call_later(self, delay, callback):
        alarm = Alarm(callback)
        heapq.heappush(self._alarms, (self.now + delay, next(self._order), alarm))
        return alarm

    def run(self, seconds):
        until = self.now + seconds
        while self._alarms and self._alarms[0][0] <= until:
            self.now, _, alarm = heapq.heappop(self._alarms)
            if alarm.callback is not None:
                alarm.callback()
        self.now = until


class Alarm:
    def __init__(self, callback):
        self.callback = callback

    def cancel(self):
        self.callback = None


class Wire:
    """Lanes 0, 1, ... with a stream, and a server that answers what a test tells it to."""

    def __init__(self, lanes):
        self.clock = Clock()
        self.lanes = Lanes(timing=self.clock)
        self.members = [self.lanes.open(session_pb2.SessionConfig(session_id=f"s{n}"), None) for n in range(lanes)]
        self.sent = []  # frames that are not answered, each [(lane, first step)]
        self.answered = []  # tickets
        self.leave()

    def step(self, *numbers, form=SHORT):
        """Wishes a chunk on each of these lanes; its ticket is the lane and its first step."""
        for number in numbers:
            lane = self.members[number]
            x = np.zeros(form.shapes[0], "f4")
            self.lanes.step(lane, Chunk(form, [x], None, (number, lane.next_step)))

    def leave(self):
        """What leaves now: the lanes of each frame. Lanes that are to be opened are."""
        frames = []
        while (request := self.lanes.flush()) is not None:
            opened = [pb.LaneOpened(lane=each.lane, session=session_pb2.Session()) for each in request.opens]
            self.receive(opened=opened)
            frames += [list(zip(frame.lanes, frame.first_steps, strict=True)) for frame in request.frames]
        self.sent += frames
        return [[lane for lane, _ in frame] for frame in frames]

    def answer(self, index=0, rows=None):
        """Answers a frame, or some rows of it."""
        frame = self.sent.pop(index)
        if rows is not None:
            frame, rest = [frame[row] for row in rows], [each for row, each in enumerate(frame) if row not in rows]
            self.sent[index:index] = [rest] if rest else []
        y = np.zeros((len(frame), 1, 2), "f4")
        named = encode_named({"y": y})
        lanes, steps = zip(*frame, strict=True)
        self.receive(frames=[pb.ResultFrame(lanes=lanes, first_steps=steps, timesteps=1, outputs=named)])

    def receive(self, **parts):
        answers = self.lanes.receive(pb.StreamResponse(**parts)) + self.lanes.take_later()
        self.answered += [each.ticket for each in answers if each.ticket]
        self.lanes.settle()

    def round_trip(self, *numbers, form=SHORT):
        """Each of these lanes takes a step, and is answered in `ROUND_TRIP`."""
        self.step(*numbers, form=form)
        self.leave()
        self.clock.run(ROUND_TRIP)
        while self.sent:
            self.answer()


@pytest.fixture
def wire():
    """Four lanes, when it is known what a round trip takes, and nobody is expected."""
    wire = Wire(4)
    wire.round_trip(3)
    wire.clock.run(1)
    return wire


def test_who_is_alone_never_waits(wire):
    """Nothing is under way: a step leaves at once, however often and however soon after the last answer."""
    for pause in (0, 0, 0.001, 0, 1, 0.02, 0, 5):
        wire.clock.run(pause)
        wire.step(0)
        assert wire.leave() == [[0]]
        wire.clock.run(ROUND_TRIP)
        wire.answer()


def test_what_comes_before_the_message_is_made_joins_it(wire):
    """The steps of one turn of the event loop leave together, though the first found nothing under way."""
    wire.step(0, 1, 2)
    assert wire.leave() == [[0, 1, 2]]


def test_nothing_is_held_before_a_round_trip_is_known():
    """There is no guess of how long an answer takes."""
    wire = Wire(2)
    wire.step(0)
    assert wire.leave() == [[0]]
    wire.step(1)
    assert wire.leave() == [[1]]


def test_steps_that_come_while_a_frame_is_under_way_share_the_next(wire):
    """They leave together when it is answered."""
    wire.step(0)
    assert wire.leave() == [[0]]
    wire.step(1)
    wire.step(2)
    assert wire.leave() == []
    wire.answer()
    assert wire.leave() == [[1, 2]]


@pytest.mark.parametrize("by", ["an answer to one lane of many", "an error"])
def test_the_first_answer_to_a_frame_lets_them_go(wire, by):
    """One lane of a frame that is slow, or that fails, does not hold up those who wait for its answer."""
    wire.step(0, 1, 2)
    wire.leave()
    wire.step(3)
    assert wire.leave() == []
    if by == "an error":
        wire.receive(errors=[error(0, 0, INVALID)])
    else:
        wire.answer(rows=[1])
    assert wire.leave() == [[3]]


def test_many_small_frames_become_one(wire):
    """However many are on their way, what follows on them is one frame: only the answer to the last lets it go."""
    wire.round_trip(0, 1, 2, 3)
    for lane in range(4):
        wire.step(lane)
        wire.clock.run(2.5 * ROUND_TRIP)
        assert wire.leave() == [[lane]]
    for lane in range(3):
        wire.answer()
        wire.step(lane)
        assert wire.leave() == []
    wire.answer()
    wire.step(3)
    assert wire.leave() == [[0, 1, 2, 3]]


def test_round_trips_that_take_longer_from_now_on_are_learned(wire):
    """A server that comes to be ten times as far away gets full frames again, though frames overtake answers first."""
    sizes = []
    for _ in range(40):
        wire.step(*[n for n in range(4) if not wire.members[n].pending])
        for _ in range(10):
            sizes += [len(lanes) for lanes in wire.leave()]
            wire.clock.run(ROUND_TRIP)
        wire.answer()
        while len(wire.sent) > 1:
            wire.answer()
    assert sizes[-1] >= 3


def test_a_frame_that_is_not_answered_holds_up_nobody_for_long(wire):
    """Two round trips at most; and who comes later does not wait for it at all."""
    wire.step(0)
    wire.leave()
    wire.step(1)
    wire.clock.run(1.9 * ROUND_TRIP)
    assert wire.leave() == []
    wire.clock.run(0.2 * ROUND_TRIP)
    assert wire.leave() == [[1]]
    wire.answer(1)
    wire.step(1)
    wire.step(2)
    assert [lane for lanes in wire.leave() for lane in lanes] == [1, 2]
    assert wire.sent[0] == [(0, 0)]  # still not answered


def test_a_slow_answer_does_not_make_others_wait_as_long(wire):
    """What a round trip takes is not learned from one that takes a hundred times as long."""
    wire.step(0)
    wire.leave()
    wire.clock.run(100 * ROUND_TRIP)
    wire.answer()
    wire.clock.run(1)
    wire.step(0)
    wire.leave()
    wire.step(1)
    wire.clock.run(4 * ROUND_TRIP)
    assert wire.leave() == [[1]]


@pytest.mark.parametrize("form", [OTHER, LONG], ids=["another model", "a long chunk"])
def test_only_what_is_alike_is_waited_for(wire, form):
    """Steps of one model wait neither for another model's, which may be slow, nor for chunks of many steps."""
    wire.round_trip(0, form=form)
    wire.clock.run(1)
    wire.step(0, form=form)
    wire.leave()
    wire.step(1)
    assert wire.leave() == [[1]]


def test_long_chunks_wait_for_nothing(wire):
    """Beside such a chunk a message costs little, and the server takes it up while it works at others."""
    wire.step(0)
    wire.leave()
    wire.step(1, form=LONG)
    assert wire.leave() == [[1]]


def test_a_session_that_sends_ahead_is_not_held(wire):
    """Its second chunk takes the first along, in order: the server has more to do than one round trip."""
    wire.step(0)
    wire.leave()
    wire.step(1)
    assert wire.leave() == []
    wire.step(1)
    wire.step(1, form=LONG)
    assert wire.leave() == [[1], [1], [1]]
    assert [frame[0] for frame in wire.sent[1:]] == [(1, 0), (1, 1), (1, 2)]


def test_who_came_right_away_is_awaited(wire):
    """Callers who are answered together and come back one by one share a frame again, with those held meanwhile."""
    wire.round_trip(0, 1, 2)
    wire.round_trip(0, 1, 2)
    wire.step(0)
    assert wire.leave() == []
    wire.step(3)
    wire.step(2)
    assert wire.leave() == []
    wire.step(1)
    assert wire.leave() == [[0, 1, 2, 3]]


def test_one_that_fell_behind_is_taken_in_again(wire):
    """A frame of one lane and a frame of the others, in turns, become one frame."""
    wire.round_trip(0, 1, 2)
    wire.step(0)
    sizes = [len(lanes) for lanes in wire.leave()]
    wire.step(1, 2)
    for _ in range(4):
        wire.clock.run(ROUND_TRIP)
        answered = [row for frame in wire.sent for row in frame]
        while wire.sent:
            wire.answer()
        sizes += [len(lanes) for lanes in wire.leave()]
        for lane, _ in answered:
            wire.step(lane)
            sizes += [len(lanes) for lanes in wire.leave()]
    assert sizes[-1] == 3


def test_who_does_not_come_is_not_awaited_for_long(wire):
    """Half a round trip after the last who came, the others go; next time that lane is not awaited."""
    for _ in range(2):
        wire.round_trip(0, 1, 2)
    wire.step(0)
    wire.step(1)
    wire.clock.run(0.6 * ROUND_TRIP)  # somebody has come meanwhile
    assert wire.leave() == []
    wire.clock.run(0.6 * ROUND_TRIP)
    assert wire.leave() == [[0, 1]]
    wire.clock.run(ROUND_TRIP)
    wire.answer()
    wire.step(0)
    wire.step(1)
    assert wire.leave() == [[0, 1]]


def test_who_comes_late_every_time_is_never_awaited(wire):
    """A caller who thinks for longer than a frame takes costs the others nothing."""
    for _ in range(3):
        wire.round_trip(0, 1)
        wire.step(0)
        assert wire.leave() == [[0]]
        wire.clock.run(ROUND_TRIP)
        wire.answer()
        wire.clock.run(5 * ROUND_TRIP)


def test_a_lost_stream_takes_nothing_along(wire):
    """What is held is sent on the next stream behind what was sent before, each once, and nothing is waited for."""
    wire.step(0)
    wire.leave()
    wire.step(1)
    wire.lanes.lost()
    wire.sent.clear()
    assert wire.members[0].pace.patience == 0
    assert wire.leave() == [[0, 1]]


@pytest.mark.parametrize("by", ["close", "hurry"])
def test_a_close_takes_what_is_held_along(wire, by):
    """A lane closes behind its chunks, and so does a client."""
    wire.step(0)
    wire.leave()
    wire.step(1)
    if by == "hurry":
        wire.lanes.hurry()
        assert wire.leave() == [[1]]
    else:
        wire.lanes.close(wire.members[1], False, "closed")
        request = wire.lanes.flush()
        assert [list(frame.lanes) for frame in request.frames] == [[1]]
        assert [close.lane for close in request.closes] == [1]


def test_what_is_known_of_a_kind_goes_with_its_last_lane(wire):
    """Sessions that come and go leave nothing behind."""
    for lane in wire.members:
        wire.lanes.close(lane, False, None)
    closes = wire.lanes.flush().closes
    wire.receive(closed=[pb.LaneClosed(lane=each.lane) for each in closes])
    assert len(wire.lanes._paces) == 1
    wire.members.clear()
    del lane
    assert len(wire.lanes._paces) == 0


def test_how_long_threads_may_keep_quiet(wire):
    """Once one step is held, the event loop need not see others before the frame under way is answered, or all who are
    awaited have come. It has to see the first, which sets the alarm that brings it back in any case.
    """
    pace = wire.members[3].pace
    for _ in range(2):
        wire.round_trip(0, 1, 2)
    assert pace.patience == 0
    wire.step(0)
    assert pace.patience == 2
    wire.step(1)
    assert pace.patience == 1
    wire.step(2)
    assert pace.patience == 0
    wire.leave()
    assert pace.patience == 0
    wire.step(3)
    assert pace.patience == float("inf")
    wire.clock.run(3 * ROUND_TRIP)
    assert pace.patience == 0
    assert wire.leave() == [[3]]


def test_a_step_that_nobody_was_woken_for_leaves_with_the_next_message(wire):
    """A thread that found others waiting, just before they left, is taken along."""
    wire.step(0)
    wire.leave()
    wire.step(1)
    late = [2]
    wire.lanes.account.collect = lambda: wire.step(late.pop()) if late else None
    wire.lanes.hurry()
    assert wire.leave() == [[1, 2]]


def frames_of(wire, *, thinks, trip=ROUND_TRIP, steps=400, callers=4):
    """The lanes of each frame, when one thread makes each caller's next step `thinks` after the one before, and each
    frame is answered `trip` after it was sent."""
    come_to_rest(wire)
    frames, due, answered = [], [], list(range(callers))
    while steps:
        while due and due[0] <= wire.clock.now:
            due.pop(0)
            answered += [lane for lane, _ in wire.sent[0]]
            wire.answer()
        if answered:
            wire.clock.run(thinks)
            wire.step(answered.pop(0))
            steps -= 1
        else:
            wire.clock.run(max(due[0] - wire.clock.now, 0))
        left = wire.leave()
        frames += left
        due += [wire.clock.now + trip] * len(left)
    return frames


def come_to_rest(wire):
    """Everything wished is answered, and nobody is awaited any more."""
    wire.clock.run(1)
    wire.leave()
    while wire.sent:
        wire.answer()
    wire.clock.run(1)


@pytest.fixture
def cohorts(monkeypatch):
    """As `wire`, with eight lanes, which are as many as may come to be two cohorts."""
    monkeypatch.setattr(pace, "COHORT", 4)
    wire = Wire(8)
    wire.round_trip(3)
    return wire


FIRST, SECOND, ALL = [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("thinks", [ROUND_TRIP / 8, ROUND_TRIP / 4])
def test_many_come_in_two_cohorts(cohorts, thinks):
    """Where the callers take as long as the server, half of them are answered while the other half is under way."""
    frames = frames_of(cohorts, thinks=thinks, callers=8)
    assert frames[-10:] in ([FIRST, SECOND] * 5, [SECOND, FIRST] * 5)


def test_few_come_in_one_frame(wire):
    """Two frames cost more than one: some callers share one, however long they take."""
    assert frames_of(wire, thinks=ROUND_TRIP / 4)[-10:] == [[0, 1, 2, 3]] * 10


def test_a_slow_server_has_full_frames(cohorts):
    """Where it is the server that is waited for, larger frames do more, and cohorts that there are become one."""
    assert frames_of(cohorts, thinks=ROUND_TRIP / 80, callers=8)[-10:] == [ALL] * 10
    assert ALL not in frames_of(cohorts, thinks=ROUND_TRIP / 8, callers=8)[-10:]
    assert frames_of(cohorts, thinks=ROUND_TRIP / 8, trip=8 * ROUND_TRIP, callers=8)[-10:] == [ALL] * 10


def test_few_who_are_left_come_in_one_frame_again(cohorts):
    """The second cohort goes over to the first when others have stopped."""
    frames_of(cohorts, thinks=ROUND_TRIP / 8, callers=8)
    come_to_rest(cohorts)
    for _ in range(2):
        cohorts.round_trip(0, 7)
    assert cohorts.members[7].pace is cohorts.members[0].pace


def test_one_message_answers_the_first_cohort_before_the_second(cohorts):
    """What the first wish leaves while the second are only told: so they do not come all together for ever."""
    frames_of(cohorts, thinks=ROUND_TRIP / 8, callers=8)
    come_to_rest(cohorts)
    cohorts.step(*ALL)
    assert cohorts.leave() == [ALL]
    lanes, steps = zip(*cohorts.sent[0], strict=True)
    named = encode_named({"y": np.zeros((8, 1, 2), "f4")})
    frame = pb.ResultFrame(lanes=lanes, first_steps=steps, timesteps=1, outputs=named)
    told = [answer.ticket[0] for answer in cohorts.lanes.receive(pb.StreamResponse(frames=[frame]))]
    assert (told, [answer.ticket[0] for answer in cohorts.lanes.take_later()]) == (FIRST, SECOND)
    assert cohorts.lanes.take_later() == []


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 3), st.sampled_from([SHORT, SHORT, SHORT, OTHER, LONG])),
    st.tuples(st.just("flush")),
    st.tuples(st.just("answer"), st.integers(0, 5), st.integers(0, 3)),
    st.tuples(st.just("run"), st.sampled_from([0.0, 0.001, 0.01, 0.05])),
    st.tuples(st.just("lose")),
)


@pytest.mark.parametrize("cohort", [pace.COHORT, 1])
@settings(deadline=None, max_examples=200)
@given(actions=st.lists(ACTIONS, max_size=60))
def test_every_chunk_leaves_and_none_twice(cohort, actions):
    """Whatever comes in whatever order: with time alone everything wished is sent, each session's in its order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "COHORT", cohort)
        _every_chunk_leaves_and_none_twice(actions)


def _every_chunk_leaves_and_none_twice(actions):
    wire = Wire(4)
    wished = {number: [] for number in range(4)}
    losses = 0
    for action, *arguments in actions:
        if action == "step":
            number, form = arguments
            wished[number].append((number, wire.members[number].next_step))
            wire.step(number, form=form)
        elif action == "flush":
            wire.leave()
        elif action == "answer" and wire.sent:
            index, row = arguments
            index %= len(wire.sent)
            # A server answers a session in order.
            if not {lane for lane, _ in wire.sent[index]} & {lane for frame in wire.sent[:index] for lane, _ in frame}:
                wire.answer(index, [row % len(wire.sent[index])])
        elif action == "run":
            wire.clock.run(*arguments)
        elif action == "lose" and losses < 2:  # from the third on, what was lost so often goes alone
            losses += 1
            wire.lanes.lost()
            wire.sent.clear()
    wire.clock.run(60)
    wire.leave()
    assert not wire.lanes.wishes
    while wire.sent:
        wire.answer()
        wire.leave()
    for number, tickets in wished.items():
        assert [ticket for ticket in wire.answered if ticket[0] == number] == tickets
