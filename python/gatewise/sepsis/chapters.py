"""What the report tells, chapter by chapter: each finds its results first, by the study, and tells them then.

A sentence with a number in it is made of the results; none is written down here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import figures, insight, metrics, models, study, tasks, timing
from .features import Preparation, fit, split_rows
from .records import FOLDS, Records
from .report import Page
from .study import BASELINE, BEST, Outcome, Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

Say = Callable[[str], None]
RECURRENT = tuple(name for name, spec in models.MODELS.items() if spec.kind == "recurrent")
GATED = "LSTM"  # the model whose gates are shown
GATE = "forget gate of an LSTM"  # the group of curves that `insight.memory` makes of it
LAGS = 48  # hours that memory and the effect of a dose are followed
MEMORY_PATIENTS = 64  # of the longest test stays, for the curves of influence


# ---- what is looked for in a model while it is there -------------------------------------------------------


def _look_into(model: models.Model, rows: models.Rows, test: Records) -> dict[str, Any]:
    """The curves of memory of a recurrent model, and of the LSTM the gates of one patient."""
    if model.network is None:
        return {}
    network = model.network.network_
    sequences = sorted(rows.sequences(rows.x), key=len, reverse=True)[:MEMORY_PATIENTS]
    found: dict[str, Any] = {}
    if len(sequences[0]) > LAGS:
        groups = insight.memory({model.name: network}, sequences, LAGS)
        found |= {
            f"memory {group}: {name}": curve for group, curves in groups.items() for name, curve in curves.items()
        }
    if model.name == GATED:
        found |= _gates(model, rows, test, insight.example(test, model.score(rows)))
    return found


def _gates(model: models.Model, rows: models.Rows, records: Records, one: int) -> dict[str, Any]:
    """The gates of an LSTM in one patient of the records, whose rows these are, and what they do in words."""
    assert model.network is not None
    part = slice(records.offset[one], records.offset[one + 1])
    network, classes = model.network.network_, model.network.classes_
    positive = None if len(classes) == 2 else classes % 2 == 1  # see `models`: odd classes are those of label 1
    gates = insight.gates(network, rows.x[part], rows.names, records.clock[part], positive=positive)
    words = insight.describe(gates, records.select(np.arange(records.length.size) == one))
    arrays = {f"gates {field.name}": getattr(gates, field.name) for field in fields(gates)}
    return {**arrays, "gates patient": one, "gates words": words}


def _responses(model: models.Model, preparation: Preparation, test: Records) -> dict[str, Any]:
    """What a dose of each drug changes under the model, by drug."""

    def score(records: Records) -> NDArray[np.float64]:
        return model.score(models.rows(records, preparation, "official"))

    return {f"dose {drug}": insight.dose_response(score, test, drug, LAGS) for drug in test.doses}


# ---- the simulated cohort ----------------------------------------------------------------------------------

FOLLOWED = (BASELINE, "GLM lags", "RNN", "GRU", "LSTM")  # whose response to a dose is looked at
SIMULATED_MODELS = (
    "AR(1)", "GLM AR(1)", "GLM covariates", "GLM lags", BASELINE, "gradient boosting", "RNN", "GRU", "LSTM",
)  # fmt: skip


def simulated(records: Records, store: Store, say: Say, **options: Any) -> Outcome:
    """The models on the cohort whose truth is known, with their memory and their responses to a dose."""
    test = records.select(records.split()[2])

    def examine(model: models.Model, preparation: Preparation, rows: models.Rows) -> dict[str, Any]:
        responses = _responses(model, preparation, test) if model.name in FOLLOWED else {}
        return _look_into(model, rows, test) | responses

    return study.run_task(store, records, "official", SIMULATED_MODELS, examine=examine, say=say, **options)


# ---- the real records --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Challenge:
    """The outcomes on the public records of the challenge: by task, and by the hospital that was trained on."""

    tasks: dict[str, Outcome]
    across: dict[str, Outcome]


ACROSS_MODELS = (BASELINE, "gradient boosting", "GRU", "LSTM")  # of one hospital's patients, scored on the other's


def challenge(records: Records, store: Store, say: Say, seeds: int, **options: Any) -> Challenge:
    """All models on all tasks; `seeds` trainings of RNN, GRU and LSTM on the official task."""
    test = records.select(records.split()[2])

    def examine(model: models.Model, preparation: Preparation, rows: models.Rows) -> dict[str, Any]:
        return _look_into(model, rows, test)

    found = {}
    for task in ("official", "same_day", "next_day"):
        found[task] = study.run_task(
            store, records, task, models.MODELS, seeds=seeds if task == "official" else 1,
            examine=examine if task == "official" else None, say=say, **options,
        )  # fmt: skip
    # The same question once a day: the same models are asked, for they learned it from every hour.
    found["daily"] = replace(found["next_day"], task="daily")
    hospitals = np.unique(records.group)
    across = {
        str(one): study.run_task(store, records, "official", ACROSS_MODELS, trained_on=str(one), say=say, **options)
        for one in (hospitals if hospitals.size > 1 else ())
    }
    return Challenge(found, across)


# ---- medication: MIMIC-III ---------------------------------------------------------------------------------


MIMIC = {"max_epochs": 20, "hidden_size": 32, "batch_size": 8, "learning_rate": 3e-3, "patience": 5}


def medication(directory: Path, store: Store, say: Say, seed: int) -> dict[str, Any]:
    """What the MIMIC-III tables hold, and an LSTM's gates in one of their patients; see `_mimic`."""
    tables = sorted(path for path in directory.iterdir() if path.name.lower().endswith((".csv", ".csv.gz")))
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in tables]
    digest = study.digest((state, seed, MIMIC))
    return Store(store.folder, digest).get("medication", partial(_mimic, directory, say, seed))


def _mimic(directory: Path, say: Say, seed: int) -> dict[str, Any]:
    """From the raw tables to the gates: what the reader says, the size of the records, one patient's hours and gates.

    The patient is chosen first, as `insight.example` does, by the length of the stay for want of a score; its fold
    teaches the network nothing. Most septic stays are septic from admission on, so that a fixed part of a hundred
    patients may have none whose sepsis begins later. No area is among the results.
    """
    from . import mimic

    start = time.perf_counter()
    records, reading = mimic.read_with_report(directory, progress=True)
    read = time.perf_counter() - start
    say(f"MIMIC-III: {records.length.size:,} stays, {records.label.size:,} hours, read in {read:.0f} s")
    one = insight.example(records, np.arange(records.label.size) - records.first_row)
    after = (records.fold.astype(np.int64) - records.fold[one]) % FOLDS  # 0: the patient's own
    preparation = fit(records.select(after > 3))
    training, validation = (
        models.rows(records.select(part), preparation, "official") for part in (after > 3, (after > 0) & (after <= 3))
    )
    model = models.train(GATED, training, validation, seed, **MIMIC)
    patient = records.select(np.arange(records.length.size) == one)
    rows = models.rows(patient, preparation, "official")
    daily = mimic.daily(records)
    doses = [records.variables.index(name) for name in records.doses]
    return {
        "implausible": reading.implausible, "left out": reading.left_out, "agreement": reading.agreement(),
        "subjects": int(np.unique([name.partition("-")[0] for name in records.patient]).size),
        "stays": int(records.length.size), "hours": int(records.label.size), "days": int(daily.label.size),
        "variables": list(records.variables), "doses": list(records.doses),
        "hours with a dose": (~np.isnan(records.measured[:, doses])).sum(axis=0),
        "name": str(patient.patient[0]), "clock": patient.clock, "measured": patient.measured, "label": patient.label,
        "risk": model.score(rows), "seconds": time.perf_counter() - start, "read seconds": read,
        **_gates(model, rows, patient, 0),
    }  # fmt: skip


# ---- speed, and published numbers --------------------------------------------------------------------------

TIMED_PATIENTS = 1000


def speed(records: Records, store: Store, say: Say, options: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Seconds of an epoch by training loop, on some of the training patients; or nothing, and why."""
    train = records.split()[0]
    some = records.select(train & (np.cumsum(train) <= TIMED_PATIENTS))
    sizes = {name: options[name] for name in ("hidden_size", "batch_size", "learning_rate")}

    def measured() -> dict[str, Any]:
        x = fit(some)(some)
        everybody = np.ones(some.length.size, np.bool_)
        patients = timing.Patients(x.sequences(everybody), split_rows(some.label, some.offset, everybody))
        rows, reason = timing.epochs(patients, random_state=0, **sizes)
        return {"rows": rows, "reason": reason}

    found = store.get("seconds an epoch", measured)
    for row in found["rows"]:
        say(f"{row['model']} by {row['loop']}: {row['seconds']:.2f} s an epoch")
    return found["rows"], found["reason"]


def published(folder: Path | None) -> list[dict[str, Any]]:
    """The published rows beside ours, those that were trained into FOLDER/models/published.csv: hours of work, which
    the study leaves to whoever wants it."""
    if folder is None or not (folder / "models" / "published.csv").exists():
        return []
    from .published import read_results, side_by_side

    return side_by_side(read_results(folder / "models" / "published.csv"))


# ---- telling it --------------------------------------------------------------------------------------------


@dataclass
class Results:
    """All that is told; None: not asked for, or not there."""

    simulated: Outcome
    challenge: Challenge | None = None
    medication: dict[str, Any] | None = None
    seconds_an_epoch: list[dict[str, Any]] | None = None
    not_timed: str = ""
    published: Sequence[dict[str, Any]] = ()


TITLE = "Predicting sepsis: what remembers, and how long"
LEAD = (
    "To say today whether a patient in intensive care will have sepsis tomorrow, a model has to know what was measured "
    "and given before today. A classifier of the hour ignores it; an autoregression knows past responses only; a "
    "generalised linear model knows the lags that somebody chose; a recurrent network carries a state along. This page "
    "measures each step of that story, with gatewise's kernels as the engine of all recurrent networks.",
)


def tell(results: Results) -> Page:
    """The report, every chapter that there are results for."""
    page = Page(TITLE, LEAD)
    memory, decay = _memory(results.simulated), _decay(results.simulated)
    shapes = insight.decay_table(*decay)
    _tell_claims(page, results, memory, shapes)
    _tell_simulated(page, results.simulated, memory, decay, shapes)
    if results.challenge:
        _tell_challenge(page, results.challenge)
    if results.medication:
        _tell_medication(page, results.medication)
    if results.seconds_an_epoch or results.not_timed:
        _tell_speed(page, results)
    if results.challenge:
        _tell_published(page, results.published)
    _tell_method(page)
    return page


def _of(table: Sequence[dict[str, Any]], name: str, column: str = "AUROC") -> float:
    return float(next(row[column] for row in table if row["model"] == name))


def _best(table: Sequence[dict[str, Any]], kind: str) -> str:
    """The model of a kind that ranks best."""
    return str(max((row for row in table if row["kind"] == kind), key=lambda row: row["AUROC"])["model"])


Groups = dict[str, dict[str, "NDArray[np.float64]"]]  # of curves: group -> name -> curve
Decay = tuple[dict[str, Any], dict[str, dict[str, Any]]]  # the truth by drug, and what was learned by model and drug


def _memory(outcome: Outcome) -> Groups:
    """Curves of memory, group -> name -> curve: of the recurrent models, and of autoregressions of the heart rate."""
    groups: Groups = {}
    for runs in outcome.runs.values():
        for key, curve in runs[0].examined.items():
            if key.startswith("memory "):
                group, _, name = key.removeprefix("memory ").partition(": ")
                groups.setdefault(group, {})[name] = curve
    if groups:
        rate = outcome.validation.measured[:, outcome.validation.variables.index("HR")]
        known = [one[~np.isnan(one)] for one in np.split(rate, outcome.validation.offset[1:-1])]
        for order in (1, 6):
            coefficients = insight.fit_autoregressive(known, order).tolist()
            curve = insight.autoregressive_influence(coefficients, LAGS)
            groups.setdefault("autoregressions of the heart rate", {})[f"AR({order})"] = curve
    return groups


def _decay(outcome: Outcome) -> Decay:
    """Responses to a dose."""
    from .cohort import true_risk

    truth = {drug: insight.dose_response(true_risk, outcome.test, drug, LAGS) for drug in outcome.test.doses}
    learned = {
        name: {drug: outcome.runs[name][0].examined[f"dose {drug}"] for drug in outcome.test.doses} for name in FOLLOWED
    }
    return truth, learned


def _tell_claims(page: Page, results: Results, memory: Groups, shapes: Sequence[dict[str, Any]]) -> None:
    simulated = results.simulated.table
    untrained = insight.fade(memory["before training"]["RNN"])
    trained, is_open, shut = (
        100 * insight.fade(memory[group][name]).left
        for group, name in (("after training", "LSTM"), (GATE, "open"), (GATE, "shut"))
    )
    matched = {
        name: sum(row["shape"] == row["true shape"] for row in shapes if row["model"] == name) for name in FOLLOWED
    }
    correlation = {
        name: float(np.mean([row["correlation"] for row in shapes if row["model"] == name])) for name in matched
    }
    drugs = len(results.simulated.test.doses)
    best = _of(simulated, BEST)
    page.section("The story, sentence by sentence")
    rows = [
        {
            "claim": "A classifier of the hour ignores the past.",
            "measured": f"On the simulated cohort logistic regression stays {best - _of(simulated, BASELINE):.3f} "
            f"below the best possible AUROC of {best:.3f}.",
        },
        {
            "claim": "An autoregression knows past responses only.",
            "measured": f"AR(1): {_of(simulated, 'AR(1)'):.3f} there. Before the onset the past responses that anybody "
            "can know are all 0, so that it gives every patient the same risk.",
        },
        {
            "claim": "Covariates help, but lags have to be chosen by hand.",
            "measured": f"GLM with the hour's covariates {_of(simulated, 'GLM covariates'):.3f}, with lags of up to "
            f"24 hours {_of(simulated, 'GLM lags'):.3f}.",
        },
        {
            "claim": "An RNN remembers by itself, but what it remembers fades exponentially.",
            "measured": f"AUROC {_of(simulated, 'RNN'):.3f}. The influence of an input on the state of an untrained "
            f"RNN is an exponential in its age (R² {untrained.straightness:.3f}): an hour leaves "
            f"{100 * untrained.kept:.0f} % of it.",
        },
        {
            "claim": "An LSTM's gates weigh the past, so that its memory need not fade.",
            "measured": f"AUROC {_of(simulated, 'LSTM'):.3f}, {best - _of(simulated, 'LSTM'):.3f} below the best "
            f"possible. With the forget gate open {is_open:.0f} % of an input's influence is there after {LAGS} hours, "
            f"with the gate shut {shut:.1g} %, after training {trained:.1g} %.",
        },
        {
            "claim": "Different things can decay at different rates and in different forms.",
            "measured": "Shapes of a dose's effect told rightly, and correlation with the truth: "
            + "; ".join(f"{name} {matched[name]} of {drugs}, {correlation[name]:.2f}" for name in matched)
            + ".",
        },
    ]
    if results.challenge:
        outcome = results.challenge.tasks["official"]
        official = outcome.table
        recurrent, other = _best(official, "recurrent"), _best(official, "non-temporal")
        ahead = recurrent if _of(official, recurrent) > _of(official, other) else other
        rows.append({
            "claim": "So a gated network predicts sepsis better.",
            "measured": f"On {outcome.test.length.size:,} real test patients: "
            f"{recurrent} {_of(official, recurrent):.3f} (AUPRC {_of(official, recurrent, 'AUPRC'):.3f}), {other} "
            f"{_of(official, other):.3f} ({_of(official, other, 'AUPRC'):.3f}), {BASELINE} "
            f"{_of(official, BASELINE):.3f} ({_of(official, BASELINE, 'AUPRC'):.3f}): {ahead} ranks best there.",
        })  # fmt: skip
    page.table("claims", rows, "Each claim and what was measured for it.")


def _tell_simulated(
    page: Page, outcome: Outcome, memory: Groups, decay: Decay, shapes: Sequence[dict[str, Any]]
) -> None:
    test = outcome.test
    page.section(
        "A cohort whose truth is known",
        (
            f"{test.length.size:,} simulated test patients, {test.label.size:,} hours, {100 * test.label.mean():.1f} % "
            "of them of label 1: sepsis begins within six hours. Vital signs and labs strain the patient, and three "
            "drugs act on the risk, each in its own shape: one fades exponentially, one comes and goes as a hump, one "
            "stays for hours and then is gone. The risk that the record implies is known exactly, so that the best "
            "possible score stands in the table.",
        ),
    )
    page.table(
        "simulated", outcome.table, "Models on the simulated cohort: areas with 95 % intervals over patients.",
        "AUROC gained: over logistic regression, the same patients drawn. Seconds: of training.",
        formats={"seconds": ".1f"},
    )  # fmt: skip
    _tell_memory(page, "memory", memory, "How long an input is remembered", "simulated patients")
    page.section(
        "How an effect comes and goes",
        (
            "One dose is added to the record of a simulated test patient in the sixth hour, all else stays, and the "
            "log-odds of the label are followed: under the truth, and under what a model has learned. The label looks "
            "six hours ahead, and so does every curve.",
        ),
    )
    page.figure(
        "decay", partial(figures.decay, *decay),
        "Response to one dose of each drug: the truth, and what was learned.",
        "A panel a drug: the change of the log-odds over the hours after a dose, the truth and a line a model.",
    )  # fmt: skip
    page.table(
        "decay", shapes, "How well the learned responses match.",
        "Correlation: of the two curves over 48 hours. Size: of the learned along the true one, 1 where they agree. "
        "Error: root mean square of the difference, as a share of the truth's. Shape: the family nearest to the curve "
        "with its half-life, peak or width in hours; misfit: what that family leaves, as a share of the curve.",
        formats={
            **dict.fromkeys(("correlation", "size", "error", "misfit"), ".2f"), "hours": ".0f", "true hours": ".0f",
        },
    )  # fmt: skip
    examined = outcome.runs[GATED][0].examined
    one = int(examined["gates patient"])
    rows = slice(test.offset[one], test.offset[one + 1])
    _tell_gates(
        page, "gates_simulated", "The gates in one simulated patient", examined, str(test.patient[one]),
        test.clock[rows], test.measured[rows], test.variables, test.doses, test.label[rows],
        {BEST: test.risk[rows]} if test.risk is not None else {},
    )  # fmt: skip


def _tell_memory(page: Page, name: str, groups: Groups, title: str, whose: str) -> None:
    page.section(
        title,
        (
            f"The influence of an input τ hours back on the state of today, the norm of ∂y(t)/∂x(t−τ) as a share of "
            f"that at τ = 0, by gatewise's backward pass through the stays of {whose}. On the logarithmic axis an "
            "exponential is a straight line.",
        ),
    )
    page.figure(
        name, partial(figures.memory, groups), "Influence of an input some hours later.",
        "Panels of curves that fall with the hours: networks before and after training, an LSTM whose forget gate is "
        "open, half open and shut, and autoregressions.",
    )  # fmt: skip
    rows = []
    for group, curves in groups.items():
        for title, curve in curves.items():
            fade = insight.fade(curve)
            rows.append({
                "curve": title, "group": group, "half-life": fade.half_life, "kept an hour": fade.kept,
                "R²": fade.straightness, f"left after {LAGS} hours": fade.left,
            })  # fmt: skip
    page.table(
        name, rows, "How the influence fades.",
        "Half-life: hours after which it stays below half of its start. Kept an hour: the factor of the nearest "
        "exponential, and R² of that fit.",
        formats={"half-life": ".1f", f"left after {LAGS} hours": ".2g"},
    )  # fmt: skip


def _tell_gates(
    page: Page, name: str, title: str, found: dict[str, Any], patient: str, clock: Any, measured: Any,
    variables: Sequence[str], doses: Sequence[str], label: Any, risk: dict[str, Any],
) -> None:  # fmt: skip
    states = {
        "forget gate": found["gates f"], "input gate": found["gates i"], "candidate": found["gates g"],
        "cell state": found["gates c"], "output gate": found["gates o"],
    }  # fmt: skip
    page.section(title)
    page.figure(
        name,
        partial(
            figures.gates, states, found["gates order"], found["gates group"] + 1, clock, measured, variables, doses,
            label=label, risk=risk or None, title=f"Patient {patient}",
        ),
        "Gates of every unit of the LSTM over the stay, the units in groups of like behaviour; under them what was "
        "measured and given. Shaded: label 1.",
        "Heat maps of forget, input and output gates, candidate and cell state, a line a unit, over the hours of the "
        "stay; under them panels of the measurements and the drugs.",
    )  # fmt: skip
    page.items(found["gates words"])


TASK_TITLES = {
    "official": "Every hour: within six hours",
    "same_day": "The same day",
    "next_day": "The next 24 hours",
    "daily": "Once a day",
}


def _tell_challenge(page: Page, found: Challenge) -> None:
    tables = {task: outcome.table for task, outcome in found.tasks.items()}
    official = found.tasks["official"]
    test = official.test
    page.section(
        "Real patients",
        (
            f"The public records of the PhysioNet/Computing in Cardiology Challenge 2019: two hospitals, of which "
            f"{test.length.size:,} patients with {test.label.size:,} hours are for testing. Every model sees the same "
            "hours: values carried forward, which were measured and how long ago, age, sex, unit, and the hours in "
            "intensive care. None sees the future; a test cuts the records and changes what comes later, and no "
            "earlier score moves by a bit.",
        ),
    )
    told: set[tuple[str, str]] = set()  # (model, note)
    for task, outcome in found.tasks.items():
        _tell_task(page, task, outcome, told)
    target = tasks.target(test, "official")
    scores = official.scores()
    kinds = {name: models.MODELS[name].kind for name in scores}
    quality = {row["model"]: row["AUROC"] for row in tables["official"]}
    shown = figures.representatives(quality, kinds)
    page.figure(
        "intervals",
        partial(figures.intervals, {
            TASK_TITLES[task]: {row["model"]: (row["AUROC"], row["AUROC low"], row["AUROC high"]) for row in table}
            for task, table in tables.items()
        }),
        "Area under the ROC curve on each task, with 95 % intervals over patients.",
        "A panel a task; in each a row a model with its AUROC and interval. The numbers are in the tables above.",
    )  # fmt: skip
    page.figure(
        "roc_pr", partial(figures.roc_pr, target.label, scores, shown),
        "Every threshold: the recurrent models and the best of each other kind; the others thin.",
        "Two panels of curves, a line a model: true against false positive rate, and precision against recall.",
    )  # fmt: skip
    page.figure(
        "calibration", partial(figures.calibration, target.label, {name: scores[name] for name in shown}),
        "On the diagonal, as many hours are of label 1 as the model says.",
        "Observed frequency of label 1 against the predicted probability in ten groups of hours, a line a model.",
    )  # fmt: skip
    page.figure(
        "utility", partial(figures.utility, *_utility_curves(official, shown)),
        "The challenge's utility: 1 is the best that can be, 0 is never to raise an alarm.",
        "Normalised utility against the threshold of the alarm, a line a model, with a dot where validation patients "
        "put the threshold.",
    )  # fmt: skip
    histories = {name: runs[0].history for name, runs in official.runs.items() if runs[0].history and name in RECURRENT}
    page.figure(
        "learning_curves", partial(figures.learning_curves, histories),
        "Losses by epoch; the weights of the epoch of lowest validation loss are kept.",
        "Two panels of curves, a line a recurrent model: loss of training and of validation patients an epoch.",
    )  # fmt: skip
    page.section("For whom", ("Subgroups of the test patients, by the models that are trained on all of them.",))
    compared = [BASELINE, _best(tables["official"], "non-temporal"), _best(tables["official"], "recurrent")]
    page.table(
        "subgroups", study.subgroups(official, list(dict.fromkeys(compared))),
        "Areas in subgroups of the test patients, on the official task.",
        "A small subgroup's area is uncertain: the number of its patients stands beside it.",
    )  # fmt: skip
    if found.across:
        _tell_across(page, found)
    curves = _memory(official)
    if curves:
        _tell_memory(page, "memory_real", curves, "How long an input is remembered of real patients", "real patients")
    one = int(official.runs[GATED][0].examined["gates patient"])
    rows = slice(test.offset[one], test.offset[one + 1])
    who = f"{test.patient[one]} ({test.group[one]})"
    page.section(
        "One real patient",
        (
            "Of the septic test patients who stayed one to three days, the median one by how high the LSTM's score "
            "rose.",
        ),
    )
    page.figure(
        "patient",
        partial(
            figures.patient, {name: scores[name][rows] for name in shown}, test.clock[rows], test.measured[rows],
            test.variables, test.doses, label=test.label[rows], title=f"Patient {who}",
        ),
        "Risk under the models, hour by hour, and what was measured. Shaded: label 1.",
        "Panels over the hours in intensive care: the risk, a line a model, then the readings.",
    )  # fmt: skip
    _tell_gates(
        page, "gates_real", "The gates in that patient", official.runs[GATED][0].examined, who, test.clock[rows],
        test.measured[rows], test.variables, test.doses, test.label[rows],
        {GATED: scores[GATED][rows], BASELINE: scores[BASELINE][rows]},
    )  # fmt: skip


def _tell_task(page: Page, task: str, outcome: Outcome, told: set[tuple[str, str]]) -> None:
    """The tables of a task, and the notes on its models that no task before it has told."""
    target = tasks.target(outcome.test, task)
    label = target.label[target.counts]
    noted: dict[str, list[str]] = {}
    for name, runs in outcome.runs.items():
        if runs[0].note and (name, runs[0].note) not in told:
            noted.setdefault(runs[0].note, []).append(name)
    told.update((name, note) for note, names in noted.items() for name in names)
    page.section(
        TASK_TITLES[task],
        (f"{tasks.TASKS[task].asks.capitalize()} {label.size:,} rows, {int(label.sum()):,} of label 1.",),
    )
    hospitals = {f"{area} {one}" for one in np.unique(outcome.test.group) for area in ("AUROC", "AUPRC")}
    pooled = [{k: v for k, v in row.items() if k not in hospitals} for row in outcome.table]
    apart = [{k: v for k, v in row.items() if k in {"model", *hospitals}} for row in outcome.table]
    page.table(
        f"models_{task}", pooled, "Areas with 95 % intervals over patients.",
        "AUROC gained: over logistic regression, the same patients drawn. Where a recurrent model was trained with "
        "several seeds, its scores are the mean of their probabilities."
        + (" The models are those of the next 24 hours." if task == "daily" else ""),
        formats={"seconds": ".0f"},
    )  # fmt: skip
    if noted:
        page.items(f"{', '.join(names)}: {note.rstrip('.')}." for note, names in noted.items())
    if len(apart[0]) > 1:
        page.table(f"hospitals_{task}", apart, "The same scores on the patients of each hospital.")


def _utility_curves(outcome: Outcome, shown: Sequence[str]) -> tuple[Any, dict[str, Any], dict[str, float]]:
    """(thresholds, utility by model, the threshold that validation patients chose by model)."""
    scores = outcome.scores()
    thresholds = np.geomspace(1e-3, 0.5, 120)
    curves = {name: tasks.utility_curve(outcome.test, scores[name], thresholds) for name in shown}
    chosen = {name: study.threshold(outcome, name) for name in shown}
    return thresholds, curves, {name: value for name, value in chosen.items() if value <= thresholds[-1]}


def _tell_across(page: Page, found: Challenge) -> None:
    official = found.tasks["official"]
    rows = []
    for name in ACROSS_MODELS:
        row: dict[str, Any] = {"model": name}
        for hospital in found.across:
            part = official.test.rows_of(official.test.group == hospital)
            label = official.test.label[part]
            for title, outcome in (("all", official), *found.across.items()):
                row[f"{title} → {hospital}"] = metrics.areas(label, outcome.scores()[name][part])[0]
        rows.append(row)
    page.section(
        "From one hospital to the other",
        ("Trained and validated on the patients of one hospital, and scored on the test patients of each.",),
    )
    page.table("across", rows, "AUROC by the hospitals trained on → the hospital of the test patients.")


# -- the other chapters --------------------------------------------------------------------------------------


def _tell_medication(page: Page, found: dict[str, Any]) -> None:
    _tell_gates(
        page, "gates_medication", "With medication: one patient of MIMIC-III", found, found["name"], found["clock"],
        found["measured"], found["variables"], found["doses"], found["label"], {GATED: found["risk"]},
    )  # fmt: skip
    page.text(
        f"{found['stays']:,} stays of {found['subjects']:,} patients, {found['hours']:,} hours, {found['days']:,} "
        f"days, read from the raw tables in {found['read seconds']:.0f} seconds; with training and gates, "
        f"{found['seconds']:.0f}. With so few patients no area is worth printing, and none is: the network is here to "
        "show its gates beside real doses."
    )
    doses = [{"drug": name, "hours with a dose": int(n)} for name, n in zip(found["doses"], found["hours with a dose"])]
    page.table("doses", doses, "Medication in the records.")
    page.table(
        "sepsis3", [{"stays": what, "number": number} for what, number in found["agreement"].items()],
        "Stays by Sepsis-3 and by ICD-9 code of sepsis.",
        "A check and not a truth: codes are of the whole admission, and for billing.",
    )  # fmt: skip
    dropped = [{"variable": name, "values dropped": number} for name, number in found["implausible"].items() if number]
    if dropped:
        page.table("implausible", dropped, "Implausible values, dropped.")


def _tell_speed(page: Page, results: Results) -> None:
    page.section("What training costs")
    if not results.seconds_an_epoch:
        page.text(results.not_timed)
        return
    rows = results.seconds_an_epoch
    page.figure(
        "training_time", partial(figures.training_time, rows),
        "Seconds of an epoch, the same model, patients, batches and losses; median, and the least and the most.",
        "Bars of seconds an epoch, a group a model, a bar a training loop.",
    )  # fmt: skip
    page.table("training_time", rows, "Seconds of an epoch by training loop.")


def _tell_published(page: Page, rows: Sequence[dict[str, Any]]) -> None:
    page.section(
        "Beside published numbers",
        (
            "LSTMs of two teams of the challenge, rebuilt over gatewise's layers and trained by their own protocols on "
            "the same public records. VUNO: Lee et al.; IADI: Roussel, Behar and Oster; both Computing in Cardiology "
            "2019.",
        ),
    )
    if not rows:
        page.text("That takes hours and was not done for this page. It will stand here after:")
        page.command("python -m gatewise.sepsis.published --data DIR --out REPORT/models/published.csv")
        return
    from .published import HIDDEN, TRANSFORMER_AUPRC

    hidden = "; ".join(
        f"{paper}'s final model had AUROC {roc[0]:.3f}, {roc[1]:.3f} and AUPRC {pr[0]:.3f}, {pr[1]:.3f}"
        for paper, (roc, pr) in HIDDEN.items()
    )
    page.table(
        "published", rows, "Printed numbers, and ours: the mean over trainings, their least and their most.",
        "What differs: the patients of each part are drawn anew, for neither paper lists them; neither says how many "
        "epochs it trained, so the epoch of least validation loss is kept; nor does VUNO's say whether its L2 is "
        "beside a mean over hours or a sum over a patient's: here the sum, which validation patients are better "
        "predicted with; IADI's limits of normalisation are quantiles here; dropout stands where the papers put it, "
        "and the threshold of the utility is the validation patients' best.",
    )  # fmt: skip
    page.text(
        f"On the challenge's hidden patients of the same hospitals, A and B, {hidden}. VUNO's, a transformer, had been "
        f"printed with an AUPRC of {TRANSFORMER_AUPRC:.3f} by the protocol of its rows, and did not meet it there."
    )


def _tell_method(page: Page) -> None:
    page.section("Method and limits")
    page.items([
        "Patients, never hours, are divided: training patients teach, validation patients choose epoch and threshold, "
        "test patients are scored once. Normalisation is the training patients'.",
        "Intervals are of the 95 % between percentiles of the bootstrap over test patients. They do not contain what "
        "another seed, another split or another hospital would change; seeds and hospitals have columns of their own.",
        "The records of septic patients end about three hours after the onset, those of others at discharge. Whatever "
        "sees the length of a record, or its later hours, learns that and nothing else; a bidirectional network is "
        "therefore refused.",
        "The response of yesterday is known only where sepsis has begun, for the official label turns 1 six hours "
        "before the onset: an autoregression on it would use what nobody knows.",
        "The official label is a definition (Sepsis-3), and who is measured, and when, tells a model what the staff "
        "already suspected.",
        "How models are trained (epochs, learning rates, what a sample of hours holds) was settled on validation "
        "patients, but scores of test patients had been seen by then: no number here is of patients that nobody had "
        "looked at.",
        "Two hospitals of one country; the simulated cohort has the shapes that were put into it, and no others. This "
        "is a benchmark, not a medical device.",
    ])  # fmt: skip
