"""The reader of MIMIC-III on made-up tables with truths worked out by hand, and on the open demo where it is.

The demo is read only where it is: in $GATEWISE_MIMIC, or in shared/data beside the repository.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("polars")

from gatewise.sepsis import cohort, mimic, mimic_items, records, sofa

DEMO = Path(os.environ.get("GATEWISE_MIMIC", Path(__file__).resolve().parents[1].parent / "shared/data/mimic3demo"))
ADMITTED = datetime(2150, 3, 1, 10, 0)  # to intensive care; to the hospital 6 h before
NAN = float("nan")

Tables = dict[str, list[dict[str, Any]]]


# ---- made-up tables ----------------------------------------------------------------------------------------


def at(hours: float) -> str:
    """The time so many hours after ICU admission."""
    return str((ADMITTED + timedelta(hours=hours)).replace(microsecond=0))


def made_up(hours: float = 40, **tables: list[dict[str, Any]]) -> Tables:
    """One man of 60 in MetaVision's MICU for so many hours; `tables` get rows beside his."""
    person = {"SUBJECT_ID": 7, "GENDER": "M", "DOB": "2090-02-20 00:00:00"}
    admission = {"SUBJECT_ID": 7, "HADM_ID": 70, "ADMITTIME": at(-6)}
    stay = {"SUBJECT_ID": 7, "HADM_ID": 70, "ICUSTAY_ID": 700, "DBSOURCE": "metavision", "FIRST_CAREUNIT": "MICU"}
    out: Tables = {name: [] for name in mimic_items.TABLES}
    out["PATIENTS"].append(person)
    out["ADMISSIONS"].append(admission)
    out["ICUSTAYS"].append({**stay, "INTIME": at(0), "OUTTIME": at(hours)})
    for name, rows in tables.items():
        out[name] += [{"SUBJECT_ID": 7, **row} for row in rows]
    return out


def chart(item: int, hours: float, value: object, unit: str = "", **more: object) -> dict[str, Any]:
    number = value if isinstance(value, (int, float)) else str(value)[0]
    return {"ITEMID": item, "CHARTTIME": at(hours), "VALUE": value, "VALUENUM": number, "VALUEUOM": unit, **more}


def drip(item: int, start: float, stop: float, amount: float, unit: str, rate: object = "", per: str = "", **more: Any):
    return {
        "ITEMID": item, "STARTTIME": at(start), "ENDTIME": at(stop), "AMOUNT": amount, "AMOUNTUOM": unit, "RATE": rate,
        "RATEUOM": per, "PATIENTWEIGHT": 50, "STATUSDESCRIPTION": "FinishedRunning", **more,
    }  # fmt: skip


def order(drug: str, first: str, last: str, route: str = "IV", kind: str = "MAIN") -> dict[str, Any]:
    dates = {"STARTDATE": f"{first} 00:00:00", "ENDDATE": last and f"{last} 00:00:00"}
    return {**dates, "DRUG_TYPE": kind, "DRUG": drug, "ROUTE": route}


def as_text(name: str, rows: list[dict[str, Any]], lower: bool = False, quoting: int = csv.QUOTE_MINIMAL) -> str:
    """The table as CSV, with a column in front and one behind that nobody asks for."""
    columns = ["ROW_ID", *mimic_items.TABLES[name], "REMARK"]
    out = io.StringIO()
    writer = csv.writer(out, quoting=quoting, lineterminator="\n")
    writer.writerow([column.lower() for column in columns] if lower else columns)
    writer.writerows([i, *(row.get(c, "") for c in columns[1:-1]), 'a "b",\nc'] for i, row in enumerate(rows))
    return out.getvalue()


def write(folder: Path, tables: Tables, gz: bool = False, lower: bool = False, **how: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in tables.items():
        data = as_text(name, rows, lower, **how).encode()
        path = folder / f"{name}.csv"
        (path.with_suffix(".csv.gz") if gz else path).write_bytes(gzip.compress(data, 1) if gz else data)
    return folder


def read(folder: Path, tables: Tables, **how: Any) -> tuple[records.Records, mimic.Report]:
    return mimic.read_with_report(write(folder, tables), **how)


def column(table: records.Records, name: str) -> np.ndarray:
    return table.measured[:, table.variables.index(name)]


def expect(table: records.Records, name: str, at_hours: dict[int, float]) -> None:
    """The column holds these values, as float32, and nothing else."""
    want = np.full(table.label.size, NAN, np.float32)
    for hour, value in at_hours.items():
        want[hour] = value
    np.testing.assert_array_equal(column(table, name), want, err_msg=name)


def assert_same(one: records.Records, other: records.Records) -> None:
    for name in ("measured", "background", "clock", "label", "length", "patient", "group", "fold"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


def random_tables(seed: int, until: float = 1e9, events: int = 1200) -> Tables:
    """Five stays of four subjects with events of all kinds, up to an hour: what is known by then."""
    random = np.random.default_rng(seed)
    out = made_up(60)
    for subject, start, hours in ((8, 5, 30), (8, 50, 20), (9, 0, 45), (3, 2, 7)):
        out["PATIENTS"] += [{"SUBJECT_ID": subject, "GENDER": "F", "DOB": "2100-01-01 00:00:00"}] * (start != 50)
        admission = subject * 10 + (start == 50)
        out["ADMISSIONS"].append({"SUBJECT_ID": subject, "HADM_ID": admission, "ADMITTIME": at(start)})
        out["ICUSTAYS"].append(
            {"SUBJECT_ID": subject, "HADM_ID": admission, "ICUSTAY_ID": admission * 10, "DBSOURCE": "carevue",
             "FIRST_CAREUNIT": "SICU", "INTIME": at(start), "OUTTIME": at(start + hours)}
        )  # fmt: skip
    charted = {"CHARTEVENTS": mimic_items.CHART, "LABEVENTS": mimic_items.LABS, "OUTPUTEVENTS": mimic_items.URINE}
    for _ in range(events):
        hour, who = round(float(random.uniform(-5, 75)), 2), {"SUBJECT_ID": int(random.choice([3, 7, 8, 9]))}
        table = str(random.choice([*charted, "CHARTEVENTS", "specimen", "drip"]))
        if table in charted:
            item = int(random.choice(list(charted[table])))
            low, high = mimic_items.LIMITS[charted[table][item].column]
            value = round(float(random.uniform(low, min(high, 200))), 2)
            row = chart(item, hour, value, "kg" * (charted[table][item].column == "Weight"))
        elif table == "specimen":
            table, row = "LABEVENTS", chart(50800, hour, str(random.choice(["ART", "VEN"])), VALUENUM="")
        else:
            amount = round(float(random.uniform(0, 2)), 2)
            table, row = "INPUTEVENTS_CV", {"ITEMID": 30120, "CHARTTIME": at(hour), "RATE": amount, "AMOUNT": amount}
        if hour < until:
            out[table].append({**who, **row})
            if len(out[table]) % 50 == 0:
                out["MICROBIOLOGYEVENTS"].append({**who, "CHARTTIME": at(hour), "SPEC_TYPE_DESC": "SPUTUM"})
    for _ in range(60):
        start, who = float(random.integers(-5, 70)), {"SUBJECT_ID": int(random.choice([3, 7, 8, 9]))}
        item, amount, last = int(random.choice([221906, 222168, 225158])), 64.0, start + 4
        day = (ADMITTED + timedelta(hours=start)).replace(hour=0)
        if start < until:  # an infusion that runs on has given half of its 64 in two of its four hours
            stop = min(last, until)
            out["INPUTEVENTS_MV"].append({**who, **drip(item, start, stop, amount * (stop - start) / 4, "")})
        if start < until:
            end = min(day + timedelta(days=2), (ADMITTED + timedelta(hours=min(until, 1e6))).replace(hour=0))
            out["PRESCRIPTIONS"].append({**who, **order("Vancomycin", f"{day:%Y-%m-%d}", f"{end:%Y-%m-%d}")})
    return out


# ---- tables in their spellings -----------------------------------------------------------------------------


def test_every_spelling_of_the_tables_reads_the_same_to_the_last_bit(tmp_path: Path) -> None:
    tables = random_tables(0)
    plain = read(tmp_path / "plain", tables)[0]
    assert np.isfinite(plain.measured).sum() > 500 and plain.label.any()
    for name, how in {"gz": {"gz": True, "lower": True}, "quoted": {"quoting": csv.QUOTE_ALL}}.items():
        assert_same(mimic.read_mimic(write(tmp_path / name, tables, **how)), plain)
    crlf = tmp_path / "crlf"
    crlf.mkdir()
    for path in (tmp_path / "plain").iterdir():
        text = path.read_bytes().replace(b"\n", b"\r\n").rstrip()  # and no end of the last line
        members = gzip.compress(text[:100]) + gzip.compress(text[100:])
        (crlf / (path.name.lower() + ".gz")).write_bytes(members)
    assert_same(mimic.read_mimic(crlf), plain)


@pytest.mark.parametrize(("block", "gz"), [(120, False), (400, True)])
def test_where_the_blocks_end_moves_no_bit(tmp_path: Path, block: int, gz: bool) -> None:
    folder = write(tmp_path, random_tables(1, events=300), gz=gz)
    whole, report = mimic.read_with_report(folder)
    cut, report_of_cut = mimic.read_with_report(folder, block=block)
    assert_same(cut, whole)
    assert str(report_of_cut) == str(report) and report.sofa.tobytes() == report_of_cut.sofa.tobytes()


# ---- rows, values, units -----------------------------------------------------------------------------------

MCG_KG = 1000 / 50  # mg -> ug/kg at the 50 kg of `drip`


@pytest.mark.parametrize(
    ("table", "row", "name", "value"),
    [
        ("CHARTEVENTS", chart(223761, 3, 98.6, "?F"), "Temp", (98.6 - 32) / 1.8),
        ("CHARTEVENTS", chart(678, 3, 104, "Deg. F"), "Temp", 40),
        ("CHARTEVENTS", chart(678, 3, 104), "Temp", 40),
        ("CHARTEVENTS", chart(676, 3, 36.5, "Deg. C"), "Temp", 36.5),
        ("CHARTEVENTS", chart(676, 3, 36.5), "Temp", 36.5),
        ("CHARTEVENTS", chart(223762, 3, 104, "°F"), "Temp", 40),  # the unit is believed, not the item
        ("CHARTEVENTS", chart(223835, 3, 40), "FiO2", 0.4),
        ("CHARTEVENTS", chart(223835, 3, 0.4), "FiO2", 0.4),
        ("CHARTEVENTS", chart(190, 3, 0.5, "torr"), "FiO2", 0.5),
        ("CHARTEVENTS", chart(190, 3, 1, "torr"), "FiO2", 1),
        ("LABEVENTS", chart(50816, 3, 35, "%"), "FiO2", 0.35),
        ("CHARTEVENTS", chart(226531, 3, 200), "Weight", 90.718474),
        ("CHARTEVENTS", chart(763, 3, 80, "kg"), "Weight", 80),
        ("CHARTEVENTS", chart(455, 3, 120, "mmHg"), "SBP", 120),
        ("LABEVENTS", chart(50821, 3, 90, "MM HG"), "PaO2", 90),
        ("LABEVENTS", chart(50912, 3, 2, "mg/dL"), "Creatinine", 2),
        ("LABEVENTS", chart(50912, 3, 88.4, "umol/L"), "Creatinine", 1),
        ("LABEVENTS", chart(50885, 3, 34.2, "µmol/L"), "Bilirubin_total", 2),
        ("LABEVENTS", chart(50931, 3, 5, "mmol/L"), "Glucose", 90.08),
        ("LABEVENTS", chart(51222, 3, 95, "g/L"), "Hgb", 9.5),
        ("LABEVENTS", chart(50983, 3, 140, "mEq/L"), "Sodium", 140),
        ("OUTPUTEVENTS", chart(226559, 3, 60, "mL"), "Urine", 60),
        ("OUTPUTEVENTS", chart(40055, 3, 60), "Urine", 60),
        ("OUTPUTEVENTS", chart(227488, 3, 60, "mL"), "Urine", -60),  # rinsed in
        ("INPUTEVENTS_MV", drip(221906, 3, 4, 2, "mg"), "Vasopressor", 2 * MCG_KG),
        ("INPUTEVENTS_MV", drip(221906, 3, 4, 2000, "mcg"), "Vasopressor", 2 * MCG_KG),
        ("INPUTEVENTS_MV", drip(221662, 3, 4, 200, "mg"), "Vasopressor", 2 * MCG_KG),
        ("INPUTEVENTS_MV", drip(221749, 3, 4, 20, "mg"), "Vasopressor", 2 * MCG_KG),
        ("INPUTEVENTS_MV", drip(222315, 3, 4, 2.4, "units"), "Vasopressor", 2.4 * 2.5),
        ("INPUTEVENTS_MV", drip(221653, 3, 4, 15, "mg"), "Dobutamine", 15 * MCG_KG),
        ("INPUTEVENTS_MV", drip(221385, 3, 4, 2, "mg"), "Benzodiazepine", 4),
        ("INPUTEVENTS_MV", drip(221668, 3, 4, 2, "mg"), "Benzodiazepine", 2),
        ("INPUTEVENTS_MV", drip(221744, 3, 4, 50, "mcg"), "Opioid", 5),
        ("INPUTEVENTS_MV", drip(221744, 3, 4, 0.05, "mg"), "Opioid", 5),
        ("INPUTEVENTS_MV", drip(221833, 3, 4, 1.5, "mg"), "Opioid", 10),
        ("INPUTEVENTS_MV", drip(225158, 3, 4, 0.5, "L"), "Fluid", 500),
        ("INPUTEVENTS_CV", {"ITEMID": 30013, "CHARTTIME": at(3), "AMOUNT": 75, "AMOUNTUOM": "cc"}, "Fluid", 75),
        ("INPUTEVENTS_CV", {"ITEMID": 30045, "CHARTTIME": at(3), "AMOUNT": 4, "AMOUNTUOM": "U"}, "Insulin", 4),
        ("INPUTEVENTS_CV", {"ITEMID": 30118, "CHARTTIME": at(3), "AMOUNT": 100}, "Opioid", 10),  # mcg is usual
    ],
)
def test_each_unit_becomes_that_of_the_variable(
    tmp_path: Path, table: str, row: dict[str, Any], name: str, value: float
) -> None:
    got = read(tmp_path, made_up(6, **{table: [row]}))[0]
    assert np.isfinite(got.measured).sum() == 1
    want = np.full(6, NAN)
    want[3] = value
    np.testing.assert_allclose(column(got, name), want, rtol=1e-6)


def test_a_row_holds_its_hour_the_last_value_and_the_sums(tmp_path: Path) -> None:
    """Hours are [k, k + 1); the last value counts; of equal times arterial pressure goes before the cuff."""
    tables = made_up(
        4.5,
        CHARTEVENTS=[
            chart(220045, -0.01, 60), chart(220045, 0, 61), chart(220045, 0.5, 63), chart(220045, 0.25, 62),
            chart(211, 1.99, 64), chart(220045, 2, 65), chart(220045, 4.5, 66), chart(220045, 4.51, 67),
            chart(220045, 2.5, 80), chart(220045, 2.5, 81), chart(220045, 2.9, 99, ERROR=1),
            chart(220050, 1, 120), chart(220179, 1, 110), chart(455, 0.9, 90), chart(51, 0.8, 100),
            chart(225664, 3, 150, VALUENUM=""), {**chart(220045, 3, 70), "CHARTTIME": ""},
            chart(220045, 3, 71, SUBJECT_ID=8),
        ],
        OUTPUTEVENTS=[
            chart(226559, 1.2, 50), chart(226560, 1.9, 25), chart(226559, 3, 10), chart(226559, 3, 5, ISERROR=1)
        ],
    )  # fmt: skip
    got, report = read(tmp_path, tables)
    assert_same(read(tmp_path, tables, block=60)[0], got)
    assert got.length.tolist() == [5] and got.clock.tolist() == [1, 2, 3, 4, 5]
    expect(got, "HR", {0: 63, 1: 64, 2: 81, 4: 66})
    expect(got, "SBP", {0: 90, 1: 120})
    expect(got, "Urine", {1: 75, 3: 10})
    expect(got, "Glucose", {})
    assert report.left_out["charted rows marked as an error"] == 2
    assert got.measured.dtype == np.float32 and got.variables[:34] == records.MEASURED
    assert got.doses == tuple(mimic_items.DOSES) and set(got.doses) <= set(got.variables)


def test_coma_is_the_sum_of_what_was_charted_together(tmp_path: Path) -> None:
    eye, verbal, motor = 220739, 223900, 223901
    got = read(
        tmp_path,
        made_up(
            6,
            CHARTEVENTS=[
                chart(eye, 0, 3), chart(verbal, 0, 4), chart(motor, 0.1, 6),
                chart(eye, 1, 2), chart(verbal, 1, "No Response-ETT", VALUENUM=1), chart(motor, 1, 5),
                chart(184, 2, 1), chart(723, 2, "1.0 ET/Trach", VALUENUM=1), chart(454, 2, 1),
                chart(184, 3, 1), chart(723, 3, 1), chart(454, 3, 1),
                chart(eye, 4, 4), chart(motor, 4, 6),
            ],
        ),
    )  # fmt: skip
    expect(got[0], "GCS", {0: 13, 1: 8, 2: 3, 3: 3})
    # 13 gives 1 point, a tube none, and 3 without a tube 4; the worst of 24 h stays.
    assert got[1].sofa.tolist() == [1, 1, 1, 4, 4, 4]


def test_other_than_arterial_blood_gives_no_arterial_gas(tmp_path: Path) -> None:
    """The kind of the specimen may stand before or after its values, or nowhere."""
    gas = {"PaO2": 50821, "PaCO2": 50818, "SaO2": 50817, "pH": 50820}
    labs = [chart(50800, 1, "VEN", VALUENUM="")]
    for hour in range(5):
        labs += [chart(item, hour, 7.3 if name == "pH" else 60) for name, item in gas.items()]
    labs += [chart(50800, 2, "MIX", VALUENUM=""), chart(50800, 3, "ART", VALUENUM="")]
    got = read(tmp_path, made_up(6, LABEVENTS=labs), block=120)[0]
    for name in ("PaO2", "PaCO2", "SaO2"):
        expect(got, name, {0: 60, 3: 60, 4: 60})
    expect(got, "pH", dict.fromkeys(range(5), 7.3))


def test_implausible_values_are_dropped_and_counted(tmp_path: Path) -> None:
    got, report = read(
        tmp_path,
        made_up(
            6,
            CHARTEVENTS=[
                chart(220045, 1, 80), chart(220045, 1.5, 0), chart(220045, 2, 301), chart(220045, 3, 300),
                chart(220179, 1, 11647), chart(220181, 1, -8), chart(220045, 30, 999), chart(223835, 2, 10),
                chart(223761, 2, 36, "?F"),
            ],
            INPUTEVENTS_MV=[drip(225158, 2, 4, 30_000, "ml")],
        ),
    )  # fmt: skip
    expect(got, "HR", {1: 80, 3: 300})
    for name in ("SBP", "MAP", "FiO2", "Temp", "Fluid"):
        expect(got, name, {})
    # That of hour 30 belongs to no stay; the infusion is two hours of 15 L.
    assert report.implausible == {"FiO2": 1, "Fluid": 2, "HR": 2, "MAP": 1, "SBP": 1, "Temp": 1}
    assert "implausible values dropped: 1 FiO2, 2 Fluid, 2 HR, 1 MAP, 1 SBP, 1 Temp" in str(report)


def test_the_limits_hold_every_column_and_their_borders_are_in(tmp_path: Path) -> None:
    grid = mimic._Grid(mimic._Stays(*(np.array([x]) for x in (7, 70, 700, 0, 3600, 1, [0.0], "carevue"))))
    assert set(mimic_items.LIMITS) | {mimic_items.VENTILATED, "GCS"} == set(grid.columns)
    for name, (low, high) in mimic_items.LIMITS.items():
        assert grid.within(name, np.float32([low, high])).all(), name
        assert not grid.within(name, np.float32([low - 0.01, high * 1.01, NAN])).any(), name


def test_stays_folds_groups_and_what_is_known_at_admission(tmp_path: Path) -> None:
    tables = made_up(400 * 24)
    tables["PATIENTS"] += [
        {"SUBJECT_ID": 2, "GENDER": "F", "DOB": "1850-01-01 00:00:00"},
        {"SUBJECT_ID": 4, "GENDER": "F", "DOB": "2150-02-27 00:00:00"},
    ]
    base = {"HADM_ID": 20, "DBSOURCE": "carevue"}
    tables["ADMISSIONS"] += [
        {"SUBJECT_ID": 2, "HADM_ID": 20, "ADMITTIME": at(1)},
        {"SUBJECT_ID": 4, "HADM_ID": 40, "ADMITTIME": at(0)},
    ]
    tables["ICUSTAYS"] += [
        {**base, "SUBJECT_ID": 2, "ICUSTAY_ID": 202, "FIRST_CAREUNIT": "CCU", "INTIME": at(31), "OUTTIME": at(31.2)},
        {**base, "SUBJECT_ID": 2, "ICUSTAY_ID": 201, "FIRST_CAREUNIT": "TSICU", "INTIME": at(1), "OUTTIME": at(4)},
        {**base, "SUBJECT_ID": 2, "ICUSTAY_ID": 203, "FIRST_CAREUNIT": "CCU", "INTIME": at(90), "OUTTIME": ""},
        {**base, "SUBJECT_ID": 4, "HADM_ID": 40, "ICUSTAY_ID": 400, "FIRST_CAREUNIT": "NICU", "INTIME": at(0),
         "OUTTIME": at(50)},
    ]  # fmt: skip
    got, report = read(tmp_path, tables)
    assert got.patient.tolist() == ["2-201", "2-202", "7-700"] and got.length.tolist() == [3, 1, 14 * 24]
    assert got.group.tolist() == ["carevue", "carevue", "metavision"]
    assert got.fold.tolist() == [records.fold_of("mimic", subject) for subject in ("2", "2", "7")]
    known = got.background[got.offset[:-1]]
    assert got.background_names == records.BACKGROUND
    np.testing.assert_allclose(known, [[90, 0, 0, 1, 0], [90, 0, 0, 0, -30], [60, 1, 1, 0, -6]])
    np.testing.assert_array_equal(got.background, np.repeat(known, got.length, axis=0))
    assert report.left_out["stays of patients under 16 years"] == 1
    assert report.left_out["stays without a time of admission or discharge"] == 1


# ---- medication --------------------------------------------------------------------------------------------


def test_an_infusion_is_spread_over_its_hours_as_its_rate_has_it(tmp_path: Path) -> None:
    got = read(
        tmp_path,
        made_up(
            6,
            INPUTEVENTS_MV=[
                drip(222168, 1.5, 3.5, 200, "mg"), drip(222168, 3.75, 3.76, 8, "mg"),
                drip(222168, 1, 2, 77, "mg", STATUSDESCRIPTION="Rewritten"),
                drip(225158, -2, 2, 400, "ml"), drip(225828, 5, 15, 1000, "ml"),
                drip(223258, 4, 4, 6, "units"), drip(223262, 4.5, 4.4, 2, "units"), drip(221794, 7, 9, 40, "mg"),
            ],
        ),
    )[0]  # fmt: skip
    expect(got, "Propofol", {1: 50, 2: 100, 3: 58})
    expect(got, "Fluid", {0: 100, 1: 100, 5: 100})
    expect(got, "Insulin", {4: 8})
    expect(got, "Furosemide", {})


def test_carevue_doses_stand_where_they_were_charted_by_the_weight_known_then(tmp_path: Path) -> None:
    given = [(30120, 1, 0.4), (30120, 3, 0.4), (30120, 3.5, 0.2), (30043, 4, 40), (30051, 4, 2), (30120, 5, 0)]
    rows = [
        {"ITEMID": i, "CHARTTIME": at(h), "AMOUNT": a, "AMOUNTUOM": "U" if i == 30051 else "mg"} for i, h, a in given
    ]
    got = read(tmp_path, made_up(6, CHARTEVENTS=[chart(763, 2, 100, "kg")], INPUTEVENTS_CV=rows))[0]
    want = {1: 400 / mimic.WEIGHT, 3: 6, 4: 40_000 / 100 / 100 + 2 * 2.5}
    np.testing.assert_allclose([column(got, "Vasopressor")[hour] for hour in want], list(want.values()), rtol=1e-6)
    assert np.isfinite(column(got, "Vasopressor")).sum() == 3


def test_the_highest_rate_of_an_hour_makes_the_points_of_circulation(tmp_path: Path) -> None:
    """A rate that is not per kg is divided by the weight: 100 kg from hour 3 on, 50 kg in MetaVision's rows."""

    def charted(item: int, hours: float, rate: float, unit: str) -> dict[str, Any]:
        return {"ITEMID": item, "CHARTTIME": at(hours), "RATE": rate, "RATEUOM": unit}

    cv = [
        charted(30120, 1, 0.05, "mcgkgmin"), charted(30047, 26, 8, "mcgmin"), charted(30047, 51, 11, "mcgmin"),
        charted(30120, 76, 0.2, "mcgkgmin"), charted(30120, 76.5, 0.05, "mcgkgmin"), charted(30043, 101, 5, "mcgkgmin"),
        charted(30042, 126, 3, "mcgkgmin"),
    ]  # fmt: skip
    mv = [
        drip(221906, 151, 153, 1, "mg", 0.3, "mg/hour"), drip(221906, 177, 179, 1, "mg", 0.31, "mg/hour"),
        drip(221662, 203.5, 205, 1, "mg", 5.5, "mcg/kg/min"), drip(221289, 230, 231, 1, "mg", 6, "mcg/min"),
    ]  # fmt: skip
    weight = [chart(763, 3, 100, "kg")]
    sofa_of = read(tmp_path, made_up(256, CHARTEVENTS=weight, INPUTEVENTS_CV=cv, INPUTEVENTS_MV=mv))[1].sofa
    points = {
        1: (3, 24), 26: (3, 24), 51: (4, 24), 76: (4, 24), 101: (2, 24), 126: (2, 24), 151: (3, 25), 177: (4, 25),
        203: (3, 25), 230: (4, 24),
    }  # fmt: skip
    want = np.zeros(256, np.int8)
    for hour, (worth, lasts) in points.items():
        want[hour : hour + lasts] = worth
    assert sofa_of.tolist() == want.tolist()


def test_antibiotics_are_counted_where_they_begin(tmp_path: Path) -> None:
    iv, swallowed = {"ORDERCATEGORYNAME": "08-Antibiotics (IV)"}, {"ORDERCATEGORYNAME": "09-Antibiotics (Non IV)"}
    got = read(
        tmp_path,
        made_up(
            6,
            INPUTEVENTS_MV=[
                drip(225798, 1, 3, 1, "dose", **iv), drip(225893, 1.5, 2, 1, "dose", **iv),
                drip(225851, 4, 5, 2, "grams", **iv), drip(225798, 2, 3, 1, "dose", **swallowed),
                drip(225869, 2, 3, 1, "dose", **iv), drip(220949, 2, 3, 100, "ml", **iv),
            ],
        ),
    )[0]  # fmt: skip
    expect(got, "Antibiotic", {1: 2, 4: 1})
    expect(got, "Fluid", {2: 100})


def test_an_order_is_known_when_its_day_is_over(tmp_path: Path) -> None:
    """Admitted on the 1st at 10 o'clock: midnights in rows 14, 38, 62; the one before admission in row 0."""
    orders = [
        order("Vancomycin", "2150-03-01", "2150-03-02"),
        order("CefePIME", "2150-02-27", "2150-02-28"), order("Levofloxacin", "2150-02-20", "2150-02-27", "PO"),
        order("Vancomycin Oral Liquid", "2150-03-01", "2150-03-02", "PO"), order("Bacitracin", "2150-03-01", ""),
        order("Vancomycin", "2150-03-01", "2150-03-02", kind="BASE"), order("Ciprofloxacin", "2150-03-01", "", "OU"),
        order("MethylPREDNISolone Na Succ.", "2150-03-02", "2150-03-01"), order("PredniSONE", "2150-03-02", "", "PO"),
        order("Furosemide", "2150-03-01", "2150-03-09"), order("Insulin", "2150-03-03", "2150-03-09", "SC"),
    ]  # fmt: skip
    got = read(tmp_path, made_up(62.5, PRESCRIPTIONS=orders))[0]
    expect(got, "Antibiotic order", {0: 1, 14: 1, 38: 1})
    expect(got, "Steroid order", {38: 2})
    expect(got, "Diuretic order", {14: 1, 38: 1, 62: 1})
    expect(got, "Insulin order", {62: 1})


# ---- organ failure, suspicion, onset -----------------------------------------------------------------------

POINTS = {  # organ: what is measured, and the points by value at and beside each threshold
    "respiration": ("PaO2", [(400, 0), (399, 1), (300, 1), (299, 2), (200, 2), (199, 3), (100, 3), (99, 4)]),
    "coagulation": ("Platelets", [(150, 0), (149, 1), (100, 1), (99, 2), (50, 2), (49, 3), (20, 3), (19, 4)]),
    "liver": ("Bilirubin_total", [(1.1, 0), (1.2, 1), (1.9, 1), (2, 2), (5.9, 2), (6, 3), (11.9, 3), (12, 4)]),
    "brain": ("gcs", [(15, 0), (14, 1), (13, 1), (12, 2), (10, 2), (9, 3), (6, 3), (5, 4), (3, 4)]),
    "kidney": ("Creatinine", [(1.1, 0), (1.2, 1), (1.9, 1), (2, 2), (3.4, 2), (3.5, 3), (4.9, 3), (5, 4)]),
}
NEEDED = (
    "PaO2", "FiO2", "ventilated", "Platelets", "Bilirubin_total", "MAP", "gcs", "Creatinine", "Urine", "catecholamine",
    "dopamine", "dobutamine",
)  # fmt: skip


def score(hours: int = 1, first_row: np.ndarray | None = None, **measured: dict[int, float]) -> np.ndarray:
    """Points [hours, 6] of one patient, measured = {hour: value}."""
    table = {name: np.full(hours, NAN, np.float32) for name in NEEDED}
    for name, values in measured.items():
        for hour, value in values.items():
            table[name][hour] = value
    return sofa.points(table, np.zeros(hours, np.int64) if first_row is None else first_row)


@pytest.mark.parametrize("organ", POINTS)
def test_the_points_of_an_organ_change_at_its_thresholds(organ: str) -> None:
    name, table = POINTS[organ]
    for value, points in table:
        got = score(FiO2={0: 1.0}, ventilated={0: 1}, **{name: {0: value}})[0]
        assert got[sofa.ORGANS.index(organ)] == points and got.sum() == points, (name, value)
    assert score()[0].tolist() == [0] * 6


def test_circulation_is_pressure_then_drugs() -> None:
    def circulation(**now: float) -> int:
        return int(score(**{name: {0: value} for name, value in now.items()})[0, 3])

    assert [circulation(MAP=70), circulation(MAP=69.9)] == [0, 1]
    assert [circulation(MAP=60, dobutamine=1), circulation(dopamine=5), circulation(dopamine=5.1)] == [2, 2, 3]
    assert [circulation(dopamine=15), circulation(dopamine=15.1), circulation(dobutamine=0)] == [3, 4, 0]
    assert [circulation(catecholamine=v) for v in (0, 0.01, 0.1, 0.11)] == [0, 3, 3, 4]
    assert circulation(catecholamine=0.05, dopamine=20, MAP=90) == 4


def test_an_fio2_holds_four_hours_and_three_points_need_a_ventilator() -> None:
    got = score(16, FiO2={0: 0.5}, ventilated={0: 1}, PaO2={4: 75})[:, 0]  # 150
    assert got.tolist() == [0] * 4 + [3] * 12
    assert score(16, FiO2={0: 0.5}, ventilated={0: 1}, PaO2={5: 75})[:, 0].max() == 0
    assert score(16, FiO2={9: 0.5}, ventilated={0: 1}, PaO2={9: 75})[:, 0].tolist() == [0] * 9 + [2] * 7
    assert score(16, FiO2={8: 0.5}, ventilated={0: 1}, PaO2={8: 75})[:, 0].tolist() == [0] * 8 + [3] * 8


def test_the_worst_of_24_hours_counts_of_that_patient_alone() -> None:
    two = np.repeat([0, 30], 30)
    got = score(60, two, Platelets={3: 40, 10: 140, 29: 10}, Creatinine={35: 2})
    assert got[:, 1].tolist() == [0] * 3 + [3] * 24 + [1] * 2 + [4] + [0] * 30
    assert got[:, 5].tolist() == [0] * 35 + [2] * 24 + [0]


@pytest.mark.parametrize(("volume", "points"), [(500, 0), (499, 3), (200, 3), (199, 4), (0, 4)])
def test_urine_counts_when_a_day_is_whole(volume: float, points: int) -> None:
    got = score(26, Urine={0: 3000, 2: volume})[:, 5]
    assert got.tolist() == [0] * 24 + [points] * 2
    after_another = score(50, np.repeat([0, 24], [24, 26]), Urine={0: 900, 24: 900, 26: volume})[:, 5]
    assert after_another.tolist() == [0] * 48 + [points] * 2
    assert score(30)[:, 5].max() == 0  # none charted is none known


def test_suspicion_needs_both_within_their_windows() -> None:
    hour = 3600

    def suspected(antibiotic: tuple[float, float], culture: tuple[float, float]) -> list[float]:
        pair = (np.array([times]) * hour for times in (antibiotic, culture))
        return (sofa.suspicions(*(x.astype(np.int64) for x in pair)) / hour).tolist()

    assert suspected((100, 100), (124, 124)) == [100]  # the culture a day after the antibiotic
    assert suspected((100, 100), (124.01, 124.01)) == []
    assert suspected((172, 172), (100, 100)) == [100]  # the antibiotic three days after the culture
    assert suspected((172.01, 172.01), (100, 100)) == []
    assert suspected((96, 120), (110, 110)) == [110]  # that day, at the time of the culture
    assert suspected((96, 120), (144, 144)) == [120] and suspected((96, 120), (144.1, 144.1)) == []
    assert suspected((96, 120), (24, 24)) == [24] and suspected((96, 120), (23.9, 23.9)) == []
    assert suspected((96, 120), (72, 96)) == [96]
    many = sofa.suspicions(np.array([[0, 0], [hour, hour]]), np.array([[60, 60], [10**7, 10**7]]))
    assert many.tolist() == [0, 60] and sofa.suspicions(np.zeros((0, 2), np.int64), many[:, None] + [0, 0]).size == 0


def test_onset_is_the_earlier_of_suspicion_and_a_rise_by_two() -> None:
    def begins(scores: list[int], *suspected: float) -> list[float]:
        return [None if np.isnan(x) else x for x in sofa.onset(np.array(scores, np.int8), np.array(suspected))]

    rises = [1] * 100 + [3] * 100
    assert begins(rises, 110.5) == [100, 110.5, 100] and begins(rises, 90.5) == [90.5, 90.5, 100]
    assert begins(rises, 148) == [100, 148, 100]  # 48 h before the suspicion the rise is in
    assert begins([1] * 100 + [3] * 100, 149) == [None] * 3  # an hour later SOFA is 3 throughout
    assert begins(rises, 76) == [76, 76, 100] and begins(rises, 75.9) == [None] * 3  # 24 h after the suspicion
    assert begins([1] * 60 + [2] * 60, 70) == [None] * 3
    assert begins([3] * 60 + [1] * 20 + [3] * 60, 100) == [80, 100, 80]  # over the lowest so far, not the first
    assert begins([2] * 60, 5) == [0, 5, 0]  # before the stay it is 0
    assert begins([2] * 60, 48) == [0, 48, 0] and begins([2] * 60, 48.1) == [None] * 3
    assert begins([2] * 60, -24) == [-24, -24, 0] and begins([2] * 60, -24.1) == [None] * 3
    assert begins(rises, 500, 90, 120, 95) == [90, 90, 100]
    assert begins(rises) == [None] * 3 and begins([], 3) == [None] * 3


def septic(**more: list[dict[str, Any]]) -> Tables:
    """Platelets fall in hour 60 (SOFA 0 -> 3); culture at 63.5, antibiotic at 64.25."""
    return made_up(
        100,
        LABEVENTS=[chart(51265, 1, 200), chart(51265, 60.5, 40)],
        MICROBIOLOGYEVENTS=[
            {"CHARTDATE": at(63.5)[:10] + " 00:00:00", "CHARTTIME": at(63.5), "SPEC_TYPE_DESC": "URINE"}
        ],
        INPUTEVENTS_MV=[drip(225798, 64.25, 65, 1, "dose", ORDERCATEGORYNAME="08-Antibiotics (IV)")],
        **more,
    )


def test_the_label_turns_six_hours_before_sepsis_begins(tmp_path: Path) -> None:
    got, report = read(tmp_path / "septic", septic(DIAGNOSES_ICD=[{"HADM_ID": 70, "ICD9_CODE": "0389"}]))
    assert (report.begins[0], report.suspicion[0], report.rise[0]) == (60, 63.5, 60)
    assert got.label.tolist() == [0] * 54 + [1] * 46
    assert report.sofa.tolist() == [0] * 60 + [3] * 24 + [0] * 16 and report.coded.tolist() == [True]
    assert report.agreement() == {"Sepsis-3 and coded": 1, "Sepsis-3 only": 0, "coded only": 0, "neither": 0}

    def without(change: Callable[[Tables], object]) -> tuple[records.Records, mimic.Report]:
        tables = septic()
        change(tables)
        return read(tmp_path / "other", tables)

    screen, report = without(lambda t: t["MICROBIOLOGYEVENTS"][0].update(SPEC_TYPE_DESC="MRSA SCREEN"))
    assert not screen.label.any() and report.agreement()["neither"] == 1 and not report.coded_admissions
    assert not without(lambda t: t["LABEVENTS"].pop())[0].label.any()
    assert not without(lambda t: t["INPUTEVENTS_MV"].clear())[0].label.any()
    early = without(lambda t: t["LABEVENTS"][1].update(CHARTTIME=at(70)))[0]
    assert early.label.tolist() == [0] * 57 + [1] * 43  # suspected at 63.5, and SOFA rises after that
    # By date alone the culture of the 4th, 62 to 86 h in, is taken to be at 64.25, with the antibiotic.
    dated = without(lambda t: t["MICROBIOLOGYEVENTS"][0].update(CHARTTIME=""))[1]
    assert (dated.suspicion[0], dated.rise[0]) == (64.25, 60)
    ordered = without(
        lambda t: (
            t["INPUTEVENTS_MV"].clear(),
            t["PRESCRIPTIONS"].append({"SUBJECT_ID": 7, **order("Zosyn", at(63.5)[:10], "")}),
        )
    )[1]
    assert (ordered.suspicion[0], ordered.rise[0]) == (63.5, 60)


@pytest.mark.parametrize("code", ["99591", "99592", "78552", "038", "03842"])
def test_the_codes_of_sepsis_and_no_other(tmp_path: Path, code: str) -> None:
    rows = [{"HADM_ID": 70, "ICD9_CODE": code}, {"HADM_ID": 71, "ICD9_CODE": f"1{code}"}, {"HADM_ID": 72}]
    report = read(tmp_path, made_up(3, DIAGNOSES_ICD=rows))[1]
    assert report.coded_admissions == 1 and report.agreement()["coded only"] == 1


# ---- no look ahead -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [9, 24, 41])
def test_no_row_knows_what_comes_after_its_hour(tmp_path: Path, hours: int) -> None:
    """Tables that end after so many hours make the same rows up to then: values and doses, to the last bit."""
    whole = read(tmp_path / "whole", random_tables(2))[0]
    cut = read(tmp_path / "cut", random_tables(2, until=hours))[0]
    np.testing.assert_array_equal(whole.length, cut.length)
    start = np.array([0 if p[0] in "79" else {"8-800": 5, "8-810": 50, "3-300": 2}[p] for p in whole.patient])
    ends = np.repeat(start, whole.length) + whole.clock
    past = ends <= hours
    assert whole.measured[past].tobytes() == cut.measured[past].tobytes()
    assert np.isfinite(whole.measured[past]).sum() > 80
    assert whole.measured[~past].tobytes() != cut.measured[~past].tobytes()
    for name in ("Vasopressor", "Antibiotic order", "Propofol", "Fluid", "HR", "Urine"):
        assert np.isfinite(column(whole, name)[past]).any() or hours == 9, name
    assert whole.background.tobytes() == cut.background.tobytes()


# ---- bad input ---------------------------------------------------------------------------------------------


def swap(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("LABEVENTS", swap("VALUENUM", "VALUES"), "expected the columns SUBJECT_ID, .*; got no VALUENUM"),
        ("PATIENTS", lambda _: "", "expected the columns SUBJECT_ID, .*; got an empty file"),
        ("CHARTEVENTS", swap("bpm", "mmHg"), r"VALUEUOM of item 220045 \(HR\) to be bpm or min; got 'mmHg'"),
        ("LABEVENTS", swap("mg/dL", "mol"), r"VALUEUOM of item 50912 \(Creatinine\) to be mgdl or umoll; got 'mol'"),
        ("INPUTEVENTS_MV", swap("mg", "ml"), r"AMOUNTUOM of item 221906 \(Vasopressor\) to be mg .*; got 'ml'"),
        ("INPUTEVENTS_MV", swap("mcg/kg/min", "mg"), r"RATEUOM of item 221906 \(catecholamine\) to be mcgkgmin"),
        ("CHARTEVENTS", swap(at(2), "2150/03/01"), "times like 2101-10-20 19:08:00 in CHARTTIME; got '2150/03/01'"),
        ("ICUSTAYS", swap(at(0), "yesterday"), "expected times like .* in INTIME; got 'yesterday'"),
        ("LABEVENTS", swap("1.5,1.5", "1.5,high"), "expected numbers in VALUENUM; got 'high'"),
        ("CHARTEVENTS", swap("220045", "HR"), "expected whole numbers in ITEMID; got 'HR'"),
        ("CHARTEVENTS", swap("\n0,7,", "\n0,,"), "expected whole numbers in SUBJECT_ID; got an empty field"),
        ("ADMISSIONS", swap(",70,", ",71,"), "expected a row for each HADM_ID of ICUSTAYS.csv; got none for 70"),
        ("PATIENTS", lambda _: as_text("PATIENTS", []), "a row for each SUBJECT_ID of ICUSTAYS.csv; got none for 7"),
        ("ICUSTAYS", lambda _: as_text("ICUSTAYS", []), "at least one ICU stay .* of 16 years .*; got none in 0 rows"),
        ("OUTPUTEVENTS", swap("\n0,7,", "\n0\n0,7,"), "expected 8 fields in every line; got "),
        ("OUTPUTEVENTS", lambda text: text + "1,7,226559", "8 fields in the last line; got 3; is the file truncated"),
    ],
)  # fmt: skip
def test_a_bad_table_is_named_with_what_was_expected_and_got(
    tmp_path: Path, name: str, change: Callable[[str], str], sentence: str
) -> None:
    good = made_up(
        5, CHARTEVENTS=[chart(220045, 2, 80, "bpm")], LABEVENTS=[chart(50912, 1, 1.5, "mg/dL")],
        INPUTEVENTS_MV=[drip(221906, 1, 2, 3, "mg", 0.1, "mcg/kg/min")], OUTPUTEVENTS=[chart(226559, 2, 5)],
    )  # fmt: skip
    assert np.isfinite(read(tmp_path, good)[0].measured).sum() == 4
    path = tmp_path / f"{name}.csv"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=sentence) as error:
        mimic.read_mimic(tmp_path)
    assert str(error.value).startswith(f"{path}: expected ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_truncated_or_damaged_gzip_is_a_sentence(tmp_path: Path) -> None:
    write(tmp_path, random_tables(3), gz=True)
    path = tmp_path / "CHARTEVENTS.csv.gz"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 50] = bytes(50)
    for data in (whole[: len(whole) // 2], whole[:5], whole[:-4], bytes(damaged), b"no gzip"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"CHARTEVENTS.csv.gz: expected a whole gzip file; got .*truncated\?"):
            mimic.read_mimic(tmp_path)


def test_a_quote_left_open_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimic, "LONGEST_LINE", 500)
    path = write(tmp_path, made_up()) / "CHARTEVENTS.csv"
    line = f"7,211,{at(1)},80,80,bpm,\n"
    path.write_text(
        "\n".join([",".join(mimic_items.TABLES["CHARTEVENTS"]), line * 9 + line.replace("bpm", '"bpm') + line * 30])
    )
    with pytest.raises(ValueError, match=r"CHARTEVENTS.csv: expected lines of at most 500 bytes; got more; is a quote"):
        mimic.read_with_report(tmp_path, block=200)


def test_a_missing_table_is_a_sentence_before_any_work(tmp_path: Path) -> None:
    write(tmp_path, made_up())
    (tmp_path / "CHARTEVENTS.csv").write_text("not looked at")
    (tmp_path / "INPUTEVENTS_MV.csv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected the table INPUTEVENTS_MV.csv or INPUTEVENTS_MV.csv.gz; there is"
    ):
        mimic.read_mimic(tmp_path)
    (tmp_path / "INPUTEVENTS_MV.csv").write_text("SUBJECT_ID,ITEMID\n")
    (tmp_path / "CHARTEVENTS.csv").write_text(as_text("CHARTEVENTS", [chart(211, 1, 80, "no unit")]))
    with pytest.raises(ValueError, match=r"INPUTEVENTS_MV.csv: expected the columns .*; got no STARTTIME"):
        mimic.read_mimic(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a directory with the tables of MIMIC-III; there is none"):
        mimic.read_mimic(tmp_path / "nowhere")


def test_the_progress_bar_ends_at_the_bytes_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, random_tables(3), gz=True)
    mimic.read_mimic(tmp_path, progress=True)
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert "reading MIMIC-III: 100%" in last


# ---- daily -------------------------------------------------------------------------------------------------


def test_a_day_is_its_last_values_and_its_sums(tmp_path: Path) -> None:
    got = read(
        tmp_path,
        made_up(
            60,
            CHARTEVENTS=[chart(220045, h, 60 + h) for h in (0, 5, 23, 50)] + [chart(220181, 30, 70)],
            OUTPUTEVENTS=[chart(226559, h, 10) for h in (1, 2, 23.5, 24, 55)],
            INPUTEVENTS_MV=[drip(225158, 23, 25, 100, "ml")],
        ),
    )[0]
    day = mimic.daily(got)
    assert day.clock.tolist() == [24, 48] and day.length.tolist() == [2] and day.label.tolist() == [0, 0]
    expect(day, "HR", {0: 83})
    expect(day, "MAP", {1: 70})
    expect(day, "Urine", {0: 30, 1: 10})
    expect(day, "Fluid", {0: 50, 1: 50})
    assert day.variables == got.variables and day.doses == got.doses


def test_daily_records_of_anybody_are_those_of_whole_days() -> None:
    """By definition, patient by patient; and what comes after a day does not move it."""
    table = cohort.simulate(100, seed=3)
    day, rows = mimic.daily(table), np.flatnonzero(mimic.day_ends(table))
    assert day.label.size == rows.size == (table.length // 24).sum()
    whole = table.length >= 24
    assert 0 < whole.sum() < 100 and day.patient.tolist() == table.patient[whole].tolist()
    assert day.length.tolist() == (table.length[whole] // 24).tolist()
    np.testing.assert_array_equal(day.label, table.label[rows])
    np.testing.assert_array_equal(day.risk, table.risk[rows])
    np.testing.assert_array_equal(day.background, table.background[rows])
    for i, row in enumerate(rows):
        hours = table.measured[row - 23 : row + 1]
        for j, name in enumerate(table.variables):
            known = hours[~np.isnan(hours[:, j]), j]
            want = NAN if not known.size else known.sum(dtype=np.float64) if name in table.doses else known[-1]
            np.testing.assert_allclose(day.measured[i, j], want, rtol=1e-6)


# ---- the open demo -----------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    not (DEMO / "CHARTEVENTS.csv.gz").exists(), reason=f"no MIMIC-III demo in {DEMO} (set GATEWISE_MIMIC)"
)


@real
def test_the_demo_is_the_one_published() -> None:
    got, report = mimic.read_with_report(DEMO)
    subjects = {name.split("-")[0] for name in got.patient}
    assert (len(subjects), got.length.size, report.coded_admissions) == (100, 136, 38)
    assert {name: int((got.group == name).sum()) for name in set(got.group)} == {"carevue": 59, "metavision": 77}
    assert got.length.max() == 14 * 24 and got.length.min() >= 1
    medians = {"HR": 85, "O2Sat": 98, "Temp": 36.9, "SBP": 117, "MAP": 76, "DBP": 58, "Resp": 19, "pH": 7.39}
    for name, value in medians.items():
        assert np.nanmedian(column(got, name)) == pytest.approx(value, rel=0.02), name
    dropped = sum(report.implausible.values())
    assert 0 < dropped < 0.002 * np.isfinite(got.measured).sum()
    agreement = report.agreement()
    assert sum(agreement.values()) == 136
    assert agreement["Sepsis-3 and coded"] >= 0.9 * report.coded.sum()  # who is coded septic is found septic
    assert got.label.any() and not got.label.all()
