"""The models of the study, each trained and scored on the same rows, through one interface.

The invariant to hold: a score of an hour is made of that hour and those before, to the last bit. Cutting a record or
changing its later hours moves no bit of the scores before. So no score goes through a product of BLAS, whose bits
depend on how many rows stand beside a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .features import Preparation, split_rows
from .records import Records
from .tasks import septic_before, stage, target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gatewise import SequenceClassifier

    Scores = NDArray[np.float64]

BLOCK = 65_536  # rows that are scored at once, to bound the memory


@dataclass(frozen=True)
class Rows:
    """Some patients' hours, as the models see them.

    Attributes:
        x: float32 [R, F], the features; names: their F names.
        doses: the names among them that are medication given; as features they are named like measurements.
        offset: int64 [P + 1], the rows of patient i are offset[i]:offset[i + 1].
        label: int8 [R], of the task.
        counts: bool [R], the rows that are trained on and scored.
        septic_before: bool [R], whether sepsis is known to have begun by the hour before.
        stage: int8 [R], how near the onset is: what recurrent networks are taught beside the label.
    """

    x: NDArray[np.float32]
    names: tuple[str, ...]
    offset: NDArray[np.int64]
    label: NDArray[np.int8]
    counts: NDArray[np.bool_]
    septic_before: NDArray[np.bool_]
    stage: NDArray[np.int8]
    doses: tuple[str, ...] = ()

    def sequences(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """`values` [R, ...] patient by patient: views."""
        return split_rows(values, self.offset, np.ones(len(self.offset) - 1, np.bool_))


def rows(records: Records, preparation: Preparation, task: str) -> Rows:
    """The records as a task's rows.

    Raises:
        ValueError: no such task; or records of other variables than the preparation was fitted to.
    """
    asked = target(records, task)
    features = preparation(records)
    return Rows(
        features.matrix,
        features.names,
        features.offset,
        asked.label,
        asked.counts,
        septic_before(records),
        stage(records),
        records.doses,
    )


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        name: its key in `MODELS`.
        score: the probability of label 1 in every row, float64 [R], whether it counts or not.
        seconds: that training took.
        parameters: the numbers that training chose.
        history: a dict an epoch, with train_loss and val_loss; empty for a model without epochs.
        network: of a recurrent model.
        note: in words, what was done beside the textbook; empty where nothing was.
    """

    name: str
    score: Callable[[Rows], Scores]
    seconds: float
    parameters: int
    history: list[dict[str, Any]] = field(default_factory=list)
    network: SequenceClassifier | None = None
    note: str = ""


@dataclass(frozen=True)
class Trained:
    """What a way of training gives; `Model` says what is what."""

    score: Callable[[Rows], Scores]
    parameters: int
    history: list[dict[str, Any]] = field(default_factory=list)
    network: SequenceClassifier | None = None
    note: str = ""


@dataclass(frozen=True)
class Spec:
    """How a model is trained, (training, validation, seed, **options), and its kind, in the words of the study:
    "non-temporal", "autoregressive", "GLM" or "recurrent"."""

    kind: str
    fit: Callable[..., Trained]


def train(name: str, training: Rows, validation: Rows, seed: int, **options: Any) -> Model:
    """Trains a model of `MODELS`; the same arguments give the same model, bit for bit.

    `options` are those of `gatewise.SequenceClassifier`, for the recurrent models only. Validation patients choose
    the epoch, and calibrate the scores that are no probabilities.

    Raises:
        ValueError: no such model; options that a model does not take; rows that count of one kind of label only; or
            a bidirectional network, which would see the future.
        ImportError: an extra is missing; the sentence names it.
    """
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}; got {name!r}")
    spec = MODELS[name]
    if spec.kind != "recurrent" and options:
        raise ValueError(f"{name}: expected no options, which are for recurrent models; got {', '.join(options)}")
    for part, some in (("training", training), ("validation", validation)):
        label = some.label[some.counts]
        if label.size == 0 or label.min() == label.max():
            raise ValueError(
                f"{part}: expected rows of label 0 and rows of label 1; got {label.size} rows that count, "
                f"{int(label.sum())} of label 1"
            )
    start = time.perf_counter()
    try:
        made = spec.fit(training, validation, seed, **options)
    except ImportError as error:
        raise ImportError(f'{name} needs {error.name}: pip install "gatewise[demo]"') from error
    seconds = time.perf_counter() - start
    return Model(name, made.score, seconds, made.parameters, made.history, made.network, made.note)


# ----------------------------------------------------------------------------------------------- non-temporal models


def _logistic_regression(training: Rows, validation: Rows, seed: int) -> Trained:
    """Logistic regression of the label on the features of the hour, standardised by the training rows."""
    from sklearn.linear_model import LogisticRegression

    x = training.x[training.counts]
    scale = np.maximum(x.std(axis=0), 1e-6)  # a feature that never varies stays at 0 or 1
    x /= scale
    model = LogisticRegression(tol=1e-5, max_iter=500).fit(x, training.label[training.counts])
    weight, bias = (model.coef_[0] / scale).astype(np.float64), float(model.intercept_[0])
    return Trained(lambda rows: _sigmoid(_linear(rows.x, weight) + bias), weight.size + 1)


# -------------------------------------------------------------------------------------------------- recurrent models


STAGED = (
    "Recurrent networks were taught, beside the label, whether the onset is 12, 24 or 48 hours away; their score is "
    "the probability of the label."
)


def _recurrent(cell: str) -> Spec:
    """A network of the cell with an output an hour; rows that do not count weigh nothing.

    With `stages` it is taught the label and how near the onset is (`tasks.stage`) together, as classes; the score is
    the sum of the probabilities of those with label 1.
    """

    def fit(training: Rows, validation: Rows, seed: int, *, stages: bool = False, **options: Any) -> Trained:
        from gatewise import SequenceClassifier

        if options.get("bidirectional"):
            raise ValueError(
                "bidirectional: expected False: the backward direction reads the hours after the one that it predicts, "
                "which nobody has seen yet; got True"
            )

        def classes(rows: Rows) -> NDArray[np.int8]:
            return 2 * rows.stage + rows.label if stages else rows.label  # odd: label 1

        taught = np.unique(classes(training)[training.counts])

        def part(rows: Rows) -> tuple[list[Any], list[Any], None, list[Any]]:
            known = rows.counts & np.isin(classes(rows), taught)
            return rows.sequences(rows.x), rows.sequences(classes(rows)), None, rows.sequences(known)

        network = SequenceClassifier(cell, random_state=seed, **options)
        network.fit(*part(training), validation_data=part(validation))
        positive = network.classes_ % 2 == 1

        def score(rows: Rows) -> Scores:
            found = network.predict_proba(rows.sequences(rows.x))
            return np.concatenate([p[:, positive].sum(axis=1, dtype=np.float64) for p in found])

        parameters = sum(weight.size for weight in network.network_.parameters.values())
        note = STAGED if stages else ""
        return Trained(score, parameters, network.history_, network, note)

    return Spec("recurrent", fit)


# ------------------------------------------------------------------------------------------------------- arithmetic


def _linear(x: NDArray[np.float32], weight: NDArray[np.float64]) -> Scores:
    """x [R, F] times weight [F] in float64: row by row the same sum in the same order, however many rows there are."""
    z = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        z[start : start + BLOCK] = np.einsum("rf,f->r", x[start : start + BLOCK].astype(np.float64), weight)
    return z


def _sigmoid(z: Scores) -> Scores:
    return 1 / (1 + np.exp(-z))


MODELS = {
    "logistic regression": Spec("non-temporal", _logistic_regression),
    "RNN": _recurrent("rnn"),
    "GRU": _recurrent("gru"),
    "LSTM": _recurrent("lstm"),
    "LSTM peephole": _recurrent("lstm_peephole"),
}
