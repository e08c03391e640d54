"""The demo's training against the same loop in plain torch.nn: `python benchmarks/demo_loop.py [--data DIR]`.

Same patients, features, cells, sizes, initial weights, batches in the same order, loss, clipping, Adam and epochs, on
the same number of threads; validation after every epoch on both sides. The torch loop is written as its users write
it, three times: with pack_padded_sequence; on padded batches with the padding masked out of the loss; and the latter
with `gatewise.torch`'s module and its `lengths` in place of torch.nn's. Its tensors are made before the clock starts,
and its batches are time-major, which torch.nn likes best.

They take turns. The work is the same if the losses are: they are compared epoch by epoch, and the script ends
with 1 if the first epoch's differ by more than rounding does. "fit" is all of it, from lists of arrays to a trained
model; "in all" adds what the demo does besides (reading, features, logistic regression, scoring), the same for both.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import gatewise as gw
from gatewise import _core, sepsis, training
from gatewise.sepsis import features, models, study

SEED = 0
SAME_LOSS = 1e-3  # relative; float32 sums of ~100 updates in another order differ by 1e-5 to 1e-4


@dataclass
class Patients:
    """Features and labels of some patients: [T_i, F] and [T_i] each."""

    x: list[np.ndarray]
    y: list[np.ndarray]


@dataclass
class Fit:
    """One training: seconds from data to model, and of scoring the test patients; per epoch seconds and losses."""

    seconds: float
    score_seconds: float
    history: list[dict[str, Any]]
    scores: np.ndarray  # probability of label 1, of all hours of the test patients


def fit_gatewise(cell: str, options: dict[str, Any], train: Patients, validation: Patients, test: Patients) -> Fit:
    start = time.perf_counter()
    model = gw.SequenceClassifier(cell, **options)
    model.fit(train.x, train.y, validation_data=(validation.x, validation.y))
    trained = time.perf_counter()
    scores = np.concatenate([p[:, 1] for p in model.predict_proba(test.x)])
    return Fit(trained - start, time.perf_counter() - trained, model.history_, scores)


# -- the same in torch ---------------------------------------------------------------------------------------


WAYS = ("gatewise.torch", "torch packed", "torch padded")


class TorchModel(torch.nn.Module):
    """A recurrent layer and a linear head for every hour; `way` is one of WAYS."""

    def __init__(self, cell: str, inputs: int, hidden: int, way: str) -> None:
        super().__init__()
        library = gw.torch if way == "gatewise.torch" else torch.nn
        self.recurrent = getattr(library, cell.upper())(inputs, hidden)
        self.head = torch.nn.Linear(hidden, 1)
        self.way = way

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [T, N, F] padded, mask [T, N] -> logits of the hours that exist, [M]."""
        if self.way == "gatewise.torch":
            y = self.recurrent(x, lengths=lengths)[0]
        elif self.way == "torch packed":
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            y = pad_packed_sequence(self.recurrent(packed)[0])[0]
        else:
            y = self.recurrent(x)[0]
        return self.head(y[mask]).squeeze(-1)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def torch_batch(x: list[torch.Tensor], y: list[torch.Tensor], index: np.ndarray) -> Batch:
    """(x [T, N, F], lengths, mask [T, N], labels [M]) of these patients."""
    lengths = torch.tensor([len(x[i]) for i in index])
    padded = pad_sequence([x[i] for i in index])
    mask = torch.arange(len(padded))[:, None] < lengths
    return padded, lengths, mask, pad_sequence([y[i] for i in index])[mask]


def start_alike(model: TorchModel, cell: str, labels: list[np.ndarray]) -> np.random.Generator:
    """Gives the model the weights with which SequenceClassifier starts; returns its generator, to draw its batches."""
    random = np.random.default_rng(SEED)
    hidden, inputs = model.recurrent.hidden_size, model.recurrent.input_size
    layer = gw.layers.Layer("rnn_tanh" if cell == "rnn" else cell, inputs, hidden, random_state=random)
    head = training.Linear(hidden, 1, dtype=np.float32, random=random)
    share = np.concatenate(labels).mean()
    head.bias[:] = np.log(share / (1 - share))
    for name, parameter in model.recurrent.named_parameters():
        parameter.data = torch.from_numpy(layer.parameters[name].copy())
    model.head.weight.data, model.head.bias.data = torch.from_numpy(head.weight), torch.from_numpy(head.bias)
    return random


def torch_fit(
    cell: str, options: dict[str, Any], train: Patients, validation: Patients, test: Patients, way: str
) -> Fit:
    x, val_x, test_x = ([torch.from_numpy(a) for a in part.x] for part in (train, validation, test))
    y, val_y = ([torch.from_numpy(a).float() for a in part.y] for part in (train, validation))
    lengths, val_lengths, test_lengths = (np.array([len(a) for a in part]) for part in (x, val_x, test_x))
    hours, val_hours = lengths.sum(), val_lengths.sum()

    start = time.perf_counter()
    model = TorchModel(cell, x[0].shape[1], options["hidden_size"], way)
    random = start_alike(model, cell, train.y)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"])
    history: list[dict[str, Any]] = []
    best, best_loss = {}, np.inf
    for epoch in range(1, options["max_epochs"] + 1):
        epoch_start, total = time.perf_counter(), 0.0
        for index in training.batches(lengths, options["batch_size"], random):
            padded, counts, mask, label = torch_batch(x, y, index)
            loss = binary_cross_entropy_with_logits(model(padded, counts, mask), label)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(label)
        with torch.no_grad():
            val_total = 0.0
            for index in by_length(val_lengths):
                padded, counts, mask, label = torch_batch(val_x, val_y, index)
                logits = model(padded, counts, mask)
                val_total += binary_cross_entropy_with_logits(logits, label, reduction="sum").item()
        history.append({
            "epoch": epoch, "train_loss": total / hours, "val_loss": val_total / val_hours,
            "seconds": time.perf_counter() - epoch_start,
        })  # fmt: skip
        if history[-1]["val_loss"] < best_loss:
            best_loss, best = history[-1]["val_loss"], {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best)
    trained = time.perf_counter()
    scores: list[Any] = [None] * len(test_x)
    with torch.no_grad():
        for index in by_length(test_lengths):
            padded, counts, mask, _ = torch_batch(test_x, [a[:, 0] for a in test_x], index)
            grid = torch.zeros(mask.shape)
            grid[mask] = model(padded, counts, mask).sigmoid()
            for column, i in enumerate(index):
                scores[i] = grid[: test_lengths[i], column].numpy()
    return Fit(trained - start, time.perf_counter() - trained, history, np.concatenate(scores))


def by_length(lengths: np.ndarray, size: int = 256) -> list[np.ndarray]:
    """Batches for evaluation, as `training.Network.logits` cuts them."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


# -- the comparison ------------------------------------------------------------------------------------------


def timed(what: str, function: Callable[[], Any], parts: dict[str, float]) -> Any:
    start = time.perf_counter()
    result = function()
    parts[what] = time.perf_counter() - start
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="the demo's training against the same loop in torch.nn")
    parser.add_argument("--data", metavar="DIR", help="PhysioNet/CinC 2019 records (default: a simulated cohort)")
    parser.add_argument("--patients", type=int, help="of the simulated cohort (4000), or the first of the records")
    parser.add_argument("--epochs", type=int, help="default: the demo's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", nargs="+", default=list(study.CELLS.values()), choices=list(study.CELLS.values()))
    parser.add_argument("--rounds", type=int, default=1, help="turns of each; the median fit counts")
    parser.add_argument("--out", metavar="DIR", help="write demo_loop.csv and demo_loop.png, the loss curves, there")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    options = dict(sepsis.REAL if arguments.data else sepsis.SIMULATED)
    options |= {"random_state": SEED, "num_threads": arguments.threads, "verbose": 0}
    if arguments.epochs:
        options["max_epochs"] = arguments.epochs
    print(f"gatewise {gw.__version__} ({_core.choose_arch()}), torch {torch.__version__}, {arguments.threads} threads")

    common: dict[str, float] = {}
    if arguments.data:
        records = timed("reading", lambda: sepsis.read(arguments.data), common)
        if arguments.patients:
            records = records.select(np.arange(records.length.size) < arguments.patients)
    else:
        records = timed("simulating", lambda: sepsis.simulate(arguments.patients or 4000, SEED), common)
    split = records.split()
    chosen = [records.select(part) for part in split]

    def prepared() -> list[models.Rows]:
        preparation = features.fit(chosen[0])
        return [models.rows(part, preparation, "official") for part in chosen]

    rows_of = timed("features", prepared, common)
    train, validation, test = (Patients(part.sequences(part.x), part.sequences(part.label)) for part in rows_of)
    baseline = "logistic regression"
    timed(baseline, lambda: models.train(baseline, rows_of[0], rows_of[1], SEED).score(rows_of[2]), common)
    print(f"{records.length.size:,} patients, {records.label.size:,} hours, {train.x[0].shape[1]} features; {options}")
    print(", ".join(f"{what} {seconds:.1f} s" for what, seconds in common.items()) + "\n")

    sides: dict[str, Callable[[str], Fit]] = {
        "gatewise": lambda cell: fit_gatewise(cell, options, train, validation, test),
        **{way: partial(torch_fit, options=options, train=train, validation=validation, test=test, way=way)
           for way in WAYS},
    }  # fmt: skip
    curves: dict[str, dict[str, list[float]]] = {}
    rows: list[dict[str, Any]] = []
    print(f"{'cell':<6}{'loop':<14}{'s/epoch':>9}{'fit s':>8}{'score s':>9}{'torch/ours':>12}"
          f"{'train loss':>12}{'val loss':>10}{'AUROC':>8}{'AUPRC':>8}{'in kernels':>12}")  # fmt: skip
    seconds = dict.fromkeys(sides, sum(common.values()))
    labels, same = np.concatenate(test.y), True
    for cell in arguments.cells:
        fits: dict[str, list[Fit]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, fit in sides.items():
                fits[side].append(fit(cell))
        ours = np.median([fit.seconds for fit in fits["gatewise"]])
        first = fits["gatewise"][0].history[0]["train_loss"]
        for side, done in fits.items():
            epoch = np.median([h["seconds"] for fit in done for h in fit.history])
            total, score = (float(np.median([getattr(fit, s) for fit in done])) for s in ("seconds", "score_seconds"))
            seconds[side] += total + score
            history = done[0].history
            kept = min(history, key=lambda h: h["val_loss"])
            auroc, auprc = study.areas(labels, done[0].scores)
            share = f"{np.mean([h['kernel_share'] for h in history]):.0%}" if side == "gatewise" else "-"
            print(f"{cell:<6}{side:<14}{epoch:>9.3f}{total:>8.2f}{score:>9.2f}{total / ours:>12.2f}"
                  f"{kept['train_loss']:>12.5f}{kept['val_loss']:>10.5f}{auroc:>8.4f}{auprc:>8.4f}{share:>12}",
                  flush=True)  # fmt: skip
            curves.setdefault(cell, {})[side] = [h["train_loss"] for h in history]
            rows.append({
                "cell": cell, "loop": side, "threads": arguments.threads, "epochs": len(history),
                "epoch_seconds": round(float(epoch), 4), "fit_seconds": round(total, 3),
                "fit_over_gatewise": round(float(total / ours), 3), "train_loss": round(kept["train_loss"], 6),
                "val_loss": round(kept["val_loss"], 6), "auroc": round(auroc, 5), "auprc": round(auprc, 5),
            })  # fmt: skip
            if not abs(history[0]["train_loss"] - first) <= SAME_LOSS * first:
                print(f"  not the same work: first epoch's loss {history[0]['train_loss']:.6f}, ours {first:.6f}")
                same = False
    in_all = ", ".join(f"{side} {s:.1f} s ({s / seconds['gatewise']:.2f})" for side, s in seconds.items())
    print(f"\nin all, with what the demo does besides: {in_all}")
    if arguments.out:
        write(Path(arguments.out), rows, curves)
    return 0 if same else 1


def write(folder: Path, rows: list[dict[str, Any]], curves: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "demo_loop.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False, layout="constrained")
    widths = {"gatewise": 7, "gatewise.torch": 4.5, "torch packed": 2.5, "torch padded": 1}  # they lie on each other
    for axis, (cell, by_side) in zip(axes[0], curves.items()):
        for side, losses in by_side.items():
            axis.plot(range(1, len(losses) + 1), losses, label=side, linewidth=widths[side])
        axis.set(title=cell.upper(), xlabel="epoch", ylabel="training loss a patient-hour")
    axes[0][0].legend()
    figure.savefig(folder / "demo_loop.png", dpi=90)


if __name__ == "__main__":
    sys.exit(main())
