"""What is taken from MIMIC-III, and as what: variables, item ids of CareVue and MetaVision, units, limits.

Item ids follow the MIMIC Code Repository (Johnson et al., JAMIA 2018;25:32). A unit that is not listed here is an
error of the reader and not a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Beside the challenge's variables: mmHg, mmol/L, points (verbal response through a tube counts 1), mL, kg.
EXTRA = ("PaO2", "Sodium", "GCS", "Urine", "Weight")
SUMMED = ("Urine",)  # beside the doses
# What a number means that stands in the hour of a dose; NaN where none was given.
DOSES = {
    "Vasopressor": "ug/kg of norepinephrine equivalents: epinephrine 1, dopamine 1/100, phenylephrine 1/10; a unit of "
    "vasopressin 2.5, whatever the weight (Goradia et al., J Crit Care 2021;61:233)",
    "Dobutamine": "ug/kg",
    "Propofol": "mg",
    "Benzodiazepine": "mg of midazolam; 1 mg of lorazepam counts as 2",
    "Opioid": "mg of intravenous morphine; 0.01 mg of fentanyl, 0.15 mg of hydromorphone count as 1",
    "Insulin": "units",
    "Furosemide": "mg, intravenous",
    "Fluid": "mL of crystalloids and colloids, carriers of drugs included",
    "Blood": "mL of red cells, plasma, platelets and cryoprecipitate",
    "Antibiotic": "intravenous administrations of antibacterials begun (MetaVision only)",
    # Prescriptions have a date only, and a stop that is known when it comes: their first hour is the one after
    # the midnight that ends a day on which they were in force.
    "Antibiotic order": "orders in force on the day just ended",
    "Steroid order": "orders in force on the day just ended",
    "Diuretic order": "orders in force on the day just ended",
    "Insulin order": "orders in force on the day just ended",
}
# What only the score of organ failure needs.
EYE, VERBAL, MOTOR, VENTILATED = "eye", "verbal", "motor", "ventilated"
RATES = ("catecholamine", "dopamine", "dobutamine")

Units = Mapping[str, tuple[float, float]]  # spelling, see `spelling` -> (a, b): a x + b is in the variable's unit


def _same(*spellings: str) -> Units:
    return {spelling(one): (1.0, 0.0) for one in spellings}


def spelling(unit: str) -> str:
    """Letters, digits and %: "mm Hg", "MM HG" and "mmHg" are one, and so are "?F" (as stored) and "Deg. F" less deg."""
    return re.sub(r"[^a-z0-9%]|^deg\b", "", unit.lower().replace("µ", "u").replace("μ", "u"))


@dataclass(frozen=True)
class Item:
    """Where a number goes.

    Attributes:
        column: its name; usual: what a missing unit means; units: those known.
        rank: of equal times the lowest goes first.
        per_kg: the column is per kg: where the unit is not, the number is divided by the weight.
    """

    column: str
    usual: str
    units: Units
    rank: int
    per_kg: bool


def _items(*groups: tuple[str, str, Units, tuple[int, ...]], per_kg: bool = False) -> dict[int, Item]:
    out: dict[int, Item] = {}
    for column, usual, units, ids in groups:
        rank = sum(item.column == column for item in out.values())
        out.update({one: Item(column, spelling(usual), units, rank + i, per_kg) for i, one in enumerate(ids)})
    return out


BEATS, BREATHS = _same("bpm", "/min"), _same("insp/min", "bpm", "/min")
PRESSURE, PERCENT = _same("mmHg", "torr"), _same("%")
TEMPERATURE = {"c": (1.0, 0.0), "f": (5 / 9, -160 / 9)}
KILOGRAMS = {"kg": (1.0, 0.0), "lb": (0.45359237, 0.0), "lbs": (0.45359237, 0.0)}
FRACTION = _same("%", "torr", "decFrc", "fraction")  # the number tells: above 1 it is a percentage ("torr" is wrong)
NUMBER = _same("", "points")
MG_DL, MMOL, IU = _same("mg/dL"), _same("mmol/L", "mEq/L"), _same("IU/L", "U/L")

# In the order in which they are preferred where two of a variable have the same time: arterial before cuff.
CHART = _items(
    ("HR", "bpm", BEATS, (220045, 211)),
    ("O2Sat", "%", PERCENT, (220277, 646)),
    ("Temp", "c", TEMPERATURE, (223762, 676)),
    ("Temp", "f", TEMPERATURE, (223761, 678)),
    ("SBP", "mmHg", PRESSURE, (220050, 51, 225309, 6701, 220179, 455, 442)),
    ("DBP", "mmHg", PRESSURE, (220051, 8368, 225310, 8555, 220180, 8441, 8440)),
    ("MAP", "mmHg", PRESSURE, (220052, 52, 225312, 6702, 220181, 456, 443)),
    ("Resp", "insp/min", BREATHS, (220210, 618, 224690, 615)),
    ("EtCO2", "mmHg", PRESSURE, (228640, 1817)),
    ("FiO2", "%", FRACTION, (223835, 3420, 190, 189, 3422)),
    ("Glucose", "mg/dL", MG_DL, (225664, 807, 226537)),
    ("Weight", "kg", KILOGRAMS, (224639, 226512, 763, 762)),
    ("Weight", "lb", KILOGRAMS, (226531,)),
    (EYE, "", NUMBER, (220739, 184)),
    (VERBAL, "", NUMBER, (223900, 723)),
    (MOTOR, "", NUMBER, (223901, 454)),
)
# A ventilator's settings and what it measures: that there is one.
VENTILATOR = (220339, 224684, 224685, 224687, 224688, 224695, 224696, 505, 506, 535, 543, 619, 682, 683)
LABS = _items(
    ("BaseExcess", "mEq/L", MMOL, (50802,)),
    ("HCO3", "mEq/L", MMOL, (50882,)),
    ("FiO2", "%", FRACTION, (50816,)),
    ("pH", "units", _same("units"), (50820,)),
    ("PaCO2", "mmHg", PRESSURE, (50818,)),
    ("PaO2", "mmHg", PRESSURE, (50821,)),
    ("SaO2", "%", PERCENT, (50817,)),
    ("AST", "IU/L", IU, (50878,)),
    ("BUN", "mg/dL", MG_DL, (51006,)),
    ("Alkalinephos", "IU/L", IU, (50863,)),
    ("Calcium", "mg/dL", MG_DL, (50893,)),
    ("Chloride", "mEq/L", MMOL, (50902, 50806)),
    ("Creatinine", "mg/dL", {**MG_DL, "umoll": (1 / 88.4, 0.0)}, (50912,)),
    ("Bilirubin_direct", "mg/dL", MG_DL, (50883,)),
    ("Glucose", "mg/dL", {**MG_DL, "mmoll": (18.016, 0.0)}, (50931, 50809)),
    ("Lactate", "mmol/L", MMOL, (50813,)),
    ("Magnesium", "mg/dL", MG_DL, (50960,)),
    ("Phosphate", "mg/dL", MG_DL, (50970,)),
    ("Potassium", "mEq/L", MMOL, (50971, 50822)),
    ("Bilirubin_total", "mg/dL", {**MG_DL, "umoll": (1 / 17.1, 0.0)}, (50885,)),
    ("TroponinI", "ng/mL", _same("ng/mL", "ug/L"), (51002,)),
    ("Hct", "%", PERCENT, (51221, 50810)),
    ("Hgb", "g/dL", {**_same("g/dL", "gm/dL"), "gl": (0.1, 0.0)}, (51222, 50811)),
    ("PTT", "sec", _same("sec", "seconds", "s"), (51275,)),
    ("WBC", "K/uL", _same("K/uL", "10^3/uL", "10^9/L"), (51301, 51300)),
    ("Fibrinogen", "mg/dL", MG_DL, (51214,)),
    ("Platelets", "K/uL", _same("K/uL", "10^3/uL", "10^9/L"), (51265,)),
    ("Sodium", "mEq/L", MMOL, (50983, 50824)),
)  # fmt: skip
SPECIMEN, ARTERIAL = 50800, ("PaO2", "PaCO2", "SaO2")  # what is arterial by name is left out of other blood
OTHER_BLOOD = ("VEN", "MIX", "CENTRAL VENOUS")

MILLILITRES = {**_same("mL", "cc"), "l": (1000.0, 0.0)}
URINE = _items(
    (
        "Urine", "mL", MILLILITRES,
        (226559, 226560, 226561, 226584, 226563, 226564, 226565, 226567, 226557, 226558, 227489,
         40055, 43175, 40069, 40094, 40715, 40473, 40085, 40057, 40056, 40405, 40428, 40086, 40096, 40651),
    ),
    ("Urine", "mL", {"ml": (-1.0, 0.0)}, (227488,)),  # what was rinsed in comes out again in 227489
)  # fmt: skip

MILLIGRAMS = {**_same("mg"), "mcg": (1e-3, 0.0), "ug": (1e-3, 0.0), **dict.fromkeys(("g", "gm", "grams"), (1e3, 0.0))}
UNITS = _same("units", "unit", "U")


def _scaled(units: Units, by: float) -> Units:
    return {name: (a * by, b * by) for name, (a, b) in units.items()}


# Amounts; CareVue's items first in each line, then MetaVision's.
PRESSORS = _items(
    ("Vasopressor", "mg", _scaled(MILLIGRAMS, 1e3), (30047, 30120, 30044, 30119, 30309, 221906, 221289)),
    ("Vasopressor", "mg", _scaled(MILLIGRAMS, 1e3 / 100), (30043, 30307, 221662)),
    ("Vasopressor", "mg", _scaled(MILLIGRAMS, 1e3 / 10), (30127, 30128, 221749)),
    ("Dobutamine", "mg", _scaled(MILLIGRAMS, 1e3), (30042, 30306, 221653)),
    per_kg=True,
)
OTHERS = _items(
    ("Vasopressor", "units", _scaled(UNITS, 2.5), (30051, 222315)),
    ("Propofol", "mg", MILLIGRAMS, (30131, 222168)),
    ("Benzodiazepine", "mg", MILLIGRAMS, (30124, 221668)),
    ("Benzodiazepine", "mg", _scaled(MILLIGRAMS, 2.0), (30141, 221385)),
    ("Opioid", "mg", MILLIGRAMS, (30126, 30153, 225154)),
    ("Opioid", "mcg", _scaled(MILLIGRAMS, 100.0), (30118, 30149, 30150, 30308, 221744, 225942, 225972)),
    ("Opioid", "mg", _scaled(MILLIGRAMS, 1 / 0.15), (30163, 221833)),
    ("Insulin", "units", UNITS, (30045, 30100, 30310, 223257, 223258, 223259, 223260, 223261, 223262)),
    ("Furosemide", "mg", MILLIGRAMS, (30123, 221794, 228340)),
    (
        "Fluid", "mL", MILLILITRES,
        (30018, 30013, 30015, 30020, 30021, 30014, 30060, 30061, 30143, 30159, 30160, 30176, 30352, 30353, 30008, 30009,
         30012, 30181, 225158, 225159, 225161, 225823, 225825, 225827, 225828, 225941, 220949, 225943, 225944, 226089,
         220861, 220862, 220863, 220864, 225174),
    ),
    ("Blood", "mL", MILLILITRES, (30001, 30005, 30006, 30007, 30180, 220970, 225168, 225170, 225171)),
)  # fmt: skip
GIVEN = {**PRESSORS, **OTHERS}
# Rates in ug/kg/min.
RATE = {
    **_same("mcg/kg/min", "mcg/min"), **dict.fromkeys(("mgkgmin", "mgmin"), (1e3, 0.0)),
    **dict.fromkeys(("mcghr", "mcghour"), (1 / 60, 0.0)), **dict.fromkeys(("mghr", "mghour"), (1e3 / 60, 0.0)),
}  # fmt: skip
RATED = _items(
    ("catecholamine", "mcg/kg/min", RATE, (30120, 30119, 221906, 221289)),
    ("catecholamine", "mcg/min", RATE, (30047, 30044, 30309)),
    ("dopamine", "mcg/kg/min", RATE, (30043, 30307, 221662)),
    ("dobutamine", "mcg/kg/min", RATE, (30042, 30306, 221653)),
    per_kg=True,
)
# MetaVision's intravenous antibacterials: neither antivirals, antifungals, antimalarials nor tuberculostatics.
ANTIBACTERIALS = (
    225798, 225840, 225842, 225843, 225845, 225847, 225850, 225851, 225853, 225855, 225859, 225860, 225862, 225863,
    225865, 225866, 225875, 225876, 225879, 225881, 225883, 225884, 225886, 225888, 225889, 225890, 225892, 225893,
    225899, 225900, 225902, 227691,
)  # fmt: skip
INTRAVENOUS = "08-Antibiotics (IV)"

ORDERS = {  # by name of the drug, in lower case
    "Antibiotic order": (
        "amikacin|amoxicillin|ampicillin|augmentin|azithromycin|aztreonam|bactrim|cef[a-z]|cephalexin|chloramphenicol|"
        "ciprofloxacin|clarithromycin|clindamycin|colisti|daptomycin|dicloxacillin|doxycycline|ertapenem|erythromycin|"
        "gentamicin|imipenem|levofloxacin|linezolid|meropenem|metronidazole|minocycline|moxifloxacin|nafcillin|"
        "ofloxacin|oxacillin|penicillin|piperacillin|polymyxin|quinupristin|streptomycin|sulfameth|sulfadiazine|"
        "synercid|tetracycline|ticarcillin|tigecycline|tobramycin|trimethoprim|unasyn|vancomycin|zosyn"
    ),
    "Steroid order": "hydrocortisone|prednisone|prednisolone|dexamethasone|fludrocortisone",
    "Diuretic order": "furosemide|bumetanide|torsemide|ethacryn|chlorothiazide|metolazone|spironolactone|acetazolamide",
    "Insulin order": "insulin|humalog|lantus|glargine",
}
PARENTERAL = ("IV", "IV DRIP", "IV BOLUS", "PB", "IM")
SYSTEMIC = (*PARENTERAL, "PO", "PO/NG", "NG", "OG", "J TUBE", "SC", "SUBCUT")
NOT_CULTURE = r"SCREEN|SEROLOGY|IMMUNOLOGY|ANTIGEN|CYTOGENETICS|INFLUENZA|VIRAL|^BLOOD \("
SEPSIS_CODES = r"^(99591|99592|78552|038\d*)$"

# What a living adult can have and the method can report, in the variable's unit; outside, it is a slip of the pen,
# another quantity in the same field, or a disconnected probe (0 for a pulse, 32 for a temperature in Celsius).
LIMITS = {
    "HR": (10, 300), "O2Sat": (20, 100), "Temp": (25, 45), "SBP": (20, 300), "MAP": (10, 250), "DBP": (5, 200),
    "Resp": (1, 80), "EtCO2": (1, 120), "BaseExcess": (-50, 50), "HCO3": (1, 70), "FiO2": (0.2, 1), "pH": (6.3, 8),
    "PaCO2": (5, 200), "SaO2": (10, 100), "AST": (1, 50000), "BUN": (1, 300), "Alkalinephos": (1, 10000),
    "Calcium": (2, 20), "Chloride": (50, 175), "Creatinine": (0.05, 40), "Bilirubin_direct": (0, 80),
    "Glucose": (5, 2000), "Lactate": (0.05, 40), "Magnesium": (0.2, 20), "Phosphate": (0.1, 25), "Potassium": (1, 15),
    "Bilirubin_total": (0.02, 100), "TroponinI": (0, 500), "Hct": (5, 75), "Hgb": (1, 25), "PTT": (10, 250),
    "WBC": (0.01, 1000), "Fibrinogen": (10, 2000), "Platelets": (1, 3000),
    "PaO2": (15, 800), "Sodium": (90, 200), "Urine": (-5000, 5000), "Weight": (20, 350),
    EYE: (1, 4), VERBAL: (0, 5), MOTOR: (1, 6),
    "Vasopressor": (0, 1e4), "Dobutamine": (0, 1e4), "Propofol": (0, 1e4), "Benzodiazepine": (0, 1e3),
    "Opioid": (0, 5e3), "Insulin": (0, 500), "Furosemide": (0, 2000), "Fluid": (0, 1e4), "Blood": (0, 1e4),
    **dict.fromkeys(("Antibiotic", "Antibiotic order", "Steroid order", "Diuretic order", "Insulin order"), (0, 100)),
    "catecholamine": (0, 10), "dopamine": (0, 100), "dobutamine": (0, 100),
}  # fmt: skip

TABLES = {
    "PATIENTS": ("SUBJECT_ID", "GENDER", "DOB"),
    "ADMISSIONS": ("SUBJECT_ID", "HADM_ID", "ADMITTIME"),
    "ICUSTAYS": ("SUBJECT_ID", "HADM_ID", "ICUSTAY_ID", "DBSOURCE", "FIRST_CAREUNIT", "INTIME", "OUTTIME"),
    "DIAGNOSES_ICD": ("HADM_ID", "ICD9_CODE"),
    "MICROBIOLOGYEVENTS": ("SUBJECT_ID", "CHARTDATE", "CHARTTIME", "SPEC_TYPE_DESC"),
    "PRESCRIPTIONS": ("SUBJECT_ID", "STARTDATE", "ENDDATE", "DRUG_TYPE", "DRUG", "ROUTE"),
    "CHARTEVENTS": ("SUBJECT_ID", "ITEMID", "CHARTTIME", "VALUE", "VALUENUM", "VALUEUOM", "ERROR"),
    "LABEVENTS": ("SUBJECT_ID", "ITEMID", "CHARTTIME", "VALUE", "VALUENUM", "VALUEUOM"),
    "OUTPUTEVENTS": ("SUBJECT_ID", "ITEMID", "CHARTTIME", "VALUE", "VALUEUOM", "ISERROR"),
    "INPUTEVENTS_CV": ("SUBJECT_ID", "ITEMID", "CHARTTIME", "AMOUNT", "AMOUNTUOM", "RATE", "RATEUOM"),
    "INPUTEVENTS_MV": (
        "SUBJECT_ID", "ITEMID", "STARTTIME", "ENDTIME", "AMOUNT", "AMOUNTUOM", "RATE", "RATEUOM", "ORDERCATEGORYNAME",
        "PATIENTWEIGHT", "STATUSDESCRIPTION",
    ),
}  # fmt: skip
