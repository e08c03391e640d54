"""Sequence models with scikit-learn's interface: SequenceClassifier and SequenceRegressor.

This file turns what users hold (padded arrays or lists, labels of any kind, missing targets, weights) into
`training.Sequences` and back; the training itself is in training.py. N sequences, T steps, I features.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union

import numpy as np
from numpy.typing import NDArray

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d
except ImportError as error:
    raise ImportError('the estimators need scikit-learn: pip install "gatewise[train]"') from error

from . import training
from .layers import Layer

Array = NDArray[Any]
Ragged = Union[Array, Sequence[Array]]
Self = TypeVar("Self", bound="_SequenceEstimator")

_ARGUMENTS = """
    X is a padded array [N, T, I] with `lengths` [N] (None: all of T), or a list of N arrays [T_i, I]. What
    comes out step by step has the form that went in: a padded array (past a sequence's end NaN, or for labels
    the zero of their type: 0, False or '') or a list. Nothing is copied as a whole: batches are cut from X as
    they are needed. A 2-D X is refused: whether it were one sequence or N single steps cannot be known.

    Targets are one per sequence, [N], or one per step, [N, T] or a list of [T_i]. A target counts unless it
    is NaN, or its `sample_weight` is 0, or it lies past its sequence's end; one that does not count
    influences nothing, to the bit. Integer and string labels have no NaN: give a weight of 0 where they are
    missing.

    Args:
        cell: a key of `gatewise.cells()`, or "rnn" (the same as "rnn_tanh").
        hidden_size, num_layers, bidirectional: of the recurrent layers. A bidirectional model sees the future
            of every step: do not use it to predict while time goes on.
        dropout: probability, between layers and before the linear head, in training.
        input_dropout, recurrent_dropout, weight_dropout, variational, zoneout: of the recurrent layers in training,
            as in `gatewise.layers.Layer`: probabilities to drop what x, h and weight_hh have, whether dropout is the
            same at every step, and the probability that a unit keeps its state, of h and c or a pair.
        proj_size, cell_clip, forget_bias: of the recurrent layers, as there.
        save: "all", "states" or "checkpoints": memory against time in training, with the same results.
        target: "step", "sequence", or "auto": by the shape of y, where y [N, T] beside padded X and a list of
            arrays as long as X's mean "step".
        learning_rate, weight_decay, clip_norm: Adam, its L2 penalty, the largest global norm of a gradient
            (None: not clipped).
        max_epochs, batch_size: passes over the data, sequences per step of the optimizer.
        bucket: batches that are drawn together and sorted by length among themselves. A larger number makes
            a batch's arrays smaller where lengths differ much. The kernels skip padding anyway, and sorting
            ties what a batch shows to its length, which can cost accuracy: 1 leaves batches random.
        validation_fraction: part of the sequences (whole ones) set aside to choose the best epoch; 0: none.
            Not used when `fit` gets validation_data.
        patience: epochs without a lower validation loss after which training stops; None: never.
        schedule: of the learning rate: "constant", or "cosine": it falls to 0 over max_epochs.
        random_state: seed or numpy Generator: of split, initial weights, batches and dropout. An integer
            makes two fits equal to the bit, whatever num_threads.
        dtype: "float32" or "float64", inside; X may have any real dtype.
        verbose: None: a progress bar on a terminal when the fit is long; 0: silent; 1: a bar.
        num_threads, backend: as in the functional calls.
"""

# Parameters that go to the recurrent layer as they are
_OF_THE_LAYER = (
    "num_layers", "bidirectional", "dropout", "input_dropout", "recurrent_dropout", "weight_dropout", "variational",
    "zoneout", "proj_size", "cell_clip", "forget_bias", "save", "dtype", "num_threads", "backend",
)  # fmt: skip

_ATTRIBUTES = """
    Attributes:
        history_: one dict per epoch: epoch, train_loss, val_loss, seconds, kernel_share (part of the seconds
            spent inside the recurrent layers).
        network_: the trained `training.Network`; network_.layer is the recurrent layer.
        target_: "step" or "sequence".
        n_features_in_: I.

    scikit-learn's own estimator checks feed two-dimensional X, so they cannot run on this class itself; the
    tests run them with every row made a sequence of one step, and leave none out.
"""


class _SequenceEstimator(BaseEstimator, ABC):  # type: ignore[misc]
    """What the two estimators share; they differ in their targets and their loss."""

    def __init__(
        self,
        cell: str = "lstm",
        hidden_size: int = 64,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        variational: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        proj_size: int = 0,
        cell_clip: float | None = None,
        forget_bias: float | None = None,
        save: str = "all",
        target: str = "auto",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        max_epochs: int = 100,
        batch_size: int = 64,
        bucket: int = 1,
        clip_norm: float | None = 1.0,
        validation_fraction: float = 0.1,
        patience: int | None = 10,
        schedule: str = "constant",
        random_state: int | np.random.Generator | None = None,
        dtype: str = "float32",
        verbose: int | None = None,
        num_threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        self.cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.recurrent_dropout = recurrent_dropout
        self.weight_dropout = weight_dropout
        self.variational = variational
        self.zoneout = zoneout
        self.proj_size = proj_size
        self.cell_clip = cell_clip
        self.forget_bias = forget_bias
        self.save = save
        self.target = target
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.bucket = bucket
        self.clip_norm = clip_norm
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.schedule = schedule
        self.random_state = random_state
        self.dtype = dtype
        self.verbose = verbose
        self.num_threads = num_threads
        self.backend = backend

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags

    def fit(
        self: Self,
        X: Ragged,
        y: Any,
        lengths: Any = None,
        sample_weight: Any = None,
        validation_data: tuple[Any, ...] | None = None,
    ) -> Self:
        """Train from scratch.

        Args:
            X, y, lengths: as the class says.
            sample_weight: [N], or per step in the form of y; not negative; 0 is the same as leaving out.
            validation_data: (X, y), (X, y, lengths) or (X, y, lengths, sample_weight): chooses the best
                epoch.

        Raises:
            ValueError: an argument that does not fit, by name; NaN or infinity in X, by its place.
            FloatingPointError: the loss is no longer finite.

        Ctrl-C leaves a fitted estimator, with the weights of the best finished epoch, and a RuntimeWarning.
        """
        self._check_parameters()
        random = _generator(self.random_state)
        x, counts = _sequences(X, lengths)
        self.n_features_in_ = x[0].shape[1]
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        self.target_ = _target_kind(self.target, y, X, counts)
        targets, weights = self._flat(X, y, counts, sample_weight)
        self._learn_targets(targets, weights)
        data = self._dataset(x, counts, targets, weights, "y").labelled()
        validation = None
        if validation_data is not None:
            validation = self._validation(*validation_data)
        elif held_out := int(self.validation_fraction * len(data)):
            order = random.permutation(len(data))
            data, validation = data.subset(order[held_out:]), data.subset(order[:held_out])
        self.network_ = self._network(data, random)
        self.history_ = training.fit(
            self.network_, data, validation, random=random, learning_rate=self.learning_rate,
            weight_decay=self.weight_decay, max_epochs=self.max_epochs, batch_size=self.batch_size,
            bucket=self.bucket, clip_norm=self.clip_norm, patience=self.patience, schedule=self.schedule,
            verbose=self.verbose,
        )  # fmt: skip
        return self

    def _network(self, data: training.Sequences, random: np.random.Generator) -> training.Network:
        """Initial weights; training starts from the best constant prediction, the head's bias."""
        constant = self._constant(data)
        layer = Layer(
            "rnn_tanh" if self.cell == "rnn" else self.cell,
            self.n_features_in_, self.hidden_size, random_state=random,
            **{name: getattr(self, name) for name in _OF_THE_LAYER},
        )  # fmt: skip
        head = training.Linear(layer.output_size, len(constant), dtype=self.dtype, random=random)
        head.bias[:] = constant
        return training.Network(layer, head, self._loss(), per_step=data.per_step, dropout=self.dropout)

    def _validation(self, X: Ragged, y: Any, lengths: Any = None, sample_weight: Any = None) -> training.Sequences:
        x, counts = self._inputs(X, lengths, "validation X")
        targets, weights = self._flat(X, y, counts, sample_weight)
        return self._dataset(x, counts, targets, weights, "validation y").labelled()

    def _dataset(self, x: list[Array], lengths: Array, targets: Array, weights: Array, name: str) -> training.Sequences:
        coded, weighted = self._encode(targets, weights, name)
        per_step = self.target_ == "step"
        return training.Sequences(x, lengths, per_step, np.dtype(self.dtype), coded, weighted.astype(self.dtype))

    def _inputs(self, X: Ragged, lengths: Any, name: str = "X") -> tuple[list[Array], Array]:
        x, counts = _sequences(X, lengths, name)
        if x[0].shape[1] != self.n_features_in_:
            raise ValueError(
                f"{name} has {x[0].shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return x, counts

    def _flat(self, X: Ragged, y: Any, lengths: Array, sample_weight: Any) -> tuple[Array, Array]:
        """(targets [M] or [M, K], weights [M]): a row per output, in order; weight 0 where missing."""
        per_step = self.target_ == "step"
        targets = _per_step("y", y, lengths) if per_step else self._per_sequence(y, lengths)
        weights = np.ones(len(targets))
        if sample_weight is not None:
            weights = _weights(sample_weight, lengths, per_step)
        missing = np.asarray(targets != targets, dtype=bool)  # only NaN differs from itself, in any dtype
        weights[missing.reshape(len(missing), -1).all(axis=1)] = 0
        if not (weights > 0).any():
            raise ValueError("y: every target is missing: it is NaN, or its sample_weight is zero")
        if targets.dtype.kind == "f" and np.isinf(targets[weights > 0]).any():
            raise ValueError("y contains infinity")
        return targets, weights

    def _per_sequence(self, y: Any, lengths: Array) -> Array:
        targets = np.asarray(y)
        if targets.ndim == 0 or len(targets) != len(lengths):
            raise ValueError(f"y: expected one target per sequence, ({len(lengths)},); got {targets.shape}")
        return targets

    def _logits(self, X: Ragged, lengths: Any) -> tuple[Array, Array]:
        """(z [M, K], lengths [N]) of what comes in for prediction."""
        check_is_fitted(self)
        x, counts = self._inputs(X, lengths)
        data = training.Sequences(x, counts, self.target_ == "step", np.dtype(self.dtype))
        return self.network_.logits(data), counts

    def _shaped(self, X: Ragged, flat: Array, lengths: Array) -> Any:
        """Outputs in the form of X: [N, ...], or step by step padded [N, T, ...] or a list of [T_i, ...]."""
        if self.target_ == "sequence":
            return flat
        if not _is_array(X):
            return np.split(flat, np.cumsum(lengths)[:-1])
        N, T, _ = np.asarray(X).shape
        fill = np.nan if flat.dtype.kind == "f" else np.zeros((), flat.dtype)
        padded = np.full((N, T, *flat.shape[1:]), fill, flat.dtype)
        padded[_valid(T, lengths)] = flat
        return padded

    def _check_parameters(self) -> None:
        for name in ("max_epochs", "batch_size", "bucket"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more; got {value!r}")
        if self.schedule not in training.SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(training.SCHEDULES)}; got {self.schedule!r}")
        for name in ("learning_rate", "clip_norm", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number; got {value!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number of 0 or more; got {self.weight_decay!r}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction: expected a part in [0, 1); got {self.validation_fraction!r}")

    # what a subclass says about its targets

    @abstractmethod
    def _learn_targets(self, targets: Array, weights: Array) -> None:
        """Set what `fit` learns from the targets themselves, such as classes_."""

    @abstractmethod
    def _encode(self, targets: Array, weights: Array, name: str) -> tuple[Array, Array]:
        """(targets [M, K or 1], weights [M, K or 1]) as the loss wants them."""

    @abstractmethod
    def _constant(self, data: training.Sequences) -> Array:
        """[K] the head's bias of the best prediction that is the same for all."""

    @abstractmethod
    def _loss(self) -> training.Loss:
        """The loss of `training` that fits the targets."""


class SequenceClassifier(ClassifierMixin, _SequenceEstimator):  # type: ignore[misc]
    __doc__ = (
        "A recurrent network with a linear head that classifies sequences, or every step.\n"
        + _ARGUMENTS
        + """        class_weight: None; "balanced": each class has the same total weight; or {label: weight}.
"""
        + _ATTRIBUTES.replace("history_:", "classes_: the labels that count in y, sorted.\n        history_:")
    )

    def __init__(
        self,
        cell: str = "lstm",
        hidden_size: int = 64,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        variational: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        proj_size: int = 0,
        cell_clip: float | None = None,
        forget_bias: float | None = None,
        save: str = "all",
        target: str = "auto",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        max_epochs: int = 100,
        batch_size: int = 64,
        bucket: int = 1,
        clip_norm: float | None = 1.0,
        validation_fraction: float = 0.1,
        patience: int | None = 10,
        schedule: str = "constant",
        class_weight: str | Mapping[Any, float] | None = None,
        random_state: int | np.random.Generator | None = None,
        dtype: str = "float32",
        verbose: int | None = None,
        num_threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            cell=cell, hidden_size=hidden_size, num_layers=num_layers, bidirectional=bidirectional,
            dropout=dropout, input_dropout=input_dropout, recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout, variational=variational, zoneout=zoneout, proj_size=proj_size,
            cell_clip=cell_clip, forget_bias=forget_bias, save=save,
            target=target, learning_rate=learning_rate, weight_decay=weight_decay,
            max_epochs=max_epochs, batch_size=batch_size, bucket=bucket, clip_norm=clip_norm,
            validation_fraction=validation_fraction, patience=patience, schedule=schedule,
            random_state=random_state, dtype=dtype, verbose=verbose, num_threads=num_threads, backend=backend,
        )  # fmt: skip
        self.class_weight = class_weight

    def decision_function(self, X: Ragged, lengths: Any = None) -> Any:
        """Logits: two classes [N] or per step, of classes_[1]; more classes with a last axis of classes."""
        z, counts = self._logits(X, lengths)
        return self._shaped(X, z[:, 0] if z.shape[1] == 1 else z, counts)

    def predict_proba(self, X: Ragged, lengths: Any = None) -> Any:
        """Probabilities of classes_, along a last axis: [N, C], [N, T, C] or a list of [T_i, C]."""
        z, counts = self._logits(X, lengths)
        if z.shape[1] == 1:
            p = training.sigmoid(z)
            return self._shaped(X, np.concatenate((1 - p, p), axis=1), counts)
        return self._shaped(X, training.softmax(z), counts)

    def predict(self, X: Ragged, lengths: Any = None) -> Any:
        """The most probable label: [N], [N, T] or a list of [T_i]."""
        z, counts = self._logits(X, lengths)
        return self._shaped(X, self._labels(z), counts)

    def score(self, X: Ragged, y: Any, lengths: Any = None, sample_weight: Any = None) -> float:
        """Accuracy over the targets that count."""
        z, counts = self._logits(X, lengths)
        targets, weights = self._flat(X, y, counts, sample_weight)
        counted = weights > 0
        return float(accuracy_score(targets[counted], self._labels(z)[counted], sample_weight=weights[counted]))

    def _labels(self, z: Array) -> Array:
        code = (z[:, 0] > 0).astype(np.int64) if z.shape[1] == 1 else z.argmax(axis=1)
        return np.asarray(self.classes_[code])

    def _per_sequence(self, y: Any, lengths: Array) -> Array:
        return np.asarray(column_or_1d(super()._per_sequence(y, lengths), warn=True))

    def _learn_targets(self, targets: Array, weights: Array) -> None:
        counted = targets[weights > 0]
        check_classification_targets(counted)
        self.classes_ = np.unique(counted)
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected two classes or more; got 1 class only, {self.classes_[0]!r}")
        self._class_weights = self._weigh_classes(counted, weights[weights > 0])

    def _weigh_classes(self, labels: Array, weights: Array) -> Array:
        if self.class_weight is None:
            return np.ones(len(self.classes_))
        if isinstance(self.class_weight, str):
            if self.class_weight != "balanced":
                raise ValueError(f"class_weight: expected None, 'balanced' or a dict; got {self.class_weight!r}")
            totals = np.bincount(np.searchsorted(self.classes_, labels), weights)
            return np.asarray(weights.sum() / (len(totals) * totals))
        unknown = [label for label in self.class_weight if label not in self.classes_]
        if unknown:
            raise ValueError(f"class_weight: expected labels among {self.classes_.tolist()}; got {unknown}")
        return np.array([self.class_weight.get(label, 1.0) for label in self.classes_.tolist()])

    def _encode(self, targets: Array, weights: Array, name: str) -> tuple[Array, Array]:
        counted = weights > 0
        codes = np.zeros(len(targets), np.int64)
        codes[counted] = np.searchsorted(self.classes_, targets[counted]).clip(max=len(self.classes_) - 1)
        unknown = np.unique(targets[counted][self.classes_[codes[counted]] != targets[counted]])
        if len(unknown):
            raise ValueError(f"{name}: expected labels among {self.classes_.tolist()}; got {unknown.tolist()}")
        weights = weights * self._class_weights[codes]
        coded = codes.astype(self.dtype) if len(self.classes_) == 2 else codes
        return coded[:, None], weights[:, None]

    def _constant(self, data: training.Sequences) -> Array:
        assert data.targets is not None and data.weights is not None
        codes, count = data.targets[:, 0].astype(np.int64), len(self.classes_)
        shares = np.bincount(codes, data.weights[:, 0], minlength=count) / data.weights.sum(dtype=np.float64)
        logits = np.log(shares.clip(min=1e-6))
        return np.asarray(logits[1:] - logits[:1] if count == 2 else logits)

    def _loss(self) -> training.Loss:
        return training.binary_cross_entropy if len(self.classes_) == 2 else training.softmax_cross_entropy


class SequenceRegressor(RegressorMixin, _SequenceEstimator):  # type: ignore[misc]
    __doc__ = (
        "A recurrent network with a linear head that predicts numbers, for sequences or for every step.\n"
        + _ARGUMENTS
        + _ATTRIBUTES
        + """
    Targets may have several outputs, along a last axis of K, any of which may be NaN on its own; the loss is
    their mean squared error. Targets far from mean 0 and standard deviation 1 train slowly: normalise them.
"""
    )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X: Ragged, lengths: Any = None) -> Any:
        """Predicted numbers, in the form of the targets of `fit`."""
        z, counts = self._logits(X, lengths)
        return self._shaped(X, z[:, 0] if self._single else z, counts)

    def score(self, X: Ragged, y: Any, lengths: Any = None, sample_weight: Any = None) -> float:
        """Coefficient of determination R^2 over the targets that count (of several outputs, where all do)."""
        z, counts = self._logits(X, lengths)
        targets, weights = self._flat(X, y, counts, sample_weight)
        targets = targets.reshape(len(targets), -1)
        counted = (weights > 0) & ~np.isnan(targets).any(axis=1)
        return float(r2_score(targets[counted], z[counted], sample_weight=weights[counted]))

    def _flat(self, X: Ragged, y: Any, lengths: Array, sample_weight: Any) -> tuple[Array, Array]:
        targets, weights = super()._flat(X, y, lengths, sample_weight)
        try:
            targets = targets.astype(np.float64, copy=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"y: expected numbers; got dtype {targets.dtype}") from error
        return targets, weights

    def _learn_targets(self, targets: Array, weights: Array) -> None:
        self._single, self._outputs = targets.ndim == 1, targets[0].size

    def _encode(self, targets: Array, weights: Array, name: str) -> tuple[Array, Array]:
        targets = targets.reshape(len(targets), -1)
        if targets.shape[1] != self._outputs:
            raise ValueError(f"{name}: expected {self._outputs} outputs; got {targets.shape[1]}")
        weights = np.where(np.isnan(targets), 0, weights[:, None])
        return np.where(weights > 0, targets, 0).astype(self.dtype), weights

    def _constant(self, data: training.Sequences) -> Array:
        assert data.targets is not None and data.weights is not None
        weights = data.weights.astype(np.float64)
        total = (data.targets * weights).sum(axis=0)
        return np.asarray(total / np.maximum(weights.sum(axis=0), np.finfo(np.float64).tiny))

    def _loss(self) -> training.Loss:
        return training.squared_error


# -- forms of input: what users hold -> lists of views and flat arrays ---------------------------------------


def _is_array(values: Any) -> bool:
    """One array (NumPy's, or another library's that turns into one), not a list of them."""
    return hasattr(values, "__array__")


def _generator(random_state: Any) -> np.random.Generator:
    if isinstance(random_state, np.random.RandomState):  # scikit-learn's tools may hand one over
        random_state = random_state.randint(2**31 - 1)
    return np.random.default_rng(random_state)


def _sequences(X: Ragged, lengths: Any, name: str = "X") -> tuple[list[Array], Array]:
    """(N views or arrays [T_i, I] of a real dtype, all finite; their lengths int64 [N])."""
    if _is_array(X) or hasattr(X, "toarray"):
        x = list(_padded(X, lengths, name))
    else:
        if lengths is not None:
            raise ValueError("lengths: a list of sequences has its own; give lengths with a padded array only")
        x = [_real(sequence, f"{name}[{i}]") for i, sequence in enumerate(X)]
    if not x:
        raise ValueError(
            f"{name}: found array with 0 sequence(s) (shape={np.shape(X)}) while a minimum of 1 is required"
        )
    for i, sequence in enumerate(x):
        if sequence.ndim == 2 and sequence.shape[1] == 0:
            raise ValueError(f"{name}[{i}]: 0 feature(s) (shape={sequence.shape}) while a minimum of 1 is required.")
        if sequence.ndim != 2 or sequence.shape[1] != x[0].shape[-1]:
            features = x[0].shape[1] if x[0].ndim == 2 else "I"
            raise ValueError(f"{name}[{i}]: expected one sequence (T_i, I) = (T_i, {features}); got {sequence.shape}")
        if sequence.dtype.kind == "f" and not np.isfinite(sequence).all():
            step, feature = np.argwhere(~np.isfinite(sequence))[0].tolist()
            what = "NaN" if np.isnan(sequence[step, feature]) else "infinity"
            raise ValueError(f"{name} contains {what}: sequence {i}, step {step}, feature {feature}")
    return x, np.array([len(sequence) for sequence in x], np.int64)


def _padded(X: Any, lengths: Any, name: str) -> Sequence[Array]:
    if hasattr(X, "toarray"):
        raise TypeError(f"{name}: a sparse matrix was given; expected a dense array (N, T, I) or a list of (T_i, I)")
    array = _real(X, name)
    if array.ndim != 3:
        raise ValueError(
            f"{name}: expected a padded array (N, T, I) or a list of arrays (T_i, I); got {array.shape}. "
            "Reshape your data: X[:, None, :] makes each row a sequence of one step, X[None] all rows one"
        )
    if lengths is None:
        return list(array)
    counts = np.asarray(lengths)
    if counts.shape != (len(array),) or counts.dtype.kind not in "iu":
        raise ValueError(f"lengths: expected integers ({len(array)},); got {counts.dtype} {counts.shape}")
    if len(counts) and not (counts.min() >= 0 and counts.max() <= array.shape[1]):
        raise ValueError(f"lengths: expected 0 to T = {array.shape[1]}; got {counts.min()} to {counts.max()}")
    return [array[i, :count] for i, count in enumerate(counts.tolist())]


def _real(values: Any, name: str) -> Array:
    """As an array of a real dtype, without a copy if it is one."""
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} is {array.dtype}")
    return array if array.dtype.kind in "fiub" else array.astype(np.float64)


def _target_kind(target: str, y: Any, X: Ragged, lengths: Array) -> str:
    if target in ("step", "sequence"):
        return target
    if target != "auto":
        raise ValueError(f"target: expected 'auto', 'step' or 'sequence'; got {target!r}")
    y = np.asarray(y) if _is_array(y) else y
    if _is_array(X) and _is_array(y) and y.ndim > 1:
        return "step" if y.shape[:2] == np.asarray(X).shape[:2] else "sequence"
    rows = [np.shape(row) for row in y]
    return "step" if all(rows) and [row[0] for row in rows] == lengths.tolist() else "sequence"


def _valid(T: int, lengths: Array) -> Array:
    """[N, T] whether a step of a padded array lies before its sequence's end."""
    return np.asarray(np.arange(T) < lengths[:, None])


def _per_step(name: str, values: Any, lengths: Array) -> Array:
    """[N, T, ...] or a list of [T_i, ...] -> [sum of T_i, ...], without what lies past the ends."""
    if _is_array(values) and np.asarray(values).ndim > 1:
        values = np.asarray(values)
        if len(values) != len(lengths) or values.shape[1] < lengths.max():
            raise ValueError(
                f"{name}: expected a target per step, ({len(lengths)}, {lengths.max()}); got {values.shape}"
            )
        return np.asarray(values[_valid(values.shape[1], lengths)])
    if len(values) != len(lengths):
        raise ValueError(f"{name}: expected {len(lengths)} sequences; got {len(values)}")
    arrays = [np.asarray(value) for value in values]
    for i, (array, length) in enumerate(zip(arrays, lengths.tolist())):
        if array.ndim == 0 or len(array) != length:
            raise ValueError(f"{name}[{i}]: expected a target per step, ({length},); got {array.shape}")
    return np.concatenate(arrays)


def _weights(values: Any, lengths: Array, per_step: bool) -> Array:
    """[M] float64, a copy, from weights per sequence or per step."""
    values = np.asarray(values) if _is_array(values) else values
    if per_step and len(values) and np.ndim(values[0]):
        weights = _per_step("sample_weight", values, lengths).astype(np.float64)
    else:
        weights = np.array(values, np.float64)
        if weights.shape != lengths.shape:
            raise ValueError(f"sample_weight: expected one per sequence, {lengths.shape}; got {weights.shape}")
        weights = np.repeat(weights, lengths) if per_step else weights
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("sample_weight: expected finite numbers of 0 or more")
    return weights
