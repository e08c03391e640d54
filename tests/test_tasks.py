"""The tasks: which label an hour has, which hours count, and what an alarm is worth. Cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gatewise.sepsis import cohort, records, tasks
from patients import everybody, real


def patients(*labels: str, clock: tuple[int, ...] | None = None) -> records.Records:
    """A patient for each string of 0s and 1s, the labels hour by hour; `clock` at their first rows, 1 by default."""
    label = np.array([int(one) for one in "".join(labels)], np.int8)
    length = np.array([len(one) for one in labels])
    row = np.concatenate([np.arange(n) for n in length])
    begin = np.repeat(np.ones(len(labels), int) if clock is None else clock, length)
    nothing = np.empty((label.size, 0), np.float32)
    return records.Records(
        measured=nothing, variables=(), background=nothing, background_names=(),
        clock=(begin + row).astype(np.float32), label=label, length=length,
        patient=np.arange(len(labels)).astype(str), group=np.full(len(labels), "A"),
        fold=np.zeros(len(labels), np.int8),
    )  # fmt: skip


def as_text(values: np.ndarray) -> str:
    return "".join(str(int(one)) for one in values)


# ---- labels and rows -----------------------------------------------------------------------------------------


def test_the_onset_is_six_hours_after_the_first_positive_row() -> None:
    """Known, past the end of the record, before it (left-censored), never."""
    table = patients("00" + "1" * 9, "0001", "1111", "0000")
    assert tasks.onset(table).tolist() == [8, 9, tasks.LEFT_CENSORED, tasks.NEVER]


def test_sepsis_is_known_an_hour_after_it_began() -> None:
    table = patients("00" + "1" * 9, "0001", "1" * 9, "0000")
    known = np.split(tasks.septic_before(table), table.offset[1:-1])
    assert [as_text(one) for one in known] == ["00000000011", "0000", "000000011", "0000"]


def test_the_official_task_is_every_hour() -> None:
    table = patients("0011", "1", "000")
    official = tasks.target(table, "official")
    assert as_text(official.label) == "00111000" and official.counts.all()


def test_hours_at_risk_end_with_the_onset() -> None:
    """Patients: onset in row 8 of 11; past the end; left-censored; never."""
    table = patients("00" + "1" * 9, "0001", "1111", "0000")
    for task in ("same_day", "next_day"):
        counts = tasks.target(table, task).counts
        assert as_text(counts) == "1" * 8 + "000" + "1111" + "0000" + "1111"


def test_same_day_means_the_day_of_24_hours_in_intensive_care() -> None:
    """Onset in hour 25, the first of day 2; in hour 24, the last of day 1; in hour 24 of a record that ends before."""
    early, late = "0" * 18 + "1" * 10, "0" * 17 + "1" * 10
    table = patients(early, late, late[:20])
    label = np.split(tasks.target(table, "same_day").label, table.offset[1:-1])
    assert tasks.onset(table).tolist() == [24, 23, 23]
    assert as_text(label[0]) == "0" * 28  # none of day 2's hours lies before its first
    assert as_text(label[1]) == "1" * 23 + "0" * 4 and as_text(label[2]) == "1" * 20
    shifted = patients(early, clock=(5,))  # admitted in hour 5: rows 20.. are day 2, and the onset is in it
    assert as_text(tasks.target(shifted, "same_day").label) == "0" * 20 + "1" * 4 + "0" * 4


def test_next_day_means_24_hours_from_now() -> None:
    table = patients("0" * 34 + "1" * 10, "0" * 34 + "1" * 4)  # onset in row 40, once past the end
    label = np.split(tasks.target(table, "next_day").label, table.offset[1:-1])
    assert as_text(label[0]) == "0" * 16 + "1" * 24 + "0" * 4
    assert as_text(label[1]) == "0" * 16 + "1" * 22


def test_the_daily_grid_is_every_24th_hour_at_risk() -> None:
    table = patients("0" * 44 + "1" * 10, "1" * 50, "0" * 50, clock=(1, 1, 20))  # onset in row 50
    daily = tasks.target(table, "daily")
    assert np.flatnonzero(daily.counts).tolist() == [23, 47, 104 + 4, 104 + 28]
    assert np.flatnonzero(daily.label).tolist() == [47]


def test_tasks_of_the_simulated_cohort_ask_of_the_same_onset() -> None:
    """Its records end before the onset, so every row is at risk but those of the left-censored."""
    table = cohort.simulate(2000, seed=3)
    censored = np.repeat(tasks.onset(table) == tasks.LEFT_CENSORED, table.length)
    assert 0 < censored.sum() < censored.size
    assert not tasks.septic_before(table)[~censored].any()
    next_day = tasks.target(table, "next_day")
    np.testing.assert_array_equal(next_day.counts, ~censored)
    assert (next_day.label[~censored] >= table.label[~censored]).all()  # six hours lie within 24
    assert next_day.label.sum() > 2 * table.label[~censored].sum()


def test_an_unknown_task_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="task: expected one of official, same_day, next_day, daily; got 'weekly'"):
        tasks.target(patients("01"), "weekly")


@real
def test_counts_of_the_real_records() -> None:
    """Rows that count and rows of label 1, in hospital A and B, as the data's description has them."""
    table = everybody()
    a = table.rows_of(table.group == "A")
    expected = {
        "official": (790_215, 17_136, 761_995, 10_780),
        "same_day": (782_601, 18_296, 756_688, 11_073),
        "next_day": (782_601, 32_722, 756_688, 19_429),
        "daily": (23_060, 1_073, 21_065, 663),
    }
    assert set(expected) == set(tasks.TASKS)
    for task, counts in expected.items():
        asked = tasks.target(table, task)
        assert not asked.label[~asked.counts].any()
        got = [int(values[part].sum()) for part in (a, ~a) for values in (asked.counts, asked.label)]
        assert tuple(got) == counts, task
    begins = tasks.onset(table)
    assert (begins == tasks.LEFT_CENSORED).sum() == 203 + 223
    assert ((begins >= table.length) & (begins != tasks.NEVER)).sum() == 15


# ---- utility ---------------------------------------------------------------------------------------------------


def by_the_challenge(label: np.ndarray, alarm: np.ndarray) -> float:
    """A patient's utility as the challenge defines it, hour by hour (Reyna et al., 2020, and its scorer)."""
    total, begins = 0.0, label.argmax() + 6 if label.any() else np.inf
    for t, alarmed in enumerate(alarm):
        late = t - begins
        if not label.any():
            total += -0.05 if alarmed else 0
        elif late <= -6:
            total += max((late + 12) / 6, -0.05) if alarmed else 0
        elif late <= 3:
            total += (3 - late) / 9 if alarmed else -2 * (late + 6) / 9
    return total


def test_the_pieces_of_the_ramps() -> None:
    """Onset in row 20: what an alarm and what silence are worth, and their difference."""
    table = patients("0" * 14 + "1" * 12)
    worth = {
        0: -0.05, 7: -0.05,  # too early
        8: 0.0, 11: 0.5, 14: 1.0,  # an alarm gains ever more from 12 to 6 hours before; silence costs nothing yet
        17: 2 / 3 + 2 / 3, 20: 1 / 3 + 4 / 3,  # later it gains ever less, and silence costs ever more
        23: 0.0 + 2.0,  # 3 hours after the onset
        24: 0.0, 25: 0.0,  # too late to matter
    }  # fmt: skip
    got = tasks.gain(table)
    for row, expected in worth.items():
        assert got[row] == pytest.approx(expected, abs=1e-12), row
    np.testing.assert_array_equal(tasks.gain(patients("000")), -0.05)
    # Septic in row 0: the challenge puts the onset at row 6.
    np.testing.assert_allclose(tasks.gain(patients("1" * 11))[[0, 6, 9, 10]], [1, 1 / 3 + 4 / 3, 2, 0])


def test_utility_is_the_sum_over_patients_normalised() -> None:
    random = np.random.default_rng(0)
    labels = ["0" * int(random.integers(0, 30)) + "1" * int(random.integers(1, 11)) for _ in range(20)]
    table = patients(*labels, "0" * 40, "0", "1" * 12)
    alarm = random.random(table.label.size) < 0.3

    def total(alarm: np.ndarray) -> float:
        parts = zip(np.split(table.label, table.offset[1:-1]), np.split(alarm, table.offset[1:-1]))
        return sum(by_the_challenge(label, some) for label, some in parts)

    best = np.zeros(alarm.size, bool)
    for start, end, first in zip(table.offset[:-1], table.offset[1:], tasks.onset(table)):
        if first != tasks.NEVER:
            first = max(first, 6)
            best[start + max(0, first - 12) : min(start + first + 4, end)] = True
    silent = total(np.zeros(alarm.size, bool))
    assert tasks.utility(table, alarm) == pytest.approx((total(alarm) - silent) / (total(best) - silent))
    assert tasks.utility(table, best) == pytest.approx(1)
    assert tasks.utility(table, ~best) < 0
    assert tasks.utility(table, np.zeros(alarm.size, bool)) == 0
    assert np.isnan(tasks.utility(patients("000"), np.ones(3, bool)))


def test_the_curve_is_the_utility_at_each_threshold_and_the_best_is_its_highest() -> None:
    table = cohort.simulate(300, seed=5)
    assert table.risk is not None
    score = np.round(table.risk, 3)  # with ties
    thresholds = np.array([0.5, 0.0, 0.012, 0.0121, 0.1, 2.0])
    curve = tasks.utility_curve(table, score, thresholds)
    np.testing.assert_allclose(curve, [tasks.utility(table, score >= one) for one in thresholds], atol=1e-12)
    assert curve[5] == 0
    best = tasks.best_threshold(table, score)
    every = tasks.utility_curve(table, score, np.unique(score))
    assert tasks.utility(table, score >= best) == pytest.approx(every.max()) and every.max() > 0.1
    assert best in score
    # Alarms up to 3 hours after the onset, row 23; later ones are worth nothing, and fewer are better.
    assert tasks.best_threshold(patients("0" * 14 + "1" * 12), np.arange(26, 0, -1.0)) == 26 - 23
    # The only patient septic is scored lowest: every alarm that would catch her costs more.
    missed = patients("0" * 14 + "1", *["0" * 300] * 10)
    assert tasks.best_threshold(missed, np.repeat([0.0, 0.9], [15, 3000])) == np.inf
