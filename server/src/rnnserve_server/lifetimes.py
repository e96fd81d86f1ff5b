"""When sessions end by themselves, or to make room: their lifetimes have run out, or were cut short."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_models.load import LoadedModel
from rnnserve_server.errors import SessionAged, SessionError, SessionEvicted, SessionExpired, SessionUnloaded
from rnnserve_server.group import Group, Key, Session

_LOOKED_AT = 1024  # sessions that a pass of expiry looks at, and may end, in about a millisecond


class Lifetimes(ABC):
    """The lifetimes of the sessions of some groups.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._groups: dict[Key, Group] = {}

    @abstractmethod
    def _end(self, group: Group, slots: Array, why: type[SessionError]) -> None:
        """Ends the sessions in N distinct slots of a group."""

    def unload(self, model: LoadedModel, seconds: float) -> int:
        """Has the sessions of a model end in so many seconds at the latest: how many do."""
        now, count = self._clock(), 0
        for group in [group for group in self._groups.values() if group.model is model]:
            slots = group.arena.all_used()
            count += len(slots)
            if seconds <= 0:
                self._end(group, slots, SessionUnloaded)
                continue
            slots = slots[group.ends_at[slots] > now + seconds]
            group.ends_at[slots] = now + seconds
            group.unloaded[slots] = True
            group.expiry.put(slots, group.ends_at[slots])
        return count

    def follow(self, session: Session, slots: Array) -> None:
        """Has sessions in N slots end with their model when a session of the same group does."""
        group = session.group
        if group.unloaded[session.slot]:
            group.unloaded[slots] = True
            group.ends_at[slots] = group.ends_at[session.slot]
            group.expiry.put(slots, group.ends_at[slots])

    def evict(self, count: int, idle_seconds: float) -> int:
        """Ends sessions to make room: as many as are asked for of those that were not used for so long and for which
        nothing is queued, the ones first that were used least recently. Returns how many have ended.
        """
        groups = list(self._groups.values())
        idle = [self._idle(group, idle_seconds) for group in groups]
        which = np.repeat(np.arange(len(groups)), [len(slots) for slots in idle])  # [N], the group of each
        slots = np.concatenate([*idle, np.zeros(0, np.int64)])  # [N]
        used = [group.last_used[found] for group, found in zip(groups, idle, strict=True)]
        oldest = np.argsort(np.concatenate([*used, np.zeros(0)]), kind="stable")[:count]
        for number in np.unique(which[oldest]).tolist():
            self._end(groups[number], slots[oldest[which[oldest] == number]], SessionEvicted)
        return len(oldest)

    def overdue(self) -> bool:
        """Whether `expire` has sessions to look at."""
        now = self._clock()
        return any((soonest := group.expiry.soonest) is not None and soonest <= now for group in self._groups.values())

    def expire(self, most: int = _LOOKED_AT) -> list[str]:
        """Ends sessions of which a lifetime has run out, not more than a second late, and returns their ids.

        Looks only at sessions that may be due: each is looked at about once per idle lifetime.

        Args:
            most: sessions looked at, at most; while there are more, `overdue` says so.
        """
        now, ended = self._clock(), list[str]()
        for group in list(self._groups.values()):
            slots = group.expiry.take(now, most)
            most -= len(slots)
            slots = slots[group.arena.used(slots)]
            if not len(slots):
                continue
            idle_since = np.where(group.tail[slots] >= 0, now, group.last_used[slots])  # [N]
            ends_at = group.ends_at[slots]  # [N]
            due = np.minimum(idle_since + group.idle_lifetime[slots], ends_at)
            group.expiry.put(slots[due > now], due[due > now])
            unloaded = group.unloaded[slots]  # [N]
            for over, why in (
                ((ends_at <= now) & ~unloaded, SessionAged),
                ((ends_at <= now) & unloaded, SessionUnloaded),
                ((due <= now) & (ends_at > now), SessionExpired),
            ):
                if over.any():
                    ended += [group.ids[slot] for slot in slots[over].tolist()]
                    self._end(group, slots[over], why)
        return ended

    def age(self, group: Group, slots: Array, age: Array) -> None:
        """Makes sessions in N slots so many seconds older: float64 [N]."""
        group.ends_at[slots] -= age
        idle_until = group.last_used[slots] + group.idle_lifetime[slots]  # it may have been idle elsewhere
        group.expiry.put(slots, np.minimum(group.ends_at[slots], idle_until))

    def resting(self, group: Group, idle_seconds: float) -> Array:
        """The slots of a group's stored sessions that were not used for so long and for which nothing is queued:
        int64 [N].
        """
        slots = self._idle(group, idle_seconds)
        return slots[group.epoch[slots] > 0]

    def _idle(self, group: Group, idle_seconds: float) -> Array:
        """The slots of a group's sessions that were not used for so long and for which nothing is queued: int64 [N]."""
        slots = group.arena.all_used()
        idle: Array = (group.last_used[slots] <= self._clock() - idle_seconds) & (group.tail[slots] < 0)
        return slots[idle]

    def _until_next_expiry(self) -> float:
        times = [soonest for group in self._groups.values() if (soonest := group.expiry.soonest) is not None]
        soonest = min(times) - self._clock() if times else 1.0
        return min(max(soonest, 0.1), 30.0)
