"""`python -m soak [--minutes 10] [--memory]`: run it with PYTHONPATH=tests."""

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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="without a store")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)  # clients tell of streams that they lose
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        print(asyncio.run(soak(60 * options.minutes, Path(name), store=not options.memory, seed=options.seed)))


if __name__ == "__main__":
    main()
