"""Correctness anyone can rerun: gradients against finite differences, kernels against the float64 reference,
exp / tanh / sigmoid against long double.

Every verdict is `error <= bound`, so an error that is NaN is a miss. Every error is relative: the largest
difference over the scale of the right answer, where an answer of zeros allows no difference at all.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, nan, sqrt
from typing import Any, ClassVar, NamedTuple, Union

import numpy as np
from numpy.typing import NDArray

from . import _core, functional, problems
from .backends import NAMES, choose

Array = NDArray[Any]
Arrays = dict[str, Array]
Outputs = Union[Array, Mapping[str, Array]]

# ---- Gradients against finite differences ------------------------------------------------------------------
#
# The loss is sum(weight * output) with fixed random weights, so that one backward pass checks every output.
# Its slope along a direction comes from the five-point stencil, whose truncation error is h^4 f'''''/30; with
# float64's rounding noise eps |loss| / h the best h is near eps^(1/5) = 7e-4. A kink (relu) or a strong
# curvature inside the stencil spoils a long step, never a short one, so a probe that misses is repeated with
# shorter steps: a right gradient meets the bound at one of them, a wrong one at none.

STEPS = (1e-3, 6e-5, 4e-6, 2.5e-7)
# Rounding noise of a slope, as a share of sum|terms of the loss| / h.
NOISE = 4 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class GradientCheck:
    """The outcome of `gradients`: the worst relative error of each gradient; true if all are within bound."""

    errors: dict[str, float]
    bound: float

    @property
    def ok(self) -> bool:
        return all(error <= self.bound for error in self.errors.values())

    @property
    def worst(self) -> float:
        return _worst(self.errors)[1]

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        width = max((len(name) for name in self.errors), default=0)
        lines = [
            f"{name:<{width}}  {error:8.1e}  {'ok' if error <= self.bound else 'MISS'}"
            for name, error in self.errors.items()
        ]
        return "\n".join([f"gradients against finite differences, bound {self.bound:.0e}", *lines])

    __repr__ = __str__


def gradients(
    layer: Any,
    inputs: Any,
    *,
    state: Any = None,
    lengths: Array | None = None,
    bound: float = 1e-8,
    directions: int = 8,
    seed: int = 0,
    strict: bool = False,
) -> GradientCheck:
    """Check an analytic backward pass against finite differences of its own forward pass, in float64.

    Args:
        layer: either a layer: `y, state, tape = layer.forward(x, state, lengths)` and
            `layer.backward(tape, dy, dstate) -> {name: gradient}`, its weights read and set through
            `state_dict()` and `load_state_dict()` (the check works on a copy; dropout must be off);
            or a pair of functions `(forward, backward)`: `forward(params) -> outputs` and
            `backward(params, doutputs) -> {name: gradient}`, where params is a dict of arrays, outputs is an
            array or a dict of arrays, and doutputs has its form.
        inputs: float64; x for a layer ([T, N, I], or [N, T, I] with batch_first), params for a pair.
        state: initial state of a layer, checked too when given: [L*D, N, H], or a tuple (h0, c0) of them.
        lengths: [N] int64, valid steps of each sequence.
        bound: largest accepted error.
        directions: an array of at most `8 * directions` elements is checked element by element; a larger one
            along this many random unit directions, each of which sees every element.
        seed: of the directions and of the weights of the loss.
        strict: raise AssertionError with the table on a miss.

    Returns:
        GradientCheck: of every array the largest |analytic - numeric|, less the rounding noise of the numeric
        slope (4 eps |loss| / h, at the shortest step 4e-9 |loss|: smaller faults are not seen), over the root
        mean square of the gradient. A gradient that backward does not return is NaN, and so a miss.

    Raises:
        ValueError: an array is not float64, forward gives two answers for one input, or a gradient's shape
            is not its parameter's.
    """
    if isinstance(layer, tuple):
        forward, backward = layer
        params: Arrays = dict(inputs)
    else:
        forward, backward, params = _layer_as_pair(layer, inputs, state, lengths)
    for name, array in params.items():
        if not isinstance(array, np.ndarray) or array.dtype != np.float64:
            raise ValueError(
                f"{name}: expected a float64 array, finite differences need its digits; got {_kind(array)}"
            )

    rng = np.random.default_rng(seed)
    outputs = forward(params)
    base, again = _named(outputs), _named(forward(params))
    for name, array in base.items():
        if array.dtype != np.float64:
            raise ValueError(f"{name}: expected forward to return float64; got {array.dtype}")
        if not np.array_equal(array, again[name], equal_nan=True):
            raise ValueError(f"{name}: forward gave two answers for the same input (is dropout on?)")
    weights = {name: rng.standard_normal(array.shape) for name, array in base.items()}
    size = sum(float(np.abs(weights[name] * array).sum()) for name, array in base.items())

    analytic = backward(params, weights if isinstance(outputs, Mapping) else weights[""])

    def loss(changed: Arrays) -> float:
        return sum(float((weights[name] * array).sum()) for name, array in _named(forward(changed)).items())

    errors: dict[str, float] = {}
    for name, array in params.items():
        gradient = analytic.get(name)
        if gradient is None:
            errors[name] = nan
        elif gradient.shape != array.shape:
            raise ValueError(f"{name}: expected a gradient of shape {array.shape}; got {gradient.shape}")
        else:
            errors[name] = _slope_error(loss, params, name, gradient, _directions(rng, array, directions), size, bound)
    result = GradientCheck(errors, bound)
    if strict and not result.ok:
        raise AssertionError(str(result))
    return result


def _directions(rng: np.random.Generator, array: Array, count: int) -> list[Array]:
    """Unit directions in the array's space: every axis of a small array, `count` random ones of a large."""
    if array.size <= 8 * count:
        return list(np.eye(array.size).reshape(array.size, *array.shape))
    random = rng.standard_normal((count, *array.shape))
    return [u / np.linalg.norm(u) for u in random]


def _slope_error(
    loss: Callable[[Arrays], float],
    params: Arrays,
    name: str,
    gradient: Array,
    directions: Sequence[Array],
    size: float,  # sum of |terms| of the loss: what its rounding error is relative to
    bound: float,
) -> float:
    """The worst error of one gradient over `directions`: of each direction the best over STEPS."""
    if not directions:
        return 0.0
    array = params[name]
    reach = max(1.0, _rms(array))

    def slope(u: Array, h: float) -> float:
        at = [loss({**params, name: array + k * h * u}) for k in (-2, -1, 1, 2)]
        return (8.0 * (at[2] - at[1]) - (at[3] - at[0])) / (12.0 * h)

    with np.errstate(invalid="ignore", over="ignore"):
        slopes = np.array([slope(u, STEPS[0] * reach) for u in directions])
        along = np.array([(gradient * u).sum() for u in directions])
        # Over all axes or over random unit directions, the slopes' root mean square is the gradient's.
        scale = float(np.fmax(_rms(gradient), _rms(slopes)))

        def error(k: int, h: float, numeric: float) -> float:
            return _ratio(_larger(0.0, abs(along[k] - numeric) - NOISE * size / h), scale)

        worst = 0.0
        for k, u in enumerate(directions):
            best = error(k, STEPS[0] * reach, slopes[k])
            for step in STEPS[1:]:
                if best <= bound:
                    break
                best = float(np.fmin(best, error(k, step * reach, slope(u, step * reach))))
            worst = _larger(worst, best)
    return worst


def _layer_as_pair(layer: Any, x: Any, state: Any, lengths: Array | None) -> tuple[Any, Any, Arrays]:
    """A layer's forward and backward as functions of one dict: its weights, "x" and the initial state."""
    layer = copy.deepcopy(layer)
    weights: Arrays = dict(layer.state_dict())
    states = dict(zip(("h0", "c0"), _parts(state)))

    def run(params: Arrays) -> Any:
        layer.load_state_dict({name: params[name] for name in weights})
        given = tuple(params[name] for name in states)
        return layer.forward(params["x"], given if len(given) > 1 else given[0] if given else None, lengths)

    def forward(params: Arrays) -> Arrays:
        y, final, _ = run(params)
        return {"y": y, **dict(zip(("hn", "cn"), _parts(final)))}

    def backward(params: Arrays, doutputs: Arrays) -> Arrays:
        dfinal = tuple(doutputs[name] for name in ("hn", "cn") if name in doutputs)
        grads = dict(layer.backward(run(params)[2], doutputs["y"], dfinal if len(dfinal) > 1 else dfinal[0]))
        return {**grads, **dict(zip(states, _parts(grads.pop("state", None))))}

    return forward, backward, {**weights, "x": x, **states}


def _parts(state: Any) -> tuple[Array, ...]:
    """The arrays of a layer's state: none, h, or h and c."""
    return () if state is None else tuple(state) if isinstance(state, (tuple, list)) else (state,)


def _named(outputs: Outputs) -> Arrays:
    return dict(outputs) if isinstance(outputs, Mapping) else {"": np.asarray(outputs)}


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _verdict(problem: str) -> str:
    return f"MISS  {problem}" if problem else "ok"


# ---- Errors ------------------------------------------------------------------------------------------------


def _rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def _ratio(difference: float, scale: float) -> float:
    """difference / scale, where nothing over nothing is no error and something over nothing is infinite."""
    return 0.0 if difference == 0.0 else difference / scale if scale > 0.0 or scale != scale else inf


def _larger(a: float, b: float) -> float:
    """The larger of two, and NaN if either is: NaN is the largest error of all."""
    return a if a != a or a > b else b


def _worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """The name and value of the largest error; ("", 0) of none."""
    worst = ("", 0.0)
    for name, error in errors.items():
        if not error <= worst[1]:
            worst = (name, error)
            if error != error:
                break
    return worst


def relative_error(got: Array | None, want: Array, scale: float | None = None) -> float:
    """max |got - want| / scale (default: max |want|): 0 for equal arrays, also of zeros, also empty.

    NaN if either has a NaN, and if got is nothing or of another shape.
    """
    if got is None or got.shape != want.shape:
        return nan
    if got.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):
        return _ratio(float(np.abs(got - want).max()), _largest(want) if scale is None else scale)


def _largest(array: Array) -> float:
    return float(np.abs(array).max(initial=0.0))


# ---- The matrix: cell x backend x dtype x option -----------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """What one row of the matrix runs: options of a problem (gatewise.problems), and sizes."""

    name: str
    words: str = "train"
    sizes: tuple[tuple[int, int, int, int], ...] = ((7, 5, 6, 9),)  # (T, N, I, H), each of them run
    biases: str = "ih hh"
    saturated: bool = False  # ±50 added to every other bias
    same_bits: bool = False  # 2 and 3 threads, and the batch in another order, give the bits of 1 thread
    storage: str = ""  # a 16-bit dtype of x, states and weights; y and gradients are then rounded to it
    feature: bool = False  # a line of `table`


def _feature(name: str, words: str, **more: Any) -> Option:
    return Option(name, words, feature=True, **more)


_EVERYTHING = "lengths,reverse,h0,reset,mask,zoneout,clip,project,batch,strided,states"

OPTIONS = (
    Option("plain"),
    Option("no bias", "nobias"),
    Option("b_ih only", biases="ih"),
    Option("b_hh only", biases="hh"),
    _feature("initial, final states", "h0"),
    _feature("lengths", "lengths,h0"),
    _feature("packed rows", "packed,h0"),
    _feature("reverse", "reverse,h0"),
    Option("lengths, reverse", "lengths,reverse,h0"),
    _feature("reset to initial", "reset,h0"),
    _feature("reset to zero", "reset0,h0"),
    _feature("batch-major", "batch,lengths"),
    _feature("strided x", "strided"),
    _feature("recurrent dropout", "mask,h0"),
    _feature("zoneout", "zoneout,h0"),
    _feature("expected zoneout", "expected,h0"),
    _feature("cell clip", "clip,h0"),
    _feature("projection", "project,h0"),
    _feature("save states", "states,h0"),
    _feature("save checkpoints", "checkpoints,h0"),
    _feature("float16 storage", "h0", storage="float16"),
    Option("everything", _EVERYTHING, same_bits=True),
    Option("saturated", "h0", saturated=True),
    Option("odd sizes", "h0", tuple((3, 4 + H % 3, 1 + H % 5, H) for H in (1, 7, 8, 9, 16, 17, 33))),
    Option("T=0, N=0, T=N=1", "h0", ((0, 3, 2, 5), (4, 0, 2, 5), (1, 1, 4, 9))),
    Option("long", "lengths,h0", ((150, 3, 5, 20),)),
    Option("threads, order", "lengths,h0", ((6, 37, 10, 40),), same_bits=True),
)
# Weight gradients are sums over all steps and sequences of terms alike in size. Where one of few elements
# happens to cancel, its own size says nothing of its error: all of them share the scale of the largest.
SUMS = ("dw_ih", "dw_hh", "db_ih", "db_hh", "dw_unit", "dw_hr")
QUICK = ("plain", "lengths, reverse", "saturated", "odd sizes", "threads, order", "everything")


def has(cell: str, option: Option) -> bool:
    """Whether there is such a row: the cell has what the option is about. Of "everything", what it has."""
    return option.name == "everything" or problems.fits(cell, option.words.split(","))


def sizes_of(cell: str, option: Option) -> list[tuple[int, int, int, int]]:
    """The option's sizes for a cell: of a single unit normalisation leaves only its rounding errors."""
    return [sizes for sizes in option.sizes if sizes[3] > 1 or not _core.cells[cell]["normed"]]


def table(rows: Sequence[Row]) -> str:
    """Rows of the matrix in short, as Markdown: for every feature and cell the backends on which all rows passed."""
    places = list(dict.fromkeys(row.backend for row in rows))
    cells = [cell for cell in _core.cells if any(row.cell == cell for row in rows)]
    lines = ["| | " + " | ".join(f"`{cell}`" for cell in cells) + " |", "| --- |" + " :-: |" * len(cells)]
    for option in (option for option in OPTIONS if option.feature):
        marks = []
        for cell in cells:
            of_both = [row for row in rows if (row.cell, row.option) == (cell, option.name)]
            passed = [place for place in places if _all_ok(row for row in of_both if row.backend == place)]
            marks.append("" if not of_both else "✓" if passed == places else ", ".join(passed) or "–")
        lines.append(f"| {option.name} | " + " | ".join(marks) + " |")
    return "\n".join([*lines, "", f"✓: {', '.join(places)}; float32 and float64."])


def _all_ok(rows: Iterable[Row]) -> bool:
    oks = [row.ok for row in rows]
    return len(oks) > 0 and all(oks)


@dataclass(frozen=True)
class Row:
    """One row of the matrix. Errors are relative; NaN where something is NaN, missing, or raised."""

    cell: str
    backend: str  # "reference", "cpu[avx2]"
    dtype: str
    option: str
    forward: float  # worst of y, hn, cn, gates, c against float64
    gradient: float  # worst of the gradients against float64
    worst: str  # which gradient that is
    share: float  # worst error over its bound, forward or gradient
    differences: float | None  # worst gradient against finite differences of the same forward; float64 only
    problem: str  # "" or what is wrong, in words

    LINE: ClassVar[str] = "{:<8}  {:<12}  {:<7}  {:<16}  {:>7}  {:>8}  {:<5}  {:>5}  {:>7}  {}"
    HEADER: ClassVar[str] = LINE.format(
        "cell", "backend", "dtype", "option", "forward", "gradient", "worst", "bound", "slope", ""
    )

    @property
    def ok(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        slope = "-" if self.differences is None else f"{self.differences:.1e}"
        errors = f"{self.forward:.1e}", f"{self.gradient:.1e}", self.worst or "-", f"{self.share:.0%}", slope
        return self.LINE.format(self.cell, self.backend, self.dtype, self.option, *errors, _verdict(self.problem))


NORMED = 8.0  # deviations of 1/8 and more: those of c are the smallest


def bound(cell: str, dtype: str, sizes: tuple[int, int, int, int], name: str) -> float:
    """The largest relative error accepted of the result `name` of a problem of sizes (T, N, I, H).

    In units of eps, one step loses about 8 in the gates (three functions within 2 ULP, and the products that
    join them) and sqrt(I + H) in a pre-activation: the random walk of that many rounded products. The states
    of these problems forget, so what earlier steps lost fades, and the bound does not grow with T. A gradient
    loses the same again on its way back, where a product has G·H terms; that of a weight is the sum over T·N steps,
    in pieces of at most some 1024. A normed cell divides by deviations, which are
    below 1 and for few units can be far below. Observed: 5 to 31 % of the bound.
    """
    T, N, I, H = sizes
    loss = 8.0 + sqrt(I + H)
    if name in functional.Gradients._fields:
        loss += 8.0 + sqrt(_core.cells[cell]["G"] * H)
    if name in SUMS:
        loss += sqrt(min(T * N, 1024))
    if _core.cells[cell]["normed"]:
        loss *= NORMED
    return loss * float(np.finfo(dtype).eps)


def matrix(
    cells: Sequence[str] | None = None,
    places: Sequence[tuple[str, str]] | None = None,
    options: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Run the matrix row by row.

    Every row runs one option in one dtype and compares all results with the backend "reference" in float64
    on the very same numbers, within `bound`; float64 rows also with the slopes of their own forward.
    Without Numba there is no reference: `truth_backend` stands in, itself held to its slopes only.

    Args:
        cells: names of cells; None: all in the kernels' list.
        places: (backend, arch) pairs as `runnable()` lists them; None: all of them.
        options: names out of OPTIONS; QUICK is a short list; None: all.
    """
    known = list(_core.cells)
    for cell in cells or ():
        if cell not in known:
            raise ValueError(f"cell: expected one of {', '.join(known)}; got {cell!r}")
    return (
        _row(cell, backend, arch, dtype, option)
        for cell in (known if cells is None else cells)
        for backend, arch in (runnable() if places is None else places)
        for dtype in ("float32", "float64")
        for option in OPTIONS
        if (options is None or option.name in options) and has(cell, option)
    )


class _Case(NamedTuple):
    """A problem and its arrays."""

    problem: problems.Problem
    inputs: problems.Inputs
    storage: str = ""

    def widened(self) -> _Case:
        return _Case(self.problem, self.inputs.astype(np.float64))

    def reordered(self, order: Array) -> _Case:
        """The same sequences in another order within the batch."""
        axis = 0 if "batch" in self.problem.options else 1
        axes = {"x": axis, "dy": axis, "reset": axis}
        axes |= dict.fromkeys(("h0", "c0", "dhn", "dcn", "lengths", "h_mask"), 0)
        arrays = self.inputs._asdict()
        moved = {name: arrays[name].take(order, axes[name]) for name in axes if arrays[name] is not None}
        return self._replace(inputs=self.inputs._replace(**moved))


# What belongs to single sequences, and the axis that counts them where time comes first
_BATCH = {"y": 1, "hn": 0, "cn": 0, "gates": 1, "c": 1, "dx": 1, "dh0": 0, "dc0": 0}


def _case(cell: str, option: Option, sizes: tuple[int, int, int, int], dtype: str) -> _Case:
    words = [word for word in option.words.split(",") if problems.fits(cell, [word])]
    short = {"float32": "f32", "float64": "f64"}[dtype]
    problem = problems.Problem(cell, *sizes, short, frozenset(words) - {"train"})
    inputs = problems.draw(problem)
    if "ih" not in option.biases:
        inputs = inputs._replace(b_ih=None)
    if "hh" not in option.biases:
        inputs = inputs._replace(b_hh=None)
    if option.saturated and inputs.b_ih is not None:  # every other one stays alive: zeros would prove nothing
        inputs.b_ih[...] += np.resize([0.0, 50.0, 0.0, -50.0], inputs.b_ih.shape)
    if cell.endswith("relu") and inputs.b_ih is not None:  # its units live, none of them within a step of its kink
        inputs.b_ih[...] = np.abs(inputs.b_ih) + 0.1
    if option.storage:
        inputs = inputs.astype(option.storage)
    return _Case(problem, inputs, option.storage)


def _run(case: _Case, backend: str, num_threads: int | None = None) -> Arrays:
    """Everything a call returns and leaves on its tape, and all its gradients, by name."""
    return problems.run(case.problem, case.inputs, backend, num_threads)


def _row(cell: str, backend: str, arch: str, dtype: str, option: Option) -> Row:
    """One row; an exception in it is its problem, not the matrix's end."""
    errors: dict[str, float] = {}  # of each result the worst, over the option's sizes
    slopes: dict[str, float] = {}
    share, problems = 0.0, []
    try:
        for sizes in sizes_of(cell, option):
            case = _case(cell, option, sizes, dtype)
            truth = _truth(case)
            with _forced(arch):
                got = _run(case, backend)
                problems += _bits(case, backend) if option.same_bits else []
                slow = dtype == "float64" and not option.storage
                against = _differences(case, backend) if slow else GradientCheck({}, inf)
            for name, error in against.errors.items():
                slopes[name] = _larger(slopes.get(name, 0.0), error)
                if not error <= against.bound:
                    problems.append(f"{name}: not the slope of forward at T,N,I,H={sizes}")
            sums = max(_largest(truth[name]) for name in SUMS if name in truth)
            for name, want in truth.items():
                found = got.get(name)
                found = found.astype(np.float64) if option.storage and found is not None else found
                error = relative_error(found, want, sums if name in SUMS else None)
                limit = bound(cell, dtype, sizes, name)
                if option.storage:  # one more rounding, and float32 inside
                    limit = bound(cell, "float32", sizes, name) + float(np.finfo(option.storage).eps)
                errors[name] = _larger(errors.get(name, 0.0), error)
                share = _larger(share, error / limit)
                if not error <= limit:
                    problems.append(f"{name}: {error:.1e} > {limit:.1e} at T,N,I,H={sizes}")
    except Exception as error:  # the row's, whatever it is
        problems.insert(0, f"{type(error).__name__}: {error}")
        share = errors["y"] = errors["dx"] = nan
    is_gradient = functional.Gradients._fields.__contains__
    worst, gradient = _worst({name: error for name, error in errors.items() if is_gradient(name)})
    return Row(
        cell=cell,
        backend=f"{backend}[{arch}]" if arch else backend,
        dtype=dtype,
        option=option.name,
        forward=_worst({name: error for name, error in errors.items() if not is_gradient(name)})[1],
        gradient=gradient,
        worst=worst,
        share=share,
        differences=_worst(slopes)[1] if dtype == "float64" and not option.storage else None,
        problem="; ".join(problems[:2]),
    )


def _truth(case: _Case) -> Arrays:
    """The answer in float64, on the case's very numbers."""
    backend, arch = truth_backend()
    with _forced(arch):
        return _run(case.widened(), backend)


def _bits(case: _Case, backend: str) -> list[str]:
    """What differs in its bits from a run with one thread.

    Of a batch in another order only what belongs to single sequences has to agree: weight gradients are sums
    over the batch. What is drawn at random belongs to a place in the batch.
    """
    one = _run(case, backend, 1)
    runs = [("with 2 threads", _run(case, backend, 2), one), ("with 3 threads", _run(case, backend, 3), one)]
    if "zoneout" not in case.problem.options:
        order = np.random.default_rng(1).permutation(case.problem.N)
        expected = {name: one[name].take(order, axis) for name, axis in _BATCH.items() if name in one}
        runs.append(("with the batch in another order", _run(case.reordered(order), backend, 1), expected))
    return [
        f"{name}: other bits {reason}"
        for reason, got, want in runs
        for name in want
        if got[name].tobytes() != want[name].tobytes()
    ]


def _differences(case: _Case, backend: str) -> GradientCheck:
    """The gradients of a call against finite differences of the same call."""
    problem, inputs = case.problem, case.inputs
    names = [*inputs._fields[:7], "w_unit", "w_hr"]
    params = {name: array for name in names if (array := getattr(inputs, name)) is not None}
    incoming = {"dy": "y"} | {name: name[1:] for name in ("dhn", "dcn") if getattr(inputs, name) is not None}

    def tape(changed: Arrays) -> functional.Tape:
        return problems.tape_of(problem, inputs._replace(**changed), backend, 1)

    def forward(changed: Arrays) -> Arrays:
        found = tape(changed)
        return {output: getattr(found, output) for output in incoming.values()}

    def backward(changed: Arrays, doutputs: dict[str, Any]) -> dict[str, Array | None]:
        grads = functional.backward(tape(changed), **{name: doutputs[output] for name, output in incoming.items()})
        return {name[1:]: d for name, d in grads._asdict().items()}

    return gradients((forward, backward), params, directions=4)


# ---- exp, tanh and sigmoid in ULP --------------------------------------------------------------------------


@dataclass(frozen=True)
class FunctionRow:
    """The error of one elementary function of one arch: `ulp` at its worst argument `at`."""

    function: str
    arch: str
    dtype: str
    ulp: float
    at: float
    problem: str

    LINE: ClassVar[str] = "{:<8}  {:<7}  {:<7}  {:>4}  {:>12}  {}"
    HEADER: ClassVar[str] = LINE.format("function", "arch", "dtype", "ULP", "at", "")

    @property
    def ok(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        error = f"{self.ulp:.2f}", f"{self.at:.6g}"
        return self.LINE.format(self.function, self.arch, self.dtype, *error, _verdict(self.problem))


ULP_BOUND = 2.0


def functions(archs: Sequence[str] | None = None) -> Iterator[FunctionRow]:
    """Measure exp, tanh and sigmoid of each arch against long double over some 400,000 arguments.

    The arguments are evenly spaced bit patterns, which visit every exponent of both signs, dense grids where
    the functions bend, and ±0, ±inf, NaN, the largest, smallest, subnormal numbers. Accepted are 2 ULP, and
    one more for float64 where long double is no wider and the judge itself is up to an ULP off.
    """
    wide = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
    for dtype in (np.float32, np.float64):
        limit = ULP_BOUND + (0.0 if wide or dtype is np.float32 else 1.0)
        x = _arguments(dtype)
        for name, exact in _EXACT.items():
            with np.errstate(all="ignore"):
                want = exact(x.astype(np.longdouble))
            for arch in running_archs() if archs is None else archs:
                got = _core.evaluate(name, x, arch)
                error = ulp_error(got, want)
                worst = int(np.argmax(np.where(np.isnan(error), inf, error)))
                ulp, at = float(error[worst]), float(x[worst])
                problem = "" if ulp <= limit else f"{name}({at!r}) = {got[worst]!r}, not {want[worst]!r}"
                if name == "tanh" and not (np.signbit(got) == np.signbit(x))[~np.isnan(x)].all():
                    problem = problem or "the sign of a zero is lost"
                yield FunctionRow(name, arch, np.dtype(dtype).name, ulp, at, problem)


_EXACT: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def _arguments(dtype: type[np.floating[Any]]) -> Array:
    info, integer = np.finfo(dtype), np.uint32 if dtype is np.float32 else np.uint64
    count = 2.0 ** (8 * info.dtype.itemsize)
    patterns = np.linspace(0, count, 200_000, endpoint=False).astype(integer).view(dtype)
    grids = [np.linspace(-reach, reach, 60_000) for reach in (1, 20, float(np.log(info.max)) + 20)]
    subnormal = info.smallest_subnormal
    special = np.array([0, inf, nan, info.max, info.tiny, subnormal, 4 * subnormal, info.eps], dtype)
    return np.concatenate([patterns, *grids, special, -special], dtype=dtype, casting="same_kind")


def ulp_error(got: Array, want: Array) -> Array:
    """|got - want| in units of the spacing of got's dtype at `want`, elementwise; NaN is right for NaN.

    `want` is of a wider type. A correctly rounded result counts as 0. Below the smallest normal number the
    unit is the spacing there, and 0 is right: kernels flush subnormal numbers.
    """
    info = np.finfo(got.dtype)
    with np.errstate(all="ignore"):
        rounded = want.astype(got.dtype)
        unit = np.spacing(np.clip(np.abs(rounded), info.tiny, 2.0 ** (info.maxexp - 1))).astype(want.dtype)
        error = np.abs(got.astype(want.dtype) - want) / unit
        flushed = (got == 0) & (np.abs(want) < info.tiny)
        right = (got == rounded) | flushed | (np.isnan(got) & np.isnan(want))
        return np.where(right, 0.0, error).astype(np.float64)


# ---- What is there to check --------------------------------------------------------------------------------


@contextmanager
def _forced(arch: str) -> Iterator[None]:
    """Run what is inside on one arch ("": as the environment has it)."""
    before = os.environ.get("GATEWISE_ARCH")
    if arch:
        os.environ["GATEWISE_ARCH"] = arch
    try:
        yield
    finally:
        if arch and before is None:
            del os.environ["GATEWISE_ARCH"]
        elif before is not None:
            os.environ["GATEWISE_ARCH"] = before


def running_archs() -> list[str]:
    """The archs that are built and run on this machine, best first."""
    return [arch for arch, runs_here in _core.archs if runs_here]


def runnable(backend: str | None = None) -> list[tuple[str, str]]:
    """(backend, arch) of everything that runs here; arch is "" for a backend that has none.

    Raises:
        ValueError: `backend` is given and is not one that runs here.
    """
    names = [name for name in NAMES if _runs(name)] if backend is None else [choose(backend)]
    return [(name, arch) for name in names for arch in (running_archs() if name == "cpu" else [""])]


def _runs(backend: str) -> bool:
    try:
        choose(backend)
    except ValueError:
        return False
    return True


def truth_backend() -> tuple[str, str]:
    """What the matrix takes for the truth: the reference or, without Numba, the plainest arch, in float64."""
    return ("reference", "") if _runs("reference") else ("cpu", running_archs()[-1])
