"""Training of a recurrent layer with a linear head: losses, Adam, clipping, batches by length, the fit loop.

Everything here is NumPy on whole batches, never a Python loop over time steps. Only labelled outputs reach
the head: a step past a sequence's end, with a missing target or of weight 0 is not multiplied by 0, it is
left out, so nothing about it can influence training. M labelled outputs, K outputs and F = D*H inputs of the
head.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .layers import Layer, draw_seed, drop

Array = NDArray[Any]
Index = NDArray[np.int64]
Loss = Callable[[Array, Array, Array], "tuple[float, Array]"]


# -- losses: (z, targets, weights) -> (sum of weight * loss, its gradient by z) ------------------------------


def binary_cross_entropy(z: Array, y: Array, w: Array) -> tuple[float, Array]:
    """-w (y log p + (1-y) log(1-p)) with p = sigmoid(z); z, y, w [M, K], y in [0, 1]. Exact for any z."""
    loss = np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))
    return _total(loss, w), w * (sigmoid(z) - y)


def softmax_cross_entropy(z: Array, y: Array, w: Array) -> tuple[float, Array]:
    """-w log softmax(z)[y]; z [M, K], y [M, 1] integer classes in 0..K-1, w [M, 1]."""
    shifted = z - z.max(axis=1, keepdims=True)
    gradient = np.exp(shifted)
    total = gradient.sum(axis=1, keepdims=True)
    loss = np.log(total) - np.take_along_axis(shifted, y, axis=1)
    gradient /= total
    np.put_along_axis(gradient, y, np.take_along_axis(gradient, y, axis=1) - 1, axis=1)
    gradient *= w
    return _total(loss, w), gradient


def squared_error(z: Array, y: Array, w: Array) -> tuple[float, Array]:
    """w (z - y)^2; z, y, w [M, K]."""
    error = z - y
    return _total(error * error, w), 2 * w * error


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)) without overflow and without loss of precision for small probabilities."""
    e = np.exp(-np.abs(z))
    p: Array = np.where(z >= 0, 1, e) / (1 + e)
    return p


def softmax(z: Array) -> Array:
    """exp(z) / sum of exp(z) over the last axis."""
    e: Array = np.exp(z - z.max(axis=-1, keepdims=True))
    e /= e.sum(axis=-1, keepdims=True)
    return e


def _total(loss: Array, w: Array) -> float:
    return float(np.sum(loss * w, dtype=np.float64))


# -- the head and the optimizer ------------------------------------------------------------------------------


class Linear:
    """z = x weight^T + bias: weight [K, F], bias [K], initialised U(-1/sqrt(F), 1/sqrt(F)) as in torch."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, random: np.random.Generator) -> None:
        bound = 1.0 / np.sqrt(inputs)
        self.weight: Array = random.uniform(-bound, bound, (outputs, inputs)).astype(dtype)
        self.bias: Array = random.uniform(-bound, bound, outputs).astype(dtype)

    def forward(self, x: Array) -> Array:
        """x [M, F] -> z [M, K]. Not BLAS: a row's bits must not depend on how many rows stand beside it."""
        z: Array = np.einsum("mf,kf->mk", x, self.weight)
        z += self.bias
        return z

    def backward(self, x: Array, dz: Array) -> tuple[Array, Array, Array]:
        """x [M, F], dz [M, K] -> (dx, dweight, dbias)."""
        dx = dz * self.weight if len(self.weight) == 1 else dz @ self.weight  # matmul is 5 times slower for K = 1
        return dx, dz.T @ x, dz.sum(axis=0)


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) in torch's form: `weight_decay` is added to the gradient, not
    decoupled.

    Writes into the arrays of `parameters`; each step works in buffers made once.
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = parameters
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.steps = 0
        self._buffers = {name: (np.zeros_like(p), np.zeros_like(p), np.empty_like(p)) for name, p in parameters.items()}

    def step(self, gradients: Mapping[str, Array]) -> None:
        """One update from gradients of the same names and shapes as the parameters."""
        self.steps += 1
        beta1, beta2 = self.betas
        rate = self.learning_rate / (1 - beta1**self.steps)
        correction = 1 / np.sqrt(1 - beta2**self.steps).item()
        for name, p in self.parameters.items():
            mean, square, scratch = self._buffers[name]
            g = gradients[name] + self.weight_decay * p if self.weight_decay else gradients[name]
            mean *= beta1
            mean += np.multiply(g, 1 - beta1, out=scratch)
            square *= beta2
            np.multiply(g, g, out=scratch)
            scratch *= 1 - beta2
            square += scratch
            np.sqrt(square, out=scratch)
            scratch *= correction
            scratch += self.eps
            np.divide(mean, scratch, out=scratch)
            scratch *= rate
            p -= scratch


def clip(gradients: Mapping[str, Array], max_norm: float | None) -> float:
    """Scale all gradients in place to a common 2-norm of at most max_norm; returns the norm before."""
    norm = float(np.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values())))
    if max_norm is not None and norm > max_norm:
        for g in gradients.values():
            g *= max_norm / (norm + 1e-6)
    return norm


# -- data ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """N packed sequences, the longest first, and, of their outputs, those that count.

    x [sum of lengths, I] step by step, batch_sizes [T] how many sequences have a step t, as `Layer.forward` takes
    them; rows [M]: which of the rows of x (per step) or of the sequences that have a step, the row after the last for
    all that have none; source [M]: the same outputs in the order of the whole set.
    """

    x: Array
    batch_sizes: Index
    rows: Index
    source: Index


@dataclass(frozen=True)
class Sequences:
    """Sequences of any length and their targets; x is never copied as a whole, only batch by batch.

    x: N arrays [T_i, I], of any real dtype. per_step: an output for every step, in the order of the sequences
    and of time, else one for every sequence. targets [M, K or 1] and weights [M, K or 1], aligned with the
    outputs, weight 0 where there is no target; None for a set that is only predicted.
    """

    x: Sequence[Array]
    lengths: Index
    per_step: bool
    dtype: np.dtype[Any]
    targets: Array | None = None
    weights: Array | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def outputs(self) -> int:
        """M: how many outputs all sequences have."""
        return int(self.lengths.sum()) if self.per_step else len(self)

    def subset(self, index: Index) -> Sequences:
        """The sequences of this index, in its order."""
        source = self._outputs_of(index)
        return replace(
            self,
            x=[self.x[i] for i in index],
            lengths=self.lengths[index],
            targets=None if self.targets is None else self.targets[source],
            weights=None if self.weights is None else self.weights[source],
        )

    def labelled(self) -> Sequences:
        """The sequences with at least one target of positive weight: the others have nothing to teach."""
        assert self.weights is not None
        outputs = np.repeat(np.arange(len(self)), self.lengths) if self.per_step else np.arange(len(self))
        return self.subset(np.unique(outputs[(self.weights > 0).any(axis=1)]))

    def batch(self, index: Index) -> Batch:
        """The sequences of this index, packed, and their outputs that count (without targets: all)."""
        index = index[np.argsort(-self.lengths[index], kind="stable")]
        lengths = self.lengths[index]
        batch_sizes = np.searchsorted(-lengths, -np.arange(lengths[0]))  # how many are longer than t
        starts = np.cumsum(batch_sizes) - batch_sizes
        rows = starts[_steps(lengths)] + np.repeat(np.arange(len(index)), lengths)  # sequence by sequence
        x = np.empty((len(rows), self.x[index[0]].shape[1]), self.dtype)
        x[rows] = np.concatenate([self.x[i] for i in index], dtype=self.dtype, casting="unsafe")
        source = self._outputs_of(index)
        if not self.per_step:
            rows = np.minimum(np.arange(len(index)), np.count_nonzero(lengths))
        if self.weights is not None:
            counts = (self.weights[source] > 0).any(axis=1)
            source, rows = source[counts], rows[counts]
        return Batch(x, batch_sizes, rows, source)

    @cached_property
    def _starts(self) -> Index:
        """[N] the first output of each sequence in the order of the whole set."""
        return np.cumsum(self.lengths) - self.lengths

    def _outputs_of(self, index: Index) -> Index:
        """The outputs of these sequences, in the order of the whole set."""
        if not self.per_step:
            return index
        lengths = self.lengths[index]
        return np.repeat(self._starts[index], lengths) + _steps(lengths)


def _steps(lengths: Index) -> Index:
    """0, 1, ... up to each length, one sequence after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def batches(lengths: Index, batch_size: int, random: np.random.Generator, bucket: int = 1) -> list[Index]:
    """All sequences once, in random batches: drawn `bucket` batches at a time, which are sorted by length among
    themselves, cut and shuffled. 1 leaves each batch a random sample of the set."""
    order = random.permutation(len(lengths))
    pool = bucket * batch_size
    pools = (order[start : start + pool] for start in range(0, len(order), pool))
    groups = [part[group] for part in pools for group in _in_order(lengths[part], batch_size)]
    return [groups[i] for i in random.permutation(len(groups))]


def _in_order(lengths: Index, batch_size: int) -> Iterator[Index]:
    order = np.argsort(lengths, kind="stable")
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


# -- the model -----------------------------------------------------------------------------------------------


class Network:
    """A recurrent layer, dropout, a linear head and a loss; `kernel_seconds`: time inside the layer.

    The head reads y at the labelled steps or, with one target per sequence, the top layer's final state (of
    both directions), [M, F].
    """

    def __init__(self, layer: Layer, head: Linear, loss: Loss, *, per_step: bool, dropout: float = 0.0) -> None:
        self.layer, self.head, self.loss = layer, head, loss
        self.per_step, self.dropout = per_step, dropout
        self.kernel_seconds = 0.0

    @property
    def parameters(self) -> dict[str, Array]:
        """All weights by name: the layer's own, head.weight, head.bias."""
        return {**self.layer.parameters, "head.weight": self.head.weight, "head.bias": self.head.bias}

    def logits(self, data: Sequences, batch_size: int = 256) -> Array:
        """[M, K] the head's outputs for every sequence (step) of the set, in its order."""
        z = np.empty((data.outputs, len(self.head.bias)), self.layer.dtype)
        data = replace(data, targets=None, weights=None)
        for index in _in_order(data.lengths, batch_size):
            batch = data.batch(index)
            features, _, _ = self._features(batch, training=False)
            z[batch.source] = self.head.forward(features)
        return z

    def mean_loss(self, data: Sequences) -> float:
        """Weighted mean of the loss over the set."""
        assert data.targets is not None and data.weights is not None
        counts = (data.weights > 0).any(axis=1)
        total, _ = self.loss(self.logits(data)[counts], data.targets[counts], data.weights[counts])
        return total / float(data.weights.sum(dtype=np.float64))

    def gradients(self, batch: Batch, targets: Array, weights: Array) -> tuple[float, dict[str, Array]]:
        """(sum of weight * loss over a batch's labelled outputs, gradients); targets, weights [M, K or 1]."""
        features, shape, tape = self._features(batch, training=True)
        seed = draw_seed(self.layer.random) if self.dropout else 0
        if self.dropout:
            features = drop(features[None], self.dropout, seed)[0]
        total, dz = self.loss(self.head.forward(features), targets, weights)
        dfeatures, dweight, dbias = self.head.backward(features, dz)
        if self.dropout:
            dfeatures = drop(dfeatures[None], self.dropout, seed)[0]
        dout = np.zeros(shape, features.dtype)
        dout[batch.rows] = dfeatures
        start = time.perf_counter()
        if self.per_step:
            gradients = self.layer.backward(tape, dout, wanted=self.layer.parameters)
        else:
            gradients = self.layer.backward(tape, dstate=self._dstate(dout[:-1]), wanted=self.layer.parameters)
        self.kernel_seconds += time.perf_counter() - start
        return total, {**gradients, "head.weight": dweight, "head.bias": dbias}

    def _features(self, batch: Batch, training: bool) -> tuple[Array, tuple[int, ...], Any]:
        """(features [M, F], shape of the array they were taken from, tape)."""
        start = time.perf_counter()
        y, state, tape = self.layer.forward(batch.x, batch_sizes=batch.batch_sizes, training=training)
        self.kernel_seconds += time.perf_counter() - start
        if not self.per_step:
            h = state[0] if isinstance(state, tuple) else state
            assert h is not None
            y = np.pad(np.concatenate(h[-self.layer.directions :], axis=1), ((0, 1), (0, 0)))
        return y[batch.rows], y.shape, tape

    def _dstate(self, dout: Array) -> Any:
        """[N, D*R] gradient of the top layer's final h -> gradient of the whole state, [L*D, N, R]."""
        D, L = self.layer.directions, self.layer.num_layers
        dtop = dout.reshape(len(dout), D, dout.shape[1] // D).swapaxes(0, 1)
        dh = np.zeros((L * D, *dtop.shape[1:]), dout.dtype)
        dh[-D:] = dtop
        return (dh, None) if self.layer.has_c else dh


SCHEDULES = ("constant", "cosine")

# -- the loop ------------------------------------------------------------------------------------------------


def fit(
    network: Network,
    train: Sequences,
    validation: Sequences | None = None,
    *,
    random: np.random.Generator,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    max_epochs: int = 100,
    batch_size: int = 64,
    bucket: int = 1,
    clip_norm: float | None = 1.0,
    patience: int | None = 10,
    schedule: str = "constant",
    verbose: int | None = None,
) -> list[dict[str, Any]]:
    """Train in place by Adam on the mean loss of mini-batches, and keep the best weights.

    A batch's loss is the sum of weight * loss over its M labelled outputs, divided by M, with the weights
    scaled to mean 1 over the whole set: a weight of 2 counts as two copies do, in whichever batch it falls.

    With a validation set the weights of the epoch of lowest validation loss are kept, and training stops
    after `patience` epochs without a lower one (None: never); without, the last epoch's weights are kept.
    Ctrl-C stops with a RuntimeWarning and the weights of the best (last) finished epoch.

    Args:
        schedule: of the learning rate: "constant", or "cosine": from learning_rate to 0 over max_epochs, along half a
            cosine (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
        verbose: None: a progress bar (needs tqdm) on a terminal after 3 s; 0: silent; 1: always a bar.

    Returns:
        One dict per finished epoch: epoch (from 1), train_loss (mean while the weights moved), val_loss (or
        None), seconds, kernel_share (the part of them inside the recurrent layer).

    Raises:
        FloatingPointError: the loss or its gradient is no longer finite.
    """
    assert train.targets is not None and train.weights is not None
    counted = int(np.count_nonzero(train.weights))
    weights = train.weights * train.dtype.type(counted / train.weights.sum(dtype=np.float64))
    optimizer = Adam(network.parameters, learning_rate, weight_decay=weight_decay)
    history: list[dict[str, Any]] = []
    best: dict[str, Array] | None = None
    best_loss, best_epoch = np.inf, 0
    updates = max_epochs * -(-len(train) // batch_size)
    bar = _progress(updates, verbose)
    try:
        for epoch in range(1, max_epochs + 1):
            start, kernels = time.perf_counter(), network.kernel_seconds
            total = 0.0
            for index in batches(train.lengths, batch_size, random, bucket):
                batch = train.batch(index)
                targets, w = train.targets[batch.source], weights[batch.source]
                count = np.count_nonzero(w)
                with np.errstate(over="ignore", invalid="ignore"):  # said better two lines below
                    loss, gradients = network.gradients(batch, targets, w / w.dtype.type(count))
                    norm = clip(gradients, clip_norm)
                _must_be_finite({"loss": loss, "norm of the gradient": norm}, epoch, learning_rate)
                if schedule == "cosine":
                    optimizer.learning_rate = learning_rate * (1 + np.cos(np.pi * optimizer.steps / updates).item()) / 2
                optimizer.step(gradients)
                total += loss * count
                bar.update()
            val_loss = None if validation is None else network.mean_loss(validation)
            _must_be_finite({"validation loss": val_loss or 0.0}, epoch, learning_rate)
            seconds = time.perf_counter() - start
            history.append({
                "epoch": epoch, "train_loss": float(total / counted), "val_loss": val_loss,
                "seconds": seconds, "kernel_share": (network.kernel_seconds - kernels) / seconds,
            })  # fmt: skip
            if val_loss is None or val_loss < best_loss:
                best = {name: p.copy() for name, p in network.parameters.items()}
                best_loss, best_epoch = np.inf if val_loss is None else val_loss, epoch
            bar.set_postfix(epoch=epoch, train_loss=history[-1]["train_loss"], val_loss=val_loss)
            if validation is not None and patience is not None and epoch - best_epoch >= patience:
                break
    except KeyboardInterrupt:
        kept = f"the weights are those of epoch {best_epoch}" if best else "no epoch was finished"
        message = f"fit was interrupted in epoch {len(history) + 1}; {kept}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    finally:
        bar.close()
    for name, value in (best or {}).items():
        network.parameters[name][...] = value
    return history


def _must_be_finite(values: Mapping[str, float], epoch: int, learning_rate: float) -> None:
    for name, value in values.items():
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the {name} became {value} in epoch {epoch}; try a learning_rate below {learning_rate:g}, "
                "a smaller clip_norm, and inputs (and regression targets) normalised to mean 0 and "
                "standard deviation 1"
            )


class _NoProgress:
    def update(self) -> None: ...
    def set_postfix(self, **values: Any) -> None: ...
    def close(self) -> None: ...


def _progress(total: int, verbose: int | None) -> Any:
    """A bar over batches; tqdm's disable=None hides it where stderr is no terminal, delay on a short fit."""
    if verbose == 0:
        return _NoProgress()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoProgress()
    shown = {"disable": False} if verbose else {"disable": None, "delay": 3}
    return tqdm(total=total, unit="batch", leave=False, **shown)
