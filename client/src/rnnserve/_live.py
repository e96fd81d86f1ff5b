"""Live sessions on a connection: what the sessions, session groups and stateful layers of both clients stand on."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass
from typing import Any

from rnnserve import nest
from rnnserve._chunks import Chunk, Columns, Lane
from rnnserve._connection import Connection
from rnnserve._link import Link, deliver
from rnnserve._signature import Signature, flat_states
from rnnserve.codec import encode_named
from rnnserve.errors import GroupError, SessionClosed, SessionNotFound
from rnnserve.models import Model
from rnnserve.options import LayerOptions
from rnnserve.v1 import options_pb2, session_pb2

_LONGEST = 1e10  # seconds, as the contract has it

_Opened = tuple[Lane, session_pb2.Session]


@dataclass(frozen=True)
class Wish:
    """What a new session is to be; `options` has only what was given."""

    model: str
    version: str = ""
    batch_size: int = 1
    initial_state: nest.Nest = None
    idle_lifetime: float | None = None
    session_id: str = ""
    options: options_pb2.LayerOptions | None = None
    lifetime: float | None = None

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
        for name in ("idle_lifetime", "lifetime"):
            seconds = getattr(self, name)
            if seconds is not None:
                if not 0 < seconds <= _LONGEST:
                    raise ValueError(f"{name} must be positive seconds, at most {_LONGEST:.0f}, got {seconds}")
                getattr(config, name).FromNanoseconds(round(seconds * 1e9))
        return config


class Live:
    """One session, or several of one kind that take their chunks together. Its methods belong to the event loop.

    It outlives its stream: what comes after a loss waits until the sessions are open on a new one.
    """

    def __init__(
        self,
        connection: Connection,
        link: Link,
        opened: list[_Opened],
        model: Model,
        group: bool,
    ) -> None:
        self.connection = connection
        self.session_ids = [session.session_id for _, session in opened]
        first = opened[0][1]
        self.signature = Signature(model, LayerOptions.from_message(first.options), first.batch_size)
        self.closed = False
        self._link = link
        self._lanes = [lane for lane, _ in opened]
        self._group = group
        self._waiting: list[Chunk] = []
        self._attaching: asyncio.Task[None] | None = None

    @classmethod
    async def create(
        cls, connection: Connection, wish: Wish, limit: float | None, *, count: int = 1, group: bool = False
    ) -> Live:
        """Makes sessions. All opens leave in one message; if one fails, those that did not are deleted."""
        model = None
        if wish.initial_state is not None:
            model = await connection.newest(wish.model, wish.version, limit, known=True)
        config = wish.config(model)
        return await connection.limited(cls._open(connection, [config] * count, group), limit)

    @classmethod
    async def attach(cls, connection: Connection, session_id: str, limit: float | None) -> Live:
        """Takes a live session."""
        return await connection.limited(cls._open(connection, [session_id], group=False), limit)

    @classmethod
    async def _open(cls, connection: Connection, targets: list[Any], group: bool) -> Live:
        link = connection.link()
        opened: list[_Opened] = []
        try:
            opened += await _open_all(link, targets)
            model = await connection.model_of(opened[0][1], None)
        except BaseException:
            for lane, _ in opened:
                link.forget(lane, delete_session=not isinstance(targets[0], str))
            raise
        return cls(connection, link, opened, model, group)

    @property
    def next_steps(self) -> list[int]:
        """The step at which each session's next chunk starts."""
        return [lane.next_step for lane in self._lanes]

    def submit(self, chunk: Chunk) -> None:
        """Sends a chunk; the answer goes to its ticket, and so does any failure."""
        if self.closed:
            deliver(chunk.ticket, None, SessionClosed(f"session {self.session_ids[0]} was closed by this client"))
        elif self._link.alive and not self._waiting:
            self._link.step(self._lanes, chunk, self._group)
        else:
            self._waiting.append(chunk)
            self._attach()

    async def settled(self) -> None:
        """Waits until every chunk submitted so far is answered."""
        if self._attaching is not None:
            await asyncio.shield(self._attaching)
        if self._link.alive:
            for lane in self._lanes:
                await self._link.settled(lane)

    async def reset(self, states: nest.Nest, limit: float | None) -> None:
        """Puts the states of every session to given values, or back to the model's default."""
        named = [] if states is None else self._named(states)
        await self.settled()
        requests = [session_pb2.ResetSessionRequest(session_id=each, states=named) for each in self.session_ids]
        await asyncio.gather(*[self.connection.reset_session(request, limit) for request in requests])

    def moved(self, step: int) -> None:
        """The session was taken to another step: what is submitted from now on starts there."""
        for lane in self._lanes:
            lane.generation += 1
            lane.next_step = step

    async def close(self, *, delete: bool, limit: float | None = None) -> None:
        """Leaves the sessions, behind the chunks submitted so far, and ends them too if asked. Closes once."""
        if self.closed:
            return
        self.closed = True
        if self._attaching is not None:
            await asyncio.shield(self._attaching)
        await self.connection.limited(self._leave(delete), limit)

    async def _leave(self, delete: bool) -> None:
        results: list[BaseException | None] = []
        if self._link.alive:
            closes = [self._link.close_lane(lane, delete) for lane in self._lanes]
            results = await asyncio.gather(*closes, return_exceptions=True)
        if not self._link.alive:  # lanes went with the stream; whether the server heard the last closes, nobody knows
            deletes = [self.connection.delete_session(each, None) for each in self.session_ids] if delete else []
            results = await asyncio.gather(*deletes, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, SessionNotFound):
                raise result

    def _named(self, states: nest.Nest) -> list[Any]:
        return encode_named(flat_states(self.signature.model, states, self.signature.batch_size or 1))

    def _attach(self) -> None:
        if self._attaching is None:
            self._attaching = asyncio.get_running_loop().create_task(self._attach_again())

    async def _attach_again(self) -> None:
        try:
            link = self.connection.link()
            opened = await _open_all(link, self.session_ids)
        except Exception as error:  # whatever it is, those who wait must hear of it
            for chunk in self._waiting:
                deliver(chunk.ticket, None, copy.copy(error))
        except asyncio.CancelledError:
            for chunk in self._waiting:
                chunk.ticket.cancel()
            raise
        else:
            self._link = link
            self._lanes = [lane for lane, _ in opened]
            for chunk in self._waiting:
                link.step(self._lanes, chunk, self._group)
        finally:
            self._waiting.clear()
            self._attaching = None

    def group_result(self, answer: Columns | GroupError, *, step: bool) -> Any:
        """The result of a group's chunk; raises the GroupError with its partial result in shape."""
        shape = self.signature.step_all_result if step else self.signature.chunk_all_result
        if isinstance(answer, GroupError):
            if isinstance(answer.partial, Columns):
                answer.partial = shape(answer.partial)
            raise answer
        return shape(answer)


async def _open_all(link: Link, targets: list[Any]) -> list[_Opened]:
    if len(targets) == 1:
        return [await link.open(targets[0])]
    tries = await asyncio.gather(*[link.open(target) for target in targets], return_exceptions=True)
    failures = [each for each in tries if isinstance(each, BaseException)]
    opened = [each for each in tries if not isinstance(each, BaseException)]
    if failures:
        for lane, _ in opened:
            link.forget(lane, delete_session=not isinstance(targets[0], str))
        raise failures[0]
    return opened
