"""The suite that measures speed: it must count right, reject wrong answers, keep what it measured. No times here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gatewise import bench, cli, peers
from gatewise.problems import GATES, OPTIONS, Inputs, Problem, draw, fits, gradients_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # of which report.py imports another script
TINY = Problem.parse("lstm:T3,N2,I3,H4:f32:train")
CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")


def report():
    """benchmarks/report.py, which is a script and no module of the package."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def installed(name):
    """A peer, or a skipped test that says why."""
    if reason := peers.PEERS[name].missing():
        pytest.skip(reason)  # the library is not installed: what is missing, and the extra that brings it
    return peers.PEERS[name]


# ---- Problems and sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bench.SETS)
def test_a_set_round_trips_through_strings_and_says_nothing_twice(name):
    texts = [str(problem) for problem in bench.SETS[name].problems]
    assert len(set(texts)) == len(texts) > 0 and bench.SETS[name].origin
    assert [Problem.parse(text) for text in texts] == bench.SETS[name].problems
    assert bench.select([name]) == [(name, problem) for problem in bench.SETS[name].problems]


def test_every_option_round_trips_and_the_order_of_words_does_not_matter():
    seen = set()
    for others in ("reset expected states batch", "reset0 zoneout checkpoints packed"):
        every: list[str] = []
        for option in (*others.split(), *OPTIONS):
            every += [option] * fits("lstm", [*every, option])
        problem = Problem.parse(f"lstm:T7,N3,I5,H9:f64:{','.join(every)}")
        backwards = ",".join(reversed(every))
        assert Problem.parse(str(problem)) == problem == Problem.parse(f"lstm:T7,N3,I5,H9:f64:{backwards}")
        seen |= problem.options
    assert seen == OPTIONS.keys() - {"train"}
    with pytest.raises(ValueError, match="does not have all these options, or they exclude each other"):
        Problem.parse("gru:T7,N3,I5,H9:f64:clip")
    assert str(TINY) == "lstm:T3,N2,I3,H4:f32:train"
    assert str(Problem.parse("lstm:T3,N2,I3,H4:f32:h0,lengths")) == "lstm:T3,N2,I3,H4:f32:lengths,h0"


@pytest.mark.parametrize("N", [1, 2, 7, 8])
def test_half_fills_half_of_the_batch(N):
    lengths = draw(Problem.parse(f"lstm:T10,N{N},I2,H2:f32:half")).lengths
    assert lengths.sum() == 5 * N and lengths.min() >= 1 and lengths.max() < 10


# ---- What a problem costs ----------------------------------------------------------------------------------


class Counted(np.ndarray):
    """Counts the multiplications and additions of the matrix products it takes part in."""

    flops = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        plain = [a.view(np.ndarray) if isinstance(a, Counted) else a for a in inputs]
        if ufunc is np.matmul:
            (*_, n), (k, m) = plain[0].shape[-2:], plain[1].shape
            assert n == k
            Counted.flops += 2 * plain[0].size * m
        return np.asarray(getattr(ufunc, method)(*plain, **kwargs)).view(Counted)


@pytest.mark.parametrize("option", ["train", "nodx", "infer"])
@pytest.mark.parametrize("cell", CELLS)
def test_flops_are_those_of_the_products_that_a_plain_loop_computes(monkeypatch, cell, option):
    problem = Problem.parse(f"{cell}:T3,N2,I5,H7:f64:{option}")
    inputs = draw(problem)
    counted = Inputs(*(None if a is None else a.view(Counted) for a in inputs))
    zeros = np.zeros
    monkeypatch.setattr(np, "zeros", lambda *args: zeros(*args).view(Counted))
    Counted.flops = 0
    peers.NumPy(problem, counted, 1).step()
    assert Counted.flops == bench.flops(problem, inputs) > 0


def test_flops_and_bytes_counted_by_hand():
    def costs(text):
        problem = Problem.parse(text)
        return bench.flops(problem, draw(problem)), bench.least_bytes(problem, draw(problem))

    # 6 rows, 4 * 7 gates, 5 + 7 terms: 2 * 6 * 28 * 12 = 4032 forward, twice that backward, 2 * 6 * 28 * 5 for dx.
    # x 30, y 42, weights 28 * 12 = 336; backward dy 42, dx 30, weights again, and the tape's 4 + 1 blocks of 42 twice.
    S = bench._core.cells["lstm"]["S"]
    tape = 2 * (S + 1) * 42
    assert costs("lstm:T2,N3,I5,H7:f64:infer") == (4032, 8 * (30 + 42 + 336))
    assert costs("lstm:T2,N3,I5,H7:f64:train") == (12096, 8 * (30 + 42 + 336 + 42 + 30 + 336 + tape))
    assert costs("lstm:T2,N3,I5,H7:f64:nodx") == (12096 - 1680, 8 * (30 + 42 + 336 + 42 + 336 + tape))
    assert costs("lstm:T2,N3,I5,H7:f32:stream") == (4032, 4 * (30 + 42 + 2 * 336))
    # a batch that is half empty costs half: 2 * 5 of 4 * 5 rows
    assert costs("rnn_tanh:T4,N5,I2,H3:f32:half")[0] == 3 * 2 * 10 * 3 * 5
    assert costs("rnn_tanh:T4,N5,I2,H3:f32:empty,infer") == (0, 4 * 3 * 5)


# ---- Verification ------------------------------------------------------------------------------------------


VERIFIED = [
    Problem.parse(f"{cell}:T6,N3,I4,H5:{dtype}:{options}")
    for cell in CELLS
    for dtype in ("f32", "f64")
    for options in ("h0", "lengths,reverse,h0", "nan")
]


@pytest.fixture(params=VERIFIED, ids=str)
def answers(request):
    """A problem and our right answers to it."""
    problem = request.param
    return problem, peers.Ours(problem, draw(problem), 1).results()


def test_right_answers_pass_and_an_error_in_any_one_of_them_does_not(answers):
    problem, results = answers
    bench.verify(problem, "us", results)
    checked = ["y", "hn", *gradients_of(problem)] + ["cn"] * (problem.cell == "lstm")
    for name in checked:
        sound = results[name]
        if np.isnan(sound).all():
            continue
        where = np.unravel_index(np.nanargmax(np.abs(sound)), sound.shape)
        for value in (sound[where] * 1.01, -sound[where], np.nan, np.inf):
            wrong = sound.copy()
            wrong[where] = value
            with pytest.raises(bench.WrongAnswer, match=f"{name} of us"):
                bench.verify(problem, "us", {**results, name: wrong})
        for wrong in (sound[:-1], sound[..., None], sound.T[..., None]):
            with pytest.raises(bench.WrongAnswer, match=f"{name} of us has the shape"):
                bench.verify(problem, "us", {**results, name: wrong})


def test_a_nan_that_is_missing_or_elsewhere_is_an_error():
    problem = Problem.parse("lstm:T6,N3,I4,H5:f32:nan")
    results = peers.Ours(problem, draw(problem), 1).results()
    assert np.isnan(results["y"]).any() and not np.isnan(results["y"]).all()
    for wrong in (np.nan_to_num(results["y"]), results["y"][:, ::-1]):
        with pytest.raises(bench.WrongAnswer, match="NaNs in other places"):
            bench.verify(problem, "us", {**results, "y": wrong})


def test_an_answer_that_is_not_shown_is_no_answer():
    results = peers.Ours(TINY, draw(TINY), 1).results()
    for name in ("y", "dw_ih", "dw_hh"):
        with pytest.raises(bench.WrongAnswer, match=f"us shows no {name}"):
            bench.verify(TINY, "us", {k: v for k, v in results.items() if k != name})


class Wrong(peers.NumPy):
    """A peer with one bias gradient off by a per cent."""

    name = "wrong"
    packages = ()

    def step(self):
        results = super().step()
        return {**results, "db_ih": results["db_ih"] * np.float32(1.01)}


def test_a_wrong_peer_is_left_out_and_named(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "wrong", Wrong)
    measurement = bench.Measurement(TINY, ["wrong"], window=1e-4)
    assert list(measurement.parties) == ["ours"]
    (row,) = measurement.rows([measurement.round()])
    assert row.against == "" and row.ratio is None
    assert "left out" in row.note and "db_ih of wrong" in row.note


def test_nothing_is_timed_when_ours_is_wrong(monkeypatch):
    sound = peers.run
    monkeypatch.setattr(peers, "run", lambda *args: {k: v * np.float32(1.01) for k, v in sound(*args).items()})
    with pytest.raises(bench.WrongAnswer, match="of gatewise"):
        bench.Measurement(TINY, window=1e-4)


# ---- Peers -------------------------------------------------------------------------------------------------


def claims():
    """Every option of a peer once, every cell and dtype in training and in inference."""
    for name, peer in {**peers.OURS, **peers.PEERS}.items():
        texts = [f"{cell}:{dtype}:{o}" for cell in CELLS for dtype in ("f32", "f64") for o in ("train", "infer")]
        texts += [f"{cell}:f32:{o}" for cell in ("lstm", "gru") for o in sorted(peer.options - {"train", "infer"})]
        texts += [f"{cell}:f32:infer,{o}" for cell in ("lstm", "gru") for o in ("half", "lengths", "reverse", "h0")]
        texts += [f"{cell}:f32:half,h0" for cell in ("lstm", "gru")]
        texts += [f"{cell}:f32:{o}" for cell in GATES if cell not in CELLS for o in ("train", "infer", "stream")]
        for cell, dtype, options in (text.split(":") for text in dict.fromkeys(texts)):
            if not fits(cell, options.split(",")):
                continue
            problem = Problem.parse(f"{cell}:T5,N3,I4,H6:{dtype}:{options}")
            if peer.refuses(problem) is None:
                yield pytest.param(name, problem, id=f"{name}-{problem}")


@pytest.mark.parametrize("name, problem", list(claims()))
def test_what_a_peer_claims_to_run_it_runs_right(name, problem):
    peer = peers.OURS.get(name) or installed(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        party = peer(problem, draw(problem), 1)
        with party.window():
            party.step()
            results = party.results()
    bench.verify(problem, name, results)
    if problem.trains:
        assert {"y", *gradients_of(problem)} - results.keys() <= {"dh0", "dc0"}
        assert ("dx" in results) == ("nodx" not in problem.options)


def test_modules_of_ours_are_measured_against_torchs_and_against_our_functions(monkeypatch):
    """Verified first, as every party is: a module that gives one answer late is wrong."""
    assert bench.installed(None, "gatewise.torch") == ["torch"]
    rows = bench.measure(TINY, ["torch"], rounds=2, window=1e-4, party="gatewise.torch")
    assert [row.against for row in rows] == ["torch", "functional"] and all(row.ratio > 0 for row in rows)
    with pytest.raises(ValueError, match=r"reverse: gatewise\.torch runs no reverse"):
        bench.select(["lstm:T5,N3,I4,H6:f32:reverse"], "gatewise.torch")
    with pytest.raises(ValueError, match=r"party: expected one of gatewise, gatewise\.torch; got 'torch'"):
        bench.installed(None, "torch")
    sound = peers.OursInTorch.results
    monkeypatch.setattr(peers.OursInTorch, "results", lambda self: {**sound(self), "hn": 0 * sound(self)["hn"]})
    with pytest.raises(bench.WrongAnswer, match=r"hn of gatewise\.torch"):
        bench.Measurement(TINY, ["torch"], window=1e-4, party="gatewise.torch")


def test_what_no_peer_can_run_is_refused_with_a_reason():
    for peer in peers.PEERS.values():
        assert peer.refuses(Problem.parse("lstm:T5,N3,I4,H6:f32:empty,reverse,stream"))
    assert "inference" in peers.OnnxRuntime.refuses(TINY)
    assert "see torch" in peers.TorchGeneric.refuses(Problem.parse("gru:T5,N3,I4,H6:f32:train"))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_threads_held_to_one_core_are_let_go_again():
    all_cores, born = os.sched_getaffinity(0), {}
    done = threading.Event()

    def live():
        born["id"] = threading.get_native_id()
        done.wait(10)

    thread = threading.Thread(target=live)
    with peers._pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
        thread.start()
        while "id" not in born:
            pass
        assert len(os.sched_getaffinity(born["id"])) == 1
    assert os.sched_getaffinity(0) == os.sched_getaffinity(born["id"]) == all_cores
    done.set()
    thread.join()


# ---- Measuring ---------------------------------------------------------------------------------------------


def test_rows_are_medians_of_rounds_and_ratios_pair_windows_of_one_round(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "numpy", type("Bare", (peers.NumPy,), {"packages": ()}))
    measurement = bench.Measurement(TINY, ["numpy"], window=1e-4)
    work = bench.flops(TINY, measurement.inputs)
    ours, theirs, peak = [1e-3, 2e-3, 4e-3], [2e-3, 2e-3, 12e-3], [work / 1e-3, work / 1e-3, work / 1e-3]
    (row,) = measurement.rows([{"ours": a, "numpy": b, "peak": p} for a, b, p in zip(ours, theirs, peak)], "some")
    assert (row.set, row.against, row.ms, row.against_ms) == ("some", "numpy", 2.0, 2.0)
    assert row.ratio == 2.0  # the median of 2, 1, 3; the medians' ratio would be 1
    assert row.peak_share == 0.5 and row.gflops == pytest.approx(work / 2e-3 / 1e9)
    assert row.spread == 0.375 and "busy: ours" in row.note
    assert all(0 <= share <= 1 for share in (row.products, row.cells, row.other))
    assert sum((row.products, row.cells, row.other, row.call)) == pytest.approx(1, abs=0.05)


class Slow(peers.NumPy):
    """A peer that takes long."""

    name = "slow"
    packages = ()

    def step(self):
        done = threading.Event()
        done.wait(0.02)
        return super().step()


def test_a_slow_peer_sits_out_two_rounds_of_three_and_is_paired_with_those_it_was_in(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "slow", Slow)
    measurement = bench.Measurement(TINY, ["slow"], window=1e-3)
    rounds = [measurement.round() for _ in range(4)]
    assert ["slow" in r for r in rounds] == [True, False, False, True]
    for k, r in enumerate(rounds):
        r.update({"ours": k + 1.0, "peak": 1.0}, **({"slow": 10.0} if "slow" in r else {}))
    (row,) = measurement.rows(rounds)
    assert row.ms == 2500 and row.against_ms == 10000 and row.ratio == (10 / 1 + 10 / 4) / 2


def test_other_parties_of_ours_are_the_plain_problem_and_one_thread():
    names = {
        text: list(bench.Measurement(Problem.parse(f"lstm:T3,N4,I2,H3:f32:{text}"), (), threads, 1e-4).parties)
        for text, threads in (("train", 1), ("subnormal", 1), ("half", 2), ("nodx", 2))
    }
    assert names == {
        "train": ["ours"], "subnormal": ["ours", "plain"], "half": ["ours", "plain", "1 thread"],
        "nodx": ["ours", "1 thread"],
    }  # fmt: skip


def test_a_problem_of_nothing_is_not_measured():
    with pytest.raises(ValueError, match="nothing to measure"):
        bench.Measurement(Problem.parse("lstm:T0,N4,I2,H3:f32:train"))


def test_memory_of_a_step_is_at_least_its_tape():
    problem = Problem.parse("lstm:T100,N64,I16,H64:f32:train")
    took = bench.memory(problem, peers.Ours.name)
    if took is None:
        # getrusage's peak is what the measurement itself rests on: without it there is nothing to compare
        pytest.skip("this system does not tell a process' highest memory")
    tape = 4 * 100 * 64 * 64 * (bench._core.cells["lstm"]["S"] + 2) / 1e6  # gates, c, y
    assert tape <= took <= 4 * tape


# ---- Files and pages ---------------------------------------------------------------------------------------


SHARED = {
    "date": "2026-01-02", "machine": "a, b", "cores": 2, "copy_gbs": 12.5, "arch": "avx512", "compiler": "g++ 12.2.0",
    "commit": "0123456789ab", "versions": "gatewise 0.1.0, numpy 2.0",
}  # fmt: skip
ROW = bench.Row(
    "grid", "lstm:T64,N32,I64,H128:f32:train", 1, 5.0, 0.01, 120.0, 150.0, 0.8, 30.0, 0.85, 0.1, 0.04, 0.01,
    "torch", 7.5, 0.02, 1.5, "",
)  # fmt: skip


def as_read(row):
    return {**vars(row), **SHARED}


def test_rows_round_trip_through_a_file(tmp_path):
    stream = replace(ROW, products=None, cells=None, other=None, call=None, note='a "note", with; signs', mb=1.25)
    alone = replace(ROW, against="", against_ms=None, against_spread=None, ratio=None, threads=2)
    file = bench.CsvFile(tmp_path / "rows.csv", SHARED)
    assert bench.read_csv(tmp_path / "rows.csv") == []
    file.write([ROW])
    file.write([stream, alone])
    assert bench.read_csv(tmp_path / "rows.csv") == [as_read(stream), as_read(alone)]  # ROW was measured again
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_kept_file_loses_only_what_is_measured_again(tmp_path):
    path = tmp_path / "rows.csv"
    old = [ROW, replace(ROW, against="jax"), replace(ROW, threads=2), replace(ROW, set="scaling")]
    bench.CsvFile(path, SHARED).write(old)
    new = replace(ROW, ms=4.0)
    bench.CsvFile(path, {**SHARED, "commit": "new"}, keep=True).write([new])
    bench.CsvFile(path, {**SHARED, "arch": "avx2"}, keep=True).write([new])
    kept = bench.read_csv(path)
    assert kept[:2] == [as_read(old[2]), as_read(old[3])]
    assert kept[2:] == [{**as_read(new), "commit": "new"}, {**as_read(new), "arch": "avx2"}]
    bench.CsvFile(path, SHARED)
    assert bench.read_csv(path) == []


def test_another_file_is_not_taken_for_rows(tmp_path):
    (tmp_path / "other.csv").write_text("problem,ms\nx,1\n")
    with pytest.raises(ValueError, match=r"other\.csv: expected the columns of gatewise bench"):
        bench.read_csv(tmp_path / "other.csv")


def synthetic():
    """Rows of a grid that meets its targets, of another arch, of a walk over sizes, and one narrow row."""
    for set_name, option in (("grid", "train"), ("grid", "nodx"), ("half", "half")):
        for threads in (1, 2):
            problem = f"lstm:T64,N32,I64,H128:f32:{option}"
            row = replace(ROW, set=set_name, problem=problem, threads=threads, peak_share=0.83)
            yield {**as_read(row), "ratio": 6.0}
            if option == "half":
                yield as_read(replace(row, against="plain", ratio=2.0))
            if threads == 2:
                yield as_read(replace(row, against="1 thread", ratio=1.9))
    yield {**as_read(replace(ROW, ratio=1.3)), "arch": "avx2"}
    few = replace(ROW, problem="gru:T1000,N1,I40,H128:f32:train", set="speech", peak_share=0.4, products=0.8)
    yield as_read(replace(few, ratio=3.0))
    yield as_read(replace(few, against="jax", ratio=1.1))
    yield as_read(replace(few, against="reference", ratio=1.0))  # ours, and so no peer
    for problem in bench.SETS["scaling"].problems:
        yield as_read(replace(ROW, set="scaling", problem=str(problem), ms=problem.H * problem.T / 100, mb=3.0,
                              against_mb=6.0))  # fmt: skip


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = bench.csv.DictWriter(file, [*bench.ROW, *SHARED])
        writer.writeheader()
        writer.writerows(rows)


def test_the_page_says_what_was_met_what_was_missed_and_what_bounds_the_rest(tmp_path):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "speed.csv", synthetic())
    text = report().write(tmp_path).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert "| LSTM f32 training, share of the FMA peak, H ≥ 128 and N ≥ 32 | ≥ 82% | 83% | met |" in lines
    assert "| LSTM f32 training against torch, both with dx | ≥ 1.25 | 6.00 | met |" in lines
    assert "| AVX2 against torch held to AVX2, LSTM f32 training | ≥ 1.20 | 1.30 | met |" in lines
    assert "| memory of a training step, of torch's | ≤ 0.60 | 0.50 | met |" in lines
    assert "| lengths that fill half of the batch: time, of the full batch's | ≤ 0.53 | 0.50 | met |" in lines
    assert any(line.startswith("| f64 training against torch |") and "not measured" in line for line in lines)
    narrow = text.partition("## Rows under 1.2")[2].partition("##")[0]
    (row,) = (line for line in narrow.splitlines() if line.startswith("| `"))
    assert row.startswith("| `gru:T1000,N1,I40,H128:f32:train` | avx512 | 1 | jax | 1.10 |")
    assert "products, at 50% of the peak" in row and "197 kB of w_hh for 1 row" in row
    assert "T from 256 to 1024: time grows as T^1.00" in text and "## grid on avx2" in text
    assert all(value in text for value in ("a, b", "g++ 12.2.0", "0123456789ab"))
    pictures = ["ratio.png", "roofline.png", "scaling.png", "memory.png"]
    for picture in pictures:
        assert f"]({picture})" in text and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert report().page(bench.read_csv(tmp_path / "speed.csv"), pictures) == text


def test_the_page_names_each_row_that_missed_its_target():
    rows = [{**row, "peak_share": 0.7, "ratio": 1.1, "products": 0.1, "cells": 0.7} for row in synthetic()]
    text = report().page(rows, [])
    grid = "`lstm:T64,N32,I64,H128:f32:train`"
    assert f"| ≥ 82% | 70% | **missed** on 1 of 1: {grid} 70% |" in text
    assert f"| ≥ 1.25 | 1.10 | **missed** on 1 of 1: {grid} 1.10 |" in text
    assert "| … all together | geometric mean ≥ 2.20 | 1.10 | **missed** |" in text
    assert "the cells' functions |" in text


def test_a_page_of_one_row_and_a_page_of_none(tmp_path):
    assert "not measured" in report().page([as_read(replace(ROW, set="", against="", ratio=None, against_ms=None))], [])
    write_rows(tmp_path / "speed.csv", [])
    with pytest.raises(ValueError, match="has none"):
        report().write(tmp_path)


def test_the_suite_runs_and_its_page_can_be_written(tmp_path):
    pytest.importorskip("pytest_benchmark"), pytest.importorskip("matplotlib")
    suite = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-p",
        "no:cacheprovider",
        "--rounds",
        "2",
        "--window",
        "1e-4",
    ]
    options = ["--against", "none", "--results", str(tmp_path), "--sets", str(TINY)]

    # these tests may be running side by side, which the suite must not
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}

    def run(*argv):
        return subprocess.run([*argv], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=alone)

    done = run(*suite, *options, "--threads", "1", "2", "--arch", "generic")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert sum(line.startswith(str(TINY)) for line in done.stdout.splitlines()) == 2
    rows = bench.read_csv(tmp_path / "speed.csv")
    assert [(row["threads"], row["against"], row["arch"]) for row in rows] == [
        (1, "", "generic"), (2, "1 thread", "generic"),
    ]  # fmt: skip
    assert run(sys.executable, "benchmarks/report.py", "--results", str(tmp_path)).returncode == 0
    wrong = run(*suite, "--sets", "gird", "--results", str(tmp_path))
    assert wrong.returncode == 4 and "'gird' is neither a problem" in wrong.stderr


# ---- gatewise bench ----------------------------------------------------------------------------------------


def gatewise(capsys, *argv):
    try:
        code = cli.main(["bench", *argv])
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    return code, *capsys.readouterr()


def test_bench_prints_a_table_and_writes_its_files(capsys, tmp_path):
    pytest.importorskip("matplotlib"), pytest.importorskip("torch")
    files = [str(tmp_path / name) for name in ("rows.csv", "rows.json", "pictures")]
    code, out, err = gatewise(
        capsys, "--quick", str(TINY), "gru:T2,N2,I3,H4:f64:infer", "--against", "torch", "--threads", "1", "2",
        "--csv", files[0], "--json", files[1], "--plot", files[2],
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert sum(line.startswith(str(TINY)) for line in lines) == 2
    assert any(line.startswith("torch / ours: geometric mean") for line in lines)
    rows = bench.read_csv(files[0])
    assert [(row["threads"], row["against"]) for row in rows] == 2 * [(1, "torch"), (2, "torch"), (2, "1 thread")]
    document = json.loads(Path(files[1]).read_text())
    assert document["arch"] == rows[0]["arch"] and len(document["rows"]) == 6
    assert {path.name for path in Path(files[2]).iterdir()} == {"ratio.png", "roofline.png"}


def test_bench_list_names_sets_origins_and_peers(capsys):
    code, out, err = gatewise(capsys, "--list")
    assert (code, err) == (0, "")
    for name, group in bench.SETS.items():
        assert name in out and group.origin in out
    for name, peer in peers.PEERS.items():
        assert name in out and (peer.missing() or peer.version()) in out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["gird"], "'gird' is neither a problem"),
        (["lstm:T3,N2:f32:train"], "expected something like"),
        (["lstmm:T3,N2,I3,H4:f32:train"], "'lstmm' is none of"),
        (["lstm:T3,N2,I3,H4:f32:trian"], "'trian' is none of"),
        (["lstm:T3,N0,I3,H4:f32:train", "--against", "none"], "nothing to measure"),
        ([str(TINY), "--against", "tensorflow"], "expected some of torch"),
        ([str(TINY), "--against", "none", "--threads", "0"], "num_threads"),
        ([str(TINY), "--against", "none", "--csv", "no/such/folder/rows.csv"], "no/such/folder"),
        ([str(TINY), "--against", "none", "--json", "no/such/folder/rows.json"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, argv, words):
    code, _, err = gatewise(capsys, *argv)
    assert code == 2 and words in err
    assert err.startswith("gatewise bench: ") and err.count("\n") == 1 and "Traceback" not in err


def test_a_peer_or_a_painter_that_is_missing_is_named_with_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    code, _, err = gatewise(capsys, str(TINY), "--against", "jax")
    assert (code, err) == (2, 'gatewise bench: jax needs jax: pip install "gatewise[bench]"\n')
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = gatewise(capsys, str(TINY), "--against", "none", "--plot", "never-drawn")
    assert (code, out) == (2, "") and 'matplotlib: pip install "gatewise[bench]"' in err
    assert not Path("never-drawn").exists()


def test_rounds_must_be_one_or_more(capsys):
    code, _, err = gatewise(capsys, str(TINY), "--rounds", "0")
    assert code == 2 and "expected 1 or more; got 0" in err


def test_a_wrong_answer_of_ours_ends_with_1(capsys, monkeypatch):
    sound = peers.run
    monkeypatch.setattr(peers, "run", lambda *args: {k: v * np.float32(1.01) for k, v in sound(*args).items()})
    code, _, err = gatewise(capsys, str(TINY), "--against", "none", "--quick")
    assert code == 1 and err.startswith("gatewise bench: wrong answer: ") and err.count("\n") == 1


def test_bench_needs_nothing_but_numpy():
    from test_install import ONLY_NUMPY, python

    out = python(
        f"{ONLY_NUMPY}\nfrom gatewise import cli\ncli.main(['bench', '--quick', '--against', 'none', '{TINY}'])"
    )
    assert str(TINY) in out


def test_every_cell_of_the_kernels_can_be_verified():
    assert set(CELLS) <= set(GATES)
