"""The whole study on small data: where it looks, what it says, that it goes on where it stopped."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels", reason='the study needs more: pip install "gatewise[demo]"')

from gatewise import sepsis
from gatewise.sepsis import chapters, cohort, figures, models, records

SMALL: dict[str, Any] = {"epochs": 2, "hidden_size": 8, "patients": 400, "seed": 1}


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time is the pictures', and they have their own tests."""
    monkeypatch.setattr(figures, "save", lambda figure, form: f"{form} of {len(figure.axes)} axes".encode())


def tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    found = {}
    for path in (folder / "tables").iterdir():
        with path.open(newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


# ---- without data ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, chapters.Results]]:
    folder = tmp_path_factory.mktemp("demo") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda figure, form: form.encode())
        patch.setattr(models, "TREES", 10)
        yield folder, sepsis.demo(report=folder, **SMALL)


def test_the_demo_writes_a_page_tables_figures_and_what_it_trained(
    simulated: tuple[Path, chapters.Results],
) -> None:
    folder, results = simulated
    found = tables(folder)
    assert sorted(found) == ["claims", "decay", "memory", "simulated"]
    assert [row["model"] for row in found["simulated"]] == ["best possible", *chapters.SIMULATED_MODELS]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(
        f"{name}.{form}" for name in ("memory", "decay", "gates_simulated") for form in ("png", "svg")
    )
    assert len(list((folder / "models" / "simulated").iterdir())) == len(chapters.SIMULATED_MODELS)
    assert list(folder.parent.iterdir()) == [folder]
    for name, score in results.simulated.scores().items():
        assert score.shape == results.simulated.test.label.shape and np.isfinite(score).all(), name
        assert ((score >= 0) & (score <= 1)).all(), name
    page = (folder / "index.html").read_text()
    best = results.simulated.table[0]["AUROC"]
    assert f"best possible AUROC of {best:.3f}" in page
    assert "Patient" not in [row["claim"] for row in found["claims"]] and len(found["claims"]) == 6


def test_the_numbers_of_the_claims_are_those_of_the_tables(simulated: tuple[Path, chapters.Results]) -> None:
    folder, _ = simulated
    found = tables(folder)
    measured = [row["measured"] for row in found["claims"]]
    auroc = {row["model"]: float(row["AUROC"]) for row in found["simulated"]}
    assert f"{auroc['best possible'] - auroc['logistic regression']:.3f} below" in measured[0]
    assert f"{auroc['AR(1)']:.3f}" in measured[1]
    assert f"{auroc['GLM covariates']:.3f}" in measured[2] and f"{auroc['GLM lags']:.3f}" in measured[2]
    assert f"AUROC {auroc['RNN']:.3f}" in measured[3] and f"AUROC {auroc['LSTM']:.3f}" in measured[4]
    told = {row["model"]: 0 for row in found["decay"]}
    for row in found["decay"]:
        told[row["model"]] += row["shape"] == row["true shape"]
    for name in chapters.FOLLOWED:
        assert f"{name} {told[name]} of 3" in measured[5]


def test_the_same_call_again_trains_nothing_and_writes_the_same(
    simulated: tuple[Path, chapters.Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = simulated

    def trains(*rest: object, **options: object) -> None:
        raise AssertionError("a model is trained again")

    before = {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}
    monkeypatch.setattr(models, "train", trains)
    sepsis.demo(report=folder, **SMALL)
    assert {path.name: path.read_bytes() for path in (folder / "tables").iterdir()} == before
    with pytest.raises(AssertionError, match="trained again"):  # another seed is another study
        sepsis.demo(report=folder, **{**SMALL, "seed": 2})


def test_a_figure_that_fails_leaves_the_earlier_report(
    simulated: tuple[Path, chapters.Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = simulated
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("nothing to draw")

    monkeypatch.setattr(figures, "decay", fails)
    with pytest.raises(RuntimeError, match="nothing to draw"):
        sepsis.demo(report=folder, **SMALL)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_with_anything_else_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    monkeypatch.setattr(cohort, "simulate", None)
    with pytest.raises(FileExistsError, match=r"expected an empty folder or an earlier report .* holds mine.txt"):
        sepsis.demo(report=tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ---- where the data lie ------------------------------------------------------------------------------------


def test_data_are_found_in_a_folder_or_one_below(tmp_path: Path) -> None:
    packed, original, mimic = tmp_path / "all" / "packed", tmp_path / "psv" / "training_setA", tmp_path / "all" / "m"
    for folder in (packed, original, mimic):
        folder.mkdir(parents=True)
    (packed / "setA.npz").touch(), (original / "p000001.psv").touch(), (mimic / "ADMISSIONS.csv.gz").touch()
    assert sepsis.find(tmp_path / "all") == (packed, mimic)
    assert sepsis.find(packed) == (packed, None) and sepsis.find(mimic) == (None, mimic)
    assert sepsis.find(tmp_path / "psv") == (tmp_path / "psv", None)
    assert sepsis.find(original) == (original, None)
    (tmp_path / "none").mkdir()
    for nothing in (tmp_path / "none", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"expected PhysioNet/CinC 2019 records .* found neither"):
            sepsis.find(nothing)


# ---- with data ---------------------------------------------------------------------------------------------


def write_psv(folder: Path, table: records.Records, group: str) -> None:
    """Simulated patients as the challenge's files: what it has no column for is left out."""
    folder.mkdir(parents=True)
    column = {name: j for j, name in enumerate(table.variables)}
    for i, (start, end) in enumerate(zip(table.offset, table.offset[1:])):
        lines = ["|".join(records.COLUMNS)]
        for row in range(start, end):
            measured = [table.measured[row, column[n]] if n in column else np.nan for n in records.MEASURED]
            age, male = table.background[row]
            fields = [*measured, age, male, np.nan, np.nan, -1.0, table.clock[row], table.label[row]]
            lines.append("|".join(f"{value:g}" for value in fields))
        (folder / f"p{group}{i:05}.psv").write_text("\n".join(lines) + "\n")


def test_the_study_of_two_hospitals_tells_every_task_and_both_ways_across(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cohort, "BASE", cohort.BASE + 2)  # enough who are septic, on the daily grid too
    for seed, group in enumerate("AB"):
        write_psv(tmp_path / "data" / f"training_set{group}", cohort.simulate(250, seed), group)
    chosen = ("AR(1)", "GLM covariates", "GLM lags", "logistic regression", "RNN", "GRU", "LSTM")
    monkeypatch.setattr(models, "MODELS", {name: models.MODELS[name] for name in chosen})
    monkeypatch.setattr(chapters, "SIMULATED_MODELS", chosen)
    monkeypatch.setattr(chapters, "ACROSS_MODELS", ("logistic regression", "LSTM"))
    monkeypatch.setattr(chapters, "TIMED_PATIENTS", 30)
    folder = tmp_path / "report"
    results = sepsis.demo(tmp_path / "data", folder, seeds=2, epochs=1, hidden_size=4, patients=450)
    found = tables(folder)
    assert results.challenge is not None
    for task, outcome in results.challenge.tasks.items():
        assert {row["model"] for row in found[f"models_{task}"]} == set(models.MODELS)
        assert len(outcome.runs["GRU"]) == (2 if task == "official" else 1)
        assert list(found[f"hospitals_{task}"][0]) == ["model", "AUROC A", "AUPRC A", "AUROC B", "AUPRC B"]
        assert not any(column.endswith((" A", " B")) for column in found[f"models_{task}"][0])
        for row, known in zip(found[f"hospitals_{task}"], outcome.table):
            assert row == {column: str(known[column]) for column in row}, "not the model's own line"
    page = (folder / "index.html").read_text()
    assert "gatewise.sepsis.published --data" in page and "published" not in found
    runs = [(name, runs[0]) for outcome in results.challenge.tasks.values() for name, runs in outcome.runs.items()]
    told = []
    for names, note in re.findall(r"<li>([^:<]*): (.*)\.</li>", page):
        told += [(name, html.unescape(note)) for name in names.split(", ") if name in models.MODELS]
    assert sorted(told) == sorted({(name, run.note.rstrip(".")) for name, run in runs if run.note}), "once each"
    assert list(found["across"][0]) == ["model", "all → A", "A → A", "B → A", "all → B", "A → B", "B → B"]
    assert "subgroups" in found and "training_time" in found and len(found["claims"]) == 7
    trained = []
    train = models.train
    monkeypatch.setattr(models, "train", lambda *rest, **options: trained.append(rest) or train(*rest, **options))
    header = "paper,row,split,seed,auroc,auprc,utility,epoch,seconds"
    line = "IADI,three LSTM layers with skip connections,0,0,0.8,0.1,0.37,9,100"
    (folder / "models" / "published.csv").write_text(f"{header}\n{line}\n")
    sepsis.demo(tmp_path / "data", folder, seeds=2, epochs=1, hidden_size=4, patients=450)
    assert not trained
    page = (folder / "index.html").read_text()
    assert "gatewise.sepsis.published --data" not in page and "three LSTM layers with skip connections" in page
    assert [row["AUROC printed"] for row in tables(folder)["published"]] == ["0.798"]
    printed = capsys.readouterr().out
    assert "data: 450 patients" in printed and f"report: {folder}" in printed
