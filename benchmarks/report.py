"""Writes the page of the results, tables and pictures, from the rows that were measured: `python benchmarks/report.py`.

Nothing on the page is typed: every number comes from speed.csv, torch_layers.csv and the tables of CUDA (cuda_page.py),
and the page can be written again without measuring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple, Optional

import cuda_page

from gatewise import bench, peers
from gatewise.problems import GATES, Problem

RESULTS = Path(__file__).resolve().parent / "results"
RIVALS = [name for name in peers.PEERS if name != "reference"]  # the reference is ours
NARROW = 1.2  # rows whose lead over the best peer is smaller are listed with what bounds them
NAMED = 6  # of the rows that miss a target, the worst
BASE = Problem.parse("lstm:T64,N32,I64,H128:f32:train")  # from where the set "scaling" walks

Row = dict[str, Any]


class Case(NamedTuple):
    """Ours on one problem: the row, and its rows against the others by their names."""

    problem: Problem
    row: Row
    against: dict[str, Row]

    @property
    def label(self) -> str:
        return f"`{self.problem}`" + f" on {self.row['threads']} threads" * (self.row["threads"] > 1)

    @property
    def best(self) -> Optional[Row]:
        """The row against the fastest peer."""
        rows = [self.against[name] for name in RIVALS if name in self.against]
        return min(rows, key=lambda row: row["ratio"]) if rows else None


def cases(rows: Iterable[Row]) -> list[Case]:
    """One a problem, set, arch and number of threads, in the order of the sets."""
    found: dict[Any, Case] = {}
    for row in rows:
        key = row["set"], row["problem"], row["arch"], row["threads"]
        case = found.setdefault(key, Case(Problem.parse(row["problem"]), row, {}))
        if row["against"]:
            case.against[row["against"]] = row
    order = [*bench.SETS, ""]
    return sorted(found.values(), key=lambda c: (order.index(c.row["set"]), c.row["arch"], c.row["threads"]))


def main_arch(rows: Sequence[Row]) -> str:
    """The arch that most rows were measured on; the others were forced."""
    archs = [row["arch"] for row in rows]
    return max(dict.fromkeys(archs), key=archs.count)


# ---- Targets -----------------------------------------------------------------------------------------------


@dataclass
class Target:
    """What was aimed at: each value (with its label) at least, or at most, a limit; or their geometric mean."""

    what: str
    values: list[tuple[str, float]]
    at_least: float | None = None
    at_most: float | None = None
    mean: bool = False
    form: str = "{:.2f}"

    def line(self) -> str:
        sign, limit = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        goal = f"{'geometric mean ' * self.mean}{sign} {self.form.format(limit)}"
        if not self.values:
            return f"| {self.what} | {goal} | – | not measured |"
        values = [("", _mean(v for _, v in self.values))] if self.mean else self.values
        missed = [(label, v) for label, v in values if not (v >= limit if self.at_most is None else v <= limit)]
        missed.sort(key=lambda pair: pair[1], reverse=self.at_most is not None)  # the worst first
        low, high = (self.form.format(end(v for _, v in values)) for end in (min, max))
        verdict = "**missed**" if missed else "met"
        if missed and not self.mean:
            worst = ", ".join(f"{label} {self.form.format(v)}" for label, v in missed[:NAMED])
            verdict += f" on {len(missed)} of {len(values)}: {worst}" + ", …" * (len(missed) > NAMED)
        return f"| {self.what} | {goal} | {low if low == high else f'{low} to {high}'} | {verdict} |"


def _mean(ratios: Iterable[float]) -> float:
    logs = [log(ratio) for ratio in ratios]
    return exp(sum(logs) / len(logs))


def targets(everything: Sequence[Case], arch: str) -> list[Target]:
    """The targets of the kernels' design, with what was measured. One thread unless said."""
    grid = [c for c in everything if c.row["set"] == "grid" and c.row["arch"] == arch and c.row["threads"] == 1]

    def values(chosen: Iterable[Case], value: Callable[[Case], float | None]) -> list[tuple[str, float]]:
        return [(c.label, v) for c in chosen if (v := value(c)) is not None]

    def ratio(peer: str) -> Callable[[Case], float | None]:
        return lambda c: c.against[peer]["ratio"] if peer in c.against else None

    def work(cells: str, dtype: str, option: str = "", among: Iterable[Case] = grid) -> list[Case]:
        wanted = frozenset(option.split())
        return [
            c for c in among
            if c.problem.cell in cells.split() and c.problem.dtype == dtype and c.problem.options == wanted
        ]  # fmt: skip

    def share(c: Case) -> float:
        return float(c.row["peak_share"])

    lstm, infer = work("lstm", "f32"), work("lstm gru", "f32", "infer")
    large = [c for c in lstm if c.problem.H >= 128 and c.problem.N >= 32]
    same = {"form": "{:.0%}"}
    lstm_torch = values(lstm, ratio("torch"))
    others = values(work("gru rnn_tanh rnn_relu", "f32"), ratio("torch"))
    double = values(work("lstm gru", "f64"), ratio("torch"))
    mine = [c for c in everything if c.row["arch"] == arch]
    half = [c for c in mine if c.row["set"] == "half" and c.row["threads"] == 1]
    stress = [c for c in mine if c.row["set"] == "stress" and c.row["threads"] == 1]
    stream = [c for c in mine if c.row["set"] == "stream" and c.row["threads"] == 1 and c.problem.cell == "lstm"]
    two = [c for c in mine if c.row["threads"] == 2]
    avx2 = [c for c in everything if c.row["arch"] == "avx2" and c.row["set"] == "grid" and c.row["threads"] == 1]
    avx2 = work("lstm", "f32", among=avx2)

    def of_plain(c: Case) -> float | None:
        return 1 / c.against["plain"]["ratio"] if "plain" in c.against else None

    memory = [(c.label, r["mb"] / r["against_mb"]) for c in mine for r in c.against.values() if r["against_mb"]]
    targets = [
        Target("LSTM f32 training, share of the FMA peak, H ≥ 128 and N ≥ 32", values(large, share), 0.82, **same),
        *(
            Target(f"… H = {H}, N = {N}",
                   values((c for c in lstm if (c.problem.H, c.problem.N) == (H, N)), share), limit, **same)
            for H, N, limit in ((64, 16, 0.76), (128, 1, 0.46))
        ),
        Target("LSTM f32 training against torch, both with dx", lstm_torch, 1.25),
        Target("… all together", lstm_torch, 2.2, mean=True),
        Target("a first layer (dx not wanted) against torch", values(work("lstm", "f32", "nodx"), ratio("torch")), 1.4),
        Target("GRU and RNN f32 training against torch", others, 1.5),
        Target("… all together", others, 5.0, mean=True),
        Target("f64 training against torch", double, 1.4),
        Target("… all together", double, 3.0, mean=True),
        Target("lengths that fill half of the batch: time, of the full batch's",
               values(half, of_plain), at_most=0.53),
        Target("… against torch's packed sequences", values(half, ratio("torch")), 5.0),
        Target("inference against onnxruntime", values(infer, ratio("onnxruntime")), 1.0),
        Target("… H ≤ 128", values((c for c in infer if c.problem.H <= 128), ratio("onnxruntime")), 1.3),
        *(
            Target(f"LSTM streaming, µs a step, H = {H}",
                   values((c for c in stream if c.problem.H == H), lambda c: 1e3 * c.row["ms"] / c.problem.T),
                   at_most=limit, form="{:.1f}")
            for H, limit in ((64, 2.5), (128, 5.0), (256, 20.0))
        ),
        Target("… against onnxruntime, H = 64",
               values((c for c in stream if c.problem.H == 64), ratio("onnxruntime")), 5.0),
        Target("2 threads over 1, H ≥ 128 and N ≥ 32 (the grid's training steps)",
               values((c for c in two if c.row["set"] == "grid" and c.problem.trains and c.problem.H >= 128
                       and c.problem.N >= 32), ratio("1 thread")), 1.8),
        Target("2 threads over 1, every problem (equal within 3 %)", values(two, ratio("1 thread")), 0.97),
        Target("AVX2 against torch held to AVX2, LSTM f32 training", values(avx2, ratio("torch")), 1.2),
        Target("a whole call of a function, T = N = 1, I = H = 8, forward, µs",
               values((c for c in work("lstm", "f32", "call") if c.problem.T == 1), lambda c: 1e3 * c.row["ms"]),
               at_most=3.0, form="{:.1f}"),
        Target("memory of a training step, of torch's", memory, at_most=0.6),
        Target("subnormal gradients, saturated gates, a NaN: time, of ordinary numbers'",
               values(stress, of_plain), at_most=1.2),
        Target("against the best peer, every problem and number of threads",
               values(mine, lambda c: c.best["ratio"] if c.best else None), 1.0),
    ]  # fmt: skip
    return targets


# ---- What bounds a row -------------------------------------------------------------------------------------


def bound(case: Case) -> str:
    """Where the time of a row goes, in words, from the shares that were measured."""
    row, problem = case.row, case.problem
    shares = {name: row[name] for name in ("products", "cells", "other", "call")}
    if None in shares.values():
        return (
            "not profiled: each step of a stream is a call of its own" if problem.kind == "stream" else "not profiled"
        )
    largest = max(shares, key=lambda name: shares[name])
    words = {
        "cells": "the cells' functions",
        "other": "the rest of the kernels: packing, memory between the passes, waiting for other threads",
        "call": "the call: Python, checks, allocation",
    }
    if largest != "products":
        return words[largest]
    text = f"products, at {row['peak_share'] / shares['products']:.0%} of the peak while they run"
    if problem.N <= 4:
        kb = GATES[problem.cell] * problem.H**2 * (4 if problem.dtype == "f32" else 8) / 1e3
        text += f"; each step reads {kb:,.0f} kB of w_hh for {problem.N} row{'s' * (problem.N > 1)}"
    return text


# ---- The page ----------------------------------------------------------------------------------------------


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def times(row: Row | None) -> str:
    return "–" if row is None else f"{row['ratio']:.2f}"


def provenance(rows: Sequence[Row]) -> Iterator[str]:
    yield "| arch | rows | date | machine | cores | compiler | commit | versions |"
    yield "|---|---|---|---|---|---|---|---|"
    names = ("arch", "date", "machine", "cores", "compiler", "commit", "versions")
    groups: dict[tuple[Any, ...], int] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups[key] = groups.get(key, 0) + 1
    for (arch, *rest), count in groups.items():
        yield f"| {arch} | {count} | " + " | ".join(map(str, rest)) + " |"


def summary(chosen: Sequence[Case]) -> Iterator[str]:
    yield "| work | threads | problems | torch / ours | best peer / ours | share of the peak |"
    yield "|---|---|---|---|---|---|"
    groups: dict[tuple[str, int], list[Case]] = {}
    for c in chosen:
        if c.row["set"] not in ("stress", "features"):
            groups.setdefault((bench.family(c.problem), c.row["threads"]), []).append(c)
    for (family, threads), group in sorted(groups.items()):
        torch = [c.against["torch"]["ratio"] for c in group if "torch" in c.against]
        best = [c.best["ratio"] for c in group if c.best]
        shares = [c.row["peak_share"] for c in group]
        columns = [f"{_mean(r):.2f} ({min(r):.2f} – {max(r):.2f})" if r else "–" for r in (torch, best)]
        columns.append(f"{min(shares):.0%} – {max(shares):.0%}")
        yield f"| {family} | {threads} | {len(group)} | " + " | ".join(columns) + " |"


def table(chosen: Sequence[Case]) -> Iterator[str]:
    met = [name for name in [*peers.PEERS, "plain", "1 thread", "functional"] if any(name in c.against for c in chosen)]
    yield ("| problem | threads | ms | ± | GFLOP/s | of peak | products | cells | other | call | "
           + "".join(f"{name} | " for name in met) + "notes |")  # fmt: skip
    yield "|---" * (11 + len(met)) + "|"
    for c in chosen:
        row = c.row
        columns = [
            f"`{c.problem}`", str(row["threads"]), f"{row['ms']:.4g}", percent(row["spread"]), f"{row['gflops']:.1f}",
            *(percent(row[name]) for name in ("peak_share", "products", "cells", "other", "call")),
            *(times(c.against.get(name)) for name in met), row["note"],
        ]  # fmt: skip
        yield "| " + " | ".join(columns) + " |"


def narrow(chosen: Iterable[Case]) -> Iterator[str]:
    yield "| problem | arch | threads | best peer | peer / ours | products | cells | other | call | bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    listed = [c for c in chosen if c.best and not c.best["ratio"] >= NARROW]
    for c in sorted(listed, key=lambda c: c.best["ratio"] if c.best else 0.0):
        assert c.best
        shares = " | ".join(percent(c.row[name]) for name in ("products", "cells", "other", "call"))
        yield (f"| `{c.problem}` | {c.row['arch']} | {c.row['threads']} | {c.best['against']} | "
               f"{c.best['ratio']:.2f} | {shares} | {bound(c)} |")  # fmt: skip


def walk(chosen: Iterable[Case], letter: str) -> list[Case]:
    """The problems that differ from the set's base in one size alone, in its order; one thread first."""
    rest = [name for name in "TNIH" if name != letter]
    on = [
        c for c in chosen if c.row["set"] == "scaling" and all(getattr(c.problem, r) == getattr(BASE, r) for r in rest)
    ]
    return sorted(on, key=lambda c: (c.row["threads"], getattr(c.problem, letter)))


def growth(chosen: Sequence[Case]) -> Iterator[str]:
    """How time grows with each size, from the last two that were measured on one thread."""
    for letter in "TNIH":
        line = [c for c in walk(chosen, letter) if c.row["threads"] == 1]
        if len(line) > 1:
            (a, b), size = line[-2:], [getattr(c.problem, letter) for c in line[-2:]]
            power = log(b.row["ms"] / a.row["ms"]) / log(size[1] / size[0])
            yield f"- {letter} from {size[0]} to {size[1]}: time grows as {letter}^{power:.2f}"


def log_log(panel: Any, x: Sequence[int]) -> None:
    """Both axes logarithmic, with numbers that can be read off."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set(xscale="log", yscale="log")
    panel.set_xticks(x, [str(size) for size in x])
    panel.xaxis.set_minor_locator(NullLocator())
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    )
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)


def scaling_picture(chosen: Sequence[Case]) -> Any:
    """Time against each size, ours and torch's, and the gain from threads."""
    picture = bench.figure(10, 6)
    panels = picture.subplots(2, 3).flatten()
    counts = sorted({c.row["threads"] for c in chosen if c.row["set"] == "scaling"})
    for panel, letter in zip(panels, "TNIH"):
        for threads, dash in zip(counts, ("-", "--", "-.", ":")):
            line = [c for c in walk(chosen, letter) if c.row["threads"] == threads]
            x, label = [getattr(c.problem, letter) for c in line], f"{threads} thread{'s' * (threads > 1)}"
            for party in ("ours", "torch"):
                y = [c.row["ms"] if party == "ours" else c.against.get(party, {}).get("against_ms") for c in line]
                colour, marker = bench.LOOKS[party]
                if None not in y:
                    panel.plot(x, y, dash, marker=marker, markersize=3, color=colour, label=f"{party}, {label}")
        log_log(panel, sorted({getattr(c.problem, letter) for c in walk(chosen, letter)}))
        panel.set(xlabel=letter, ylabel="ms a training step")
    if len(counts) > 1:
        for colour, H in zip(("#56B4E9", "#0072B2", "black"), (32, 128, 512)):
            line = [c for c in walk(chosen, "H") if H == c.problem.H]
            gains = [1.0 if c.row["threads"] == 1 else c.against["1 thread"]["ratio"] for c in line]
            panels[4].plot([c.row["threads"] for c in line], gains, "o-", color=colour, label=f"H = {H}")
        panels[4].plot(counts, counts, ":", color="#777777", label="ideal")
        panels[4].set(xlabel="threads", ylabel="times as fast as 1 thread", xticks=counts)
        panels[4].grid(alpha=0.3)
        panels[4].legend(fontsize=8, frameon=False)
    panels[4].set_visible(len(counts) > 1)
    panels[5].axis("off")
    panels[5].legend(*panels[0].get_legend_handles_labels(), loc="center left", fontsize=9, frameon=False)
    picture.suptitle(f"One size at a time away from {BASE}", fontsize=11)
    return picture


def memory_picture(chosen: Sequence[Case]) -> Any:
    """What a training step takes besides its arguments and weights."""
    picture = bench.figure(9, 3.4)
    for panel, letter in zip(picture.subplots(1, 2), "TH"):
        line = [c for c in walk(chosen, letter) if c.row["mb"] is not None and "torch" in c.against]
        x = [getattr(c.problem, letter) for c in line]
        for party, y in (
            ("ours", [c.row["mb"] for c in line]),
            ("torch", [c.against["torch"]["against_mb"] for c in line]),
        ):
            colour, marker = bench.LOOKS[party]
            panel.plot(x, y, marker=marker, color=colour, label=party)
        log_log(panel, x)
        panel.set(xlabel=letter, ylabel="MB a training step")
        panel.legend(fontsize=8, frameon=False)
    return picture


HEAD = """# Results

Written by `benchmarks/report.py` from [speed.csv](speed.csv); `make bench` measures and writes both. Every answer was
verified before it was timed. All parties of a row took turns, window by window, in one process, so that they met the
same machine: trust the ratios more than the times.

- *ms* median time of a problem, all of its T steps, *±* half the distance between the quartiles; *GFLOP/s* of the
  matrix products; *of peak* their share of the multiply-add rate measured between the windows, times the threads.
- *products, cells, other, call* shares of the time: in matrix products, in the cells' functions, in the rest of the
  kernels (packing, memory), outside of them (Python, allocation). With several threads, those of the first.
- Under a peer's name: its time over ours, the median over the rounds, so above 1 ours is faster. `plain` is ours on
  ordinary numbers and full sequences, `1 thread` ours on one thread. – : the peer has no such layer, or was not run.
- {rounds} rounds of windows of {window:.0f} ms or more, unless the run was told otherwise; a peer that takes long, and
  more than {slow} times as long as ours, takes part in every third.
- torch, jax and keras compute the same gradients that we do; onnxruntime runs inference in float32 alone.
"""


def modules(rows: Sequence[Row]) -> Iterator[str]:
    """gatewise.torch against torch.nn, and against the same problem on arrays."""
    chosen = cases(rows)
    met = [c for c in chosen if "torch" in c.against]
    behind = [c for c in met if not c.against["torch"]["ratio"] >= 1]
    yield "## gatewise.torch"
    yield ""
    yield ("Its modules through autograd, by `make bench ARGS=\"--party gatewise.torch\"`: torch is torch.nn, "
           "`functional` the same problem on NumPy's arrays without PyTorch.")  # fmt: skip
    yield f"torch / gatewise.torch is under 1 on {len(behind)} of {len(met)} measurements."
    yield ""
    yield from provenance(rows)
    yield ""
    yield from summary(chosen)
    yield ""
    yield from table(sorted(chosen, key=lambda c: c.row["threads"]))


def page(
    rows: Sequence[Row], pictures: Sequence[str], of_modules: Sequence[Row] = (), of_cuda: Sequence[str] = ()
) -> str:
    """The page, from the rows and the names of the pictures beside it, the rows of PyTorch's modules, and what
    cuda_page.py has to say."""
    arch, everything = main_arch(rows), cases(rows)
    mine = [c for c in everything if c.row["arch"] == arch]
    head = HEAD.format(rounds=bench.ROUNDS, window=1e3 * bench.WINDOW, slow=bench.SLOW)
    lines = [head, *provenance(rows)]
    if len({row["commit"] for row in rows}) > 1:
        lines += ["", "Not all rows are of one commit: a part was measured again, the rest kept."]
    busy = sum("busy" in c.row["note"] for c in everything)
    lines += ["", f"{busy} of {len(everything)} measurements spread by more than {bench.BUSY:.0%} and are marked busy."]
    lines += ["", "## Summary", "", f"Geometric mean (least – most) over all sets but stress and features, {arch}.", ""]
    lines += summary(mine)
    lines += ["", "![The peers' times over ours](ratio.png)"] * ("ratio.png" in pictures)
    lines += ["", "## Targets", "", "On the set grid and one thread where nothing else is said.", ""]
    lines += ["| what | target | measured | |", "|---|---|---|---|"]
    lines += [target.line() for target in targets(everything, arch)]
    lines += ["", f"## Rows under {NARROW}", "", "Against the best peer, the narrowest first.", "", *narrow(everything)]
    lines += ["", "## Scaling", ""]
    lines += ["![Time against T, N, I, H and threads](scaling.png)", ""] * ("scaling.png" in pictures)
    lines += growth(mine)
    lines += ["", "![Memory of a training step](memory.png)"] * ("memory.png" in pictures)
    lines += ["", "## Roofline", "", "![Roofline](roofline.png)", ""]
    lines += ["Above the slope: what has to move fits a cache. The slope is the copying of arrays that do not."]
    for name, group in bench.SETS.items():
        for which in [arch, *sorted({c.row["arch"] for c in everything} - {arch})]:
            chosen = [c for c in everything if (c.row["set"], c.row["arch"]) == (name, which)]
            if chosen:
                lines += [
                    "",
                    f"## {name}" + f" on {which}" * (which != arch),
                    "",
                    f"{group.origin}.",
                    "",
                    *table(chosen),
                ]
    alone = [c for c in everything if not c.row["set"]]
    lines += ["", "## Problems of no set", "", *table(alone)] * bool(alone)
    lines += ["", *modules(of_modules)] if of_modules else []
    lines += ["", *of_cuda] if of_cuda else []
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def write(folder: Path) -> Path:
    """Write README.md and the pictures beside the speed.csv of a folder."""
    rows = bench.read_csv(folder / "speed.csv")
    if not rows:
        raise ValueError(f"{folder / 'speed.csv'}: expected rows to report; it has none")
    arch = main_arch(rows)
    mine = [c for c in cases(rows) if c.row["arch"] == arch]
    drawn = [path.name for path in bench.plot([row for row in rows if row["arch"] == arch], folder)]
    for name, draw, needs in (
        ("scaling.png", scaling_picture, lambda c: True),
        ("memory.png", memory_picture, lambda c: c.row["mb"] is not None),
    ):
        if any(c.row["set"] == "scaling" and needs(c) for c in mine):
            draw(mine).savefig(folder / name, dpi=120, metadata={"Software": None})
            drawn.append(name)
    path = folder / "README.md"
    of_modules = folder / "torch_layers.csv"
    rows_of_modules = bench.read_csv(of_modules) if of_modules.exists() else ()
    path.write_text(page(rows, drawn, rows_of_modules, cuda_page.section(folder)), encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where speed.csv is")
    try:
        print(write(parser.parse_args().results))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"report: {error}")
