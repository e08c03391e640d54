"""The Numba reference is right: against PyTorch in float64, against finite differences, every cell and option."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import gatewise as gw
import problems
from gatewise import reference
from loops import numpy_bits, numpy_kept, torch_loop
from problems import Problem

CELLS = list(reference.CELLS)
PROBLEMS = [cell for cell in CELLS if reference.CELLS[cell].U == 0]  # those that gatewise.problems draws all weights of


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


@pytest.mark.parametrize("cell", PROBLEMS)
def test_float32_is_rounded_float64(cell: str) -> None:
    for problem in problems.biting(cell, "f32"):
        problems.check(problem, problems.run(problem, problems.draw(problem), "reference"))


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

        before = gx, gh, np.zeros(0), reference.State(h, c), np.inf
        gates, next = maths.forward(*before)
        assert np.allclose(next[: len(out)], [a.item() for a in out], rtol=0, atol=1e-14)
        assert len(gates) == maths.G
        dgx, dgh, dprev, _ = maths.backward(*before, gates, next, reference.State(dh, dc))
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
    before = (np.nan,), (0.0,), (1.0,), reference.State(0.0, 0.0), np.inf
    for cell in (reference.RnnRelu, reference.IndRnnRelu):
        _, next = cell.forward(*before)
        assert np.isnan(next.h)
    assert np.isnan(reference.clipped(np.nan, 1.0))


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


# ---- Every cell with every option, against a loop written in PyTorch ---------------------------------------

T, N, I, H = 5, 4, 3, 6
LENGTHS = np.array([5, 0, 3, 4])
# name: (keywords of functional.forward, whether it is for cells with c only)
COMBINATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "lengths, reverse": ({"lengths": LENGTHS, "reverse": True}, False),
    "reset": ({"reset": True, "lengths": LENGTHS}, False),
    "reset to zero, reverse": ({"reset": True, "reset_to": "zero", "reverse": True, "lengths": LENGTHS}, False),
    "mask, zoneout": ({"h_mask": True, "zoneout_h": 0.4, "zoneout_c": 0.3, "seed": 2**63 + 11}, False),
    "zoneout's expectation": ({"zoneout_h": 0.4, "zoneout_c": 0.3, "reverse": True}, False),
    "clip": ({"cell_clip": 0.4}, True),
    "projection": ({"w_hr": True, "h_mask": True, "zoneout_h": 0.3, "seed": 5}, True),
    "packed": ({"batch_sizes": np.array([4, 4, 3, 1, 1]), "reverse": True, "reset": True, "zoneout_h": 0.5, "seed": 1},
               False),
    "batch first": ({"batch_first": True, "reset": True, "lengths": LENGTHS, "zoneout_c": 0.5, "seed": 0}, False),
    "all": ({"w_hr": True, "h_mask": True, "zoneout_h": 0.2, "zoneout_c": 0.3, "seed": 3, "cell_clip": 0.5,
             "reset": True, "lengths": LENGTHS, "reverse": True, "batch_first": True, "reset_to": "zero"}, True),
}  # fmt: skip
NAMES = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0", "w_unit", "w_hr")


RUNS = [
    (cell, name)
    for cell, maths in reference.CELLS.items()
    for name, (options, needs_c) in COMBINATIONS.items()
    if (maths.has_c or not needs_c) and not ("w_hr" in options and maths.middle != "none")
]


@dataclass
class Call:
    """A call of functional.forward on the reference: float64 arrays by name, and the other keywords."""

    cell: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]

    def forward(self, arrays: dict[str, np.ndarray], backend: str = "reference") -> gw.Tape:
        given = [arrays.get(name) for name in NAMES]
        return gw.functional.forward(
            self.cell, *given[:7], **self.options, w_unit=given[7], w_hr=given[8], backend=backend
        )

    def outputs(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tape = self.forward(arrays)
        return {name: a for name, a in (("y", tape.y), ("hn", tape.hn), ("cn", tape.cn)) if a is not None}

    def gradients(self, arrays: dict[str, np.ndarray], incoming: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tape = self.forward(arrays)
        grads = gw.functional.backward(tape, incoming["y"], incoming["hn"], incoming.get("cn"))
        return {name[1:]: grad for name, grad in grads._asdict().items() if grad is not None}


def draw_call(cell: str, combination: str) -> Call:
    rng, maths, options = np.random.default_rng(1), reference.CELLS[cell], {**COMBINATIONS[combination][0]}
    packed = "batch_sizes" in options
    leading = (int(options["batch_sizes"].sum()),) if packed else (N, T) if "batch_first" in options else (T, N)
    R, rows = 3 if options.pop("w_hr", False) else H, maths.G * H
    shapes = {
        "x": (*leading, I), "w_ih": (rows, I), "h0": (N, R),
        **({"w_hh": (rows, R)} if maths.product else {}),
        **({} if maths.normed else {"b_ih": (rows,), "b_hh": (rows,)}),
        **({"c0": (N, H)} if maths.has_c else {}),
        **({"w_unit": (maths.U * H,)} if maths.U else {}),
        **({"w_hr": (R, H)} if R != H else {}),
    }  # fmt: skip
    if not maths.has_c:
        options.pop("zoneout_c", None)
    if options.pop("h_mask", False) and maths.product:
        options["h_mask"] = rng.integers(0, 2, (N, R)) * 2.0
    if "reset" in options:
        options["reset"] = rng.random(leading) < 0.4
    return Call(cell, {name: rng.normal(size=shape) for name, shape in shapes.items()}, options)


@pytest.mark.parametrize(("cell", "combination"), RUNS)
def test_results_gradients_and_second_order_equal_torch(cell: str, combination: str) -> None:
    """To 1e-12: outputs, gradients, and the gradients of a function of the gradients."""
    call, rng = draw_call(cell, combination), np.random.default_rng(2)
    p = {name: torch.tensor(a, requires_grad=True) for name, a in call.arrays.items()}
    want = torch_loop(call.cell, call.options, p)
    incoming = {name: torch.tensor(rng.normal(size=a.shape), requires_grad=True) for name, a in want.items()}
    loss = sum((incoming[name] * a).sum() for name, a in want.items())
    grads = dict(zip(p, torch.autograd.grad(loss, list(p.values()), create_graph=True)))
    along = {name: rng.normal(size=a.shape) for name, a in call.arrays.items()}
    slope = sum((grads[name] * torch.tensor(a)).sum() for name, a in along.items())
    second = torch.autograd.grad(slope, [*incoming.values(), *p.values()], allow_unused=True)

    tape, numbers = call.forward(call.arrays), {name: a.detach().numpy() for name, a in incoming.items()}
    for name, a in want.items():
        assert close(getattr(tape, name), a.detach().numpy(), 1e-12), name
    ours = gw.functional.backward(tape, numbers["y"], numbers["hn"], numbers.get("cn"))._asdict()
    assert {name for name, a in ours.items() if a is not None} == {"d" + name for name in p}
    for name, a in grads.items():
        assert close(ours["d" + name], a.detach().numpy(), 1e-12), f"d{name}"
    ours = gw.functional.double_backward(
        tape, numbers["y"], numbers["hn"], numbers.get("cn"), **{"dd" + name: a for name, a in along.items()}
    )._asdict()
    names = ["dd" + name for name in incoming] + ["d" + name for name in p]
    assert {name for name, a in ours.items() if a is not None} == {*names}
    for name, a in zip(names, second):
        got = ours[name]
        assert close(got, np.zeros_like(got) if a is None else a.numpy(), 1e-12), f"second order: {name}"


@pytest.mark.parametrize(("cell", "combination"), RUNS)
def test_gradients_of_every_option_equal_finite_differences(cell: str, combination: str) -> None:
    call = draw_call(cell, combination)
    assert gw.check.gradients((call.outputs, call.gradients), call.arrays, strict=True, directions=2)


@pytest.mark.parametrize("cell", CELLS)
def test_second_order_equals_differences_of_the_gradient(cell: str) -> None:
    """The Hessian's product with a direction is the gradient's slope along it."""
    call, rng, step = draw_call(cell, "mask, zoneout"), np.random.default_rng(4), 3e-4
    along = {name: rng.normal(size=a.shape) / np.sqrt(a.size) for name, a in call.arrays.items()}
    incoming = {name: rng.normal(size=a.shape) for name, a in call.outputs(call.arrays).items()}
    second = gw.functional.double_backward(
        call.forward(call.arrays), incoming["y"], incoming["hn"], incoming.get("cn"),
        **{"dd" + name: a for name, a in along.items()},
    )  # fmt: skip
    points = [{name: a + k * step * along[name] for name, a in call.arrays.items()} for k in (-2, -1, 1, 2)]
    for prefix, run in (("dd", call.outputs), ("d", lambda arrays: call.gradients(arrays, incoming))):
        far_below, below, above, far_above = map(run, points)
        for name in above:
            numeric = (8 * (above[name] - below[name]) - (far_above[name] - far_below[name])) / (12 * step)
            assert close(getattr(second, prefix + name), numeric, 1e-9), name


def test_second_order_takes_any_tape_and_says_what_does_not_fit() -> None:
    call = draw_call("lstm", "plain")
    tapes = [call.forward(call.arrays, backend) for backend in ("reference", "cpu")]
    dd = np.ones_like(call.arrays["w_hh"])
    one, other = (gw.functional.double_backward(tape, tapes[0].y, ddw_hh=dd) for tape in tapes)
    assert all(np.array_equal(a, b) for a, b in zip(one, other) if a is not None or b is not None)
    for bad, word in [
        ({"ddw_hh": dd[:-1]}, "ddw_hh: expected .* got float64"),
        ({"ddx": 3}, "ddx: .* got int"),
        ({"ddw_hr": dd}, "ddw_hr: expected None"),
    ]:
        with pytest.raises(ValueError, match=word):
            gw.functional.double_backward(tapes[0], tapes[0].y, **bad)
    with pytest.raises(ValueError, match="tape: expected"):
        gw.functional.double_backward(dd)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[7, 7, 7, 7], [7, 2, 1, 5]])
def test_projection_equals_torch(lengths: list[int], reverse: bool) -> None:
    """torch.nn.LSTM(proj_size=3), its backward direction for `reverse`, packed."""
    rng, rows = np.random.default_rng(6), 4 * H
    order = np.sort(lengths)[::-1].copy()
    layer = torch.nn.LSTM(I, H, proj_size=3, bidirectional=True, dtype=torch.float64)
    end = "_l0_reverse" if reverse else "_l0"
    weights = [getattr(layer, kind + end) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")]
    w_ih, w_hh, b_ih, b_hh, w_hr = (w.detach().numpy() for w in weights)
    assert w_hh.shape == (rows, 3)
    x = torch.tensor(rng.normal(size=(7, 4, I)), requires_grad=True)
    h, c = (torch.tensor(rng.normal(size=(2, 4, width)), requires_grad=True) for width in (3, H))
    packed = pack_padded_sequence(x, order)
    y, (hn, cn) = layer(packed, (h, c))
    side = slice(3, 6) if reverse else slice(0, 3)
    want = [y.data[:, side], hn[int(reverse)], cn[int(reverse)]]
    incoming = [rng.normal(size=a.shape) for a in want]
    grads = torch.autograd.grad(
        sum((a * torch.tensor(da)).sum() for a, da in zip(want, incoming)), [packed.data, h, c, *weights]
    )
    tape = gw.lstm_forward(
        packed.data.detach().numpy(), w_ih, w_hh, b_ih, b_hh, h[int(reverse)].detach().numpy(),
        c[int(reverse)].detach().numpy(), w_hr=w_hr, batch_sizes=packed.batch_sizes.numpy(), reverse=reverse,
        backend="reference",
    )  # fmt: skip
    for got, a in zip((tape.y, tape.hn, tape.cn), want):
        assert close(got, a.detach().numpy(), 1e-12)
    ours = gw.lstm_backward(tape, *incoming)
    names = ("dx", "dh0", "dc0", "dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr")
    for name, a in zip(names, grads):
        a = a[int(reverse)] if name in ("dh0", "dc0") else a
        assert close(getattr(ours, name), a.numpy(), 1e-12), name
    assert tape.gates.shape == (order.sum(), 4, H) and tape.c.shape == (order.sum(), H)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_reset_is_to_run_the_segments_apart(cell: str, reverse: bool) -> None:
    """One row cut at steps 2 and 3 is three rows: same states, same gradients, and dh0 is the sum of theirs."""
    call = draw_call(cell, "plain")
    arrays = {**call.arrays, "x": call.arrays["x"][:, :1].copy(), "h0": call.arrays["h0"][:1]}
    if "c0" in arrays:
        arrays["c0"] = arrays["c0"][:1]
    reset = np.array([[False], [False], [True], [True], [False]])
    dy = np.random.default_rng(0).normal(size=(T, 1, H))
    whole = Call(cell, arrays, {"reset": reset, "reverse": reverse}).forward(arrays)
    grads = gw.functional.backward(whole, dy)
    parts = [
        Call(cell, arrays, {"reverse": reverse}).forward({**arrays, "x": arrays["x"][part].copy()})
        for part in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    apart = [gw.functional.backward(tape, d.copy()) for tape, d in zip(parts, np.split(dy, [2, 3]))]
    assert np.array_equal(whole.y, np.concatenate([tape.y for tape in parts]))
    assert np.array_equal(whole.hn, parts[0 if reverse else 2].hn)
    assert np.array_equal(grads.dx, np.concatenate([part.dx for part in apart]))
    for name in gw.Gradients._fields[1:]:
        if getattr(grads, name) is not None:
            assert close(sum(getattr(part, name) for part in apart), getattr(grads, name), 1e-13), name


@pytest.mark.parametrize("cell", CELLS)
def test_reset_at_the_beginning(cell: str) -> None:
    """Forward it drops the initial state if it is to be zero; in reverse nothing comes before it."""
    call = draw_call(cell, "plain")
    first = np.zeros((T, N), bool)
    first[0] = True
    nothing = {name: a for name, a in call.arrays.items() if name not in ("h0", "c0")}
    run = Call(cell, call.arrays, {"reset": first, "reset_to": "zero"})
    assert np.array_equal(run.forward(call.arrays).y, call.forward(nothing).y)
    assert not gw.functional.backward(run.forward(call.arrays), np.ones((T, N, H))).dh0.any()
    plain, other = (
        Call(cell, call.arrays, {"reverse": True, **more}).forward(call.arrays).y
        for more in ({}, {"reset": first, "reset_to": "zero"})
    )
    assert np.array_equal(plain, other)


@pytest.mark.parametrize("cell", CELLS)
def test_state_passes_from_call_to_call(cell: str) -> None:
    """run(T) is run(2) and then, from its final state, run(T - 2); backward the same in the other order."""
    call, rng = draw_call(cell, "plain"), np.random.default_rng(0)
    dy = rng.normal(size=(T, N, H))
    whole = call.forward(call.arrays)
    first = call.forward({**call.arrays, "x": call.arrays["x"][:2]})
    ends = {"h0": first.hn} if first.cn is None else {"h0": first.hn, "c0": first.cn}
    then = call.forward({**call.arrays, "x": call.arrays["x"][2:], **ends})
    assert np.array_equal(whole.y, np.concatenate([first.y, then.y])) and np.array_equal(whole.hn, then.hn)
    every, late = gw.functional.backward(whole, dy), gw.functional.backward(then, dy[2:])
    early = gw.functional.backward(first, dy[:2], late.dh0, late.dc0)
    assert np.array_equal(every.dx, np.concatenate([early.dx, late.dx])) and np.array_equal(every.dh0, early.dh0)
    assert close(early.dw_ih + late.dw_ih, every.dw_ih, 1e-13)


@pytest.mark.parametrize(("cell", "combination"), [run for run in RUNS if "lengths" in COMBINATIONS[run[1]][0]])
def test_nothing_past_the_end_is_read(cell: str, combination: str) -> None:
    call, rng = draw_call(cell, combination), np.random.default_rng(0)
    dy = rng.normal(size=call.forward(call.arrays).y.shape)
    past = np.arange(T)[:, None] >= LENGTHS
    past = past.T if "batch_first" in call.options else past
    other = Call(cell, {**call.arrays, "x": call.arrays["x"].copy()}, {**call.options})
    other.arrays["x"][past] = np.nan
    if "reset" in call.options:
        other.options["reset"] = call.options["reset"] ^ past
    tapes = [call.forward(call.arrays), other.forward(other.arrays)]
    grads = [
        gw.functional.backward(tape, np.where(past[..., None], fill, dy)) for tape, fill in zip(tapes, (0, np.nan))
    ]
    results = [
        {**grad._asdict(), **{name: getattr(tape, name) for name in ("y", "hn", "cn", "gates", "c")}}
        for tape, grad in zip(tapes, grads)
    ]
    for name, value in results[0].items():
        assert np.array_equal(value, results[1][name]) or value is None, name
        if value is not None and name in ("y", "gates", "c", "dx"):
            assert not value[past].any(), name


@pytest.mark.parametrize("cell", CELLS)
def test_only_wanted_gradients_come_back(cell: str) -> None:
    call = draw_call(cell, "plain")
    tape, dy = call.forward(call.arrays), np.ones((T, N, H))
    every = {name: a for name, a in gw.functional.backward(tape, dy)._asdict().items() if a is not None}
    names = [*every]
    for wanted in [[], *([name] for name in names), names[::2], names[1::2]]:
        got = gw.functional.backward(tape, dy, wanted=wanted)._asdict()
        assert [name for name in got if got[name] is not None] == [name for name in names if name in wanted]
        assert all(np.array_equal(got[name], every[name]) for name in wanted)


def test_plain_python_gives_the_same_numbers(tmp_path: Path) -> None:
    """The file is the definition: without the compiler, its lines mean the same."""
    runs = [(cell, name) for cell in CELLS for name in ("mask, zoneout", "all") if (cell, name) in RUNS]
    script = (
        "import sys, numpy as np\n"
        "from test_reference import results_of\n"
        "runs = {f'{cell} {name}': results_of(cell, name) for cell, name in eval(sys.argv[2])}\n"
        "np.savez(sys.argv[1], **{f'{run} {key}': a for run, results in runs.items() for key, a in results.items()})\n"
    )
    path = tmp_path / "plain.npz"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(path), repr(runs)], env=environment, check=True)
    plain = np.load(path)
    for cell, name in runs:
        for key, value in results_of(cell, name).items():
            assert close(plain[f"{cell} {name} {key}"], value, 1e-13), f"{cell}, {name}: {key}"


def results_of(cell: str, combination: str) -> dict[str, np.ndarray]:
    """Outputs, gradients and second order of a run."""
    call = draw_call(cell, combination)
    outputs = call.outputs(call.arrays)
    incoming = {name: np.ones_like(a) for name, a in outputs.items()}
    second = gw.functional.double_backward(call.forward(call.arrays), incoming["y"], ddw_ih=call.arrays["w_ih"])
    grads = {"d" + name: a for name, a in call.gradients(call.arrays, incoming).items()}
    return {**outputs, **grads, **{f"second {name}": a for name, a in second._asdict().items() if a is not None}}


# ---- Random bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 + 12345, 2**64 - 1])
def test_random_bits_are_their_definition(seed: int) -> None:
    key = reference.random_key
    got = [
        [[reference.random_bits(np.uint64(key(np.uint64(seed), t, n)), j) for j in range(5)] for n in range(3)]
        for t in range(4)
    ]
    assert np.array_equal(np.array(got, np.uint32), numpy_bits(seed, 4, 3, 5))


@pytest.mark.parametrize("p", [0.0, 0.1, 1 / 3, 0.5, 1 - 2.0**-31])
def test_a_probability_is_cut_exactly(p: float) -> None:
    """A share floor(p 2^31) / 2^31 of all bits, the lowest of which does not count."""
    limit = int(np.floor(p * 2.0**31))
    assert not reference.happens(np.uint64(2 * limit), p)
    assert limit == 0 or reference.happens(np.uint64(2 * limit - 1), p)


def test_random_bits_look_random() -> None:
    """Shares, bits and correlations as those of coins: the seeds are fixed, so 5 standard deviations mean a fault."""
    shape = (64, 32, 96)
    count = np.prod(shape)
    bits = numpy_bits(7, *shape)
    share = np.array([((bits >> np.uint32(b)) & np.uint32(1)).mean() for b in range(32)])
    assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(count)
    for p in (0.05, 0.3, 0.9):
        kept = numpy_kept(7, shape, p)
        assert abs(kept.mean() - p) < 5 * np.sqrt(p * (1 - p) / count)
        others = {
            "step": (kept[1:], kept[:-1]),
            "row": (kept[:, 1:], kept[:, :-1]),
            "unit": (kept[..., 1:], kept[..., :-1]),
            "step and row": (kept[1:, :-1], kept[:-1, 1:]),
            "row and unit": (kept[:, 1:, :-1], kept[:, :-1, 1:]),
            "h and c": (kept, numpy_kept(7, shape, p, of_c=True)),
            "seed": (kept, numpy_kept(8, shape, p)),
        }
        for name, (a, b) in others.items():  # the sample correlation of n independent pairs has deviation 1/sqrt(n)
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size), name
        for axis in range(3):  # means along an axis scatter as those of coins do: no step, row or unit is special
            means = kept.mean(axis=axis)
            variance = p * (1 - p) / shape[axis]  # its estimate from M numbers, a little heavier than normal, has ...
            deviation = variance * np.sqrt(3 / means.size)  # ... a deviation of at most this
            assert abs(((means - p) ** 2).mean() - variance) < 5 * deviation, axis


# ---- Functions around it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_arrays_are_storage(dtype: str, backend: str) -> None:
    """What comes out is the float32 run on the widened numbers, rounded; each gradient is like its array."""
    half = np.dtype(np.float16) if dtype == "float16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    call = draw_call("lstm_peephole", "reset")
    stored = {name: a.astype(np.float32 if name in ("b_hh", "c0") else half) for name, a in call.arrays.items()}
    wide = {name: a.astype(np.float32) for name, a in stored.items()}
    dy = np.ones((T, N, H), half)
    tape, exact = call.forward(stored, backend), call.forward(wide, backend)
    for name in ("y", "hn", "cn"):
        got = getattr(tape, name)
        assert got.dtype == half and np.array_equal(got, getattr(exact, name).astype(half)), name
    assert np.array_equal(tape.gates, exact.gates) and np.array_equal(tape.c, exact.c)
    widened = sum(a.nbytes for a in wide.values()) - sum(wide[name].nbytes for name in ("b_hh", "c0"))
    assert tape.nbytes == exact.nbytes + exact.y.nbytes + widened
    grads = gw.functional.backward(tape, dy)
    along = {"ddx": dy[..., :I].copy()}
    second, exact_second = (
        gw.functional.double_backward(tape, dy, **along),
        gw.functional.double_backward(exact, dy.astype(np.float32), ddx=along["ddx"].astype(np.float32)),
    )
    for results, wanted in [(grads, gw.functional.backward(exact, dy.astype(np.float32))), (second, exact_second)]:
        for name, a in results._asdict().items():
            if a is not None:
                like = stored[name[1:]].dtype if name[1:] in stored else half
                assert a.dtype == like and np.array_equal(a, getattr(wanted, name).astype(like)), name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("combination", ["packed", "batch first", "reset"])
def test_gates_and_c_lie_as_y_does(combination: str, backend: str) -> None:
    call = draw_call("lstm", combination)
    tape = call.forward(call.arrays, backend)
    assert tape.gates.shape == (*tape.y.shape[:-1], 4, H) and tape.c.shape == tape.y.shape
    if combination == "reset":  # without zoneout, h is made of them
        assert close(tape.gates[..., 3, :] * np.tanh(tape.c), tape.y, 1e-13)
    exact = call.forward(call.arrays)
    assert close(tape.gates, exact.gates, 1e-13) and close(tape.c, exact.c, 1e-13)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_a_tape_did_not_keep(backend: str) -> None:
    call = draw_call("lstm", "plain")
    for save, kept in [("states", {"c"}), ("checkpoints", set())]:
        tape = Call("lstm", call.arrays, {"save": save}).forward(call.arrays, backend)
        for name in ("gates", "c"):
            if name in kept:
                assert np.array_equal(tape.c, call.forward(call.arrays, backend).c)
                continue
            enough = "all" if name == "gates" else "states"
            with pytest.raises(ValueError, match=f"save='{save}'; .* save='{enough}'"):
                getattr(tape, name)
        grads = gw.functional.backward(tape, np.ones((T, N, H)))
        want = gw.functional.backward(call.forward(call.arrays, backend), np.ones((T, N, H)))
        for field, a, b in zip(gw.Gradients._fields, grads, want):
            if b is not None:  # sums over steps come in other pieces from checkpoints
                assert np.array_equal(a, b) if save == "states" or field == "dx" else close(a, b, 1e-14), field


def test_options_that_there_are_not() -> None:
    call = draw_call("lstm", "plain")
    given = [call.arrays[name] for name in NAMES[:7]]
    for function in (gw.lstm, gw.lstm_forward):
        with pytest.raises(TypeError, match="lenghts: no such option"):
            function(*given, lenghts=LENGTHS)
        with pytest.raises(ValueError, match=r"cell: expected one of lstm, .*lstm_norm.*got 'gru'"):
            function(*given, cell="gru")
