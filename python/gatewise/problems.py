"""Problems: one string names a cell, a shape, a dtype and options, and always means the same numbers.

    lstm:T100,N32,I256,H256:f32:train          gru:T7,N3,I5,H9:f64:lengths,reverse,h0,nobias

Tests and benchmarks share this file. Every array is drawn at random from a seed made of the string: zeros
would hide errors and flatter timings.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from . import _core, functional

Array = NDArray[Any]

CELLS = _core.cells
GATES: dict[str, int] = {cell: facts["G"] for cell, facts in _core.cells.items()}
DTYPES: dict[str, Any] = {"f32": np.float32, "f64": np.float64}
OPTIONS = {
    "train": "forward and backward (the default)",
    "infer": "forward only, by a layer that holds its weights",
    "call": "forward only, by a function to which the weights are passed",
    "stream": "forward only, one step a call, the state carried from call to call",
    "lengths": "unequal lengths in any order, with a 0 and a full one as soon as N > 1",
    "half": "unequal lengths of 1 to T - 1 that fill half of the batch",
    "empty": "every length 0",
    "reverse": "walked from the last step to the first",
    "h0": "initial states given, and gradients of the final states coming in",
    "nodx": "the gradient of x is not wanted, as in the first layer of a network",
    "nobias": "no b_ih, no b_hh",
    "saturated": "biases of ±50",
    "zeros": "weights of 0",
    "subnormal": "incoming gradients of 1e-36, whose products are subnormal in float32",
    "nan": "one NaN in x",
    "reset": "a new segment at every fourth step or so, which starts from the initial state",
    "reset0": "the same, but from zero",
    "mask": "h times a mask before it meets w_hh: recurrent dropout",
    "zoneout": "zoneout of h and c, drawn",
    "expected": "zoneout of h and c, by its expectation",
    "clip": "|c| at most 0.7",
    "project": "a projection of h to half of its size",
    "batch": "batch-major: x [N, T, I]",
    "packed": "packed rows, as in torch's PackedSequence, of lengths from 1 to T",
    "strided": "x is every other step, from the end, of a larger array",
    "states": "the tape keeps c, not the gates",
    "checkpoints": "the tape keeps c at every sqrt(T)-th step",
}
# What goes through the same kernels whichever cell it is; the rest depends on what the cell has.
_DEMANDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "clip": lambda cell: cell["has_c"],
    "project": lambda cell: cell["has_c"] and not cell["normed"],
    "mask": lambda cell: cell["product"],
}
_EXCLUDE = [("reset", "reset0"), ("zoneout", "expected"), ("states", "checkpoints"), ("batch", "packed")]
_EXCLUDE += [("packed", other) for other in ("lengths", "half", "empty")]


def fits(cell: str, options: Iterable[str]) -> bool:
    """Whether a cell has all these options, and they go together."""
    chosen = set(options)
    has_all = all(demand(CELLS[cell]) for option, demand in _DEMANDS.items() if option in chosen)
    return has_all and not any(chosen >= {*pair} for pair in _EXCLUDE)


@dataclass(frozen=True)
class Problem:
    """A named problem; `Problem.parse(str(problem)) == problem`."""

    cell: str
    T: int
    N: int
    I: int
    H: int
    dtype: str
    options: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Problem:
        match = re.fullmatch(r"(\w+):T(\d+),N(\d+),I(\d+),H(\d+):(\w+):([\w,]+)", text)
        if not match:
            raise ValueError(f"problem {text!r}: expected something like lstm:T100,N32,I256,H256:f32:train")
        cell, *sizes, dtype, options = match.groups()
        known: Iterable[str]
        for word, known in [(cell, GATES), (dtype, DTYPES), *((o, OPTIONS) for o in options.split(","))]:
            if word not in known:
                raise ValueError(f"problem {text!r}: {word!r} is none of {', '.join(known)}")
        if not fits(cell, options.split(",")):
            raise ValueError(f"problem {text!r}: {cell} does not have all these options, or they exclude each other")
        T, N, I, H = map(int, sizes)
        return cls(cell, T, N, I, H, dtype, frozenset(options.split(",")) - {"train"})

    def __str__(self) -> str:
        options = ",".join(o for o in OPTIONS if o in self.options) or "train"
        return f"{self.cell}:T{self.T},N{self.N},I{self.I},H{self.H}:{self.dtype}:{options}"

    @property
    def R(self) -> int:
        """Numbers in h."""
        return (self.H + 1) // 2 if "project" in self.options else self.H

    @property
    def trains(self) -> bool:
        return not self.options & {"infer", "call", "stream"}

    @property
    def kind(self) -> str:
        """train, infer, call or stream."""
        return next((kind for kind in ("infer", "call", "stream") if kind in self.options), "train")

    def without(self, *options: str) -> Problem:
        return replace(self, options=self.options - {*options})


class Inputs(NamedTuple):
    """The arrays of a problem, under the names of the functional API; None where the problem has none."""

    x: Array
    w_ih: Array
    w_hh: Array | None
    b_ih: Array | None
    b_hh: Array | None
    h0: Array | None
    c0: Array | None
    lengths: NDArray[np.int64] | None
    dy: Array
    dhn: Array | None
    dcn: Array | None
    w_unit: Array | None = None
    w_hr: Array | None = None
    h_mask: Array | None = None
    reset: NDArray[np.bool_] | None = None
    batch_sizes: NDArray[np.int64] | None = None

    def astype(self, dtype: Any) -> Inputs:
        floats = {k: v for k, v in self._asdict().items() if v is not None and v.dtype.kind == "f"}
        return self._replace(**{k: v.astype(dtype) for k, v in floats.items()})


def draw(problem: Problem) -> Inputs:
    """The arrays of a problem: inputs and states of order 1, products with the weights as well."""
    T, N, I, H, R, G = problem.T, problem.N, problem.I, problem.H, problem.R, GATES[problem.cell]
    rng = np.random.default_rng(zlib.crc32(str(problem).encode()))

    def normal(*shape: int, scale: float = 1.0) -> Array:
        drawn: Array = (rng.standard_normal(shape) * scale).astype(DTYPES[problem.dtype])
        return drawn

    has = problem.options.__contains__
    cell = CELLS[problem.cell]
    has_c, biased = cell["has_c"], not has("nobias") and not cell["normed"]
    w_scale = 0.0 if has("zeros") else 0.6 / np.sqrt(R)
    b_ih = normal(G * H, scale=0.3)
    lengths, batch_sizes = None, None
    if has("empty"):
        lengths = np.zeros(N, np.int64)
    elif has("lengths"):
        lengths = rng.integers(0, T + 1, N)
        lengths[:2] = [T, 0][: len(lengths)]
        lengths = rng.permutation(lengths)
    elif has("half"):
        some = rng.integers(1, max(T, 2), N // 2)
        lengths = rng.permutation(np.concatenate([some, T - some, [max(T // 2, 1)] * (N % 2)]).astype(np.int64))
        lengths = np.clip(lengths, 0, T)
    elif has("packed"):
        N = N if T else 0
        T = T if N else 0
        batch_sizes = np.sort(rng.integers(1, N + 1, T))[::-1].copy() if N else np.zeros(0, np.int64)
        batch_sizes[:1] = N
    leading = (int(batch_sizes.sum()),) if batch_sizes is not None else (N, T) if has("batch") else (T, N)
    inputs = Inputs(
        x=normal(*leading, I),
        w_ih=normal(G * H, I, scale=0.0 if has("zeros") else 0.6 / np.sqrt(I)),
        w_hh=normal(G * H, R, scale=w_scale) if cell["product"] else None,
        b_ih=None if not biased else np.copysign(b_ih.dtype.type(50), b_ih) if has("saturated") else b_ih,
        b_hh=normal(G * H, scale=0.3) if biased else None,
        h0=normal(N, R) if has("h0") else None,
        c0=normal(N, H) if has("h0") and has_c else None,
        lengths=lengths,
        dy=normal(*leading, R, scale=1e-36 if has("subnormal") else 1.0),
        dhn=normal(N, R) if has("h0") else None,
        dcn=normal(N, H) if has("h0") and has_c else None,
        # gains are around 1, as in training; other weights of a unit's own let it forget
        w_unit=normal(cell["U"] * H, scale=0.3) + DTYPES[problem.dtype](cell["normed"]) if cell["U"] else None,
        w_hr=normal(R, H, scale=1 / np.sqrt(H)) if has("project") else None,
        h_mask=(normal(N, R) > -0.5) * DTYPES[problem.dtype](1.25) if has("mask") else None,
        reset=rng.random(leading) < 0.25 if has("reset") or has("reset0") else None,
        batch_sizes=batch_sizes,
    )
    if has("strided"):
        wide = np.zeros((2 * len(inputs.x), *inputs.x.shape[1:-1], I + 3), inputs.x.dtype)
        wide[::-2, ..., 1 : I + 1] = inputs.x
        inputs = inputs._replace(x=wide[::-2, ..., 1 : I + 1])
    if has("nan"):
        inputs.x[(slice(1),) * inputs.x.ndim] = np.nan
    return inputs


def options_of(problem: Problem, inputs: Inputs) -> functional.Options:
    """What the functional API calls options, of a problem."""
    has = problem.options.__contains__
    given: dict[str, Any] = {
        name: getattr(inputs, name)
        for name in ("w_unit", "w_hr", "h_mask", "reset", "batch_sizes")
        if getattr(inputs, name) is not None
    }
    if has("reset0"):
        given["reset_to"] = "zero"
    if has("zoneout") or has("expected"):
        given |= {"zoneout_h": 0.3, "zoneout_c": 0.4 if CELLS[problem.cell]["has_c"] else 0.0}
    if has("zoneout"):
        given["seed"] = 2**64 - 59
    if has("clip"):
        given["cell_clip"] = 0.7
    if has("batch"):
        given["batch_first"] = True
    for save in ("states", "checkpoints"):
        if has(save):
            given["save"] = save
    return cast(functional.Options, given)


def gradients_of(problem: Problem) -> list[str]:
    """The gradients that a training step of the problem computes: those of what it was given."""
    cell, has = CELLS[problem.cell], problem.options.__contains__
    names = ["dw_ih"] + ["dw_hh"] * cell["product"]
    names += ["db_ih", "db_hh"] * (not has("nobias") and not cell["normed"])
    names += ["dw_unit"] * (cell["U"] > 0) + ["dw_hr"] * has("project")
    names += ["dx"] * (not has("nodx"))
    return names + (["dh0"] + ["dc0"] * cell["has_c"]) * has("h0")


def tape_of(
    problem: Problem, inputs: Inputs, backend: str | None = "cpu", num_threads: int | None = None
) -> functional.Tape:
    """The forward pass of a problem on a backend."""
    return functional.forward(
        problem.cell, *inputs[:7], lengths=inputs.lengths, reverse="reverse" in problem.options,
        backend=backend, num_threads=num_threads, training=problem.trains, **options_of(problem, inputs),
    )  # fmt: skip


def kept_of(problem: Problem, tape: functional.Tape) -> dict[str, Array | None]:
    """What the tape of a problem shows of its insides: gates, c."""
    if not problem.trains or "checkpoints" in problem.options:
        return {}
    return {"c": tape.c} if "states" in problem.options else {"gates": tape.gates, "c": tape.c}


def run(
    problem: Problem,
    inputs: Inputs,
    backend: str | None = "cpu",
    num_threads: int | None = None,
    wanted: list[str] | None = None,
) -> dict[str, Array]:
    """Every result of a problem on a backend, by name: y hn cn, gates c of the tape, and the gradients."""
    tape = tape_of(problem, inputs, backend, num_threads)
    results = {"y": tape.y, "hn": tape.hn, "cn": tape.cn, **kept_of(problem, tape)}
    if problem.trains:
        grads = functional.backward(tape, inputs.dy, inputs.dhn, inputs.dcn, wanted=wanted, num_threads=num_threads)
        results |= grads._asdict()
    return {name: array for name, array in results.items() if array is not None}
