"""Those who do as they should, and measure how long they wait. A process of its own: `python -m fuzz.honest`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np

import rnnserve

PERIOD = 0.05  # seconds from step to step: twice as often as a voice activity model is asked


class Waits:
    """Seconds, since they were told last.

    Attributes:
        steps: that steps took.
        late: by which they were sent later than they were due: the client's own, whatever the server does.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.late: list[float] = []

    def told(self) -> dict[str, Any]:
        """How many there were, and milliseconds."""
        steps, late = (np.array(each or [0.0]) * 1e3 for each in (self.steps, self.late))
        found = {"steps": len(self.steps)}
        self.steps.clear()
        self.late.clear()
        p50, p99 = np.percentile(steps, [50, 99]).tolist()
        return found | {"p50": p50, "p99": p99, "late": float(np.percentile(late, 99))}


async def work(address: str, token: str, sessions: int, waits: Waits, stop: asyncio.Event) -> dict[str, Any]:
    """Steps sessions until told to stop; then holds every output against one call over all that was sent."""
    chance = np.random.default_rng(1)
    async with rnnserve.aio.Client(address, token=token, retry_for=0) as client:
        wrong = steps = 0

        async def one(number: int) -> None:
            nonlocal wrong, steps
            said, heard = [], []
            async with client.session("lstm-4", session_id=f"honest-{number}") as session:
                due = time.perf_counter() + number * PERIOD / sessions
                while not stop.is_set():
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    waits.late.append(time.perf_counter() - due)
                    due = max(due + PERIOD, time.perf_counter())
                    x = chance.standard_normal(5).astype(np.float32)
                    began = time.perf_counter()
                    heard.append(await session.step(x, timeout=30))
                    waits.steps.append(time.perf_counter() - began)
                    said.append(x)
            layer = client.RNN("lstm-4", return_sequences=True)
            expected = (await layer(np.array(said)[None]))[0]
            steps += len(said)
            wrong += int((np.array(heard) != expected).any(axis=-1).sum())

        await asyncio.gather(*(one(number) for number in range(sessions)))
        return {"steps": steps, "wrong": wrong}


async def main(address: str, token: str, sessions: int) -> None:
    """Tells the waits since the last line whenever a line comes in, and the end of it all when the input ends."""
    waits = Waits()
    stop = asyncio.Event()
    task = asyncio.create_task(work(address, token, sessions, waits, stop))
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(waits.told() | {"failed": task.done()}), flush=True)
    stop.set()
    print(json.dumps(await task), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
