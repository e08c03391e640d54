"""gatewise.torch's modules against torch.nn's: `python benchmarks/torch_layers.py [--threads 1] [--out FILE.csv]`.

Forward and backward through autograd on both sides, with the same weights, input and gradient; outputs and gradients
are compared first, then both take turns. The last problem, T = N = 1 and H = 8, is the modules' own cost.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import gatewise as gw

SIZES = (  # T, N, I, H
    (64, 1, 32, 32), (64, 16, 32, 64), (256, 8, 16, 64), (64, 32, 64, 128), (128, 64, 64, 128), (64, 32, 128, 256),
    (1000, 1, 40, 128), (1, 1, 8, 8),
)  # fmt: skip
SAME = 1e-3  # of the largest number: float32 sums of thousands of terms in another order
ROUNDS, WINDOW = 9, 0.03


def step(module: Any, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    def run() -> tuple[torch.Tensor, ...]:
        out = module(x)
        y = out[0] if isinstance(out, tuple) else out
        return y, *torch.autograd.grad(y, [x, *module.parameters()], dy)

    return run


def window(run: Callable[[], Any]) -> float:
    """Seconds a call, over as many as fill a window."""
    start, calls = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < WINDOW:
        run()
        calls += 1
    return taken / calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", metavar="FILE", help="write the rows there, as CSV")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    print(f"gatewise {gw.__version__} ({gw.backends()['cpu']}), torch {torch.__version__}, threads {arguments.threads}")
    for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
        for T, N, I, H in SIZES[-1:] if name.endswith("Cell") else SIZES:
            theirs, ours = getattr(torch.nn, name)(I, H), getattr(gw.torch, name)(I, H)
            ours.load_state_dict(theirs.state_dict())
            shape = (N,) if name.endswith("Cell") else (T, N)
            x, dy = torch.randn(*shape, I, requires_grad=True), torch.randn(*shape, H)
            peer, own = step(theirs, x, dy), step(ours, x, dy)
            for a, b in zip(peer(), own()):
                if not (a - b).abs().max() <= SAME * a.abs().max():
                    print(f"{name}: T{T},N{N},I{I},H{H}: the results differ")
                    return 1
            pairs = [(window(peer), window(own)) for _ in range(ROUNDS)]
            low, ratio, high = statistics.quantiles([p / o for p, o in pairs], n=4)
            mine = statistics.median(o for _, o in pairs)
            rows.append({
                "module": name, "T": T, "N": N, "I": I, "H": H, "threads": arguments.threads,
                "us": round(mine * 1e6, 1),
                "torch/gatewise": round(ratio, 3), "quartiles": f"{low:.2f}-{high:.2f}",
            })  # fmt: skip
            print("  ".join(f"{value!s:>9}" for value in rows[-1].values()), flush=True)
    print(f"least ratio {min(row['torch/gatewise'] for row in rows)}, "
          f"geometric mean {statistics.geometric_mean(row['torch/gatewise'] for row in rows):.2f}")  # fmt: skip
    if arguments.out:
        with open(arguments.out, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
