"""Live sessions on a connection: what the sessions, session groups and stateful layers of both clients stand on."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

from rnnserve import nest
from rnnserve._chunks import Chunk, Columns, Lane
from rnnserve._connection import Connection
from rnnserve._link import forget
from rnnserve._links import Links
from rnnserve._notices import Notice
from rnnserve._signature import flat_states
from rnnserve._tickets import deliver
from rnnserve.codec import Array, encode_named
from rnnserve.errors import (
    ClientClosed,
    DeadlineExceeded,
    GroupError,
    InvalidInput,
    SessionClosed,
    SessionNotFound,
    StepMismatch,
)
from rnnserve.models import Model
from rnnserve.options import NO_TERMS, LayerOptions, Terms
from rnnserve.v1 import options_pb2, session_pb2

_Opened = tuple[Lane, session_pb2.Session]


@dataclass(frozen=True)
class Wish:
    """What a new session is to be; `options` has only what was given."""

    model: str
    version: str = ""
    batch_size: int = 1
    initial_state: nest.Nest = None
    session_id: str = ""
    options: options_pb2.LayerOptions | None = None
    terms: Terms = NO_TERMS

    def config(self, model: Model | None) -> session_pb2.SessionConfig:
        """The wish as the contract has it; the model's description is needed for initial states only."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        config = session_pb2.SessionConfig(
            model=self.model,
            version=self.version,
            batch_size=self.batch_size,
            options=self.options,
            session_id=self.session_id,
        )
        if self.initial_state is not None and model is not None:
            config.initial_states.extend(encode_named(flat_states(model, self.initial_state, self.batch_size)))
        self.terms.write(config)
        return config


class Live:
    """One session, or several of one kind that take their chunks together. Its methods belong to the event loop.

    It outlives its streams: its lanes are opened again, and what was not answered is sent again, when one is lost.
    """

    def __init__(
        self,
        connection: Connection,
        links: Links,
        opened: list[_Opened],
        model: Model,
        group: bool,
    ) -> None:
        self.connection = connection
        self.session_ids = [session.session_id for _, session in opened]
        first = opened[0][1]
        self.signature = connection.signature(model, LayerOptions.from_message(first.options), first.batch_size)
        self.closed = False
        #: A future of the event loop, for a chunk whose answer is awaited there.
        self.new_ticket = links.loop.create_future
        self._links = links
        self._lanes = [lane for lane, _ in opened]
        self._group = group

    @classmethod
    async def create(
        cls, connection: Connection, wish: Wish, limit: float | None, *, count: int = 1, group: bool = False
    ) -> Live:
        """Makes sessions. All opens leave in one message; if one fails, those that did not are deleted."""
        model = None
        if wish.initial_state is not None:
            model = await connection.newest(wish.model, wish.version, limit, known=True)
        configs = [wish.config(model) for _ in range(count)]
        for config in configs:
            # An id of ours makes it safe to ask again when the answer is lost: what exists then, we have made.
            config.session_id = config.session_id or uuid.uuid4().hex
        return await connection.limited(cls._open(connection, configs, group), limit)

    @classmethod
    async def attach(cls, connection: Connection, session_id: str, limit: float | None) -> Live:
        """Takes a live session."""
        return await connection.limited(cls._open(connection, [session_id], group=False), limit)

    @classmethod
    async def attach_all(cls, connection: Connection, session_ids: list[str], limit: float | None) -> Live:
        """Takes live sessions of one kind as a group."""
        return await connection.limited(cls._open(connection, session_ids, group=True), limit)

    @classmethod
    async def _open(cls, connection: Connection, targets: list[Any], group: bool) -> Live:
        links = await connection.links()
        opened: list[_Opened] = []
        try:
            opened += await _open_all(links, targets)
            _check_alike([session for _, session in opened])
            model = await connection.model_of(opened[0][1], None)
        except BaseException:
            for lane, _ in opened:
                forget(lane, delete_session=not isinstance(targets[0], str))
            raise
        return cls(connection, links, opened, model, group)

    def lane(self, place: int = 0) -> Lane:
        """The lane of one of its sessions, for calls that are for it."""
        return self._lanes[place]

    def neighbour(self, place: int = 0) -> str:
        """An id for a new session that belongs where one of its sessions is."""
        return self._links.neighbour(self._lanes[place])

    @property
    def next_steps(self) -> list[int]:
        """The step at which each session's next chunk starts."""
        return [lane.next_step for lane in self._lanes]

    @property
    def notices(self) -> list[Notice | None]:
        """What the server told of each session last without being asked."""
        return [lane.notice for lane in self._lanes]

    @property
    def patience(self) -> float:
        """How many steps may gather before the event loop has to see one of this session. Any thread may ask."""
        pace = self._lanes[0].pace
        return 0 if pace is None else pace.patience

    @property
    def full(self) -> bool:
        """Whether a chunk that is submitted now would wait in line, because too many are not answered."""
        return self._links.full

    def submit(self, chunk: Chunk) -> None:
        """Sends a chunk; the answer goes to its ticket, and so does any failure."""
        if self.closed:
            deliver(chunk.ticket, None, SessionClosed(f"session {self.session_ids[0]} was closed by this client"))
        elif self._links.closed:
            deliver(chunk.ticket, None, ClientClosed("the client is closed"))
        else:
            self._links.step(self._lanes, chunk, self._group)

    async def answer(self, chunk: Chunk, limit: float | None) -> Any:
        """The answer to a chunk that was submitted, or DeadlineExceeded. Costs no task.

        Whoever stops waiting may write to the arrays again, but the chunk may have to be sent again: it takes a copy.
        """
        seconds = self.connection.seconds(limit)
        timer = None
        if seconds is not None:
            timer = asyncio.get_running_loop().call_later(seconds, self._expire, chunk, seconds)
        try:
            return await chunk.ticket
        except asyncio.CancelledError:
            self.abandon(chunk)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def abandon(self, chunk: Chunk) -> bool:
        """Gives up the answer to a chunk; whether the chunk keeps its place, or was not taken yet and never is."""
        if not chunk.ticket.cancel() and not chunk.ticket.cancelled() and isinstance(chunk.ticket, asyncio.Future):
            chunk.ticket.exception()  # seen, so that asyncio does not report it as never retrieved
        chunk.own()
        return not self._links.withdraw(chunk)

    def late(self, chunk: Chunk, seconds: float, *, taken: bool) -> DeadlineExceeded:
        """The error for a chunk that was not answered in time."""
        told = self.connection.late(seconds)
        if not taken:
            told += "; the chunk was not sent, for too many are not answered: the session is as it was"
            return DeadlineExceeded(told, metadata={"session_id": self.session_ids[0]})
        step = chunk.first_steps[0]
        told += f"; the chunk at step {step} keeps its place and is applied once: go on with the next, do not repeat it"
        return DeadlineExceeded(told, metadata={"session_id": self.session_ids[0], "first_step": str(step)})

    def _expire(self, chunk: Chunk, seconds: float) -> None:
        if not chunk.ticket.done():
            chunk.own()
            chunk.ticket.set_exception(self.late(chunk, seconds, taken=not self._links.withdraw(chunk)))

    async def settled(self) -> None:
        """Waits until every chunk submitted so far is answered."""
        await self._links.admitted()
        for lane in self._lanes:
            await self._links.settled(lane)

    async def reset(self, states: nest.Nest, limit: float | None) -> None:
        """Puts the states of every session to given values, or back to the model's default."""
        named = [] if states is None else self._named(states)
        await self.connection.limited(self._reset([named] * len(self._lanes), limit), limit)

    async def _reset(self, states: list[list[Any]], limit: float | None) -> None:
        await self.settled()
        resets = [
            self._reset_one(session_pb2.ResetSessionRequest(session_id=each, states=named), lane, limit)
            for each, lane, named in zip(self.session_ids, self._lanes, states, strict=True)
        ]
        await asyncio.gather(*resets)

    async def _reset_one(self, request: session_pb2.ResetSessionRequest, lane: Lane, limit: float | None) -> None:
        """Asks for the reset at a step, so that one whose answer was lost cannot strike twice, or late."""
        if not lane.known:  # dropped with a stream: the session is wherever it is
            return await self.connection.reset_session(request, limit, lane, retry=False)
        request.step = lane.next_step
        try:
            await self.connection.reset_session(request, limit, lane)
        except StepMismatch as mismatch:  # somebody else has stepped the session; that was never in the way
            if mismatch.expected_step is None:
                raise
            request.step = mismatch.expected_step
            await self.connection.reset_session(request, limit, lane)

    async def reset_each(self, states: list[dict[str, Array]], limit: float | None) -> None:
        """Puts the states of each session to values of its own, by name, each [batch_size, ...]."""
        await self.connection.limited(self._reset([encode_named(each) for each in states], limit), limit)

    def moved(self, place: int, step: int) -> None:
        """A session was taken to another step: what is submitted from now on starts there."""
        lane = self._lanes[place]
        lane.generation += 1
        lane.next_step = step

    async def close(self, *, delete: bool, limit: float | None = None) -> None:
        """Leaves the sessions, behind the chunks submitted so far, and ends them too if asked. Closes once."""
        if self.closed:
            return
        self.closed = True
        await self.connection.limited(self._leave(delete), limit)

    async def _leave(self, delete: bool) -> None:
        await self._links.admitted()
        closes = [self._links.close_lane(lane, delete) for lane in self._lanes]
        for result in await asyncio.gather(*closes, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, SessionNotFound):
                raise result

    def _named(self, states: nest.Nest) -> list[Any]:
        return encode_named(flat_states(self.signature.model, states, self.signature.batch_size or 1))

    def group_result(self, answer: Columns | GroupError, *, step: bool) -> Any:
        """The result of a group's chunk; raises the GroupError with its partial result in shape."""
        shape = self.signature.step_all_result if step else self.signature.chunk_all_result
        if isinstance(answer, GroupError):
            if isinstance(answer.partial, Columns):
                answer.partial = shape(answer.partial)
            raise answer
        return shape(answer)


def _check_alike(sessions: list[session_pb2.Session]) -> None:
    """Raises InvalidInput unless sessions are of one model, batch size and set of options."""
    kinds = [(each.model, each.version, each.batch_size, each.options) for each in sessions]
    for session_id, kind in zip([each.session_id for each in sessions], kinds, strict=True):
        if kind != kinds[0]:
            wanted = f"sessions like {sessions[0].session_id!r}, a {kinds[0][0]!r} of {kinds[0][2]} rows"
            raise InvalidInput.of("sessions", wanted, f"{session_id!r}, a {kind[0]!r} of {kind[2]} rows")


async def _open_all(links: Links, targets: list[Any]) -> list[_Opened]:
    if len(targets) == 1:
        return [await links.open(targets[0])]
    tries = await asyncio.gather(*[links.open(target) for target in targets], return_exceptions=True)
    failures = [each for each in tries if isinstance(each, BaseException)]
    opened = [each for each in tries if not isinstance(each, BaseException)]
    if failures:
        for lane, _ in opened:
            forget(lane, delete_session=not isinstance(targets[0], str))
        raise failures[0]
    return opened
