"""Streams through a fleet of `docker compose` while it is killed, scaled and rolled:

    PYTHONPATH=tests python tests/docker/stream.py localhost:50051 [SESSIONS]

Needs the installed client and models, and `docker` with Compose. Prints a line for each event, and ends with status 1
if an output is not the oracle's or one is lost or doubled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from fleet.traffic import Traffic
from rnnserve import aio

ROOT = Path(__file__).parents[2]
COMPOSE = ["docker", "compose", "--file", str(ROOT / "docker-compose.yml"), "--profile", "fleet"]
STREAMS = 32  # enough that each replica has some
GOAL = 2.0  # seconds that a pause may take, beside five times what an answer takes when nothing happens


async def run(*command: str, **variables: str) -> str:
    """What a command prints."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **variables}
    )
    said, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{errors.decode()[-3000:]}")
    return said.decode()


async def replicas() -> list[str]:
    return (await run(*COMPOSE, "ps", "--quiet", "replica")).split()


async def scale(count: int) -> None:
    await run(
        *COMPOSE, "up", "--detach", "--wait", "--no-recreate", "--no-deps", "--scale", f"replica={count}", "replica"
    )


async def kill_one() -> None:
    await run("docker", "kill", (await replicas())[0])


async def roll() -> None:
    """To an image that differs: a label is enough for another id."""
    name = f"rnnserve-roll-{os.getpid()}"
    await run("sh", "-c", f"echo 'FROM rnnserve\nLABEL rolled={name}' | docker build --tag rnnserve -")
    await run(str(ROOT / "deploy" / "roll.sh"))


async def main(address: str, sessions: int) -> int:
    events = [
        ("docker kill of 1 of 3 replicas (goal: less than 2 s)", kill_one),
        ("up to 5 replicas", lambda: scale(5)),
        ("down to 2 replicas", lambda: scale(2)),
        ("roll to another image (goal: none to be seen)", roll),
    ]
    failed = 0
    async with aio.Client(address, timeout=60, streams=STREAMS) as client:
        traffic = Traffic(client, sessions, pause=0.25, steps=4000)
        async with traffic.flowing():
            await traffic.go_on(10)
            traffic.mark()
            await traffic.go_on(10)
            phase = traffic.mark()
            most = GOAL + 5 * phase.longest
            print(f"         nothing happens: {phase}", flush=True)
            for name, event in events:
                started, before = time.monotonic(), traffic.done
                await event()
                await traffic.go_on(8)
                phase = traffic.mark()
                ok = phase.longest < most
                failed += not ok
                took, steps = time.monotonic() - started, traffic.done - before
                print(
                    f"{'passed' if ok else 'FAILED'}   {name}: {phase}; {steps:,} steps in {took:.0f} s",
                    flush=True,
                )
    print(f"passed   {traffic.done:,} steps of {sessions} sessions: each output the oracle's, none lost or doubled")
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: stream.py HOST:PORT [SESSIONS]")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")  # what the client says of its streams
    try:
        sys.exit(asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 500)))
    except Exception:
        traceback.print_exc()
        print("FAILED   tests/docker/stream.py")
        sys.exit(1)
