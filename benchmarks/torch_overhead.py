"""The own cost of gatewise.torch's modules and of torch.nn's: `python benchmarks/torch_overhead.py [--out FILE]`.

One step of one sequence, H = 8, forward and backward through autograd, on one thread: next to no arithmetic. Outputs
and gradients are compared first, then both take turns. Larger problems: `make bench ARGS="--party gatewise.torch"`.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from contextlib import nullcontext
from typing import Any

import torch

import gatewise as gw
from gatewise import bench

H = 8
SAME = 1e-5  # of the largest number: float32 sums of a few terms in another order


class Step:
    """A party as gatewise.bench times them."""

    window = nullcontext

    def __init__(self, module: Any, x: torch.Tensor, dy: torch.Tensor) -> None:
        self.module, self.x, self.dy = module, x, dy
        self.inputs = [x, *module.parameters()]

    def step(self) -> tuple[torch.Tensor, ...]:
        out = self.module(self.x)
        y = out[0] if isinstance(out, tuple) else out
        return y, *torch.autograd.grad(y, self.inputs, self.dy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", help="write the rows there, as CSV")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    print(f"gatewise {gw.__version__} ({gw.backends()['cpu']}), torch {torch.__version__}, µs forward and backward")
    for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
        theirs, ours = getattr(torch.nn, name)(H, H), getattr(gw.torch, name)(H, H)
        ours.load_state_dict(theirs.state_dict())
        axes = (1,) if name.endswith("Cell") else (1, 1)
        x, dy = torch.randn(*axes, H, requires_grad=True), torch.randn(*axes, H)
        parties = Step(theirs, x, dy), Step(ours, x, dy)
        for a, b in zip(*(party.step() for party in parties)):
            if not (a - b).abs().max() <= SAME * a.abs().max():
                print(f"{name}: the results differ")
                return 1
        calls = [bench.calls_of(party, bench.WINDOW)[0] for party in parties]
        turns = [[bench.seconds_a_call(*pair) for pair in zip(parties, calls)] for _ in range(bench.ROUNDS)]
        low, ratio, high = statistics.quantiles([peer / own for peer, own in turns], n=4)
        peer, own = (1e6 * statistics.median(column) for column in zip(*turns))
        rows.append({
            "module": name, "us": round(own, 1), "torch_us": round(peer, 1), "torch/gatewise": round(ratio, 3),
            "quartiles": f"{low:.2f}-{high:.2f}",
        })  # fmt: skip
        print("  ".join(f"{value!s:>9}" for value in rows[-1].values()), flush=True)
    if arguments.out:
        with open(arguments.out, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
