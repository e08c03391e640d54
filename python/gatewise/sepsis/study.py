"""The study: logistic regression, RNN, GRU and LSTM on the same rows and features, scored on unseen patients.

Everything a model learns from is a training patient; validation patients choose the epoch; test patients are
scored once, all their rows pooled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import features, models
from .models import Model
from .records import Records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]

CELLS = {"RNN": "rnn", "GRU": "gru", "LSTM": "lstm"}
BEST = "best possible"


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


def run(records: Records, say: Callable[[str], None] = print, seed: int = 0, **options: Any) -> Study:
    """Trains the models and scores them on the test patients; `say` gets a line as each is done.

    `seed` is that of every model; `options` are those of `gatewise.SequenceClassifier`, the same for all cells.

    Raises:
        ValueError: a part of the split has hours of one kind of label only.
        ImportError: scikit-learn is missing.
    """
    training, validation, test = (records.select(part) for part in parts(records))
    preparation = features.fit(training)
    say(f"{len(preparation.names)} features an hour; training on {training.length.size} patients")
    train, validate, unseen = (models.rows(part, preparation, "official") for part in (training, validation, test))
    study = Study(test, {}, [])
    if test.risk is not None:
        study.scores[BEST] = test.risk
    for name in ("logistic regression", *CELLS):
        model = models.train(name, train, validate, seed, **(options if name in CELLS else {}))
        study.models.append(model)
        score = study.scores[name] = model.score(unseen)
        auroc, auprc = areas(test.label, score)
        say(f"{name}: AUROC {auroc:.3f}, AUPRC {auprc:.3f}, trained in {model.seconds:.1f} s")
    return study
