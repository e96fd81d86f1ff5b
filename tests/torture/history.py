"""The checker: what sessions were answered, against what one uninterrupted run of the engine gives, bit for bit.

A fault has a name that says what must have happened, found out by trying what the engine would have given then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rnnserve_models.engine.base import Arrays
from torture.plan import Plan


@dataclass(frozen=True)
class Fault:
    """Something that must not be.

    Attributes:
        name: what.
        session: whose.
        detail: where, for a person.
    """

    name: str
    session: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.session}: {self.name}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class History:
    """What the application saw of one session.

    Attributes:
        sent: how many of its chunks it wanted.
        answers: (number of the chunk, digest of the answer), in the order in which they came to the application.
        step: where the session stood at the end, if anybody looked.
        states: its states then.
    """

    sent: int
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    step: int | None = None
    states: Arrays | None = None


def check(plans: Sequence[Plan], histories: Mapping[str, History]) -> list[Fault]:
    """All that is wrong: every chunk answered once, with the oracle's bits, and every session where it should be."""
    faults = []
    for plan in plans:
        history = histories[plan.name]
        expected, states = plan.expected(history.sent)
        faults += _counted(plan, history)
        said = dict(reversed(history.answers))  # the first answer to each
        wrong = [number for number in sorted(said) if number < history.sent and said[number] != expected[number]]
        if wrong:
            faults.append(_named(plan, plans, histories, wrong[0], said[wrong[0]]))
            continue  # what follows is wrong for the same reason
        if history.step is not None and history.step != plan.starts[history.sent]:
            name = "lost commit" if history.step < plan.starts[history.sent] else "doubled step"
            faults.append(Fault(name, plan.name, f"ended at step {history.step}, not {plan.starts[history.sent]}"))
        elif history.states is not None and not _equal(history.states, states):
            faults.append(_state_named(plan, plans, histories, history.states))
    return faults


def _counted(plan: Plan, history: History) -> list[Fault]:
    numbers = [number for number, _ in history.answers]
    faults = [
        Fault("lost answer", plan.name, f"chunk {each}") for each in range(history.sent) if each not in {*numbers}
    ]
    faults += (
        [Fault("doubled answer", plan.name, f"chunk {each}") for each in set(numbers) if numbers.count(each) > 1]
        if (len(numbers) != len(set(numbers)))
        else []
    )
    faults += [Fault("answer to nothing", plan.name, f"chunk {each}") for each in numbers if each >= history.sent]
    return faults


def _named(plan: Plan, plans: Sequence[Plan], histories: Mapping[str, History], number: int, said: bytes) -> Fault:
    """What explains the first wrong answer of a session."""
    where = f"chunk {number} at step {plan.starts[number]}"
    before = plan.states_between(number)
    for behind in range(1, number + 1):
        if plan.answer(number, before[number - behind])[0] == said:
            return Fault("lost commit", plan.name, f"{where}, as if the {behind} before it had not been")
    for again in range(number + 1):
        _, states = plan.answer(again, before[number])
        if plan.answer(number, states)[0] == said:
            return Fault("doubled step", plan.name, f"{where}, as if chunk {again} had been applied twice")
    for other in plans:
        if other.kind == plan.kind and other.name != plan.name:
            for at, states in enumerate(other.states_between(histories[other.name].sent)):
                if plan.answer(number, states)[0] == said:
                    return Fault("swapped state", plan.name, f"{where}, from the states of {other.name}, chunk {at}")
    return Fault("wrong answer", plan.name, where)


def _state_named(plan: Plan, plans: Sequence[Plan], histories: Mapping[str, History], states: Arrays) -> Fault:
    own = plan.states_between(histories[plan.name].sent)
    if any(_equal(states, each) for each in own[:-1]):
        return Fault("lost commit", plan.name, "its final states are those of an earlier step")
    for other in plans:
        if other.kind != plan.kind or other.name == plan.name:
            continue
        if any(_equal(states, each) for each in other.states_between(histories[other.name].sent)):
            return Fault("swapped state", plan.name, f"its final states are those of {other.name}")
    if any(_equal(states, plan.answer(each, own[-1])[1]) for each in range(histories[plan.name].sent)):
        return Fault("doubled step", plan.name, "its final states have a chunk twice")
    return Fault("wrong state", plan.name)


def _equal(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(
        np.ascontiguousarray(one[name]).tobytes() == np.ascontiguousarray(other[name]).tobytes() for name in one
    )
