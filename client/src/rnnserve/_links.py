"""All the links of a client: which replica has which session, and where sessions go when it does not answer.

A session belongs where rendezvous hashing of its id puts it, among the replicas that answer. So every client that knows
the same replicas looks for it at the same one, and a replica that goes or comes concerns its share of the sessions
only. That is for speed: whoever has a session, another replica with the same store can take it over at any time.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from rnnserve._chunks import Chunk, Lane
from rnnserve._lanes import Account
from rnnserve._link import LOG, Link
from rnnserve._notices import OnNotice
from rnnserve._rendezvous import choose
from rnnserve._resolve import Replica
from rnnserve._retry import Retry
from rnnserve._tickets import deliver
from rnnserve.errors import ClientClosed, RequestError, RnnserveError
from rnnserve.v1 import session_pb2

#: Bytes of unanswered chunks that a client keeps for sending them again.
REPLAY_BYTES = 64 << 20

#: The metadata by which a proxy routes a stream or a call: the same replica for the same value, while it answers.
SESSION_KEY = "x-session-id"

#: Seconds in which a server whose stream broke must take a connection, else its sessions go elsewhere.
_REACHED_WITHIN = 1.0

#: Seconds between questions to a replica that does not answer, at most.
_PROBED_WITHIN = 0.5

#: Seconds that an answer may take before the replica is asked whether it serves.
_SILENT_AFTER = 3.0

#: Seconds between looks at lanes that are not where they belong.
_TENDED_EVERY = 1.0

#: Seconds between looks at what a server that shuts down has left.
_LEFT_EVERY = 0.01

#: Lanes that go to another server together: each is waited for by those that come behind. From a server that shuts down
#: one of so many, if that is more.
_LEAVE_TOGETHER = 16
_LEAVE_SHARE = 8

#: Seconds that those are waited for, at most.
_TAKEN_WITHIN = 1.0

_MISSES = 3  # sessions that a replica does not know, after which it is not asked for others
_IDS = 200  # tries to find one for a place
_AT_ONCE = 256  # lanes that are looked at in one turn of the event loop
_GONE = ("", "DRAINING")  # reasons that tell that there is no server any more; others come from one
#: Metadata for proxies.
Routing = tuple[tuple[str, str], ...]

_KEY = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)


class Place:
    """One replica, or one of several ways to the same target.

    Attributes:
        name: by which all clients tell it from others.
        replica: where it is.
        link: the streams to it.
        down: it did not answer, and has not since.
        gone: it is not among the replicas any more.
        shares: it was found to know a session that is at another one.
    """

    __slots__ = ("down", "gone", "link", "name", "replica", "shares")

    def __init__(self, name: str, replica: Replica, link: Link) -> None:
        self.name = name
        self.replica = replica
        self.link = link
        self.down = self.gone = self.shares = False


class Links:
    """The links of a client, one for each replica, or several to one target.

    Chunks beyond `replay_bytes` wait in line, outside the links: they are not sent, and may be taken back.

    Args:
        retry: when to try again.
        replay_bytes: see above.
        channel: the channel to a replica.
        start: starts a stream to a replica, with metadata.
        knows: asks a replica whether it knows a session.
        serves: asks a replica whether it serves; or, with metadata, whoever a proxy takes that to.
        drop: closes the channel to a replica.
        moves: whether lanes may go from one place to another.
        on_notice: is given every notice of a server, and must return at once.

    Attributes:
        closed: they were closed for good.
        account: what all of them have in common.
        loop: where they run.
    """

    def __init__(
        self,
        retry: Retry,
        replay_bytes: int,
        *,
        channel: Callable[[Replica], grpc.aio.Channel],
        start: Callable[[Replica, Routing], Any],
        knows: Callable[[Replica, str], Any],
        serves: Callable[..., Any],
        drop: Callable[[Replica], Any],
        moves: bool,
        on_notice: OnNotice | None = None,
    ) -> None:
        self.closed = False
        self._retry = retry
        self._replay_bytes = replay_bytes
        self._channel = channel
        self._start = start
        self._knows = knows
        self._serves = serves
        self._drop = drop
        self._moves = moves
        self._on_notice = on_notice
        self.account = Account()
        self._places: dict[str, Place] = {}  # those that new sessions are placed at
        self._of: dict[Link, Place] = {}  # every link, those of replicas that are gone too
        self._line: dict[Any, tuple[list[Lane], bool] | None] = {}  # chunks, and futures of those who wait behind them
        self.loop = asyncio.get_running_loop()
        self._turn = 0
        self._leaving = asyncio.Lock()  # links leave in turns: a server that takes sessions over does nothing else
        self._chores: set[asyncio.Task[None]] = set()
        self._astray: asyncio.Event = asyncio.Event()
        if moves:
            self._chores |= {self.loop.create_task(self._tend()), self.loop.create_task(self._listen())}

    # Places

    def set(self, replicas: dict[str, Replica]) -> None:
        """The replicas from now on, by name. Those that are missing keep what they have until they are lost."""
        if replicas.keys() == self._places.keys():
            return
        for name in [name for name in self._places if name not in replicas]:
            self._places.pop(name).gone = True
        back = {place.name: place for place in self._of.values()}
        for name, replica in replicas.items():
            place = back.get(name)
            if place is None:
                link = Link(replica.target, self._stream, self._retry, self, self.account, self._on_notice)
                place = self._of[link] = Place(name, replica, link)
            place.gone = False
            self._places.setdefault(name, place)
        self._prune()
        self._astray.set()

    def _prune(self) -> None:
        """Forgets replicas that are gone, and links that have a successor, once they have no lanes any more."""
        for link, place in list(self._of.items()):
            if (place.gone or place.link is not link) and not link.lanes.members:
                del self._of[link]
                self._chore(self._forget(link, place))

    async def _forget(self, link: Link, place: Place) -> None:
        await link.close()
        if place.link is link:
            await self._drop(place.replica)

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _link(self, place: Place) -> Link:
        """A new link to a place, which new sessions go to from now on."""
        link = Link(place.replica.target, self._stream, self._retry, self, self.account, self._on_notice)
        self._of[link] = place
        return link

    def place(self, session_id: str) -> Place:
        """Where a session belongs now."""
        if len(self._places) == 1:
            return next(iter(self._places.values()))
        up = [name for name, place in self._places.items() if not place.down]
        return self._places[choose(up or self._places, session_id)]

    def any(self) -> Place:
        """A place for a call that is of no session: each in its turn."""
        if len(self._places) == 1:
            return next(iter(self._places.values()))
        places = list(self._places.values())
        self._turn += 1
        up = [place for place in places if not place.down] or places
        return up[self._turn % len(up)]

    def holding(self, lane: Lane) -> Place:
        """The place that has a lane now, or where it would belong if it is closed."""
        found = next((place for link, place in self._of.items() if link.lanes is lane.holder), None)
        return found or self.place(_session_id(lane))

    def all(self) -> list[Place]:
        """The replicas."""
        return list(self._places.values())

    @staticmethod
    def routing(place: Place, session_id: str) -> Routing:
        """What a call for a session says, so that it comes where the session's stream goes."""
        key = place.link.key or session_id
        return ((SESSION_KEY, key),) if _KEY.fullmatch(key) else ()

    def failed(self, place: Place, failure: RequestError) -> bool:
        """A call to a place was not answered: whether there are others to ask at once."""
        if not self._moves or failure.reason not in _GONE:
            return False
        self._lose(place)
        return any(not other.down for other in self._places.values())

    @property
    def trouble(self) -> str | None:
        """Why there is no stream now although there should be; None while all have theirs, or need none."""
        return next((link.trouble for link in self._of if link.trouble), None)

    # Lanes

    async def open(self, target: session_pb2.SessionConfig | str) -> tuple[Lane, session_pb2.Session]:
        """Opens a lane where it belongs, for a new session, or for a live one by its id."""
        return await self.place(target if isinstance(target, str) else target.session_id).link.open(target)

    def neighbour(self, lane: Lane) -> str:
        """An id for a new session that belongs where a lane is now."""
        place = self.holding(lane)
        made = uuid.uuid4().hex
        for _ in range(_IDS):  # in vain if the place is gone
            if self.place(made) is place:
                break
            made = uuid.uuid4().hex
        return made

    async def close_lane(self, lane: Lane, delete_session: bool) -> None:
        """Closes a lane behind its chunks, and ends its session too if asked."""
        if self.closed:
            raise ClientClosed("the client is closed")
        ticket: asyncio.Future[None] = self.loop.create_future()
        if lane.holder.close(lane, delete_session, ticket):
            lane.holder.woken()
            await ticket

    async def settled(self, lane: Lane) -> None:
        """Waits until every chunk sent on the lane so far is answered."""
        ticket: asyncio.Future[None] = self.loop.create_future()
        if lane.holder.barrier(lane, ticket):
            lane.holder.woken()
            await ticket

    # Chunks

    @property
    def full(self) -> bool:
        """Whether chunks have to wait in line."""
        return bool(self._line) or self.account.held >= self._replay_bytes

    def step(self, lanes: list[Lane], chunk: Chunk, together: bool) -> None:
        """Sends a chunk on one lane, or on several together; the answer goes to its ticket."""
        if self._line or self.account.held >= self._replay_bytes:
            self._line[chunk] = lanes, together
            return
        if together:
            lanes[0].holder.step_all(lanes, chunk)
        else:
            lanes[0].holder.step(lanes[0], chunk)

    def withdraw(self, chunk: Chunk) -> bool:
        """Takes back a chunk that waits in line. False: it does not, and keeps its place in its session."""
        return self._line.pop(chunk, self) is not self

    async def admitted(self) -> None:
        """Waits until nothing that was asked for before waits in line."""
        if self._line:
            ticket = self.loop.create_future()
            self._line[ticket] = None
            await ticket

    def admit(self) -> None:
        """Sends what waits in line, as far as there is room."""
        while self._line and self.account.held < self._replay_bytes:
            waiting = next(iter(self._line))
            entry = self._line.pop(waiting)
            if entry is None:
                deliver(waiting, None)
            elif not waiting.ticket.done():
                lanes, together = entry
                if together:
                    lanes[0].holder.step_all(lanes, waiting)
                else:
                    lanes[0].holder.step(lanes[0], waiting)

    def tell(self, link: Link, error: Callable[[], RnnserveError]) -> None:
        """Fails the chunks in line that are for a link, and whoever waits for the line."""
        for waiting, entry in list(self._line.items()):
            if entry is None or any(lane.holder is link.lanes for lane in entry[0]):
                del self._line[waiting]
                deliver(waiting.ticket if isinstance(waiting, Chunk) else waiting, None, error())

    # Replicas that go and come

    def heard(self, link: Link) -> None:
        """There is a server at the other end of a link."""
        place = self._of.get(link)  # not if it was forgotten meanwhile
        if place is not None and place.down:
            place.down = False
            self._astray.set()

    async def move(self, link: Link, failure: RequestError) -> bool:
        """Takes the lanes of a link that lost its stream to other replicas, if there are any that answer.

        Not if only its connection broke: the server takes another at once, and has the sessions in its memory.
        """
        place = self._of.get(link)
        if place is not None and place.link is not link:
            self._adopt(place, link.lanes.part())
            self._prune()
            return True
        if place is None or not self._moves or failure.reason not in _GONE:
            return False
        if not failure.reason and link.served and not link.silent and await self._reached(place):
            return False
        self._lose(place)
        await self._find_others(place)
        if not self._others:
            return False
        lanes = link.lanes.part()
        if lanes:
            LOG.warning("%s: %s; its %d sessions go to other replicas", place.name, failure, len(lanes))
        homes: dict[Place, list[Lane]] = {}
        for lane in lanes:
            homes.setdefault(self.place(_session_id(lane)), []).append(lane)
        for home, some in homes.items():
            self._adopt(home, some)
        return True

    def _adopt(self, place: Place, lanes: list[Lane], *, held: bool = False) -> None:
        if lanes:
            place.link.key = place.link.key or _session_id(lanes[0])
            place.link.lanes.adopt(lanes, held=held)

    def _hand_over(self, lane: Lane, place: Place) -> bool:
        """Takes a lane to another place, if nothing is wished on it. It is opened there when it is closed here, for
        then the store has all of it.
        """

        def go_on(closed: asyncio.Future[None]) -> None:
            closed.exception()  # whatever became of it, nothing more can come of it
            lane.holder.open_held(lane)

        ticket, was_open = self.loop.create_future(), lane.open
        if not lane.holder.let_go(lane, ticket):
            return False
        self._adopt(place, [lane], held=was_open)
        ticket.add_done_callback(go_on)
        return True

    def leave(self, link: Link) -> None:
        """The server at the other end of a link shuts down, and still answers: its lanes go elsewhere meanwhile."""
        place = self._of.get(link)
        if place is not None and place.link is link and not self.closed:
            self._chore(self._leave(link, place))

    async def _leave(self, link: Link, place: Place) -> None:
        if self._moves:
            self._lose(place)
            await self._find_others(place)
            if not self._others:
                return
        else:
            while not await self._serves(place.replica, self.routing(place, "")):  # a proxy does not know of others yet
                await self._retry.sleep(_LEFT_EVERY)
                if not link.live:
                    return
            if place.link is link:
                key, place.link = link.key, self._link(place)
                place.link.key = key
        while link.live and (lanes := link.lanes.members):
            going = [lane for lane in lanes if link.lanes.may_go(lane)]
            going = going[: max(_LEAVE_TOGETHER, len(lanes) // _LEAVE_SHARE)]
            async with self._leaving:
                for lane in going:
                    home = self.place(_session_id(lane)) if self._moves else place
                    # Or the replica is back, and takes what is left when this stream ends.
                    if lane.holder is link.lanes and home.link is not link:
                        self._hand_over(lane, home)
                await self._taken_over(going)
        self._prune()

    async def _taken_over(self, lanes: list[Lane]) -> None:
        """Waits until lanes that were handed over are open, but for no longer than a server that is well takes."""
        end = self._retry.clock() + _TAKEN_WITHIN
        await self._retry.sleep(_LEFT_EVERY)
        while any(lane.opening for lane in lanes) and self._retry.clock() < end:
            await self._retry.sleep(_LEFT_EVERY)

    @property
    def _others(self) -> bool:
        """Whether a replica answers."""
        return any(not place.down for place in self._places.values())

    async def _find_others(self, lost: Place) -> None:
        """If no replica answers as far as is known, asks all but the one that was lost."""
        if not self._others:
            await asyncio.gather(*[self._ask(place) for place in self._places.values() if place is not lost])

    def _lose(self, place: Place) -> None:
        if not place.down:
            place.down = True
            self._chore(self._probe(place))

    async def _reached(self, place: Place) -> bool:
        """Whether a server takes connections: gRPC's own doing, so that a server that is busy does too."""
        channel = self._channel(place.replica)
        state = channel.get_state(try_to_connect=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(_REACHED_WITHIN):
                while state not in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        return state is grpc.ChannelConnectivity.READY

    async def _probe(self, place: Place) -> None:
        """Asks a replica that did not answer again and again, until it serves."""
        trial = replace(self._retry, limit=None, longest=_PROBED_WITHIN).begin()
        while place.down and not place.gone:
            await self._retry.sleep(max(self._retry.first, trial.next() or 0.0))
            await self._ask(place)

    async def _ask(self, place: Place) -> None:
        if place.down and await self._serves(place.replica):
            self.heard(place.link)

    async def _listen(self) -> None:
        """Gives up streams whose replicas hang, or have vanished without a word."""
        while True:
            await self._retry.sleep(_SILENT_AFTER / 3)
            now = self._retry.clock()
            late = [
                place
                for place in self._of.values()
                if now - place.link.heard_at > _SILENT_AFTER and place.link.lanes.waiting
            ]
            await asyncio.gather(*[self._wonder(place) for place in late])

    async def _wonder(self, place: Place) -> None:
        heard_at = place.link.heard_at
        if not await self._serves(place.replica) and place.link.heard_at == heard_at:
            place.link.silence(f"nothing was heard of the replica for {self._retry.clock() - heard_at:.1f} s")

    async def _tend(self) -> None:
        """Brings lanes home that are elsewhere, when nothing is wished on them."""
        while True:
            await self._astray.wait()
            await self._retry.sleep(_TENDED_EVERY)
            self._astray.clear()
            misses: Counter[Place] = Counter()
            going: list[Lane] = []
            async for lane, home in self._strays():
                if misses[home] >= _MISSES:
                    continue
                if not await self._shared(home, lane):
                    misses[home] += 1
                elif lane.holder is home.link.lanes or not self._hand_over(lane, home):
                    self._astray.set()  # it is busy
                else:
                    going.append(lane)
                    if len(going) == _LEAVE_TOGETHER:
                        await self._taken_over(going)
                        going.clear()
            self._prune()

    async def _strays(self) -> AsyncIterator[tuple[Lane, Place]]:
        for link, place in list(self._of.items()):
            for number, lane in enumerate(link.lanes.members):
                if number % _AT_ONCE == _AT_ONCE - 1:
                    await asyncio.sleep(0)
                home = self.place(_session_id(lane))
                if home is not place and not home.down and not lane.closing:
                    yield lane, home

    async def _shared(self, home: Place, lane: Lane) -> bool:
        """Whether a replica knows a session that is at another one, or would not find it."""
        if not home.shares:
            home.shares = bool(await self._knows(home.replica, _session_id(lane)))
        return home.shares

    # Streams

    def _stream(self, link: Link) -> Any:
        place = self._of[link]
        if not _KEY.fullmatch(link.key):
            link.key = uuid.uuid4().hex
        return self._start(place.replica, ((SESSION_KEY, link.key),))

    async def close(self) -> None:
        """Ends the streams; what is unanswered fails with ClientClosed."""
        self.closed = True
        tasks = list(self._chores)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *[link.close() for link in self._of], return_exceptions=True)


def _session_id(lane: Lane) -> str:
    return lane.request.session_id or lane.request.create.session_id
