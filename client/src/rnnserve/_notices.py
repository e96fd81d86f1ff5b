"""What the server tells of sessions although nobody asked: that they are about to end, or have."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from rnnserve.v1 import inference_pb2 as pb

LOG = logging.getLogger("rnnserve")

Reason = Literal["expired", "aged", "closed", "taken_over", "evicted", "model_unloaded", "draining"]

_REASONS: dict[int, Reason] = {
    pb.NOTICE_REASON_EXPIRED: "expired",
    pb.NOTICE_REASON_AGED: "aged",
    pb.NOTICE_REASON_CLOSED: "closed",
    pb.NOTICE_REASON_TAKEN_OVER: "taken_over",
    pb.NOTICE_REASON_EVICTED: "evicted",
    pb.NOTICE_REASON_MODEL_UNLOADED: "model_unloaded",
    pb.NOTICE_REASON_DRAINING: "draining",
}

_MEANINGS: dict[tuple[Reason, bool], str] = {
    ("expired", False): "expires unless it is used",
    ("aged", False): "comes to the end of its lifetime",
    ("evicted", False): "may have to make room for others unless it is used",
    ("model_unloaded", False): "goes on with a model that was unloaded",
    ("draining", False): "is on a server that shuts down",
    ("expired", True): "was idle for longer than its lifetime and expired",
    ("aged", True): "came to the end of its lifetime",
    ("closed", True): "was deleted by somebody else",
    ("taken_over", True): "was taken over by another server",
    ("evicted", True): "had to make room for others",
    ("model_unloaded", True): "ended with its model",
}


@dataclass(frozen=True)
class Notice:
    """What the server tells of a session.

    Attributes:
        session_id: the session.
        reason: why it ends: "expired" (it is idle), "aged" (its lifetime), "closed" (somebody has deleted it),
            "taken_over", "evicted" (others need the room), "model_unloaded" or "draining" (the server shuts down).
        ended: True: it has ended. False: it will, if nothing is done: an idle session that is used lives on.
        time_left: seconds that it still lives, at least; None for an ended one, and where that is not known.
    """

    session_id: str
    reason: Reason
    ended: bool
    time_left: float | None = None

    @classmethod
    def of(cls, session_id: str, message: pb.LaneNotice) -> Notice | None:
        """What the message says of a session; None for a reason that this client does not know."""
        reason = _REASONS.get(message.reason)
        if reason is None:
            return None
        left = message.time_left.seconds + message.time_left.nanos / 1e9 if message.HasField("time_left") else None
        return cls(session_id, reason, message.ended, left)

    def __str__(self) -> str:
        return f"session {self.session_id} {self._meaning}"

    @property
    def _meaning(self) -> str:
        meaning = _MEANINGS.get((self.reason, self.ended), self.reason)
        return meaning if self.time_left is None else f"{meaning}, in {self.time_left:.0f} s"


OnNotice = Callable[[Notice], Any]


def log(target: str, notices: Iterable[Notice]) -> None:
    """One line for each kind of notice, however many sessions it is for."""
    kinds = Counter((notice.reason, notice.ended) for notice in notices)
    first = {(notice.reason, notice.ended): notice for notice in reversed(list(notices))}
    for kind, count in kinds.items():
        more = f" (and {count - 1} more)" if count > 1 else ""
        LOG.warning("%s: session %s%s %s", target, first[kind].session_id, more, first[kind]._meaning)


class NoticeThread:
    """Calls a callback on a thread of its own, where it may use the client."""

    def __init__(self, callback: OnNotice) -> None:
        self._callback = callback
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rnnserve-notices")

    def __call__(self, notice: Notice) -> None:
        self._thread.submit(self._run, notice)

    def close(self) -> None:
        """Calls no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, notice: Notice) -> None:
        try:
            self._callback(notice)
        except Exception:
            LOG.exception("on_notice failed for %s", notice)


def on_the_loop(callback: OnNotice) -> OnNotice:
    """A callback, or coroutine function, that runs as a task of the event loop."""
    tasks: set[asyncio.Task[None]] = set()  # the loop keeps no hold on them

    async def run(notice: Notice) -> None:
        try:
            result = callback(notice)
            if asyncio.iscoroutine(result):
                await result
        except Exception:
            LOG.exception("on_notice failed for %s", notice)

    def call(notice: Notice) -> None:
        task = asyncio.get_running_loop().create_task(run(notice))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return call
