"""Times training steps (forward and backward of one layer) against PyTorch, in one run: `make bench`.

Every problem is verified first, then timed: ours and PyTorch's by turns, in windows of at least 30 ms, so that both
meet the same machine. A row gives the median time of a step and its spread (half the distance between the quartiles),
the median of the ratios of neighbouring windows, and our share of the multiply-add peak that was measured in the same
process. `dx`, the gradient of the input, is computed by both sides or, where said, not wanted by either.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import gatewise as gw
from gatewise import _core

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from problems import (
    DTYPES,
    FLOOR,
    GATES,
    TORCH,
    Inputs,
    Problem,
    distance,
    draw,
    ours,
    run,
    run_torch,
    tape_of,
)

# A grid from overhead to large matrices; one step of one sequence, streams, clinical, speech and language sizes.
SHAPES = [
    "T1,N1,I8,H8", "T64,N1,I32,H32", "T1000,N1,I40,H128", "T256,N8,I16,H64", "T64,N16,I32,H64", "T64,N32,I64,H128",
    "T128,N64,I64,H128", "T40,N64,I111,H100", "T64,N32,I128,H256", "T64,N64,I256,H512",
]  # fmt: skip
WINDOW, ROUNDS = 0.03, 9
FIELDS = ("problem", "threads", "dx", "ms", "spread_ms", "torch_ms", "ratio", "gflops", "peak_share")


def our_step(problem: Problem, inputs: Inputs, threads: int, dx: bool) -> Callable[[], object]:
    wanted = ["dw_ih", "dw_hh", "db_ih", "db_hh"] + ["dx"] * dx

    def step() -> object:
        tape = tape_of(problem, inputs, num_threads=threads)
        return gw.functional.backward(tape, inputs.dy, wanted=wanted, num_threads=threads)

    return step


def torch_step(problem: Problem, inputs: Inputs, dx: bool) -> Callable[[], object]:
    kind, extra = TORCH[problem.cell]
    x, dy = torch.from_numpy(inputs.x).requires_grad_(dx), torch.from_numpy(inputs.dy)
    layer = getattr(torch.nn, kind)(problem.I, problem.H, dtype=x.dtype, **extra)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.from_numpy(getattr(inputs, ours(name)))

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x)[0].backward(dy)

    return step


def verify(problem: Problem, inputs: Inputs, threads: int) -> None:
    """Our results are within twice PyTorch's own error of PyTorch in float64, plus a small floor."""
    exact, theirs = run_torch(problem, inputs.astype(np.float64)), run_torch(problem, inputs)
    mine = run(problem, inputs, num_threads=threads)
    for name, want in exact.items():
        floor = FLOOR * np.finfo(mine[name].dtype).eps * np.abs(want).max()
        error, bound = distance(mine[name], want), 2 * distance(theirs[name], want) + floor
        if not (error <= bound):
            raise SystemExit(f"{problem}: {name} is off by {error:.3g}, more than {bound:.3g}; not timed")


def seconds_per_call(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def calls_in_window(function: Callable[[], object]) -> int:
    calls = 1
    while (taken := calls * seconds_per_call(function, calls)) < WINDOW:
        calls = max(calls + 1, int(calls * min(10, 1.2 * WINDOW / taken)))
    return calls


def measure(problem: Problem, threads: int, dx: bool, peak: float) -> dict[str, object]:
    inputs = draw(problem)
    verify(problem, inputs, threads)
    torch.set_num_threads(threads)
    sides = our_step(problem, inputs, threads, dx), torch_step(problem, inputs, dx)
    calls = [calls_in_window(side) for side in sides]
    times = np.array([[seconds_per_call(*side) for side in zip(sides, calls)] for _ in range(ROUNDS)])
    low, mine, high = np.percentile(times[:, 0], [25, 50, 75])
    I, H = problem.I, problem.H
    flops = 2 * problem.T * problem.N * GATES[problem.cell] * H * (3 * (I + H) - (0 if dx else I))
    return dict(zip(FIELDS, (
        str(problem), threads, "yes" if dx else "no", 1e3 * mine, 1e3 * (high - low) / 2, 1e3 * np.median(times[:, 1]),
        np.median(times[:, 1] / times[:, 0]), flops / mine / 1e9, flops / mine / peak / threads,
    )))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="gatewise against PyTorch, training steps of one layer")
    parser.add_argument("--cells", nargs="+", default=list(TORCH), choices=list(TORCH))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T64,N16,I32,H64")
    parser.add_argument("--dtypes", nargs="+", default=["f32"], choices=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--without-dx", action="store_true", help="as for the first layer of a network")
    parser.add_argument("--csv", type=Path, help="write the rows here as well")
    options = parser.parse_args()

    arch = _core.choose_arch()
    peaks = {d: _core.fma_rate(arch, np.dtype(DTYPES[d]).name, 0.5) for d in options.dtypes}
    versions = f"gatewise {gw.__version__} ({arch}), torch {torch.__version__}, numpy {np.__version__}"
    print(f"{versions}, {platform.platform()}")
    print("FMA peak of one core: " + ", ".join(f"{d} {peak / 1e9:.0f} GFLOP/s" for d, peak in peaks.items()))
    print(f"\n{'problem':<38} threads  dx        ms  ± spread  torch ms  torch/ours  GFLOP/s  of peak")
    rows = []
    for dtype in options.dtypes:
        for cell in options.cells:
            for shape in options.shapes:
                for threads in options.threads:
                    problem = Problem.parse(f"{cell}:{shape}:{dtype}:train")
                    row = measure(problem, threads, not options.without_dx, peaks[dtype])
                    rows.append({**row, "versions": versions, "peak_gflops": peaks[dtype] / 1e9})
                    print(
                        "{problem:<38} {threads:>7}  {dx:<3} {ms:>8.3f}  {spread_ms:>8.3f}  {torch_ms:>8.3f}"
                        "  {ratio:>10.2f}  {gflops:>7.1f}  {peak_share:>7.0%}".format(**row),
                        flush=True,
                    )
    ratios = np.array([row["ratio"] for row in rows], dtype=float)
    print(f"\ntorch/ours: geometric mean {np.exp(np.log(ratios).mean()):.2f}, least {ratios.min():.2f}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
