"""The sepsis model trained by several processes: `torchrun --nproc-per-node 2 -m gatewise.sepsis.distributed`.

`python -m gatewise.sepsis.distributed` is the same in one process. Everything random is a function of the seed and of
the place in the training (epoch, batch, rank); no generator runs on from batch to batch. So a batch is the same
patients for any number of processes, each of which takes its share of them, and a training resumed from its checkpoint
by as many processes goes on to the bits of one that was never stopped.

Losses and weights are those of one process up to the order of sums; with dropout, whose masks each rank draws for its
own patients, only in distribution. Every process reads all records, for its share of them changes batch by batch.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.functional import binary_cross_entropy_with_logits, dropout
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from .. import torch as gatewise_torch
from .. import training
from ..backends import available_cores, choose_num_threads
from ..layers import write_whole
from . import REAL, SIMULATED, features, models, read, simulate, study

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Index = NDArray[np.int64]

T = TypeVar("T")

CLIP_NORM = 1.0
SCORED_AT_ONCE = 256  # patients
WHOLE = states.StateDictOptions(full_state_dict=True)  # on every rank, also where each holds a part


# -- the model and its patients ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What makes a training this one and not another: a checkpoint of other settings is refused."""

    cell: str
    hidden_size: int
    dropout: float
    dtype: str
    batch_size: int
    learning_rate: float
    seed: int
    data: str  # digest of features, labels and split


class Model(torch.nn.Module):
    """A recurrent layer, dropout, and a linear head for every hour."""

    def __init__(self, inputs: int, settings: Settings) -> None:
        super().__init__()
        dtype = getattr(torch, settings.dtype)
        layer = getattr(gatewise_torch, settings.cell.upper())
        self.recurrent = layer(inputs, settings.hidden_size, batch_first=True, dtype=dtype)
        self.head = torch.nn.Linear(settings.hidden_size, 1, dtype=dtype)
        self.dropout = settings.dropout

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """x [N, T, F] padded, lengths [N] -> logits of the hours that are real, patient by patient, [M, 1]."""
        y = self.recurrent(x, lengths=lengths)[0]
        real = torch.arange(x.shape[1]) < lengths[:, None]
        z: torch.Tensor = self.head(dropout(y[real], self.dropout, self.training))
        return z


@dataclass(frozen=True)
class Patients:
    """Features, float32 [T_i, F], and lengths T_i, int64 [P], of patients; their hours' labels, int8 [R]."""

    x: list[NDArray[np.float32]]
    lengths: Index
    label: NDArray[np.int8]
    dtype: torch.dtype  # of the batches

    def batch(self, index: Index) -> tuple[torch.Tensor, torch.Tensor, Index]:
        """(x [N, T, F] padded, lengths [N], hours [M]: which rows of `label`, patient by patient).

        The index may be empty: x is [0, 1, F] then.
        """
        lengths = self.lengths[index]
        x = torch.zeros(len(index), int(lengths.max(initial=1)), self.x[0].shape[1], dtype=self.dtype)
        for n, i in enumerate(index):
            x[n, : lengths[n]] = torch.from_numpy(self.x[i])
        ends = np.cumsum(self.lengths)
        hours = [np.arange(ends[i] - self.lengths[i], ends[i]) for i in index]
        return x, torch.from_numpy(lengths), np.concatenate([np.zeros(0, np.int64), *hours])


# -- processes -----------------------------------------------------------------------------------------------


@contextmanager
def process_group() -> Iterator[None]:
    """The processes that torchrun started (or whoever else sets its variables), over gloo; else this one alone.

    torchrun keeps one store for all attempts, and gloo would read the addresses of workers that are dead (PyTorch's
    issue 135712): each attempt gets a part of its own. On several nodes that is not possible, for each counts its own
    restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there, and every attempt has another store.
    """
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    elif os.environ.get("GROUP_WORLD_SIZE") == "1":
        store, rank, size = next(rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group("gloo", store=PrefixStore(attempt, store), rank=rank, world_size=size)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def divide_threads() -> int:
    """Gives this process its share of the cores, at least one; returns how many threads that is.

    torchrun sets OMP_NUM_THREADS=1 for its workers, on any machine, so that they do not crowd each other out: two of
    them on 32 cores would leave 30 idle. Whether it was torchrun or the user who set it cannot be told, so it does not
    count here. GATEWISE_NUM_THREADS is set by nobody but the user, and wins.
    """
    threads, source = choose_num_threads(None)
    if source != "GATEWISE_NUM_THREADS":
        threads = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def share(index: Index) -> Index:
    """The part of a global batch that is this rank's: each patient is one rank's, some ranks may get none.

    Batches come in the order of length, so taking turns gives all ranks about as many hours.
    """
    return index[dist.get_rank() :: dist.get_world_size()]


def from_rank_0(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; its error too, or the others would wait for a process that has gone."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [make()]
        except (ValueError, OSError) as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    made: T = box[0]
    return made


def whole(tensor: torch.Tensor) -> float:
    """A single number that may be spread over the ranks."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


# -- the training --------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a training has come: with weights and optimizer, all there is to resume it."""

    epoch: int = 1  # that runs or is next
    batch: int = 0  # how many of its batches are done
    total: float = 0.0  # their loss, summed over hours
    seconds: float = 0.0  # they took
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry for every epoch before
    best: dict[str, Any] = field(default_factory=dict)  # the weights after the one of lowest validation loss


class Training:
    """A model in training. All ranks make one and call its methods together."""

    def __init__(self, settings: Settings, train: Patients, validation: Patients, sharded: bool) -> None:
        self.settings, self.train, self.validation = settings, train, validation
        self.progress = Progress()
        torch.manual_seed(settings.seed)
        self.model = Model(train.x[0].shape[1], settings)
        positive = float(train.label.mean())
        torch.nn.init.constant_(self.model.head.bias, math.log(positive / (1 - positive)))
        self.distributed: Callable[..., torch.Tensor] = self.model  # the same weights
        if sharded:
            # One group: gathered for a step; between steps a rank holds its part of weights, gradients and the
            # optimizer's state. A stack of large layers would be a group a layer.
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        else:
            self.distributed = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self.scale = dist.get_world_size() / self._reduced_one()

    def _reduced_one(self) -> float:
        """What the ranks make of a gradient that is 1 on each of them: its mean or its sum.

        Both wrappers promise the mean. But in some releases of PyTorch, FSDP over gloo returns the sum (issue 162338
        there), and says nothing.

        After its first backward pass DDP lays out its buckets anew, and of four ranks and more the layout decides the
        order of sums. It must be the same for the first batch after a restart as it was: this pass is that first one.
        """
        bias = self.model.head.bias
        x = torch.zeros(1, 1, self.train.x[0].shape[1], dtype=bias.dtype)
        torch.autograd.backward(self.distributed(x, torch.ones(1, dtype=torch.int64)).sum())
        assert bias.grad is not None
        one = whole(bias.grad)
        self.optimizer.zero_grad()
        return one

    def run_epoch(self, save: Callable[[], None], every: int) -> dict[str, Any]:
        """Trains for the rest of the epoch, calls `save` after each `every` batches; returns the history's entry."""
        p, seed, start = self.progress, self.settings.seed, time.perf_counter()
        earlier = p.seconds
        order = training.batches(self.train.lengths, self.settings.batch_size, np.random.default_rng((seed, p.epoch)))
        while p.batch < len(order):
            draw = np.random.SeedSequence((seed, p.epoch, p.batch, dist.get_rank()))
            torch.manual_seed(int(draw.generate_state(1, np.uint64)[0]))
            p.total += self._step(order[p.batch])
            p.batch += 1
            p.seconds = earlier + time.perf_counter() - start
            if p.batch % every == 0 and p.batch < len(order):
                save()
        z = torch.from_numpy(self.logits(self.validation))
        label = self.validation.label
        val_loss = float(binary_cross_entropy_with_logits(z, torch.from_numpy(label).double()))
        entry = {
            "epoch": p.epoch, "train_loss": p.total / len(self.train.label), "val_loss": val_loss,
            "val_auroc": study.areas(label, z.numpy())[0], "seconds": earlier + time.perf_counter() - start,
        }  # fmt: skip
        best = p.best
        if all(val_loss < past["val_loss"] for past in p.history):
            best = {name: value.clone() for name, value in self.weights().items()}
        self.progress = Progress(p.epoch + 1, history=[*p.history, entry], best=best)
        save()
        return entry

    def _step(self, index: Index) -> float:
        """One update on a global batch: the mean loss over its hours, whoever has them. Returns their summed loss."""
        x, lengths, hours = self.train.batch(share(index))
        label = torch.from_numpy(self.train.label[hours]).to(x.dtype)
        loss = binary_cross_entropy_with_logits(self.distributed(x, lengths)[:, 0], label, reduction="sum")
        self.optimizer.zero_grad()
        (loss * (self.scale / self.train.lengths[index].sum())).backward()
        norm = whole(clip_grad_norm_(self.model.parameters(), CLIP_NORM))
        total = loss.detach().double()
        dist.all_reduce(total)
        for name, value in (("loss", float(total)), ("norm of the gradient", norm)):
            if not math.isfinite(value):  # on all ranks, so all stop
                rate = self.settings.learning_rate
                raise FloatingPointError(f"the {name} became {value} in epoch {self.progress.epoch}; "
                                         f"try a learning rate below {rate:g}")  # fmt: skip
        self.optimizer.step()
        return float(total)

    def logits(self, patients: Patients) -> NDArray[np.float64]:
        """[R] of all hours, on every rank; the ranks share the work."""
        z = torch.zeros(len(patients.label), dtype=torch.float64)
        order = np.argsort(patients.lengths, kind="stable")
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(order), SCORED_AT_ONCE):
                x, lengths, hours = patients.batch(share(order[start : start + SCORED_AT_ONCE]))
                z[hours] = self.model(x, lengths)[:, 0].double()
        self.model.train()
        dist.all_reduce(z)  # adds zeros: an hour is one rank's
        return z.numpy()

    def weights(self) -> dict[str, Any]:
        """All weights by their names in the model, whole, on every rank."""
        return states.get_model_state_dict(self.model, options=WHOLE)

    def save(self, path: str) -> None:
        """Writes the checkpoint; until all of it is written, the file is the one before."""
        state = {
            "settings": asdict(self.settings),
            "progress": vars(self.progress),
            "model": self.weights(),
            "optimizer": states.get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE),
        }
        if dist.get_rank() == 0:
            file = io.BytesIO()
            torch.save(state, file)
            write_whole(path, file.getvalue())

    def resume(self, path: str) -> None:
        """Goes on where the checkpoint is, if there is the file.

        Raises:
            ValueError: it is no checkpoint, or one of other settings.
        """
        state = from_rank_0(lambda: read_checkpoint(path, self.settings))
        if state is not None:
            self.progress = Progress(**state["progress"])
            states.set_model_state_dict(self.model, state["model"], options=WHOLE)
            states.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=WHOLE)

    def keep_best(self) -> dict[str, Any]:
        """Gives the model the weights of the epoch with the lowest validation loss; returns its entry."""
        states.set_model_state_dict(self.model, self.progress.best, options=WHOLE)
        return min(self.progress.history, key=lambda entry: float(entry["val_loss"]))


def check_writable(path: str) -> None:
    """Says before any work that no checkpoint can be written there."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise ValueError(f"--checkpoint: expected a file in a folder that exists; got {path}")


def read_checkpoint(path: str, settings: Settings) -> dict[str, Any] | None:
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
        there, _, _ = dict(state["settings"]), Progress(**state["progress"]), (state["model"], state["optimizer"])
    except Exception as error:  # what torch.load raises for a file of something else depends on what it is
        reason = f"{type(error).__name__}: {error}".partition(". ")[0].splitlines()[0]
        raise ValueError(f"{path}: expected a checkpoint of this training, or no file; got {reason}") from error
    here = asdict(settings)
    other = [name for name in here if there.get(name) != here[name]]
    if other:
        expected, got = (", ".join(f"{name} {side.get(name)}" for name in other) for side in (here, there))
        raise ValueError(f"{path}: expected a checkpoint of {expected}; got one of {got}")
    return state


# -- the command line ----------------------------------------------------------------------------------------


def require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError('the study needs scikit-learn: pip install "gatewise[train]"') from error


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Reads, trains, scores the test patients; all ranks do, each with its own `say`."""
    require_sklearn()
    threads = divide_threads()
    if options.checkpoint is not None:
        from_rank_0(lambda: check_writable(options.checkpoint))
    records = simulate(options.patients, options.seed) if options.data is None else read(options.data)
    parts = study.parts(records)
    built = features.build(records, parts[0])
    digest = hashlib.sha256()
    for array in (built.matrix, records.label, records.length, *parts):
        digest.update(array.data)
    fields = {name: getattr(options, name) for name in Settings.__annotations__ if name != "data"}
    settings = Settings(**fields, data=digest.hexdigest()[:16])
    train, validation, test = (
        Patients(
            built.sequences(part), records.length[part], records.label[records.rows_of(part)],
            getattr(torch, settings.dtype),
        ) for part in parts
    )  # fmt: skip
    say(f"{records.length.size:,} patients, {records.label.size:,} hours, {len(built.names)} features")
    say(f"{settings.cell}, {settings.hidden_size} units, {settings.dtype}, processes: {dist.get_world_size()}"
        f"{', sharded' if options.shard else ''}, threads of each: {threads}")  # fmt: skip
    model = Training(settings, train, validation, options.shard)
    if options.checkpoint is not None:
        model.resume(options.checkpoint)

    def save() -> None:
        if options.checkpoint is not None:
            model.save(options.checkpoint)

    p = model.progress
    if p.epoch > 1 or p.batch:
        say(f"resumed from {options.checkpoint}: epoch {p.epoch}, {p.batch} batches done")
    reached = p.epoch - (p.batch == 0)
    if reached > options.epochs:
        raise ValueError(f"--epochs: expected at least {reached}, where {options.checkpoint} is; got {options.epochs}")
    while model.progress.epoch <= options.epochs:
        entry = model.run_epoch(save, options.checkpoint_every)
        say(f"epoch {entry['epoch']}: loss {entry['train_loss']:.5f}, validation loss {entry['val_loss']:.5f}, "
            f"AUROC {entry['val_auroc']:.4f}, {entry['seconds']:.1f} s")  # fmt: skip
    best = model.keep_best()
    auroc, auprc = study.areas(test.label, model.logits(test))
    say(f"test, with the weights after epoch {best['epoch']}: AUROC {auroc:.4f}, AUPRC {auprc:.4f}")


def number(kind: Callable[[str], T], expected: str, fits: Callable[[T], bool]) -> Callable[[str], T]:
    """A type for argparse, whose message it is that the user sees."""

    def convert(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}; got {text}")
        return value

    return convert


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, those that were not given filled in by what suits the data."""
    count = number(int, "an integer, 1 or more", lambda n: n >= 1)
    parser = argparse.ArgumentParser(
        prog="gatewise.sepsis.distributed",
        description="Trains the sepsis model, in one process or, started by torchrun, in several.",
    )
    parser.add_argument("--data", metavar="DIR", help="PhysioNet/CinC 2019 records (default: a simulated cohort)")
    parser.add_argument("--patients", type=count, metavar="N", help="of the simulated cohort (default: 4000)")
    parser.add_argument("--cell", choices=list(models.CELLS.values()), default="lstm", help="default: lstm")
    parser.add_argument("--hidden-size", type=count, metavar="H")
    parser.add_argument("--dropout", type=number(float, "a number in 0 <= p < 1", lambda p: 0 <= p < 1), metavar="P",
                        default=0.0, help="of the head's inputs (default: 0)")  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    parser.add_argument("--epochs", type=count, metavar="N")
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="patients of an update, of all processes together"
    )
    parser.add_argument("--learning-rate", type=number(float, "a number above 0", lambda r: 0 < r < math.inf),
                        metavar="RATE")  # fmt: skip
    parser.add_argument("--seed", type=number(int, "an integer, 0 or more", lambda n: n >= 0), metavar="N", default=0,
                        help="of the cohort, the first weights and the batches (default: 0)")  # fmt: skip
    parser.add_argument("--shard", action="store_true", help="spread weights and optimizer over the processes (FSDP)")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="written after every epoch and within; resumed from if it is there")  # fmt: skip
    parser.add_argument("--checkpoint-every", type=count, metavar="N", default=100,
                        help="batches between checkpoints within an epoch (default: 100)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.data is not None and options.patients is not None:
        parser.error("argument --patients: expected with the simulated cohort only; got --data as well")
    defaults = SIMULATED if options.data is None else REAL
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{
        "data": None, "checkpoint": None, "patients": 4000, "epochs": defaults["max_epochs"], **defaults, **given,
    })  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line on `argv` (default: the process's); returns 0, or 2 after the user's mistake.

    A mistake is said by every rank: torchrun stops the others as soon as one has ended, so which of them comes to say
    it is chance.
    """
    options = parse(argv)
    try:
        with process_group():
            run(options, print_now if dist.get_rank() == 0 else silent)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"gatewise.sepsis.distributed: {error}", file=sys.stderr)
        return 2
    return 0


def print_now(line: str) -> None:
    print(line, flush=True)


def silent(line: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
