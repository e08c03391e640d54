"""Two published LSTMs on the public records, by their own protocols, with gatewise's layers in PyTorch modules.

VUNO: Lee et al., "Early Prediction of Sepsis from Clinical Data via Transformer-based Model", and IADI: Roussel, Behar
and Oster, "A Recurrent Neural Network for the Prediction of Vital Sign Evolution and Sepsis in ICU", both Computing in
Cardiology 2019. What the papers leave open is said at the place where it is decided here.

Everything is computed on packed rows: step by step, the rows of the patients that have the step.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, dropout, relu
from torch.nn.utils.rnn import PackedSequence

from .. import torch as gatewise_torch
from .. import training
from ..backends import available_cores
from ..layers import write_whole
from . import metrics, tasks
from .features import fit
from .records import MEASURED, Records, read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Patients = NDArray[np.bool_]

V = len(MEASURED)
VITALS = 8  # the first of MEASURED: IADI gives six hours of them, of the others the hour's
HISTORY = 6


@dataclass(frozen=True)
class Row:
    """A row of a published table: what it is called, AUROC, AUPRC and utility as printed."""

    name: str
    paper: str
    auroc: float
    auprc: float
    utility: float
    module: Callable[[int], torch.nn.Module]  # of the number of features
    features: Callable[[Records, Patients], list[NDArray[np.float32]]]
    learning_rate: float
    batch_size: int
    weight_decay: float
    per_patient: bool  # the loss is summed over a patient's hours and averaged over patients; else averaged over hours
    max_epochs: int
    splits: list[tuple[Sequence[int], Sequence[int], Sequence[int]]]  # folds for training, validation, test


# -- VUNO ----------------------------------------------------------------------------------------------------


class Vuno(torch.nn.Module):
    """Three residual LSTM layers of 200 units between a projection and a classifier.

    Its features are values carried forward, then, with `masks`, which were measured and the hours since, then the
    background. With `decay`, a value carried forward fades towards the mean, by a rate learned for each variable (Che
    et al. 2018), and its change from the hour before is a feature as well, through which no gradient goes, as in the
    team's code.
    """

    def __init__(self, masks: bool, decay: bool, background: int, hidden_size: int = 200) -> None:
        super().__init__()
        self.masks, self.decay = masks, decay
        self.fade = torch.nn.Linear(V, V) if decay else None
        self.project = torch.nn.Linear(V * (1 + 2 * masks + decay) + background, hidden_size)
        self.layers = torch.nn.ModuleList(gatewise_torch.LSTM(hidden_size, hidden_size) for _ in range(3))
        self.head = torch.nn.Linear(hidden_size, 1)

    def forward(self, x: torch.Tensor, batch_sizes: torch.Tensor) -> torch.Tensor:
        """x [M, F] packed, batch_sizes [T] -> logits [M]."""
        if self.fade is not None:
            value, seen, hours = x[:, :V], x[:, V : 2 * V], x[:, 2 * V : 3 * V]
            value = torch.where(seen > 0, value, value * torch.exp(-relu(self.fade(hours))))
            before = _row_before(batch_sizes)
            change = torch.where(before[:, None] >= 0, value - value[before], 0.0).detach()
            x = torch.cat([value, x[:, V:], change], dim=1)
        y = self.project(x)
        for layer in self.layers:
            out = layer(PackedSequence(y, batch_sizes))[0].data
            y = y + dropout(out, 0.1, self.training)
        z: torch.Tensor = self.head(dropout(y, 0.5, self.training)).squeeze(-1)
        return z


def _row_before(batch_sizes: torch.Tensor) -> torch.Tensor:
    """The packed row of the same patient's hour before, int64 [M]; -1 in the first hour."""
    size = batch_sizes.tolist()
    before = [torch.full((size[0],), -1)] if size else []
    start = 0
    for earlier, now in zip(size, size[1:]):
        before.append(torch.arange(start, start + now))
        start += earlier
    return torch.cat(before)


def vuno_features(masks: bool) -> Callable[[Records, Patients], list[NDArray[np.float32]]]:
    """Values carried forward (and, with `masks`, which were measured and the hours since), background, clock."""

    def build(records: Records, train: Patients) -> list[NDArray[np.float32]]:
        features = fit(records.select(train))(records)
        keep = [j for j in range(len(features.names)) if masks or not V <= j < 3 * V]
        matrix = np.ascontiguousarray(features.matrix[:, keep])
        return np.split(matrix, records.offset[1:-1])

    return build


# -- IADI ----------------------------------------------------------------------------------------------------


class Iadi(torch.nn.Module):
    """An embedding of three dense layers, three LSTM layers of 64 units that see all before them, two dense layers.

    Sizes and skip connections as in the team's published code. Their network also predicts the next vital signs and
    the label of each of the next six hours; the row reproduced here is without auxiliary task, and has one output.
    """

    def __init__(self, inputs: int, embedding: int = 32, hidden_size: int = 64) -> None:
        super().__init__()
        wide = (inputs, 4 * inputs, 8 * inputs, embedding)
        self.embed = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in zip(wide, wide[1:]))
        self.layers = torch.nn.ModuleList(
            gatewise_torch.LSTM(embedding + i * hidden_size, hidden_size) for i in range(3)
        )
        self.after = torch.nn.Linear(embedding + 3 * hidden_size, embedding)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(embedding, 2 * VITALS), torch.nn.ReLU(), torch.nn.Linear(2 * VITALS, 1)
        )

    def forward(self, x: torch.Tensor, batch_sizes: torch.Tensor) -> torch.Tensor:
        """x [M, F] packed, batch_sizes [T] -> logits [M]."""
        for linear in self.embed:
            x = relu(linear(x))
        for layer in self.layers:
            x = torch.cat([layer(PackedSequence(x, batch_sizes))[0].data, x], dim=1)
        z: torch.Tensor = self.head(relu(self.after(x))).squeeze(-1)
        return z


def iadi_features(records: Records, train: Patients) -> list[NDArray[np.float32]]:
    """No imputation: a value not measured is -1, all others lie in 0..1 between fixed limits.

    Vital signs of this hour and the five before, background and clock, labs, and which labs were measured. The limits
    are the 0.1 and 99.9 % quantiles of the training patients (the team's are numbers in its code); beyond them a value
    is cut.
    """
    rows = records.rows_of(train)
    raw = np.concatenate([records.measured, records.background, records.clock[:, None]], axis=1)
    low, high = np.nanquantile(raw[rows], [0.001, 0.999], axis=0)
    scaled = ((raw - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    scaled = np.where(np.isnan(raw), -1, scaled).astype(np.float32)
    vitals, labs, background = scaled[:, :VITALS], scaled[:, VITALS:V], scaled[:, V:]
    hour = np.arange(len(raw)) - records.first_row
    lagged = [np.where((hour >= k)[:, None], np.roll(vitals, k, axis=0), 0).astype(np.float32) for k in range(HISTORY)]
    measured = (~np.isnan(raw[:, VITALS:V])).astype(np.float32)
    return np.split(np.concatenate([*lagged, background, labs, measured], axis=1), records.offset[1:-1])


# -- protocol ------------------------------------------------------------------------------------------------

Split = tuple[Sequence[int], Sequence[int], Sequence[int]]  # folds for training, validation, test
SIXTY_TWENTY_TWENTY: list[Split] = [(range(12), range(12, 16), range(16, 20))]


def _quarter(q: int) -> Split:
    """A quarter is for testing; of the others about a sixth, which the paper leaves open, chooses the epoch."""
    others = [fold for fold in range(20) if fold % 4 != q]
    return [f for f in others if f % 6 != q], [f for f in others if f % 6 == q], list(range(q, 20, 4))


QUARTERS = [_quarter(q) for q in range(4)]
BACKGROUND = 6  # five columns known at admission, and the clock


def _vuno(name: str, masks: bool, decay: bool, auroc: float, auprc: float, utility: float) -> Row:
    def module(inputs: int) -> Vuno:
        return Vuno(masks, decay, inputs - V * (1 + 2 * masks))

    # The paper doesn't say how many epochs: the one of least loss on the validation patients. Nor what its loss is a
    # mean of, on which hangs what an L2 of 1e-3 is: beside the mean over hours, 40 times smaller than a patient's sum,
    # it holds the weights so small that validation patients' loss was .083, .080, .080 in the three rows; beside the
    # sum .079, .076, .076.
    return Row(
        name, "VUNO", auroc, auprc, utility, module, vuno_features(masks),
        learning_rate=1e-3, batch_size=32, weight_decay=1e-3, per_patient=True, max_epochs=12,
        splits=SIXTY_TWENTY_TWENTY,
    )  # fmt: skip


ROWS = (
    _vuno("values carried forward", False, False, 0.773, 0.127, 0.287),
    _vuno("with masks and time since measured", True, False, 0.803, 0.138, 0.349),
    _vuno("with decay imputation and differences too", True, True, 0.812, 0.136, 0.355),
    Row(
        "three LSTM layers with skip connections", "IADI", 0.798, 0.095, 0.386, Iadi, iadi_features,
        learning_rate=1e-4, batch_size=256, weight_decay=1e-5, per_patient=False, max_epochs=40,
        splits=QUARTERS,
    ),
)  # fmt: skip


# What the teams' final models had on hidden patients of the same two hospitals: AUROC and AUPRC in A and B, from
# 2019/results/challenge.tsv of physionetchallenges.github.io. VUNO's was a transformer; IADI's had auxiliary tasks.
HIDDEN = {"VUNO": ((0.793, 0.812), (0.092, 0.083)), "IADI": ((0.792, 0.817), (0.094, 0.104))}
TRANSFORMER_AUPRC = 0.144  # of VUNO's by the protocol of its rows here, as printed


@dataclass(frozen=True)
class Fitted:
    """What one training gave: test areas and utility, the epoch that was kept, and seconds."""

    auroc: float
    auprc: float
    utility: float
    epoch: int
    seconds: float


def reproduce(
    row: Row, records: Records, split: int, seed: int, say: Callable[[str], None] = lambda line: None
) -> Fitted:
    """Trains the row's network on one of its splits and scores the split's test patients.

    Stops after three epochs without a lower validation loss. The threshold of the utility is the validation patients'
    best.
    """
    start = time.perf_counter()
    parts = [np.isin(records.fold, list(folds)) for folds in row.splits[split]]
    sequences = row.features(records, parts[0])
    train, validation, test = (_sequences(records, sequences, part) for part in parts)
    torch.manual_seed(seed)
    random = np.random.default_rng((seed, split))
    model = row.module(sequences[0].shape[1])
    positive = float(records.label[records.rows_of(parts[0])].mean())
    _last_bias(model).data.fill_(np.log(positive / (1 - positive)))  # starts at the base rate, as SequenceClassifier
    optimizer = torch.optim.Adam(model.parameters(), lr=row.learning_rate, weight_decay=row.weight_decay)
    best: dict[str, torch.Tensor] = {}
    best_loss, best_epoch = np.inf, 0
    for epoch in range(1, row.max_epochs + 1):
        model.train()
        for index in training.batches(train.lengths, row.batch_size, random):
            z, label = _logits(model, train, index)
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(z, label, reduction="sum")
            torch.autograd.backward(loss / (len(index) if row.per_patient else len(label)))
            optimizer.step()
        z, label = _all_logits(model, validation)
        missed = float(binary_cross_entropy_with_logits(z, label))
        say(f"{row.paper} {row.name}, split {split}, seed {seed}, epoch {epoch}: validation loss {missed:.5f}")
        if missed < best_loss:
            best = {name: value.clone() for name, value in model.state_dict().items()}
            best_loss, best_epoch = missed, epoch
        elif epoch - best_epoch >= 3:
            break
    model.load_state_dict(best)
    threshold = tasks.best_threshold(records.select(parts[1]), _all_logits(model, validation)[0].double().numpy())
    score = _all_logits(model, test)[0].double().numpy()
    tested = records.select(parts[2])
    auroc, auprc = metrics.areas(tested.label, score)
    return Fitted(auroc, auprc, tasks.utility(tested, score >= threshold), best_epoch, time.perf_counter() - start)


def _last_bias(model: torch.nn.Module) -> torch.Tensor:
    return [parameter for name, parameter in model.named_parameters() if name.startswith("head")][-1]


def _sequences(records: Records, x: list[NDArray[np.float32]], patients: Patients) -> training.Sequences:
    label = records.label[records.rows_of(patients)].astype(np.float32)[:, None]
    chosen = [x[i] for i in np.flatnonzero(patients)]
    return training.Sequences(chosen, records.length[patients], True, np.dtype(np.float32), label, np.ones_like(label))


def _logits(
    model: torch.nn.Module, data: training.Sequences, index: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels) of the hours of these patients."""
    batch = data.batch(index)
    assert data.targets is not None
    z = model(torch.from_numpy(batch.x), torch.from_numpy(batch.batch_sizes))
    return z[torch.from_numpy(batch.rows)], torch.from_numpy(data.targets[batch.source, 0])


def _all_logits(model: torch.nn.Module, data: training.Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels) of all hours, in the order of the set."""
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    assert data.targets is not None
    z = torch.empty(data.outputs)
    with torch.no_grad():
        for start in range(0, len(order), 256):
            batch = data.batch(order[start : start + 256])
            packed = model(torch.from_numpy(batch.x), torch.from_numpy(batch.batch_sizes))
            z[torch.from_numpy(batch.source)] = packed[torch.from_numpy(batch.rows)]
    return z, torch.from_numpy(data.targets[:, 0])


# -- the command ---------------------------------------------------------------------------------------------

COLUMNS = ("paper", "row", "split", "seed", *(field.name for field in fields(Fitted)))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows that `main` has written: COLUMNS, numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        kept = list(csv.DictReader(file))
    return [{k: v if k in ("paper", "row") else float(v) for k, v in row.items()} for row in kept]


def side_by_side(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A dict a published row: the printed numbers beside ours, the mean, the least and the most of the trainings."""
    table = []
    for row in ROWS:
        ours = [result for result in results if (result["paper"], result["row"]) == (row.paper, row.name)]
        if not ours:
            continue
        line: dict[str, Any] = {"paper": row.paper, "row": row.name, "trainings": len(ours)}
        for title, measure in (("AUROC", "auroc"), ("AUPRC", "auprc"), ("utility", "utility")):
            values = np.array([result[measure] for result in ours])
            line[f"{title} printed"] = getattr(row, measure)
            line[title] = float(values.mean())
            ends = (values.min(), values.max()) if len(values) > 1 else (None, None)
            line[f"{title} low"], line[f"{title} high"] = ends
        table.append(line)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m gatewise.sepsis.published --data DIR --out FILE.csv`: a line a training, done ones are left out."""
    parser = argparse.ArgumentParser(prog="python -m gatewise.sepsis.published", description=main.__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="PhysioNet/CinC 2019 records")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="CSV that a line is added to")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each split; default: 3")
    parser.add_argument("--paper", choices=["VUNO", "IADI"], help="default: both")
    parser.add_argument("--threads", type=int, default=available_cores(), metavar="N", help="default: all cores")
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)  # before the first hour of work, not after it
    torch.set_num_threads(options.threads)
    records = read(options.data, progress=True)
    for seed in range(options.seeds):
        for row in ROWS:
            for split in range(len(row.splits)):
                done = {(r["paper"], r["row"], r["split"], r["seed"]) for r in read_results(options.out)}
                if options.paper not in (None, row.paper) or (row.paper, row.name, split, seed) in done:
                    continue
                fitted = asdict(reproduce(row, records, split, seed, partial(print, flush=True)))
                line = {"paper": row.paper, "row": row.name, "split": split, "seed": seed, **fitted}
                text = options.out.read_text() if options.out.exists() else ",".join(COLUMNS) + "\n"
                added = ",".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in line.values())
                write_whole(options.out, f"{text}{added}\n".encode())
                print(added, flush=True)


if __name__ == "__main__":
    main()
