"""Every layer, option, mask and dtype against what real Keras 2 and 3 computed, on both engines.

The cases are in vectors/keras; `make vectors` prints the errors as a table.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from vectors.keras.cases import load_cases, run

FAMILIES = defaultdict(list)
for _case in load_cases():
    FAMILIES[_case.family].append(_case)


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_real_keras(family, engine):
    """Shapes, dtypes, nesting and values, to 2e-5 (float16: 4e-3)."""
    faults = []
    for case in FAMILIES[family]:
        try:
            run(case, engine)
        except Exception as error:
            faults.append(f"{case.name}: {type(error).__name__}: {error}")
    assert not faults, f"{len(faults)} of {len(FAMILIES[family])} cases:\n" + "\n".join(faults)


def test_the_cases_cover_what_they_should():
    """Both Kerases, every family, and enough of each."""
    cases = [case for family in FAMILIES.values() for case in family]
    assert len(cases) >= 1000
    assert {case.keras for case in cases} == {2, 3}
    assert min(map(len, FAMILIES.values())) >= 4
