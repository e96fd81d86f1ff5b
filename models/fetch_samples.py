"""Takes the recordings that models/samples/samples.yaml names, for the README's client and the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from rnnserve_models.errors import ModelError
from rnnserve_models.fetch import fetch_file
from rnnserve_models.spec import Source

SAMPLES = Path(__file__).with_name("samples")


def main() -> int:
    """Takes what is missing; 1 if something could not be had."""
    failed = 0
    for name, source in yaml.safe_load((SAMPLES / "samples.yaml").read_text(encoding="utf-8")).items():
        try:
            print(f"{fetch_file(Source(**source), SAMPLES / name)}: ready")
        except ModelError as error:
            print(error, file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
