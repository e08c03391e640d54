"""What is to be predicted: the label of each hour, which hours count, and what an alarm is worth.

The definitions:

- The records' label is 1 from `HORIZON` hours before the onset of sepsis on. So the onset is the first positive row
  + `HORIZON`, unless row 0 is positive already: then it lies anywhere up to row `HORIZON` (left-censored). It may lie
  past the end of the record.
- An hour is at risk when it lies before the onset. Patients whose onset is left-censored have none.
- At time t it is known whether sepsis had begun by t - 1; the label of t - 1 is not: it looks `HORIZON` hours ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .cohort import HORIZON
from .records import Records

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEVER = 2**62  # the onset of who is not septic: later than any row
LEFT_CENSORED = -1
DAY = 24  # hours


@dataclass(frozen=True)
class Target:
    """What a task asks of R rows.

    Attributes:
        label: int8 [R], 0 where a row doesn't count.
        counts: bool [R], the rows that are trained on and scored.
    """

    label: NDArray[np.int8]
    counts: NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------------ the onset


def onset(records: Records) -> NDArray[np.int64]:
    """The row within each patient, [P], in which sepsis begins, `NEVER` or `LEFT_CENSORED`."""
    first = _first_positive(records)
    return np.where(first == 0, LEFT_CENSORED, np.where(first == NEVER, NEVER, first + HORIZON))


def septic_before(records: Records) -> NDArray[np.bool_]:
    """[R]: whether sepsis is known to have begun by the hour before, s(t - 1) = [t - 1 >= onset].

    Where the onset is left-censored it is known from row `HORIZON` on, the latest that it can have been.
    """
    return _row(records) - 1 >= np.repeat(_latest_onset(records), records.length)


STAGES = (48, 24, 12, HORIZON)  # hours before the onset at which the next stage begins


def stage(records: Records) -> NDArray[np.int8]:
    """[R]: how near the onset is, 0 (more than 48 hours, or never) to 4 (within `HORIZON` hours, or it has begun).

    What a network can learn beside the label: of a patient who will be septic tomorrow it learns something today.
    """
    hours = np.repeat(_latest_onset(records), records.length) - _row(records)
    near = np.sum([hours <= limit for limit in STAGES], axis=0, dtype=np.int8)
    return np.where(records.label == 1, np.int8(len(STAGES)), near)


def _first_positive(records: Records) -> NDArray[np.int64]:
    """[P]: the first row with label 1 within each patient, or `NEVER`."""
    first = np.full(records.length.size, NEVER, np.int64)
    positive = np.flatnonzero(records.label)
    patient = np.searchsorted(records.offset, positive, side="right") - 1
    np.minimum.at(first, patient, positive - records.offset[patient])
    return first


def _latest_onset(records: Records) -> NDArray[np.int64]:
    """[P]: the onset, `HORIZON` where it is left-censored."""
    begins = onset(records)
    return np.where(begins == LEFT_CENSORED, HORIZON, begins)


def _row(records: Records) -> NDArray[np.int64]:
    """[R]: each row's place within its patient."""
    return np.arange(records.label.size) - records.first_row


# ------------------------------------------------------------------------------------------------------ the tasks


def _official(records: Records) -> Target:
    return Target(records.label, np.ones(records.label.size, np.bool_))


def _same_day(records: Records) -> Target:
    begins, at_risk = _at_risk(records)
    day = (records.clock.astype(np.int64) - 1) // DAY
    # The clock advances by an hour a row, so it also tells the day of an onset past the record's end.
    day_of_onset = (records.clock.astype(np.int64) + np.where(at_risk, begins - _row(records), 0) - 1) // DAY
    return _target(at_risk & (begins != NEVER) & (day == day_of_onset), at_risk)


def _next_day(records: Records) -> Target:
    begins, at_risk = _at_risk(records)
    return _target(at_risk & (begins - _row(records) <= DAY), at_risk)


def _daily(records: Records) -> Target:
    next_day = _next_day(records)
    counts = next_day.counts & (records.clock.astype(np.int64) % DAY == 0)
    return _target((next_day.label == 1) & counts, counts)


def _at_risk(records: Records) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The onset of each row's patient, [R], and whether the row lies before it."""
    begins = np.repeat(onset(records), records.length)
    return begins, _row(records) < begins


def _target(label: NDArray[np.bool_], counts: NDArray[np.bool_]) -> Target:
    return Target(label.astype(np.int8), counts)


@dataclass(frozen=True)
class Task:
    """What a task asks, in words, and how it is asked of records."""

    asks: str
    define: Callable[[Records], Target]


TASKS = {
    "official": Task("every hour: does sepsis begin within 6 hours, or has it begun?", _official),
    "same_day": Task("every hour at risk: does sepsis begin before the end of this day in intensive care?", _same_day),
    "next_day": Task("every hour at risk: does sepsis begin within the next 24 hours?", _next_day),
    "daily": Task("once a day, at risk: does sepsis begin within the next 24 hours?", _daily),
}


def target(records: Records, task: str) -> Target:
    """The label of each row, and which rows count.

    Raises:
        ValueError: no such task.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}; got {task!r}")
    return TASKS[task].define(records)


# ---------------------------------------------------------------------------------------------------- the utility

# Hours from the onset, and what an hour with or without alarm is worth: Reyna et al., Crit Care Med 2020;48(2):210,
# as in the challenge's own evaluate_sepsis_score.py.
EARLY, OPTIMAL, LATE = -12, -6, 3
BEST_ALARM, WORST_SILENCE, FALSE_ALARM = 1.0, -2.0, -0.05


def gain(records: Records) -> NDArray[np.float64]:
    """What an alarm in each row is worth more than silence, [R]: all that the utility depends on.

    In a septic patient an alarm's worth rises from 0 to 1 between 12 and 6 hours before the onset, falls to 0 3 hours
    after it, and is -0.05 earlier; silence costs nothing until 6 hours before, then ever more, 2 in the end. Later
    than 3 hours after the onset nothing counts. A false alarm costs 0.05. A left-censored onset is put at row
    `HORIZON`, as the challenge does.
    """
    hours = _row(records) - np.repeat(_latest_onset(records), records.length).astype(np.float64)
    alarm = np.where(
        hours <= OPTIMAL,
        np.maximum(BEST_ALARM * (hours - EARLY) / (OPTIMAL - EARLY), FALSE_ALARM),
        BEST_ALARM * (LATE - hours) / (LATE - OPTIMAL),
    )
    silence = np.where(hours <= OPTIMAL, 0.0, WORST_SILENCE * (hours - OPTIMAL) / (LATE - OPTIMAL))
    return np.where(hours <= LATE, alarm - silence, 0.0)


def utility(records: Records, alarm: NDArray[np.bool_]) -> float:
    """The challenge's normalised utility of alarms, bool [R]: 1 is the best that can be, 0 is never to raise one.

    NaN where nobody is septic. It is linear in `alarm`, so bootstraps may sum `gain` by patient.
    """
    worth = gain(records)
    return float(worth[alarm].sum()) / _best(worth)


def utility_curve(records: Records, score: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The utility, [K], of an alarm wherever the score, [R], is at least a threshold, [K] in any order."""
    worth = gain(records)
    order = np.argsort(score, kind="stable")
    # Of the rows in rising order of their score, all from this place on raise an alarm.
    place = np.searchsorted(score[order], thresholds, side="left")
    below = np.concatenate([[0.0], np.cumsum(worth[order])])
    return np.asarray((below[-1] - below[place]) / _best(worth))


def best_threshold(records: Records, score: NDArray[np.float64]) -> float:
    """The threshold with the highest utility: of the scores that occur, or infinity where no alarm is worth it.

    To be chosen on validation patients. Of equal ones the highest, which raises the fewest alarms.
    """
    candidates = np.append(np.unique(score), np.inf)[::-1]
    return float(candidates[np.argmax(utility_curve(records, score, candidates))])


def _best(worth: NDArray[np.float64]) -> float:
    """The gain of the best alarms, those that gain anything; NaN where there are none."""
    best = float(worth[worth > 0].sum())
    return best if best > 0 else float("nan")
