"""What is looked for inside the models: the truth of the simulated cohort, memory, decay shapes, gates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn")

from gatewise import SequenceClassifier, training
from gatewise.layers import Layer
from gatewise.sepsis import cohort, insight, records


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


def test_the_true_risk_is_what_the_cohort_says_row_by_row(simulated: records.Records) -> None:
    """The definition once more, by plain loops: strain, rise of lactate and doses, six hours later."""
    assert simulated.risk is not None
    variables = {v.name: v for v in cohort.VARIABLES}
    for one in range(8):
        start, end = simulated.offset[one : one + 2]
        age, male = simulated.background[start].astype(float)
        rest = cohort.BASE + cohort.AGE_PER_DECADE * (age - 63) / 10 + cohort.MALE * male
        hazard = [0.0, *[1 / (1 + np.exp(-rest))] * (cohort.HORIZON - 1)]
        last, strain, rise, drawn, doses = dict.fromkeys(variables, 0.0), 0.0, 0.0, -1, []
        for t, row in enumerate(simulated.measured[start:end].astype(float)):
            record = dict(zip(simulated.variables, row))
            for name, v in variables.items():
                if not np.isnan(record[name]):
                    value = (record[name] - v.normal) / v.spread
                    if name == "Lactate":
                        rise, drawn = (value - last[name] if drawn >= 0 else 0.0), t
                    last[name] = value
            now = sum(v.strain * last[name] for name, v in variables.items())
            strain = cohort.STRAIN_MEMORY * strain + (1 - cohort.STRAIN_MEMORY) * now
            doses += [(drug, t, record[drug.name]) for drug in cohort.DRUGS if not np.isnan(record[drug.name])]
            drive = rest + cohort.STRAIN * strain
            if drawn >= 0:
                drive += cohort.LACTATE_RISE * rise * 0.5 ** ((t - drawn) / cohort.LACTATE_HALF_LIFE)
            for drug, given, amount in doses:
                drive += amount * drug.hazard * float(drug.shape(np.array(t - given), drug.hours))
            hazard.append(1 / (1 + np.exp(-min(drive, 10.0))))
            risk = 1 - np.prod(1 - np.array(hazard[t + 1 : t + 1 + cohort.HORIZON]))
            assert simulated.risk[start + t] == pytest.approx(risk, rel=1e-9), (one, t)


def test_the_true_risk_of_other_records_is_a_sentence(simulated: records.Records) -> None:
    with pytest.raises(ValueError, match=r"records: expected the variables of a simulated cohort, HR, .*; got HR, MAP"):
        cohort.true_risk(replace(simulated, variables=(*simulated.variables[:-1], "Insulin")))


# ---- memory ------------------------------------------------------------------------------------------------


def series(seed: int, patients: int, features: int, steps: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(0, 1, (steps + i % 3, features)) for i in range(patients)]


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm", "lstm_peephole"])
def test_influence_is_the_norm_of_finite_differences(cell: str) -> None:
    layer, lags = Layer(cell, 3, 5, random_state=0), 4
    x = series(1, 4, 3, lags + 2)
    weight = np.random.default_rng(2).normal(0, 1, 5)
    exact = insight._in_float64(layer)

    def last(sequence: np.ndarray) -> np.ndarray:
        y, _, _ = exact.forward(np.ascontiguousarray(sequence[:, None]), training=False)
        return y[lags, 0]

    norm, norm_of_weighted = np.zeros(lags + 1), np.zeros(lags + 1)
    for sequence in x:
        for tau in range(lags + 1):
            jacobian = np.zeros((5, 3))
            for i in range(3):
                for sign in (1, -1):
                    moved = sequence.copy()
                    moved[lags - tau, i] += sign * 1e-5
                    jacobian[:, i] += sign * last(moved) / 2e-5
            norm[tau] += np.linalg.norm(jacobian) / len(x)
            norm_of_weighted[tau] += np.linalg.norm(weight @ jacobian) / len(x)
    # central differences of step 1e-5 in float64: 1e-10 of truncation, 1e-16 / 1e-5 of rounding
    np.testing.assert_allclose(insight.influence(layer, x, lags), norm, atol=1e-9)
    np.testing.assert_allclose(insight.influence(layer, x, lags, weight), norm_of_weighted, atol=1e-9)


def test_influence_is_a_product_of_jacobians() -> None:
    """Of a tanh RNN, dh_t / dx_{t - tau} = D_t W D_{t-1} W ... D_{t-tau} V with D the slopes of tanh."""
    layer, lags = Layer("rnn_tanh", 2, 4, random_state=3, dtype=np.float64), 6
    x = series(4, 3, 2, lags + 1)
    weights = layer.parameters
    expected = np.zeros(lags + 1)
    for sequence in x:
        y, _, _ = layer.forward(np.ascontiguousarray(sequence[:, None]))
        slope = [np.diag(1 - h[0] ** 2) for h in y]
        path = slope[lags]
        for tau in range(lags + 1):
            expected[tau] += np.linalg.norm(path @ weights["weight_ih_l0"]) / len(x)
            path = path @ weights["weight_hh_l0"] @ slope[lags - tau - 1]
    np.testing.assert_allclose(insight.influence(layer, x, lags), expected, rtol=1e-10)


def test_a_linear_rnn_fades_as_its_weight_does_and_a_forced_forget_gate_as_itself() -> None:
    lags = 30
    x = [np.zeros((lags + 1, 2))]
    linear = Layer("rnn_tanh", 2, 3, random_state=0, dtype=np.float64)
    for name, value in linear.parameters.items():  # at 0, tanh is the identity
        value[...] = 0.8 * np.eye(3) if name == "weight_hh_l0" else 0 if "bias" in name else value
    curve = insight.influence(linear, x, lags)
    np.testing.assert_allclose(curve / curve[0], 0.8 ** np.arange(lags + 1), rtol=1e-12)
    faded = insight.fade(curve)
    assert faded.half_life == pytest.approx(np.log(0.5) / np.log(0.8)) and faded.kept == pytest.approx(0.8)
    assert faded.straightness == pytest.approx(1) and faded.left == pytest.approx(0.8**lags)

    bias = 2.0
    lstm = Layer("lstm", 2, 3, random_state=0, dtype=np.float64)
    for name, value in lstm.parameters.items():  # no gate sees h; g is linear at 0; the forget gate is sigmoid(2)
        value[...] = 0 if name != "weight_ih_l0" else value
        if name == "bias_ih_l0":
            value[3:6] = bias
    curve = insight.influence(lstm, x, lags)
    np.testing.assert_allclose(curve / curve[0], (1 / (1 + np.exp(-bias))) ** np.arange(lags + 1), rtol=1e-12)


def test_a_curve_that_stays_has_no_half_life_and_a_lost_one_a_short_one() -> None:
    stays = insight.fade(np.linspace(1, 0.6, 20))
    assert stays.half_life == np.inf and stays.left == pytest.approx(0.6)
    assert insight.fade(np.array([1.0, 0.5, 0.25])).half_life == pytest.approx(1)
    assert insight.fade(np.array([1.0, 0.0, 0.0])).half_life < 0.01
    # it is below half for good only after 3 steps
    assert 3 < insight.fade(np.array([1.0, 0.4, 0.9, 0.8, 0.1])).half_life < 4
    assert insight.fade(np.array([1.0, 0.9, 0.2, 0.9, 0.2])).straightness < 0.6


def test_autoregressive_influence_is_the_impulse_response() -> None:
    np.testing.assert_allclose(insight.autoregressive_influence([-0.7], 20), 0.7 ** np.arange(21))
    phi = [0.5, -0.3, 0.2]
    y = np.zeros(24)
    for t in range(3, 24):
        y[t] = (t == 3) + sum(p * y[t - i] for i, p in enumerate(phi, 1))
    np.testing.assert_allclose(insight.autoregressive_influence(phi, 20), np.abs(y[3:]))


def test_autoregressive_coefficients_are_found_again() -> None:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        y = np.zeros(300)
        for t in range(2, 300):
            y[t] = 0.6 * y[t - 1] - 0.3 * y[t - 2] + random.normal()
        rows.append(5 + y)
    # 12,000 steps: a standard deviation of some .01
    np.testing.assert_allclose(insight.fit_autoregressive([*rows, np.zeros(2)], 2), [0.6, -0.3], atol=0.04)


def test_an_untrained_rnn_forgets_exponentially_and_an_lstm_as_its_forget_gate_says() -> None:
    x = series(5, 8, 6, 49)
    networks = {name: trained(cell, 6) for name, cell in (("RNN", "rnn"), ("GRU", "gru"), ("LSTM", "lstm"))}
    groups = insight.memory(networks, x, 48, {"AR(1)": [0.9]})
    assert {group: list(curves) for group, curves in groups.items()} == {
        "before training": ["AR(1)", "RNN", "GRU", "LSTM"],
        "after training": ["RNN", "GRU", "LSTM"],
        "forget gate of an LSTM": ["open", "half open", "shut"],
    }
    assert all(curve.shape == (49,) and curve[0] == 1 for curves in groups.values() for curve in curves.values())
    rnn = insight.fade(groups["before training"]["RNN"])
    assert rnn.straightness > 0.99 and rnn.kept < 0.8
    gate = {state: insight.fade(curve) for state, curve in groups["forget gate of an LSTM"].items()}
    assert gate["shut"].left < 1e-12 < gate["half open"].left < 1e-3 < gate["open"].left
    assert gate["shut"].half_life < gate["half open"].half_life < 2 and gate["open"].half_life > 5
    expected = insight.influence(networks["GRU"].layer, x, 48)
    np.testing.assert_allclose(groups["after training"]["GRU"], expected / expected[0])
    assert "forget gate of an LSTM" not in insight.memory({"GRU": networks["GRU"]}, x, 5)


def test_influence_without_a_long_sequence_or_with_zoneout_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="x: expected a sequence of more than 9 steps; the longest has 8"):
        insight.influence(Layer("gru", 3, 4), [np.zeros((8, 3)), np.zeros((2, 3))], 9)
    with pytest.raises(ValueError, match=r"layer: expected one without zoneout; got zoneout=\(0.1, 0.0\)"):
        insight.influence(Layer("gru", 3, 4, zoneout=0.1), [np.zeros((8, 3))], 2)


def trained(cell: str, features: int, hidden: int = 12, seed: int = 0) -> training.Network:
    """After one epoch on noise."""
    x = series(seed + 7, 20, features, 12)
    y = [(one.sum(axis=1) > 0).astype(int) for one in x]
    options = {"hidden_size": hidden, "max_epochs": 1, "batch_size": 5, "validation_fraction": 0.0, "verbose": 0}
    return SequenceClassifier(cell=cell, random_state=seed, **options).fit(x, y).network_


# ---- decay shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drug", cohort.DRUGS, ids=lambda drug: drug.name)
def test_the_response_of_the_true_risk_is_the_effect_through_the_window(drug: cohort.Drug) -> None:
    """With nothing else in the record: exact in closed form, and in the limit of a small hazard `through_window`."""
    table = nobody_measured(5, 60)
    response = insight.dose_response(cohort.true_risk, table, drug.name, hours=48, at=6)
    effect = drug.hazard * drug.effect()[:49]
    age, male = table.background[table.offset[:-1]].astype(float).T
    rest = (cohort.BASE + cohort.AGE_PER_DECADE * (age - 63) / 10 + cohort.MALE * male)[:, None]

    def risk(effect: np.ndarray) -> np.ndarray:
        hazard = 1 / (1 + np.exp(-rest - np.concatenate([np.zeros(5), effect])))
        return 1 - np.prod(1 - np.lib.stride_tricks.sliding_window_view(hazard, 6, axis=1), axis=2)

    def log_odds(p: np.ndarray) -> np.ndarray:
        return np.log(p / (1 - p))

    exact = (log_odds(risk(effect)) - log_odds(risk(0 * effect))).mean(axis=0)
    np.testing.assert_allclose(response, exact, atol=1e-9)
    np.testing.assert_allclose(response, insight.through_window(effect), atol=0.02)
    shape, hours, misfit = insight.shape_of(response)
    expected = {"exponential": "exponential", "hump": "delayed hump", "plateau": "plateau"}[drug.shape.__name__]
    assert shape == expected and hours == pytest.approx(drug.hours, rel=0.05) and misfit < 0.02


def test_a_dose_changes_nothing_but_the_dose(simulated: records.Records) -> None:
    seen = []

    def score(table: records.Records) -> np.ndarray:
        seen.append(table)
        return np.full(table.label.size, 0.3)

    np.testing.assert_array_equal(insight.dose_response(score, simulated, "Steroid", hours=20, at=3), np.zeros(21))
    given, without = seen
    column = simulated.variables.index("Steroid")
    changed = ~((given.measured == without.measured) | np.isnan(given.measured) & np.isnan(without.measured))
    hour = np.arange(without.label.size) - without.first_row
    np.testing.assert_array_equal(changed, (hour == 3)[:, None] & (np.arange(changed.shape[1]) == column))
    assert np.isnan(without.measured[changed]).all() and (given.measured[changed] == 1).all()
    assert without.length.min() > 23 and given.length.size > 100


def test_a_response_is_the_mean_change_of_the_log_odds_from_the_hour_of_the_dose(simulated: records.Records) -> None:
    column = simulated.variables.index("Sedative")

    def score(table: records.Records) -> np.ndarray:
        hour = np.arange(table.label.size) - table.first_row
        given = ~np.isnan(table.measured[:, column])
        last = np.maximum.accumulate(np.where(given, np.arange(hour.size), -1000))
        since = np.where(last >= table.first_row, np.arange(hour.size) - last, -1)
        return 1 / (1 + np.exp(2 + 0.1 * hour - np.where(since >= 0, 0.5 + 0.25 * since, 0)))

    few = replace(simulated, measured=simulated.measured.copy())
    few.measured[:, column] = np.nan
    response = insight.dose_response(score, few, "Sedative", hours=10)
    np.testing.assert_allclose(response, 0.5 + 0.25 * np.arange(11), atol=1e-9)


def test_a_shape_is_told_apart_with_noise_and_the_table_scores_the_match() -> None:
    random = np.random.default_rng(0)
    hours = np.arange(49.0)
    truth = {
        "A": insight.through_window(-1.5 * cohort.exponential(hours, 8.0)),
        "B": insight.through_window(1.5 * cohort.hump(hours, 14.0)),
        "C": insight.through_window(1.2 * cohort.plateau(hours, 10.0)),
    }
    noisy = {drug: 0.8 * curve + random.normal(0, 0.05, 49) for drug, curve in truth.items()}
    flat = {drug: np.zeros(49) for drug in truth}
    rows = insight.decay_table(truth, {"noisy": noisy, "flat": flat, "truth": truth})
    table = {(row["drug"], row["model"]): row for row in rows}
    assert len(table) == 9
    for drug, shape in zip("ABC", insight.SHAPES):
        exact, near, none = (table[drug, model] for model in ("truth", "noisy", "flat"))
        assert exact["shape"] == near["shape"] == exact["true shape"] == shape
        assert exact["error"] == 0 and exact["size"] == 1 and exact["correlation"] == pytest.approx(1)
        assert near["size"] == pytest.approx(0.8, abs=0.05) and 0.15 < near["error"] < 0.3 < 0.9 < near["correlation"]
        assert none["error"] == 1 and none["size"] == 0 == none["correlation"]


def test_an_unknown_drug_or_short_stays_are_a_sentence(simulated: records.Records) -> None:
    with pytest.raises(ValueError, match="drug: expected one of Antibiotic, Steroid, Sedative; got HR"):
        insight.dose_response(cohort.true_risk, simulated, "HR")
    with pytest.raises(ValueError, match="records: expected patients who stay for more than 206 hours; got none"):
        insight.dose_response(cohort.true_risk, simulated, "Steroid", hours=200)


# ---- gates -------------------------------------------------------------------------------------------------

NAMES = ("HR", "Lactate", "Steroid", "HR measured", "Lactate measured", "Steroid measured",
         "HR age", "Lactate age", "Steroid age", "Age", "hours in ICU")  # fmt: skip


def one_patient(hours: int) -> tuple[records.Records, np.ndarray]:
    """Records of three variables, and made-up features for them."""
    random = np.random.default_rng(8)
    measured = random.normal(0, 1, (hours, 3)).astype(np.float32)
    measured[random.random(measured.shape) < [0.2, 0.8, 0.9]] = np.nan
    table = replace(
        nobody_measured(1, hours), measured=measured, variables=("HR", "Lactate", "Steroid"), doses=("Steroid",)
    )
    return table, random.normal(0, 1, (hours, len(NAMES))).astype(np.float32)


@pytest.mark.parametrize("cell", ["lstm", "lstm_peephole"])
def test_gates_are_the_cells_equations_and_their_parts_add_up(cell: str) -> None:
    network, (table, x) = trained(cell, len(NAMES)), one_patient(25)
    found = insight.gates(network, x, NAMES, table.clock, groups=3)
    weights = {name: value.astype(np.float64) for name, value in network.layer.parameters.items()}
    sign = np.where(network.head.weight[0] < 0, -1.0, 1.0)
    c, h, before = np.zeros(12), np.zeros(12), np.zeros((4, 25, 12))
    for t in range(25):
        pre = weights["weight_ih_l0"] @ x[t].astype(float) + weights["weight_hh_l0"] @ h
        pre = (pre + weights["bias_ih_l0"] + weights["bias_hh_l0"]).reshape(4, 12)
        peep = weights["weight_unit_l0"].reshape(3, 12) if cell == "lstm_peephole" else np.zeros((3, 12))
        pre[:2] += peep[:2] * c
        i, f, g = 1 / (1 + np.exp(-pre[0])), 1 / (1 + np.exp(-pre[1])), np.tanh(pre[2])
        c = f * c + i * g
        pre[3] += peep[2] * c
        h = np.tanh(c) / (1 + np.exp(-pre[3]))
        before[:, t] = pre * np.array([np.ones(12), np.ones(12), sign, np.ones(12)])
        for name, value in (("i", i), ("f", f), ("g", g * sign), ("c", c * sign), ("h", h * sign)):
            np.testing.assert_allclose(getattr(found, name)[t], value, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(found.adds.sum(axis=1), (found.h * sign) @ network.head.weight[0], atol=1e-12)

    assert found.sources == ("HR", "Lactate", "Steroid", "Age", "hours in ICU", insight.PAST)
    w = weights["weight_ih_l0"].reshape(4, 12, -1) * np.array([1, 1, 0, 1])[:, None, None]
    w[2] = weights["weight_ih_l0"].reshape(4, 12, -1)[2] * sign[:, None]
    lactate = np.einsum("qhf,tf->qth", w[:, :, [1, 4, 7]], x[:, [1, 4, 7]].astype(float))
    for k in range(3):
        units = found.group == k
        whole = before[:, :, units].mean(axis=2)
        np.testing.assert_allclose(
            found.parts[:, k].sum(axis=2), whole - whole.mean(axis=1, keepdims=True), atol=1e-6
        )  # the inverse of a saturated gate costs digits
        part = lactate[:, :, units].mean(axis=2)
        np.testing.assert_allclose(found.parts[:, k, :, 1], part - part.mean(axis=1, keepdims=True), atol=1e-9)
    np.testing.assert_allclose(found.shares().sum(axis=2), 1)


def test_the_order_of_units_changes_no_group() -> None:
    network, (table, x) = trained("lstm", len(NAMES)), one_patient(30)
    one = insight.gates(network, x, NAMES, table.clock)
    assert sorted(one.order) == list(range(12)) and (np.diff(one.group[one.order]) >= 0).all()
    kept = one.kept()
    assert (np.diff(kept) < 0).all() and kept.size == 4
    assert kept[1] == pytest.approx(np.exp(np.log(one.f[:, one.group == 1]).mean()))
    permutation = np.random.default_rng(1).permutation(12)
    rows = (np.arange(4)[:, None] * 12 + permutation).ravel()
    for name, value in network.layer.parameters.items():
        value[...] = value[rows] if value.ndim == 1 else value[rows][:, permutation] if "hh" in name else value[rows]
    network.head.weight[...] = network.head.weight[:, permutation]
    other = insight.gates(network, x, NAMES, table.clock)
    np.testing.assert_array_equal(other.group, one.group[permutation])
    np.testing.assert_allclose(other.adds, one.adds, atol=1e-5)
    assert insight.describe(other, table) == insight.describe(one, table)


def test_units_that_behave_alike_are_one_group() -> None:
    network, (table, x) = trained("lstm", len(NAMES)), one_patient(30)
    slow = np.arange(12) % 3 == 1
    for name, value in network.layer.parameters.items():
        value[...] = 0.01 * value
        if name == "bias_hh_l0":
            value[12:24] = np.where(slow, 4.0, -2.0)
    found = insight.gates(network, x, NAMES, table.clock, groups=2)
    np.testing.assert_array_equal(found.group, np.where(slow, 0, 1))
    np.testing.assert_allclose(found.kept(), 1 / (1 + np.exp([-4.0, 2.0])), rtol=0.02)
    first = [line for line in insight.describe(found, table) if line.startswith("Group 1")]
    kept = found.kept()[0]
    assert len(first) == 1 and first[0].startswith(
        f"Group 1 (4 cells of 12) keeps {100 * kept:.1f} % of its memory from an hour to the next: half of it is gone "
        f"in {np.log(0.5) / np.log(kept):.0f} hours. Its forget gate"
    )


def test_the_words_say_what_the_numbers_are() -> None:
    """A network whose every gate is known: the forget gate closes and the input gate opens on a Lactate measured."""
    network, (table, x) = trained("lstm", len(NAMES), hidden=1), one_patient(24)
    x[:] = 0
    table.measured[:] = np.nan
    table.measured[[9, 17], 1] = 2.0
    table.measured[4, 2] = 1.0
    x[[9, 17], 4], x[4, 5] = 1.0, 1.0  # Lactate measured, Steroid measured
    for value in network.layer.parameters.values():
        value[...] = 0
    network.layer.parameters["bias_ih_l0"][:] = [-2, 3, 0, 0]
    w = network.layer.parameters["weight_ih_l0"]
    w[0, 4], w[1, 4], w[2, 5], w[2, 4] = 3.0, -4.0, 1.0, -2.0
    network.head.weight[...] = -1.5
    found = insight.gates(network, x, NAMES, table.clock)
    words = insight.describe(found, table)
    kept = np.exp((22 * -np.log1p(np.exp(-3)) + 2 * -np.log1p(np.exp(1))) / 24)
    opened = (22 / (1 + np.exp(2)) + 2 / (1 + np.exp(-1))) / 24
    c, h = 0.0, []
    for t in range(24):
        lactate, steroid = t in (9, 17), t == 4
        c = c / (1 + np.exp(-3 + 4 * lactate)) + np.tanh(steroid - 2 * lactate) / (1 + np.exp(2 - 3 * lactate))
        h.append(0.5 * np.tanh(c) * -1.5)
    assert words == [
        "The network has 1 cell in 1 group, told apart by what they do in the 24 hours of this stay.",
        f"Group 1 (1 cell of 1) keeps {100 * kept:.1f} % of its memory from an hour to the next: half of it is gone in "
        f"{np.log(0.5) / np.log(kept):.1f} hours. "
        "Its forget gate, 0.95 in most hours, falls to 0.27 in hour 10, most of all by Lactate, measured that hour. "
        f"Its input gate is {opened:.2f} open in the mean, and widest (0.73) in hour 10, most of all by Lactate, "
        "measured that hour; it moves with Lactate (100 %). "
        "What its cell gate writes pushes the score up in 2 of the 24 hours, and most strongly up in hour 10, most of "
        "all by Lactate, measured that hour. "
        "Its output gate lets 50 % through in the mean (50 to 50 %), moved by no source in particular; so the group "
        f"adds between −{abs(min(h)):.1f} (hour {np.argmin(h) + 1}) and +{max(h):.1f} (hour {np.argmax(h) + 1}) to the "
        "log-odds.",
    ]


def test_of_a_network_with_classes_a_group_adds_the_slope_of_the_log_odds() -> None:
    random = np.random.default_rng(3)
    x = series(9, 20, len(NAMES), 12)
    y = [random.integers(0, 4, len(one)) for one in x]
    model = SequenceClassifier(hidden_size=6, max_epochs=1, validation_fraction=0.0, verbose=0, random_state=0).fit(
        x, y
    )
    network, (table, one) = model.network_, one_patient(15)
    positive = model.classes_ % 2 == 1
    found = insight.gates(network, one, NAMES, table.clock, 6, positive)
    exact = insight._in_float64(network.layer)
    h = exact.forward(np.ascontiguousarray(one[:, None].astype(np.float64)))[0][:, 0]

    def log_odds(h: np.ndarray) -> np.ndarray:
        z = np.exp(h @ network.head.weight.T.astype(np.float64) + network.head.bias)
        return np.log(z[:, positive].sum(axis=1) / z[:, ~positive].sum(axis=1))

    slope = insight._slope(network.head, h, positive)
    for unit in range(6):
        step = 1e-6 * (np.arange(6) == unit)
        np.testing.assert_allclose((log_odds(h + step) - log_odds(h - step)) / 2e-6, slope[:, unit], atol=1e-8)
    turned = np.where(slope.mean(axis=0) < 0, -1, 1)
    np.testing.assert_allclose(found.h, h * turned, atol=1e-12)
    np.testing.assert_allclose(found.adds.sum(axis=1), (h * slope).sum(axis=1), atol=1e-12)
    with pytest.raises(ValueError, match="network: expected one output; got 4"):
        insight.gates(network, one, NAMES, table.clock)
    with pytest.raises(ValueError, match="network: expected an output for each of 2 classes; got 4"):
        insight.gates(network, one, NAMES, table.clock, 4, positive[:2])


def test_the_words_name_hours_before_and_drugs_given() -> None:
    table, _ = one_patient(6)
    table.measured[:] = np.nan
    table.measured[[0, 1], 2] = 1.0
    parts = np.zeros((4, 1, 6, 4))
    parts[1, 0, 3, 2] = parts[1, 0, 4, 1] = -1.0
    parts[1, 0, 5, 3] = -1.0
    zeros = np.zeros((6, 1))
    found = insight.Gates(
        table.clock, zeros, zeros, zeros, zeros, zeros, zeros, np.zeros(1, int), np.zeros(1, int),
        ("HR", "Lactate", "Steroid", insight.PAST), parts, zeros,
    )  # fmt: skip
    said = [insight._why(found, table, 1, 0, t, -1) for t in range(6)]
    assert said == [
        "", "", "", ", most of all by Steroid, given 2 hours before",
        ", most of all because Lactate was not measured so far", ", out of what the network held before",
    ]  # fmt: skip


def test_the_words_name_the_hours_in_which_a_forget_gate_is_low() -> None:
    table, _ = one_patient(8)
    zeros, parts = np.zeros((8, 1)), np.zeros((4, 1, 8, 1))
    found = insight.Gates(
        table.clock, zeros, zeros, zeros, zeros, zeros, zeros, np.zeros(1, int), np.zeros(1, int),
        (insight.PAST,), parts, zeros,
    )  # fmt: skip
    for f, words in (
        ([0.9, 0.9, 0.5, 0.4, 0.6, 0.9, 0.9, 0.9], "falls to 0.40 in hours 3 to 5."),
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.4], "falls to 0.40 in hours 7 to 8."),
        ([0.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], "falls to 0.30 in hour 1."),
    ):
        assert insight._forget(found, table, 0, np.array(f)) == f"Its forget gate, 0.90 in most hours, {words}"
    assert insight._forget(found, table, 0, np.linspace(0.6, 0.65, 8)).endswith("hardly moves: 0.60 to 0.65.")


def test_gates_of_what_has_none_is_a_sentence() -> None:
    table, x = one_patient(9)
    with pytest.raises(ValueError, match=r"network: expected one layer of an LSTM in one direction; got Layer.*gru"):
        insight.gates(trained("gru", len(NAMES)), x, NAMES, table.clock)
    network = trained("lstm", len(NAMES))
    with pytest.raises(ValueError, match="names: expected one for each of 11 features; got 2"):
        insight.gates(network, x, NAMES[:2], table.clock)
    found = insight.gates(network, x, NAMES, table.clock)
    with pytest.raises(ValueError, match="patient: expected the 9 hours of the gates; got 8"):
        insight.describe(found, one_patient(8)[0])


def test_the_example_is_the_median_septic_patient_with_doses(simulated: records.Records) -> None:
    assert simulated.risk is not None
    chosen = insight.example(simulated, simulated.risk)
    ranges = list(zip(simulated.offset[:-1], simulated.offset[1:]))

    def drugs(i: int) -> int:
        given = ~np.isnan(simulated.measured[slice(*ranges[i]), len(cohort.VARIABLES) :])
        return int(given.any(axis=0).sum())

    septic = [
        i for i, (a, b) in enumerate(ranges)
        if simulated.label[a:b].any() and not simulated.label[a] and 24 <= b - a <= 72
    ]  # fmt: skip
    most = max(map(drugs, septic))
    alike = [i for i in septic if drugs(i) == most]
    highest = sorted(simulated.risk[slice(*ranges[i])].max() for i in alike)
    assert chosen in alike and most >= 2
    assert simulated.risk[slice(*ranges[chosen])].max() == highest[len(alike) // 2]
