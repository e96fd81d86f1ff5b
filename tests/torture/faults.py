"""Faults that a run of the torture must find: each breaks a server as a plausible mistake would."""

from __future__ import annotations

import random
from typing import Any

import numpy as np


def plant(name: str) -> None:
    """Breaks this process's server in the way of that name."""
    FAULTS[name]()


def _commit_by(commit_ticks: Any) -> None:
    """Has ticks committed in that way, by whoever commits any."""
    from rnnserve_server.store.base import Store
    from rnnserve_server.store.sqlite import SqliteStore

    SqliteStore.commit_ticks = commit_ticks  # type: ignore[method-assign]
    SqliteStore.begin_commit = Store.begin_commit  # type: ignore[method-assign]


def _drops_a_commit() -> None:
    """The store says that a tick is durable, and has not written it: now and then."""
    from rnnserve_server.store.sqlite import SqliteStore

    commit, chance = SqliteStore.commit_ticks, random.Random(5)

    async def careless(self: Any, ticks: Any) -> list[list[bool]]:
        kept = [chance.random() > 0.02 for _ in ticks]
        applied = iter(await commit(self, [tick for tick, keep in zip(ticks, kept, strict=True) if keep]))
        return [next(applied) if keep else [True] * len(tick.ids) for tick, keep in zip(ticks, kept, strict=True)]

    _commit_by(careless)


def _answers_before_commit() -> None:
    """What is written reaches the store some ticks after the answers have left."""
    from rnnserve_server.store.sqlite import SqliteStore

    commit, late = SqliteStore.commit_ticks, list[Any]()

    async def lazy(self: Any, ticks: Any) -> list[list[bool]]:
        late.append(ticks)
        for each in [late.pop(0) for _ in range(len(late) - 3)]:
            await commit(self, each)
        return [[True] * len(tick.ids) for tick in ticks]

    _commit_by(lazy)


def _forgets_answers() -> None:
    """The replay window finds nothing."""
    from rnnserve_server.replay import Window

    Window.find = lambda self, *what: {}  # type: ignore[method-assign]


def _writes_to_the_neighbour() -> None:
    """Now and then a session's states are written to another session."""
    from rnnserve_server.state import Arena

    scatter, chance = Arena.scatter, random.Random(5)

    def confused(self: Any, slots: Any, states: Any) -> None:
        slots = np.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
        others = np.setdiff1d(self.all_used(), slots)
        if len(others) and chance.random() < 0.5:
            slots = np.concatenate([others[:1], slots[1:]])
        scatter(self, slots, states)

    Arena.scatter = confused  # type: ignore[method-assign]


def _applies_twice() -> None:
    """A chunk that is sent again is not recognised, and is run again."""
    from rnnserve_server.sessions import SessionTable

    check = SessionTable.check

    def credulous(self: Any, sessions: Any, session_id: Any, **ahead: Any) -> Any:
        here = sessions.group.step[sessions.slots]
        if sessions.first_steps is not None:
            behind = sessions.first_steps < here
            said, sessions.first_steps = sessions.first_steps, np.where(behind, here, sessions.first_steps)
            result = check(self, sessions, session_id, **ahead)
            sessions.first_steps = said
            return result
        return check(self, sessions, session_id, **ahead)

    SessionTable.check = credulous  # type: ignore[method-assign]


def _keeps_an_answer() -> None:
    """Now and then an answer is taken for sent, and lies there."""
    from rnnserve_server.api.stream import LaneStream

    answer, chance = LaneStream._answer, random.Random(5)

    def forgetful(self: Any, parts: Any, chunks: int, nbytes: int) -> None:
        if chance.random() < 0.02:
            self._unanswered -= chunks
        else:
            answer(self, parts, chunks, nbytes)

    LaneStream._answer = forgetful  # type: ignore[method-assign]


def _shows_new_states() -> None:
    """The states of a session that are looked at, or that a fork gets, are those of a new one."""
    from rnnserve_server import states

    shown = states.all_states_of
    states.all_states_of = lambda session: {name: np.zeros_like(state) for name, state in shown(session).items()}


def _forgets_a_gap() -> None:
    """The masked steps that end a chunk are not counted on in the next one, for rules that reset a row after some."""
    from rnnserve_server import resets

    counted = resets._masked_runs
    resets._masked_runs = lambda call, before: counted(call, np.zeros_like(before))


FAULTS = {
    "drops-a-commit": _drops_a_commit,
    "answers-before-commit": _answers_before_commit,
    "forgets-answers": _forgets_answers,
    "writes-to-the-neighbour": _writes_to_the_neighbour,
    "applies-twice": _applies_twice,
    "keeps-an-answer": _keeps_an_answer,
    "shows-new-states": _shows_new_states,
    "forgets-a-gap": _forgets_a_gap,
}
