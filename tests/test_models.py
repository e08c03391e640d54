"""The models of the study: none sees the future, each is what an independent computation says it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from gatewise import sepsis
from gatewise.sepsis import cohort, features, models, records, study
from patients import DATA, cut, disturb, real

NETWORK = {"max_epochs": 2, "hidden_size": 8, "batch_size": 32, "learning_rate": 1e-2, "verbose": 0}


def options(name: str) -> dict[str, Any]:
    return NETWORK if models.MODELS[name].kind == "recurrent" else {}


@pytest.fixture(scope="module")
def table() -> records.Records:
    return cohort.simulate(400, seed=7)


@pytest.fixture(scope="module")
def preparation(table: records.Records) -> features.Preparation:
    return features.fit(table.select(table.split()[0]))


def three(table: records.Records, preparation: features.Preparation, task: str = "official") -> list[models.Rows]:
    return [models.rows(table.select(part), preparation, task) for part in table.split()]


# ---- no look ahead -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_no_model_knows_the_future(name: str, table: records.Records, preparation: features.Preparation) -> None:
    """Cut the test records, then disturb their later hours: the scores of the hours before stay, to the last bit."""
    train, validation, test = three(table, preparation)
    model = models.train(name, train, validation, 0, **options(name))
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
def test_logistic_regression_on_a_fifth_of_the_real_records() -> None:
    """Between .70 and .80; what knows the length of a record gets past .9."""
    everybody = sepsis.read(DATA)
    some = everybody.select(np.isin(everybody.fold, [0, 4, 6, 7]))
    prepare = features.fit(some.select(some.split()[0]))
    train, validation, test = three(some, prepare)
    assert np.isfinite(train.x).all() and train.names[:34] == records.MEASURED
    auroc, _ = study.areas(test.label, models.train("logistic regression", train, validation, 0).score(test))
    assert 0.70 < auroc < 0.80
