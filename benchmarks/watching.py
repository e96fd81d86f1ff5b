"""What it costs to watch: microseconds that metrics, the log of slow ticks and traces add to a tick.

    python -m benchmarks.watching

A worker in this process steps 64 sessions of a small model, one frame a tick, and its observer is exchanged from batch
to batch of ticks, so that all of them meet the same machine. Beside that, the observers alone, on one tick's record.
CPU time, of which a busy machine's other programs take no part; the lower quartile, because they take the caches.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from benchmarks import work
from rnnserve_models.options import LayerOptions
from rnnserve_server.blocks import Sessions
from rnnserve_server.config import Settings
from rnnserve_server.core import Core
from rnnserve_server.intake import Frame
from rnnserve_server.metrics import Metrics
from rnnserve_server.observer import Observer, Observers, SlowTicks, Ticked
from rnnserve_server.repository import Repository
from rnnserve_server.tracing import Tracing
from rnnserve_server.worker import Worker

LANES, TICKS, ROUNDS = 64, 100, 61
_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Sink:
    """Takes answers, and says when one is there."""

    def __init__(self) -> None:
        self.cancelled = False
        self.deadline = None
        self.done = asyncio.Event()

    def session_id(self, tag: int) -> str:
        return ""

    def result(self, answers: object) -> None:
        self.done.set()

    def failed(self, failures: object) -> None:
        raise RuntimeError(failures)

    def flush(self) -> None:
        pass


class Nowhere(SpanExporter):
    """Takes spans."""

    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


class Keeps:
    """Keeps the last tick's record."""

    tick: Ticked | None = None

    def ticked(self, tick: Ticked) -> None:
        self.tick = tick


async def main() -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Nowhere()))
    tracing = Tracing(provider)
    metrics, slow, keeps = Metrics(dict), SlowTicks(10.0, time.monotonic), Keeps()
    kinds: dict[str, Observer | None] = {
        "nobody": None,
        "metrics": Observers([metrics]),
        "metrics and the log of slow ticks": Observers([metrics, slow]),
        "metrics, the log and traces, of a frame that is traced": Observers([metrics, slow, tracing]),
    }
    with tempfile.TemporaryDirectory() as folder:
        work.write_model(Path(folder))
        core = Core(Settings(models=Path(folder), inline_seconds=1.0), Repository.load(Path(folder)))
        model = core.repository.get(work.MODEL)
        group, slots, _ = core.sessions.create_many(
            model, 1, LayerOptions(stateful=True), LANES, initial_states=None, idle_lifetime=1e6
        )
        x, sink, tags = work.numbers(LANES, 1, 1, work.FEATURES), Sink(), np.arange(LANES)
        worker = core.worker(model)

        async def ticks(observer: Observer | None, *, traced: bool) -> float:
            _watch(worker, observer)
            start = time.process_time()
            for _ in range(TICKS):
                sink.done.clear()
                trace = tracing.received(_PARENT) if traced else None
                sessions = Sessions(group, slots, group.generation[slots], None, group.ended, True)
                core.submit_frame(Frame(sink, tags, sessions, {"input": x}, None, trace))
                await sink.done.wait()
            return (time.process_time() - start) / TICKS * 1e6

        taken: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(ROUNDS):
            for name, observer in kinds.items():
                taken[name].append(await ticks(observer, traced="traced" in name))
        print(f"a tick of {LANES} sessions of an LSTM of {work.UNITS} units, watched by")
        base = taken["nobody"][1:]
        for name, times in taken.items():
            print(f"  {name:56} {_lower(times[1:]):7.1f} us  {_lower(times[1:]) - _lower(base):+6.1f} us")
        print("an observer alone")
        for traced in (False, True):
            await ticks(keeps, traced=traced)
            assert keeps.tick is not None
            for name, observer in (("metrics", metrics), ("the log of slow ticks", slow), ("traces", tracing)):
                print(f"  {name + ', a frame that is traced' * traced:56} {_alone(observer, keeps.tick):7.2f} us")
        await core.close()


def _watch(worker: Worker, observer: Observer | None) -> None:
    worker._observer = observer
    worker._watched = None


def _alone(observer: Observer, tick: Ticked) -> float:
    times = []
    for _ in range(21):
        start = time.process_time()
        for _ in range(1000):
            observer.ticked(tick)
        times.append((time.process_time() - start) * 1e3)
    return _lower(times)


def _lower(times: list[float]) -> float:
    return statistics.quantiles(times, n=4)[0]


if __name__ == "__main__":
    asyncio.run(main())
