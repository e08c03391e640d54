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

from collections.abc import Callable
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
    Drug("Sedative", plateau, 10.0, 1.2, 0.012, 0.0, {"HR": -0.5, "Resp": -0.6}),
)
BASE = -7.6  # log-odds of sepsis an hour without strain, lactate or doses
STRAIN, STRAIN_MEMORY = 3.0, 0.9  # weight of the strain, and the share of it kept from hour to hour
LACTATE_RISE, LACTATE_HALF_LIFE = 0.9, 12.0  # per spread above the reading before; fades with the hours since
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
    record, drive = _run(random, stay.max(), BASE + AGE_PER_DECADE * (age - 63) / 10 + MALE * male)

    # Hazard [T + HORIZON, P]; nobody is admitted with sepsis beginning in hour 0.
    hazard = 1 / (1 + np.exp(-np.minimum(drive, 10)))  # never 1 to the last bit: its logarithm is needed
    hazard[0] = 0.0
    begins = random.random(hazard.shape) < hazard
    onset = np.where(begins.any(axis=0), begins.argmax(axis=0), len(hazard))
    length = np.minimum(stay, onset)

    hour = np.arange(stay.max())[:, None]
    free = np.cumsum(np.log1p(-hazard), axis=0)  # log of the chance of being free of sepsis up to each hour
    risk = -np.expm1(free[HORIZON:] - free[:-HORIZON])
    label = onset <= hour + HORIZON
    rows = (hour < length).T  # patient by patient, hour by hour
    names = np.char.mod("s%06d", np.arange(patients))
    return Records(
        measured=record.transpose(1, 0, 2)[rows],
        variables=(*(v.name for v in VARIABLES), *(d.name for d in DRUGS)),
        background=np.repeat(np.stack([age, male], axis=1), length, axis=0).astype(np.float32),
        background_names=("Age", "Gender"),
        clock=(np.broadcast_to(hour, label.shape).T[rows] + 1).astype(np.float32),
        label=label.T[rows].astype(np.int8), length=length,
        patient=names, group=np.full(patients, "simulated"),
        fold=np.array([fold_of("simulated", name) for name in names], np.int8),
        doses=tuple(drug.name for drug in DRUGS), risk=risk.T[rows],
    )  # fmt: skip


def _run(random: np.random.Generator, hours: int, at_rest: Array) -> tuple[NDArray[np.float32], Array]:
    """All patients hour by hour, as if all stayed to the end.

    Returns the record, float32 [T, P, V] with NaN where nothing was measured or given, and the log-odds of
    the hazard, [T + HORIZON, P]: slot t + HORIZON is the drive of hour t, the first slots are the patient
    `at_rest`, [P].
    """
    patients = at_rest.size
    normal, spread, sickness, drift, measured, weight = (
        np.array([getattr(v, name) for v in VARIABLES], np.float64)
        for name in ("normal", "spread", "sickness", "drift", "measured", "strain")
    )
    lactate = [v.name for v in VARIABLES].index("Lactate")
    on_readings = np.array([[drug.readings.get(v.name, 0.0) for v in VARIABLES] for drug in DRUGS])
    on_hazard = np.array([drug.hazard for drug in DRUGS])
    given, indication = (np.array([getattr(d, name) for d in DRUGS]) for name in ("given", "indication"))
    effects = np.stack([drug.effect() for drug in DRUGS], axis=1)  # [LONGEST, drugs]

    record = np.full((hours, patients, len(VARIABLES) + len(DRUGS)), np.nan, np.float32)
    drive = np.tile(at_rest, (hours + HORIZON, 1))
    doses = np.zeros((hours, patients, len(DRUGS)))
    base = random.normal(0, 0.5, (patients, len(VARIABLES)))  # what is normal for this patient, in spreads
    noise = random.normal(0, 1, base.shape)
    deterioration = random.normal(0, 1, patients)
    last = np.zeros(base.shape)  # readings carried forward, in spreads from normal; 0 before the first
    strain, rise = np.zeros(patients), np.zeros(patients)
    lactate_known = np.zeros(patients, bool)

    for t in range(hours):
        deterioration = 0.97 * deterioration + np.sqrt(1 - 0.97**2) * random.normal(0, 1, patients)
        noise = drift * noise + np.sqrt(1 - drift**2) * random.normal(0, 1, base.shape)
        # [P, drugs]: every dose so far, weighed by its age
        acting = np.einsum("kpd,kd->pd", doses[:t], effects[t:0:-1])
        state = base + noise + sickness * np.maximum(deterioration, 0)[:, None] + acting @ on_readings
        value = np.round(np.maximum(normal + spread * state, 0.1 * normal), 2)
        sought = measured * np.where(measured < 0.5, np.exp(0.4 * strain.clip(0, 3))[:, None], 1)
        seen = random.random(base.shape) < sought
        record[t, :, : len(VARIABLES)] = np.where(seen, value, np.nan)

        before = last[:, lactate].copy()
        last = np.where(seen, (value - normal) / spread, last)
        drawn = seen[:, lactate]
        change = np.where(lactate_known, last[:, lactate] - before, 0)
        rise = np.where(drawn, change, rise * 2 ** (-1 / LACTATE_HALF_LIFE))
        lactate_known |= drawn
        strain = STRAIN_MEMORY * strain + (1 - STRAIN_MEMORY) * (last @ weight)

        wanted = given * np.exp(indication * strain.clip(0, 3)[:, None])
        dosed = random.random(wanted.shape) < wanted
        amount = np.round(np.exp(random.normal(0, 0.3, wanted.shape)), 2)
        doses[t] = np.where(dosed, amount, 0)
        record[t, :, len(VARIABLES) :] = np.where(dosed, amount, np.nan)
        acting = acting + doses[t] * effects[0]
        drive[t + HORIZON] += STRAIN * strain + LACTATE_RISE * rise + acting @ on_hazard
    return record, drive
