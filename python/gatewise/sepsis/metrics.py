"""How well scores rank: areas under the curves, and their spread over patients by the bootstrap.

Hours of a patient are not independent, patients are: a replicate draws patients with replacement and takes all their
hours. A patient drawn k times counts k-fold, so a replicate is a weight an hour, and the scores are sorted only once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

REPLICATES = 200
LEVEL = 0.95  # of an interval, from its percentiles


def areas(label: NDArray[np.int8], score: Floats) -> tuple[float, float]:
    """Area under the ROC curve, and average precision; NaN where only one kind of label is."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if label.size == 0 or label.min() == label.max():
        return float("nan"), float("nan")
    return float(roc_auc_score(label, score)), float(average_precision_score(label, score))


def draws(patients: int, replicates: int = REPLICATES, seed: int = 0) -> NDArray[np.int64]:
    """How often each patient is drawn, int64 [replicates, patients]; a row sums to `patients`."""
    return np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / max(patients, 1)), replicates)


def replicated_areas(
    label: NDArray[np.int8], score: Floats, patient: NDArray[np.int64], drawn: NDArray[np.int64]
) -> Floats:
    """`areas` of every replicate, float64 [replicates, 2].

    Args:
        label, score: [R]; patient: [R], whose hour each is, an index into the columns of `drawn`.
        drawn: [replicates, patients], as `draws` makes it; the same for two models makes their difference a paired one.
    """
    order = np.argsort(-score, kind="stable")
    value, positive, patient = score[order], label[order].astype(np.float64), patient[order]
    starts = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))  # of each group of equal scores
    out = np.full((len(drawn), 2), np.nan)
    for row, weight in zip(out, drawn.astype(np.float64)):
        w = weight[patient]
        hits, all_ = np.add.reduceat(w * positive, starts), np.add.reduceat(w, starts)
        misses, found, seen = all_ - hits, np.cumsum(hits), np.cumsum(all_)
        if found[-1] in (0, seen[-1]):
            continue
        above = found - hits / 2  # positives above a negative of this group; of its own group, half
        row[0] = (misses @ above) / (found[-1] * (seen[-1] - found[-1]))
        precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
        row[1] = (hits @ precision) / found[-1]
    return out


def interval(value: float, replicates: Floats) -> tuple[float, float, float]:
    """(value, low, high): an estimate and its percentile interval (Efron and Tibshirani 1993, chapter 13); its ends are
    NaN where no replicate has a value."""
    known = replicates[~np.isnan(replicates)]
    if not known.size:
        return value, float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)
