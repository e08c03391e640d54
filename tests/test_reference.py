"""The Numba reference is right: against PyTorch in float64, against finite differences, cell by cell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gatewise as gw
import problems
from gatewise import reference
from problems import Problem

CELLS = list(reference.CELLS)


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """The largest difference is within `tolerance` of the largest value, or of 1. NaN is not close."""
    return problems.distance(a, b) <= tolerance * max(1.0, np.abs(b).max(initial=0.0))


def test_a_problem_is_its_name() -> None:
    for problem in problems.biting("lstm", "f32"):
        assert Problem.parse(str(problem)) == problem
        first, second = problems.draw(problem), problems.draw(Problem.parse(str(problem)))
        assert all(np.array_equal(a, b) for a, b in zip(first, second) if a is not None)
    for text, word in [("lstm:T1,N1,I1,H1:f32", "expected"), ("lstm:T1,N1,I1,H1:f32:lenghts", "lenghts")]:
        with pytest.raises(ValueError, match=word):
            Problem.parse(text)


@pytest.mark.parametrize("cell", problems.TORCH)
def test_float64_equals_torch(cell: str) -> None:
    """Results and gradients to 1e-12, on every shape, with packed sequences and in reverse."""
    for problem in filter(problems.torch_runs, problems.biting(cell, "f64")):
        ours = problems.truth(problem)
        theirs = problems.run_torch(problem, problems.draw(problem))
        hidden = {"gates", "c"} | ({"db_ih", "db_hh"} if "nobias" in problem.options else set())
        assert ours.keys() - theirs.keys() <= hidden, f"{problem}: PyTorch shows {list(theirs)}"
        for name in ours.keys() & theirs.keys():
            assert close(ours[name], theirs[name], 1e-12), f"{problem}: {name}"


@pytest.mark.parametrize("cell", CELLS)
def test_float32_is_rounded_float64(cell: str) -> None:
    for problem in problems.biting(cell, "f32"):
        problems.check(problem, problems.run(problem, problems.draw(problem), "reference"))


@pytest.mark.parametrize("options", ["h0", "lengths,reverse,h0", "nobias,lengths,h0"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_equal_finite_differences(cell: str, options: str) -> None:
    """Of every number that goes in, by central differences of the loss that dy, dhn and dcn define."""
    problem = Problem.parse(f"{cell}:T4,N3,I2,H3:f64:{options}")
    inputs = problems.draw(problem)

    def loss() -> float:
        tape = problems.tape_of(problem, inputs, "reference")
        pairs = [(tape.y, inputs.dy), (tape.hn, inputs.dhn), (tape.cn, inputs.dcn)]
        return sum(float((a * da).sum()) for a, da in pairs if a is not None)

    for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"):
        if (values := getattr(inputs, name)) is None:
            continue
        numeric, step = np.empty_like(values), 1e-5
        for index in np.ndindex(values.shape):
            kept = values[index]
            values[index] = kept + step
            up = loss()
            values[index] = kept - step
            numeric[index] = (up - loss()) / (2 * step)
            values[index] = kept
        assert close(problems.truth(problem)["d" + name], numeric, 1e-8), name


@pytest.mark.parametrize("cell", problems.TORCH)
def test_cell_equals_torch_cell(cell: str) -> None:
    """One unit; with W_ih = 1 and W_hh = 0 PyTorch's x is gx and its b_hh is gh, and so their gradients."""
    maths, rng = reference.CELLS[cell], np.random.default_rng(0)
    kind, extra = problems.TORCH[cell]
    layer = getattr(torch.nn, kind + "Cell")(maths.G, 1, dtype=torch.float64, **extra)
    for _ in range(20):
        gx, gh, (h, c, dh, dc) = rng.normal(size=maths.G), rng.normal(size=maths.G), rng.normal(size=4)
        x, prev = torch.tensor(gx[None], requires_grad=True), torch.tensor([[h], [c]], requires_grad=True)
        layer.weight_ih.data, layer.weight_hh.data = (
            torch.eye(maths.G).double(),
            torch.zeros(maths.G, 1).double(),
        )
        layer.bias_ih.data, layer.bias_hh.data = torch.zeros(maths.G).double(), torch.tensor(gh)
        layer.zero_grad()
        out = layer(x, (prev[:1], prev[1:])) if maths.has_c else (layer(x, prev[:1]),)
        sum((a * da).sum() for a, da in zip(out, (dh, dc))).backward()

        saved, next = maths.forward(gx, gh, reference.State(h, c))
        assert np.allclose(next[: len(out)], [a.item() for a in out], rtol=0, atol=1e-14)
        assert len(saved) == maths.S
        dgx, dgh, dprev = maths.backward(saved, reference.State(h, c), next, reference.State(dh, dc))
        assert np.allclose(dgx, x.grad[0], rtol=0, atol=1e-14)
        assert np.allclose(dgh, layer.bias_hh.grad, rtol=0, atol=1e-14)
        assert np.allclose(dprev[: len(out)], prev.grad[: len(out), 0], rtol=0, atol=1e-14)


def test_sigmoid_is_accurate_everywhere() -> None:
    """Also where 1 - sigmoid or exp(-a) would lose every digit or overflow."""
    a = np.array([-np.inf, -1e4, -700.0, -50.0, -1.0, -0.0, 0.0, 1.0, 50.0, 1e4, np.inf])
    exact = 1 / (1 + np.exp(-a.astype(np.longdouble)))
    got = np.array([reference.sigmoid(v) for v in a])
    assert np.all(np.abs(got - exact) <= 4e-16 * exact + 1e-320)
    assert np.isnan(reference.sigmoid(np.nan))


def test_nan_is_not_rectified_away() -> None:
    _, next = reference.RnnRelu.forward((np.nan,), (0.0,), reference.State(0.0, 0.0))
    assert np.isnan(next.h)


@pytest.mark.parametrize("reverse", ["", ",reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_past_the_end_is_read(cell: str, reverse: str) -> None:
    problem = Problem.parse(f"{cell}:T6,N5,I3,H4:f64:lengths,h0{reverse}")
    inputs = problems.draw(problem)
    past = np.arange(6)[:, None] >= inputs.lengths
    inputs.x[past] = inputs.dy[past] = np.nan
    for name, value in problems.run(problem, inputs, "reference").items():
        assert np.array_equal(value, problems.truth(problem)[name]), name
        if name in ("y", "gates", "c", "dx"):
            assert not value[past].any(), name


@pytest.mark.parametrize("cell", CELLS)
def test_only_wanted_gradients_come_back(cell: str) -> None:
    problem = Problem.parse(f"{cell}:T5,N3,I4,H6:f64:lengths,h0")
    inputs, every = problems.draw(problem), problems.truth(problem)
    names = [name for name in gw.functional.Gradients._fields if name in every]
    for wanted in [[], *([name] for name in names), names[::2], names[1::2]]:
        got = problems.run(problem, inputs, "reference", wanted=wanted)
        assert [name for name in names if name in got] == [name for name in names if name in wanted]
        assert all(np.array_equal(got[name], every[name]) for name in wanted)


def test_functional_names_on_this_backend() -> None:
    inputs = problems.draw(Problem.parse("lstm:T5,N3,I4,H6:f64:h0"))
    arguments = inputs[:7]
    y, (hn, cn) = reference.lstm(*arguments)
    tape = reference.lstm_forward(*arguments)
    assert tape.backend == "reference"
    assert all(np.array_equal(a, b) for a, b in [(y, tape.y), (hn, tape.hn), (cn, tape.cn)])
    assert reference.lstm_backward(tape, inputs.dy).dx.any()
    with pytest.raises(AttributeError, match="lstm_sideways"):
        _ = reference.lstm_sideways


def test_plain_python_gives_the_same_numbers(tmp_path: Path) -> None:
    """The file is the definition: without the compiler, its lines mean the same."""
    texts = [f"{cell}:T4,N3,I2,H3:{dtype}:lengths,reverse,h0" for cell in CELLS for dtype in ("f32", "f64")]
    script = (
        "import sys, numpy as np\n"
        "from problems import Problem, draw, run\n"
        "runs = {p: run(p, draw(p), 'reference') for p in map(Problem.parse, sys.argv[2:])}\n"
        "np.savez(sys.argv[1], **{f'{p} {name}': a for p, run in runs.items() for name, a in run.items()})\n"
    )
    path = tmp_path / "plain.npz"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(path), *texts], env=environment, check=True)
    plain = np.load(path)
    for text in texts:
        problem = Problem.parse(text)
        for name, value in problems.run(problem, problems.draw(problem), "reference").items():
            tolerance = 4 * np.finfo(value.dtype).eps
            assert close(plain[f"{problem} {name}"], value, tolerance), f"{text}: {name}"
