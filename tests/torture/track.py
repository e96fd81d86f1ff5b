"""How far the sessions of a run are, whoever drives them: what was sent and answered, and what must not have been."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable

from torture.history import Fault, History
from torture.plan import Plan

WINDOW = 16
"""Chunks that a server must be able to answer again."""

AGAIN = {"STEP_AHEAD", "SESSION_TAKEN_OVER", "STORE_DOWN", "DRAINING", "QUEUE_FULL", "LANE_UNKNOWN", "CANCELLED"}


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
        shared: every session has several drivers, who step it at once.
        mischief: how likely a needless or a wrong request is, each time.
        alone: there is one server, which nobody can take a session from.
    """

    def __init__(
        self,
        seed: int,
        addresses: Callable[[], list[str]],
        *,
        ahead: int,
        mischief: float,
        abreast: bool = False,
        shared: bool = False,
    ) -> None:
        self.chance = random.Random(seed)
        self.addresses = addresses
        self.ahead = ahead
        self.abreast = abreast
        self.shared = shared
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
    """How far one session is, by all who drive it.

    Attributes:
        plan: what it is to do.
        column: that of the sessions that it goes in step with.
        history: what it was answered.
        total: chunks that are wanted.
        frontier: so many first chunks are answered.
        high: so many chunks were sent ever.
        created: it was made, and that was acknowledged.
        exists: somebody has said that it exists, who may not have stored it yet.
        taken_back: it is taken back now and then, so that what was answered may have to be sent again.
        seen: its states as they were seen: how many chunks it had taken, and their digest.
        forked: answers of its forks to a chunk: its number, and the digest of what was answered.
        moved: who is to be told that it was answered.
    """

    def __init__(self, trial: Trial, plan: Plan, column: int) -> None:
        self.trial = trial
        self.plan = plan
        self.column = column
        self.history = History(0)
        self.total = len(plan.lengths)
        self.frontier = self.high = 0
        self.created = self.exists = self.taken_back = False
        self.seen: list[tuple[int, bytes]] = []
        self.forked: list[tuple[int, bytes]] = []
        self.moved: list[asyncio.Event] = []
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

    def sending(self, number: int) -> None:
        """A chunk is about to be sent."""
        self._since.setdefault(number, time.monotonic())
        if number < self.high:
            self.trial.counts["resends"] += 1
        self.high = max(self.high, number + 1)

    def stands(self, step: int, known: int) -> int | None:
        """The server says where the session is, of which so many chunks were answered when that was asked: how many it
        has taken, or None if that cannot be.
        """
        self.created = True
        if step < self.plan.starts[known] and not self.taken_back:
            self.fault("lost commit", f"is at step {step}, chunks up to {self.plan.starts[known]} were answered")
        elif step > self.plan.starts[self.high] or step not in self._numbers:
            self.fault("doubled step", f"is at step {step}, chunks up to {self.plan.starts[self.high]} were sent")
        else:
            return self._numbers[step]
        return None

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
            for event in (self.trial.moved, *self.moved):
                event.set()

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
        elif why not in AGAIN or (why == "SESSION_TAKEN_OVER" and self.trial.alone):
            self.fault("refused", f"chunk {number}: {why}")
        return True
