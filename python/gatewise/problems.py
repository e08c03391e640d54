"""Problems: one string names a cell, a shape, a dtype and options, and always means the same numbers.

    lstm:T100,N32,I256,H256:f32:train          gru:T7,N3,I5,H9:f64:lengths,reverse,h0,nobias

Tests and benchmarks share this file. Every array is drawn at random from a seed made of the string: zeros
would hide errors and flatter timings.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core, functional

Array = NDArray[Any]

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
}


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
        T, N, I, H = map(int, sizes)
        return cls(cell, T, N, I, H, dtype, frozenset(options.split(",")) - {"train"})

    def __str__(self) -> str:
        options = ",".join(o for o in OPTIONS if o in self.options) or "train"
        return f"{self.cell}:T{self.T},N{self.N},I{self.I},H{self.H}:{self.dtype}:{options}"

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
    w_hh: Array
    b_ih: Array | None
    b_hh: Array | None
    h0: Array | None
    c0: Array | None
    lengths: NDArray[np.int64] | None
    dy: Array
    dhn: Array | None
    dcn: Array | None

    def astype(self, dtype: Any) -> Inputs:
        return self._replace(
            **{k: v.astype(dtype) for k, v in self._asdict().items() if v is not None and k != "lengths"}
        )


def draw(problem: Problem) -> Inputs:
    """The arrays of a problem: inputs and states of order 1, products with the weights as well."""
    T, N, I, H, G = problem.T, problem.N, problem.I, problem.H, GATES[problem.cell]
    rng = np.random.default_rng(zlib.crc32(str(problem).encode()))

    def normal(*shape: int, scale: float = 1.0) -> Array:
        drawn: Array = (rng.standard_normal(shape) * scale).astype(DTYPES[problem.dtype])
        return drawn

    has = problem.options.__contains__
    has_c = _core.cells[problem.cell]["has_c"]
    w_scale = 0.0 if has("zeros") else 0.6 / np.sqrt(H)
    b_ih = normal(G * H, scale=0.3)
    lengths = None
    if has("empty"):
        lengths = np.zeros(N, np.int64)
    elif has("lengths"):
        lengths = rng.integers(0, T + 1, N)
        lengths[:2] = [T, 0][: len(lengths)]
        lengths = rng.permutation(lengths)
    elif has("half"):
        some = rng.integers(1, max(T, 2), N // 2)
        lengths = rng.permutation(np.concatenate([some, T - some, [max(T // 2, 1)] * (N % 2)]).astype(np.int64))
    inputs = Inputs(
        x=normal(T, N, I),
        w_ih=normal(G * H, I, scale=0.0 if has("zeros") else 0.6 / np.sqrt(I)),
        w_hh=normal(G * H, H, scale=w_scale),
        b_ih=None if has("nobias") else np.copysign(b_ih.dtype.type(50), b_ih) if has("saturated") else b_ih,
        b_hh=None if has("nobias") else normal(G * H, scale=0.3),
        h0=normal(N, H) if has("h0") else None,
        c0=normal(N, H) if has("h0") and has_c else None,
        lengths=lengths,
        dy=normal(T, N, H, scale=1e-36 if has("subnormal") else 1.0),
        dhn=normal(N, H) if has("h0") else None,
        dcn=normal(N, H) if has("h0") and has_c else None,
    )
    if has("nan"):
        inputs.x[:1, :1, :1] = np.nan
    return inputs


def gradients_of(problem: Problem) -> list[str]:
    """The gradients that a training step of the problem computes: those of what it was given."""
    names = ["dw_ih", "dw_hh"] + ["db_ih", "db_hh"] * ("nobias" not in problem.options)
    names += ["dx"] * ("nodx" not in problem.options)
    return names + (["dh0"] + ["dc0"] * _core.cells[problem.cell]["has_c"]) * ("h0" in problem.options)


def tape_of(
    problem: Problem, inputs: Inputs, backend: str | None = "cpu", num_threads: int | None = None
) -> functional.Tape:
    """The forward pass of a problem on a backend."""
    return functional.forward(
        problem.cell, *inputs[:7], lengths=inputs.lengths, reverse="reverse" in problem.options,
        backend=backend, num_threads=num_threads, training=problem.trains,
    )  # fmt: skip


def run(
    problem: Problem,
    inputs: Inputs,
    backend: str | None = "cpu",
    num_threads: int | None = None,
    wanted: list[str] | None = None,
) -> dict[str, Array]:
    """Every result of a problem on a backend, by name: y hn cn, gates c of the tape, and the gradients."""
    tape = tape_of(problem, inputs, backend, num_threads)
    results = {"y": tape.y, "hn": tape.hn, "cn": tape.cn}
    if problem.trains:
        grads = functional.backward(tape, inputs.dy, inputs.dhn, inputs.dcn, wanted=wanted, num_threads=num_threads)
        results = {**results, "gates": tape.gates, "c": tape.c, **grads._asdict()}
    return {name: array for name, array in results.items() if array is not None}
