"""The models of the study, each trained and scored on the same rows, through one interface.

The invariant to hold: a score of an hour is made of that hour and those before, to the last bit. Cutting a record or
changing its later hours moves no bit of the scores before. So no score goes through a product of BLAS, whose bits
depend on how many rows stand beside a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .features import GROUPS, Preparation, split_rows
from .records import Records
from .tasks import septic_before, stage, target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gatewise import SequenceClassifier

    Scores = NDArray[np.float64]

BLOCK = 65_536  # rows that are scored at once, to bound the memory

LAGS = (6, 12, 24)  # hours: the label's horizon, half a day, a day; chosen by hand before any fit, never tuned
SVM_HOURS = 3_000  # of either label; scoring costs as many kernel values as there are hours, times these
MLP_HIDDEN, MLP_EPOCHS, MLP_PATIENCE = (64, 32), 12, 3
TREES = 150
# Hours of label 0 for each of label 1 that are trained on, where taking all costs minutes.
MLP_PER_POSITIVE, TREES_PER_POSITIVE, GLM_PER_POSITIVE = 10, 3, 5
TOLD = "told when sepsis has begun, as no other model is"  # in the official task all hours after that are of label 1
CALIBRATED = "made a probability by logistic regression on the validation patients (Platt)"


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

    @property
    def first_row(self) -> NDArray[np.int64]:
        """int64 [R]: the first row of the patient each row belongs to."""
        return np.repeat(self.offset[:-1], np.diff(self.offset))

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
        score: the probability of label 1 in every row, float64 [R], whether it counts or not.
        parameters: the numbers that training chose.
        history: a dict an epoch, with train_loss and val_loss; empty for a model without epochs.
        network: of a recurrent model.
        note: in words, what was done beside the textbook; empty where nothing was.
        name: its key in `MODELS`; seconds: that training took. Both are set by `train`.
    """

    score: Callable[[Rows], Scores]
    parameters: int
    history: list[dict[str, Any]] = field(default_factory=list)
    network: SequenceClassifier | None = None
    note: str = ""
    name: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Spec:
    """How a model is trained, (training, validation, seed, **options), and its kind, in the words of the study:
    "non-temporal", "autoregressive", "GLM" or "recurrent"."""

    kind: str
    fit: Callable[..., Model]


def train(name: str, training: Rows, validation: Rows, seed: int, **options: Any) -> Model:
    """Trains a model of `MODELS`; the same arguments give the same model, bit for bit.

    `options` are those of `gatewise.SequenceClassifier`, and `stages`, for the recurrent models only. Validation
    patients choose the epoch, and calibrate the scores that are no probabilities.

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
    return replace(made, name=name, seconds=time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------- non-temporal models


def _logistic_regression(training: Rows, validation: Rows, seed: int) -> Model:
    """Logistic regression of the label on the features of the hour, standardised by the training rows."""
    from sklearn.linear_model import LogisticRegression

    x, label, scale = _standardised(training)
    # float64: in float32 the Hessian of this solver is singular. A few steps, where L-BFGS takes hundreds.
    model = LogisticRegression(solver="newton-cholesky", tol=1e-6).fit(x.astype(np.float64), label)
    weight, bias = model.coef_[0] / scale, float(model.intercept_[0])
    return Model(lambda rows: _sigmoid(_linear(rows.x, weight) + bias), weight.size + 1)


def _naive_bayes(training: Rows, validation: Rows, seed: int) -> Model:
    """Gaussian naive Bayes on the features of the hour."""
    from sklearn.naive_bayes import GaussianNB

    model = GaussianNB().fit(training.x[training.counts], training.label[training.counts])

    def log_odds(rows: Rows) -> Scores:
        joint = _blockwise(lambda x: model.predict_joint_log_proba(x.astype(np.float64)), rows.x)
        odds = joint[:, 1] - joint[:, 0]
        # A feature that hardly varied in training makes them billions: their logarithm has the same order, and no row
        # outweighs the others in the calibration.
        return np.asarray(np.sign(odds) * np.log1p(np.abs(odds)))

    parameters = model.theta_.size + model.var_.size + 1
    note = f"takes features for independent, which they are not: the logarithm of its log-odds was {CALIBRATED}"
    return _calibrated(log_odds, validation, parameters, note)


def _linear_svm(training: Rows, validation: Rows, seed: int) -> Model:
    """Linear support vector machine: hinge loss, both labels of the same weight, features as for logistic regression.

    By stochastic gradient descent, averaged: five passes.
    """
    from sklearn.linear_model import SGDClassifier

    x, label, scale = _standardised(training)
    model = SGDClassifier(
        "hinge", alpha=1e-5, class_weight="balanced", average=True, max_iter=5, tol=None, random_state=seed
    ).fit(x, label)
    weight = (model.coef_[0] / scale).astype(np.float64)
    return _calibrated(lambda rows: _linear(rows.x, weight), validation, weight.size, CALIBRATED)


def _rbf_svm(training: Rows, validation: Rows, seed: int) -> Model:
    """Support vector machine with a Gaussian kernel, on a sample of hours: training takes their number squared.

    The sample has as many hours of label 1 as of label 0, at most `SVM_HOURS` of either.
    """
    from sklearn.svm import SVC

    index, _ = _sample(training, 1, seed, SVM_HOURS)
    x, label = training.x[index], training.label[index]
    gamma = 1 / max(x.shape[1] * float(x.var()), 1e-6)
    model = SVC(C=1.0, gamma=gamma, cache_size=500).fit(x, label)
    vectors, alpha = model.support_vectors_.astype(np.float32), model.dual_coef_[0].astype(np.float32)

    def decision(rows: Rows) -> Scores:
        return _blockwise(lambda x: np.einsum("rs,s->r", _kernel(x, vectors, gamma), alpha), rows.x, BLOCK // 16)

    note = f"trained on {index.size:,} of {int(training.counts.sum()):,} hours, half of label 1; " + CALIBRATED
    return _calibrated(decision, validation, alpha.size * (1 + vectors.shape[1]), note)


def _kernel(x: NDArray[np.float32], vectors: NDArray[np.float32], gamma: float) -> NDArray[np.float32]:
    """exp(-gamma |x - v|^2), [R, S]: the distances are one layer of the recurrent kernels, stopped at its first step.

    relu(W x + b) of a product that gives a row the same bits wherever it stands; a distance is not negative, so relu
    only takes off what rounding left below 0.
    """
    from gatewise import IndRNN

    squares = np.square(vectors).sum(axis=1)
    layer = IndRNN(vectors.shape[1] + 1, len(vectors))
    for parameter in layer.parameters.values():
        parameter[:] = 0
    layer.parameters["weight_ih_l0"][:] = np.concatenate([-2 * vectors, np.ones_like(squares)[:, None]], axis=1)
    layer.parameters["bias_ih_l0"][:] = squares
    with_square = np.concatenate([x, np.einsum("rf,rf->r", x, x)[:, None]], axis=1)
    distance = layer.forward(with_square[None], training=False)[0][0]
    distance *= np.float32(-gamma)
    return np.asarray(np.exp(distance, out=distance))


def _mlp(training: Rows, validation: Rows, seed: int) -> Model:
    """A deep network of the hour's features: two hidden layers, Adam; validation patients choose the epoch."""
    from sklearn.neural_network import MLPClassifier

    index, shift = _sample(training, MLP_PER_POSITIVE, seed)
    x, label = training.x[index], training.label[index]
    # A generator, not the seed: partial_fit would draw the same order from that in every epoch.
    model = MLPClassifier(MLP_HIDDEN, alpha=1e-4, batch_size=min(256, len(x)), random_state=np.random.RandomState(seed))
    history: list[dict[str, Any]] = []
    best: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def log_odds(rows: Rows, layers: list[tuple[NDArray[Any], NDArray[Any]]]) -> Scores:
        def forward(x: NDArray[np.float32]) -> NDArray[Any]:
            for weight, bias in layers[:-1]:
                x = np.maximum(np.einsum("rf,hf->rh", x, weight) + bias, 0)
            weight, bias = layers[-1]
            return np.asarray(np.einsum("rf,f->r", x, weight[0]) + bias[0])

        return _blockwise(forward, rows.x) + shift

    for epoch in range(1, MLP_EPOCHS + 1):
        start = time.perf_counter()
        model.partial_fit(x, label, classes=[0, 1])
        layers = [(np.array(w.T, order="C"), b.copy()) for w, b in zip(model.coefs_, model.intercepts_)]
        val_loss = _log_loss(log_odds(validation, layers), validation)
        if all(val_loss < one["val_loss"] for one in history):
            best = layers
        seconds = time.perf_counter() - start
        history.append({"epoch": epoch, "train_loss": float(model.loss_), "val_loss": val_loss, "seconds": seconds})
        if epoch - min(history, key=lambda one: one["val_loss"])["epoch"] >= MLP_PATIENCE:
            break
    parameters = sum(weight.size + bias.size for weight, bias in best)
    return Model(lambda rows: _sigmoid(log_odds(rows, best)), parameters, history, note=_sampled(index, training))


def _gradient_boosting(training: Rows, validation: Rows, seed: int) -> Model:
    """Gradient-boosted trees on the features of the hour; their number is fixed, nothing is held out."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    index, shift = _sample(training, TREES_PER_POSITIVE, seed)
    model = HistGradientBoostingClassifier(
        learning_rate=0.06, max_iter=TREES, early_stopping=False, random_state=seed
    ).fit(training.x[index], training.label[index])
    leaves = model.n_iter_ * model.max_leaf_nodes  # at most; a tree has a split less than leaves, of two numbers
    parameters = leaves + 2 * (leaves - model.n_iter_)

    def score(rows: Rows) -> Scores:
        return _sigmoid(_blockwise(model.decision_function, rows.x) + shift)

    return Model(score, parameters, note=_sampled(index, training))


# ---------------------------------------------------------------------------------------------- autoregressive models


def _autoregressive(order: int) -> Spec:
    """The label given s(t - 1) .. s(t - k), s being whether sepsis had begun: what is known of past responses.

    Sepsis that has begun stays, so of these lags only k + 1 patterns occur: as many as the model has coefficients, and
    its fit, by maximum likelihood under any link and by least squares alike, is the frequency of label 1 with each
    pattern. Counting them is exact where an optimiser has no finite answer (after the onset every label is 1). In
    hours at risk there is one pattern only, and the model is the base rate.
    """

    def pattern(rows: Rows) -> NDArray[np.int64]:
        """[R]: s(t - 1) + 2 s(t - 2) + 4 s(t - 3) ...; 0 before the record."""
        hour = np.arange(len(rows.label)) - rows.first_row
        known = rows.septic_before.astype(np.int64)
        bits = np.zeros(len(known), np.int64)
        for back in range(order):
            bits[back:] |= np.where(hour[back:] >= back, known[: len(known) - back], 0) << back
        return bits

    def fit(training: Rows, validation: Rows, seed: int) -> Model:
        label = training.label[training.counts]
        seen = pattern(training)[training.counts]
        count, positive = np.bincount(seen, minlength=2**order), np.bincount(seen, label, minlength=2**order)
        share = np.where(count > 0, positive / np.maximum(count, 1), label.mean())  # the base rate where none was seen
        return Model(lambda rows: share[pattern(rows)], order + 1, note=TOLD)

    return Spec("autoregressive", fit)


# ------------------------------------------------------------------------------------- generalised linear models


def _glm(covariates: bool, lags: tuple[int, ...]) -> Spec:
    """Binomial GLM with logit link of the label on s(t - 1), the covariates x_t, and lags of them chosen by hand.

    Covariates: the values carried forward, the background, the hours in intensive care; of a dose, whether it is given
    this hour and how much. No masks and no hours since, which are a memory of their own. With lags a, b, c: the values
    so many hours back, and the doses given in hours 1 to a, a + 1 to b, b + 1 to c back.
    """

    def design(rows: Rows, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n, K] of the rows chosen by their numbers, [n]."""
        parts: list[NDArray[Any]] = [rows.septic_before[index, None]]
        if covariates:
            first = rows.first_row[index]
            derived = {name + suffix for name in rows.names for suffix, _, _ in GROUPS[1:]}
            plain = [name for name in rows.names if name not in derived and name not in rows.doses]
            values = [rows.names.index(name) for name in plain]
            lagged = [rows.names.index(name) for name in plain if f"{name} measured" in rows.names]
            doses = [rows.names.index(name) for name in rows.doses]
            given = [rows.names.index(f"{name} measured") for name in rows.doses]

            def back(columns: list[int], hours: int) -> NDArray[np.float64]:
                """The columns so many hours before; 0 before the record."""
                row = np.maximum(index - hours, first)
                return np.where((index - hours == row)[:, None], rows.x[row[:, None], columns], 0.0)

            def dosed(hours: range) -> list[NDArray[np.float64]]:
                """How often, and how much beyond the mean, each drug was given so many hours before."""
                both = [(back(given, hour), back(doses, hour)) for hour in hours]
                return [sum((g for g, _ in both), np.zeros(1)), sum((g * d for g, d in both), np.zeros(1))]

            parts.append(back(values, 0))
            if doses:
                parts += dosed(range(1))
            for start, end in zip((0, *lags), lags):
                parts.append(back(lagged, end))
                if doses:
                    parts += dosed(range(start + 1, end + 1))
        return np.concatenate(parts, axis=1, dtype=np.float64)

    def fit(training: Rows, validation: Rows, seed: int) -> Model:
        from statsmodels.genmod.families import Binomial
        from statsmodels.genmod.generalized_linear_model import GLM

        index, shift = _sample(training, GLM_PER_POSITIVE, seed)
        x, label = design(training, index), training.label[index]
        # Coefficients without a finite or a unique estimate (after the onset every label is 1; some features are the
        # same twice) get one by a weak prior, log-F(1, 1): two observations of weight 1/2 each, with either label,
        # on which this covariate alone is 1 (Greenland and Mansournia, Stat Med 2015;34:3133).
        k = x.shape[1]
        prior = np.repeat(np.eye(k), 2, axis=0)
        x = np.concatenate([np.concatenate([np.ones(len(x)), np.zeros(2 * k)])[:, None], np.concatenate([x, prior])], 1)
        label = np.concatenate([label, np.tile([0.0, 1.0], k)])
        weight = np.concatenate([np.ones(index.size), np.full(2 * k, 0.5)])
        start = np.zeros(k + 1)
        start[0] = np.log(label[: index.size].mean() / (1 - label[: index.size].mean()))
        fitted = GLM(label, x, family=Binomial(), freq_weights=weight).fit(
            method="newton", start_params=start, max_start_irls=0, maxiter=100, disp=False
        )
        bias, coefficients = fitted.params[0] + shift, fitted.params[1:]

        def score(rows: Rows) -> Scores:
            every = np.arange(len(rows.label))
            return _sigmoid(
                _blockwise(lambda some: np.einsum("rk,k->r", design(rows, some), coefficients), every) + bias
            )

        return Model(score, k + 1, note="; ".join(filter(None, [TOLD, _sampled(index, training)])))

    return Spec("GLM", fit)


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

    def fit(training: Rows, validation: Rows, seed: int, *, stages: bool = False, **options: Any) -> Model:
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
        return Model(score, parameters, network.history_, network, note)

    return Spec("recurrent", fit)


# ------------------------------------------------------------------------------------------------------ what they share


def _standardised(training: Rows) -> tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.float32]]:
    """Features of deviation 1 and labels of the rows that count, and what the features were divided by, [F]."""
    x = training.x[training.counts]
    deviation = x.std(axis=0)
    scale = np.where(deviation > 1e-6, deviation, np.float32(1))  # a feature that never varies stays as it is
    x /= scale
    return x, training.label[training.counts], scale


def _sample(
    training: Rows, per_positive: int, seed: int, positives: int | None = None
) -> tuple[NDArray[np.int64], float]:
    """Hours of label 1, all or at most so many, and for each at most `per_positive` of label 0, drawn by the seed.

    Returns their row numbers, rising, and what brings log-odds fitted to them back to all hours: the log of the share
    of label 0 taken over the share of label 1 taken. For a logistic model that is exact (Prentice and Pyke, Biometrika
    1979;66:403).
    """
    random = np.random.default_rng(seed)
    of_label = [np.flatnonzero(training.counts & (training.label == one)) for one in (0, 1)]
    taken = [0, min(of_label[1].size, positives or of_label[1].size)]
    taken[0] = min(of_label[0].size, per_positive * taken[1])
    chosen = [random.choice(rows, n, replace=False) for rows, n in zip(of_label, taken)]
    shares = [n / rows.size for rows, n in zip(of_label, taken)]
    return np.sort(np.concatenate(chosen)), float(np.log(shares[0] / shares[1]))


def _sampled(index: NDArray[np.int64], training: Rows) -> str:
    every = int(training.counts.sum())
    if index.size == every:
        return ""
    return f"trained on {index.size:,} of {every:,} hours, all of label 1 among them; the log-odds are corrected for it"


def _calibrated(score: Callable[[Rows], Scores], validation: Rows, parameters: int, note: str) -> Model:
    """Probabilities from a score that is none: logistic regression of the label on it, on the validation patients."""
    from sklearn.linear_model import LogisticRegression

    z = score(validation)[validation.counts]
    mean, deviation = z.mean(), max(z.std(), 1e-12)
    platt = LogisticRegression(solver="newton-cholesky", tol=1e-8).fit(
        (z - mean)[:, None] / deviation, validation.label[validation.counts]
    )
    slope = platt.coef_[0, 0] / deviation
    bias = platt.intercept_[0] - slope * mean
    return Model(lambda rows: _sigmoid(slope * score(rows) + bias), parameters + 2, note=note)


def _blockwise(function: Callable[[Any], NDArray[Any]], rows: NDArray[Any], block: int = BLOCK) -> NDArray[np.float64]:
    """A function of rows [R, ...], block by block to bound the memory; its results, [R, ...]."""
    parts = [function(rows[start : start + block]) for start in range(0, len(rows), block)]
    return np.concatenate(parts, dtype=np.float64)


def _linear(x: NDArray[np.float32], weight: NDArray[np.float64]) -> Scores:
    """x [R, F] times weight [F] in float64: row by row the same sum in the same order, however many rows there are."""
    return _blockwise(lambda some: np.einsum("rf,f->r", some.astype(np.float64), weight), x)


def _sigmoid(z: Scores) -> Scores:
    """Where exp would overflow, the last number that it would not: the probability is 0 to 300 digits."""
    return 1 / (1 + np.exp(-np.maximum(z, -700)))


def _log_loss(log_odds: Scores, rows: Rows) -> float:
    """Mean over the rows that count."""
    z, label = log_odds[rows.counts], rows.label[rows.counts]
    return float(np.mean(np.logaddexp(0, np.where(label == 1, -z, z))))


CELLS = {"RNN": "rnn", "GRU": "gru", "LSTM": "lstm"}  # the cells that PyTorch has too

MODELS = {
    "logistic regression": Spec("non-temporal", _logistic_regression),
    "naive Bayes": Spec("non-temporal", _naive_bayes),
    "linear SVM": Spec("non-temporal", _linear_svm),
    "RBF SVM": Spec("non-temporal", _rbf_svm),
    "MLP": Spec("non-temporal", _mlp),
    "gradient boosting": Spec("non-temporal", _gradient_boosting),
    "AR(1)": _autoregressive(1),
    "AR(6)": _autoregressive(6),
    "GLM AR(1)": _glm(covariates=False, lags=()),
    "GLM covariates": _glm(covariates=True, lags=()),
    "GLM lags": _glm(covariates=True, lags=LAGS),
    **{name: _recurrent(cell) for name, cell in CELLS.items()},
    "LSTM peephole": _recurrent("lstm_peephole"),
}
