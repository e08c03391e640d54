"""A simulated intensive-care cohort whose true risk is known, in the same `Records` as the real one.

Why the risk in `Records.risk` is the best possible score, and not merely a good one. What drives sepsis here
is written in the record: the readings carried forward, the doses given, age and sex. Call `drive[t]` that sum
over the hours up to and including t. It acts after an incubation of `HORIZON` hours: the hazard of hour
t + HORIZON is sigmoid(drive[t]). The label of hour t asks whether sepsis begins in the next `HORIZON` hours,
and the hazards of exactly these hours are settled by the record up to t. So, with everything knowable at t,

    P(label[t] = 1) = 1 - prod over k = t - HORIZON + 1 .. t of (1 - sigmoid(drive[k]))

holds exactly, and no causal model can rank or calibrate better but by luck. Three things keep it exact: how
long a patient stays is drawn at admission and by itself; what is measured and given depends on the record
only; a record ends with the hour before sepsis begins, so that having a row tells no more than being free of
sepsis so far. (The challenge's records run on for three hours after the onset.) The onset is followed up past
discharge.

A model of one row cannot get there: the drive remembers a smoothed strain, the change from the lactate
before, and each dose through the shape in which its effect comes and goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .records import Records, fold_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

HORIZON = 6  # hours, as in the challenge's label
SHORTEST, LONGEST = 8, 168  # hours of stay


# ------------------------------------------------------------------------------ how the effect of a dose runs


def exponential(hours: Array, half_life: float) -> Array:
    """Full at once, then halves every `half_life` hours."""
    return np.exp2(-hours / half_life)


def hump(hours: Array, peak: float) -> Array:
    """Nothing at first, full at `peak` hours, then fades: (t / peak) exp(1 - t / peak)."""
    return hours / peak * np.exp(1 - hours / peak)


def plateau(hours: Array, width: float) -> Array:
    """Full for `width` hours, then gone within a few: a logistic edge of half an hour."""
    return 1 / (1 + np.exp((hours - width) / 0.5))


# --------------------------------------------------------------------------------------------- the two tables


@dataclass(frozen=True)
class Variable:
    """A quantity measured: `normal` and `spread` in its unit, all else in spreads."""

    name: str
    normal: float
    spread: float
    sickness: float  # shift per unit of deterioration
    drift: float  # share of its noise kept from hour to hour
    measured: float  # chance of a reading in an hour
    strain: float = 0.0  # weight in the strain that drives the hazard


@dataclass(frozen=True)
class Drug:
    """A drug: how the effect of a dose runs, what it does at its fullest, and how often it is given."""

    name: str
    shape: Callable[[Array, float], Array]
    hours: float  # half-life, peak or width of the shape
    hazard: float  # added to the log-odds of sepsis by a standard dose
    given: float  # chance of a dose in an hour
    indication: float  # how the strain on record multiplies that chance: exp(indication * strain)
    readings: dict[str, float] = field(default_factory=dict)  # shift of readings, in spreads

    def effect(self) -> Array:
        """The effect of one dose, 0, 1, ... hours after it: [LONGEST]."""
        return self.shape(np.arange(LONGEST, dtype=np.float64), self.hours)


VARIABLES = (
    Variable("HR", 84, 14, 0.7, 0.3, 0.90, 0.30),
    Variable("MAP", 82, 12, -0.6, 0.3, 0.88, -0.30),
    Variable("Resp", 18, 4, 0.6, 0.2, 0.88, 0.30),
    Variable("Temp", 37.0, 0.6, 0.5, 0.6, 0.35, 0.25),
    Variable("Lactate", 1.8, 0.7, 0.6, 0.8, 0.09),
    Variable("WBC", 10.5, 3.5, 0.5, 0.9, 0.06),
    Variable("Creatinine", 1.2, 0.5, 0.4, 0.95, 0.06),
    Variable("Glucose", 130, 32, 0.2, 0.7, 0.16),
)
DRUGS = (
    Drug("Antibiotic", exponential, 8.0, -1.6, 0.020, 0.5, {"Temp": -0.4}),
    Drug("Steroid", hump, 14.0, 1.5, 0.010, 0.3, {"Glucose": 1.2}),
    Drug("Sedative", plateau, 10.0, 1.5, 0.012, 0.0, {"HR": -0.5, "Resp": -0.6}),
)
NAMES = (*(v.name for v in VARIABLES), *(d.name for d in DRUGS))
NORMAL, SPREAD = (np.array([getattr(v, name) for v in VARIABLES]) for name in ("normal", "spread"))
LACTATE = NAMES.index("Lactate")
BASE = -8.0  # log-odds of sepsis an hour without strain, lactate or doses
STRAIN, STRAIN_MEMORY = 5.2, 0.9  # weight of the strain, and the share of it kept from hour to hour
LACTATE_RISE, LACTATE_HALF_LIFE = 0.45, 12.0  # per spread above the reading before; fades with the hours since
AGE_PER_DECADE, MALE = 0.15, 0.2


def simulate(patients: int = 4000, seed: int = 0) -> Records:
    """Simulates a cohort. The same number of patients and seed give the same records, bit for bit.

    Raises:
        ValueError: fewer than 100 patients: some fold would be left without anybody septic.
    """
    if patients < 100:
        raise ValueError(f"patients: expected at least 100; got {patients}")
    random = np.random.default_rng(seed)
    stay = np.exp(random.normal(np.log(40), 0.6, patients)).clip(SHORTEST, LONGEST).astype(np.int64)
    age = np.round(random.normal(63, 16, patients).clip(18, 90))
    male = (random.random(patients) < 0.56).astype(np.float64)
    measured, log_odds = _run(random, _Drive(stay, age, male))

    hazard = _hazard(log_odds)
    begins = random.random(hazard.shape) < hazard
    onset = np.where(begins.any(axis=0), begins.argmax(axis=0), len(hazard))
    length = np.minimum(stay, onset)

    hour = np.arange(stay.max())[:, None]
    label = onset <= hour + HORIZON
    stayed, rows = (hour < stay).T, (hour < length).T  # patient by patient, hour by hour
    names = np.char.mod("s%06d", np.arange(patients))
    return Records(
        measured=measured[rows[stayed]],
        variables=NAMES,
        background=np.repeat(np.stack([age, male], axis=1), length, axis=0).astype(np.float32),
        background_names=("Age", "Gender"),
        clock=(np.broadcast_to(hour, label.shape).T[rows] + 1).astype(np.float32),
        label=label.T[rows].astype(np.int8), length=length,
        patient=names, group=np.full(patients, "simulated"),
        fold=np.array([fold_of("simulated", name) for name in names], np.int8),
        doses=tuple(drug.name for drug in DRUGS), risk=_risk(hazard).T[rows],
    )  # fmt: skip


def true_risk(records: Records) -> Array:
    """The exact probability of label 1 in every row, float64 [R], computed from the record alone.

    It is `Records.risk` again, and is known as well where the record was changed: what would the risk be, had
    this dose not been given?

    Raises:
        ValueError: the records have other variables than a simulated cohort.
    """
    if records.variables != NAMES or records.background_names != ("Age", "Gender"):
        got = ", ".join((*records.variables, *records.background_names))
        raise ValueError(f"records: expected the variables of a simulated cohort, {', '.join(NAMES)}; got {got}")
    age, male = records.background[records.offset[:-1]].astype(np.float64).T
    drive = _Drive(records.length, age, male)
    for t, rows in drive.hours():
        drive.read(records.measured[rows, : len(VARIABLES)])
        drive.dose(t, records.measured[rows, len(VARIABLES) :])
    risk = _risk(_hazard(drive.log_odds)).T
    by_row: Array = risk[np.arange(risk.shape[1]) < records.length[:, None]]
    return by_row


class _Drive:
    """The log-odds of the hazard, as the record moves them from hour to hour: the one definition of the risk.

    The patients still there in an hour come first in `order`, by falling length of stay: the hour's arrays are theirs.

    Attributes:
        log_odds: [T + HORIZON, P]: slot t + HORIZON is the drive of hour t, the first slots are the patient at rest.
        strain: [n] after `read`, of the n patients still there.
        acting: [T, P, drugs] the effect of all doses so far, in the hours to come; P in `order`.
    """

    def __init__(self, length: NDArray[np.int64], age: Array, male: Array) -> None:
        self.length, self.order = length, np.argsort(-length, kind="stable")
        hours, patients = int(length.max()), length.size
        self.log_odds = np.tile(BASE + AGE_PER_DECADE * (age - 63) / 10 + MALE * male, (hours + HORIZON, 1))
        self.acting = np.zeros((hours, patients, len(DRUGS)))
        self.strain, self._rise = np.zeros(patients), np.zeros(patients)
        self._last = np.zeros((patients, len(VARIABLES)))  # carried forward, in spreads from normal; 0 before the first
        self._known = np.zeros(patients, bool)  # whether Lactate was measured before

    def hours(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each hour t, and where the rows of those still there are: [n]."""
        first = (np.cumsum(self.length) - self.length)[self.order]
        for t in range(self.length.max()):
            yield t, first[: np.count_nonzero(self.length > t)] + t

    def read(self, readings: NDArray[np.float32]) -> None:
        """An hour's readings, [n, variables], NaN where nothing was measured."""
        n, seen = len(readings), ~np.isnan(readings)
        before = self._last[:n]
        self._last = np.where(seen, (readings.astype(np.float64) - NORMAL) / SPREAD, before)
        drawn, known = seen[:, LACTATE], self._known[:n]
        change = np.where(known, self._last[:, LACTATE] - before[:, LACTATE], 0)
        self._rise = np.where(drawn, change, self._rise[:n] * 2 ** (-1 / LACTATE_HALF_LIFE))
        self._known = known | drawn
        # Not @: BLAS does not promise the same bits for any number of rows.
        strain = np.einsum("pv,v->p", self._last, [v.strain for v in VARIABLES])
        self.strain = STRAIN_MEMORY * self.strain[:n] + (1 - STRAIN_MEMORY) * strain

    def dose(self, t: int, amounts: NDArray[np.float32]) -> None:
        """The doses of hour t, [n, drugs], NaN where none was given; after `read`."""
        n = len(amounts)
        for d, drug in enumerate(DRUGS):
            given = np.flatnonzero(~np.isnan(amounts[:, d]))
            effect = drug.effect()[: len(self.acting) - t, None]
            self.acting[t : t + len(effect), given, d] += effect * amounts[given, d].astype(np.float64)
        on_hazard = np.einsum("pd,d->p", self.acting[t, :n], [drug.hazard for drug in DRUGS])
        self.log_odds[t + HORIZON, self.order[:n]] += STRAIN * self.strain + LACTATE_RISE * self._rise + on_hazard


def _hazard(log_odds: Array) -> Array:
    """[T + HORIZON, P]: the chance that sepsis begins in an hour, if it has not before."""
    hazard: Array = 1 / (1 + np.exp(-np.minimum(log_odds, 10)))  # never 1 to the last bit: its logarithm is needed
    hazard[0] = 0.0  # nobody is admitted with sepsis beginning in hour 0
    return hazard


def _risk(hazard: Array) -> Array:
    """[T, P]: the chance that sepsis begins in the `HORIZON` hours after each hour."""
    free = np.cumsum(np.log1p(-hazard), axis=0)  # log of the chance of being free of sepsis up to each hour
    risk: Array = -np.expm1(free[HORIZON:] - free[:-HORIZON])
    return risk


def _run(random: np.random.Generator, drive: _Drive) -> tuple[NDArray[np.float32], Array]:
    """All patients hour by hour, to the end of their stay.

    Returns the record, float32 [rows, V] with NaN where nothing was measured or given, and the log-odds of the hazard,
    as `_Drive` has them.
    """
    patients = drive.length.size
    sickness, drift, measured = (
        np.array([getattr(v, name) for v in VARIABLES], np.float64) for name in ("sickness", "drift", "measured")
    )
    on_readings = np.array([[drug.readings.get(v.name, 0.0) for v in VARIABLES] for drug in DRUGS])
    given, indication = (np.array([getattr(d, name) for d in DRUGS]) for name in ("given", "indication"))

    record = np.full((drive.length.sum(), len(NAMES)), np.nan, np.float32)
    base = random.normal(0, 0.5, (patients, len(VARIABLES)))  # what is normal for this patient, in spreads
    noise = random.normal(0, 1, base.shape)
    deterioration = random.normal(0, 1, patients)
    for t, rows in drive.hours():
        n = rows.size
        deterioration = 0.97 * deterioration[:n] + np.sqrt(1 - 0.97**2) * random.normal(0, 1, n)
        noise = drift * noise[:n] + np.sqrt(1 - drift**2) * random.normal(0, 1, (n, len(VARIABLES)))
        state = base[:n] + noise + sickness * np.maximum(deterioration, 0)[:, None] + drive.acting[t, :n] @ on_readings
        value = np.round(np.maximum(NORMAL + SPREAD * state, 0.1 * NORMAL), 2)
        strain = drive.strain[:n, None].clip(0, 3)
        sought = measured * np.where(measured < 0.5, np.exp(0.4 * strain), 1)
        seen = random.random(value.shape) < sought
        record[rows, : len(VARIABLES)] = np.where(seen, value, np.nan)
        drive.read(record[rows, : len(VARIABLES)])  # as it is written, in float32

        wanted = given * np.exp(indication * drive.strain[:, None].clip(0, 3))
        amount = np.round(np.exp(random.normal(0, 0.3, wanted.shape)), 2)
        record[rows, len(VARIABLES) :] = np.where(random.random(wanted.shape) < wanted, amount, np.nan)
        drive.dose(t, record[rows, len(VARIABLES) :])
    return record, drive.log_odds
