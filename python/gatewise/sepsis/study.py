"""The study: logistic regression, RNN, GRU and LSTM on the same rows and features, scored on unseen patients.

Everything a model learns from is a training patient; validation patients choose the epoch; test patients are
scored once, all their rows pooled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .features import Features, build, split_rows
from .records import Records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]

# Sequences, float32 [T_i, F] each -> probability of label 1, float64 [all their rows].
Score = Callable[[list[Any]], "Scores"]

CELLS = {"RNN": "rnn", "GRU": "gru", "LSTM": "lstm"}
BEST = "best possible"


@dataclass(frozen=True)
class Model:
    """A trained model: its score for a list of patients' features, and what it cost."""

    name: str
    score: Score
    seconds: float
    parameters: int
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """The test records, and each model's probabilities of label 1 on their rows, float64 [R], by its name."""

    test: Records
    scores: dict[str, Scores]
    models: list[Model]

    def table(self) -> list[dict[str, Any]]:
        """A dict a model: model, auroc, auprc, seconds, parameters; then the areas in each group."""
        trained = {model.name: model for model in self.models}
        groups = np.unique(self.test.group)
        rows = []
        for name, score in self.scores.items():
            row: dict[str, Any] = {"model": name}
            row["auroc"], row["auprc"] = areas(self.test.label, score)
            row["seconds"] = trained[name].seconds if name in trained else None
            row["parameters"] = trained[name].parameters if name in trained else None
            for group in groups if len(groups) > 1 else ():
                part = self.test.rows_of(self.test.group == group)
                row[f"auroc {group}"], row[f"auprc {group}"] = areas(self.test.label[part], score[part])
            rows.append(row)
        return rows


def areas(label: NDArray[np.int8], score: Scores) -> tuple[float, float]:
    """Area under the ROC curve, and average precision; NaN where only one kind of label is."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if label.min() == label.max():
        return float("nan"), float("nan")
    return float(roc_auc_score(label, score)), float(average_precision_score(label, score))


def parts(records: Records) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Patients, each bool [P], for training, validation and test, as `Records.split` has them.

    Raises:
        ValueError: a part has hours of one kind of label only.
    """
    split = records.split()
    for part, patients in zip(("training", "validation", "test"), split):
        label = records.label[records.rows_of(patients)]
        if label.size == 0 or label.min() == label.max():
            raise ValueError(
                f"{part} patients: expected hours of label 0 and hours of label 1; got {label.size} hours, "
                f"{int(label.sum())} of label 1. Are these all the records?"
            )
    return split


def run(records: Records, say: Callable[[str], None] = print, **options: Any) -> Study:
    """Trains the models and scores them on the test patients; `say` gets a line as each is done.

    `options` are those of `gatewise.SequenceClassifier`, the same for all cells.

    Raises:
        ValueError: a part of the split has hours of one kind of label only.
        ImportError: scikit-learn is missing.
    """
    train, validation, test = parts(records)
    features = build(records, train)
    say(f"{len(features.names)} features an hour; training on {int(train.sum())} patients")
    sequences = features.sequences(test)
    study = Study(records.select(test), {}, [])
    if study.test.risk is not None:
        study.scores[BEST] = study.test.risk

    def add(model: Model) -> None:
        study.models.append(model)
        score = study.scores[model.name] = model.score(sequences)
        auroc, auprc = areas(study.test.label, score)
        say(f"{model.name}: AUROC {auroc:.3f}, AUPRC {auprc:.3f}, trained in {model.seconds:.1f} s")

    add(logistic(records, features, train))
    for name, cell in CELLS.items():
        add(recurrent(name, records, features, train, validation, cell=cell, **options))
    return study


def logistic(records: Records, features: Features, train: NDArray[np.bool_]) -> Model:
    """Logistic regression of the label on the features of the hour, standardised by the training rows."""
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    rows = records.rows_of(train)
    x = features.matrix[rows]
    scale = np.maximum(x.std(axis=0), 1e-6)  # a feature that never varies stays at 0 or 1
    x /= scale
    model = LogisticRegression(tol=1e-5, max_iter=500).fit(x, records.label[rows])
    seconds = time.perf_counter() - start
    weight, bias = (model.coef_[0] / scale).astype(np.float64), float(model.intercept_[0])

    def score(sequences: list[Any]) -> Scores:
        # Row by row the same sum in the same order, however many rows there are: BLAS does not promise that.
        logit = np.concatenate([np.einsum("tf,f->t", x.astype(np.float64), weight) for x in sequences]) + bias
        return 1 / (1 + np.exp(-logit))

    return Model("logistic regression", score, seconds, model.coef_.size + 1, [])


def recurrent(
    name: str,
    records: Records,
    features: Features,
    train: NDArray[np.bool_],
    validation: NDArray[np.bool_],
    **options: Any,
) -> Model:
    """A recurrent network with one output an hour; `options` are those of `gatewise.SequenceClassifier`."""
    from gatewise import SequenceClassifier

    def part(patients: NDArray[np.bool_]) -> tuple[list[Any], list[Any]]:
        return features.sequences(patients), split_rows(records.label, records.offset, patients)

    start = time.perf_counter()
    network = SequenceClassifier(**options).fit(*part(train), validation_data=part(validation))
    seconds = time.perf_counter() - start

    def score(sequences: list[Any]) -> Scores:
        return np.concatenate([p[:, 1] for p in network.predict_proba(sequences)]).astype(np.float64)

    parameters = sum(weight.size for weight in network.network_.parameters.values())
    return Model(name, score, seconds, parameters, network.history_)
