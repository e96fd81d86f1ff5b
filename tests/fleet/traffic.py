"""Sessions that stream at a steady pace, whatever happens to the servers; in the end every output is the oracle's.

The oracle is the same model in this process, over each session's whole sequence at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from rnnserve import aio
from rnnserve_models import model_from_file

MODEL = "lstm-4"
FEATURES = 5
UNITS = 4
Seconds: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_AT = (50, 99, 100)
_NAMES = ("p50", "p99", "longest")
ZOO = Path(__file__).parents[2] / "models" / "zoo"


class Phase(NamedTuple):
    """How long answers took in some time.

    Attributes:
        seconds: float64 [A], of each answer.
        pauses: float64 [N], of the slowest answer of each session.
    """

    seconds: Seconds
    pauses: Seconds

    @property
    def longest(self) -> float:
        """Seconds that the slowest answer took."""
        return float(self.pauses.max())

    def __str__(self) -> str:
        answers, pauses = (
            " ".join(f"{name} {1e3 * value:.0f}" for name, value in zip(_NAMES, np.percentile(of, _AT), strict=True))
            for of in (self.seconds, self.pauses)
        )
        return (
            f"longest pause of a session {pauses} ms, of {len(self.pauses)} sessions;"
            f" answers {answers} ms, of {len(self.seconds):,}"
        )


class Traffic:
    """Sessions of one client.

    Args:
        client: what opens and steps them.
        count: sessions, two of three on their own and the others in one group.
        pause: seconds between the steps of a session.
        steps: the most that a session may come to.
        seed: of the inputs.

    Attributes:
        session_ids: of all sessions.
    """

    def __init__(self, client: aio.Client, count: int, *, pause: float, steps: int, seed: int = 0) -> None:
        self.session_ids: list[str] = []
        self._seconds: list[float] = []  # that each answer took since `mark`; a group's is one
        self._pauses = np.zeros(count)  # [N], the longest of each session
        self._oracle = model_from_file(ZOO / MODEL / "1", return_sequences=True)
        self._client = client
        self._pause = pause
        self._x = np.random.default_rng(seed).standard_normal((count, steps, FEATURES), np.float32)
        self._y = np.zeros((count, steps, UNITS), np.float32)
        self._done = np.zeros(count, np.int64)
        self._over = False
        self._failed: BaseException | None = None
        self._moved = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Streams as long as the block runs; then ends with the step at which each session is.

        Raises:
            AssertionError: an output is not the oracle's, or a session is not at the step that it came to.
        """
        alone = len(self._x) * 2 // 3
        sessions = await asyncio.gather(*[self._client.session(MODEL) for _ in range(alone)])
        group = await self._client.session_group(MODEL, len(self._x) - alone)
        self.session_ids = [session.session_id for session in sessions] + group.session_ids
        tasks = [asyncio.create_task(self._stream([n], session)) for n, session in enumerate(sessions)]
        tasks.append(asyncio.create_task(self._stream(list(range(alone, len(self._x))), group)))
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            yield
        finally:
            self._over = True
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for each in results:
            if isinstance(each, BaseException):
                raise each
        infos = await asyncio.gather(*[session.info() for session in sessions])
        assert [info.step for info in infos] == self._done[:alone].tolist(), "steps were lost or doubled"
        assert group.next_steps == self._done[alone:].tolist(), "steps of the group were lost or doubled"
        self._check()

    async def _stream(self, rows: list[int], live: Any) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._pause * (rows[0] % 8) / 8
        for step in range(self._x.shape[1]):
            await asyncio.sleep(max(0.0, due - loop.time()))
            if self._over:
                return
            x = self._x[rows, step]
            sent = time.monotonic()
            y = await live.step(x if len(rows) > 1 else x[0])
            seconds = time.monotonic() - sent
            self._seconds.append(seconds)
            self._pauses[rows] = np.maximum(self._pauses[rows], seconds)
            self._y[rows, step] = y
            self._done[rows] = step + 1
            due = max(due + self._pause, loop.time())
            async with self._moved:
                self._moved.notify_all()
        raise AssertionError("the sessions came to the end of their inputs: give them more steps")

    async def go_on(self, steps: int) -> None:
        """Waits until every session has come so many steps further.

        Raises:
            Exception: a step was not answered.
        """
        goal = self._done + steps
        async with self._moved:
            await self._moved.wait_for(lambda: self._failed is not None or bool((self._done >= goal).all()))
        if self._failed is not None:
            raise self._failed

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._failed = self._failed or task.exception()  # whoever waits is told by the next answer to another session

    def mark(self) -> Phase:
        """What was since the last `mark`, or since the sessions began."""
        phase = Phase(np.array(self._seconds), self._pauses.copy())
        self._seconds.clear()
        self._pauses[:] = 0.0
        return phase

    @property
    def done(self) -> int:
        """Steps that were answered."""
        return int(self._done.sum())

    def _check(self) -> None:
        longest = int(self._done.max())
        expected = np.asarray(self._oracle(self._x[:, :longest]))
        for n, steps in enumerate(self._done.tolist()):
            wrong = np.flatnonzero((self._y[n, :steps] != expected[n, :steps]).any(axis=-1))
            assert not len(wrong), f"session {n} differs from the oracle from step {wrong[0]} on, of {steps}"
