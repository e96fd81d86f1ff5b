"""`python -m fuzz.files.guided TARGET [flags of libFuzzer]`: attempts that are chosen by which code they reach.

It needs Atheris, and ends at the first fault, whose bytes it leaves in a file; given that file, it shows it again.
"""

from __future__ import annotations

import logging
import sys
import warnings
from random import Random

import atheris

with atheris.instrument_imports(include=["rnnserve_models", "rnnserve_server", "yaml", "zipfile", "safetensors"]):
    from fuzz.files.attempt import attempt
    from fuzz.files.targets import TARGETS


class Guided(Random):
    """Chance that is what libFuzzer says, and nothing but zeros when it has said all."""

    def __new__(cls, data: bytes) -> Guided:
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int) -> int:
        """The next bytes, as many as it takes."""
        size = (k + 7) // 8
        said = self._data[self._at : self._at + size].ljust(size, b"\0")
        self._at += size
        return int.from_bytes(said, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """A number of 0 to 1, in 65536 steps."""
        return self.getrandbits(16) / 65536


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    warnings.simplefilter("ignore")
    logging.disable()

    def one(data: bytes) -> None:
        outcome = attempt(target, Guided(data))
        if outcome.fault and not (outcome.costly and target.apart):  # that is refused in a process of its own
            raise RuntimeError(f"{outcome.what}\n{outcome.reason}")

    atheris.Setup([sys.argv[0], "-rss_limit_mb=6144", "-timeout=60", "-max_len=512", *sys.argv[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
