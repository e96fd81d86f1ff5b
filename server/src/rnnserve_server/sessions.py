"""Sessions: who they are, where their states are, how long they live and at which step they stand.

Sessions of the same model version, batch size and options form a *group* and share columns, so that a frame of N
lanes is checked and committed by a few array operations. A session is a slot in its group. A slot's generation
changes when its session ends: work that still carries the old one is refused, and can never touch the states of the
session that has the slot next.
"""

from __future__ import annotations

import heapq
import secrets
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.load import LoadedModel
from rnnserve_models.options import LayerOptions
from rnnserve_server import blocks
from rnnserve_server.errors import (
    ServiceError,
    SessionClosed,
    SessionError,
    SessionExists,
    SessionExpired,
    SessionsFull,
    SessionUnknown,
    step_mismatch,
)
from rnnserve_server.replay import NO_REPLAY, Limits, Window
from rnnserve_server.state import Arena

_REMEMBERED_ENDS = 65536
_IDLE_ENTRIES = 1024  # so many entries of ended sessions are not worth a walk through the heap


class Group:
    """The sessions of one model version, batch size and set of options, as columns over slots.

    Attributes:
        arena: their states.
        step: uint64 [capacity], time steps consumed.
        generation: int64 [capacity], changes when a slot's session ends.
        last_used: float64 [capacity], when the session was last stepped or reset, by the monotonic clock.
        tail: int64 [capacity], the number of the last block queued for the session, -1 for none.
        live: sessions in it.
        ended: how many of its sessions have ended.
        answered: int64 [capacity], chunks answered.
        answered_bytes: int64 [capacity], bytes of the answers.
        window: what was answered lately.
        fitting: the signatures of inputs that are known to fit.
    """

    def __init__(self, model: LoadedModel, batch_size: int, options: LayerOptions, replay: Limits = NO_REPLAY) -> None:
        self.model = model
        self.batch_size = batch_size
        self.options = options
        self.arena = Arena(model.engine.states, batch_size)
        self.step = np.zeros(0, np.uint64)
        self.generation = np.zeros(0, np.int64)
        self.last_used = np.zeros(0, np.float64)
        self.tail = np.zeros(0, np.int64)
        self.live = 0
        self.ended = 0
        self.answered = np.zeros(0, np.int64)
        self.answered_bytes = np.zeros(0, np.int64)
        self.window = Window(self, replay)
        self.fitting: set[Hashable] = set()

    def acquire(self, now: float) -> int:
        """Gives a session a slot, at step 0."""
        slot = self.arena.acquire()
        if self.arena.capacity > len(self.step):
            missing = (0, self.arena.capacity - len(self.step))
            self.step = np.pad(self.step, missing)
            self.generation = np.pad(self.generation, missing)
            self.last_used = np.pad(self.last_used, missing)
            self.tail = np.pad(self.tail, missing, constant_values=-1)
            self.answered = np.pad(self.answered, missing)
            self.answered_bytes = np.pad(self.answered_bytes, missing)
        self.step[slot] = 0
        self.last_used[slot] = now
        self.live += 1  # tail stays: chunks of the slot's last session may still have to be told that it ended
        return slot

    def release(self, slot: int) -> None:
        """Takes a slot back. Work that is queued for it will find another generation."""
        self.generation[slot] += 1
        self.live -= 1
        self.ended += 1
        self.arena.release(slot)


@dataclass(slots=True, eq=False)
class Session:
    """A stateful layer on the server."""

    id: str
    number: int
    group: Group
    slot: int
    generation: int
    create_time: float
    idle_lifetime: float

    @property
    def step(self) -> int:
        """The number of time steps it has consumed."""
        return int(self.group.step[self.slot])

    @property
    def busy(self) -> bool:
        """Whether chunks wait for it or run."""
        return bool(self.group.tail[self.slot] >= 0)


class SessionTable:
    """All sessions of a server.

    Args:
        max_sessions: live sessions at most.
        max_state_bytes: bytes of their states at most.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch, for people.
    """

    def __init__(
        self,
        *,
        max_sessions: int,
        max_state_bytes: int,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._max_sessions = max_sessions
        self._max_state_bytes = max_state_bytes
        self._clock = clock
        self._wall_clock = wall_clock
        self._live: dict[str, Session] = {}
        self._groups: dict[_Key, Group] = {}
        self._ended: OrderedDict[str, type[SessionError]] = OrderedDict()
        self._due: list[tuple[float, int, str]] = []  # a heap of when each session may have expired
        self._number = 0
        self.state_bytes = 0

    def __len__(self) -> int:
        return len(self._live)

    def create(
        self,
        model: LoadedModel,
        batch_size: int,
        options: LayerOptions,
        *,
        initial_states: Mapping[str, Array] | None,
        idle_lifetime: float,
        replay: Limits = NO_REPLAY,
        session_id: str = "",
    ) -> Session:
        """Makes a session at step 0.

        Args:
            model: its model, for life.
            batch_size: rows of every call.
            options: its options.
            initial_states: every state, [batch_size, *shape], already checked; None for the model's default.
            idle_lifetime: seconds.
            replay: how much its replay window holds.
            session_id: the id to give it; empty for a new one.

        Raises:
            SessionExists: a live session has that id.
            SessionsFull: the server holds as many as it may.
        """
        if session_id in self._live:
            raise SessionExists(session_id)
        if len(self._live) >= self._max_sessions:
            raise SessionsFull(
                f"the server holds {len(self._live)} sessions, as many as it may; "
                "delete some, or try again when others expire",
                retry_after=self._until_next_expiry(),
            )
        key = _key(model, batch_size, options, replay)
        group = self._groups.get(key) or Group(model, batch_size, options, replay)
        if self.state_bytes + group.arena.session_bytes > self._max_state_bytes:
            raise SessionsFull(
                f"the server holds {self.state_bytes} bytes of session states and may hold {self._max_state_bytes}; "
                f"a session of {group.arena.session_bytes} bytes does not fit",
                retry_after=self._until_next_expiry(),
            )
        self._groups[key] = group
        session_id = session_id or secrets.token_hex(16)
        now = self._clock()
        slot = group.acquire(now)
        if initial_states:
            group.arena.reset(slot, initial_states)
        self._number += 1
        session = Session(
            session_id, self._number, group, slot, int(group.generation[slot]), self._wall_clock(), idle_lifetime
        )
        self._live[session_id] = session
        self._ended.pop(session_id, None)
        self.state_bytes += group.arena.session_bytes
        heapq.heappush(self._due, (now + idle_lifetime, session.number, session_id))
        return session

    def get(self, session_id: str) -> Session:
        """Finds a live session.

        Raises:
            SessionUnknown, SessionClosed, SessionExpired: there is none, and why.
        """
        session = self._live.get(session_id)
        if session is None:
            raise self._gone(session_id)
        return session

    def delete(self, session_id: str) -> None:
        """Ends a session and forgets its state.

        Raises:
            SessionUnknown, SessionClosed, SessionExpired: there is none, and why.
        """
        self._end(self.get(session_id), SessionClosed)

    def reset(self, session: Session, states: Mapping[str, Array] | None) -> None:
        """Sets a session's states to given ones, or to the model's default. Its step stays."""
        session.group.arena.reset(session.slot, states)
        session.group.last_used[session.slot] = self._clock()

    def after(self, number: int, model: str = "") -> Iterator[Session]:
        """Live sessions made after the ``number``-th, oldest first."""
        for session in self._live.values():
            if session.number > number and model in ("", session.group.model.name):
                yield session

    def uses(self, model: LoadedModel) -> bool:
        """Whether a live session has this very model."""
        return any(group.model is model for group in self._groups.values())

    def expire(self) -> list[Session]:
        """Ends the sessions whose idle lifetime has run out, and returns them.

        Looks only at sessions that may be due: each is looked at once per idle lifetime.
        """
        now, ended = self._clock(), []
        while self._due and self._due[0][0] <= now:
            _, number, session_id = heapq.heappop(self._due)
            session = self._live.get(session_id)
            if session is None or session.number != number:
                continue
            due = float(session.group.last_used[session.slot]) + session.idle_lifetime
            if session.busy:
                due = now + session.idle_lifetime
            if due > now:
                heapq.heappush(self._due, (due, number, session_id))
            else:
                self._end(session, SessionExpired)
                ended.append(session)
        return ended

    def check(
        self, sessions: blocks.Sessions, session_id: Callable[[int], str]
    ) -> tuple[Array | None, list[tuple[int, ServiceError]]]:
        """Holds the chunks of a block against their sessions, when their turn has come.

        Args:
            sessions: the chunks' columns; ``first_steps`` are filled in where the request left them out, if all fit.
            session_id: the session of the chunk at a position.

        Returns:
            The positions of the chunks that fit (None: all of them), and by position the errors of the others.
        """
        group, slots = sessions.group, sessions.slots
        here = group.step[slots]  # [N]
        first_steps = here if sessions.first_steps is None else sessions.first_steps
        # Columns are mostly equal, and the fastest way to find that out is to compare their bytes.
        if first_steps.tobytes() == here.tobytes() and (
            group.ended == sessions.ended or group.generation[slots].tobytes() == sessions.generations.tobytes()
        ):
            sessions.first_steps, sessions.ended = first_steps, group.ended
            return None, []
        alive = group.generation[slots] == sessions.generations
        fine = alive & (first_steps == here)
        errors: list[tuple[int, ServiceError]] = [
            (int(index), step_mismatch(int(here[index]), int(first_steps[index])))
            if alive[index]
            else (int(index), self._gone(session_id(int(index))))
            for index in np.flatnonzero(~fine)
        ]
        return np.flatnonzero(fine), errors

    def commit(self, sessions: blocks.Sessions, states: Arrays, timesteps: int) -> None:
        """Writes the states of finished chunks, which `check` found to fit, and moves their sessions on."""
        group, slots = sessions.group, sessions.slots
        assert sessions.first_steps is not None
        group.arena.scatter(slots, states)
        group.step[slots] = sessions.first_steps + np.uint64(timesteps)
        group.last_used[slots] = self._clock()

    def trim_replays(self, most: int) -> None:
        """Has the replay windows hold so many bytes at most, all together: the largest group's oldest rounds go."""
        windows = [group.window for group in self._groups.values()]
        while sum(window.nbytes for window in windows) > most:
            if not max(windows, key=lambda window: window.nbytes).drop_oldest():
                return

    def _gone(self, session_id: str) -> SessionError:
        return self._ended.get(session_id, SessionUnknown)(session_id)

    def _end(self, session: Session, why: type[SessionError]) -> None:
        del self._live[session.id]
        group = session.group
        group.release(session.slot)
        if not group.live:  # give its memory back; work that is still queued holds on to the group it was sent to
            del self._groups[_key(group.model, group.batch_size, group.options, group.window.limits)]
        self.state_bytes -= group.arena.session_bytes
        self._ended[session.id] = why
        if len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)
        if len(self._due) > 2 * len(self._live) + _IDLE_ENTRIES:  # forget when sessions long gone would have expired
            self._due = [due for due in self._due if (s := self._live.get(due[2])) and s.number == due[1]]
            heapq.heapify(self._due)

    def _until_next_expiry(self) -> float:
        soonest = self._due[0][0] - self._clock() if self._due else 1.0
        return min(max(soonest, 0.1), 30.0)


_Key = tuple[str, str, str, int, LayerOptions, Limits]


def _key(model: LoadedModel, batch_size: int, options: LayerOptions, replay: Limits) -> _Key:
    """What the sessions of a group have in common."""
    return model.name, model.version, model.digest, batch_size, options, replay
