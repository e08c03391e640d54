"""How large a layer may be for the persistent CUDA plan, card by card: `python benchmarks/cuda_plan.py [--out FILE]`.

Computed by cpp/cuda/plan.hpp from each card's limits (tests/plans.py says whose numbers they are); nothing is measured.
For each card, cell, dtype and batch: the largest H that forward and backward run in one launch each, and the plan
there; and what PyTorch asks cuDNN for at that H, and up to which H it asks for a persistent algorithm.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cuda_evidence import write

import gatewise as gw
from compiler import ROOT
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/cuda_plan.csv")
    arguments = parser.parse_args()
    cells = [name for name in gw.cells() if plan(CARDS["T4"], problem(name, 1, 8, "f32", False)).persistent]
    rows = [
        row(card, cell, dtype, batch, backward)
        for card in CARDS for cell in cells for dtype in DTYPES for batch in BATCHES for backward in (False, True)
    ]  # fmt: skip
    write(arguments.out, rows)
    print(f"{'largest H at N = 32':<22}" + "".join(f"{dtype:>14}" for dtype in DTYPES) + "   (forward/backward)")
    found = {(r["card"], r["cell"], r["dtype"], r["pass"]): r["largest_H"] for r in rows if r["N"] == 32}
    for card in CARDS:
        for cell in cells:
            both = [f"{found[card, cell, d, 'forward']}/{found[card, cell, d, 'backward']}" for d in DTYPES]
            print(f"{card:<10} {cell:<11}" + "".join(f"{text:>14}" for text in both))


if __name__ == "__main__":
    main()
