"""From records to the matrix every model sees: a float32 row an hour, made of that hour and those before.

The invariant to hold: a row never depends on a later row of its patient, nor on how many there are. (A
variable never measured so far is therefore `CAP` hours old, and not as old as the record is long.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import Records

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


def build(records: Records, train: NDArray[np.bool_]) -> Features:
    """The features of all records, normalised by the rows of the training patients, bool [P], alone.

    For each variable: the last value measured so far (0, the training mean, before the first), whether it was
    measured this hour, and the hours since it last was (in units of `CAP`, at most 1). Then the background,
    with an indicator for those that some training patient lacks, and the hours in intensive care.
    """
    measured, columns = records.variables, len(records.variables)
    missing_background = np.isnan(records.background)
    train_rows = records.rows_of(train)
    lacking: NDArray[np.bool_] = np.any(missing_background[train_rows], axis=0)
    names = (
        *measured,
        *(f"{name} measured" for name in measured),
        *(f"{name} age" for name in measured),
        *records.background_names,
        *(f"{name} missing" for name, some in zip(records.background_names, lacking) if some),
        "hours in ICU",
    )
    matrix = np.empty((records.label.size, len(names)), np.float32)
    first_row = records.first_row
    for j, name in enumerate(measured):
        value, seen, hours = _carry_forward(records.measured[:, j], first_row)
        matrix[:, j] = _normalise(name, value, train_rows)
        matrix[:, columns + j] = seen
        matrix[:, 2 * columns + j] = hours / CAP
    background = range(3 * columns, 3 * columns + len(records.background_names))
    for j, name, value in zip(background, records.background_names, records.background.T):
        matrix[:, j] = _normalise(name, value, train_rows)
    matrix[:, background.stop : -1] = missing_background[:, lacking]
    matrix[:, -1] = _normalise("hours in ICU", np.log1p(records.clock), train_rows)
    return Features(matrix, names, records.offset)


def _carry_forward(
    value: NDArray[np.float32], first_row: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]:
    """Value last measured [R], NaN before the first; measured in this row?; hours since, at most `CAP`."""
    row = np.arange(value.size)
    seen = ~np.isnan(value)
    # Rows rise, so the running maximum is the last measured row; one before first_row is another patient's.
    last = np.maximum.accumulate(np.where(seen, row, -1))
    known = last >= first_row
    carried = np.where(known, value[last], np.float32(np.nan))
    hours = np.where(known, np.minimum(row - last, CAP), CAP).astype(np.float32)
    return carried, seen, hours


def _normalise(name: str, value: NDArray[np.float32], train_rows: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Mean 0 and deviation 1 over the training rows that have a value; rows without one become 0."""
    value = PREPARE[name](value) if name in PREPARE else value
    known = value[train_rows & ~np.isnan(value)].astype(np.float64)
    mean, deviation = (known.mean(), known.std()) if known.size else (0.0, 1.0)
    normal = ((value - mean) / (deviation if deviation > 0 else 1.0)).astype(np.float32)
    return np.nan_to_num(normal, copy=False).clip(-LIMIT, LIMIT)
