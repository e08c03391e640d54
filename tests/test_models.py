"""The models of the study: none sees the future, each is what an independent computation says it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("statsmodels")

from threadpoolctl import threadpool_limits

from gatewise.sepsis import cohort, features, models, records, study
from patients import cut, disturb, everybody, real

NETWORK = {"max_epochs": 2, "hidden_size": 8, "batch_size": 32, "learning_rate": 1e-2, "verbose": 0}


def options(name: str) -> dict[str, Any]:
    return NETWORK if models.MODELS[name].kind == "recurrent" else {}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Little of everything; and one thread, for scikit-learn's wait for each other longer than these few rows take."""
    with threadpool_limits(1), pytest.MonkeyPatch.context() as patch:
        for name, little in (("TREES", 20), ("SVM_HOURS", 300), ("MLP_EPOCHS", 6)):
            patch.setattr(models, name, little)
        yield


@pytest.fixture(scope="module")
def table() -> records.Records:
    return cohort.simulate(400, seed=7)


@pytest.fixture(scope="module")
def preparation(table: records.Records) -> features.Preparation:
    return features.fit(table.select(table.split()[0]))


def three(table: records.Records, preparation: features.Preparation, task: str = "official") -> list[models.Rows]:
    return [models.rows(table.select(part), preparation, task) for part in table.split()]


@pytest.fixture(scope="module")
def part(table: records.Records, preparation: features.Preparation) -> list[models.Rows]:
    """Of a task that leaves rows out."""
    return three(table, preparation, "next_day")


def with_septic(part: list[models.Rows], share: float) -> list[models.Rows]:
    """As if a fifth of the patients had been septic for the last hours of their record, such a share of label 1."""
    made, random = [], np.random.default_rng(0)
    for rows in part:
        hour = np.arange(len(rows.label)) - rows.first_row
        length = np.diff(rows.offset)
        ill = np.repeat(np.arange(length.size) % 5 == 0, length)
        known = ill & (hour >= np.repeat(length, length) - 9)
        label = np.where(known, random.random(known.size) < share, rows.label).astype(np.int8)
        made.append(replace(rows, septic_before=known, label=label, counts=rows.counts | known))
    return made


# ---- no look ahead -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_no_model_knows_the_future(name: str, table: records.Records, preparation: features.Preparation) -> None:
    """Cut the test records, then disturb their later hours: the scores of the hours before stay, to the last bit."""
    train, validation, test = three(table, preparation)
    how = {**options(name), "stages": True} if name == "GRU" else options(name)
    model = models.train(name, train, validation, 0, **how)
    unseen = table.select(table.split()[2])
    before = model.score(test)
    assert before.dtype == np.float64 and before.shape == test.label.shape
    assert (before >= 0).all() and (before <= 1).all()
    for hours in (1, 5, 20):
        first = np.arange(before.size) - unseen.first_row < hours
        for change in (cut, disturb):
            changed = change(unseen, hours)
            later = models.rows(changed, preparation, "official")
            kept = np.arange(changed.label.size) - changed.first_row < hours
            assert later.x[kept].tobytes() == test.x[first].tobytes()
            assert model.score(later)[kept].tobytes() == before[first].tobytes(), (change.__name__, hours)


def test_a_network_that_reads_backwards_is_refused_because_it_sees_the_future(
    table: records.Records, preparation: features.Preparation
) -> None:
    """The refusal, and what it guards against: the same estimator moves past scores when the future moves."""
    from gatewise import SequenceClassifier

    train, validation, test = three(table, preparation)
    with pytest.raises(ValueError, match="bidirectional: expected False: the backward direction reads the hours after"):
        models.train("LSTM", train, validation, 0, bidirectional=True)
    network = SequenceClassifier("lstm", bidirectional=True, random_state=0, validation_fraction=0, **NETWORK)
    network.fit(train.sequences(train.x), train.sequences(train.label))
    later = models.rows(disturb(table.select(table.split()[2]), 5), preparation, "official")
    one, other = (network.predict_proba(some.sequences(some.x)) for some in (test, later))
    moved = [not np.array_equal(a[:5], b[:5]) for a, b in zip(one, other) if len(a) > 5]
    assert all(moved) and len(moved) > 20


# ---- against an independent computation ----------------------------------------------------------------------


def test_logistic_regression_is_that_of_scikit_learn(part: list[models.Rows]) -> None:
    from sklearn.linear_model import LogisticRegression

    train, validation, test = part
    scale = np.maximum(train.x[train.counts].std(axis=0), 1e-6)
    peer = LogisticRegression(tol=1e-9, max_iter=5000).fit(
        (train.x[train.counts] / scale).astype(np.float64), train.label[train.counts]
    )
    expected = peer.predict_proba((test.x / scale).astype(np.float64))[:, 1]
    got = models.train("logistic regression", train, validation, 0)
    np.testing.assert_allclose(got.score(test), expected, rtol=1e-4, atol=1e-6)
    assert got.parameters == train.x.shape[1] + 1


def test_gradient_boosting_is_that_of_scikit_learn_on_the_sample(part: list[models.Rows]) -> None:
    from sklearn.ensemble import HistGradientBoostingClassifier

    train, validation, test = part
    index, shift = models._sample(train, models.TREES_PER_POSITIVE, 3)
    peer = HistGradientBoostingClassifier(
        learning_rate=0.06, max_iter=models.TREES, early_stopping=False, random_state=3
    )
    odds = odds_of(peer.fit(train.x[index], train.label[index]).predict_proba(test.x)[:, 1])
    got = models.train("gradient boosting", train, validation, 3)
    np.testing.assert_allclose(odds_of(got.score(test)), odds * np.exp(shift), rtol=1e-6)
    assert f"trained on {index.size:,} of {train.counts.sum():,} hours" in got.note


def odds_of(p: np.ndarray) -> np.ndarray:
    return p / (1 - p)


def test_scores_that_are_no_probabilities_are_calibrated_on_the_validation_patients(part: list[models.Rows]) -> None:
    """Naive Bayes and both SVMs: scikit-learn's own score, through a logistic regression on validation alone."""
    from sklearn.linear_model import LogisticRegression, SGDClassifier
    from sklearn.naive_bayes import GaussianNB
    from sklearn.svm import SVC

    train, validation, test = part
    x, label = train.x[train.counts], train.label[train.counts]
    scale = np.maximum(x.std(axis=0), 1e-6)
    linear = SGDClassifier(
        "hinge", alpha=1e-5, class_weight="balanced", average=True, max_iter=5, tol=None, random_state=0
    ).fit(x / scale, label)
    bayes = GaussianNB().fit(x, label)
    index, _ = models._sample(train, 1, 0, models.SVM_HOURS)
    kernel = SVC(gamma=1 / (x.shape[1] * train.x[index].var())).fit(train.x[index], train.label[index])

    def log_odds(x: np.ndarray) -> np.ndarray:
        odds = np.diff(bayes.predict_joint_log_proba(x.astype(np.float64)), axis=1)[:, 0]
        return np.sign(odds) * np.log1p(np.abs(odds))

    for name, score in (
        ("naive Bayes", log_odds),
        ("linear SVM", lambda x: linear.decision_function(x / scale)),
        ("RBF SVM", kernel.decision_function),
    ):
        spread = score(validation.x).std()
        z, unseen = score(validation.x)[validation.counts, None] / spread, score(test.x)[:, None] / spread
        # With a penalty of 1 on the slope against thousands of hours, as our calibration has it.
        expected = LogisticRegression(tol=1e-10).fit(z, validation.label[validation.counts]).predict_proba(unseen)[:, 1]
        model = models.train(name, train, validation, 0)
        np.testing.assert_allclose(model.score(test), expected, rtol=2e-3, err_msg=name)
        assert "on the validation patients (Platt)" in model.note


def test_the_mlp_is_that_of_scikit_learn_after_its_best_epoch(
    part: list[models.Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn import neural_network

    train, validation, test = part
    made: list[Any] = []
    original = neural_network.MLPClassifier

    def recorded(*args: Any, **options: Any) -> Any:
        made.append(original(*args, **options))
        return made[-1]

    model = models.train("MLP", train, validation, 0)
    losses = [epoch["val_loss"] for epoch in model.history]
    best = int(np.argmin(losses))
    assert len(losses) == min(models.MLP_EPOCHS, best + 1 + models.MLP_PATIENCE)
    p = model.score(validation)[validation.counts]
    label = validation.label[validation.counts]
    assert -np.log(np.where(label == 1, p, 1 - p)).mean() == pytest.approx(losses[best], rel=1e-6)

    monkeypatch.setattr(neural_network, "MLPClassifier", recorded)
    monkeypatch.setattr(models, "MLP_EPOCHS", best + 1)  # the same epochs again, so the estimator ends with the best
    again = models.train("MLP", train, validation, 0)
    assert again.score(test).tobytes() == model.score(test).tobytes()
    _, shift = models._sample(train, models.MLP_PER_POSITIVE, 0)
    odds = odds_of(made[0].predict_proba(test.x)[:, 1].astype(np.float64))
    np.testing.assert_allclose(odds_of(model.score(test)), odds * np.exp(shift), rtol=1e-4)
    assert model.parameters == sum(w.size for w in (*made[0].coefs_, *made[0].intercepts_))


def lagged(values: np.ndarray, rows: models.Rows, back: int) -> np.ndarray:
    """Patient by patient so many hours before, 0 before the record."""
    parts = []
    for one in rows.sequences(values):
        moved = np.zeros(one.shape)
        moved[back:] = one[: max(len(one) - back, 0)]
        parts.append(moved)
    return np.concatenate(parts)


@pytest.mark.parametrize("order", [1, 6])
def test_an_autoregression_is_the_frequency_of_its_lags(order: int, part: list[models.Rows]) -> None:
    train, validation, test = with_septic(part, 0.6)
    score = models.train(f"AR({order})", train, validation, 0).score(test)
    patterns = [
        np.stack([lagged(rows.septic_before, rows, back) for back in range(order)], axis=1) for rows in (train, test)
    ]
    for row in range(0, len(score), 7):
        same = (patterns[0] == patterns[1][row]).all(axis=1) & train.counts
        assert score[row] == (train.label[same].mean() if same.any() else train.label[train.counts].mean())
    assert np.unique(score).size == order + 1  # sepsis stays, so the lags have so many patterns


@pytest.mark.parametrize(("name", "share"), [("GLM AR(1)", 1.0), ("GLM covariates", 0.6), ("GLM lags", 1.0)])
def test_a_glm_is_that_of_statsmodels_on_a_design_made_by_hand(
    name: str, share: float, part: list[models.Rows]
) -> None:
    """Also where every hour after the onset is of label 1, and the likelihood has no maximum."""
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_linear_model import GLM

    train, validation, test = with_septic(part, share)
    designs = []
    for rows in (train, test):
        column = {one: rows.x[:, j].astype(np.float64) for j, one in enumerate(rows.names)}
        measured = [one.name for one in cohort.VARIABLES]
        columns = [np.ones(len(rows.label)), rows.septic_before]
        if name != "GLM AR(1)":
            columns += [column[one] for one in (*measured, "Age", "Gender", "hours in ICU")]
            windows = {0: range(1)}
            if name == "GLM lags":
                windows |= {6: range(1, 7), 12: range(7, 13), 24: range(13, 25)}
            for back, hours in windows.items():
                columns += [lagged(column[one], rows, back) for one in measured] if back else []
                for drug in rows.doses:
                    given = column[f"{drug} measured"]
                    columns.append(sum(lagged(given, rows, hour) for hour in hours))
                    columns.append(sum(lagged(given * column[drug], rows, hour) for hour in hours))
        designs.append(np.stack(columns, axis=1))
    index, shift = models._sample(train, models.GLM_PER_POSITIVE, 0)
    k = designs[0].shape[1]
    prior = np.repeat(np.eye(k)[1:], 2, axis=0)
    x, y = np.concatenate([designs[0][index], prior]), np.append(train.label[index], np.arange(2 * k - 2) % 2)
    weight = np.where(np.arange(len(y)) < index.size, 1.0, 0.5)
    fitted = GLM(y, x, family=Binomial(), freq_weights=weight).fit(tol=1e-12, maxiter=200)
    odds = odds_of(fitted.predict(designs[1])) * np.exp(shift)
    model = models.train(name, train, validation, 0)
    np.testing.assert_allclose(odds_of(model.score(test)), odds, rtol=1e-6)
    assert model.parameters == k


def test_of_hours_at_risk_an_autoregression_knows_the_base_rate_only(
    table: records.Records, preparation: features.Preparation
) -> None:
    """Nobody's sepsis has begun, so its lags say nothing; a GLM's coefficient of them is 0, and nothing fails."""
    train, validation, test = three(table, preparation, "next_day")
    rate = train.label[train.counts].mean()
    for name in ("AR(1)", "AR(6)", "GLM AR(1)"):
        score = models.train(name, train, validation, 0).score(test)[test.counts]
        np.testing.assert_allclose(score, rate, rtol=1e-6, err_msg=name)


def test_a_sample_holds_every_positive_hour_and_its_correction(part: list[models.Rows]) -> None:
    train = part[0]
    index, shift = models._sample(train, 4, 0)
    assert (np.diff(index) > 0).all() and train.counts[index].all()
    positive, negative = (int((train.label[train.counts] == one).sum()) for one in (1, 0))
    assert train.label[index].sum() == positive and index.size == 5 * positive
    assert shift == pytest.approx(np.log(4 * positive / negative))
    few, more = models._sample(train, 1, 0, positives=20)
    assert train.label[few].sum() == 20 and few.size == 40 and more == pytest.approx(np.log(positive / negative))
    everything, none = models._sample(train, 10**6, 0)
    assert everything.size == train.counts.sum() and none == 0
    assert not np.array_equal(models._sample(train, 4, 1)[0], index)


# ---- what each family can know -------------------------------------------------------------------------------

HOURS, PATIENTS = 48, 150


def planted(signal: str, seed: int) -> models.Rows:
    """A pulse and a drug given at random; the label is frequent where the signal is, and rare elsewhere.

    Neither masks nor hours since tell of the past, and every dose is the same: its value carried forward says nothing.
    """
    random = np.random.default_rng(seed)
    pulse = random.normal(size=(PATIENTS, HOURS))
    given = random.random((PATIENTS, HOURS)) < 0.03
    begun = np.repeat(random.random((PATIENTS, 1)) < 0.5, HOURS, axis=1)  # no hour tells of it
    before = np.cumsum(given, axis=1)
    earlier = np.zeros(given.shape)  # doses 5 to 12 hours back
    earlier[:, 5:] = before[:, : HOURS - 5]
    earlier[:, 13:] -= before[:, : HOURS - 13]
    sign = {"pulse now": pulse > 1, "dose before": earlier > 0, "known sepsis": begun}[signal]
    label = random.random(sign.shape) < np.where(sign, 0.6, 0.03)
    nothing = np.zeros((PATIENTS, HOURS))
    x = np.stack([pulse, nothing, nothing, given, nothing, nothing], axis=-1).reshape(-1, 6).astype(np.float32)
    names = ("Pulse", "Drug", "Pulse measured", "Drug measured", "Pulse age", "Drug age")
    offset = np.arange(PATIENTS + 1) * HOURS
    every = np.ones(label.size, bool)
    label = label.ravel().astype(np.int8)
    return models.Rows(x, names, offset, label, every, begun.ravel(), stage=np.zeros_like(label), doses=("Drug",))


@pytest.mark.parametrize("signal", ["pulse now", "dose before", "known sepsis"])
def test_each_family_finds_what_it_can_know_and_nothing_else(signal: str) -> None:
    """The story's claims on three planted signals. Who can know a signal ranks well by it; who cannot ranks as if the
    labels were other patients', whose AUROC varies by so many standard deviations."""
    from sklearn.metrics import roc_auc_score

    train, validation, test = (planted(signal, seed) for seed in range(3))
    random = np.random.default_rng(3)
    others = [random.permutation(test.label.reshape(PATIENTS, HOURS)).ravel() for _ in range(20)]
    for name, spec in models.MODELS.items():
        knows = {
            "non-temporal": {"pulse now"},
            "autoregressive": {"known sepsis"},
            "GLM": {"known sepsis"} | ({"pulse now"} if name != "GLM AR(1)" else set()),
            "recurrent": {"pulse now", "dose before"},
        }[spec.kind] | ({"dose before"} if name == "GLM lags" else set())
        epochs = 24 if signal == "dose before" else 6
        more = {"max_epochs": epochs, "hidden_size": 16, "batch_size": 16, "learning_rate": 0.02, "patience": None}
        model = models.train(name, train, validation, 0, **(options(name) and {**NETWORK, **more}))
        score = model.score(test)
        auroc = roc_auc_score(test.label, score)
        if signal in knows:
            assert auroc > 0.75, name
        else:
            chance = [roc_auc_score(label, score) for label in others]
            assert abs(auroc - np.mean(chance)) <= 4 * np.std(chance), name


# ---- what is learned from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_rows_that_do_not_count_teach_nothing_and_a_seed_makes_a_model(name: str) -> None:
    """With other labels where none counts, in training and validation, the same model to the last bit; a hundred
    patients are enough to train it."""
    small = cohort.simulate(100, seed=6)
    parts = three(small, features.fit(small.select(small.split()[0])))
    random = np.random.default_rng(0)
    parts = [replace(rows, counts=random.random(rows.label.size) < 0.7) for rows in parts]
    lies = [replace(rows, label=np.where(rows.counts, rows.label, 1 - rows.label)) for rows in parts]
    model, again = (models.train(name, *some[:2], 5, **options(name)) for some in (parts, lies))
    scores = model.score(parts[2])
    assert scores.tobytes() == again.score(parts[2]).tobytes()
    assert [one.get("val_loss") for one in model.history] == [one.get("val_loss") for one in again.history]
    other = models.train(name, *parts[:2], 6, **options(name)).score(parts[2])
    drawn = name not in ("logistic regression", "naive Bayes", "AR(1)", "AR(6)", "GLM AR(1)")
    assert (np.abs(other - scores).max() > 1e-6) == drawn  # only then has the seed something to draw


# ---- refusals ------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_a_sentence(table: records.Records, preparation: features.Preparation) -> None:
    train, validation, _ = three(table, preparation)
    with pytest.raises(ValueError, match=r"name: expected one of logistic regression, .*; got 'oracle'"):
        models.train("oracle", train, validation, 0)
    with pytest.raises(ValueError, match=r"logistic regression: expected no options, .*; got hidden_size"):
        models.train("logistic regression", train, validation, 0, hidden_size=8)
    nobody = replace(train, counts=train.label == 0)
    with pytest.raises(
        ValueError, match=r"training: expected rows of label 0 and .* of label 1; got \d+ rows .*, 0 of"
    ):
        models.train("LSTM", nobody, validation, 0)
    with pytest.raises(ValueError, match="validation: expected rows of label 0"):
        models.train("LSTM", train, replace(validation, counts=validation.label == 1), 0)


# ---- the real records --------------------------------------------------------------------------------------


@real
def test_logistic_regression_on_some_of_the_real_records() -> None:
    """Between .70 and .80; what knows the length of a record gets past .9."""
    some = everybody().select(np.isin(everybody().fold, [0, 4, 6]))
    prepare = features.fit(some.select(some.split()[0]))
    train, validation, test = three(some, prepare)
    assert np.isfinite(train.x).all() and train.names[:34] == records.MEASURED
    auroc, _ = study.areas(test.label, models.train("logistic regression", train, validation, 0).score(test))
    assert 0.70 < auroc < 0.80
