"""What goes on inside the models: how long they remember, how a drug's effect runs in them, what gates do in a patient.

Numbers and words, no drawing. Derivatives are those of gatewise's own backward pass, in float64: exact, and never
estimated. T hours, H units, R rows of records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gatewise.layers import Layer
from gatewise.training import softmax

from .cohort import HORIZON, exponential, hump, plateau, true_risk
from .records import Records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gatewise.training import Linear, Network

    Array = NDArray[np.float64]

# ------------------------------------------------------------------------------------- memory: how long it lasts


def influence(layer: Layer, x: Sequence[NDArray[Any]], lags: int, weight: NDArray[Any] | None = None) -> Array:
    """How much what came in tau steps ago moves what goes out now: float64 [lags + 1], for tau = 0, 1, ... lags.

    The mean over sequences of the Frobenius norm of dy_t / dx_{t - tau} at step t = lags, y being the hidden state: one
    backward pass for each row of the Jacobian. With `weight` [R], that of the gradient of the number weight . y.

    Args:
        layer: dropout plays no part, as in prediction.
        x: [T_i, I] each. Those of more than `lags` steps are used, up to there.

    Raises:
        ValueError: no sequence is long enough; or the layer has zoneout.
    """
    used = [one[: lags + 1] for one in x if len(one) > lags]
    if not used:
        longest = max((len(one) for one in x), default=0)
        raise ValueError(f"x: expected a sequence of more than {lags} steps; the longest has {longest}")
    layer = _in_float64(layer)
    y, _, tape = layer.forward(np.stack(used, axis=1).astype(np.float64))
    assert tape is not None
    square = np.zeros(y.shape[:2])
    for row in np.eye(layer.output_size) if weight is None else np.asarray(weight, np.float64)[None]:
        dy = np.zeros_like(y)
        dy[-1] = row
        square += np.square(layer.backward(tape, dy, wanted=["x"])["x"]).sum(axis=2)
    curve: Array = np.sqrt(square).mean(axis=1)[::-1]
    return curve


def autoregressive_influence(coefficients: Sequence[float], lags: int) -> Array:
    """The same of AR(k), y_t = sum of phi_i y_{t - i} + x_t, from its k coefficients: its impulse response, float64
    [lags + 1] (psi_0 = 1, psi_tau = sum of phi_i psi_{tau - i}; Box and Jenkins, Time Series Analysis, 3.1)."""
    from scipy.signal import lfilter

    impulse = np.zeros(lags + 1)
    impulse[0] = 1.0
    response: Array = np.abs(lfilter([1.0], [1.0, *(-phi for phi in coefficients)], impulse))
    return response


def fit_autoregressive(series: Sequence[NDArray[Any]], order: int) -> Array:
    """The coefficients phi_1 ... phi_k of AR(k) over several series [T_i], by least squares, with one mean for all."""
    mean = np.concatenate(series).mean(dtype=np.float64)
    windows = [np.lib.stride_tricks.sliding_window_view(one, order + 1) for one in series if len(one) > order]
    table = np.concatenate(windows).astype(np.float64) - mean
    coefficients: Array = np.linalg.lstsq(table[:, -2::-1], table[:, -1], rcond=None)[0]
    return coefficients


def memory(
    networks: Mapping[str, Network],
    x: Sequence[NDArray[Any]],
    lags: int = 48,
    coefficients: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Array]]:
    """Curves of influence, float64 [lags + 1] each, as shares of the influence at lag 0: group -> name -> curve.

    "before training" has the networks' cells with fresh weights and the autoregressive models, "after training" the
    networks as they are, and, where one of them is an LSTM, "forget gate of an LSTM" that cell with fresh weights and
    the bias of its forget gate at +5 ("open"), 0 ("half open") and -5 ("shut").

    Args:
        networks: trained ones by name, such as `SequenceClassifier.network_`.
        x: as in `influence`.
        coefficients: of autoregressive models by name.
        seed: of the fresh weights.
    """

    def fresh(layer: Layer, **options: Any) -> Array:
        sizes = layer.cell, layer.input_size, layer.hidden_size, layer.num_layers
        return influence(Layer(*sizes, random_state=seed, **options), x, lags)

    ar = {name: autoregressive_influence(phi, lags) for name, phi in (coefficients or {}).items()}
    groups = {
        "before training": ar | {name: fresh(network.layer) for name, network in networks.items()},
        "after training": {name: influence(network.layer, x, lags) for name, network in networks.items()},
    }
    lstm = next((network.layer for network in networks.values() if network.layer.cell == "lstm"), None)
    if lstm is not None:
        biases = {"open": 5.0, "half open": 0.0, "shut": -5.0}
        groups["forget gate of an LSTM"] = {state: fresh(lstm, forget_bias=bias) for state, bias in biases.items()}
    return {group: {name: curve / curve[0] for name, curve in curves.items()} for group, curves in groups.items()}


@dataclass(frozen=True)
class Fade:
    """How a curve of influence fades.

    Attributes:
        half_life: steps after which it stays below half of its start; inf: not within the curve.
        kept: the factor from a step to the next of the exponential nearest to it (least squares on the logarithm).
        straightness: R^2 of that fit: 1 where the curve is an exponential.
        left: at the last lag, as a share of the start.
    """

    half_life: float
    kept: float
    straightness: float
    left: float


def fade(curve: Array) -> Fade:
    """The numbers of a curve [lags + 1] from `influence`; lags at which it is 0 are left out of the fit."""
    above = np.flatnonzero(curve >= curve[0] / 2)[-1]
    half_life = np.inf
    if above + 1 < curve.size:
        before, after = curve[above], max(curve[above + 1], np.finfo(np.float64).tiny)
        half_life = above + np.log(before / (curve[0] / 2)) / np.log(before / after)
    lag = np.flatnonzero(curve > 0)
    logarithm = np.log(curve[lag])
    slope, start = np.polyfit(lag, logarithm, 1) if lag.size > 1 else (-np.inf, 0.0)
    spread = np.square(logarithm - logarithm.mean()).sum()
    rest = np.square(logarithm - start - slope * lag).sum() if lag.size > 1 else 0.0
    straightness = 1 - rest / spread if spread > 0 else 1.0
    return Fade(float(half_life), float(np.exp(slope)), float(straightness), float(curve[-1] / curve[0]))


def _in_float64(layer: Layer) -> Layer:
    """The same function in float64, without anything random."""
    if layer.zoneout != (0.0, 0.0):
        raise ValueError(f"layer: expected one without zoneout; got zoneout={layer.zoneout}")
    copy = Layer(
        layer.cell, layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias,
        bidirectional=layer.bidirectional, proj_size=layer.proj_size, cell_clip=layer.cell_clip, dtype=np.float64,
    )  # fmt: skip
    copy.load_state_dict(layer.state_dict())
    return copy


# ------------------------------------------------------------------------- decay: how the effect of a dose runs

Score = Callable[[Records], "Array"]  # records -> probability of label 1, float64 [R]
SHAPES: dict[str, Callable[[Array, float], Array]] = {
    "exponential": exponential, "delayed hump": hump, "plateau": plateau,
}  # fmt: skip


def dose_response(score: Score, records: Records, drug: str, hours: int = 48, at: int = 6) -> Array:
    """What a standard dose changes: the mean over patients of the change of the log-odds, float64 [hours + 1].

    The dose (1) is added to the record in hour `at` of the stay, and all else in the record stays as it was. The
    patients are those who stay for `hours` more and had no dose of this drug in that hour, the same ones at every hour.

    Raises:
        ValueError: the records have no such drug, or nobody stays that long.
    """
    if drug not in records.doses:
        raise ValueError(f"drug: expected one of {', '.join(records.doses) or 'none'}; got {drug}")
    column = records.variables.index(drug)
    stays = records.length > at + hours
    stays[stays] = np.isnan(records.measured[records.offset[:-1][stays] + at, column])
    if not stays.any():
        raise ValueError(f"records: expected patients who stay for more than {at + hours} hours; got none")
    without = records.select(stays)
    given = replace(without, measured=without.measured.copy())
    rows = without.offset[:-1, None] + at + np.arange(hours + 1)
    given.measured[rows[:, 0], column] = 1.0
    change: Array = (_log_odds(score(given)) - _log_odds(score(without)))[rows].mean(axis=0)
    return change


def decay(
    records: Records, scores: Mapping[str, Score], hours: int = 48
) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """The response to each drug, float64 [hours + 1]: the truth by drug, and what was learned by model and drug."""
    truth = {drug: dose_response(true_risk, records, drug, hours) for drug in records.doses}
    learned = {
        name: {drug: dose_response(score, records, drug, hours) for drug in records.doses}
        for name, score in scores.items()
    }
    return truth, learned


def decay_table(truth: Mapping[str, Array], learned: Mapping[str, Mapping[str, Array]]) -> list[dict[str, Any]]:
    """How well the curves of `decay` match: a dict for each drug and model.

    correlation: of the two curves, which leaves aside their size. size: of the learned curve along the true one, 1
    where they agree. error: the root mean square of the difference as a share of that of the truth. shape, hours,
    misfit: the family nearest to the learned curve, see `shape_of`; true shape and true hours: that of the truth.
    """
    rows = []
    for drug, true in truth.items():
        true_shape, true_hours, _ = shape_of(true)
        for model, curves in learned.items():
            curve = curves[drug]
            shape, hours, misfit = shape_of(curve)
            rows.append({
                "drug": drug, "model": model, "correlation": _correlation(curve, true),
                "size": float(curve @ true / (true @ true)), "error": _relative(curve - true, true),
                "shape": shape, "hours": hours, "misfit": misfit, "true shape": true_shape, "true hours": true_hours,
            })  # fmt: skip
    return rows


def shape_of(curve: Array) -> tuple[str, float, float]:
    """The family of `SHAPES` nearest to a dose response; its half-life, peak or width in hours; and the misfit.

    The label looks `HORIZON` hours ahead and an effect acts after as many (see `cohort`), so that an effect of a(t) on
    the hazard shows as log of the mean of exp(a(t - j)) over j = 0 .. HORIZON - 1, where the hazard is small and else
    constant: the families are fitted as they look through that window, each by its size and its hours. The misfit is
    the root mean square of what is left, as a share of that of the curve.
    """
    from scipy.optimize import least_squares

    best = ("", np.nan, np.inf)
    extreme = curve[np.abs(curve).argmax()]
    for name, shape in SHAPES.items():
        for hours in (3.0, 10.0, 30.0):

            def rest(p: Array, shape: Callable[[Array, float], Array] = shape) -> Array:
                return through_window(p[0] * shape(np.arange(curve.size, dtype=np.float64), np.exp(p[1]))) - curve

            bounds = ([-10.0, np.log(0.5)], [10.0, np.log(500.0)])
            fit = least_squares(rest, [np.clip(extreme, -9, 9), np.log(hours)], bounds=bounds)
            misfit = _relative(fit.fun, curve)
            if misfit < best[2]:
                best = (name, float(np.exp(fit.x[1])), misfit)
    return best


def through_window(effect: Array) -> Array:
    """How an effect on the log-odds of the hazard, 0, 1, ... hours after a dose, shows in those of the label."""
    padded = np.concatenate([np.zeros(HORIZON - 1), effect])
    windows = np.lib.stride_tricks.sliding_window_view(padded, HORIZON)
    seen: Array = np.log(np.exp(windows).mean(axis=1))
    return seen


def _log_odds(probability: Array) -> Array:
    p = np.asarray(probability, np.float64).clip(1e-12, 1 - 1e-12)
    log_odds: Array = np.log(p / (1 - p))
    return log_odds


def _relative(difference: Array, to: Array) -> float:
    """Root mean square of one as a share of that of the other; inf where that is 0."""
    scale = np.linalg.norm(to)
    return float(np.linalg.norm(difference) / scale) if scale else np.inf


def _correlation(one: Array, other: Array) -> float:
    """0 where a curve is flat: it goes with nothing."""
    return float(np.corrcoef(one, other)[0, 1]) if one.std() and other.std() else 0.0


# --------------------------------------------------------------------------------- gates: one patient, hour by hour

GATES = ("input", "forget", "cell", "output")
PAST = "what the network held before"


@dataclass(frozen=True)
class Gates:
    """The gates of an LSTM in one patient's stay: T hours, H units in K groups of like behaviour.

    The sign of a unit's state means nothing by itself. Here it is turned so that a positive one raises the score.

    Attributes:
        hour: [T] hours in intensive care.
        i, f, g, o, c, h: [T, H] input, forget, cell and output gates, cell state, hidden state.
        group: int64 [H], each unit's group, 0 .. K - 1, the longest memory first.
        order: int64 [H], the units group by group, like ones side by side.
        sources: S names: the variables and background that the network sees, and last `PAST`.
        parts: [4, K, T, S] of `GATES`: where the mean of a group's gate before its activation comes from; each source's
            part, less its mean over the stay.
        adds: [T, K], what each group adds to the log-odds of the score; to first order, if the network has classes.
    """

    hour: Array
    i: Array
    f: Array
    g: Array
    o: Array
    c: Array
    h: Array
    group: NDArray[np.int64]
    order: NDArray[np.int64]
    sources: tuple[str, ...]
    parts: Array
    adds: Array

    def kept(self) -> Array:
        """[K] share of its state that a group keeps from an hour to the next: the geometric mean of its forget gate."""
        return np.array([np.exp(np.log(self.f[:, self.group == k]).mean()) for k in range(self.adds.shape[1])])

    def shares(self) -> Array:
        """[4, K, S] share of each source in how the gate moves over the stay; they sum to 1.

        The covariance of a part with the whole, over the variance of the whole; a part that pulls against it is
        negative.
        """
        whole = self.parts.sum(axis=3, keepdims=True)
        variance = np.square(whole).sum(axis=2)
        shares: Array = (self.parts * whole).sum(axis=2) / np.where(variance > 0, variance, 1.0)
        return shares


def gates(
    network: Network,
    x: NDArray[Any],
    names: Sequence[str],
    hour: NDArray[Any],
    groups: int = 4,
    positive: NDArray[np.bool_] | None = None,
) -> Gates:
    """The gates of one patient.

    Args:
        network: of an LSTM, such as `SequenceClassifier.network_`.
        x, names: [T, F] the patient's features and their F names, as `features` makes them.
        hour: [T] hours in intensive care.
        groups: K; units are grouped by Ward's hierarchical clustering of what their gates and states do over the hours.
        positive: bool [classes], which of the network's classes are label 1, where it has more than one output.

    Raises:
        ValueError: the network is not one layer of an LSTM in one direction, or names or classes do not fit it.
    """
    layer, head = network.layer, network.head
    if layer.cell not in ("lstm", "lstm_peephole") or layer.num_layers > 1 or layer.bidirectional or layer.proj_size:
        raise ValueError(f"network: expected one layer of an LSTM in one direction; got {layer!r}")
    if len(head.bias) != (1 if positive is None else len(positive)):
        asked = "one output" if positive is None else f"an output for each of {len(positive)} classes"
        raise ValueError(f"network: expected {asked}; got {len(head.bias)}")
    if len(names) != x.shape[1]:
        raise ValueError(f"names: expected one for each of {x.shape[1]} features; got {len(names)}")
    groups = min(groups, layer.hidden_size)
    layer = _in_float64(layer)
    inputs = np.asarray(x, np.float64)
    y, _, tape = layer.forward(np.ascontiguousarray(inputs[:, None]))
    assert tape is not None
    run = tape.runs[0][0]
    assert run.c is not None
    weight = _slope(head, y[:, 0], positive)
    sign = np.where(weight.sum(axis=0) < 0, -1.0, 1.0)
    i, f, g, o = run.gates[:, 0].swapaxes(0, 1)
    c, h = run.c[:, 0] * sign, y[:, 0] * sign
    behaviour = np.concatenate([i, f, g * sign, o, np.tanh(c)])
    group, order = _group(behaviour.T, f, groups)
    members = np.eye(groups)[group] / np.bincount(group)  # [H, K]: means over groups

    variables = [_variable(name, names) for name in names]
    sources = (*dict.fromkeys(variables), PAST)
    belongs = np.array([[variable == source for source in sources] for variable in variables], np.float64)  # [F, S]
    # What a gate is before its activation: its inverse. What is not the input's is the past's, peepholes included.
    before = np.stack([_log_odds(i), _log_odds(f), np.arctanh(g.clip(-1 + 1e-15, 1 - 1e-15)), _log_odds(o)])
    w_ih = layer.parameters["weight_ih_l0"].reshape(4, layer.hidden_size, -1).copy()
    before[2] *= sign
    w_ih[2] *= sign[:, None]
    mean_weight = np.einsum("qhf,hk->qkf", w_ih, members)
    parts = np.einsum("qkf,tf,fs->qkts", mean_weight, inputs, belongs, optimize=True)
    parts[..., -1] = np.einsum("qth,hk->qkt", before, members) - parts.sum(axis=3)
    parts -= parts.mean(axis=2, keepdims=True)
    adds = np.einsum("th,hk->tk", y[:, 0] * weight, np.eye(groups)[group])
    hours = np.asarray(hour, np.float64)
    return Gates(hours, i, f, g * sign, o, c, h, group, order, sources, parts, adds)


def _slope(head: Linear, h: Array, positive: NDArray[np.bool_] | None) -> Array:
    """[T, H]: the derivative of the score's log-odds by h [T, H]; the head's weight itself where it has one output."""
    weight, bias = head.weight.astype(np.float64), head.bias.astype(np.float64)
    if positive is None:
        return np.repeat(weight, len(h), axis=0)
    p = softmax(np.einsum("th,kh->tk", h, weight) + bias)
    shares = p / np.where(positive, p[:, positive].sum(axis=1)[:, None], -p[:, ~positive].sum(axis=1)[:, None])
    slope: Array = shares @ weight
    return slope


def _group(behaviour: Array, f: Array, groups: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(group [H], order [H]) of units by their behaviour [H, ...], groups by falling mean of f [T, H]."""
    if len(behaviour) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

    tree = linkage(behaviour, "ward", optimal_ordering=True)
    found = fcluster(tree, groups, "maxclust") - 1
    memory = np.bincount(found, np.log(f).mean(axis=0)) / np.bincount(found)
    group = np.argsort(np.argsort(-memory))[found].astype(np.int64)
    place = np.argsort(leaves_list(tree))
    return group, np.lexsort((place, group))


def _variable(name: str, names: Sequence[str]) -> str:
    """The variable that a feature is about: "Lactate age" and "Lactate measured" are about Lactate."""
    stem, _, last = name.rpartition(" ")
    return stem if last in ("measured", "age", "missing") and stem in names else name


# ------------------------------------------------------------------------------------------------- gates in words


def describe(gates: Gates, patient: Records) -> list[str]:
    """What each gate does in this patient, a paragraph a group, in sentences made of the numbers in `gates`.

    Args:
        patient: the records of the patient alone, whose T hours they are.
    """
    hours, units = gates.f.shape
    if patient.label.size != hours:
        raise ValueError(f"patient: expected the {hours} hours of the gates; got {patient.label.size}")
    sizes = np.bincount(gates.group)
    groups = f"{_count(units, 'cell')} in {_count(sizes.size, 'group')}"
    paragraphs = [f"The network has {groups}, told apart by what they do in the {hours} hours of this stay."]
    for k, (size, kept) in enumerate(zip(sizes, gates.kept())):
        of_group = gates.group == k
        i, f, o = (gate[:, of_group].mean(axis=1) for gate in (gates.i, gates.f, gates.o))
        written = (gates.i * gates.g)[:, of_group].mean(axis=1)
        half = np.log(0.5) / np.log(kept)
        said = [
            f"Group {k + 1} ({_count(size, 'cell')} of {units}) keeps {100 * kept:.1f} % of its memory from an hour to "
            f"the next: half of it is gone in {_duration(half)}.",
            _forget(gates, patient, k, f),
        ]
        peak = int(i.argmax())
        said.append(
            f"Its input gate is {i.mean():.2f} open in the mean, and widest ({i[peak]:.2f}) in hour "
            f"{gates.hour[peak]:.0f}{_why(gates, patient, 0, k, peak, +1)}; it moves with {_movers(gates, 0, k)}."
        )
        most = int(np.abs(written).argmax())
        up, why = "up" if written[most] > 0 else "down", _why(gates, patient, 2, k, most, np.sign(written[most]))
        said.append(
            f"What its cell gate writes pushes the score up in {int((written > 0).sum())} of the {hours} hours, and "
            f"most strongly {up} in hour {gates.hour[most]:.0f}{why}."
        )
        low, high = int(gates.adds[:, k].argmin()), int(gates.adds[:, k].argmax())
        said.append(
            f"Its output gate lets {100 * o.mean():.0f} % through in the mean ({100 * o.min():.0f} to "
            f"{100 * o.max():.0f} %), moved by {_movers(gates, 3, k)}; so the group adds between "
            f"{_signed(gates.adds[low, k])} (hour {gates.hour[low]:.0f}) and {_signed(gates.adds[high, k])} (hour "
            f"{gates.hour[high]:.0f}) to the log-odds."
        )
        paragraphs.append(" ".join(said))
    return paragraphs


def _forget(gates: Gates, patient: Records, k: int, f: Array) -> str:
    """The sentence on where a group's forget gate [T] closes most."""
    usual, low = float(np.median(f)), int(f.argmin())
    if usual - f[low] < 0.1:
        return f"Its forget gate hardly moves: {f.min():.2f} to {f.max():.2f}."
    # the hours around the lowest in which it is more than half-way down
    down = f < (usual + f[low]) / 2
    first, last = low, low
    while first > 0 and down[first - 1]:
        first -= 1
    while last + 1 < f.size and down[last + 1]:
        last += 1
    begins, ends = gates.hour[first], gates.hour[last]
    when = f"in hour {begins:.0f}" if first == last else f"in hours {begins:.0f} to {ends:.0f}"
    return (
        f"Its forget gate, {usual:.2f} in most hours, falls to {f[low]:.2f} {when}"
        f"{_why(gates, patient, 1, k, low, -1)}."
    )


def _why(gates: Gates, patient: Records, gate: int, k: int, t: int, sign: float) -> str:
    """The source that pushes a gate most the way it goes in an hour, as the end of a clause."""
    part = sign * gates.parts[gate, k, t]
    source = gates.sources[int(part.argmax())]
    if part.max() <= 0:
        return ""
    if source == PAST:
        return f", out of {PAST}"
    if source not in patient.variables:
        return f", most of all by {source}"
    known = np.flatnonzero(~np.isnan(patient.measured[: t + 1, patient.variables.index(source)]))
    action = "given" if source in patient.doses else "measured"
    if not known.size:
        return f", most of all because {source} was not {action} so far"
    ago = t - int(known[-1])
    when = "that hour" if ago == 0 else f"{_count(ago, 'hour')} before"
    return f", most of all by {source}, {action} {when}"


def _movers(gates: Gates, gate: int, k: int) -> str:
    """The sources that a gate moves with, the largest first, up to three of a tenth or more."""
    share = gates.shares()[gate, k]
    first = [s for s in np.argsort(-share)[:3] if share[s] >= 0.1]
    return _and([f"{gates.sources[s]} ({100 * share[s]:.0f} %)" for s in first]) if first else "no source in particular"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _duration(hours: float) -> str:
    if hours < 1:
        return "less than an hour"
    return f"{hours:.1f} hours" if hours < 10 else f"{hours:.0f} hours" if hours < 1000 else "more than 1000 hours"


def _signed(number: float) -> str:
    return f"{number:+.1f}".replace("-", "−")


def example(records: Records, score: NDArray[Any]) -> int:
    """The patient to show, by number: septic, 24 to 72 hours, given as many of the drugs as any such patient, and among
    these the median by how high the score rose: typical, and neither the best nor the worst the model can do.

    Args:
        score: [R] of the rows of the records.
    """
    first, last = records.offset[:-1], records.offset[1:]
    highest = np.maximum.reduceat(score, first)
    septic = (np.maximum.reduceat(records.label, first) == 1) & (records.label[first] == 0)
    shown = septic & (records.length >= 24) & (records.length <= 72)
    shown = shown if shown.any() else septic if septic.any() else np.ones(last.size, bool)
    given = ~np.isnan(records.measured[:, [records.variables.index(drug) for drug in records.doses]])
    drugs = np.logical_or.reduceat(given, first, axis=0).sum(axis=1)
    shown &= drugs == drugs[shown].max()
    chosen = np.flatnonzero(shown)
    return int(chosen[np.argsort(highest[chosen], kind="stable")[chosen.size // 2]])
