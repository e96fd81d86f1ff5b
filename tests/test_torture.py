"""The torture, in short; and its checker, which has to find what is planted. `make torture` runs it for long."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rnnserve_models.engine.base import Arrays
from torture.hands import check_seen
from torture.history import History, check
from torture.plan import KINDS, Kind, Plan, digest, make_plans, write_models
from torture.run import Report, Torture, empty_store, torture
from torture.track import Track, Trial


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Plan]:
    """Two sessions of each kind, of a dozen chunks."""
    engines = write_models(tmp_path_factory.mktemp("models"))
    return make_plans(engines, seed=3, sessions=2 * len(KINDS), steps=1000, longest=12)


def truth(plans: list[Plan]) -> dict[str, History]:
    """Histories in which all is as it should be."""
    histories = {}
    for plan in plans:
        answers, states = plan.expected(len(plan.lengths))
        histories[plan.name] = History(len(answers), list(enumerate(answers)), plan.starts[-1], states)
    return histories


def retold(plan: Plan, number: int, states: Arrays) -> History:
    """The history of a session that was in other states when chunk ``number`` came."""
    answers = list(enumerate(plan.expected(number)[0]))
    for each in range(number, len(plan.lengths)):
        answer, states = plan.answer(each, states)
        answers.append((each, answer))
    return History(len(answers), answers, plan.starts[-1], states)


def found(plans: list[Plan], changed: dict[str, History]) -> set[tuple[str, str]]:
    return {(fault.session, fault.name) for fault in check(plans, truth(plans) | changed)}


def test_a_true_history_has_no_faults(plans: list[Plan]) -> None:
    assert check(plans, truth(plans)) == []


@pytest.mark.parametrize("at", range(len(KINDS)))
def test_planted_faults_are_found_by_name(plans: list[Plan], at: int) -> None:
    """A doubled step, a lost commit and a swapped state, in a session of each kind."""
    plan, other, number = plans[at], plans[at + len(KINDS)], 6
    before, others = plan.states_between(len(plan.lengths)), other.states_between(len(other.lengths))
    assert found(plans, {plan.name: retold(plan, number, before[number + 1])}) == {(plan.name, "doubled step")}
    assert found(plans, {plan.name: retold(plan, number, before[number - 1])}) == {(plan.name, "lost commit")}
    swapped = {plan.name: retold(plan, number, others[4]), other.name: retold(other, 4, before[number])}
    assert found(plans, swapped) == {(plan.name, "swapped state"), (other.name, "swapped state")}


def test_planted_faults_behind_the_last_answer(plans: list[Plan]) -> None:
    """What only the final step and states show."""
    plan, other, last = plans[0], plans[len(KINDS)], len(plans[0].lengths)
    true, before = truth([plan])[plan.name], plan.states_between(last)
    for name, step, states in [
        ("lost commit", plan.starts[-2], before[-2]),
        ("doubled step", plan.starts[-1] + plan.lengths[-1], before[-1]),
        ("lost commit", plan.starts[-1], before[-2]),
        ("doubled step", plan.starts[-1], plan.answer(last - 1, before[-1])[1]),
        ("swapped state", plan.starts[-1], truth([other])[other.name].states),
    ]:
        assert found(plans, {plan.name: History(last, true.answers, step, states)}) == {(plan.name, name)}


def test_answers_that_are_lost_or_doubled(plans: list[Plan]) -> None:
    """Every chunk is answered to the application, and once."""
    plan = plans[0]
    true = truth([plan])[plan.name]
    for name, answers in [
        ("lost answer", true.answers[:3] + true.answers[4:]),
        ("doubled answer", [*true.answers, true.answers[2]]),
        ("wrong answer", [(0, b"?"), *true.answers[1:]]),
    ]:
        assert found(plans, {plan.name: History(true.sent, answers, true.step, true.states)}) == {(plan.name, name)}


def run(what: Torture, kind: str, folder: Path) -> Report:
    if kind == "redis" and not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with empty_store(kind, folder) as url:
        report = asyncio.run(torture(what, url, folder))
    print(report)
    return report


@pytest.mark.parametrize(("kind", "replicas"), [("sqlite", 1), ("redis", 2)])
def test_a_short_torture_of_the_sdk(tmp_path: Path, kind: str, replicas: int) -> None:
    """Applications send chunks, some ahead, through one client of the SDK, while servers are killed and connections
    cut: each gets every output, once and the right one, and never an error.
    """
    what = Torture(seed=6, seconds=5, kills=3, steps=4000, sessions=24, calls=0, sdk=20, replicas=replicas)
    report = run(what, kind, tmp_path)
    assert report.faults == []
    assert report.steps > 300
    assert report.kills > 0


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_short_torture(tmp_path: Path, kind: str, replicas: int) -> None:
    """Servers are killed, connections cut and sessions taken away: every history is the oracle's."""
    what = Torture(seed=replicas, seconds=5, kills=3, steps=2500, sessions=16, replicas=replicas)
    report = run(what, kind, tmp_path)
    assert report.faults == []
    assert report.steps > 300
    assert report.kills > 0


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_short_torture_of_wide_frames(tmp_path: Path, kind: str) -> None:
    """Forty sessions of a stream go in step, up to twelve frames ahead of their answers: their frames are run and
    stored together, and every history is the oracle's.
    """
    what = Torture(seed=3, seconds=5, kills=3, steps=20_000, sessions=120, abreast=40, links=3, calls=0, longest=1)
    report = run(replace(what, ahead=12, mischief=0.002), kind, tmp_path)
    assert report.faults == []
    assert report.steps > 1000
    assert report.kills > 0


@pytest.mark.parametrize(("kind", "replicas"), [("sqlite", 2), ("redis", 1)])
def test_a_short_torture_of_shared_sessions(tmp_path: Path, kind: str, replicas: int) -> None:
    """Three streams step each session at once, ahead of each other's answers; of some, two and unary calls: whoever
    asks for a chunk is answered with the same bits, and every history is the oracle's.
    """
    what = Torture(seed=4, seconds=5, kills=3, steps=4000, sessions=16, shared=3, replicas=replicas, mischief=0.2)
    report = run(what, kind, tmp_path)
    assert report.faults == []
    assert report.steps > 300
    assert report.kills > 0
    assert report.counts["replays"] > 100
    assert report.counts["silences"] > 0


@pytest.mark.parametrize(("kind", "replicas"), [("sqlite", 1), ("redis", 2)])
def test_a_short_torture_of_sessions_in_hand(tmp_path: Path, kind: str, replicas: int) -> None:
    """While sessions are stepped they are looked at, forked and taken back: what is seen of them is the oracle's, their
    forks answer as they would, and every history is the oracle's.
    """
    what = Torture(seed=5, seconds=5, kills=3, steps=8000, sessions=16, longest=3, replicas=replicas, hands=3)
    report = run(what, kind, tmp_path)
    assert report.faults == []
    assert report.steps > 300
    assert all(report.counts[what] > 0 for what in ("looks", "forks", "taken back"))


def test_what_is_seen_wrong_of_a_session_in_hand(plans: list[Plan]) -> None:
    """States of another step, and what a fork answered from there, are found."""
    trial = Trial(0, lambda: ["here"], ahead=1, mischief=0.0)
    tracks = [Track(trial, plan, 0) for plan in plans[:3]]
    for track in tracks:
        before = track.plan.states_between(4)
        track.seen.append((3, digest({}, before[3])))
        track.forked.append((3, track.plan.answer(3, before[3])[0]))
    assert check_seen(tracks) == []
    before = plans[1].states_between(4)
    tracks[1].seen.append((2, digest({}, before[3])))
    tracks[2].forked.append((2, plans[2].answer(2, plans[2].states_between(4)[3])[0]))
    assert [(fault.session, fault.name) for fault in check_seen(tracks)] == [
        (plans[1].name, "wrong states"),
        (plans[2].name, "wrong answer"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("drops-a-commit", {"lost commit", "refused"}),
        ("answers-before-commit", {"lost commit", "refused"}),  # as ahead of what is there
        ("forgets-answers", {"forgotten answer", "refused"}),
        ("writes-to-the-neighbour", {"swapped state", "wrong answer"}),
        ("applies-twice", {"doubled step", "answer to nothing", "another answer"}),
        ("keeps-an-answer", {"unanswered at the end", "kept waiting"}),
        ("shows-new-states", {"wrong states", "wrong answer"}),
        ("forgets-a-gap", {"wrong answer", "lost commit", "swapped state"}),
    ],
)
def test_a_fault_in_the_server_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, names: set[str]
) -> None:
    """With any of these faults planted in its servers a short torture fails, and says how."""
    monkeypatch.setattr("torture.client.PATIENCE", 2.0)  # or a minute would have to pass until a stream waits in vain
    what = Torture(seed=2, seconds=8, kills=2, steps=6000, sessions=16, links=2, calls=2, fault=fault, mischief=0.3)
    if fault == "keeps-an-answer":  # which others are given, so that nobody stands still
        what = replace(what, links=3, calls=0, shared=3)
    if fault == "shows-new-states":
        what = replace(what, longest=3, hands=2)
    assert run(what, "sqlite", tmp_path).names() & names


def test_the_kinds_are_of_both_engines_and_all_options() -> None:
    assert {kind.masked for kind in KINDS} == {True, False}
    assert len({kind.batch for kind in KINDS}) == 3
    assert {bool(kind.every_steps) for kind in KINDS if not kind.masked_steps} == {True, False}
    assert any(kind.masked_steps for kind in KINDS)
    assert all(isinstance(kind, Kind) for kind in KINDS)
