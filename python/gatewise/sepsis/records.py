"""Hourly patient records in one table, and the readers of the PhysioNet/CinC Challenge 2019.

Invariant: the rows of a patient are adjacent and in the order of time, one row an hour. A reader keeps what
the file says, to the last published digit; what is implausible is dealt with in `features`.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The challenge's columns, in its order: empty in an hour without a measurement; known at admission.
MEASURED = (
    "HR", "O2Sat", "Temp", "SBP", "MAP", "DBP", "Resp", "EtCO2", "BaseExcess", "HCO3", "FiO2", "pH", "PaCO2",
    "SaO2", "AST", "BUN", "Alkalinephos", "Calcium", "Chloride", "Creatinine", "Bilirubin_direct", "Glucose",
    "Lactate", "Magnesium", "Phosphate", "Potassium", "Bilirubin_total", "TroponinI", "Hct", "Hgb", "PTT",
    "WBC", "Fibrinogen", "Platelets",
)  # fmt: skip
BACKGROUND = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime")
CLOCK = "ICULOS"
LABEL = "SepsisLabel"
COLUMNS = (*MEASURED, *BACKGROUND, CLOCK, LABEL)

FOLDS = 20
TEST_FOLDS, VALIDATION_FOLDS = (0, 1, 2, 3), (4, 5)  # training: the other fourteen
PER_PATIENT = ("patient_id", "length", "fold")  # what the packed form holds beside the columns
PACKED_NAN = -(2**31)  # the packed form holds value x 100 as int32; this one stands for an empty field


@dataclass(frozen=True)
class Records:
    """Hourly records of P patients in R rows.

    Attributes:
        measured: float32 [R, V], NaN in an hour without a measurement.
        variables: the V names.
        background: float32 [R, B], what is known from admission on; NaN where it was not recorded.
        background_names: the B names.
        clock: float32 [R], hours in intensive care.
        label: int8 [R], 1 where sepsis begins within the horizon (or has begun).
        length: int64 [P], rows of each patient.
        patient: str [P]; group: str [P], the hospital; fold: int8 [P] in 0..19.
        doses: the names among `variables` that are medication given, not a value measured.
        risk: float64 [R], the exact probability of label 1 given the record up to that hour; None for real
        patients.
    """

    measured: NDArray[np.float32]
    variables: tuple[str, ...]
    background: NDArray[np.float32]
    background_names: tuple[str, ...]
    clock: NDArray[np.float32]
    label: NDArray[np.int8]
    length: NDArray[np.int64]
    patient: NDArray[np.str_]
    group: NDArray[np.str_]
    fold: NDArray[np.int8]
    doses: tuple[str, ...] = ()
    risk: NDArray[np.float64] | None = None

    @property
    def offset(self) -> NDArray[np.int64]:
        """int64 [P + 1]: the rows of patient i are offset[i]:offset[i + 1]."""
        return np.concatenate([[0], np.cumsum(self.length)]).astype(np.int64)

    @property
    def first_row(self) -> NDArray[np.int64]:
        """int64 [R]: the first row of the patient each row belongs to."""
        return np.repeat(self.offset[:-1], self.length)

    def rows_of(self, patients: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The rows, bool [R], of the patients chosen by a bool [P]."""
        return np.repeat(patients, self.length)

    def select(self, patients: NDArray[np.bool_]) -> Records:
        """The records of the patients chosen by a bool [P]."""
        rows = self.rows_of(patients)
        return replace(
            self,
            measured=self.measured[rows], background=self.background[rows], clock=self.clock[rows],
            label=self.label[rows], length=self.length[patients], patient=self.patient[patients],
            group=self.group[patients], fold=self.fold[patients],
            risk=None if self.risk is None else self.risk[rows],
        )  # fmt: skip

    def split(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Patients, each bool [P], for training, validation and test."""
        test, validation = np.isin(self.fold, TEST_FOLDS), np.isin(self.fold, VALIDATION_FOLDS)
        return ~(test | validation), validation, test


def last_seen(value: NDArray[np.float32]) -> NDArray[np.int64]:
    """The row, [R], in which a column was last measured so far, -1 before the first; one before the first row of a
    patient is another patient's."""
    return np.maximum.accumulate(np.where(np.isnan(value), -1, np.arange(value.size)))


def read(directory: str | Path, progress: bool = False) -> Records:
    """Reads the PhysioNet/CinC 2019 records under a directory.

    Two forms: packed (`setA.npz`, `setB.npz`, with folds), or the original folders with one `.psv` file a
    patient (`training_setA/p000001.psv`), searched at any depth. Where both lie, the packed form is read. The
    fold of a `.psv` file follows from a hash of hospital and patient and from nothing else (see `fold_of`).

    Raises:
        FileNotFoundError: no such directory, or neither form in it.
        ValueError: a file that is not what it should be; the sentence names file, expected and got.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory with .npz or .psv files; there is none")
    packed = sorted(directory.glob("*.npz"))
    if packed:
        return _concatenate([_read_packed(path) for path in packed])
    files = sorted(directory.rglob("*.psv"))
    if files:
        return _read_psv(files, progress)
    raise FileNotFoundError(
        f"{directory}: expected the packed sets (*.npz) or the original folders of *.psv files; found neither"
    )


def fold_of(group: str, patient: str) -> int:
    """The fold 0..19 of a patient: SHA-256 of "group/patient" modulo 20, the same whoever else is read."""
    return int.from_bytes(hashlib.sha256(f"{group}/{patient}".encode()).digest()[:8], "big") % FOLDS


# ------------------------------------------------------------------------------------------------ packed form


def _read_packed(path: Path) -> Records:
    if not zipfile.is_zipfile(path):
        raise _bad(path, "a readable .npz archive", "a file that is no zip archive, or half of one")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in (*COLUMNS, *PER_PATIENT) if name not in archive.files]
            if missing:
                raise _bad(path, f"an array for each of the 41 columns and {PER_PATIENT}", f"no {missing[0]}")
            return _from_packed(path, archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise _bad(path, "a readable .npz archive", f"{type(error).__name__}: {error}") from error


def _from_packed(path: Path, archive: Any) -> Records:
    length = archive["length"].astype(np.int64)
    rows, patients = int(length.sum()), length.size
    if patients and length.min() < 1:
        raise _bad(path, "at least one row for each patient", f"a length of {length.min()}")

    def column(name: str, size: int) -> NDArray[Any]:
        array: NDArray[Any] = archive[name]
        if array.shape != (size,) or array.dtype.kind != "i":
            raise _bad(path, f"{name} to be integers ({size},)", f"{array.dtype} {array.shape}")
        return array

    def table(names: tuple[str, ...]) -> NDArray[np.float32]:
        out = np.empty((rows, len(names)), np.float32)
        for j, name in enumerate(names):
            stored = column(name, rows)
            if stored.dtype == np.int32:  # hundredths; Gender and ICULOS are smaller integers, as they are
                out[:, j] = np.where(stored == PACKED_NAN, np.nan, stored / 100)
            else:
                out[:, j] = stored
        return out

    group = path.stem[3:] if path.stem.startswith("set") else path.stem
    records = Records(
        measured=table(MEASURED), variables=MEASURED,
        background=table(BACKGROUND), background_names=BACKGROUND,
        clock=table((CLOCK,))[:, 0], label=column(LABEL, rows).astype(np.int8), length=length,
        patient=np.char.mod("p%06d", column("patient_id", patients)), group=np.full(patients, group),
        fold=column("fold", patients).astype(np.int8),
    )  # fmt: skip
    _check(path, records.clock, records.label, records.first_row)
    if patients and not (records.fold.min() >= 0 and records.fold.max() < FOLDS):
        raise _bad(path, f"folds 0..{FOLDS - 1}", f"{records.fold.min()}..{records.fold.max()}")
    return records


# -------------------------------------------------------------------------------------------------- .psv form


def _read_psv(files: list[Path], progress: bool) -> Records:
    tables = [_read_patient(path) for path in _with_progress(files, progress)]
    table = np.concatenate(tables)
    groups = [path.parent.name.rpartition("set")[2] for path in files]  # training_setA -> A
    first_background, clock = len(MEASURED), len(MEASURED) + len(BACKGROUND)
    return Records(
        measured=np.ascontiguousarray(table[:, :first_background]), variables=MEASURED,
        background=np.ascontiguousarray(table[:, first_background:clock]), background_names=BACKGROUND,
        clock=table[:, clock].copy(), label=table[:, clock + 1].astype(np.int8),
        length=np.array([len(one) for one in tables], np.int64),
        patient=np.array([path.stem for path in files]), group=np.array(groups),
        fold=np.array([fold_of(group, path.stem) for group, path in zip(groups, files)], np.int8),
    )  # fmt: skip


def _read_patient(path: Path) -> NDArray[np.float32]:
    """float32 [T, 41] of one file."""
    try:
        text = path.read_text("ascii")
    except UnicodeDecodeError as error:
        raise _bad(path, "text separated by |", f"a byte that is no ASCII at {error.start}") from error
    lines = text.splitlines()
    if not lines:
        raise _bad(path, "a header line with the 41 columns", "an empty file")
    header = lines[0].split("|")
    if tuple(header) != COLUMNS:
        missing = [name for name in COLUMNS if name not in header]
        got = f"no {missing[0]}" if missing else "others or another order"
        raise _bad(path, "the 41 columns HR|...|SepsisLabel in order", got)
    if len(lines) == 1:
        raise _bad(path, "at least one row under the header", "none")
    fields: list[str] = []
    for number, line in enumerate(lines[1:], 2):
        row = line.split("|")
        if len(row) != len(COLUMNS):
            raise _bad(path, f"{len(COLUMNS)} fields in line {number}", f"{len(row)}; is the file truncated?")
        fields += row
    try:
        table = np.fromiter(map(float, fields), np.float64, len(fields)).astype(np.float32)
    except ValueError as error:
        raise _bad(path, "numbers or NaN in every field", str(error)) from error
    table = table.reshape(-1, len(COLUMNS))
    _check(path, table[:, -2], table[:, -1], np.zeros(len(table), np.int64))
    return table


def _with_progress(files: list[Path], progress: bool) -> Iterator[Path]:
    if not progress:
        return iter(files)
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('the progress bar needs tqdm: pip install "gatewise[demo]"') from error
    return iter(tqdm(files, desc="reading .psv", unit=" patients", unit_scale=True))


# ------------------------------------------------------------------------------------------------- both forms


def _concatenate(sets: list[Records]) -> Records:
    def stack(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(one, name) for one in sets])

    return Records(
        stack("measured"), MEASURED, stack("background"), BACKGROUND, stack("clock"), stack("label"),
        stack("length"), stack("patient"), stack("group"), stack("fold"),
    )  # fmt: skip


def _check(path: Path, clock: NDArray[Any], label: NDArray[Any], first_row: NDArray[np.int64]) -> None:
    """Raises unless labels are 0 or 1 and the clock advances by an hour a row within a patient."""
    wrong = ~np.isin(label, (0, 1))
    if wrong.any():
        raise _bad(path, f"{LABEL} 0 or 1", f"{label[wrong][0]} in row {int(wrong.argmax())}")
    expected = clock[first_row] + (np.arange(clock.size) - first_row)
    wrong = ~(clock == expected)
    if wrong.any():
        row = int(wrong.argmax())
        raise _bad(path, f"{CLOCK} to advance by 1 a row, to {expected[row]:g} in row {row}", f"{clock[row]:g}")


def _bad(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(f"{path}: expected {expected}; got {got}")
