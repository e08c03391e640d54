"""The checks themselves: right answers pass, and every kind of wrong one is a miss.

A check that cannot fail is worth nothing, so most of these tests plant a fault and ask that it be seen.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import gatewise as gw
from gatewise import check, functional
from gatewise.layers import Layer

# ---- gradients: a pair of functions ------------------------------------------------------------------------


def dense(params):
    return np.tanh(params["x"] @ params["w"].T + params["b"])


def d_dense(params, dy):
    da = dy * (1 - dense(params) ** 2)
    return {"x": da @ params["w"], "w": da.T @ params["x"], "b": da.sum(0)}


def dense_params(rng, rows=4, inputs=3, outputs=5):
    return {
        "x": rng.standard_normal((rows, inputs)),
        "w": rng.standard_normal((outputs, inputs)),
        "b": rng.standard_normal(outputs),
    }


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("size", [5, 60])  # 60: w and b are larger than what is checked element by element
def test_a_right_gradient_passes(rng, size):
    result = check.gradients((dense, d_dense), dense_params(rng, inputs=size, outputs=size))
    assert result and result.ok and result.worst <= result.bound
    assert list(result.errors) == ["x", "w", "b"]
    assert "MISS" not in str(result)


@pytest.mark.parametrize("size", [5, 60])
@pytest.mark.parametrize("name", ["x", "w", "b"])
def test_one_wrong_element_is_a_miss(rng, size, name):
    def wrong(params, dy):
        grads = d_dense(params, dy)
        grads[name].flat[-1] += 1e-5 * np.abs(grads[name]).max()
        return grads

    result = check.gradients((dense, wrong), dense_params(rng, inputs=size, outputs=size))
    assert not result
    assert [key for key, error in result.errors.items() if not error <= result.bound] == [name]
    assert str(result).count("MISS") == 1


def test_a_relative_fault_of_a_millionth_is_a_miss(rng):
    def wrong(params, dy):
        return {name: grad * (1 + 1e-6) for name, grad in d_dense(params, dy).items()}

    assert not any(error <= 1e-8 for error in check.gradients((dense, wrong), dense_params(rng)).errors.values())


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_misses(rng, poison):
    def wrong(params, dy):
        grads = d_dense(params, dy)
        grads["w"][0, 0] = poison
        return grads

    assert not check.gradients((dense, wrong), dense_params(rng))
    assert not check.gradients((dense, wrong), dense_params(rng, inputs=60, outputs=60))


def test_a_forward_of_nan_is_a_miss(rng):
    params = dense_params(rng)
    params["x"][0, 0] = np.nan
    assert not check.gradients((dense, d_dense), params)


def test_a_gradient_of_zeros_where_there_is_a_slope_is_a_miss(rng):
    def wrong(params, dy):
        return {name: np.zeros_like(grad) for name, grad in d_dense(params, dy).items()}

    assert not any(error <= 0.5 for error in check.gradients((dense, wrong), dense_params(rng)).errors.values())


def test_an_invented_gradient_where_there_is_no_slope_is_a_miss():
    def forward(params):
        return params["a"] * 2

    def backward(params, dy):
        return {"a": dy * 2, "unused": np.full(3, 1e-7)}

    result = check.gradients((forward, backward), {"a": np.ones(3), "unused": np.ones(3)})
    assert result.errors["a"] <= result.bound
    assert not result.errors["unused"] <= result.bound


def test_a_gradient_that_backward_leaves_out_is_a_miss(rng):
    def partial(params, dy):
        grads = d_dense(params, dy)
        del grads["b"]
        return grads

    result = check.gradients((dense, partial), dense_params(rng))
    assert not result and np.isnan(result.errors["b"])


def test_a_kink_beside_the_point_does_not_spoil_a_right_gradient():
    """|a| has slopes of ±1: at 3e-4 a step of 1e-3 reaches across the kink, shorter ones do not."""
    params = {"a": np.array([3e-4, -3e-4, 1.0])}
    assert check.gradients((lambda p: np.abs(p["a"]), lambda p, dy: {"a": dy * np.sign(p["a"])}), params)
    assert not check.gradients((lambda p: np.abs(p["a"]), lambda p, dy: {"a": dy}), params)


def test_outputs_may_be_a_dict(rng):
    def forward(params):
        return {"sum": params["a"].sum(), "square": params["a"] ** 2}

    def backward(params, d):
        return {"a": d["sum"] + 2 * params["a"] * d["square"]}

    assert check.gradients((forward, backward), {"a": rng.standard_normal(6)})


def test_strict_raises_with_the_table(rng):
    with pytest.raises(AssertionError, match=r"(?s)bound 1e-08.*\nw .* MISS"):
        check.gradients(
            (dense, lambda p, dy: {**d_dense(p, dy), "w": np.zeros_like(p["w"])}),
            dense_params(rng),
            strict=True,
        )
    check.gradients((dense, d_dense), dense_params(rng), strict=True)


def test_gradients_leaves_the_arrays_alone(rng):
    params = dense_params(rng)
    before = {name: array.copy() for name, array in params.items()}
    check.gradients((dense, d_dense), params)
    assert all(np.array_equal(params[name], before[name]) for name in params)


def test_what_cannot_be_checked_is_said(rng):
    params = dense_params(rng)
    with pytest.raises(ValueError, match=r"^b: expected a float64 array.*; got float32 \(5,\)$"):
        check.gradients((dense, d_dense), {**params, "b": params["b"].astype(np.float32)})
    with pytest.raises(ValueError, match=r"^w: expected a gradient of shape \(5, 3\); got \(3, 5\)$"):
        check.gradients((dense, lambda p, dy: {**d_dense(p, dy), "w": d_dense(p, dy)["w"].T}), params)
    with pytest.raises(ValueError, match="two answers for the same input"):
        check.gradients((lambda p: dense(p) * rng.random(), d_dense), params)
    with pytest.raises(ValueError, match="expected forward to return float64; got float32"):
        check.gradients((lambda p: dense(p).astype(np.float32), d_dense), params)


# ---- gradients: a layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", gw.cells())
def test_every_layer_passes(rng, cell):
    layer = Layer(cell, 3, 4, num_layers=2, bidirectional=True, dtype=np.float64, random_state=1)
    before = layer.state_dict()
    h = rng.standard_normal((4, 3, 4))
    state = (h, rng.standard_normal(h.shape)) if layer.has_c else h
    result = check.gradients(layer, rng.standard_normal((5, 3, 3)), state=state, lengths=np.array([2, 5, 0]))
    assert result.ok, result
    assert set(result.errors) == {*before, "x", "h0"} | ({"c0"} if layer.has_c else set())
    assert all(np.array_equal(layer.state_dict()[name], before[name]) for name in before)


def test_batch_first_and_no_state(rng):
    layer = gw.GRU(3, 4, dtype=np.float64, batch_first=True, bias=False, random_state=1)
    assert check.gradients(layer, rng.standard_normal((2, 6, 3)))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1_reverse", "bias_hh_l0_reverse", "x", "state"])
def test_a_wrong_gradient_of_a_layer_is_a_miss(rng, name):
    class Wrong(gw.GRU):
        def backward(self, *args, **kwargs):
            grads = super().backward(*args, **kwargs)
            grads[name].flat[1] *= 1.0001
            return grads

    layer = Wrong(3, 4, num_layers=2, bidirectional=True, dtype=np.float64, random_state=1)
    result = check.gradients(layer, rng.standard_normal((5, 3, 3)), state=rng.standard_normal((4, 3, 4)))
    assert [key for key, error in result.errors.items() if not error <= result.bound] == [
        "h0" if name == "state" else name
    ]


def test_dropout_is_refused(rng):
    layer = gw.LSTM(3, 4, num_layers=2, dropout=0.5, dtype=np.float64)
    with pytest.raises(ValueError, match="is dropout on"):
        check.gradients(layer, rng.standard_normal((5, 3, 3)))


def test_a_float32_layer_is_refused(rng):
    with pytest.raises(ValueError, match=r"^weight_ih_l0: expected a float64 array"):
        check.gradients(gw.LSTM(3, 4), rng.standard_normal((5, 3, 3)))


# ---- measures ----------------------------------------------------------------------------------------------


def test_relative_error():
    a = np.array([1.0, -4.0])
    assert check.relative_error(a, a) == 0.0
    assert check.relative_error(np.array([1.0, -4.4]), a) == pytest.approx(0.1)
    assert check.relative_error(np.zeros(3), np.zeros(3)) == 0.0
    assert check.relative_error(np.empty((0, 3)), np.empty((0, 3))) == 0.0
    assert check.relative_error(np.full(3, 1e-30), np.zeros(3)) == np.inf
    for got, want in [
        ([1, np.nan], a),
        (a, [1, np.nan]),
        ([np.nan, np.nan], [np.nan, np.nan]),
        ([1, np.inf], [1, np.inf]),
    ]:
        assert np.isnan(check.relative_error(np.array(got), np.array(want)))
    assert np.isnan(check.relative_error(np.zeros(2), np.zeros(3)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ulp_error(dtype):
    info = np.finfo(dtype)
    wide = np.longdouble

    def error(got, want):
        return check.ulp_error(np.array([got], dtype), np.array([want], wide))[0]

    one, eps, tiny = wide(1), wide(info.eps), wide(info.tiny)
    assert error(1, one) == 0
    assert error(1 + 3 * info.eps, one) == 3
    assert error(2 - info.eps, one * 2) == 0.5  # below a power of two numbers lie twice as close
    assert error(1, one + eps * wide(0.25)) == 0  # correctly rounded
    assert error(0, tiny / 2) == 0  # flushed
    assert error(0, tiny) > 1e6  # a normal number is not
    assert error(info.tiny, tiny * (1 + 2 * eps)) == 2
    assert error(np.inf, wide(np.inf)) == error(np.nan, wide(np.nan)) == 0
    assert error(np.inf, wide(info.max)) == np.inf
    assert error(-np.inf, wide(np.inf)) == np.inf
    for got, want in [(np.nan, one), (1, wide(np.nan)), (np.nan, wide(np.inf))]:
        assert not error(got, want) <= 1e9


# ---- the matrix --------------------------------------------------------------------------------------------


def row(option, cell="lstm", dtype="float32"):
    place = next(place for place in check.runnable() if place[0] == "cpu")
    (found,) = (row for row in check.matrix([cell], [place], [option]) if row.dtype == dtype)
    return found


def test_every_cell_backend_and_arch_passes_the_quick_matrix():
    found = list(check.matrix(options=check.QUICK))
    assert not [row for row in found if not row.ok]
    assert {row.cell for row in found} == set(gw.cells())
    assert {row.dtype for row in found} == {"float32", "float64"}
    assert {row.option for row in found} == set(check.QUICK)
    for row in found:
        assert row.share <= 1.0
        assert (row.differences is None) == (row.dtype == "float32")


def test_the_readmes_table_is_what_check_says():
    """Every mark is a feature of the cell; that its rows pass on every arch is for `gatewise check` to say."""
    ok = {"forward": 0.0, "gradient": 0.0, "worst": "", "share": 0.0, "differences": None, "problem": ""}
    rows = [
        check.Row(cell=cell, backend="cpu", dtype=dtype, option=option.name, **ok)
        for cell in gw.cells()
        for dtype in ("float32", "float64")
        for option in check.OPTIONS
        if option.feature and check.has(cell, option)
    ]
    text, _, _ = check.table(rows).partition("\n\n")
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"<!-- gatewise check --table -->\n{text}\n<!-- /gatewise check --table -->" in readme
    # and one row that fails takes its mark away
    broken = [replace(row, problem="off") if row == rows[0] else row for row in rows]
    assert check.table(broken) != check.table(rows)


@pytest.mark.parametrize("cell", gw.cells())
def test_every_feature_passes_on_this_machines_best_arch(cell):
    features = [option.name for option in check.OPTIONS if option.feature]
    place = next(place for place in check.runnable() if place[0] == "cpu")
    assert not [str(row) for row in check.matrix([cell], [place], features) if not row.ok]


@pytest.fixture
def tamper(monkeypatch):
    """Change what the cpu backend returns on its way to the check; the reference is left alone."""

    def plant(function, change):
        original = getattr(functional, function)

        def changed(*args, **kwargs):
            result = original(*args, **kwargs)
            backend = kwargs.get("backend") or args[0].backend
            return change(result, kwargs) if backend == "cpu" else result

        monkeypatch.setattr(functional, function, changed)

    return plant


def nudge(array, factor):
    """Multiply the largest element: the smallest change that the measure has to see."""
    array.flat[np.abs(array).argmax()] *= factor


@pytest.mark.parametrize("dtype, factor", [("float32", 1 + 1e-4), ("float64", 1 + 1e-12)])
@pytest.mark.parametrize("name", functional.Gradients._fields)
def test_a_nudged_gradient_is_a_miss(tamper, name, dtype, factor):
    projection = partial(row, "projection", "lstm_peephole", dtype)

    def change(grads, _):
        nudge(getattr(grads, name), factor)
        return grads

    assert projection().ok
    tamper("backward", change)
    found = projection()
    assert not found.ok and found.worst == name and found.problem.startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["y", "hn", "cn"])
def test_a_nudged_output_is_a_miss(tamper, name):
    def change(tape, _):
        nudge(getattr(tape, name), 1 + 1e-4)
        return tape

    tamper("forward", change)
    found = row("plain")
    assert not found.ok and found.problem.startswith(f"{name}: ")


def test_nan_is_a_miss(tamper):
    tamper("backward", lambda grads, _: grads._replace(dw_hh=grads.dw_hh * np.nan))
    found = row("plain")
    assert not found.ok and found.worst == "dw_hh" and np.isnan(found.gradient)


def test_a_gradient_that_is_missing_is_a_miss(tamper):
    tamper("backward", lambda grads, _: grads._replace(db_hh=None))
    assert not row("plain").ok


def test_an_exception_is_the_rows_problem(tamper):
    def change(grads, _):
        raise RuntimeError("no such kernel")

    tamper("backward", change)
    assert row("plain").problem == "RuntimeError: no such kernel"


def test_other_bits_with_other_threads_are_a_miss(tamper):
    def change(tape, kwargs):
        if kwargs["num_threads"] == 3:
            tape.y[0, 0, 0] = np.nextafter(tape.y[0, 0, 0], np.float32(9))
        return tape

    assert row("threads, order").ok
    tamper("forward", change)
    assert row("threads, order").problem.startswith("y: other bits with 3 threads")


def test_bits_that_depend_on_the_order_of_the_batch_are_a_miss(tamper):
    def change(tape, _):
        tape.hn[3, 0] = np.nextafter(tape.hn[3, 0], np.float32(9))
        return tape

    tamper("forward", change)
    assert row("threads, order").problem == "hn: other bits with the batch in another order"


def test_finite_differences_find_a_backward_that_agrees_with_a_wrong_reference(tamper, monkeypatch):
    """Both backends wrong in the same way: only the forward pass can tell."""

    def change(grads, _):
        nudge(grads.dw_ih, 1.001)
        return grads

    monkeypatch.delenv("GATEWISE_ARCH", raising=False)  # the truth then runs on the row's own arch, the best
    monkeypatch.setattr(check, "_truth", lambda case: check._run(case, "cpu"))
    tamper("backward", change)
    found = row("plain", dtype="float64")
    assert found.problem.startswith("w_ih: not the slope of forward")
    assert found.gradient == found.forward == 0.0


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.delenv("GATEWISE_ARCH", raising=False)
    row("plain")
    assert "GATEWISE_ARCH" not in os.environ
    monkeypatch.setenv("GATEWISE_ARCH", "generic")
    row("plain")
    assert os.environ["GATEWISE_ARCH"] == "generic"


def test_every_gradient_of_every_option_is_a_test(monkeypatch):
    """No option compares zeros with zeros, except where nothing runs (T = 0, N = 0)."""
    for cell, info in gw.cells().items():
        for option in (option for option in check.OPTIONS if check.has(cell, option)):
            for sizes in check.sizes_of(cell, option):
                case = check._case(cell, option, sizes, "float64")
                if 0 in sizes:
                    continue
                for name, array in check._truth(case).items():
                    assert np.abs(array).max() > 1e-4, (cell, option.name, name)
                assert info["G"] * sizes[3] == len(case.inputs.w_ih)


# ---- functions ---------------------------------------------------------------------------------------------


def test_exp_tanh_and_sigmoid_are_within_two_ulp_on_every_arch():
    found = list(check.functions())
    assert not [row for row in found if not row.ok]
    assert len(found) == 6 * len(check.running_archs())


@pytest.mark.parametrize(
    "fault",
    [
        lambda y: np.where(y == np.float32(0.5), y * (1 + 4 * np.finfo(y.dtype).eps), y),
        lambda y: np.where(np.isnan(y), 0, y),
        lambda y: np.where(np.isinf(y), np.finfo(y.dtype).max, y),
        lambda y: np.where(np.abs(y) < 1e-30, 0, y),
        lambda y: np.abs(y),
    ],
    ids=["4 ULP at a half", "NaN", "inf", "flushed too early", "sign"],
)
def test_a_wrong_function_is_a_miss(monkeypatch, fault):
    def evaluate(name, x, arch):
        with np.errstate(all="ignore"):
            return fault(check._EXACT[name](x.astype(np.longdouble)).astype(x.dtype)).astype(x.dtype)

    monkeypatch.setattr(check._core, "evaluate", evaluate)
    assert not all(row.ok for row in check.functions(["generic"]))
