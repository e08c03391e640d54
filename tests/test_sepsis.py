"""The sepsis study: readers, simulated cohort, features and scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from gatewise import sepsis
from gatewise.sepsis import cohort, features, records, study
from patients import everybody, real

# ---- readers -----------------------------------------------------------------------------------------------


def made_up(seed: int, patients: int) -> list[np.ndarray]:
    """float64 [T, 41] a patient, two decimals, most fields empty."""
    random = np.random.default_rng(seed)
    tables = []
    for _ in range(patients):
        hours = int(random.integers(1, 30))
        table = np.round(random.normal(50, 40, (hours, 41)), 2)
        table[:, :34][random.random((hours, 34)) < 0.7] = np.nan
        table[:, 35] = random.integers(0, 2)
        table[:, 36:38] = random.choice([0, 1, np.nan])
        table[:, 39] = np.arange(hours) + random.integers(1, 5)
        table[:, 40] = np.arange(hours) >= random.integers(0, 40)
        tables.append(table)
    return tables


def write_psv(path: Path, table: np.ndarray, header: str = "|".join(records.COLUMNS)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["|".join("NaN" if np.isnan(v) else f"{v:g}" for v in row) for row in table]
    path.write_text("\n".join([header, *lines]) + "\n")


def packed(tables: list[np.ndarray], first_id: int = 1) -> dict[str, np.ndarray]:
    """The arrays of the packed form."""
    table = np.concatenate(tables)
    arrays: dict[str, np.ndarray] = {}
    for j, name in enumerate(records.COLUMNS):
        if name in ("Gender", "ICULOS", "SepsisLabel"):
            arrays[name] = table[:, j].astype(np.int16)
        else:
            hundredths = np.round(np.nan_to_num(table[:, j]) * 100).astype(np.int32)
            arrays[name] = np.where(np.isnan(table[:, j]), -(2**31), hundredths).astype(np.int32)
    arrays["length"] = np.array([len(one) for one in tables], np.int16)
    arrays["patient_id"] = np.arange(first_id, first_id + len(tables), dtype=np.int32)
    arrays["fold"] = np.array([records.fold_of("A", f"p{i:06d}") for i in arrays["patient_id"]], np.int8)
    return arrays


def assert_equal(one: records.Records, other: records.Records) -> None:
    for name in ("measured", "background", "clock", "label", "length", "patient", "group", "fold"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype.kind == b.dtype.kind, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_both_forms_read_the_same_to_the_last_bit(tmp_path: Path) -> None:
    tables = made_up(0, 7)
    for i, table in enumerate(tables, 1):
        write_psv(tmp_path / f"psv/training/training_setA/p{i:06d}.psv", table)
    (tmp_path / "npz").mkdir()
    np.savez_compressed(tmp_path / "npz/setA.npz", **packed(tables))
    from_psv, from_npz = sepsis.read(tmp_path / "psv"), sepsis.read(tmp_path / "npz")
    assert_equal(from_psv, from_npz)
    table = np.concatenate(tables).astype(np.float32)
    np.testing.assert_array_equal(from_psv.measured, table[:, :34])
    np.testing.assert_array_equal(from_psv.background, table[:, 34:39])
    np.testing.assert_array_equal(from_psv.clock, table[:, 39])
    np.testing.assert_array_equal(from_psv.label, table[:, 40])
    assert set(from_psv.group) == {"A"}
    np.testing.assert_array_equal(np.diff(from_psv.offset), [len(one) for one in tables])


def test_two_hospitals_are_told_apart_and_a_fold_depends_on_its_patient_only(tmp_path: Path) -> None:
    tables = made_up(1, 6)
    for i, table in enumerate(tables):
        write_psv(tmp_path / f"training_set{'AB'[i % 2]}/p{i:06d}.psv", table)
    both = sepsis.read(tmp_path)
    assert both.group.tolist() == ["A", "A", "A", "B", "B", "B"]
    assert both.patient.tolist() == [f"p{i:06d}" for i in (0, 2, 4, 1, 3, 5)]
    only_b = sepsis.read(tmp_path / "training_setB")
    assert_equal(only_b, both.select(both.group == "B"))


def test_folds_are_even_and_make_three_parts() -> None:
    count = np.bincount([records.fold_of("A", f"p{i:06d}") for i in range(20_000)], minlength=20)
    assert count.size == 20
    assert (np.abs(count - 1000) < 5 * np.sqrt(1000 * 0.95)).all()
    cohort_ = cohort.simulate(300, seed=3)
    train, validation, test = cohort_.split()
    np.testing.assert_array_equal(train.astype(int) + validation + test, 1)
    assert set(cohort_.fold[test]) == {0, 1, 2, 3}
    assert set(cohort_.fold[validation]) == {4, 5}


GOOD = np.zeros((3, 41))
GOOD[:, 39] = [1, 2, 3]
ROW = "|".join(["1"] * 39 + ["1", "0"])
HEADER = "|".join(records.COLUMNS)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "expected a header line with the 41 columns; got an empty file"),
        (HEADER.replace("|pH|", "|").encode(), "expected the 41 columns .* in order; got no pH"),
        (HEADER.replace("HR|O2Sat", "O2Sat|HR").encode(), "in order; got others or another order"),
        (HEADER.encode(), "expected at least one row under the header; got none"),
        (f"{HEADER}\n{ROW}\n1|2|3".encode(), "expected 41 fields in line 3; got 3; is the file truncated"),
        (f"{HEADER}\n{ROW}|7".encode(), "expected 41 fields in line 2; got 42"),
        (f"{HEADER}\n{ROW[:-1]}?".encode(), "expected numbers or NaN in every field; got could not convert"),
        (f"{HEADER}\n{ROW[:-1]}2".encode(), "expected SepsisLabel 0 or 1; got 2"),
        (f"{HEADER}\n{ROW[:-1]}NaN".encode(), "expected SepsisLabel 0 or 1; got nan"),
        (f"{HEADER}\n{ROW}\n{ROW}".encode(), "expected ICULOS to advance by 1 a row, to 2 in row 1; got 1"),
        (b"\xff\xfe\x00", "expected text separated by |; got a byte that is no ASCII at 0"),
    ],
)
def test_a_bad_psv_file_is_named_with_what_was_expected_and_got(tmp_path: Path, text: bytes, sentence: str) -> None:
    write_psv(tmp_path / "training_setA/p000001.psv", GOOD)
    bad = tmp_path / "training_setA/p000002.psv"
    bad.write_bytes(text)
    with pytest.raises(ValueError, match=sentence.replace("|", r"\|")) as error:
        sepsis.read(tmp_path)
    assert str(error.value).startswith(str(bad))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pH": None}, "expected an array for each of the 41 columns .*; got no pH"),
        ({"fold": None}, "got no fold"),
        ({"HR": np.zeros(2, np.int32)}, r"expected HR to be integers \(3,\); got int32 \(2,\)"),
        ({"HR": np.zeros(3)}, r"expected HR to be integers \(3,\); got float64"),
        ({"fold": np.array([20], np.int8)}, "expected folds 0..19; got 20..20"),
        (
            {"length": np.array([0], np.int16)},
            "expected at least one row for each patient; got a length of 0",
        ),
        ({"SepsisLabel": np.array([0, 1, 3])}, "expected SepsisLabel 0 or 1; got 3 in row 2"),
        ({"ICULOS": np.array([1, 2, 4])}, "expected ICULOS to advance by 1 a row, to 3 in row 2; got 4"),
    ],
)
def test_a_bad_packed_set_is_named_with_what_was_expected_and_got(
    tmp_path: Path, change: dict[str, np.ndarray | None], sentence: str
) -> None:
    arrays = {name: array for name, array in {**packed([GOOD]), **change}.items() if array is not None}
    np.savez(tmp_path / "setA.npz", **arrays)
    with pytest.raises(ValueError, match=sentence) as error:
        sepsis.read(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "setA.npz"))


def test_a_truncated_or_damaged_archive_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "setA.npz"
    np.savez_compressed(path, **packed(made_up(0, 20)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"setA.npz: expected a readable .npz archive; got a file that is no zip"):
        sepsis.read(tmp_path)
    damaged = bytearray(whole)
    damaged[200:260] = bytes(60)  # inside the first array
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"setA.npz: expected a readable .npz archive; got \w+: "):
        sepsis.read(tmp_path)


def test_nothing_to_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a directory .* there is none"):
        sepsis.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"\*.psv files; found neither"):
        sepsis.read(tmp_path)


# ---- simulated cohort --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated() -> records.Records:
    return cohort.simulate(3000, seed=1)


def test_a_seed_makes_a_cohort(simulated: records.Records) -> None:
    assert_equal(cohort.simulate(200, seed=5), cohort.simulate(200, seed=5))
    assert not np.array_equal(cohort.simulate(200, seed=6).length, cohort.simulate(200, seed=5).length)
    assert simulated.measured.dtype == np.float32
    assert simulated.length.min() >= 1
    with pytest.raises(ValueError, match="patients: expected at least 100; got 3"):
        cohort.simulate(3)


def test_effects_of_a_dose_run_as_they_are_called() -> None:
    hours = np.arange(0.0, 200.0)
    fading = cohort.exponential(hours, 8.0)
    assert fading[0] == 1
    np.testing.assert_allclose(fading[8:] / fading[:-8], 0.5)
    delayed = cohort.hump(hours, 14.0)
    assert delayed[0] == 0 and delayed.argmax() == 14 and delayed[14] == pytest.approx(1)
    assert (np.diff(delayed[:15]) > 0).all() and (np.diff(delayed[14:]) < 0).all()
    flat = cohort.plateau(hours, 10.0)
    np.testing.assert_allclose(flat[:8], 1, atol=0.03)
    np.testing.assert_allclose(flat[13:], 0, atol=0.03)
    assert flat[10] == pytest.approx(0.5)


def test_the_true_risk_is_the_frequency_of_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all, and in every tenth of the risk and of the stay, as many labels are 1 as the risk says.

    Labels of a patient overlap, so deviations are summed by patient; patients are independent. Sepsis is made
    more frequent, so that a horizon wrong by one hour is many standard deviations off.
    """
    monkeypatch.setattr(cohort, "BASE", cohort.BASE + 2)
    table = cohort.simulate(4000, seed=1)
    assert table.risk is not None
    hour = np.arange(table.label.size) - table.first_row
    tenths = [np.array_split(np.argsort(by, kind="stable"), 10) for by in (table.risk, hour)]
    for rows in (slice(None), *tenths[0], *tenths[1]):
        off = np.zeros(table.label.size)
        off[rows] = table.label[rows] - table.risk[rows]
        by_patient = np.add.reduceat(off, table.offset[:-1])
        # Where hardly anybody is septic the sample tells too little of its own deviation: then Poisson's.
        deviation = np.sqrt(max(np.square(by_patient).sum(), cohort.HORIZON * table.risk[rows].sum()))
        assert abs(by_patient.sum()) < 4 * deviation


def test_no_score_of_the_record_beats_the_true_risk(simulated: records.Records) -> None:
    """The true risk blunted in any way, and every column by itself, ranks worse."""
    risk, label = simulated.risk, simulated.label
    assert risk is not None
    best, best_precision = study.areas(label, risk)
    random = np.random.default_rng(0)
    hour_before = np.where(np.arange(risk.size) > simulated.first_row, np.roll(risk, 1), risk.mean())
    train = simulated.split()[0]
    columns = features.build(simulated, train).matrix.astype(np.float64)
    for other in (risk * np.exp(random.normal(0, 0.5, risk.size)), hour_before, *columns.T, *-columns.T):
        auroc, auprc = study.areas(label, other)
        assert auroc < best and auprc < best_precision


def test_doses_are_in_the_record_and_move_the_risk(simulated: records.Records) -> None:
    """Some hours after a dose the risk has moved from that of the hour before it, the way of the drug."""
    assert simulated.risk is not None
    log_odds = np.log(simulated.risk / (1 - simulated.risk))
    for drug, after in (("Antibiotic", 6), ("Steroid", 18), ("Sedative", 8)):
        given = ~np.isnan(simulated.measured[:, simulated.variables.index(drug)])
        rows = np.flatnonzero(given)
        last = simulated.first_row + np.repeat(simulated.length, simulated.length) - 1
        rows = rows[(rows - 1 >= simulated.first_row[rows]) & (rows + after <= last[rows])]
        moved = log_odds[rows + after] - log_odds[rows - 1]
        hazard = next(one.hazard for one in cohort.DRUGS if one.name == drug)
        assert np.sign(moved.mean()) == np.sign(hazard)
        assert abs(moved.mean()) > 5 * moved.std() / np.sqrt(rows.size)
    assert set(simulated.doses) == {drug.name for drug in cohort.DRUGS}


# ---- features ----------------------------------------------------------------------------------------------


def by_hand(table: records.Records, cap: float) -> tuple[np.ndarray, np.ndarray]:
    """The definition: the value last measured [R, V] (NaN: never) and the hours since, row by row."""
    value = np.full_like(table.measured, np.nan)
    hours = np.full_like(table.measured, cap)
    for start, end in zip(table.offset[:-1], table.offset[1:]):
        for j in range(table.measured.shape[1]):
            for t in range(start, end):
                for back in range(t, start - 1, -1):
                    if not np.isnan(table.measured[back, j]):
                        value[t, j], hours[t, j] = table.measured[back, j], min(t - back, cap)
                        break
    return value, hours


def test_features_are_the_last_value_the_mask_and_the_hours_since() -> None:
    table = cohort.simulate(100, seed=2)
    train = np.arange(100) < 70
    built = features.build(table, train)
    value, hours = by_hand(table, features.CAP)
    v = len(table.variables)
    train_value = value[table.rows_of(train)].astype(np.float64)
    normal = (value - np.nanmean(train_value, axis=0)) / np.nanstd(train_value, axis=0)
    expected = np.nan_to_num(normal).clip(-features.LIMIT, features.LIMIT)
    np.testing.assert_allclose(built.matrix[:, :v], expected, atol=1e-5)
    np.testing.assert_array_equal(built.matrix[:, v : 2 * v], ~np.isnan(table.measured))
    np.testing.assert_allclose(built.matrix[:, 2 * v : 3 * v], hours / features.CAP, rtol=1e-6)
    assert built.matrix.shape == (table.label.size, len(built.names)) and built.matrix.dtype == np.float32


def test_sequences_are_views_of_the_matrix() -> None:
    table = cohort.simulate(100, seed=2)
    chosen = np.arange(100) % 3 == 0
    built = features.build(table, chosen)
    sequences = built.sequences(chosen)
    assert [len(one) for one in sequences] == table.length[chosen].tolist()
    assert all(np.shares_memory(one, built.matrix) for one in sequences)
    np.testing.assert_array_equal(np.concatenate(sequences), built.matrix[table.rows_of(chosen)])


def test_normalisation_knows_the_training_patients_only() -> None:
    table = cohort.simulate(200, seed=4)
    train, _, _ = table.split()
    other = replace(table, measured=table.measured.copy())
    rows = table.rows_of(train)
    other.measured[~rows] *= 3
    one, two = features.build(table, train).matrix, features.build(other, train).matrix
    np.testing.assert_array_equal(one[rows], two[rows])
    assert not np.array_equal(one[~rows], two[~rows])


def test_a_preparation_refuses_other_variables() -> None:
    table = cohort.simulate(100, seed=2)
    prepare = features.fit(table)
    without = replace(table, measured=table.measured[:, 1:], variables=table.variables[1:])
    with pytest.raises(ValueError, match=r"expected the variables of the training patients, \('HR', .*; got \('MAP', "):
        prepare(without)
    with pytest.raises(ValueError, match=r"background_names of the training patients, \('Age', .*; got \('Gender',\)"):
        prepare(replace(table, background=table.background[:, 1:], background_names=("Gender",)))


def test_garbage_in_fio2_is_cut_to_what_a_fraction_can_be(tmp_path: Path) -> None:
    tables = made_up(3, 30)
    garbage = [-50.0, 40.0, 4000.0, 0.5, 1.0]
    for table in tables:
        table[:, records.MEASURED.index("FiO2")] = np.resize(garbage, len(table))
    np.savez(tmp_path / "setA.npz", **packed(tables))
    table = sepsis.read(tmp_path)
    built = features.build(table, np.ones(30, bool))
    column = built.matrix[:, records.MEASURED.index("FiO2")]
    raw = table.measured[:, records.MEASURED.index("FiO2")]
    assert np.unique(column[raw >= 1]).size == 1
    assert column[raw == -50].max() < column[raw == 0.5].min() < column[raw >= 1].min()


# ---- the real records --------------------------------------------------------------------------------------


@real
def test_the_real_records_are_those_published() -> None:
    a, b = (everybody().select(everybody().group == group) for group in "AB")
    assert (a.length.size, a.label.size, int(a.label.sum())) == (20_336, 790_215, 17_136)
    assert (b.length.size, b.label.size, int(b.label.sum())) == (20_000, 761_995, 10_780)
    assert (a.patient[0], b.patient[0], a.length.min(), a.length.max()) == ("p000001", "p100001", 8, 336)
    missing = np.isnan(a.measured).mean(axis=0)
    assert missing[records.MEASURED.index("Lactate")] == pytest.approx(0.966, abs=5e-4)
