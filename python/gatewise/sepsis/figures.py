"""All drawing, in one style: pure functions from plain arrays to a matplotlib Figure.

A model has one look in every figure: its colour (Okabe and Ito's, safe for the colour-blind) is its own or its
family's, its marker nobody else's, so that a grey printer loses nothing. A heat map only darkens or only lightens.
Every function takes the `width` of its figure in inches: WIDE for a page, where panels stand side by side, NARROW for
a telephone, where they are stacked and letters keep their size.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[Any]

WIDE, NARROW = 8.6, 4.1  # inches; 96 pixels an inch are 826 and 394
DPI = 150

BLACK, GREY, LIGHT = "#000000", "#777777", "#BBBBBB"
ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"


def _look(color: str, dash: Any, marker: str, linewidth: float = 1.4) -> dict[str, Any]:
    return {"color": color, "linestyle": dash, "marker": marker, "linewidth": linewidth}


LOOKS: dict[str, dict[str, Any]] = {
    "best possible": _look(BLACK, (0, (1, 1)), "", 1.8),
    "logistic regression": _look(GREY, (0, (6, 2)), "v"),
    "naive Bayes": _look(GREY, (0, (1, 2)), "x"),
    "linear SVM": _look(GREY, (0, (3, 2)), "<"),
    "RBF SVM": _look(GREY, (0, (5, 1, 1, 1)), ">"),
    "MLP": _look(GREY, (0, (8, 2, 2, 2)), "p"),
    "gradient boosting": _look(BLACK, (0, (5, 1)), "h"),
    "AR(1)": _look(VERMILLION, (0, (2, 1)), "P"),
    "AR(6)": _look(VERMILLION, (0, (6, 1, 1, 1, 1, 1)), "X"),
    "GLM AR(1)": _look(PURPLE, (0, (3, 1)), "d"),
    "GLM covariates": _look(PURPLE, (0, (5, 2, 1, 2)), "*"),
    "GLM lags": _look(PURPLE, (0, (9, 3)), "+"),
    "RNN": _look(ORANGE, (0, (3, 1, 1, 1)), "^", 1.7),
    "GRU": _look(GREEN, (0, (4, 1)), "s", 1.7),
    "LSTM": _look(BLUE, "-", "o", 2.0),
    "LSTM peephole": _look(SKY, (0, (7, 1)), "D", 1.7),
}
# For lines that are no model: a forget gate held open, a rule of thumb.
OTHERS = (
    _look(BLUE, "-", "o"), _look(VERMILLION, (0, (5, 2)), "s"), _look(GREEN, (0, (3, 1, 1, 1)), "^"),
    _look(BLACK, (0, (1, 1)), "D"), _look(PURPLE, (0, (8, 2)), "v"),
)  # fmt: skip

EVERY_POINT = {"markevery": 1, "markersize": 4}  # for lines of a few points, or of one

# What is shown of a patient's record, in this order, and its unit.
UNITS = {
    "HR": "/min", "MAP": "mmHg", "Resp": "/min", "Temp": "°C", "Lactate": "mmol/L", "WBC": "10³/µL",
    "Creatinine": "mg/dL", "Glucose": "mg/dL", "O2Sat": "%", "Platelets": "10³/µL",
}  # fmt: skip
READINGS, DRUGS = 6, 12  # of them at most
LOSSES = {"Training patients": "train_loss", "Validation patients": "val_loss"}


# ------------------------------------------------------------------------------------------ the influence of the past


def memory(groups: Mapping[str, Mapping[str, Array]], *, width: float = WIDE) -> Figure:
    """How much an input counts some steps later, on a logarithmic axis; a panel a group.

    Args:
        groups: group -> name -> float [lags + 1], the influence of an input 0, 1, ... steps back. A group is what is
            compared: before training, after training, the forget gate open and shut. A curve that becomes 0 leaves the
            panel downwards.
    """
    figure, panels, below = _panels(width, len(groups), 3.2, sharey=True)
    values = np.concatenate([np.ravel(curve) for group in groups.values() for curve in group.values()])
    positive = values[np.isfinite(values) & (values > 0)]
    top = positive.max() if positive.size else 1.0
    for axes, (title, curves) in zip(panels, groups.items()):
        for look, (name, curve) in zip(_looks(curves), curves.items()):
            axes.plot(np.arange(len(curve)), curve, **look, label=name)
        axes.set_yscale("log", nonpositive="clip")
        _style(axes, "steps back, τ", "influence ‖∂y(t) / ∂x(t−τ)‖" if axes in below else "", title)
    # Twelve powers of ten tell fading from lasting; what is under them is rounding.
    bottom = max(positive.min() if positive.size else 0.1, top * 1e-12)
    panels[0].set_ylim(bottom / 2, top * 2)
    _legend(figure, panels)
    return figure


def decay(
    truth: Mapping[str, Array],
    learned: Mapping[str, Mapping[str, Array]],
    *,
    effect: str = "change of the log-odds",
    width: float = WIDE,
) -> Figure:
    """The response to one dose hour by hour; a panel a drug, the truth in black.

    Args:
        truth: drug -> float [hours + 1], 0, 1, ... hours after the dose.
        learned: model -> drug -> the same.
        effect: what the values are, for the axis.
    """
    figure, panels, below = _panels(width, len(truth), 3.0)
    for axes, (drug, curve) in zip(panels, truth.items()):
        axes.axhline(0, color=LIGHT, linewidth=0.8)
        axes.plot(np.arange(len(curve)), curve, color=BLACK, linestyle=(0, (1, 1)), linewidth=3, label="truth")
        for look, (name, responses) in zip(_looks(learned), learned.items()):
            if drug in responses:
                axes.plot(np.arange(len(responses[drug])), responses[drug], **look, label=name)
        _style(axes, "hours after the dose", effect if axes in below else "", drug)
    _legend(figure, panels)
    return figure


# ------------------------------------------------------------------------------------------------------ one patient


def gates(
    states: Mapping[str, Array],
    order: Array,
    cluster: Array,
    hours: Array,
    measured: Array,
    variables: Sequence[str],
    doses: Sequence[str],
    *,
    label: Array | None = None,
    risk: Mapping[str, Array] | None = None,
    title: str = "",
    width: float = WIDE,
) -> Figure:
    """The gates of every unit over a stay as heat maps, and under them what was measured and given, on one time axis.

    Args:
        states: name -> float [T, H], from top to bottom. What lies within 0 and 1 is drawn as a gate, white shut and
            black open; the rest (candidate, cell state) around 0, dark negative and light positive.
        order: int [H], the units from top to bottom; those of a cluster stand together.
        cluster: int [H], the cluster of each unit.
        hours: float [T]. measured: float [T, V], NaN where nothing was. variables: the V names. doses: those among
            them that are medication.
        label: [T], shaded where it is 1. risk: model -> float [T], probabilities.
    """
    risks = 1 if risk else 0
    extra = [1.5] * risks + [1.5] * len(states)
    figure, panels = _stay(width, extra, hours, measured, variables, doses, label)
    if risk:
        _risk(panels[0], hours, risk)
    members = np.asarray(cluster)[order]
    edges = np.flatnonzero(np.diff(members)) + 1
    bounds = np.concatenate([[0], edges, [len(members)]])
    extent = (hours[0] - 0.5, hours[-1] + 0.5, len(members) - 0.5, -0.5)
    for axes, (name, state) in zip(panels[risks:], states.items()):
        gate = np.nanmin(state) >= 0 and np.nanmax(state) <= 1
        limit = 1.0 if gate else max(float(np.nanmax(np.abs(state))), 1e-6)
        image = axes.imshow(
            state[:, order].T, extent=extent, aspect="auto", interpolation="nearest",
            cmap="Greys" if gate else "cividis", vmin=0.0 if gate else -limit, vmax=limit,
        )  # fmt: skip
        for edge in edges:
            axes.axhline(edge - 0.5, color=VERMILLION, linewidth=0.8)
        for k, (start, end) in enumerate(zip(bounds[:-1], bounds[1:])):
            axes.add_patch(_bar(axes, start - 0.5, end - start, BLACK if k % 2 else LIGHT))
        middle = (bounds[:-1] + bounds[1:] - 1) / 2
        axes.set_yticks(_apart(middle, 0.13 * len(members)), [str(members[start]) for start in bounds[:-1]])
        axes.tick_params(axis="y", length=0, pad=9)
        axes.set_ylabel(name)
        figure.colorbar(image, ax=axes, pad=0.01, aspect=10, ticks=[0, 1] if gate else [-limit, 0, limit],
                        format=None if gate else "{x:.2g}")  # fmt: skip
    panels[0].set_title(title, loc="left", fontsize=11, parse_math=False)
    _align(figure, panels)
    return figure


def patient(
    risk: Mapping[str, Array],
    hours: Array,
    measured: Array,
    variables: Sequence[str],
    doses: Sequence[str],
    *,
    label: Array | None = None,
    title: str = "",
    width: float = WIDE,
) -> Figure:
    """The risk under some models hour by hour, and under it what was measured and given; arguments as in `gates`."""
    figure, panels = _stay(width, [2.6], hours, measured, variables, doses, label)
    _risk(panels[0], hours, risk)
    panels[0].set_title(title, loc="left", fontsize=11, parse_math=False)
    _legend(figure, panels[:1])
    _align(figure, panels)
    return figure


def _risk(axes: Axes, hours: Array, risk: Mapping[str, Array]) -> None:
    for look, (name, score) in zip(_looks(risk), risk.items()):
        axes.plot(hours, 100 * np.asarray(score), **look, label=name)
    _style(axes, "", "risk, %")
    axes.set_ylim(0, None)


def _stay(
    width: float,
    extra: list[float],
    hours: Array,
    measured: Array,
    variables: Sequence[str],
    doses: Sequence[str],
    label: Array | None,
) -> tuple[Figure, list[Axes]]:
    """Panels over one time axis: `extra` of these heights, to be drawn by the caller, then the record."""
    names, seen = list(variables), ~np.isnan(measured)
    readings = [names.index(name) for name in UNITS if name in names and name not in doses]
    readings = [j for j in readings if seen[:, j].any()][:READINGS]
    drugs = [names.index(name) for name in doses if name in names and seen[:, names.index(name)].any()]
    drugs = sorted(drugs, key=lambda j: -int(seen[:, j].sum()))[:DRUGS]

    heights = extra + [0.8] * len(readings) + ([0.35 + 0.2 * len(drugs)] if drugs else [])
    figure = _figure(width, sum(heights) + 0.6)
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    for j, axes in zip(readings, panels[len(extra) :]):
        axes.plot(hours[seen[:, j]], measured[seen[:, j], j], "o-", color="#444444", markersize=2.8, linewidth=0.8)
        _style(axes, "", f"{names[j]}\n{UNITS[names[j]]}")
    if drugs:
        axes = panels[-1]
        for line, j in enumerate(drugs):
            given = measured[seen[:, j], j]
            size = 90 * np.clip(given / max(float(given.max()), 1e-12), 0.15, 1)  # of the largest dose here
            axes.scatter(hours[seen[:, j]], np.full(given.size, -line), s=size, marker="|", color="#444444")
        _style(axes, "", "")
        axes.set_yticks([-line for line in range(len(drugs))], [names[j] for j in drugs])
        axes.set_ylim(-len(drugs) + 0.4, 0.6)
    if label is not None and (positive := hours[np.asarray(label) == 1]).size:
        for i, axes in enumerate(panels):
            span = (positive[0] - 0.5, positive[-1] + 0.5)
            axes.axvspan(*span, color=ORANGE, alpha=0.2, linewidth=0, zorder=0, label="" if i else "label 1")
            for edge in span:
                axes.axvline(edge, color=GREY, linewidth=0.7, linestyle=(0, (2, 2)))
    panels[0].set_xlim(hours[0] - 0.5, hours[-1] + 0.5)
    panels[-1].set_xlabel("hours in intensive care")
    return figure, panels


def _align(figure: Figure, panels: list[Axes]) -> None:
    """The names of the y axes in one column, 0.55 inches from the axes: `align_ylabels` would measure every tick."""
    for axes in panels:
        axes.yaxis.set_label_coords(-0.55 / (figure.get_figwidth() - 1.5), 0.5)


def _apart(places: Array, distance: float) -> Array:
    """Rising places moved so far up that each is this far from the next; the last one stays."""
    moved = places.astype(np.float64)
    for i in range(len(moved) - 2, -1, -1):
        moved[i] = min(moved[i], moved[i + 1] - distance)
    return moved


def _bar(axes: Axes, start: float, height: float, color: str) -> Any:
    """A strip left of the axes, along these units."""
    from matplotlib.patches import Rectangle

    return Rectangle((-0.015, start), 0.01, height, color=color, transform=axes.get_yaxis_transform(), clip_on=False)


# ------------------------------------------------------------------------------------------------------- how well


def representatives(quality: Mapping[str, float], family: Mapping[str, str]) -> list[str]:
    """The names to draw where all would be a tangle: every recurrent model, every one without a family (the best
    possible), and the best of each other family; in the order of `quality`, model -> higher is better."""
    shown = {name for name in quality if family.get(name, "recurrent") == "recurrent"}
    for one in set(family.values()):
        members = [name for name in quality if family.get(name) == one]
        if members:
            shown.add(max(members, key=lambda name: quality[name]))
    return [name for name in quality if name in shown]


def roc_pr(
    label: Array, scores: Mapping[str, Array], shown: Iterable[str] | None = None, *, width: float = WIDE
) -> Figure:
    """ROC, and precision against recall, of float [R] scores of R labels; models that are not `shown` as thin lines."""
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

    figure, (roc, pr), _ = _panels(width, 2, 3.9)
    chosen = set(scores if shown is None else shown)
    for look, (name, score) in zip(_looks(scores), scores.items()):
        false, true, _ = roc_curve(label, score)
        precision, recall, _ = precision_recall_curve(label, score)
        areas = f"{auc(false, true):.3f} / {average_precision_score(label, score):.3f}"
        if name not in chosen:
            look = {"color": LIGHT, "linewidth": 0.7, "zorder": 1}
        text = f"{name}  {areas}" if name in chosen else None
        kept = _thin(false, 300)
        roc.plot(false[kept], true[kept], **look, label=text)
        kept = np.flatnonzero(recall >= 0.01)[::-1]  # the first few alarms are noise
        kept = kept[_thin(recall[kept], 300)]
        pr.plot(recall[kept], precision[kept], **look)
    roc.plot([0, 1], [0, 1], color=GREY, linewidth=0.7, label=f"chance  0.500 / {np.mean(label):.3f}")
    pr.axhline(float(np.mean(label)), color=GREY, linewidth=0.7)
    if len(chosen) < len(scores):
        roc.plot([], [], color=LIGHT, linewidth=0.7, label="the other models")
    _style(roc, "false positive rate", "true positive rate", "ROC (area: first number)")
    _style(pr, "recall", "precision", "Precision and recall (area: second)")
    pr.set_ylim(0, None)
    _legend(figure, (roc,))
    return figure


def calibration(label: Array, scores: Mapping[str, Array], *, width: float = WIDE) -> Figure:
    """Observed against predicted frequency in ten equal groups of rows; logarithmic axes, for sepsis is rare."""
    figure = _figure(min(width, 5.6), 4.6 + 0.25 * len(scores) / 2)
    axes = figure.subplots()
    low, high = 1.0, 0.0
    for look, (name, score) in zip(_looks(scores), scores.items()):
        groups = np.array_split(np.argsort(score, kind="stable"), 10)
        predicted = np.array([score[rows].mean() for rows in groups])
        observed = np.array([label[rows].mean() for rows in groups])
        some = (observed > 0) & (predicted > 0)  # a group without sepsis has no place on a logarithmic axis
        axes.plot(predicted[some], observed[some], **look | EVERY_POINT, label=name)
        low = min(low, *predicted[some], *observed[some])
        high = max(high, *predicted[some], *observed[some])
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.7)
    axes.set(xscale="log", yscale="log")
    _style(axes, "predicted probability", "observed frequency", "Calibration, in tenths of the hours")
    _legend(figure, (axes,))
    return figure


def utility(
    thresholds: Array,
    curves: Mapping[str, Array],
    chosen: Mapping[str, float] | None = None,
    *,
    width: float = WIDE,
) -> Figure:
    """Normalised utility against the threshold of the alarm.

    Args:
        thresholds: float [K]. curves: model -> float [K].
        chosen: model -> the threshold that validation patients chose, drawn as a dot on the curve.
    """
    figure = _figure(min(width, 6.4), 4.2 + 0.25 * len(curves) / 2)
    axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=0.7)
    for look, (name, curve) in zip(_looks(curves), curves.items()):
        axes.plot(thresholds, curve, **look, label=name)
        if chosen and name in chosen:
            at = np.interp(chosen[name], thresholds, curve)
            axes.plot([chosen[name]], [at], "o", color=look["color"], markeredgecolor=BLACK, markersize=7, zorder=4)
    if np.min(thresholds) > 0:
        axes.set_xscale("log")
    best = max(float(np.max(curve)) for curve in curves.values())
    axes.set_ylim(max(min(float(np.min(curve)) for curve in curves.values()), -0.5), best + 0.05)
    title = "Dot: chosen on validation patients" if chosen else ""
    _style(axes, "threshold of the alarm", "normalised utility", title)
    _legend(figure, (axes,))
    return figure


def intervals(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    published: Mapping[str, Mapping[str, float]] | None = None,
    *,
    measure: str = "AUROC",
    width: float = WIDE,
) -> Figure:
    """Values with their intervals, a row a name, a panel a group of patients.

    Args:
        panels: panel -> name -> (value, lower end, upper end).
        published: panel -> name -> value, as open diamonds in rows of their own under the measured ones.
    """
    said = published or {}
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    others = list(dict.fromkeys(name for rows in said.values() for name in rows if name not in names))
    figure, axes_of, below = _panels(width, len(panels), 0.5 + 0.26 * (len(names) + len(others)), sharey=True)
    for axes, (title, rows) in zip(axes_of, panels.items()):
        for look, name in zip(_looks(names), names):
            if name in rows:
                value, low, high = rows[name]
                y = -names.index(name)
                axes.plot([low, high], [y, y], color=look["color"], linewidth=2, solid_capstyle="butt")
                axes.plot([value], [y], marker=look["marker"] or "o", color=look["color"], markersize=6)
        for name, value in said.get(title, {}).items():
            y = -(names + others).index(name)
            axes.plot([value], [y], marker="D", color=BLACK, markerfacecolor="white", linestyle="", markersize=6)
        _style(axes, measure, "", title)
        axes.set_yticks(-np.arange(len(names + others)), [*names, *(f"{name} ◇" for name in others)])
        axes.set_ylim(-len(names + others) + 0.4, 0.6)
        axes.tick_params(axis="y", length=0)
        if axes not in below:
            axes.tick_params(axis="y", labelleft=False)
    return figure


# ------------------------------------------------------------------------------------------------------- training


def learning_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], *, width: float = WIDE) -> Figure:
    """Losses of training and validation patients by epoch; model -> its `history_`, a dict an epoch."""
    figure, panels, below = _panels(width, len(LOSSES), 3.4, sharey=True)
    for axes, (title, key) in zip(panels, LOSSES.items()):
        for look, (name, history) in zip(_looks(histories), histories.items()):
            losses = [epoch[key] for epoch in history]
            axes.plot(range(1, len(history) + 1), losses, **look | EVERY_POINT, label=name)
        _style(axes, "epoch", "cross-entropy an hour" if axes in below else "", title)
        axes.locator_params(axis="x", integer=True)
    # The first epoch starts at the constant prediction and would flatten all that follows.
    later = [epoch[key] for history in histories.values() for epoch in history[1:] for key in LOSSES.values()]
    if later:
        panels[0].set_ylim(0.95 * min(later), 1.1 * max(later))
    _legend(figure, panels)
    return figure


BARS: tuple[dict[str, Any], ...] = (
    {"color": BLUE}, {"color": SKY, "hatch": "//"}, {"color": "#999999", "hatch": ".."}, {"color": "#DDDDDD"},
    {"color": BLACK},
)  # fmt: skip


def training_time(rows: Sequence[Mapping[str, Any]], *, width: float = WIDE) -> Figure:
    """Seconds of an epoch; rows as `timing.epochs` has them: model, loop, and the seconds' median, least and most."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    loops = list(dict.fromkeys(row["loop"] for row in rows))
    figure = _figure(min(width, 6.8), 1.3 + 0.3 * len(rows))
    axes = figure.subplots()
    for bar, (k, loop) in zip(BARS, enumerate(loops)):
        mine = [row for row in rows if row["loop"] == loop]
        y = [-models.index(row["model"]) - (k - (len(loops) - 1) / 2) * 0.8 / len(loops) for row in mine]
        seconds = np.array([row["seconds"] for row in mine])
        spread = [seconds - [row["least"] for row in mine], [row["most"] for row in mine] - seconds]
        axes.barh(y, seconds, 0.8 / len(loops), **bar, edgecolor=BLACK, linewidth=0.6, label=loop)
        axes.errorbar(seconds, y, xerr=np.abs(spread), fmt="none", ecolor=BLACK, elinewidth=1, capsize=2)
        for height, row in zip(y, mine):
            axes.annotate(f" {row['seconds']:.2g}", (row["most"], height), va="center", fontsize=9, xytext=(3, 0),
                          textcoords="offset points")  # fmt: skip
    _style(axes, "seconds an epoch: median, least and most", "", "")
    axes.set_yticks(-np.arange(len(models)), models)
    axes.margins(x=0.12)
    axes.set_xlim(0, None)
    _legend(figure, (axes,))
    return figure


# ---------------------------------------------------------------------------------------------------------- style


def save(figure: Figure, form: str) -> bytes:
    """The figure as "png" or "svg": the same figure gives the same bytes. Letters in an SVG are paths, for nobody knows
    which fonts its reader has."""
    from matplotlib import rc_context

    if layout := figure.get_layout_engine():  # once for both forms: it takes longer than the drawing
        layout.execute(figure)
        figure.set_layout_engine("none")
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "gatewise", "svg.fonttype": "path"}):
        figure.savefig(file, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the pictures need matplotlib: pip install "gatewise[demo]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(width: float, count: int, height: float, sharey: bool = False) -> tuple[Figure, list[Axes], list[Axes]]:
    """Panels of this height in inches, side by side as far as they fit, and those of the first column among them."""
    rows = -(-count // max(1, min(count, 3, int(width / 2.7))))
    columns = -(-count // rows)  # four are two by two, and none is alone in its row
    figure = _figure(width, rows * height + 0.8)
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count]), list(grid[:, 0])


def _looks(names: Iterable[str]) -> list[dict[str, Any]]:
    """The look of each name: its model's, also of "RNN trained", unless another name here is of the same model; then
    each has one of its own. Markers stand at equal distances along a line, at other places for the next one."""
    names = list(names)
    models = [max((one for one in LOOKS if f"{name} ".startswith(f"{one} ")), key=len, default="") for name in names]
    looks = []
    for k, model in enumerate(models):
        look = LOOKS[model] if model and models.count(model) == 1 else OTHERS[k % len(OTHERS)]
        looks.append({**look, "markersize": 4.5, "markevery": (0.02 + 0.025 * (k % 5), 0.15)})
    return looks


def _style(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, under them, where it covers nothing."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels()):
            found.setdefault(name, handle)
    if not found:
        return
    letters = max(map(len, found)) + 7  # the line before the name
    columns = max(1, min(len(found), int(figure.get_figwidth() / (0.078 * letters))))
    rows = -(-len(found) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(found.values(), found.keys(), loc="outside lower left", ncols=columns, frameon=False, handlelength=3)


def _thin(x: Array, points: int) -> Array:
    """Indices of at most about so many points of an increasing x, evenly spread, both ends among them: a line of
    100,000 points looks the same and its dashes run together."""
    if len(x) <= points:
        return np.arange(len(x))
    nearest = np.searchsorted(x, np.linspace(x[0], x[-1], points))
    return np.unique(np.concatenate([[0], nearest, [len(x) - 1]]))
