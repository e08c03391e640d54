"""The CUDA kernels without a GPU: the source that ships, run by the tests' host runtime (tests/cuda_host), gives the
reference's results on every kind of problem, and its float64 backward is the slope of its own forward.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gatewise as gw
import problems
from cuda_host import build
from gatewise.problems import gradients_of
from plans import DeviceLimits
from problems import Inputs, Problem

CELLS = list(problems.GATES)
GIVEN = ["x", "w_ih", "w_hh", "b_ih", "b_hh", "w_unit", "w_hr", "h0", "c0", "h_mask", "dy", "dhn", "dcn"]
RESULTS = ["y", "hn", "cn", "dx", "dh0", "dc0", "dw_ih", "dw_hh", "db_ih", "db_hh", "dw_unit", "dw_hr"]
Results = dict[str, np.ndarray]


class Call(ctypes.Structure):
    """`Call` of layer_driver.cu, member by member."""

    _fields_ = (
        [("cell", ctypes.c_char_p)]
        + [(name, ctypes.c_int64) for name in ("is_double", "T", "N", "I", "H", "R", "G", "U", "rows")]
        + [(name, ctypes.c_void_p) for name in (*GIVEN, "lengths", "reset")]
        + [(name, ctypes.c_int64) for name in ("x_size", "x_start", "step_stride", "sequence_stride")]
        + [(name, ctypes.c_int64) for name in ("reverse", "layout", "reset_to_zero", "drawn", "save", "trains")]
        + [("loop", ctypes.c_int64), ("operands", ctypes.c_int64), ("device", DeviceLimits)]
        + [(name, ctypes.c_double) for name in ("zoneout_h", "zoneout_c", "cell_clip")]
        + [("seed", ctypes.c_uint64)]
        + [(name, ctypes.c_void_p) for name in RESULTS]
    )


class ProductCall(ctypes.Structure):
    """`ProductCall` of layer_driver.cu, member by member."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("is_double", "tile", "a_by_k", "b_by_k", "M", "N", "K", "parts", "add")]
        + [(name, ctypes.c_int64) for name in ("turn", "a_size", "b_size", "c_size")]
        + [(name, ctypes.c_void_p) for name in ("a", "b", "bias", "a_at", "c_at", "c")]
    )


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The kernels and their driver as the host compiler builds them."""
    if reason := build.missing():
        pytest.skip(reason)
    return ctypes.CDLL(str(build.build(build.HERE / "layer_driver.cu")))


def called(function: Any, call: ctypes.Structure | None, arrays: dict[str, np.ndarray]) -> None:
    """Lends the arrays to a function of the driver; its sentence, if it fails, is a RuntimeError."""
    for name, array in arrays.items():
        setattr(call, name, array.ctypes.data)
    message = ctypes.create_string_buffer(1000)
    if function(*([ctypes.byref(call)] if call else []), message, ctypes.c_size_t(1000)):
        raise RuntimeError(message.value.decode())


def span(x: np.ndarray) -> tuple[np.ndarray, int]:
    """The memory that a view covers, and where in it the view starts, in elements."""
    base = x if x.base is None or x.flags.c_contiguous else x.base
    start = (x.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // x.itemsize
    return np.ascontiguousarray(base), start


def run(library: ctypes.CDLL, problem: Problem, inputs: Inputs, **execution: Any) -> Results:
    """What the CUDA kernels make of a problem: outputs, and the gradients that the reference has.

    execution: members of the call that say how; without them there is no device to plan for, hence no persistent loop.
    """
    facts, has = gw.cells()[problem.cell], problem.options.__contains__
    options = problems.options_of(problem, inputs)
    layout = 2 if has("packed") else 1 if has("batch") else 0
    dtype, x = inputs.x.dtype, inputs.x
    N, T, I, H, R, G = problem.N, problem.T, problem.I, problem.H, problem.R, facts["G"]
    lengths = inputs.lengths
    if inputs.batch_sizes is not None:
        T = len(inputs.batch_sizes)
        N = int(inputs.batch_sizes[0]) if T else 0
        lengths = (inputs.batch_sizes[:, None] > np.arange(N)).sum(0)
    strides = [stride // x.itemsize for stride in x.strides[:-1]]
    step, sequence = (strides[0], 0) if layout == 2 else (strides[1], strides[0]) if layout == 1 else strides
    memory, start = span(x)

    alive: dict[str, np.ndarray] = {"x": memory}
    alive |= {name: np.ascontiguousarray(a) for name in GIVEN[1:] if (a := getattr(inputs, name)) is not None}
    if lengths is not None:
        alive["lengths"] = np.ascontiguousarray(lengths, np.int64)
    if inputs.reset is not None:
        alive["reset"] = np.ascontiguousarray(inputs.reset, np.uint8)
    results = {"y": np.full(inputs.dy.shape, np.nan, dtype), "hn": np.full((N, R), np.nan, dtype)}
    if facts["has_c"]:
        results["cn"] = np.full((N, H), np.nan, dtype)
    # As the reference has them: of states and biases too where none are given
    shapes = {name: (N, R if name == "dh0" else H) for name in ("dh0", "dc0")[: 1 + facts["has_c"]]}
    shapes |= {} if facts["normed"] else {"db_ih": (G * H,), "db_hh": (G * H,)}
    shapes |= {name: getattr(inputs, name[1:]).shape for name in gradients_of(problem)}
    for name, shape in shapes.items() if problem.trains else ():
        results[name] = np.full(shape, np.nan if name in ("dx", "dh0", "dc0") else 0, dtype)  # others are added to

    call = Call(
        cell=problem.cell.encode(), is_double=dtype == np.float64, T=T, N=N, I=I, H=H, R=R, G=G, U=facts["U"],
        rows=len(inputs.dy) if layout == 2 else T * N, x_size=memory.size, x_start=start, step_stride=step,
        sequence_stride=sequence, reverse=has("reverse"), layout=layout, reset_to_zero=has("reset0"),
        drawn=has("zoneout"), save=1 if has("states") else 2 if has("checkpoints") else 0, trains=problem.trains,
        zoneout_h=options.get("zoneout_h", 0), zoneout_c=options.get("zoneout_c", 0),
        cell_clip=options.get("cell_clip", np.inf), seed=options.get("seed", 0), **execution,
    )  # fmt: skip
    called(library.gatewise_run_layer, call, alive | results)
    return results


def check(library: ctypes.CDLL, problem: Problem, **execution: Any) -> None:
    results, exact = run(library, problem, problems.draw(problem), **execution), problems.truth(problem)
    own = {
        name: exact[name].astype(results["y"].dtype) for name in ("gates", "c") if name in exact
    }  # of the CPU's tape
    problems.check(problem, results | own)


def fitting(cell: str, dtype: str, shape: str, options: str) -> Problem:
    """A problem with those of the options that the cell has."""
    own = [option for option in options.split(",") if problems.fits(cell, [option])]
    return Problem.parse(f"{cell}:{shape}:{dtype}:{','.join(own) or 'train'}")


TILES = ["large", "small", "tiny"]
PRODUCTS = [(False, False), (False, True), (True, True)]  # A B^T, A B, A^T B


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_products(library: ctypes.CDLL, tile: str, dtype: str) -> None:
    """Every tile, over its edges; rows named by an array and rotated ones; several parts; nothing else is written."""
    rng, real = np.random.default_rng(0), problems.DTYPES[dtype]
    sizes = {
        "large": [(129, 65, 35), (5, 70, 16)],
        "small": [(33, 31, 47), (64, 32, 1)],
        "tiny": [(9, 5, 13), (1, 1, 1)],
    }
    for (M, N, K), (a_by_k, b_by_k), parts in itertools.product(sizes[tile], PRODUCTS, (1, 3)):
        a, b = rng.standard_normal((K, M) if a_by_k else (M + 2, K)), rng.standard_normal((K, N) if b_by_k else (N, K))
        a, b, bias = a.astype(real), b.astype(real), rng.standard_normal(N).astype(real)
        rows, turn = K if a_by_k else M, len(b) // 2
        a_at, c_at = rng.permutation(len(a))[:rows], rng.permutation(M + 3)[:M]
        c = rng.standard_normal((M + 3, N)).astype(real)
        adds, biased = parts > 1 or a_by_k, parts == 1
        left, right = a[a_at].astype(np.float64), np.roll(b, -turn, 0).astype(np.float64)
        exact = (left.T if a_by_k else left) @ (right if b_by_k else right.T) + biased * bias
        expected = c.astype(np.float64)
        expected[c_at] = exact + adds * expected[c_at]
        call = ProductCall(
            is_double=dtype == "f64", tile=TILES.index(tile), a_by_k=a_by_k, b_by_k=b_by_k, M=M, N=N, K=K,
            parts=parts, add=adds, turn=turn, a_size=a.size, b_size=b.size, c_size=c.size,
        )  # fmt: skip
        lent = {"a": a, "b": b, "a_at": a_at, "c_at": c_at, "c": c} | ({"bias": bias} if biased else {})
        called(library.gatewise_run_product, call, lent)
        untouched = np.setdiff1d(np.arange(M + 3), c_at)
        assert np.array_equal(c[untouched], expected[untouched].astype(real))
        bound = 4 * np.sqrt(K + 1) * np.finfo(real).eps * np.abs(expected).max()
        assert np.abs(c - expected).max() <= bound, (M, N, K, a_by_k, b_by_k, parts)


def check_16_bits(library: ctypes.CDLL) -> None:
    """Numbers of 16 bits to floats and back, bit by bit: all of them, what lies between and just beside the middle, and
    beyond their ends; in an odd number, of which nothing is left out. NaN stays one, of whatever bits."""

    def convert(dtype: type, numbers: np.ndarray, to: np.ndarray) -> np.ndarray:
        pointers = [ctypes.c_void_p(numbers.ctypes.data), ctypes.c_int64(numbers.size), ctypes.c_void_p(to.ctypes.data)]
        assert library.gatewise_convert(dtype is ml_dtypes.bfloat16, to.dtype == np.float32, *pointers) == 0
        return to

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        bits = np.uint32 if a.dtype == np.float32 else np.uint16
        nan = np.isnan(b.astype(np.float32))
        return np.array_equal(np.isnan(a.astype(np.float32)), nan) and np.array_equal(
            a[~nan].view(bits), b[~nan].view(bits)
        )

    for dtype in (np.float16, ml_dtypes.bfloat16):
        all_of_them = np.arange(65536, dtype=np.uint16).view(dtype)[:65535]
        wide = convert(dtype, all_of_them, np.full(65535, np.nan, np.float32))
        with np.errstate(over="ignore", invalid="ignore"):
            assert same(wide, all_of_them.astype(np.float32))
            middle = wide + (np.spacing(wide.astype(dtype)).astype(np.float32)) / 2
            beside = [np.nextafter(middle, np.float32(side)) for side in (np.inf, -np.inf)]
            ends = np.array([np.finfo(np.float32).max, -np.inf, np.nan, 1e-45, -1e-45, 65519.996, 65520], np.float32)
            numbers = np.concatenate([wide, middle, *beside, ends])
            assert same(convert(dtype, numbers, np.zeros(numbers.size, dtype)), numbers.astype(dtype)), dtype


def test_numbers_of_16_bits(library: ctypes.CDLL) -> None:
    check_16_bits(library)


# Tiles are 32 rows by 32 columns; a step's product has several parts from K = 256 on.
SHAPES = ["T4,N3,I7,H17", "T1,N1,I1,H5", "T4,N33,I3,H33"]
OPTIONS = [
    *("train", "nobias", "h0,reverse", "lengths,h0", "lengths,reverse", "empty,h0", "infer,lengths,h0"),
    *("reset,h0", "reset,reverse,lengths", "reset0,h0", "reset0,reverse,lengths,h0"),
    *("mask,h0", "mask,reset,lengths", "zoneout,h0,lengths,reverse", "expected,h0", "clip,h0", "infer,zoneout,reset"),
    *("project,h0", "project,mask,reset,lengths", "project,zoneout,reverse,h0", "infer,project,lengths"),
    *("batch,lengths,h0", "packed,reverse,h0", "packed,reset", "strided,batch,reverse", "strided"),
    *("states,lengths,h0", "checkpoints,reset,reverse,h0", "states,zoneout,mask,project", "checkpoints,project,packed"),
]
SOME = [*(f"{shape}:h0" for shape in SHAPES), *(f"T5,N4,I3,H9:{options}" for options in OPTIONS)]
SOME += [f"{shape}:lengths,h0" for shape in ("T0,N3,I2,H4", "T3,N0,I2,H4")]


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_problem(library: ctypes.CDLL, cell: str, dtype: str) -> None:
    """In float32, which is the same source, some of them."""
    for text in SOME if dtype == "f64" else SOME[::3]:
        check(library, fitting(cell, dtype, *text.split(":")))


# Cells that run as nvcc's PTX. To compile one takes a minute or more; with GATEWISE_PTX=all they all do.
PTX_CELLS = CELLS if os.environ.get("GATEWISE_PTX") == "all" else ["lstm"]


def ptx_library(cell: str) -> ctypes.CDLL:
    """nvcc's PTX of a cell's layer, in place of the source; every access to memory is checked."""
    name = "".join(word.capitalize() for word in cell.replace("indrnn", "ind_rnn").split("_"))  # in cells.hpp
    driver = build.build(build.HERE / "layer_driver.cu", mode="ptx", defines=[f"-DGATEWISE_CELLS={name}"])
    return ctypes.CDLL(str(driver))


@pytest.mark.skipif(bool(build.missing("ptx")), reason=str(build.missing("ptx")))
@pytest.mark.parametrize("cell", PTX_CELLS)
def test_what_nvcc_makes_of_the_kernels(cell: str) -> None:
    library = ptx_library(cell)
    check_16_bits(library)
    for shape in SHAPES:
        check(library, fitting(cell, "f32", shape, "h0"))
    for options in OPTIONS:
        check(library, fitting(cell, "f64", "T5,N4,I3,H9", options))


@pytest.mark.parametrize(("cell", "options"), [("gru", "h0"), ("gru_norm", "h0"), ("lstm", "project,h0")])
def test_long_sums_in_parts(library: ctypes.CDLL, cell: str, options: str) -> None:
    """K beyond the least part: products of a step and gradients of weights are sums of several parts, and of chunks."""
    check(library, Problem.parse(f"{cell}:T2,N2,I3,H260:f64:{options}"))
    check(library, Problem.parse(f"{cell}:T150,N4,I2,H8:f64:{options}"))


def slope(f: Callable[[np.ndarray], float], at: np.ndarray, along: np.ndarray, step: float = 1e-5) -> float:
    return (f(at + step * along) - f(at - step * along)) / (2 * step)


def check_slope(library: ctypes.CDLL, cell: str, **execution: Any) -> None:
    """Finite differences of the float64 forward, along a random direction in every argument at a time."""
    problem = Problem.parse(f"{cell}:T3,N2,I2,H8:f64:lengths,h0")
    inputs = problems.draw(problem)
    results = run(library, problem, inputs, **execution)
    infer = Problem.parse(f"{cell}:T3,N2,I2,H8:f64:infer,lengths,h0")
    rng = np.random.default_rng(0)

    def loss(given: Inputs) -> float:
        out = run(library, infer, given, **execution)
        pairs = [(out["y"], inputs.dy), (out["hn"], inputs.dhn), (out.get("cn"), inputs.dcn)]
        return sum(float(np.sum(a * da)) for a, da in pairs if a is not None and da is not None)

    for name in gradients_of(problem):
        argument: Any = getattr(inputs, name[1:])
        along = rng.standard_normal(argument.shape)

        def at(value: np.ndarray, name: str = name) -> float:
            return loss(inputs._replace(**{name[1:]: value}))

        expected = slope(at, argument, along)
        assert abs(expected - np.sum(results[name] * along)) <= 1e-7 * (1 + abs(expected)), name


@pytest.mark.parametrize("cell", CELLS)
def test_backward_is_the_slope_of_forward(library: ctypes.CDLL, cell: str) -> None:
    check_slope(library, cell)


def check_batch(library: ctypes.CDLL, **execution: Any) -> None:
    """A row's outputs do not depend on how many others are computed with it, though tiles and grids do."""
    problem = Problem.parse("lstm:T3,N37,I5,H9:f32:h0")
    inputs = problems.draw(problem)
    whole = run(library, problem, inputs, **execution)
    one = inputs._replace(x=inputs.x[:, 5:6].copy(), dy=inputs.dy[:, 5:6].copy())
    one = one._replace(**{name: getattr(inputs, name)[5:6].copy() for name in ("h0", "c0", "dhn", "dcn")})
    alone = run(library, Problem.parse("lstm:T3,N1,I5,H9:f32:h0"), one, **execution)
    for name in ("y", "dx"):
        assert np.array_equal(whole[name][:, 5:6], alone[name]), name
    for name in ("hn", "cn", "dh0", "dc0"):
        assert np.array_equal(whole[name][5:6], alone[name]), name


def test_same_bits_in_any_batch(library: ctypes.CDLL) -> None:
    check_batch(library)


@pytest.mark.parametrize("save", ["states", "checkpoints"])
@pytest.mark.parametrize("cell", ["lstm", "lstm_norm", "gru_reset_before"])
def test_gates_are_recomputed_to_the_same_bits(library: ctypes.CDLL, cell: str, save: str) -> None:
    whole, less = (Problem.parse(f"{cell}:T5,N3,I4,H9:f32:lengths,h0{option}") for option in ("", f",{save}"))
    inputs = problems.draw(whole)
    expected, results = run(library, whole, inputs), run(library, less, inputs)
    for name in expected:
        if not name.startswith(("dw", "db")):  # sums over rows, a chunk at a time
            assert np.array_equal(results[name], expected[name]), name


def test_a_loop_that_keeps_no_checkpoints_is_said(library: ctypes.CDLL) -> None:
    problem = Problem.parse("lstm:T2,N2,I2,H3:f32:checkpoints")
    with pytest.raises(RuntimeError, match='loop: expected one that is stepwise, for save is "checkpoints"'):
        run(library, problem, problems.draw(problem), loop=1)


class CublasCalls(ctypes.Structure):
    _fields_ = [("products", ctypes.c_int), ("math_mode", ctypes.c_int)]


@pytest.fixture
def cublas(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[CublasCalls]:
    """Layers run with a stand-in for cuBLAS; what it counts."""
    command = [build.COMPILER, "-shared", "-fPIC", "-O1", "-Wall", source := build.HERE / "fake_cublas.cpp"]
    fake = build.make("libcublas.so", [source], command)
    monkeypatch.setenv("GATEWISE_CUBLAS", str(fake))
    called(library.gatewise_find_cublas, None, {})
    yield CublasCalls.in_dll(ctypes.CDLL(str(fake)), "fake_cublas_calls")
    monkeypatch.setenv("GATEWISE_CUBLAS", "0")
    called(library.gatewise_find_cublas, None, {})


@pytest.mark.parametrize(
    ("problem", "products"),
    [
        ("gru:T4,N3,I7,H17:f64:h0", 6),  # gx; dx and dw_ih, each in two parts, for dgx is rotated; dw_hh
        ("gru_reset_before:T4,N3,I7,H17:f32:h0", 5),  # the last gate's rows of dw_hh apart
        ("lstm_norm:T5,N4,I3,H9:f32:h0", 4),  # gx among what is saved
        ("lstm:T5,N4,I3,H9:f64:project,h0", 5),
        ("lstm:T5,N4,I3,H9:f32:packed,h0", 4),
        ("lstm:T5,N4,I3,H9:f32:strided,h0", 2),  # dx and dw_hh
        ("lstm:T5,N4,I3,H9:f64:lengths,h0", 1),  # rows of x and dx are somewhere: dw_hh
        ("lstm:T5,N4,I3,H9:f64:reverse", 1),
        ("lstm:T5,N4,I3,H9:f32:batch,h0", 1),
        ("indrnn_tanh:T0,N3,I2,H4:f64:h0", 0),
    ],
)
def test_cublas_where_it_is_asked_for(library: ctypes.CDLL, cublas: CublasCalls, problem: str, products: int) -> None:
    """Right results, from the products that it can make: those of evenly strided rows."""
    before = cublas.products
    check(library, Problem.parse(problem))
    assert cublas.products - before == products


def test_cublas_rounds_operands_where_that_is_allowed(library: ctypes.CDLL, cublas: CublasCalls) -> None:
    problem = Problem.parse("gru:T2,N2,I2,H3:f32:h0")
    inputs = problems.draw(problem)
    for operands, mode in (0, 2), (1, 3), (2, 2):  # exact, tf32, bf16: pedantic or tf32
        run(library, problem, inputs, operands=operands)
        assert cublas.math_mode == mode


def test_a_cublas_that_is_not_there_is_said(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, sentence in ("/nowhere/libcublas.so", "cannot open"), (library._name, "has no cublasCreate_v2"):
        monkeypatch.setenv("GATEWISE_CUBLAS", file)
        with pytest.raises(RuntimeError, match=f"GATEWISE_CUBLAS: .*{sentence}"):
            called(library.gatewise_find_cublas, None, {})


def check_later(library: ctypes.CDLL, options: str, how: str, **execution: Any) -> None:
    """The same bits where the kernels run after the call has returned, and where they are captured in a graph and run
    again on other numbers."""
    problem = Problem.parse(f"lstm:T4,N3,I2,H5:f64:{options}")
    inputs = problems.draw(problem)
    expected = run(library, problem, inputs, **execution)
    switch = library.cuda_host_deferred if how == "deferred" else library.gatewise_replay
    try:
        switch(1)
        results = run(library, problem, inputs, **execution)
    finally:
        switch(0)
    assert all(np.array_equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("how", ["deferred", "replayed"])
@pytest.mark.parametrize("options", ["lengths,reverse,h0", "zoneout,h0", "packed,h0"])
def test_a_call_leaves_nothing_behind_that_is_read_later(library: ctypes.CDLL, options: str, how: str) -> None:
    check_later(library, options, how)


def test_many_sequences(library: ctypes.CDLL) -> None:
    """More than one kernel's parameters hold the lengths of."""
    check(library, Problem.parse("gru:T2,N600,I1,H1:f64:lengths,reverse"))


def check_schedules(library: ctypes.CDLL, cell: str, **execution: Any) -> None:
    problem = Problem.parse(f"{cell}:T3,N4,I5,H9:f32:lengths,reset,h0")
    inputs = problems.draw(problem)
    expected = run(library, problem, inputs, **execution)
    try:
        for schedule in (b"reverse", b"random:1", b"random:2"):
            library.cuda_host_schedule(schedule)
            results = run(library, problem, inputs, **execution)
            assert all(np.array_equal(results[name], expected[name]) for name in expected), schedule
    finally:
        library.cuda_host_schedule(b"forward")


@pytest.mark.parametrize("cell", ["lstm", "gru_norm"])
def test_same_bits_in_any_order_of_threads(library: ctypes.CDLL, cell: str) -> None:
    check_schedules(library, cell)
