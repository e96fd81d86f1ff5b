"""Sessions: who they are, where their states are, and at which step they stand."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.load import LoadedModel
from rnnserve_models.options import LayerOptions
from rnnserve_server import blocks
from rnnserve_server.directory import Directory
from rnnserve_server.errors import (
    ServiceError,
    SessionAway,
    SessionClosed,
    SessionError,
    SessionExists,
    SessionsFull,
    SessionTakenOver,
    SessionUnknown,
    step_mismatch,
)
from rnnserve_server.group import Group, Session, key_of
from rnnserve_server.lifetimes import Lifetimes
from rnnserve_server.owners import Owners
from rnnserve_server.replay import NO_REPLAY, Limits
from rnnserve_server.resets import NO_RULES, ResetRules

__all__ = ["Group", "Session", "SessionTable"]


class SessionTable(Lifetimes):
    """All sessions of a server.

    Args:
        max_sessions: live sessions at most.
        max_state_bytes: bytes of their states at most.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch, for people.

    Attributes:
        state_bytes: bytes of the states of all sessions.
        entered: by model and version, how many sessions were made here or came from the store.
        fetched: how many of those came from the store.
        resumed: how many were opened by their ids.
        rested: how many left memory and live on in the store.
        ends: by model, version and why, how many ended.
        dropped: rounds of answers that were forgotten because all together took too much memory.
        on_end: told of sessions in N slots of a group that are about to end, and why.
        owners: whose they are and what each may have; None: there are no principals.
    """

    def __init__(
        self,
        *,
        max_sessions: int,
        max_state_bytes: int,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        super().__init__(clock)
        self._max_sessions = max_sessions
        self._max_state_bytes = max_state_bytes
        self._wall_clock = wall_clock
        self._directory = Directory()
        self._by_index: dict[int, Group] = {}
        self._live = 0
        self._number = 0
        self._index = 0
        self.state_bytes = 0
        self.entered: Counter[tuple[str, str]] = Counter()
        self.fetched: Counter[tuple[str, str]] = Counter()
        self.resumed: Counter[tuple[str, str]] = Counter()
        self.rested: Counter[tuple[str, str]] = Counter()
        self.ends: Counter[tuple[str, str, type[SessionError]]] = Counter()
        self.dropped = 0
        self.on_end: Callable[[Group, Array, type[SessionError]], None] | None = None
        self.owners: Owners | None = None

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._directory

    def __len__(self) -> int:
        return self._live

    def is_stored(self, session_id: str) -> bool:
        """Whether a session is here, and is kept in a store too."""
        place = self._directory.find(session_id)
        return place is not None and bool(self._by_index[place[0]].epoch[place[1]] > 0)

    def create(
        self,
        model: LoadedModel,
        batch_size: int,
        options: LayerOptions,
        *,
        initial_states: Mapping[str, Array] | None,
        idle_lifetime: float,
        lifetime: float = math.inf,
        replay: Limits = NO_REPLAY,
        rules: ResetRules = NO_RULES,
        session_id: str = "",
    ) -> Session:
        """Makes a session at step 0. Arguments as `create_many`.

        Raises:
            SessionExists: a live session has that id.
            SessionsFull: the server holds as many as it may.
        """
        group, slots, full = self.create_many(
            model,
            batch_size,
            options,
            1,
            initial_states=initial_states,
            idle_lifetime=idle_lifetime,
            lifetime=lifetime,
            replay=replay,
            rules=rules,
            session_ids=[session_id] if session_id else (),
        )
        if full is not None:
            raise full
        return self.at(group, int(slots[0]))

    def create_many(
        self,
        model: LoadedModel,
        batch_size: int,
        options: LayerOptions,
        count: int,
        *,
        initial_states: Mapping[str, Array] | None,
        idle_lifetime: float,
        lifetime: float = math.inf,
        replay: Limits = NO_REPLAY,
        rules: ResetRules = NO_RULES,
        session_ids: Sequence[str] = (),
        scope: str = "",
        stored: int | None = None,
        new: bool = True,
    ) -> tuple[Group, Array, SessionsFull | None]:
        """Makes N sessions at step 0 that are alike, or as many as there is room for.

        Args:
            model: their model, for life.
            batch_size: rows of every call.
            options: their options.
            count: N, at least 1.
            initial_states: every state, [batch_size, *shape], already checked; None for the model's default.
            idle_lifetime: seconds.
            lifetime: seconds; infinity for no end.
            replay: how much their replay windows hold.
            rules: when their states are reset by themselves.
            session_ids: the N distinct ids to give them, scope and all; empty for new ones.
            scope: what their owner's ids begin with; empty: they are nobody's.
            stored: how many sessions their owner has in the store, if there is one.
            new: they are new, not taken from a store.

        Returns:
            Their group; the slots of those that were made, int64 [<= N]; and why the others were not, or None if all
            were.

        Raises:
            SessionExists: a live session has that id.
        """
        for session_id in session_ids:
            if session_id in self:
                raise SessionExists(session_id)
        key = key_of(model, batch_size, options, replay, rules)
        group = self._groups.get(key) or Group(model, batch_size, options, replay, rules, self._index + 1)
        room = min(
            self._max_sessions - self._live,
            (self._max_state_bytes - self.state_bytes) // max(1, group.arena.session_bytes),
        )
        full: Callable[[Group], SessionsFull] = self._full
        if self.owners is not None:
            left, exceeded = self.owners.room(scope, group.arena.session_bytes, stored, new=new)
            if exceeded is not None and left < room:
                room, full = left, lambda _: exceeded
        if room <= 0:
            return group, np.zeros(0, np.int64), full(group)
        if key not in self._groups:
            self._index = group.index
            self._groups[key] = self._by_index[group.index] = group
        ids = session_ids[:room] or [scope + each for each in _new_ids(min(count, room))]
        slots = self._make(group, ids, initial_states, idle_lifetime, lifetime)
        return group, slots, full(group) if room < count else None

    def at(self, group: Group, slot: int) -> Session:
        """The live session of a slot."""
        return Session(
            group.ids[slot],
            int(group.number[slot]),
            group,
            slot,
            int(group.generation[slot]),
            float(group.create_time[slot]),
            float(group.idle_lifetime[slot]),
            float(group.lifetime[slot]),
        )

    def get(self, session_id: str) -> Session:
        """Finds a live session.

        Raises:
            SessionUnknown, SessionClosed, SessionExpired: there is none, and why.
        """
        place = self._directory.find(session_id)
        if place is None:
            raise self._why(session_id)
        index, slot = place
        return self.at(self._by_index[index], slot)

    def was_taken(self, session_id: str) -> bool:
        """Whether another server has taken a session over, which was here."""
        return isinstance(self._why(session_id), SessionTakenOver)

    def why_ended(self, session_id: str) -> type[SessionError]:
        """Why a session is not here that was: SessionUnknown or SessionAway for one that may live on in a store."""
        return type(self._why(session_id))

    def gone(self, group: Group, session_id: str) -> SessionError:
        """Why a session of a group that was here is not any more: SessionAway for one that may live on in a store."""
        error = self._why(session_id)
        if not isinstance(error, SessionUnknown):
            return error
        if session_id in self:  # another session has its id by now
            return SessionClosed(session_id)
        if self.rested[group.model.name, group.model.version]:  # it came back from wherever it was, and rests
            return SessionAway(session_id)
        return error

    def delete(self, session_id: str) -> None:
        """Ends a session and forgets its state.

        Raises:
            SessionUnknown, SessionClosed, SessionExpired: there is none, and why.
        """
        session = self.get(session_id)
        self.delete_many(session.group, np.array([session.slot]))

    def delete_many(self, group: Group, slots: Array) -> None:
        """Ends the live sessions in N distinct slots of a group, and forgets their states."""
        self._end(group, slots, SessionClosed)

    def reset(self, session: Session, states: Mapping[str, Array] | None) -> None:
        """Sets a session's states to given ones, or to the model's default. Its step stays."""
        session.group.arena.reset(session.slot, states)
        session.group.last_used[session.slot] = self._clock()
        session.group.dirty[session.slot] = True

    def rewind(self, session: Session, step: int, states: Mapping[str, Array]) -> None:
        """Takes a session back to a step and the states that it had there; what it did since is forgotten."""
        group, slot = session.group, session.slot
        group.arena.reset(slot, states)
        group.window.forget_from(group, slot, step)
        group.step[slot] = step
        group.last_used[slot] = self._clock()
        group.dirty[slot] = True

    def after(self, number: int, model: str = "") -> Iterator[Session]:
        """Live sessions made after the ``number``-th, oldest first."""
        groups = [group for group in self._groups.values() if model in ("", group.model.name)]
        slots = [group.arena.all_used() for group in groups]
        slots = [found[group.number[found] > number] for group, found in zip(groups, slots, strict=True)]
        if not groups:
            return
        numbers = np.concatenate([group.number[found] for group, found in zip(groups, slots, strict=True)])  # [N]
        which = np.repeat(np.arange(len(groups)), [len(found) for found in slots])  # [N], the group of each
        together = np.concatenate(slots)  # [N]
        for position in np.argsort(numbers, kind="stable"):
            yield self.at(groups[which[position]], int(together[position]))

    def of(self, scope: str, number: int, model: str = "") -> Iterator[Session]:
        """A principal's live sessions made after the ``number``-th, oldest first."""
        found = [self.get(each) for each in self.owners.of(scope)] if self.owners is not None else []
        return iter(
            sorted(
                (each for each in found if each.number > number and model in ("", each.group.model.name)),
                key=lambda session: session.number,
            )
        )

    def uses(self, model: LoadedModel) -> bool:
        """Whether a live session has this very model."""
        return any(group.model is model for group in self._groups.values())

    def trim(self) -> bool:
        """Gives memory of ended sessions' states back to the system, a bounded amount at a time.

        Returns:
            Whether there may be more of it.
        """
        return any(group.arena.trim() for group in self._groups.values())

    def check(
        self, sessions: blocks.Sessions, session_id: Callable[[int], str], *, ahead: bool = False
    ) -> tuple[Array | None, list[tuple[int, ServiceError]]]:
        """Holds the chunks of a block against their sessions, when their turn has come.

        Args:
            sessions: the chunks' columns; ``first_steps`` are filled in where the request left them out, if all fit.
            session_id: the session of the chunk at a position.
            ahead: they follow chunks that are not committed yet, and are known to be in step with those.

        Returns:
            The positions of the chunks that fit (None: all of them), and by position the errors of the others.
        """
        group, slots = sessions.group, sessions.at
        here = group.step[slots]  # [N]
        if ahead and sessions.first_steps is not None:
            here = sessions.first_steps
        first_steps = here.copy() if sessions.first_steps is None else sessions.first_steps
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
            else (int(index), self.gone(group, session_id(int(index))))
            for index in np.flatnonzero(~fine)
        ]
        return np.flatnonzero(fine), errors

    def commit(self, sessions: blocks.Sessions, states: Arrays, timesteps: int, *, stored: bool = False) -> None:
        """Writes the states of finished chunks, which `check` found to fit, and moves their sessions on.

        Args:
            sessions: the chunks' columns.
            states: every state, [N * batch_size, *shape].
            timesteps: of each chunk.
            stored: whether a store has them already.
        """
        group, slots = sessions.group, sessions.at
        assert sessions.first_steps is not None
        group.arena.scatter(slots, states)
        group.step[slots] = sessions.first_steps + np.uint64(timesteps)
        group.dirty[slots] = not stored
        group.last_used[slots] = self._clock()

    def lacking(self, count: int, session_bytes: int) -> int:
        """How many sessions would have to go for N more of so many bytes; 0 or less: none."""
        over = self.state_bytes + count * session_bytes - self._max_state_bytes
        return max(self._live + count - self._max_sessions, -(-over // max(1, session_bytes)))

    def groups(self) -> list[Group]:
        """All groups."""
        return list(self._groups.values())

    def forget(self, group: Group, slots: Array) -> None:
        """Lets sessions in N slots leave memory, which live on in a store."""
        self._directory.forget(self._unname(group, slots))
        self.rested[group.model.name, group.model.version] += len(slots)
        self._release(group, slots)

    def lose(self, group: Group, slots: Array, why: type[SessionError]) -> None:
        """Ends sessions in N slots here, which have ended in the store or belong to somebody else."""
        self._remember(group, slots, why)
        self._release(group, slots)

    @property
    def held_bytes(self) -> int:
        """Bytes of all states and replay windows."""
        return self.state_bytes + sum(group.window.nbytes for group in self._groups.values())

    def trim_replays(self, most: int) -> None:
        """Has the replay windows hold so many bytes at most, all together: the states before the oldest rounds go, and
        then the oldest rounds, those of the largest group first.
        """
        windows = [group.window for group in self._groups.values()]
        over = sum(window.nbytes for window in windows) - most
        for window in sorted(windows, key=lambda window: window.nbytes, reverse=True):
            if over > 0:
                over -= window.drop_starts(over)
        while sum(window.nbytes for window in windows) > most:
            if not max(windows, key=lambda window: window.nbytes).drop_oldest():
                return
            self.dropped += 1

    def _why(self, session_id: str) -> SessionError:
        if self.is_stored(session_id):  # it left memory, and came back while this work waited
            return SessionAway(session_id)
        return self._directory.why(session_id)(session_id)

    def _make(
        self,
        group: Group,
        ids: Sequence[str],
        initial_states: Mapping[str, Array] | None,
        idle_lifetime: float,
        lifetime: float,
    ) -> Array:
        """Makes N sessions, for which there is room: their slots, int64 [N]."""
        now, count = self._clock(), len(ids)
        slots = group.acquire(count, now)
        if initial_states:
            group.arena.reset(slots, initial_states)
        group.number[slots] = np.arange(self._number + 1, self._number + 1 + count)
        group.create_time[slots] = self._wall_clock()
        group.idle_lifetime[slots] = idle_lifetime
        group.lifetime[slots] = lifetime
        group.ends_at[slots] = now + lifetime
        group.expiry.put(slots, np.full(count, now + min(idle_lifetime, lifetime)))
        for slot, session_id in zip(slots.tolist(), ids, strict=True):
            group.ids[slot] = session_id
        self._directory.put(ids, group.index, slots.tolist())
        if self.owners is not None:
            self.owners.add(ids, group.arena.session_bytes)
        self.entered[group.model.name, group.model.version] += count
        self._live += count
        self._number += count
        self.state_bytes += count * group.arena.session_bytes
        return slots

    def _end(self, group: Group, slots: Array, why: type[SessionError]) -> None:
        """Ends the sessions in N distinct slots of a group."""
        if self.on_end is not None:
            self.on_end(group, slots, why)
        self._remember(group, slots, why)
        self._release(group, slots)

    def _remember(self, group: Group, slots: Array, why: type[SessionError]) -> None:
        """Keeps in mind why the sessions in N slots ended."""
        self.ends[group.model.name, group.model.version, why] += len(slots)
        self._directory.end(self._unname(group, slots), why)

    def _unname(self, group: Group, slots: Array) -> list[str]:
        """The ids of sessions in N slots, which are theirs and their owners' no more."""
        ids = group.unname(slots)
        if self.owners is not None:
            for session_id in ids:
                self.owners.remove(session_id, group.arena.session_bytes)
        return ids

    def _release(self, group: Group, slots: Array) -> None:
        if not len(slots):
            return
        group.release(slots)
        self._live -= len(slots)
        self.state_bytes -= len(slots) * group.arena.session_bytes
        if not group.live:  # give its memory back; work that is still queued holds on to the group it was sent to
            key = key_of(group.model, group.batch_size, group.options, group.window.limits, group.rules or NO_RULES)
            del self._groups[key], self._by_index[group.index]

    def _full(self, group: Group) -> SessionsFull:
        """Why there is no room for one more."""
        if self._live >= self._max_sessions:
            return SessionsFull(
                f"the server holds {self._live} sessions, as many as it may; "
                "delete some, or try again when others expire",
                retry_after=self._until_next_expiry(),
            )
        return SessionsFull(
            f"the server holds {self.state_bytes} bytes of session states and may hold {self._max_state_bytes}; "
            f"a session of {group.arena.session_bytes} bytes does not fit",
            retry_after=self._until_next_expiry(),
        )


def _new_ids(count: int) -> list[str]:
    """Ids of 128 random bits each, so that nobody can guess them."""
    digits = os.urandom(16 * count).hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]
