"""What a stream's client should know of its sessions although it did not ask: that they are about to end, or have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_server.api.lanes import Lanes
from rnnserve_server.core import Core
from rnnserve_server.errors import (
    SessionAged,
    SessionClosed,
    SessionError,
    SessionEvicted,
    SessionExpired,
    SessionTakenOver,
    SessionUnloaded,
    StoreDown,
)
from rnnserve_server.sessions import Group
from rnnserve_server.store.base import Head

_SHARE, _LEAST, _MOST = 0.1, 2.0, 60.0  # of a lifetime, and seconds: how long before its end it is told
_AGAIN = 1.0  # seconds, when the store did not answer


class Reason(Enum):
    """Why a session ends; see NoticeReason."""

    EXPIRED = "expired"
    AGED = "aged"
    CLOSED = "closed"
    TAKEN_OVER = "taken over"
    EVICTED = "evicted"
    MODEL_UNLOADED = "model unloaded"


_REASONS: dict[type[SessionError], Reason] = {
    SessionExpired: Reason.EXPIRED,
    SessionAged: Reason.AGED,
    SessionClosed: Reason.CLOSED,
    SessionTakenOver: Reason.TAKEN_OVER,
    SessionEvicted: Reason.EVICTED,
    SessionUnloaded: Reason.MODEL_UNLOADED,
}


@dataclass(slots=True)
class Notice:
    """The same for several lanes.

    Attributes:
        reason: why their sessions end.
        ended: whether they have.
        lanes: which.
        left: how many seconds the first of them still lives; None for unknown.
    """

    reason: Reason
    ended: bool
    lanes: list[int]
    left: float | None = None


_Found = dict[tuple[Reason, bool], Notice]


class _Seen(NamedTuple):
    """What was found of a group when it was last looked at; until one of these changes, there is nothing to tell."""

    group: Group
    ended: int
    served: bool
    until: float


class LaneWatch:
    """Finds out what a stream has to be told.

    Using a session only moves its end away, so a group of which no session has ended is not looked at again before the
    first of its sessions can have come near to its end: that costs nothing, however many lanes there are.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._seen: dict[int, _Seen] = {}
        self._look_at = np.zeros(0)  # [capacity], there is nothing to tell before of a session at rest on that lane
        self._told: dict[int, dict[tuple[Reason, bool], float]] = {}  # by lane, for which end

    def opened(self, lanes: Sequence[int]) -> None:
        """There are other sessions on some lanes now."""
        self._seen.clear()
        inside = [lane for lane in lanes if lane < len(self._look_at)]
        self._look_at[inside] = 0.0
        if self._told:
            for lane in lanes:
                self._told.pop(lane, None)

    async def look(self, lanes: Lanes) -> list[Notice]:
        """What there is to tell."""
        now = self._core.clock()
        found: _Found = {}
        if len(self._look_at) < len(lanes.group):
            self._look_at = np.pad(self._look_at, (0, len(lanes.group) - len(self._look_at)))
        away: list[int] = []
        for number, group in lanes.groups.items():
            served = group.model in self._core.repository
            seen = self._seen.get(number)
            if (
                seen is not None
                and (seen.group, seen.ended, seen.served) == (group, group.ended, served)
                and now < seen.until
            ):
                continue
            mine = np.flatnonzero(lanes.group == number)
            here = group.generation[lanes.slot[mine]] == lanes.generation[mine]
            until = self._live(found, group, served, mine[here], lanes.slot[mine[here]], now)
            for lane in mine[~here].tolist():
                if (reason := _REASONS.get(self._core.sessions.why_ended(lanes.ids[lane]))) is not None:
                    self._tell(found, lane, reason, ended=True)
                elif self._core.keeper is not None:  # it is at rest, and somebody else may use it
                    if self._look_at[lane] <= now:
                        away.append(lane)
                    else:
                        until = min(until, float(self._look_at[lane]))
            self._seen[number] = _Seen(group, group.ended, served, until)
        if away:
            await self._away(found, lanes, away, now)
        return list(found.values())

    def _live(self, found: _Found, group: Group, served: bool, lanes: Array, slots: Array, now: float) -> float:
        """Looks at sessions in memory, on N lanes and in N slots: when to look again."""
        if not len(lanes):
            return np.inf
        used = np.where(group.tail[slots] >= 0, now, group.last_used[slots])  # [N]
        idle, lifetime = group.idle_lifetime[slots], group.lifetime[slots]
        ends_at, unloaded = group.ends_at[slots], group.unloaded[slots]
        expires_at = np.where(used + idle < ends_at, used + idle, np.inf)
        coming = [
            (Reason.EXPIRED, expires_at, expires_at - _margin(idle), idle - _margin(idle)),
            (Reason.AGED, np.where(unloaded, np.inf, ends_at), ends_at - _margin(lifetime), lifetime),
            (Reason.MODEL_UNLOADED, np.where(unloaded, ends_at, np.inf), np.full(len(lanes), now), lifetime),
        ]
        if (evicted := self._core.settings.evict_idle_seconds) and self._core.keeper is None:
            early = evicted - _margin(np.array(evicted))
            coming.append((Reason.EVICTED, used + evicted, used + early, np.full(len(lanes), early)))
        self._look_at[lanes] = np.minimum(coming[0][2], coming[1][2])
        until = np.inf
        for reason, due, from_then, again in coming:
            finite = np.isfinite(due)
            near = finite & (from_then <= now)
            # A session that is used after it was told is not told again before so many seconds have passed.
            until = min(until, from_then[finite & ~near].min(initial=np.inf), now + again[near].min(initial=np.inf))
            for lane, end in zip(lanes[near].tolist(), due[near].tolist(), strict=True):
                self._tell(found, lane, reason, end=end, left=max(0.0, end - now))
        if not served:
            for lane in lanes[~unloaded].tolist():
                self._tell(found, lane, Reason.MODEL_UNLOADED)
        return float(until)

    async def _away(self, found: _Found, lanes: Lanes, away: Sequence[int], now: float) -> None:
        """Looks at sessions that are in the store and not in memory."""
        assert self._core.keeper is not None
        ids = [lanes.ids[lane] for lane in away]
        numbers = lanes.group[list(away)].tolist()
        distinct = list(dict.fromkeys(ids))
        try:
            ends = dict(zip(distinct, await self._core.keeper.ends(distinct), strict=True))
        except StoreDown:
            ends = {}
        for lane, number, session_id in zip(away, numbers, ids, strict=True):
            if lanes.ids[lane] != session_id:  # it was closed meanwhile
                continue
            look_at, end = np.inf, ends.get(session_id)
            if not ends:  # the store did not answer
                look_at = now + _AGAIN
            elif isinstance(end, Head):
                left = end.expires_at - self._core.wall_clock()
                reason, lifetime = Reason.EXPIRED, end.meta.idle_lifetime
                if end.meta.lifetime is not None and end.meta.ends_at <= end.expires_at:
                    reason, lifetime = Reason.AGED, end.meta.lifetime
                early = left - float(_margin(np.array(lifetime)))
                if early <= 0:
                    self._tell(found, lane, reason, end=end.expires_at, left=max(0.0, left))
                look_at = now + (early if early > 0 else max(left, _AGAIN))
            elif end in _REASONS:
                self._tell(found, lane, _REASONS[end], ended=True)
            self._look_at[lane] = look_at
            if number in self._seen:
                self._seen[number] = self._seen[number]._replace(until=min(self._seen[number].until, look_at))

    def _tell(
        self,
        found: _Found,
        lane: int,
        reason: Reason,
        *,
        ended: bool = False,
        end: float = np.inf,
        left: float | None = None,
    ) -> None:
        """Tells a lane of an end, unless it was told of that very one."""
        told = self._told.setdefault(lane, {})
        if told.get((reason, ended)) == end:
            return
        told[reason, ended] = end
        notice = found.setdefault((reason, ended), Notice(reason, ended, [], left))
        notice.lanes.append(lane)
        if left is not None:
            notice.left = left if notice.left is None else min(notice.left, left)


def _margin(lifetime: Array) -> Array:
    """How long before the end of a lifetime it is told: both in seconds."""
    return np.minimum(np.clip(lifetime * _SHARE, _LEAST, _MOST), lifetime / 2)
