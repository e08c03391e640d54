"""What the launch plan makes of each card: `python benchmarks/cuda_plan.py [--results DIR]`.

Computed by cpp/cuda/plan.hpp from each card's limits (tests/plans.py says whose numbers they are); nothing is measured.
  cuda_plan.csv       for each card, cell, dtype and batch: the largest H that forward and backward run in one launch
                      each, and the plan there; and what PyTorch asks cuDNN for at that H, and up to which H it asks for
                      a persistent algorithm
  cuda_roofline.csv   the least time of a step on a card, from its data sheet, and what bounds it
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cuda_evidence import RESULTS, Row, write

import gatewise as gw
from plans import CARDS, DTYPES, FRAGMENT_BYTES, library, plan, problem, reason

BATCHES = 1, 32, 128
# cuDNN's cells, with the largest H, forward and backward, for which PyTorch asks for the algorithm "persist static,
# small H": get_algo() of aten/src/ATen/native/cudnn/RNN.cpp, on any card that we have a plan for, for full sequences of
# one direction without projection. In float16 alone it may also ask for "persist static", not for GRU; see there.
CUDNN = {"lstm": (192, 128), "gru": (192, 128), "rnn_tanh": (384, 256), "rnn_relu": (384, 256)}


def cudnn(cell: str, dtype: str, backward: bool) -> int | None:
    """The largest H for which PyTorch has cuDNN run a persistent algorithm; None: cuDNN has no such cell."""
    if cell not in CUDNN:
        return None
    return 0 if dtype == "f64" else CUDNN[cell][backward]


def row(card: str, cell: str, dtype: str, batch: int, backward: bool) -> dict[str, object]:
    limits = CARDS[card]
    largest = library().largest_H(limits, problem(cell, batch, 0, dtype, backward))
    made = plan(limits, problem(cell, batch, largest, dtype, backward))
    beyond = plan(limits, problem(cell, batch, largest + 1, dtype, backward))
    persistent = cudnn(cell, dtype, backward)
    at_largest = "" if persistent is None else "standard" if largest > persistent else "persist static, small H"
    return {
        "card": card, "capability": f"{limits.major}.{limits.minor}", "cell": cell, "dtype": dtype, "N": batch,
        "pass": "backward" if backward else "forward", "largest_H": largest, "blocks": made.grid_units,
        "threads": made.block, "units": made.units, "registers": made.registers,
        "register_KB": made.register_fragments * FRAGMENT_BYTES / 1024,
        "shared_weights_KB": (made.fragments - made.register_fragments) * FRAGMENT_BYTES / 1024,
        "shared_KB": made.shared_bytes / 1024, "beyond": reason(beyond),
        "cudnn_persistent_H": "" if persistent is None else persistent, "cudnn_at_largest_H": at_largest,
    }  # fmt: skip


# ---- The least time of a step -------------------------------------------------------------------------------


class Sheet(NamedTuple):
    """What a card's maker promises: rates of multiplications and additions in 10^12 a second, without sparsity, bytes
    from memory in 10^9 a second, and the boost clock in GHz."""

    f32: float
    f64: float
    memory: float
    clock: float


# NVIDIA's data sheets and white papers: T4; A100 40 GB (SXM4); GA102 (RTX 3090); Ada (RTX 4090); L4; H100 (SXM5); the
# HGX B200's; RTX Blackwell (RTX 5090). Where a sheet leaves double out, it is 1/32 of float's rate (T4) or 1/64. The
# sheets of H100 and B200 give no clock: theirs are those that drivers report as the most.
SHEETS = {
    "T4": Sheet(8.1, 8.1 / 32, 320, 1.590),
    "A100 40GB": Sheet(19.5, 9.7, 1555, 1.410),
    "RTX 3090": Sheet(35.6, 35.6 / 64, 936, 1.695),
    "RTX 4090": Sheet(82.6, 82.6 / 64, 1008, 2.520),
    "L4": Sheet(30.3, 30.3 / 64, 300, 2.040),
    "H100 SXM": Sheet(66.9, 33.5, 3350, 1.980),
    "B200": Sheet(80.0, 40.0, 8000, 1.965),
    "RTX 5090": Sheet(104.8, 104.8 / 64, 1792, 2.407),
}
SHARED_BYTES = 128  # of shared memory that a multiprocessor reads or writes in a clock: 32 banks of 4 bytes


def step(card: str, cell: str, dtype: str, N: int, H: int, backward: bool) -> Row:
    """The least time of one step of a training layer with I = H on a card, by what can bound it.

    flops     of the products: of x and h forward; backward the same, and again for the gradients of the weights
    memory    what arrives from memory and goes to it once, whatever the caches: arguments, results, the tape; w_hh
              too, if it is read anew at each step and the L2 cache cannot hold it
    shared    persistent only: weights that are not in registers, once for every four sequences (Exact::sequences), and
              a batch tile's sums, in and out
    Nothing is counted for the barrier of a persistent step or for the launches of a stepwise one.
    """
    limits, sheet, facts = CARDS[card], SHEETS[card], gw.cells()[cell]
    G, bytes_each = facts["G"], DTYPES[dtype][0]
    made = plan(limits, problem(cell, N, H, dtype, backward))
    flops = 2 * N * G * H * (H + H) * (2 if backward else 1)
    tape = (facts["S"] + facts["has_c"]) * H
    # forward: x in, y out; backward: dy, x and y in, dx out
    numbers = N * (tape + (4 if backward else 2) * H)
    whole = G * H * H * bytes_each
    moved = numbers * bytes_each + (0 if made.persistent or whole <= limits.l2_bytes else whole)
    microseconds = {"flops": flops / getattr(sheet, dtype) * 1e-6, "memory": moved / sheet.memory * 1e-3, "shared": 0.0}
    if made.persistent:
        held = (made.fragments - made.register_fragments) * FRAGMENT_BYTES
        shared = held * -(-N // 4) + 2 * (made.shared_bytes - held) * -(-N // made.batch_tile)
        microseconds["shared"] = shared / (SHARED_BYTES * sheet.clock) * 1e-3
    by = max(microseconds, key=lambda name: microseconds[name])
    return {
        "card": card, "cell": cell, "dtype": dtype, "pass": "backward" if backward else "forward", "N": N, "H": H,
        "loop": "persistent" if made.persistent else "stepwise", "mflop": round(flops / 1e6, 3),
        "kb": round(moved / 1e3, 3), **{f"{name}_us": f"{us:.3g}" for name, us in microseconds.items()},
        "least_us": f"{microseconds[by]:.3g}", "bound_by": by,
    }  # fmt: skip


def roofline() -> Iterator[Row]:
    for card, cell, dtype, N, H, backward in itertools.product(
        SHEETS, ("lstm", "gru"), ("f32", "f64"), (1, 32, 128), (128, 256, 512, 1024, 2048), (False, True)
    ):
        yield step(card, cell, dtype, N, H, backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="DIR", default=RESULTS)
    folder: Path = parser.parse_args().results
    cells = [name for name in gw.cells() if plan(CARDS["T4"], problem(name, 1, 8, "f32", False)).persistent]
    rows = [
        row(card, cell, dtype, batch, backward)
        for card in CARDS for cell in cells for dtype in DTYPES for batch in BATCHES for backward in (False, True)
    ]  # fmt: skip
    write(folder / "cuda_plan.csv", rows)
    write(folder / "cuda_roofline.csv", roofline())
    print(f"{'largest H at N = 32':<22}" + "".join(f"{dtype:>14}" for dtype in DTYPES) + "   (forward/backward)")
    found = {(r["card"], r["cell"], r["dtype"], r["pass"]): r["largest_H"] for r in rows if r["N"] == 32}
    for card in CARDS:
        for cell in cells:
            both = [f"{found[card, cell, d, 'forward']}/{found[card, cell, d, 'backward']}" for d in DTYPES]
            print(f"{card:<10} {cell:<11}" + "".join(f"{text:>14}" for text in both))


if __name__ == "__main__":
    main()
