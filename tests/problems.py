"""What the tests judge problems by. A result is judged by its distance to the float64 reference, and that distance
by PyTorch's own. Problems themselves, one string each, are the package's: gatewise.problems.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

import gatewise as gw
from gatewise.peers import TORCH, ours
from gatewise.problems import (
    CELLS,
    DTYPES,
    GATES,
    OPTIONS,
    Inputs,
    Problem,
    draw,
    fits,
    kept_of,
    options_of,
    run,
    tape_of,
)  # fmt: skip

__all__ = [
    "CELLS", "DTYPES", "GATES", "OPTIONS", "TORCH", "Inputs", "Problem", "biting", "check", "draw", "fits", "kept_of",
    "options_of", "run", "tape_of", "truth",
]  # fmt: skip


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

    (T, N, I), H, R = inputs.x.shape, problem.H, problem.R
    lengths = np.full(N, T) if inputs.lengths is None else inputs.lengths
    some = np.flatnonzero(lengths)  # PyTorch packs no sequence of length 0
    kind, extra = TORCH[problem.cell]
    has_c = kind == "LSTM"
    dtype = getattr(torch, inputs.x.dtype.name)
    if R != H:
        extra = {**extra, "proj_size": R}
    layer = getattr(torch.nn, kind)(I, H, bias=inputs.b_ih is not None, dtype=dtype, **extra)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.from_numpy(getattr(inputs, ours(name)))

    def leaf(array: np.ndarray | None, size: int = H) -> torch.Tensor:
        array = np.zeros((N, size), inputs.x.dtype) if array is None else array
        return torch.from_numpy(array.copy()).requires_grad_()

    def walk(a: torch.Tensor) -> torch.Tensor:
        """Each sequence in the order in which it is walked; applied again, back in the order of time."""
        if "reverse" not in problem.options:
            return a
        t = np.arange(T)[:, None]
        return a[np.where(t < lengths, lengths - 1 - t, t), np.arange(N)]

    x, h0, c0 = leaf(inputs.x), leaf(inputs.h0, R), leaf(inputs.c0)
    packed = torch.nn.utils.rnn.pack_padded_sequence(walk(x)[:, some], lengths[some], enforce_sorted=False)
    state = (h0[None, some], c0[None, some]) if has_c else h0[None, some]
    out, state = layer(packed, state)
    y, hn, cn = torch.zeros(T, N, R, dtype=x.dtype), h0.clone(), c0.clone()
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


@cache
def torch_errors(problem: Problem) -> dict[str, float]:
    """PyTorch's largest error in each result, in the problem's dtype; {} where it cannot run."""
    if not torch_runs(problem):
        return {}
    results = run_torch(problem, draw(problem))
    return {name: distance(results[name], exact) for name, exact in truth(problem).items() if name in results}


BEYOND_TORCH = {"reset", "reset0", "mask", "zoneout", "expected", "clip"}


def torch_runs(problem: Problem) -> bool:
    """PyTorch has the cell and its options; it takes neither an empty batch nor one of nothing but empty sequences."""
    own = BEYOND_TORCH | {"empty", "batch", "packed"}
    return problem.cell in TORCH and problem.T * problem.N > 0 and not problem.options & own


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
        if problem.cell not in TORCH or problem.options & BEYOND_TORCH:
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
    *(
        f"{shape}:dtype:{options}"
        for shape in ("T8,N5,I6,H19", "T17,N12,I3,H40")
        for options in (
            *("reset,h0", "reset0,h0,reverse,lengths", "mask,h0", "zoneout,h0", "expected,lengths", "clip,h0"),
            *("project,h0", "project,states,mask,reset0,h0", "infer,project,zoneout,reset"),
            *("batch,h0,lengths", "packed,h0", "packed,reverse,reset", "strided,nobias", "strided,batch,reverse"),
            *("states,h0,lengths", "checkpoints,h0,lengths", "checkpoints,reset,reverse"),
            *("zoneout,mask,reset,states,h0", "zoneout,project,checkpoints,packed,clip,h0"),
        )
    ),
]


def biting(cell: str, dtype: str) -> list[Problem]:
    """The problems every backend must get right, for one cell and dtype; an option that the cell lacks is left out."""
    problems = []
    for text in BITING:
        shape, _, options = text.split(":")
        if CELLS[cell]["normed"] and shape.endswith("H1"):
            continue  # of a single unit normalisation leaves only its rounding errors
        own = [option for option in options.split(",") if fits(cell, [option])]
        problems.append(Problem.parse(f"{cell}:{shape}:{dtype}:{','.join(own) or 'train'}"))
    return list(dict.fromkeys(problems))
