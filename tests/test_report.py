"""The sepsis study's report: figures that show what they are given, a page that needs nothing else, its files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from sklearn.metrics import roc_auc_score

from gatewise.sepsis import figures, report

MODELS = (
    "logistic regression", "naive Bayes", "linear SVM", "RBF SVM", "MLP", "gradient boosting", "AR(1)", "AR(6)",
    "GLM AR(1)", "GLM covariates", "GLM lags", "RNN", "GRU", "LSTM", "LSTM peephole",
)  # fmt: skip


def lines(axes: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """label -> (x, y) of the lines with a label."""
    return {
        line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def texts(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# ---- style -------------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    """Relative luminance of sRGB as WCAG defines it, from 0 black to 1 white."""
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_any_two_models_can_be_told_apart_on_a_grey_printer() -> None:
    """By marker always; without markers, by dash or by a difference of grey; and every line can be seen on white."""
    assert list(figures.LOOKS) == ["best possible", *MODELS]
    for (one, a), (other, b) in combinations(figures.LOOKS.items(), 2):
        assert a["marker"] != b["marker"], (one, other)
        grey = abs(luminance(a["color"]) - luminance(b["color"]))
        assert a["linestyle"] != b["linestyle"] or grey > 0.1, (one, other)
    for name, look in figures.LOOKS.items():
        assert 1.05 / (luminance(look["color"]) + 0.05) > 2, name  # contrast with the paper


def test_a_model_looks_the_same_in_every_figure() -> None:
    random = np.random.default_rng(0)
    label, score = np.arange(40) % 2, {name: random.random(40) for name in ("GRU", "AR(1)", "LSTM")}
    history = [{"train_loss": 0.2, "val_loss": 0.2}] * 3
    drawn = [
        figures.roc_pr(label, score).axes[0], figures.utility(np.arange(1.0, 41), score).axes[0],
        figures.memory({"all": score}).axes[0], figures.calibration(label, score).axes[0],
        figures.learning_curves(dict.fromkeys(score, history)).axes[0],
        figures.decay({"drug": np.ones(40)}, {name: {"drug": one} for name, one in score.items()}).axes[0],
        figures.patient(score, np.arange(40.0), np.full((40, 1), 80.0), ("HR",), ()).axes[0],
    ]  # fmt: skip
    for axes in drawn:
        for name in score:
            (line,) = (line for line in axes.lines if line.get_label().split("  ")[0] == name)
            assert (line.get_color(), line.get_marker()) == (
                figures.LOOKS[name]["color"],
                figures.LOOKS[name]["marker"],
            )
            assert not axes.spines["top"].get_visible() and not axes.spines["right"].get_visible()


def test_states_of_a_model_have_its_look_and_two_in_one_panel_their_own() -> None:
    curves = {"LSTM trained": np.ones(5), "LSTM peephole trained": np.ones(5), "MLPs": np.ones(5)}
    apart = {"LSTM forget gate open": np.ones(5), "LSTM forget gate shut": np.ones(5)}
    one, other = (
        [(line.get_color(), line.get_marker()) for line in axes.lines]
        for axes in figures.memory({"after": curves, "forget gate": apart}).axes
    )
    looks = {name: (look["color"], look["marker"]) for name, look in figures.LOOKS.items()}
    assert one[:2] == [looks["LSTM"], looks["LSTM peephole"]] and one[2] not in looks.values()
    assert len(set(other)) == 2


def test_representatives_are_the_recurrent_models_and_the_best_of_each_family() -> None:
    family = {"a": "linear", "b": "linear", "c": "AR", "RNN": "recurrent", "LSTM": "recurrent"}
    quality = {"best possible": 0.95, "a": 0.7, "b": 0.8, "RNN": 0.6, "c": 0.5, "LSTM": 0.9}
    assert figures.representatives(quality, family) == ["best possible", "b", "RNN", "c", "LSTM"]


# ---- figures show what they are given ----------------------------------------------------------------------


@pytest.mark.parametrize(("width", "columns"), [(figures.WIDE, 2), (figures.NARROW, 1)])
def test_memory_shows_every_curve_of_every_group(width: float, columns: int) -> None:
    steps = np.arange(40.0)
    groups = {"before": {"RNN": 0.5**steps, "AR(6)": np.where(steps < 7, 0.3, 0.0)}, "after": {"RNN": 0.9**steps}}
    figure = figures.memory(groups, width=width)
    assert figure.get_figwidth() == width
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == columns
    for axes, (title, curves) in zip(figure.axes, groups.items()):
        assert axes.get_title(loc="left") == title and axes.get_yscale() == "log"
        assert lines(axes).keys() == curves.keys()
        for name, (x, y) in lines(axes).items():
            np.testing.assert_array_equal(x, steps)
            np.testing.assert_array_equal(y, curves[name])
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 0.5**39 and top > 1  # all of it can be seen
    assert texts(figure) == ["RNN", "AR(6)"]


def test_four_panels_stand_two_by_two_and_on_a_telephone_in_a_column() -> None:
    groups = {name: {"RNN": np.ones(3)} for name in "abcd"}
    for width, shape in ((figures.WIDE, (2, 2)), (figures.NARROW, (4, 1))):
        grids = {
            axes.get_subplotspec().get_gridspec().get_geometry() for axes in figures.memory(groups, width=width).axes
        }
        assert grids == {shape}


def test_decay_shows_the_truth_beside_what_was_learned() -> None:
    truth = {"Antibiotic": np.linspace(-1, 0, 30), "Steroid": np.sin(np.arange(30.0))}
    learned = {"LSTM": {drug: curve * 0.9 for drug, curve in truth.items()}, "GLM lags": {"Steroid": np.ones(30)}}
    figure = figures.decay(truth, learned)
    antibiotic, steroid = map(lines, figure.axes)
    np.testing.assert_array_equal(antibiotic["truth"][1], truth["Antibiotic"])
    np.testing.assert_array_equal(antibiotic["LSTM"][1], truth["Antibiotic"] * 0.9)
    np.testing.assert_array_equal(steroid["GLM lags"][1], np.ones(30))
    assert antibiotic.keys() == {"truth", "LSTM"} and steroid.keys() == {"truth", "LSTM", "GLM lags"}
    assert texts(figure) == ["truth", "LSTM", "GLM lags"]


def stay(hours: int = 12) -> dict[str, Any]:
    """A stay with two readings, a drug that was given and one that was not."""
    measured = np.full((hours, 5), np.nan)
    measured[:, 0], measured[::3, 1], measured[[2, 7], 2] = np.arange(hours) + 60, 37.5, [1, 2]
    return {
        "hours": np.arange(4.0, 4 + hours), "measured": measured, "doses": ("Steroid", "Sedative"),
        "variables": ("HR", "Temp", "Steroid", "Sedative", "WBC"), "label": np.arange(hours) >= hours - 3,
    }  # fmt: skip


def test_gates_puts_units_by_cluster_over_the_record_on_one_time_axis() -> None:
    random = np.random.default_rng(0)
    gate, cell = random.random((12, 6)), random.normal(0, 2, (12, 6))
    order, cluster = np.array([4, 0, 2, 5, 1, 3]), np.array([1, 2, 1, 2, 1, 2])
    figure = figures.gates({"forget f": gate, "cell c": cell}, order, cluster, **stay(), risk={"LSTM": gate[:, 0]})
    risk, forget, state, *record = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    np.testing.assert_allclose(lines(risk)["LSTM"][1], 100 * gate[:, 0])
    for axes, values in ((forget, gate), (state, cell)):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), values[:, order].T)
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2"]
        assert axes.get_yticks().tolist() == [1, 4]  # the middle of rows 0..2 and 3..5
        assert tuple(image.get_extent()) == (3.5, 15.5, 5.5, -0.5)
        grey = [luminance(to_hex(color)) for color in image.get_cmap()(np.linspace(0, 1, 32))]
        assert (np.diff(grey) > 0).all() or (np.diff(grey) < 0).all()  # a grey printer keeps the order
    assert forget.images[0].get_clim() == (0, 1)
    limit = np.abs(cell).max()
    assert state.images[0].get_clim() == (-limit, limit)
    assert [axes.get_ylabel().split("\n")[0] for axes in record] == ["HR", "Temp", ""]
    assert {axes.get_xlim() for axes in figure.axes if axes.get_label() != "<colorbar>"} == {(3.5, 15.5)}


def test_the_numbers_of_small_clusters_are_not_on_each_other() -> None:
    cluster = np.array([1] * 20 + [2, 3, 4, 4])
    figure = figures.gates({"forget f": np.random.default_rng(0).random((12, 24))}, np.arange(24), cluster, **stay())
    places = figure.axes[0].get_yticks()
    assert (np.diff(places) > 3).all() and places[-1] == 22.5 and abs(places[0] - 9.5) < 3


def test_patient_shows_readings_where_they_were_taken_and_drugs_where_they_were_given() -> None:
    one = stay()
    figure = figures.patient({"LSTM": np.linspace(0, 0.5, 12)}, **one)
    risk, heart, temperature, drugs = figure.axes
    np.testing.assert_allclose(lines(risk)["LSTM"][1], np.linspace(0, 50, 12))
    (reading,) = (line for line in temperature.lines if line.get_marker() == "o")
    np.testing.assert_array_equal(reading.get_xdata(), one["hours"][::3])
    assert temperature.get_ylabel() == "Temp\n°C" and heart.get_ylabel() == "HR\n/min"
    assert [tick.get_text() for tick in drugs.get_yticklabels()] == ["Steroid"]  # no sedative was given
    (marks,) = drugs.collections
    np.testing.assert_array_equal(marks.get_offsets()[:, 0], one["hours"][[2, 7]])
    assert marks.get_sizes()[1] == 2 * marks.get_sizes()[0]
    (shade,) = (patch for patch in risk.patches if patch.get_label() == "label 1")
    assert (shade.get_x(), shade.get_width()) == (12.5, 3)
    assert texts(figure) == ["label 1", "LSTM"]


def test_roc_and_precision_are_those_of_the_scores_and_nobody_is_hidden() -> None:
    random = np.random.default_rng(0)
    label = (random.random(4000) < 0.1).astype(int)
    scores = {name: random.normal(0, 1, 4000) + k * label for k, name in enumerate(("AR(1)", "GRU", "LSTM"))}
    figure = figures.roc_pr(label, scores, shown=("GRU", "LSTM"))
    roc, pr = figure.axes
    for name in ("GRU", "LSTM"):
        auroc = roc_auc_score(label, scores[name])
        (text,) = (text for text in lines(roc) if text.startswith(f"{name}  {auroc:.3f} / "))
        x, y = lines(roc)[text]
        assert x.size < 400 and np.trapezoid(y, x) == pytest.approx(auroc, abs=5e-3)  # thinned, yet the same curve
    assert not any(text.startswith("AR(1)") for text in lines(roc)) and "the other models" in texts(figure)
    (other,) = (line for line in roc.lines if line.get_color() == figures.LIGHT and len(line.get_xdata()))
    assert np.trapezoid(other.get_ydata(), other.get_xdata()) == pytest.approx(
        roc_auc_score(label, scores["AR(1)"]), abs=5e-3
    )
    curve = max(pr.lines, key=lambda line: line.get_linewidth())  # LSTM's
    recall, precision = curve.get_xdata(), curve.get_ydata()
    for k in (
        1,
        len(recall) // 2,
        -2,
    ):  # a point of the curve: the share of label 1 among as many of the highest scores
        found = round(recall[k] * label.sum())
        highest = np.sort(scores["LSTM"][label == 1])[::-1][found - 1]
        assert precision[k] == pytest.approx(label[scores["LSTM"] >= highest].mean(), abs=0.01)


def test_calibration_is_predicted_and_observed_in_tenths() -> None:
    score = np.linspace(0.01, 0.5, 100)
    label = (np.arange(100) % 10 < np.arange(100) // 10).astype(int)  # k in ten of tenth k, none in the first
    (axes,) = figures.calibration(label, {"RNN": score}).axes
    x, y = lines(axes)["RNN"]
    np.testing.assert_allclose(y, np.arange(1, 10) / 10)
    np.testing.assert_allclose(x, score.reshape(10, 10).mean(axis=1)[1:])


def test_utility_marks_the_threshold_that_was_chosen() -> None:
    thresholds, curve = np.array([0.01, 0.1, 0.2]), np.array([-2.0, 0.3, 0.1])
    (axes,) = figures.utility(thresholds, {"LSTM": curve}, {"LSTM": 0.1}).axes
    np.testing.assert_array_equal(lines(axes)["LSTM"][1], curve)
    dot = axes.lines[-1]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (0.1, 0.3)
    assert axes.get_ylim() == (-0.5, 0.35)


def test_learning_curves_show_both_losses() -> None:
    history = [{"train_loss": 0.9 / k, "val_loss": 1.0 / k} for k in range(1, 5)]
    train, validation = figures.learning_curves({"GRU": history}).axes
    np.testing.assert_array_equal(lines(train)["GRU"], [[1, 2, 3, 4], [one["train_loss"] for one in history]])
    np.testing.assert_array_equal(lines(validation)["GRU"][1], [one["val_loss"] for one in history])
    assert [line.get_markevery() for line in train.lines] == [1]  # even a single epoch is seen


def test_intervals_show_values_ends_and_what_was_published() -> None:
    panels = {"A": {"RNN": (0.8, 0.79, 0.82), "LSTM": (0.83, 0.82, 0.84)}, "B": {"LSTM": (0.85, 0.8, 0.9)}}
    first, second = figures.intervals(panels, {"A": {"a paper": 0.81}}).axes
    names = [tick.get_text() for tick in first.get_yticklabels()]
    assert names == ["RNN", "LSTM", "a paper ◇"]
    at = {(line.get_ydata()[0], *line.get_xdata()) for line in first.lines}
    assert at == {(0, 0.79, 0.82), (0, 0.8), (-1, 0.82, 0.84), (-1, 0.83), (-2, 0.81)}
    assert {(line.get_ydata()[0], *line.get_xdata()) for line in second.lines} == {(-1, 0.8, 0.9), (-1, 0.85)}


def test_training_time_draws_a_bar_a_row() -> None:
    rows = [
        {"model": model, "loop": loop, "seconds": s, "least": s - 0.1, "most": s + 0.2}
        for model, loop, s in (("GRU", "gatewise", 0.5), ("GRU", "torch", 1.5), ("LSTM", "gatewise", 0.7))
    ]
    (axes,) = figures.training_time(rows).axes
    assert sorted(bar.get_width() for bar in axes.patches) == [0.5, 0.7, 1.5]
    middle = {bar.get_width(): bar.get_y() + bar.get_height() / 2 for bar in axes.patches}
    assert middle[0.5] > middle[1.5] > middle[0.7]  # from top to bottom
    ends = np.sort(np.concatenate([c.get_segments() for c in axes.collections])[:, :, 0].ravel())
    np.testing.assert_allclose(ends, [0.4, 0.6, 0.7, 0.9, 1.4, 1.7])


# ---- the page ----------------------------------------------------------------------------------------------

NASTY = 'Ann <script>alert("1")</script> & Bob'
ROWS: list[dict[str, Any]] = [
    {"model": "LSTM", "AUROC": 0.82345, "AUROC low": 0.81, "AUROC high": 0.83, "seconds": 1234.567, "parameters": 64001,
     "words": NASTY},
    {"model": NASTY, "AUROC": 0.5, "AUROC low": None, "AUROC high": float("nan"), "seconds": None, "parameters": 7,
     "words": None},
    {"model": "AR(1)", "AUROC": 0.5, "AUROC low": 0.4, "AUROC high": float("inf"), "seconds": 0.04, "parameters": 0,
     "words": ""},
]  # fmt: skip


def small(width: float) -> Any:
    figure = figures._figure(width / 4, 1)
    figure.subplots().plot([0, 1])
    return figure


def large(width: float) -> Any:
    figure = figures._figure(width / 4, 1)
    figure.text(0, 0.5, "π")
    figure.subplots().plot(np.random.default_rng(0).random(2500), marker="o")  # too long for an SVG
    return figure


@pytest.fixture(scope="module")
def page() -> report.Page:
    made = report.Page(f"Title {NASTY}", [f"Lead {NASTY}", "See https://doi.org/10.1/a?b=1&c=2."])
    made.section(f"First {NASTY}", ["Words."])
    made.table("models", ROWS, f"Caption {NASTY}", note=f"Note {NASTY}", formats={"seconds": ".1f"})
    made.items([NASTY])
    made.command(f"gatewise {NASTY}")
    made.section("Second")
    made.figure("small", small, f"Caption {NASTY}", f"Alt {NASTY}")
    made.figure("large", large, "Another.", "Zigzag.")
    return made


class Document(HTMLParser):
    """What a browser makes of a page, and complains of tags that do not match."""

    EMPTY = ("meta", "img", "source", "br", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []  # texts of th and td, in order
        self.open: list[str] = []
        self.words: dict[str, str] = {}  # tag -> all text directly in it
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words[self.open[-1]] = self.words.get(self.open[-1], "") + data
            if self.open[-1] in ("th", "td"):
                self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_needs_nothing_else(page: report.Page) -> None:
    document = Document(page.html())
    for tag, attributes in document.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed"), tag
        for name in {"src", "srcset", "href", "data", "action", "poster"} & attributes.keys():
            allowed = ("#", "https://") if tag == "a" else ("data:image/",)
            assert attributes[name].startswith(allowed), (tag, attributes[name])
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in report.CSS and "@import" not in report.CSS
    kinds = [image["src"].partition(";")[0] for image in document.all("img")]
    assert kinds == ["data:image/svg+xml", "data:image/png"]


def test_the_page_can_be_read_without_seeing_it(page: report.Page) -> None:
    document = Document(page.html())
    assert document.all("html") == [{"lang": "en"}]
    assert [image["alt"] for image in document.all("img")] == [f"Alt {NASTY}", "Zigzag."]
    assert len(document.all("caption")) == len(document.all("table")) == 1
    assert {th["scope"] for th in document.all("th")} == {"col", "row"}
    assert len(document.all("h1")) == 1 and len(document.all("h2")) == 2
    anchors = {attributes["id"] for _, attributes in document.elements if "id" in attributes}
    inner = [a["href"] for a in document.all("a") if a["href"].startswith("#")]
    assert len(inner) == 2 and {href[1:] for href in inner} <= anchors
    named = [attributes["aria-labelledby"] for _, attributes in document.elements if "aria-labelledby" in attributes]
    assert set(named) <= anchors
    levels = [tag for tag, _ in document.elements if tag in ("header", "nav", "main")]
    assert levels == ["header", "nav", "main"]


def test_every_text_is_escaped_and_addresses_are_links(page: report.Page) -> None:
    text = page.html()
    assert "<script" not in text and text.count("&lt;script&gt;") == 13
    document = Document(text)
    for tag in ("title", "h1", "h2", "p", "caption", "figcaption", "li", "code", "td", "th"):
        assert NASTY in document.words[tag], tag
    assert {"href": "https://doi.org/10.1/a?b=1&c=2"} in document.all("a")  # without the full stop


def test_the_table_shows_the_numbers_of_its_csv_rounded(page: report.Page) -> None:
    rows = list(csv.DictReader(io.StringIO(page.files["tables/models.csv"].decode())))
    assert list(rows[0]) == list(ROWS[0])
    assert [float(rows[0][key]) for key in ("AUROC", "AUROC low", "AUROC high")] == [0.82345, 0.81, 0.83]
    assert rows[1]["seconds"] == "" and rows[1]["model"] == NASTY
    auroc = "{:.3f} ({:.3f} to {:.3f})".format(*(float(rows[0][key]) for key in ("AUROC", "AUROC low", "AUROC high")))
    assert Document(page.html()).cells == [
        "model", "AUROC", "seconds", "parameters", "words",
        "LSTM", auroc, f"{float(rows[0]['seconds']):.1f}", f"{int(rows[0]['parameters']):,}", NASTY,
        NASTY, f"{float(rows[1]['AUROC']):.3f}", report.MISSING, rows[1]["parameters"], report.MISSING,
        "AR(1)", "0.500 (0.400 to ∞)", "0.0", "0", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda page: page.table("none", [], "Caption."), "table none: expected one or more rows"),
        (lambda page: page.table("two", [{"a": 1}, {"b": 1}], "Caption."), "all with the columns of the first"),
        (lambda page: page.table("models", ROWS, "Caption."), r"tables/models.csv: expected a name of its own"),
        (lambda page: page.table("../up", ROWS, "Caption."), r"name: expected small letters, .*; got '../up'"),
        (lambda page: page.figure("mute", small, "Caption.", ""), "figure mute: expected an alt text; got none"),
    ],
)
def test_what_no_reader_could_use_is_refused(
    page: report.Page, build: Callable[[report.Page], None], sentence: str
) -> None:
    before = dict(page.files), page.html()
    with pytest.raises(ValueError, match=sentence):
        build(page)
    assert (page.files, page.html()) == before


# ---- files -------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_is_the_page_tables_and_figures(page: report.Page, tmp_path: Path) -> None:
    folder = page.write(tmp_path / "deep/report")
    files = tree(folder)
    assert sorted(files) == ["figures/large.png", "figures/large.svg", "figures/small.png", "figures/small.svg",
                             "index.html", "tables/models.csv"]  # fmt: skip
    assert files["figures/small.png"].startswith(b"\x89PNG") and b"<svg" in files["figures/small.svg"][:600]
    assert files["index.html"].decode() == page.html()


def test_a_new_report_replaces_the_old_one_and_leaves_the_models(page: report.Page, tmp_path: Path) -> None:
    for name in ("table.csv", "roc_pr.png", "tables/gone.csv", "figures/gone.svg", "index.html.123.tmp",
                 "tables/models.csv.9.tmp", "models/seed 0/LSTM.npz"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("earlier")
    page.write(tmp_path)
    assert sorted(tree(tmp_path)) == sorted([*page.files, "index.html", "models/seed 0/LSTM.npz"])
    assert (tmp_path / "models/seed 0/LSTM.npz").read_text() == "earlier"


@pytest.mark.parametrize(
    "stranger", ["mine.txt", "tables/mine.txt", "figures/a.csv", "figures/deep/a.png", "models", "a/b"]
)
def test_a_folder_with_anything_else_is_refused_untouched(page: report.Page, tmp_path: Path, stranger: str) -> None:
    (tmp_path / stranger).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / stranger).write_text("keep me")
    named = {"figures/deep/a.png": "figures/deep", "a/b": "a"}.get(stranger, stranger)
    with pytest.raises(FileExistsError, match=rf"expected an empty folder or an earlier report .* holds {named}$"):
        page.write(tmp_path)
    assert tree(tmp_path) == {stranger: b"keep me"}
    with pytest.raises(FileExistsError, match="expected a folder to write the report to; it is a file"):
        page.write(tmp_path / stranger)


@pytest.mark.parametrize("last", [0, 2, 5])
def test_a_disk_that_is_full_leaves_the_earlier_page(
    page: report.Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Whichever file fails: the page is the earlier one, which needs none of the others; none is half written."""
    report.Page("Earlier").write(tmp_path)
    before = (tmp_path / "index.html").read_bytes()
    written = []

    def full(path: Path, content: bytes) -> None:
        if len(written) == last:
            raise OSError("no space left on device")
        written.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(report, "write_whole", full)
    with pytest.raises(OSError, match="no space left"):
        page.write(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before
    assert all(content == page.files[name] for name, content in tree(tmp_path).items() if name != "index.html")
