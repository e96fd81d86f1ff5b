"""A run of the torture: servers, clients, and an adversary with a seed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redis_server import running_redis
from rnnserve_server.records import rules_of, unpack_states
from rnnserve_server.store import open_store
from torture.client import PATIENCE, Link, call_by_call
from torture.hands import check_seen, take_in_hand
from torture.history import Fault, check
from torture.plan import Plan, make_plans, write_models
from torture.proxy import Proxy
from torture.sdk import by_sdk, client
from torture.servers import ServerProcess
from torture.track import Track, Trial

_GRACE = 120.0  # seconds that what is under way may take when the time is up


@dataclass(frozen=True)
class Torture:
    """What a run is.

    Attributes:
        seed: of all dice.
        seconds: after so long nothing new is begun.
        kills: how often a server is ended: with SIGKILL, every fourth time with SIGTERM.
        steps: time steps that all sessions take together.
        sessions: so many.
        longest: time steps of a chunk at most.
        replicas: servers on one store; sessions hop between them if there are several.
        links: streams.
        calls: sessions that are driven by unary calls.
        sdk: sessions that are driven by the SDK, one client for all.
        abreast: sessions that go in step on one stream, in frames of as many lanes.
        shared: drivers of each session, who step it at once: each on a stream of its own, or by unary calls.
        hands: who look at sessions, fork them, and take some of them back, those that no unary calls drive.
        ahead: chunks that a session is ahead of its answers.
        cut: bytes, in the mean, after which a connection is cut; None: never.
        mischief: how likely a client does something needless or wrong.
        rest_seconds: after which idle sessions leave memory.
        fault: one of `torture.faults`, planted in the servers.
    """

    seed: int = 0
    seconds: float = 60.0
    kills: int = 10
    steps: int = 20_000
    sessions: int = 24
    longest: int = 12
    replicas: int = 1
    links: int = 4
    calls: int = 4
    sdk: int = 0
    abreast: int = 1
    shared: int = 1
    hands: int = 0
    ahead: int = 5
    cut: int | None = 300_000
    mischief: float = 0.1
    rest_seconds: float = 0.5
    fault: str = ""


@dataclass
class Report:
    """What came of it."""

    torture: Torture
    store: str
    seconds: float = 0.0
    steps: int = 0
    chunks: int = 0
    kills: int = 0
    terms: int = 0
    cuts: dict[str, int] = field(default_factory=dict)
    delays: int = 0
    longest_drain: float = 0.0
    longest_pause: float = 0.0
    patient: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def names(self) -> set[str]:
        """The names of the faults."""
        return {fault.name for fault in self.faults}

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.store}: {self.steps:,} steps in {self.chunks:,} chunks, {self.seconds:.0f} s",
            f"  seed {self.torture.seed}, {self.torture.sessions} sessions, {self.torture.replicas} server(s)",
            f"  {self.kills} x SIGKILL, {self.terms} x SIGTERM (ended after {self.longest_drain:.2f} s at most)",
            f"  connections cut amid the bytes: {', '.join(f'{n} x {how}' for how, n in sorted(self.cuts.items()))}; "
            f"held back: {self.delays} times",
            f"  longest pause of a session: {self.longest_pause:.2f} s ({self.patient})",
            *(f"  {count:>8,} {name}" for name, count in sorted(self.counts.items())),
            *(f"  FAULT {fault}" for fault in self.faults[:20]),
            f"  verdict: {f'{len(self.faults)} FAULTS' if self.faults else 'every history is the oracle’s'}",
        ]
        return "\n".join(lines)


@contextlib.contextmanager
def empty_store(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a store: of SQLite in a folder, or of a Redis of our own."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/sessions.db"
    else:
        with running_redis() as server:
            yield server.url


async def torture(what: Torture, url: str, folder: Path) -> Report:
    """Runs it, and checks every history.

    Args:
        what: the run.
        url: of the store, which is empty.
        folder: for models and logs.
    """
    engines = write_models(folder / "models")
    plans = make_plans(engines, what.seed, what.sessions, what.steps, what.longest, abreast=what.abreast)
    settings = {"models": str(folder / "models"), "store": url, "rest_seconds": what.rest_seconds, "drain_seconds": 2.0}
    servers = [ServerProcess(settings, folder / f"server{n}.log", what.fault) for n in range(what.replicas)]
    report, started = Report(what, url.partition(":")[0]), time.monotonic()
    try:
        for server in servers:
            await asyncio.to_thread(server.start)
        async with contextlib.AsyncExitStack() as stack:
            proxies = [
                await stack.enter_async_context(Proxy(server.address, random.Random(f"{what.seed}/{n}"), what.cut))
                for n, server in enumerate(servers)
            ]
            trial = Trial(
                what.seed,
                lambda: [p.address for p in proxies],
                ahead=what.ahead,
                mischief=what.mischief,
                abreast=what.abreast > 1,
                shared=what.shared > 1,
            )
            tracks = [Track(trial, plan, number // what.abreast) for number, plan in enumerate(plans)]
            await _run(what, trial, tracks, servers, proxies, report)
            report.cuts = dict(sum((proxy.cuts for proxy in proxies), Counter[str]()))
            trial.counts["connections refused"] = sum(proxy.resets for proxy in proxies)
        for server in servers:
            await _terminate(server, trial)
        for track in tracks:
            track.history.sent = track.total
        if not (what.fault and trial.faults):
            await _look(url, tracks)
        report.faults = [*trial.faults]
        report.faults += [
            Fault("error in the log", server.address, line)
            for server in servers
            for line in server.log().splitlines()
            if "[error" in line or "Traceback" in line
        ]
        broken = {fault.session for fault in trial.faults}  # what follows is wrong for the same reason
        sound = [track for track in tracks if track.plan.name not in broken]
        report.faults += check_seen(sound)
        report.faults += check([t.plan for t in sound], {t.plan.name: t.history for t in tracks})
        report.steps, report.longest_pause, report.patient = trial.steps, trial.longest, trial.patient
        report.chunks = sum(len(track.history.answers) for track in tracks)
        report.counts = dict(trial.counts)
    finally:
        for server in servers:
            server.close()
    report.seconds = time.monotonic() - started
    return report


async def _run(
    what: Torture,
    trial: Trial,
    tracks: list[Track],
    servers: list[ServerProcess],
    proxies: list[Proxy],
    report: Report,
) -> None:
    """Until every session has been answered all, or the time is up."""
    links = [Link(trial) for _ in range(what.links)]
    for link in links:
        link.others = [other for other in links if other is not link] if what.replicas > 1 else []
    called, rest = tracks[: what.calls], tracks[what.calls :]
    by_client, streamed = rest[: what.sdk], rest[what.sdk :]
    for number, track in enumerate([*called, *streamed]):
        first = max(0, number - what.calls) // what.abreast
        for other in range(what.shared - (number < what.calls)):
            links[(first + other) % len(links)].take(track)
    for track in streamed[::2] if what.hands else ():
        track.taken_back = True
    adversary = asyncio.create_task(_adversary(what, trial, servers, proxies, report))
    tasks = [asyncio.create_task(link.run()) for link in links]
    tasks += [asyncio.create_task(call_by_call(trial, track)) for track in called]
    sdk = client(trial)
    tasks += [asyncio.create_task(by_sdk(trial, track, sdk)) for track in by_client]
    # Whoever has a session looked at by another server takes it from the SDK, whose application is told that.
    at_hand = tracks if trial.alone else [*called, *streamed]
    tasks += [asyncio.create_task(take_in_hand(trial, at_hand)) for _ in range(what.hands)]
    try:
        end = time.monotonic() + what.seconds
        late = False
        while not all(track.done for track in tracks):
            if what.fault and trial.faults:
                for track in tracks:
                    track.total = track.frontier
                break  # found, which was all that was asked
            trial.moved.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(trial.moved.wait(), 0.5)
            for task in (adversary, *tasks):
                if task.done() and not task.cancelled() and task.exception():
                    task.result()
            if time.monotonic() > end + _GRACE:
                trial.faults += [Fault("stuck", t.plan.name, f"at chunk {t.frontier}") for t in tracks if not t.done]
                for track in tracks:
                    track.total = track.frontier
            elif time.monotonic() > end and not late:
                late = True
                for track in tracks:
                    track.total = track.high
        for link in links if not trial.faults else ():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.settled(), PATIENCE)
            link.kept_waiting()
    finally:
        trial.over = True
        trial.moved.set()
        await asyncio.wait([adversary])  # whatever server it is ending or starting
        for task in tasks:
            task.cancel()
        await asyncio.gather(adversary, *tasks, return_exceptions=True)
        await sdk.close()
        for server in servers:
            if not server.alive:
                await asyncio.to_thread(server.start)


async def _adversary(
    what: Torture, trial: Trial, servers: list[ServerProcess], proxies: list[Proxy], report: Report
) -> None:
    """Does harm whenever the sessions have come some way further, so that all of it falls on work."""
    chance = random.Random(f"{what.seed}/adversary")
    moments = sorted(chance.uniform(0.01, 0.97) * what.steps for _ in range(what.kills))
    for number, moment in enumerate(moments):
        while trial.steps < moment:
            trial.moved.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(trial.moved.wait(), 1.0)
            for server in servers:
                if not server.alive:  # nobody has ended it
                    why = f"status {server.exit_code}: {server.log()[-300:]}"
                    trial.faults.append(Fault("dead server", server.address, why))
                    await asyncio.to_thread(server.start)
            if trial.over:
                return
        await asyncio.sleep(chance.expovariate(200))  # somewhere within what is under way
        at = chance.randrange(len(servers))
        server, proxy = servers[at], proxies[at]
        if chance.random() < 0.2:
            report.delays += 1
            proxy.passing.clear()
            await asyncio.sleep(chance.uniform(0, 0.1))
            proxy.passing.set()
        if number % 4 == 3:
            report.terms += 1
            began = time.monotonic()
            await _terminate(server, trial)
            report.longest_drain = max(report.longest_drain, time.monotonic() - began)
        else:
            report.kills += 1
            await asyncio.to_thread(server.kill)
        if chance.random() < 0.2:
            proxy.refusing = True
            await asyncio.to_thread(server.start)
            await asyncio.sleep(chance.uniform(0, 0.1))
            proxy.refusing = False
        else:
            await asyncio.to_thread(server.start)


async def _terminate(server: ServerProcess, trial: Trial) -> None:
    """SIGTERM, after which a server has to end by itself, and well."""
    await asyncio.to_thread(server.terminate)
    if server.exit_code != 0:
        trial.faults.append(Fault("bad end", server.address, f"status {server.exit_code}: {server.log()[-300:]}"))


async def _look(url: str, tracks: list[Track]) -> None:
    """Where the sessions stand in the end, in the store."""
    store = await open_store(url)
    try:
        for start in range(0, len(tracks), 256):
            part = tracks[start : start + 256]
            for track, record in zip(part, await store.take([t.plan.name for t in part], time.time()), strict=True):
                if record is None:
                    if track.created:
                        track.fault("lost session", "it is not in the store")
                    continue
                track.history.step = record.step
                plan: Plan = track.plan
                specs = (*plan.engine.states, *rules_of(record.meta).states)
                states = unpack_states(specs, plan.kind.batch, record.states)
                track.history.states = {spec.name: states[spec.name] for spec in plan.engine.states}
    finally:
        await store.close()
