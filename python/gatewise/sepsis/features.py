"""From records to the matrix every model sees: a float32 row an hour, made of that hour and those before.

The invariant to hold: a row never depends on a later row of its patient, nor on how many there are. (A
variable never measured so far is therefore `CAP` hours old, and not as old as the record is long.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import Records, last_seen

if TYPE_CHECKING:
    from numpy.typing import NDArray

CAP = 48.0  # hours after which a measurement counts as old as one never made
LIMIT = 6.0  # standard deviations at which a normalised value is cut: typing errors reach thousands


def _fraction(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """FiO2 is a fraction no lower than the air's; some entries are percentages, some neither (-50..4000)."""
    return value.clip(0.21, 1.0)


def _signed_log(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """For hours that span minutes to months."""
    return np.sign(value) * np.log1p(np.abs(value))


PREPARE = {"FiO2": _fraction, "HospAdmTime": _signed_log}


@dataclass(frozen=True)
class Features:
    """float32 [R, F] normalised features and their F names; patient i's rows are offset[i]:offset[i + 1]."""

    matrix: NDArray[np.float32]
    names: tuple[str, ...]
    offset: NDArray[np.int64]

    def sequences(self, patients: NDArray[np.bool_]) -> list[NDArray[np.float32]]:
        """The [T_i, F] of the patients chosen by a bool [P]: views, nothing is copied."""
        return split_rows(self.matrix, self.offset, patients)


def split_rows(rows: NDArray[Any], offset: NDArray[np.int64], patients: NDArray[np.bool_]) -> list[NDArray[Any]]:
    """Views of `rows` [R, ...], one for each patient chosen by a bool [P]."""
    return [rows[offset[i] : offset[i + 1]] for i in np.flatnonzero(patients)]


# ------------------------------------------------------------------------------ the columns before normalising


@dataclass(frozen=True)
class Carried:
    """What a variable's past tells in each row, [R] each.

    Attributes:
        value: float32, last measured so far; NaN before the first.
        seen: bool, measured in this row.
        hours: float32, since it last was; at most `CAP`, which also stands for never.
    """

    value: NDArray[np.float32]
    seen: NDArray[np.bool_]
    hours: NDArray[np.float32]


# The groups of columns, each with a column of every variable: what follows the variable's name, what the column
# holds, and whether it is normalised. The order is that of the matrix; a new group is a new line.
GROUPS: tuple[tuple[str, Callable[[Carried], NDArray[Any]], bool], ...] = (
    ("", lambda carried: carried.value, True),
    (" measured", lambda carried: carried.seen, False),
    (" age", lambda carried: carried.hours / CAP, False),
)
CLOCK_NAME = "hours in ICU"


def _columns(records: Records) -> Iterator[tuple[str, NDArray[Any], bool]]:
    """Name, values [R] with NaN where there is none, and whether they are normalised; one variable at a time."""
    first_row = records.first_row
    for name, measured in zip(records.variables, records.measured.T):
        carried = _carry_forward(_prepared(name, measured), first_row)
        for suffix, column, normalised in GROUPS:
            yield name + suffix, column(carried), normalised
    for name, value in zip(records.background_names, records.background.T):
        yield name, _prepared(name, value), True
        yield f"{name} missing", np.isnan(value), False
    yield CLOCK_NAME, np.log1p(records.clock), True


def _prepared(name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
    return PREPARE[name](value) if name in PREPARE else value


def _carry_forward(value: NDArray[np.float32], first_row: NDArray[np.int64]) -> Carried:
    row = np.arange(value.size)
    seen = ~np.isnan(value)
    last = last_seen(value)
    known = last >= first_row
    carried = np.where(known, value[last], np.float32(np.nan))
    hours = np.where(known, np.minimum(row - last, CAP), CAP).astype(np.float32)
    return Carried(carried, seen, hours)


# ------------------------------------------------------------------------------------------------ what is learned


@dataclass(frozen=True)
class Preparation:
    """How records become features: all that is learned from the training patients, applied to anybody.

    Attributes:
        names: the F columns.
        variables, background_names: those of the records that it was fitted to, and can be applied to.
        mean, deviation: float64 [F], of the training rows that have a value; 0 and 1 where a column stays as it is.
    """

    names: tuple[str, ...]
    variables: tuple[str, ...]
    background_names: tuple[str, ...]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    def __call__(self, records: Records) -> Features:
        """The features of the records: mean 0 and deviation 1 in training, cut at `LIMIT`, 0 without a value.

        Raises:
            ValueError: records of other variables or background than those of the training patients.
        """
        for what in ("variables", "background_names"):
            expected, got = getattr(self, what), getattr(records, what)
            if expected != got:
                raise ValueError(f"records: expected the {what} of the training patients, {expected}; got {got}")
        matrix = np.empty((records.label.size, len(self.names)), np.float32)
        place = {name: j for j, name in enumerate(self.names)}
        for name, value, normalised in _columns(records):
            if name not in place:  # whether a background is missing that no training patient lacked
                continue
            j = place[name]
            if not normalised:
                matrix[:, j] = value
                continue
            normal = ((value - self.mean[j]) / self.deviation[j]).astype(np.float32)
            matrix[:, j] = np.nan_to_num(normal, copy=False).clip(-LIMIT, LIMIT)
        return Features(matrix, self.names, records.offset)


def fit(training: Records) -> Preparation:
    """Learns from the training patients.

    For each variable: the last value measured so far (0, the training mean, before the first), whether it was
    measured this hour, and the hours since it last was (in units of `CAP`, at most 1). Then the background,
    with an indicator for those that some training patient lacks, and the hours in intensive care.
    """
    background = training.background_names
    lacking: NDArray[np.bool_] = np.any(np.isnan(training.background), axis=0)
    names = (
        *(name + suffix for suffix, _, _ in GROUPS for name in training.variables),
        *background,
        *(f"{name} missing" for name, some in zip(background, lacking) if some),
        CLOCK_NAME,
    )
    learned = {name: _spread(value) for name, value, normalised in _columns(training) if normalised}
    mean, deviation = np.array([learned.get(name, (0.0, 1.0)) for name in names], np.float64).T
    return Preparation(names, training.variables, background, mean, deviation)


def _spread(value: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and deviation of what is there; 0 and 1 where nothing is, 1 where nothing varies."""
    known = value[~np.isnan(value)].astype(np.float64)
    mean, deviation = (known.mean(), known.std()) if known.size else (0.0, 1.0)
    return mean, deviation if deviation > 0 else 1.0


def build(records: Records, train: NDArray[np.bool_]) -> Features:
    """The features of all records, normalised by the rows of the training patients, bool [P], alone."""
    return fit(records.select(train))(records)
