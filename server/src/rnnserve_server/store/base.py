"""What every store of sessions promises.

A store keeps, of each session, all that another process needs to go on with it: what it is, its states, its step and
its replay window. Three counters keep its history a line:

* the **epoch** says whose it is. `take` raises it, and whoever holds an older one can write no more.
* the **revision** counts the writes. Each is accepted once, right behind the one before it. The step alone would not
  do: a reset leaves it as it is and a rewind moves it back, so a write that was long under way could fit again.
* the **step** is the session's own, and only carried along.

Hence the rules for whoever writes:

1. A session is written by its owner, one write after the other, each with the next revision.
2. A write that is refused (False) means that the session has another owner, or has ended: `ended` says which.
3. After an error, or a call that was cancelled, a write may have been applied or not, or may be yet. The very same
   write may be sent again: if it was applied, it is recognised, and the answer is True. Anything else must begin with
   `take`, which shuts out whatever is still under way and tells what was applied.

Every method takes a batch, so that a tick is one transaction or one pipeline. Ids within a batch are distinct. Times
are seconds since the epoch and come from the caller, so that all replicas should agree on the time to a second or so.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rnnserve_server.store.tick import Tick

REMEMBERED = 86400.0
"""Seconds for which it is remembered why a session ended, unless the store is told otherwise."""

Applied = list[list[bool]]
"""Of ticks: for each of their sessions whether it is as the tick says."""

Told = Callable[[Applied | Exception], None]
"""Called with what came of a commit: `Applied`, or why it is not known."""

T = TypeVar("T")

_MOST = 2**63 - 1
_COMMITS: set[asyncio.Task[None]] = set()  # that are under way: the loop alone would let them be collected


class StoreError(Exception):
    """The store could not do what it was asked to. The message says what to do about it."""


class StoreMisconfigured(StoreError):
    """The store cannot be opened with these settings."""


class StoreUnavailable(StoreError):
    """The store does not answer, is busy or is full. Trying again may help; see the third rule above."""


class StoreCorrupt(StoreError):
    """What is stored is not what this program writes."""


class End(StrEnum):
    """Why a session ended."""

    CLOSED = "closed"
    """It was deleted."""
    IDLE = "idle"
    """It was not used for as long as its idle lifetime."""
    AGED = "aged"
    """Its absolute lifetime ran out."""
    EVICTED = "evicted"
    """It had to make room."""
    UNLOADED = "unloaded"
    """Its model was unloaded."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What is remembered of a session that ended.

    Attributes:
        why: the reason.
        at: when, in seconds since the epoch.
        epoch: its last owner's.
    """

    why: End
    at: float
    epoch: int


@dataclass(frozen=True, slots=True)
class Meta:
    """What never changes in a session's life.

    Attributes:
        model: its model's name.
        version: its model's version.
        digest: its model's digest: what the states are good for.
        batch_size: rows of every call.
        options: the layer's options; anything that JSON can hold.
        create_time: seconds since the epoch.
        idle_lifetime: seconds without use after which it ends.
        lifetime: seconds after which it ends in any case, or None.
        window_replies: replies that its replay window holds at most.
        window_bytes: bytes of payload that its replay window holds at most.
        reset_every_steps: its states go back to their default after so many steps, again and again; 0: they do not.
        reset_masked_steps: a row's states do so after so many masked steps in a row; 0: they do not.
    """

    model: str
    version: str
    digest: str
    batch_size: int
    options: Mapping[str, Any]
    create_time: float
    idle_lifetime: float
    lifetime: float | None = None
    window_replies: int = 0
    window_bytes: int = 0
    reset_every_steps: int = 0
    reset_masked_steps: int = 0

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, document: str | bytes) -> Meta:
        """Reads what `to_json` wrote, here or in a later release that says more.

        Raises:
            StoreCorrupt: it is something else.
        """
        try:
            values = json.loads(document)
            return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
        except (ValueError, TypeError) as error:
            raise StoreCorrupt(
                f"expected a session's description in JSON, got {document[:200]!r} ({error}); "
                "something else writes to this store: give rnnserve one of its own"
            ) from error

    @property
    def ends_at(self) -> float:
        """When it ends in any case: infinity if there is no such time."""
        return math.inf if self.lifetime is None else self.create_time + self.lifetime

    def expires_at(self, last_used: float) -> float:
        """When it ends if it is not used again."""
        return min(last_used + self.idle_lifetime, self.ends_at)

    def due(self, last_used: float, now: float) -> End | None:
        """Why it has come to its end by ``now``, or None."""
        if self.ends_at <= now:
            return End.AGED
        return End.IDLE if last_used + self.idle_lifetime <= now else None


@dataclass(frozen=True, slots=True)
class Reply:
    """What was answered to one chunk.

    Attributes:
        first_step: the step at which the chunk began.
        timesteps: the chunk's time steps, at least 1.
        request_digest: of the chunk's inputs, to tell another chunk for the same step from the same one.
        payload: the answer, byte for byte.
    """

    first_step: int
    timesteps: int
    request_digest: bytes
    payload: bytes

    @property
    def end(self) -> int:
        """The step after its last."""
        return self.first_step + self.timesteps


@dataclass(frozen=True, slots=True)
class Head:
    """A session but for its states and replies: for lists, and for a look before it is taken."""

    id: str
    meta: Meta
    epoch: int
    revision: int
    step: int
    last_used: float

    @property
    def expires_at(self) -> float:
        """When it ends if it is not used again."""
        return self.meta.expires_at(self.last_used)

    @property
    def cursor(self) -> str:
        """Its place in the list of all sessions, oldest first. Cursors sort as text."""
        return f"{int(self.meta.create_time * 1e6):018d}.{self.id}"


@dataclass(frozen=True, slots=True)
class Record(Head):
    """All that is stored of a session.

    Attributes:
        states: all of its states, one after the other; what is where is for its model to say.
        replies: its replay window, oldest first, none overlapping another and none reaching beyond ``step``.

    Raises:
        ValueError: the replies are not so, or a number does not fit 63 bits.
    """

    states: bytes
    replies: tuple[Reply, ...] = ()

    def __post_init__(self) -> None:
        _check(self.epoch, self.revision, self.step, self.replies)


@dataclass(frozen=True, slots=True)
class Write:
    """How a session changes: what one or more chunks, a reset or a use leave behind.

    The window afterwards is what it held, without the replies that begin before ``forget_before`` and without those
    that reach beyond where ``replies`` begin (or beyond ``step``, if there are none), and then ``replies``; of all
    these the last ``keep``. So a session that is moved back forgets what it has not done any more.

    Attributes:
        id: the session's.
        epoch: the writer's.
        revision: the number of this write: one more than the session's.
        step: the session's step afterwards.
        last_used: when it was used.
        states: its states afterwards, or None if they stay.
        replies: new replies, oldest first.
        forget_before: the first step of the window.
        keep: replies that the window holds at most, no less than there are new ones; 0: as many as there are.

    Raises:
        ValueError: the replies overlap, reach beyond ``step`` or are more than ``keep``, or a number does not fit 63
            bits.
    """

    id: str
    epoch: int
    revision: int
    step: int
    last_used: float
    states: bytes | None = None
    replies: tuple[Reply, ...] = ()
    forget_before: int = 0
    keep: int = 0

    def __post_init__(self) -> None:
        _check(self.epoch, self.revision - 1, self.step, self.replies)
        if 0 < self.keep < len(self.replies):
            raise ValueError(f"{len(self.replies)} new replies in a window of {self.keep}")

    @property
    def start(self) -> int:
        """Where its replies begin: no older reply may reach beyond."""
        return self.replies[0].first_step if self.replies else self.step

    def window(self, replies: Sequence[Reply]) -> tuple[Reply, ...]:
        """The replay window afterwards."""
        kept = (reply for reply in replies if reply.first_step >= self.forget_before and reply.end <= self.start)
        return (*kept, *self.replies)[-self.keep :]  # -0: all

    def is_in(self, record: Record) -> bool:
        """Whether a record of this write's epoch and revision is what this very write left behind."""
        return (
            record.step == self.step
            and self.states in (None, record.states)
            and record.replies[len(record.replies) - len(self.replies) :] == self.replies
        )


def first_epoch() -> int:
    """An epoch for a session that is made: at random, so that no owner of an earlier session of that id has it."""
    return secrets.randbits(48) + 1


class Store(ABC):
    """Where sessions are kept. Used from one event loop.

    Every method raises `StoreUnavailable` when the store cannot be reached, and `StoreCorrupt` when it holds something
    else than sessions.
    """

    name: str
    """What it is called in settings, logs and metrics."""
    shared: bool
    """Whether other processes can take sessions from it."""
    embedded: bool = False
    """Whether a commit is work of this process rather than a wait for another one: then fewer and larger ones pay,
    however long one takes.
    """

    @property
    def failed(self) -> str:
        """Why nothing is stored any more until the process is started again; empty: nothing is wrong for good."""
        return ""

    @abstractmethod
    async def create(self, records: Sequence[Record]) -> list[bool]:
        """Stores new sessions, of epochs by `first_epoch`.

        One that has come to its end by the new one's ``create_time`` makes room.

        Returns:
            For each whether it is stored. False: the id is that of another live session.
        """

    @abstractmethod
    async def take(self, ids: Sequence[str], now: float) -> list[Record | None]:
        """Makes sessions the caller's: their epoch is one more, and their owners before can write no more.

        Ends those that have come to their end by ``now``.

        Returns:
            Each as it is now, with its new epoch; None: there is none, and `ended` says why.
        """

    @abstractmethod
    async def peek(self, ids: Sequence[str]) -> list[Head | None]:
        """Looks at sessions without taking them. They may have come to their end without being ended yet."""

    @abstractmethod
    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        """Applies writes, one a session, each whole or not at all, and returns when they are durable.

        Returns:
            For each whether it is applied, by this call or by an earlier one with the very same write. False: the
            session is another's or has ended; nothing of the write was applied, nor ever will be.
        """

    async def commit_ticks(self, ticks: Sequence[Tick]) -> Applied:
        """Applies the writes that ticks of distinct sessions stand for, as `commit` does: for each whether it is."""
        applied = iter(await self.commit([write for tick in ticks for write in tick.writes()]))
        return [list(islice(applied, len(tick.ids))) for tick in ticks]

    def begin_commit(self, ticks: Sequence[Tick], told: Told) -> None:
        """Begins `commit_ticks` for who has no task to wait in; what came of it is told on the event loop, in nobody's
        context: what it returned or raised. A store that needs no task for it saves turns of the loop.
        """
        in_task(self.commit_ticks(ticks), told)

    @abstractmethod
    async def delete(self, owned: Sequence[tuple[str, int]], why: End, now: float) -> list[bool]:
        """Ends sessions that the caller owns, and remembers why.

        Args:
            owned: (id, epoch) of each.
            why: the reason.
            now: the time.

        Returns:
            For each whether it is ended, by this call or by an earlier one of the same epoch and reason.
        """

    @abstractmethod
    async def ended(self, ids: Sequence[str], now: float) -> list[Ended | None]:
        """Why sessions ended, as long as that is remembered; None also for those that live."""

    @abstractmethod
    async def expire(self, now: float, limit: int) -> list[str]:
        """Ends sessions that have come to their end by ``now``, and remembers why.

        Costs nothing for those that are not due: each is looked at about once per idle lifetime.

        Returns:
            The ids of at most ``limit`` sessions that this call ended; fewer than ``limit``: no more are due.
        """

    @abstractmethod
    async def page(self, after: str, limit: int, model: str = "", scope: str = "") -> list[Head]:
        """Sessions in the order of their cursors: oldest first.

        Args:
            after: the cursor of the last one seen, or empty.
            limit: so many at most; fewer: there are no more.
            model: only those of this model, unless it is empty.
            scope: only those whose ids begin so, unless it is empty: a principal's name and a slash.
        """

    @abstractmethod
    async def count_of(self, scope: str) -> int:
        """How many sessions have ids that begin so: a principal's name and a slash. Those that have come to their end
        without being ended yet are counted too.
        """

    @abstractmethod
    async def count(self, models: Sequence[str]) -> list[int]:
        """How many sessions of each model there are, those among them that are due but were not ended yet.

        Costs time in proportion to their number at most, and is asked every few seconds.
        """

    @abstractmethod
    async def close(self) -> None:
        """Waits for what is under way and lets go of everything. The sessions stay."""


def in_task(commit: Coroutine[Any, Any, Applied], told: Told) -> None:
    """Has a task commit, and tell what came of it."""

    async def run() -> None:
        try:
            applied: Applied | Exception = await commit
        except Exception as error:
            applied = error
        told(applied)

    task = asyncio.get_running_loop().create_task(run(), context=contextvars.Context())
    _COMMITS.add(task)
    task.add_done_callback(_COMMITS.discard)


def settles(future: asyncio.Future[T]) -> Callable[[T | Exception], None]:
    """What gives a future what it is told was returned or raised, if somebody waits for that still."""

    def told(result: T | Exception) -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    return told


def check_distinct(ids: Sequence[str]) -> None:
    """Raises ValueError if an id is named twice."""
    if len(set(ids)) != len(ids):
        raise ValueError("a session is named twice in one batch")


def _check(epoch: int, revision: int, step: int, replies: Sequence[Reply]) -> None:
    if not (0 < epoch <= _MOST and 0 <= revision <= _MOST and 0 <= step <= _MOST):
        raise ValueError(f"numbers of 63 bits expected, got epoch {epoch}, revision {revision}, step {step}")
    before = 0
    for reply in replies:
        if reply.first_step < before or reply.timesteps < 1:
            raise ValueError(
                f"a reply of {reply.timesteps} steps at {reply.first_step} follows one that ends at {before}"
            )
        before = reply.end
    if before > step:
        raise ValueError(f"the replies reach to step {before}, the session to {step}")
