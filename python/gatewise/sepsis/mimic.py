"""MIMIC-III tables -> hourly Records with medication and Sepsis-3 labels; hourly Records -> daily ones.

Invariant: a row of a stay holds what was charted, drawn or given in its hour, [intime + k h, intime + (k + 1) h),
and nothing later; the label alone looks ahead. Tables are read in blocks of whole lines and only what is placed
in a row is kept: memory is that of the rows, 0.4 KB each, and not of the tables. Nothing is written.

MIMIC-III: Johnson et al., Sci Data 2016;3:160035. The open demo (lower case, .csv.gz) and the credentialed files
(upper case, .csv or .csv.gz) are read by the same code.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .cohort import HORIZON
from .mimic_items import (
    ANTIBACTERIALS,
    ARTERIAL,
    CHART,
    DOSES,
    EXTRA,
    EYE,
    GIVEN,
    INTRAVENOUS,
    LABS,
    LIMITS,
    MOTOR,
    NOT_CULTURE,
    ORDERS,
    OTHER_BLOOD,
    PARENTERAL,
    RATED,
    RATES,
    SEPSIS_CODES,
    SPECIMEN,
    SUMMED,
    SYSTEMIC,
    TABLES,
    URINE,
    VENTILATED,
    VENTILATOR,
    VERBAL,
    Item,
    spelling,
)
from .records import BACKGROUND, MEASURED, Records, fold_of
from .sofa import held, onset, points, suspicions

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

HOUR, DAY = 3600, 86400
LONGEST = 14  # days of a stay that are kept: the challenge's longest record is as long
ADULT = 16  # years; the younger ones in MIMIC-III are newborns
OLDEST = 90.0  # years; dates of birth of those over 89 are shifted to an age of 300
WEIGHT = 80.0  # kg, where none was charted so far
BLOCK = 1 << 24  # bytes of text read at once
LONGEST_LINE = 1 << 26  # bytes; more is a quote that nothing closes

# --------------------------------------------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Report:
    """What reading did, and how each of the P stays of the records got its label.

    Attributes:
        implausible: values outside `LIMITS`, dropped, by variable (those of no stay are not counted).
        left_out: stays that are not in the records, by reason; and rows that say they are wrong.
        begins, suspicion, rise: float64 [P], hours since ICU admission at which sepsis begins, infection was
            suspected and SOFA rose; NaN in a stay without Sepsis-3.
        sofa: int8 [R], the score of each hour.
        coded: bool [P], the hospital admission has an ICD-9 code of sepsis (995.91, 995.92, 785.52, 038.x).
        coded_admissions: how many admissions have one, in the ICU or not.
    """

    implausible: dict[str, int]
    left_out: dict[str, int]
    begins: Floats
    suspicion: Floats
    rise: Floats
    sofa: NDArray[np.int8]
    coded: NDArray[np.bool_]
    coded_admissions: int

    def agreement(self) -> dict[str, int]:
        """Stays by Sepsis-3 and by code. A check and not a truth: codes are of the admission, and for billing."""
        label = ~np.isnan(self.begins)
        return {
            "Sepsis-3 and coded": int((label & self.coded).sum()),
            "Sepsis-3 only": int((label & ~self.coded).sum()),
            "coded only": int((~label & self.coded).sum()),
            "neither": int((~label & ~self.coded).sum()),
        }

    def __str__(self) -> str:
        parts = {
            "implausible values dropped": self.implausible,
            "left out": self.left_out,
            "stays by Sepsis-3 and by ICD-9 code": self.agreement(),
        }
        return "\n".join(f"{k}: {', '.join(f'{n:,} {what}' for what, n in v.items()) or 0}" for k, v in parts.items())


def read_mimic(directory: str | Path, progress: bool = False) -> Records:
    """The hourly records of all adult ICU stays in a directory of MIMIC-III tables.

    A patient of the records is an ICU stay, `subject-icustay`; stays of a subject share the fold. Row k holds the
    hour that begins k hours after ICU admission, up to discharge, at most 14 days; its clock is k + 1. Several
    measurements of an hour: the last one; urine and doses: their sum. A laboratory value stands at the time
    its specimen was drawn (MIMIC-III has no other), and is known somewhat later. The group is the database,
    carevue or metavision. Unit1 is the medical ICU, Unit2 the surgical one or trauma's; coronary care and
    cardiac surgery are neither.

    The label is Sepsis-3 (see `sofa`), 1 from 6 h before sepsis begins, as in the PhysioNet 2019 challenge, from
    which it differs in four ways. A septic record is not cut 3 h after the onset: it runs to discharge, with label
    1. SOFA may rise from 48 h before to 24 h after the suspicion, as Seymour et al. have it, and not from 24 h
    before to 12 h after. Antibiotics need not go on for 72 h. Stays whose sepsis began before admission or soon
    after it are in; they are positive from row 0.

    Raises:
        FileNotFoundError: no such directory, or a table is missing.
        ValueError: a table is not what it should be; the sentence names file, expected and got.
        ImportError: polars (or, for the progress bar, tqdm) is missing.
    """
    return read_with_report(directory, progress)[0]


def read_with_report(directory: str | Path, progress: bool = False, block: int = BLOCK) -> tuple[Records, Report]:
    """As `read_mimic`, and what was dropped and found; `block` bytes of a table are in memory at once."""
    try:
        import polars  # noqa: F401
    except ImportError as error:
        raise ImportError('MIMIC-III tables need polars: pip install "gatewise[demo]"') from error
    tables, bar = _find(Path(directory), block, progress)
    try:
        return _read(tables)
    finally:
        if bar:
            bar.close()


def _read(tables: dict[str, _Table]) -> tuple[Records, Report]:
    left_out: dict[str, int] = {}
    stays = _stays(tables, left_out)
    grid = _Grid(stays)
    _chart(tables["CHARTEVENTS"], grid, left_out)
    _labs(tables["LABEVENTS"], grid)
    grid.when.clear()  # all that is left are sums
    _urine(tables["OUTPUTEVENTS"], grid, left_out)
    weight = held(grid.columns["Weight"], stays.first_row)
    weight = np.where(np.isnan(weight), np.float32(WEIGHT), weight)
    _carevue(tables["INPUTEVENTS_CV"], grid, weight)
    given = _metavision(tables["INPUTEVENTS_MV"], grid, weight, left_out)
    ordered = _orders(tables["PRESCRIPTIONS"], grid)
    sofa = points({**grid.columns, "gcs": _coma(grid)}, stays.first_row).sum(axis=1, dtype=np.int8)
    cultures = _cultures(tables["MICROBIOLOGYEVENTS"])
    begins, suspicion, rise = _onsets(stays, sofa, np.concatenate([given, ordered]), cultures).T
    codes = tables["DIAGNOSES_ICD"].whole()
    codes = codes.filter(codes["ICD9_CODE"].fill_null("").str.contains(SEPSIS_CODES))
    coded = np.unique(_integers(tables["DIAGNOSES_ICD"], codes, "HADM_ID"))
    implausible, of_stays = dict(sorted(grid.implausible.items())), np.isin(stays.admission, coded)
    report = Report(implausible, left_out, begins, suspicion, rise, sofa, of_stays, coded.size)
    return _records(stays, grid, begins), report


def _records(stays: _Stays, grid: _Grid, begins: Floats) -> Records:
    names = (*MEASURED, *EXTRA, *DOSES)
    measured = np.empty((stays.offset[-1], len(names)), np.float32)
    for j, name in enumerate(names):
        measured[:, j] = grid.columns.pop(name)  # each is freed as it is copied
    hour = np.arange(stays.offset[-1]) - stays.first_row
    with np.errstate(invalid="ignore"):
        label = hour >= np.repeat(np.floor(begins) - HORIZON, stays.rows)
    return Records(
        measured=measured, variables=names,
        background=np.repeat(stays.background, stays.rows, axis=0), background_names=BACKGROUND,
        clock=(hour + 1).astype(np.float32), label=label.astype(np.int8), length=stays.rows,
        patient=np.array([f"{subject}-{stay}" for subject, stay in zip(stays.subject, stays.stay)]),
        group=stays.database,
        fold=np.array([fold_of("mimic", str(subject)) for subject in stays.subject], np.int8),
        doses=tuple(DOSES),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the stays


@dataclass(frozen=True)
class _Stays:
    """The P stays, sorted by subject and admission; times in seconds since 1970."""

    subject: Ints
    admission: Ints
    stay: Ints
    start: Ints
    stop: Ints  # discharge, or the end of the last row if that is earlier
    rows: Ints
    background: NDArray[np.float32]
    database: NDArray[np.str_]

    @property
    def offset(self) -> Ints:
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    @property
    def first_row(self) -> Ints:
        return np.repeat(self.offset[:-1], self.rows)

    def of(self, subject: Ints, time: Ints) -> Ints:
        """The stay in which each event falls, -1 for none. An event at discharge is still in."""
        stay = np.searchsorted(_moment(self.subject, self.start), _moment(subject, time), "right") - 1
        inside = (stay >= 0) & (self.subject[stay] == subject) & (time <= self.stop[stay])
        return np.where(inside, stay, -1)

    def place(self, subject: Ints, time: Ints) -> tuple[Ints, Ints]:
        """The row of each event, -1 for none, and the second in its hour."""
        stay = self.of(subject, time)
        since = time - self.start[stay]
        hour = np.minimum(since // HOUR, self.rows[stay] - 1)  # discharge on the hour belongs to the last row
        return np.where(stay >= 0, self.offset[stay] + hour, -1), since - hour * HOUR


def _stays(tables: dict[str, _Table], left_out: dict[str, int]) -> _Stays:
    table, hospital, people = tables["ICUSTAYS"], tables["ADMISSIONS"], tables["PATIENTS"]
    frame, admissions, patients = table.whole(), hospital.whole(), people.whole()
    admitted = _lookup(hospital, admissions, "HADM_ID", _times(hospital, admissions, "ADMITTIME"))
    born = _lookup(people, patients, "SUBJECT_ID", _times(people, patients, "DOB"))
    male = _lookup(people, patients, "SUBJECT_ID", (patients["GENDER"] == "M").fill_null(False).to_numpy())
    subject, admission, stay = (_integers(table, frame, name) for name in ("SUBJECT_ID", "HADM_ID", "ICUSTAY_ID"))
    start, stop = _times(table, frame, "INTIME"), _times(table, frame, "OUTTIME")
    timeless, begin, end = np.isnan(start) | np.isnan(stop), _seconds(start), _seconds(stop)
    into_hospital = admitted(table, admission)
    age = (into_hospital - born(table, subject)) / (365.2425 * DAY)
    young = age < ADULT
    left_out["stays without a time of admission or discharge"] = int(timeless.sum())
    left_out[f"stays of patients under {ADULT} years"] = int((young & ~timeless).sum())
    kept = np.flatnonzero(~timeless & ~young)
    kept = kept[np.lexsort((stay[kept], begin[kept], subject[kept]))]
    if not kept.size:
        raise _bad(
            table.path, f"at least one ICU stay of somebody of {ADULT} years or more", f"none in {frame.height} rows"
        )
    rows = np.clip(-(-(end - begin) // HOUR), 1, 24 * LONGEST)
    unit = frame["FIRST_CAREUNIT"].fill_null("").to_numpy()
    background = np.stack(
        [
            np.where(age > OLDEST - 1, OLDEST, np.floor(age)), male(table, subject), unit == "MICU",
            np.isin(unit, ["SICU", "TSICU"]), (into_hospital - begin) / HOUR,
        ],
        axis=1,
    ).astype(np.float32)  # fmt: skip
    return _Stays(
        subject[kept], admission[kept], stay[kept], begin[kept], np.minimum(end, begin + rows * HOUR)[kept],
        rows[kept], background[kept], frame["DBSOURCE"].fill_null("unknown").to_numpy().astype(str)[kept],
    )  # fmt: skip


def _lookup(
    table: _Table, frame: pl.DataFrame, key: str, value: NDArray[Any]
) -> Callable[[_Table, Ints], NDArray[Any]]:
    known = dict(zip(_integers(table, frame, key).tolist(), value))

    def look_up(asking: _Table, wanted: Ints) -> NDArray[Any]:
        missing = [one for one in wanted.tolist() if one not in known]
        if missing:
            raise _bad(table.path, f"a row for each {key} of {asking.path.name}", f"none for {missing[0]}")
        return np.array([known[one] for one in wanted.tolist()], value.dtype)

    return look_up


# ---------------------------------------------------------------------------------------------------- events, rows


@dataclass(frozen=True)
class _Events:
    """E events in the units of their columns, `names[column]`; `line` is the row of the frame each stood in."""

    names: tuple[str, ...]
    subject: Ints
    time: Ints
    column: Ints
    rank: Ints
    value: Floats
    by_weight: NDArray[np.bool_]  # still to be divided by the weight
    line: Ints

    def where(self, chosen: NDArray[np.bool_]) -> _Events:
        arrays = ("subject", "time", "column", "rank", "value", "by_weight", "line")
        return replace(self, **{name: getattr(self, name)[chosen] for name in arrays})

    def of(self, *names: str) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = np.isin(self.column, [self.names.index(name) for name in names])
        return chosen


class _Grid:
    """One float32 [R] a column, NaN where there is nothing; the same to the bit however the tables are cut."""

    def __init__(self, stays: _Stays) -> None:
        self.stays = stays
        names = (*MEASURED, *EXTRA, *DOSES, EYE, VERBAL, MOTOR, VENTILATED, *RATES)
        self.columns = {name: np.full(int(stays.offset[-1]), np.nan, np.float32) for name in names}
        self.when: dict[str, NDArray[np.uint16]] = {}
        self.implausible: dict[str, int] = {}

    def placed(self, events: _Events) -> Iterator[tuple[str, _Events, Ints, Ints]]:
        """By column: the events that fall into a stay, their rows, and the second in the hour."""
        row, second = self.stays.place(events.subject, events.time)
        for column in np.unique(events.column):
            chosen = (events.column == column) & (row >= 0)
            yield events.names[column], events.where(chosen), row[chosen], second[chosen]

    def within(self, name: str, value: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Which values are inside `LIMITS`; the others are counted."""
        low, high = LIMITS[name]
        good: NDArray[np.bool_] = (value >= np.float32(low)) & (value <= np.float32(high))
        if not good.all():
            self.implausible[name] = self.implausible.get(name, 0) + int((~good).sum())
        return good

    def last(self, events: _Events) -> None:
        """Keeps the last value of each hour; of equal times the item of the first rank, of those the last line."""
        for name, part, row, second in self.placed(events):
            value = part.value.astype(np.float32)
            good = self.within(name, value)
            row, order, value = row[good], (1 + second * 16 + 15 - part.rank)[good], value[good]
            when = self.when.setdefault(name, np.zeros(self.columns[name].size, np.uint16))
            best = np.lexsort((order, row))  # stable: of equals the later line is the later here
            best = best[np.append(row[best][1:] != row[best][:-1], True)] if best.size else best
            best = best[order[best] >= when[row[best]]]
            when[row[best]] = order[best]
            self.columns[name][row[best]] = value[best]

    def add(self, name: str, row: Ints, value: NDArray[np.floating[Any]]) -> None:
        """Adds one by one, in the order of the table."""
        good = self.within(name, value)
        row, column = row[good], self.columns[name]
        column[row] = np.nan_to_num(column[row])
        np.add.at(column, row, value[good].astype(np.float32))

    def highest(self, name: str, row: Ints, value: NDArray[np.floating[Any]]) -> None:
        good = self.within(name, value)
        np.fmax.at(self.columns[name], row[good], value[good].astype(np.float32))


def _events(
    table: _Table, frame: pl.DataFrame, items: Mapping[int, Item], number: str, unit: str, time: str = "CHARTTIME"
) -> _Events:
    """The rows of a frame that have one of the items, a number and a time."""
    value, when, item = _numbers(table, frame, number), _times(table, frame, time), _integers(table, frame, "ITEMID")
    line = np.flatnonzero(~np.isnan(value) & ~np.isnan(when) & np.isin(item, list(items)))
    value, item = value[line], item[line]
    units = frame[unit].fill_null("").to_numpy()[line].astype(str)
    names = tuple(dict.fromkeys(one.column for one in items.values()))
    column, rank, by_weight = np.zeros(item.size, np.int64), np.zeros(item.size, np.int64), np.zeros(item.size, bool)
    for one in np.unique(item):
        known, rows = items[int(one)], np.flatnonzero(item == one)
        column[rows], rank[rows] = names.index(known.column), known.rank
        for spelled in np.unique(units[rows]):
            short = spelling(str(spelled)) or known.usual
            if short not in known.units:
                accepted = " or ".join(name or "none" for name in known.units)
                raise _bad(table.path, f"{unit} of item {one} ({known.column}) to be {accepted}", repr(str(spelled)))
            scale, shift = known.units[short]
            these = rows[units[rows] == spelled]
            value[these], by_weight[these] = value[these] * scale + shift, known.per_kg and "kg" not in short
    if "FiO2" in names:  # a fraction or a percentage, whatever its unit says
        value[(column == names.index("FiO2")) & (value > 1)] /= 100
    subject = _integers(table, frame, "SUBJECT_ID")[line]
    return _Events(names, subject, when[line].astype(np.int64), column, rank, value, by_weight, line)


def _chart(table: _Table, grid: _Grid, left_out: dict[str, int]) -> None:
    for frame in table.frames((*CHART, *VENTILATOR)):
        frame = _right(frame, "ERROR", left_out)
        events = _events(table, frame, CHART, "VALUENUM", "VALUEUOM")
        tube = frame["VALUE"].str.contains(r"\bET").fill_null(False).to_numpy()[events.line]
        events.value[tube & events.of(VERBAL)] = 0
        grid.last(events)
        when, subject = _times(table, frame, "CHARTTIME"), _integers(table, frame, "SUBJECT_ID")
        setting = np.isin(_integers(table, frame, "ITEMID"), VENTILATOR) & ~np.isnan(when)
        row, _ = grid.stays.place(subject[setting], when[setting].astype(np.int64))
        grid.columns[VENTILATED][row[row >= 0]] = 1


def _labs(table: _Table, grid: _Grid) -> None:
    """What is arterial by name waits for the kind of its specimen, which may stand anywhere in the table."""
    waiting: list[_Events] = []
    other_blood: list[Ints] = []
    for frame in table.frames((*LABS, SPECIMEN)):
        item, when = _integers(table, frame, "ITEMID"), _times(table, frame, "CHARTTIME")
        other = (item == SPECIMEN) & frame["VALUE"].is_in(OTHER_BLOOD).fill_null(False).to_numpy() & ~np.isnan(when)
        other_blood.append(_moment(_integers(table, frame, "SUBJECT_ID")[other], when[other].astype(np.int64)))
        events = _events(table, frame, LABS, "VALUENUM", "VALUEUOM")
        gas = events.of(*ARTERIAL)
        waiting.append(events.where(gas))
        grid.last(events.where(~gas))
    not_arterial = np.concatenate(other_blood) if other_blood else np.zeros(0, np.int64)
    for events in waiting:
        grid.last(events.where(~np.isin(_moment(events.subject, events.time), not_arterial)))


def _moment(subject: Ints, time: Ints) -> Ints:
    """Subject and time in one number; the seconds of the years up to 2240 fit in 33 bits."""
    return subject * (1 << 34) + time


def _urine(table: _Table, grid: _Grid, left_out: dict[str, int]) -> None:
    for frame in table.frames(URINE):
        frame = _right(frame, "ISERROR", left_out)
        for name, part, row, _ in grid.placed(_events(table, frame, URINE, "VALUE", "VALUEUOM")):
            grid.add(name, row, part.value)


def _right(frame: pl.DataFrame, flag: str, left_out: dict[str, int]) -> pl.DataFrame:
    """Without the rows that the chart itself calls an error."""
    wrong = (frame[flag] == "1").fill_null(False)
    left_out["charted rows marked as an error"] = left_out.get("charted rows marked as an error", 0) + int(wrong.sum())
    return frame.filter(~wrong)


def _coma(grid: _Grid) -> NDArray[np.float32]:
    """Fills GCS, and returns the one that SOFA takes: 15 where a tube hinders speech, as Johnson et al. have it."""
    eye, verbal, motor = (grid.columns[name] for name in (EYE, VERBAL, MOTOR))
    grid.columns["GCS"] = eye + np.maximum(verbal, 1) + motor
    return np.where(verbal == 0, np.float32(15), grid.columns["GCS"])


# ------------------------------------------------------------------------------------------------------ medication


def _carevue(table: _Table, grid: _Grid, weight: NDArray[np.float32]) -> None:
    """What CareVue charted as gone in since the last time stands at the hour of charting; a rate likewise."""
    for frame in table.frames((*GIVEN, *RATED)):
        events = _events(table, frame, GIVEN, "AMOUNT", "AMOUNTUOM")
        for name, part, row, _ in grid.placed(events.where(events.value != 0)):
            grid.add(name, row, part.value / np.where(part.by_weight, weight[row], 1))
        for name, part, row, _ in grid.placed(_events(table, frame, RATED, "RATE", "RATEUOM")):
            grid.highest(name, row, part.value / np.where(part.by_weight, weight[row], 1))


def _metavision(table: _Table, grid: _Grid, weight: NDArray[np.float32], left_out: dict[str, int]) -> Ints:
    """Spreads an infusion evenly over its hours, as its constant rate has it; returns the antibiotics given.

    Those are int64 [A, 3]: subject, and twice the second of the start.
    """
    stays, antibiotics = grid.stays, [np.zeros((0, 3), np.int64)]
    for frame in table.frames((*GIVEN, *RATED, *ANTIBACTERIALS)):
        rewritten = (frame["STATUSDESCRIPTION"] == "Rewritten").fill_null(False)
        left_out["rewritten infusions"] = left_out.get("rewritten infusions", 0) + int(rewritten.sum())
        frame = frame.filter(~rewritten)
        item, subject = _integers(table, frame, "ITEMID"), _integers(table, frame, "SUBJECT_ID")
        start, stop = _times(table, frame, "STARTTIME"), _times(table, frame, "ENDTIME")
        patient_weight = _numbers(table, frame, "PATIENTWEIGHT")
        low, high = LIMITS["Weight"]
        patient_weight[~((patient_weight >= low) & (patient_weight <= high))] = np.nan

        given = np.isin(item, ANTIBACTERIALS) & (frame["ORDERCATEGORYNAME"] == INTRAVENOUS).fill_null(False).to_numpy()
        given &= ~np.isnan(start)
        when = start[given].astype(np.int64)
        antibiotics.append(np.stack([subject[given], when, when], axis=1))
        row, _ = stays.place(subject[given], when)
        row = row[row >= 0]
        grid.add("Antibiotic", row, np.ones(row.size))

        for items, number in ((GIVEN, "AMOUNT"), (RATED, "RATE")):
            events = _events(table, frame, items, number, f"{number}UOM", "STARTTIME")
            events = events.where((events.value > 0) & ~np.isnan(stop[events.line]))
            which, row, share = _spread(stays, events.subject, events.time, stop[events.line].astype(np.int64))
            kilograms = patient_weight[events.line][which]
            kilograms = np.where(np.isnan(kilograms), weight[row], kilograms)
            value = events.value[which] / np.where(events.by_weight[which], kilograms, 1)
            for column in np.unique(events.column):
                name, chosen = events.names[column], events.column[which] == column
                if items is GIVEN:
                    grid.add(name, row[chosen], (value * share)[chosen])
                else:
                    grid.highest(name, row[chosen], value[chosen])
    return np.concatenate(antibiotics)


def _spread(stays: _Stays, subject: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints, Floats]:
    """The rows an interval overlaps: which interval, the row, and the share of the interval in it.

    An interval belongs to the stay in which it starts; or, if it starts before, to that in which it ends.
    """
    stop = np.maximum(stop, start + 1)
    stay = stays.of(subject, start)
    stay = np.where(stay >= 0, stay, stays.of(subject, stop))
    which = np.flatnonzero(stay >= 0)
    stay = stay[which]
    begin, end = np.maximum(start[which], stays.start[stay]), np.minimum(stop[which], stays.stop[stay])
    which, stay, begin, end = (x[end > begin] for x in (which, stay, begin, end))
    first, last = (begin - stays.start[stay]) // HOUR, (end - 1 - stays.start[stay]) // HOUR
    count = last - first + 1
    piece, step = _steps(count)
    hour = first[piece] + step
    edge = stays.start[stay[piece]] + hour * HOUR
    seconds = np.minimum(end[piece], edge + HOUR) - np.maximum(begin[piece], edge)
    whole = (stop - start)[which[piece]]
    return which[piece], stays.offset[stay[piece]] + hour, seconds / whole


def _orders(table: _Table, grid: _Grid) -> Ints:
    """Counts the orders in force at the midnight that ends each day; returns the antibiotics ordered.

    Those are int64 [A, 3]: subject, first and last second of the day of the order.
    """
    antibiotics = [np.zeros((0, 3), np.int64)]
    stays = grid.stays
    for frame in table.frames():
        drug, route = frame["DRUG"].str.to_lowercase().fill_null(""), frame["ROUTE"].fill_null("")
        usable = (frame["DRUG_TYPE"] == "MAIN").fill_null(False) & route.is_in(SYSTEMIC)
        usable &= ~drug.str.contains("vancomycin") | route.is_in(PARENTERAL)  # swallowed it stays in the gut
        subject = _integers(table, frame, "SUBJECT_ID")
        start, stop = _times(table, frame, "STARTDATE"), _times(table, frame, "ENDDATE")
        for name, pattern in ORDERS.items():
            chosen = (usable & drug.str.contains(pattern)).to_numpy() & ~np.isnan(start)
            first = _seconds(start[chosen]) // DAY * DAY
            last = np.maximum(_seconds(stop[chosen]) // DAY * DAY, first)  # some end before they start
            if name == "Antibiotic order":
                antibiotics.append(np.stack([subject[chosen], first, first + DAY - 1], axis=1))
            grid.add(name, *_midnights(stays, subject[chosen], first + DAY, last + DAY))
    return np.concatenate(antibiotics)


def _midnights(stays: _Stays, subject: Ints, first: Ints, last: Ints) -> tuple[Ints, Floats]:
    """Rows of the midnights first, first + a day, ..., last in every stay of the subject, and a one for each.

    The last midnight before a stay counts in its first row: at admission the day before is known.
    """
    at, end = (np.searchsorted(stays.subject, subject, side) for side in ("left", "right"))
    order, step = _steps(end - at)
    stay = at[order] + step
    before = stays.start[stay] // DAY * DAY
    low = np.maximum(first[order], before)
    high = np.minimum(last[order], (stays.stop[stay] - 1) // DAY * DAY)
    count = np.maximum((high - low) // DAY + 1, 0)
    piece, step = _steps(count)
    midnight = low[piece] + DAY * step
    hour = np.maximum(midnight - stays.start[stay[piece]], 0) // HOUR
    return stays.offset[stay[piece]] + hour, np.ones(piece.size)


def _steps(count: Ints) -> tuple[Ints, Ints]:
    """[2, 3] -> [0, 0, 1, 1, 1] and [0, 1, 0, 1, 2]."""
    which = np.repeat(np.arange(count.size), count)
    return which, np.arange(which.size) - np.repeat(np.cumsum(count) - count, count)


# ---------------------------------------------------------------------------------------------------------- labels


def _cultures(table: _Table) -> Ints:
    """int64 [C, 3]: subject, first and last second at which the culture can have been taken."""
    frame = table.whole()
    frame = frame.filter(~frame["SPEC_TYPE_DESC"].fill_null("").str.contains(NOT_CULTURE))
    day, time = _times(table, frame, "CHARTDATE"), _times(table, frame, "CHARTTIME")
    known = ~np.isnan(day) | ~np.isnan(time)
    dated = np.isnan(time[known])
    first = np.where(dated, day[known], time[known]).astype(np.int64)
    last = np.where(dated, first + DAY - 1, first)
    return np.unique(np.stack([_integers(table, frame, "SUBJECT_ID")[known], first, last], axis=1), axis=0)


def _onsets(stays: _Stays, sofa: NDArray[np.int8], antibiotics: Ints, cultures: Ints) -> Floats:
    """float64 [P, 3]: the hours of `sofa.onset` of each stay."""
    antibiotics, cultures = (x[np.argsort(x[:, 0], kind="stable")] for x in (antibiotics, cultures))
    found = np.full((stays.subject.size, 3), np.nan)
    subject, suspected = -1, np.zeros(0, np.int64)
    for i in range(stays.subject.size):
        if stays.subject[i] != subject:
            subject = int(stays.subject[i])
            suspected = suspicions(
                *(x[slice(*np.searchsorted(x[:, 0], [subject, subject + 1])), 1:] for x in (antibiotics, cultures))
            )
        rows = slice(stays.offset[i], stays.offset[i + 1])
        found[i] = onset(sofa[rows], (suspected - stays.start[i]) / HOUR)
    return found


# ---------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Table:
    path: Path
    wanted: tuple[str, ...]
    block: int
    read: Callable[[int], object]  # told of each stretch of bytes of the file that has been read

    def whole(self) -> pl.DataFrame:
        import polars as pl

        return pl.concat(list(self.frames()))

    def frames(self, items: Iterable[int] | None = None) -> Iterator[pl.DataFrame]:
        """The wanted columns as text, block by block; of the items, if any are given."""
        import polars as pl

        items = None if items is None else list(items)
        for frame in self._blocks():
            if items is not None:
                frame = frame.filter(pl.Series(np.isin(_integers(self, frame, "ITEMID"), items)))
            yield frame

    def header(self) -> list[str]:
        """The columns, upper case; those wanted are among them."""
        with self._open() as (_, stream):
            line = stream.readline()
        header = next(csv.reader([line.decode("utf-8-sig", "replace").strip().upper()]), [])
        missing = [name for name in self.wanted if name not in header]
        if missing:
            got = f"no {missing[0]}" if header else "an empty file"
            raise _bad(self.path, f"the columns {', '.join(self.wanted)}", got)
        return header

    @contextmanager
    def _open(self) -> Iterator[tuple[BinaryIO, BinaryIO | gzip.GzipFile]]:
        """The file as it lies there, and its text."""
        with self.path.open("rb") as file:
            try:
                yield file, gzip.GzipFile(fileobj=file) if self.path.suffix.lower() == ".gz" else file
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise _bad(self.path, "a whole gzip file", f"{error}; is it truncated?") from error

    def _blocks(self) -> Iterator[pl.DataFrame]:
        header = self.header()
        at = [header.index(name) for name in self.wanted]
        with self._open() as (file, stream):
            stream.readline()
            done, rest, empty = 0, b"", True
            while True:
                text = stream.read(self.block)
                self.read(file.tell() - done)
                done = file.tell()
                lines, rest = _whole_lines(rest + text) if text else (rest, b"")
                if len(rest) > LONGEST_LINE:
                    raise _bad(self.path, f"lines of at most {LONGEST_LINE:,} bytes", "more; is a quote left open?")
                if not text and lines:  # one line is left, without its end
                    self._same_width(lines, len(header))
                if lines or (not text and empty):
                    empty = False
                    yield self._parse(lines, at, len(header))
                if not text:
                    return

    def _same_width(self, lines: bytes, width: int) -> None:
        fields = len(next(csv.reader(io.StringIO(lines.decode("utf-8", "replace"), newline=""))))
        if fields != width:
            raise _bad(self.path, f"{width} fields in the last line", f"{fields}; is the file truncated?")

    def _parse(self, lines: bytes, at: list[int], width: int) -> pl.DataFrame:
        import polars as pl

        if not lines:
            return pl.DataFrame({}, schema=dict.fromkeys(self.wanted, pl.String))
        names = dict(sorted(zip(at, self.wanted)))
        try:
            frame = pl.read_csv(
                io.BytesIO(lines), has_header=False, columns=list(names), infer_schema=False, null_values="",
                encoding="utf8-lossy",
            )  # fmt: skip
        except pl.exceptions.PolarsError as error:
            raise _bad(self.path, f"{width} fields in every line", str(error).splitlines()[0]) from error
        frame.columns = list(names.values())
        return frame


def _whole_lines(text: bytes) -> tuple[bytes, bytes]:
    """Cuts behind the last end of a line that is not inside quotes."""
    end = text.rfind(b"\n") + 1
    while end and text.count(b'"', 0, end) % 2:
        end = text.rfind(b"\n", 0, end - 1) + 1
    return text[:end], text[end:]


def _find(directory: Path, block: int, progress: bool) -> tuple[dict[str, _Table], Any]:
    """The tables, and the bar to close. All are there and have their columns, or nothing is read.

    Where a table lies there in both forms the plain one is taken.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory with the tables of MIMIC-III; there is none")
    there = {path.name.lower(): path for path in sorted(directory.iterdir())}
    paths = {}
    for name in TABLES:
        found = [there[f"{name.lower()}{end}"] for end in (".csv", ".csv.gz") if f"{name.lower()}{end}" in there]
        if not found:
            raise FileNotFoundError(f"{directory}: expected the table {name}.csv or {name}.csv.gz; there is none")
        paths[name] = found[0]
    for name, path in paths.items():
        _Table(path, TABLES[name], block, int).header()
    bar = _bar(sum(path.stat().st_size for path in paths.values())) if progress else None
    read = bar.update if bar else int
    return {name: _Table(path, TABLES[name], block, read) for name, path in paths.items()}, bar


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('the progress bar needs tqdm: pip install "gatewise[demo]"') from error
    return tqdm(total=total, desc="reading MIMIC-III", unit="B", unit_scale=True)


def _integers(table: _Table, frame: pl.DataFrame, name: str) -> Ints:
    import polars as pl

    number = frame[name].cast(pl.Int64, strict=False)
    _all_parsed(table, frame[name], number.is_null(), "whole numbers")
    return np.asarray(number.to_numpy(), np.int64)


def _numbers(table: _Table, frame: pl.DataFrame, name: str) -> Floats:
    """NaN where there is none."""
    import polars as pl

    number = frame[name].cast(pl.Float64, strict=False)
    _all_parsed(table, frame[name], number.is_null() & frame[name].is_not_null(), "numbers")
    return np.array(number.fill_null(np.nan).to_numpy(), np.float64)


def _times(table: _Table, frame: pl.DataFrame, name: str) -> Floats:
    """Seconds since 1970, exact; NaN where there is none."""
    import polars as pl

    time = frame[name].str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="ms", strict=False)
    _all_parsed(table, frame[name], time.is_null() & frame[name].is_not_null(), "times like 2101-10-20 19:08:00")
    return np.array(time.dt.epoch("s").cast(pl.Float64).fill_null(np.nan).to_numpy(), np.float64)


def _seconds(time: Floats) -> Ints:
    return np.nan_to_num(time).astype(np.int64)


def _all_parsed(table: _Table, text: pl.Series, failed: pl.Series, expected: str) -> None:
    if failed.any():
        got = text.filter(failed)[0]
        raise _bad(table.path, f"{expected} in {text.name}", "an empty field" if got is None else repr(got))


# ----------------------------------------------------------------------------------------------------------- daily


def day_ends(records: Records) -> NDArray[np.bool_]:
    """bool [R], the rows that end a 24-h ICU day: the daily grid of the tasks."""
    ends: NDArray[np.bool_] = records.clock % 24 == 0
    return ends


def daily(records: Records) -> Records:
    """One row a whole 24-h ICU day: what is known at its end, of that day alone.

    The last value measured in the day, urine and doses summed; clock, background, label and risk are those of
    the day's last hour, so that row i stands for row `np.flatnonzero(day_ends(records))[i]` of the hourly
    records, and a label of a task is taken from there. A day that is not whole has no row (its length would tell
    of discharge), a patient without a whole day is left out.
    """
    ends = day_ends(records)
    row = np.arange(records.clock.size)
    # How many days of anybody have ended before this row; hours after a patient's last whole day have none.
    day: Ints = np.cumsum(ends) - ends
    days = int(ends.sum())
    last_end = np.full(records.length.size, -1)
    patient = np.repeat(np.arange(records.length.size), records.length)
    last_end[patient[ends]] = row[ends]
    inside = row <= last_end[patient]
    measured = np.full((days, len(records.variables)), np.nan, np.float32)
    for j, name in enumerate(records.variables):
        value = records.measured[:, j]
        some = np.flatnonzero(inside & ~np.isnan(value))
        if name in SUMMED or name in records.doses:
            measured[day[some], j] = 0
            np.add.at(measured[:, j], day[some], value[some])
        else:
            measured[day[some], j] = value[some]  # of several the last one stays
    length = np.bincount(patient[ends], minlength=records.length.size).astype(np.int64)
    kept = length > 0
    return replace(
        records,
        measured=measured, background=records.background[ends], clock=records.clock[ends], label=records.label[ends],
        length=length[kept], patient=records.patient[kept], group=records.group[kept], fold=records.fold[kept],
        risk=None if records.risk is None else records.risk[ends],
    )  # fmt: skip


def _bad(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(f"{path}: expected {expected}; got {got}")
