"""What a server has behind it that has run for a day: what it remembers is as much as it may be.

A server keeps in mind why the last 65,536 sessions ended, and its store why those of the last day did. Until that is so
much, memory grows with the sessions that end, and a soak of minutes could not tell it from memory that is lost.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import grpc.aio

from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import inference_pb2_grpc
from rnnserve.v1.session_pb2 import SessionConfig
from rnnserve_server.store.sqlite import SqliteStore

_ENDS = 66_000  # more than a server keeps in mind
_LANES = 1000  # of them at a time
_ROWS = 600_000  # sessions that ended within the last day; the file's pages are then more than SQLite keeps in memory


async def fill(path: Path) -> None:
    """Makes a store in which many sessions have ended lately."""
    await (await SqliteStore.open(path)).close()
    chance, now = random.Random(1), time.time()
    ids = sorted(f"{chance.getrandbits(128):032x}" for _ in range(_ROWS))
    rows = ((each, "closed", now - 3600 * chance.random(), 1) for each in ids)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA synchronous = off")
        database.execute("PRAGMA cache_size = -262144")
        database.executemany("INSERT INTO ended (id, why, at, epoch) VALUES (?, ?, ?, ?)", rows)
    database.close()


async def live_through(address: str, token: str = "") -> None:
    """Has as many sessions come and go as a server keeps in mind. With a principal's token, where there are such."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    async with grpc.aio.insecure_channel(address) as channel:

        def requests() -> Iterator[pb.StreamRequest]:
            for _ in range(_ENDS // _LANES):
                yield pb.StreamRequest(
                    opens=[pb.LaneOpen(lane=lane, create=SessionConfig(model="lstm-4")) for lane in range(_LANES)],
                    closes=[pb.LaneClose(lane=lane, delete_session=True) for lane in range(_LANES)],
                )

        ended = 0
        async for response in inference_pb2_grpc.InferenceServiceStub(channel).Stream(requests(), metadata=metadata):
            assert not response.errors, response.errors[0]
            ended += len(response.closed)
    assert ended == _ENDS
