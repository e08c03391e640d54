"""The study: every model on every task, on the same rows, with seeds repeated and intervals over patients.

Everything a model learns from is a training patient; validation patients choose its epoch and its threshold; test
patients are scored once. What a model scored is kept on disk, so that a study that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..layers import write_whole
from . import metrics, models, tasks
from .features import Preparation, fit
from .metrics import areas
from .models import Model
from .records import Records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]

__all__ = [
    "BEST", "Outcome", "Run", "Store", "areas", "parts", "run_task", "subgroups", "table", "threshold", "utility",
]  # fmt: skip

BEST = "best possible"
EXAMINED = "examined "  # begins the names of what `examine` found, in the store
BASELINE = "logistic regression"  # the differences in the tables are to this one


class Store:
    """Results by name in a folder: what is there is read, what is not is computed and kept, each file whole or not
    at all. `digest`: of whatever decides the results besides their names; results of another are computed again.
    """

    def __init__(self, folder: Path | None, digest: str = "") -> None:
        self.folder, self.digest = folder, digest

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The arrays and plain values of this name; what `compute` returns, if there is nothing yet."""
        path = None if self.folder is None else self.folder / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.npz"
        if path is not None and (kept := self._read(path)) is not None:
            return kept
        values = compute()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, _packed(values, self.digest))
        return values

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            # Opened here: of a file that is no archive, np.load would leave it open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                plain = json.loads(str(archive["plain"]))
                if plain.pop("digest") != self.digest:
                    return None
                return {**plain, **{name: archive[name] for name in archive.files if name != "plain"}}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # not there, or not one of ours: it is computed again


def _packed(values: dict[str, Any], digest: str) -> bytes:
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in values.items() if name not in arrays}
    file = io.BytesIO()
    arrays["plain"] = np.array(json.dumps({**plain, "digest": digest}))
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes any keyword for allow_pickle
    return file.getvalue()


SOURCES = (
    "features.py", "tasks.py", "models.py", "insight.py", "mimic.py", "mimic_items.py", "sofa.py", "../training.py",
    "../estimators.py",
)  # fmt: skip


def digest(*settings: Any) -> str:
    """A digest of settings, of the arrays of any records among them, of this version, and of how models are made."""
    hashed = hashlib.sha256(__version__.encode())
    for name in SOURCES:
        hashed.update((Path(__file__).parent / name).read_bytes())
    for one in settings:
        if not isinstance(one, Records):
            hashed.update(repr(one).encode())
            continue
        hashed.update(repr(one.variables).encode())
        for array in (one.measured, one.background, one.label, one.length, one.fold):
            hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()[:16]


# ---- one model, one task -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A model trained once: probabilities for the test and the validation patients' hours, float64; what it cost; what
    `run_task`'s `examine` found in it."""

    seed: int
    test: Scores
    validation: Scores
    seconds: float
    parameters: int
    history: list[dict[str, Any]]
    note: str
    examined: dict[str, Any]


# (model, preparation, test rows) -> what was found, arrays and plain values by name.
Examine = Callable[[Model, Preparation, models.Rows], "dict[str, Any]"]


@dataclass(frozen=True)
class Outcome:
    """What the models scored on one task: the runs of each, by name; `test` and `validation` are the patients' records.

    `trained_on`: the groups (hospitals) whose training and validation patients were used; None: all.
    """

    task: str
    trained_on: str | None
    test: Records
    validation: Records
    runs: dict[str, list[Run]]

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """`table` of this outcome, computed once: its intervals take a second a model."""
        return table(self)

    def scores(self) -> dict[str, Scores]:
        """A model's probabilities on the test hours: the mean over its seeds; the best possible ones, where known."""
        mean = {name: np.mean([run.test for run in runs], axis=0) for name, runs in self.runs.items()}
        known = {} if self.test.risk is None or self.task != "official" else {BEST: self.test.risk}
        return {**known, **mean}


def run_task(
    store: Store,
    records: Records,
    task: str,
    names: Iterable[str],
    *,
    seed: int = 0,
    seeds: int = 1,
    trained_on: str | None = None,
    examine: Examine | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> Outcome:
    """Trains models on a task, RNN, GRU and LSTM with `seeds` seeds from `seed` on, and scores them on test patients.

    `options` are those of `gatewise.SequenceClassifier`, the same for all cells. `examine` looks into each model while
    it is there; what it returns, arrays and plain values by name, is kept with the scores.

    Raises:
        ValueError: a part of the split has rows of one kind of label only.
        ImportError: an extra is missing.
    """
    split = parts(records, task, trained_on)
    made: list[Any] = []  # when a model has to be trained, and not when all are read from the store

    def prepared() -> tuple[Preparation, models.Rows, models.Rows, models.Rows]:
        if not made:
            preparation = fit(records.select(split[0]))
            made.extend([preparation, *(models.rows(records.select(part), preparation, task) for part in split)])
        preparation, training, validation, test = made
        return preparation, training, validation, test

    def trained(name: str, seed: int) -> dict[str, Any]:
        preparation, training, validation, test = prepared()
        recurrent = models.MODELS[name].kind == "recurrent"
        model = models.train(name, training, validation, seed, **(options if recurrent else {}))
        found = examine(model, preparation, test) if examine else {}
        return {
            "test": model.score(test), "validation": model.score(validation), "seconds": model.seconds,
            "parameters": model.parameters, "history": model.history, "note": model.note,
            **{f"{EXAMINED}{key}": value for key, value in found.items()},
        }  # fmt: skip

    outcome = Outcome(task, trained_on, records.select(split[2]), records.select(split[1]), {})
    counted = tasks.target(outcome.test, task)
    for name in names:
        repeats = seeds if name in models.CELLS else 1
        for one in range(seed, seed + repeats):
            key = f"{task} {trained_on or 'all'} {name} {one}"
            found = store.get(key, partial(trained, name, one))
            examined = {k[len(EXAMINED) :]: found.pop(k) for k in list(found) if k.startswith(EXAMINED)}
            outcome.runs.setdefault(name, []).append(Run(seed=one, examined=examined, **found))
            auroc, auprc = areas(counted.label[counted.counts], found["test"][counted.counts])
            cost = f"trained in {found['seconds']:.0f} s"
            say(f"{task}, {name}, seed {one}: AUROC {auroc:.3f}, AUPRC {auprc:.3f}, {cost}")
    return outcome


def parts(
    records: Records, task: str = "official", trained_on: str | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Patients, each bool [P], for training, validation and test, as `Records.split` has them.

    `trained_on`: a group; the others' patients are for testing only.

    Raises:
        ValueError: a part has rows of one kind of label only.
    """
    train, validation, test = records.split()
    if trained_on is not None:
        inside = records.group == trained_on
        train, validation = train & inside, validation & inside
    target = tasks.target(records, task)
    for name, patients in (("training", train), ("validation", validation), ("test", test)):
        label = target.label[target.counts & records.rows_of(patients)]
        if label.size == 0 or label.min() == label.max():
            raise ValueError(
                f"{name} patients: expected hours of label 0 and hours of label 1; got {label.size} hours, "
                f"{int(label.sum())} of label 1. Are these all the records?"
            )
    return train, validation, test


# ---- tables ------------------------------------------------------------------------------------------------


def table(outcome: Outcome, replicates: int = metrics.REPLICATES) -> list[dict[str, Any]]:
    """A dict a model: areas and the gain over `BASELINE`, with the ends of their intervals; areas in each group; cost.

    The intervals are over patients, by the bootstrap. Of a model trained with several seeds the scores are the mean
    of their probabilities; "AUROC a seed", there where any was, has each seed by itself.
    """
    target = tasks.target(outcome.test, outcome.task)
    patient = np.repeat(np.arange(outcome.test.length.size), outcome.test.length)[target.counts]
    label = target.label[target.counts]
    drawn = metrics.draws(outcome.test.length.size, replicates)
    scores = {name: score[target.counts] for name, score in outcome.scores().items()}
    drawn_areas = {name: metrics.replicated_areas(label, score, patient, drawn) for name, score in scores.items()}
    base, drawn_base = (areas(label, scores[BASELINE]), drawn_areas[BASELINE]) if BASELINE in scores else (None, None)
    groups = np.unique(outcome.test.group)
    group = outcome.test.group[patient]
    several = any(len(runs) > 1 for runs in outcome.runs.values())
    rows = []
    for name, score in scores.items():
        auroc, auprc = areas(label, score)
        runs = outcome.runs.get(name, [])
        row: dict[str, Any] = {
            "model": name,
            "kind": models.MODELS[name].kind if runs else "truth",
            **_columns("AUROC", auroc, drawn_areas[name][:, 0]),
            **_columns("AUPRC", auprc, drawn_areas[name][:, 1]),
        }
        if base is not None and drawn_base is not None:
            row |= _columns("AUROC gained", auroc - base[0], drawn_areas[name][:, 0] - drawn_base[:, 0])
        if outcome.task == "official":
            row["utility"] = utility(outcome, name) if runs else None
        for one in groups if len(groups) > 1 else ():
            part = group == one
            row[f"AUROC {one}"], row[f"AUPRC {one}"] = areas(label[part], score[part])
        if several:
            single = [areas(label, run.test[target.counts])[0] for run in runs] if len(runs) > 1 else []
            row["AUROC a seed"] = " ".join(f"{value:.3f}" for value in single) or None
        row["seconds"] = float(np.mean([run.seconds for run in runs])) if runs else None
        row["parameters"] = runs[0].parameters if runs else None
        rows.append(row)
    return rows


def _columns(name: str, value: float, replicates: Scores) -> dict[str, float]:
    return dict(zip((name, f"{name} low", f"{name} high"), metrics.interval(value, replicates)))


def threshold(outcome: Outcome, name: str) -> float:
    """The threshold of the alarm: the one of the highest utility on the validation patients."""
    return tasks.best_threshold(outcome.validation, np.mean([run.validation for run in outcome.runs[name]], axis=0))


def utility(outcome: Outcome, name: str) -> float:
    """The challenge's normalised utility on the test patients, by `threshold`."""
    score = np.mean([run.test for run in outcome.runs[name]], axis=0)
    return tasks.utility(outcome.test, score >= threshold(outcome, name))


AGES = {"under 50": (0, 50), "50 to 64": (50, 65), "65 to 79": (65, 80), "80 and over": (80, 200)}


def subgroups(outcome: Outcome, names: Sequence[str]) -> list[dict[str, Any]]:
    """A dict a subgroup of test patients (hospital, sex, age, unit): size, share of label 1, each model's areas."""
    test = outcome.test
    first = test.background[test.offset[:-1]]
    known = {name: first[:, j] for j, name in enumerate(test.background_names)}
    chosen: dict[str, NDArray[np.bool_]] = {f"hospital {one}": test.group == one for one in np.unique(test.group)}
    chosen |= {"women": known["Gender"] == 0, "men": known["Gender"] == 1}
    chosen |= {f"age {name}": (known["Age"] >= low) & (known["Age"] < high) for name, (low, high) in AGES.items()}
    if "Unit1" in known:
        chosen |= {"medical unit": known["Unit1"] == 1, "surgical unit": known["Unit2"] == 1}
        chosen["unit not recorded"] = np.isnan(known["Unit1"])
    target = tasks.target(test, outcome.task)
    scores = outcome.scores()
    out = []
    for title, patients in chosen.items():
        rows = target.counts & test.rows_of(patients)
        label = target.label[rows]
        row: dict[str, Any] = {"patients": title, "number": int(patients.sum()), "hours": int(rows.sum())}
        row["share of label 1"] = float(label.mean()) if label.size else None
        for name in names:
            row[f"auroc {name}"], row[f"auprc {name}"] = areas(label, scores[name][rows])
        out.append(row)
    return out
