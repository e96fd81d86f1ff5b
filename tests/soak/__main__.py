"""`python -m soak [--minutes 10] [--memory] [--pause 1]`: run it with PYTHONPATH=tests."""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
from pathlib import Path

from soak.run import soak


def main() -> None:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--visitors", type=int, default=6, help="at a time")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that each stays away between two visits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="without a store")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)  # clients tell of streams that they lose
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        settings = {"visitors": options.visitors, "pause": options.pause, "seed": options.seed}
        print(asyncio.run(soak(60 * options.minutes, Path(name), store=not options.memory, **settings)))


if __name__ == "__main__":
    main()
