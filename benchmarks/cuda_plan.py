"""How large a layer may be for the persistent CUDA plan, card by card: `python benchmarks/cuda_plan.py [--out FILE]`.

Computed by cpp/cuda/plan.hpp from each card's limits (tests/plans.py says whose numbers they are); nothing is measured.
For each card, cell, dtype and batch: the largest H that forward and backward run in one launch each, and the plan
there.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import gatewise as gw
from compiler import ROOT
from plans import CARDS, DTYPES, FRAGMENT_BYTES, library, plan, problem, reason

BATCHES = 1, 32, 128


def row(card: str, cell: str, dtype: str, batch: int, backward: bool) -> dict[str, object]:
    limits = CARDS[card]
    largest = library().largest_H(limits, problem(cell, batch, 0, dtype, backward))
    made = plan(limits, problem(cell, batch, largest, dtype, backward))
    beyond = plan(limits, problem(cell, batch, largest + 1, dtype, backward))
    return {
        "card": card, "capability": f"{limits.major}.{limits.minor}", "cell": cell, "dtype": dtype, "N": batch,
        "pass": "backward" if backward else "forward", "largest_H": largest, "blocks": made.grid_units,
        "threads": made.block, "units": made.units, "registers": made.registers,
        "register_KB": made.register_fragments * FRAGMENT_BYTES / 1024,
        "shared_weights_KB": (made.fragments - made.register_fragments) * FRAGMENT_BYTES / 1024,
        "shared_KB": made.shared_bytes / 1024, "beyond": reason(beyond),
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
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'largest H at N = 32':<22}" + "".join(f"{dtype:>14}" for dtype in DTYPES) + "   (forward/backward)")
    found = {(r["card"], r["cell"], r["dtype"], r["pass"]): r["largest_H"] for r in rows if r["N"] == 32}
    for card in CARDS:
        for cell in cells:
            both = [f"{found[card, cell, d, 'forward']}/{found[card, cell, d, 'backward']}" for d in DTYPES]
            print(f"{card:<10} {cell:<11}" + "".join(f"{text:>14}" for text in both))


if __name__ == "__main__":
    main()
