"""Sepsis-3 on hourly rows: organ failure (SOFA), suspicion of infection, and when sepsis begins.

Singer et al., JAMA 2016;315(8):801 (the definition); Seymour et al., JAMA 2016;315(8):762 (its windows); Vincent
et al., Intensive Care Med 1996;22:707 (SOFA). A score of an hour knows that hour and those before, of its
patient alone. Suspicion and onset are labels: they look at the whole stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import last_seen

if TYPE_CHECKING:
    from numpy.typing import NDArray

ORGANS = ("respiration", "coagulation", "liver", "circulation", "brain", "kidney")
WORST_OF = 24  # hours over which the worst points of an organ count
GAS_HOURS, VENTILATOR_HOURS = 4, 8  # how long an FiO2, and a ventilator's setting, is taken to hold

DAY = 24 * 3600
CULTURE_AFTER, ANTIBIOTIC_AFTER = DAY, 3 * DAY  # seconds: culture after antibiotic, antibiotic after culture
BEFORE, AFTER = 48, 24  # hours around the suspicion in which SOFA must rise
RISE = 2


def held(value: NDArray[np.float32], first_row: NDArray[np.int64], hours: int | None = None) -> NDArray[np.float32]:
    """The last value so far, [R]; NaN before a patient's first one, and where it is more than `hours` old."""
    row, last = np.arange(value.size), last_seen(value)
    oldest = first_row if hours is None else np.maximum(first_row, row - hours)
    return np.where(last >= oldest, value[last], np.float32(np.nan)) if value.size else value


def points(hour: Mapping[str, NDArray[np.float32]], first_row: NDArray[np.int64]) -> NDArray[np.int8]:
    """SOFA points of each organ, int8 [R, 6] in the order of `ORGANS`: the worst of 24 hours, 0 if never measured.

    Args:
        hour: float32 [R] each, NaN where there is none. PaO2 mmHg, FiO2 fraction, ventilated (any number: a
            setting was charted), Platelets 10^3/uL, Bilirubin_total mg/dL, MAP mmHg, gcs (a tube is no reason
            for points: the caller decides), Creatinine mg/dL, Urine mL in the hour; the highest rates in the
            hour in ug/kg/min: catecholamine (norepinephrine or epinephrine), dopamine, dobutamine.
        first_row: int64 [R], the first row of each row's patient.

    An FiO2 holds for 4 hours; 3 and 4 points for respiration need a ventilator, whose settings hold for 8. Urine
    counts from a patient's 24th row on, if any was charted in the 24 hours. Vasopressin and phenylephrine are
    not in the score.
    """
    fio2 = held(hour["FiO2"], first_row, GAS_HOURS)
    respiration = _below(hour["PaO2"] / fio2, 100, 200, 300, 400)
    ventilated = ~np.isnan(held(hour["ventilated"], first_row, VENTILATOR_HOURS))
    circulation = np.where(hour["MAP"] < 70, 1, 0)
    catecholamine, dopamine = hour["catecholamine"], hour["dopamine"]
    for given, worth in (
        ((hour["dobutamine"] > 0) | (dopamine > 0), 2),
        ((dopamine > 5) | (catecholamine > 0), 3),
        ((dopamine > 15) | (catecholamine > np.float32(0.1)), 4),
    ):
        circulation[given] = worth
    worst = np.stack(
        [
            np.where(ventilated, respiration, np.minimum(respiration, 2)),
            _below(hour["Platelets"], 20, 50, 100, 150),
            _above(hour["Bilirubin_total"], 1.2, 2, 6, 12),
            circulation,
            _below(hour["gcs"], 6, 10, 13, 15),
            _above(hour["Creatinine"], 1.2, 2, 3.5, 5),
        ],
        axis=1,
    ).astype(np.int8)
    of_hour, row = worst.copy(), np.arange(len(worst))
    for back in range(1, WORST_OF):
        inside = row - back >= first_row
        worst[inside] = np.maximum(worst[inside], of_hour[row[inside] - back])
    kidney = ORGANS.index("kidney")
    worst[:, kidney] = np.maximum(worst[:, kidney], _urine(hour["Urine"], first_row))
    return worst


def _below(value: NDArray[Any], *edges: float) -> NDArray[Any]:
    """Points by how many of the four rising edges a value is below; 0 for NaN."""
    return np.where(np.isnan(value), 0, 4 - np.searchsorted(np.array(edges, np.float32), value, "right"))


def _above(value: NDArray[Any], *edges: float) -> NDArray[Any]:
    """Points by how many of the four rising edges a value reaches; 0 for NaN."""
    return np.where(np.isnan(value), 0, np.searchsorted(np.array(edges, np.float32), value, "right"))


def _urine(urine: NDArray[np.float32], first_row: NDArray[np.int64]) -> NDArray[Any]:
    """3 points below 500 mL in the last 24 rows, 4 below 200."""
    start = np.arange(urine.size) - WORST_OF + 1
    whole = start >= first_row
    start = np.where(whole, start, 0)

    def last_day(x: NDArray[Any]) -> NDArray[np.float64]:
        total: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(x, dtype=np.float64)])
        return total[1:] - total[start]

    volume, charted = last_day(np.nan_to_num(urine)), last_day(~np.isnan(urine))
    return np.where(whole & (charted > 0), np.where(volume < 200, 4, np.where(volume < 500, 3, 0)), 0)


def suspicions(antibiotics: NDArray[np.int64], cultures: NDArray[np.int64]) -> NDArray[np.int64]:
    """When infection was suspected in one subject: seconds, sorted, each once.

    Args:
        antibiotics, cultures: int64 [A, 2] and [C, 2], the first and the last second at which each can have
            been: the same twice where the time is known, a whole day where only the date is.

    An antibiotic and a culture make a suspicion if the culture is taken within 24 h after the antibiotic, or the
    antibiotic given within 72 h after the culture (both borders count); its time is that of the first of the
    two. Of what has only a date the moment nearest to the other is taken.
    """
    a0, a1 = antibiotics[:, None, 0], antibiotics[:, None, 1]
    c0, c1 = cultures[None, :, 0], cultures[None, :, 1]
    antibiotic, culture = np.clip(c0, a0, a1), np.clip(a0, c0, c1)  # nearest, or both the first moment in common
    gap = antibiotic - culture
    pair = (gap >= -CULTURE_AFTER) & (gap <= ANTIBIOTIC_AFTER)
    return np.unique(np.minimum(antibiotic, culture)[pair])


def onset(sofa: NDArray[np.integer[Any]], suspected: NDArray[np.float64]) -> tuple[float, float, float]:
    """When sepsis begins in one stay: hours since its first row, then those of suspicion and of SOFA; or NaN.

    Args:
        sofa: int [T], the score of each hour.
        suspected: float64 [K], hours from the start of the stay at which infection was suspected; may be < 0.

    A suspicion counts if, from 48 h before it to 24 h after it, SOFA rises by 2 over the lowest since the hour
    before that window. Before the stay SOFA is taken as 0, as the definition has it for what is not known: in a
    window that begins with the stay or before, a SOFA of 2 is a rise. Sepsis begins at the earlier of suspicion
    and rise. Of several suspicions that count the one with the earliest onset is taken.
    """
    best = (np.nan, np.nan, np.nan)
    for suspicion in suspected:
        start, stop = int(np.ceil(suspicion - BEFORE)), int(np.floor(suspicion + AFTER)) + 1
        window = sofa[max(start, 0) : max(stop, 0)]
        lowest = np.minimum.accumulate(sofa[start - 1 : stop])[1:] if start > 0 else 0
        risen = window - lowest >= RISE
        if risen.any():
            rise = float(max(start, 0) + risen.argmax())
            begins = min(rise, float(suspicion))
            if not begins >= best[0]:
                best = (begins, float(suspicion), rise)
    return best
