"""What is looked for inside the models: the truth of the simulated cohort, memory, decay shapes, gates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn")

from gatewise.sepsis import cohort, records


@pytest.fixture(scope="module")
def simulated() -> records.Records:
    return cohort.simulate(600, seed=3)


def nobody_measured(patients: int, hours: int) -> records.Records:
    """A cohort's records with nothing measured or given."""
    table = cohort.simulate(100, seed=0)
    chosen = table.select(np.arange(100) < patients)
    first = np.repeat(chosen.offset[:-1], hours)
    return replace(
        chosen, measured=np.full((patients * hours, len(table.variables)), np.nan, np.float32),
        background=chosen.background[first], clock=np.tile(np.arange(1.0, hours + 1, dtype=np.float32), patients),
        label=np.zeros(patients * hours, np.int8), length=np.full(patients, hours), risk=None,
    )  # fmt: skip


# ---- the true risk -----------------------------------------------------------------------------------------


def test_the_true_risk_is_a_function_of_the_record_up_to_the_hour(simulated: records.Records) -> None:
    assert simulated.risk is not None
    np.testing.assert_allclose(cohort.true_risk(simulated), simulated.risk, rtol=1e-12)
    some = simulated.select(np.arange(600) % 7 == 2)
    np.testing.assert_allclose(cohort.true_risk(some), some.risk, rtol=1e-12)
    hour = np.arange(some.label.size) - some.first_row
    early = hour < 9
    cut = replace(
        some, measured=some.measured[early], background=some.background[early], clock=some.clock[early],
        label=some.label[early], length=np.minimum(some.length, 9), risk=None,
    )  # fmt: skip
    np.testing.assert_allclose(cohort.true_risk(cut), some.risk[early], rtol=1e-12)


def test_the_true_risk_of_a_dose_in_closed_form() -> None:
    """With nothing measured, the hazard is that of the patient at rest and of the doses."""
    table = nobody_measured(3, 60)
    steroid = table.variables.index("Steroid")
    table.measured[[4, 10], steroid] = 1.0, 0.5
    age, male = table.background[0].astype(float)
    rest = cohort.BASE + cohort.AGE_PER_DECADE * (age - 63) / 10 + cohort.MALE * male
    hours = np.arange(60.0)
    effect = np.zeros(60)
    effect[4:] += 1.5 * cohort.hump(hours[:-4], 14.0)
    effect[10:] += 0.75 * cohort.hump(hours[:-10], 14.0)
    hazard = 1 / (1 + np.exp(-rest - np.concatenate([np.zeros(cohort.HORIZON), effect])))
    hazard[0] = 0
    expected = [1 - np.prod(1 - hazard[t + 1 : t + 1 + cohort.HORIZON]) for t in range(60)]
    np.testing.assert_allclose(cohort.true_risk(table)[:60], expected, rtol=1e-12)


def test_the_true_risk_of_other_records_is_a_sentence(simulated: records.Records) -> None:
    with pytest.raises(ValueError, match=r"records: expected the variables of a simulated cohort, HR, .*; got HR, MAP"):
        cohort.true_risk(replace(simulated, variables=(*simulated.variables[:-1], "Insulin")))
