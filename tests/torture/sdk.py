"""Sessions that the SDK drives, as an application does: it sends chunks, some ahead, and gets their outputs."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import numpy as np

import rnnserve
from rnnserve import aio
from torture.plan import digest
from torture.track import Track, Trial


def client(trial: Trial) -> aio.Client:
    """One for all sessions: of a server, or of several that share a store. It never gives up."""
    addresses = trial.addresses()
    return aio.Client(addresses if len(addresses) > 1 else addresses[0], timeout=None, retry_for=None)


async def by_sdk(trial: Trial, track: Track, client: aio.Client) -> None:
    """Every chunk must be answered, whatever happens: the application sees at most a pause."""
    plan, kind = track.plan, track.plan.kind
    waiting: deque[tuple[int, asyncio.Task[Any]]] = deque()
    number = 0
    try:
        session = await client.session(
            kind.model,
            session_id=plan.name,
            batch_size=kind.batch,
            reset_every=kind.every_steps or None,
            reset_after_masked=kind.masked_steps or None,
            **dict.fromkeys(kind.options, True),
        )
        track.created = True
        while number < track.total or waiting:
            if number < track.total and len(waiting) < trial.ahead:
                x, mask = plan.chunk(number)
                track.sending(number)
                waiting.append((number, asyncio.create_task(session(x, mask=mask))))
                number += 1
                if trial.chance.random() < 0.5:  # a burst now and then
                    continue
            first, answer = waiting.popleft()
            track.answered(plan.starts[first], _digest(track, await answer))
        await session.detach()
    except rnnserve.RnnserveError as error:
        track.fault("refused", f"the SDK raised {error!r}")
    finally:
        for _, answer in waiting:
            answer.cancel()


def _digest(track: Track, answer: Any) -> bytes:
    if "return_state" not in track.plan.kind.options:
        return digest({"output": np.asarray(answer)}, {})
    output, *states = answer
    return digest({"output": output}, {spec.name: s for spec, s in zip(track.plan.engine.states, states, strict=True)})
