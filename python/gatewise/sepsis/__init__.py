"""The main job: predict sepsis, hour by hour, from intensive-care records, and report how well it went.

`demo` is all of it. Its parts, in the order of the work: `records` (the table and its readers), `cohort` (a
simulated one), `features`, `study` (trains and scores), `report` (table and pictures).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cohort import simulate
from .records import Records, read

if TYPE_CHECKING:
    from .study import Study

__all__ = ["Records", "demo", "format_table", "read", "simulate"]


# How the recurrent networks are trained unless the caller says otherwise. All epochs are run, for the
# learning curves; the weights of the best are kept.
REAL: dict[str, Any] = {
    "max_epochs": 10,
    "hidden_size": 100,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "patience": None,
}
SIMULATED: dict[str, Any] = {
    "max_epochs": 20,
    "hidden_size": 32,
    "batch_size": 32,
    "learning_rate": 3e-3,
    "patience": None,
}


def demo(
    data: str | Path | None = None,
    report: str | Path | None = "gatewise-report",
    *,
    seed: int = 0,
    epochs: int | None = None,
    hidden_size: int | None = None,
    patients: int = 4000,
) -> Study:
    """Trains logistic regression, RNN, GRU and LSTM on hourly records; prints the table, writes the report.

    Args:
        data: directory of the PhysioNet/CinC 2019 records, packed or .psv; None: a simulated cohort.
        patients: of the simulated cohort.
        report: folder for table and pictures, replaced if it holds an earlier report; None: no report.
        seed: of the cohort and of every model.
        epochs, hidden_size: of the recurrent networks; None: what suits the data.

    Raises:
        FileNotFoundError, ValueError: the data are not what they should be (see `read`).
        FileExistsError: the report's folder holds something that is no report; said before any work is done.
        ImportError: an extra is missing; the sentence names it.
    """
    _require_extras()
    from . import report as reports
    from . import study as studies

    if report is not None:
        reports.check_folder(Path(report))
    start = time.perf_counter()
    records = simulate(patients, seed) if data is None else read(data, progress=True)
    source = "simulated cohort" if data is None else data
    share = f"{100 * records.label.mean():.2f} % of them of label 1"
    print(
        f"{source}: {records.length.size:,} patients, {records.label.size:,} hours, {share} "
        f"({time.perf_counter() - start:.1f} s)"
    )
    said = {"max_epochs": epochs, "hidden_size": hidden_size}
    options = (SIMULATED if data is None else REAL) | {k: v for k, v in said.items() if v is not None}
    study = studies.run(records, seed=seed, **options)
    print(f"\n{study.test.length.size:,} test patients, {study.test.label.size:,} hours\n")
    print(format_table(study.table()))
    if report is not None:
        print(f"\nreport: {reports.write(study, report)}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return study


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `Study.table` as aligned text; - for what is not there."""

    def cell(name: str, value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.1f}" if name == "seconds" else f"{value:.3f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    header = list(rows[0])
    lines = [[name.replace("auroc", "AUROC").replace("auprc", "AUPRC") for name in header]]
    lines += [[cell(name, row[name]) for name in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def _require_extras() -> None:
    """Says before any work, not after it, that something is not installed."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ImportError(f'the demo needs {error.name}: pip install "gatewise[demo]"') from error
