"""The study: what is kept and resumed, what its tables say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the study needs scikit-learn: pip install "gatewise[demo]"')

from gatewise.sepsis import cohort, metrics, models, records, study, tasks

NAMES = ("logistic regression", "RNN")
OPTIONS = {"max_epochs": 2, "hidden_size": 4, "num_threads": 1}


@pytest.fixture(scope="module")
def simulated() -> records.Records:
    return cohort.simulate(300, seed=5)


@pytest.fixture(scope="module")
def outcome(simulated: records.Records) -> study.Outcome:
    return study.run_task(study.Store(None), simulated, "official", NAMES, seeds=2, say=lambda line: None, **OPTIONS)


# ---- what is kept ------------------------------------------------------------------------------------------


def test_a_store_computes_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {"curve": np.array([0.1, np.nan]), "words": ["a", "b"], "seconds": 1.5}

    for _ in range(2):
        kept = study.Store(tmp_path / "models", "one").get("task LSTM 0", compute)
        np.testing.assert_array_equal(kept["curve"], [0.1, np.nan])
        assert kept["words"] == ["a", "b"] and kept["seconds"] == 1.5 and set(kept) == {"curve", "words", "seconds"}
    assert len(calls) == 1
    study.Store(tmp_path / "models", "another").get("task LSTM 0", compute)
    assert len(calls) == 2
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["task-LSTM-0.npz"]


def test_names_that_differ_in_a_bracket_have_files_of_their_own(tmp_path: Path) -> None:
    store = study.Store(tmp_path)
    names = ("AR(1)", "AR(6)", "GLM AR(1)", "official all LSTM 0", "official all LSTM peephole 0")
    for number, name in enumerate(names):
        store.get(name, lambda number=number: {"number": number})
    assert [store.get(name, dict)["number"] for name in names] == list(range(len(names)))


@pytest.mark.parametrize("damage", [b"", b"no archive", b"PK\x03\x04 half of one"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: bytes) -> None:
    store = study.Store(tmp_path)
    store.get("LSTM", lambda: {"number": 1})
    (tmp_path / "LSTM.npz").write_bytes(damage)
    assert store.get("LSTM", lambda: {"number": 2}) == {"number": 2}
    assert store.get("LSTM", lambda: {"number": 3}) == {"number": 2}


def test_a_study_that_was_stopped_goes_on(
    simulated: records.Records, outcome: study.Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the third training, it trains the third one only, and gives what an unstopped one does."""
    trained = []
    train = models.train

    def stops(name: str, *rest: object, **options: object) -> models.Model:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(name)
        return train(name, *rest, **options)  # type: ignore[arg-type]

    def run() -> study.Outcome:
        store = study.Store(tmp_path, study.digest(simulated))
        return study.run_task(store, simulated, "official", NAMES, seeds=2, say=lambda line: None, **OPTIONS)

    monkeypatch.setattr(models, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        run()
    trained.clear()
    found = run()
    assert trained == ["RNN"]
    for name, runs in outcome.runs.items():
        for one, other in zip(runs, found.runs[name]):
            np.testing.assert_array_equal(one.test, other.test)
            np.testing.assert_array_equal(one.validation, other.validation)
            assert one.parameters == other.parameters
    trained.clear()
    run()
    assert not trained


def test_a_digest_knows_every_number_of_the_records(simulated: records.Records) -> None:
    one = study.digest(simulated, {"max_epochs": 2})
    measured = simulated.measured.copy()
    measured[-1, 0] += 1
    assert study.digest(replace(simulated, measured=measured), {"max_epochs": 2}) != one
    assert study.digest(simulated, {"max_epochs": 3}) != one
    assert study.digest(simulated, {"max_epochs": 2}) == one


def test_what_is_found_in_a_model_is_kept_with_its_scores(simulated: records.Records, tmp_path: Path) -> None:
    def examine(model: models.Model, preparation: object, rows: models.Rows) -> dict[str, object]:
        return {"rows": rows.label.size, "curve": model.score(rows)[:3]}

    store = study.Store(tmp_path)
    for _ in range(2):
        found = study.run_task(store, simulated, "official", NAMES[:1], examine=examine, say=lambda line: None)
        (run,) = found.runs["logistic regression"]
        assert run.examined["rows"] == found.test.label.size
        np.testing.assert_array_equal(run.examined["curve"], run.test[:3])


# ---- tables ------------------------------------------------------------------------------------------------


def test_scores_are_the_mean_of_the_seeds_and_the_truth(outcome: study.Outcome) -> None:
    scores = outcome.scores()
    assert list(scores) == [study.BEST, *NAMES]
    np.testing.assert_array_equal(scores[study.BEST], outcome.test.risk)
    one, two = outcome.runs["RNN"]
    assert one.seed == 0 and two.seed == 1 and not np.array_equal(one.test, two.test)
    np.testing.assert_allclose(scores["RNN"], (one.test + two.test) / 2)


def test_the_table_says_what_the_scores_do(outcome: study.Outcome) -> None:
    table = {row["model"]: row for row in study.table(outcome, replicates=40)}
    scores, label = outcome.scores(), outcome.test.label
    for name, row in table.items():
        assert (row["AUROC"], row["AUPRC"]) == metrics.areas(label, scores[name])
        assert row["AUROC low"] < row["AUROC"] < row["AUROC high"]
    base = table["logistic regression"]
    assert base["AUROC gained"] == base["AUROC gained low"] == base["AUROC gained high"] == 0
    assert table["RNN"]["AUROC gained"] == table["RNN"]["AUROC"] - base["AUROC"]
    assert table[study.BEST]["AUROC gained low"] > 0  # the truth ranks better in nearly every replicate
    assert table["RNN"]["AUROC a seed"] == " ".join(
        f"{metrics.areas(label, run.test)[0]:.3f}" for run in outcome.runs["RNN"]
    )
    assert table["RNN"]["kind"] == "recurrent" and table["RNN"]["parameters"] == 4 * (36 + 4 + 2) + 4 + 1


def test_the_threshold_of_the_utility_is_of_the_validation_patients(outcome: study.Outcome) -> None:
    scores = np.mean([run.test for run in outcome.runs["RNN"]], axis=0)
    validation = np.mean([run.validation for run in outcome.runs["RNN"]], axis=0)
    threshold = tasks.best_threshold(outcome.validation, validation)
    assert study.utility(outcome, "RNN") == tasks.utility(outcome.test, scores >= threshold)
    best_of_test = tasks.utility(outcome.test, scores >= tasks.best_threshold(outcome.test, scores))
    assert study.utility(outcome, "RNN") <= best_of_test


def test_subgroups_are_parts_of_the_test_patients(outcome: study.Outcome) -> None:
    rows = {row["patients"]: row for row in study.subgroups(outcome, ["RNN"])}
    for parts in (["men", "women"], [name for name in rows if name.startswith("age")], ["hospital simulated"]):
        assert sum(rows[part]["number"] for part in parts) == outcome.test.length.size
        assert sum(rows[part]["hours"] for part in parts) == outcome.test.label.size
    men = outcome.test.background[:, outcome.test.background_names.index("Gender")] == 1
    expected = metrics.areas(outcome.test.label[men], outcome.scores()["RNN"][men])
    assert (rows["men"]["auroc RNN"], rows["men"]["auprc RNN"]) == expected


def test_one_hospital_is_trained_on_and_all_are_tested(simulated: records.Records) -> None:
    hospital = np.where(np.arange(simulated.length.size) % 2, "A", "B")
    both = replace(simulated, group=hospital)
    train, validation, test = study.parts(both, trained_on="A")
    assert (hospital[train] == "A").all() and (hospital[validation] == "A").all()
    np.testing.assert_array_equal(test, both.split()[2])
    assert set(hospital[test]) == {"A", "B"}


def test_a_split_without_sepsis_is_a_sentence(simulated: records.Records) -> None:
    nobody = simulated.select(np.isin(simulated.fold, records.TEST_FOLDS))
    with pytest.raises(ValueError, match=r"training patients: expected hours of label 0 .* got 0 hours, 0 of"):
        study.parts(nobody)


# ---- what networks are taught beside the label -------------------------------------------------------------


def test_stages_are_hours_to_the_onset() -> None:
    """A record of 70 hours, positive from row 59 on: the onset is row 65."""
    table = cohort.simulate(100, seed=2)
    label = np.zeros(70, np.int8)
    label[59:] = 1
    one = replace(
        table, measured=table.measured[:70], background=table.background[:70], clock=np.arange(70, dtype=np.float32),
        label=label, length=np.array([70]), patient=table.patient[:1], group=table.group[:1], fold=table.fold[:1],
        risk=None,
    )  # fmt: skip
    hours = 65 - np.arange(70)
    expected = np.select([label == 1, hours <= 12, hours <= 24, hours <= 48], [4, 3, 2, 1], 0)
    np.testing.assert_array_equal(tasks.stage(one), expected)
    never = replace(one, label=np.zeros(70, np.int8))
    assert (tasks.stage(never) == 0).all()


def test_a_network_taught_stages_scores_the_label(simulated: records.Records) -> None:
    """Its probabilities are of the label: calibrated in the mean, and of as many classes as occur."""
    outcome = study.run_task(
        study.Store(None), simulated, "official", ["GRU"], say=lambda line: None, stages=True,
        max_epochs=6, hidden_size=8, learning_rate=1e-2, num_threads=1,
    )  # fmt: skip
    (run,) = outcome.runs["GRU"]
    assert ((run.test >= 0) & (run.test <= 1)).all()
    assert run.test.mean() == pytest.approx(outcome.test.label.mean(), rel=0.5)
    assert metrics.areas(outcome.test.label, run.test)[0] > 0.6
    assert run.parameters == 3 * 8 * (36 + 8 + 2) + 5 * (8 + 1)
