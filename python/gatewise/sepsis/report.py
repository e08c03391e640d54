"""The report folder: the table as CSV and four pictures, in one style that survives a grey printer.

Models are told apart by colour (Okabe and Ito's, safe for the colour-blind), by dash, and keep their order.
"""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .features import split_rows
from .records import Records
from .study import BEST, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("table.csv", "roc_pr.png", "calibration.png", "learning_curves.png", "patient.png")
LOOKS: dict[str, dict[str, Any]] = {
    BEST: {"color": "black", "linestyle": (0, (1, 1)), "linewidth": 1.6},
    "logistic regression": {"color": "#777777", "linestyle": (0, (6, 2)), "linewidth": 1.6},
    "RNN": {"color": "#E69F00", "linestyle": (0, (3, 1, 1, 1)), "linewidth": 1.6},
    "GRU": {"color": "#009E73", "linestyle": (0, (4, 1)), "linewidth": 1.6},
    "LSTM": {"color": "#0072B2", "linestyle": "-", "linewidth": 2.0},
}
ONSET = "#D55E00"
PANELS = {"HR": "/min", "MAP": "mmHg", "Resp": "/min", "Temp": "°C", "Lactate": "mmol/L", "WBC": "10³/µL"}
LOSSES = {"Training patients": "train_loss", "Validation patients": "val_loss"}


def write(study: Study, folder: str | Path) -> Path:
    """Writes the report and returns its folder; a report already there is replaced, all at once or not at
    all.

    Raises:
        FileExistsError: the folder holds something that is no report.
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        draft.chmod(0o755)  # mkdtemp's is for the owner only
        _write_table(study, draft / "table.csv")
        for name, draw in (
            ("roc_pr.png", _roc_pr),
            ("calibration.png", _calibration),
            ("learning_curves.png", _learning_curves),
            ("patient.png", _patient),
        ):
            draw(study).savefig(draft / name, dpi=150)
        check_folder(folder)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def check_folder(folder: Path) -> None:
    """Raises FileExistsError when a report would delete anything that is not part of a report."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: expected a folder to write the report to; it is a file")
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    if strangers:
        raise FileExistsError(
            f"{folder}: expected an empty folder or an earlier report to replace; it holds {strangers[0]}"
        )


def _write_table(study: Study, path: Path) -> None:
    rows = study.table()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the pictures need matplotlib: pip install "gatewise[demo]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def _roc_pr(study: Study) -> Figure:
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = _figure(10, 4.6)
    roc, pr = figure.subplots(1, 2)
    label = study.test.label
    for row, (name, score) in zip(study.table(), study.scores.items()):
        false, true, _ = roc_curve(label, score)
        roc.plot(false, true, **LOOKS[name], label=f"{name}  {row['auroc']:.3f}")
        precision, recall, _ = precision_recall_curve(label, score)
        # The first few alarms are noise: from 1 % of the recall on. Thinned, or the dashes run together.
        kept = np.flatnonzero(recall >= 0.01)
        kept = kept[:: max(1, kept.size // 400)]
        pr.plot(recall[kept], precision[kept], **LOOKS[name], label=f"{name}  {row['auprc']:.3f}")
    roc.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, label="chance  0.500")
    pr.axhline(label.mean(), color="#BBBBBB", linewidth=0.8, label=f"chance  {label.mean():.3f}")
    _style(roc, "false positive rate", "true positive rate", "ROC: area under the curve")
    _style(pr, "recall", "precision", "Precision and recall: average precision")
    roc.set_aspect("equal")
    roc.legend(loc="lower right", frameon=False)
    pr.legend(loc="upper right", frameon=False)
    return figure


def _calibration(study: Study) -> Figure:
    """Observed against predicted frequency in ten equal groups; logarithmic axes, for sepsis is rare."""
    figure = _figure(5.6, 5.2)
    axes = figure.subplots()
    low, high = 1.0, 0.0
    for name, score in study.scores.items():
        groups = np.array_split(np.argsort(score, kind="stable"), 10)
        predicted = np.array([score[rows].mean() for rows in groups])
        observed = np.array([study.test.label[rows].mean() for rows in groups])
        some = observed > 0  # a group without sepsis has no place on a logarithmic axis
        axes.plot(predicted[some], observed[some], **LOOKS[name], marker="o", markersize=3.5, label=name)
        low = min(low, predicted[some].min(), observed[some].min())
        high = max(high, predicted.max(), observed.max())
    axes.plot([low, high], [low, high], color="#BBBBBB", linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    _style(axes, "predicted probability", "observed frequency", "Calibration, in tenths of the test hours")
    axes.legend(loc="upper left", frameon=False)
    return figure


def _learning_curves(study: Study) -> Figure:
    figure = _figure(10, 4.2)
    train, validation = figure.subplots(1, 2, sharey=True)
    for model in study.models:
        if model.history:
            epochs = range(1, len(model.history) + 1)
            for axes, key in zip((train, validation), LOSSES.values()):
                axes.plot(epochs, [epoch[key] for epoch in model.history], **LOOKS[model.name], marker="o",
                          markersize=3.5, label=model.name)  # fmt: skip
    for axes, title in zip((train, validation), LOSSES):
        _style(axes, "epoch", "cross-entropy an hour" if axes is train else "", title)
        axes.xaxis.get_major_locator().set_params(integer=True)
    # The first epoch starts at the constant prediction and would flatten all that follows.
    later = [epoch[key] for model in study.models for epoch in model.history[1:] for key in LOSSES.values()]
    if later:
        train.set_ylim(0.95 * min(later), 1.15 * max(later))
        validation.legend(loc="upper right", frameon=False)
    return figure


def _patient(study: Study) -> Figure:
    """One test patient: the risk under all models, and under it what was measured and given."""
    test = study.test
    one = _example(test, next(reversed(study.scores.values())))
    start, end = test.offset[one], test.offset[one + 1]
    hours, label, measured = test.clock[start:end], test.label[start:end], test.measured[start:end]
    readings = [j for j, name in enumerate(test.variables) if name in PANELS and not np.isnan(measured[:, j]).all()]
    drugs = [j for j, name in enumerate(test.variables) if name in test.doses]

    heights = [3.0] + [1.0] * len(readings) + ([0.3 + 0.25 * len(drugs)] if drugs else [])
    figure = _figure(8, 1.05 * sum(heights))
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for name, score in study.scores.items():
        panels[0].plot(hours, 100 * score[start:end], **LOOKS[name], label=name)
    title = f"Patient {test.patient[one]} ({test.group[one]}): risk of sepsis hour by hour"
    _style(panels[0], "", "risk, %", title)
    top = panels[0].get_ylim()[1]
    panels[0].set_yticks([tick for tick in panels[0].get_yticks() if 0 <= tick <= min(top, 100)])
    panels[0].set_ylim(0, 1.4 * top)  # room for the legend above the curves
    for j, axes in zip(readings, panels[1:]):
        seen = ~np.isnan(measured[:, j])
        axes.plot(hours[seen], measured[seen, j], "o-", color="#444444", markersize=2.8, linewidth=0.8)
        _style(axes, "", f"{test.variables[j]}\n{PANELS[test.variables[j]]}")
    if drugs:
        for line, j in enumerate(drugs):
            given = np.flatnonzero(~np.isnan(measured[:, j]))
            height = np.full(given.size, -line)
            panels[-1].scatter(hours[given], height, s=45 * measured[given, j], marker="|", color="#444444")
        panels[-1].set_yticks([-line for line in range(len(drugs))], [test.variables[j] for j in drugs])
        _style(panels[-1], "", "")
        panels[-1].set_ylim(-len(drugs) + 0.4, 0.6)
    positive = hours[label == 1]
    for axes in panels:
        if positive.size:
            axes.axvspan(positive[0] - 0.5, positive[-1] + 0.5, color=ONSET, alpha=0.12, linewidth=0,
                         label="label 1: sepsis in 6 h" if axes is panels[0] else None)  # fmt: skip
    panels[0].legend(loc="upper left", frameon=False, ncols=3)
    panels[-1].set_xlabel("hours in intensive care")
    figure.align_ylabels(panels[: len(readings) + 1])
    return figure


def _example(test: Records, score: Any) -> int:
    """The patient to show: septic, a stay of 24 to 72 hours, and the median one by how far the score rose.

    The median, so that the picture is typical, and neither the best nor the worst the model can do.
    """
    labels = split_rows(test.label, test.offset, np.ones(test.length.size, bool))
    scores = split_rows(score, test.offset, np.ones(test.length.size, bool))
    septic = [i for i, label in enumerate(labels) if label.any() and not label[0]]
    shown = [i for i in septic if 24 <= test.length[i] <= 72] or septic or [0]
    return sorted(shown, key=lambda i: float(scores[i].max()))[len(shown) // 2]
