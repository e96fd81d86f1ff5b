"""The fuzzer: a server, honest clients, and one that sends what it should not."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import grpc
import yaml

from fuzz.frames import Talk
from fuzz.likeness import Likenesses, asked
from fuzz.messages import stream_request, unary_request
from raw_http2 import Wire
from rnnserve.v1 import inference_pb2
from rnnserve_server.access.edit import with_token
from soak.past import live_through
from soak.watch import Holdings
from torture.servers import ServerProcess, server_process

ZOO = Path(__file__).parents[2] / "models" / "zoo"
_LEFT_SECONDS = 3.0
_STREAM = "/rnnserve.v1.InferenceService/Stream"
_OPTIONS = [("grpc.max_receive_message_length", -1)]
_LATE_MEGABYTES = 40
_CALM_SECONDS = 15.0  # of 1280 steps each: the 99th percentile of a few seconds is a matter of luck
# What may not be told of a request that could be parsed: they are what a fault of the server's own looks like.
_BAD = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}
_BAD_NUMBERS = {code.value[0] for code in _BAD}


@dataclass(frozen=True)
class Fuzz:
    """How much of it.

    Attributes:
        frames: in all.
        seconds: nothing new is begun after so long.
        seed: of chance.
        sessions: honest ones.
        pace: frames a second at most; 0: as fast as it goes.
        rows_per_second: the quota of who sends them; 0: none.
        nice: how much the sender, which would be another machine, gives way to the server and the honest clients.
    """

    frames: int = 1_000_000
    seconds: float = 900.0
    seed: int = 0
    sessions: int = 64
    pace: float = 0.0
    rows_per_second: float = 5000.0
    nice: int = 0


@dataclass
class Report:
    """What came of it.

    Attributes:
        frames: sent, by kind.
        statuses: how calls and chunks were answered.
        faults: what must not be.
        calm, fuzzed: milliseconds that the honest waited, before and meanwhile, and that they were late by themselves.
        growth: of the server's descriptors and threads.
        memory: the server's own, in MB, at the beginning, when it remembers as many ended sessions as it may, and after
            each tenth of the frames.
    """

    frames: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    calm: dict[str, float] = field(default_factory=dict)
    fuzzed: dict[str, float] = field(default_factory=dict)
    growth: dict[str, int] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)
    honest: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times longer the honest waited, at the 99th percentile."""
        return self.fuzzed["p99"] / max(self.calm["p99"], 1e-9)

    def __str__(self) -> str:
        lines = [
            f"{self.frames.total()} frames in {self.seconds:.0f} s: {dict(self.frames)}",
            f"answered: {dict(self.statuses.most_common())}",
            f"honest sessions: p50 {self.calm['p50']:.2f} ms and p99 {self.calm['p99']:.2f} ms before, "
            f"{self.fuzzed['p50']:.2f} and {self.fuzzed['p99']:.2f} ms meanwhile "
            f"({self.ratio:.2f} times); sent late by themselves, p99 {self.calm['late']:.2f} ms before and "
            f"{self.fuzzed['late']:.2f} meanwhile; {self.honest}",
            f"growth: {self.growth}, memory {self.memory} MB",
            *(f"FAULT: {fault}" for fault in self.faults),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return plain | {"ratio": self.ratio}


class _Honest:
    """The honest clients' process."""

    def __init__(self, address: str, token: str, sessions: int) -> None:
        command = [sys.executable, "-m", "fuzz.honest", address, token, str(sessions)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def latencies(self) -> dict[str, float]:
        """Since this was asked last."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()

    def end(self) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._line()
        finally:
            self._process.wait(30)

    def kill(self) -> None:
        with self._process:  # closes its pipes
            self._process.kill()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the honest clients have failed")
        return json.loads(line)


def fuzz(plan: Fuzz, folder: Path) -> Report:
    """Runs it."""
    path, report = folder / "principals.yaml", Report()
    now = datetime.now(UTC)
    tokens = {name: with_token(path, name, None, now, None) for name in ("alice", "mallory")}
    document = yaml.safe_load(path.read_text())
    document["principals"]["mallory"]["quotas"] = {"sessions": 200, "rows_per_second": plan.rows_per_second}
    path.write_text(yaml.safe_dump(document))
    settings = {
        "models": ZOO,
        "principals": path,
        "connection_idle_seconds": 2.0,
        "idle_lifetime": _LEFT_SECONDS,  # or the fuzzer's quota would soon be full of sessions that it has lost
        "max_idle_lifetime": _LEFT_SECONDS,
        "log_level": "error",
    }
    with server_process(folder / "server.log", **settings) as server:
        honest = _Honest(server.address, tokens["alice"], plan.sessions)
        try:
            _run(plan, server, honest, tokens["alice"], tokens["mallory"], report)
        finally:
            honest.kill()
        if not server.alive:
            report.faults.append("the server has died")
        server.terminate()
        log = server.log()
        if found := [match.start() for match in re.finditer(r"Traceback|request failed", log)]:
            report.faults.append(f"the server logged {len(found)} failures of its own")
            report.faults += [log[max(0, at - 300) : at + 3000] for at in found[:3]]
    return report


def _run(plan: Fuzz, server: ServerProcess, honest: _Honest, honest_token: str, token: str, report: Report) -> None:
    os.nice(plan.nice)
    chance = Random(plan.seed)
    asyncio.run(live_through(server.address, honest_token))
    sender = _Sender(server.address, token, chance, report)
    sender.send(min(2000, plan.frames // 20))  # what is loaded and grows once
    time.sleep(1.0)
    honest.latencies()
    time.sleep(_CALM_SECONDS)
    report.calm = honest.latencies()
    before = Holdings.of(server.pid)
    began = time.monotonic()
    while (sent := report.frames.total()) < plan.frames and (spent := time.monotonic() - began) < plan.seconds:
        if sent >= len(report.memory) * plan.frames // 10:
            report.memory.append(_megabytes(server))
        sender.send(min(500, plan.frames - sent))
        if plan.pace and (ahead := sent / plan.pace - spent) > 0:
            time.sleep(ahead)
        if not server.alive:
            return
    report.seconds = time.monotonic() - began
    report.fuzzed = honest.latencies()
    report.memory.append(_megabytes(server))  # before the honest ask for all their outputs once more
    report.honest = honest.end()
    if report.honest["wrong"]:
        report.faults.append(f"{report.honest['wrong']} outputs of honest sessions are not what they should be")
    sender.close()
    deadline = time.monotonic() + 20
    while (after := Holdings.of(server.pid)).files > before.files and time.monotonic() < deadline:
        time.sleep(0.2)  # connections without calls are closed after two seconds
    report.growth = {"descriptors": after.files - before.files, "threads": after.threads - before.threads}
    if report.growth["descriptors"] > 0:
        report.faults.append(f"{report.growth['descriptors']} descriptors are left")
    if report.growth["threads"] > 8:
        report.faults.append(f"{report.growth['threads']} threads are left")
    if (late := report.memory[-1] - report.memory[len(report.memory) // 2]) > _LATE_MEGABYTES:
        report.faults.append(f"{late:.1f} MB more than half-way, where all that is kept was there")


def _megabytes(server: ServerProcess) -> float:
    return round(Holdings.of(server.pid).memory / 1e6, 1)


class _Sender:
    """Who sends what it should not."""

    def __init__(self, address: str, token: str, chance: Random, report: Report) -> None:
        self._address, self._token, self._chance, self._report = address, token, chance, report
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._channel = grpc.insecure_channel(address, _OPTIONS)

    def close(self) -> None:
        self._channel.close()
        gc.collect()

    def send(self, frames: int) -> None:
        """So many frames: half of HTTP/2, and most of the rest in streams."""
        raw = frames // 2
        unary = frames // 50
        self._raw(raw)
        for _ in range(unary):
            self._unary()
        self._streams(frames - raw - unary)

    def _raw(self, frames: int) -> None:
        """Connections of raw frames, each of which must be ended by the server or be as alive as any other."""
        while frames > 0:
            talk = Talk(self._chance, self._token)
            sent = list(talk.frames(frames))
            frames -= len(sent)
            self._report.frames["HTTP/2"] += len(sent)
            try:
                with Wire(self._address, timeout=10) as wire:
                    wire.send(*sent)
                    # A frame that promises more than comes would be waited for: so nothing more comes at all.
                    wire.socket.shutdown(1)
                    ended = wire.ended()
            except OSError as error:
                ended = not isinstance(error, TimeoutError)
            self._report.statuses["connection closed" if ended else "connection open"] += 1
            if not ended:
                self._report.faults.append("a connection that nobody speaks on any more was not closed")

    def _unary(self) -> None:
        method, content = unary_request(self._chance)
        self._report.frames["call"] += 1
        try:
            self._channel.unary_unary(method)(content, metadata=self._metadata, timeout=30)
            self._report.statuses["OK"] += 1
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            self._report.statuses[code.name] += 1
            if code in _BAD or code is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._report.faults.append(f"{method} of {content!r:.300}: {code.name} {error.details()}")  # type: ignore[attr-defined]

    def _streams(self, frames: int) -> None:
        """Streams, of which every chunk must be answered, or the stream be ended with a status that says why."""
        while frames > 0:
            contents: list[bytes] = []
            if self._chance.random() < 0.2:
                talk, size = Likenesses(self._chance), min(frames, self._chance.choice((4, 16, 40)))
                contents = [talk.opening(), *(talk.next() for _ in range(size)), talk.closing()]
                self._report.frames["alike"] += size
                frames -= size
            else:
                for number in range(self._chance.randrange(1, 10)):
                    size = min(frames, self._chance.choice((1, 4, 16)))
                    request = stream_request(self._chance, size, first=not number)
                    contents.append(request.SerializeToString())
                    self._report.frames["stream"] += len(request.frames)
                    frames -= len(request.frames)
                    if frames <= 0:
                        break
            self._stream(contents)

    def _stream(self, contents: list[bytes]) -> None:
        report = self._report
        expected = [asked(content) for content in contents]
        queued: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for content in (*contents, None):
            queued.put(content)
        call = self._channel.stream_stream(_STREAM, response_deserializer=inference_pb2.StreamResponse.FromString)(
            iter(queued.get, None), metadata=self._metadata, timeout=60
        )
        answered = 0
        try:
            for response in call:
                for frame in response.frames:
                    answered += len(frame.lanes)
                    report.statuses["chunk OK"] += len(frame.lanes)
                for error in response.errors:
                    answered += error.operation == inference_pb2.LANE_OPERATION_STEP
                    report.statuses[f"lane {error.status.code}"] += 1
                    if error.status.code in _BAD_NUMBERS or not error.status.details:
                        report.faults.append(f"a lane was told {error.status!r:.300}")
            if None in expected:
                report.faults.append(f"a stream went on after {contents[expected.index(None)]!r:.300}")
            elif answered != (total := sum(filter(None, expected))):
                report.faults.append(f"{answered} answers to {total} chunks")
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            report.statuses[f"stream {code.name}"] += 1
            if code is not grpc.StatusCode.INVALID_ARGUMENT or None not in expected:
                report.faults.append(f"a stream was ended: {code.name} {error.details()}")  # type: ignore[attr-defined]
