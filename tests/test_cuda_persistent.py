"""The persistent CUDA kernels without a GPU: a layer's whole loop in one launch of several blocks, which gives what the
stepwise kernels are held to (test_cuda_kernels.py), also where tensor cores multiply rounded numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

import gatewise as gw
import problems
from cuda_host import build
from plans import KB, MB, DeviceLimits
from plans import device as device_of
from problems import Problem
from test_cuda_host import to_bf16
from test_cuda_kernels import (
    OPTIONS,
    PTX_CELLS,
    check,
    check_batch,
    check_later,
    check_schedules,
    check_slope,
    fitting,
    library,
    ptx_library,
    run,
)

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "lstm_peephole", "lstm_coupled", "gru"]  # one product a step, and nothing else
PERSISTENT = 1  # Loop of kernels.hpp
OPERANDS = ["exact", "tf32", "bf16"]  # Operands of kernels.hpp
__all__ = ["library"]


def card(multiprocessors: int, capability: str = "8.0") -> DeviceLimits:
    """A device so small that a small layer takes all of it: each block owns several units."""
    limits = device_of(multiprocessors, 4 * MB, capability)
    limits.shared_per_block = 99 * KB
    return limits


# Weights in registers alone, and from the driver's 16 registers on in shared memory too; one tile of rows to a warp, up
# to four, and several groups of them; a batch of several tiles.
SHAPES = [("T4,N3,I7,H17", 3), ("T3,N1,I1,H5", 5), ("T4,N33,I3,H33", 4), ("T2,N2,I2,H24", 1)]
SOME = [*((shape, "h0", blocks) for shape, blocks in SHAPES)]
SOME += [
    ("T5,N4,I3,H9", options, 3) for options in OPTIONS if "project" not in options and "checkpoints" not in options
]


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_problem(library: ctypes.CDLL, cell: str, dtype: str) -> None:
    """In float32, which is the same source, and in cells that differ in no option, some of them."""
    every = dtype == "f64" and cell in ("lstm", "gru")
    for shape, options, multiprocessors in SOME if every else SOME[::4]:
        check(library, fitting(cell, dtype, shape, options), loop=PERSISTENT, device=card(multiprocessors))


def to_tf32(x: np.ndarray) -> np.ndarray:
    """The nearest float32 numbers of 11 significant bits, ties away from zero."""
    return ((x.astype(np.float32).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


ROUNDED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tf32": to_tf32,
    "bf16": lambda x: (to_bf16(x).astype(np.uint32) << 16).view(np.float32),
}


def check_rounded(library: ctypes.CDLL, cell: str, operands: str, shape: str, multiprocessors: int) -> None:
    """Tensor cores round the product's operands, once, and nothing else.

    A first step is that of a float64 reference on rounded numbers, within the bounds of float32. Later h is
    rounded as w_hh is, by up to the same share, so the reference on a rounded w_hh shows how large an error that makes:
    twice as large with both, and twice that again as one draw of roundings is not like another. Nor can it be far
    smaller.
    """
    how = {"loop": PERSISTENT, "operands": OPERANDS.index(operands), "device": card(multiprocessors)}
    step = fitting(cell, "f32", "T1" + shape[2:], "h0,infer")
    inputs = problems.draw(step)
    if cell == "gru":  # whose h0 is not in the product only
        inputs = inputs._replace(h0=ROUNDED[operands](inputs.h0))
    results = run(library, step, inputs, **how)
    inputs = inputs._replace(w_hh=ROUNDED[operands](inputs.w_hh), h0=ROUNDED[operands](inputs.h0))
    exact = problems.run(step, inputs.astype(np.float64), "reference")
    for name in ("y", "hn", "cn"):
        if name in results:
            bound = gw.check.bound(cell, "float32", (step.T, step.N, step.I, step.H), name)
            assert np.abs(results[name] - exact[name]).max() <= bound, name

    problem = fitting(cell, "f32", shape, "lengths,h0")
    inputs = problems.draw(problem)
    exact, results = problems.truth(problem), run(library, problem, inputs, **how)
    other = inputs._replace(w_hh=ROUNDED[operands](inputs.w_hh)).astype(np.float64)
    other = problems.run(problem, other, "reference")
    for names in ({"y", "hn", "cn"}, {name for name in results if name.startswith("d")}):
        caused = max(np.abs(other[name] - exact[name]).max() for name in names & results.keys())
        error = max(np.abs(results[name] - exact[name]).max() for name in names & results.keys())
        assert caused / 4 <= error <= 4 * caused, (names, caused, error)


@pytest.mark.parametrize("operands", OPERANDS[1:])
@pytest.mark.parametrize("cell", CELLS)
def test_rounded_operands(library: ctypes.CDLL, cell: str, operands: str) -> None:
    for shape, multiprocessors in [("T4,N3,I7,H17", 3), ("T3,N20,I2,H37", 4)]:
        check_rounded(library, cell, operands, shape, multiprocessors)


@pytest.mark.parametrize("operands", OPERANDS)
def test_a_nan_stays_in_its_sequence(library: ctypes.CDLL, operands: str) -> None:
    """It reaches all units through the product, rounded or not, and no other sequence, not even where a warp
    has more pieces to multiply than there are columns."""
    problem = Problem.parse("gru:T3,N3,I2,H17:f32:infer,h0")
    inputs = problems.draw(problem)
    how = {"loop": PERSISTENT, "operands": OPERANDS.index(operands), "device": card(4)}
    expected, h0 = run(library, problem, inputs, **how)["y"], inputs.h0.copy()
    for number in np.nan, np.inf:
        h0[1, 4] = number
        y = run(library, problem, inputs._replace(h0=h0), **how)["y"]
        assert np.array_equal(y[:, ::2], expected[:, ::2])
        assert np.isnan(y[:, 1]).all() if np.isnan(number) else not np.array_equal(y[:, 1], expected[:, 1])


def test_double_and_older_devices_multiply_exactly(library: ctypes.CDLL) -> None:
    for dtype, capability in ("f64", "8.0"), ("f32", "7.5"):
        how = {"loop": PERSISTENT, "operands": OPERANDS.index("bf16"), "device": card(3, capability)}
        check(library, Problem.parse(f"lstm:T4,N3,I7,H17:{dtype}:h0"), **how)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_is_the_slope_of_forward(library: ctypes.CDLL, cell: str) -> None:
    check_slope(library, cell, loop=PERSISTENT, device=card(2))


def test_same_bits_in_any_batch(library: ctypes.CDLL) -> None:
    for operands in range(3):
        check_batch(library, loop=PERSISTENT, operands=operands, device=card(3))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_same_bits_in_any_order_of_threads(library: ctypes.CDLL, cell: str) -> None:
    for operands in range(3):
        check_schedules(library, cell, loop=PERSISTENT, operands=operands, device=card(3))


@pytest.mark.parametrize("how", ["deferred", "replayed"])
def test_a_call_leaves_nothing_behind_that_is_read_later(library: ctypes.CDLL, how: str) -> None:
    check_later(library, "zoneout,h0", how, loop=PERSISTENT, device=card(3))


@pytest.mark.skipif(bool(build.missing("ptx")), reason=str(build.missing("ptx")))
@pytest.mark.parametrize("cell", [cell for cell in PTX_CELLS if cell in CELLS])
def test_what_nvcc_makes_of_the_kernels(cell: str) -> None:
    driver = ptx_library(cell)
    for shape, options, multiprocessors in SOME[:4:2] + SOME[7::5]:
        for dtype in problems.DTYPES:
            check(driver, fitting(cell, dtype, shape, options), loop=PERSISTENT, device=card(multiprocessors))
    for operands in ROUNDED:
        check_rounded(driver, cell, operands, "T4,N3,I7,H17", 3)


def test_what_cannot_be_persistent_is_said(library: ctypes.CDLL) -> None:
    for text, words in [
        ("gru_norm:T2,N2,I2,H3:f32:train", "in the middle of a step"),
        ("indrnn_relu:T2,N2,I2,H3:f32:train", "no recurrent product"),
        ("lstm:T2,N2,I2,H5:f32:project", "projection"),
    ]:
        problem = Problem.parse(text)
        with pytest.raises(RuntimeError, match=f"loop: expected .*{words}"):
            run(library, problem, problems.draw(problem), loop=PERSISTENT, device=card(3))
        check(library, problem, device=card(3))  # as planned
