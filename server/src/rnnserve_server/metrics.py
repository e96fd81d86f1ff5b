"""What Prometheus is told, and the HTTP server that tells it.

Nothing is counted twice: what the house counts anyway is read when somebody asks, on the event loop's thread, where it
is written. What only a tick knows is tallied by `Metrics.ticked`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

import numpy as np
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from rnnserve_models.load import LoadedModel
from rnnserve_server.errors import (
    ServiceError,
    SessionAged,
    SessionAway,
    SessionClosed,
    SessionExpired,
    SessionTakenOver,
)
from rnnserve_server.observer import Ticked
from rnnserve_server.store.base import StoreError
from rnnserve_server.tally import ROWS, SECONDS, Tally

if TYPE_CHECKING:
    from rnnserve_server.core import Core

_SCRAPE_SECONDS = 10.0  # a loop that does not answer for so long is stuck, and the scrape shall fail
_COUNT_SECONDS = 10.0  # how old the number of stored sessions may be: to count them takes the store time

_Labels = tuple[str, ...]
_Values = Mapping[Any, float]  # by the values of the labels
_MODEL: _Labels = ("model", "version")


class _Work:
    """What the ticks of one model did."""

    __slots__ = ("chunks", "engine", "queue", "rows", "steps", "tick")

    def __init__(self) -> None:
        self.tick, self.queue, self.engine, self.rows = Tally(SECONDS), Tally(SECONDS), Tally(SECONDS), Tally(ROWS)
        self.chunks = 0
        self.steps = 0


class Metrics(Collector):
    """An observer of ticks, and what a registry collects.

    Args:
        rejections: tells how often each reason was told.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        rejections: Callable[[], dict[str, int]],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._rejections = rejections
        self._clock = clock
        self._wall_clock = wall_clock
        self._work: dict[tuple[str, str], _Work] = {}
        self._core: Core | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stored: tuple[float, dict[str, int]] | None = None

    def ticked(self, tick: Ticked) -> None:
        """See `Observer`."""
        model = tick.model
        work = self._work.get((model.name, model.version)) or self._known(model)
        trace_id, at = "", 0.0
        rows = 0
        for block in tick.blocks:
            rows += block.rows
            if block.traces and not trace_id:
                trace_id, at = block.traces[0].trace_id, self._wall_clock()
        work.tick.add(tick.ended_at - tick.began_at, trace_id, at)
        if tick.queued_at is not None:
            work.queue.add(max(0.0, tick.began_at - tick.queued_at), trace_id, at)
        if tick.ran_at is not None and tick.run_at is not None:
            work.engine.add(tick.ran_at - tick.run_at, trace_id, at)
            work.rows.add(rows, trace_id, at)
        for block in tick.finished:
            chunks = len(block.tags)
            work.chunks += chunks * block.rounds
            work.steps += chunks * block.call.timesteps

    def _known(self, model: LoadedModel) -> _Work:
        return self._work.setdefault((model.name, model.version), _Work())

    def attach(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        """From now on, collects what a server knows, whose event loop that is."""
        self._core, self._loop = core, loop

    def collect(self) -> Iterable[Metric]:
        """Everything there is to tell, for a registry. Not on the event loop's thread.

        Raises:
            TimeoutError: the event loop does not answer.
        """
        if self._core is None or self._loop is None or self._loop.is_closed():
            return []
        return asyncio.run_coroutine_threadsafe(self._families(self._core), self._loop).result(_SCRAPE_SECONDS)

    async def _families(self, core: Core) -> list[Metric]:
        stored = await self._count_stored(core)
        for model in core.repository:
            self._known(model)  # from 0, so that its first step shows as a rise
        return [
            *self._ticks(),
            *self._queues(core),
            *_sessions(core),
            *_stores(core, stored),
            *self._server(core),
        ]

    def _ticks(self) -> Iterator[Metric]:
        for name, text, tallies in (
            (
                "rnnserve_tick_seconds",
                "Seconds from taking chunks out of the queue to sending their answers",
                {key: work.tick for key, work in self._work.items()},
            ),
            (
                "rnnserve_queue_seconds",
                "Seconds that the oldest chunk of a tick had waited for it",
                {key: work.queue for key, work in self._work.items()},
            ),
            (
                "rnnserve_engine_seconds",
                "Seconds that the engine took for a tick, the way to its thread and back included",
                {key: work.engine for key, work in self._work.items()},
            ),
            (
                "rnnserve_tick_rows",
                "Rows that the engine computed at once in a tick",
                {key: work.rows for key, work in self._work.items()},
            ),
        ):
            yield _histogram(name, text, _MODEL, tallies)
        chunks = {key: work.chunks for key, work in self._work.items()}
        steps = {key: work.steps for key, work in self._work.items()}
        yield _counter("rnnserve_chunks", "Chunks and calls that were computed and answered", _MODEL, chunks)
        yield _counter("rnnserve_steps", "Time steps of the chunks that were computed and answered", _MODEL, steps)

    def _queues(self, core: Core) -> Iterator[Metric]:
        waiting: dict[_Labels, float] = dict.fromkeys(self._work, 0)
        nbytes, replayed = dict(waiting), dict(waiting)
        for worker in core.workers:
            key = worker.model.name, worker.model.version
            waiting[key] = waiting.get(key, 0) + len(worker)
            nbytes[key] = nbytes.get(key, 0) + worker.queued_bytes
            replayed[key] = replayed.get(key, 0) + worker.replayed
        yield _gauge("rnnserve_queue_frames", "Frames, blocks and calls that wait or run", _MODEL, waiting)
        yield _gauge("rnnserve_queue_bytes", "Bytes of input that wait or run", _MODEL, nbytes)
        text = "Chunks that were sent again and answered as they were answered before"
        yield _counter("rnnserve_replays", text, _MODEL, replayed)

    async def _count_stored(self, core: Core) -> dict[str, int]:
        """Sessions in the store, by model; empty if there is no store or it does not answer."""
        if core.keeper is None:
            return {}
        if self._stored is None or self._clock() - self._stored[0] > _COUNT_SECONDS:
            models = sorted({model.name for model in core.repository})
            try:
                counts = await core.keeper.store.count(models)
            except StoreError:
                return {}
            self._stored = self._clock(), dict(zip(models, counts, strict=True))
        return self._stored[1]

    def _server(self, core: Core) -> Iterator[Metric]:
        reasons: dict[_Labels, float] = {(reason,): 0 for reason in sorted(_reasons(ServiceError))}
        reasons |= {(reason,): count for reason, count in self._rejections().items()}
        text = "Answers that were errors: calls, and chunks, opens and closes on lanes, by the reason in ErrorInfo"
        yield _counter("rnnserve_rejections", text, ("reason",), reasons)
        yield _gauge("rnnserve_streams", "Open streams", (), {(): core.streams})
        yield _counter("rnnserve_streams_opened", "Streams that were opened", (), {(): core.streamed})
        models = {(model.name, model.version, model.engine.name): 1 for model in core.repository}
        text = "Models that are served; always 1"
        yield _gauge("rnnserve_model_info", text, (*_MODEL, "engine"), models)
        text = "Whether the server is shutting down"
        yield _gauge("rnnserve_draining", text, (), {(): int(core.draining.is_set())})
        yield _gauge("rnnserve_info", "The release; always 1", ("version",), {(version("rnnserve-server"),): 1})


def _sessions(core: Core) -> Iterator[Metric]:
    table = core.sessions
    live, states, replies = dict[_Labels, float](), dict[_Labels, float](), dict[_Labels, float]()
    for model in core.repository:
        for state in ("busy", "idle"):
            live[model.name, model.version, state] = 0
        states[model.name, model.version] = replies[model.name, model.version] = 0
    for group in table.groups():
        key = group.model.name, group.model.version
        busy = int(np.count_nonzero(group.tail[group.arena.all_used()] >= 0))
        for state, count in (("busy", busy), ("idle", group.live - busy)):
            live[*key, state] = live.get((*key, state), 0) + count
        states[key] = states.get(key, 0) + group.live * group.arena.session_bytes
        replies[key] = replies.get(key, 0) + group.window.nbytes
    text = "Sessions in memory: busy ones, whose chunks wait or run, and idle ones"
    yield _gauge("rnnserve_sessions", text, (*_MODEL, "state"), live)
    yield _gauge("rnnserve_state_bytes", "Bytes of the states of the sessions in memory", _MODEL, states)
    text = "Bytes that are kept to answer chunks again that are sent again"
    yield _gauge("rnnserve_replay_bytes", text, _MODEL, replies)
    text = "Rounds of answers that were forgotten early because all of them took more than --max-replay-bytes"
    yield _counter("rnnserve_replay_drops", text, (), {(): table.dropped})
    nothing: dict[Any, int] = dict.fromkeys(states, 0)
    created = {key: count - table.fetched[key] for key, count in table.entered.items()}
    text = "Sessions that were made: created, forked or imported"
    yield _counter("rnnserve_sessions_created", text, _MODEL, nothing | created)
    text = "Lanes that were opened on a session that there was, by its id: clients that came back"
    yield _counter("rnnserve_sessions_resumed", text, _MODEL, nothing | table.resumed)
    text = "Sessions that came from the store into memory, taken over from another server or back from rest"
    yield _counter("rnnserve_sessions_fetched", text, _MODEL, nothing | table.fetched)
    text = "Sessions that left memory for the store, because nobody used them or others needed the room"
    yield _counter("rnnserve_sessions_rested", text, _MODEL, nothing | table.rested)
    ends: dict[_Labels, float] = {(*key, _why(each)): 0 for key in states for each in _ENDS}
    ends |= {(model, release, _why(why)): count for (model, release, why), count in table.ends.items()}
    text = (
        "Sessions that ended in memory: closed by their clients, expired (idle too long), aged (at the end of their "
        "lifetime), taken_over (by another server), store_down (to be fetched again, once the store answers)"
    )
    yield _counter("rnnserve_sessions_ended", text, (*_MODEL, "reason"), ends)


_ENDS = SessionClosed, SessionExpired, SessionAged, SessionTakenOver, SessionAway


def _why(end: type[ServiceError]) -> str:
    return end.reason.lower().removeprefix("session_")


def _stores(core: Core, stored: dict[str, int]) -> Iterator[Metric]:
    store = core.observed_store
    name = "" if store is None else store.name
    text = "Sessions in the store: those of all servers that share it, resting ones included"
    counts: dict[_Labels, float] = {(name, model): count for model, count in stored.items()}
    yield _gauge("rnnserve_store_sessions", text, ("store", "model"), counts)
    labels = ("store", "operation")
    tallies = {} if store is None else {(name, operation): tally for operation, tally in store.seconds.items()}
    yield _histogram("rnnserve_store_seconds", "Seconds that the store took for a call", labels, tallies)
    errors: dict[_Labels, float] = dict.fromkeys(tallies, 0)
    if store is not None:
        errors |= {(name, operation): count for operation, count in store.errors.items()}
    yield _counter("rnnserve_store_errors", "Calls to the store that failed", labels, errors)


def _counter(name: str, text: str, labels: _Labels, values: _Values) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _gauge(name: str, text: str, labels: _Labels, values: _Values) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(name: str, text: str, labels: _Labels, tallies: Mapping[Any, Tally]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, tally in tallies.items():
        buckets: list[Any] = []
        total = 0
        for bucket, count in enumerate(tally.counts):
            total += count
            bound = tally.bounds[bucket] if bucket < len(tally.bounds) else None
            example = tally.examples.get(bucket)
            exemplar = example and Exemplar({"trace_id": example.trace_id}, example.value, example.at)
            buckets.append(("+Inf" if bound is None else repr(float(bound)), total, exemplar))
        family.add_metric(key, buckets, tally.sum)
    return family


def _subclasses(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _reasons(kind: type[ServiceError]) -> set[str]:
    """Every reason that there is: each is counted from the start, so that a first rejection shows as a rise."""
    return {reason for each in _subclasses(kind) if (reason := getattr(each, "reason", ""))}


class MetricsServer:
    """Answers GET /metrics, in Prometheus's text format or OpenMetrics, on threads of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Listens.

        Raises:
            OSError: the address cannot be listened on.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(metrics)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self.registry = registry
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise OSError(f"metrics: cannot listen on {host}:{port}: {error}") from error
        self.port = self._server.server_port

    def close(self) -> None:
        """Stops. Not on the event loop's thread: an answer that is under way may need it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
