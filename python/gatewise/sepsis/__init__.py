"""The main job: predict sepsis, hour by hour, from intensive-care records, and report what remembers and how long.

`demo` is all of it. Its parts, in the order of the work: `records` (the table and its readers), `mimic` (records from
MIMIC-III tables, labelled by `sofa`), `cohort` (simulated ones), `features`, `tasks`, `models`, `study` (trains and
scores), `insight` (looks into the networks), `timing`, `published`, and `chapters`, which tells it all by `figures` and
`report`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cohort import simulate
from .records import Records, read

if TYPE_CHECKING:
    from .chapters import Results

__all__ = ["Records", "demo", "find", "format_table", "read", "simulate"]


# How the recurrent networks are trained unless the caller says otherwise. All epochs are run, for the
# learning curves; the weights of the best are kept.
REAL: dict[str, Any] = {
    "max_epochs": 6,
    "hidden_size": 100,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "patience": None,
}
# With these an LSTM comes within .01 of the best possible AUROC from 24,000 simulated patients on.
SIMULATED: dict[str, Any] = {
    "max_epochs": 8,
    "hidden_size": 32,
    "batch_size": 32,
    "learning_rate": 6e-3,
    "schedule": "cosine",
    "weight_decay": 3e-5,
    "patience": None,
}
PATIENTS = 30_000  # of the simulated cohort


def demo(
    data: str | Path | None = None,
    report: str | Path | None = "gatewise-report",
    *,
    seed: int = 0,
    seeds: int = 3,
    epochs: int | None = None,
    hidden_size: int | None = None,
    patients: int | None = None,
) -> Results:
    """The study: trains every model, prints the tables, writes the report.

    What is trained is kept under the report's folder as it is finished; the same call goes on where another stopped.

    Args:
        data: directory of the PhysioNet/CinC 2019 records, of MIMIC-III tables, or of folders with both; None: the
            simulated cohort alone, which stands in every report.
        report: folder of the page, tables and figures, replaced if it holds an earlier report; None: no report, and
            nothing is kept.
        seed: of the cohort and of every model.
        seeds: trainings of RNN, GRU and LSTM on the official task of the 2019 records.
        epochs, hidden_size: of the recurrent networks; None: what suits the data.
        patients: how many, simulated and of the 2019 records each; None: `PATIENTS` simulated ones, all real ones.

    Raises:
        FileNotFoundError, ValueError: the data are not what they should be (see `read` and `mimic.read_mimic`).
        FileExistsError: the report's folder holds something that is no report; said before any work is done.
        ImportError: an extra is missing; the sentence names it.
    """
    _require_extras()
    from . import chapters, study
    from . import report as reports

    if report is not None:
        reports.check_folder(Path(report))
    challenge, mimic = (None, None) if data is None else find(data)
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    def store(name: str, *settings: Any) -> study.Store:
        return study.Store(None if report is None else Path(report) / reports.KEPT / name, study.digest(*settings))

    def options(usual: dict[str, Any]) -> dict[str, Any]:
        said = {"max_epochs": epochs, "hidden_size": hidden_size}
        return usual | {name: value for name, value in said.items() if value is not None}

    cohort = simulate(PATIENTS if patients is None else patients, seed)
    say(_size("simulated cohort", cohort))
    settings = options(SIMULATED)
    results = chapters.Results(
        chapters.simulated(cohort, store("simulated", cohort, settings, seed), say, seed=seed, **settings)
    )
    _show(results.simulated.table)
    if challenge is not None:
        records = read(challenge, progress=True)
        if patients is not None:
            order = np.random.default_rng(seed).permutation(records.length.size)
            records = records.select(order < patients)
        say(_size(str(challenge), records))
        settings = options(REAL) | {"stages": True}
        kept = store("challenge", records, settings, seed)
        results.challenge = chapters.challenge(records, kept, say, seeds, seed=seed, **settings)
        for outcome in results.challenge.tasks.values():
            _show(outcome.table)
        results.seconds_an_epoch, results.not_timed = chapters.speed(records, kept, say, settings)
        results.published = chapters.published(Path(report) if report is not None else None)
    if mimic is not None:
        results.medication = chapters.medication(mimic, store("mimic"), say, seed)
    if report is not None:
        print(f"\nreport: {chapters.tell(results).write(report)}")
    say("done")
    return results


def find(directory: str | Path) -> tuple[Path | None, Path | None]:
    """Where the PhysioNet/CinC 2019 records and the MIMIC-III tables lie: the directory itself, or a folder in it.

    Raises:
        FileNotFoundError: there is no such directory, or neither is there.
    """
    directory = Path(directory)
    folders = [directory, *sorted(path for path in directory.iterdir() if path.is_dir())] if directory.is_dir() else []

    def has(folder: Path, *patterns: str) -> bool:
        return any(True for pattern in patterns for _ in folder.glob(pattern))

    mimic = next((folder for folder in folders if has(folder, "ADMISSIONS.csv*", "admissions.csv*")), None)
    packed = next((folder for folder in folders if has(folder, "*.npz")), None)
    challenge = packed or (directory if folders and has(directory, "**/*.psv") else None)
    if challenge is None and mimic is None:
        raise FileNotFoundError(
            f"{directory}: expected PhysioNet/CinC 2019 records (*.npz or *.psv) or MIMIC-III tables (ADMISSIONS.csv "
            f"or .csv.gz and the others), in it or in a folder of it; found neither"
        )
    return challenge, mimic


def _size(name: str, records: Records) -> str:
    share = f"{100 * records.label.mean():.2f} % of them of label 1"
    return f"{name}: {records.length.size:,} patients, {records.label.size:,} hours, {share}"


def _show(table: Sequence[dict[str, Any]]) -> None:
    print(f"\n{format_table(table)}\n", flush=True)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the same columns as aligned text; - for what is not there, and the ends of intervals left out."""

    def cell(name: str, value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.1f}" if name == "seconds" else f"{value:.3f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    header = [name for name in rows[0] if not name.endswith((" low", " high"))]
    lines = [header, *([cell(name, row[name]) for name in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def _require_extras() -> None:
    """Says before any work, not after it, that something is not installed."""
    try:
        for package in ("matplotlib", "polars", "sklearn", "statsmodels", "tqdm"):
            import_module(package)
    except ImportError as error:
        raise ImportError(f'the demo needs {error.name}: pip install "gatewise[demo]"') from error
