"""Problems: one string names a cell, a shape, a dtype and options, and always means the same numbers.

    lstm:T100,N32,I256,H256:f32:train          gru:T7,N3,I5,H9:f64:lengths,reverse,h0,nobias

Tests and benchmarks share this file. Every array is drawn at random from a seed made of the string: zeros
would hide errors and flatter timings. A result is judged by its distance to the float64 reference, and that
distance by PyTorch's own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

import gatewise as gw

GATES = {cell: facts["G"] for cell, facts in gw.cells().items()}
DTYPES = {"f32": np.float32, "f64": np.float64}
TORCH = {  # PyTorch's layer and its options, for the cells that it has too: only they are compared with it
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
OPTIONS = {
    "train": "forward and backward (the default)",
    "infer": "forward only",
    "lengths": "unequal lengths in any order, with a 0 and a full one as soon as N > 1",
    "empty": "every length 0",
    "reverse": "walked from the last step to the first",
    "h0": "initial states given, and gradients of the final states coming in",
    "nobias": "no b_ih, no b_hh",
    "saturated": "biases of ±50",
    "zeros": "weights of 0",
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
        for word, known in [(cell, GATES), (dtype, DTYPES), *((o, OPTIONS) for o in options.split(","))]:
            if word not in known:
                raise ValueError(f"problem {text!r}: {word!r} is none of {', '.join(known)}")
        return cls(cell, *map(int, sizes), dtype, frozenset(options.split(",")) - {"train"})

    def __str__(self) -> str:
        options = ",".join(o for o in OPTIONS if o in self.options) or "train"
        return f"{self.cell}:T{self.T},N{self.N},I{self.I},H{self.H}:{self.dtype}:{options}"


class Inputs(NamedTuple):
    """The arrays of a problem, under the names of the functional API; None where the problem has none."""

    x: np.ndarray
    w_ih: np.ndarray
    w_hh: np.ndarray
    b_ih: np.ndarray | None
    b_hh: np.ndarray | None
    h0: np.ndarray | None
    c0: np.ndarray | None
    lengths: np.ndarray | None
    dy: np.ndarray
    dhn: np.ndarray | None
    dcn: np.ndarray | None

    def astype(self, dtype: type) -> Inputs:
        return self._replace(
            **{k: v.astype(dtype) for k, v in self._asdict().items() if v is not None and k != "lengths"}
        )


def draw(problem: Problem) -> Inputs:
    """The arrays of a problem: inputs and states of order 1, products with the weights as well."""
    T, N, I, H, G = problem.T, problem.N, problem.I, problem.H, GATES[problem.cell]
    rng = np.random.default_rng(zlib.crc32(str(problem).encode()))

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(DTYPES[problem.dtype])

    has = problem.options.__contains__
    has_c = gw.cells()[problem.cell]["has_c"]
    w_scale = 0.0 if has("zeros") else 0.6 / np.sqrt(H)
    b_ih = normal(G * H, scale=0.3)
    lengths = None
    if has("empty"):
        lengths = np.zeros(N, np.int64)
    elif has("lengths"):
        lengths = rng.integers(0, T + 1, N)
        lengths[:2] = [T, 0][: len(lengths)]
        lengths = rng.permutation(lengths)
    return Inputs(
        x=normal(T, N, I),
        w_ih=normal(G * H, I, scale=0.0 if has("zeros") else 0.6 / np.sqrt(I)),
        w_hh=normal(G * H, H, scale=w_scale),
        b_ih=None if has("nobias") else np.copysign(b_ih.dtype.type(50), b_ih) if has("saturated") else b_ih,
        b_hh=None if has("nobias") else normal(G * H, scale=0.3),
        h0=normal(N, H) if has("h0") else None,
        c0=normal(N, H) if has("h0") and has_c else None,
        lengths=lengths,
        dy=normal(T, N, H),
        dhn=normal(N, H) if has("h0") else None,
        dcn=normal(N, H) if has("h0") and has_c else None,
    )


def tape_of(
    problem: Problem, inputs: Inputs, backend: str = "cpu", num_threads: int | None = None
) -> gw.functional.Tape:
    """The forward pass of a problem on a backend."""
    return gw.functional.forward(
        problem.cell, *inputs[:7], lengths=inputs.lengths, reverse="reverse" in problem.options,
        backend=backend, num_threads=num_threads, training="infer" not in problem.options,
    )  # fmt: skip


def run(
    problem: Problem,
    inputs: Inputs,
    backend: str = "cpu",
    num_threads: int | None = None,
    wanted: list[str] | None = None,
) -> dict[str, np.ndarray]:
    """Every result of a problem on a backend, by name: y hn cn, gates c of the tape, and the gradients."""
    tape = tape_of(problem, inputs, backend, num_threads)
    results = {"y": tape.y, "hn": tape.hn, "cn": tape.cn}
    if "infer" not in problem.options:
        grads = gw.functional.backward(tape, inputs.dy, inputs.dhn, inputs.dcn, wanted=wanted, num_threads=num_threads)
        results |= {"gates": tape.gates, "c": tape.c, **grads._asdict()}
    return {name: array for name, array in results.items() if array is not None}


@cache
def truth(problem: Problem) -> dict[str, np.ndarray]:
    """The results of the reference in float64, on the very numbers of the problem. Do not write to them."""
    return run(problem, draw(problem).astype(np.float64), "reference")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Problems are small and machines busy: PyTorch's threads would mostly spin and wait for each other."""
    import torch

    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


@one_torch_thread()
def run_torch(problem: Problem, inputs: Inputs) -> dict[str, np.ndarray]:
    """The results of PyTorch's own layer in the inputs' dtype, of the same names as those of `run`."""
    import torch

    (T, N, I), H = inputs.x.shape, problem.H
    lengths = np.full(N, T) if inputs.lengths is None else inputs.lengths
    some = np.flatnonzero(lengths)  # PyTorch packs no sequence of length 0
    kind, extra = TORCH[problem.cell]
    has_c = kind == "LSTM"
    dtype = torch.from_numpy(inputs.x).dtype
    layer = getattr(torch.nn, kind)(I, H, bias=inputs.b_ih is not None, dtype=dtype, **extra)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.from_numpy(getattr(inputs, ours(name)))

    def leaf(array: np.ndarray | None) -> torch.Tensor:
        array = np.zeros((N, H), inputs.x.dtype) if array is None else array
        return torch.from_numpy(array.copy()).requires_grad_()

    def walk(a: torch.Tensor) -> torch.Tensor:
        """Each sequence in the order in which it is walked; applied again, back in the order of time."""
        if "reverse" not in problem.options:
            return a
        t = np.arange(T)[:, None]
        return a[np.where(t < lengths, lengths - 1 - t, t), np.arange(N)]

    x, h0, c0 = leaf(inputs.x), leaf(inputs.h0), leaf(inputs.c0)
    packed = torch.nn.utils.rnn.pack_padded_sequence(walk(x)[:, some], lengths[some], enforce_sorted=False)
    state = (h0[None, some], c0[None, some]) if has_c else h0[None, some]
    out, state = layer(packed, state)
    y, hn, cn = torch.zeros(T, N, H, dtype=x.dtype), h0.clone(), c0.clone()
    y[:, some] = torch.nn.utils.rnn.pad_packed_sequence(out, total_length=T)[0]
    hn[some] = state[0][0] if has_c else state[0]
    cn[some] = state[1][0] if has_c else c0[some]
    y = walk(y)

    pairs = [(y, inputs.dy), (hn, inputs.dhn), (cn, inputs.dcn)]
    sum((a * torch.from_numpy(da)).sum() for a, da in pairs if da is not None).backward()
    results = {"y": y, "hn": hn, "dx": x.grad, "dh0": h0.grad}
    results |= {"cn": cn, "dc0": c0.grad} if has_c else {}
    results |= {"d" + ours(name): parameter.grad for name, parameter in layer.named_parameters()}
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def ours(torch_name: str) -> str:
    """weight_ih_l0 is our w_ih."""
    return torch_name.replace("weight", "w").replace("bias", "b").removesuffix("_l0")


@cache
def torch_errors(problem: Problem) -> dict[str, float]:
    """PyTorch's largest error in each result, in the problem's dtype; {} where it cannot run."""
    if not torch_runs(problem):
        return {}
    results = run_torch(problem, draw(problem))
    return {name: distance(results[name], exact) for name, exact in truth(problem).items() if name in results}


def torch_runs(problem: Problem) -> bool:
    """PyTorch has the cell; it takes neither an empty batch nor a batch of nothing but empty sequences."""
    return problem.cell in TORCH and problem.T * problem.N > 0 and "empty" not in problem.options


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference; NaN if there is one anywhere."""
    assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
    return float(np.abs(a - b).max(initial=0.0))


# Roundings that a result may be off by where PyTorch happens to have no error at all. They are roundings of
# the largest output or the largest gradient: one that came out small may owe that to cancellation.
FLOOR = 16


def check(problem: Problem, results: dict[str, np.ndarray]) -> None:
    """Assert that every result is within twice PyTorch's error of the float64 reference, plus a small floor.

    What PyTorch does not show (gates, cell states, gradients of absent biases) is held to its error in y, and a
    cell that it does not have to the bound of `gatewise check`.
    """
    exact, errors, limits = truth(problem), torch_errors(problem), np.finfo(DTYPES[problem.dtype])
    assert results.keys() == exact.keys(), f"{problem}: results {set(results) ^ set(exact)}"
    sizes = {name: np.abs(a).max(initial=0.0) for name, a in exact.items()}
    shape = problem.T, problem.N, problem.I, problem.H
    for name, value in results.items():
        assert value.dtype == limits.dtype, f"{problem}: {name} is {value.dtype}"
        scale = max(size for other, size in sizes.items() if other.startswith("d") == name.startswith("d"))
        err = distance(value, exact[name])
        floor = FLOOR * limits.eps
        if problem.cell not in TORCH:
            floor = gw.check.bound(problem.cell, limits.dtype.name, shape, name)
        bound = 2 * errors.get(name, errors.get("y", 0.0)) + floor * scale + limits.tiny
        if not (err <= bound):
            raise AssertionError(
                f"{problem}: {name} is off by {err:.3g}, more than {bound:.3g} (largest value {scale:.3g})"
            )


# Shapes that bite: around every register width, single everything, nothing at all, an input much wider than
# the state, more rows and more columns than a kernel takes in one piece.
SMALL = [f"T7,N3,I5,H{H}" for H in (1, 7, 8, 9, 15, 16, 17, 21, 33)] + [
    "T6,N5,I1,H12",
    "T9,N1,I4,H10",
    "T1,N4,I3,H8",
    "T1,N1,I1,H1",
    "T5,N13,I17,H24",
    "T4,N6,I70,H130",
]
NOTHING = ["T0,N3,I4,H5", "T3,N0,I4,H5", "T0,N0,I1,H1"]
LARGE = ["T150,N41,I3,H10", "T24,N16,I20,H264", "T2,N3,I1100,H6"]
BITING = [
    *(f"{shape}:dtype:{options}" for shape in SMALL for options in ("h0", "lengths,reverse,h0,nobias")),
    *(f"{shape}:dtype:{options}" for shape in NOTHING for options in ("train", "lengths,reverse,h0")),
    *(f"{shape}:dtype:{options}" for shape in LARGE for options in ("h0", "lengths,reverse")),
    *(
        f"T8,N5,I6,H19:dtype:{options}"
        for options in (
            "train",
            "nobias",
            "reverse",
            "lengths",
            "lengths,reverse",
            "empty",
            "empty,reverse,h0",
        )
    ),
    *(f"T6,N4,I5,H11:dtype:{options}" for options in ("saturated,h0", "zeros,h0", "zeros,nobias", "infer,h0,lengths")),
]


def biting(cell: str, dtype: str) -> list[Problem]:
    """The problems every backend must get right, for one cell and dtype."""
    return [Problem.parse(f"{cell}:{text.replace('dtype', dtype)}") for text in BITING]
