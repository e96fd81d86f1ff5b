"""Watching ticks: what is told, what a watcher may do wrong, and the log of slow ticks."""

from __future__ import annotations

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs

from house import FEATURES, AddingEngine, Clock, Notes, chunks, loaded, opened, table
from rnnserve_models.options import LayerOptions
from rnnserve_server.blocks import Sessions
from rnnserve_server.intake import Frame
from rnnserve_server.layout import signature
from rnnserve_server.observer import Observers, SlowTicks, Ticked
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.tally import Tally
from rnnserve_server.worker import Worker


class Seen:
    def __init__(self):
        self.ticks: list[Ticked] = []

    def ticked(self, tick):
        self.ticks.append(tick)


class SlowEngine(AddingEngine):
    """Each run takes a second of the test's clock."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def run(self, inputs, lengths, states):
        self.clock.now += 1.0
        return super().run(inputs, lengths, states)


def house(observer, *, slice_steps=4):
    clock = Clock()
    model, sessions = loaded(SlowEngine(clock)), table(clock)
    worker = Worker(
        model, Scheduler(16, slice_steps), sessions, clock=clock, on_progress=lambda: None, observer=observer
    )
    return clock, model, sessions, worker


def frame(session, sink, steps=1):
    group = session.group
    x = {"input": np.ones((1, 1, steps, FEATURES), np.float32)}
    slots = np.array([session.slot])
    return Frame(sink, np.zeros(1, np.int64), Sessions(group, slots, group.generation[slots], None), x, None), x


async def test_a_tick_tells_what_ran_and_when():
    """Rows, steps, chunks and times of a tick are those of the run; a chunk's wait is counted from when it came in, and
    once only though it is cut into slices.
    """
    seen = Seen()
    clock, model, sessions, worker = house(seen, slice_steps=2)
    session = opened(sessions, model, batch_size=1, options=LayerOptions(stateful=True, return_sequences=True))
    sink = Notes()
    given, x = frame(session, sink, steps=3)
    worker.take_in(given, signature(x, None))
    clock.now += 5.0
    await worker.close()
    assert sink.told == [0]
    first, second = seen.ticks
    assert (first.queue_seconds, first.engine_seconds, first.seconds) == (5.0, 1.0, 1.0)
    assert (first.rows, first.steps, len(first.blocks), list(first.finished)) == (1, 2, 1, [])
    assert (second.queue_seconds, second.engine_seconds, second.steps) == (None, 1.0, 1)
    assert [len(block.tags) for block in second.finished] == [1]
    assert (first.model, first.store_seconds) == (model, None)


async def test_what_an_observer_raises_harms_nobody():
    """A bug in one observer is logged; ticks go on, and the others are told."""

    class Broken:
        def ticked(self, tick):
            raise ZeroDivisionError

    seen = Seen()
    _, model, sessions, worker = house(Observers([Broken(), seen]))
    session = opened(sessions, model)
    sink = Notes()
    with capture_logs() as lines:
        for _ in range(2):
            worker.submit(chunks(session.group, [session.slot], sink=sink))
        await worker.close()
    assert sink.told == [0, 0]
    assert seen.ticks
    assert [line["event"] for line in lines] == ["an observer failed"] * len(seen.ticks)
    assert lines[0]["observer"] == "Broken"


async def test_slow_ticks_are_logged_once_a_second():
    """A tick that took longer than the setting is logged with its model, sessions and times; within the next second no
    other is, and the next line says how many were left out. Faster ticks are not logged.
    """
    clock = Clock()
    slow = SlowTicks(0.5, clock)
    model, sessions = loaded(), table(clock)
    session = opened(sessions, model)
    block = chunks(session.group, [session.slot])

    def tick(seconds):
        told = Ticked(model, clock.now)
        told.runs([block], 1, clock.now)
        clock.now += seconds
        told.ran_at = told.ended_at = clock.now
        slow.ticked(told)

    with capture_logs() as lines:
        tick(0.4)
        assert lines == []
        tick(0.6)
        clock.now -= 0.6
        tick(0.6)
        clock.now -= 0.6
        tick(0.6)
        clock.now += 1.0
        tick(0.7)
    assert [line["left_out"] for line in lines] == [0, 2]
    line = lines[0]
    assert (line["model"], line["version"], line["rows"], line["log_level"]) == ("adder", "1", 1, "warning")
    assert line["sessions"] == [session.id]
    assert line["seconds"] == line["engine_seconds"] == pytest.approx(0.6)


async def test_lines_of_the_worker_name_model_and_sessions():
    """What goes wrong in a tick is logged with the model, its version and the sessions that it was about; nothing of
    the call that happened to wake the worker is in it.
    """
    _, model, sessions, worker = house(None)
    session = opened(sessions, model)
    model.engine.bug = ZeroDivisionError()
    with (
        structlog.contextvars.bound_contextvars(principal="somebody else"),
        capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines,
    ):
        worker.submit(chunks(session.group, [session.slot]))
        await worker.close()
    (line,) = lines
    assert (line["event"], line["model"], line["version"], line["sessions"]) == (
        "tick failed",
        "adder",
        "1",
        [session.id],
    )
    assert "principal" not in line


def test_a_tally_counts_into_the_buckets_that_prometheus_means():
    """A value belongs to the first bucket whose bound is not less than it, or to the last; the sum is that of all; the
    last value of a bucket that came with a trace is kept.
    """
    tally = Tally((1.0, 2.0))
    for value, trace in ((0.5, ""), (1.0, "a"), (1.5, ""), (2.0, "b"), (9.0, "c"), (3.0, "d")):
        tally.add(value, trace, 7.0)
    assert tally.counts == [2, 2, 2]
    assert (tally.sum, tally.count) == (17.0, 6)
    assert {bucket: (e.trace_id, e.value, e.at) for bucket, e in tally.examples.items()} == {
        0: ("a", 1.0, 7.0),
        1: ("b", 2.0, 7.0),
        2: ("d", 3.0, 7.0),
    }
