"""`python -m fuzz.files.worker TARGET SEED FIRST LAST SECONDS`: attempts, in a process that may die.

It prints the number of an attempt before it begins, and a line of JSON about what came of it.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import resource
import sys
import time
import warnings
from random import Random

from fuzz.files.attempt import SECONDS, attempt
from fuzz.files.targets import TARGETS

_APART_SECONDS = 8.0
ADDRESS_SPACE = 4 << 30
"""Of the process: what asks for more gets a MemoryError."""


def chance_of(target: str, seed: int, number: int) -> Random:
    """What an attempt is made from: the same each time."""
    return Random(f"{target}/{seed}/{number}")


def main() -> None:
    name, (seed, first, last), seconds = sys.argv[1], map(int, sys.argv[2:5]), float(sys.argv[5])
    warnings.simplefilter("ignore")
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target, end, number = TARGETS[name], time.monotonic() + seconds, first
    target.make(chance_of(name, seed, first))  # what it is made from is read once, which is not the attempt's time
    while time.monotonic() < end and (number <= last or last < 0):
        print(number, flush=True)
        faulthandler.dump_traceback_later(_APART_SECONDS if target.apart else 2 * SECONDS, exit=True)
        outcome = attempt(target, chance_of(name, seed, number))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(outcome._asdict()), flush=True)
        number += 1


if __name__ == "__main__":
    main()
