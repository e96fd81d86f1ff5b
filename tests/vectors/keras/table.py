"""Prints how far the engines are from real Keras: the largest absolute error of every family of cases.

    PYTHONPATH=tests python -m vectors.keras.table [FAMILY ...]

Ends with status 1 if any case fails, after a list of those that do.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from vectors.keras.cases import Case, load_cases, run

ENGINES = ("numpy", "onnx")


def main(families: list[str]) -> int:
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in load_cases():
        if not families or case.family in families:
            groups[case.family].append(case)
    failures = []
    print(f"{'family':36}{'cases':>7}" + "".join(f"{engine:>12}" for engine in ENGINES))
    for family, cases in groups.items():
        cells = []
        for engine in ENGINES:
            worst, failed = 0.0, 0
            for case in cases:
                try:
                    worst = max(worst, run(case, engine))
                except Exception as error:
                    failed += 1
                    failures.append(f"{family}: {case.name} under {engine}: {type(error).__name__}: {error}")
            cells.append(f"{failed} FAIL" if failed else f"{worst:.1e}")
        print(f"{family:36}{len(cases):>7}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    print(f"{'all':36}{sum(map(len, groups.values())):>7}")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
