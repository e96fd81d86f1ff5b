"""Sessions that several streams step at once, on a real server."""

from __future__ import annotations

import queue
import random
import threading
from collections import Counter
from typing import Any

import grpc
import numpy as np
import pytest

from rnnserve.codec import decode, encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import inference_pb2_grpc, session_pb2, session_pb2_grpc
from serving import ZOO, running_server

MODEL, FEATURES, SESSIONS = "lstm-4", 5, 40
SECONDS = 20.0  # for which an answer may be waited for


class Stream:
    """A stream on a connection of its own, with all sessions on its lanes.

    Args:
        address: the server's.
        ids: the sessions.
        heard: where what it hears is put, with the stream.
    """

    def __init__(self, address: str, ids: list[str], heard: queue.SimpleQueue[tuple[Stream, Any]]) -> None:
        self.asked: Counter[int] = Counter()  # answers that are still to come, by lane
        self._heard = heard
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._call = inference_pb2_grpc.InferenceServiceStub(self._channel).Stream(iter(self._requests.get, None))
        opens = [pb.LaneOpen(lane=lane, session_id=each) for lane, each in enumerate(ids)]
        self.ask(range(len(ids)), pb.StreamRequest(opens=opens))
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, lanes: Any, request: pb.StreamRequest) -> None:
        self.asked.update(lanes)
        self._requests.put(request)

    def _listen(self) -> None:
        try:
            for response in self._call:
                self._heard.put((self, response))
        except grpc.RpcError as error:
            self._heard.put((self, error))

    def cut(self) -> None:
        self._call.cancel()
        self._requests.put(None)
        self._channel.close()


def chunk(lane: int, first_step: int, steps: int) -> np.ndarray:
    """What a session takes at some steps, whoever sends it: [1, steps, features]."""
    rows = [np.random.default_rng((lane, first_step + t)).standard_normal(FEATURES, np.float32) for t in range(steps)]
    return np.stack(rows)[None]


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_whoever_asks_is_answered(tmp_path, store):
    """Three streams, cut and opened anew at times, step the same sessions without waiting for one another, and so ahead
    of each other's answers: every chunk is answered on its own stream, be it that it came out of turn, and what is
    answered is what each session gives when it is stepped alone.
    """
    rng = random.Random(store)
    settings: dict[str, Any] = {"store": f"sqlite:///{tmp_path / 'kept.db'}", "durability": "step"}
    with (
        running_server(models=ZOO, **(settings if store == "sqlite" else {})) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        sessions = session_pb2_grpc.SessionServiceStub(channel)
        config = session_pb2.SessionConfig(model=MODEL, batch_size=1)
        asked = session_pb2.CreateSessionRequest(config=config)
        ids = [sessions.CreateSession(asked).session.session_id for _ in range(SESSIONS)]
        heard: queue.SimpleQueue[tuple[Stream, Any]] = queue.SimpleQueue()
        streams = [Stream(server.address, ids, heard) for _ in range(3)]
        at = [0] * SESSIONS
        outputs: dict[tuple[int, int], bytes] = {}  # by lane and the step behind the chunk
        for _ in range(25):
            ahead = list(at)
            for _ in range(rng.randrange(1, 9)):
                lanes = list(range(SESSIONS)) if rng.random() < 0.5 else sorted(rng.sample(range(SESSIONS), 5))
                steps = rng.choice([1, 1, 2])
                x = np.stack([chunk(lane, ahead[lane], steps) for lane in lanes])  # [N, 1, steps, features]
                frame = pb.StepFrame(lanes=lanes, first_steps=[ahead[lane] for lane in lanes])
                frame.inputs.extend(encode_named({"input": x}))
                rng.choice(streams).ask(lanes, pb.StreamRequest(frames=[frame]))
                for lane in lanes:
                    ahead[lane] += steps
            if rng.random() < 0.2:
                number = rng.randrange(3)
                streams[number].cut()
                streams[number] = Stream(server.address, ids, heard)
            while any(stream.asked.total() for stream in streams):
                stream, response = heard.get(timeout=SECONDS)
                if stream not in streams:
                    continue
                assert not isinstance(response, Exception), response
                stream.asked.subtract(opened.lane for opened in response.opened)
                stream.asked.subtract(error.lane for error in response.errors)
                assert all(b"STEP_" in error.status.SerializeToString() for error in response.errors)
                for result in response.frames:
                    stream.asked.subtract(result.lanes)
                    (y,) = (decode(named.tensor) for named in result.outputs)
                    for lane, first_step, row in zip(result.lanes, result.first_steps, y, strict=True):
                        outputs[lane, first_step + result.timesteps] = row.tobytes()
            for lane, each in enumerate(ids):  # chunks of a stream that was cut may have been run
                found = sessions.GetSession(session_pb2.GetSessionRequest(session_id=each))
                at[lane] = found.session.step
        for stream in streams:
            stream.cut()
        assert len(outputs) > 10 * SESSIONS
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        for lane in range(SESSIONS):
            alone = pb.PredictRequest(model=MODEL, inputs=encode_named({"input": chunk(lane, 0, at[lane])}))
            alone.options.return_sequences = True
            (y,) = (decode(named.tensor) for named in inference.Predict(alone).outputs)  # [1, T, units]
            assert all(y[0, step - 1].tobytes() == of for (one, step), of in outputs.items() if one == lane)
