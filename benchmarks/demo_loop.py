"""The demo's training against the same loop in plain torch.nn: `python benchmarks/demo_loop.py [--data DIR]`.

Same patients, features, cells, sizes, initial weights, batches in the same order, loss, clipping, Adam and epochs, on
the same number of threads; validation after every epoch on both sides. `gatewise.sepsis.timing` has the loops and says
how they are written.

They take turns. The work is the same if the losses are: they are compared epoch by epoch, and the script ends
with 1 if the first epoch's differ by more than rounding does. "fit" is all of it, from lists of arrays to a trained
model; "in all" adds what the demo does besides (reading, features, logistic regression, scoring), the same for both.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gatewise as gw
from gatewise import _core, sepsis
from gatewise.sepsis import features, metrics, models, timing

SEED = 0


def timed(what: str, function: Callable[[], Any], parts: dict[str, float]) -> Any:
    start = time.perf_counter()
    result = function()
    parts[what] = time.perf_counter() - start
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="the demo's training against the same loop in torch.nn")
    parser.add_argument("--data", metavar="DIR", help="PhysioNet/CinC 2019 records (default: a simulated cohort)")
    parser.add_argument("--patients", type=int, help="of the simulated cohort (4000), or the first of the records")
    parser.add_argument("--epochs", type=int, help="default: the demo's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", nargs="+", default=list(models.CELLS.values()), choices=list(models.CELLS.values()))
    parser.add_argument("--rounds", type=int, default=1, help="turns of each; the median fit counts")
    parser.add_argument("--out", metavar="DIR", help="write demo_loop.csv and demo_loop.png, the loss curves, there")
    arguments = parser.parse_args()

    options = dict(sepsis.REAL if arguments.data else sepsis.SIMULATED)
    options |= {"random_state": SEED, "num_threads": arguments.threads, "verbose": 0}
    if arguments.epochs:
        options["max_epochs"] = arguments.epochs
    print(f"gatewise {gw.__version__} ({_core.choose_arch()}), torch {torch.__version__}, {arguments.threads} threads")

    common: dict[str, float] = {}
    if arguments.data:
        records = timed("reading", lambda: sepsis.read(arguments.data), common)
        if arguments.patients:
            records = records.select(np.arange(records.length.size) < arguments.patients)
    else:
        records = timed("simulating", lambda: sepsis.simulate(arguments.patients or 4000, SEED), common)
    split = records.split()
    chosen = [records.select(part) for part in split]

    def prepared() -> list[models.Rows]:
        preparation = features.fit(chosen[0])
        return [models.rows(part, preparation, "official") for part in chosen]

    rows_of = timed("features", prepared, common)
    train, validation, test = (timing.Patients(part.sequences(part.x), part.sequences(part.label)) for part in rows_of)
    baseline = "logistic regression"
    timed(baseline, lambda: models.train(baseline, rows_of[0], rows_of[1], SEED).score(rows_of[2]), common)
    print(f"{records.length.size:,} patients, {records.label.size:,} hours, {train.x[0].shape[1]} features; {options}")
    print(", ".join(f"{what} {seconds:.1f} s" for what, seconds in common.items()) + "\n")

    curves: dict[str, dict[str, list[float]]] = {}
    rows: list[dict[str, Any]] = []
    print(f"{'cell':<6}{'loop':<16}{'s/epoch':>9}{'fit s':>8}{'score s':>9}{'torch/ours':>12}"
          f"{'train loss':>12}{'val loss':>10}{'AUROC':>8}{'AUPRC':>8}{'in kernels':>12}")  # fmt: skip
    seconds = dict.fromkeys(timing.WAYS, sum(common.values()))
    labels, same = np.concatenate(test.y), True
    for cell in arguments.cells:
        fits: dict[str, list[timing.Fit]] = {way: [] for way in timing.WAYS}
        for _ in range(arguments.rounds):
            for way, done in fits.items():
                done.append(timing.fit(way, cell, options, train, validation, test))
        ours = np.median([fit.seconds for fit in fits["gatewise"]])
        first = fits["gatewise"][0].history[0]["train_loss"]
        for way, done in fits.items():
            epoch = np.median([h["seconds"] for fit in done for h in fit.history])
            total, score = (float(np.median([getattr(fit, s) for fit in done])) for s in ("seconds", "score_seconds"))
            seconds[way] += total + score
            history = done[0].history
            kept = min(history, key=lambda h: h["val_loss"])
            auroc, auprc = metrics.areas(labels, done[0].scores)
            share = f"{np.mean([h['kernel_share'] for h in history]):.0%}" if way == "gatewise" else "-"
            print(f"{cell:<6}{way:<16}{epoch:>9.3f}{total:>8.2f}{score:>9.2f}{total / ours:>12.2f}"
                  f"{kept['train_loss']:>12.5f}{kept['val_loss']:>10.5f}{auroc:>8.4f}{auprc:>8.4f}{share:>12}",
                  flush=True)  # fmt: skip
            curves.setdefault(cell, {})[way] = [h["train_loss"] for h in history]
            rows.append({
                "cell": cell, "loop": way, "threads": arguments.threads, "epochs": len(history),
                "epoch_seconds": round(float(epoch), 4), "fit_seconds": round(total, 3),
                "fit_over_gatewise": round(float(total / ours), 3), "train_loss": round(kept["train_loss"], 6),
                "val_loss": round(kept["val_loss"], 6), "auroc": round(auroc, 5), "auprc": round(auprc, 5),
            })  # fmt: skip
            if not abs(history[0]["train_loss"] - first) <= timing.SAME_LOSS * first:
                print(f"  not the same work: first epoch's loss {history[0]['train_loss']:.6f}, ours {first:.6f}")
                same = False
    in_all = ", ".join(f"{way} {s:.1f} s ({s / seconds['gatewise']:.2f})" for way, s in seconds.items())
    print(f"\nin all, with what the demo does besides: {in_all}")
    if arguments.out:
        write(Path(arguments.out), rows, curves)
    return 0 if same else 1


def write(folder: Path, rows: list[dict[str, Any]], curves: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "demo_loop.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False, layout="constrained")
    widths = dict(zip(timing.WAYS, (7, 4.5, 2.5, 1)))  # they lie on each other
    for axis, (cell, by_side) in zip(axes[0], curves.items()):
        for side, losses in by_side.items():
            axis.plot(range(1, len(losses) + 1), losses, label=side, linewidth=widths[side])
        axis.set(title=cell.upper(), xlabel="epoch", ylabel="training loss a patient-hour")
    axes[0][0].legend()
    figure.savefig(folder / "demo_loop.png", dpi=90)


if __name__ == "__main__":
    sys.exit(main())
