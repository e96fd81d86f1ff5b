"""What a model's worker ran is stored, one commit at a time, and answered when it is.

Where a commit takes long, the next ticks run meanwhile: see `behind`. Only when one is stored are its chunks committed
in memory and answered, so that nobody ever sees more than is stored. No task stands between a commit and its answers:
the store tells of its end by a call.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import structlog

from rnnserve_server.answering import Answering, Ready, Shown, internal_error
from rnnserve_server.behind import Behind, Chain, Ran
from rnnserve_server.blocks import Block, sinks_of
from rnnserve_server.errors import SessionAway, StoreDown
from rnnserve_server.keeper import Keeper
from rnnserve_server.observer import Observer, Ticked
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.sessions import Session, SessionTable
from rnnserve_server.store.base import Applied, StoreError

log = structlog.get_logger(__name__)

_HELD_COMMITS = 4  # as long as the last commit took: so often a commit is held back while there is more to run
_HELD_SECONDS = 0.01  # which a commit is taken to take at most, whatever the disk did the last time
_FAR_MORE = 4  # times the input of what is stored: what is run meanwhile
_NEAR_SECONDS = 0.005  # which a commit elsewhere may take to be waited for: less than two commits cost more than one

Chained = list[tuple[Block, list[Shown]]]
"""The blocks of a chain, and what they answer."""


class Storing:
    """Has a keeper's store keep what was run.

    Args:
        keeper: its durability is ``step``.
        answering: commits and answers what is stored.
        scheduler: the worker's queue.
        sessions: where states are committed.
        clock: monotonic seconds.
        go_on: called when there may be something to run.
        on_progress: called when queued work got less.
        observer: who is told of each tick, if anybody is.

    Attributes:
        under_way: a commit is.
    """

    def __init__(
        self,
        keeper: Keeper,
        answering: Answering,
        scheduler: Scheduler,
        sessions: SessionTable,
        *,
        clock: Callable[[], float],
        go_on: Callable[[], None],
        on_progress: Callable[[], None],
        observer: Observer | None,
    ) -> None:
        self.under_way = False
        self._keeper = keeper
        self._answering = answering
        self._scheduler = scheduler
        self._sessions = sessions
        self._clock = clock
        self._go_on = go_on
        self._on_progress = on_progress
        self._observer = observer
        self._behind = Behind()
        self._over = asyncio.Event()  # nothing is under way
        self._ran_at = 0.0  # when the first of what is behind was run
        self._began_at = 0.0  # when what is under way began
        self._commit_seconds = 0.0  # what the last commit took, as far as it shall count
        self._takes_long = False  # what is under way: nothing waits for it any more
        self._stored_bytes = 0  # of input of what is under way
        self._patience: asyncio.TimerHandle | None = None  # says when that is
        self._losing: asyncio.Task[None] | None = None  # held on to, or it might be collected

    def add(self, blocks: Sequence[Block], watched: Ticked | None) -> None:
        """Blocks of sessions were run, in one tick, which is over when they are stored. The next may run meanwhile."""
        if not self._behind:
            self._ran_at = self._clock()
        self._behind.add(Ran(blocks, watched))
        for block in blocks:
            self._scheduler.ran(block)
        if not self._waits:
            self._begin()

    def comes_first(self) -> bool:
        """Whether what was run is to be stored before anything else is run, where commits are waited for; begins it.

        Much of a commit costs the same for many frames as for one. So what is waiting is run first, and stored along
        with what was run before, which thereby waits for some times as long as the last commit took: a server that
        always has something to run spends a fifth of its time on commits at most. What comes meanwhile is one tick; if
        another process does not answer, there may be work that is not for the store.
        """
        if not self._waits or not self._behind:
            return False
        if self._scheduler.has_ready and self._clock() < self._ran_at + _HELD_COMMITS * self._commit_seconds:
            return False
        self._begin()
        return self._is_waited_for

    async def wait(self) -> None:
        """Waits until nothing is under way."""
        if self.under_way:
            await self._over.wait()

    def holds_back(self, nbytes: int) -> bool:
        """Whether a commit is under way during which so many bytes of input are not run.

        What is far more than it stores is run, if it is not this process's own work: of what a client sends ahead the
        first often comes alone, and is on its way to the store when the others come, which make a commit of their own
        in any case.
        """
        return self._is_waited_for and (self._keeper.store.embedded or nbytes < _FAR_MORE * self._stored_bytes)

    @property
    def _is_waited_for(self) -> bool:
        """Whether a commit is under way that what comes meanwhile waits for."""
        return self.under_way and self._waits and not self._takes_long

    @property
    def _waits(self) -> bool:
        """Whether nothing is run during a commit: where it is this process's own work anyway, or is over so soon that
        to make two commits of what would be one is a loss.
        """
        return self._keeper.store.embedded or self._commit_seconds < _NEAR_SECONDS

    def _begin(self) -> None:
        """Has what was run stored and answered, and then what is run meanwhile."""
        while self._behind and not self.under_way:
            ran, chains = self._behind.take()
            try:
                living = self._living(chains)
                ticks = [self._keeper.tick(each) for each in living]
            except Exception:
                self._failed(ran)
                living, ticks = [], []
            if not ticks:
                self._tell(ran, None, ())
                continue
            self.under_way, self._takes_long, self._began_at = True, False, self._clock()
            self._stored_bytes = sum([block.nbytes for chain in living for block, _ in chain])
            self._over.clear()
            if not self._keeper.store.embedded:
                loop = asyncio.get_running_loop()
                self._patience = loop.call_later(_HELD_SECONDS, self._lose_patience, context=contextvars.Context())
            ready: dict[Block, list[Ready]] = {}
            told = partial(self._kept, ran, living, ready)
            try:
                self._keeper.store.begin_commit(ticks, told)
            except Exception as error:  # a bug
                told(error)
            else:
                self._make_ready(living, ready)

    def _make_ready(self, living: Sequence[Chained], ready: dict[Block, list[Ready]]) -> None:
        """Readies what blocks are answered while they are stored: there is nothing else to do."""
        try:
            for chain in living:
                for block, shown in chain:
                    ready[block] = self._answering.ready(block, shown)
        except Exception:  # a bug, or an answer that cannot be encoded: whoever waits for it is told when it is stored
            log.debug("an answer could not be made ready", exc_info=True)

    def _living(self, chains: Sequence[Chain]) -> list[Chained]:
        """Of chains what can be stored, and what it answers: sessions may have ended while others were stored."""
        living: list[Chained] = []
        for chain in chains:
            blocks = [checked for block in chain if (checked := self._answering.checked(block))]
            if blocks:
                living.append([(block, self._answering.shown(block)) for block in blocks])
        return living

    def _lose_patience(self) -> None:
        """A commit takes long: what is not for the store need not wait for it."""
        self._takes_long = True
        self._go_on()

    def _kept(
        self,
        ran: Sequence[Ran],
        living: Sequence[Chained],
        ready: Mapping[Block, Sequence[Ready]],
        applied: Applied | Exception,
    ) -> None:
        """The store says what it has kept of chains: they are answered."""
        self._commit_seconds = min(self._clock() - self._began_at, _HELD_SECONDS)
        if self._patience is not None:
            self._patience.cancel()
        answered: list[Block] = []
        stored_at = None if self._observer is None else self._clock()
        try:
            if isinstance(applied, StoreError):
                self._not_kept([block for chain in living for block, _ in chain], applied)
            elif isinstance(applied, Exception):
                raise applied
            elif lost := self._move_on(living, applied):
                losing = self._lose(ran, living, lost, stored_at)
                self._losing = asyncio.get_running_loop().create_task(losing, context=contextvars.Context())
                return
            else:
                answered = self._answer(living, ready)
        except Exception:
            self._failed(ran)
        self._end(ran, stored_at, answered)

    def _move_on(self, living: Sequence[Chained], applied: Applied) -> list[Session]:
        """Moves the revisions of what was kept on: the sessions that were not."""
        lost: list[Session] = []
        for ((block, _), *_), each in zip(living, applied, strict=True):
            assert block.sessions is not None
            group, slots = block.sessions.group, block.sessions.slots
            if all(each) and block.sessions.ended == group.ended:
                group.revision[block.sessions.at] += 1
                continue
            good = np.array(each)
            alive = group.generation[slots] == block.sessions.generations
            group.revision[slots[good & alive]] += 1
            lost += [self._sessions.at(group, slot) for slot in slots[~good & alive].tolist()]
        return lost

    async def _lose(
        self,
        ran: Sequence[Ran],
        living: Sequence[Chained],
        lost: Sequence[Session],
        stored_at: float | None,
    ) -> None:
        """Some of the sessions of chains are not ours any more; the others are answered."""
        answered: list[Block] = []
        try:
            await self._keeper.lose(lost)
            answered = self._answer(living, {})
        except Exception:
            self._failed(ran)
        self._end(ran, stored_at, answered)

    def _answer(self, living: Sequence[Chained], ready: Mapping[Block, Sequence[Ready]]) -> list[Block]:
        """Commits and answers the blocks of chains that are stored: those whose sessions live."""
        answered: list[Block] = []
        for chain in living:
            for block, shown in chain:
                if alive := self._answering.alive(block):
                    shown = shown if alive is block else self._answering.shown(alive)
                    self._answering.commit(alive, shown, stored=True, ready=ready.get(alive))
                    answered.append(alive)
        return answered

    def _not_kept(self, blocks: Sequence[Block], error: StoreError) -> None:
        """The store does not answer. Whether blocks were written is not known: what is stored is what counts."""
        log.warning("the store does not answer", error=str(error), **self._answering.facts(blocks))
        living = [alive for block in blocks if (alive := self._answering.alive(block))]
        for block in living:
            if block.onto is None and block.sessions is not None:
                self._sessions.lose(block.sessions.group, block.sessions.slots, SessionAway)
        for block in living:
            self._answering.drop(block, StoreDown(error))

    def _failed(self, ran: Sequence[Ran]) -> None:
        """What was to be stored has met a bug: no one is left waiting for it."""
        blocks = [block for tick in ran for block in tick.blocks]
        log.exception("storing a tick failed", **self._answering.facts(blocks))
        for block in filter(self._scheduler.holds, blocks):
            self._answering.drop(block, internal_error())

    def _end(self, ran: Sequence[Ran], stored_at: float | None, answered: Sequence[Block]) -> None:
        """A commit is over."""
        self.under_way = False
        self._tell(ran, stored_at, answered)
        self._begin()
        if not self.under_way:
            self._over.set()
        self._go_on()

    def _tell(self, ran: Sequence[Ran], stored_at: float | None, answered: Sequence[Block]) -> None:
        """Ticks are over, and whoever waits for them is told."""
        blocks = [block for tick in ran for block in tick.blocks]
        for sink in sinks_of(blocks):
            sink.flush()
        if self._observer is not None:
            for tick in ran:
                self._watch(self._observer, tick, stored_at, answered)
        self._on_progress()

    def _watch(self, observer: Observer, ran: Ran, stored_at: float | None, answered: Sequence[Block]) -> None:
        if (watched := ran.watched) is None:
            return
        numbers = {block.number for block in ran.blocks}
        watched.finished = [*watched.finished, *(block for block in answered if block.number in numbers)]
        watched.stored_at, watched.ended_at = stored_at, self._clock()
        observer.ticked(watched)
