"""What training takes in gatewise and in PyTorch: the same model, patients, batches and number of threads.

`fit` is one training, the torch loop as its users write it: with pack_padded_sequence; on padded batches with the
padding masked out of the loss; and the latter with `gatewise.torch`'s module and its `lengths` in place of torch.nn's.
Tensors are made before the clock starts, and batches are time-major, which torch.nn likes best. Initial weights,
batches in their order, loss, clipping and Adam are those of SequenceClassifier, so the losses are the same but for
rounding: that shows that the work is the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import training
from ..backends import choose_num_threads
from ..estimators import SequenceClassifier
from ..layers import Layer
from .models import CELLS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[Any]

WAYS = ("gatewise", "gatewise.torch", "torch.nn padded", "torch.nn packed")
SAME_LOSS = 1e-3  # relative; float32 sums of ~100 updates in another order differ by 1e-5 to 1e-4
SCORED_AT_ONCE = 256  # patients, as `training.Network.logits` has it


@dataclass(frozen=True)
class Patients:
    """Features and labels of some patients: [T_i, F] and [T_i] each."""

    x: Sequence[Any]
    y: Sequence[Any]


@dataclass(frozen=True)
class Fit:
    """One training: seconds from data to model, and of scoring the test patients; per epoch seconds and losses."""

    seconds: float
    score_seconds: float
    history: list[dict[str, Any]]
    scores: Array  # probability of label 1, of all hours of the test patients


NOBODY = Patients([], [])


def epochs(
    patients: Patients, cells: Sequence[str] = tuple(CELLS), rounds: int = 5, limit: float = 60.0, **options: Any
) -> tuple[list[dict[str, Any]], str]:
    """Seconds of an epoch, way by way.

    A first epoch of each is not timed: it warms up, and its loss shows that the work is the same. Then the ways take
    turns, each epoch starting from the initial weights.

    Args:
        patients: a thousand of the challenge's take half a minute.
        cells: of `models.CELLS`. rounds: epochs timed of each way; fewer, but one, where all of it would take longer
            than `limit` seconds, as on a machine that is busy.
        options: hidden_size, batch_size, learning_rate, random_state, num_threads, as of SequenceClassifier.

    Returns:
        A dict a cell and way: model, loop, seconds (median), least, most, over gatewise (ratio of medians), epochs,
        loss; and a sentence that says which ways are not there and why, empty where all are.
    """
    options = {"random_state": 0, **options}
    options["num_threads"], _ = choose_num_threads(options.get("num_threads"))
    began, missing = time.perf_counter(), _missing()
    ways, reasons, rows = WAYS[:1] if missing else WAYS, [missing] if missing else [], []
    for k, name in enumerate(cells):
        start = time.perf_counter()
        first = {way: fit(way, CELLS[name], {**options, "max_epochs": 1}, patients).history[0] for way in ways}
        ours = first["gatewise"]["train_loss"]
        same = [way for way in ways if abs(first[way]["train_loss"] - ours) <= SAME_LOSS * ours]
        reasons += [
            f"{name}, {way}: not the same work, its loss is {first[way]['train_loss']:.6f} and gatewise's {ours:.6f}"
            for way in ways
            if way not in same
        ]
        seconds: dict[str, list[float]] = {way: [] for way in same}
        until = start + (limit - (start - began)) / (len(cells) - k)  # an even share of the time left
        for turn in range(rounds):
            now = time.perf_counter()
            if turn and now + (now - start) / (turn + 1) > until:
                break
            for way, times in seconds.items():
                times.append(fit(way, CELLS[name], {**options, "max_epochs": 1}, patients).history[0]["seconds"])
        for way, times in seconds.items():
            median = float(np.median(times))
            rows.append({
                "model": name, "loop": way, "seconds": median, "least": min(times), "most": max(times),
                "over gatewise": median / float(np.median(seconds["gatewise"])), "epochs": len(times),
                "loss": first[way]["train_loss"],
            })  # fmt: skip
    return rows, ". ".join(reasons)


def _missing() -> str:
    """Why PyTorch cannot take part; empty where it can."""
    try:
        from .. import torch  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def fit(
    way: str,
    cell: str,
    options: dict[str, Any],
    train: Patients,
    validation: Patients = NOBODY,
    test: Patients = NOBODY,
) -> Fit:
    """Trains a model one way, one of WAYS, and scores the test patients.

    `options` are those of SequenceClassifier: hidden_size, batch_size, learning_rate, max_epochs, random_state,
    num_threads, and, where they are not the defaults, weight_decay and schedule. Without validation patients the last
    epoch's weights are kept.

    Raises:
        ValueError: no such way.
        ImportError: PyTorch is missing.
    """
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}; got {way!r}")
    loop = _fit if way == "gatewise" else _torch_fit
    return loop(way, cell, options, train, validation, test)


def _fit(way: str, cell: str, options: dict[str, Any], train: Patients, validation: Patients, test: Patients) -> Fit:
    start = time.perf_counter()
    model = SequenceClassifier(cell, **{"verbose": 0, "patience": None, "validation_fraction": 0.0, **options})
    model.fit(train.x, train.y, validation_data=(validation.x, validation.y) if validation.x else None)
    trained = time.perf_counter()
    scores = [p[:, 1] for p in model.predict_proba(test.x)] if test.x else [np.empty(0)]
    return Fit(trained - start, time.perf_counter() - trained, model.history_, np.concatenate(scores))


# -- the same in torch ---------------------------------------------------------------------------------------


def _torch_fit(
    way: str, cell: str, options: dict[str, Any], train: Patients, validation: Patients, test: Patients
) -> Fit:
    import torch

    from .. import torch as gatewise_torch  # before the clock starts

    library = gatewise_torch if way == "gatewise.torch" else torch.nn
    data, held_out, unseen = map(_tensors, (train, validation, test))
    threads = torch.get_num_threads()
    torch.set_num_threads(options["num_threads"])
    try:
        start = time.perf_counter()
        model, random = _start_alike(library, way, cell, train, options)
        history = _train(model, data, held_out, options, random)
        trained = time.perf_counter()
        scores: list[Any] = [None] * len(unseen.x)
        for index, (padded, counts, mask, _) in _evaluated(unseen):
            grid = torch.zeros(mask.shape)
            grid[mask] = model(padded, counts, mask).sigmoid()
            for column, i in enumerate(index):
                scores[i] = grid[: counts[column], column].numpy()
        ended = time.perf_counter()
    finally:
        torch.set_num_threads(threads)
    return Fit(trained - start, ended - trained, history, np.concatenate([np.empty(0), *scores]))


def _train(model: Any, train: Patients, validation: Patients, options: dict[str, Any], random: Any) -> list[Any]:
    """The loop: the history of the training, with the best epoch's weights left in the model."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    lengths = np.array([len(y) for y in train.y])
    hours, held_out = int(lengths.sum()), sum(len(y) for y in validation.y)
    decay, updates = options.get("weight_decay", 0.0), options["max_epochs"] * -(-len(train.y) // options["batch_size"])
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"], weight_decay=decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    history: list[dict[str, Any]] = []
    best, best_loss = {}, np.inf
    for epoch in range(1, options["max_epochs"] + 1):
        start, total, val_loss = time.perf_counter(), 0.0, None
        for index in training.batches(lengths, options["batch_size"], random):
            padded, counts, mask, label = _batch(train, index)
            loss = binary_cross_entropy_with_logits(model(padded, counts, mask), label)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if options.get("schedule") == "cosine":
                cosine.step()
            total += loss.item() * len(label)
        if held_out:
            val_loss = sum(
                binary_cross_entropy_with_logits(model(padded, counts, mask), label, reduction="sum").item() / held_out
                for _, (padded, counts, mask, label) in _evaluated(validation)
            )
        seconds = time.perf_counter() - start
        history.append({"epoch": epoch, "train_loss": total / hours, "val_loss": val_loss, "seconds": seconds})
        if val_loss is None or val_loss < best_loss:
            best = {name: value.clone() for name, value in model.state_dict().items()}
            best_loss = np.inf if val_loss is None else val_loss
    model.load_state_dict(best)
    return history


def _tensors(patients: Patients) -> Patients:
    import torch

    return Patients([torch.from_numpy(x) for x in patients.x], [torch.from_numpy(y).float() for y in patients.y])


def _batch(patients: Patients, index: Array) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x [T, N, F], lengths [N], mask [T, N], labels [M]) of these patients."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = torch.tensor([len(patients.x[i]) for i in index])
    padded = pad_sequence([patients.x[i] for i in index])
    mask = torch.arange(len(padded))[:, None] < lengths
    return padded, lengths, mask, pad_sequence([patients.y[i] for i in index])[mask]


def _evaluated(patients: Patients) -> Iterator[tuple[Array, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Batches for evaluation, without gradients, cut as `training.Network.logits` cuts them."""
    import torch

    order = np.argsort([len(y) for y in patients.y], kind="stable")
    with torch.no_grad():
        for start in range(0, len(order), SCORED_AT_ONCE):
            index = order[start : start + SCORED_AT_ONCE]
            yield index, _batch(patients, index)


def _start_alike(
    library: Any, way: str, cell: str, train: Patients, options: dict[str, Any]
) -> tuple[Any, np.random.Generator]:
    """A recurrent layer and a linear head for every hour, with the weights with which SequenceClassifier starts, and
    its generator, to draw its batches."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    inputs, hidden = train.x[0].shape[1], options["hidden_size"]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = getattr(library, cell.upper())(inputs, hidden)
            self.head = torch.nn.Linear(hidden, 1)

        def forward(self, x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
            """x [T, N, F] padded, mask [T, N] -> logits of the hours that exist, [M]."""
            if way == "gatewise.torch":
                y = self.recurrent(x, lengths=lengths)[0]
            elif way == "torch.nn packed":
                packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
                y = pad_packed_sequence(self.recurrent(packed)[0])[0]
            else:
                y = self.recurrent(x)[0]
            z: Tensor = self.head(y[mask]).squeeze(-1)
            return z

    random = np.random.default_rng(options["random_state"])
    layer = Layer("rnn_tanh" if cell == "rnn" else cell, inputs, hidden, random_state=random)
    head = training.Linear(hidden, 1, dtype=np.float32, random=random)
    share = np.concatenate(train.y).mean()
    head.bias[:] = np.log(share / (1 - share))
    model = Model()
    for name, parameter in model.recurrent.named_parameters():
        parameter.data = torch.from_numpy(layer.parameters[name].copy())
    model.head.weight.data, model.head.bias.data = torch.from_numpy(head.weight), torch.from_numpy(head.bias)
    return model, random
